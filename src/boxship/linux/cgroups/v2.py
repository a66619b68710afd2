"""Control groups where v2 is all there is.

Runs in: the runtime, as root or as a user to whom a part of the hierarchy was delegated.
Spec: kernel Documentation/admin-guide/cgroup-v2.rst. Order of writes and texts of errors: runc's.
"""

from __future__ import annotations

import errno
import os

from boxship.kit.errors import BoxshipError, FailedPrecondition, InvalidArgument, PermissionDenied, Unsupported
from boxship.linux.cgroups import files
from boxship.linux.cgroups.arrangement import arrangement, in_user_namespace, membership
from boxship.linux.cgroups.files import FileError, explain, failure, missing, refused, write
from boxship.linux.cgroups.group import (
    Cgroup,
    OomEvents,
    below,
    signal_each,
)
from boxship.linux.cgroups.limits import cpu_weight, io_weight, max_string, pids_max, swap_only
from boxship.linux.cgroups.v1 import rdma_line, set_hugetlb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from boxship.linux.cgroups.limits import Limits

_DEFAULT_PERIOD = 100000
_IN_MODIFY = 2
_IN_CLOEXEC = 0o2000000


def mountpoint() -> str:
    """Where v2 is mounted."""
    return arrangement().unified


def locate_v2(inner: str, caller: int) -> str:
    """The directory for a path: absolute ones are below the mount point, relative ones beside the caller's own group.

    Beside and not below, because a group that has processes cannot hand controllers to groups below it.
    """
    if inner.startswith("/"):
        return (mountpoint() + inner).rstrip("/")
    own = membership(caller).get("")
    if own is None:
        raise BoxshipError("cgroup path not found")
    return os.path.normpath(f"{mountpoint()}/{os.path.dirname(own)}/{inner}")


