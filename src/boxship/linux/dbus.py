"""A small D-Bus client: calls and their answers, and signals, on a Unix socket.

Runs in: the runtime, when systemd drives the cgroups. One call at a time; blocks, with a time limit.
Spec: D-Bus Specification 0.43, "Type System", "Message Protocol", "Authentication Protocol".

Values are Python's own: integers, floats, bool, str (for s, o and g), list (a), dict (a{..}), tuple (a struct), bytes (ay),
`Variant` (v).
"""

from __future__ import annotations

import _socket
import os
from _struct import Struct
from sys import byteorder

from boxship.kit.errors import BoxshipError, InvalidArgument, NotFound, Unavailable, from_os_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

METHOD_CALL, METHOD_RETURN, ERROR, SIGNAL = 1, 2, 3, 4
_PATH, _INTERFACE, _MEMBER, _ERROR_NAME, _REPLY_SERIAL, _DESTINATION, _SENDER, _SIGNATURE = range(1, 9)
_FIELD_TYPES = {
    _PATH: "o", _INTERFACE: "s", _MEMBER: "s", _ERROR_NAME: "s", _REPLY_SERIAL: "u", _DESTINATION: "s", _SENDER: "s",
    _SIGNATURE: "g",
}
_ENDIAN = "<" if byteorder == "little" else ">"
_FIXED = {"y": "B", "b": "I", "n": "h", "q": "H", "i": "i", "u": "I", "x": "q", "t": "Q", "d": "d", "h": "I"}
_ALIGNMENT = {
    "y": 1, "b": 4, "n": 2, "q": 2, "i": 4, "u": 4, "x": 8, "t": 8, "d": 8, "h": 4, "s": 4, "o": 4, "g": 1, "a": 4, "(": 8,
    "{": 8, "v": 1,
}
_LIMIT = 1 << 26
"""No array, and here no message, is longer."""


class Variant:
    """A value with its type."""

    __slots__ = ("signature", "value")

    def __init__(self, signature: str, value: object) -> None:
        self.signature = signature
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Variant) and (self.signature, self.value) == (other.signature, other.value)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Variant({self.signature!r}, {self.value!r})"


