"""The spawner: a process that has everything imported, and is forked for each shim.

Runs in: the spawner, single-threaded, one a user and set of namespaces; it is no shim's parent in any sense that matters: killed
with SIGKILL, it takes nobody with it.
Spec: the message of `src/native/caller.h`: {version, argc, envc, umask} with descriptors 0, 1, 2, the folder, and a file of all
strings, each with a NUL behind it; the answer is {EXIT, code}.

For each caller the spawner forks a holder, and that a worker (`boxship.shim.main`): the worker reads the request, so that a
caller that stalls is alone with it, and none of what that takes is in the memory that a new shim keeps. When nothing but an
answer was asked for, both end with it.
"""

from __future__ import annotations

import _socket
import gc
import os
import select
import sys
import time
from _struct import Struct

from boxship.kit import failpoint
from boxship.kit.files import read_all
from boxship.linux import _sys
from boxship.shim import command
from boxship.shim import main as shim
from boxship.shim.handover import Contents

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from boxship.shim.forks import OwnRuntime

IDLE_S = 300.0
VERSION = 1
WORD = Struct("=iiii")
EXIT = 5
_FDS = 5
_FILLINGS = 400
_SIGCHLD, _SIG_IGN, _SIG_DFL = 17, 1, 0


def listen(path: str) -> _socket.socket | None:
    """Take the place at `path`; None when another spawner has it, which a lock beside it tells. Raises OSError."""
    import fcntl

    folder = os.path.dirname(path)
    os.makedirs(os.path.dirname(folder), 0o711, exist_ok=True)
    os.makedirs(folder, 0o700, exist_ok=True)
    lock = os.open(path + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    # The lock is held as long as the process lives; shims close their copy.
    global _lock
    _lock = lock
    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC, 0)
    if os.path.lexists(path):
        os.unlink(path)
    before = os.umask(0o177)
    try:
        listener.bind(path)
    finally:
        os.umask(before)
    listener.listen(128)
    return listener


_lock = -1


def fill_holes() -> list[object]:
    """Objects of every small size, which take the places that are free between others: what a fork makes afterwards is in few
    pages of its own, in place of one new object in each of many pages that it would share otherwise. Keep them."""
    return [[bytes(size) for _ in range(_FILLINGS)] for size in range(0, 480, 16)]


class Spawner:
    """The one of this process."""

    def __init__(self, listener: _socket.socket, path: str, own_runtime: OwnRuntime) -> None:
        """`listener` at `path`; `own_runtime` is boxrun within this process."""
        self._listener = listener
        self._path = path
        self._own_runtime = own_runtime

    def serve(self, stale: Callable[[], bool], idle_s: float = IDLE_S) -> None:
        """Fork for every caller, until nobody came for a while, or the package is another one than was imported
        (`stale`)."""
        import _signal  # type: ignore[import-not-found]

        _signal.signal(_SIGCHLD, _SIG_IGN)  # nobody asks how a shim ended
        gc.collect()
        self._fillings = fill_holes()
        gc.freeze()
        gc.disable()
        poll = select.poll()
        poll.register(self._listener.fileno(), select.POLLIN)
        last = time.monotonic()
        while not stale():
            ready = poll.poll(idle_s * 1000 / 4)
            if not ready:
                if time.monotonic() - last > idle_s:
                    break
                continue
            last = time.monotonic()
            if stale():
                break  # a caller whose connection nobody takes starts another spawner
            self._take()
        os.unlink(self._path)
        self._listener.close()

    def _take(self) -> None:
        conn, _ = self._listener._accept()  # type: ignore[attr-defined]
        if os.fork() == 0:
            # The fork: whatever happens, it ends here and never goes on as a second spawner.
            try:
                import _signal

                _signal.signal(_SIGCHLD, _SIG_DFL)
                self._listener.close()
                os.close(_lock)
                os.setsid()
                self._work(*_sys.hold(conn))
            except BaseException:
                sys.excepthook(*sys.exc_info())  # into SOCKET.log: nobody else hears of it
                raise
            finally:
                os._exit(0)
        os.close(conn)

    def _work(self, control: int, fds: list[int]) -> None:
        """In a worker: the first of its holder has a caller, the others the state of the one before."""
        if len(fds) > 1:
            contents = Contents(fds)
            shim.run(control, contents.state[0], self._own_runtime, contents.fd(1), contents)
            return
        start = self._answer(fds[0])
        if start is not None:
            assert start.listener is not None
            shim.settle(control, start.birth)
            shim.run(control, start.birth, self._own_runtime, start.listener.detach())

    def _answer(self, fd: int) -> command.Answered | None:
        """Do what the caller asks for; the answer when it is a new shim."""
        conn = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, fd)
        caller = _read_caller(conn)
        if caller is None:
            return None
        if caller.environ.get("BOXSHIP_FAILPOINT"):
            failpoint.load(dict(caller.environ))
        answered = command.answer(caller, self._own_runtime)
        failpoint.hit("shim.start.told")
        # Whoever reads the answer reads to its end, and that is when nobody has it open any more.
        for each in (*caller.stdio, caller.cwd):
            os.close(each)
        try:
            conn.send(WORD.pack(EXIT, answered.code, 0, 0), _socket.MSG_NOSIGNAL)
        except OSError:
            pass  # it is gone; whom it has told of the shim will come
        conn.close()
        return answered if answered.listener is not None else None


def _read_caller(conn: _socket.socket) -> command.Caller | None:
    """None: it went away, or speaks another version; it helps itself then."""
    data, ancillary, _, _ = conn.recvmsg(WORD.size, _socket.CMSG_SPACE(4 * _FDS), _socket.MSG_CMSG_CLOEXEC)
    fds = [int.from_bytes(part[i : i + 4], "little") for _, _, part in ancillary for i in range(0, len(part), 4)]
    if len(data) != WORD.size or len(fds) != _FDS:
        return None
    version, argc, envc, umask = WORD.unpack(data)
    if version != VERSION:
        return None
    strings = [part.decode(errors="surrogateescape") for part in read_all(f"/proc/self/fd/{fds[4]}").split(b"\0")]
    os.close(fds[4])
    environ = {}
    for pair in strings[argc : argc + envc]:
        name, _, value = pair.partition("=")
        environ[name] = value
    pid = int.from_bytes(conn.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)[:4], "little")
    return command.Caller(strings[:argc], environ, fds[:3], fds[3], pid, umask)
