"""Unpacks a layer into a directory.

Runs in: any thread, with the rights of the process: as root, or rootless in a user namespace, where devices are left out.
Spec: image-spec 1.1.1, layer.md "Applying Changesets" and "Whiteouts"; overlayfs (Documentation/filesystems/overlayfs.rst) for
how it knows a whiteout and an opaque directory; openat2(2), Linux ≥ 5.6.

Whatever the tar says, nothing outside of the root is reached: the directory of a member is opened by openat2 with
RESOLVE_IN_ROOT, and the member itself is made by its bare name below that descriptor, never following a link there. Links on the
way are followed as a container would follow them.

A directory's mode and times are set when everything else is done, since making entries needs the one and changes the other.

Not here: EROFS images (`boxship.images.layers.erofs`), decompression (`boxship.images.layers.streams`).
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections import OrderedDict
from struct import pack
from typing import TYPE_CHECKING

from boxship.abi import mount as m
from boxship.images.layers import names, tar
from boxship.images.layers.lowers import Lowers, copy_xattrs, is_whiteout
from boxship.kit.errors import InvalidArgument, from_os_error
from boxship.linux.mounts import openat2

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from boxship.images.layers.tar import Member, Source

    IdMap = Sequence[tuple[int, int, int]]
    """(id in the layer, id on the disk, how many)."""

PLAIN = ""
"""Whiteouts remove what is there."""
OVERLAY = "trusted.overlay.opaque"
"""Whiteouts are left for overlayfs to see."""
USER_OVERLAY = "user.overlay.opaque"
"""The same, mounted with `userxattr`."""

_OPEN_DIRS = 64
_MAX_LINKS = 255
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_IN_ROOT = m.RESOLVE_IN_ROOT | m.RESOLVE_NO_MAGICLINKS


class Applied:
    """What became of a layer.

    Attributes:
        entries: members of the tar.
        devices: names of devices that were left out, for want of the right to make them.
    """

    __slots__ = ("devices", "entries")

    def __init__(self) -> None:
        self.entries = 0
        self.devices: list[bytes] = []


def apply(
    source: Source, root: str, form: str = PLAIN, *, lowers: Lowers | None = None, uid_map: IdMap = (), gid_map: IdMap = (),
    limits: names.Limits | None = None,
) -> Applied:
    """Unpack the tar `source` into the directory `root`.

    `form`: what whiteouts become. `lowers`: the layers below `root`, for what the tar takes for granted (overlay forms only).
    `uid_map`, `gid_map`: how ids are shifted; empty for not at all.
    On an error what was unpacked stays: the caller throws the snapshot away. Raises TarError, InvalidArgument, and OSError.
    """
    applier = _Applier(root, form, lowers or Lowers(), uid_map, gid_map)
    try:
        return applier.run(source, limits or names.Limits())
    finally:
        applier.close()


def shift(number: int, id_map: IdMap) -> int:
    """The id on the disk; raises InvalidArgument for one that is not mapped."""
    for inside, outside, size in id_map:
        if inside <= number < inside + size:
            return number - inside + outside
    raise InvalidArgument(f"layer: the id {number} has no place in the id map")


class _Applier:
    def __init__(self, root: str, form: str, lowers: Lowers, uid_map: IdMap, gid_map: IdMap) -> None:
        self._form = form
        self._lowers = lowers
        self._uid_map = uid_map
        self._gid_map = gid_map
        self._root = os.open(root, _DIRECTORY)
        status = os.fstat(self._root)
        # Empty at first: all that it has is this layer's own, and there is nothing to hide in it.
        self._fresh = not os.listdir(self._root)
        self._own: dict[tuple[int, int], set[bytes]] = {}
        self._ids = (os.geteuid(), os.getegid())
        # Set-gid directories and default ACLs would decide instead.
        self._always_chown = not self._fresh or bool(status.st_mode & stat.S_ISGID)
        self._umask = _umask()
        self._rootless = in_user_namespace()
        self._dirs: OrderedDict[bytes, int] = OrderedDict()
        self._retired: list[int] = []
        self._late: dict[tuple[int, int], tuple[bytes, int, int]] = {}
        self._opaque_root = False
        self._applied = Applied()

    def close(self) -> None:
        self._forget()
        self._retire()
        os.close(self._root)

    def run(self, source: Source, limits: names.Limits) -> Applied:
        applied = self._applied
        for member in tar.members(source):
            applied.entries += 1
            if limits.entries and applied.entries > limits.entries:
                raise InvalidArgument(f"layer: more than {limits.entries} entries")
            if self._retired:
                self._retire()
            path = names.clean(member.name)
            parent, _, base = path.rpartition(b"/")
            try:
                if base[:4] == names.WHITEOUT:
                    if not names.is_aufs(path):
                        self._whiteout(parent, names.whiteout(base))
                elif path:
                    self._member(source, member, parent, base)
                elif member.kind == stat.S_IFDIR:
                    self._attributes(self._root, member, b"")
                else:
                    raise InvalidArgument("layer: the root is no directory")
            except OSError as error:
                raise _wrapped(error, member) from error
        if self._opaque_root:
            self._hide_lower_root()
        self._finish_directories()
        return applied

    def _member(self, source: Source, member: Member, parent: bytes, base: bytes) -> None:
        kind = member.kind
        fd = self._dir(parent)
        if kind == stat.S_IFREG:
            self._regular(source, member, fd, base)
        elif kind == stat.S_IFDIR:
            self._directory(member, fd, parent, base)
        elif kind == stat.S_IFLNK:
            if not member.link:
                raise InvalidArgument(f"layer: the symbolic link {os.fsdecode(member.name)} has no target")
            self._make(fd, base, lambda: os.symlink(member.link, base, dir_fd=fd))
            self._ownership(member, fd, base)
        elif kind == tar.LINK:
            self._link(member, fd, base)
        else:
            self._device(member, fd, base)
        if not self._fresh:
            self._own.setdefault(_key(fd), set()).add(base)

    def _regular(self, source: Source, member: Member, parent: int, base: bytes) -> None:
        permissions = member.mode & 0o777 & ~self._umask
        try:
            fd = os.open(base, _NEW, permissions, dir_fd=parent)
        except FileExistsError:
            self._clear(parent, base)
            fd = os.open(base, _NEW, permissions, dir_fd=parent)
        try:
            if member.sparse is not None:
                os.ftruncate(fd, member.size)
                for start, length in member.sparse:
                    for piece in source.chunks(length):
                        _pwrite_all(fd, piece, start)
                        start += len(piece)
            elif member.size:
                for piece in source.chunks(member.size):
                    written = os.write(fd, piece)
                    while written < len(piece):
                        written += os.write(fd, piece[written:])
            self._chown(member, fd)
            if member.xattrs:
                self._set_xattrs(fd, member)
            # After chown, which takes set-id bits away.
            if permissions != member.mode or self._always_chown:
                os.fchmod(fd, member.mode)
            os.utime(fd, ns=(member.mtime, member.mtime))
        finally:
            os.close(fd)

    def _directory(self, member: Member, parent: int, parent_path: bytes, base: bytes) -> None:
        opaque = False
        try:
            os.mkdir(base, 0o700, dir_fd=parent)
        except FileExistsError:
            status = os.stat(base, dir_fd=parent, follow_symlinks=False)
            if not stat.S_ISDIR(status.st_mode):
                opaque = is_whiteout(status) and self._form != PLAIN
                self._clear(parent, base)
                os.mkdir(base, 0o700, dir_fd=parent)
        path = parent_path + b"/" + base if parent_path else base
        fd = os.open(base, _DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
        self._keep(path, fd)
        if opaque:
            os.setxattr(fd, self._form, b"y")
        self._attributes(fd, member, path)

    def _attributes(self, fd: int, member: Member, path: bytes) -> None:
        self._chown(member, fd)
        if member.xattrs:
            self._set_xattrs(fd, member)
        self._late[_key(fd)] = (path, member.mode, member.mtime)

    def _link(self, member: Member, parent: int, base: bytes) -> None:
        target = names.clean(member.link, "link")
        above, _, name = target.rpartition(b"/")
        if not name:
            raise InvalidArgument(f"layer: the link {os.fsdecode(member.name)} is to the root")
        status = None
        at = -1
        try:
            at = openat2(self._root, os.fsdecode(above) or ".", _DIRECTORY, 0, _IN_ROOT)
            status = os.stat(name, dir_fd=at, follow_symlinks=False)
        except FileNotFoundError:
            if at >= 0:
                os.close(at)
            at = os.dup(self._copy_up(target))
        try:
            if status is not None and is_whiteout(status):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fsdecode(target))
            if status is not None and stat.S_ISDIR(status.st_mode):
                raise InvalidArgument(f"layer: {os.fsdecode(member.name[:255])}: a hard link to a directory")
            if status is not None and os.path.sameopenfile(at, parent) and name == base:
                return  # to itself
            self._make(parent, base, lambda: os.link(name, base, src_dir_fd=at, dst_dir_fd=parent, follow_symlinks=False))
        finally:
            os.close(at)

    def _device(self, member: Member, parent: int, base: bytes) -> None:
        try:
            number = os.makedev(member.major, member.minor)
            self._make(parent, base, lambda: os.mknod(base, member.kind | member.mode & 0o777, number, dir_fd=parent))
        except PermissionError:
            # What a user namespace may not make: containerd leaves it out, too.
            self._applied.devices.append(member.name)
            return
        self._ownership(member, parent, base)
        os.chmod(base, member.mode, dir_fd=parent)

    def _make(self, parent: int, base: bytes, make: Callable[[], None]) -> None:
        try:
            make()
        except FileExistsError:
            self._clear(parent, base)
            make()

    def _ownership(self, member: Member, parent: int, base: bytes) -> None:
        """Of what is neither a file nor a directory: it cannot be opened without doing something."""
        uid, gid = self._shifted(member)
        if self._always_chown or (uid, gid) != self._ids:
            os.chown(base, uid, gid, dir_fd=parent, follow_symlinks=False)
        if member.xattrs:
            self._set_xattrs(f"/proc/self/fd/{parent}/{os.fsdecode(base)}", member)
        os.utime(base, ns=(member.mtime, member.mtime), dir_fd=parent, follow_symlinks=False)

    def _shifted(self, member: Member) -> tuple[int, int]:
        uid = shift(member.uid, self._uid_map) if self._uid_map else member.uid
        return uid, shift(member.gid, self._gid_map) if self._gid_map else member.gid

    def _chown(self, member: Member, fd: int) -> None:
        uid, gid = self._shifted(member)
        if self._always_chown or (uid, gid) != self._ids:
            os.fchown(fd, uid, gid)

    def _set_xattrs(self, target: int | str, member: Member) -> None:
        for name, value in member.xattrs.items():
            if not names.keep_xattr(name):
                continue
            if name == b"security.capability" and self._uid_map:
                value = shift_capability(value, self._uid_map)
            try:
                os.setxattr(target, name, value, follow_symlinks=isinstance(target, int))
            except OSError as error:
                # A file system without them, or (rootless; or user.* on what is no file) without the right: as others do.
                if error.errno == errno.ENOTSUP:
                    continue
                if error.errno == errno.EPERM and (self._rootless or name.startswith(b"user.")):
                    continue
                raise

    def _clear(self, parent: int, base: bytes) -> None:
        """Take away what is in the way of a new entry that is no directory, or that replaces one that is none."""
        status = os.stat(base, dir_fd=parent, follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            self._forget()
            shutil.rmtree(base, dir_fd=parent)
        else:
            if stat.S_ISLNK(status.st_mode):
                self._forget()
            os.unlink(base, dir_fd=parent)

    def _whiteout(self, parent: bytes, hidden: bytes) -> None:
        """`hidden` is a name in the directory `parent`, or b"" for everything that is not this layer's."""
        if self._form == PLAIN:
            if self._fresh:
                return
            try:
                fd = self._existing(parent)
            except (FileNotFoundError, NotADirectoryError):
                return  # nothing to hide
            self._remove(fd, hidden)
            return
        fd = self._dir(parent)
        if not hidden:
            self._prune(fd)
            os.setxattr(fd, self._form, b"y")
            self._opaque_root = self._opaque_root or not parent
            return
        if not self._fresh:
            self._remove(fd, hidden)
        try:
            os.mknod(hidden, stat.S_IFCHR, 0, dir_fd=fd)
        except FileExistsError:
            # This layer's own is not hidden, but what is below it.
            if stat.S_ISDIR(os.stat(hidden, dir_fd=fd, follow_symlinks=False).st_mode):
                below = os.open(hidden, _DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
                try:
                    os.setxattr(below, self._form, b"y")
                finally:
                    os.close(below)

    def _remove(self, fd: int, hidden: bytes) -> None:
        """Take away what is not this layer's: `hidden` in the directory `fd`, or everything in it."""
        self._forget()
        if not hidden:
            self._prune(fd)
            return
        try:
            status = os.stat(hidden, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            return
        own = hidden in self._own.get(_key(fd), ())
        if stat.S_ISDIR(status.st_mode):
            below = os.open(hidden, _DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
            try:
                left = self._prune(below)
            finally:
                os.close(below)
            if not left and not own:
                os.rmdir(hidden, dir_fd=fd)
        elif not own:
            os.unlink(hidden, dir_fd=fd)

    def _prune(self, fd: int) -> bool:
        """Remove what is not this layer's from a directory; whether anything is left."""
        if self._fresh:
            return True
        own = self._own.get(_key(fd), ())
        left = False
        for name in os.listdir(fd):
            encoded = os.fsencode(name)
            if stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
                below = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
                try:
                    kept = self._prune(below)
                finally:
                    os.close(below)
                if kept or encoded in own:
                    left = True
                else:
                    os.rmdir(name, dir_fd=fd)
            elif encoded in own:
                left = True
            else:
                os.unlink(name, dir_fd=fd)
        return left

    def _hide_lower_root(self) -> None:
        """Overlayfs always merges the roots, whatever they say: hide each name by itself."""
        for name in self._lowers.names():
            self._whiteout(b"", name)

    # Directories by path, some of them open.

    def _dir(self, path: bytes) -> int:
        """The directory, made when it is not there; borrowed."""
        if not path:
            return self._root
        fd = self._dirs.get(path)
        if fd is not None:
            self._dirs.move_to_end(path)
            return fd
        try:
            return self._existing(path)
        except FileNotFoundError:
            return self._keep(path, self._make_way(path))

    def _existing(self, path: bytes) -> int:
        if not path:
            return self._root
        return self._keep(path, openat2(self._root, os.fsdecode(path), _DIRECTORY, 0, _IN_ROOT))

    def _keep(self, path: bytes, fd: int) -> int:
        old = self._dirs.pop(path, None)
        if old is not None:
            self._retired.append(old)
        self._dirs[path] = fd
        if len(self._dirs) > _OPEN_DIRS:
            _, oldest = self._dirs.popitem(last=False)
            self._retired.append(oldest)
        return fd

    def _forget(self) -> None:
        """Paths lead elsewhere now. The descriptors stay open until the next member: callers have borrowed them."""
        self._retired += self._dirs.values()
        self._dirs.clear()

    def _retire(self) -> None:
        for fd in self._retired:
            os.close(fd)
        self._retired.clear()

    def _make_way(self, path: bytes) -> int:
        """Make the directories of `path`, as the layers below have them, and follow links of this and of those layers."""
        rest = path.split(b"/")[::-1]
        done: list[bytes] = []
        fds = [os.dup(self._root)]
        links = 0
        try:
            while rest:
                part = rest.pop()
                if part in (b"", b"."):
                    continue
                if part == b"..":
                    if done:
                        done.pop()
                        os.close(fds.pop())
                    continue
                target = self._step(fds[-1], b"/".join([*done, part]), part)
                if target is None:
                    done.append(part)
                    fds.append(os.open(part, _DIRECTORY | os.O_NOFOLLOW, dir_fd=fds[-1]))
                    continue
                links += 1
                if links > _MAX_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fsdecode(path))
                if target.startswith(b"/"):
                    while done:
                        done.pop()
                        os.close(fds.pop())
                rest += target.split(b"/")[::-1]
            return fds.pop()
        finally:
            for fd in fds:
                os.close(fd)

    def _step(self, parent: int, path: bytes, base: bytes) -> bytes | None:
        """None when `base` is a directory, now if not before; else the target of the link that it is."""
        try:
            status = os.stat(base, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            pass
        else:
            if stat.S_ISLNK(status.st_mode):
                return os.readlink(base, dir_fd=parent)
            if stat.S_ISDIR(status.st_mode):
                return None
            if not is_whiteout(status) or self._form == PLAIN:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fsdecode(path))
            # A whiteout of this layer, and now a new directory of the same name that is not in the tar.
            os.unlink(base, dir_fd=parent)
            self._new_directory(parent, path, base, None)
            below = os.open(base, _DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
            try:
                os.setxattr(below, self._form, b"y")
            finally:
                os.close(below)
            return None
        found = self._lowers.find(path)
        if found is not None and stat.S_ISLNK(found[1].st_mode):
            return os.fsencode(os.readlink(found[0]))
        self._new_directory(parent, path, base, found if found is not None and stat.S_ISDIR(found[1].st_mode) else None)
        return None

    def _new_directory(self, parent: int, path: bytes, base: bytes, like: tuple[str, os.stat_result] | None) -> None:
        os.mkdir(base, 0o700, dir_fd=parent)
        fd = os.open(base, _DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
        try:
            if like is None:
                uid = shift(0, self._uid_map) if self._uid_map else self._ids[0]
                gid = shift(0, self._gid_map) if self._gid_map else self._ids[1]
                if (uid, gid) != self._ids:
                    os.fchown(fd, uid, gid)
                self._late[_key(fd)] = (path, 0o755, 0)
            else:
                source, status = like
                os.fchown(fd, status.st_uid, status.st_gid)
                copy_xattrs(source, fd)
                self._late[_key(fd)] = (path, stat.S_IMODE(status.st_mode), status.st_mtime_ns)
        finally:
            os.close(fd)

    def _copy_up(self, target: bytes) -> int:
        """A file of a layer below, to be linked to: copied into this one. Answers with its directory, borrowed."""
        found = self._lowers.find(target)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fsdecode(target))
        path, status = found
        above, _, base = target.rpartition(b"/")
        parent = self._dir(above)
        if stat.S_ISREG(status.st_mode):
            fd = os.open(base, _NEW, 0o600, dir_fd=parent)
            try:
                source = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    while os.sendfile(fd, source, None, 1 << 30):
                        pass
                    os.fchown(fd, status.st_uid, status.st_gid)
                    copy_xattrs(source, fd)
                finally:
                    os.close(source)
                os.fchmod(fd, stat.S_IMODE(status.st_mode))
                os.utime(fd, ns=(status.st_mtime_ns, status.st_mtime_ns))
            finally:
                os.close(fd)
        elif stat.S_ISLNK(status.st_mode):
            os.symlink(os.readlink(path), base, dir_fd=parent)
            os.chown(base, status.st_uid, status.st_gid, dir_fd=parent, follow_symlinks=False)
            os.utime(base, ns=(status.st_mtime_ns, status.st_mtime_ns), dir_fd=parent, follow_symlinks=False)
        elif stat.S_ISDIR(status.st_mode):
            raise InvalidArgument(f"layer: a hard link to the directory {os.fsdecode(target)}")
        else:
            os.mknod(base, status.st_mode, status.st_rdev, dir_fd=parent)
            os.chown(base, status.st_uid, status.st_gid, dir_fd=parent)
        return parent

    def _finish_directories(self) -> None:
        """Modes and times, the deepest first: rootless, nothing can be opened below a directory that has lost its x."""
        self._forget()
        for (device, inode), (path, mode, mtime) in sorted(self._late.items(), key=lambda item: -item[1][0].count(b"/")):
            if path:
                try:
                    fd = openat2(self._root, os.fsdecode(path), _DIRECTORY | os.O_NOFOLLOW, 0, _IN_ROOT)
                except (FileNotFoundError, NotADirectoryError):
                    continue  # replaced by something else later in the tar
                except OSError as error:
                    if error.errno == errno.ELOOP:
                        continue  # by a link
                    raise
            else:
                fd = os.dup(self._root)
            try:
                if _key(fd) == (device, inode):
                    os.fchmod(fd, mode)
                    os.utime(fd, ns=(mtime, mtime))
            finally:
                os.close(fd)


def shift_capability(value: bytes, uid_map: IdMap) -> bytes:
    """File capabilities for the root of a user namespace: revision 3, which names its id (linux/capability.h)."""
    if len(value) != 20 or value[3] != 2:
        return value
    return pack("<I", 3 << 24 | value[0]) + value[4:] + pack("<I", shift(0, uid_map))


def _key(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def in_user_namespace() -> bool:
    """Whether this process is root of less than the machine: not all ids are mapped."""
    try:
        with open("/proc/self/uid_map", encoding="ascii") as file:
            return file.read().split() != ["0", "0", "4294967295"]
    except FileNotFoundError:
        return False  # a kernel without user namespaces


def _umask() -> int:
    """The process's umask, without changing it: other threads make files meanwhile."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return 0o777


def _pwrite_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


def _wrapped(error: OSError, member: Member) -> Exception:
    """What a hostile or broken layer provokes is its own fault; a full disk and the like stay what they are."""
    name = os.fsdecode(member.name[:255])
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EROFS):
        return OSError(error.errno, f"layer: {name}: {os.strerror(error.errno).lower()}")
    if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EXDEV, errno.EISDIR, errno.ENOENT):
        return InvalidArgument(f"layer: {name}: {os.strerror(error.errno).lower()}")
    return from_os_error(error, f"layer: {name}:")
