"""Control groups where v1 has the controllers; with a v2 mount beside it (hybrid) that is entered too.

Runs in: the runtime.
Spec: kernel Documentation/admin-guide/cgroup-v1. Order of writes and texts of errors: runc's.
"""

from __future__ import annotations

import errno
import os

from boxship.kit.errors import BoxshipError, FailedPrecondition, InvalidArgument, Unsupported
from boxship.linux.cgroups import files
from boxship.linux.cgroups.arrangement import (
    CONTROLLERS,
    arrangement,
    in_user_namespace,
    membership,
    not_mounted,
)
from boxship.linux.cgroups.files import FileError, explain, missing, refused, write
from boxship.linux.cgroups.group import (
    Cgroup,
    OomEvents,
    below,
    signal_each,
)
from boxship.linux.cgroups.limits import pids_max

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from boxship.linux.cgroups.limits import Limits

UNIFIED = ""
"""The key of the v2 directory among the paths."""
_OPTIONAL = frozenset(("name=systemd", "misc", UNIFIED))
"""Hierarchies without limits: failing to enter them does not matter."""


def locate_v1(inner: str, caller: int) -> dict[str, str]:
    """The directory in every hierarchy that is mounted, by controller, in the order of `CONTROLLERS`."""
    machine = arrangement()
    own = {} if inner.startswith("/") else membership(caller)
    paths = {}
    for name in CONTROLLERS:
        hierarchy = machine.by_controller.get(name)
        if hierarchy is None or (own and name not in own):
            if name == "devices":
                # Without it every device of the host would be open.
                raise not_mounted(name)
            continue
        base = hierarchy.directory(own[name]) if own else hierarchy.mountpoint
        paths[name] = f"{base}/{inner.lstrip('/')}".rstrip("/")
    if machine.unified:
        paths[UNIFIED] = f"{machine.unified}/{inner.lstrip('/')}".rstrip("/")
    return paths


