"""How cgroups are mounted on this machine: v1, hybrid or v2.

Runs in: the runtime; the answer is kept for the life of the process and its forks, which share the mount namespace.
Spec: proc_pid_mountinfo(5), cgroups(7).
"""

from __future__ import annotations

import os
from posix import stat as _stat

from boxship.kit.errors import NotFound

CONTROLLERS = (
    "devices", "freezer", "cpuset", "memory", "cpu", "cpuacct", "pids", "blkio", "hugetlb", "net_cls", "net_prio",
    "perf_event", "rdma", "name=systemd", "misc",
)
"""What a container is put into where it is mounted as v1, in the order in which that happens.

The first two tell whether the group is somebody else's.
"""

_KNOWN = frozenset((*CONTROLLERS, "debug"))


class Hierarchy:
    """A mounted v1 hierarchy.

    Attributes:
        controllers: names, or "name=NAME" for one without controllers.
        mountpoint: where; with several mounts of the hierarchy the first.
        root: the group that is mounted there, "/" but inside containers.
        plain_names: cpuset's files have no prefix (mount option noprefix).
    """

    __slots__ = ("controllers", "mountpoint", "plain_names", "root")

    def __init__(self, controllers: list[str], mountpoint: str, root: str, *, plain_names: bool) -> None:
        self.controllers = controllers
        self.mountpoint = mountpoint
        self.root = root
        self.plain_names = plain_names

    def directory(self, cgroup: str) -> str:
        """The directory of a group named as in /proc/PID/cgroup, which need not lie below the root of the mount."""
        if self.root == "/":
            return os.path.normpath(f"{self.mountpoint}/{cgroup}")
        return os.path.normpath(f"{self.mountpoint}/{os.path.relpath(cgroup, self.root)}")


class Arrangement:
    """The machine's cgroup mounts.

    Attributes:
        hierarchies: v1's, in the order of mounting.
        unified: the v2 mount point, "" without; it holds controllers only if there is no v1 hierarchy.
        unified_root: the group mounted there.
        unified_options: of the v2 file system, for example "nsdelegate". A mount without them, from the first cgroup
            namespace, takes them from the machine.
    """

    __slots__ = ("by_controller", "hierarchies", "unified", "unified_options", "unified_root")

    def __init__(self) -> None:
        self.hierarchies: list[Hierarchy] = []
        self.by_controller: dict[str, Hierarchy] = {}
        self.unified = ""
        self.unified_root = "/"
        self.unified_options: list[str] = []

    @property
    def pure_v2(self) -> bool:
        """Whether v2 is all there is."""
        return bool(self.unified) and not self.hierarchies


def unescape(text: str) -> str:
    r"""A path of mountinfo, where space, tab, newline and backslash are written as \040 and the like."""
    head, *rest = text.split("\\")
    for part in rest:
        head += chr(int(part[:3], 8)) + part[3:]
    return head


def parse_mountinfo(text: str) -> Arrangement:
    """The arrangement that a mountinfo file shows. Of several v2 mounts the one below /sys/fs/cgroup counts."""
    found = Arrangement()
    for line in text.splitlines():
        head, _, tail = line.partition(" - ")
        if not tail.startswith("cgroup"):
            continue
        fields = head.split(" ")
        root, mountpoint = unescape(fields[3]), unescape(fields[4])
        kind, _, options = tail.split(" ", 2)
        if kind == "cgroup2":
            if not found.unified or mountpoint.startswith("/sys/fs/cgroup"):
                found.unified, found.unified_root = mountpoint, root
                found.unified_options = [word for word in options.split(",") if word not in ("rw", "ro", "seclabel")]
        elif kind == "cgroup":
            words = options.split(",")
            names = [word for word in words if word in _KNOWN or word.startswith("name=")]
            names = [name for name in names if name not in found.by_controller]
            if names:
                hierarchy = Hierarchy(names, mountpoint, root, plain_names="noprefix" in words)
                found.hierarchies.append(hierarchy)
                for name in names:
                    found.by_controller[name] = hierarchy
    return found


_known: Arrangement | None = None


def arrangement() -> Arrangement:
    """The machine's arrangement, read once."""
    global _known
    if _known is None:
        fd = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        parts = []
        try:
            # The kernel hands out at most a page a read, and whole lines only; the last part is shorter or empty.
            while part := os.read(fd, 1 << 20):
                parts.append(part)
        finally:
            os.close(fd)
        _known = parse_mountinfo(b"".join(parts).decode("utf-8", "surrogateescape"))
    return _known


def parse_membership(text: str) -> dict[str, str]:
    """The groups in a /proc/PID/cgroup file by controller, "" for v2."""
    groups = {}
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        for name in controllers.split(","):
            groups[name] = path
    return groups


def membership(pid: int = 0) -> dict[str, str]:
    """The groups of a process (0: of this one)."""
    fd = os.open(f"/proc/{pid or 'self'}/cgroup", os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = b""
        while part := os.read(fd, 65536):
            data += part
    finally:
        os.close(fd)
    return parse_membership(data.decode("utf-8", "surrogateescape"))


def not_mounted(controller: str) -> NotFound:
    """The error for a controller without which nothing goes."""
    return NotFound(f"mountpoint for {controller} not found")


_in_user_namespace: bool | None = None


def in_user_namespace() -> bool:
    """Whether this process is in a user namespace other than the initial one: device rules are not for it to set."""
    global _in_user_namespace
    if _in_user_namespace is None:
        fd = os.open("/proc/self/uid_map", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _in_user_namespace = os.read(fd, 4096).split() != [b"0", b"0", b"4294967295"]
        finally:
            os.close(fd)
    return _in_user_namespace


def systemd_runs() -> bool:
    """Whether systemd is this machine's init; the test is sd_booted(3)'s."""
    try:
        return _stat("/run/systemd/system", follow_symlinks=False).st_mode & 0o170000 == 0o040000
    except OSError:
        return False


def prepare() -> None:
    """Find out now what would be found out at the first use: for a server that forks its workers."""
    arrangement()
    in_user_namespace()


def restore_options(wanted: list[str]) -> None:
    """Give the v2 hierarchy back those of its options that were lost: whoever mounts it anywhere sets them for all.

    CRIU mounts it without any, and thereby takes nsdelegate from the machine. Raises OSError.
    """
    from boxship.abi import mount, syscalls
    from boxship.linux import _sys

    forget()
    machine = arrangement()
    lost = [option for option in wanted if option not in machine.unified_options]
    if not machine.unified or not lost:
        return
    context = _sys.syscall(
        syscalls.FSPICK, mount.AT_FDCWD, os.fsencode(machine.unified) + b"\0", mount.FSPICK_CLOEXEC | mount.FSPICK_NO_AUTOMOUNT
    )
    try:
        for option in wanted:
            _sys.syscall(syscalls.FSCONFIG, context, mount.FSCONFIG_SET_FLAG, option.encode() + b"\0", None, 0)
        _sys.syscall(syscalls.FSCONFIG, context, mount.FSCONFIG_CMD_RECONFIGURE, None, None, 0)
    finally:
        os.close(context)
    forget()


def forget() -> None:
    """Look again at the next call of `arrangement`: a mount came or went."""
    global _known
    _known = None
