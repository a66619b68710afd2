"""The spawner: a process that has everything imported, and is forked for each shim.

Runs in: the spawner, single-threaded, one a user and set of namespaces; it is no shim's parent in any sense that matters: killed
with SIGKILL, it takes nobody with it.
Spec: the message of `src/native/caller.h`: {version, argc, envc, umask} with descriptors 0, 1, 2, the folder, and a file of all
strings, each with a NUL behind it; the answer is {EXIT, code}.

What is asked for is done in the fork, and with `start` the fork becomes the shim. So the spawner itself reads nothing that a
caller wrote, and a caller that stalls is alone with it.
"""

from __future__ import annotations

import _socket
import gc
import os
import select
import time
from _struct import Struct

from boxship.kit import failpoint
from boxship.kit.files import read_all
from boxship.shim import command

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from boxship.api.oci_runtime.runtime import Carrier

IDLE_S = 300.0
VERSION = 1
WORD = Struct("=iiii")
EXIT = 5
_FDS = 5
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


def serve(
    listener: _socket.socket, path: str, own_runtime: Carrier | None, stale: Callable[[], bool], idle_s: float = IDLE_S,
) -> None:
    """Fork for every caller, until nobody came for a while, or the package is another one than was imported (`stale`)."""
    import _signal  # type: ignore[import-not-found]

    _signal.signal(_SIGCHLD, _SIG_IGN)  # nobody asks how a shim ended
    gc.collect()
    gc.freeze()
    gc.disable()
    poll = select.poll()
    poll.register(listener.fileno(), select.POLLIN)
    last = time.monotonic()
    while not stale():
        if not poll.poll(idle_s * 1000 / 4):
            if time.monotonic() - last > idle_s:
                break
            continue
        last = time.monotonic()
        fd, _ = listener._accept()  # type: ignore[attr-defined]
        if os.fork() == 0:
            # The fork: whatever happens, it ends here and never goes on as a second spawner.
            try:
                _signal.signal(_SIGCHLD, _SIG_DFL)
                listener.close()
                os.close(_lock)
                _serve_one(fd, own_runtime)
            finally:
                os._exit(0)
        os.close(fd)
    os.unlink(path)


def _serve_one(fd: int, own_runtime: Carrier | None) -> None:
    conn = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, fd)
    caller = _read_caller(conn)
    if caller is None:
        return
    if caller.environ.get("BOXSHIP_FAILPOINT"):
        failpoint.load(dict(caller.environ))
    answered = command.answer(caller, own_runtime)
    conn.send(WORD.pack(EXIT, answered.code, 0, 0), _socket.MSG_NOSIGNAL)
    conn.close()
    for given in (*caller.stdio, caller.cwd):
        os.close(given)
    if answered.becomes is not None:
        answered.becomes.become(own_runtime)


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
    os.umask(umask)
    pid = int.from_bytes(conn.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)[:4], "little")
    return command.Caller(strings[:argc], environ, fds[:3], fds[3], pid)
