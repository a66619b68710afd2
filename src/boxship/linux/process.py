"""Processes from outside: descriptors of them, waiting, signals, what /proc/PID/stat tells.

Runs in: any process.
Spec: pidfd_open(2) (Linux ≥ 5.3), pidfd_send_signal(2) (≥ 5.1), signal(7), proc(5).
Not here: starting them (`boxship.linux.remote`).
"""

from __future__ import annotations

import errno
import os

from boxship.abi import process as abi
from boxship.abi import syscalls
from boxship.kit.errors import InvalidArgument
from boxship.kit.files import read_all
from boxship.kit.text import quoted
from boxship.linux import _sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

SIGWINCH = abi.SIGNALS["SIGWINCH"]
_SIGCHLD, _SIGURG, _SIGPIPE = abi.SIGNALS["SIGCHLD"], abi.SIGNALS["SIGURG"], abi.SIGNALS["SIGPIPE"]


def pidfd_open(pid: int) -> int:
    """A descriptor of the process, close-on-exec; readable once it has ended. Raises ProcessLookupError."""
    return os.pidfd_open(pid)


def pidfd_send_signal(pidfd: int, number: int) -> None:
    """Signal the process that the descriptor means, and never another one that got its pid. Raises OSError."""
    _sys.syscall(syscalls.PIDFD_SEND_SIGNAL, pidfd, number, None, 0)


def wait(pidfd: int, timeout_s: float | None = None) -> bool:
    """Wait until the process has ended, as a zombie at least; False when the time is up. None waits for ever."""
    import select

    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else max(0, round(timeout_s * 1000))))


def stat(pid: int) -> tuple[str, int]:
    """(state letter, start time in clock ticks since boot) of a process. Raises OSError when there is none.

    Pid and start time together name a process for as long as the machine runs.
    """
    try:
        data = read_all(f"/proc/{pid}/stat")
    except FileNotFoundError:
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH), str(pid)) from None
    # The name may hold spaces and parentheses; fields 3 and 22 are counted from behind it.
    fields = data[data.rindex(b")") + 2 :].split(b" ")
    return fields[0].decode("ascii"), int(fields[19])


def start_time(pid: int) -> int:
    """Clock ticks from boot to the start of a process. Raises OSError."""
    return stat(pid)[1]


def is_alive(pid: int, started: int) -> bool:
    """Whether the process with that pid and start time runs: neither gone, nor a zombie, nor replaced by another.

    Raises OSError when that cannot be found out: a lack of descriptors is no reason to take a process for dead.
    """
    try:
        state, found = stat(pid)
    except ProcessLookupError:
        return False
    return found == started and state not in "ZX"


def parse_signal(text: str) -> int:
    """The number of "TERM", "SIGTERM", "sigterm", "15", "RTMIN+3" or "RTMAX-1".

    Numbers are taken as they are; the kernel refuses those that are none. Raises InvalidArgument in runc's words.
    """
    digits = text[1:] if text[:1] in ("+", "-") else text
    if digits.isascii() and digits.isdigit() and len(digits) < 10:
        return int(text)
    name = text.upper()
    if not name.startswith("SIG"):
        name = f"SIG{name}"
    number = abi.SIGNALS.get(name) or _real_time(name)
    if not number:
        raise InvalidArgument(f"unknown signal {quoted(text)}")
    return number


def _real_time(name: str) -> int:
    for base, sign in (("SIGRTMIN+", 1), ("SIGRTMAX-", -1)):
        offset = name.removeprefix(base)
        if offset != name and offset.isascii() and offset.isdigit() and len(offset) < 3:
            number = abi.SIGNALS[base[:-1]] + sign * int(offset)
            if abi.SIGNALS["SIGRTMIN"] <= number <= abi.SIGNALS["SIGRTMAX"]:
                return number
    return 0


def signal_name(number: int) -> str:
    """ "SIGTERM" of 15; "signal 99" where there is no name."""
    for name, value in abi.SIGNALS.items():
        if value == number:
            return name
    low, high = abi.SIGNALS["SIGRTMIN"], abi.SIGNALS["SIGRTMAX"]
    return f"SIGRTMIN+{number - low}" if low < number < high else f"signal {number}"


def exit_code(status: int) -> int:
    """Of a wait status, as shells and runc have it: 128 and the signal for a process that was killed."""
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


class Signals:
    """The signals of this process as bytes on a descriptor, while the object is open: for a loop that waits with poll(2).

    Leaves alone what cannot be caught, what a fault of our own would raise, and SIGCHLD. Only in the main thread.
    """

    def __init__(self) -> None:
        import _signal  # type: ignore[import-not-found]  # `signal` without its enums, which are slow to import

        self.fd, self._write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._old: list[tuple[int, Callable[..., object] | int | None]] = []
        self._old_wakeup = _signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        kept = {_SIGCHLD, _SIGURG, _SIGPIPE, abi.SIGNALS["SIGKILL"], abi.SIGNALS["SIGSTOP"], 4, 5, 7, 8, 11, 31}
        for number in _signal.valid_signals():
            if number not in kept:
                try:
                    self._old.append((number, _signal.getsignal(number)))
                    _signal.signal(number, _noted)
                except OSError:
                    self._old.pop()

    def close(self) -> None:
        """Put back what was there before."""
        import _signal

        for number, handler in self._old:
            if handler is not None:
                _signal.signal(number, handler)
        self._old = []
        _signal.set_wakeup_fd(self._old_wakeup)
        os.close(self.fd)
        os.close(self._write_end)


def _noted(number: int, frame: object) -> None:
    """The byte on the descriptor says it all."""
