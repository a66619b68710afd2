"""Several commands at once on one container, and a warm server that is old, gone or broken."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import boxship
from support.machine import Bundle, Done, Machine

STATES = {"creating", "created", "running", "stopped", "paused"}


def together(machine: Machine, *commands: list[str], warm: bool = True) -> list[Done]:
    """Begin all at about the same time, and wait for all."""
    begun = []
    for words in commands:
        begun.append(machine.begin(*words, warm=warm))
        time.sleep(random.uniform(0, 0.006 if warm else 0.03))
    done = [running.wait() for running in begun]
    for one in done:
        assert "Traceback" not in one.err and "internal error" not in one.err and "was killed" not in one.err, done
        assert one.code >= 0, done
        # 137: exec tells how its process ended, which is by the kill or delete that came in between.
        assert one.code in (0, 137) or one.err.strip(), done
    return done


@pytest.fixture
def path(machine: Machine, bundle: Bundle) -> str:
    machine.warm_up()
    random.seed("together")
    return bundle.write()


ROUNDS = 12


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
def test_of_creates_of_one_id_exactly_one_succeeds(machine: Machine, path: str, warm: bool) -> None:
    """The id is taken by one; the others say so, and do not disturb it."""
    for _ in range(ROUNDS if warm else 3):
        container = machine.name()
        create = ["create", "-b", path, container]
        done = together(machine, create, create, create, create, warm=warm)
        assert sorted(one.code for one in done) == [0, 1, 1, 1], done
        assert all("already exists" in one.err for one in done if one.code)
        assert machine.state(container)["status"] == "created"
        machine.ok("start", container)
        machine.ok("delete", "--force", container)


def test_of_starts_exactly_one_succeeds(machine: Machine, path: str) -> None:
    """The word is given once."""
    for _ in range(ROUNDS):
        container = machine.name()
        machine.ok("create", "-b", path, container)
        done = together(machine, *([["start", container]] * 4))
        assert sorted(one.code for one in done) == [0, 1, 1, 1], done
        assert machine.state(container)["status"] == "running"
        machine.ok("delete", "--force", container)


def test_of_deletes_exactly_one_finds_the_container(machine: Machine, path: str) -> None:
    """Without force the others say that there is none; with force they are content."""
    for turn in range(ROUNDS):
        container = machine.name()
        machine.ok("create", "-b", path, container)
        force = ["--force"] if turn % 2 else []
        done = together(machine, *([["delete", *force, container]] * 4))
        assert sorted(one.code for one in done) == ([0, 0, 0, 0] if force else [0, 1, 1, 1]), done
        assert all("does not exist" in one.err for one in done if one.code)


def test_a_container_created_while_it_is_deleted_is_whole_or_gone(machine: Machine, path: str) -> None:
    """`delete --force` in the middle of `create` waits for it, or comes before it."""
    before = machine.look()
    for turn in range(ROUNDS * 2):
        container = machine.name()
        commands = [["create", "-b", path, container], ["delete", "--force", container]]
        if turn % 3 == 0:
            commands.reverse()
        done = together(machine, *commands)
        state = machine("state", container)
        if state.code == 0:
            assert json.loads(state.out)["status"] == "created"
            machine.ok("start", container)
        machine.ok("delete", "--force", container)
        left = machine.left(before)
        assert not left, (done, left)


@pytest.mark.parametrize(
    "commands",
    [
        ["start", "delete --force"], ["kill ID KILL", "delete"], ["kill ID KILL", "delete --force", "exec"], ["pause", "delete --force"],
        ["pause", "resume", "pause", "resume"], ["pause", "kill ID KILL"], ["exec", "exec", "delete --force"], ["exec", "kill ID KILL"],
        ["update --pids-limit 50", "delete --force"], ["update --pids-limit 50", "update --pids-limit 60", "pause", "exec"],
        ["start", "kill ID TERM"], ["state", "ps", "list", "delete --force"], ["events --stats", "delete --force"], ["start", "exec"],
    ],
    ids=" + ".join,
)
def test_commands_at_once_never_corrupt_a_container(machine: Machine, path: str, commands: list[str]) -> None:
    """Any of them may lose; afterwards the container is in one of its states, or gone, and can be deleted."""
    before = machine.look()
    for _ in range(5):
        container = machine.name()
        machine.ok(*(["create"] if "start" in commands else ["run", "-d"]), "-b", path, container)
        words = []
        for command in commands:
            name, *rest = command.split()
            rest = [container if word == "ID" else word for word in rest]
            words.append([name, *rest, *([] if "ID" in command or name == "list" else [container]), *(["true"] if name == "exec" else [])])
        together(machine, *words)
        state = machine("state", container)
        if state.code == 0:
            assert json.loads(state.out)["status"] in STATES
        else:
            assert "does not exist" in state.err
        machine.ok("delete", "--force", container)
        left = machine.left(before)
        assert not left, left


def test_containers_made_by_many_at_once_are_all_there(machine: Machine, path: str) -> None:
    """Twelve at a time, of different ids, warm and cold mixed."""
    names = [machine.name() for _ in range(12)]
    begun = [machine.begin("run", "-d", "-b", path, name, warm=i % 3 != 0) for i, name in enumerate(names)]
    assert [running.wait().code for running in begun] == [0] * len(names)
    listed = json.loads(machine.ok("list", "-f", "json"))
    assert {entry["id"] for entry in listed if entry["status"] == "running"} >= set(names)
    begun = [machine.begin("delete", "--force", name, warm=i % 2 == 0) for i, name in enumerate(names)]
    assert [running.wait().code for running in begun] == [0] * len(names)


def test_a_container_paused_for_ever_is_deleted(machine: Machine, path: str) -> None:
    """Frozen processes do not die: delete thaws them."""
    container = machine.name()
    machine.ok("run", "-d", "-b", path, container)
    machine.ok("pause", container)
    machine.ok("delete", "--force", container, timeout=20)


def test_a_command_whose_lock_is_held_by_a_stopped_one_gets_its_turn(machine: Machine, path: str) -> None:
    """A `start` that hangs holds the lock; state, list and kill work meanwhile, and when it is killed, delete does."""
    container = machine.name()
    machine.ok("create", "-b", path, container)
    hanging = machine.begin("start", container, env={"BOXSHIP_FAILPOINT": "start.opened=stop"})
    deadline = time.monotonic() + 10
    while not _stopped(hanging.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    machine.state(container)
    machine.ok("list")
    machine.ok("kill", container, "KILL")
    deleting = machine.begin("delete", "--force", container)
    time.sleep(0.2)
    assert deleting.process.poll() is None, "delete waits for its turn"
    os.kill(hanging.pid, signal.SIGKILL)
    hanging.wait()
    assert deleting.wait().code == 0


def _stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


# --- the warm server -------------------------------------------------------------------------------------------------


@pytest.fixture
def own(machine: Machine, tmp_path: Path) -> Iterator[Path]:
    """An installation of the tests' own, to upgrade: the folder of its package."""
    shutil.copytree(Path(boxship.__file__).parent, tmp_path / "src/boxship", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    next((tmp_path / "venv").glob("lib/python*/site-packages")).joinpath("boxship.pth").write_text(f"{tmp_path}/src\n")
    shutil.copy(machine.exe, tmp_path / "venv/bin/boxrun")
    machine.warm_up()
    os.kill(machine.warm_server(), signal.SIGKILL)
    for path in Path(f"{machine.root}/run/boxship/warm").iterdir():
        path.unlink()
    ours, machine.exe = machine.exe, str(tmp_path / "venv/bin/boxrun")
    try:
        yield tmp_path / "src/boxship"
    finally:
        if machine.warm_server():
            os.kill(machine.warm_server(), signal.SIGKILL)
        for path in Path(f"{machine.root}/run/boxship/warm").iterdir():
            path.unlink()
        machine.exe = ours


@pytest.mark.parametrize("how", ["edited", "replaced", "removed", "executor"])
def test_an_upgrade_is_served_by_new_code_at_once(machine: Machine, bundle: Bundle, own: Path, how: str) -> None:
    """A server that was there before the upgrade serves no more: the very next command is done by what is installed now."""
    path = bundle.write()
    machine.warm_up()
    server = machine.warm_server()
    container = machine.name()
    machine.ok("run", "-d", "-b", path, container)
    main = own / "runtime/command/main.py"
    changed = main.read_text().replace('VERSION = "0.1.0"', 'VERSION = "9.9.9"')
    if how == "edited":
        main.write_text(changed)
    elif how == "replaced":
        (own / "new").write_text(changed)
        (own / "new").rename(main)
    elif how == "executor":
        (own / "runtime/_init").write_bytes((own / "runtime/_init").read_bytes() + b"\0")
    else:
        (own / "runtime/stats.py").unlink()
    said = machine.ok("--version")
    if how in ("edited", "replaced"):
        assert "9.9.9" in said
    assert machine.state(container)["status"] == "running"
    assert machine.ok("exec", container, "echo", "fine") == "fine\n"
    deadline = time.monotonic() + 20
    while machine.warm_server() in (0, server) and time.monotonic() < deadline and how != "removed":
        machine("--version")
        time.sleep(0.05)
    assert machine.warm_server() != server, "there is a new server"
    machine.ok("delete", "--force", container)


def test_without_its_package_boxrun_says_so(machine: Machine, own: Path) -> None:
    """An installation that was taken away under a server that runs."""
    machine.warm_up()
    own.rename(own.parent / "gone")
    done = machine("--version")
    assert done.code == 1 and "boxship" in done.err
    (own.parent / "gone").rename(own)
    assert "boxrun version" in machine.ok("--version")


def test_a_killed_server_is_replaced(machine: Machine, path: str) -> None:
    """Its socket is there still, and nobody listens: the next command does without, and a new server comes."""
    server = machine.warm_server()
    workers = machine.warm_workers()
    os.kill(server, signal.SIGKILL)
    assert "boxrun version" in machine.ok("--version", timeout=5)
    machine.warm_up()
    assert machine.warm_server() not in (0, server)
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        machine.look()
        time.sleep(0.02)
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()], "its workers went with it"


