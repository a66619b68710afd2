"""exec: a second process in a container that runs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from support.machine import Bundle, Machine, capability_sets

Ask = Callable[[Callable[[], object]], object]


def test_it_shares_the_containers_namespaces_and_its_cgroup(machine: Machine, running: str, way: bool) -> None:
    pid = machine.state(running)["pid"]
    kinds = ("pid", "mnt", "net", "uts", "ipc")
    done = machine("exec", running, "sh", "-c", "; ".join(f"readlink /proc/self/ns/{kind}" for kind in kinds), warm=way)
    assert done.code == 0, done
    # `readlink` is a child, in the same namespaces.
    assert done.out.split() == [os.readlink(f"/proc/{pid}/ns/{kind}") for kind in kinds]
    groups = machine.ok("exec", running, "cat", "/proc/self/cgroup", warm=way)
    assert sorted(groups.splitlines()) == sorted(machine.ok("exec", running, "cat", "/proc/1/cgroup", warm=way).splitlines())


@pytest.mark.parametrize(("script", "code"), [("true", 0), ("exit 7", 7), ("kill -9 $$", 137), ("kill -15 $$", 143)])
def test_its_exit_status_is_the_programs(machine: Machine, running: str, way: bool, script: str, code: int) -> None:
    assert machine("exec", running, "sh", "-c", script, warm=way).code == code


def test_failures_of_its_own_are_255(machine: Machine, running: str) -> None:
    missing = machine("exec", running, "/no/such")
    assert missing.code == 255 and "/no/such" in missing.err and "no such file or directory" in missing.err
    nobody = machine("exec", machine.name(), "true")
    assert nobody.code == 255 and "exec failed: container does not exist" in nobody.err


def test_a_container_that_is_not_running_takes_no_process(machine: Machine, running: str, eventually: Ask) -> None:
    machine.ok("kill", running, "KILL")
    eventually(lambda: machine.state(running)["status"] == "stopped")
    refused = machine("exec", running, "true")
    assert refused.code == 255 and "cannot exec in a stopped container" in refused.err


def test_flags_stand_in_for_the_configuration(machine: Machine, bundle: Bundle, box: str) -> None:
    bundle.process["env"] = ["PATH=/bin", "FROM=config"]
    bundle.process["user"] = {"uid": 0, "gid": 0, "additionalGids": [5]}
    (bundle.rootfs / "work").mkdir()
    machine.ok("run", "--detach", "--bundle", bundle.write(), box)
    done = machine.ok(
        "exec", "--cwd", "/work", "--env", "ADDED=by flag", "-e", "FROM=flag", "--user", "1000:1001", "--additional-gids", "7", "-g", "8",
        box, "sh", "-c", "pwd; echo $ADDED, $FROM; id -u; id -g; id -G; grep NoNewPrivs /proc/self/status",
    )
    lines = done.splitlines()
    assert lines[0] == "/work" and lines[1] == "by flag, flag"
    assert lines[2:4] == ["1000", "1001"] and set(lines[4].split()) == {"1001", "5", "7", "8"}
    assert lines[5].split() == ["NoNewPrivs:", "1"]
    plain = machine.ok("exec", box, "sh", "-c", "pwd; echo $FROM; id -u").split()
    assert plain == ["/", "config", "0"]
    off = machine.ok("exec", "--no-new-privs=false", box, "grep", "NoNewPrivs", "/proc/self/status")
    assert off.split() == ["NoNewPrivs:", "0"]


@pytest.mark.parametrize("user", ["1x", "-1", "4294967296", "root", "1:", "1:x"])
def test_a_user_that_is_no_number_is_refused(machine: Machine, running: str, user: str) -> None:
    refused = machine("exec", "--user", user, running, "id", "-u")
    assert refused.code == 255, refused
    assert refused.out == ""


def test_a_capability_is_added_but_never_inheritable(machine: Machine, running: str) -> None:
    def sets(*flags: str) -> dict[str, int]:
        return capability_sets(machine.ok("exec", *flags, running, "grep", "Cap", "/proc/self/status"))

    before, after = sets(), sets("--cap", "CAP_SYS_TIME")
    assert after["CapEff"] == before["CapEff"] | 1 << 25 and after["CapBnd"] == before["CapBnd"] | 1 << 25
    assert after["CapInh"] == 0 and after["CapAmb"] == 0


def test_a_process_file_says_everything(machine: Machine, running: str, tmp_path: Path, way: bool) -> None:
    path = tmp_path / "process.json"
    process = {
        "args": ["sh", "-c", "id -u; umask; ulimit -c; echo $A; cat /proc/self/oom_score_adj"], "cwd": "/tmp", "env": ["A=b", "PATH=/bin"],
        "user": {"uid": 33, "gid": 34, "umask": 0o27}, "rlimits": [{"type": "RLIMIT_CORE", "soft": 0, "hard": 0}],
        "oomScoreAdj": 500,
    }
    path.write_text(json.dumps(process))
    done = machine("exec", "--process", str(path), running, warm=way)
    assert done.code == 0, done
    assert done.out.split() == ["33", "0027", "0", "b", "500"]


def test_standard_streams_are_the_callers(machine: Machine, running: str, tmp_path: Path, way: bool) -> None:
    (tmp_path / "in").write_text("some words\n")
    with open(tmp_path / "in") as given:
        done = machine("exec", running, "sh", "-c", "tr a-z A-Z; echo oops >&2", warm=way, stdin=given)
    assert (done.out, done.err) == ("SOME WORDS\n", "oops\n")


def test_a_terminal_of_the_callers_own(machine: Machine, running: str, way: bool) -> None:
    ours, theirs = os.openpty()
    try:
        command = machine.begin(
            "exec", "--tty", running, "sh", "-c", "test -t 0 && test -t 1 && exit 9", warm=way, stdin=theirs, stdout=theirs, stderr=theirs
        )
        assert command.wait().code == 9
    finally:
        os.close(ours)
        os.close(theirs)


def test_detached_it_returns_at_once_and_goes_on(machine: Machine, running: str, eventually: Ask) -> None:
    machine.ok("exec", "--detach", running, "sh", "-c", "sleep 0.2; touch /tmp/late; exec sleep 1000", timeout=10)
    eventually(lambda: machine("exec", running, "test", "-e", "/tmp/late").code == 0)


def test_in_a_paused_container_it_waits_when_told_so(machine: Machine, running: str) -> None:
    machine.ok("pause", running)
    command = machine.begin("exec", "--ignore-paused", running, "echo", "woke")
    try:
        assert machine.state(running)["status"] == "paused"
        machine.ok("resume", running)
        done = command.wait(20)
        assert (done.code, done.out) == (0, "woke\n")
    finally:
        machine("resume", running)


def test_it_enters_a_sub_cgroup(machine: Machine, running: str) -> None:
    controllers = [c for c in ("memory", "pids") if os.path.isdir(f"/sys/fs/cgroup/{c}")]
    if not controllers:
        pytest.skip("no v1 hierarchy")
    pid = machine.state(running)["pid"]
    own = {line.split(":")[1]: line.strip().split(":")[2] for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()}
    path = f"/sys/fs/cgroup/pids{own['pids']}"
    os.mkdir(f"{path}/sub")
    done = machine("exec", "--cgroup", "pids:sub", running, "cat", "/proc/self/cgroup")
    assert done.code == 0, done
    # In a cgroup namespace the container's own is the root.
    assert [line.split(":")[2] for line in done.out.splitlines() if line.split(":")[1] == "pids"] in (["/sub"], [f"{own['pids']}/sub"])
    refused = machine("exec", "--cgroup", "pids:nosuch", running, "true")
    assert refused.code == 255, refused
    refused = machine("exec", "--cgroup", "a", "--cgroup", "b", running, "true")
    assert refused.code == 255 and "invalid --cgroup argument" in refused.err


def test_a_working_folder_outside_is_refused(machine: Machine, running: str) -> None:
    """CVE-2024-21626: a descriptor of the host's must not become the working folder."""
    for number in range(3, 20):
        refused = machine("exec", "--cwd", f"/proc/self/fd/{number}", running, "pwd")
        assert refused.code == 255, (number, refused)
