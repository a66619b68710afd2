"""Containers in v2 groups that boxrun makes itself: limits, life in a group, and its end."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from boxship.linux.cgroups.arrangement import Arrangement, parse_mountinfo
from support.boxrun import CGROUP, Boxrun, eventually, gone, make_rootless, membership, read
from support.machine import Bundle

pytestmark = pytest.mark.lane("plain")

MIB = 1 << 20


def resources(bundle: Bundle, **given: object) -> None:
    found = bundle.linux["resources"]
    assert isinstance(found, dict)
    found.update(given)


def disk() -> tuple[int, int]:
    """The number of the root disk, which can be throttled."""
    major, minor = read(Path("/sys/block/nvme0n1/dev")).split(":")
    return int(major), int(minor)


def test_limits_reach_the_files_as_runc_converts_them(boxrun: Boxrun, bundle: Bundle) -> None:
    major, minor = disk()
    resources(
        bundle,
        memory={"limit": 64 * MIB, "reservation": 32 * MIB, "swap": 96 * MIB},
        cpu={"shares": 512, "quota": 50000, "period": 200000, "burst": 10000, "cpus": "0", "mems": "0"},
        pids={"limit": 20},
        blockIO={
            "weight": 500, "throttleReadBpsDevice": [{"major": major, "minor": minor, "rate": 1 << 20}],
            "throttleWriteIOPSDevice": [{"major": major, "minor": minor, "rate": 100}],
        },
        hugepageLimits=[{"pageSize": "2MB", "limit": 4 * MIB}],
        unified={"memory.high": str(48 * MIB), "pids.max": "19"},
    )
    group = boxrun.cgroup(boxrun.run(bundle))
    found = {
        name: read(group / name)
        for name in (
            "memory.max", "memory.low", "memory.swap.max", "memory.high", "cpu.weight", "cpu.max", "cpu.max.burst", "cpuset.cpus",
            "cpuset.mems", "pids.max", "io.weight", "io.max", "hugetlb.2MB.max",
        )
    }
    assert found == {
        "memory.max": str(64 * MIB), "memory.low": str(32 * MIB), "memory.swap.max": str(32 * MIB),
        "memory.high": str(48 * MIB), "cpu.weight": "59", "cpu.max": "50000 200000", "cpu.max.burst": "10000",
        "cpuset.cpus": "0", "cpuset.mems": "0", "pids.max": "19", "io.weight": "default 4950",
        "io.max": f"{major}:{minor} rbps=1048576 wbps=max riops=max wiops=100", "hugetlb.2MB.max": str(4 * MIB),
    }


def test_update_changes_what_it_names_and_leaves_the_rest(boxrun: Boxrun, bundle: Bundle) -> None:
    resources(bundle, memory={"limit": 64 * MIB, "swap": 64 * MIB}, cpu={"quota": 50000, "period": 100000}, pids={"limit": 20})
    name = boxrun.run(bundle)
    group = boxrun.cgroup(name)
    assert read(group / "memory.swap.max") == "0"
    boxrun.ok("update", "--memory", "80m", "--memory-swap", "100m", name)
    assert (read(group / "memory.max"), read(group / "memory.swap.max")) == (str(80 * MIB), str(20 * MIB))
    boxrun.ok("update", "--cpu-quota", "30000", "--pids-limit", "30", "--cpuset-cpus", "0", "--cpu-share", "1024", name)
    assert read(group / "cpu.max") == "30000 100000"
    assert (read(group / "pids.max"), read(group / "cpuset.cpus"), read(group / "cpu.weight")) == ("30", "0", "100")
    boxrun.ok("update", "--memory-reservation", "16m", "--cpu-period", "50000", name)
    assert (read(group / "memory.low"), read(group / "cpu.max")) == (str(16 * MIB), "30000 50000")
    boxrun.ok("update", "--pids-limit", "-1", "--cpu-quota", "-1", name)
    assert (read(group / "pids.max"), read(group / "cpu.max")) == ("max", "max 50000")
    assert read(group / "memory.max") == str(80 * MIB)


def test_update_takes_resources_from_standard_input(boxrun: Boxrun, bundle: Bundle) -> None:
    name = boxrun.run(bundle)
    change = {"memory": {"limit": 50 * MIB, "checkBeforeUpdate": True}, "unified": {"memory.high": str(40 * MIB)}}
    command = [boxrun.exe, "update", "--resources", "-", name]
    subprocess.run(command, input=json.dumps(change), text=True, check=True)
    group = boxrun.cgroup(name)
    assert (read(group / "memory.max"), read(group / "memory.high")) == (str(50 * MIB), str(40 * MIB))
    refused = subprocess.run(
        command, input='{"memory": {"limit": 4096, "checkBeforeUpdate": true}}', text=True, capture_output=True
    )
    assert refused.returncode == 1
    assert "rejecting memory limit 4096 <= usage" in refused.stderr


def test_a_limit_without_its_controller_names_it(boxrun: Boxrun, bundle: Bundle) -> None:
    resources(bundle, unified={"nothing.max": "1"})
    done = boxrun("run", "-d", "--bundle", bundle.write(), boxrun.name())
    assert done.code == 1
    assert 'unified resource "nothing.max" can\'t be set: controller "nothing" not available' in done.err


def test_pause_stops_every_process_and_resume_continues(boxrun: Boxrun, bundle: Bundle) -> None:
    bundle.mounts.append({"destination": "/mnt", "type": "tmpfs", "source": "tmpfs"})
    bundle.shell("while :; do n=$((n+1)); echo $n > /mnt/count; done")
    name = boxrun.run(bundle)
    group = boxrun.cgroup(name)
    count = Path(f"/proc/{boxrun.pid(name)}/root/mnt/count")
    boxrun.ok("pause", name)
    assert read(group / "cgroup.freeze") == "1"
    assert "frozen 1" in read(group / "cgroup.events")
    assert boxrun.state(name)["status"] == "paused"
    before = count.read_text()
    time.sleep(0.5)
    assert count.read_text() == before
    refused = boxrun("exec", name, "true")
    assert (refused.code, "cannot exec in a paused container" in refused.err) == (255, True)
    boxrun.ok("resume", name)
    assert boxrun.state(name)["status"] == "running"
    eventually(lambda: count.read_text() not in ("", before), "it counts again")


def test_a_paused_container_can_be_killed_and_deleted(boxrun: Boxrun, bundle: Bundle) -> None:
    name = boxrun.run(bundle)
    pid, group = boxrun.pid(name), boxrun.cgroup(name)
    boxrun.ok("pause", name)
    boxrun.ok("delete", "--force", name)
    assert not group.exists()
    eventually(lambda: gone(pid), "init is gone")


def test_ps_lists_the_processes_of_groups_below_too(boxrun: Boxrun, bundle: Bundle) -> None:
    bundle.shell("sleep 1000 & sleep 1000 & wait")
    name = boxrun.run(bundle)
    eventually(lambda: len(json.loads(boxrun.ok("ps", "--format", "json", name))) == 3, "three processes")
    pids = json.loads(boxrun.ok("ps", "--format", "json", name))
    below = boxrun.cgroup(name) / "below"
    below.mkdir()
    (below / "cgroup.procs").write_text(str(pids[-1]))
    assert sorted(json.loads(boxrun.ok("ps", "--format", "json", name))) == sorted(pids)
    assert "sleep 1000" in boxrun.ok("ps", name)


def test_statistics_come_from_v2_files_under_runcs_names(boxrun: Boxrun, bundle: Bundle) -> None:
    resources(bundle, memory={"limit": 64 * MIB}, pids={"limit": 20})
    bundle.shell("head -c 1000000 /dev/zero | wc -c; sleep 1000")
    name = boxrun.run(bundle)
    event = json.loads(boxrun.ok("events", "--stats", name))
    assert (event["type"], event["id"]) == ("stats", name)
    data = event["data"]
    assert data["pids"]["limit"] == 20
    assert data["pids"]["current"] >= 1
    assert data["memory"]["usage"]["limit"] == 64 * MIB
    assert 0 < data["memory"]["usage"]["usage"] < 64 * MIB
    assert data["memory"]["raw"]["anon"] > 0
    assert data["cpu"]["usage"]["total"] > 0
    assert data["cpu"]["usage"]["total"] >= data["cpu"]["usage"]["user"]


def test_lack_of_memory_is_told_and_counted(boxrun: Boxrun, bundle: Bundle) -> None:
    resources(bundle, memory={"limit": 24 * MIB, "swap": 24 * MIB})
    name = boxrun.run(bundle)
    events = boxrun.begin("events", "--interval", "60s", name)
    time.sleep(2)
    done = boxrun("exec", name, "sh", "-c", "tail /dev/zero")
    assert done.code == 137, done
    eventually(lambda: '"type":"oom"' in events.output().replace(" ", ""), "the event comes")
    boxrun.ok("kill", name, "KILL")
    assert events.wait(20).code == 0


def test_too_little_memory_for_init_is_said(boxrun: Boxrun, bundle: Bundle) -> None:
    resources(bundle, memory={"limit": 4096, "swap": 4096})
    done = boxrun("run", "-d", "--bundle", bundle.write(), boxrun.name())
    assert done.code != 0
    assert "OOM" in done.err, done


def test_device_rules_hold(boxrun: Boxrun, bundle: Bundle) -> None:
    bundle.linux["devices"] = [
        {"path": "/dev/kmsg", "type": "c", "major": 1, "minor": 11, "fileMode": 0o666},
        {"path": "/dev/disk", "type": "b", "major": disk()[0], "minor": disk()[1], "fileMode": 0o666},
    ]
    bundle.capable("CAP_MKNOD", "CAP_DAC_OVERRIDE", "CAP_SYSLOG")
    bundle.writable()
    script = (
        "for open in '</dev/kmsg' '</dev/disk' '>/dev/disk' '</dev/zero' '</dev/k' '>/dev/null'; do"
        '  test $open = "</dev/k" && mknod /dev/k c 1 11; (eval ": $open") 2>/dev/null && echo yes || echo no; done'
    )
    first = boxrun.output(bundle, script).split()
    # Making a node is allowed, opening it is not.
    assert first == ["no", "no", "no", "yes", "no", "yes"]
    resources(bundle, devices=[
        {"allow": False, "access": "rwm"}, {"allow": True, "type": "c", "major": 1, "minor": 11, "access": "r"},
        {"allow": True, "type": "b", "major": disk()[0], "minor": disk()[1], "access": "r"},
    ])
    second = boxrun.output(bundle, script).split()
    assert second == ["yes", "yes", "no", "yes", "yes", "yes"]


def test_device_rules_outlive_an_update(boxrun: Boxrun, bundle: Bundle) -> None:
    bundle.linux["devices"] = [{"path": "/dev/kmsg", "type": "c", "major": 1, "minor": 11, "fileMode": 0o666}]
    bundle.capable("CAP_SYSLOG")
    name = boxrun.run(bundle)
    boxrun.ok("update", "--pids-limit", "30", name)
    done = boxrun("exec", "--cap", "CAP_SYSLOG", name, "sh", "-c", ": </dev/kmsg")
    assert done.code != 0
    assert "not permitted" in done.err.lower()


def test_exec_joins_the_group(boxrun: Boxrun, bundle: Bundle) -> None:
    name = boxrun.run(bundle)
    assert boxrun.shell(name, "cat /proc/self/cgroup").strip() == "0::/"
    assert read(boxrun.cgroup(name) / "cgroup.procs") == str(boxrun.pid(name))


def test_exec_follows_init_into_a_group_below(boxrun: Boxrun, bundle: Bundle) -> None:
    bundle.linux["namespaces"] = [{"type": kind} for kind in ("pid", "mount", "uts", "cgroup")]
    name = boxrun.run(bundle)
    group = boxrun.cgroup(name)
    (group / "inner").mkdir()
    (group / "inner/cgroup.procs").write_text(str(boxrun.pid(name)))
    (group / "cgroup.subtree_control").write_text("+pids")
    assert boxrun.shell(name, "cat /proc/self/cgroup").strip() == "0::/inner"
    assert boxrun.ok("exec", "--cgroup", "inner", name, "cat", "/proc/self/cgroup").strip() == "0::/inner"
    missing = boxrun("exec", "--cgroup", "none", name, "true")
    assert missing.code == 255


def test_init_is_born_in_its_group(boxrun: Boxrun, bundle: Bundle) -> None:
    # The caller's own group has no room for one more process, so nothing can be made there and moved.
    boxrun.ok("--version")
    eventually(lambda: any(path.is_socket() for path in Path("/run/boxship/warm").glob("*")), "a warm server")
    full = CGROUP / "full"
    full.mkdir()
    try:
        (full / "pids.max").write_text("1")
        name = boxrun.name()
        boxrun.ok("run", "-d", "--bundle", bundle.write(), name, into=full)
        assert boxrun.cgroup(name) != full
    finally:
        eventually(lambda: not read(full / "cgroup.procs"), "nobody is left there")
        full.rmdir()


def test_the_container_sees_its_group_as_the_root(boxrun: Boxrun, bundle: Bundle) -> None:
    resources(bundle, pids={"limit": 17})
    script = "cat /proc/self/cgroup /sys/fs/cgroup/pids.max; echo 5 >/sys/fs/cgroup/pids.max || echo refused"
    lines = boxrun.output(bundle, script).split("\n")
    assert lines[:3] == ["0::/", "17", "refused"]


def test_without_a_cgroup_namespace_the_whole_hierarchy_is_shown(boxrun: Boxrun, bundle: Bundle) -> None:
    bundle.linux["namespaces"] = [{"type": kind} for kind in ("pid", "mount", "ipc", "uts", "network")]
    resources(bundle, pids={"limit": 18})
    name = boxrun.run(bundle)
    where = boxrun.shell(name, "cat /proc/self/cgroup").strip()
    assert where == f"0::/{boxrun.cgroup(name).relative_to(CGROUP)}"
    assert boxrun.shell(name, f"cat /sys/fs/cgroup/{name}/pids.max").strip() == "18"
    # A cgroup2 file system has one set of options, and a mount from the first namespace sets them.
    assert "nsdelegate" in arrangement_now().unified_options


def test_the_path_is_as_the_configuration_says(boxrun: Boxrun, bundle: Bundle) -> None:
    bundle.linux["cgroupsPath"] = "/outer/middle/inner"
    resources(bundle, pids={"limit": 18})
    name = boxrun.run(bundle)
    assert boxrun.cgroup(name) == CGROUP / "outer/middle/inner"
    boxrun.ok("delete", "--force", name)
    assert not (CGROUP / "outer/middle/inner").exists()
    (CGROUP / "outer/middle").rmdir()
    (CGROUP / "outer").rmdir()


def test_a_group_in_use_is_refused_and_left_alone(boxrun: Boxrun, bundle: Bundle) -> None:
    taken = CGROUP / "taken"
    taken.mkdir()
    sleeper = subprocess.Popen(["sleep", "1000"])
    try:
        (taken / "cgroup.procs").write_text(str(sleeper.pid))
        bundle.linux["cgroupsPath"] = "/taken"
        done = boxrun("run", "-d", "--bundle", bundle.write(), boxrun.name())
        assert done.code == 1
        assert "container's cgroup is not empty: 1 process(es) found" in done.err
        assert sleeper.poll() is None
        assert read(taken / "cgroup.procs") == str(sleeper.pid)
    finally:
        sleeper.kill()
        sleeper.wait()
        taken.rmdir()


def test_delete_takes_groups_that_the_container_made_below(boxrun: Boxrun, bundle: Bundle) -> None:
    name = boxrun.run(bundle)
    group = boxrun.cgroup(name)
    (group / "a/b").mkdir(parents=True)
    boxrun.ok("kill", name, "KILL")
    eventually(lambda: boxrun.state(name)["status"] == "stopped", "it stops")
    boxrun.ok("delete", name)
    assert not group.exists()


def test_without_a_pid_namespace_kill_reaches_all(boxrun: Boxrun, bundle: Bundle) -> None:
    bundle.linux["namespaces"] = [{"type": kind} for kind in ("mount", "ipc", "uts", "network", "cgroup")]
    bundle.mounts[:] = [m for m in bundle.mounts if m["destination"] != "/proc"]
    bundle.mounts.append({"destination": "/proc", "type": "bind", "source": "/proc", "options": ["rbind"]})
    bundle.linux["maskedPaths"] = bundle.linux["readonlyPaths"] = []
    bundle.shell("sleep 1000 & sleep 1000 & wait")
    name = boxrun.run(bundle)
    eventually(lambda: len(json.loads(boxrun.ok("ps", "--format", "json", name))) == 3, "three processes")
    pids = json.loads(boxrun.ok("ps", "--format", "json", name))
    boxrun.ok("kill", name, "KILL")
    eventually(lambda: not read(CGROUP / name / "cgroup.procs"), "all are gone")
    assert all(gone(pid) or read(Path(f"/proc/{pid}/stat")).split()[2] == "Z" for pid in pids)


def test_a_user_with_a_delegated_group_sets_limits(bundle: Bundle, boxrun: Boxrun) -> None:
    rootless = rootless_boxrun()
    group = CGROUP / "delegated"
    try:
        for path in (group, group / "shell"):
            path.mkdir()
            (CGROUP / "cgroup.subtree_control").write_text("+memory +pids +cpu")
        (group / "cgroup.subtree_control").write_text("+memory +pids +cpu")
        for path in (group, group / "shell"):
            for name in ("", "cgroup.procs", "cgroup.subtree_control", "cgroup.threads"):
                os.chown(path / name, 1000, 1000)
        make_rootless(bundle)
        resources(bundle, memory={"limit": 32 * MIB}, pids={"limit": 16})
        bundle.linux["cgroupsPath"] = "box"
        name = rootless.run(bundle, into=group / "shell")
        found = membership(rootless.pid(name))
        assert found == group / "box"
        assert (read(found / "memory.max"), read(found / "pids.max")) == (str(32 * MIB), "16")
        inside = rootless.ok("exec", name, "sh", "-c", "cat /proc/self/cgroup; id -u", into=group / "shell")
        assert inside.split() == ["0::/", "0"]
        # From outside of what was delegated the process cannot be moved in; it runs all the same.
        assert rootless.shell(name, "cat /proc/self/cgroup; id -u").split() == ["0::/../..", "0"]
        rootless.ok("pause", name)
        rootless.ok("resume", name)
        rootless.ok("delete", "--force", name)
        assert not (group / "box").exists()
    finally:
        rootless.close()
        for path in (group / "box", group / "shell", group):
            if path.exists():
                eventually(lambda path=path: "populated 0" in read(path / "cgroup.events"), "nobody is left there")
                path.rmdir()


def test_a_user_without_delegation_gets_no_limits_and_is_told(bundle: Bundle) -> None:
    rootless = rootless_boxrun()
    make_rootless(bundle)
    try:
        assert rootless.output(bundle, "id -u").strip() == "0"
        bundle.linux["resources"] = {"memory": {"limit": 32 * MIB}}
        done = rootless("run", "--bundle", bundle.write(), rootless.name())
        assert done.code == 1
        assert "rootless needs no limits + no cgrouppath when no permission is granted for cgroups" in done.err
    finally:
        rootless.close()


def rootless_boxrun() -> Boxrun:
    """The ordinary user's boxrun."""
    runtime = Boxrun(user=1000)
    folder = Path("/run/user/1000")
    folder.mkdir(parents=True, exist_ok=True)
    os.chown(folder, 1000, 1000)
    folder.chmod(0o700)
    return runtime



def arrangement_now() -> Arrangement:
    """How cgroups are mounted at this moment."""
    return parse_mountinfo(Path("/proc/self/mountinfo").read_text())
