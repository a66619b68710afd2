"""Descriptors that callers and containers hand to each other: terminals, pidfds, listening sockets, readiness."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.handover import Receiver, read_until
from support.machine import Bundle, Machine

Ask = Callable[[Callable[[], object]], object]


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[Receiver]:
    made = Receiver(tmp_path / "sock")
    yield made
    made.close()


# --- terminals -------------------------------------------------------------------------------------------------------


def test_the_console_socket_gets_the_terminal(machine: Machine, bundle: Bundle, box: str, receiver: Receiver, way: bool) -> None:
    bundle.process["terminal"] = True
    bundle.process["consoleSize"] = {"height": 33, "width": 99}
    bundle.shell("tty; read word; echo got $word")
    machine.ok("create", "--bundle", bundle.write(), "--console-socket", receiver.path, box, warm=way)
    payload, terminal = receiver.take()
    assert payload.startswith(b"/dev/p")
    assert os.isatty(terminal) and os.get_terminal_size(terminal) == (99, 33)
    machine.ok("start", box, warm=way)
    assert b"/dev/pts/0" in read_until(terminal, b"\n")
    os.write(terminal, b"hello\n")
    assert b"got hello" in read_until(terminal, b"got hello")


def test_a_terminal_without_anybody_to_hold_it_is_refused(machine: Machine, bundle: Bundle, receiver: Receiver) -> None:
    bundle.process["terminal"] = True
    refused = machine("create", "--bundle", bundle.write(), machine.name())
    assert refused.code == 1 and "cannot allocate tty if runc will detach without setting console socket" in refused.err
    bundle.process["terminal"] = False
    refused = machine("create", "--bundle", bundle.write(), "--console-socket", receiver.path, machine.name())
    assert refused.code == 1 and "cannot use console socket if runc will not detach or allocate tty" in refused.err


def test_exec_with_a_terminal_through_the_console_socket(machine: Machine, running: str, receiver: Receiver) -> None:
    machine.ok("exec", "--detach", "--tty", "--console-socket", receiver.path, running, "sh", "-c", "tty; echo done")
    _, terminal = receiver.take()
    assert b"/dev/pts/" in read_until(terminal, b"done")


def test_run_in_the_foreground_connects_the_callers_terminal(machine: Machine, bundle: Bundle, box: str, way: bool) -> None:
    bundle.process["terminal"] = True
    bundle.shell("test -t 0 && test -t 1 && test -t 2 && read word && echo got $word")
    ours, theirs = os.openpty()
    try:
        command = machine.begin("run", "--bundle", bundle.write(), box, warm=way, stdin=theirs, stdout=theirs, stderr=theirs)
        os.write(ours, b"hello\n")
        assert b"got hello" in read_until(ours, b"got hello")
        assert command.wait().code == 0
    finally:
        os.close(ours)
        os.close(theirs)


# --- pidfds ----------------------------------------------------------------------------------------------------------


def pid_of(pidfd: int) -> int:
    for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines():
        if line.startswith("Pid:"):
            return int(line.split()[1])
    raise AssertionError("not a pidfd")


def test_the_pidfd_socket_gets_init_and_exec(
    machine: Machine, bundle: Bundle, box: str, receiver: Receiver, way: bool, tmp_path: Path
) -> None:
    machine.ok("create", "--bundle", bundle.write(), "--pidfd-socket", receiver.path, box, warm=way)
    payload, fd = receiver.take()
    assert payload == b"standard" and pid_of(fd) == machine.state(box)["pid"]
    machine.ok("start", box)
    machine.ok("exec", "--detach", "--pid-file", str(tmp_path / "pid"), "--pidfd-socket", receiver.path, box, "sleep", "1000", warm=way)
    payload, second = receiver.take()
    assert payload == b"setns" and pid_of(second) == int((tmp_path / "pid").read_text())
    signal.pidfd_send_signal(second, signal.SIGKILL)
    assert select.select([second], [], [], 10)[0]


# --- descriptors from the caller -------------------------------------------------------------------------------------


LIST = "for n in 3 4 5 6 7 8; do readlink /proc/self/fd/$n || echo none; done; echo $LISTEN_FDS $LISTEN_PID"


def open_some(folder: Path, *numbers: int) -> Callable[[], None]:
    def before() -> None:
        for number in numbers:
            os.dup2(os.open(folder / f"file{number}", os.O_RDWR | os.O_CREAT), number)

    return before


@pytest.mark.parametrize(("listen", "preserve"), [(0, 2), (2, 0), (2, 1)])
def test_descriptors_are_passed_on_in_order(
    machine: Machine, bundle: Bundle, tmp_path: Path, way: bool, listen: int, preserve: int
) -> None:
    bundle.shell(LIST)
    numbers = range(3, 3 + listen + preserve)
    env = {"LISTEN_FDS": str(listen)} if listen else {}
    done = machine(
        "run", "--preserve-fds", str(preserve), "--bundle", bundle.write(), machine.name(), warm=way, env=env, pass_fds=list(numbers),
        before=open_some(tmp_path, *numbers),
    )
    assert done.code == 0, done
    *links, told = done.out.splitlines()
    assert [link.rsplit("/", 1)[-1] for link in links[: len(numbers)]] == [f"file{n}" for n in numbers]
    assert all("file" not in link for link in links[len(numbers) :]), links
    assert told.split() == ([str(listen), "1"] if listen else [])


HOLDING = """
import os, resource, sys
count, folder, *words = sys.argv[1:]
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
for number in range(3, 3 + int(count)):
    assert os.open(f"{folder}/file{number}", os.O_RDWR | os.O_CREAT) == number
    os.set_inheritable(number, True)
