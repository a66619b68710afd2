"""Performing system calls in another process: programs of calls, and the process that carries them out.

Runs in: the runtime (the *parent*). The other side is `src/native/init.c`, which runs inside the container's namespaces and
does nothing but what a `Program` says; so no interpreter, library or open file of the host is ever inside a container.

    parent                                            init (sealed copy of src/native/init.c)
      │  spawn(): clone(CLONE_VFORK|namespaces), execveat   │
      │────────────────────────────────────────────────────►│ maps the shared memory, waits
      │  run(program): writes it into the memory,           │
      │  {first, fds} + SCM_RIGHTS over the socket          │
      │────────────────────────────────────────────────────►│ performs call after call
      │◄────────────────────────────────────────────────────│ {index, errno}; 0 = came to the END
      │  closes the socket                                  │ exits, if it still waits

Layout of the memory (little or big endian as the machine is; 16 MiB at 0x200000000000 in init, sparse): operations of 72
bytes each from offset 0, then the data that their pointers mean; the last `SCRATCH_SIZE` bytes are no program's, for
system calls to fill that may have much to say or little.

Not here: what the programs do (`boxship.runtime.init` tells the story of a container).
"""

from __future__ import annotations

import _socket
import os
from _struct import Struct
from sys import byteorder as _ORDER

from boxship.abi import syscalls
from boxship.kit.errors import InvalidArgument
from boxship.linux import _sys

try:
    from boxship.linux._sys import Label, Operations, Reg
except ImportError:
    raise ImportError("boxship.linux._sys is not of this version: build the package again, make build") from None

__all__ = [
    "CTL", "NEXT", "SCRATCH", "SCRATCH_SIZE", "Label", "Program", "Reg", "Remote", "RemoteError", "RemoteGone", "channel",
    "received", "sealed", "spawn",
]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

BASE = 0x200000000000
SIZE = 16 << 20
SCRATCH_SIZE = 1 << 18
SCRATCH = BASE + SIZE - SCRATCH_SIZE
"""Where init has it: an address for arguments."""
_RESULT = Struct("=q")
_WORD = Struct("=II")
_ANSWER = Struct("=Ii")
_OP_SIZE = 72
_RESULT_OFFSET = 16

_END, _FORK, _STORE, _LOAD, _EXPECT, _SET, _ANSWER_NOW = 0x10000, 0x10001, 0x10002, 0x10003, 0x10004, 0x10005, 0x10006
_ASIDE = 0xFFFFFFFE
_RECEIVED = 64

NEXT = -1
"""As `on_err`: go on with the following operation."""


CTL = Reg(1)
"""Holds the remote side's control socket."""


def received(index: int) -> Reg:
    """The register of the index-th descriptor sent along with the program."""
    return Reg(_RECEIVED + index)


class RemoteError(OSError):
    """A system call failed in the remote process; `what` is the description that the program gave to it.

    A description that begins with "!" is the whole message: the errno would only puzzle. One that begins with "@N@" is
    completed by whoever knows what the 32 bits of data at offset N mean, a wait status for example.
    """

    def __init__(self, error: int, what: str, index: int) -> None:
        super().__init__(error, os.strerror(error))
        self.what = what
        self.index = index

    def __str__(self) -> str:
        if self.what.startswith("!"):
            return self.what[1:]
        return f"{self.what}: {(self.strerror or '').lower()}"


class RemoteGone(Exception):
    """The remote process ended (killed, or it executed another program) before it answered."""


