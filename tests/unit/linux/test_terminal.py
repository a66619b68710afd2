"""The session between two terminals, on pairs of pseudo-terminals; descriptors over sockets."""

from __future__ import annotations

import array
import errno
import fcntl
import os
import select
import socket
import struct
import termios
from collections.abc import Iterator

import pytest

from boxship.linux import terminal

TIOCGWINSZ, TIOCSWINSZ = 0x5413, 0x5414


@pytest.fixture
def pty() -> Iterator[tuple[int, int]]:
    """(master, the container's side)."""
    master, slave = os.openpty()
    yield master, slave
    for fd in (master, slave):
        try:
            os.close(fd)
        except OSError:
            pass


@pytest.fixture
def pipes() -> Iterator[dict[str, int]]:
    """The caller's stdin and stdout, and the far ends that the test holds."""
    stdin, keys = os.pipe()
    screen, stdout = os.pipe()
    ends = {"stdin": stdin, "keys": keys, "screen": screen, "stdout": stdout}
    yield ends
    for fd in ends.values():
        try:
            os.close(fd)
        except OSError:
            pass


def rounds(session: terminal.Session, count: int = 10) -> None:
    """Let the session work until nothing happens."""
    poll = select.poll()
    for _ in range(count):
        session.register(poll)
        ready = dict(poll.poll(20))
        if not ready:
            return
        session.copy(ready)


def raw(fd: int) -> None:
    """No line discipline in the way of the test."""
    terminal.make_raw(fd)


def test_keys_reach_the_container_and_output_the_caller(pty: tuple[int, int], pipes: dict[str, int]) -> None:
    master, slave = pty
    raw(slave)
    session = terminal.Session(os.dup(master), pipes["stdin"], pipes["stdout"])
    os.write(pipes["keys"], b"hello")
    os.write(slave, b"world")
    rounds(session)
    assert os.read(slave, 100) == b"hello"
    assert os.read(pipes["screen"], 100) == b"world"
    session.close()


def test_newlines_pass_as_they_are(pty: tuple[int, int], pipes: dict[str, int]) -> None:
    master, slave = pty
    session = terminal.Session(os.dup(master), pipes["stdin"], pipes["stdout"])
    os.write(slave, b"a\nb\n")
    rounds(session)
    assert os.read(pipes["screen"], 100) == b"a\nb\n"
    session.close()


def test_what_was_written_before_the_end_is_printed_on_close(pty: tuple[int, int], pipes: dict[str, int]) -> None:
    master, slave = pty
    session = terminal.Session(os.dup(master), pipes["stdin"], pipes["stdout"])
    os.write(slave, b"x" * 1000)
    os.close(slave)
    session.close()
    assert os.read(pipes["screen"], 4096) == b"x" * 1000


def test_end_of_input_is_end_of_file_for_the_container(pty: tuple[int, int], pipes: dict[str, int]) -> None:
    master, slave = pty
    session = terminal.Session(os.dup(master), pipes["stdin"], pipes["stdout"])
    os.write(pipes["keys"], b"line\n")
    os.close(pipes["keys"])
    rounds(session)
    assert os.read(slave, 100) == b"line\n"
    assert os.read(slave, 100) == b""
    session.close()


def test_the_container_may_close_its_terminal_and_open_it_again(pty: tuple[int, int], pipes: dict[str, int]) -> None:
    master, slave = pty
    name = os.ttyname(slave)
    session = terminal.Session(os.dup(master), pipes["stdin"], pipes["stdout"])
    os.close(slave)
    rounds(session, 3)
    again = os.open(name, os.O_RDWR | os.O_NOCTTY)
    os.write(again, b"back")
    rounds(session)
    assert os.read(pipes["screen"], 100) == b"back"
    os.close(again)
    session.close()


def test_a_reader_that_went_away_does_not_stop_the_container(pty: tuple[int, int], pipes: dict[str, int]) -> None:
    master, slave = pty
    session = terminal.Session(os.dup(master), pipes["stdin"], pipes["stdout"])
    os.close(pipes["screen"])
    for _ in range(3):
        os.write(slave, b"y" * 3000)
        rounds(session)
    session.close()


