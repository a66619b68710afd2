"""Which ids of the host the ids of a container are: what goes into uidMappings and gidMappings.

Runs in: the boxship command.
Spec: user_namespaces(7), subuid(5), newuidmap(1).

root                  every id is itself, but the container has a user namespace of its own, so none of its capabilities
                      reaches beyond it
others, with a range  0 is the caller; 1 and up come from /etc/subuid and /etc/subgid through newuidmap(1)
others, without       0 is the caller; there are no other ids in the container

Not here: writing the maps (`boxship.linux.idmaps`).
"""

from __future__ import annotations

import errno
import os

from boxship.abi.namespace import CLONE_NEWUSER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Ranges = list[dict[str, int]]


class Maps:
    """uidMappings and gidMappings."""

    __slots__ = ("gids", "uids")

    def __init__(self, uids: Ranges, gids: Ranges) -> None:
        self.uids = uids
        self.gids = gids

    def single(self) -> bool:
        """Whether the container has one user id only."""
        return sum(entry["size"] for entry in self.uids) == 1

    def holds(self, uid: int, gid: int) -> bool:
        """Whether both ids exist in the container."""
        return _holds(self.uids, uid) and _holds(self.gids, gid)


def _holds(ranges: Ranges, number: int) -> bool:
    return any(entry["containerID"] <= number < entry["containerID"] + entry["size"] for entry in ranges)


def identity() -> Maps:
    """Every id that this process's own user namespace has, as itself."""
    return Maps(_own("/proc/self/uid_map"), _own("/proc/self/gid_map"))


def _own(path: str) -> Ranges:
    with open(path) as file:
        rows = [line.split() for line in file]
    return [{"containerID": int(row[0]), "hostID": int(row[0]), "size": int(row[2])} for row in rows]


def caller(environ: Mapping[str, str], uid: int, gid: int) -> Maps:
    """An ordinary user's: the caller as 0, then the subordinate ids when they can be used."""
    from boxship.linux.idmaps import rootless_mappings, subordinate_ranges

    user = _name(uid)
    uids, gids = subordinate_ranges("/etc/subuid", user, uid), subordinate_ranges("/etc/subgid", user, uid)
    if not (uids and gids and _on_path("newuidmap", environ) and _on_path("newgidmap", environ)):
        uids, gids = [], []
    return Maps(_ranges(rootless_mappings(uid, uids)), _ranges(rootless_mappings(gid, gids)))


def _ranges(mappings: list[tuple[int, int, int]]) -> Ranges:
    return [{"containerID": inside, "hostID": outside, "size": size} for inside, outside, size in mappings]


def _tuples(ranges: Ranges) -> list[tuple[int, int, int]]:
    return [(entry["containerID"], entry["hostID"], entry["size"]) for entry in ranges]


def _name(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return ""


def _on_path(program: str, environ: Mapping[str, str]) -> bool:
    folders = environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").split(":")
    return any(os.access(f"{folder or '.'}/{program}", os.X_OK) for folder in folders)


def as_container_root(maps: Maps, work: Callable[[], None]) -> None:
    """Call `work` in a child that is root of a user namespace with these maps: for files of the container's other ids.

    Raises PermissionError when `work` failed there, BoxshipError when the namespace could not be made.
    """
    from boxship.linux.idmaps import write_id_maps
    from boxship.linux.probe import unshare

    ready, mapped = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        # Child: system calls and `work` only, and _exit in any case, so that nothing of the parent runs twice.
        code = 1
        try:
            os.close(mapped[1])
            unshare(CLONE_NEWUSER)
            os.write(ready[1], b"1")
            if os.read(mapped[0], 1) == b"1":
                os.setresgid(0, 0, 0)
                os.setresuid(0, 0, 0)
                work()
                code = 0
        except OSError:
            pass
        finally:
            os._exit(code)
    os.close(ready[1])
    os.close(mapped[0])
    try:
        if os.read(ready[0], 1) == b"1":
            write_id_maps(pid, _tuples(maps.uids), _tuples(maps.gids), deny_setgroups=maps.single())
            os.write(mapped[1], b"1")
    finally:
        os.close(ready[0])
        os.close(mapped[1])
        status = os.waitpid(pid, 0)[1]
    if status:
        raise PermissionError(errno.EPERM, "files of the container's other ids could not be removed")
