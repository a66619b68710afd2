"""The container's file system as system calls for init: targets, mounts, devices, masks, the change of root.

Runs in: the runtime; what it writes is carried out by init, in the container's mount namespace, before the root changes
(except where said otherwise).
Spec: runtime-spec 1.3.0, config.md "Mounts", config-linux.md "Default Devices", "Masked Paths", "Readonly Paths".

One rule makes the whole safe from a hostile root file system: a path of the container is resolved exactly once, by openat2(2)
with RESOLVE_IN_ROOT below the root's descriptor, and everything after that is done to the descriptor. Nothing is created
through a symbolic link. (CVE-2019-19921, CVE-2021-30465, CVE-2024-45310, CVE-2025-31133, CVE-2025-52881, CVE-2026-41579.)

Not here: the order of it all, which is the story in `boxship.runtime.init`.
"""

from __future__ import annotations

import errno
import os
import stat

from boxship.abi import mount as m
from boxship.abi import syscalls as sc
from boxship.kit.errors import BoxshipError, InvalidArgument
from boxship.linux import mounts
from boxship.linux.remote import NEXT, Label, Program, Reg, received

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from boxship.linux.remote import Remote
    from boxship.oci.config import Device, Mount

_RESOLVE = m.RESOLVE_IN_ROOT | m.RESOLVE_NO_MAGICLINKS

# Files that lxcfs and its like put over entries of /proc; everything else below it stays the kernel's.
_PROC_EXCEPTIONS = frozenset(
    (
        "proc/cpuinfo", "proc/diskstats", "proc/meminfo", "proc/stat", "proc/swaps", "proc/uptime", "proc/loadavg",
        "proc/slabinfo", "proc/sys/kernel/ns_last_pid", "proc/sys/crypto/fips_enabled",
    )
)

