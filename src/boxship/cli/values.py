"""The values that docker's flags take, from the text that people write: sizes, cpus, environment, volumes.

Runs in: the boxship command.
Spec: docker run's reference; sizes as in docker/go-units (RAMInBytes: powers of 1024, `b`, `k`, `m`, `g`, `t`, `p`).
"""

from __future__ import annotations

import os

from boxship.kit.errors import InvalidArgument, from_os_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_UNITS = "bkmgtp"

_PROPAGATION = ("shared", "slave", "private", "rshared", "rslave", "rprivate")
_IGNORED = ("consistent", "cached", "delegated", "nocopy", "z", "Z")


def size(text: str) -> int:
    """Bytes from "512", "64m", "1.5GiB". Raises InvalidArgument."""
    word = text.strip().lower()
    number = word.rstrip("bikmgtp ")
    suffix = word[len(number) :].strip()
    unit = suffix[:1] or "b"
    well_formed = suffix in ("", unit, unit + "b", unit + "ib") and suffix not in ("bb", "bib")
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if not well_formed or not number[:1].isdigit() or not 0 <= value < 2**63:
        raise InvalidArgument(f"invalid size: '{text}'")
    return int(value * 1024 ** _UNITS.index(unit))


def cpus(text: str) -> tuple[int, int]:
    """(quota, period) in microseconds that allow "1.5" processors' worth of time. Raises InvalidArgument."""
    whole, _, fraction = text.partition(".")
    digits = (whole or "0") + fraction
    if not digits.isdigit() or not digits.isascii() or not (whole or fraction):
        raise InvalidArgument(f"invalid number of cpus: '{text}'")
    if len(fraction) > 9:
        raise InvalidArgument(f"value is too precise: '{text}'")
    period = 100_000
    quota = int((whole or "0") + fraction.ljust(9, "0")) * period // 10**9
    available = os.cpu_count() or 1
    if quota < 1000:
        raise InvalidArgument(f"range of CPUs is from 0.01 to {available}.00, as there are only {available} CPUs available")
    if quota > available * period:
        raise InvalidArgument(f"range of CPUs is from 0.01 to {available}.00, as there are only {available} CPUs available")
    return quota, period


def environment(words: Iterable[str], caller: Mapping[str, str]) -> list[str]:
    """NAME=VALUE as it is; NAME alone takes the caller's value, and is left out when the caller has none."""
    result = []
    for word in words:
        name, equals, _ = word.partition("=")
        if not name:
            raise InvalidArgument(f"invalid environment variable: {word}")
        if "\0" in word:
            raise InvalidArgument(f"invalid environment variable: {name}: contains a NUL byte")
        if equals:
            result.append(word)
        elif name in caller:
            result.append(f"{name}={caller[name]}")
    return result


def environment_file(path: str, caller: Mapping[str, str]) -> list[str]:
    """The variables of a docker env-file: one a line, no quoting, `#` begins a comment only at the start of a line."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().removeprefix("\ufeff").splitlines()
    except OSError as error:
        raise from_os_error(error, "open") from None
    except UnicodeDecodeError:
        raise InvalidArgument(f"env file {path} contains invalid utf8 bytes") from None
    words = []
    for line in lines:
        line = line.lstrip()
        if line and not line.startswith("#"):
            name = line.partition("=")[0]
            if not name or name != name.strip() or " " in name:
                raise InvalidArgument(f"invalid env file ({path}): variable '{name}' contains whitespaces")
            words.append(line)
    return environment(words, caller)


def volume(text: str, cwd: str) -> dict[str, object]:
    """The mount of `-v SOURCE:TARGET[:OPTIONS]`. A source that is not there is made as a directory, as docker does.

    Raises InvalidArgument, also for what needs a store of volumes: a name instead of a path, and an anonymous volume.
    """
    invalid = f"invalid volume specification: '{text}'"
    parts = text.split(":")
    if len(parts) not in (2, 3) or not parts[0] or not parts[1]:
        if len(parts) == 1:
            raise InvalidArgument(f"{invalid}: anonymous volumes are not supported", "give SOURCE:TARGET")
        raise InvalidArgument(invalid)
    source, target = parts[0], parts[1]
    if not target.startswith("/"):
        raise InvalidArgument(f"{invalid}: invalid mount config: must use an absolute path: {target}")
    target = os.path.normpath(target).replace("//", "/")
    if target == "/":
        raise InvalidArgument(f"{invalid}: destination can't be '/'")
    if not source.startswith(("/", "./", "../")) and source not in (".", ".."):
        raise InvalidArgument(f"{invalid}: named volumes are not supported", f"'./{source}' is a directory here")
    source = os.path.normpath(os.path.join(cwd, source))
    options, propagation = ["rbind"], "rprivate"
    for option in filter(None, parts[2].split(",") if len(parts) == 3 else []):
        if option == "ro":
            options += ["ro", "rro"]
        elif option in _PROPAGATION:
            propagation = option
        elif option != "rw" and option not in _IGNORED:
            raise InvalidArgument(f"{invalid}: invalid mode: {parts[2]}")
    if not os.path.lexists(source):
        try:
            os.makedirs(source, 0o755, exist_ok=True)
        except OSError as error:
            raise from_os_error(error, f"creating mount source path '{source}': mkdir") from None
    return {"destination": target, "type": "bind", "source": source, "options": [*options, propagation]}
