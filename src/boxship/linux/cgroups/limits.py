"""Limits of a control group, as numbers, and their conversion from v1 to v2.

Runs in: the runtime.
Spec: kernel Documentation/admin-guide/cgroup-v1/*.rst and cgroup-v2.rst; the scales of v1 are the ones used.
"""

from __future__ import annotations

from boxship.kit.errors import InvalidArgument

ANY = -1
"""A device number that stands for all."""


class DeviceRule:
    """One rule of a list of device rules.

    Attributes:
        allow: whether the rule allows or denies.
        kind: "a" (everything; the other fields do not matter), "b" or "c".
        major, minor: numbers, or `ANY`.
        access: some of "r", "w" and "m" (mknod).
    """

    __slots__ = ("access", "allow", "kind", "major", "minor")

    def __init__(self, allow: bool, kind: str = "a", major: int = ANY, minor: int = ANY, access: str = "rwm") -> None:
        self.allow = allow
        self.kind = kind
        self.major = major
        self.minor = minor
        self.access = access

    def __repr__(self) -> str:
        return f"DeviceRule({self.allow}, {str(self)!r})"

    def __str__(self) -> str:
        """As v1's devices.allow takes it."""
        major = "*" if self.major == ANY else self.major
        minor = "*" if self.minor == ANY else self.minor
        return f"{self.kind} {major}:{minor} {self.access}"


class Limits:
    """What to limit; None, 0 where the kernel has no use for it, or an empty list leaves a setting alone.

    Attributes, with v1's units and ranges:
        memory_limit, memory_reservation, memory_swap: bytes, -1 for none; swap is memory and swap together.
        memory_swappiness: 0 … 100. memory_disable_oom_killer, memory_check_before_update: booleans.
        cpu_shares: 2 … 262144. cpu_quota, cpu_burst, cpu_period, cpu_realtime_*: µs; quota -1 for none.
        cpu_cpus, cpu_mems: lists as "0-2,7". cpu_idle: 0 or 1.
        pids_limit: processes, -1 for none; here 0 is a limit (of 1, as systemd knows no 0).
        blkio_weight, blkio_leaf_weight: 10 … 1000.
        blkio_weight_device: (major, minor, weight, leaf weight). blkio_throttle_*: (major, minor, rate per second).
        hugepages: (size such as "2MB", bytes). rdma: device to (handles or None, objects or None).
        net_classid: tc class. net_priorities: (interface, priority).
        unified: name to content of v2 files.
        devices: rules in order, ending with the effective policy; None leaves the present ones.
    """

    __slots__ = (
        "blkio_leaf_weight", "blkio_throttle_read_bps", "blkio_throttle_read_iops", "blkio_throttle_write_bps",
        "blkio_throttle_write_iops", "blkio_weight", "blkio_weight_device", "cpu_burst", "cpu_cpus", "cpu_idle", "cpu_mems",
        "cpu_period", "cpu_quota", "cpu_realtime_period", "cpu_realtime_runtime", "cpu_shares", "devices", "hugepages",
        "memory_check_before_update", "memory_disable_oom_killer", "memory_kernel", "memory_kernel_tcp", "memory_limit",
        "memory_reservation", "memory_swap", "memory_swappiness", "memory_use_hierarchy", "net_classid", "net_priorities",
        "pids_limit", "rdma", "unified",
    )

    def __init__(self) -> None:
        self.memory_limit: int | None = None
        self.memory_reservation: int | None = None
        self.memory_swap: int | None = None
        self.memory_kernel: int | None = None
        self.memory_kernel_tcp: int | None = None
        self.memory_swappiness: int | None = None
        self.memory_disable_oom_killer: bool | None = None
        self.memory_use_hierarchy: bool | None = None
        self.memory_check_before_update: bool | None = None
        self.cpu_shares: int | None = None
        self.cpu_quota: int | None = None
        self.cpu_burst: int | None = None
        self.cpu_period: int | None = None
        self.cpu_realtime_runtime: int | None = None
        self.cpu_realtime_period: int | None = None
        self.cpu_cpus: str = ""
        self.cpu_mems: str = ""
        self.cpu_idle: int | None = None
        self.pids_limit: int | None = None
        self.blkio_weight: int | None = None
        self.blkio_leaf_weight: int | None = None
        self.blkio_weight_device: list[tuple[int, int, int | None, int | None]] = []
        self.blkio_throttle_read_bps: list[tuple[int, int, int]] = []
        self.blkio_throttle_write_bps: list[tuple[int, int, int]] = []
        self.blkio_throttle_read_iops: list[tuple[int, int, int]] = []
        self.blkio_throttle_write_iops: list[tuple[int, int, int]] = []
        self.hugepages: list[tuple[str, int]] = []
        self.net_classid: int | None = None
        self.net_priorities: list[tuple[str, int]] = []
        self.rdma: dict[str, tuple[int | None, int | None]] = {}
        self.unified: dict[str, str] = {}
        self.devices: list[DeviceRule] | None = None

    def has_memory(self) -> bool:
        """Whether v2 has something to set for memory."""
        return bool(self.memory_limit or self.memory_reservation or self.memory_swap)

    def has_cpu(self) -> bool:
        """Whether v2 has something to set for cpu."""
        return (
            bool(self.cpu_shares or self.cpu_quota or self.cpu_period)
            or self.cpu_idle is not None or self.cpu_burst is not None
        )

    def has_realtime(self) -> bool:
        """Whether v1 has something to set for realtime scheduling."""
        return bool(self.cpu_realtime_period or self.cpu_realtime_runtime)

    def has_cpuset(self) -> bool:
        """Whether CPUs or memory nodes are given."""
        return bool(self.cpu_cpus or self.cpu_mems)

    def has_io(self) -> bool:
        """Whether v2 has something to set for io."""
        return bool(
            self.blkio_weight or self.blkio_weight_device or self.blkio_throttle_read_bps or self.blkio_throttle_write_bps
            or self.blkio_throttle_read_iops or self.blkio_throttle_write_iops
        )

    def wanted(self) -> list[str]:
        """v1's controllers, in the order in which they are set, for which something is given (devices apart)."""
        needs = (
            ("cpuset", self.has_cpuset()),
            ("memory", self.has_memory() or self.memory_disable_oom_killer or self.memory_swappiness is not None),
            ("cpu", self.has_cpu() or self.has_realtime()),
            ("pids", self.pids_limit is not None),
            ("blkio", self.has_io() or self.blkio_leaf_weight),
            ("hugetlb", self.hugepages),
            ("net_cls", self.net_classid),
            ("net_prio", self.net_priorities),
            ("rdma", self.rdma),
        )
        return [name for name, needed in needs if needed]


