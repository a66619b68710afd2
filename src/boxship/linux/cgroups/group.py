"""The face of a container's control group; `v1`, `v2` and `systemd` fill it in.

Runs in: the runtime.
"""

from __future__ import annotations

import os

from boxship.kit.errors import FailedPrecondition, InvalidArgument, NotFound, Unsupported
from boxship.linux.cgroups.arrangement import arrangement, systemd_runs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

    from boxship.linux.cgroups.limits import Limits


class OomEvents:
    """Tells when the kernel kills for want of memory. `fileno` becomes readable; then `read` says what happened.

    `happened` decides after a read whether it was a kill (True), nothing of interest (None), or the end of the group (False).
    """

    __slots__ = ("_fds", "_happened")

    def __init__(self, fds: list[int], happened: object) -> None:
        self._fds = fds
        self._happened = happened

    @property
    def fds(self) -> list[int]:
        """For another process's `oom_events` to go on with."""
        return self._fds

    def fileno(self) -> int:
        """For poll(2)."""
        return self._fds[0]

    def read(self) -> bool | None:
        """True: out of memory; False: the group is gone or empty, nothing will follow; None: neither. Blocks."""
        data = os.read(self._fds[0], 4096)
        return self._happened(data)  # type: ignore[operator,no-any-return]

    def close(self) -> None:
        """End the watch."""
        for fd in self._fds:
            os.close(fd)
        self._fds = []


