"""What the controllers count, in one shape for v1 and v2.

Runs in: the runtime.
Spec: kernel Documentation/admin-guide/cgroup-v1 (cpuacct, memory, blkio-controller, hugetlb, rdma) and cgroup-v2.rst.

The shape is nested dicts whose keys are those of `runc events --stats`, every key always there, and what runc does not show
beside them: `cpu.burst`, `rdma`, `misc`, `oom_kills`. Times are in ns, sizes in bytes; a limit that is none is `files.MAX`.

Not here: which zeros the JSON leaves out (`boxship.runtime.stats`).
"""

from __future__ import annotations

import errno
import os

from boxship.kit.errors import BoxshipError
from boxship.linux.cgroups import files
from boxship.linux.cgroups.files import missing, parse_int, read_int, read_table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Entry = dict[str, object]

_NS_PER_TICK = 10_000_000  # USER_HZ is 100 on every architecture that matters here

_BLKIO = (
    "ioServiceBytesRecursive", "ioServicedRecursive", "ioQueueRecursive", "ioServiceTimeRecursive", "ioWaitTimeRecursive",
    "ioMergedRecursive", "ioTimeRecursive", "sectorsRecursive",
)
# v1's files, the most telling kind first: BFQ with debugging, BFQ, CFQ (Linux before 5.0), throttling.
_BLKIO_FILES = (
    (
        ("blkio.bfq.sectors_recursive", "sectorsRecursive"),
        ("blkio.bfq.io_service_time_recursive", "ioServiceTimeRecursive"),
        ("blkio.bfq.io_wait_time_recursive", "ioWaitTimeRecursive"),
        ("blkio.bfq.io_merged_recursive", "ioMergedRecursive"),
        ("blkio.bfq.io_queued_recursive", "ioQueueRecursive"),
        ("blkio.bfq.time_recursive", "ioTimeRecursive"),
        ("blkio.bfq.io_serviced_recursive", "ioServicedRecursive"),
        ("blkio.bfq.io_service_bytes_recursive", "ioServiceBytesRecursive"),
    ),
    (
        ("blkio.bfq.io_serviced_recursive", "ioServicedRecursive"),
        ("blkio.bfq.io_service_bytes_recursive", "ioServiceBytesRecursive"),
    ),
    (
        ("blkio.sectors_recursive", "sectorsRecursive"),
        ("blkio.io_service_time_recursive", "ioServiceTimeRecursive"),
        ("blkio.io_wait_time_recursive", "ioWaitTimeRecursive"),
        ("blkio.io_merged_recursive", "ioMergedRecursive"),
        ("blkio.io_queued_recursive", "ioQueueRecursive"),
        ("blkio.time_recursive", "ioTimeRecursive"),
        ("blkio.io_serviced_recursive", "ioServicedRecursive"),
        ("blkio.io_service_bytes_recursive", "ioServiceBytesRecursive"),
    ),
    (
        ("blkio.throttle.io_serviced_recursive", "ioServicedRecursive"),
        ("blkio.throttle.io_service_bytes_recursive", "ioServiceBytesRecursive"),
    ),
    (
        ("blkio.throttle.io_serviced", "ioServicedRecursive"),
        ("blkio.throttle.io_service_bytes", "ioServiceBytesRecursive"),
    ),
)
_CPUSET = (
    "cpu_exclusive", "mem_hardwall", "mem_exclusive", "memory_migrate", "memory_spread_page", "memory_spread_slab",
    "memory_pressure", "sched_load_balance", "sched_relax_domain_level",
)


def _empty() -> dict[str, Entry]:
    return {
        "cpu": {
            "usage": {"total": 0, "percpu": [], "percpu_kernel": [], "percpu_user": [], "kernel": 0, "user": 0},
            "throttling": {"periods": 0, "throttledPeriods": 0, "throttledTime": 0},
            "burst": {"periods": 0, "time": 0},
            "psi": None,
        },
        "cpuset": {"cpus": [], "mems": [], **dict.fromkeys(_CPUSET, 0)},
        "memory": {
            "cache": 0, "usage": _memory_entry(), "swap": _memory_entry(), "kernel": _memory_entry(),
            "kernelTCP": _memory_entry(), "raw": {}, "psi": None,
        },
        "pids": {"current": 0, "limit": 0},
        "blkio": {**{name: [] for name in _BLKIO}, "psi": None},
        "hugetlb": {},
        "rdma": {"current": {}, "limit": {}},
        "misc": {},
    }


