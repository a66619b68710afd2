"""Mounts: the options that people write, the attributes that the kernel takes, and the calls of the new mount API.

Runs in: any process; functions act on the calling process's mount namespace.
Spec: fsopen(2), fsconfig(2), fsmount(2), open_tree(2), move_mount(2) (Linux ≥ 5.2), mount_setattr(2) (≥ 5.12), openat2(2)
(≥ 5.6), pivot_root(2); mount(8) for the options; runtime-spec 1.3.0, config-linux.md "Mounts".
Not here: which mounts a container gets, and in what order (`boxship.runtime.init`).
"""

from __future__ import annotations

import errno
import os
from _struct import Struct

from boxship.abi import mount as m
from boxship.abi import syscalls
from boxship.linux import _sys

_MAX_LINKS = 40
_HOW = Struct("=QQQ")
_ATTR = Struct("=QQQQ")

# option: (clears, MS_ flag)
FLAGS = {
    "async": (True, m.MS_SYNCHRONOUS), "atime": (True, m.MS_NOATIME), "bind": (False, m.MS_BIND), "defaults": (False, 0),
    "dev": (True, m.MS_NODEV), "diratime": (True, m.MS_NODIRATIME), "dirsync": (False, m.MS_DIRSYNC),
    "exec": (True, m.MS_NOEXEC), "iversion": (False, m.MS_I_VERSION), "lazytime": (False, m.MS_LAZYTIME),
    "loud": (True, m.MS_SILENT), "mand": (False, m.MS_MANDLOCK), "noatime": (False, m.MS_NOATIME),
    "nodev": (False, m.MS_NODEV), "nodiratime": (False, m.MS_NODIRATIME), "noexec": (False, m.MS_NOEXEC),
    "noiversion": (True, m.MS_I_VERSION), "nolazytime": (True, m.MS_LAZYTIME), "nomand": (True, m.MS_MANDLOCK),
    "norelatime": (True, m.MS_RELATIME), "nostrictatime": (True, m.MS_STRICTATIME), "nosuid": (False, m.MS_NOSUID),
    "nosymfollow": (False, m.MS_NOSYMFOLLOW), "rbind": (False, m.MS_BIND | m.MS_REC), "relatime": (False, m.MS_RELATIME),
    "remount": (False, m.MS_REMOUNT), "ro": (False, m.MS_RDONLY), "rw": (True, m.MS_RDONLY), "silent": (False, m.MS_SILENT),
    "strictatime": (False, m.MS_STRICTATIME), "suid": (True, m.MS_NOSUID), "sync": (False, m.MS_SYNCHRONOUS),
    "symfollow": (True, m.MS_NOSYMFOLLOW),
}
PROPAGATION = {
    "private": m.MS_PRIVATE, "rprivate": m.MS_PRIVATE | m.MS_REC, "slave": m.MS_SLAVE, "rslave": m.MS_SLAVE | m.MS_REC,
    "shared": m.MS_SHARED, "rshared": m.MS_SHARED | m.MS_REC, "unbindable": m.MS_UNBINDABLE,
    "runbindable": m.MS_UNBINDABLE | m.MS_REC,
}
# option: (clears, MOUNT_ATTR_ flag)
RECURSIVE = {
    "rro": (False, m.MOUNT_ATTR_RDONLY), "rrw": (True, m.MOUNT_ATTR_RDONLY), "rnosuid": (False, m.MOUNT_ATTR_NOSUID),
    "rsuid": (True, m.MOUNT_ATTR_NOSUID), "rnodev": (False, m.MOUNT_ATTR_NODEV), "rdev": (True, m.MOUNT_ATTR_NODEV),
    "rnoexec": (False, m.MOUNT_ATTR_NOEXEC), "rexec": (True, m.MOUNT_ATTR_NOEXEC),
    "rnodiratime": (False, m.MOUNT_ATTR_NODIRATIME), "rdiratime": (True, m.MOUNT_ATTR_NODIRATIME),
    "rrelatime": (False, m.MOUNT_ATTR_RELATIME), "rnorelatime": (True, m.MOUNT_ATTR_RELATIME),
    "rnoatime": (False, m.MOUNT_ATTR_NOATIME), "ratime": (True, m.MOUNT_ATTR_NOATIME),
    "rstrictatime": (False, m.MOUNT_ATTR_STRICTATIME), "rnostrictatime": (True, m.MOUNT_ATTR_STRICTATIME),
    "rnosymfollow": (False, m.MOUNT_ATTR_NOSYMFOLLOW), "rsymfollow": (True, m.MOUNT_ATTR_NOSYMFOLLOW),
}
EXTENSIONS = ("tmpcopyup",)

ATIME = m.MS_NOATIME | m.MS_RELATIME | m.MS_STRICTATIME

