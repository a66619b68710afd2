"""Files of containers as tar archives: docker cp both ways, docker export, and what changed.

Runs in: the daemon, the work itself in worker threads.
Spec: Docker Engine API, ContainerArchive, PutContainerArchive, ContainerExport, ContainerChanges.

A path is looked up below a descriptor of the container's root with openat2(2), so that no link leads out of it, not even one
that a running container changes meanwhile. A running container's root is /proc/PID/root, where its volumes are mounted; a stopped
one's is put together for the time of the copy, and a path in a volume is looked up in the volume.
"""

from __future__ import annotations

import base64
import io
import json
import os
import stat
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from boxship.abi import mount as m
from boxship.engine import times
from boxship.engine.container import Container
from boxship.engine.core import Core
from boxship.engine.rootfs import overlay_layers
from boxship.engine.startup import running_root
from boxship.kit.errors import InvalidArgument, NotFound, PermissionDenied, from_os_error
from boxship.linux.roots import Root

_COPY = 1 << 20
_GO_DIR, _GO_LINK, _GO_DEVICE, _GO_FIFO, _GO_SOCKET = 1 << 31, 1 << 27, 1 << 26, 1 << 25, 1 << 24
_GO_SETUID, _GO_SETGID, _GO_CHAR, _GO_STICKY = 1 << 23, 1 << 22, 1 << 21, 1 << 20


class Place:
    """A path in a container: the root that it is below, and the path there. A context manager."""

    def __init__(self, root: Root, path: str, *, read_only: bool, owner: str = "") -> None:
        self.root = root
        self.path = path
        self.owner = owner
        self.read_only = read_only

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *error: object) -> None:
        self.root.close()


def clean(path: str) -> str:
    """The path as an absolute one without dots and doubled slashes."""
    return os.path.normpath("/" + path.lstrip("/"))


async def place(core: Core, container: Container, path: str, *, writing: bool = False) -> Place:
    """Where `path` is, opened; a context manager. Raises NotFound and what containerd raises."""
    wanted = clean(path)
    root = await running_root(core, container)
    if root is not None:
        return Place(root, wanted, read_only=False, owner=container.name)
    points = [point for point in container.mounts if point["Type"] in ("bind", "volume") and (
        wanted == point["Destination"] or wanted.startswith(point["Destination"] + "/"))]
    if points:
        point = max(points, key=lambda each: len(each["Destination"]))
        source = core.volumes.path(point["Name"]) if point["Type"] == "volume" else point["Source"]
        inner = wanted[len(point["Destination"]) :] or "/"
        if os.path.isdir(source):
            return Place(Root(path=source), inner, read_only=not point["RW"], owner=container.name)
    mounts = await core.snapshots.mounts(container.id)
    if writing:
        container.fresh = False
        core.save(container)
    return Place(
        Root(mounts, read_only=not writing), wanted, read_only=container.host["ReadonlyRootfs"], owner=container.name)


def _split(path: str) -> tuple[str, str]:
    parent, _, name = path.rstrip("/").rpartition("/")
    return parent, name


def _go_mode(mode: int) -> int:
    """st_mode as Go's os.FileMode, which is what clients expect."""
    found = mode & 0o777
    kind = stat.S_IFMT(mode)
    found |= {stat.S_IFDIR: _GO_DIR, stat.S_IFLNK: _GO_LINK, stat.S_IFBLK: _GO_DEVICE, stat.S_IFCHR: _GO_DEVICE | _GO_CHAR,
              stat.S_IFIFO: _GO_FIFO, stat.S_IFSOCK: _GO_SOCKET}.get(kind, 0)
    for bit, go in ((stat.S_ISUID, _GO_SETUID), (stat.S_ISGID, _GO_SETGID), (stat.S_ISVTX, _GO_STICKY)):
        if mode & bit:
            found |= go
    return found


def _open_item(spot: Place) -> tuple[int, str, os.stat_result]:
    """(descriptor of the parent, name in it, what it is) of a path, its last component not followed. Raises NotFound."""
    parent, name = _split(spot.path)
    try:
        if not name:
            fd = spot.root.open("/", os.O_RDONLY | os.O_DIRECTORY)
            return fd, ".", os.fstat(fd)
        fd = spot.root.open_folder(parent)
    except OSError as error:
        raise _not_found(spot, error) from None
    try:
        return fd, name, os.stat(name, dir_fd=fd, follow_symlinks=False)
    except OSError as error:
        os.close(fd)
        raise _not_found(spot, error) from None


