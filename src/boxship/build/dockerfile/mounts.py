"""`RUN --mount`: what it says.

Runs in: whatever evaluates a Dockerfile.
Spec: the Dockerfile reference, RUN --mount.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from dataclasses import dataclass
from posixpath import normpath

from boxship.build.dockerfile.source import suggestion
from boxship.kit.errors import InvalidArgument

TYPES = ("bind", "cache", "tmpfs", "secret", "ssh")
SHARING = ("shared", "private", "locked")
_KEYS = ("type", "from", "source", "src", "target", "dst", "destination", "readonly", "ro", "readwrite", "rw", "id", "sharing",
         "required", "size", "mode", "uid", "gid", "env")
_TRUE = frozenset(("1", "t", "T", "TRUE", "true", "True"))
_FALSE = frozenset(("0", "f", "F", "FALSE", "false", "False"))
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?) ?(?:([kmgtp])(?:i?b)?|b)?\Z", re.IGNORECASE)
_OWNED = frozenset(("cache", "secret", "ssh"))


@dataclass(frozen=True)
class Mount:
    """One mount, its words expanded."""

    type: str = "bind"
    from_: str = ""
    """A stage, an image or a context; "" for the main context (bind) or nothing (cache)."""
    source: str = ""
    """Path in `from_`."""
    target: str = ""
    """Path in the container; of a secret or ssh mount the default one if none is given."""
    target_given: bool = False
    """Whether the Dockerfile names the target."""
    read_only: bool = False
    id: str = ""
    """Of a cache, secret or ssh agent."""
    sharing: str = "shared"
    required: bool = False
    size: int = 0
    """Of a tmpfs, in bytes; 0 for no limit."""
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    env: str = ""
    """The variable that a secret is put into; "" for none."""

    @property
    def read_write(self) -> bool:
        """Whether it may be written to."""
        return not self.read_only


@dataclass(frozen=True)
class MountFlag:
    """`--mount=…` as it is written."""

    text: str
    fields: tuple[str, ...]

    @property
    def from_(self) -> str:
        """What `from=` names: variables are not expanded in it."""
        found = ""
        for each in self.fields:
            key, _, value = each.partition("=")
            if key.lower() == "from":
                found = value
        return found

    @property
    def constant(self) -> bool:
        """Whether it means the same whatever the variables are."""
        return "$" not in self.text

    def expanded(self, expand: Callable[[str], str]) -> Mount:
        """The mount with its words expanded. Raises InvalidArgument."""
        return _mount(self.fields, expand)


def parse(text: str) -> MountFlag:
    """Split the flag's value. Raises InvalidArgument."""
    try:
        rows = list(csv.reader([text], strict=True))
    except csv.Error as error:
        raise InvalidArgument(f"failed to parse csv mounts: {error}") from None
    if not rows or not rows[0]:
        raise InvalidArgument("failed to parse csv mounts: it is empty", "such as --mount=type=cache,target=/PATH")
    flag = MountFlag(text, tuple(rows[0]))
    if "$" in flag.from_[:-1]:
        raise InvalidArgument("'from' doesn't support variable expansion, define alias stage instead")
    return flag


def _mount(fields: tuple[str, ...], expand: Callable[[str], str]) -> Mount:
    values: dict[str, object] = {"type": "bind"}
    read_only: bool | None = None
    for each in fields:
        key, equals, value = each.partition("=")
        key = key.lower()
        if key not in _KEYS:
            hint = suggestion(key, list(_KEYS))
            raise InvalidArgument(
                f"unexpected key '{key}' in '{each}'" if equals else f"invalid field '{each}' must be a key=value pair", hint)
        if key in ("readonly", "ro", "readwrite", "rw"):
            read_only = (not equals or _boolean(key, expand(value))) is key.startswith(("readonly", "ro"))
        elif key == "required":
            if values["type"] not in ("secret", "ssh"):
                raise InvalidArgument(f"unexpected key 'required' for mount type '{values['type']}'")
            values["required"] = not equals or _boolean(key, expand(value))
        elif not equals:
            raise InvalidArgument(f"invalid field '{each}' must be a key=value pair")
        else:
            name, found = _field(key, expand(value), str(values["type"]))
            values[name] = found
    kind = str(values["type"])
    values["read_only"] = kind not in ("cache", "tmpfs") if read_only is None else read_only
    _check(kind, values)
    return Mount(**_with_defaults(kind, values))  # type: ignore[arg-type]