# Flags of a mount, as opposed to those of its superblock.
_MOUNT_ATTRS = (
    (m.MS_RDONLY, m.MOUNT_ATTR_RDONLY), (m.MS_NOSUID, m.MOUNT_ATTR_NOSUID), (m.MS_NODEV, m.MOUNT_ATTR_NODEV),
    (m.MS_NOEXEC, m.MOUNT_ATTR_NOEXEC), (m.MS_NODIRATIME, m.MOUNT_ATTR_NODIRATIME),
    (m.MS_NOSYMFOLLOW, m.MOUNT_ATTR_NOSYMFOLLOW),
)
# Flags of a superblock and the parameter of fsconfig(2) that sets them.
SUPERBLOCK = (
    (m.MS_SYNCHRONOUS, "sync"), (m.MS_MANDLOCK, "mand"), (m.MS_DIRSYNC, "dirsync"), (m.MS_LAZYTIME, "lazytime"),
    (m.MS_I_VERSION, "iversion"),
)


class Options:
    """The options of one mount, sorted by what carries them out.

    Attributes:
        flags, cleared: MS_ flags that were asked for, and that were asked to be off.
        propagation: MS_SHARED and the like, with MS_REC, in the order given.
        recursive_set, recursive_clear: MOUNT_ATTR_ flags for the whole tree.
        idmap: "" (none), "idmap" or "ridmap".
        copy_up: tmpcopyup.
        data: what is left for the file system, in order.
    """

    __slots__ = ("cleared", "copy_up", "data", "flags", "idmap", "propagation", "recursive_clear", "recursive_set")

    def __init__(self) -> None:
        self.flags = 0
        self.cleared = 0
        self.propagation: list[int] = []
        self.recursive_set = 0
        self.recursive_clear = 0
        self.idmap = ""
        self.copy_up = False
        self.data: list[str] = []


def parse_options(options: list[str]) -> Options:
    """Sort options; the later of two opposites wins, and what is unknown is the file system's."""
    result = Options()
    for option in options:
        if option in FLAGS:
            clears, flag = FLAGS[option]
            if clears:
                result.flags &= ~flag
                result.cleared |= flag
            else:
                result.flags |= flag
                result.cleared &= ~flag
        elif option in PROPAGATION:
            result.propagation.append(PROPAGATION[option])
        elif option in RECURSIVE:
            clears, flag = RECURSIVE[option]
            if clears:
                result.recursive_clear |= flag
                result.recursive_set &= ~flag
            else:
                result.recursive_set |= flag
                result.recursive_clear &= ~flag
            if flag & m.MOUNT_ATTR__ATIME or option in ("rrelatime", "rnorelatime"):
                # The access time modes are one field of the kernel's: setting any means clearing the field first.
                result.recursive_clear |= m.MOUNT_ATTR__ATIME
        elif option in ("idmap", "ridmap"):
            result.idmap = option
        elif option == "tmpcopyup":
            result.copy_up = True
        else:
            result.data.append(option)
    return result


def known_options() -> list[str]:
    """Every option that `parse_options` knows, sorted."""
    return sorted([*FLAGS, *PROPAGATION, *RECURSIVE, "idmap", "ridmap", *EXTENSIONS])


def mount_attributes(flags: int) -> int:
    """The MOUNT_ATTR_ flags of a mount with these MS_ flags; relatime unless another access time mode is asked for."""
    attributes = 0
    for ms, attribute in _MOUNT_ATTRS:
        if flags & ms:
            attributes |= attribute
    if flags & m.MS_STRICTATIME:
        attributes |= m.MOUNT_ATTR_STRICTATIME
    elif flags & m.MS_NOATIME:
        attributes |= m.MOUNT_ATTR_NOATIME
    return attributes


CLEARABLE = (
    m.MOUNT_ATTR_RDONLY | m.MOUNT_ATTR_NOSUID | m.MOUNT_ATTR_NODEV | m.MOUNT_ATTR_NOEXEC | m.MOUNT_ATTR_NODIRATIME
    | m.MOUNT_ATTR_NOSYMFOLLOW
)


def split_data(data: list[str]) -> list[tuple[str, str | None]]:
    """(key, value or None) of file system options; a comma inside double quotes (SELinux contexts) does not separate."""
    pairs: list[tuple[str, str | None]] = []
    for item in data:
        start = 0
        quoted = False
        for i, char in enumerate(item + ","):
            if char == '"':
                quoted = not quoted
            elif char == "," and (not quoted or i == len(item)):
                part = item[start:i]
                start = i + 1
                if part:
                    key, equals, value = part.partition("=")
                    pairs.append((key, value.strip('"') if equals else None))
    return pairs


