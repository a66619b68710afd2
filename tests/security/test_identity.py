"""Users, groups and capabilities: no spelling of an id becomes root, and none is more than it was given."""

from __future__ import annotations

import json

import pytest

from support.machine import Bundle, Machine, capability_sets


@pytest.mark.parametrize(
    "user",
    [
        "1x", "x", "", " 1", "1 ", "+1", "-1", "-0", "0x1", "1_0", "1.0", "1e3", "\uff11", "\xb2", "1:", ":1", ":", "1:x", "1:-1", "1:1:1", "root",
        "2147483648x", "4294967295", "4294967296", "4294967297", "9223372036854775808", "18446744073709551616", "18446744073709551617",
        "1:4294967295", "1:4294967296", "1\n", "\t1", "NaN",
    ],
)
def test_exec_runs_as_the_user_named_or_not_at_all(machine: Machine, bundle: Bundle, running: str, user: str) -> None:
    """CVE-2026-30892 (crun: `exec -u 1` became uid 0), CVE-2024-40635 (ids that wrap): whatever is no number is refused.

    4294967295 is (uid_t)-1, by which setresuid(2) means "as before": root.
    """
    done = machine("exec", "--user", user, running, "id")
    if user == "":  # given as nothing: the configuration's user, as without the option
        assert done.out.startswith("uid=0"), done
        return
    assert done.code == 255, (user, done)
    assert done.out == "", (user, done)


@pytest.mark.parametrize("user", ["1", "1:1", "01", "65534:65533", "2147483647", "2147483648:2147483648", "4294967294:4294967294"])
def test_exec_takes_every_id_that_there_is(machine: Machine, running: str, user: str) -> None:
    """CVE-2026-30892: the uid and gid asked for are those that the process has, above 2^31 too."""
    uid, _, gid = user.partition(":")
    out = machine.ok("exec", "--user", user, running, "cat", "/proc/self/status")
    status = dict(line.split(":\t", 1) for line in out.splitlines() if ":\t" in line)
    assert status["Uid"].split() == [str(int(uid))] * 4
    assert status["Gid"].split() == [str(int(gid or 0))] * 4


@pytest.fixture
def running(machine: Machine, bundle: Bundle) -> object:
    """A container that runs, for `exec`."""
    container = machine.name()
    machine.ok("run", "-d", "-b", bundle.write(), container)
    yield container
    machine.ok("delete", "-f", container)


@pytest.mark.parametrize("value", [-1, 4294967295, 4294967296, 2**63, 2**64, 2**64 + 1, 1.5, 1e3, "1", True, [1]])
@pytest.mark.parametrize("field", ["uid", "gid", "additionalGids", "umask"])
def test_an_id_out_of_range_in_the_configuration_is_refused(machine: Machine, bundle: Bundle, field: str, value: object) -> None:
    """CVE-2024-40635: a number that does not fit is an error, never another user."""
    if field == "umask" and value == 4294967295:
        pytest.skip("a number like others for umask(2), which takes its low bits")
    bundle.process["user"] = {"uid": 1, "gid": 1, field: [value] if field == "additionalGids" else value}
    bundle.process["args"] = ["id"]
    done = machine("run", "-b", bundle.write(), machine.name())
    assert done.code == 1, done
    assert done.out == ""
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("container", "host", "size"),
    [(0, 0, 4294967295), (0, 4294967295, 1), (0, 4294967290, 10), (4294967295, 0, 1), (0, -1, 1), (0, 0, 0), (0, 0, -1), (0, 2**32, 1), (0, 0, 2**33)],
)
def test_a_mapping_of_ids_beyond_the_last_is_refused(machine: Machine, bundle: Bundle, container: int, host: int, size: int) -> None:
    """Ids of a user namespace neither wrap nor reach -1; the whole range but that is one that can be had."""
    bundle.linux["namespaces"].append({"type": "user"})  # type: ignore[attr-defined]
    for kind in ("uidMappings", "gidMappings"):
        bundle.linux[kind] = [{"containerID": container, "hostID": host, "size": size}]
    bundle.process["args"] = ["true"]
    done = machine("run", "-b", bundle.write(), machine.name())
    assert "Traceback" not in done.err
    assert done.code == (0 if size == 4294967295 else 1), done


