"""The systemd driver: names, and limits as unit properties."""

from __future__ import annotations

import pytest

from boxship.kit.errors import InvalidArgument
from boxship.linux.cgroups import DeviceRule, Limits
from boxship.linux.cgroups import systemd as driver
from boxship.linux.dbus import Variant

INFINITY = (1 << 64) - 1


def test_the_path_is_slice_prefix_and_name() -> None:
    unit = driver.parse_path("machine.slice:libpod:abc", "id", user=False)
    assert (unit.name, unit.slice, unit.title) == ("libpod-abc.scope", "machine.slice", "abc")
    assert driver.parse_path("", "id", user=True).slice == "user.slice"
    assert driver.parse_path(":p:n", "id", user=False).slice == "system.slice"
    assert driver.parse_path("a.slice::x.slice", "id", user=False).name == "x.slice"


def test_a_path_of_another_form_is_refused() -> None:
    for wrong in ("/a/b", "a:b", "a:b:c:d"):
        with pytest.raises(InvalidArgument, match='expected cgroupsPath to be of format "slice:prefix:name"'):
            driver.parse_path(wrong, "id", user=False)
    with pytest.raises(InvalidArgument, match="invalid unit name"):
        driver.parse_path("a.slice:p:../../x", "id", user=False)


@pytest.mark.parametrize(
    ("name", "path"),
    [("-.slice", "/"), ("a.slice", "/a.slice"), ("test-a-b.slice", "/test.slice/test-a.slice/test-a-b.slice")],
)
def test_slices_lie_in_one_another(name: str, path: str) -> None:
    assert driver.expand_slice(name) == path


@pytest.mark.parametrize("name", [".slice", "a", "a/b.slice", "a--b.slice", "-a.slice", "a-.slice", "", "../x.slice"])
def test_wrong_slices_are_refused(name: str) -> None:
    with pytest.raises(InvalidArgument, match="invalid slice name"):
        driver.expand_slice(name)


def test_limits_of_v2_become_properties() -> None:
    limits = Limits()
    limits.memory_limit, limits.memory_reservation, limits.pids_limit = 5, -1, 0
    limits.cpu_shares, limits.cpu_quota, limits.cpu_period, limits.cpu_cpus = 1024, 50500, 100000, "0,2"
    properties, quota = driver.limit_properties_v2(limits, 252, -1)
    assert dict(properties) == {
        "MemoryMax": Variant("t", 5), "MemoryLow": Variant("t", INFINITY), "MemorySwapMax": Variant("t", INFINITY),
        "TasksMax": Variant("t", 1), "CPUWeight": Variant("t", 100), "CPUQuotaPeriodUSec": Variant("t", 100000),
        "CPUQuotaPerSecUSec": Variant("t", 510000), "AllowedCPUs": Variant("ay", b"\x05"),
    }
    assert quota == 51000


def test_old_systemd_is_not_told_what_it_does_not_know() -> None:
    limits = Limits()
    limits.cpu_period, limits.cpu_cpus, limits.cpu_idle, limits.cpu_shares = 1000, "0", 1, 2
    assert dict(driver.limit_properties_v2(limits, 239, 0)[0]) == {
        "CPUWeight": Variant("t", 1), "CPUQuotaPerSecUSec": Variant("t", INFINITY),
    }
    assert ("CPUWeight", Variant("t", 0)) in driver.limit_properties_v2(limits, 252, 0)[0]


def test_limits_of_v1_become_properties() -> None:
    limits = Limits()
    limits.memory_limit, limits.cpu_shares, limits.blkio_weight, limits.pids_limit = -1, 512, 100, -1
    assert dict(driver.limit_properties_v1(limits, 252)[0]) == {
        "MemoryLimit": Variant("t", INFINITY), "CPUShares": Variant("t", 512), "BlockIOWeight": Variant("t", 100),
        "TasksMax": Variant("t", INFINITY),
    }


def test_device_rules_become_an_allow_list() -> None:
    limits = Limits()
    limits.devices = [
        DeviceRule(False), DeviceRule(True, "c", 1, 3, "rwm"), DeviceRule(True, "b", -1, -1, "m"),
        DeviceRule(True, "c", 136, -1, "rw"), DeviceRule(True, "c", -1, 5, "r"),
    ]
    assert driver.limit_properties_v2(limits, 252, 0)[0] == [
        ("DeviceAllow", Variant("a(ss)", [])), ("DevicePolicy", Variant("s", "strict")),
        ("DeviceAllow", Variant("a(ss)", [("/dev/char/1:3", "rwm"), ("block-*", "m"), ("char-136", "rw")])),
    ]
    limits.devices = [DeviceRule(True)]
    assert driver.limit_properties_v2(limits, 252, 0)[0] == [
        ("DeviceAllow", Variant("a(ss)", [])), ("DevicePolicy", Variant("s", "auto")),
    ]


def test_unified_files_become_properties_where_there_are_some() -> None:
    unified = {
        "memory.max": " max\n", "memory.low": "5", "pids.max": "0", "cpu.max": "50000 100000", "cpuset.cpus": "1",
        "cpu.weight": "7", "memory.oom.group": "1", "hugetlb.2MB.max": "1",
    }
    assert dict(driver.unified_properties(unified, 252)) == {
        "MemoryMax": Variant("t", INFINITY), "MemoryLow": Variant("t", 5), "TasksMax": Variant("t", 1),
        "CPUQuotaPeriodUSec": Variant("t", 100000), "CPUQuotaPerSecUSec": Variant("t", 500000),
        "AllowedCPUs": Variant("ay", b"\x02"), "CPUWeight": Variant("t", 7),
    }
    assert driver.oom_policy(unified, 253) == [("OOMPolicy", Variant("s", "kill"))]
    assert driver.oom_policy(unified, 252) == []
    for wrong in ({"a/b.c": "1"}, {"nodot": "1"}, {"memory.max": "x"}, {"cpu.max": "1 2 3"}, {"cpuset.cpus": ""}):
        with pytest.raises(InvalidArgument):
            driver.unified_properties(wrong, 252)


def test_properties_come_from_annotations() -> None:
    assert driver.annotated_properties({
        "org.systemd.property.TimeoutStopUSec": "uint64 123456789", "org.systemd.property.TimeoutStartSec": "5",
        "org.systemd.property.CollectMode": "'inactive-or-failed'", "other": "x",
    }) == [
        ("TimeoutStopUSec", "t", 123456789), ("TimeoutStartUSec", "t", 5000000), ("CollectMode", "s", "inactive-or-failed"),
    ]
    for name, value, text in (
        ("X", "1", "name incorrect: too short"), ("Exec-Start", "1", "contains non-alphabetic character"),
        ("Collect", "'a", "value parse error"), ("TimeoutStopSec", "'a'", "not a number"),
    ):
        with pytest.raises(InvalidArgument, match=text):
            driver.annotated_properties({"org.systemd.property." + name: value})