class V1Group(Cgroup):
    """One directory a hierarchy; controllers that are mounted together have the same.

    Attributes:
        paths: directory by controller, "" for v2's.
    """

    __slots__ = ("_cpuset_done", "paths")

    def __init__(self, paths: dict[str, str], *, rootless: bool, explicit: bool) -> None:
        super().__init__(rootless=rootless, explicit=explicit)
        self.paths = paths
        self.v2_path = paths.get(UNIFIED, "")
        self._cpuset_done = False

    def encode(self) -> dict[str, object]:
        """See `Cgroup`."""
        return {
            "driver": self.driver, "version": 1, "paths": self.paths, "rootless": self.rootless, "explicit": self.explicit,
        }

    @classmethod
    def from_record(cls, record: dict[str, object]) -> V1Group:
        """See `Cgroup`."""
        paths: dict[str, str] = record["paths"]  # type: ignore[assignment]
        return cls(paths, rootless=bool(record["rootless"]), explicit=bool(record["explicit"]))

    def directories(self) -> dict[str, str]:
        """One controller for each directory."""
        return {directory: name for name, directory in reversed(self.paths.items())}

    # --- making it -----------------------------------------------------------------------------------------------

    def create(self, limits: Limits) -> None:
        """See `Cgroup`."""
        if limits.unified:
            raise InvalidArgument("invalid configuration: cannot use unified on cgroup v1")
        self.make(limits)

    def make(self, limits: Limits, *, check: bool = True) -> None:
        """`create`; without `check` the group may have processes already."""
        self.fresh = True
        done: dict[str, OSError | None] = {}
        for name, directory in list(self.paths.items()):
            if directory not in done:
                done[directory] = None
                try:
                    if not self._make(directory):
                        self.fresh = False
                        if check and name in ("devices", "freezer"):
                            self.check_unused()
                except OSError as error:
                    done[directory] = error
                except FailedPrecondition:
                    if name == "freezer" and self.paths.get("devices") != directory:
                        _remove_quietly(self.paths["devices"])  # ours, and new, or it would have been refused
                    raise
            failed = done[directory]
            if failed is None:
                if name == "cpuset":
                    self._prepare_cpuset(directory, limits)
                elif name == "cpu" and limits.has_realtime():
                    # A realtime process may not enter before its group has bandwidth.
                    self._set_realtime(directory, limits)
            elif name in _OPTIONAL or (self.rootless and not self.explicit and refused(failed)):
                # `apply` complains if there is a limit for it after all.
                del self.paths[name]
            else:
                raise explain(failed)
        self.v2_path = self.paths.get(UNIFIED, "")

    def birthplace(self) -> int:
        """See `Cgroup`. The v2 hierarchy has no controllers here, and so no limits."""
        directory = self.paths.get(UNIFIED, "")
        if not directory:
            return -1
        try:
            self._make(directory)
            return os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return -1  # `create` decides whether that is forgiven

    def _make(self, directory: str) -> bool:
        """Make a directory, with those on the way; False when it is there already."""
        try:
            os.mkdir(directory, 0o755)
            return True
        except FileExistsError:
            return False
        except FileNotFoundError:
            pass
        except OSError as error:
            raise files.failure(error, "mkdir", directory) from None
        try:
            os.makedirs(directory, 0o755, exist_ok=True)
        except OSError as error:
            raise files.failure(error, "mkdir", directory) from None
        return True

    def _prepare_cpuset(self, directory: str, limits: Limits) -> None:
        """Give it CPUs and memory nodes: a new cpuset has none, and then nothing can enter it."""
        prefix = self._cpuset_prefix()
        try:
            if limits.has_cpuset():
                self._inherit_cpuset(os.path.dirname(directory), prefix)
                self._set_cpuset(directory, limits)
                self._cpuset_done = True
                if limits.cpu_cpus and limits.cpu_mems:
                    return
            self._inherit_cpuset(directory, prefix)
        except OSError as error:
            raise explain(error) from None

    def _inherit_cpuset(self, directory: str, prefix: str) -> tuple[str, str]:
        # The root of the hierarchy is never empty, so this ends there at the latest.
        cpus = files.read(f"{directory}/{prefix}cpus").strip()
        mems = files.read(f"{directory}/{prefix}mems").strip()
        if not cpus or not mems:
            parent_cpus, parent_mems = self._inherit_cpuset(os.path.dirname(directory), prefix)
            if not cpus:
                cpus = parent_cpus
                write(f"{directory}/{prefix}cpus", cpus)
            if not mems:
                mems = parent_mems
                write(f"{directory}/{prefix}mems", mems)
        return cpus, mems

    def _cpuset_prefix(self) -> str:
        hierarchy = arrangement().by_controller.get("cpuset")
        return "" if hierarchy is not None and hierarchy.plain_names else "cpuset."

    # --- limits --------------------------------------------------------------------------------------------------

    def apply(self, limits: Limits) -> None:
        """See `Cgroup`."""
        if limits.unified:
            raise InvalidArgument("invalid configuration: cannot use unified on cgroup v1")
        wanted = limits.wanted()
        setters: dict[str, Callable[[str, Limits], None]] = {
            "cpuset": self._set_cpuset, "memory": _set_memory, "cpu": self._set_cpu, "pids": _set_pids, "blkio": _set_blkio,
            "hugetlb": _set_hugetlb, "net_cls": _set_net_cls, "net_prio": _set_net_prio, "rdma": _set_rdma,
        }
        if wanted[:1] == ["cpuset"] and self._cpuset_done:
            del wanted[0]
            self._cpuset_done = False
        if limits.devices is not None and not in_user_namespace():
            self._set_devices(limits)
        for name in wanted:
            directory = self.paths.get(name)
            if directory is None:
                raise FailedPrecondition(f"cannot set {name} limit: container could not join or create cgroup")
            try:
                setters[name](directory, limits)
            except OSError as error:
                raise explain(error) from None

    def _set_devices(self, limits: Limits) -> None:
        from boxship.linux.cgroups import devices

        directory = self.paths.get("devices")
        rules = limits.devices or []
        try:
            if directory is None:
                raise FailedPrecondition("cannot set devices limit: container could not join or create cgroup")
            devices.set_v1(directory, rules, fresh=self.fresh)
        except OSError as error:
            if not self.rootless:
                raise explain(error) from None
        except FailedPrecondition:
            # Rules for devices are not for an ordinary user to set.
            if not self.rootless:
                raise

    def _set_cpuset(self, directory: str, limits: Limits) -> None:
        prefix = self._cpuset_prefix()
        if limits.cpu_cpus:
            write(f"{directory}/{prefix}cpus", limits.cpu_cpus)
        if limits.cpu_mems:
            write(f"{directory}/{prefix}mems", limits.cpu_mems)

    def _set_realtime(self, directory: str, limits: Limits) -> None:
        try:
            _set_realtime(directory, limits)
        except OSError as error:
            raise explain(error) from None

    def _set_cpu(self, directory: str, limits: Limits) -> None:
        if limits.cpu_shares:
            write(directory + "/cpu.shares", str(limits.cpu_shares))
            actual = files.read_int(directory + "/cpu.shares")
            if limits.cpu_shares > actual:
                raise InvalidArgument(f"the maximum allowed cpu-shares is {actual}")
            if limits.cpu_shares < actual:
                raise InvalidArgument(f"the minimum allowed cpu-shares is {actual}")
        # The kernel checks old quota against new period, and burst against quota: what it refuses is tried again once
        # the quota is set.
        again: list[tuple[str, int]] = []
        if limits.cpu_period:
            _write_or_retry(directory + "/cpu.cfs_period_us", limits.cpu_period, again, retry=bool(limits.cpu_quota))
        if limits.cpu_burst is not None:
            try:
                _write_or_retry(directory + "/cpu.cfs_burst_us", limits.cpu_burst, again, retry=bool(limits.cpu_quota))
            except FileError as error:
                if error.errno != errno.ENOENT:  # Linux before 5.14
                    raise
        if limits.cpu_quota:
            write(directory + "/cpu.cfs_quota_us", str(limits.cpu_quota))
            for path, value in again:
                write(path, str(value))
        if limits.cpu_idle is not None:
            write(directory + "/cpu.idle", str(limits.cpu_idle))
        _set_realtime(directory, limits)

    # --- entering ------------------------------------------------------------------------------------------------

    def join_fds(self, sub: dict[str, str] | None = None, *, unified: bool = True, init_pid: int = 0) -> list[int]:
        """See `Cgroup`."""
        paths = self._sub_paths(sub) if sub else self.paths
        fds: list[int] = []
        try:
            for directory, name in {directory: name for name, directory in paths.items()}.items():
                if name == UNIFIED:
                    if not unified:
                        continue
                    file = "/cgroup.procs"  # v2's cgroup.threads takes no process from elsewhere
                else:
                    file = "/tasks"
                try:
                    fds.append(os.open(directory + file, os.O_WRONLY | os.O_CLOEXEC))
                except OSError as error:
                    if name in _OPTIONAL or (self.rootless and not self.explicit and refused(error)):
                        continue
                    raise explain(files.failure(error, "open", directory + file)) from None
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return fds

    def _sub_paths(self, sub: dict[str, str]) -> dict[str, str]:
        if "" in sub:
            return {name: below(directory, sub[""]) for name, directory in self.paths.items()}
        paths = dict(self.paths)
        for name, path in sub.items():
            if name not in paths:
                raise InvalidArgument(f"unknown controller {name} in SubCgroupPaths")
            paths[name] = below(paths[name], path)
        return paths

    def add(self, pid: int) -> None:
        """See `Cgroup`."""
        for directory, name in self.directories().items():
            try:
                files.enter(directory, pid)
            except BoxshipError:
                if name not in _OPTIONAL:
                    raise

    # --- processes -----------------------------------------------------------------------------------------------

    def _main(self) -> str:
        """The directory that stands for the group; "" when the container has none."""
        return self.paths.get("devices") or next(iter(self.paths.values()), "")

    def exists(self) -> bool:
        """See `Cgroup`."""
        return os.path.isdir(self._main())

    def pids(self, *, recursive: bool = True) -> list[int]:
        """See `Cgroup`."""
        try:
            return files.processes(self._main(), recursive=recursive)
        except OSError as error:
            if missing(error):
                return []
            raise explain(error, "unable to get cgroup PIDs: ") from None

    def freeze(self) -> None:
        """See `Cgroup`."""
        directory = self.paths.get("freezer")
        if directory is None:
            raise FailedPrecondition("cannot toggle freezer: cgroups not configured for container")
        try:
            _freeze(directory + "/freezer.state")
        except OSError as error:
            raise explain(error) from None

    def thaw(self) -> None:
        """See `Cgroup`."""
        directory = self.paths.get("freezer")
        if directory is None:
            raise FailedPrecondition("cannot toggle freezer: cgroups not configured for container")
        try:
            write(directory + "/freezer.state", "THAWED")
        except OSError as error:
            raise explain(error) from None

    def frozen(self) -> bool:
        """See `Cgroup`."""
        directory = self.paths.get("freezer")
        if directory is None:
            return False
        try:
            for _ in range(1000):
                state = files.read(directory + "/freezer.state").strip()
                if state != "FREEZING":
                    break
                import time

                time.sleep(0.001)  # usually over at once; a process in the kernel may hold it up for ever
            if state == "THAWED":
                return False
            # Frozen itself, or only by a group above it?
            return files.read(directory + "/freezer.self_freezing").strip() == "1"
        except OSError as error:
            if missing(error):
                return False
            raise explain(error, "unable to get cgroup freezer state: ") from None

    def signal_all(self, signal: int) -> None:
        """See `Cgroup`."""
        if signal == 9 and self.v2_path:
            try:
                write(self.v2_path + "/cgroup.kill", "1")
                # For those that entered the v1 hierarchies only. And v1's frozen processes do not even die.
                signal_each(self.pids(), signal)
                self._thaw_quietly()
                return
            except FileError as error:
                if not missing(error):
                    raise explain(error) from None
        try:
            self.freeze()
        except BoxshipError:
            pass  # then some process may be born meanwhile and escape; better than none signalled
        try:
            signal_each(self.pids(), signal)
        finally:
            self._thaw_quietly()

    def _thaw_quietly(self) -> None:
        try:
            self.thaw()
        except BoxshipError:
            pass

    # --- the end -------------------------------------------------------------------------------------------------

    def made(self) -> list[str]:
        """See `Cgroup`."""
        return list(self.directories())

    def delete(self) -> None:
        """See `Cgroup`."""
        if self.foreign:
            return
        left = files.remove_all(list(self.directories()))
        if left:
            busy = " ".join(f"{name}:{path}" for name, path in sorted(self.paths.items()) if path in left)
            raise FailedPrecondition(f"Failed to remove paths: map[{busy}]")

    # --- looking -------------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, object]:
        """See `Cgroup`."""
        from boxship.linux.cgroups import stats

        try:
            return stats.read_v1(self.paths, self._cpuset_prefix())
        except OSError as error:
            raise explain(error) from None

    def oom_kills(self) -> int:
        """See `Cgroup`."""
        directory = self.paths.get("memory")
        if directory is None:
            return 0
        try:
            return files.read_table(directory + "/memory.oom_control").get("oom_kill", 0)
        except OSError as error:
            if missing(error):
                return 0
            raise explain(error) from None

    def oom_events(self, kept: list[int] | None = None) -> OomEvents:
        """See `Cgroup`."""
        directory = self.paths.get("memory")
        if directory is None:
            raise Unsupported("memory controller missing")
        if kept:
            return OomEvents(kept, lambda data: os.path.exists(directory + "/cgroup.event_control"))
        event = os.eventfd(0, os.EFD_CLOEXEC)
        fds = [event]
        try:
            fds.append(files.open_file(directory + "/memory.oom_control", os.O_RDONLY))
            write(directory + "/cgroup.event_control", f"{event} {fds[1]} ")
        except OSError as error:
            for fd in fds:
                os.close(fd)
            raise explain(error) from None
        # The kernel signals the removal of the group too.
        return OomEvents(fds, lambda data: os.path.exists(directory + "/cgroup.event_control"))

    def v1_mounts(self) -> list[tuple[str, str, str]]:
        """See `Cgroup`."""
        mounts = []
        own: dict[str, str] = {}
        for hierarchy in arrangement().hierarchies:
            name = hierarchy.controllers[0]
            directory = self.paths.get(name, "")
            if not directory:
                # Not entered (a named hierarchy, or refused): it shows the group that the container's parent is in.
                own = own or membership()
                directory = hierarchy.directory(own.get(name, "/"))
            mounts.append((os.path.basename(hierarchy.mountpoint), ",".join(hierarchy.controllers), directory))
        return mounts