@pytest.mark.parametrize("uid", [0, 1000])
def test_no_capability_is_inheritable_unless_the_configuration_says_so(machine: Machine, bundle: Bundle, uid: int) -> None:
    """CVE-2022-29162 (crun 2022-27650, podman 2022-27649, moby 2022-24769): files with capabilities would give more."""
    container = machine.name()
    bundle.process["user"] = {"uid": uid, "gid": uid}
    machine.ok("run", "-d", "-b", bundle.write(), container)
    for flags in ([], ["--cap", "CAP_NET_RAW"], ["--cap", "CAP_SYS_PTRACE", "--cap", "CAP_NET_RAW"], ["--user", "5:5", "--cap", "CAP_KILL"]):
        seen = capability_sets(machine.ok("exec", *flags, container, "cat", "/proc/self/status"))
        assert seen["CapInh"] == 0, flags
        assert seen["CapAmb"] == 0, flags
    with open(f"/proc/{machine.state(container)['pid']}/status") as file:
        seen = capability_sets(file.read())
    assert seen["CapInh"] == seen["CapAmb"] == 0
    machine.ok("delete", "-f", container)


@pytest.mark.parametrize("uid", [0, 1000])
@pytest.mark.parametrize("userns", [False, True], ids=["root", "userns"])
def test_a_process_has_the_capabilities_listed_and_no_other(machine: Machine, bundle: Bundle, uid: int, userns: bool) -> None:
    """All five sets are as configured; what the runtime had is gone, also from the bounding set."""
    if userns:
        bundle.linux["namespaces"].append({"type": "user"})  # type: ignore[attr-defined]
        for kind in ("uidMappings", "gidMappings"):
            bundle.linux[kind] = [{"containerID": 0, "hostID": 0, "size": 65536}]
    bundle.process["user"] = {"uid": uid, "gid": uid}
    bundle.process["capabilities"] = {
        "bounding": ["CAP_KILL", "CAP_CHOWN"], "permitted": ["CAP_KILL"], "effective": ["CAP_KILL"], "inheritable": ["CAP_KILL"],
        "ambient": [],
    }
    bundle.process["args"] = ["cat", "/proc/self/status"]
    done = machine("run", "-b", bundle.write(), machine.name())
    assert done.code == 0, done
    seen = capability_sets(done.out)
    assert seen["CapBnd"] == 1 << 5 | 1 << 0
    assert seen["CapInh"] == 1 << 5
    assert seen["CapAmb"] == 0
    # execve(2): with no_new_privs root keeps what it had, and others have what is ambient.
    assert seen["CapPrm"] == (1 << 5 if uid == 0 else 0)


def test_a_process_of_exec_is_confined_as_its_container_is(machine: Machine, bundle: Bundle) -> None:
    """exec must not be the way around seccomp, no_new_privs or the bounding set of the configuration."""
    bundle.linux["seccomp"] = {
        "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{"names": ["mkdirat", "mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 99}],
    }
    bundle.writable()
    container = machine.name()
    machine.ok("run", "-d", "-b", bundle.write(), container)
    out = machine.ok("exec", container, "cat", "/proc/self/status")
    assert "NoNewPrivs:\t1" in out
    assert "Seccomp:\t2" in out
    assert capability_sets(out)["CapBnd"] == capability_sets(machine.ok("exec", container, "cat", "/proc/1/status"))["CapBnd"]
    assert machine("exec", container, "mkdir", "/tmp/x").code == 1
    machine.ok("delete", "-f", container)


def test_the_environment_of_the_caller_stays_outside(machine: Machine, bundle: Bundle) -> None:
    """Secrets of the runtime's own environment are not the container's, nor what the native entry adds to it."""
    bundle.process["args"] = ["env"]
    for warm in (True, False):
        out = machine.ok("run", "-b", bundle.write(), machine.name(), warm=warm, env={"SECRET": "canary", "LD_PRELOAD": ""})
        assert {line.partition("=")[0] for line in out.splitlines()} == {"PATH", "TERM", "HOME"}


@pytest.mark.parametrize("process", [{"user": {"uid": 0}}, {"user": {"uid": 4294967295, "gid": 1}}, {"capabilities": {"ambient": ["CAP_KILL"]}}])
def test_a_process_file_for_exec_is_checked_as_the_configuration_is(
    machine: Machine, bundle: Bundle, running: str, process: dict[str, object]
) -> None:
    """`exec --process`: what is missing is not filled in from the runtime, and what is out of range is refused."""
    path = bundle.path / "process.json"
    path.write_text(json.dumps({"args": ["cat", "/proc/self/status"], "cwd": "/", "env": ["PATH=/bin"], **process}))
    done = machine("exec", "--process", str(path), running)
    assert "Traceback" not in done.err
    if process.get("user", {}).get("uid"):  # type: ignore[attr-defined]
        assert done.code == 255, done
    else:
        assert capability_sets(done.out)["CapInh"] == capability_sets(done.out)["CapAmb"] == 0
