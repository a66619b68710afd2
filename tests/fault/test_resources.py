"""A full disk, a read-only folder, no memory, no descriptors: an error that says so, and nothing left behind."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.machine import Bundle, Done, Look, Machine


@pytest.fixture
def small(machine: Machine) -> Iterator[str]:
    """A state folder on a file system of its own, 1 MB to begin with."""
    machine.host("mkdir", "-p", "/run/small")
    machine.host("mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "small", "/run/small")
    yield "/run/small"
    machine.host("umount", "/run/small")
    machine.host("rmdir", "/run/small")


def orderly(done: Done) -> None:
    """Either it worked, or it says in a line what did not."""
    assert "Traceback" not in done.err and "internal error" not in done.err, done
    assert done.code == 0 or done.err.strip(), done


def left_in(machine: Machine, folder: str) -> list[str]:
    return [name for name in os.listdir(machine.root + folder) if name != "@seccomp"]


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
@pytest.mark.parametrize("what", ["blocks", "inodes"])
def test_on_a_full_disk_create_leaves_nothing(machine: Machine, bundle: Bundle, small: str, what: str, warm: bool) -> None:
    """Room for nothing, for the first file, for the second, and so on until there is enough for all."""
    path = bundle.write()
    machine.warm_up()
    before = machine.look()
    outcomes = []
    for room in range(1, 30):
        option = f"size={room * 4096}" if what == "blocks" else f"size=1m,nr_inodes={room}"
        machine.host("mount", "-o", f"remount,{option}", "/run/small")
        container = machine.name()
        done = machine("--root", small, "create", "-b", path, container, warm=warm)
        orderly(done)
        outcomes.append(done.code)
        if done.code == 0:
            orderly(machine("--root", small, "start", container, warm=warm))
            machine.ok("--root", small, "delete", "--force", container, warm=warm)
            break
        assert not left_in(machine, small), room
    assert outcomes[0] == 1 and outcomes[-1] == 0
    assert not [item for item in machine.left(before, 1) if "/run/small" not in item]


def test_when_the_disk_fills_up_a_container_can_still_be_used_and_deleted(machine: Machine, bundle: Bundle, small: str) -> None:
    """No block is free any more: state, exec, kill, start and delete need none."""
    path = bundle.write()
    running, created = machine.name(), machine.name()
    machine.ok("--root", small, "run", "-d", "-b", path, running)
    machine.ok("--root", small, "create", "-b", path, created)
    filler = Path(f"{machine.root}{small}/@filler")
    with open(filler, "wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(bytes(4096))
    assert json.loads(machine.ok("--root", small, "state", running))["status"] == "running"
    assert len(json.loads(machine.ok("--root", small, "list", "-f", "json"))) == 2
    assert machine.ok("--root", small, "exec", running, "echo", "fine") == "fine\n"
    machine.ok("--root", small, "start", created)
    assert json.loads(machine.ok("--root", small, "state", created))["status"] == "running"
    machine.ok("--root", small, "pause", running)
    machine.ok("--root", small, "resume", running)
    machine.ok("--root", small, "kill", running, "KILL")
    for container in (running, created):
        machine.ok("--root", small, "delete", "--force", container)
    filler.unlink()
    assert not left_in(machine, small)


def test_a_full_disk_under_log_and_pid_file(machine: Machine, bundle: Bundle, small: str) -> None:
    """A log that cannot be written stops nobody; a pid file that cannot be written undoes the container."""
    path = bundle.write()
    filler = Path(f"{machine.root}{small}/filler")
    with open(filler, "wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(bytes(4096))
    container = machine.name()
    for form in ("text", "json"):
        machine.ok("--debug", "--log", f"{small}/log", "--log-format", form, "run", "-d", "-b", path, container)
        machine.ok("--debug", "--log", f"{small}/log", "--log-format", form, "delete", "--force", container)
        done = machine("--debug", "--log", f"{small}/log", "--log-format", form, "state", container)
        assert done.code == 1 and "does not exist" in done.err, done
    done = machine("run", "-d", "--pid-file", f"{small}/pid", "-b", path, container)
    orderly(done)
    assert done.code == 1
    assert machine("state", container).code == 1
    assert sorted(left_in(machine, small)) == ["filler", "log"]


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
def test_in_a_read_only_state_folder_commands_say_so(machine: Machine, bundle: Bundle, small: str, warm: bool) -> None:
    """What is there can be looked at; what would be written is refused, and made undone."""
    path = bundle.write()
    container = machine.name()
    machine.ok("--root", small, "run", "-d", "-b", path, container, warm=warm)
    machine.host("mount", "-o", "remount,ro", "/run/small")
    before = machine.look()
    done = machine("--root", small, "create", "-b", path, machine.name(), warm=warm)
    orderly(done)
    assert done.code == 1 and "read-only" in done.err, done
    assert not machine.left(before)
    assert json.loads(machine.ok("--root", small, "state", container, warm=warm))["status"] == "running"
    assert machine.ok("--root", small, "exec", container, "echo", "fine", warm=warm) == "fine\n"
    orderly(machine("--root", small, "delete", "--force", container, warm=warm))
    machine.host("mount", "-o", "remount,rw", "/run/small")
    machine.ok("--root", small, "delete", "--force", container, warm=warm)
    assert not left_in(machine, small)


def test_a_state_folder_that_is_none(machine: Machine, bundle: Bundle, small: str) -> None:
    """A file, a device, a missing parent, somebody's record of another kind: errors, and nothing is touched."""
    path = bundle.write()
    Path(f"{machine.root}{small}/file").write_text("mine")
    for root in (f"{small}/file", "/dev/null", "/proc", f"{small}/file/below", "/sys/fs"):
        done = machine("--root", root, "create", "-b", path, machine.name())
        orderly(done)
        assert done.code == 1, (root, done)
    assert Path(f"{machine.root}{small}/file").read_text() == "mine"


