"""Copies a tree as it is: owners, modes, times, extended attributes, holes, hard links, devices.

Runs in: any thread. Data is shared with the original where the file system can (copy_file_range(2) on xfs and btrfs).
"""

from __future__ import annotations

import errno
import os
import stat

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def copy_tree(source: str, target: str) -> None:
    """The content of the directory `source` into the empty directory `target`, which becomes like it. Raises OSError."""
    _copy_directory(source, target, {})


def _copy_directory(source: str, target: str, links: dict[tuple[int, int], str]) -> None:
    with os.scandir(source) as entries:
        for entry in entries:
            path = f"{target}/{entry.name}"
            status = entry.stat(follow_symlinks=False)
            kind = stat.S_IFMT(status.st_mode)
            if kind == stat.S_IFDIR:
                os.mkdir(path, 0o700)
                _copy_directory(entry.path, path, links)
                continue
            key = (status.st_dev, status.st_ino)
            if status.st_nlink > 1:
                if key in links:
                    os.link(links[key], path, follow_symlinks=False)
                    continue
                links[key] = path
            if kind == stat.S_IFREG:
                _copy_file(entry.path, path)
            elif kind == stat.S_IFLNK:
                os.symlink(os.readlink(entry.path), path)
            elif kind == stat.S_IFSOCK:
                links.pop(key, None)  # no one listens at a copy
                continue
            else:
                os.mknod(path, status.st_mode, status.st_rdev)
            _like(entry.path, path, status)
    _like(source, target, os.stat(source, follow_symlinks=False))


def _copy_file(source: str, target: str) -> None:
    fd = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        new = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(new, size)
            at = 0
            while at < size:
                try:
                    start = os.lseek(fd, at, os.SEEK_DATA)
                except OSError as error:
                    if error.errno == errno.ENXIO:
                        break  # holes to the end
                    raise
                at = os.lseek(fd, start, os.SEEK_HOLE)
                while start < at:
                    copied = os.copy_file_range(fd, new, at - start, start, start)
                    if not copied:
                        return  # cut short meanwhile
                    start += copied
        finally:
            os.close(new)
    finally:
        os.close(fd)


def _like(source: str, target: str, status: os.stat_result) -> None:
    os.chown(target, status.st_uid, status.st_gid, follow_symlinks=False)
    for name in os.listxattr(source, follow_symlinks=False):
        os.setxattr(target, name, os.getxattr(source, name, follow_symlinks=False), follow_symlinks=False)
    if not stat.S_ISLNK(status.st_mode):
        os.chmod(target, stat.S_IMODE(status.st_mode))
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)