def open_how(flags: int, mode: int = 0, resolve: int = 0) -> bytes:
    """struct open_how, always close-on-exec."""
    return _HOW.pack(flags | m.O_CLOEXEC, mode, resolve)


def mount_attr(attr_set: int = 0, attr_clr: int = 0, propagation: int = 0, userns_fd: int = 0) -> bytes:
    """struct mount_attr."""
    return _ATTR.pack(attr_set, attr_clr, propagation, userns_fd)


def _path(path: str) -> bytes:
    return os.fsencode(path) + b"\0"


def _named(path: str, call: str) -> OSError:
    import sys

    error = sys.exc_info()[1]
    number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
    return OSError(number, f"{call}: {os.strerror(number)}", path)


def openat2(dir_fd: int, path: str, flags: int, mode: int = 0, resolve: int = 0) -> int:
    """openat2(2): a descriptor, close-on-exec. Raises OSError; EXDEV or ELOOP when `resolve` forbids the path."""
    try:
        return _sys.syscall(syscalls.OPENAT2, dir_fd, _path(path), open_how(flags, mode, resolve), 24)
    except OSError:
        raise _named(path, "openat2") from None


def follow_links(root_fd: int, path: str) -> str:
    """`path` inside the root `root_fd` with all symbolic links followed, relative to the root.

    What does not exist, or cannot be looked at, stays as it is written. Raises OSError ELOOP after as many links as the
    kernel follows.
    """
    done: list[str] = []
    rest = path.split("/")[::-1]
    links = 0
    while rest:
        part = rest.pop()
        if part in ("", "."):
            continue
        if part == "..":
            done = done[:-1]
            continue
        done.append(part)
        try:
            resolve = m.RESOLVE_IN_ROOT | m.RESOLVE_NO_MAGICLINKS
            fd = openat2(root_fd, "/".join(done), m.O_PATH | m.O_NOFOLLOW, 0, resolve)
        except OSError:
            continue
        try:
            target = os.readlink("", dir_fd=fd)
        except OSError:
            continue  # no link
        finally:
            os.close(fd)
        links += 1
        if links > _MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        done = [] if target.startswith("/") else done[:-1]
        rest += target.split("/")[::-1]
    return "/".join(done)


def fsopen(fstype: str) -> int:
    """fsopen(2): a file system context. Raises OSError, ENODEV for an unknown type."""
    try:
        return _sys.syscall(syscalls.FSOPEN, _path(fstype), m.FSOPEN_CLOEXEC)
    except OSError:
        raise _named(fstype, "fsopen") from None


def fsconfig(context: int, command: int, key: str | None = None, value: str | None = None) -> None:
    """fsconfig(2)."""
    _sys.syscall(
        syscalls.FSCONFIG, context, command, _path(key) if key is not None else None,
        _path(value) if value is not None else None, 0,
    )


def fsmount(context: int, attributes: int = 0) -> int:
    """fsmount(2): a detached mount of the file system that the context made."""
    return _sys.syscall(syscalls.FSMOUNT, context, m.FSMOUNT_CLOEXEC, attributes)


def make_mount(fstype: str, options: list[tuple[str, str | None]], attributes: int = 0) -> int:
    """A detached mount of a new file system: fsopen, fsconfig for each option, fsmount. Raises OSError."""
    context = fsopen(fstype)
    try:
        for key, value in options:
            fsconfig(context, m.FSCONFIG_SET_FLAG if value is None else m.FSCONFIG_SET_STRING, key, value)
        fsconfig(context, m.FSCONFIG_CMD_CREATE)
        return fsmount(context, attributes)
    finally:
        os.close(context)


def open_tree(dir_fd: int, path: str, flags: int) -> int:
    """open_tree(2), close-on-exec; with OPEN_TREE_CLONE a detached copy of the mount (AT_RECURSIVE: of the tree)."""
    try:
        return _sys.syscall(syscalls.OPEN_TREE, dir_fd, _path(path), flags | m.OPEN_TREE_CLOEXEC)
    except OSError:
        raise _named(path, "open_tree") from None


def move_mount(mount_fd: int, target_fd: int, target: str = "") -> None:
    """move_mount(2): attach a detached mount at `target` (below `target_fd`, or that very descriptor)."""
    flags = m.MOVE_MOUNT_F_EMPTY_PATH | (0 if target else m.MOVE_MOUNT_T_EMPTY_PATH)
    try:
        _sys.syscall(syscalls.MOVE_MOUNT, mount_fd, b"\0", target_fd, _path(target), flags)
    except OSError:
        raise _named(target, "move_mount") from None