class Cgroup:
    """One container's control group, in every hierarchy that the machine has.

    Attributes:
        rootless: whether a lack of permission is forgiven while no limit and no path is asked for.
        explicit: whether the path was asked for.
        fresh: whether `create` of this process made it.
        foreign: whether `create` refused it because it is in use: then it is not ours to kill or to delete.
        needs_pid: the group comes to be by `add` of the first process, not by `create` (systemd's scopes).
        v2_path: the directory in the unified hierarchy, "" where there is none.
        properties: further unit properties for systemd, as (name, D-Bus signature, value).
        environ: where a user's bus is looked up; None for this process's own environment.
    """

    __slots__ = ("environ", "explicit", "foreign", "fresh", "properties", "rootless", "v2_path")

    driver = "cgroupfs"
    needs_pid = False

    def __init__(self, *, rootless: bool, explicit: bool) -> None:
        self.rootless = rootless
        self.explicit = explicit
        self.fresh = False
        self.foreign = False
        self.v2_path = ""
        self.properties: list[tuple[str, str, object]] = []
        self.environ: Mapping[str, str] | None = None

    @classmethod
    def plan(
        cls, cgroups_path: str, container_id: str, *, systemd: bool, rootless: bool, caller: int = 0,
        environ: Mapping[str, str] | None = None,
    ) -> Cgroup | None:
        """Where a container's group will be, without making anything.

        With cgroupfs an absolute path is below the mount point, a relative one below the own group of `caller` (a
        process, 0 for this one; on v2 beside it), and an empty one is the container's id. With systemd it is
        "slice:prefix:name". None: there are no cgroups here, and rootless does without.
        Raises NotFound (no devices controller), InvalidArgument (not of systemd's form), Unavailable (no systemd).
        """
        machine = arrangement()
        if systemd:
            if not systemd_runs():
                raise Unsupported("systemd not running on this host, cannot use systemd cgroups manager")
            from boxship.linux.cgroups.systemd import plan_unit

            return plan_unit(cgroups_path, container_id, rootless=rootless, environ=environ)
        inner = clean(cgroups_path) or clean(container_id)
        if not inner:
            raise InvalidArgument("cgroup path must not be empty")
        if not machine.hierarchies and not machine.unified:
            if rootless:
                return None
            raise NotFound("no cgroup mount found in mountinfo")
        if machine.pure_v2:
            from boxship.linux.cgroups.v2 import V2Group, locate_v2

            return V2Group(locate_v2(inner, caller), rootless=rootless, explicit=bool(cgroups_path))
        from boxship.linux.cgroups.v1 import V1Group, locate_v1

        return V1Group(locate_v1(inner, caller), rootless=rootless, explicit=bool(cgroups_path))

    @staticmethod
    def decode(record: dict[str, object]) -> Cgroup:
        """The group that `encode` described."""
        if record["driver"] == "systemd":
            from boxship.linux.cgroups.systemd import decode_unit

            return decode_unit(record)
        if record["version"] == 2:
            from boxship.linux.cgroups.v2 import V2Group

            return V2Group.from_record(record)
        from boxship.linux.cgroups.v1 import V1Group

        return V1Group.from_record(record)

    def encode(self) -> dict[str, object]:
        """What `decode` needs, as plain data."""
        raise NotImplementedError

    @classmethod
    def from_record(cls, record: dict[str, object]) -> Self:
        """`decode`, for one arrangement."""
        raise NotImplementedError

    def create(self, limits: Limits) -> None:
        """Make the directories, and set what must be there before a process enters.

        Raises FailedPrecondition when the group is there already with processes in it, or frozen; PermissionDenied and
        others of `BoxshipError`. What was made so far remains: `abandon` or `delete` removes it.
        """
        raise NotImplementedError

    def apply(self, limits: Limits) -> None:
        """Set the limits that are given. Raises BoxshipError, naming the file or the controller that is missing."""
        raise NotImplementedError

    def join_fds(self, sub: dict[str, str] | None = None, *, unified: bool = True, init_pid: int = 0) -> list[int]:
        """Open files, one a hierarchy, to each of which a process writes b"0" to enter; the caller closes them.

        On v1 these are the `tasks` files: one thread that moves itself passes the kernel's global lock
        (cgroup_procs_write_start), so that it does not wait for an RCU grace period as a write to cgroup.procs does. The
        process must have one thread. `sub`: by controller ("" for all) a group below to enter instead. Without `unified`
        the v2 hierarchy is left out, for a process that was cloned into it (`clone_fd`): its file does cost the wait, up to
        13 ms on an idle machine. `init_pid`: as for `clone_fd`, when no `sub` is given.
        """
        raise NotImplementedError

    def sub(self, path: str, controller: str = "") -> list[int]:
        """`join_fds` for a group below this one, in one hierarchy or all: `exec --cgroup [controller:]path`."""
        return self.join_fds({controller: path})

    def clone_fd(self, init_pid: int = 0) -> int:
        """The v2 directory, open for clone3(CLONE_INTO_CGROUP); -1 without v2.

        `init_pid`: for exec. A container's own processes may have left the group or may have made it an inner node, which
        takes no processes; then it is the group of this process.
        """
        if not self.v2_path:
            return -1
        return os.open(self.v2_path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def birthplace(self) -> int:
        """As `clone_fd`, but before `create`, which goes on while the process is being cloned; -1 where limits come first."""
        return -1

    def add(self, pid: int) -> None:
        """Move a process into the group: slower than its own write to `join_fds`, which systemd's scopes rule out."""
        raise NotImplementedError

    def exists(self) -> bool:
        """Whether the group is there."""
        raise NotImplementedError

    def pids(self, *, recursive: bool = True) -> list[int]:
        """The processes in the group, and in all below. Raises BoxshipError."""
        raise NotImplementedError

    def freeze(self) -> None:
        """Stop all processes; returns when they are. Raises BoxshipError, after thawing what was frozen by then."""
        raise NotImplementedError

    def thaw(self) -> None:
        """Undo `freeze`."""
        raise NotImplementedError

    def frozen(self) -> bool:
        """Whether this very group, not one above it, is frozen; False when it is gone."""
        raise NotImplementedError

    def kill(self, signal: int) -> None:
        """Send a signal to every process in the group, nothing in a foreign one. Raises NotFound "cgroup not exist"."""
        if self.foreign:
            return
        if not self.exists():
            raise does_not_exist()
        self.signal_all(signal)

    def signal_all(self, signal: int) -> None:
        """`kill`, for a group that is there and ours."""
        raise NotImplementedError

    def abandon(self) -> None:
        """Undo `create`, however far it came: end what is in the group and remove it. A foreign group is left alone.

        Raises BoxshipError when it cannot be removed.
        """
        if self.foreign:
            return
        if self.exists():
            self.kill(9)
        self.delete()

    def withdraw(self) -> None:
        """Undo a `create` that was killed before it had looked whether the group is in use: only what is empty goes."""
        import time

        left = self.made()
        for _ in range(50):
            left = [path for path in left if _in_the_way(path)]
            if not left:
                break
            time.sleep(0.02)  # a process that was cloned into it is just ending, or it is another's

    def made(self) -> list[str]:
        """The directories that `create` makes."""
        return []

    def delete(self) -> None:
        """Remove the group and all below it; nothing happens when it is gone. Raises FailedPrecondition while it is busy."""
        raise NotImplementedError

    def check_unused(self) -> None:
        """Raises FailedPrecondition when there are processes in the group, or it is frozen; then it is foreign."""
        present = self.pids()
        if present:
            self.foreign = True
            raise FailedPrecondition(f"container's cgroup is not empty: {len(present)} process(es) found")
        if self.frozen():
            self.foreign = True
            raise FailedPrecondition("container's cgroup unexpectedly frozen")

    def stats(self) -> dict[str, object]:
        """What the controllers count; see `boxship.linux.cgroups.stats`. Raises BoxshipError."""
        raise NotImplementedError

    def oom_events(self, kept: list[int] | None = None) -> OomEvents:
        """Watch for lack of memory, or go on with the descriptors that another watch of it `kept`.

        Raises BoxshipError, Unsupported without a memory controller.
        """
        raise NotImplementedError

    def oom_kills(self) -> int:
        """How many processes the kernel killed here for want of memory; 0 when it does not say."""
        raise NotImplementedError

    def v1_mounts(self) -> list[tuple[str, str, str]]:
        """(folder name, mount option, the group's directory on the host) of each v1 hierarchy, in the order of mounting."""
        return []

    def delegate(self, uid: int) -> None:
        """Give the v2 group to a user, with the files by which it may make groups below (never its own limits)."""


def _in_the_way(path: str) -> bool:
    try:
        os.rmdir(path)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def clean(path: str) -> str:
    """`path` made canonical as text, so that it never leads above its start; a relative one stays relative."""
    if not path:
        return ""
    if "\0" in path:
        raise InvalidArgument("cgroup path must not contain a NUL byte")
    # A leading "//" is special to normpath, so it gets exactly one slash.
    absolute = os.path.normpath("/" + path.lstrip("/"))
    return absolute if path.startswith("/") else absolute[1:]


def below(base: str, sub: str) -> str:
    """`sub` below `base`. Raises InvalidArgument when it leads out."""
    joined = os.path.normpath(f"{base}/{sub}")
    if joined != base and not joined.startswith(base + "/"):
        raise InvalidArgument(f"bad sub cgroup path: {sub}")
    return joined


def does_not_exist() -> NotFound:
    """There is no group to kill the processes of."""
    return NotFound("cgroup not exist")


def signal_each(pids: list[int], signal: int) -> None:
    """kill(2) each; those that are gone do not matter, nor those that may not be signalled."""
    for pid in pids:
        try:
            os.kill(pid, signal)
        except OSError:
            pass
