"""What of a mount only the parent can do: look at sources on the host, shift their ids, copy a directory up into a tmpfs.

Runs in: the runtime, between two programs of init.
Spec: runtime-spec 1.3.0, config.md "Mounts" (idmap, ridmap, tmpcopyup); mount_setattr(2) MOUNT_ATTR_IDMAP (Linux ≥ 5.12).
"""

from __future__ import annotations

import os
import stat

from boxship.abi import mount as m
from boxship.abi import syscalls as sc
from boxship.kit.errors import BoxshipError
from boxship.linux import _sys, mounts
from boxship.linux.remote import NEXT, Program
from boxship.runtime.rootfs import Source, inside

TYPE_CHECKING = False
if TYPE_CHECKING:
    from boxship.oci.config import Mount
    from boxship.runtime.init import Story


def open_source(story: Story, mount: Mount, options: mounts.Options) -> tuple[Source, int]:
    """The source of a bind mount, and the detached mount for init to attach, or -1 where init opens the path itself.

    The parent opens it where ids are shifted, and for a user namespace whose root may not reach the path (but not when
    rootless: then the parent may no more than init).
    """
    where = f'error during container init: error mounting "{mount.source}" to rootfs at "{mount.destination}": '
    path = os.path.normpath(os.path.join(story.bundle, mount.source))
    if not mount.source:
        raise BoxshipError(where + "a bind mount needs a source")
    # Below the root file system an earlier mount may be what is meant: only init sees it.
    inner = path == story.rootfs or path.startswith(story.rootfs + "/")
    try:
        mode = _mode_in_container(story, path) if inner else os.stat(path).st_mode
    except OSError as error:
        raise BoxshipError(f"{where}stat {path}: {(error.strerror or '').lower()}") from None
    is_proc = inside(mount.destination) == "proc" and _file_system(path) == m.PROC_SUPER_MAGIC
    shifted = bool(mount.uid_mappings or mount.gid_mappings or options.idmap)
    source = Source(path, is_dir=stat.S_ISDIR(mode), is_proc=is_proc, shifted=shifted)
    if not shifted and (inner or not story.userns or story.rootless):
        return source, -1
    recursive = m.AT_RECURSIVE if options.flags & m.MS_REC else 0
    try:
        if inner:
            fd = _opened_in_container(story, path, m.OPEN_TREE_CLONE | recursive)
        else:
            fd = mounts.open_tree(m.AT_FDCWD, path, m.OPEN_TREE_CLONE | recursive)
            # As a bind mount made by init is: events come in from the host, none go out.
            mounts.mount_setattr(fd, recursive=True, propagation=m.MS_SLAVE)
    except OSError as error:
        raise BoxshipError(f"{where}open_tree {path}: {(error.strerror or '').lower()}") from None
    if shifted:
        userns = _userns_of(story, mount)
        try:
            mounts.mount_setattr(fd, recursive=options.idmap == "ridmap", attr_set=m.MOUNT_ATTR_IDMAP, userns_fd=userns)
        except OSError as error:
            os.close(fd)
            raise BoxshipError(
                f"{where}failed to set MOUNT_ATTR_IDMAP on {path}: {os.strerror(error.errno or 0).lower()}"
                " (maybe the filesystem used doesn't support idmap mounts on this kernel?)"
            ) from None
        finally:
            os.close(userns)
    return source, fd


def _mode_in_container(story: Story, path: str) -> int:
    """st_mode of a host path as init sees it now. Raises OSError."""
    p = story.p
    buffer = p.place(bytes(256))
    index = p.call(sc.STATX, m.AT_FDCWD, path, 0, 0x7FF, 0, on_err=NEXT)
    p.point(index, 4, buffer)
    story.perform()
    result = story.remote.result(index)
    if result < 0:
        raise OSError(-result, os.strerror(-result), path)
    return int.from_bytes(story.remote.data(buffer + 28, 2), "little")


def _opened_in_container(story: Story, path: str, flags: int) -> int:
    """open_tree(2) by init; the descriptor comes here. Raises OSError (RemoteError)."""
    p = story.p
    fd = p.new()
    p.call(sc.OPEN_TREE, m.AT_FDCWD, path, flags | m.OPEN_TREE_CLOEXEC, dst=fd, what=f"open_tree {path}")
    p.send_descriptor(fd, "send the source")
    story.fs.close(fd)
    story.perform()
    return story.remote.descriptors.pop()


def _file_system(path: str) -> int:
    buffer = bytearray(120)
    _sys.syscall(sc.STATFS, os.fsencode(path) + b"\0", buffer)
    return int.from_bytes(buffer[:8], "little")