os.execv(words[0], words)
"""


@pytest.mark.parametrize("count", [201, 600, 1200])
@pytest.mark.parametrize("command", ["run", "exec"])
def test_many_descriptors_are_passed_on(machine: Machine, bundle: Bundle, box: str, tmp_path: Path, way: bool, command: str, count: int) -> None:
    """More than fit into one message, and so many that the runtime's own have to make room."""
    script = f"ls -l /proc/$$/fd | grep -c /file; for n in 3 {count + 2}; do readlink /proc/$$/fd/$n; done"
    bundle.process.pop("rlimits", None)
    env = {} if way else {"BOXRUN_WARM": "0"}
    words = [sys.executable, "-I", "-c", HOLDING, str(count), str(tmp_path), machine.exe, command, "--preserve-fds", str(count)]
    if command == "run":
        bundle.shell(script)
        done = machine.start([*words, "--bundle", bundle.write(), box], env=env).wait()
    else:
        machine.ok("run", "--detach", "--bundle", bundle.write(), box)
        done = machine.start([*words, box, "sh", "-c", script], env=env).wait()
    assert done.code == 0, done
    assert done.out.split() == [str(count), f"{tmp_path}/file3", f"{tmp_path}/file{count + 2}"]


def test_exec_passes_descriptors_on(machine: Machine, running: str, tmp_path: Path, way: bool) -> None:
    done = machine(
        "exec", "--preserve-fds", "1", running, "sh", "-c", LIST, warm=way, env={"LISTEN_FDS": "1"}, pass_fds=[3, 4],
        before=open_some(tmp_path, 3, 4),
    )
    assert done.code == 0, done
    assert [line.rsplit("/", 1)[-1] for line in done.out.splitlines()[:2]] == ["file3", "file4"]
    assert done.out.splitlines()[-1] == "1 1"


def test_a_descriptor_that_is_not_open_is_refused(machine: Machine, bundle: Bundle, way: bool) -> None:
    refused = machine("run", "--preserve-fds", "3", "--bundle", bundle.write(), machine.name(), warm=way)
    assert refused.code == 1 and "preserve" in refused.err


