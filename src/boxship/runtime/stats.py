"""The data of `events --stats`, in runc's JSON shape: the same keys in the same order, and the same zeros left out.

Runs in: the runtime.
Spec: runc types/events.go.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from boxship.linux.cgroups import Cgroup

    Object = dict[str, object]


def _without_zeros(values: Object, always: tuple[str, ...] = ()) -> Object:
    return {key: value for key, value in values.items() if value or key in always}


def _psi(owner: Object, pressure: object) -> None:
    if pressure:
        owner["psi"] = pressure


def describe(cgroup: Cgroup) -> Object:
    """The object "data" of a statistics event. Raises BoxshipError."""
    return shape(cgroup.stats())


def shape(stats: Object) -> Object:
    """`Cgroup.stats` as runc shows it."""
    cpu, memory, blkio, hugetlb = _object(stats["cpu"]), _object(stats["memory"]), _object(stats["blkio"]), stats["hugetlb"]

    shown_cpu: Object = {}
    usage = _without_zeros(_object(cpu["usage"]), ("kernel", "user"))
    throttling = _without_zeros(_object(cpu["throttling"]))
    if any(usage.values()):
        shown_cpu["usage"] = usage
    if throttling:
        shown_cpu["throttling"] = throttling
    _psi(shown_cpu, cpu["psi"])

    cpuset = _object(stats["cpuset"])
    shown_cpuset = {}
    # cpus and mems have their places among the flags, which are always shown.
    for key in ("cpus", "cpu_exclusive", "mems"):
        if cpuset[key] or key == "cpu_exclusive":
            shown_cpuset[key] = cpuset[key]
    shown_cpuset.update({key: value for key, value in cpuset.items() if key not in ("cpus", "cpu_exclusive", "mems")})

    shown_memory: Object = _without_zeros({"cache": memory["cache"]})
    for key in ("usage", "swap", "kernel", "kernelTCP"):
        entry = _object(memory[key])
        if any(entry.values()):
            shown_memory[key] = _without_zeros(entry, ("limit", "failcnt"))
    shown_memory.update(_without_zeros({"raw": memory["raw"]}))
    _psi(shown_memory, memory["psi"])

    shown_blkio: Object = {}
    for key, entries in blkio.items():
        if key != "psi" and entries:
            shown_blkio[key] = [_without_zeros(entry) for entry in entries]  # type: ignore[attr-defined]
    _psi(shown_blkio, blkio["psi"])

    return {
        "cpu": shown_cpu,
        "cpuset": shown_cpuset,
        "memory": shown_memory,
        "pids": _without_zeros(_object(stats["pids"])),
        "blkio": shown_blkio,
        "hugetlb": {size: _without_zeros(entry, ("failcnt",)) for size, entry in _object(hugetlb).items()},  # type: ignore[arg-type]
        "intel_rdt": {},
        "network_interfaces": None,
    }


def _object(value: object) -> Object:
    assert isinstance(value, dict)
    return value
