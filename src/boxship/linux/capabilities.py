"""Capabilities: names to bits, and what this kernel and this process can give away.

Runs in: the runtime; init performs the calls that are composed from this.
Spec: capabilities(7), capset(2); runtime-spec 1.3.0, config.md "Linux Process": what cannot be granted is worth a warning.
Not here: which container gets which (`boxship.oci`), and the order of the calls (`boxship.runtime.init`).
"""

from __future__ import annotations

from _struct import Struct

from boxship.abi import capability as abi
from boxship.kit.files import read_all

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_HEADER = Struct("=Ii")  # struct __user_cap_header_struct {u32 version; int pid}
_DATA = Struct("=6I")  # two of struct __user_cap_data_struct {u32 effective, permitted, inheritable}, low word first
_NUMBERS = {name: number for number, name in enumerate(abi.NAMES)}

_last_cap: int | None = None


def known() -> list[str]:
    """All names that this version knows, by number, as `runc features` lists them."""
    return list(abi.NAMES)


def last_cap() -> int:
    """The highest capability that the running kernel has; the highest that we know where it does not say (no /proc)."""
    global _last_cap
    if _last_cap is None:
        try:
            _last_cap = int(read_all("/proc/sys/kernel/cap_last_cap"))
        except (OSError, ValueError):
            _last_cap = len(abi.NAMES) - 1
    return _last_cap


def bits(names: Iterable[str]) -> tuple[int, list[str]]:
    """(mask, names that are unknown or that this kernel lacks, sorted and each once). Names are exact, as in "CAP_KILL"."""
    mask = 0
    unknown = set()
    last = last_cap()
    for name in names:
        number = _NUMBERS.get(name)
        if number is None or number > last:
            unknown.add(name)
        else:
            mask |= 1 << number
    return mask, sorted(unknown)


def names(mask: int) -> list[str]:
    """Names of the bits in `mask`, by number; a bit without a name is "CAP_41" and the like."""
    count = max(mask.bit_length(), len(abi.NAMES))
    return [abi.NAMES[i] if i < len(abi.NAMES) else f"CAP_{i}" for i in range(count) if mask >> i & 1]


def bounding() -> int:
    """Our own bounding set: nobody below us can have more. Raises OSError where there is no /proc."""
    return _status("CapBnd")


def effective() -> int:
    """Our own effective set."""
    return _status("CapEff")


def _status(field: str) -> int:
    data = read_all("/proc/self/status")
    start = data.index(f"\n{field}:".encode()) + len(field) + 2
    return int(data[start : data.index(b"\n", start)], 16)


def capset_data(effective: int, permitted: int, inheritable: int) -> tuple[bytes, bytes]:
    """(header, data) for capset(2) on the calling thread."""
    low = (1 << 32) - 1
    data = _DATA.pack(
        effective & low, permitted & low, inheritable & low, effective >> 32, permitted >> 32, inheritable >> 32
    )
    return _HEADER.pack(abi.LINUX_CAPABILITY_VERSION_3, 0), data
