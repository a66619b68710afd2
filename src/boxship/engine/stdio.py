"""A process's stdin, stdout and stderr between the shim's FIFOs, the log and whoever is attached.

Runs in: the daemon, on its event loop.
Spec: shim v2's stdio (FIFOs that the client creates).

FIFOs, and not a log program of the shim's (`binary://`): they work with every shim, cost no process for each container, and
whoever attaches gets the bytes as they are. While no daemon runs the shim holds a FIFO open, so what is written waits in it (a
mebibyte for each stream) and the next daemon reads on: nothing is lost, a program that writes more than that waits
(docs/decisions/0006).
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import stat
from collections import deque
from collections.abc import Callable

STDIN, STDOUT, STDERR = 0, 1, 2
_NAMES = ("stdin", "stdout", "stderr")
_CHUNK = 65536
_PIPE_SIZE = 1 << 20
_HIGH, _LOW = 1 << 20, 1 << 18


class Subscriber:
    """One who is attached. `get` gives what comes; the stream is held back while a mebibyte waits here."""

    __slots__ = ("_event", "_items", "closed", "owner", "size", "streams")

    def __init__(self, owner: Streams, streams: frozenset[int]) -> None:
        self.owner = owner
        self.streams = streams
        self.size = 0
        self.closed = False
        self._items: deque[tuple[int, bytes]] = deque()
        self._event = asyncio.Event()

    def put(self, stream: int, data: bytes) -> None:
        """Called by the stream's reader."""
        if stream in self.streams and not self.closed:
            self._items.append((stream, data))
            self.size += len(data)
            self._event.set()

    def end(self) -> None:
        """No more will come."""
        self.closed = True
        self._event.set()

    async def get(self) -> tuple[int, bytes] | None:
        """The next piece, with its stream; None at the end."""
        while not self._items:
            if self.closed:
                return None
            self._event.clear()
            await self._event.wait()
        stream, data = self._items.popleft()
        self.size -= len(data)
        if self.size <= _LOW:
            self.owner.resume()
        return stream, data


class Streams:
    """The three streams of one process. `create` makes the FIFOs, `open` begins to read, `done` is set after the last byte."""

    def __init__(self, directory: str, prefix: str = "", *, stdin: bool = False, terminal: bool = False) -> None:
        self.directory = directory
        self.terminal = terminal
        self._paths = [f"{directory}/{prefix}{name}" for name in _NAMES]
        self.has_stdin = stdin
        self.write_log: Callable[[int, bytes], None] | None = None
        self.done = asyncio.Event()
        self.started = asyncio.Event()
        """Set when the shim has its ends: what is written to stdin before, and its end, would be lost."""
        self.stdin_closed = False
        self._stdin = -1
        self._readers: dict[int, int] = {}
        self._paused = False
        self._subscribers: list[Subscriber] = []

    @property
    def stdin(self) -> str:
        """What the shim is told; "" for none."""
        return self._paths[STDIN] if self.has_stdin else ""

    @property
    def stdout(self) -> str:
        """What the shim is told."""
        return self._paths[STDOUT]

    @property
    def stderr(self) -> str:
        """What the shim is told; a terminal has none."""
        return "" if self.terminal else self._paths[STDERR]

    def create(self) -> None:
        """Make the FIFOs. Raises OSError."""
        os.makedirs(self.directory, mode=0o700, exist_ok=True)
        for path in filter(None, (self.stdin, self.stdout, self.stderr)):
            try:
                os.mkfifo(path, 0o600)
            except FileExistsError:
                os.unlink(path)
                os.mkfifo(path, 0o600)

    def open(self) -> None:
        """Open our ends and read from now on. Raises OSError."""
        loop = asyncio.get_running_loop()
        if self.stdin:
            # For reading too: a FIFO without a reader cannot be opened for writing alone without waiting.
            self._stdin = _open(self.stdin, os.O_RDWR)
        for stream, path in ((STDOUT, self.stdout), (STDERR, self.stderr)):
            if path:
                fd = _open(path, os.O_RDONLY)
                try:
                    fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
                except OSError:
                    pass  # a limit of the machine; the usual 64 KiB do too
                self._readers[stream] = fd
                loop.add_reader(fd, self._read, stream, fd)

    def subscribe(self, streams: frozenset[int]) -> Subscriber:
        """Attach to those streams."""
        made = Subscriber(self, streams)
        if self.done.is_set():
            made.end()
        self._subscribers.append(made)
        return made

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """Detach."""
        subscriber.end()
        if subscriber in self._subscribers:
            self._subscribers.remove(subscriber)
        self.resume()

    def _read(self, stream: int, fd: int) -> None:
        try:
            data = os.read(fd, _CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._end(stream)
            return
        if self.write_log is not None:
            self.write_log(stream, data)
        for subscriber in self._subscribers:
            subscriber.put(stream, data)
            if subscriber.size > _HIGH and not self._paused:
                self._pause()

    def _pause(self) -> None:
        self._paused = True
        for fd in self._readers.values():
            asyncio.get_running_loop().remove_reader(fd)

    def resume(self) -> None:
        """Read on, when nobody is too far behind."""
        if self._paused and all(each.size <= _LOW for each in self._subscribers):
            self._paused = False
            for stream, fd in self._readers.items():
                asyncio.get_running_loop().add_reader(fd, self._read, stream, fd)

    def _end(self, stream: int) -> None:
        fd = self._readers.pop(stream, -1)
        if fd >= 0:
            if not self._paused:
                asyncio.get_running_loop().remove_reader(fd)
            os.close(fd)
        if not self._readers:
            self._finish()

    def _finish(self) -> None:
        self.done.set()
        for subscriber in self._subscribers:
            subscriber.end()

    async def write_stdin(self, data: bytes) -> None:
        """Write to the process's stdin, waiting while it is full. Does nothing once stdin is closed."""
        loop = asyncio.get_running_loop()
        view = memoryview(data)
        while view and self._stdin >= 0:
            try:
                view = view[os.write(self._stdin, view) :]
            except BlockingIOError:
                ready: asyncio.Future[None] = loop.create_future()
                fd = self._stdin
                loop.add_writer(fd, _set, ready)
                try:
                    await ready
                finally:
                    loop.remove_writer(fd)
            except OSError as error:
                if error.errno != errno.EPIPE:
                    raise
                return

    def close_stdin(self) -> None:
        """Close our end. The shim holds another until it is told by CloseIO."""
        self.stdin_closed = True
        if self._stdin >= 0:
            asyncio.get_running_loop().remove_writer(self._stdin)
            os.close(self._stdin)
            self._stdin = -1

    async def drain(self, limit: float) -> None:
        """Wait until all was read, at most `limit` seconds: a process that outlives its parent may hold a stream open."""
        try:
            await asyncio.wait_for(self.done.wait(), limit)
        except TimeoutError:
            pass

    def close(self) -> None:
        """Stop reading, and remove the FIFOs."""
        self.close_stdin()
        for stream in list(self._readers):
            self._end(stream)
        self._finish()
        for path in self._paths:
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass


def _set(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


def _open(path: str, flags: int) -> int:
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    if not stat.S_ISFIFO(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "is not a FIFO", path)
    return fd
