"""ttRPC's frames and envelopes, without any I/O.

Runs in: the shims, and whoever talks to them.
Spec: ttRPC protocol 1.2. A frame, in network byte order:

    offset  size  meaning
    0       4     length of the data
    4       4     stream, odd for calls of a client
    8       1     type: 1 request, 2 response, 3 data
    9       1     flags: 1 remote closed, 2 remote open, 4 no data
    10      …     data, at most 4 MiB
"""

from __future__ import annotations

from _struct import Struct

from boxship.api.task import pb
from boxship.kit.errors import BoxshipError, Internal, ResourceExhausted, from_code

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

HEADER = Struct(">IIBB")
DATA_MAX = 4 << 20
REQUEST, RESPONSE, DATA = 1, 2, 3
REMOTE_CLOSED, REMOTE_OPEN, NO_DATA = 1, 2, 4
NAMESPACE = "containerd-namespace-ttrpc"


class Frames:
    """Cuts what comes in into frames."""

    __slots__ = ("_buffer", "_skip")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._skip = 0

    @property
    def is_empty(self) -> bool:
        """Whether there is no part of a frame."""
        return not self._buffer and not self._skip

    def feed(self, data: bytes) -> Iterator[tuple[int, int, int, bytes | None]]:
        """(stream, type, flags, data) of each frame that is whole by now; data is None for one that was too long."""
        buffer = self._buffer
        buffer += data
        while True:
            if self._skip:
                taken = min(self._skip, len(buffer))
                del buffer[:taken]
                self._skip -= taken
                if self._skip:
                    return
            if len(buffer) < HEADER.size:
                return
            length, stream, kind, flags = HEADER.unpack_from(buffer)
            if length > DATA_MAX:
                del buffer[: HEADER.size]
                self._skip = length
                yield stream, kind, flags, None
                continue
            end = HEADER.size + length
            if len(buffer) < end:
                return
            payload = bytes(buffer[HEADER.size : end])
            del buffer[:end]
            yield stream, kind, flags, payload


def frame(stream: int, kind: int, flags: int, data: bytes) -> bytes:
    """One frame. Raises ResourceExhausted."""
    if len(data) > DATA_MAX:
        raise too_long(len(data))
    return HEADER.pack(len(data), stream, kind, flags) + data


def too_long(length: int) -> BoxshipError:
    """The error for a message that is longer than a frame may be."""
    return ResourceExhausted(f"message length {length} exceeds maximum message size of {DATA_MAX}")


def request(stream: int, service: str, method: str, payload: bytes, namespace: str = "", timeout_s: float | None = None) -> bytes:
    """The frame that begins a call with one answer."""
    envelope = pb.ttrpc.Request(service=service, method=method, payload=payload)
    if namespace:
        envelope.metadata.add(key=NAMESPACE, value=namespace)
    if timeout_s is not None:
        envelope.timeout_nano = int(timeout_s * 1e9)
    return frame(stream, REQUEST, 0, envelope.SerializeToString())


def response(stream: int, payload: bytes) -> bytes:
    """The frame that answers a call."""
    try:
        return frame(stream, RESPONSE, 0, pb.ttrpc.Response(payload=payload).SerializeToString())
    except ResourceExhausted as error:
        return failure(stream, error)


def failure(stream: int, error: BaseException) -> bytes:
    """The frame that says why there is no answer."""
    code = error.code if isinstance(error, BoxshipError) else 2
    status = pb.status.Status(code=code, message=str(error))
    return frame(stream, RESPONSE, 0, pb.ttrpc.Response(status=status).SerializeToString())


def result(data: bytes | None, kind: Any) -> Any:
    """The answer in a response's data, of the message class `kind`. Raises the error that the peer answered."""
    from google.protobuf.message import DecodeError

    if data is None:
        raise too_long(DATA_MAX + 1)
    try:
        envelope = pb.ttrpc.Response.FromString(data)
        if envelope.HasField("status") and envelope.status.code:
            raise from_code(envelope.status.code, envelope.status.message)
        return kind.FromString(envelope.payload)
    except DecodeError:
        raise Internal("ttrpc: the answer is no message") from None
