"""Containers in scopes that systemd makes, of the machine's own and of a user's."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.boxrun import CGROUP, Boxrun, eventually, make_rootless, membership, open_to_all, read, said
from support.machine import Bundle

pytestmark = pytest.mark.lane("systemd")

MIB = 1 << 20
PREFIX, TITLE = ("runc", "libcontainer") if os.environ.get("BOXSHIP_GUEST_RUNTIME") == "runc" else ("boxrun", "boxrun")


@pytest.fixture
def boxrun() -> Iterator[Boxrun]:
    """The runtime under test with the systemd driver."""
    runtime = Boxrun("--systemd-cgroup")
    yield runtime
    left = runtime.close()
    left += [line for line in said("systemctl", "list-units", "--all", "--plain", "--no-legend").split("\n") if f"{PREFIX}-t" in line]
    assert not left, left


@pytest.fixture
def user() -> Iterator[Boxrun]:
    """The same for an ordinary user with a systemd of his own."""
    said("loginctl", "enable-linger", "user")
    eventually(Path("/run/user/1000/bus").exists, "the user's bus", 60)
    runtime = Boxrun("--systemd-cgroup", user=1000)
    yield runtime
    left = runtime.close()
    assert not left, left


def properties(unit: str, *names: str) -> dict[str, str]:
    """Of a unit, as systemctl shows them."""
    shown = said("systemctl", "show", unit, *(word for name in names for word in ("-p", name)))
    return dict(line.split("=", 1) for line in shown.split("\n") if line)


def scope(name: str) -> str:
    """The unit of a container that names none."""
    return f"{PREFIX}-{name}.scope"


def limit(bundle: Bundle, **given: object) -> None:
    found = bundle.linux["resources"]
    assert isinstance(found, dict)
    found.update(given)


def test_the_container_is_a_scope_with_its_limits(boxrun: Boxrun, bundle: Bundle) -> None:
    limit(
        bundle, memory={"limit": 64 * MIB, "reservation": 32 * MIB, "swap": 96 * MIB},
        cpu={"shares": 512, "quota": 50000, "period": 200000, "cpus": "0", "mems": "0"}, pids={"limit": 20},
        unified={"memory.high": str(48 * MIB)},
    )
    name = boxrun.run(bundle)
    shown = properties(
        scope(name), "MemoryMax", "MemoryLow", "MemorySwapMax", "MemoryHigh", "CPUWeight", "CPUQuotaPerSecUSec",
        "CPUQuotaPeriodUSec", "AllowedCPUs", "AllowedMemoryNodes", "TasksMax", "Delegate", "Slice", "ActiveState", "Description",
        "ControlGroup", "DefaultDependencies",
    )
    assert shown == {
        "MemoryMax": str(64 * MIB), "MemoryLow": str(32 * MIB), "MemorySwapMax": str(32 * MIB), "MemoryHigh": str(48 * MIB),
        "CPUWeight": "59", "CPUQuotaPerSecUSec": "250ms", "CPUQuotaPeriodUSec": "200ms", "AllowedCPUs": "0",
        "AllowedMemoryNodes": "0", "TasksMax": "20", "Delegate": "yes", "Slice": "system.slice", "ActiveState": "active",
        "Description": f"{TITLE} container {name}", "ControlGroup": f"/system.slice/{scope(name)}", "DefaultDependencies": "no",
    }
    group = boxrun.cgroup(name)
    assert group == CGROUP / "system.slice" / scope(name)
    found = [read(group / file) for file in ("memory.max", "memory.swap.max", "cpu.max", "cpu.weight", "pids.max", "cpuset.cpus")]
    assert found == [str(64 * MIB), str(32 * MIB), "50000 200000", "59", "20", "0"]


def test_update_changes_the_unit_and_the_files(boxrun: Boxrun, bundle: Bundle) -> None:
    limit(bundle, memory={"limit": 64 * MIB, "swap": 64 * MIB}, pids={"limit": 20})
    name = boxrun.run(bundle)
    change = ["--memory", "80m", "--memory-swap", "100m", "--pids-limit", "30", "--cpu-quota", "30000", "--cpu-period", "100000"]
    boxrun.ok("update", *change, "--cpu-share", "2048", "--cpuset-cpus", "0", name)
    shown = properties(scope(name), "MemoryMax", "MemorySwapMax", "TasksMax", "CPUQuotaPerSecUSec", "CPUWeight", "AllowedCPUs")
    assert shown == {
        "MemoryMax": str(80 * MIB), "MemorySwapMax": str(20 * MIB), "TasksMax": "30", "CPUQuotaPerSecUSec": "300ms",
        "CPUWeight": "174", "AllowedCPUs": "0",
    }
    group = boxrun.cgroup(name)
    found = [read(group / file) for file in ("memory.max", "memory.swap.max", "pids.max", "cpu.max", "cpu.weight")]
    assert found == [str(80 * MIB), str(20 * MIB), "30", "30000 100000", "174"]
    boxrun.ok("update", "--memory", "-1", "--memory-swap", "-1", "--pids-limit", "-1", name)
    assert properties(scope(name), "MemoryMax", "TasksMax") == {"MemoryMax": "infinity", "TasksMax": "infinity"}
    assert (read(group / "memory.max"), read(group / "pids.max")) == ("max", "max")


def test_slice_prefix_and_name_come_from_the_path(boxrun: Boxrun, bundle: Bundle) -> None:
    bundle.linux["cgroupsPath"] = "machine-inner.slice:libpod:abc"
    name = boxrun.run(bundle)
    assert boxrun.cgroup(name) == CGROUP / "machine.slice/machine-inner.slice/libpod-abc.scope"
    assert properties("libpod-abc.scope", "Slice", "Description") == {
        "Slice": "machine-inner.slice", "Description": f"{TITLE} container abc"
    }
    boxrun.ok("delete", "--force", name)
    assert properties("libpod-abc.scope", "LoadState") == {"LoadState": "not-found"}


def test_a_path_of_another_form_is_refused(boxrun: Boxrun, bundle: Bundle) -> None:
    bundle.linux["cgroupsPath"] = "/some/path"
    done = boxrun("run", "-d", "--bundle", bundle.write(), boxrun.name())
    assert done.code == 1
    assert 'expected cgroupsPath to be of format "slice:prefix:name" for systemd cgroups, got "/some/path" instead' in done.err


def test_annotations_become_properties(boxrun: Boxrun, bundle: Bundle) -> None:
    bundle.spec["annotations"] = {
        "org.systemd.property.TimeoutStopUSec": "uint64 123000000", "org.systemd.property.CollectMode": "'inactive-or-failed'",
    }
    name = boxrun.run(bundle)
    assert properties(scope(name), "TimeoutStopUSec", "CollectMode") == {
        "TimeoutStopUSec": "2min 3s", "CollectMode": "inactive-or-failed"
    }
    bundle.spec["annotations"] = {"org.systemd.property.Bad": "no variant"}
    done = boxrun("run", "-d", "--bundle", bundle.write(), boxrun.name())
    assert done.code == 1
    assert "org.systemd.property.Bad" in done.err


def test_create_start_exec_pause_and_delete(boxrun: Boxrun, bundle: Bundle) -> None:
    name = boxrun.name()
    boxrun.ok("create", "--bundle", bundle.write(), name)
    assert boxrun.state(name)["status"] == "created"
    assert properties(scope(name), "ActiveState") == {"ActiveState": "active"}
    boxrun.ok("start", name)
    assert boxrun.shell(name, "cat /proc/self/cgroup").strip() == "0::/"
    boxrun.ok("pause", name)
    assert boxrun.state(name)["status"] == "paused"
    assert read(boxrun.cgroup(name) / "cgroup.freeze") == "1"
    boxrun.ok("resume", name)
    assert len(json.loads(boxrun.ok("ps", "--format", "json", name))) == 1
    assert json.loads(boxrun.ok("events", "--stats", name))["data"]["pids"]["current"] == 1
    group = boxrun.cgroup(name)
    boxrun.ok("kill", name, "KILL")
    eventually(lambda: boxrun.state(name)["status"] == "stopped", "it stops")
    boxrun.ok("delete", name)
    assert not group.exists()
    assert properties(scope(name), "LoadState") == {"LoadState": "not-found"}


def test_a_command_in_the_foreground_leaves_nothing(boxrun: Boxrun, bundle: Bundle) -> None:
    limit(bundle, pids={"limit": 9})
    script = "cat /proc/self/cgroup /sys/fs/cgroup/pids.max"
    assert boxrun.output(bundle, script).split() == ["0::/", "9"]
    assert properties(scope(boxrun.names[-1]), "LoadState") == {"LoadState": "not-found"}


def test_device_rules_hold_also_when_systemd_reloads(boxrun: Boxrun, bundle: Bundle) -> None:
    bundle.linux["devices"] = [
        {"path": "/dev/kmsg", "type": "c", "major": 1, "minor": 11, "fileMode": 0o666},
        {"path": "/dev/hwrng", "type": "c", "major": 10, "minor": 183, "fileMode": 0o666},
    ]
    bundle.capable("CAP_SYSLOG")
    limit(bundle, devices=[{"allow": False, "access": "rwm"}, {"allow": True, "type": "c", "major": 1, "minor": 11, "access": "r"}])
    name = boxrun.run(bundle)
    shown = properties(scope(name), "DevicePolicy", "DeviceAllow")
    assert shown["DevicePolicy"] == "strict"
    assert "/dev/char/1:11 r" in shown["DeviceAllow"]
    script = (
        "for open in '</dev/kmsg' '>/dev/kmsg' '</dev/hwrng' '</dev/zero'; do"
        " (eval \": $open\") 2>&1 | grep -q permitted && echo no || echo yes; done"
    )
    expected = ["yes", "no", "no", "yes"]
    def opened() -> list[str]:
        return boxrun.ok("exec", "--cap", "CAP_SYSLOG", name, "sh", "-c", script).split()

    assert opened() == expected
    said("systemctl", "daemon-reload")
    assert opened() == expected
    boxrun.ok("update", "--pids-limit", "30", name)
    assert opened() == expected


def test_a_scope_of_that_name_that_runs_is_left_alone(boxrun: Boxrun, bundle: Bundle) -> None:
    name = boxrun.name()
    sleeper = subprocess.Popen(["systemd-run", "--quiet", "--scope", "--unit", scope(name), "sleep", "1000"])
    try:
        eventually(lambda: properties(scope(name), "ActiveState") == {"ActiveState": "active"}, "the scope is there")
        done = boxrun("run", "-d", "--bundle", bundle.write(), name)
        assert done.code == 1
        assert sleeper.poll() is None
        assert properties(scope(name), "ActiveState") == {"ActiveState": "active"}
    finally:
        said("systemctl", "stop", scope(name))
        sleeper.wait()


def test_a_failed_create_leaves_no_unit(boxrun: Boxrun, bundle: Bundle) -> None:
    bundle.process["args"] = ["/no/such/program"]
    name = boxrun.name()
    assert boxrun("run", "-d", "--bundle", bundle.write(), name).code != 0
    assert properties(scope(name), "LoadState") == {"LoadState": "not-found"}


def test_the_group_belongs_to_root_of_the_user_namespace(boxrun: Boxrun, bundle: Bundle) -> None:
    bundle.linux["namespaces"] = [*bundle.linux["namespaces"], {"type": "user"}]  # type: ignore[misc]
    for kind in ("uidMappings", "gidMappings"):
        bundle.linux[kind] = [{"containerID": 0, "hostID": 100000, "size": 65536}]
    for mount in bundle.mounts:
        if mount["destination"] == "/sys/fs/cgroup":
            mount["options"] = ["nosuid", "noexec", "nodev", "relatime"]
    open_to_all(bundle)
    name = boxrun.run(bundle)
    made = "mkdir /sys/fs/cgroup/below && echo 1 >/sys/fs/cgroup/below/cgroup.procs && cat /proc/self/cgroup"
    boxrun.shell(name, made)
    assert (boxrun.cgroup(name).name, os.stat(boxrun.cgroup(name)).st_uid) == ("below", 100000)
    refused = boxrun("exec", name, "sh", "-c", "echo max >/sys/fs/cgroup/memory.max")
    assert refused.code != 0


def test_a_user_gets_a_scope_of_his_own_systemd(user: Boxrun, bundle: Bundle) -> None:
    make_rootless(bundle)
    limit(bundle, memory={"limit": 32 * MIB}, pids={"limit": 16})
    name = user.run(bundle)
    group = membership(user.pid(name))
    assert group == CGROUP / "user.slice/user-1000.slice/user@1000.service/user.slice" / scope(name)
    assert (read(group / "memory.max"), read(group / "pids.max")) == (str(32 * MIB), "16")
    shown = as_user("systemctl", "--user", "show", scope(name), "-p", "MemoryMax", "-p", "TasksMax")
    assert sorted(shown.split()) == [f"MemoryMax={32 * MIB}", "TasksMax=16"]
    assert user.shell(name, "cat /proc/self/cgroup; id -u").split() == ["0::/", "0"]
    user.ok("update", "--memory", "40m", name)
    assert read(group / "memory.max") == str(40 * MIB)
    user.ok("pause", name)
    assert user.state(name)["status"] == "paused"
    user.ok("resume", name)
    user.ok("delete", "--force", name)
    assert not group.exists()
    assert as_user("systemctl", "--user", "show", scope(name), "-p", "LoadState") == "LoadState=not-found"


def test_a_user_makes_groups_himself_in_what_systemd_delegates(user: Boxrun, bundle: Bundle) -> None:
    make_rootless(bundle)
    limit(bundle, memory={"limit": 32 * MIB}, pids={"limit": 16})
    bundle.linux["cgroupsPath"] = "box"
    user.before = []
    name = user.name()
    command = f"exec {user.exe} run -d --bundle {bundle.write()} {name} >/dev/null 2>&1"
    as_user("systemd-run", "--user", "--scope", "--quiet", "-p", "Delegate=yes", "sh", "-c", command)
    group = membership(user.pid(name))
    assert group.name == "box"
    assert group.is_relative_to(CGROUP / "user.slice/user-1000.slice/user@1000.service")
    assert (read(group / "memory.max"), read(group / "pids.max")) == (str(32 * MIB), "16")
    user.ok("delete", "--force", name)
    assert not group.exists()


def as_user(*words: str) -> str:
    """What a command of the ordinary user's prints; it must succeed."""
    environ = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/home/user", "XDG_RUNTIME_DIR": "/run/user/1000"}
    environ["DBUS_SESSION_BUS_ADDRESS"] = "unix:path=/run/user/1000/bus"
    done = subprocess.run(
        words, env=environ, user=1000, group=1000, extra_groups=[], stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=60,
    )
    assert done.returncode == 0, done
    return done.stdout.strip()