# (name below /dev, minor, major, mode): the spec's default devices.
DEFAULT_DEVICES = (
    ("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0),
)

_STATX_MODE, _STATX_RDEV = 28, 128  # offsets in struct statx
_STATFS_SIZE = 120
_STATX_BASIC = 0x7FF


def inside(path: str) -> str:
    """A path of the container, relative to its root: "/a/../b//c" is "b/c", the root itself is ""."""
    return os.path.normpath("/" + path).lstrip("/")


class Source:
    """Where a bind mount comes from, as the runtime sees it before init begins.

    Attributes:
        path: absolute path on the host.
        is_dir: decides what a missing target is made as.
        received: which of the descriptors sent along is the detached mount that the runtime made; None when there is none.
        shifted: whether it must be that one, since its ids are mapped; otherwise it is for when init cannot reach the path.
        is_proc: whether it lies in a procfs.
    """

    __slots__ = ("is_dir", "is_proc", "path", "received", "shifted")

    def __init__(self, path: str, *, is_dir: bool, is_proc: bool, shifted: bool = False) -> None:
        self.path = path
        self.shifted = shifted
        self.is_dir = is_dir
        self.is_proc = is_proc
        self.received: int | None = None


class Rootfs:
    """Appends the operations for one container's file system to a program."""

    def __init__(self, program: Program, root: Reg, rootfs: str, *, perform: Callable[[], None], label: str = "") -> None:
        """`rootfs` is the root's path on the host; `perform` carries out what was appended so far and makes a new program
        current: see `use`.
        """
        self.p = program
        self.root = root
        self.perform = perform
        self.remote: Callable[[], Remote]
        self.userns = False
        self.rootfs = rootfs
        self.host_root = -1
        self.label = label
        self._covered: list[str] = []  # folders over which new file systems are mounted: the image has nothing to say below

    def use(self, program: Program) -> None:
        """Go on in another program; registers made by `Program.keep` live on."""
        self.p = program

    # --- paths ---------------------------------------------------------------------------------------------------

    def open(
        self, path: str, flags: int, what: str, *, on_err: int | Label = 0, resolve: int = _RESOLVE, dst: Reg | None = None
    ) -> Reg:
        """openat2 of a container path below the root."""
        register = dst or self.p.new()
        how = mounts.open_how(flags, 0, resolve)
        self.p.call(sc.OPENAT2, self.root, path or ".", how, len(how), dst=register, what=what, on_err=on_err)
        return register

    def open_existing(self, path: str, dst: Reg, absent: Label) -> None:
        """O_PATH of a container path; `absent` is jumped to when it is not there. Any other failure ends the start."""
        p = self.p
        opened = Label()
        how = mounts.open_how(m.O_PATH, 0, _RESOLVE)
        tried = p.call(sc.OPENAT2, self.root, path or ".", how, 24, dst=dst, on_ok=opened, on_err=NEXT)
        for number in (errno.ENOENT, errno.ENOTDIR):
            p.if_failed(tried, number, absent)
        p.call(sc.OPENAT2, self.root, path or ".", how, 24, dst=dst, what="open")
        p.mark(opened)

    def close(self, *registers: Reg) -> None:
        """close(2) each; descriptors of a long list of mounts must not pile up."""
        for register in registers:
            self.p.call(sc.CLOSE, register, on_err=NEXT)

    def make_directories(self, path: str, what: str, dst: Reg, *, strict: str = "") -> None:
        """Make `path` and its missing parents, each mkdirat(2) in the opened parent; leaves the last one open in `dst`.

        A missing part behind a symbolic link is made where the link leads, inside the root. `strict`: the last part must
        not be a link, and this is the complaint.
        """
        p = self.p
        if not path:
            self.open("", m.O_PATH | m.O_DIRECTORY, what, dst=dst)
            return
        parts = path.split("/")
        current = self.root
        # Two registers in turn: the parent is closed only when the child is open.
        pair = (p.new(), p.new())
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            target = dst if last else pair[i % 2]
            opened = Label()
            flags = m.O_PATH | m.O_DIRECTORY | (m.O_NOFOLLOW if last and strict else 0)
            how = mounts.open_how(flags, 0, _RESOLVE)
            p.call(sc.OPENAT2, self.root, "/".join(parts[: i + 1]), how, 24, dst=target, on_ok=opened, on_err=NEXT)
            p.call(sc.MKDIRAT, current, part, 0o755, on_err=0 if last and strict else NEXT, what=strict or what)
            how = mounts.open_how(m.O_PATH | m.O_DIRECTORY | m.O_NOFOLLOW, 0, m.RESOLVE_BENEATH | m.RESOLVE_NO_SYMLINKS)
            p.call(sc.OPENAT2, current, part, how, 24, dst=target, what=what)
            p.mark(opened)
            if current is not self.root:
                self.close(current)
            current = target

    def make_file(self, path: str, what: str, dst: Reg, mode: int = 0o644) -> None:
        """Make an empty file, and its parents, and leave it open in `dst`."""
        folder, _, name = path.rpartition("/")
        parent = self.root
        if folder:
            parent = self.p.new()
            self.make_directories(folder, what, parent)
        flags = os.O_CREAT | os.O_EXCL | m.O_NOFOLLOW | os.O_RDONLY
        how = mounts.open_how(flags, mode, m.RESOLVE_BENEATH | m.RESOLVE_NO_SYMLINKS)
        self.p.call(sc.OPENAT2, parent, name, how, 24, dst=dst, what=what)
        if folder:
            self.close(parent)

    def close_host(self) -> None:
        """Close the parent's own view of the root."""
        if self.host_root >= 0:
            os.close(self.host_root)
            self.host_root = -1

    def settle(self, path: str) -> str:
        """`path` with dangling symbolic links of the image replaced by where they lead: mount points are made there.

        Only text comes of it: what is made is made by init, without following links, so an image that changes meanwhile
        gains nothing.
        """
        if self.host_root < 0:
            self.host_root = os.open(self.rootfs, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.close(mounts.openat2(self.host_root, path or ".", m.O_PATH, 0, _RESOLVE))
            return path
        except FileNotFoundError:
            pass
        except OSError:
            return path  # init meets the same obstacle, and says so
        try:
            return mounts.follow_links(self.host_root, path)
        except OSError:
            raise BoxshipError(f"{self.p.context}too many levels of symbolic links in {path}") from None

    def target(self, path: str, what: str, *, is_dir: bool) -> Reg:
        """The mount point at `path`, made when it is missing."""
        p = self.p
        register = p.new()
        there = Label()
        if not any(path.startswith(folder) for folder in self._covered):
            path = self.settle(path)
        how = mounts.open_how(m.O_PATH, 0, _RESOLVE)
        p.call(sc.OPENAT2, self.root, path, how, 24, dst=register, on_ok=there, on_err=NEXT)
        if is_dir:
            self.make_directories(path, what, register)
        else:
            self.make_file(path, what, register)
        p.mark(there)
        return register

    # --- mounts --------------------------------------------------------------------------------------------------

    def mount(self, mount: Mount, options: mounts.Options, source: Source | None) -> None:
        """One entry of `mounts`, but for cgroup file systems and tmpcopyup, which take more than a line of calls."""
        p = self.p
        path = inside(mount.destination)
        fstype = "bind" if source else (mount.type or "")
        p.context = f'error mounting "{mount.source or ""}" to rootfs at "{mount.destination}": '
        self.check_destination(mount.destination, fstype, source)
        if source is not None:
            self._bind(path, options, source)
        elif fstype in ("proc", "sysfs"):
            target = p.new()
            complaint = f'!filesystem "{fstype}" must be mounted on ordinary directory'
            self.make_directories(path, "make mountpoint", target, strict=complaint)
            self.attach(self.new_filesystem(fstype, mount.source or fstype, options), target, options)
            self._covered.append(path + "/")
        else:
            self._other(path, fstype, mount.source or fstype, options)
            if fstype == "tmpfs":
                self._covered.append(path + "/")
        p.context = ""

    def check_destination(self, destination: str, fstype: str, source: Source | None) -> None:
        """Refuse mounts over the root, over /proc and below it, but for procfs itself and the files that lxcfs emulates."""
        path = inside(destination)
        if not path:
            raise BoxshipError(f'{self.p.context}mountpoint "{destination}" is on the top of rootfs')
        if path == "proc":
            if fstype != "proc" and not (source and source.is_proc):
                raise InvalidArgument(f'{self.p.context}"/proc" cannot be mounted because it is not of type proc')
        elif path.startswith("proc/") and path not in _PROC_EXCEPTIONS:
            raise InvalidArgument(f'{self.p.context}"/{path}" cannot be mounted because it is inside /proc')

    def not_in_proc(self, path: str, target: Reg) -> None:
        """Refuse a mount point inside /proc that the image's links led to."""
        # The text of the path says nothing where the image has symbolic links: ask the descriptor.
        if path in _PROC_EXCEPTIONS or path == "proc":
            return
        buffer = self.p.place(bytes(_STATFS_SIZE))
        self.p.point(self.p.call(sc.FSTATFS, target, 0, what="check mountpoint"), 1, buffer)
        self.p.expect(
            buffer, m.PROC_SUPER_MAGIC, differs=True, error=errno.EPERM,
            what=f'!"/{path}" cannot be mounted because it is inside /proc',
        )

    def new_filesystem(self, fstype: str, source: str, options: mounts.Options) -> Reg:
        """fsopen … fsmount: a detached mount."""
        p = self.p
        context, mounted = p.new(), p.new()
        p.call(sc.FSOPEN, fstype, m.FSOPEN_CLOEXEC, dst=context, what="fsopen")
        p.call(sc.FSCONFIG, context, m.FSCONFIG_SET_STRING, "source", source, 0, what="set source")
        for flag, key in mounts.SUPERBLOCK:
            if options.flags & flag:
                p.call(sc.FSCONFIG, context, m.FSCONFIG_SET_FLAG, key, 0, 0, what=f"set option {key}")
        data = mounts.split_data(options.data)
        if self.label and fstype not in ("proc", "sysfs", "mqueue", "cgroup", "cgroup2"):
            data.append(("context", self.label))
        for key, value in data:
            if value is None:
                p.call(sc.FSCONFIG, context, m.FSCONFIG_SET_FLAG, key, 0, 0, what=f"set option {key}")
            else:
                p.call(sc.FSCONFIG, context, m.FSCONFIG_SET_STRING, key, value, 0, what=f"set option {key}={value}")
        p.call(sc.FSCONFIG, context, m.FSCONFIG_CMD_CREATE, 0, 0, 0, what="create file system")
        flags = options.flags
        if fstype == "tmpfs":
            flags &= ~m.MS_RDONLY  # others still put things into it; `read_only` makes up for it
        p.call(sc.FSMOUNT, context, m.FSMOUNT_CLOEXEC, mounts.mount_attributes(flags), dst=mounted, what="fsmount")
        self.close(context)
        return mounted

    def attach(self, mounted: Reg, target: Reg, options: mounts.Options) -> None:
        """Put a detached mount onto an opened mount point, give it its propagation, and close both."""
        p = self.p
        p.call(
            sc.MOVE_MOUNT, mounted, "", target, "", m.MOVE_MOUNT_F_EMPTY_PATH | m.MOVE_MOUNT_T_EMPTY_PATH, what="move_mount"
        )
        for flag in options.propagation:
            self.set_attributes(mounted, what="set propagation", recursive=bool(flag & m.MS_REC), propagation=flag & ~m.MS_REC)
        if options.recursive_set or options.recursive_clear:
            self.set_attributes(
                mounted, what="mount_setattr", recursive=True, attr_set=options.recursive_set,
                attr_clr=options.recursive_clear,
            )
        self.close(mounted, target)

    def set_attributes(
        self, mounted: Reg, *, what: str, recursive: bool = False, attr_set: int = 0, attr_clr: int = 0, propagation: int = 0,
        on_err: int | Label = 0, on_ok: Label | None = None,
    ) -> None:
        """mount_setattr(2) on an open mount."""
        flags = m.AT_EMPTY_PATH | (m.AT_RECURSIVE if recursive else 0)
        attr = mounts.mount_attr(attr_set, attr_clr, propagation)
        self.p.call(sc.MOUNT_SETATTR, mounted, "", flags, attr, len(attr), what=what, on_err=on_err, on_ok=on_ok)

    def _other(self, path: str, fstype: str, source: str, options: mounts.Options) -> None:
        p = self.p
        if fstype != "tmpfs" or any(key == "mode" for key, _ in mounts.split_data(options.data)):
            target = self.target(path, "create mountpoint", is_dir=True)
            self.not_in_proc(path, target)
            self.attach(self.new_filesystem(fstype, source, options), target, options)
            return
        # A tmpfs over a directory that was there has that directory's permissions.
        target = p.new()
        missing = Label()
        buffer = p.place(bytes(256))
        how = mounts.open_how(m.O_PATH, 0, _RESOLVE)
        p.call(sc.OPENAT2, self.root, path, how, 24, dst=target, on_err=missing)
        p.point(p.call(sc.STATX, target, "", m.AT_EMPTY_PATH, _STATX_BASIC, 0, what="stat mountpoint"), 4, buffer)
        self.close(target)
        p.mark(missing)
        context = p.context
        self.perform()
        mode = int.from_bytes(self.remote().data(buffer + _STATX_MODE, 2), "little") & 0o7777
        p = self.p
        p.context = context
        target = self.target(path, "create mountpoint", is_dir=True)
        self.not_in_proc(path, target)
        if mode:
            options.data.insert(0, f"mode={mode:04o}")
        self.attach(self.new_filesystem(fstype, source, options), target, options)

    def _bind(self, path: str, options: mounts.Options, source: Source) -> None:
        p = self.p
        recursive = m.AT_RECURSIVE if options.flags & m.MS_REC else 0
        mounted = p.new()
        opened, closed = Label(), Label()
        if not source.shifted:
            flags = m.OPEN_TREE_CLONE | m.OPEN_TREE_CLOEXEC | recursive
            p.call(
                sc.OPEN_TREE, m.AT_FDCWD, source.path, flags, dst=mounted, what=f"open source {source.path}", on_ok=opened,
                on_err=closed if source.received is not None else 0,
            )
        p.mark(closed)
        if source.received is not None:
            p.call(sc.FCNTL, received(source.received), 1030, 3, dst=mounted, what="dup")
        p.mark(opened)
        if source.received is not None:
            self.close(received(source.received))
        target = self.target(path, "create mountpoint", is_dir=source.is_dir)
        self.not_in_proc(path, target)
        self._bind_flags(mounted, options)
        self.attach(mounted, target, options)

    def _bind_flags(self, mounted: Reg, options: mounts.Options) -> None:
        # With any option at all the flags are those asked for and no others, as `mount --bind -o …` has it; without one
        # the source's stay. Access times stay unless a mode is asked for by name (as mount(2) has it, asking for one to be
        # off is not enough). Flags that a user namespace has locked stay too, unless their clearing was asked for.
        wanted, cleared = options.flags & ~(m.MS_BIND | m.MS_REC | m.MS_REMOUNT | m.MS_SILENT), options.cleared
        if not wanted and not cleared:
            return
        attr_set = mounts.mount_attributes(wanted)
        access = (m.MOUNT_ATTR__ATIME | m.MOUNT_ATTR_NODIRATIME) if wanted & (mounts.ATIME | m.MS_NODIRATIME) else 0
        clearable = mounts.CLEARABLE & ~m.MOUNT_ATTR_NODIRATIME | access
        done = Label()
        self.set_attributes(
            mounted, what="", attr_set=attr_set, on_err=NEXT, on_ok=done, attr_clr=clearable & ~(attr_set & ~m.MOUNT_ATTR__ATIME)
        )
        named = mounts.mount_attributes(cleared) & mounts.CLEARABLE & ~m.MOUNT_ATTR_NODIRATIME
        self.set_attributes(
            mounted, what="failed to set user-requested vfs flags on bind-mount: cannot clear locked flags",
            attr_set=attr_set, attr_clr=(named | m.MOUNT_ATTR_NOSYMFOLLOW | access) & ~(attr_set & ~m.MOUNT_ATTR__ATIME),
        )
        self.p.mark(done)

    def read_only(self, path: str) -> None:
        """Make the mount at `path` read-only: what `ro` on a tmpfs or on /dev was put off for."""
        mounted = self.open(inside(path), m.O_PATH, f"remount {path} read-only")
        self.set_attributes(mounted, what=f"remount {path} read-only", attr_set=m.MOUNT_ATTR_RDONLY)
        self.close(mounted)

    def hide_host(self, rootfs: str) -> None:
        """Take away every procfs and sysfs outside the root: without pivot_root(2) the host's tree stays below.

        The kernel lets a user namespace mount a procfs where another one is wholly visible, even one that cannot be reached.
        """
        p = self.p
        for point in mounts.mount_points("proc", "sysfs"):
            if point == rootfs or point.startswith(rootfs + "/"):
                continue
            gone = Label()
            p.call(sc.MOUNT, 0, point, 0, m.MS_SLAVE | m.MS_REC, 0, on_err=NEXT)
            p.call(sc.UMOUNT2, point, m.MNT_DETACH, on_ok=gone, on_err=NEXT)
            # Locked in place by another user namespace: then something goes over it.
            p.call(sc.MOUNT, "tmpfs", point, "tmpfs", 0, 0, what=f"hide {point}")
            p.mark(gone)

    # --- cgroup file systems -------------------------------------------------------------------------------------

    def cgroup_v1(self, mount: Mount, options: mounts.Options, hierarchies: list[tuple[str, str, str]], *, own_ns: bool) -> None:
        """A tmpfs with one mount per hierarchy, and links for the controllers that share one.

        `hierarchies`: (folder name, options, the container's directory on the host). With a cgroup namespace each is
        mounted anew and shows the container's cgroup as its root; without, the container's directories are bound.
        """
        p = self.p
        path = inside(mount.destination)
        p.context = f'error mounting "{mount.source or "cgroup"}" to rootfs at "{mount.destination}": '
        self.check_destination(mount.destination, "cgroup", None)
        plain = mounts.parse_options(["nosuid", "noexec", "nodev", "mode=755"])
        plain.propagation = options.propagation
        self._other(path, "tmpfs", "tmpfs", plain)
        folder = self.open(path, m.O_PATH | m.O_DIRECTORY, "open mountpoint")
        inner = mounts.open_how(m.O_PATH | m.O_DIRECTORY | m.O_NOFOLLOW, 0, m.RESOLVE_BENEATH | m.RESOLVE_NO_SYMLINKS)
        for name, data, directory in hierarchies:
            target = p.new()
            p.call(sc.MKDIRAT, folder, name, 0o755, what="create mountpoint")
            p.call(sc.OPENAT2, folder, name, inner, 24, dst=target, what="create mountpoint")
            if own_ns:
                entry = mounts.parse_options(["nosuid", "noexec", "nodev", data])
                entry.flags |= options.flags & m.MS_RDONLY
                mounted = self.new_filesystem("cgroup", "cgroup", entry)
            else:
                entry = mounts.parse_options([])
                entry.propagation = options.propagation
                mounted = p.new()
                flags = m.OPEN_TREE_CLONE | m.OPEN_TREE_CLOEXEC | m.AT_RECURSIVE
                p.call(sc.OPEN_TREE, m.AT_FDCWD, directory, flags, dst=mounted, what=f"open source {directory}")
                self._bind_flags(mounted, options)
            self.attach(mounted, target, entry)
            if "," in name:
                for alias in name.split(","):
                    p.call(sc.SYMLINKAT, name, folder, alias, what=f"link {alias}", on_err=NEXT)
        self.close(folder)
        if options.flags & m.MS_RDONLY:
            self.read_only(mount.destination)
        p.context = ""

    def cgroup_v2(self, mount: Mount, options: mounts.Options, fallback: str, machine_options: list[str]) -> None:
        """cgroup2, or where the kernel refuses (a user namespace without a cgroup namespace) `fallback` bound read as asked.

        `machine_options`: what the machine's own mount has and must keep; empty for a cgroup namespace, which cannot change it.
        """
        p = self.p
        path = inside(mount.destination)
        p.context = f'error mounting "{mount.source or "cgroup"}" to rootfs at "{mount.destination}": '
        self.check_destination(mount.destination, "cgroup2", None)
        target = self.target(path, "create mountpoint", is_dir=True)
        self.not_in_proc(path, target)
        context, mounted, done, refused = p.new(), p.new(), Label(), Label()
        p.call(sc.FSOPEN, "cgroup2", m.FSOPEN_CLOEXEC, dst=context, what="fsopen")
        p.call(sc.FSCONFIG, context, m.FSCONFIG_SET_STRING, "source", mount.source or "cgroup", 0, what="set source")
        for key, value in mounts.split_data(options.data):
            if value is None:
                p.call(sc.FSCONFIG, context, m.FSCONFIG_SET_FLAG, key, 0, 0, on_err=NEXT)
        for key in machine_options:
            p.call(sc.FSCONFIG, context, m.FSCONFIG_SET_FLAG, key, 0, 0, on_err=NEXT)
        p.call(sc.FSCONFIG, context, m.FSCONFIG_CMD_CREATE, 0, 0, 0, on_err=refused)
        attributes = mounts.mount_attributes(options.flags)
        p.call(sc.FSMOUNT, context, m.FSMOUNT_CLOEXEC, attributes, dst=mounted, on_ok=done, on_err=refused)
        p.mark(refused)
        flags = m.OPEN_TREE_CLONE | m.OPEN_TREE_CLOEXEC | m.AT_RECURSIVE
        p.call(sc.OPEN_TREE, m.AT_FDCWD, fallback, flags, dst=mounted, what=f"open source {fallback}")
        self._bind_flags(mounted, options)
        p.mark(done)
        self.close(context)
        self.attach(mounted, target, options)
        p.context = ""

    # --- /dev ----------------------------------------------------------------------------------------------------

    def devices(self, devices: list[Device], *, kcore: bool) -> None:
        """The default devices and links, then the configured devices."""
        p = self.p
        p.context = "error creating device nodes: "
        dev = p.keep()
        self.make_directories("dev", "open /dev", dev)
        for name, major, minor in DEFAULT_DEVICES:
            self._node(dev, name, f"/dev/{name}", stat.S_IFCHR | 0o666, os.makedev(major, minor), 0, 0)
        for device in devices:
            self._device(device)
        p.context = "error setting up ptmx: "
        p.call(sc.UNLINKAT, dev, "ptmx", 0, on_err=NEXT)
        p.call(sc.SYMLINKAT, "pts/ptmx", dev, "ptmx", what="symlink")
        p.context = ""
        links = [("/proc/self/fd", "fd")]
        links += [(f"/proc/self/fd/{number}", name) for number, name in enumerate(("stdin", "stdout", "stderr"))]
        if kcore:
            links.append(("/proc/kcore", "core"))
        for to, name in links:
            p.call(sc.SYMLINKAT, to, dev, name, on_err=NEXT)
        self.close(dev)

    def _device(self, device: Device) -> None:
        path = inside(device.path)
        if not path or path == "dev/ptmx":
            return
        kinds = {"c": stat.S_IFCHR, "u": stat.S_IFCHR, "b": stat.S_IFBLK, "p": stat.S_IFIFO}
        mode = kinds[device.type] | (0o666 if device.file_mode is None else device.file_mode & 0o7777)
        number = 0 if device.type == "p" else os.makedev(device.major or 0, device.minor or 0)
        folder, _, name = path.rpartition("/")
        parent = self.p.new()
        if folder:
            self.make_directories(folder, f'mkdir parent of device inode "{device.path}"', parent)
        else:
            self.open("", m.O_PATH | m.O_DIRECTORY, "open root", dst=parent)
        self._node(parent, name, device.path, mode, number, device.uid or 0, device.gid or 0)
        self.close(parent)

    def _node(self, folder: Reg, name: str, host: str, mode: int, number: int, uid: int, gid: int) -> None:
        p = self.p
        done, bind = Label(), Label()
        if not self.userns:
            made = Label()
            p.call(sc.MKNODAT, folder, name, mode, number, on_ok=made, on_err=NEXT)
            # There already: an image's own, or a device listed twice. Refused: a runtime inside a container.
            node = p.new()
            how = mounts.open_how(m.O_PATH | m.O_NOFOLLOW, 0, 0)
            p.call(sc.OPENAT2, folder, name, how, 24, dst=node, on_ok=done, on_err=bind)
            p.mark(made)
            # umask is 0 in init; the owner alone is left to set.
            if uid or gid:
                p.call(sc.FCHOWNAT, folder, name, uid, gid, m.AT_SYMLINK_NOFOLLOW, what=f"chown {host}")
            p.jump(done)
        p.mark(bind)
        # A user namespace may not make device nodes: the host's is bound over an empty file.
        source, target = p.new(), p.new()
        flags = m.OPEN_TREE_CLONE | m.OPEN_TREE_CLOEXEC
        p.call(sc.OPEN_TREE, m.AT_FDCWD, host, flags, dst=source, what=f"open device {host}")
        # O_NONBLOCK: an image may have a FIFO there.
        how = mounts.open_how(os.O_CREAT | m.O_NOFOLLOW | os.O_NONBLOCK, 0o644, m.RESOLVE_BENEATH | m.RESOLVE_NO_SYMLINKS)
        p.call(sc.OPENAT2, folder, name, how, 24, dst=target, what=f"create device inode {host}")
        p.call(
            sc.MOVE_MOUNT, source, "", target, "", m.MOVE_MOUNT_F_EMPTY_PATH | m.MOVE_MOUNT_T_EMPTY_PATH,
            what=f"bind device {host}",
        )
        self.close(source, target)
        p.mark(done)

    # --- masks ---------------------------------------------------------------------------------------------------

    def masks(self, paths: list[str], null: Reg) -> None:
        """Hide `paths`: a file under `null` (the host's, opened before the root changed), a directory under an empty tmpfs."""
        p = self.p
        cover, copy, target = p.keep(), p.new(), p.new()
        p.context = "can't mask paths: "
        options = mounts.parse_options(["ro", "nr_blocks=1", "nr_inodes=1"])
        made = self.new_filesystem("tmpfs", "tmpfs", options)
        p.call(sc.FCNTL, made, 1030, 3, dst=cover, what="dup")
        self.close(made)
        self.set_attributes(cover, what="read-only", attr_set=m.MOUNT_ATTR_RDONLY)
        clone = m.OPEN_TREE_CLONE | m.OPEN_TREE_CLOEXEC | m.AT_EMPTY_PATH
        onto = m.MOVE_MOUNT_F_EMPTY_PATH | m.MOVE_MOUNT_T_EMPTY_PATH
        # Before Linux 6.15 a detached mount cannot be copied: then each mask is a file system of its own.
        shared = mounts.kernel_version() >= (6, 15)
        for path in dict.fromkeys(inside(path) for path in paths):
            p.context = f'can\'t mask path "/{path}": '
            done, plain, put = Label(), Label(), Label()
            how = mounts.open_how(m.O_PATH | m.O_DIRECTORY, 0, _RESOLVE)
            p.call(sc.OPENAT2, self.root, path or ".", how, 24, dst=target, on_err=plain)
            if shared:
                p.call(sc.OPEN_TREE, cover, "", clone, dst=copy, what="copy mask", on_ok=put)
            else:
                own = self.new_filesystem("tmpfs", "tmpfs", options)
                self.set_attributes(own, what="read-only", attr_set=m.MOUNT_ATTR_RDONLY)
                p.call(sc.FCNTL, own, 1030, 3, dst=copy, what="dup")
                self.close(own)
                p.jump(put)
            p.mark(plain)
            # Not a directory, or not there: only the second open tells.
            self.open_existing(path, target, done)
            p.call(sc.OPEN_TREE, null, "", clone, dst=copy, what="copy mask")
            p.mark(put)
            p.call(sc.MOVE_MOUNT, copy, "", target, "", onto, what="move_mount")
            self.close(copy, target)
            p.mark(done)
        p.context = ""
        self.close(cover)

    def read_only_paths(self, paths: list[str]) -> None:
        """Bind each path onto itself, read-only; what is not there is skipped."""
        p = self.p
        target, copy = p.new(), p.new()
        onto = m.MOVE_MOUNT_F_EMPTY_PATH | m.MOVE_MOUNT_T_EMPTY_PATH
        clone = m.OPEN_TREE_CLONE | m.OPEN_TREE_CLOEXEC | m.AT_EMPTY_PATH | m.AT_RECURSIVE
        for path in dict.fromkeys(inside(path) for path in paths):
            p.context = f'can\'t make "/{path}" read-only: '
            done = Label()
            self.open_existing(path, target, done)
            p.call(sc.OPEN_TREE, target, "", clone, dst=copy, what="open_tree")
            self.set_attributes(copy, what="mount_setattr", attr_set=m.MOUNT_ATTR_RDONLY)
            p.call(sc.MOVE_MOUNT, copy, "", target, "", onto, what="move_mount")
            self.close(copy, target)
            p.mark(done)
        p.context = ""

    # --- the root ------------------------------------------------------------------------------------------------

    def take_root(self, rootfs: str, propagation: int) -> None:
        """Cut the namespace off from the host's mounts, and make `rootfs` a mount of its own, open in the root register."""
        p = self.p
        p.context = "error preparing rootfs: "
        p.call(sc.MOUNT, 0, "/", 0, propagation or (m.MS_SLAVE | m.MS_REC), 0, what="set propagation of /")
        # The mount that holds rootfs must not be shared: pivot_root(2) refuses it, and the new mount would appear on the
        # host. Which mount that is only the kernel knows: EINVAL means "not a mount point", so try upwards.
        done = Label()
        kind = m.MS_SLAVE if propagation & m.MS_SLAVE else m.MS_PRIVATE
        path = rootfs
        while path != "/":
            p.call(sc.MOUNT, 0, path, 0, kind, 0, on_ok=done, on_err=NEXT)
            path = os.path.dirname(path)
        p.call(sc.MOUNT, 0, "/", 0, kind, 0, what="set propagation of /")
        p.mark(done)
        flags = m.OPEN_TREE_CLONE | m.OPEN_TREE_CLOEXEC | m.AT_RECURSIVE
        p.call(sc.OPEN_TREE, m.AT_FDCWD, rootfs, flags, dst=self.root, what=f"open {rootfs}")
        p.call(sc.MOVE_MOUNT, self.root, "", m.AT_FDCWD, rootfs, m.MOVE_MOUNT_F_EMPTY_PATH, what=f"mount {rootfs}")
        p.context = ""

    def change_root(self, *, pivot: bool, rootfs: str = "", has_mount_ns: bool = True) -> None:
        """Make the root register's directory "/", with nothing of the host's tree left."""
        p = self.p
        p.context = "error jailing process inside rootfs: "
        old = p.new()
        p.call(sc.OPENAT, m.AT_FDCWD, "/", m.O_PATH | m.O_DIRECTORY | m.O_CLOEXEC, dst=old, what="open /")
        p.call(sc.FCHDIR, self.root, what="fchdir to rootfs")
        if not has_mount_ns:
            p.call(sc.CHROOT, ".", what="chroot")
        elif pivot:
            # pivot_root(".", ".") stacks the old root on the new one; no directory for it is needed.
            p.call(sc.PIVOT_ROOT, ".", ".", what="pivot_root")
            p.call(sc.FCHDIR, old, what="fchdir to old root")
            p.call(sc.MOUNT, 0, ".", 0, m.MS_SLAVE | m.MS_REC, 0, what="detach old root from the host")
            p.call(sc.UMOUNT2, ".", m.MNT_DETACH, what="unmount old root")
        else:
            p.call(sc.MOUNT, rootfs, "/", 0, m.MS_MOVE, 0, what="move rootfs")
            p.call(sc.CHROOT, ".", what="chroot")
        p.call(sc.CHDIR, "/", what="chdir to /")
        self.close(old)
        p.context = ""
