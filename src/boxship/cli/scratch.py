"""The folder of one run: what the container writes goes there, and goes away with it.

Runs in: the boxship command.

    BASE/                    0700; the first of `bases` that can carry an overlay's upper layer
      ID/                    flock(2)ed by the boxship that runs the container
        rootfs/              the skeleton of the root: mount points, links, generated files
        lower/N              links to the folders that the machine or an image gives; their names need no escaping
        upper/N, work/N      what the container changes in them

Lock order: BASE (shared) is held from before ID/ is made until ID/ is locked; a sweep holds BASE (exclusive), so that it never
takes a folder that is being made.

The mounts on all this exist in the container's mount namespace only, so a killed boxship leaves a folder and nothing else, and
the next run removes that (`sweep`).
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from sys import byteorder

from boxship.kit.errors import BoxshipError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

# File systems that overlayfs takes no upper layer from: no d_type, no whiteouts, or no xattrs. statfs(2) f_type.
_UNFIT = frozenset((0x794C7630, 0x6969, 0x65735546, 0x4D44, 0x2011BAB0, 0xFF534D42, 0xFE534D42, 0x01021997, 0xF15F))


def bases(environ: Mapping[str, str], uid: int) -> list[str]:
    """Where scratch folders may be, the best place first.

    A disk comes before a file system in memory: what a build writes into its container can be large.
    """
    if uid == 0:
        return ["/var/lib/boxship/scratch", "/run/boxship/scratch", "/tmp/boxship-0/scratch", "/dev/shm/boxship-0/scratch"]
    found = []
    home = environ.get("HOME", "")
    data = environ.get("XDG_DATA_HOME") or (f"{home}/.local/share" if home.startswith("/") and home != "/" else "")
    if data:
        found.append(f"{data}/boxship/scratch")
    if environ.get("XDG_RUNTIME_DIR"):
        found.append(f"{environ['XDG_RUNTIME_DIR']}/boxship/scratch")
    return [*found, f"/tmp/boxship-{uid}/scratch", f"/dev/shm/boxship-{uid}/scratch"]


def prepare(path: str) -> None:
    """Make a folder of ours with its parents, 0700 all that is new; refuses one that another user could have put there.

    Raises OSError.
    """
    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    for folder in (path, os.path.dirname(path)):
        status = os.lstat(folder)
        if not stat.S_ISDIR(status.st_mode) or status.st_uid not in (0, os.geteuid()):
            raise PermissionError(errno.EPERM, "not a folder of this user", folder)


def fit(path: str) -> bool:
    """Whether a folder can carry upper layers: by file system, and free of what overlay's options cannot express."""
    try:
        prepare(path)
    except OSError:
        return False
    return carries(path)


def carries(path: str) -> bool:
    """Whether a folder that is there can carry upper layers."""
    if any(char in path for char in ',:\\"') or any(char.isspace() for char in path):
        return False
    try:
        return os.access(path, os.W_OK | os.X_OK) and filesystem_type(path) not in _UNFIT
    except OSError:
        return False


def filesystem_type(path: str) -> int:
    """statfs(2)'s f_type. Raises OSError."""
    from boxship.abi import syscalls
    from boxship.linux import _sys

    buffer = bytearray(256)
    _sys.syscall(syscalls.STATFS, os.fsencode(path) + b"\0", buffer)
    return int.from_bytes(buffer[:8], byteorder) & 0xFFFFFFFF


