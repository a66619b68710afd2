"""What a container uses, as `docker stats` reads it.

Runs in: the daemon.
Spec: Docker Engine API, ContainerStats; containerd's Metrics of cgroup v1 and v2.
"""

from __future__ import annotations

import os
import time
from typing import Any, NamedTuple

from boxship.api.containerd.pb import tasks
from boxship.api.task.pb import metrics_v1, metrics_v2
from boxship.engine import times
from boxship.engine.container import Container
from boxship.engine.core import Core
from boxship.kit.errors import BoxshipError

_NO_CPU: dict[str, Any] = {
    "cpu_usage": {"total_usage": 0, "usage_in_kernelmode": 0, "usage_in_usermode": 0},
    "throttling_data": {"periods": 0, "throttled_periods": 0, "throttled_time": 0},
}
_BLOCK = ("io_service_bytes_recursive", "io_serviced_recursive", "io_queue_recursive", "io_service_time_recursive",
          "io_wait_time_recursive", "io_merged_recursive", "io_time_recursive", "sectors_recursive")
_V1_MEMORY = {
    "cache": "cache", "rss": "rss", "rss_huge": "rss_huge", "mapped_file": "mapped_file", "dirty": "dirty",
    "writeback": "writeback",
    "pgpgin": "pg_pg_in", "pgpgout": "pg_pg_out", "pgfault": "pg_fault", "pgmajfault": "pg_maj_fault",
    "inactive_anon": "inactive_anon", "active_anon": "active_anon", "inactive_file": "inactive_file",
    "active_file": "active_file",
    "unevictable": "unevictable", "hierarchical_memory_limit": "hierarchical_memory_limit",
    "hierarchical_memsw_limit": "hierarchical_swap_limit",
}
_V1_TOTALS = ("cache", "rss", "rss_huge", "mapped_file", "dirty", "writeback", "pgpgin", "pgpgout", "pgfault", "pgmajfault",
              "inactive_anon", "active_anon", "inactive_file", "active_file", "unevictable")
_V2_MEMORY = (
    "anon", "file", "kernel_stack", "slab", "sock", "shmem", "file_mapped", "file_dirty", "file_writeback", "anon_thp",
    "inactive_anon", "active_anon", "inactive_file", "active_file", "unevictable", "slab_reclaimable", "slab_unreclaimable",
    "pgfault",
    "pgmajfault", "workingset_refault", "workingset_activate", "workingset_nodereclaim", "pgrefill", "pgscan", "pgsteal",
    "pgactivate",
    "pgdeactivate", "pglazyfree", "pglazyfreed", "thp_fault_alloc", "thp_collapse_alloc",
)


class Sample(NamedTuple):
    """One look. `read` is RFC 3339."""

    read: str
    cpu: dict[str, Any]
    memory: dict[str, Any]
    pids: dict[str, Any]
    block: dict[str, Any]
    networks: dict[str, Any] | None


EMPTY = Sample(times.ZERO, _NO_CPU, {}, {}, dict.fromkeys(_BLOCK), None)


