"""Network namespaces that live without a process: made, pinned to a file, visited, let go.

Runs in: a thread that may change its own network namespace for a moment; other threads are not concerned.
Spec: network_namespaces(7), setns(2), unshare(2); the files are bind mounts, as iproute2's in /run/netns.
"""

from __future__ import annotations

import errno
import os

from boxship.abi import mount as m
from boxship.abi import syscalls
from boxship.abi.namespace import CLONE_NEWNET
from boxship.linux import _sys, mounts
from boxship.linux.namespaces import setns

_OWN = "/proc/thread-self/ns/net"


class Inside:
    """`with Inside(fd):` the calling thread is in that network namespace (a descriptor, borrowed)."""

    def __init__(self, namespace: int) -> None:
        self._namespace = namespace
        self._home = -1

    def __enter__(self) -> None:
        self._home = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
        try:
            setns(self._namespace, CLONE_NEWNET)
        except OSError:
            os.close(self._home)
            raise

    def __exit__(self, *_: object) -> None:
        _return(self._home)


def _return(home: int) -> None:
    # Failing here would leave us in the container's network; nothing may go on then.
    try:
        setns(home, CLONE_NEWNET)
    except OSError:
        os.abort()
    os.close(home)


def create(path: str) -> int:
    """Make a namespace, pin it to a new file at `path`, and return a descriptor of it. Raises OSError; nothing is left then."""
    os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))
    try:
        home = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _sys.syscall(syscalls.UNSHARE, CLONE_NEWNET)
        except OSError:
            os.close(home)
            raise
        try:
            # Opened first: in this thread "self" changes with the way home.
            made = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
        finally:
            _return(home)
        try:
            mounts.mount(f"/proc/thread-self/fd/{made}", path, None, m.MS_BIND)
        except OSError:
            os.close(made)
            raise
        return made
    except OSError:
        os.unlink(path)
        raise


def remove(path: str) -> None:
    """Unpin the namespace at `path` and remove the file; it ends with its last process. It may be gone. Raises OSError."""
    try:
        mounts.umount(path, m.MNT_DETACH)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT):  # EINVAL: not mounted
            raise
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