class CallError(BoxshipError):
    """The other side answered with an error; `name` is its D-Bus name."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message or name)
        self.name = name


def split_signature(signature: str) -> list[str]:
    """The complete types in a signature. Raises InvalidArgument."""
    types = []
    start = 0
    while start < len(signature):
        end = _type_end(signature, start)
        types.append(signature[start:end])
        start = end
    return types


def _type_end(signature: str, at: int) -> int:
    if at >= len(signature):
        raise InvalidArgument(f'incomplete D-Bus signature "{signature}"')
    code = signature[at]
    if code == "a":
        return _type_end(signature, at + 1)
    if code in "({":
        close = ")" if code == "(" else "}"
        at += 1
        while at < len(signature) and signature[at] != close:
            at = _type_end(signature, at)
        if at >= len(signature):
            raise InvalidArgument(f'incomplete D-Bus signature "{signature}"')
        return at + 1
    if code not in _ALIGNMENT:
        raise InvalidArgument(f'unknown type "{code}" in D-Bus signature "{signature}"')
    return at + 1


def _pad(out: bytearray, alignment: int) -> None:
    out += bytes(-len(out) % alignment)


def marshal(signature: str, values: tuple[object, ...] | list[object], out: bytearray | None = None) -> bytearray:
    """Append `values` to `out` in the wire format; `out` must begin at a multiple of 8 of the message."""
    if out is None:
        out = bytearray()
    types = split_signature(signature)
    if len(types) != len(values):
        raise InvalidArgument(f'{len(values)} values for D-Bus signature "{signature}"')
    for kind, value in zip(types, values, strict=True):
        _put(kind, value, out)
    return out


def _put(kind: str, value: object, out: bytearray) -> None:
    code = kind[0]
    _pad(out, _ALIGNMENT[code])
    if code in _FIXED:
        out += Struct(_ENDIAN + _FIXED[code]).pack(value)
    elif code in "so":
        text = str(value).encode("utf-8", "surrogateescape")
        if 0 in text:
            raise InvalidArgument("a D-Bus string must not contain a NUL byte")
        out += Struct(_ENDIAN + "I").pack(len(text)) + text + b"\0"
    elif code == "g":
        text = str(value).encode()
        out += bytes((len(text),)) + text + b"\0"
    elif code == "v":
        assert isinstance(value, Variant)
        _put("g", value.signature, out)
        _put(value.signature, value.value, out)
    elif code == "a":
        length_at = len(out)
        out += bytes(4)
        item = kind[1:]
        _pad(out, _ALIGNMENT[item[0]])  # not part of the length
        start = len(out)
        if item == "y":
            out += bytes(value)  # type: ignore[call-overload]
        elif item[0] == "{":
            assert isinstance(value, dict)
            for pair in value.items():
                _put(item, pair, out)
        else:
            assert isinstance(value, list | tuple)
            for element in value:
                _put(item, element, out)
        Struct(_ENDIAN + "I").pack_into(out, length_at, len(out) - start)
    else:  # struct or dict entry: aligned above
        assert isinstance(value, tuple)
        for part, element in zip(split_signature(kind[1:-1]), value, strict=True):
            _put(part, element, out)


class _Reader:
    """A position in a message."""

    def __init__(self, data: bytes, endian: str = _ENDIAN, at: int = 0) -> None:
        self.data = data
        self.endian = endian
        self.at = at

    def take(self, kind: str) -> object:
        code = kind[0]
        self.at += -self.at % _ALIGNMENT[code]
        if code in _FIXED:
            form = Struct(self.endian + _FIXED[code])
            value: object = form.unpack_from(self.data, self.at)[0]
            self.at += form.size
            return bool(value) if code == "b" else value
        if code in "sog":
            length = self.take("y" if code == "g" else "u")
            assert isinstance(length, int)
            text = self.data[self.at : self.at + length].decode("utf-8", "surrogateescape")
            self.at += length + 1
            return text
        if code == "v":
            signature = str(self.take("g"))
            return Variant(signature, self.take(signature))
        if code == "a":
            length = self.take("u")
            assert isinstance(length, int)
            item = kind[1:]
            self.at += -self.at % _ALIGNMENT[item[0]]
            end = self.at + length
            if item == "y":
                self.at = end
                return self.data[end - length : end]
            elements = []
            while self.at < end:
                elements.append(self.take(item))
            return dict(elements) if item[0] == "{" else elements  # type: ignore[arg-type]
        return tuple(self.take(part) for part in split_signature(kind[1:-1]))


def unmarshal(signature: str, data: bytes, endian: str = _ENDIAN) -> list[object]:
    """The values in a message's body."""
    reader = _Reader(data, endian)
    return [reader.take(kind) for kind in split_signature(signature)]


class Message:
    """A message as received."""

    __slots__ = ("body", "fields", "kind", "serial")

    def __init__(self, kind: int, serial: int, fields: dict[int, object], body: list[object]) -> None:
        self.kind = kind
        self.serial = serial
        self.fields = fields
        self.body = body

    @property
    def member(self) -> str:
        """The name of the method or signal."""
        return str(self.fields.get(_MEMBER, ""))


def encode_message(kind: int, serial: int, fields: dict[int, object], signature: str, values: tuple[object, ...]) -> bytes:
    """A whole message."""
    body = marshal(signature, values)
    if signature:
        fields = {**fields, _SIGNATURE: signature}
    header = marshal(
        "yyyyuua(yv)",
        (
            ord("l" if byteorder == "little" else "B"), kind, 0, 1, len(body), serial,
            [(code, Variant(_FIELD_TYPES[code], value)) for code, value in fields.items()],
        ),
    )
    _pad(header, 8)
    return bytes(header + body)