class Program(Operations):
    """Operations in order, with the memory that their arguments point to.

    Arguments are integers, `Reg`, None (0), bytes or buffers (a pointer to a copy), and str (a pointer to a
    NUL-terminated path or name). `context` is put in front of every description that follows, e.g. the mount that is being
    worked on. What is called for every operation (`call`, `place`, `new`, `mark` …) is in src/native/program.c, and
    described in _sys.pyi.
    """

    __slots__ = ()

    def keep(self) -> Reg:
        """A register that keeps its value over later programs too: never handed out by `new`."""
        global _kept
        _kept = _kept + 1 if _kept < 511 else 400
        return Reg(_kept)

    def end(self) -> int:
        """Answer success and wait for the next program."""
        return self.call(_END)

    def answer(self) -> int:
        """Answer success, and go on all the same: what follows happens when the runtime is gone."""
        return self.call(_ANSWER_NOW)

    def jump(self, label: Label) -> None:
        """Go on at `label`."""
        self.call(_SET, 0, on_ok=label)

    def set(self, register: Reg, value: int | str | Reg) -> None:
        """Put a number, or the address of a string, into a register."""
        self.call(_SET, value, dst=register)

    def fork(self, flags: int, *, parent: Label, takes_over: bool, what: str) -> int:
        """clone(2) with `flags`: the child goes on with the next operation, the parent at `parent`.

        With `takes_over` the child answers from now on; otherwise it is a helper that ends with an exit or an exec.
        Returns the offset (for `Remote.data`) of the child's pid, 32 bits, as the parent's pid namespace counts: there
        before the child runs, which the operation's result need not be.
        """
        pid = self.place(bytes(4))
        index = self.call(_FORK, flags | 0x00100000, 1 if takes_over else 0, 0, on_ok=parent, what=what)  # PARENT_SETTID
        self.point(index, 2, pid)
        return pid

    def store(self, index_offset: int, value: Reg | int) -> int:
        """Write a register as 32 bits at an offset from `place`, e.g. a descriptor number into a control message."""
        index = self.call(_STORE, 0, value)
        self.point(index, 0, index_offset)
        return index

    def load(self, offset: int, dst: Reg, mask: int = 0xFFFFFFFF) -> None:
        """Put 32 bits at an offset from `place` into a register."""
        self.point(self.call(_LOAD, 0, mask, dst=dst), 0, offset)

    def expect(
        self, offset: int, value: int, *, mask: int = 0xFFFFFFFF, differs: bool = False, error: int, what: str = "",
        on_err: int | Label = 0,
    ) -> None:
        """Fail with errno `error` unless the 32 bits at `offset`, masked, equal (or `differs`: do not equal) `value`."""
        self.point(self.call(_EXPECT, 0, mask, value, int(differs), error, what=what, on_err=on_err), 0, offset)

    def if_failed(self, index: int, error: int, then: Label) -> None:
        """Go on at `then` when operation `index` failed with errno `error`, with the next operation otherwise."""
        result = BASE + index * _OP_SIZE + _RESULT_OFFSET
        self.call(_EXPECT, result, 0xFFFFFFFF, -error & 0xFFFFFFFF, 0, error, on_err=NEXT, on_ok=then)

    def fail(self, error: int, what: str) -> None:
        """Stop here with an error: where the branches that found nothing come together."""
        self.expect(self.place(bytes(4)), 1, error=error, what=what)

    def send_descriptor(self, fd: Reg, what: str) -> None:
        """Send `fd` to the runtime over the control socket; it appears in `Remote.descriptors`."""
        # struct msghdr: one vector, one control message of 24 bytes.
        header = self.place(Struct("=24xQ8xQ8x").pack(1, 24))
        vector = self.place(bytes(8) + (1).to_bytes(8, _ORDER))
        control = self.place(Struct("=QiiiI").pack(20, 1, 1, 0, 0))  # SOL_SOCKET, SCM_RIGHTS
        byte = self.place(b"F")
        self.embed(vector, byte)
        self.embed(header + 16, vector)
        self.embed(header + 32, control)
        self.store(control + 16, fd)
        self.point(self.call(syscalls.SENDMSG, CTL, 0, 0x4000, what=what), 1, header)  # MSG_NOSIGNAL

    def hand_over(self, fd: Reg, channel: Reg, on_err: int | Label) -> None:
        """Tell the number of `fd` over `channel` and wait until the other side has fetched it with pidfd_getfd(2).

        Only write(2) and read(2): the descriptor may be the listener of a filter that stops all else.
        """
        word = self.place(_WORD.pack(_ASIDE, 0))
        self.store(word + 4, fd)
        self.point(self.call(syscalls.WRITE, channel, 0, 8, what="handing over the seccomp listener", on_err=on_err), 1, word)
        self.point(self.call(syscalls.READ, channel, 0, 8, what="waiting for the seccomp agent", on_err=on_err), 1, word)
        self.call(syscalls.CLOSE, fd, on_err=NEXT)

    def what(self, index: int) -> str:
        """The description of an operation, its context in front."""
        what, context = self.texts[index], self.contexts[index]
        if not context or not what:
            return what
        mark = ""
        if what[0] == "!":
            mark = "!"
        elif what[0] == "@":
            mark = what[: what.index("@", 1) + 1]
        return mark + context + what[len(mark) :]

    @property
    def descriptions(self) -> list[str]:
        """Of every operation, in order."""
        return [self.what(index) for index in range(len(self))]


