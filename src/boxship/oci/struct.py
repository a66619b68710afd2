"""Typed structures over JSON objects: the annotations of a class are its schema.

Runs in: every process of the thin set.

    class Mount(Struct):
        destination: str                      # required
        type: str = ""                        # absent in the text: the default
        options: list[str] = []               # absent: a fresh list for each object
        flags: u32 | None = None
        uid_mappings: list[IDMapping] = []

A field can be str, bool, float, object (any JSON value), the integers below, another structure, `list[T]`,
`dict[str, T]`, any of them `| None`, and an alias of str that the module of the class has in its dictionary
`CHOICES` (the values that are allowed) or `CHECKS` (a function that raises InvalidArgument). The name on the wire is
the field's in camelCase (a trailing `_` is dropped), unless the class's table `_wire` has another. `null` counts as
absent. Members that no field names are kept in `extra` and written back. A field that holds its default is not
written, unless it is required or in `_always`.

A class's annotations are turned into decoders when its first object is decoded, so that importing a module of
structures costs nothing, and a configuration pays for the structures that it uses. Errors find their JSON path
while the exception travels up, so that a correct document never builds one.
Not here: rules that concern several fields (`boxship.oci.validate`).
"""

from __future__ import annotations

import sys

from boxship.kit.errors import InvalidArgument
from boxship.oci.text import dumps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, ClassVar, Self, dataclass_transform

    Decoder = Callable[[object], object]
else:

    def dataclass_transform(**_: object):
        return lambda cls: cls


u8 = int
u16 = int
u32 = int
u64 = int
i32 = int
i64 = int
size64 = int

_INTEGERS = {
    "u8": (0, 0xFF), "u16": (0, 0xFFFF), "u32": (0, 0xFFFFFFFF), "u64": (0, 0xFFFFFFFFFFFFFFFF),
    "i32": (-0x80000000, 0x7FFFFFFF), "i64": (-0x8000000000000000, 0x7FFFFFFFFFFFFFFF),
    "size64": (0, 0x7FFFFFFFFFFFFFFF), "int": (-0x8000000000000000, 0x7FFFFFFFFFFFFFFF),
}

ZERO: Any = object()
"""Default of a field that is a structure and, when absent, a fresh one made of defaults."""


class Choice:
    """The allowed values of an alias of str, and what is said of others: `%q` is the value quoted, `%s` as it is."""

    __slots__ = ("values", "words")

    def __init__(self, words: str, *values: str) -> None:
        self.words = words
        self.values = frozenset(values)

    def refuse(self, value: str) -> str:
        """The rule that `value` breaks."""
        said = self.words.replace("%q", _quote(value)).replace("%s", _shorten(value))
        return f"{said} (one of {', '.join(sorted(self.values))})"


class _Invalid(Exception):
    """A rule that is broken, on its way up; `steps` is the path from it to the root."""

    def __init__(self, rule: str, *steps: str) -> None:
        super().__init__(rule)
        self.steps = list(steps)


def _shorten(text: str) -> str:
    return text if len(text) <= 64 else text[:61] + "..."


def _quote(text: str) -> str:
    return dumps(_shorten(text))


