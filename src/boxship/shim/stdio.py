"""Standard streams of a container's process, without a terminal: what the client named is what the process gets.

Runs in: the shim.
Spec: containerd's runtime v2, "IO": no scheme or `fifo` a named pipe made by the client, `file` a file that is appended to,
`binary` a program that is given the streams (`boxship.shim.logger`); nothing named is /dev/null.

Between a FIFO and the process there is a pipe, as with containerd's own shim: the FIFO is a file of the host, which is nothing
for the process to see, and which criu could not find again. The shim keeps the FIFO's other end, so that nothing is lost and
nobody gets SIGPIPE while the client is away: what is written then waits until somebody reads it, up to the task's deletion, also
when the process is over; a reader sees the end of file as soon as no process of the container can write any more.

Not here: terminals (`boxship.shim.console`).
"""

from __future__ import annotations

import os
import stat

from boxship.kit.errors import InvalidArgument, NotFound, Unsupported
from boxship.kit.loop import Later
from boxship.shim.copying import Copy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from boxship.kit.loop import Loop
    from boxship.shim.handover import Contents, Parcel
    from boxship.shim.logger import Logger

_DRAIN_S = 10.0
_LOOK_S = 0.05


def split_uri(uri: str) -> tuple[str, str, str]:
    """(scheme, path, query) of `scheme://path?query`; no scheme for a plain path."""
    scheme, colon, rest = uri.partition("://")
    if not colon:
        return "", uri, ""
    path, _, query = rest.partition("?")
    return scheme, path, query


def append_to(path: str) -> int:
    """A descriptor that appends to a file, which is made with its folder where it is missing. Raises OSError."""
    os.makedirs(os.path.dirname(path) or "/", exist_ok=True)
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)


class Stdio:
    """The three streams of one process.

    Attributes:
        fds: what the runtime is given, until `handed_over`.
        logger: the program that takes the output, or None.
    """

    def __init__(self, loop: Loop, logger: Logger | None = None, owner: tuple[int, int] = (0, 0)) -> None:
        """`owner`: uid and gid for what is made here, where the container's root is another user."""
        self.fds: list[int] = []
        self.logger = logger
        self._loop = loop
        self._kept: list[int] = []
        self._stdin_writer = -1
        self._input: Copy | None = None
        self._outputs: list[Copy] = []
        self._drained: Later | None = None
        self._owner = owner

    def open(self, stdin: str, stdout: str, stderr: str) -> None:
        """Raises NotFound, InvalidArgument, Unsupported, OSError; `close` then, too."""
        self.fds.append(self._open_input(stdin))
        if self.logger is not None:
            self.fds += [os.dup(self.logger.stdout), os.dup(self.logger.stderr)]
            self.logger.handed_over()
        elif split_uri(stdout)[0] == "file":
            self.fds.append(append_to(split_uri(stdout)[1]))
            self.fds.append(os.dup(self.fds[1]))
        else:
            self.fds.append(self._open_output(stdout))
            self.fds.append(self._open_output(stderr))

    def _pipe(self) -> tuple[int, int]:
        reader, writer = os.pipe2(os.O_CLOEXEC)
        if self._owner != (0, 0):
            os.fchown(reader, *self._owner)
        return reader, writer

    def _open_input(self, uri: str) -> int:
        path = fifo_path(uri)
        if not path:
            return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        if not is_fifo(path):
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        fifo = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        # The client may come and go: only CloseIO lets the process read an end of file.
        self._stdin_writer = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        reader, writer = self._pipe()
        self._input = Copy(self._loop, fifo, writer, self.close_stdin)
        return reader

    def _open_output(self, uri: str) -> int:
        path = fifo_path(uri)
        if not path:
            return os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
        if not is_fifo(path):
            return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        # A reader first: then opening it for writing waits for nobody.
        self._kept.append(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        fifo = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        reader, writer = self._pipe()
        self._outputs.append(Copy(self._loop, reader, fifo, self._look_drained))
        return writer

    def handed_over(self) -> None:
        """The process has them: from now on only it and its children can write."""
        for fd in self.fds:
            os.close(fd)
        self.fds = []

    def pack(self, parcel: Parcel) -> tuple[object, ...]:
        """For `unpack`, in the next worker, of one whose streams are handed over."""
        return (parcel.put(self._stdin_writer), [parcel.put(fd) for fd in self._kept],
                None if self._input is None else self._input.pack(parcel), [copy.pack(parcel) for copy in self._outputs])

    def unpack(self, packed: tuple[Any, ...], contents: Contents) -> None:
        """Undo `pack`, with a fresh one."""
        writer, kept, copy, outputs = packed
        self._stdin_writer = contents.fd(writer)
        self._kept = [contents.fd(place) for place in kept]
        if copy is not None:
            self._input = Copy.unpack(self._loop, copy, contents, self.close_stdin)
        self._outputs = [Copy.unpack(self._loop, one, contents, self._look_drained) for one in outputs]

    def close_stdin(self) -> None:
        """The process reads the end of its input once the client has closed its end."""
        if self._stdin_writer >= 0:
            os.close(self._stdin_writer)
            self._stdin_writer = -1

    def process_ended(self) -> None:
        """Nobody reads the input any more; the output may still be others', and the client may still read."""
        if self._input is not None:
            self._input.close()
        self.close_stdin()

    def drained(self) -> Later:
        """Done when what was written is where the client can read it, or in some seconds."""
        self._drained = later = Later()
        timer = self._loop.after(_DRAIN_S, later.set)
        later.then(lambda done: timer.cancel())
        self._look_drained()
        if not later.done:
            self._again(later)
        return later

    def _again(self, later: Later) -> None:
        if not later.done:
            self._look_drained()
            self._loop.after(_LOOK_S, lambda: self._again(later))

    def _look_drained(self) -> None:
        if self._drained is None:
            return
        moved = [copy.move() for copy in self._outputs]
        if all(moved):
            self._drained.set()

    def close(self) -> None:
        """Release everything; the logger is told to end."""
        self.handed_over()
        self.process_ended()
        self._drained = None
        for copy in self._outputs:
            copy.move()
            copy.close()
        for fd in self._kept:
            os.close(fd)
        self._kept = []
        if self.logger is not None:
            self.logger.close()


def fifo_path(uri: str) -> str:
    """The path that a stream's URI names, "" for none. Raises InvalidArgument, Unsupported."""
    scheme, path, _ = split_uri(uri)
    if scheme not in ("", "fifo"):
        raise Unsupported(f"unknown STDIO scheme {scheme}")
    if path and not path.startswith("/"):
        raise InvalidArgument(f"path of a standard stream is not absolute: {path}")
    return path


def is_fifo(path: str) -> bool:
    """Raises NotFound."""
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except FileNotFoundError:
        raise NotFound(f"containerd-shim: opening file {path!r}: no such file or directory") from None