class Scratch:
    """The folder of one run, locked until `remove`."""

    __slots__ = ("_fd", "id", "layers", "path")

    def __init__(self, base: str, run_id: str) -> None:
        """Make BASE/ID. Raises FileExistsError when the name is taken, OSError."""
        self.id = run_id
        self.path = f"{base}/{run_id}"
        self.layers = 0
        base_fd = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(base_fd, fcntl.LOCK_SH)
            os.mkdir(self.path, 0o700)
            self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._fd, fcntl.LOCK_EX)
        finally:
            os.close(base_fd)
        for name in ("rootfs", "lower", "upper", "work"):
            os.mkdir(f"{self.path}/{name}", 0o755)

    @property
    def rootfs(self) -> str:
        """The skeleton of the root."""
        return f"{self.path}/rootfs"

    def layer(self, lower: str) -> tuple[str, str, str]:
        """Paths of lower, upper and work for an overlay over the folder `lower`; the upper has its permissions.

        The root of an overlay has the upper's attributes, so a bare mkdir would show.
        """
        number = self.layers
        self.layers += 1
        link, upper, work = (f"{self.path}/{kind}/{number}" for kind in ("lower", "upper", "work"))
        os.symlink(lower, link)
        status = os.stat(lower)
        os.mkdir(upper, 0o700)
        os.mkdir(work, 0o700)
        os.chmod(upper, stat.S_IMODE(status.st_mode))
        if os.geteuid() == 0:
            if status.st_uid or status.st_gid:
                _give(upper, status.st_uid, status.st_gid)
        elif status.st_uid != os.geteuid():
            self._own_folders(lower, upper)
        return link, upper, work

    def _own_folders(self, lower: str, upper: str, deeper: str = "local") -> None:
        # What belongs to an id that the container does not have, not even its root may change. The folders of a layer take
        # their owner from the upper one, so these, and those in local/, become the caller's: in them files can be
        # made, removed and replaced.
        with os.scandir(lower) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    own = f"{upper}/{entry.name}"
                    os.mkdir(own, 0o700)
                    os.chmod(own, stat.S_IMODE(entry.stat(follow_symlinks=False).st_mode))
                    if entry.name == deeper and os.access(entry.path, os.R_OK | os.X_OK):
                        self._own_folders(entry.path, own, "")

    def remove(self, delete_as_root: Callable[[str], None] | None = None) -> None:
        """Remove the folder. `delete_as_root` is called with its path when files of other ids of the container are left."""
        try:
            remove_tree(self.path)
        except PermissionError:
            if delete_as_root is None:
                raise
            delete_as_root(self.path)
        finally:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1


def _give(path: str, uid: int, gid: int) -> None:
    try:
        os.chown(path, uid, gid)
    except OSError as error:
        # In a user namespace that does not map the owner: the container's root owns it, as it could not otherwise.
        if error.errno not in (errno.EINVAL, errno.EPERM):
            raise


def make(places: Iterable[str], run_id: str) -> Scratch:
    """The run's folder at the first of the places that is fit. Raises BoxshipError."""
    tried = []
    for base in places:
        tried.append(base)
        if fit(base):
            return Scratch(base, run_id)
    raise BoxshipError(
        f"no place for the container's own files: tried {', '.join(tried)}",
        "one of them must be writable, and its file system neither an overlay nor a network's",
    )


def remove_tree(path: str) -> None:
    """Remove a folder with all below it, following no link. Raises PermissionError for what belongs to others."""
    _remove(os.path.basename(path), os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), owned=True)


def _remove(name: str, parent: int, *, owned: bool = False) -> None:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        try:
            folder = os.open(name, flags, dir_fd=parent)
        except FileNotFoundError:
            return
        except PermissionError:
            # Overlay's own folder has no permissions at all, and a container may take them from its folders.
            status = os.stat(name, dir_fd=parent, follow_symlinks=False)
            if not stat.S_ISDIR(status.st_mode):
                raise
            os.chmod(name, 0o700, dir_fd=parent)
            folder = os.open(name, flags, dir_fd=parent)
        try:
            with os.scandir(folder) as entries:
                names = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
            for entry, is_dir in names:
                if is_dir:
                    _remove(entry, folder)
                else:
                    _unlink(entry, folder)
        finally:
            os.close(folder)
        try:
            os.rmdir(name, dir_fd=parent)
        except FileNotFoundError:
            pass
    finally:
        if owned:
            os.close(parent)


def _unlink(name: str, folder: int) -> None:
    try:
        os.unlink(name, dir_fd=folder)
    except FileNotFoundError:
        pass
    except PermissionError:
        # A directory of ours without write permission.
        os.fchmod(folder, 0o700)
        os.unlink(name, dir_fd=folder)


def sweep(places: Iterable[str], alive: Callable[[str], bool], delete_as_root: Callable[[str], None] | None = None) -> int:
    """Remove the folders of runs whose boxship was killed and whose container is not `alive`; returns how many.

    Never waits: when another boxship is at it, that one does the work.
    """
    removed = 0
    for base in places:
        try:
            base_fd = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            names = os.listdir(base_fd)
            if not names:
                continue
            fcntl.flock(base_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for name in names:
                removed += _sweep_one(base, base_fd, name, alive, delete_as_root)
        except OSError:
            continue  # what cannot be cleaned today must not keep the next container from starting
        finally:
            os.close(base_fd)
    return removed


def _sweep_one(
    base: str, base_fd: int, name: str, alive: Callable[[str], bool], delete_as_root: Callable[[str], None] | None
) -> int:
    try:
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=base_fd)
    except OSError:
        return 0
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return 0
    else:
        if alive(name):
            return 0
        try:
            remove_tree(f"{base}/{name}")
        except PermissionError:
            if delete_as_root is None:
                return 0
            delete_as_root(f"{base}/{name}")
        return 1
    finally:
        os.close(fd)
