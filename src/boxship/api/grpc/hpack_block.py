"""Header blocks: those of requests read, those of answers written.

Runs in: the daemon. Spec: RFC 7541; gRPC over HTTP/2 (responses, status, percent-encoded messages).
Not here: frames (`boxship.api.grpc.server`). Decoding proper is the library's, hpack.
"""

from __future__ import annotations

import hpack

__all__ = ["ANSWER", "OK", "Decoder", "failure", "refusal"]

BLOCK_MAX = 1 << 16
_KNOWN_MAX = 256

Headers = dict[str, str]


def _literal(name: str, value: bytes) -> bytes:
    """A field that nobody is to remember. Names are short; a value's length may need several bytes."""
    return b"\0" + _length(len(name)) + name.encode() + _length(len(value)) + value


def _length(size: int) -> bytes:
    if size < 0x7F:
        return bytes([size])
    out = bytearray([0x7F])
    size -= 0x7F
    while size > 0x7F:
        out.append(size & 0x7F | 0x80)
        size >>= 7
    out.append(size)
    return bytes(out)


_STATUS_200 = b"\x88"  # of the static table
ANSWER = _STATUS_200 + _literal("content-type", b"application/grpc")
"""Before messages."""
OK = _literal("grpc-status", b"0")
"""After them."""


def failure(code: int, message: str) -> bytes:
    """After messages, or (with `ANSWER` before it) alone: a status that is an error."""
    text = b"".join(bytes([c]) if 0x20 <= c <= 0x7E and c != 0x25 else b"%%%02X" % c for c in message.encode(errors="replace"))
    return _literal("grpc-status", b"%d" % code) + _literal("grpc-message", text)


def refusal(status: int) -> bytes:
    """An answer of HTTP, to what is not gRPC."""
    return _literal(":status", b"%d" % status)


class Decoder:
    """Of one connection. Blocks that only point to known fields are remembered: a client repeats itself."""

    def __init__(self) -> None:
        self._decoder = hpack.Decoder(max_header_list_size=BLOCK_MAX)
        self._known: dict[bytes, Headers] = {}

    def decode(self, block: bytes) -> Headers:
        """The fields; of those with one name the last. Raises ValueError."""
        known = self._known.get(block)
        if known is not None:
            return known
        try:
            headers = {_text(name): _text(value) for name, value in self._decoder.decode(block, raw=True)}
        except hpack.HPACKError as error:
            raise ValueError(f"header block: {error}") from None
        # Only one-byte references (RFC 7541, 6.1): nothing in the table changes by them, and they mean the same until it does.
        if block and min(block) > 0x80 and max(block) < 0xFF:
            if len(self._known) < _KNOWN_MAX:
                self._known[block] = headers
        else:
            self._known.clear()
        return headers


def _text(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode(errors="replace")