def _show(value: object) -> str:
    """`value` in an error: short scalars as JSON, the others by kind."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str):
        return _quote(value)
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return "a number of more than 128 bits"
    return _shorten(dumps(value))


def _member(key: str) -> str:
    """The step of a path to the member `key` of a map."""
    if key.replace("_", "a").replace("-", "a").isalnum():
        return "." + key
    return f"[{_quote(key)}]"


def _join(path: str, error: _Invalid) -> str:
    steps = "".join(reversed(error.steps))
    whole = path + steps if path else steps.removeprefix(".")
    return f"{whole}: {error}" if whole else str(error)


def _string(value: object) -> object:
    if type(value) is not str:
        raise _Invalid(f"expected a string, got {_show(value)}")
    if "\0" in value:
        raise _Invalid("string contains null byte")
    return value


def _boolean(value: object) -> object:
    if value is not True and value is not False:
        raise _Invalid(f"expected true or false, got {_show(value)}")
    return value


def _number(value: object) -> object:
    if type(value) is not float and type(value) is not int:
        raise _Invalid(f"expected a number, got {_show(value)}")
    return value


def _anything(value: object) -> object:
    return value


def _integer(low: int, high: int) -> Decoder:
    def decode(value: object) -> object:
        if type(value) is not int or not low <= value <= high:
            raise _Invalid(f"expected an integer from {low} to {high}, got {_show(value)}")
        return value

    return decode


def _choice(choice: Choice, optional: bool = False) -> Decoder:
    values = choice.values | {""} if optional else choice.values

    def decode(value: object) -> object:
        if type(value) is not str:
            raise _Invalid(f"expected a string, got {_show(value)}")
        if value not in values:
            raise _Invalid(choice.refuse(value))
        return value

    return decode


def _checked(check: Callable[[str], None]) -> Decoder:
    def decode(value: object) -> object:
        if type(value) is not str:
            raise _Invalid(f"expected a string, got {_show(value)}")
        try:
            check(value)
        except InvalidArgument as error:
            raise _Invalid(f"{error}: {_quote(value)}") from None
        return value

    return decode


def _strings(value: object) -> object:
    if type(value) is not list:
        raise _Invalid(f"expected a list, got {_show(value)}")
    for item in value:
        if type(item) is not str or "\0" in item:
            return _list(_string)(value)  # finds it again, with its index
    return value[:]


def _list(decode_item: Decoder) -> Decoder:
    def decode(value: object) -> object:
        if type(value) is not list:
            raise _Invalid(f"expected a list, got {_show(value)}")
        done: list[object] = []
        try:
            for item in value:
                done.append(decode_item(item))
        except _Invalid as error:
            error.steps.append(f"[{len(done)}]")
            raise
        return done

    return decode


def _map(decode_item: Decoder) -> Decoder:
    def decode(value: object) -> object:
        if type(value) is not dict:
            raise _Invalid(f"expected an object, got {_show(value)}")
        done: dict[str, object] = {}
        key = ""
        try:
            for key, item in value.items():
                if "\0" in key:
                    raise _Invalid("string contains null byte")
                done[key] = decode_item(item)
        except _Invalid as error:
            error.steps.append(_member(key))
            raise
        return done

    return decode


def _nested(cls: type[Struct]) -> Decoder:
    """The decoder of a structure inside another, compiled when the first one comes."""
    compiled: Decoder | None = None

    def decode(value: object) -> object:
        nonlocal compiled
        if compiled is None:
            compiled = _schema(cls).decode
        return compiled(value)

    return decode


def _resolve(annotation: str, module: str) -> Decoder:
    """The decoder of a type that is written as in a class body of `module`."""
    annotation = annotation.removesuffix(" | None")
    if annotation.startswith("list["):
        inner = _resolve(annotation[5:-1], module)
        return _strings if inner is _string else _list(inner)
    if annotation.startswith("dict[str, "):
        return _map(_resolve(annotation[10:-1], module))
    if annotation in _INTEGERS:
        return _integer(*_INTEGERS[annotation])
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    names = sys.modules[module].__dict__
    choice = names.get("CHOICES", {}).get(annotation)
    if choice is not None:
        return _choice(choice)
    check = names.get("CHECKS", {}).get(annotation)
    if check is not None:
        return _checked(check)
    found = names[annotation]
    if isinstance(found, type) and issubclass(found, Struct):
        return _nested(found)
    raise TypeError(f"{module}: no decoder for the annotation {annotation!r}")


_PLAIN: dict[str, Decoder] = {"str": _string, "bool": _boolean, "float": _number, "object": _anything}


def _encode_value(value: object) -> object:
    if isinstance(value, Struct):
        return value.encode()
    if isinstance(value, list):
        return [_encode_value(item) for item in value]
    if isinstance(value, dict):
        return {key: _encode_value(item) for key, item in value.items()}
    return value


def camel_case(name: str) -> str:
    """The name on the wire that a field gets by itself: `rootfs_propagation` becomes `rootfsPropagation`."""
    first, *others = name.removesuffix("_").split("_")
    return first + "".join(word[:1].upper() + word[1:] for word in others)


class _Field:
    __slots__ = ("always", "default", "wire")

    def __init__(self, wire: str, default: object, always: bool) -> None:
        self.wire = wire
        self.default = default  # ... when the field is required
        self.always = always


class _Schema:
    """What the annotations of one class say, compiled."""

    __slots__ = ("decode", "fields", "fresh")

    def __init__(self, cls: type[Struct]) -> None:
        fields: dict[str, _Field] = {}
        fresh: list[tuple[str, Callable[[], object]]] = []
        required: list[tuple[str, str, str]] = []
        table: dict[str, tuple[str, Decoder]] = {}
        for base in reversed(cls.__mro__):
            if not issubclass(base, Struct) or base is Struct:
                continue
            module = base.__module__
            for name, annotation in base.__annotations__.items():
                wire = cls._wire.get(name) or camel_case(name)
                default = getattr(cls, name, ...)
                fields[name] = _Field(wire, default, default is ... or name in cls._always)
                choice = sys.modules[module].__dict__.get("CHOICES", {}).get(annotation)
                decode = _choice(choice, default == "") if choice else _resolve(annotation, module)
                table[wire] = (name, decode)
                if default is ...:
                    required.append((name, wire, choice.refuse("") if choice else "is required"))
                elif default is ZERO:
                    fresh.append((name, sys.modules[module].__dict__[annotation]))
                elif isinstance(default, list | dict):
                    fresh.append((name, type(default)))
        self.fields = fields
        self.fresh = tuple(fresh)
        self.decode = _object(cls, table, self.fresh, tuple(required))


def _object(
    cls: type[Struct],
    table: dict[str, tuple[str, Decoder]],
    fresh: tuple[tuple[str, Callable[[], object]], ...],
    required: tuple[tuple[str, str, str], ...],
) -> Decoder:
    find = table.get
    # Other tools write "pagesize" and get away with it: Go's decoder takes a name in any case when none fits exactly.
    find_folded = {key.lower(): field for key, field in table.items()}.get
    new = object.__new__

    def decode(value: object) -> object:
        if type(value) is not dict:
            raise _Invalid(f"expected an object, got {_show(value)}")
        done: dict[str, object] = {}
        extra: dict[str, object] = {}
        key = ""
        try:
            for key, item in value.items():
                field = find(key) or find_folded(key.lower())
                if field is None:
                    extra[key] = item
                elif item is not None:
                    done[field[0]] = field[1](item)
        except _Invalid as error:
            error.steps.append("." + key)
            raise
        for name, wire, rule in required:
            if name not in done:
                raise _Invalid(rule, "." + wire)
        for name, make in fresh:
            if name not in done:
                done[name] = make()
        done["extra"] = extra
        made = new(cls)
        made.__dict__ = done
        return made

    return decode


def _schema(cls: type[Struct]) -> _Schema:
    found: _Schema | None = cls.__dict__.get("_compiled")
    if found is None:
        found = cls._compiled = _Schema(cls)
    return found


@dataclass_transform(kw_only_default=True)
class Struct:
    """Base of the typed structures. `extra` has the members of the JSON object that no field names."""

    _wire: ClassVar[dict[str, str]] = {}
    _always: ClassVar[tuple[str, ...]] = ()
    _compiled: ClassVar[_Schema | None] = None

    if TYPE_CHECKING:
        extra: dict[str, object] = {}
    else:

        def __init__(self, **values: object) -> None:
            """Make one by hand; the values are taken as they are. Raises TypeError as a dataclass does."""
            schema = _schema(type(self))
            extra = values.pop("extra", None)
            for name in values:
                if name not in schema.fields:
                    raise TypeError(f"{type(self).__name__} has no field {name!r}")
            for name, field in schema.fields.items():
                if field.default is ... and name not in values:
                    raise TypeError(f"{type(self).__name__} needs the field {name!r}")
            for name, make in schema.fresh:
                if name not in values:
                    values[name] = make()
            values["extra"] = {} if extra is None else extra
            self.__dict__ = values

    @classmethod
    def decode(cls, obj: object, path: str = "") -> Self:
        """The structure that the JSON object `obj` is; `path` is where it stands in its document.

        Raises InvalidArgument, which names the JSON path and the rule. Nothing of `obj` is shared but what is
        kept in `extra` and in fields of the type object.
        """
        try:
            made = _schema(cls).decode(obj)
        except _Invalid as error:
            raise InvalidArgument(_join(path, error)) from None
        return made  # type: ignore[return-value]

    def encode(self) -> dict[str, object]:
        """The JSON object: fields in the order of the class, without those that hold their defaults, then `extra`."""
        values = self.__dict__
        result: dict[str, object] = {}
        for name, field in _schema(type(self)).fields.items():
            value = values.get(name, field.default)
            if value is None or value is ...:
                continue
            if not field.always and value == field.default:
                continue
            encoded = _encode_value(value)
            if field.default is ZERO and not encoded and not field.always:
                continue
            result[field.wire] = encoded
        result.update(self.extra)
        return result

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self.encode() == other.encode()

    __hash__ = None  # type: ignore[assignment]  # they can be changed

    def __repr__(self) -> str:
        return f"{type(self).__name__}({dumps(self.encode())})"