def _remove_quietly(directory: str) -> None:
    try:
        os.rmdir(directory)
    except OSError:
        pass


def _write_or_retry(path: str, value: int, again: list[tuple[str, int]], *, retry: bool) -> None:
    """Write; a value that the kernel finds invalid for now is put into `again` with `retry`."""
    try:
        write(path, str(value))
    except FileError as error:
        if error.errno != errno.EINVAL or not retry:
            raise
        again.append((path, value))


def _set_realtime(directory: str, limits: Limits) -> None:
    again: list[tuple[str, int]] = []
    if limits.cpu_realtime_period:
        retry = bool(limits.cpu_realtime_runtime)
        _write_or_retry(directory + "/cpu.rt_period_us", limits.cpu_realtime_period, again, retry=retry)
    if limits.cpu_realtime_runtime:
        write(directory + "/cpu.rt_runtime_us", str(limits.cpu_realtime_runtime))
        for path, value in again:
            write(path, str(value))


def _set_memory(directory: str, limits: Limits) -> None:
    limit, swap = limits.memory_limit, limits.memory_swap
    if limit == -1 and not swap and os.path.exists(directory + "/memory.memsw.limit_in_bytes"):
        swap = -1  # no limit of memory means none of memory and swap
    # Swap must never be below memory, not even for a moment: growing starts with swap, shrinking with memory.
    grows = limit and swap and (swap == -1 or files.read_int(directory + "/memory.limit_in_bytes") < swap)
    if swap and grows:
        write(directory + "/memory.memsw.limit_in_bytes", str(swap))
    if limit:
        try:
            write(directory + "/memory.limit_in_bytes", str(limit))
        except FileError as error:
            if error.errno != errno.EBUSY:
                raise
            usage = files.read_int(directory + "/memory.usage_in_bytes")
            peak = files.read_int(directory + "/memory.max_usage_in_bytes")
            raise FailedPrecondition(
                f"unable to set memory limit to {limit} (current usage: {usage}, peak usage: {peak})"
            ) from None
    if swap and not grows:
        write(directory + "/memory.memsw.limit_in_bytes", str(swap))
    if limits.memory_reservation:
        write(directory + "/memory.soft_limit_in_bytes", str(limits.memory_reservation))
    if limits.memory_disable_oom_killer:
        write(directory + "/memory.oom_control", "1")
    swappiness = limits.memory_swappiness
    if swappiness is not None and swappiness not in (-1, files.MAX):
        if not 0 <= swappiness <= 100:
            raise InvalidArgument(f"invalid memory swappiness value: {swappiness} (valid range is 0-100)")
        write(directory + "/memory.swappiness", str(swappiness))