def _memory_entry(limit: int = 0, usage: int = 0, peak: int = 0, failcnt: int = 0) -> Entry:
    return {"limit": limit, "usage": usage, "max": peak, "failcnt": failcnt}


def _optional_int(path: str) -> int | None:
    try:
        return read_int(path)
    except OSError as error:
        if missing(error):
            return None
        raise


def huge_page_sizes() -> list[str]:
    """Sizes of huge pages as the files are named, such as "2MB"."""
    try:
        names = os.listdir("/sys/kernel/mm/hugepages")
    except OSError:
        return []
    sizes = []
    for name in sorted(names):
        number = name.removeprefix("hugepages-").removesuffix("kB")
        if number.isdecimal():
            kilobytes = int(number)
            if kilobytes >= 1 << 20:
                sizes.append(f"{kilobytes >> 20}GB")
            elif kilobytes >= 1 << 10:
                sizes.append(f"{kilobytes >> 10}MB")
            else:
                sizes.append(f"{kilobytes}KB")
    return sizes


def expand(ranges: str) -> list[int]:
    """The numbers of a list such as "0-2,7"."""
    numbers: list[int] = []
    for part in ranges.strip().split(","):
        if part:
            low, _, high = part.partition("-")
            numbers += range(int(low), int(high or low) + 1)
    return numbers


# --- v1 --------------------------------------------------------------------------------------------------------------


def read_v1(paths: dict[str, str], cpuset_prefix: str) -> dict[str, object]:
    """Statistics of a group with a directory for each controller. A controller that is not there counts nothing."""
    stats = _empty()
    readers: tuple[tuple[str, Callable[[str], None]], ...] = (
        ("cpuset", lambda path: _cpuset_v1(path + "/" + cpuset_prefix, stats["cpuset"])),
        ("memory", lambda path: _memory_v1(path, stats["memory"])),
        ("cpu", lambda path: _cpu_v1(path, stats["cpu"])),
        ("cpuacct", lambda path: _cpuacct_v1(path, stats["cpu"])),
        ("pids", lambda path: _pids(path, stats["pids"])),
        ("blkio", lambda path: _blkio_v1(path, stats["blkio"])),
        ("hugetlb", lambda path: _hugetlb_v1(path, stats["hugetlb"])),
        ("rdma", lambda path: _rdma(path, stats["rdma"])),
        ("misc", lambda path: _misc(path, stats["misc"])),
    )
    for name, reader in readers:
        path = paths.get(name)
        if path:
            try:
                reader(path)
            except OSError as error:
                if not missing(error):
                    raise
    return {**stats}


def _cpuset_v1(prefix: str, out: Entry) -> None:
    for name in ("cpus", "mems"):
        out[name] = expand(files.read(prefix + name))
    for name in _CPUSET:
        text = files.read(prefix + name).strip()
        out[name] = int(text)  # sched_relax_domain_level may be -1


def _memory_v1(path: str, out: Entry) -> None:
    raw = read_table(path + "/memory.stat")
    out["raw"] = raw
    out["cache"] = raw.get("cache", 0)
    for key, name in (("usage", "memory"), ("swap", "memory.memsw"), ("kernel", "memory.kmem"), ("kernelTCP", "memory.kmem.tcp")):
        usage = _optional_int(f"{path}/{name}.usage_in_bytes")
        if usage is not None:
            out[key] = _memory_entry(
                _optional_int(f"{path}/{name}.limit_in_bytes") or 0, usage, read_int(f"{path}/{name}.max_usage_in_bytes"),
                read_int(f"{path}/{name}.failcnt"),
            )


def _cpu_v1(path: str, out: Entry) -> None:
    table = read_table(path + "/cpu.stat")
    out["throttling"] = {
        "periods": table.get("nr_periods", 0), "throttledPeriods": table.get("nr_throttled", 0),
        "throttledTime": table.get("throttled_time", 0),
    }
    out["burst"] = {"periods": table.get("nr_bursts", 0), "time": table.get("burst_time", 0)}