def pids_max(limit: int) -> str:
    """The content of pids.max. systemd takes no 0 for TasksMax, so 0 is 1 with every driver."""
    return str(limit or 1) if limit >= 0 else "max"


def cpu_weight(shares: int) -> int:
    """v2's weight (1 … 10000, default 100) for v1's shares (2 … 262144, default 1024); 0 is unset in both.

    The curve goes through minimum, default and maximum of both scales, and is systemd's and runc's since 2025.
    """
    if shares == 0:
        return 0
    if shares <= 2:
        return 1
    if shares >= 262144:
        return 10000
    from math import ceil, log2

    power = log2(shares)
    return ceil(10 ** ((power * power + 125 * power) / 612 - 7 / 34))


def io_weight(weight: int) -> int:
    """v2's io.weight (1 … 10000) for v1's blkio.weight (10 … 1000); 0 is unset in both."""
    return 1 + (weight - 10) * 9999 // 990 if weight else 0


def swap_only(swap: int, memory: int) -> int:
    """v2's swap limit for v1's limit of memory and swap together; 0 is unset and -1 unlimited, for both arguments too.

    Equal limits give 0, which then means "no swap" and not "unset": the caller tells by `swap` > 0.
    """
    if memory == -1 and swap == 0:
        return -1  # v1 lifts both together
    if swap in (-1, 0) or memory == -1:
        return swap
    if memory == 0:
        raise InvalidArgument("unable to set swap limit without memory limit")
    if memory < 0:
        raise InvalidArgument(f"invalid memory value: {memory}")
    if swap < memory:
        raise InvalidArgument("memory+swap limit should be >= memory limit")
    return swap - memory


def max_string(value: int) -> str:
    """The content of a v2 file for a v1 limit: "max" for -1."""
    return "max" if value == -1 else str(value)


def bitmap(ranges: str) -> bytes:
    """A list of CPUs as "1,3-5" as bits, lowest first, as systemd takes it. Raises InvalidArgument."""
    bits = 0
    for part in ranges.split(","):
        part = part.strip()
        if not part:
            continue
        low, dash, high = part.partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()):
            raise InvalidArgument(f'invalid range: "{part}"')
        first, last = int(low), int(high or low)
        if first > last or last > 65535:
            raise InvalidArgument(f'invalid range: "{part}"')
        bits |= ((1 << (last - first + 1)) - 1) << first
    if not bits:
        raise InvalidArgument("empty value")
    return bits.to_bytes((bits.bit_length() + 7) // 8, "little")