_kept = 400


class Remote:
    """A process that performs programs. Owns its control socket and its mapping of the shared memory.

    `descriptors` are those that the remote process sent back, in order; whoever takes one owns it.
    """

    def __init__(self, pid: int | Callable[[], int], ctl: int, memory: int) -> None:
        """Takes the descriptors `ctl` and `memory`. `pid` may be a promise, kept at the first use of `self.pid`.

        Programs can be sent before: they wait in the socket.
        """
        self._pid = pid
        self.ctl = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, ctl)
        self.memory = memory
        self.descriptors: list[int] = []
        self._program: Program | None = None

    @property
    def pid(self) -> int:
        """The process. Raises OSError when it could not be started after all."""
        if not isinstance(self._pid, int):
            try:
                self._pid = self._pid()
            except OSError as error:
                failed = error

                def again() -> int:
                    raise failed

                self._pid = again  # never 0, which kill(2) would take for everybody
                raise
        return self._pid

    @pid.setter
    def pid(self, pid: int) -> None:
        self._pid = pid

    def settle(self) -> None:
        """Have the promise of a pid kept, if it was not yet. Raises OSError."""
        self.pid  # noqa: B018

    def close(self) -> None:
        """Let go: a remote process that waits for a program exits."""
        self.ctl.close()
        if self.memory >= 0:
            os.close(self.memory)
            self.memory = -1
        for fd in self.descriptors:
            os.close(fd)
        self.descriptors = []

    def send(self, program: Program, fds: Sequence[int] = ()) -> None:
        """Start `program` without waiting for its answer; `fds` arrive in the registers `received(0)` and following."""
        image = program.image()
        if len(image) > SIZE - SCRATCH_SIZE:
            what = f"arguments, environment or paths of {len(image)} bytes"
            raise InvalidArgument(f"{what} are more than the {SIZE - SCRATCH_SIZE} that init takes")
        written = 0
        while written < len(image):
            written += os.pwrite(self.memory, image[written:] if written else image, written)
        self._program = program
        word = _WORD.pack(0, len(fds))
        try:
            if fds:
                rights = Struct(f"={len(fds)}i").pack(*fds)
                self.ctl.sendmsg([word], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])
            else:
                self.ctl.send(word)
        except (BrokenPipeError, ConnectionResetError):
            raise RemoteGone("the container's init ended unexpectedly") from None

    def wait(self) -> int:
        """Wait for the answer: the index of the END that was reached, or ~fd for `Program.hand_over`.

        Raises RemoteError, or RemoteGone when the process ended or executed a program.
        """
        assert self._program is not None
        while True:
            try:
                message, ancillary, _, _ = self.ctl.recvmsg(8, 32, _socket.MSG_CMSG_CLOEXEC)
            except ConnectionResetError:
                message, ancillary = b"", []
            for _, _, data in ancillary:
                self.descriptors.append(int.from_bytes(data[:4], _ORDER))
            if len(message) == 1:
                continue
            if len(message) != 8:
                raise RemoteGone("the container's init ended unexpectedly")
            index: int
            error: int
            index, error = _ANSWER.unpack(message)
            if index == _ASIDE:
                return ~error
            if error:
                raise RemoteError(error, self._program.what(index), index)
            return int(index)

    def run(self, program: Program, fds: Sequence[int] = ()) -> int:
        """`send` and `wait`."""
        self.send(program, fds)
        return self.wait()

    def fetched(self) -> None:
        """Let a process go on that waits in `Program.hand_over`."""
        self.ctl.send(_WORD.pack(0, 0))

    def release(self) -> None:
        """Let a process go on that waits for the word to start; returns when it executed its program.

        Raises RemoteError when it could not.
        """
        self.fetched()
        try:
            self.wait()
        except RemoteGone:
            return
        raise RemoteGone("the container's init came back instead of executing its program")

    @property
    def descriptions(self) -> list[str]:
        """Those of the program that was sent last."""
        assert self._program is not None
        return self._program.descriptions

    def result(self, index: int) -> int:
        """What operation `index` of the last program returned; negative errno when it failed."""
        return int(_RESULT.unpack(os.pread(self.memory, 8, index * _OP_SIZE + _RESULT_OFFSET))[0])

    def data(self, offset: int, size: int) -> bytes:
        """`size` bytes of the last program's data, at an offset from `place`."""
        assert self._program is not None
        return os.pread(self.memory, size, self._program.data_base + offset)

    def scratch(self, size: int) -> bytes:
        """The first bytes at `SCRATCH`."""
        return os.pread(self.memory, size, SIZE - SCRATCH_SIZE)