class V2Group(Cgroup):
    """One directory."""

    __slots__ = ()

    def __init__(self, path: str, *, rootless: bool, explicit: bool) -> None:
        super().__init__(rootless=rootless, explicit=explicit)
        self.v2_path = path

    def encode(self) -> dict[str, object]:
        """See `Cgroup`."""
        return {
            "driver": self.driver, "version": 2, "paths": {"": self.v2_path}, "rootless": self.rootless,
            "explicit": self.explicit,
        }

    @classmethod
    def from_record(cls, record: dict[str, object]) -> V2Group:
        """See `Cgroup`."""
        paths: dict[str, str] = record["paths"]  # type: ignore[assignment]
        return cls(paths[""], rootless=bool(record["rootless"]), explicit=bool(record["explicit"]))

    # --- making it -----------------------------------------------------------------------------------------------

    def create(self, limits: Limits) -> None:
        """See `Cgroup`."""
        try:
            self.make(limits)
        except OSError as error:
            if not self.rootless or self.explicit or not refused(error):
                raise explain(error) from None
            if self._needs_controllers(limits):
                text = "rootless needs no limits + no cgrouppath when no permission is granted for cgroups: "
                raise PermissionDenied(str(explain(error, text))) from None
            self.v2_path = ""  # the process stays where it is

    def _needs_controllers(self, limits: Limits) -> bool:
        available = files.read(mountpoint() + "/cgroup.controllers").split()
        names = {"blkio": "io"}
        return any(
            names.get(name, name) in available
            for name in limits.wanted() if name in ("pids", "memory", "blkio", "cpu", "cpuset", "hugetlb")
        )

    def make(self, limits: Limits, *, check: bool = True) -> None:
        """Make every directory on the way, with the controllers of the root enabled down to the last but one.

        With `check` the last one must be unused if it is there already. Raises OSError, FailedPrecondition.
        """
        top = mountpoint()
        controllers = files.read(top + "/cgroup.controllers").split()
        self._enable(top, controllers)
        made: list[str] = []
        current = top
        names = self.v2_path[len(top) :].strip("/").split("/")
        try:
            for depth, name in enumerate(names, 1):
                current = f"{current}/{name}"
                last = depth == len(names)
                try:
                    os.mkdir(current, 0o755)
                    made.append(current)
                except FileExistsError:
                    if last and check:
                        self.check_unused()
                except OSError as error:
                    raise failure(error, "mkdir", current) from None
                self._check_type(current, limits)
                if not last:
                    self._enable(current, controllers)
        except BaseException:
            for path in reversed(made):
                try:
                    os.rmdir(path)
                except OSError:
                    break
            raise
        self.fresh = self.v2_path in made

    def _enable(self, path: str, controllers: list[str]) -> None:
        """Hand controllers to the groups below; what is refused is noticed when a limit needs it."""
        file = path + "/cgroup.subtree_control"
        try:
            write(file, " ".join("+" + name for name in controllers))
        except OSError:
            for name in controllers:
                try:
                    write(file, "+" + name)
                except OSError:
                    pass

    def _check_type(self, path: str, limits: Limits) -> None:
        try:
            kind = files.read(path + "/cgroup.type").strip()
        except OSError:
            return  # Linux before 4.14
        if kind == "domain":
            return
        domain = limits.has_memory() or limits.has_io() or limits.has_cpu() or bool(limits.hugepages)
        if kind == "domain invalid":
            if domain:
                raise FailedPrecondition(
                    f'cannot enter cgroupv2 "{path}" with domain controllers -- it is in an invalid state'
                )
            try:
                write(path + "/cgroup.type", "threaded")
            except OSError:
                pass
        elif kind in ("domain threaded", "threaded") and domain:
            raise FailedPrecondition(f'cannot enter cgroupv2 "{path}" with domain controllers -- it is in {kind} mode')

    # --- limits --------------------------------------------------------------------------------------------------

    def apply(self, limits: Limits) -> None:
        """See `Cgroup`."""
        path = self.v2_path
        if not path:
            wanted = limits.wanted() or (["unified"] if limits.unified else [])
            if wanted:
                raise FailedPrecondition(f"cannot set {wanted[0]} limit: container could not join or create cgroup")
            return
        try:
            if limits.pids_limit is not None:
                write(path + "/pids.max", pids_max(limits.pids_limit))
            if limits.has_memory():
                self._set_memory(limits)
            if limits.has_io():
                _set_io(path, limits)
            if limits.has_cpu():
                self._set_cpu(limits)
            if limits.devices is not None:
                self._set_devices(limits)
            if limits.cpu_cpus:
                write(path + "/cpuset.cpus", limits.cpu_cpus)
            if limits.cpu_mems:
                write(path + "/cpuset.mems", limits.cpu_mems)
            set_hugetlb(path, limits, "max")
            for device, (handles, objects) in limits.rdma.items():
                write(path + "/rdma.max", rdma_line(device, handles, objects))
        except OSError as error:
            raise explain(error) from None
        for name, value in limits.unified.items():
            self._set_unified(name, value)

    def check_memory(self, limits: Limits) -> None:
        """With memory_check_before_update: refuse limits below what is in use, which would kill at once."""
        limit, swap = limits.memory_limit or 0, limits.memory_swap or 0
        if not limits.memory_check_before_update or (limit <= 0 and swap <= 0):
            return
        try:
            usage = files.read_int(self.v2_path + "/memory.current")
        except OSError:
            return
        if 0 < swap <= usage:
            raise FailedPrecondition(f"rejecting memory+swap limit {swap} <= usage {usage}")
        if 0 < limit <= usage:
            raise FailedPrecondition(f"rejecting memory limit {limit} <= usage {usage}")

    def swap_limit(self, limits: Limits) -> str:
        """The content for memory.swap.max, "" to leave it alone.

        v1's swap limit includes memory. An update that names one of the two takes the other from what is set.
        """
        limit, swap = limits.memory_limit or 0, limits.memory_swap or 0
        if not self.fresh and (limit > 0) != (swap > 0) and limit != -1 and swap != -1:
            try:
                memory_now = files.read_int(self.v2_path + "/memory.max")
                swap_now = files.read_int(self.v2_path + "/memory.swap.max")
            except OSError:
                memory_now = swap_now = files.MAX
            if memory_now != files.MAX:
                if not limit:
                    limit = memory_now
                elif swap_now != files.MAX:
                    swap = memory_now + swap_now
        value = swap_only(swap, limit)
        if value == 0 and swap <= 0:
            return ""
        return max_string(value)

    def _set_memory(self, limits: Limits) -> None:
        self.check_memory(limits)
        path = self.v2_path
        swap = self.swap_limit(limits)
        if swap:
            try:
                write(path + "/memory.swap.max", swap)
            except FileError as error:
                # Without swap accounting there is nothing to lift or to forbid.
                if error.errno != errno.ENOENT or swap not in ("max", "0"):
                    raise
        if limits.memory_limit:
            write(path + "/memory.max", max_string(limits.memory_limit))
        if limits.memory_reservation:
            write(path + "/memory.low", max_string(limits.memory_reservation))

    def cpu_max(self, limits: Limits) -> tuple[int, int]:
        """(quota in µs or -1, period in µs); an update that names one of the two takes the other from what is set."""
        quota, period = limits.cpu_quota or 0, limits.cpu_period or 0
        if not self.fresh and bool(quota) != bool(period):
            try:
                quota_now, period_now = files.read(self.v2_path + "/cpu.max").split()
                quota = quota or (-1 if quota_now == "max" else int(quota_now))
                period = period or int(period_now)
            except OSError:
                pass
        return (quota if quota > 0 else -1), period or _DEFAULT_PERIOD

    def _set_cpu(self, limits: Limits) -> None:
        path = self.v2_path
        if limits.cpu_idle is not None:
            write(path + "/cpu.idle", str(limits.cpu_idle))
        if limits.cpu_shares:
            write(path + "/cpu.weight", str(cpu_weight(limits.cpu_shares)))
        burst = "" if limits.cpu_burst is None else str(limits.cpu_burst)
        if burst:
            try:
                write(path + "/cpu.max.burst", burst)
                burst = ""
            except FileError as error:
                # Larger than the quota so far: again when the quota is set.
                if error.errno != errno.EINVAL or not limits.cpu_quota:
                    raise
        if limits.cpu_quota or limits.cpu_period:
            quota, period = self.cpu_max(limits)
            write(path + "/cpu.max", f"{max_string(quota)} {period}")
            if burst:
                write(path + "/cpu.max.burst", burst)

    def _set_devices(self, limits: Limits) -> None:
        from boxship.linux.cgroups import bpf

        rules = limits.devices or []
        try:
            bpf.restrict_devices(self.v2_path, rules)
        except (OSError, BoxshipError):
            # Where BPF is not allowed, mknod(2) is not either; otherwise only a policy that forbids nothing may be lost.
            if self.rootless or in_user_namespace():
                return
            if all(rule.allow and set("rwm") <= set(rule.access) for rule in rules):
                return
            raise

    def _set_unified(self, name: str, value: str) -> None:
        if "/" in name:
            raise InvalidArgument(f'unified resource "{name}" must be a file name (no slashes)')
        try:
            files.write_each(f"{self.v2_path}/{name}", value.splitlines(keepends=True) or [value])
        except OSError as error:
            if refused(error) or error.errno == errno.ENOENT:
                controller, dot, _ = name.partition(".")
                if not dot:
                    text = f'unified resource "{name}" must be in the form CONTROLLER.PARAMETER'
                    raise InvalidArgument(text) from None
                if controller != "cgroup" and controller not in self._controllers():
                    text = f'unified resource "{name}" can\'t be set: controller "{controller}" not available'
                    raise Unsupported(text) from None
            raise explain(error, f'unable to set unified resource "{name}": ') from None

    def _controllers(self) -> list[str]:
        try:
            return files.read(self.v2_path + "/cgroup.controllers").split()
        except OSError:
            return []

    # --- entering ------------------------------------------------------------------------------------------------

    def join_fds(self, sub: dict[str, str] | None = None, *, unified: bool = True, init_pid: int = 0) -> list[int]:
        """See `Cgroup`."""
        if not self.v2_path or not unified:
            return []
        path = self._sub_path(sub) if sub else self._joinable(init_pid)
        try:
            return [files.open_file(path + "/cgroup.procs", os.O_WRONLY)]
        except OSError as error:
            if self.rootless:
                return []
            raise explain(error) from None

    def _sub_path(self, sub: dict[str, str] | None) -> str:
        return below(self.v2_path, (sub or {}).get("", ""))

    def _joinable(self, init_pid: int) -> str:
        """The group, or that of init, which may have left it, or have made it an inner node."""
        path = self.v2_path
        if init_pid and path:
            try:
                usable = not files.read(path + "/cgroup.subtree_control").strip()
            except OSError:
                usable = False  # gone
            if not usable:
                path = os.path.normpath(f"{mountpoint()}/{membership(init_pid).get('', '')}")
        return path

    def clone_fd(self, init_pid: int = 0) -> int:
        """See `Cgroup`."""
        path = self._joinable(init_pid)
        if not path:
            return -1
        try:
            return files.open_file(path, os.O_PATH | os.O_DIRECTORY)
        except OSError as error:
            if self.rootless:
                return -1
            raise explain(error, "can't open cgroup: ") from None

    def add(self, pid: int) -> None:
        """See `Cgroup`."""
        if self.v2_path:
            files.enter(self.v2_path, pid)

    # --- processes -----------------------------------------------------------------------------------------------

    def exists(self) -> bool:
        """See `Cgroup`."""
        return bool(self.v2_path) and os.path.isdir(self.v2_path)

    def pids(self, *, recursive: bool = True) -> list[int]:
        """See `Cgroup`."""
        if not self.v2_path:
            return []
        try:
            return files.processes(self.v2_path, recursive=recursive)
        except OSError as error:
            if missing(error):
                return []
            raise explain(error, "unable to get cgroup PIDs: ") from None

    def freeze(self) -> None:
        """See `Cgroup`."""
        self._set_frozen("1")

    def thaw(self) -> None:
        """See `Cgroup`."""
        self._set_frozen("0")

    def _set_frozen(self, wanted: str) -> None:
        if not self.v2_path:
            raise FailedPrecondition("cannot toggle freezer: cgroups not configured for container")
        try:
            write(self.v2_path + "/cgroup.freeze", wanted)
            if wanted == "1":
                self._wait_frozen()
        except FileError as error:
            if missing(error):
                if wanted == "0":
                    return
                raise explain(error, "freezer not supported: ") from None
            raise explain(error) from None

    def _wait_frozen(self) -> None:
        import time

        for _ in range(1000):
            if files.read_table(self.v2_path + "/cgroup.events").get("frozen"):
                return
            time.sleep(0.01)
        raise FailedPrecondition("timeout of 10s reached waiting for the cgroup to freeze")

    def frozen(self) -> bool:
        """See `Cgroup`."""
        if not self.v2_path:
            return False
        try:
            if files.read(self.v2_path + "/cgroup.freeze").strip() != "1":
                return False
            self._wait_frozen()
            return True
        except OSError as error:
            if missing(error):
                return False
            raise explain(error, "unable to get cgroup freezer state: ") from None

    def signal_all(self, signal: int) -> None:
        """See `Cgroup`."""
        if signal == 9:
            try:
                write(self.v2_path + "/cgroup.kill", "1")  # Linux 5.14; reaches frozen processes too
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
            try:
                self.thaw()
            except BoxshipError:
                pass

    # --- the end -------------------------------------------------------------------------------------------------

    def made(self) -> list[str]:
        """See `Cgroup`."""
        return [self.v2_path] if self.v2_path else []

    def delete(self) -> None:
        """See `Cgroup`."""
        if self.foreign:
            return
        if self.v2_path and files.remove_all([self.v2_path]):
            raise FailedPrecondition(f"Failed to remove paths: map[:{self.v2_path}]")

    # --- looking -------------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, object]:
        """See `Cgroup`."""
        from boxship.linux.cgroups import stats

        try:
            return stats.read_v2(self.v2_path)
        except OSError as error:
            raise explain(error, "error while statting cgroup v2: ") from None

    def oom_kills(self) -> int:
        """See `Cgroup`."""
        try:
            return files.read_table(self.v2_path + "/memory.events").get("oom_kill", 0) if self.v2_path else 0
        except OSError as error:
            if missing(error):
                return 0
            raise explain(error) from None

    def oom_events(self, kept: list[int] | None = None) -> OomEvents:
        """See `Cgroup`."""
        from _struct import Struct

        from boxship.abi import syscalls
        from boxship.linux import _sys

        path = self.v2_path
        head = Struct("=iIII")
        watch = kept[0] if kept else _sys.syscall(syscalls.INOTIFY_INIT1, _IN_CLOEXEC)
        try:
            # What is watched already keeps its number.
            memory, events = (
                _sys.syscall(syscalls.INOTIFY_ADD_WATCH, watch, os.fsencode(f"{path}/{name}") + b"\0", _IN_MODIFY)
                for name in ("memory.events", "cgroup.events")
            )
        except OSError as error:
            os.close(watch)
            raise explain(failure(error, "unable to add inotify watch:", path)) from None

        def happened(data: bytes) -> bool | None:
            result: bool | None = None
            offset = 0
            while offset + head.size <= len(data):
                source, mask, _, length = head.unpack_from(data, offset)
                offset += head.size + length
                if not mask & _IN_MODIFY:
                    continue
                try:
                    if source == memory and files.read_table(path + "/memory.events").get("oom_kill"):
                        result = True
                    elif source == events and not files.read_table(path + "/cgroup.events").get("populated"):
                        result = False if result is None else result
                except OSError:
                    return False
            return result

        return OomEvents([watch], happened)

    def delegate(self, uid: int) -> None:
        """See `Cgroup`."""
        try:
            names = files.read("/sys/kernel/cgroup/delegate").split()
        except OSError:
            names = ["cgroup.procs", "cgroup.subtree_control", "cgroup.threads"]
        try:
            os.chown(self.v2_path, uid, -1)
            for name in names:
                try:
                    os.chown(f"{self.v2_path}/{name}", uid, -1)
                except FileNotFoundError:
                    pass
        except OSError as error:
            raise explain(failure(error, "chown", error.filename or self.v2_path)) from None


def _set_io(path: str, limits: Limits) -> None:
    weight = limits.blkio_weight or 0
    bfq = False
    if weight or limits.blkio_weight_device:
        bfq = os.path.exists(path + "/io.bfq.weight")
    if weight:
        if bfq:
            write(path + "/io.bfq.weight", str(weight))
        else:
            write(path + "/io.weight", str(io_weight(weight)))
    # A lone number read back: a kernel before 5.4, which has no weights per device.
    if bfq and limits.blkio_weight_device and not files.read(path + "/io.bfq.weight").strip().isdecimal():
        for major, minor, device_weight, _ in limits.blkio_weight_device:
            write(path + "/io.bfq.weight", f"{major}:{minor} {device_weight or 0}\n")
    for name, devices in (
        ("rbps", limits.blkio_throttle_read_bps), ("wbps", limits.blkio_throttle_write_bps),
        ("riops", limits.blkio_throttle_read_iops), ("wiops", limits.blkio_throttle_write_iops),
    ):
        for major, minor, rate in devices:
            write(path + "/io.max", f"{major}:{minor} {name}={rate}")