def message_size(start: bytes) -> int:
    """The size of the message that begins with these 16 bytes. Raises Unavailable when it is none, or too long."""
    if start[:1] not in (b"l", b"B") or start[3] != 1:
        raise Unavailable("D-Bus: not a message")
    endian = "<" if start[:1] == b"l" else ">"
    body, fields = Struct(endian + "I").unpack_from(start, 4)[0], Struct(endian + "I").unpack_from(start, 12)[0]
    size: int = 16 + fields + -fields % 8 + body
    if size > _LIMIT:
        raise Unavailable("D-Bus: message too long")
    return size


def decode_message(data: bytes) -> Message:
    """The inverse of `encode_message`, for either byte order."""
    endian = "<" if data[:1] == b"l" else ">"
    reader = _Reader(data, endian, 4)
    body_size, serial = reader.take("u"), reader.take("u")
    assert isinstance(body_size, int) and isinstance(serial, int)
    fields: dict[int, object] = {}
    pairs = reader.take("a(yv)")
    assert isinstance(pairs, list)
    for code, variant in pairs:
        fields[code] = variant.value
    signature = str(fields.get(_SIGNATURE, ""))
    return Message(data[1], serial, fields, unmarshal(signature, data[len(data) - body_size :], endian))


def parse_address(addresses: str) -> list[bytes]:
    """Socket names of the unix addresses in "unix:path=…;unix:abstract=…", in order."""
    names = []
    for address in addresses.split(";"):
        transport, _, options = address.partition(":")
        if transport != "unix":
            continue
        for option in options.split(","):
            key, _, value = option.partition("=")
            raw = _unescape(value)
            if key == "path":
                names.append(raw)
            elif key == "abstract":
                names.append(b"\0" + raw)
    return names


def _unescape(text: str) -> bytes:
    first, *rest = text.split("%")
    result = first.encode("utf-8", "surrogateescape")
    for part in rest:
        result += bytes.fromhex(part[:2]) + part[2:].encode("utf-8", "surrogateescape")
    return result


