"""Resource limits.

Runs in: the runtime, on another process by prlimit(2).
Spec: prlimit(2); runtime-spec 1.3.0, config.md "POSIX process": rlimits.
"""

from __future__ import annotations

from _struct import Struct

from boxship.abi import process as abi
from boxship.abi import syscalls
from boxship.kit.errors import InvalidArgument, from_os_error
from boxship.linux import _sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

RLIMIT = Struct("=QQ")
"""struct rlimit64 {u64 rlim_cur, rlim_max}."""
INFINITY = abi.RLIM_INFINITY


def number(name: str) -> int:
    """Of "RLIMIT_NOFILE" and the like. Raises InvalidArgument in runc's words."""
    found = abi.RLIMITS.get(name)
    if found is None:
        raise InvalidArgument(f"wrong rlimit value: {name}")
    return found


def name(resource: int) -> str:
    """Of a number; "RLIMIT_16" and the like for one without a name."""
    for found, value in abi.RLIMITS.items():
        if value == resource:
            return found
    return f"RLIMIT_{resource}"


def pack(soft: int, hard: int) -> bytes:
    """struct rlimit64; negative values mean RLIM_INFINITY, as in JSON written by programs with signed numbers."""
    return RLIMIT.pack(soft & INFINITY, hard & INFINITY)


def get(pid: int, resource: int) -> tuple[int, int]:
    """(soft, hard) of a process; 0 is the caller. Raises OSError."""
    old = bytearray(RLIMIT.size)
    _sys.syscall(syscalls.PRLIMIT64, pid, resource, None, old)
    soft, hard = RLIMIT.unpack(old)
    return soft, hard


def prlimit(pid: int, resource: int, soft: int, hard: int) -> None:
    """Set both limits of a process. Raises OSError; EPERM where raising the hard one takes CAP_SYS_RESOURCE that we lack."""
    _sys.syscall(syscalls.PRLIMIT64, pid, resource, pack(soft, hard), None)


def apply(pid: int, kind: str, soft: int, hard: int, report: Callable[[str], object] = lambda text: None) -> tuple[int, int]:
    """Set the limit named `kind`; what may not be raised stays where it is, and `report` is told. Returns what is in force.

    Raises InvalidArgument for an unknown name, or a soft limit above the hard one; both in runc's words.
    """
    resource = number(kind)
    soft, hard = soft & INFINITY, hard & INFINITY
    try:
        try:
            prlimit(pid, resource, soft, hard)
        except PermissionError:
            # For RLIMIT_NOFILE above fs.nr_open too, however mighty the caller.
            _, highest = get(pid, resource)
            clamped = min(soft, highest), min(hard, highest)
            if clamped == (soft, hard):
                raise
            prlimit(pid, resource, *clamped)
            report(f"{kind}: {soft}:{hard} is not permitted, stays at {clamped[0]}:{clamped[1]}")
            soft, hard = clamped
    except OSError as error:
        raise from_os_error(error, f"error setting rlimits for ready process: error setting rlimit type {resource}") from None
    return soft, hard