def _system_ns() -> int:
    """CPU time of the whole machine."""
    with open("/proc/stat", encoding="ascii") as file:
        fields = file.readline().split()[1:8]
    return sum(map(int, fields)) * (1_000_000_000 // os.sysconf("SC_CLK_TCK"))


def _machine_memory() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        return int(file.readline().split()[1]) * 1024


async def sample(core: Core, container: Container) -> Sample:
    """Look at it now; EMPTY's figures when it does not run."""
    if not container.state.running or container.state.restarting:
        return EMPTY
    try:
        found = await core.containerd.tasks.Metrics(tasks.MetricsRequest(filters=[f"id=={container.id}"]), core.call)
    except BoxshipError:
        return EMPTY
    if not found.metrics:
        return EMPTY
    data = found.metrics[0].data
    now = times.rfc3339(time.time_ns())
    networks = _networks(container)
    if data.type_url.endswith("io.containerd.cgroups.v1.Metrics"):
        return _v1(now, metrics_v1.Metrics.FromString(data.value), networks)
    return _v2(now, metrics_v2.Metrics.FromString(data.value), networks)


def _cpu(total: int, kernel: int, user: int, throttle: tuple[int, int, int], per_cpu: list[int]) -> dict[str, Any]:
    return {
        "cpu_usage": {"total_usage": total, **({"percpu_usage": per_cpu} if per_cpu else {}), "usage_in_kernelmode": kernel,
                      "usage_in_usermode": user},
        "system_cpu_usage": _system_ns(), "online_cpus": len(per_cpu) or os.cpu_count() or 1,
        "throttling_data": {"periods": throttle[0], "throttled_periods": throttle[1], "throttled_time": throttle[2]},
    }


def _v1(now: str, found: Any, networks: dict[str, Any] | None) -> Sample:
    usage, throttling = found.cpu.usage, found.cpu.throttling
    memory = found.memory
    shown = {key: getattr(memory, name) for key, name in _V1_MEMORY.items()}
    shown |= {f"total_{key}": getattr(memory, f"total_{_V1_MEMORY[key]}") for key in _V1_TOTALS}
    whole = _machine_memory()
    limit = memory.usage.limit
    block: dict[str, Any] = {}
    for key in _BLOCK:
        entries = getattr(found.blkio, key.replace("io_queue_", "io_queued_"))
        block[key] = [{"major": each.major, "minor": each.minor, "op": each.op, "value": each.value} for each in entries]
    return Sample(
        now,
        _cpu(usage.total, usage.kernel, usage.user, (throttling.periods, throttling.throttled_periods, throttling.throttled_time),
             list(usage.per_cpu)),
        {"usage": memory.usage.usage, "max_usage": memory.usage.max, "stats": shown,
         **({"failcnt": memory.usage.failcnt} if memory.usage.failcnt else {}), "limit": min(limit, whole) if limit else whole},
        _pids(found.pids), block, networks)


def _v2(now: str, found: Any, networks: dict[str, Any] | None) -> Sample:
    cpu, memory = found.cpu, found.memory
    whole = _machine_memory()
    limit = memory.usage_limit
    entries = []
    for each in found.io.usage:
        entries += [{"major": each.major, "minor": each.minor, "op": "read", "value": each.rbytes},
                    {"major": each.major, "minor": each.minor, "op": "write", "value": each.wbytes}]
    return Sample(
        now,
        _cpu(cpu.usage_usec * 1000, cpu.system_usec * 1000, cpu.user_usec * 1000,
             (cpu.nr_periods, cpu.nr_throttled, cpu.throttled_usec * 1000), []),
        {"usage": memory.usage, "stats": {key: getattr(memory, key, 0) for key in _V2_MEMORY},
         "limit": min(limit, whole) if limit else whole},
        _pids(found.pids), dict.fromkeys(_BLOCK) | {"io_service_bytes_recursive": entries}, networks)


def _pids(found: Any) -> dict[str, Any]:
    return {"current": found.current, **({"limit": found.limit} if 0 < found.limit < 1 << 63 else {})}


def _networks(container: Container) -> dict[str, Any] | None:
    """Counters of the interfaces of its network namespace, but for the loopback; None in the host's."""
    if container.host["NetworkMode"] in ("host", "none") or container.host["NetworkMode"].startswith("container:"):
        return None
    found: dict[str, Any] = {}
    try:
        with open(f"/proc/{container.state.pid}/net/dev", encoding="ascii") as file:
            for line in list(file)[2:]:
                name, _, counters = line.partition(":")
                values = list(map(int, counters.split()))
                if name.strip() != "lo":
                    found[name.strip()] = {
                        "rx_bytes": values[0], "rx_packets": values[1], "rx_errors": values[2], "rx_dropped": values[3],
                        "tx_bytes": values[8], "tx_packets": values[9], "tx_errors": values[10], "tx_dropped": values[11]}
    except OSError:
        return None
    return found


def shown(container: Container, present: Sample, former: Sample) -> dict[str, Any]:
    """The object that a client gets."""
    return {
        "name": f"/{container.name}", "id": container.id, "read": present.read, "preread": former.read,
        "pids_stats": present.pids,
        "blkio_stats": present.block, "num_procs": 0, "storage_stats": {}, "cpu_stats": present.cpu, "precpu_stats": former.cpu,
        "memory_stats": present.memory, **({"networks": present.networks} if present.networks is not None else {}),
    }