def _field(key: str, value: str, kind: str) -> tuple[str, object]:
    if key == "type":
        return "type", _one_of(value, TYPES, "unsupported mount type")
    if key == "sharing":
        return "sharing", _one_of(value, SHARING, "unsupported sharing value")
    if key == "size":
        if kind != "tmpfs":
            raise InvalidArgument(f"unexpected key 'size' for mount type '{kind}'")
        return "size", _size(value)
    if key in ("uid", "gid"):
        return key, _number(key, value, 10)
    if key == "mode":
        return key, _number(key, value, 8)
    names = {"from": "from_", "src": "source", "dst": "target", "destination": "target"}
    return names.get(key, key), value


def _one_of(value: str, known: tuple[str, ...], what: str) -> str:
    if value.lower() not in known:
        raise InvalidArgument(f'{what} "{value}"', suggestion(value.lower(), list(known)) or f"it may be {', '.join(known)}")
    return value.lower()


def _boolean(key: str, value: str) -> bool:
    if value not in _TRUE and value not in _FALSE:
        raise InvalidArgument(f"invalid value for {key}: {value}")
    return value in _TRUE


def _number(key: str, value: str, base: int) -> int:
    digits = "01234567" if base == 8 else "0123456789"
    if not value or value.strip(digits) or len(value) > 20 or (number := int(value, base)) >= 1 << 32:
        raise InvalidArgument(f"invalid value {value} for {key}")
    return number


def _size(value: str) -> int:
    found = _SIZE.match(value)
    if found is None:
        raise InvalidArgument(f"invalid value for size: {value}", "such as 64m or 1.5g")
    size = int(float(found[1]) * 1024 ** ("bkmgtp".index((found[2] or "b").lower())))
    if size >= 1 << 63:
        raise InvalidArgument(f"invalid value for size: {value}")
    return size


def _check(kind: str, values: dict[str, object]) -> None:
    if kind not in _OWNED:
        for key in ("mode", "uid", "gid"):
            if key in values:
                raise InvalidArgument(f'{key} not allowed for "{kind}" type mounts')
    if kind == "secret":
        if values.get("from_"):
            raise InvalidArgument("secret mount should not have a from")
        if "sharing" in values:
            raise InvalidArgument("secret mount should not define sharing")
        if not (values.get("source") or values.get("target") or values.get("id")):
            raise InvalidArgument("invalid secret mount. one of source, target required")
        if values.get("source") and values.get("id"):
            raise InvalidArgument("both source and id can't be set")
    elif kind == "ssh" and values.get("source"):
        raise InvalidArgument("ssh does not support source", "name the agent with id=")
    elif "sharing" in values and kind != "cache":
        raise InvalidArgument(f"invalid cache sharing set for {kind} mount")
    if kind in ("bind", "cache", "tmpfs") and not values.get("target"):
        raise InvalidArgument(f"{kind} mount needs a target", "add target=/PATH")


def _with_defaults(kind: str, values: dict[str, object]) -> dict[str, object]:
    target = str(values.get("target") or "")
    values["target_given"] = bool(target)
    if kind == "secret":
        name = str(values.get("source") or values.get("id") or "") or target.rstrip("/").rpartition("/")[2]
        values["id"] = name
        values["target"] = target or f"/run/secrets/{name.rstrip('/').rpartition('/')[2]}"
    elif kind == "ssh":
        values["id"] = values.get("id") or "default"
        values["target"] = target or "/run/buildkit/ssh_agent.0"
    elif kind == "cache":
        values["id"] = values.get("id") or normpath(target)
    return values
