"""The warm server of boxrun, and the workers that it forks, which serve one command after the other.

Runs in: the *server*, one a user, identity and set of namespaces: single-threaded, everything imported, its heap frozen.
It keeps a few workers that wait on the listening socket already, so that not even the fork is on a command's way. A
*worker* serves calls of the native boxrun (`src/native/boxrun.c`, where the messages are drawn), one at a time. It goes on
to the next only as it was before: after a command that failed, or that left a descriptor or a child, it ends.
The server starts by itself after a command that had to do without it, and ends when it had none for a while.

What the caller is, and the worker cannot be, it asks the caller to do: children are spawned by the caller's process, so
that they inherit its limits, session, cgroups and place in the tree of processes.

    board      memory that all share, two bytes a worker, written by the worker alone once it lives:
               what it does (NOBODY, WAITING, BUSY, LEAVING), and how many commands it has begun (modulo 256)

Invariants: a worker acts only for a caller with its own user, capabilities, confinement and namespaces (`_is_same`),
and only with code that is still what is installed (`is_stale`). Nothing of a command outlives it in the worker.
"""

from __future__ import annotations

import _socket
import errno
import os
import select
import time
from _struct import Struct

from boxship.abi import syscalls
from boxship.kit.errors import BoxshipError, Unavailable
from boxship.kit.files import is_locked
from boxship.linux import _sys, remote

TYPE_CHECKING = False
if TYPE_CHECKING:
    import mmap
    from collections.abc import Sequence

    from boxship.runtime.rehearsal import Rehearsal

IDLE_S = 300.0
IDLE_ELSEWHERE_S = 10.0
"""In a mount namespace that is not the machine's own: the server holds it, and with it all that is mounted there."""
WORKERS = 3
"""That wait at most; one that comes back from a command while so many do leaves."""
_SPARE = 2
"""That wait at least: with fewer the server forks another, soon."""
_COMMANDS = 64
"""After which a worker ends: the collector of garbage is off, and what it would find goes with the process."""
_SLOTS = 512
_NOBODY, _WAITING, _BUSY, _LEAVING = 0, 1, 2, 3
_WORD = Struct("=iiii")
VERSION = 2
"""Of the messages: boxrun.c's and the worker's must be the same."""
_PR_SET_PDEATHSIG = 1
_REFILL_S = 0.03
_REHEARSALS = 30
_IN_CHANGES = 0x8 | 0x40 | 0x80 | 0x200 | 0x400 | 0x800  # CLOSE_WRITE, MOVED_FROM, MOVED_TO, DELETE, DELETE_SELF, MOVE_SELF
_SPAWN, _WAIT, _FDS, _ATTEND, _EXIT = 1, 2, 3, 4, 5
_FDS_AT_ONCE = 200  # as boxrun.c has room for
_REPLY, _WINDOW, _ENDED = 0, 1, 2
_FIRST_MOUNT_NAMESPACES = (0xEFFFFFF8, 0xF0000000, 0xF0000001)
"""Inode numbers of the first one: MNT_NS_INIT_INO since Linux 6.18, and what the kernel's counter began with before."""
_FIELDS = (
    b"\nUid:", b"\nGid:", b"\nGroups:", b"\nCapInh:", b"\nCapPrm:", b"\nCapEff:", b"\nCapBnd:", b"\nCapAmb:",
    b"\nNoNewPrivs:", b"\nSeccomp:",
)
_SO_PEERPIDFD = 77
_KINDS = ("mnt", "pid", "net", "user", "uts", "ipc", "cgroup", "time")


class CallerGone(Unavailable):
    """The native process ended before its command did."""

    def __init__(self) -> None:
        super().__init__("the calling boxrun process was killed")