def _cpuacct_v1(path: str, out: Entry) -> None:
    ticks = read_table(path + "/cpuacct.stat")
    user, kernel = [], []
    try:
        for line in files.read(path + "/cpuacct.usage_all").splitlines()[1:]:
            fields = line.split()
            user.append(int(fields[1]))
            kernel.append(int(fields[2]))
    except OSError as error:
        if not missing(error):
            raise
    out["usage"] = {
        "total": read_int(path + "/cpuacct.usage"),
        "percpu": [int(number) for number in files.read(path + "/cpuacct.usage_percpu").split()],
        "percpu_kernel": kernel, "percpu_user": user,
        "kernel": ticks["system"] * _NS_PER_TICK, "user": ticks["user"] * _NS_PER_TICK,
    }


def _pids(path: str, out: Entry) -> None:
    out["current"] = read_int(path + "/pids.current")
    limit = read_int(path + "/pids.max")
    out["limit"] = 0 if limit == files.MAX else limit  # here, unlike elsewhere, 0 is "no limit"


def _blkio_v1(path: str, out: Entry) -> None:
    for group in _BLKIO_FILES:
        for position, (file, key) in enumerate(group):
            try:
                out[key] = _blkio_entries(files.read(f"{path}/{file}"), file)
            except OSError as error:
                if not missing(error) or position:
                    raise
                break  # not this kind
            if not out[key]:
                # Nothing counted: as with runc the next kind may know more.
                if position == 0:
                    break
                return
        else:
            return


def _blkio_entries(text: str, file: str) -> list[Entry]:
    entries: list[Entry] = []
    for line in text.splitlines():
        fields = line.replace(":", " ").split()
        if len(fields) < 3:
            if fields[:1] == ["Total"]:
                continue
            raise BoxshipError(f"unable to parse {file}: malformed line: {files.quoted(line)}")
        op = fields[2] if len(fields) == 4 else ""
        entries.append({"major": int(fields[0]), "minor": int(fields[1]), "op": op, "value": int(fields[-1])})
    return entries


def _hugetlb_v1(path: str, out: Entry) -> None:
    for size in huge_page_sizes():
        name = f"{path}/hugetlb.{size}.rsvd"
        usage = _optional_int(name + ".usage_in_bytes")
        if usage is None:
            name = f"{path}/hugetlb.{size}"
            usage = read_int(name + ".usage_in_bytes")
        out[size] = {"usage": usage, "max": read_int(name + ".max_usage_in_bytes"), "failcnt": read_int(name + ".failcnt")}


def _rdma(path: str, out: Entry) -> None:
    for key, file in (("current", "rdma.current"), ("limit", "rdma.max")):
        devices = {}
        for line in files.read(f"{path}/{file}").splitlines():
            device, *pairs = line.split()
            devices[device] = {name: parse_int(value) for name, _, value in (pair.partition("=") for pair in pairs)}
        out[key] = devices


def _misc(path: str, out: Entry) -> None:
    usage = read_table(path + "/misc.current")
    events = {name.removesuffix(".max"): count for name, count in read_table(path + "/misc.events").items()}
    for name in {**usage, **events}:
        out[name] = {"usage": usage.get(name, 0), "events": events.get(name, 0)}


# --- v2 --------------------------------------------------------------------------------------------------------------


def read_v2(path: str) -> dict[str, object]:
    """Statistics of a v2 group. A controller that is not enabled counts nothing."""
    stats = _empty()
    if not path:
        return {**stats}
    readers: tuple[Callable[[], None], ...] = (
        lambda: _pids_v2(path, stats["pids"]), lambda: _memory_v2(path, stats["memory"]),
        lambda: _io_v2(path, stats["blkio"]), lambda: _cpu_v2(path, stats["cpu"]),
        lambda: _hugetlb_v2(path, stats["hugetlb"]), lambda: _rdma(path, stats["rdma"]), lambda: _misc(path, stats["misc"]),
    )
    for reader in readers:
        try:
            reader()
        except OSError as error:
            if not missing(error):
                raise
    for key, file in (("cpu", "cpu.pressure"), ("memory", "memory.pressure"), ("blkio", "io.pressure")):
        stats[key]["psi"] = read_pressure(f"{path}/{file}")
    return {**stats}


def _pids_v2(path: str, out: Entry) -> None:
    try:
        _pids(path, out)
    except OSError as error:
        if not missing(error):
            raise
        # Without the controller, count.
        out["current"] = len(files.processes(path, recursive=False))