def _set_pids(directory: str, limits: Limits) -> None:
    if limits.pids_limit is not None:
        write(directory + "/pids.max", pids_max(limits.pids_limit))


def _set_blkio(directory: str, limits: Limits) -> None:
    weights = "blkio.weight"
    if (limits.blkio_weight or limits.blkio_weight_device) and not os.path.exists(f"{directory}/{weights}"):
        weights = "blkio.bfq.weight"  # since CFQ is gone (Linux 5.0), if BFQ is there
    if limits.blkio_weight:
        write(f"{directory}/{weights}", str(limits.blkio_weight))
    if limits.blkio_leaf_weight:
        write(directory + "/blkio.leaf_weight", str(limits.blkio_leaf_weight))
    for major, minor, weight, leaf in limits.blkio_weight_device:
        if weight:
            write(f"{directory}/{weights}_device", f"{major}:{minor} {weight}")
        if leaf:
            write(directory + "/blkio.leaf_weight_device", f"{major}:{minor} {leaf}")
    for name, devices in (
        ("read_bps", limits.blkio_throttle_read_bps), ("write_bps", limits.blkio_throttle_write_bps),
        ("read_iops", limits.blkio_throttle_read_iops), ("write_iops", limits.blkio_throttle_write_iops),
    ):
        for major, minor, rate in devices:
            write(f"{directory}/blkio.throttle.{name}_device", f"{major}:{minor} {rate}")


