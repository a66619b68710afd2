"""Bytes from one pipe to another, without going through this process.

Runs in: the shim's loop; nothing here waits. Spec: splice(2).
"""

from __future__ import annotations

import os
from fcntl import ioctl

from boxship.kit.loop import IN, OUT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from boxship.kit.loop import Loop
    from boxship.shim.handover import Contents, Parcel

_FIONREAD = 0x541B
_AT_ONCE = 1 << 20
_FLAGS = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK


class Copy:
    """From `source` to `sink`, both taken; one of them a pipe. `ended` is called after both are closed."""

    def __init__(self, loop: Loop, source: int, sink: int, ended: Callable[[], object]) -> None:
        self._loop = loop
        self._source = source
        self._sink = sink
        self._ended = ended
        if self.open:
            loop.add(source, IN, self._ready)
            loop.add(sink, 0, self._ready)

    def pack(self, parcel: Parcel) -> tuple[int, ...]:
        """For `unpack`, in the next worker. Closed ones too."""
        sink_wanted, source_wanted = self._loop.wanted(self._sink), self._loop.wanted(self._source)
        sink = parcel.put(self._sink)
        return sink, parcel.put(self._source, to_previous=True), sink_wanted, source_wanted

    @classmethod
    def unpack(cls, loop: Loop, packed: tuple[int, ...], contents: Contents, ended: Callable[[], object]) -> Copy:
        """Undo `pack`."""
        sink, source, sink_wanted, source_wanted = packed
        copy = cls(loop, contents.fd(source), contents.fd(sink), ended)
        if copy.open:
            loop.want(copy._sink, sink_wanted)
            loop.want(copy._source, source_wanted)
        return copy

    def _ready(self, events: int) -> None:
        self.move()

    @property
    def open(self) -> bool:
        """Whether more may come."""
        return self._source >= 0

    def move(self) -> bool:
        """As much as there is and as goes; False when the sink takes no more for now."""
        while self.open:
            try:
                moved = os.splice(self._source, self._sink, _AT_ONCE, flags=_FLAGS)
            except BlockingIOError:
                # Either there is nothing to read or no room to write: the kernel does not say which.
                full = int.from_bytes(ioctl(self._source, _FIONREAD, bytes(4)), "little") > 0
                self._loop.want(self._source, 0 if full else IN)
                self._loop.want(self._sink, OUT if full else 0)
                return not full
            except BrokenPipeError:
                moved = 0  # nobody reads: the process has closed its input
            if not moved:
                self.close()
        return True

    def close(self) -> None:
        """The reader of the sink reads an end of file, the writer of the source gets SIGPIPE."""
        if self.open:
            for fd in (self._source, self._sink):
                self._loop.remove(fd)
                os.close(fd)
            self._source = self._sink = -1
            self._ended()
