"""Reading and writing the small files of cgroup file systems.

Runs in: the runtime.
Every failure is a `FileError`: an OSError that knows what was being done, in runc's words, so that callers can look at the
errno first and tell the user afterwards (`explain`).
"""

from __future__ import annotations

import errno
import os

from boxship.kit.errors import BoxshipError, from_os_error

MAX = (1 << 64) - 1
"""What "max" in a file reads as."""

_ESCAPES = {"\n": "\\n", "\t": "\\t", '"': '\\"', "\\": "\\\\"}


class FileError(OSError):
    """An operation on a cgroup file failed. `doing` is what stands before the path in the message."""

    doing = ""


def failure(error: OSError, doing: str, path: str) -> FileError:
    """`error` with its circumstances."""
    result = FileError(error.errno, os.strerror(error.errno or errno.EIO), path)
    result.doing = doing
    return result


def explain(error: OSError, before: str = "") -> BoxshipError:
    """The error for the user, for example `failed to write "-5": write /sys/…/pids.max: invalid argument`."""
    return from_os_error(error, before + (error.doing if isinstance(error, FileError) else "access"))


def quoted(text: str) -> str:
    """`text` in double quotes, with escapes."""
    return '"' + "".join(_ESCAPES.get(char, char) for char in text) + '"'


def open_file(path: str, flags: int) -> int:
    """open(2), close-on-exec. Raises FileError."""
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except OSError as error:
        raise failure(error, "open", path) from None


def write(path: str, data: str) -> None:
    """Write `data` in one call. Raises FileError."""
    fd = open_file(path, os.O_WRONLY)
    try:
        os.write(fd, data.encode())
    except OSError as error:
        raise failure(error, f"failed to write {quoted(data)}: write", path) from None
    finally:
        os.close(fd)


def write_each(path: str, values: list[str]) -> None:
    """Write several values, one call each, through one open file: such files take one value a write."""
    if not values:
        return
    fd = open_file(path, os.O_WRONLY)
    value = ""
    try:
        for value in values:
            os.write(fd, value.encode())
    except OSError as error:
        raise failure(error, f"failed to write {quoted(value)}: write", path) from None
    finally:
        os.close(fd)


def read(path: str) -> str:
    """The whole file. Raises FileError."""
    fd = open_file(path, os.O_RDONLY)
    try:
        parts = []
        while part := os.read(fd, 65536):
            parts.append(part)
            if len(part) < 3072:
                break  # while there is more, a seq_file fills its page but for the record that did not fit
        return b"".join(parts).decode("utf-8", "surrogateescape")
    except OSError as error:
        raise failure(error, "read", path) from None
    finally:
        os.close(fd)


def parse_int(text: str) -> int:
    """A counter; "max" is `MAX`, and the negative values that some kernels show are 0."""
    text = text.strip()
    return MAX if text == "max" else max(0, int(text))


def read_int(path: str) -> int:
    """The single number in a file. Raises FileError, or BoxshipError when it holds something else."""
    text = read(path)
    try:
        return parse_int(text)
    except ValueError:
        raise BoxshipError(f"unable to parse {path}: {quoted(text.strip())} is no number") from None


def read_table(path: str) -> dict[str, int]:
    """A file of lines "key number"."""
    table = {}
    for line in read(path).splitlines():
        key, _, value = line.partition(" ")
        try:
            table[key] = parse_int(value)
        except ValueError:
            raise BoxshipError(f'unable to parse {path}: line {quoted(line)} is not in "key value" format') from None
    return table


def missing(error: OSError) -> bool:
    """Whether the file, or the group that it belonged to, is not there (any more)."""
    return error.errno in (errno.ENOENT, errno.ENODEV)


def refused(error: OSError) -> bool:
    """Whether it is for want of permission, in the wide sense."""
    return error.errno in (errno.EPERM, errno.EACCES, errno.EROFS)


def subdirectories(path: str) -> list[str]:
    """Names of the groups directly below `path`."""
    with os.scandir(path) as entries:
        return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]


def processes(path: str, *, recursive: bool) -> list[int]:
    """The processes of a group, and with `recursive` of all groups below it.

    Groups below that vanish meanwhile do not matter. Raises FileError when `path` itself is not there.
    """
    try:
        text = read(path + "/cgroup.procs")
    except FileError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        text = read(path + "/cgroup.threads")  # a threaded group has no list of processes
    found = [int(line) for line in text.split()]
    if recursive:
        for name in subdirectories(path):
            try:
                found += processes(f"{path}/{name}", recursive=True)
            except OSError as error:
                if not missing(error):
                    raise
    return found


def enter(path: str, pid: int) -> None:
    """Move a process into the group at `path`. Raises BoxshipError."""
    import time

    for attempt in range(5):
        try:
            write(path + "/cgroup.procs", str(pid))
            return
        except FileError as error:
            if error.errno != errno.EINVAL or attempt == 4:
                raise explain(error, f"failed to write {pid}: " if error.doing == "open" else "") from None
        # EINVAL: the process is so new that it has not run yet.
        time.sleep(0.03)


def remove_all(paths: list[str]) -> list[str]:
    """Remove groups with everything below them; returns those that remain.

    The usual case costs one rmdir(2) each. What is busy is tried again with growing pauses, all together, for about a
    second: processes that were just killed need a moment to be gone.
    """
    left = [path for path in paths if not _remove(path)]
    pause = 0.001
    for _ in range(10):
        if not left:
            break
        import time

        time.sleep(pause)
        pause *= 2
        left = [path for path in left if not _remove(path)]
    return left


def _remove(path: str) -> bool:
    try:
        os.rmdir(path)
        return True
    except FileNotFoundError:
        return True
    except OSError:
        pass
    # Groups below, a process that is about to go, or a read-only mount, on which rmdir(2) says EROFS even for nothing.
    try:
        names = subdirectories(path)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    for name in names:
        _remove(f"{path}/{name}")
    try:
        if names:
            os.rmdir(path)
            return True
    except FileNotFoundError:
        return True
    except OSError:
        pass
    return False