class Caller:
    """The native process at the other end, as the parent of containers (see `boxship.runtime.parent.Parent`).

    `spent`: serving it has changed this process.
    """

    def __init__(self, conn: _socket.socket, stdio: Sequence[int], pid: int) -> None:
        self.conn = conn
        self.stdio = stdio
        self.pid = pid
        self.spent = False
        self._spawning: remote.Remote | None = None

    def ask(self, what: int, a: int = 0, b: int = 0, fds: Sequence[int] = ()) -> None:
        """Send a word. Raises CallerGone."""
        if self._spawning is not None:
            # Answers come in the order of the questions: take the one that is still to come.
            spawning, self._spawning = self._spawning, None
            spawning.settle()
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, Struct(f"={len(fds)}i").pack(*fds))] if fds else []
        try:
            self.conn.sendmsg([_WORD.pack(what, a, b, 0)], rights)
        except (BrokenPipeError, ConnectionResetError):
            raise CallerGone from None

    def answer(self, descriptors: int = 0) -> tuple[int, int, int, list[int]]:
        """(kind, two numbers, descriptors) of the next word. Raises CallerGone."""
        try:
            space = _socket.CMSG_SPACE(4 * (descriptors or 1))
            data, ancillary, _, _ = self.conn.recvmsg(_WORD.size, space, _socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:
            raise CallerGone from None
        if len(data) != _WORD.size:
            raise CallerGone
        fds = [int.from_bytes(part[i : i + 4], "little") for _, _, part in ancillary for i in range(0, len(part), 4)]
        kind, a, b, _ = _WORD.unpack(data)
        return kind, a, b, fds

    def spawn(self, exe: int, name: str, stdio: Sequence[int], clone_flags: int, cgroup: int = -1) -> remote.Remote:
        """See `Parent`."""
        ours, theirs, memory = remote.channel()
        try:
            self.ask(_SPAWN, clone_flags, int(cgroup >= 0), [exe, *stdio, theirs, memory, *([cgroup] if cgroup >= 0 else [])])
        except BaseException:
            os.close(ours)
            os.close(memory)
            raise
        finally:
            os.close(theirs)

        def promise() -> int:
            # The caller clones while we think about what to tell its child.
            self._spawning = None
            _, pid, _, _ = self.answer()
            if pid < 0:
                raise OSError(-pid, os.strerror(-pid), f"clone {name}")
            return pid

        self._spawning = remote.Remote(promise, ours, memory)
        return self._spawning

    def wait(self, pid: int) -> int:
        """See `Parent`."""
        self.ask(_WAIT, pid)
        _, error, status, _ = self.answer()
        if error < 0:
            raise OSError(-error, os.strerror(-error))
        return status

    def attend(self, pid: int, terminal: int) -> int:
        """See `Parent`."""
        from boxship.linux.process import exit_code

        if terminal < 0:
            self.ask(_ATTEND, pid)
            _, status, _, _ = self.answer()
            return exit_code(status)
        from boxship.linux.terminal import Session

        session = Session(terminal, self.stdio[0], self.stdio[1])
        try:
            self.ask(_ATTEND, pid, 1)
            poll = select.poll()
            poll.register(self.conn, select.POLLIN)
            while True:
                session.register(poll)
                ready = dict(poll.poll())
                session.copy(ready)
                if self.conn.fileno() in ready:
                    kind, status, _, _ = self.answer()
                    if kind == _ENDED:
                        return exit_code(status)
                    session.resize()
        finally:
            session.close()

    def inherited(self, count: int) -> list[int]:
        """See `Parent`."""
        if count > _FDS_AT_ONCE // 2:
            _have_room()
            self.spent = True  # a hook of the next command shall not have that limit
        fds: list[int] = []
        while len(fds) < count:
            wanted = min(count - len(fds), _FDS_AT_ONCE)
            self.ask(_FDS, wanted, 3 + len(fds))
            _, error, _, came = self.answer(wanted)
            if error == 0 and len(came) < wanted:
                error = -errno.EMFILE  # ours, not the caller's
            if error < 0:
                raise OSError(-error, os.strerror(-error))
            fds += came
        return fds


def _have_room() -> None:
    """As many open files as this process may have: those of a caller may be more than a new process's usual limit."""
    from boxship.abi.process import RLIMITS
    from boxship.linux import rlimits

    kind = RLIMITS["RLIMIT_NOFILE"]
    soft, hard = rlimits.get(0, kind)
    if soft < hard:
        rlimits.prlimit(0, kind, hard, hard)


def launch(path: str) -> None:
    """Start a server on the socket `path` in the background, detached from the caller in every way, and return at once."""
    import sys

    if _has_server(path):
        return
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        return
    # The child does nothing that could go wrong half-way: it becomes another program or ends.
    try:
        os.setsid()
        if os.fork():
            os._exit(0)
        null = os.open("/dev/null", os.O_RDWR)
        for fd in range(3):
            os.dup2(null, fd)
        os.closerange(3, 4096)
        os.chdir("/")
        environment = {k: v for k, v in os.environ.items() if k in ("LANG", "XDG_RUNTIME_DIR")}
        environment["PATH"] = "/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/sbin:/usr/local/bin"
        os.execve(sys.executable, [sys.executable, "-I", "-m", "boxship.runtime.warm", path], environment)
    finally:
        os._exit(127)


def _has_server(path: str) -> bool:
    try:
        return is_locked(path + ".lock")
    except OSError:
        return False


def serve(path: str) -> None:
    """The server's life. Returns when it was idle long enough, or when another one has the place."""
    import fcntl

    folder = os.path.dirname(path)
    os.makedirs(os.path.dirname(folder), 0o711, exist_ok=True)
    os.makedirs(folder, 0o700, exist_ok=True)
    os.umask(0o077)
    lock = os.open(path + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    rehearsal = warm_up()
    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0)
    if os.path.lexists(path):
        os.unlink(path)
    listener.bind(path)
    listener.listen(128)
    try:
        _keep_workers(listener, rehearsal)
    finally:
        os.unlink(path)
        os.unlink(path + ".lock")


def warm_up() -> Rehearsal:
    """Import and prepare what commands need, then freeze the heap: pages stay shared with the workers."""
    import fcntl  # noqa: F401
    import gc
    import importlib
    import pwd  # noqa: F401
    import signal  # noqa: F401

    for name in (
        "oci.config", "oci.validate", "oci.text", "linux.seccomp", "linux.capabilities", "linux.cgroups", "linux.cgroups.v1",
        "linux.cgroups.v2", "linux.idmaps", "linux.keyring", "linux.lsm", "linux.mounts", "linux.namespaces", "linux.process",
        "linux.rlimits", "linux.scheduler", "linux.terminal", "runtime.create", "runtime.exec", "runtime.hooks",
        "runtime.lifecycle", "runtime.resources", "runtime.sources", "runtime.stats", "runtime.command.main",
        "runtime.command.commands", "runtime.command.table",
    ):
        importlib.import_module("boxship." + name)
    from boxship.linux import capabilities
    from boxship.linux.cgroups import arrangement
    from boxship.runtime.executor import executor
    from boxship.runtime.rehearsal import Rehearsal

    executor()
    capabilities.last_cap()
    arrangement.prepare()
    rehearsal = Rehearsal()
    for _ in range(_REHEARSALS):
        rehearsal.perform()
    _watch_files()
    gc.collect()
    gc.freeze()
    gc.disable()
    return rehearsal


_changes: select.poll | None = None


def _watch_files() -> None:
    """Have the kernel tell when a file of the package is written, replaced or removed: an upgrade, or an edit."""
    global _changes
    import sys

    fd = _sys.syscall(syscalls.INOTIFY_INIT1, os.O_CLOEXEC | os.O_NONBLOCK)
    files = [getattr(module, "__file__", None) for name, module in sys.modules.items() if name.startswith("boxship")]
    for folder in {os.path.dirname(path) for path in files if path}:
        _sys.syscall(syscalls.INOTIFY_ADD_WATCH, fd, os.fsencode(folder) + b"\0", _IN_CHANGES)
    _changes = select.poll()
    _changes.register(fd, select.POLLIN)


def is_stale() -> bool:
    """Whether the package was upgraded or edited since. Nobody reads the event, so that every worker sees it."""
    return _changes is not None and bool(_changes.poll(0))


def _keep_workers(listener: _socket.socket, rehearsal: Rehearsal) -> None:
    """Fork workers as they are taken, reap them, and end when idle or stale."""
    import mmap

    board = mmap.mmap(-1, 2 * _SLOTS)
    woken, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    patience = IDLE_S if _at_home() else IDLE_ELSEWHERE_S
    last, begun = time.monotonic(), b""
    poll = select.poll()
    poll.register(woken, select.POLLIN)
    # The end of a worker wakes the server: one that was killed while it waited leaves callers with nobody to answer.
    workers: dict[int, tuple[int, int]] = {}

    def fork() -> None:
        slot = board[:_SLOTS].find(_NOBODY)
        if slot < 0:
            time.sleep(_REFILL_S)  # so many at work: callers wait for one of them
            return
        board[slot] = _WAITING
        pid = _fork_worker(listener, _Place(board, slot, wake), rehearsal, [handle for handle, _ in workers.values()])
        workers[pid] = os.pidfd_open(pid), slot
        poll.register(workers[pid][0], select.POLLIN)

    for _ in range(WORKERS):
        fork()
    while True:
        waiting = board[:_SLOTS].count(_WAITING)
        if not waiting:
            fork()
        # Not at once, which would take a processor from the command that has just begun, and whose worker may be back.
        elif waiting < _SPARE and not poll.poll(_REFILL_S * 1000):
            fork()
            continue
        poll.poll(0 if waiting < _SPARE else patience * 1000 / 4)
        try:
            stale = b"s" in os.read(woken, 4096)
        except BlockingIOError:
            stale = False
        while True:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            handle, slot = workers.pop(pid)
            board[slot] = _NOBODY
            poll.unregister(handle)
            os.close(handle)
        now = board[:]
        if now[_SLOTS:] != begun or _BUSY in now[:_SLOTS]:
            last, begun = time.monotonic(), now[_SLOTS:]
        if stale or time.monotonic() - last > patience:
            for pid, (_, slot) in workers.items():
                # One that is being taken in this moment has done nothing yet: its caller does it all.
                if board[slot] == _WAITING:
                    os.kill(pid, 9)
            return


class _Place:
    """A worker's place on the board."""

    __slots__ = ("_board", "_slot", "_wake")

    def __init__(self, board: mmap.mmap, slot: int, wake: int) -> None:
        self._board = board
        self._slot = slot
        self._wake = wake

    def take(self) -> None:
        """A command begins."""
        board = self._board
        board[self._slot] = _BUSY
        board[_SLOTS + self._slot] = (board[_SLOTS + self._slot] + 1) % 256
        if board[:_SLOTS].count(_WAITING) < _SPARE:
            self.tell(b"t")

    def leave(self) -> None:
        """No more commands."""
        self._board[self._slot] = _LEAVING

    def come_back(self) -> bool:
        """Wait again; False when enough others do."""
        board = self._board
        if board[:_SLOTS].count(_WAITING) >= WORKERS:
            return False
        board[self._slot] = _WAITING
        return True

    def tell(self, word: bytes) -> None:
        """Wake the server: "t" for a command that began with few waiting, "s" for code that is not current any more."""
        try:
            os.write(self._wake, word)
        except (BlockingIOError, BrokenPipeError):
            pass  # it has enough to read, or is gone


def _at_home() -> bool:
    """Whether this is the machine's own mount namespace."""
    own = os.stat("/proc/self/ns/mnt").st_ino
    try:
        return own == os.stat("/proc/1/ns/mnt").st_ino
    except PermissionError:
        return own in _FIRST_MOUNT_NAMESPACES  # pid 1 is another user's, or protected


def _fork_worker(listener: _socket.socket, place: _Place, rehearsal: Rehearsal, handles: Sequence[int]) -> int:
    server = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    # The worker: whatever happens, it ends here and never goes on as a second server.
    code = 1
    try:
        for handle in handles:
            os.close(handle)
        rehearsal.perform()
        code = _work(listener, place, server)
    finally:
        os._exit(code)


def _work(listener: _socket.socket, place: _Place, server: int) -> int:
    from boxship.linux.cgroups import arrangement

    # Woken when a mount of ours comes or goes: the hierarchies may be others then.
    mounts = os.open("/proc/self/mounts", os.O_RDONLY | os.O_CLOEXEC)
    changed = select.poll()
    changed.register(mounts, select.POLLPRI)
    identity = _identity("self")
    own = _descriptors()
    for _ in range(_COMMANDS):
        _die_with(server)
        # Blocking: the kernel wakes one waiting worker for a caller, not all.
        fd, _address = listener._accept()  # type: ignore[attr-defined]
        place.take()
        _die_with(0)
        conn = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, fd)
        if is_stale():
            place.tell(b"s")
            return 0
        if changed.poll(0):
            arrangement.forget()
        fit = _serve_one(conn, identity)
        conn.close()
        if not (fit and _is_as_before(own, identity) and place.come_back()):
            break
    place.leave()
    return 0


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _is_as_before(descriptors: int, identity: list[object]) -> bool:
    """Whether a command has left nothing: no descriptor, no child, no folder that is held.

    A command goes to other network namespaces for devices; that it came back is seen to here once more.
    """
    os.chdir("/")
    if _descriptors() != descriptors or os.stat("/proc/self/ns/net").st_ino != identity[_KINDS.index("net")]:
        return False
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return True
    return False


