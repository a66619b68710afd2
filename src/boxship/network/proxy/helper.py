"""The helper: serves what the daemon says, whether or not the daemon is there.

Runs in: a process of its own, one per state folder; one thread for this loop and for names, and those of `_relay`.
Spec: `boxship.network.proxy.control`.
"""

from __future__ import annotations

import _socket
import os
import resource
import sys

from boxship.kit.errors import BoxshipError, InvalidArgument, from_os_error
from boxship.kit.loop import IN, Inbox, Loop
from boxship.network.dns.resolvers import Resolvers
from boxship.network.proxy import control, ports
from boxship.network.proxy.control import PortMapping
from boxship.oci.text import dumps, loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_SIGTERM = 15
LONELY_S = 3.0
"""How long it stays when there is nothing to do and nobody is there."""


class _Port:
    __slots__ = ("mapping", "named", "served")

    def __init__(self, mapping: PortMapping, served: ports.Served, named: int) -> None:
        self.mapping = mapping
        self.served = served
        self.named = named
        """The last `begin` after which it was named."""


class Helper:
    """All of it. `run` returns when it is no longer needed, or told to stop."""

    def __init__(self, listener: _socket.socket) -> None:
        self.loop = Loop()
        self._listener = listener
        self._instance = os.urandom(8).hex()
        self._callers: dict[int, _socket.socket] = {}
        self._ports: dict[tuple[str, str, int], _Port] = {}
        self._round = 0
        self._resolvers = Resolvers(self.loop)
        listener.setblocking(False)
        self.loop.add(listener.fileno(), IN, self._accept)
        self._lonely()

    def run(self) -> None:
        """Serve."""
        inbox = Inbox(self.loop)
        inbox.on(_SIGTERM, self.loop.stop)
        self.loop.run()

    # those who call

    def _accept(self, events: int) -> None:
        try:
            fd, _ = self._listener._accept()  # type: ignore[attr-defined]
        except OSError:
            return
        caller = _socket.socket(fileno=fd)
        caller.setblocking(False)
        uid = int.from_bytes(caller.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)[4:8], sys.byteorder)
        if uid not in (0, os.geteuid()):
            caller.close()
            return
        self._callers[fd] = caller
        self.loop.add(fd, IN, lambda events: self._read(caller))

    def _read(self, caller: _socket.socket) -> None:
        fds: list[int] = []
        try:
            data, ancillary, _, _ = caller.recvmsg(control.MESSAGE_MAX, _socket.CMSG_SPACE(4))
            for level, kind, content in ancillary:
                if (level, kind) == (_socket.SOL_SOCKET, _socket.SCM_RIGHTS):
                    fds += [int.from_bytes(content[at : at + 4], sys.byteorder) for at in range(0, len(content) - 3, 4)]
            if not data:
                raise ConnectionResetError
            caller.send(dumps(self._answer(data, fds)).encode())
        except BlockingIOError:
            pass
        except OSError:
            fd = caller.fileno()
            self.loop.remove(fd)
            del self._callers[fd]
            caller.close()
            self._lonely()
        finally:
            for fd in fds:
                os.close(fd)

    def _answer(self, data: bytes, fds: list[int]) -> dict[str, Any]:
        """Descriptors that are kept are taken out of `fds`."""
        try:
            message = loads(data, "message")
            if not isinstance(message, dict):
                raise InvalidArgument("malformed message: not an object")
            do = str(message.get("do"))
            if do not in _COMMANDS:
                raise InvalidArgument(f"{do}: no such command")
            return _COMMANDS[do](self, message, fds) or {}
        except BoxshipError as error:
            return {"error": str(error), "code": error.code}
        except OSError as error:
            failed = from_os_error(error, f"{do}:")
            return {"error": str(failed), "code": failed.code}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            return {"error": f"malformed message: {error!r}", "code": InvalidArgument.code}

    def _lonely(self) -> None:
        if not self._callers:
            self.loop.after(LONELY_S, self._leave)

    def _leave(self) -> None:
        if not self._callers and not self._ports and not self._resolvers.serving:
            self.loop.stop()

    # what they say

    def _hello(self, message: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        return {
            "version": control.VERSION, "instance": self._instance, "pid": os.getpid(), "ports": len(self._ports),
            "connections": sum(each.served.connections() for each in self._ports.values()), "resolvers": self._resolvers.serving,
        }

    def _begin(self, message: dict[str, Any], fds: list[int]) -> None:
        if message["what"] == "names":
            self._resolvers.begin()
        else:
            self._round += 1

    def _end(self, message: dict[str, Any], fds: list[int]) -> None:
        if message["what"] == "names":
            self._resolvers.end()
            return
        for each in [each for each in self._ports.values() if each.named != self._round]:
            self._close(each)

    def _publish(self, message: dict[str, Any], fds: list[int]) -> None:
        mapping = PortMapping(*message["port"])
        key = mapping[:3]
        present = self._ports.get(key)
        if present is not None and present.mapping == mapping:
            present.named = self._round
            return
        ports.check(mapping)
        if present is not None:
            self._close(present)
        self._ports[key] = _Port(mapping, ports.serve(mapping, fds.pop() if fds else -1), self._round)

    def _withdraw(self, message: dict[str, Any], fds: list[int]) -> None:
        mapping = PortMapping(*message["port"])
        present = self._ports.get(mapping[:3])
        if present is not None and present.mapping == mapping:
            self._close(present)

    def _close(self, port: _Port) -> None:
        del self._ports[port.mapping[:3]]
        port.served.close()

    def _names(self, message: dict[str, Any], fds: list[int]) -> None:
        self._resolvers.command(message)

    def _stop(self, message: dict[str, Any], fds: list[int]) -> None:
        self.loop.stop()


_COMMANDS = {
    "hello": Helper._hello,
    "begin": Helper._begin,
    "end": Helper._end,
    "publish": Helper._publish,
    "withdraw": Helper._withdraw,
    **dict.fromkeys(("network", "forget", "join", "leave", "attach", "detach"), Helper._names),
    "stop": Helper._stop,
}


def main(argv: list[str]) -> int:
    """`argv` is the number of the listening descriptor. Returns the exit code."""
    if len(argv) != 2 or not argv[1].isdigit():
        sys.stderr.write("usage: python -m boxship.network.proxy DESCRIPTOR (started by the daemon)\n")
        return 2
    # Two descriptors a connection: as many as the caller's limit allows.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    Helper(_socket.socket(fileno=int(argv[1]))).run()
    return 0
