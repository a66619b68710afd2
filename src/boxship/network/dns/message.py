"""DNS messages, as far as a server needs them that answers for a few names and passes everything else on as it is.

Runs in: the helper. No I/O.
Spec: RFC 1035 section 4, RFC 6891 section 6.1; sizes: RFC 1035 section 2.3.4.
Not here: answers of other servers taken apart, which nobody needs: they are compared with the question and passed on.
"""

from __future__ import annotations

import _socket
from _struct import Struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

A, PTR, MX, AAAA, OPT, SVCB, HTTPS, IXFR, AXFR = 1, 12, 15, 28, 41, 64, 65, 251, 252
IN = 1
NOERROR, FORMERR, SERVFAIL, NXDOMAIN, NOTIMP, REFUSED = 0, 1, 2, 3, 4, 5
UDP_SIZE, OWN_SIZE, MESSAGE_MAX = 512, 4096, 65535

_HEADER = Struct(">HHHHHH")
_TWO = Struct(">HH")
_THREE = Struct(">HHH")
_RECORD = Struct(">HHHIH")
_RECORD_HEAD = Struct(">HHIH")
_NAME_MAX, _LABEL_MAX = 255, 63
_RESPONSE, _TRUNCATED, _DESIRED, _AVAILABLE, _CHECKING = 0x8000, 0x0200, 0x0100, 0x0080, 0x0010
_AT_QUESTION = 0xC00C
_OPCODE = 0x7800


class Malformed(Exception):
    """No query. `answer` says so to who sent it; empty for what is not to be answered at all."""

    def __init__(self, answer: bytes = b"") -> None:
        super().__init__()
        self.answer = answer


class Query:
    """One question."""

    __slots__ = ("edns", "flags", "id", "kind", "klass", "name", "payload", "question")

    def __init__(self, number: int, flags: int, name: str, question: bytes, kind: int, klass: int) -> None:
        self.id = number
        self.flags = flags
        self.name = name
        """In lower case, without the last dot; "" for the root, and for what cannot be written with dots."""
        self.question = question
        """The section as it was sent, for the answer."""
        self.kind = kind
        self.klass = klass
        self.payload = UDP_SIZE
        """How long an answer by UDP may be."""
        self.edns = False


def parse(packet: bytes) -> Query:
    """Take a query apart. Raises Malformed for everything that is none, and nothing else."""
    if len(packet) < _HEADER.size:
        raise Malformed
    number, flags, questions, answers, authorities, additional = _HEADER.unpack_from(packet)
    if flags & _RESPONSE:
        raise Malformed  # to answer an answer would never end
    if flags & _OPCODE:
        raise Malformed(_refuse(number, flags, NOTIMP))
    broken = Malformed(_refuse(number, flags, FORMERR))
    if questions != 1 or answers or authorities:
        raise broken
    labels = []
    at = _HEADER.size
    try:
        while length := packet[at]:
            # A pointer could lead back into the header only.
            if length > _LABEL_MAX:
                raise broken
            labels.append(packet[at + 1 : at + 1 + length])
            at += 1 + length
            if at - _HEADER.size >= _NAME_MAX:
                raise broken
        kind, klass = _TWO.unpack_from(packet, at + 1)
    except Exception as error:
        if error is broken:
            raise
        raise broken from None
    end = at + 1 + _TWO.size
    name = b"" if any(b"." in each for each in labels) else b".".join(labels)
    query = Query(number, flags, name.lower().decode("latin-1"), packet[_HEADER.size : end], kind, klass)
    if additional:
        _additional(query, packet, end, additional, broken)
    return query


def _additional(query: Query, packet: bytes, at: int, count: int, broken: Malformed) -> None:
    """Look for EDNS."""
    for _ in range(count):
        try:
            while length := packet[at]:
                if length > _LABEL_MAX:
                    at += 1  # a pointer is two bytes long and ends the name
                    break
                at += 1 + length
            kind, klass, _, size = _RECORD_HEAD.unpack_from(packet, at + 1)
        except Exception:  # noqa: BLE001 - an index or a structure past the end
            raise broken from None
        at += 1 + _RECORD_HEAD.size + size
        if at > len(packet):
            raise broken
        if kind == OPT:
            if query.edns:
                raise broken  # RFC 6891 section 6.1.1: one at most
            query.edns = True
            query.payload = max(klass, UDP_SIZE)


def _refuse(number: int, flags: int, code: int) -> bytes:
    return _HEADER.pack(number, _RESPONSE | (flags & (_OPCODE | _DESIRED)) | code, 0, 0, 0, 0)


def address_record(address: str, ttl_s: int) -> bytes:
    """An A or AAAA record of the name that was asked for."""
    data = _socket.inet_pton(_socket.AF_INET6 if ":" in address else _socket.AF_INET, address)
    return _RECORD.pack(_AT_QUESTION, A if len(data) == 4 else AAAA, IN, ttl_s, len(data)) + data


def pointer_record(name: str, ttl_s: int) -> bytes:
    """A PTR record of the name that was asked for. Raises ValueError for a name that cannot be written."""
    data = b""
    for label in name.encode("latin-1").split(b"."):
        if not 0 < len(label) <= _LABEL_MAX:
            raise ValueError(name)
        data += bytes((len(label),)) + label
    if len(data) >= _NAME_MAX:
        raise ValueError(name)
    return _RECORD.pack(_AT_QUESTION, PTR, IN, ttl_s, len(data) + 1) + data + b"\0"


def answer(query: Query, records: Sequence[bytes] = (), code: int = NOERROR, limit: int = MESSAGE_MAX) -> bytes:
    """The answer; records that do not fit into `limit` bytes are left out, and it says that they are."""
    flags = _RESPONSE | _AVAILABLE | (query.flags & (_DESIRED | _CHECKING)) | code
    option = b"\0" + _RECORD_HEAD.pack(OPT, OWN_SIZE, 0, 0) if query.edns else b""
    left = limit - _HEADER.size - len(query.question) - len(option)
    taken: list[bytes] = []
    for record in records:
        left -= len(record)
        if left < 0:
            flags |= _TRUNCATED
            break
        taken.append(record)
    header = _HEADER.pack(query.id, flags, 1, len(taken), 0, 1 if option else 0)
    return b"".join((header, query.question, *taken, option))


def answers(query: Query, number: int, packet: bytes) -> int:
    """The code of `packet`, when it is the answer to the query sent under `number`; -1 when it is something else."""
    if len(packet) < _HEADER.size:
        return -1
    found, flags, questions = _THREE.unpack_from(packet)
    if found != number or not flags & _RESPONSE or flags & _OPCODE:
        return -1
    end = _HEADER.size + len(query.question)
    # Some servers leave the question out when they refuse it; some change its case.
    if questions and (questions != 1 or packet[_HEADER.size : end].lower() != query.question.lower()):
        return -1
    if not questions and flags & 0xF == NOERROR:
        return -1
    return int(flags & 0xF)


def address_of(name: str) -> str:
    """The address that a PTR question is about; "" when it is about something else."""
    if name.endswith(".in-addr.arpa"):
        parts = name.split(".")[:-2]
        address = ".".join(reversed(parts)) if len(parts) == 4 else ""
        family = _socket.AF_INET
    elif name.endswith(".ip6.arpa"):
        nibbles = "".join(reversed(name.split(".")[:-2]))
        address = ":".join(nibbles[at : at + 4] for at in range(0, 32, 4)) if len(nibbles) == 32 else ""
        family = _socket.AF_INET6
    else:
        return ""
    try:
        return _socket.inet_ntop(family, _socket.inet_pton(family, address))
    except (OSError, ValueError):
        return ""