def set_hugetlb(directory: str, limits: Limits, suffix: str) -> None:
    """Limit huge pages in use, and reserved ones where the kernel counts them (Linux 5.7)."""
    reserved = True
    for size, value in limits.hugepages:
        write(f"{directory}/hugetlb.{size}.{suffix}", str(value))
        if reserved:
            try:
                write(f"{directory}/hugetlb.{size}.rsvd.{suffix}", str(value))
            except FileError as error:
                if error.errno != errno.ENOENT:
                    raise
                reserved = False


def _set_hugetlb(directory: str, limits: Limits) -> None:
    set_hugetlb(directory, limits, "limit_in_bytes")


def _set_net_cls(directory: str, limits: Limits) -> None:
    if limits.net_classid:
        write(directory + "/net_cls.classid", str(limits.net_classid))


def _set_net_prio(directory: str, limits: Limits) -> None:
    for interface, priority in limits.net_priorities:
        write(directory + "/net_prio.ifpriomap", f"{interface} {priority}")


def rdma_line(device: str, handles: int | None, objects: int | None) -> str:
    """A line for rdma.max."""
    line = device
    if handles is not None:
        line += f" hca_handle={handles}"
    if objects is not None:
        line += f" hca_object={objects}"
    return line


def _set_rdma(directory: str, limits: Limits) -> None:
    for device, (handles, objects) in limits.rdma.items():
        write(directory + "/rdma.max", rdma_line(device, handles, objects))


def _freeze(state_file: str) -> None:
    """Freeze, against processes that are born meanwhile, which v1 may leave in FREEZING for ever.

    The counts and pauses are runc's, found by experiment: writing again helps, thawing now and then helps more.
    """
    try:
        for attempt in range(1000):
            if attempt % 50 == 49:
                import time

                try:
                    write(state_file, "THAWED")
                except OSError:
                    pass
                time.sleep(0.01)
            write(state_file, "FROZEN")
            if attempt % 25 == 24:
                import time

                time.sleep(0.00001)
            state = files.read(state_file).strip()
            if state == "FROZEN":
                return
            if state != "FREEZING":
                raise FailedPrecondition(f"unexpected state {state} while freezing")
        raise FailedPrecondition("unable to freeze")
    except BaseException:
        # Half frozen is the worst state to leave it in.
        try:
            write(state_file, "THAWED")
        except OSError:
            pass
        raise