def test_a_slow_reader_is_waited_for_without_blocking(pty: tuple[int, int], pipes: dict[str, int]) -> None:
    master, slave = pty
    session = terminal.Session(os.dup(master), pipes["stdin"], pipes["stdout"])
    os.set_blocking(pipes["stdout"], False)
    while True:
        try:
            os.write(pipes["stdout"], b"." * 4096)
        except BlockingIOError:
            break
    os.set_blocking(pipes["stdout"], True)
    os.write(slave, b"late")
    rounds(session)  # would block here
    data = b""
    while b"late" not in data:
        data += os.read(pipes["screen"], 65536)
        rounds(session)
    session.close()


def test_no_stdin_at_all_is_no_error(pty: tuple[int, int], pipes: dict[str, int]) -> None:
    master, slave = pty
    session = terminal.Session(os.dup(master), pipes["stdin"], pipes["stdout"])
    os.close(pipes["stdin"])
    os.write(slave, b"alive")
    rounds(session)
    assert os.read(pipes["screen"], 100) == b"alive"
    session.close()


def test_the_callers_terminal_is_raw_meanwhile_and_lends_its_size(pty: tuple[int, int]) -> None:
    master, slave = pty
    outer_master, outer = os.openpty()
    fcntl.ioctl(outer, TIOCSWINSZ, struct.pack("=4H", 31, 97, 0, 0))
    before = termios.tcgetattr(outer)
    session = terminal.Session(os.dup(master), outer, outer)
    meanwhile = termios.tcgetattr(outer)
    assert not meanwhile[3] & (termios.ICANON | termios.ECHO | termios.ISIG)
    assert meanwhile[1] & termios.OPOST
    assert struct.unpack("=4H", fcntl.ioctl(slave, TIOCGWINSZ, bytes(8)))[:2] == (31, 97)
    fcntl.ioctl(outer, TIOCSWINSZ, struct.pack("=4H", 10, 20, 0, 0))
    session.resize()
    assert struct.unpack("=4H", fcntl.ioctl(slave, TIOCGWINSZ, bytes(8)))[:2] == (10, 20)
    # Same descriptor for both directions.
    os.write(outer_master, b"k")
    os.write(slave, b"out")
    raw(slave)
    rounds(session)
    assert os.read(slave, 10) == b"k"
    assert os.read(outer_master, 10) == b"out"
    session.close()
    assert termios.tcgetattr(outer) == before
    os.close(outer)
    os.close(outer_master)


def listening(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    folder = os.open(os.path.dirname(path), os.O_PATH)
    sock.bind(f"/proc/self/fd/{folder}/{os.path.basename(path)}")
    os.close(folder)
    sock.listen()
    return sock


@pytest.mark.parametrize("folder", ["short", "a-name-that-is-longer-than-the-address-has-room-for/" * 4])
def test_a_descriptor_arrives_with_its_message(tmp_path: object, folder: str) -> None:
    path = f"{tmp_path}/{folder}/socket".replace("//", "/")
    os.makedirs(os.path.dirname(path))
    payload = b"/dev/pts/3" if folder == "short" else b"j" * 300_000
    with listening(path) as sock:
        read_end, write_end = os.pipe()
        pid = os.fork() if len(payload) > 65536 else None
        if pid == 0:
            terminal.send_fd(path, write_end, payload)
            os._exit(0)
        if pid is None:
            terminal.send_fd(path, write_end, payload)
        peer, _ = sock.accept()
        with peer:
            data, ancillary, _, _ = peer.recvmsg(1 << 20, 64)
            while len(data) < len(payload):
                data += peer.recv(1 << 20)
        if pid:
            assert os.waitpid(pid, 0)[1] == 0
        assert data == payload
        ((level, kind, rights),) = ancillary
        assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        (received,) = array.array("i", rights)
        os.write(received, b"same pipe")
        assert os.read(read_end, 100) == b"same pipe"
        for fd in (read_end, write_end, received):
            os.close(fd)


def test_nobody_listening_names_the_path(tmp_path: object) -> None:
    with pytest.raises(OSError) as caught:
        terminal.send_fd(f"{tmp_path}/none", 0, b"x")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, f"{tmp_path}/none")
