"""Netlink: requests in batches, answers, and the packing of attributes.

Runs in: any process; a socket belongs for ever to the network namespace in which it was made.
Spec: netlink(7), rtnetlink(7).

    batch   [header|body|attributes]… in one sendmsg(2): the kernel works through all of them, one system call and one answer each
    dump    one request, many answers
"""

from __future__ import annotations

import errno
import os
from _struct import Struct

from boxship.abi import netlink as abi
from boxship.kit.errors import from_os_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

HEADER = Struct("=IHHII")  # struct nlmsghdr {u32 len; u16 type, flags; u32 seq, pid}
ATTRIBUTE = Struct("=HH")  # struct nlattr {u16 len, type}
NUMBER = Struct("=I")
_BUFFER = 1 << 16


def aligned(size: int) -> int:
    """`size` up to the next multiple of four."""
    return (size + 3) & ~3


def attribute(kind: int, data: bytes) -> bytes:
    """One attribute, padded."""
    size = ATTRIBUTE.size + len(data)
    return (ATTRIBUTE.pack(size, kind) + data).ljust(aligned(size), b"\0")


def nested(kind: int, *attributes: bytes) -> bytes:
    """An attribute made of attributes."""
    return attribute(kind | abi.NLA_F_NESTED, b"".join(attributes))


def number(kind: int, value: int) -> bytes:
    """An attribute that is a u32 of the machine's byte order."""
    return attribute(kind, NUMBER.pack(value))


def text(kind: int, value: str) -> bytes:
    """An attribute that is a string with its NUL."""
    return attribute(kind, os.fsencode(value) + b"\0")


def attributes(data: bytes) -> dict[int, bytes]:
    """Attributes by their kind; of those that come twice the last."""
    found = {}
    at = 0
    while at + ATTRIBUTE.size <= len(data):
        size, kind = ATTRIBUTE.unpack_from(data, at)
        if size < ATTRIBUTE.size:
            break
        found[kind & 0x3FFF] = data[at + ATTRIBUTE.size : at + size]
        at += aligned(size)
    return found


class Message:
    """One request of a batch; `doing` says in an error what failed."""

    __slots__ = ("body", "doing", "flags", "ignore", "kind")

    def __init__(self, kind: int, flags: int, body: bytes, doing: str, ignore: tuple[int, ...] = ()) -> None:
        self.kind = kind
        self.flags = flags
        self.body = body
        self.doing = doing
        self.ignore = ignore
        """Numbers of errors that are as good as success."""


class Socket:
    """A netlink socket of the network namespace that the calling thread is in. Closed by `close`, or as a context manager."""

    def __init__(self, protocol: int = abi.NETLINK_ROUTE) -> None:
        import _socket

        self._sock = _socket.socket(abi.AF_NETLINK, _socket.SOCK_RAW | _socket.SOCK_CLOEXEC, protocol)
        self._sequence = 0
        self._sock.bind((0, 0))
        for option in (abi.NETLINK_EXT_ACK, abi.NETLINK_GET_STRICT_CHK):
            try:
                self._sock.setsockopt(abi.SOL_NETLINK, option, 1)
            except OSError:
                pass  # an older kernel explains less, and answers more than was asked for

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    def __enter__(self) -> Socket:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, messages: list[Message]) -> None:
        """Send all in one call. Raises the first failure as an error of the tree; the kernel has then tried the others too."""
        if not messages:
            return
        first = self._sequence + 1
        packed = []
        for message in messages:
            self._sequence += 1
            flags = message.flags | abi.NLM_F_ACK | abi.NLM_F_REQUEST
            size = HEADER.size + len(message.body)
            packed.append(
                HEADER.pack(size, message.kind, flags, self._sequence, 0) + message.body.ljust(aligned(size) - HEADER.size, b"\0")
            )
        self._sock.send(b"".join(packed))
        failure: OSError | None = None
        failed = messages[0]
        left = len(messages)
        while left:
            for answer, flags, sequence, body in self._receive():
                if answer != abi.NLMSG_ERROR or not first <= sequence <= self._sequence:
                    continue
                left -= 1
                message = messages[sequence - first]
                try:
                    check(body, flags, len(message.body))
                except OSError as error:
                    if failure is None and error.errno not in message.ignore:
                        failure, failed = error, message
        if failure is not None:
            raise from_os_error(failure, failed.doing) from None

    def transaction(self, messages: list[tuple[int, int, bytes]], acknowledged: int) -> Iterator[tuple[bytes, int]]:
        """Send all (type, flags, body) in one call and yield (body, flags) of so many NLMSG_ERRORs."""
        packed = b""
        for kind, flags, body in messages:
            self._sequence += 1
            size = HEADER.size + len(body)
            packed += HEADER.pack(size, kind, flags | abi.NLM_F_REQUEST, self._sequence, 0)
            packed += body.ljust(aligned(size) - HEADER.size, b"\0")
        self._sock.send(packed)
        while acknowledged:
            for answer, flags, _, body in self._receive():
                if answer == abi.NLMSG_ERROR:
                    acknowledged -= 1
                    yield body, flags

    def request(self, kind: int, flags: int, body: bytes) -> Iterator[bytes]:
        """Send one request and yield the bodies of its answers. Raises OSError; EINTR when a dump is not consistent."""
        self._sequence += 1
        self._sock.send(HEADER.pack(HEADER.size + len(body), kind, flags | abi.NLM_F_REQUEST, self._sequence, 0) + body)
        expects_many = flags & (abi.NLM_F_DUMP | abi.NLM_F_ACK)
        interrupted = False
        while True:
            for answer, answer_flags, sequence, found in self._receive():
                if sequence != self._sequence:
                    continue
                interrupted = interrupted or bool(answer_flags & abi.NLM_F_DUMP_INTR)
                if answer == abi.NLMSG_ERROR:
                    check(found, answer_flags, len(body))
                    return
                if answer == abi.NLMSG_DONE:
                    if interrupted:
                        raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))
                    return
                yield found
                if not expects_many:
                    return

    def _receive(self) -> Iterator[tuple[int, int, int, bytes]]:
        """(type, flags, sequence, body) of each message of one datagram."""
        data = self._sock.recv(_BUFFER)
        at = 0
        while at + HEADER.size <= len(data):
            size, answer, flags, sequence, _ = HEADER.unpack_from(data, at)
            yield answer, flags, sequence, data[at + HEADER.size : at + size]
            at += aligned(max(size, HEADER.size))


def check(body: bytes, flags: int, request_size: int) -> None:
    """Raise what an NLMSG_ERROR says, with the kernel's own explanation where it gives one."""
    code = -int.from_bytes(body[:4], "little", signed=True)
    if not code:
        return
    words = os.strerror(code)
    if flags & abi.NLM_F_ACK_TLVS:
        # The error is followed by the request it is about, or by its header only.
        skip = 4 + HEADER.size + (0 if flags & abi.NLM_F_CAPPED else aligned(request_size))
        message = attributes(body[skip:]).get(abi.NLMSGERR_ATTR_MSG)
        if message:
            words = f"{words}: {message.rstrip(bytes(1)).decode(errors='replace')}"
    raise OSError(code, words)
