"""Resources: from config.json to limits."""

from __future__ import annotations

import pytest

from boxship.kit.errors import BoxshipError, InvalidArgument
from boxship.oci.config import Resources
from boxship.runtime.command.update import ram_in_bytes, resources_from_flags
from boxship.runtime.resources import device_rules, limits, warnings


def resources(**members: object) -> Resources:
    return Resources.decode(members, "")


def test_every_member_arrives() -> None:
    result = limits(resources(
        memory={
            "limit": 1, "reservation": 2, "swap": 3, "kernel": 4, "kernelTCP": 5, "swappiness": 6, "disableOOMKiller": True,
            "useHierarchy": True, "checkBeforeUpdate": True,
        },
        cpu={
            "shares": 1024, "quota": 2, "burst": 3, "period": 4, "realtimeRuntime": 5, "realtimePeriod": 6, "cpus": "0",
            "mems": "1", "idle": 1,
        },
        pids={"limit": 7},
        blockIO={
            "weight": 10, "leafWeight": 11, "weightDevice": [{"major": 8, "minor": 0, "weight": 12, "leafWeight": 13}],
            "throttleReadBpsDevice": [{"major": 8, "minor": 1, "rate": 1}],
            "throttleWriteBpsDevice": [{"major": 8, "minor": 1, "rate": 2}],
            "throttleReadIOPSDevice": [{"major": 8, "minor": 1, "rate": 3}],
            "throttleWriteIOPSDevice": [{"major": 8, "minor": 1, "rate": 4}],
        },
        hugepageLimits=[{"pageSize": "2MB", "limit": 9}],
        network={"classID": 5, "priorities": [{"name": "eth0", "priority": 6}]},
        rdma={"mlx5_1": {"hcaHandles": 3, "hcaObjects": 4}},
        unified={"memory.high": "max"},
    ))
    left_alone = [name for name in type(result).__slots__ if not getattr(result, name)]
    assert left_alone == []
    assert (result.memory_swap, result.cpu_realtime_period, result.pids_limit) == (3, 6, 7)
    assert result.blkio_weight_device == [(8, 0, 12, 13)]
    assert result.blkio_throttle_write_iops == [(8, 1, 4)]
    assert (result.hugepages, result.net_priorities, result.rdma) == ([("2MB", 9)], [("eth0", 6)], {"mlx5_1": (3, 4)})


def test_without_resources_there_are_still_device_rules() -> None:
    result = limits(None)
    assert result.wanted() == []
    assert result.devices is not None
    assert str(result.devices[0]) == "c *:* m"


def test_an_update_leaves_devices_alone() -> None:
    assert limits(resources(devices=[{"allow": False, "access": "rwm"}]), devices=False).devices is None


def test_default_devices_come_after_the_configured_ones() -> None:
    fuse = {"allow": True, "type": "c", "major": 10, "minor": 229, "access": "rw"}
    configured = resources(devices=[{"allow": False, "access": "rwm"}, fuse])
    rules = [str(rule) for rule in device_rules(configured.devices)]
    assert rules[:3] == ["a *:* rwm", "c 10:229 rw", "c *:* m"]
    assert "c 1:3 rwm" in rules


def test_a_node_that_is_configured_has_no_default_rule() -> None:
    rules = [str(rule) for rule in device_rules([], ["/dev/null", "/dev/fuse"])]
    assert "c 1:3 rwm" not in rules
    assert "c 1:5 rwm" in rules


def test_a_rule_without_access_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="device access at 1 field cannot be empty"):
        device_rules(resources(devices=[{"allow": False, "access": "r"}, {"allow": True}]).devices)


def test_kernel_memory_is_warned_of() -> None:
    assert warnings(None) == []
    assert warnings(resources(memory={"limit": 5})) == []
    assert warnings(resources(memory={"kernel": 5})) == ["Kernel memory settings are ignored and will be removed"]


# --- update ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [("5", 5), ("5b", 5), ("1k", 1024), ("2KB", 2048), ("1.5kib", 1536), ("1 m", 1 << 20), ("1G", 1 << 30), ("0", 0)],
)
def test_sizes_are_powers_of_1024(text: str, size: int) -> None:
    assert ram_in_bytes(text) == size


@pytest.mark.parametrize("text", ["", "m", "-1", "1x", "1bb", "1kbb", "1 2", "nan", "inf", "1e400", "1mib2"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="invalid s"):
        ram_in_bytes(text)


def test_flags_of_update_become_resources() -> None:
    assert resources_from_flags({
        "memory": "64m", "memory-swap": "-1", "memory-reservation": "", "cpu-quota": "-1", "cpu-period": "5", "pids-limit": 0,
        "cpuset-cpus": "0-1", "blkio-weight": 0, "cpu-idle": "1", "resources": "", "l3-cache-schema": "",
    }) == {
        "memory": {"limit": 64 << 20, "swap": -1}, "cpu": {"quota": -1, "period": 5, "cpus": "0-1", "idle": 1},
        "pids": {"limit": 0},
    }


@pytest.mark.parametrize(
    ("flag", "value", "text"),
    [
        ("cpu-period", "x", 'invalid value for cpu-period: strconv.ParseUint: parsing "x": invalid syntax'),
        ("cpu-period", "-5", 'invalid value for cpu-period: strconv.ParseUint: parsing "-5": invalid syntax'),
        ("cpu-quota", "9" * 20, f'invalid value for cpu-quota: strconv.ParseInt: parsing "{"9" * 20}": value out of range'),
        ("memory", "5x", "invalid value for memory: invalid s"),
        ("l3-cache-schema", "L3:0=f", "Intel RDT/CAT: l3 cache schema is not enabled"),
    ],
)
def test_wrong_values_of_update_are_named(flag: str, value: str, text: str) -> None:
    with pytest.raises(BoxshipError) as caught:
        resources_from_flags({flag: value})
    assert str(caught.value).startswith(text)
