"""`events`: statistics every so often, and word when the kernel kills for want of memory.

Runs in: the runtime, until the container's control group is gone or the reader hangs up.
Spec: runc events.go and types/events.go: one JSON object a line, {"type": "stats" | "oom", "id", "data"}.
"""

from __future__ import annotations

from boxship.kit.errors import BoxshipError, FailedPrecondition, InvalidArgument
from boxship.oci import text
from boxship.runtime import state, stats
from boxship.runtime.state import open_container

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from boxship.linux.cgroups import Cgroup
    from boxship.runtime.context import Context

_UNITS_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_duration(duration: str) -> float:
    """Seconds for a duration as Go writes it: "5s", "100ms", "1h2m3.5s". Raises InvalidArgument unless it is above zero."""
    wrong = InvalidArgument(f'time: invalid duration "{duration}"')
    total = 0.0
    rest = duration.removeprefix("+")
    if not rest:
        raise wrong
    if rest == "0":
        rest = "0s"
    if rest.startswith("-"):
        raise InvalidArgument("duration interval must be greater than 0")
    while rest:
        number = rest[: len(rest) - len(rest.lstrip("0123456789."))]
        rest = rest[len(number) :]
        unit = rest[: len(rest) - len(rest.lstrip("nuµμmsh"))]
        rest = rest[len(unit) :]
        if unit not in _UNITS_S or not number.strip(".") or number.count(".") > 1:
            raise wrong
        total += float(number) * _UNITS_S[unit]
    if total > 1 << 33:
        raise wrong  # beyond what 64 bits of nanoseconds hold
    if total <= 0:
        raise InvalidArgument("duration interval must be greater than 0")
    return total


def _event(kind: str, container_id: str, data: object = None) -> str:
    event: dict[str, object] = {"type": kind, "id": container_id}
    if data is not None:
        event["data"] = data
    return text.dumps(event) + "\n"


def follow(context: Context, container_id: str, show: Callable[[str], object], *, interval_s: float, once: bool) -> int:
    """Hand events to `show` as they come; with `once` one set of statistics. Returns the exit code.

    Raises FailedPrecondition when the container is stopped, and errors of reading statistics with `once`.
    """
    with open_container(context, container_id) as container:
        if container.status() == state.STOPPED:
            raise FailedPrecondition(f"container with id {container_id} is not running")
        cgroup = container.control_group()
    if cgroup is None:
        raise FailedPrecondition("cgroup not exist")
    if once:
        show(_event("stats", container_id, _statistics(cgroup)))
        return 0
    _watch(context, container_id, cgroup, show, interval_s)
    return 0


def _statistics(cgroup: Cgroup) -> dict[str, object]:
    try:
        return stats.describe(cgroup)
    except BoxshipError as error:
        raise type(error)(f"unable to get container cgroup stats: {error}") from None


def _watch(context: Context, container_id: str, cgroup: Cgroup, show: Callable[[str], object], interval_s: float) -> None:
    import select
    import time

    watch = cgroup.oom_events()
    try:
        poll = select.poll()
        poll.register(watch.fileno(), select.POLLIN)
        due = time.monotonic() + interval_s
        while True:
            if poll.poll(max(0.0, due - time.monotonic()) * 1000):
                happened = watch.read()
                if happened is False:
                    return
                if happened:
                    show(_event("oom", container_id))
                continue
            due += interval_s
            if not cgroup.exists():
                return
            try:
                show(_event("stats", container_id, _statistics(cgroup)))
            except BoxshipError as error:
                context.log("error", str(error))
    finally:
        watch.close()