DAMAGES = ["", "{", "null", "[]", "{}", '{"pid": "x"}', "\0" * 100, '{"ociVersion": "1.3.0", "id": 5}', "[" * 100000]


@pytest.mark.parametrize("damage", DAMAGES, ids=range(len(DAMAGES)))
@pytest.mark.parametrize("file", ["state.json", "config.json", "start.json"])
def test_a_damaged_record_is_told_and_deleted(machine: Machine, bundle: Bundle, file: str, damage: str) -> None:
    """After a crash of the machine a record may be empty or half: no command dies of it, and delete --force removes it."""
    container = machine.name()
    machine.ok("create", "-b", bundle.write(), container)
    path = Path(f"{machine.root}/run/boxship/boxrun/{container}/{file}")
    path.write_text(damage)
    for words in (["state"], ["start"], ["ps"], ["kill"], ["pause"]):
        orderly(machine(words[0], container))
    orderly(machine("exec", container, "true"))
    machine.ok("list")
    done = machine("delete", "--force", container)
    orderly(done)
    assert done.code == 0, done
    assert machine("state", container).code == 1


LOST = {
    "state.json": "a second copy tells",
    "state.json claim.json": "the configuration tells where its group is",
    "-state.json": "as with a damaged one",
    "-state.json claim.json": "as with damaged ones",
}


@pytest.mark.parametrize(
    ("kind", "lost"),
    # Without a group, its pid is all that leads to a container: the second copy has it.
    [(kind, lost) for kind in ("running", "paused", "hostpid", "hostmount", "nocgroup") for lost in LOST if kind != "nocgroup" or "claim" not in lost],
)
def test_delete_force_finds_a_container_whose_record_is_lost(machine: Machine, bundle: Bundle, kind: str, lost: str, tmp_path: Path) -> None:
    """Processes, control groups and mounts go by other traces than state.json; poststop hooks run. `nothing_is_left` looks."""
    before = {"nocgroup": ["--cgroup-manager", "disabled"]}.get(kind, [])
    bundle.shell("sleep 1000 & sleep 1000")
    if kind in ("hostpid", "hostmount"):
        gone = {"hostpid": "pid", "hostmount": "mount"}[kind]
        bundle.linux["namespaces"] = [ns for ns in bundle.linux["namespaces"] if ns["type"] != gone]  # type: ignore[attr-defined]
    if kind == "hostmount":
        bundle.without("/sys", "/sys/fs/cgroup")
        del bundle.linux["maskedPaths"], bundle.linux["readonlyPaths"]
        bundle.spec["root"]["path"] = str(bundle.rootfs)  # type: ignore[index]
    bundle.spec["hooks"] = {"poststop": [{"path": "/bin/sh", "args": ["sh", "-c", f"cat > {tmp_path}/told"]}]}
    container = machine.name()
    machine.ok(*before, "run", "-d", "-b", bundle.write(), container)
    if kind == "paused":
        machine.ok("pause", container)
    folder = Path(f"{machine.root}/run/boxship/boxrun/{container}")
    for name in lost.removeprefix("-").split():
        if lost.startswith("-"):
            (folder / name).unlink()
        else:
            (folder / name).write_text("{")
    if lost == "-state.json claim.json":
        # A folder without either is what a create leaves that was killed before it made anything.
        (folder / "claim.json").write_text("")
    done = machine("delete", "--force", container)
    orderly(done)
    assert done.code == 0 and "damaged" in done.err, done
    assert json.loads((tmp_path / "told").read_text())["id"] == container
    assert machine("state", container).code == 1