def _not_found(spot: Place, error: OSError) -> NotFound:
    import errno

    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV):
        return NotFound(f"Could not find the file {spot.path} in container {spot.owner}")
    raise from_os_error(error, f"looking up {spot.path}") from None


def stat_header(spot: Place, wanted: str) -> str:
    """X-Docker-Container-Path-Stat."""
    fd, name, info = _open_item(spot)
    try:
        target = ""
        if stat.S_ISLNK(info.st_mode):
            target = os.readlink(name, dir_fd=fd)
            if not target.startswith("/"):
                target = os.path.normpath(os.path.join(_split(spot.path)[0] or "/", target))
        if wanted.endswith("/") and not stat.S_ISDIR(info.st_mode) and not stat.S_ISLNK(info.st_mode):
            raise InvalidArgument(f"not a directory: {wanted}")
    finally:
        os.close(fd)
    base = os.path.basename(clean(wanted)) or "/"
    text = json.dumps({
        "name": base, "size": info.st_size, "mode": _go_mode(info.st_mode), "mtime": times.rfc3339(info.st_mtime_ns),
        "linkTarget": target})
    return base64.b64encode(text.encode()).decode()


# out


class _Pipe(io.RawIOBase):
    """What tarfile writes into: gathers, and hands on in pieces."""

    def __init__(self, put: Callable[[bytes], None]) -> None:
        self._put = put
        self._parts: list[bytes] = []
        self._size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        piece = bytes(data)
        self._parts.append(piece)
        self._size += len(piece)
        if self._size >= _COPY:
            self.hand_on()
        return len(piece)

    def hand_on(self) -> None:
        """Hand on what is gathered. The consumer raises when it wants no more."""
        if self._parts:
            self._put(b"".join(self._parts))
            self._parts, self._size = [], 0


def write_tar(spot: Place, put: Callable[[bytes], None], *, base: str) -> None:
    """The file or tree at a place as a tar archive whose names begin with `base` ("" for a root file system). Raises NotFound."""
    pipe = _Pipe(put)
    fd, name, info = _open_item(spot)
    try:
        archive = tarfile.open(fileobj=pipe, mode="w|", format=tarfile.PAX_FORMAT, bufsize=512)
        with archive:
            _add(archive, fd, name, info, base, {}, info.st_dev if not base else None)
        pipe.hand_on()
    except OSError as error:
        raise from_os_error(error, f"reading {spot.path}") from None
    finally:
        os.close(fd)


def _add(
    archive: tarfile.TarFile, parent: int, name: str, info: os.stat_result, shown: str, links: dict[tuple[int, int], str],
    device: int | None,
) -> None:
    mode = info.st_mode
    entry = tarfile.TarInfo(shown)
    entry.mode, entry.uid, entry.gid = stat.S_IMODE(mode), info.st_uid, info.st_gid
    entry.mtime = info.st_mtime_ns // 1_000_000_000
    if stat.S_ISSOCK(mode):
        return  # tar has no sockets
    if not stat.S_ISDIR(mode) and info.st_nlink > 1:
        first = links.setdefault((info.st_dev, info.st_ino), shown)
        if first != shown:
            entry.type, entry.linkname = tarfile.LNKTYPE, first
            archive.addfile(entry)
            return
    if stat.S_ISREG(mode):
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
        with os.fdopen(fd, "rb") as file:
            entry.size = os.fstat(fd).st_size
            _xattrs(entry, fd)
            archive.addfile(entry, _Exactly(file, entry.size))
        return
    if stat.S_ISLNK(mode):
        entry.type, entry.linkname = tarfile.SYMTYPE, os.readlink(name, dir_fd=parent)
    elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        entry.type = tarfile.CHRTYPE if stat.S_ISCHR(mode) else tarfile.BLKTYPE
        entry.devmajor, entry.devminor = os.major(info.st_rdev), os.minor(info.st_rdev)
    elif stat.S_ISFIFO(mode):
        entry.type = tarfile.FIFOTYPE
    if not stat.S_ISDIR(mode):
        archive.addfile(entry)
        return
    entry.type = tarfile.DIRTYPE
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        _xattrs(entry, fd)
        if shown:
            archive.addfile(entry)
        if device is not None and info.st_dev != device:
            return  # another file system is mounted there
        for child in sorted(os.listdir(fd)):
            try:
                inner = os.stat(child, dir_fd=fd, follow_symlinks=False)
                _add(archive, fd, child, inner, f"{shown}/{child}" if shown else child, links, device)
            except FileNotFoundError:
                continue  # removed while the tree was read
    finally:
        os.close(fd)


