"""Files that are either the old or the new one, never half of either.

Runs in: every process.
"""

from __future__ import annotations

import os


def write_all(fd: int, data: bytes) -> None:
    """write(2) until all of `data` is out; raises OSError (ENOSPC and the like)."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def write_new(path: str, data: bytes, mode: int = 0o600, dir_fd: int | None = None) -> None:
    """Write a file that is not there yet. Raises OSError, FileExistsError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(path, flags, mode, dir_fd=dir_fd)
    try:
        write_all(fd, data)
    finally:
        os.close(fd)


def write_atomic(path: str, data: bytes, mode: int = 0o600, dir_fd: int | None = None) -> None:
    """Replace `path` by `data`: a temporary file beside it, then rename(2).

    State lives on tmpfs, where a power cut leaves nothing anyway, so there is no fsync: a killed process is what
    this protects from. Raises OSError and leaves no temporary file behind.
    """
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        try:
            write_new(temporary, data, mode, dir_fd)
        except FileExistsError:
            # Left by a process of the same number that was killed.
            os.unlink(temporary, dir_fd=dir_fd)
            write_new(temporary, data, mode, dir_fd)
        os.rename(temporary, path, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    except BaseException:
        os.unlink(temporary, dir_fd=dir_fd)
        raise


def read_all(path: str, limit: int = 1 << 24, dir_fd: int | None = None) -> bytes:
    """The whole file; raises OSError, EFBIG when it is longer than `limit` bytes."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        parts = []
        size = 0
        while chunk := os.read(fd, 65536):
            size += len(chunk)
            if size > limit:
                import errno

                raise OSError(errno.EFBIG, f"larger than {limit} bytes", path)
            parts.append(chunk)
        return b"".join(parts)
    finally:
        os.close(fd)


def is_locked(path: str, dir_fd: int | None = None) -> bool:
    """Whether some process holds an exclusive flock(2) on a file or folder. Raises OSError when it cannot be opened."""
    import fcntl

    probe = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        fcntl.flock(probe, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(probe)
    return False
