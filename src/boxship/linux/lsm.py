"""Linux security modules: which are there, and what to write where so that execve(2) switches to a profile or label.

Runs in: the runtime, which looks at the host; init writes, below a procfs that the container cannot have tampered with.
Spec: apparmor(7), proc(5) "/proc/pid/attr"; runtime-spec 1.3.0, config.md (apparmorProfile, selinuxLabel).
Linux ≥ 5.8 has /proc/PID/attr/apparmor, so that several modules do not share one file.
"""

from __future__ import annotations

import os

from boxship.abi import syscalls
from boxship.kit.errors import InvalidArgument
from boxship.kit.files import read_all
from boxship.linux import _sys

_SELINUX_MAGIC = 0xF97CFF8C
_ST_RDONLY = 1


def apparmor_enabled() -> bool:
    """Whether the kernel enforces AppArmor profiles."""
    try:
        os.stat("/sys/kernel/security/apparmor")
        return read_all("/sys/module/apparmor/parameters/enabled")[:1] == b"Y"
    except OSError:
        return False


def selinux_enabled() -> bool:
    """Whether the kernel enforces SELinux labels: a policy is loaded, and its file system is mounted and writable."""
    try:
        if b"\tselinuxfs\n" not in read_all("/proc/filesystems"):
            return False
        # Before a policy is loaded, everything is labelled "kernel".
        return _selinux_mounted() and read_all("/proc/self/attr/current").rstrip(b"\0\n") != b"kernel"
    except OSError:
        return False


def _selinux_mounted() -> bool:
    if _is_selinuxfs("/sys/fs/selinux"):
        return True
    for line in read_all("/proc/self/mountinfo").split(b"\n"):
        if b" - selinuxfs " in line:
            path = line.split(b" ")[4].decode("unicode_escape", "replace")
            return _is_selinuxfs(path)
    return False


def _is_selinuxfs(path: str) -> bool:
    buffer = bytearray(120)
    try:
        _sys.syscall(syscalls.STATFS, os.fsencode(path) + b"\0", buffer)
        flags = os.statvfs(path).f_flag
    except OSError:
        return False
    return int.from_bytes(buffer[:4], "little") == _SELINUX_MAGIC and not flags & _ST_RDONLY


def apparmor_attribute() -> str:
    """The file below /proc/PID that takes an AppArmor profile."""
    return "attr/apparmor/exec" if os.path.exists("/proc/self/attr/apparmor/exec") else "attr/exec"


def exec_attributes(apparmor_profile: str, selinux_label: str) -> list[tuple[str, bytes]]:
    """(file below /proc/PID, what to write) for each module that shall act at the next execve(2); "" asks for nothing.

    Without AppArmor a profile is passed over, as engines name their default one on every machine. A label without SELinux
    is an error: raises InvalidArgument in runc's words.
    """
    attributes = []
    if apparmor_profile and apparmor_enabled():
        attributes.append((apparmor_attribute(), b"exec " + os.fsencode(apparmor_profile)))
    if selinux_label:
        check_label(selinux_label)
        attributes.append(("attr/exec", os.fsencode(selinux_label)))
    return attributes


def key_attributes(selinux_label: str) -> list[tuple[str, bytes]]:
    """As `exec_attributes`, for the label of the keys that are made next (of the session keyring)."""
    return [("attr/keycreate", os.fsencode(selinux_label))] if selinux_label and selinux_enabled() else []


def check_label(selinux_label: str) -> None:
    """Raises InvalidArgument when there is a label and no SELinux."""
    if selinux_label and not selinux_enabled():
        raise InvalidArgument("selinux label is specified in config, but selinux is disabled or not supported")