def test_killed_workers_are_replaced(machine: Machine, path: str) -> None:
    """All workers that wait are killed: the next command has to wait for a new one, and not for long."""
    time.sleep(0.3)
    for _ in range(3):
        for pid in machine.warm_workers():
            os.kill(pid, signal.SIGKILL)
        begun = time.monotonic()
        assert "boxrun version" in machine.ok("--version", timeout=20)
        assert time.monotonic() - begun < 3


@pytest.mark.parametrize("what", ["file", "folder", "link", "nobody"])
def test_rubbish_in_the_sockets_place_is_passed_over(machine: Machine, path: str, what: str) -> None:
    """A file, a folder, a link or a dead socket where the server's should be: commands do without."""
    socket_path = Path(machine.warm_socket())
    os.kill(machine.warm_server(), signal.SIGKILL)
    if what != "nobody":
        socket_path.unlink()
    if what == "file":
        socket_path.write_text("x")
    elif what == "folder":
        socket_path.mkdir()
    elif what == "link":
        socket_path.symlink_to("/dev/null")
    assert "boxrun version" in machine.ok("--version", timeout=10)
    container = machine.name()
    machine.ok("run", "-d", "-b", path, container)
    machine.ok("delete", "--force", container)
    if what == "folder":
        socket_path.rmdir()
    machine.warm_up()