def limits(kind: int, value: int) -> object:
    """For the child, just before its exec."""
    return lambda: resource.setrlimit(kind, (value, value))


def attempt(machine: Machine, path: str, earlier: Look, *, warm: bool, **limited: object) -> int:
    """create, state, exec and delete with a limit; afterwards all is gone, by `delete` without one if need be."""
    container = machine.name()
    done = machine("create", "-b", path, container, warm=warm, timeout=30, **limited)
    code = done.code
    if code == 0:
        for words in (["state", container], ["start", container], ["exec", container, "true"], ["delete", "--force", container]):
            tried = machine(*words, warm=warm, timeout=30, **limited)
            assert "internal error" not in tried.err, tried
    else:
        assert "internal error" not in done.err, done
        if "fork/exec" not in done.err and done.code == 1 and "Traceback" not in done.err:
            left = machine.left(earlier)
            assert not left, (limited, done, left)
    machine.ok("delete", "--force", container)
    left = machine.left(earlier)
    assert not left, (limited, done, left)
    return code


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
def test_with_few_descriptors_a_command_fails_without_a_trace(machine: Machine, bundle: Bundle, warm: bool) -> None:
    """EMFILE at any of its opens: RLIMIT_NOFILE from 3 up to what is enough."""
    path = bundle.write()
    machine.warm_up()
    before = machine.look()
    codes = {n: attempt(machine, path, before, warm=warm, before=limits(resource.RLIMIT_NOFILE, n)) for n in (3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 18, 20, 24, 32, 64)}
    assert codes[64] == 0
    assert 1 in codes.values()


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
def test_with_little_memory_a_command_fails_without_a_trace(machine: Machine, bundle: Bundle, warm: bool) -> None:
    """ENOMEM at any moment: RLIMIT_AS from what cannot even start a program up to what is enough."""
    path = bundle.write()
    machine.warm_up()
    before = machine.look()
    megabytes = (1, 2, 4, 8, 12, 16, 18, 20, 24, 28, 30, 32, 34, 36, 40, 48, 64, 128, 256)
    codes = {n: attempt(machine, path, before, warm=warm, before=limits(resource.RLIMIT_AS, n << 20)) for n in megabytes}
    assert codes[256] == 0
    assert set(codes.values()) != {0}


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
@pytest.mark.parametrize("size", [0, 1, 100, 4096])
def test_with_a_limit_on_the_size_of_files_a_command_fails_without_a_trace(
    machine: Machine, bundle: Bundle, warm: bool, size: int
) -> None:
    """EFBIG, which comes with a signal that would kill."""
    path = bundle.write()
    machine.warm_up()
    before = machine.look()
    attempt(machine, path, before, warm=warm, before=limits(resource.RLIMIT_FSIZE, size))


def test_a_container_of_too_little_memory_or_too_few_processes_is_undone(machine: Machine, bundle: Bundle) -> None:
    """The container's own limits strike while it is made: an error, and nothing is left."""
    before = machine.look()
    for limited in ({"memory": {"limit": 4096}}, {"memory": {"limit": 200_000}}, {"pids": {"limit": 1}}, {"cpu": {"quota": 1000, "period": 1000000}}):
        bundle.linux["resources"] = {**limited, "devices": [{"allow": False, "access": "rwm"}]}
        container = machine.name()
        done = machine("run", "-d", "-b", bundle.write(), container, timeout=30)
        orderly(done)
        machine.ok("delete", "--force", container)
        left = machine.left(before)
        assert not left, (limited, left)