def _die_with(server: int) -> None:
    """A worker that waits is nobody's when its server is gone; one at work (0) has a command to finish."""
    _sys.syscall(syscalls.PRCTL, _PR_SET_PDEATHSIG, 9 if server else 0, 0, 0, 0)
    if server and os.getppid() != server:
        os._exit(0)


def _identity(pid: int | str) -> list[object]:
    """What a process sees and may. Raises OSError, ValueError when that cannot be told."""
    found: list[object] = [os.stat(f"/proc/{pid}/ns/{kind}").st_ino for kind in _KINDS]
    root = os.stat(f"/proc/{pid}/root")
    found += (root.st_dev, root.st_ino)
    fd = os.open(f"/proc/{pid}/status", os.O_RDONLY | os.O_CLOEXEC)
    try:
        status = os.read(fd, 1 << 16)
    finally:
        os.close(fd)
    for field in _FIELDS:
        start = status.index(field)
        found.append(status[start : status.index(b"\n", start + 1)])
    try:
        fd = os.open(f"/proc/{pid}/attr/current", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return found
    try:
        found.append(os.read(fd, 4096))
    except OSError:
        pass  # there is no security module
    finally:
        os.close(fd)
    return found


def _is_same(pid: int, identity: list[object]) -> bool:
    try:
        return _identity(pid) == identity
    except (OSError, ValueError):
        return False  # gone already


def _is_alive(conn: _socket.socket) -> bool:
    """Whether the process that connected is still there, so that what was read of its number was about it (Linux ≥ 6.5)."""
    try:
        handle = int.from_bytes(conn.getsockopt(_socket.SOL_SOCKET, _SO_PEERPIDFD, 4), "little")
    except OSError:
        return True
    try:
        ended = select.poll()
        ended.register(handle, select.POLLIN)
        return not ended.poll(0)
    finally:
        os.close(handle)


def _serve_one(conn: _socket.socket, identity: list[object]) -> bool:
    """Whether the worker is fit for another command."""
    from boxship.runtime.command.main import Invocation

    credentials = conn.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)
    pid = int.from_bytes(credentials[:4], "little")
    if not _is_same(pid, identity) or not _is_alive(conn):
        return True  # it does the work itself, with what it may
    data, ancillary, _, _ = conn.recvmsg(_WORD.size, _socket.CMSG_SPACE(4 * 5), _socket.MSG_CMSG_CLOEXEC)
    fds = [int.from_bytes(part[i : i + 4], "little") for _, _, part in ancillary for i in range(0, len(part), 4)]
    if len(data) != _WORD.size or len(fds) != 5:
        return False
    version, argc, envc, umask = _WORD.unpack(data)
    if version != VERSION:
        return False
    *stdio, folder, strings = fds
    size = os.fstat(strings).st_size
    text = os.pread(strings, size, 0).split(b"\0")
    os.close(strings)
    argv = [os.fsdecode(part) for part in text[:argc]]
    environ = dict(part.split("=", 1) for part in map(os.fsdecode, text[argc : argc + envc]) if "=" in part)
    if "restore" in argv or "checkpoint" in argv or "NOTIFY_SOCKET" in environ:
        # To be done by the caller's own kin: CRIU makes the container's init a child of who started it (and may be told
        # of a descriptor by its number), and a service manager knows its services by the pid of who sends a message.
        return False
    os.umask(umask)
    os.fchdir(folder)
    os.close(folder)
    try:
        cwd = os.getcwd()
    except FileNotFoundError:
        cwd = "/"
    caller = Caller(conn, stdio, pid)
    call = Invocation(argv, caller, environ, cwd)
    code = call.run()
    # Before the last word: whoever reads what the command wrote waits for its end.
    for fd in stdio:
        os.close(fd)
    try:
        caller.ask(_EXIT, code)
    except CallerGone:
        return False
    return call.done and not caller.spent


def main() -> None:
    """`python -m boxship.runtime.warm SOCKET`."""
    import sys

    try:
        serve(sys.argv[1])
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.ENOSPC):
            raise
    except BoxshipError:
        pass  # a machine on which it cannot be warm; commands tell what is wrong with it


if __name__ == "__main__":
    main()
