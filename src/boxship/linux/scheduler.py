"""Where and when a process runs: scheduling policy, I/O priority, CPU affinity, memory policy.

Runs in: the runtime, which packs the arguments; init performs the calls.
Spec: sched_setattr(2), ioprio_set(2), sched_setaffinity(2), set_mempolicy(2); runtime-spec 1.3.0, config.md "Linux Process"
(scheduler, ioPriority, execCPUAffinity) and config-linux.md "Memory policy".
"""

from __future__ import annotations

from _struct import Struct

from boxship.abi import process as abi
from boxship.kit.errors import InvalidArgument
from boxship.kit.text import parse_uint, quoted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

# struct sched_attr {u32 size, policy; u64 flags; s32 nice; u32 priority; u64 runtime, deadline, period; u32 util_min, util_max}
_SCHED_ATTR = Struct("=IIQiIQQQII")
_MAX_ID = 64 * 1024
_NODES_FORBIDDEN = ("MPOL_DEFAULT", "MPOL_LOCAL")
_NODES_REQUIRED = ("MPOL_BIND", "MPOL_INTERLEAVE", "MPOL_PREFERRED_MANY", "MPOL_WEIGHTED_INTERLEAVE")

ALL_CPUS = b"\xff" * (_MAX_ID // 8)
"""The affinity of a process that was never bound: the kernel clears what it lacks, and what the cpuset forbids."""


def sched_attr(
    policy: str, *, flags: Iterable[str] = (), nice: int = 0, priority: int = 0, runtime: int = 0, deadline: int = 0,
    period: int = 0,
) -> bytes:
    """struct sched_attr. Times in nanoseconds. Raises InvalidArgument in runc's words."""
    if not policy:
        raise InvalidArgument("scheduler policy is required")
    number = abi.SCHED_POLICIES.get(policy)
    if number is None:
        raise InvalidArgument(f"invalid scheduler policy: {policy}")
    if policy in ("SCHED_OTHER", "SCHED_BATCH") and not -20 <= nice <= 19:
        raise InvalidArgument(f"invalid scheduler.nice: {nice} when scheduler.policy is {policy}")
    if priority and policy not in ("SCHED_FIFO", "SCHED_RR"):
        raise InvalidArgument("scheduler.priority can only be specified for SchedFIFO or SchedRR policy")
    if policy != "SCHED_DEADLINE" and (runtime or deadline or period):
        raise InvalidArgument("scheduler runtime/deadline/period can only be specified for SchedDeadline policy")
    bits = 0
    for flag in flags:
        bit = abi.SCHED_FLAGS.get(flag)
        if bit is None:
            raise InvalidArgument(f"invalid scheduler flag: {flag}")
        bits |= bit
    return _SCHED_ATTR.pack(
        _SCHED_ATTR.size, number, bits, nice, priority & 0xFFFFFFFF, _u64(runtime), _u64(deadline), _u64(period), 0, 0
    )


def _u64(value: int) -> int:
    return value & ((1 << 64) - 1)


def io_priority(class_name: str, priority: int) -> int:
    """The value for ioprio_set(2). Raises InvalidArgument in runc's words."""
    if not 0 <= priority <= 7:
        raise InvalidArgument(f"invalid ioPriority.Priority: {priority}")
    number = abi.IOPRIO_CLASSES.get(class_name)
    if number is None:
        raise InvalidArgument(f"invalid ioPriority.Class: {quoted(class_name)}")
    return number << abi.IOPRIO_CLASS_SHIFT | priority


def cpu_mask(text: str) -> bytes | None:
    """The mask of a list such as "0-3,7", in whole 64-bit words; None for "".

    Raises ValueError in runc's words, to be put behind "bad CPUAffinity.Initial: " and the like.
    """
    if not text:
        return None
    mask = _members(text)
    if not mask:
        raise ValueError(f"no members found in set {quoted(text)}")
    return _words(mask)


def _members(text: str) -> int:
    mask = 0
    for part in text.split(","):
        part = part.strip()
        if not part:
            continue
        first, dash, last = part.partition("-")
        start = _id(first)
        end = _id(last) if dash else start
        if start > end:
            raise ValueError(f"invalid range: {part}")
        mask |= (1 << (end + 1)) - (1 << start)
    return mask


def _id(text: str) -> int:
    value = parse_uint(text, 32)
    if value > _MAX_ID:
        raise ValueError(f"values larger than {_MAX_ID} are not supported")
    return value


def _words(mask: int) -> bytes:
    """The kernel's bitmaps are arrays of words, each in the machine's byte order."""
    words = (mask.bit_length() + 63) // 64
    return b"".join(Struct("=Q").pack(_u64(mask >> 64 * i)) for i in range(words))


def memory_policy(mode: str, nodes: str = "", flags: Iterable[str] = ()) -> tuple[int, bytes, int]:
    """(mode with flags, node mask, maxnode) for set_mempolicy(2); an empty mask goes with maxnode 0.

    Raises InvalidArgument in runc's words.
    """
    number = abi.MPOL_MODES.get(mode)
    if number is None:
        raise InvalidArgument(f"invalid memory policy mode {quoted(mode)}")
    try:
        mask = cpu_mask(nodes)
    except ValueError as error:
        raise InvalidArgument(f"invalid memory policy nodes {quoted(nodes)}: {error}") from None
    for flag in flags:
        bit = abi.MPOL_FLAGS.get(flag)
        if bit is None:
            raise InvalidArgument(f"invalid memory policy flag {quoted(flag)}")
        number |= bit
    if mask and mode in _NODES_FORBIDDEN:
        raise InvalidArgument(f"memory policy mode requires 0 nodes but got {_count(mask)}")
    if not mask and mode in _NODES_REQUIRED:
        raise InvalidArgument("memory policy mode requires at least one node but got 0")
    # The kernel takes one from maxnode before it counts bits.
    return (number, mask, len(mask) * 8 + 1) if mask else (number, b"", 0)


def _count(mask: bytes) -> int:
    return sum(byte.bit_count() for byte in mask)


def known_memory_modes() -> list[str]:
    """As `runc features` lists them."""
    return sorted(abi.MPOL_MODES)


def known_memory_flags() -> list[str]:
    """As `runc features` lists them."""
    return sorted(abi.MPOL_FLAGS)