def _memory_v2(path: str, out: Entry) -> None:
    raw = read_table(path + "/memory.stat")
    out["raw"] = raw
    out["cache"] = raw.get("file", 0)
    current = _optional_int(path + "/memory.current")
    if current is None:
        _root_memory(out, raw)
        return
    limit = read_int(path + "/memory.max")
    out["usage"] = _memory_entry(limit, current, _optional_int(path + "/memory.peak") or 0)
    swap = _optional_int(path + "/memory.swap.current")
    swap_limit = read_int(path + "/memory.swap.max") if swap is not None else 0
    # As in v1 the figures for swap include memory; peaks cannot be added up.
    together = swap_limit if swap_limit == files.MAX else min(files.MAX, swap_limit + limit)
    out["swap"] = _memory_entry(together, (swap or 0) + current)


def _root_memory(out: Entry, raw: dict[str, int]) -> None:
    """The root group has no memory.current: the same from its other files."""
    meminfo = {}
    for line in files.read("/proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name in ("SwapTotal", "SwapFree"):
            meminfo[name] = int(value.split()[0]) * 1024
    usage = raw.get("anon", 0) + raw.get("file", 0)
    out["usage"] = _memory_entry(files.MAX, usage)
    out["swap"] = _memory_entry(files.MAX, usage + meminfo.get("SwapTotal", 0) - meminfo.get("SwapFree", 0))


_IO_KEYS = {
    "rbytes": ("ioServiceBytesRecursive", "Read"), "wbytes": ("ioServiceBytesRecursive", "Write"),
    "rios": ("ioServicedRecursive", "Read"), "wios": ("ioServicedRecursive", "Write"),
}


def _io_v2(path: str, out: Entry) -> None:
    tables: dict[str, list[Entry]] = {key: [] for key, _ in _IO_KEYS.values()}
    for line in files.read(path + "/io.stat").splitlines():
        device, *pairs = line.split()
        major, colon, minor = device.partition(":")
        if not colon:
            continue
        for pair in pairs:
            name, _, value = pair.partition("=")
            if name in _IO_KEYS:
                key, op = _IO_KEYS[name]
                tables[key].append({"major": int(major), "minor": int(minor), "op": op, "value": int(value)})
    out.update(tables)


def _cpu_v2(path: str, out: Entry) -> None:
    table = read_table(path + "/cpu.stat")

    def ns(name: str) -> int:
        return table.get(name, 0) * 1000

    out["usage"] = {
        "total": ns("usage_usec"), "percpu": [], "percpu_kernel": [], "percpu_user": [], "kernel": ns("system_usec"),
        "user": ns("user_usec"),
    }
    out["throttling"] = {
        "periods": table.get("nr_periods", 0), "throttledPeriods": table.get("nr_throttled", 0),
        "throttledTime": ns("throttled_usec"),
    }
    out["burst"] = {"periods": table.get("nr_bursts", 0), "time": ns("burst_usec")}


def _hugetlb_v2(path: str, out: Entry) -> None:
    for size in huge_page_sizes():
        usage = _optional_int(f"{path}/hugetlb.{size}.rsvd.current")
        if usage is None:
            usage = read_int(f"{path}/hugetlb.{size}.current")
        out[size] = {"usage": usage, "max": 0, "failcnt": read_table(f"{path}/hugetlb.{size}.events").get("max", 0)}


def read_pressure(path: str) -> Entry | None:
    """Pressure stall information: some and full, each avg10, avg60, avg300 and total (µs); None where there is none."""
    try:
        text = files.read(path)
    except OSError as error:
        # Built without, switched off for the group, or (EOPNOTSUPP) for lack of psi=1 on the kernel's command line.
        if missing(error) or error.errno == errno.EOPNOTSUPP:
            return None
        raise
    result: Entry = {kind: {"avg10": 0.0, "avg60": 0.0, "avg300": 0.0, "total": 0} for kind in ("some", "full")}
    for line in text.splitlines():
        kind, *pairs = line.split()
        values: dict[str, object] = {}
        for pair in pairs:
            name, _, value = pair.partition("=")
            number = float(value)
            values[name] = int(number) if number == int(number) else number
        result[kind] = values
    return result