def mount_setattr(
    dir_fd: int, path: str = "", *, recursive: bool = False, attr_set: int = 0, attr_clr: int = 0, propagation: int = 0,
    userns_fd: int = 0,
) -> None:
    """mount_setattr(2) on the mount at `path`, or on the descriptor itself when `path` is empty."""
    flags = (m.AT_RECURSIVE if recursive else 0) | (0 if path else m.AT_EMPTY_PATH)
    attr = mount_attr(attr_set, attr_clr, propagation, userns_fd)
    try:
        _sys.syscall(syscalls.MOUNT_SETATTR, dir_fd, _path(path), flags, attr, len(attr))
    except OSError:
        raise _named(path, "mount_setattr") from None


def mount(source: str | None, target: str, fstype: str | None = None, flags: int = 0, data: str | None = None) -> None:
    """mount(2)."""
    encoded = [None if text is None else _path(text) for text in (source, target, fstype, data)]
    try:
        _sys.syscall(syscalls.MOUNT, encoded[0], encoded[1], encoded[2], flags, encoded[3])
    except OSError:
        raise _named(target, "mount") from None


def detached(fstype: str, source: str, options: list[str]) -> int:
    """One mount in mount(8)'s words, a bind or a file system with its options however long they are, not attached anywhere.

    Answers with its descriptor: the mount goes with it, unless move_mount(2) attaches it. The lower directories of an overlay
    are given one by one (Linux ≥ 6.5), since all options of mount(2) must fit into a page. Raises OSError.
    """
    parsed = parse_options(options)
    if parsed.flags & m.MS_BIND or fstype == "bind":
        recursive = bool(parsed.flags & m.MS_REC)
        tree = open_tree(m.AT_FDCWD, source, m.OPEN_TREE_CLONE | (m.AT_RECURSIVE if recursive else 0))
        attributes = mount_attributes(parsed.flags & ~(m.MS_BIND | m.MS_REC))
        if attributes:
            try:
                mount_setattr(tree, recursive=recursive, attr_set=attributes)
            except BaseException:
                os.close(tree)
                raise
        return tree
    pairs: list[tuple[str, str | None]] = []
    for key, value in split_data(parsed.data):
        if fstype == "overlay" and key == "lowerdir" and value is not None and kernel_version() >= (6, 5):
            pairs += [("lowerdir+", lower.replace("\\:", ":")) for lower in split_lowers(value)]
        else:
            pairs.append((key, value))
    pairs += [(key, None) for flag, key in SUPERBLOCK if parsed.flags & flag]
    if parsed.flags & m.MS_RDONLY:
        pairs.append(("ro", None))
    return make_mount(fstype, [("source", source), *pairs], mount_attributes(parsed.flags))


def attach(fstype: str, source: str, target: str, options: list[str]) -> None:
    """One mount as `detached` makes it, at `target`, with the propagation that the options say. Raises OSError."""
    mounted = detached(fstype, source, options)
    try:
        move_mount(mounted, m.AT_FDCWD, target)
    finally:
        os.close(mounted)
    for propagation in parse_options(options).propagation:
        mount_setattr(
            m.AT_FDCWD, target, recursive=bool(propagation & m.MS_REC), propagation=propagation & ~m.MS_REC,
        )


def split_lowers(value: str) -> list[str]:
    """An overlay's lowerdir option at its colons, but not at those behind a backslash, which are part of a name."""
    lowers = [""]
    escaped = False
    for char in value:
        if char == ":" and not escaped:
            lowers.append("")
        else:
            lowers[-1] += char
        escaped = char == "\\" and not escaped
    return [lower for lower in lowers if lower]


def umount(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    try:
        _sys.syscall(syscalls.UMOUNT2, _path(target), flags)
    except OSError:
        raise _named(target, "umount") from None


def pivot_root(new_root: str, put_old: str) -> None:
    """pivot_root(2)."""
    _sys.syscall(syscalls.PIVOT_ROOT, _path(new_root), _path(put_old))


def kernel_version() -> tuple[int, int]:
    """The running kernel's version and patch level, (6, 18) for "6.18.44-custom"."""
    numbers = os.uname().release.split("-")[0].split(".")
    return int(numbers[0]), int("".join(c for c in numbers[1] if c.isdigit()) or 0)


def mount_points(*fstypes: str) -> list[str]:
    """Where file systems (of those types, or all) are mounted, in the order of mounting."""
    points = []
    with open("/proc/self/mountinfo", "rb") as table:
        for line in table:
            fields, _, kind = line.partition(b" - ")
            if not fstypes or kind.split(b" ", 1)[0].decode() in fstypes:
                # Blanks and the like are written as \040.
                point = fields.split(b" ")[4].decode("unicode_escape").encode("latin-1")
                points.append(os.fsdecode(point))
    return points


def umount_below(path: str) -> None:
    """Detach every mount below `path`, the newest first, but not one on `path` itself."""
    for point in reversed(mount_points()):
        if point.startswith(path.rstrip("/") + "/"):
            umount(point, m.MNT_DETACH)
