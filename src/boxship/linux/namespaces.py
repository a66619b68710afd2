"""Namespaces as descriptors: opening, telling what they are, whose they are, entering.

Runs in: any process.
Spec: namespaces(7), ioctl_nsfs(2) (Linux ≥ 4.11), setns(2), pidfd_getfd(2) (Linux ≥ 5.6).
Not here: making them, which clone(2) does for init (`boxship.linux.remote`); their numbers (`boxship.abi.namespace`).
"""

from __future__ import annotations

import os

from boxship.abi import namespace as n
from boxship.abi import syscalls
from boxship.kit.errors import InvalidArgument
from boxship.linux import _sys

_NS_GET_USERNS, _NS_GET_NSTYPE = 0xB701, 0xB703


def open_namespace(path: str, kind: str) -> int:
    """A descriptor of the namespace at `path`, close-on-exec. Raises InvalidArgument when there is none of that kind."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError as error:
        raise InvalidArgument(f"namespace path: lstat {path}: {(error.strerror or '').lower()}") from None
    try:
        found = _sys.syscall(syscalls.IOCTL, fd, _NS_GET_NSTYPE, 0)
    except OSError:
        found = 0
    if found != n.FLAGS[kind]:
        os.close(fd)
        what = next((name for name, flag in n.FLAGS.items() if flag == found), "")
        raise InvalidArgument(f"invalid namespace path {path}: {'a ' + what if what else 'not a'} namespace, not of type {kind}")
    return fd


def owner_of(fd: int) -> int:
    """The inode number of the user namespace that owns a namespace; 0 when it is above the caller's, who may not know."""
    try:
        owner = _sys.syscall(syscalls.IOCTL, fd, _NS_GET_USERNS, 0)
    except PermissionError:
        return 0
    try:
        return os.fstat(owner).st_ino
    finally:
        os.close(owner)


def setns(fd: int, flags: int) -> None:
    """setns(2): enter a namespace, or with a pidfd all those of that process in `flags` (Linux ≥ 5.8)."""
    _sys.syscall(syscalls.SETNS, fd, flags)


def pidfd_getfd(pidfd: int, number: int) -> int:
    """pidfd_getfd(2): a copy of another process's descriptor. Raises OSError."""
    return _sys.syscall(syscalls.PIDFD_GETFD, pidfd, number, 0)


def identity(kind: str, pid: int | str = "self") -> int:
    """The inode number that tells a process's namespace of that kind from all others."""
    return os.stat(f"/proc/{pid}/ns/{n.FILES[kind]}").st_ino