class Connection:
    """A connection to a bus, or directly to systemd, which has no bus in between (and then no names and no Hello)."""

    def __init__(self, name: bytes, *, direct: bool, timeout_s: float = 30.0) -> None:
        self._socket = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
        self._socket.settimeout(timeout_s)
        self._serial = 0
        self._buffer = b""
        self.direct = direct
        self.signals: list[Message] = []
        try:
            self._connect(name)
            self._authenticate()
            if not direct:
                self.call("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "Hello")
        except BaseException:
            self._socket.close()
            raise

    def _connect(self, name: bytes) -> None:
        for attempt in range(7):
            try:
                self._socket.connect(name)
                return
            except BlockingIOError as error:
                if attempt == 6:
                    raise _undialled(error, name) from None
                import time

                time.sleep(0.1 * 2**attempt)  # the other side's queue is full: many containers at once
            except OSError as error:
                raise _undialled(error, name) from None

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _authenticate(self) -> None:
        # No identity is claimed: the other side takes the one that the kernel tells it, which is right in user namespaces too.
        self._send(b"\0AUTH EXTERNAL\r\nDATA\r\nBEGIN\r\n")
        lines = b""
        while lines.count(b"\r\n") < 2:
            lines += self._receive()
        first, second, self._buffer = lines.split(b"\r\n", 2)
        if not first.startswith(b"DATA") or not second.startswith(b"OK"):
            raise Unavailable(f"D-Bus: authentication refused: {first.decode('ascii', 'replace')}")

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendall(data, _socket.MSG_NOSIGNAL)
        except OSError as error:
            raise _lost(error) from None

    def _receive(self) -> bytes:
        try:
            data = self._socket.recv(65536)
        except OSError as error:
            raise _lost(error) from None
        if not data:
            raise Unavailable("D-Bus: connection closed by the other side")
        return data

    def _next(self) -> Message:
        while len(self._buffer) < 16 or len(self._buffer) < message_size(self._buffer[:16]):
            self._buffer += self._receive()
        size = message_size(self._buffer[:16])
        data, self._buffer = self._buffer[:size], self._buffer[size:]
        return decode_message(data)

    def call(
        self, destination: str, path: str, interface: str, member: str, signature: str = "", *values: object
    ) -> list[object]:
        """Call a method; returns the values of its answer. Raises CallError, Unavailable."""
        self._serial += 1
        serial = self._serial
        fields: dict[int, object] = {_PATH: path, _INTERFACE: interface, _MEMBER: member}
        if not self.direct:
            fields[_DESTINATION] = destination
        self._send(encode_message(METHOD_CALL, serial, fields, signature, values))
        while True:
            message = self._next()
            if message.kind == SIGNAL:
                self.signals.append(message)
            elif message.fields.get(_REPLY_SERIAL) == serial:
                if message.kind == ERROR:
                    text = str(message.body[0]) if message.body else ""
                    raise CallError(str(message.fields.get(_ERROR_NAME, "")), text)
                return message.body

    def wait_signal(self, member: str, first: int, value: object) -> Message:
        """The next signal of that name whose argument number `first` is `value`; those that came before count."""
        while True:
            for message in self.signals:
                if message.member == member and len(message.body) > first and message.body[first] == value:
                    self.signals.remove(message)
                    return message
            message = self._next()
            if message.kind == SIGNAL:
                self.signals.append(message)


def _undialled(error: OSError, name: bytes) -> BoxshipError:
    shown = name.replace(b"\0", b"@", 1).decode("utf-8", "replace")
    return from_os_error(OSError(error.errno, error.strerror, shown), "dial unix")


def _lost(error: OSError) -> Unavailable:
    if isinstance(error, TimeoutError):
        return Unavailable("D-Bus: timed out waiting for an answer")
    return Unavailable(f"D-Bus: {(error.strerror or str(error)).lower()}")


def connect_systemd(*, user: bool, environ: Mapping[str, str] | None = None) -> Connection:
    """A connection on which systemd answers: its own socket for root, else the system bus; or the user's instance."""
    if not user:
        if os.geteuid() == 0:
            try:
                return Connection(b"/run/systemd/private", direct=True)
            except BoxshipError:
                pass
        return Connection(b"/run/dbus/system_bus_socket", direct=False)
    environ = os.environ if environ is None else environ
    names = parse_address(environ.get("DBUS_SESSION_BUS_ADDRESS", ""))
    runtime_dir = environ.get("XDG_RUNTIME_DIR", "")
    if not names and runtime_dir and os.path.exists(runtime_dir + "/bus"):
        names = [os.fsencode(runtime_dir + "/bus")]
    if not names:
        raise NotFound(
            "could not detect DBUS_SESSION_BUS_ADDRESS from the environment; make sure you have installed the "
            "dbus-user-session or dbus-daemon package; note you may need to re-login"
        )
    failure: BoxshipError | None = None
    for name in names:
        try:
            return Connection(name, direct=False)
        except BoxshipError as error:
            failure = error
    assert failure is not None
    raise failure


# --- GVariant text, as people write values in annotations ------------------------------------------------------------

_KEYWORDS = {
    "boolean": "b", "byte": "y", "int16": "n", "uint16": "q", "int32": "i", "uint32": "u", "int64": "x", "uint64": "t",
    "double": "d", "string": "s", "objectpath": "o", "signature": "g", "handle": "h",
}
_DELIMITERS = " \t\n,]>)"
_BACKSLASH = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v"}


class _Text:
    """A parser of GVariant's text format, without dictionaries."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def fail(self, why: str) -> InvalidArgument:
        return InvalidArgument(f"{why} at position {self.at}")

    def skip(self) -> str:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1
        return self.text[self.at : self.at + 1]

    def word(self) -> str:
        start = self.at
        while self.at < len(self.text) and self.text[self.at] not in _DELIMITERS:
            self.at += 1
        return self.text[start : self.at]

    def value(self, wanted: str = "") -> Variant:
        char = self.skip()
        if char == "@":
            self.at += 1
            start = self.at
            while self.at < len(self.text) and not self.text[self.at].isspace():
                self.at += 1
            signature = self.text[start : self.at]
            if len(split_signature(signature)) != 1:
                raise self.fail("not one type")
            return self.value(signature)
        if char in ("'", '"'):
            return Variant(wanted if wanted in ("o", "g") else "s", self.string(char))
        if char == "[":
            return self.array(wanted)
        if char == "(":
            return self.structure(wanted)
        if char == "<":
            self.at += 1
            inner = self.value()
            if self.skip() != ">":
                raise self.fail("expected >")
            self.at += 1
            return Variant("v", inner)
        word = self.word()
        if word in _KEYWORDS:
            return self.value(_KEYWORDS[word])
        return self.number(word, wanted)

    def number(self, word: str, wanted: str) -> Variant:
        if word in ("true", "false"):
            return Variant("b", word == "true")
        try:
            if wanted == "d" or (not wanted and any(char in word for char in ".eE") and not word.startswith("0x")):
                return Variant("d", float(word))
            number = int(word, 0) if word.lstrip("+-")[:2] in ("0x", "0X") else int(word)
        except ValueError:
            raise self.fail(f'unexpected "{word}"') from None
        kind = wanted or "i"
        if kind not in _FIXED or kind == "b":
            raise self.fail(f'"{word}" is not of type {kind}')
        try:
            number.to_bytes(Struct("=" + _FIXED[kind]).size, byteorder, signed=kind in "nix")
        except OverflowError:
            raise self.fail(f"{word} does not fit type {kind}") from None
        return Variant(kind, number)

    def string(self, quote: str) -> str:
        self.at += 1
        result = ""
        while True:
            char = self.text[self.at : self.at + 1]
            self.at += 1
            if not char:
                raise self.fail("unterminated string")
            if char == quote:
                return result
            if char == "\\":
                char = self.text[self.at : self.at + 1]
                self.at += 1
                if char in ("u", "U"):
                    digits = 4 if char == "u" else 8
                    try:
                        char = chr(int(self.text[self.at : self.at + digits], 16))
                    except (ValueError, OverflowError):
                        raise self.fail("bad escape") from None
                    self.at += digits
                else:
                    char = _BACKSLASH.get(char, char)
            result += char

    def items(self, close: str, kinds: list[str]) -> list[Variant]:
        """Elements up to `close`. `kinds`: their types, where known; the last one, or in an array the first, repeats."""
        self.at += 1
        found: list[Variant] = []
        while self.skip() != close:
            if found:
                if self.skip() != ",":
                    raise self.fail("expected ,")
                self.at += 1
                if self.skip() == close:
                    break
            wanted = kinds[min(len(found), len(kinds) - 1)] if kinds else ""
            if close == "]" and found:
                wanted = found[0].signature
            found.append(self.value(wanted))
        self.at += 1
        return found

    def array(self, wanted: str) -> Variant:
        item = wanted[1:] if wanted.startswith("a") else ""
        found = self.items("]", [item] if item else [])
        if not item:
            if not found:
                raise self.fail("can't infer the type of an empty array")
            item = found[0].signature
        for element in found:
            if element.signature != item:
                raise self.fail(f"array of {item} holds {element.signature}")
        values = [element.value for element in found]
        return Variant("a" + item, bytes(values) if item == "y" else values)  # type: ignore[arg-type]

    def structure(self, wanted: str) -> Variant:
        kinds = split_signature(wanted[1:-1]) if wanted.startswith("(") else []
        found = self.items(")", kinds)
        signature = "(" + "".join(element.signature for element in found) + ")"
        return Variant(signature, tuple(element.value for element in found))


def parse_variant(text: str) -> Variant:
    """A value in GVariant's text format, for example `uint64 5`, `'x'`, `['a', 'b']` or `@as []`. Raises InvalidArgument."""
    parser = _Text(text)
    result = parser.value()
    if parser.skip():
        raise parser.fail("more than one value")
    return result