def _userns_of(story: Story, mount: Mount) -> int:
    """A descriptor of the user namespace whose id maps the mount shall have."""
    if not mount.uid_mappings:
        # The container's own: that of init, which has it by now.
        story.perform()
        return os.open(f"/proc/{story.remote.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    from boxship.linux.idmaps import write_id_maps

    # A namespace exists as long as something holds it: a process of its own makes it, and leaves us the descriptor.
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    helper = story.context.parent.spawn(story.executor, "boxrun-userns", [null] * 3, 0)
    os.close(null)
    try:
        p = Program()
        p.call(sc.UNSHARE, 0x10000000, what="unable to unshare the user namespace")  # CLONE_NEWUSER
        p.end()
        helper.run(p)
        write_id_maps(
            helper.pid, [(x.container_id, x.host_id, x.size) for x in mount.uid_mappings],
            [(x.container_id, x.host_id, x.size) for x in mount.gid_mappings], deny_setgroups=False,
        )
        return os.open(f"/proc/{helper.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        helper.close()
        story.context.parent.wait(helper.pid)


def copy_up(story: Story, mount: Mount, options: mounts.Options) -> None:
    """A tmpfs that begins with what the directory below it holds (tmpcopyup).

    Init makes the tmpfs and shows the parent both directories; the parent copies, through descriptors and without
    following any link, and init attaches the result.
    """
    p = story.p
    fs = story.fs
    path = inside(mount.destination)
    p.context = f'error mounting "{mount.source or ""}" to rootfs at "{mount.destination}": tmpcopyup: '
    fs.check_destination(mount.destination, "tmpfs", None)
    target, mounted = p.keep(), p.keep()
    opened = fs.target(path, "create mountpoint", is_dir=True)
    fs.not_in_proc(path, opened)
    p.call(sc.FCNTL, opened, 1030, 3, dst=target, what="dup")
    fs.close(opened)
    made = fs.new_filesystem("tmpfs", mount.source or "tmpfs", options)
    p.call(sc.FCNTL, made, 1030, 3, dst=mounted, what="dup")
    fs.close(made)
    p.send_descriptor(target, "send the directory")
    p.send_descriptor(mounted, "send the tmpfs")
    story.perform()
    source, destination = story.remote.descriptors[-2:]
    del story.remote.descriptors[-2:]
    try:
        _copy_directory(_reopen(source), _reopen(destination), own_mode=not any(o.startswith("mode=") for o in options.data))
    except RecursionError:
        raise BoxshipError(f"{p.context}failed to copy {mount.destination}: too many levels of directories") from None
    except OSError as error:
        raise BoxshipError(f"{p.context}failed to copy {mount.destination}: {error}") from error
    finally:
        os.close(source)
        os.close(destination)
    story.p.context = p.context
    fs.attach(mounted, target, options)
    story.p.context = ""


def _reopen(fd: int) -> int:
    return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)


def _copy_directory(source: int, destination: int, *, own_mode: bool = True) -> None:
    """Copy the contents and attributes of a directory; takes both descriptors."""
    try:
        with os.scandir(source) as entries:
            for entry in entries:
                _copy_entry(entry.name, source, destination)
        _copy_attributes(os.fstat(source), destination, own_mode=own_mode)
    finally:
        os.close(source)
        os.close(destination)


def _copy_entry(name: str, source: int, destination: int) -> None:
    info = os.stat(name, dir_fd=source, follow_symlinks=False)
    kind = stat.S_IFMT(info.st_mode)
    if kind == stat.S_IFDIR:
        os.mkdir(name, 0o700, dir_fd=destination)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        _copy_directory(os.open(name, flags, dir_fd=source), os.open(name, flags, dir_fd=destination))
    elif kind == stat.S_IFREG:
        read = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=source)
        write = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=destination)
        try:
            # Not copy_file_range(2), which refuses to copy from one kind of file system to another.
            while os.sendfile(write, read, None, 1 << 24):
                pass
            _copy_attributes(info, write)
        finally:
            os.close(read)
            os.close(write)
    elif kind == stat.S_IFLNK:
        os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=destination)
        os.chown(name, info.st_uid, info.st_gid, dir_fd=destination, follow_symlinks=False)
    else:
        os.mknod(name, info.st_mode, info.st_rdev, dir_fd=destination)
        os.chown(name, info.st_uid, info.st_gid, dir_fd=destination, follow_symlinks=False)


def _copy_attributes(info: os.stat_result, fd: int, *, own_mode: bool = True) -> None:
    os.fchown(fd, info.st_uid, info.st_gid)
    if own_mode:
        os.fchmod(fd, stat.S_IMODE(info.st_mode))
    os.utime(fd, ns=(info.st_atime_ns, info.st_mtime_ns))
