"""A container's figures as the messages that containerd's clients read.

Runs in: the shim.
Spec: containerd/cgroups, io.containerd.cgroups.v1.Metrics and .v2.Metrics.
Not here: reading them (`boxship.linux.cgroups.stats`).
"""

from __future__ import annotations

from boxship.api.task import pb
from boxship.linux.cgroups import Cgroup
from boxship.linux.cgroups.arrangement import arrangement, membership

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_V1_BLKIO = {
    "io_service_bytes_recursive": "ioServiceBytesRecursive", "io_serviced_recursive": "ioServicedRecursive",
    "io_queued_recursive": "ioQueueRecursive", "io_service_time_recursive": "ioServiceTimeRecursive",
    "io_wait_time_recursive": "ioWaitTimeRecursive", "io_merged_recursive": "ioMergedRecursive",
    "io_time_recursive": "ioTimeRecursive", "sectors_recursive": "sectorsRecursive",
}
# The message's fields are named after memory.stat's lines, but for these.
_V1_MEMORY = {
    "pg_pg_in": "pgpgin", "pg_pg_out": "pgpgout", "pg_fault": "pgfault", "pg_maj_fault": "pgmajfault",
    "hierarchical_swap_limit": "hierarchical_memsw_limit",
}


def cgroup_of(pid: int) -> Cgroup | None:
    """The control group that a process is in, None where it is in none of its own. Raises OSError."""
    machine = arrangement()
    own = membership(pid)
    if machine.pure_v2:
        path = own.get("", "/")
        return None if path == "/" else Cgroup.decode(
            {"driver": "cgroupfs", "version": 2, "paths": {"": machine.unified + path}, "rootless": False, "explicit": True})
    paths = {
        name: hierarchy.directory(own[name]) for name, hierarchy in machine.by_controller.items()
        if own.get(name, "/") != "/"
    }
    if machine.unified and own.get("", "/") != "/":
        paths[""] = machine.unified + own[""]
    if not paths:
        return None
    return Cgroup.decode({"driver": "cgroupfs", "version": 1, "paths": paths, "rootless": False, "explicit": True})


def metrics(cgroup: Cgroup) -> Any:
    """The message for the cgroup's arrangement. Raises BoxshipError."""
    stats: Any = cgroup.stats()
    return _v2(stats, cgroup.oom_kills()) if cgroup.encode()["version"] == 2 else _v1(stats, cgroup.oom_kills())


def _entry(message: Any, entry: Any) -> None:
    message.limit, message.usage, message.max, message.failcnt = entry["limit"], entry["usage"], entry["max"], entry["failcnt"]


def _v1(stats: Any, oom_kills: int) -> Any:
    message = pb.metrics_v1.Metrics()
    for size, entry in stats["hugetlb"].items():
        message.hugetlb.add(usage=entry["usage"], max=entry["max"], failcnt=entry["failcnt"], pagesize=size)
    message.pids.current, message.pids.limit = stats["pids"]["current"], stats["pids"]["limit"]
    usage, throttling = stats["cpu"]["usage"], stats["cpu"]["throttling"]
    message.cpu.usage.total, message.cpu.usage.kernel, message.cpu.usage.user = usage["total"], usage["kernel"], usage["user"]
    message.cpu.usage.per_cpu.extend(usage["percpu"])
    message.cpu.throttling.periods = throttling["periods"]
    message.cpu.throttling.throttled_periods = throttling["throttledPeriods"]
    message.cpu.throttling.throttled_time = throttling["throttledTime"]
    raw = stats["memory"]["raw"]
    for field in message.memory.DESCRIPTOR.fields:
        if field.type == field.TYPE_MESSAGE:
            continue
        total = "total_" if field.name.startswith("total_") else ""
        name = field.name.removeprefix("total_")
        setattr(message.memory, field.name, raw.get(total + _V1_MEMORY.get(name, name), 0))
    for name, key in (("usage", "usage"), ("swap", "swap"), ("kernel", "kernel"), ("kernel_tcp", "kernelTCP")):
        _entry(getattr(message.memory, name), stats["memory"][key])
    for name, key in _V1_BLKIO.items():
        for entry in stats["blkio"][key]:
            getattr(message.blkio, name).add(op=entry["op"], major=entry["major"], minor=entry["minor"], value=entry["value"])
    _rdma(message, stats)
    message.memory_oom_control.oom_kill = oom_kills
    return message


def _rdma(message: Any, stats: Any) -> None:
    for kind in ("current", "limit"):
        for device, entry in stats["rdma"][kind].items():
            getattr(message.rdma, kind).add(
                device=device, hca_handles=min(entry.get("hca_handle", 0), 0xFFFFFFFF),
                hca_objects=min(entry.get("hca_object", 0), 0xFFFFFFFF))


def _psi(message: Any, pressure: Any) -> None:
    for kind in ("some", "full"):
        for name, value in (pressure or {}).get(kind, {}).items():
            setattr(getattr(message.psi, kind), name, value)


def _v2(stats: Any, oom_kills: int) -> Any:
    message = pb.metrics_v2.Metrics()
    message.pids.current, message.pids.limit = stats["pids"]["current"], stats["pids"]["limit"]
    usage, throttling, burst = stats["cpu"]["usage"], stats["cpu"]["throttling"], stats["cpu"]["burst"]
    cpu = message.cpu
    cpu.usage_usec, cpu.user_usec, cpu.system_usec = (usage[key] // 1000 for key in ("total", "user", "kernel"))
    cpu.nr_periods, cpu.nr_throttled = throttling["periods"], throttling["throttledPeriods"]
    cpu.throttled_usec = throttling["throttledTime"] // 1000
    cpu.nr_bursts, cpu.burst_usec = burst["periods"], burst["time"] // 1000
    _psi(cpu, stats["cpu"]["psi"])
    memory, raw = message.memory, stats["memory"]["raw"]
    for field in memory.DESCRIPTOR.fields:
        if field.type != field.TYPE_MESSAGE and field.name in raw:
            setattr(memory, field.name, raw[field.name])
    used, swap = stats["memory"]["usage"], stats["memory"]["swap"]
    memory.usage, memory.usage_limit, memory.max_usage = used["usage"], used["limit"], used["max"]
    # Here swap is what `runc events` shows: memory and swap together.
    memory.swap_usage = max(0, swap["usage"] - used["usage"])
    memory.swap_limit = swap["limit"] - used["limit"] if used["limit"] < swap["limit"] else swap["limit"]
    _psi(memory, stats["memory"]["psi"])
    _rdma(message, stats)
    devices: dict[tuple[int, int], Any] = {}
    for key, names in (("ioServiceBytesRecursive", ("rbytes", "wbytes")), ("ioServicedRecursive", ("rios", "wios"))):
        for entry in stats["blkio"][key]:
            device = entry["major"], entry["minor"]
            if device not in devices:
                devices[device] = message.io.usage.add(major=device[0], minor=device[1])
            if entry["op"] in ("Read", "Write"):
                setattr(devices[device], names[entry["op"] == "Write"], entry["value"])
    _psi(message.io, stats["blkio"]["psi"])
    for size, entry in stats["hugetlb"].items():
        message.hugetlb.add(current=entry["usage"], max=entry["max"], pagesize=size, failcnt=entry["failcnt"])
    message.memory_events.oom_kill = oom_kills
    return message
