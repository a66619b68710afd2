"""Signals by name, /proc/PID/stat, waiting, the signals of this process as bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest

from boxship.kit.errors import InvalidArgument
from boxship.linux import process


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("TERM", 15), ("SIGTERM", 15), ("sigterm", 15), ("term", 15), ("15", 15), ("9", 9), ("0", 0), ("-1", -1), ("+2", 2),
        ("RTMIN+3", 37), ("SIGRTMIN+3", 37), ("rtmax-1", 63), ("RTMIN", 34), ("SIGRTMAX", 64), ("CHLD", 17), ("IOT", 6),
        ("1000", 1000),
    ],
)
def test_signals_are_known_by_name_and_number(text: str, number: int) -> None:
    assert process.parse_signal(text) == number


@pytest.mark.parametrize(
    "text", ["FOO", "", "SIG", "RTMIN+31", "RTMAX-31", "RTMIN+x", "1 ", "1_0", "0x9", "\u0661", "9" * 5000, "TERM "]
)
def test_unknown_signals_are_refused_in_runcs_words(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        process.parse_signal(text)
    assert str(caught.value) == f'unknown signal "{text}"'


def test_the_table_is_the_interpreters() -> None:
    for name, number in process.abi.SIGNALS.items():
        assert getattr(signal, name, number) == number


def test_numbers_have_names() -> None:
    assert [process.signal_name(n) for n in (15, 17, 37, 64, 99)] == ["SIGTERM", "SIGCHLD", "SIGRTMIN+3", "SIGRTMAX", "signal 99"]


def test_exit_codes_are_those_of_shells() -> None:
    assert process.exit_code(3 << 8) == 3
    assert process.exit_code(9) == 137


@pytest.fixture
def sleeper() -> subprocess.Popen[bytes]:  # type: ignore[misc]
    with subprocess.Popen(["sleep", "60"]) as child:
        yield child
        child.kill()


def test_a_process_is_waited_for_and_signalled_by_descriptor(sleeper: subprocess.Popen[bytes]) -> None:
    fd = process.pidfd_open(sleeper.pid)
    try:
        assert not process.wait(fd, 0)
        process.pidfd_send_signal(fd, signal.SIGTERM)
        assert process.wait(fd, 10)
        assert process.stat(sleeper.pid)[0] == "Z"
        sleeper.wait()
        with pytest.raises(ProcessLookupError):
            process.pidfd_send_signal(fd, 0)
    finally:
        os.close(fd)


def test_pid_and_start_time_tell_a_process(sleeper: subprocess.Popen[bytes]) -> None:
    started = process.start_time(sleeper.pid)
    assert process.is_alive(sleeper.pid, started)
    assert not process.is_alive(sleeper.pid, started + 1)
    sleeper.kill()
    fd = process.pidfd_open(sleeper.pid)
    assert process.wait(fd, 10)
    os.close(fd)
    assert not process.is_alive(sleeper.pid, started), "a zombie is not alive"
    sleeper.wait()
    assert not process.is_alive(sleeper.pid, started)
    with pytest.raises(ProcessLookupError):
        process.stat(sleeper.pid)


def test_a_name_with_parentheses_does_not_confuse(monkeypatch: pytest.MonkeyPatch) -> None:
    line = b"7 (a) S ) b) R " + b" ".join(b"%d" % n for n in range(4, 22)) + b" 4711 0 0\n"
    monkeypatch.setattr(process, "read_all", lambda path: line)
    assert process.stat(7) == ("R", 4711)


def test_signals_come_as_bytes_and_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    signals = process.Signals()
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGWINCH)
        time.sleep(0)
        assert set(os.read(signals.fd, 100)) == {signal.SIGUSR1, signal.SIGWINCH}
        with pytest.raises(BlockingIOError):
            os.read(signals.fd, 1)
    finally:
        signals.close()
    assert signal.getsignal(signal.SIGUSR1) == before
    assert signal.set_wakeup_fd(-1) == -1
