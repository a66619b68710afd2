"""The spawner: a process that has everything imported, and is forked for each shim.

Runs in: the spawner, single-threaded, one a user and set of namespaces; it is no shim's parent in any sense that matters: killed
with SIGKILL, it takes nobody with it.
Spec: the message of `src/native/caller.h`: {version, argc, envc, umask} with descriptors 0, 1, 2, the folder, and a file of all
strings, each with a NUL behind it; the answer is {EXIT, code}.

What is asked for is done in a fork, so that the spawner itself reads nothing that a caller wrote, and a caller that stalls is
alone with it. For a new shim that fork hands over the socket and what the shim has to know, and the spawner forks once more: the
shim's memory is the spawner's, and none of what it took to read the request.
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
from boxship.shim import command

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
_LAST_BIRTHS_MS = 1000
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
        self._births, self._tell = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)

    def serve(self, stale: Callable[[], bool], idle_s: float = IDLE_S) -> None:
        """Fork for every caller and every shim, until nobody came for a while, or the package is another one than was imported
        (`stale`)."""
        import _signal  # type: ignore[import-not-found]

        _signal.signal(_SIGCHLD, _SIG_IGN)  # nobody asks how a shim ended
        gc.collect()
        self._fillings = fill_holes()
        gc.freeze()
        gc.disable()
        poll = select.poll()
        poll.register(self._listener.fileno(), select.POLLIN)
        poll.register(self._births.fileno(), select.POLLIN)
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
            for fd, _ in ready:
                self._take(fd)
        os.unlink(self._path)
        poll.unregister(self._listener.fileno())
        self._listener.close()
        # What was promised is kept: shims that were asked for before.
        while poll.poll(_LAST_BIRTHS_MS):
            self._take(self._births.fileno())

    def _take(self, fd: int) -> None:
        if fd == self._listener.fileno():
            conn, _ = self._listener._accept()  # type: ignore[attr-defined]
            self._fork(self._answer, [conn])
        else:
            _, ancillary, _, _ = self._births.recvmsg(1, _socket.CMSG_SPACE(8), _socket.MSG_CMSG_CLOEXEC)
            given = [int.from_bytes(part[i : i + 4], "little") for _, _, part in ancillary for i in range(0, len(part), 4)]
            if len(given) == 2:
                self._fork(self._be_shim, given)

    def _fork(self, work: Callable[[list[int]], None], given: list[int]) -> None:
        if os.fork() == 0:
            # The fork: whatever happens, it ends here and never goes on as a second spawner.
            try:
                import _signal

                _signal.signal(_SIGCHLD, _SIG_DFL)
                self._listener.close()
                self._births.close()
                os.close(_lock)
                work(given)
            except BaseException:
                sys.excepthook(*sys.exc_info())  # into SOCKET.log: nobody else hears of it
                raise
            finally:
                os._exit(0)
        for fd in given:
            os.close(fd)

    def _answer(self, given: list[int]) -> None:
        conn = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, given[0])
        caller = _read_caller(conn)
        if caller is None:
            return
        if caller.environ.get("BOXSHIP_FAILPOINT"):
            failpoint.load(dict(caller.environ))
        answered = command.answer(caller, self._own_runtime)
        if answered.listener is not None:
            birth = os.memfd_create("birth", os.MFD_CLOEXEC)
            os.write(birth, answered.birth)
            fds = Struct("=2i").pack(answered.listener.fileno(), birth)
            self._tell.sendmsg([b"b"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, fds)])
        failpoint.hit("shim.start.told")
        conn.send(WORD.pack(EXIT, answered.code, 0, 0), _socket.MSG_NOSIGNAL)

    def _be_shim(self, given: list[int]) -> None:
        self._tell.close()
        listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, given[0])
        birth = os.pread(given[1], 1 << 21, 0)
        os.close(given[1])
        command.be_shim(listener, birth, self._own_runtime)


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
