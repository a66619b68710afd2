"""The flags of `update`: what each is called, and which member of LinuxResources it sets.

Runs in: the runtime.
Spec: runc 1.5 `update --help`; runtime-spec 1.3.0, config-linux.md "Control groups".
Not here: setting the limits (`boxship.runtime.resources`).
"""

from __future__ import annotations

from boxship.kit.errors import InvalidArgument, Unsupported
from boxship.runtime.command.flags import INT, STRING, Flag

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

# (flag, member of LinuxResources, its member, how the text is read, usage); the hidden ones are obsolete.
_TABLE = (
    ("blkio-weight", "blockIO", "weight", "int", "Specifies per cgroup weight, range is from 10 to 1000"),
    ("cpu-period", "cpu", "period", "uint", "CPU CFS period to be used for hardcapping (in usecs). 0 to use system default"),
    ("cpu-quota", "cpu", "quota", "int", "CPU CFS hardcap limit (in usecs). Allowed cpu time in a given period"),
    ("cpu-burst", "cpu", "burst", "uint", "CPU CFS hardcap burst limit (in usecs)"),
    ("cpu-share", "cpu", "shares", "uint", "CPU shares (relative weight vs. other containers)"),
    ("cpu-rt-period", "cpu", "realtimePeriod", "uint",
     "CPU realtime period to be used for hardcapping (in usecs). 0 to use system default"),
    ("cpu-rt-runtime", "cpu", "realtimeRuntime", "int",
     "CPU realtime hardcap limit (in usecs). Allowed cpu time in a given period"),
    ("cpuset-cpus", "cpu", "cpus", "", "CPU(s) to use"),
    ("cpuset-mems", "cpu", "mems", "", "Memory node(s) to use"),
    ("kernel-memory", "memory", "kernel", "size", ""),
    ("kernel-memory-tcp", "memory", "kernelTCP", "size", ""),
    ("memory", "memory", "limit", "size", "Memory limit (in bytes)"),
    ("cpu-idle", "cpu", "idle", "int", "set cgroup SCHED_IDLE or not, 0: default behavior, 1: SCHED_IDLE"),
    ("memory-reservation", "memory", "reservation", "size", "Memory reservation or soft_limit (in bytes)"),
    ("memory-swap", "memory", "swap", "size", "Total memory usage (memory + swap); set '-1' to enable unlimited swap"),
    ("pids-limit", "pids", "limit", "int", "Maximum number of pids allowed in the container"),
)
_MEANING = {flag: (group, member, kind) for flag, group, member, kind, _ in _TABLE}
_NUMBERS = ("blkio-weight", "pids-limit")  # numbers for the command line already

FLAGS = [
    Flag("resources, r", "path to the file containing the resources to update or '-' to read from the standard input", STRING),
    *(
        Flag(flag, usage or "(obsoleted; do not use)", INT if flag in _NUMBERS else STRING, hidden=not usage)
        for flag, _, _, _, usage in _TABLE
    ),
    Flag("l3-cache-schema", "The string of Intel RDT/CAT L3 cache schema", STRING),
    Flag("mem-bw-schema", "The string of Intel RDT/MBA memory bandwidth schema", STRING),
]

_UNITS = "bkmgtp"


def ram_in_bytes(text: str) -> int:
    """Bytes for "64m", "1.5 GiB" and the like: powers of 1024, as docker's and runc's flags take them. Raises InvalidArgument."""
    number = text.rstrip("bBiIkKmMgGtTpP")
    suffix = text[len(number) :].lower()
    number = number.removesuffix(" ") if suffix else number
    unit = suffix[:1] or "b"
    if suffix not in ("", unit, unit + "b", unit + "ib") or suffix in ("bb", "bib") or unit not in _UNITS:
        raise InvalidArgument(f"invalid suffix: '{suffix}'")
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if not number[:1].isdecimal() or not 0 <= value < 2**63:
        raise InvalidArgument(f"invalid size: '{text}'")
    return int(value * 1024 ** _UNITS.index(unit))


def _number(text: str, *, signed: bool) -> int:
    digits = text[1:] if text[:1] == "+" or (signed and text[:1] == "-") else text
    function = "ParseInt" if signed else "ParseUint"
    if not (digits.isascii() and digits.isdecimal()):
        raise InvalidArgument(f'strconv.{function}: parsing "{text}": invalid syntax')
    value = int(text)
    if not (-(1 << 63) <= value < 1 << 63 if signed else value < 1 << 64):
        raise InvalidArgument(f'strconv.{function}: parsing "{text}": value out of range')
    return value


def resources_from_flags(values: Mapping[str, object]) -> dict[str, object]:
    """The LinuxResources object for the flags of `update` that were given. Raises InvalidArgument, Unsupported."""
    change: dict[str, object] = {}
    for flag, given in values.items():
        if flag in ("l3-cache-schema", "mem-bw-schema") and given:
            raise Unsupported(
                "Intel RDT/CAT: l3 cache schema is not enabled" if flag == "l3-cache-schema"
                else "Intel RDT/MBA: memory bandwidth schema is not enabled"
            )
        if flag not in _MEANING:
            continue
        group, member, kind = _MEANING[flag]
        value = given
        if isinstance(given, str):
            if not given:
                continue
            try:
                if kind == "size":
                    value = -1 if given == "-1" else ram_in_bytes(given)
                elif kind:
                    value = _number(given, signed=kind == "int")
            except InvalidArgument as error:
                raise InvalidArgument(f"invalid value for {flag}: {error}") from None
        elif flag == "blkio-weight" and not given:
            continue
        members = change.setdefault(group, {})
        assert isinstance(members, dict)
        members[member] = value
    return change
