"""Which ids of the host the ids of a container are: what goes into uidMappings and gidMappings.

Runs in: the boxship command.
Spec: user_namespaces(7), subuid(5), newuidmap(1).

root                  every id is itself, but the container has a user namespace of its own, so none of its capabilities
                      reaches beyond it
others, with a range  0 is the caller; 1 and up come from /etc/subuid and /etc/subgid through newuidmap(1)
others, without       0 is the caller; there are no other ids in the container

Not here: writing the maps (`boxship.linux`).
"""

from __future__ import annotations

import os

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
    user = _name(uid)
    uids = _subordinate("/etc/subuid", user, uid)
    gids = _subordinate("/etc/subgid", user, uid)
    if not (uids and gids and _on_path("newuidmap", environ) and _on_path("newgidmap", environ)):
        uids, gids = [], []
    return Maps(_stack(uid, uids), _stack(gid, gids))


def _stack(own: int, ranges: list[tuple[int, int]]) -> Ranges:
    result = [{"containerID": 0, "hostID": own, "size": 1}]
    following = 1
    for start, count in ranges:
        result.append({"containerID": following, "hostID": start, "size": count})
        following += count
    return result


def _name(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return ""


def _subordinate(path: str, user: str, uid: int) -> list[tuple[int, int]]:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            rows = [line.strip().split(":") for line in file]
    except OSError:
        return []
    wanted = {str(uid), user} - {""}
    return [(int(row[1]), int(row[2])) for row in rows if len(row) == 3 and row[0] in wanted and row[1].isdigit() and row[2].isdigit()]


def _on_path(program: str, environ: Mapping[str, str]) -> bool:
    folders = environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").split(":")
    return any(os.access(f"{folder or '.'}/{program}", os.X_OK) for folder in folders)


def available() -> bool:
    """Whether the kernel lets this process make a user namespace: tried out in a child, since many policies have a say."""
    from boxship.abi import namespace, syscalls
    from boxship.linux import _sys

    pid = os.fork()
    if pid == 0:
        # Child: one system call, then the end; nothing here takes a lock or runs an exit handler.
        try:
            _sys.syscall(syscalls.UNSHARE, namespace.CLONE_NEWUSER)
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


def as_container_root(maps: Maps, work: Callable[[], None]) -> None:
    """Call `work` in a child that is root of a user namespace with these maps: for files of the container's other ids.

    Raises PermissionError when the namespace cannot be made or `work` failed there.
    """
    import errno
    import subprocess

    from boxship.abi import namespace, syscalls
    from boxship.linux import _sys

    ready, mapped = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        # Child: system calls and `work` only, and _exit in any case, so that nothing of the parent runs twice.
        code = 1
        try:
            _sys.syscall(syscalls.UNSHARE, namespace.CLONE_NEWUSER)
            os.write(ready[1], b"1")
            os.close(mapped[1])
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
            for program, ranges in (("newuidmap", maps.uids), ("newgidmap", maps.gids)):
                words = [str(entry[key]) for entry in ranges for key in ("containerID", "hostID", "size")]
                subprocess.run([program, str(pid), *words], check=False, capture_output=True)
            os.write(mapped[1], b"1")
    finally:
        os.close(ready[0])
        os.close(mapped[1])
        status = os.waitpid(pid, 0)[1]
    if status:
        raise PermissionError(errno.EPERM, "files of other ids could not be removed")