def test_a_listening_socket_reaches_the_container(machine: Machine, bundle: Bundle, box: str) -> None:
    listener = socket.socket(socket.AF_INET)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    with listener:
        machine.ok(
            "run", "--detach", "--bundle", bundle.write(), box, env={"LISTEN_FDS": "1"}, pass_fds=[3],
            before=lambda: os.dup2(listener.fileno(), 3),
        )
        inode = os.fstat(listener.fileno()).st_ino
    assert os.stat(f"/proc/{machine.state(box)['pid']}/fd/3").st_ino == inode


# --- readiness -------------------------------------------------------------------------------------------------------


class Manager:
    """Somebody like systemd: reads the notify socket, and closes what comes with BARRIER=1."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.path)
        self.heard: list[str] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                data, ancillary, _, _ = self.socket.recvmsg(4096, socket.CMSG_SPACE(16))
            except OSError:
                return
            self.heard.append(data.decode().strip())
            for _, _, raw in ancillary:
                os.close(int.from_bytes(raw[:4], "little"))


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(tmp_path / "manager")
    yield made
    made.socket.close()


def say(machine: Machine, box: str, message: bytes) -> None:
    """What the container's program would send: to the socket that it sees, by way of its own root."""
    pid = machine.state(box)["pid"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        folder = os.open(f"/proc/{pid}/root/run/notify", os.O_PATH)
        try:
            sock.sendto(message, f"/proc/self/fd/{folder}/notify.sock")
        finally:
            os.close(folder)


@pytest.fixture
def watched(bundle: Bundle) -> Bundle:
    """Its program writes down where it was told to say that it is ready."""
    bundle.writable()
    bundle.shell('echo "$NOTIFY_SOCKET" > /where; sleep 1000')
    return bundle


def test_start_waits_for_ready_and_tells_the_manager(
    machine: Machine, watched: Bundle, box: str, manager: Manager, eventually: Ask
) -> None:
    env = {"NOTIFY_SOCKET": manager.path}
    machine.ok("create", "--bundle", watched.write(), box, env=env)
    command = machine.begin("start", box, env=env)
    where = watched.rootfs / "where"
    eventually(lambda: where.exists() and where.read_text())
    assert where.read_text() == "/run/notify/notify.sock\n"
    say(machine, box, b"STATUS=not yet")
    time.sleep(0.2)
    assert command.process.poll() is None and manager.heard == []
    say(machine, box, b"READY=1\nSTATUS=up")
    assert command.wait().code == 0
    assert manager.heard == ["READY=1", f"MAINPID={machine.state(box)['pid']}", "BARRIER=1"]


def test_others_may_use_the_container_while_start_waits(
    machine: Machine, watched: Bundle, box: str, manager: Manager, eventually: Ask
) -> None:
    command = machine.begin("run", "--detach", "--bundle", watched.write(), box, env={"NOTIFY_SOCKET": manager.path})
    eventually((watched.rootfs / "where").exists)
    machine.ok("pause", box, timeout=10)
    machine.ok("resume", box, timeout=10)
    machine.ok("kill", box, "KILL")
    assert command.wait(10).code == 0  # its program was started, and that is what was asked for
    assert manager.heard == []


def test_run_in_the_foreground_names_itself_as_the_process_to_watch(
    machine: Machine, watched: Bundle, box: str, manager: Manager, eventually: Ask
) -> None:
    command = machine.begin("run", "--bundle", watched.write(), box, env={"NOTIFY_SOCKET": manager.path})
    eventually((watched.rootfs / "where").exists)
    say(machine, box, b"READY=1")
    eventually(lambda: len(manager.heard) == 3)
    assert manager.heard[1] == f"MAINPID={command.pid}"
    machine.ok("kill", box, "KILL")
    assert command.wait().code == 137


def test_without_a_manager_there_is_no_notify_socket(machine: Machine, watched: Bundle, box: str, eventually: Ask) -> None:
    machine.ok("run", "--detach", "--bundle", watched.write(), box)
    eventually(lambda: (watched.rootfs / "where").exists() and (watched.rootfs / "where").read_text())
    assert (watched.rootfs / "where").read_text() == "\n"
    assert not (watched.rootfs / "run/notify").exists()
    assert json.loads(machine.ok("ps", "--format", "json", box))
