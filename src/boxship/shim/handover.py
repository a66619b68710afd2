"""How one worker of a shim leaves to the next what it knows and holds, so that between them no interpreter is needed.

Runs in: the shim's workers. Spec: the messages of `src/native/hold.c`.

State is plain data for `marshal`, and names descriptors by their place in the parcel. Not here: what it is, which the modules
that have it know themselves: each has a `pack` and an `unpack`.
"""

from __future__ import annotations

import _socket
import marshal
import os
from _struct import Struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from boxship.kit.loop import Loop

FDS_MAX = 240
_INTEREST = Struct("=Hh")
_INT = Struct("=i")
_STATE_MAX = 1 << 24


class Parcel:
    """What is handed over. Its descriptors stay open here too."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._state = os.memfd_create("shim", os.MFD_CLOEXEC)
        self._fds = [self._state]
        self._interests = bytearray(_INTEREST.pack(0, -1))

    def put(self, fd: int, *, to_previous: bool = False) -> int:
        """Its place; -1 for no descriptor (-1). The next worker begins when what the loop waits for there happens; `to_previous`
        when there is more to it than passing on what comes to the descriptor that was put before."""
        if fd < 0:
            return -1
        self._fds.append(fd)
        self._interests += _INTEREST.pack(self._loop.wanted(fd), len(self._fds) - 2 if to_previous else -1)
        return len(self._fds) - 1

    def send(self, control: int, state: Any) -> bool:
        """Hand it over, which is the last thing that a worker does. False, and nothing happens, when it holds too much."""
        if len(self._fds) > FDS_MAX:
            os.close(self._state)
            return False
        os.write(self._state, marshal.dumps(state))
        channel = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, os.dup(control))
        fds = b"".join(map(_INT.pack, self._fds))
        channel.sendmsg([self._interests], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, fds)])
        return True


class Contents:
    """What was handed over: plain data as it was, and descriptors by their places."""

    def __init__(self, fds: list[int]) -> None:
        """The state is read here, and its descriptor closed."""
        self._fds = fds
        self.state = marshal.loads(os.pread(fds[0], _STATE_MAX, 0))
        os.close(fds[0])

    def fd(self, place: int) -> int:
        """The descriptor."""
        return self._fds[place] if place >= 0 else -1