def channel() -> tuple[int, int, int]:
    """(our end of the control socket, the remote end, the shared memory), all close-on-exec."""
    ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0)
    memory = os.memfd_create("boxship-init", os.MFD_CLOEXEC)
    os.ftruncate(memory, SIZE)
    return ours.detach(), theirs.detach(), memory


def spawn(exe: int, name: str, stdio: Sequence[int], clone_flags: int = 0, cgroup: int = -1) -> Remote:
    """Start the executor `exe` (an open, sealed copy of it) as a child with the three descriptors `stdio`.

    `clone_flags`: new namespaces, but neither a user namespace (the exec would lose its capabilities before
    ids are mapped) nor a time namespace (clone(2) cannot). `cgroup`: an open directory of the v2 hierarchy to be born in
    (Linux ≥ 5.7).
    """
    ours, theirs, memory = channel()
    try:
        pid = _sys.spawn(exe, name, [*stdio, theirs, memory], clone_flags, cgroup)
    except BaseException:
        os.close(ours)
        os.close(memory)
        raise
    finally:
        os.close(theirs)
    return Remote(pid, ours, memory)


def sealed(data: bytes, name: str) -> int:
    """An executable copy of a program in memory that nobody can change: memfd with all seals (Linux ≥ 3.17).

    MFD_EXEC says so where vm.memfd_noexec asks for it (Linux ≥ 6.3).
    """
    import fcntl

    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        fd = os.memfd_create(name, flags | 0x10)  # MFD_EXEC
    except OSError:
        fd = os.memfd_create(name, flags)
    try:
        os.write(fd, data)
        os.fchmod(fd, 0o555)
        # F_SEAL_EXEC is left out: it is newer than the kernels we serve, and the mode gives nothing away.
        fcntl.fcntl(fd, 1033, 0xF)  # F_ADD_SEALS: SEAL | SHRINK | GROW | WRITE
    except BaseException:
        os.close(fd)
        raise
    return fd