def _xattrs(entry: tarfile.TarInfo, fd: int) -> None:
    try:
        names = os.listxattr(fd)
    except OSError:
        return
    entry.pax_headers = {
        f"SCHILY.xattr.{name}": os.getxattr(fd, name).decode("utf-8", "surrogateescape")
        for name in names if name.startswith(("security.capability", "user.")) and not name.startswith("user.overlay.")
    }


class _Exactly:
    """A file of exactly `size` bytes, whatever happens to it while it is read."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._left = size

    def read(self, size: int = -1) -> bytes:
        wanted = self._left if size < 0 else min(size, self._left)
        data = self._file.read(wanted)
        data += b"\0" * (wanted - len(data))
        self._left -= len(data)
        return data


# in


def extract(spot: Place, stream: BinaryIO, *, no_overwrite_kind: bool, owner: tuple[int, int] | None) -> None:
    """Unpack a tar archive (gzip, bzip2 and xz too) into a folder of the container.

    Raises NotFound, InvalidArgument, PermissionDenied.

    Every entry's folder is looked up below the root anew, so that a link that an earlier entry made, or the container
    itself puts there, leads nowhere outside.
    """
    try:
        fd = spot.root.open(spot.path, os.O_RDONLY | os.O_DIRECTORY)
    except NotADirectoryError:
        raise InvalidArgument("extraction point is not a directory") from None
    except OSError as error:
        raise _not_found(spot, error) from None
    os.close(fd)
    if spot.read_only:
        raise PermissionDenied("container rootfs is marked read-only")
    folders: list[tuple[str, tarfile.TarInfo]] = []
    try:
        with tarfile.open(fileobj=stream, mode="r|*") as archive:
            for entry in archive:
                _extract(spot, archive, entry, folders, no_overwrite_kind=no_overwrite_kind, owner=owner)
        for path, entry in reversed(folders):
            fd = spot.root.open_folder(path)
            try:
                os.utime(fd, (entry.mtime, entry.mtime))
            finally:
                os.close(fd)
    except tarfile.TarError as error:
        raise InvalidArgument(f"reading the archive: {error}") from None
    except OSError as error:
        raise from_os_error(error, "unpacking the archive") from None


def _extract(
    spot: Place, archive: tarfile.TarFile, entry: tarfile.TarInfo, folders: list[tuple[str, tarfile.TarInfo]], *,
    no_overwrite_kind: bool,
    owner: tuple[int, int] | None,
) -> None:
    if ".." in entry.name.split("/"):
        raise InvalidArgument(f"invalid archive: {entry.name} leads out of it")
    name = clean(entry.name).strip("/")
    if not name:
        return
    path = f"{spot.path.rstrip('/')}/{name}"
    parent_path, base = _split(path)
    try:
        parent = spot.root.open_folder(parent_path)
    except FileNotFoundError:
        spot.root.make_folder(parent_path, 0o755)
        parent = spot.root.open_folder(parent_path)
    try:
        there = _lstat(base, parent)
        is_folder = there is not None and stat.S_ISDIR(there.st_mode)
        if there is not None and no_overwrite_kind and is_folder != entry.isdir():
            raise InvalidArgument(
                f'cannot overwrite {_kind(folder=is_folder)} "{path}" with {_kind(folder=entry.isdir())} "{spot.path}"')
        if there is not None and not (is_folder and entry.isdir()):
            if is_folder:
                _remove_tree(base, parent)
            else:
                os.unlink(base, dir_fd=parent)
        uid, gid = owner if owner is not None else (entry.uid, entry.gid)
        if entry.isdir():
            if not is_folder:
                os.mkdir(base, 0o700, dir_fd=parent)
            folders.append((path, entry))
        elif entry.isreg():
            fd = os.open(base, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=parent)
            with os.fdopen(fd, "wb") as file:
                source = archive.extractfile(entry)
                while source is not None and (data := source.read(_COPY)):
                    file.write(data)
        elif entry.issym():
            os.symlink(entry.linkname, base, dir_fd=parent)
        elif entry.islnk():
            target = f"{spot.path.rstrip('/')}/{clean(entry.linkname).strip('/')}"
            folder = spot.root.open_folder(_split(target)[0])
            try:
                os.link(_split(target)[1], base, src_dir_fd=folder, dst_dir_fd=parent, follow_symlinks=False)
            finally:
                os.close(folder)
            return
        elif entry.ischr() or entry.isblk() or entry.isfifo():
            kind = stat.S_IFCHR if entry.ischr() else stat.S_IFBLK if entry.isblk() else stat.S_IFIFO
            os.mknod(base, kind | 0o600, os.makedev(entry.devmajor, entry.devminor) if not entry.isfifo() else 0, dir_fd=parent)
        else:
            raise InvalidArgument(f"unhandled tar header type {entry.type!r} of {entry.name}")
        os.chown(base, uid, gid, dir_fd=parent, follow_symlinks=False)
        if not entry.issym():
            fd = os.open(base, m.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
            try:
                os.chmod(f"/proc/self/fd/{fd}", entry.mode & 0o7777)
                for key, value in entry.pax_headers.items():
                    if key.startswith("SCHILY.xattr."):
                        os.setxattr(f"/proc/self/fd/{fd}", key[13:], value.encode("utf-8", "surrogateescape"))
            finally:
                os.close(fd)
            if not entry.isdir():
                os.utime(base, (entry.mtime, entry.mtime), dir_fd=parent, follow_symlinks=False)
    finally:
        os.close(parent)


def _kind(*, folder: bool) -> str:
    return "directory" if folder else "non-directory"


def _lstat(name: str, parent: int) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _remove_tree(name: str, parent: int) -> None:
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        for child in os.listdir(fd):
            info = os.stat(child, dir_fd=fd, follow_symlinks=False)
            if stat.S_ISDIR(info.st_mode):
                _remove_tree(child, fd)
            else:
                os.unlink(child, dir_fd=fd)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=parent)


# what changed

_MODIFIED, _ADDED, _DELETED = 0, 1, 2


def changes(mounts: list[Any]) -> list[dict[str, Any]]:
    """What a container changed of its image: the upper directory of its overlay against what lies below."""
    upper, lowers = overlay_layers(mounts)
    found: list[dict[str, Any]] = []
    for path, info in _walk(upper, ""):
        if stat.S_ISCHR(info.st_mode) and info.st_rdev == 0:
            found.append({"Path": path, "Kind": _DELETED})
        elif _below(lowers, path) is not None:
            found.append({"Path": path, "Kind": _MODIFIED})
        else:
            found.append({"Path": path, "Kind": _ADDED})
    return sorted(found, key=lambda each: str(each["Path"]))


def _walk(top: str, path: str) -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(f"{top}{path}") as entries:
        for entry in entries:
            info = entry.stat(follow_symlinks=False)
            inner = f"{path}/{entry.name}"
            yield inner, info
            if stat.S_ISDIR(info.st_mode):
                yield from _walk(top, inner)


def _below(lowers: list[str], path: str) -> os.stat_result | None:
    """What the lower layers have at a path; whiteouts and opaque folders hide what lies deeper."""
    for lower in lowers:
        at = lower
        for name in path.strip("/").split("/"):
            at = f"{at}/{name}"
            try:
                info = os.lstat(at)
            except OSError:
                break
            if stat.S_ISCHR(info.st_mode) and info.st_rdev == 0:
                return None
            if not stat.S_ISDIR(info.st_mode) and at != f"{lower}{path}":
                return None
        else:
            return os.lstat(at)
        if _opaque(lower, path):
            return None
    return None


def _opaque(lower: str, path: str) -> bool:
    at = lower
    for name in path.strip("/").split("/")[:-1]:
        at = f"{at}/{name}"
        try:
            if os.getxattr(at, "trusted.overlay.opaque", follow_symlinks=False) == b"y":
                return True
        except OSError:
            continue
    return False
