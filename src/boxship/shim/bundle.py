"""What the shim keeps in a container's bundle, so that a later process can finish what this one began.

Runs in: the shim, and its `delete`.
Spec: containerd's runtime v2: the files that its own shim writes.

    config.json    the container's configuration, by containerd
    rootfs/        where its root file system is mounted
    log, log.json  the shim's log (a FIFO), the runtime's
    address        where the shim listens
    options.json   the options that the container was created with
    runtime        name or path of its runtime
    init.pid       pid of its first process
    exit.json      how that ended, as soon as it has: `delete` tells it when the shim is dead
"""

from __future__ import annotations

import errno
import os

from boxship.abi import mount as m
from boxship.api.task import pb
from boxship.kit.errors import BoxshipError, from_os_error
from boxship.kit.files import read_all, write_atomic
from boxship.kit.user import run_folder
from boxship.linux import mounts
from boxship.oci import text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

OWN_RUNTIME = "boxrun"
OTHER_ROOT = "/run/containerd/runc"
_CONFIG_MAX = 64 << 20


class Options:
    """containerd.runc.v1.Options, as far as it is known here."""

    FIELDS = (
        "no_pivot_root", "no_new_keyring", "shim_cgroup", "io_uid", "io_gid", "binary_name", "root", "systemd_cgroup",
        "criu_image_path", "criu_work_path",
    )

    def __init__(self) -> None:
        self.no_pivot_root = False
        self.no_new_keyring = False
        self.shim_cgroup = ""
        self.io_uid = 0
        self.io_gid = 0
        self.binary_name = ""
        self.root = ""
        self.systemd_cgroup = False
        self.criu_image_path = ""
        self.criu_work_path = ""

    @classmethod
    def unpack(cls, value: Any) -> Options:
        """From the Any of a request; options of another runtime's kind are none of ours."""
        options = cls()
        if value is not None and value.type_url.rpartition("/")[2] == "containerd.runc.v1.Options":
            message = pb.runc_options.Options.FromString(value.value)
            for name in cls.FIELDS:
                setattr(options, name, getattr(message, name))
        return options

    def encode(self) -> bytes:
        """As `options.json`."""
        return text.dumps({name: getattr(self, name) for name in self.FIELDS}).encode()

    @classmethod
    def load(cls, bundle: str) -> Options:
        """From the bundle; the defaults where nothing was written."""
        options = cls()
        try:
            found = text.loads(read_all(f"{bundle}/options.json"), "options.json")
        except (OSError, BoxshipError):
            return options
        if isinstance(found, dict):
            for name in cls.FIELDS:
                value = found.get(name)
                if isinstance(value, type(getattr(options, name))):
                    setattr(options, name, value)
        return options

    @property
    def binary(self) -> str:
        """The runtime."""
        return self.binary_name or OWN_RUNTIME

    def root_of(self, namespace: str) -> str:
        """Where the runtime keeps the state of a namespace's containers."""
        base = self.root
        if not base:
            base = OTHER_ROOT if self.binary != OWN_RUNTIME else _own_root()
        return os.path.join(base, namespace)


def _own_root() -> str:
    return f"{run_folder(os.environ)}/boxship/runtime"


def load_config(bundle: str) -> dict[str, object]:
    """config.json. Raises BoxshipError, OSError."""
    found = text.loads(read_all(f"{bundle}/config.json", _CONFIG_MAX), "config.json")
    return found if isinstance(found, dict) else {}


def has_pid_namespace(config: dict[str, object]) -> bool:
    """Whether the end of the container's first process is the end of all of its processes."""
    linux = config.get("linux")
    namespaces = linux.get("namespaces") if isinstance(linux, dict) else None
    for namespace in namespaces if isinstance(namespaces, list) else []:
        if isinstance(namespace, dict) and namespace.get("type") == "pid":
            return not namespace.get("path")
    return False


def is_quick(config: dict[str, object]) -> bool:
    """Whether starting and deleting it waits for nobody: neither for hooks nor for an agent that takes its system calls."""
    linux = config.get("linux")
    seccomp = linux.get("seccomp") if isinstance(linux, dict) else None
    return not config.get("hooks") and not (isinstance(seccomp, dict) and seccomp.get("listenerPath"))


def mount_rootfs(bundle: str, wanted: Iterable[Any]) -> None:
    """Mount what makes up the root file system, the first one first. Raises BoxshipError; then nothing stays mounted."""
    target = f"{bundle}/rootfs"
    os.makedirs(target, 0o711, exist_ok=True)
    try:
        for one in wanted:
            where = os.path.join(target, one.target.lstrip("/")) if one.target else target
            mounts.attach(one.type, one.source, where, list(one.options))
    except OSError as error:
        unmount_rootfs(bundle)
        raise from_os_error(error, "failed to mount rootfs component") from None


def unmount_rootfs(bundle: str) -> None:
    """Take away what is mounted there, with all that is mounted on it. Raises OSError."""
    while True:
        try:
            mounts.umount(f"{bundle}/rootfs", m.MNT_DETACH | m.UMOUNT_NOFOLLOW)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT):
                return  # no mount point, or not any more; or not there
            raise


def write_exit(bundle: str, pid: int, status: int, at_ns: int) -> None:
    """Keep how the container ended. Raises OSError."""
    write_atomic(f"{bundle}/exit.json", text.dumps({"pid": pid, "status": status, "exitedAt": at_ns}).encode())


def read_exit(bundle: str) -> tuple[int, int, int] | None:
    """(pid, status, time in ns), None when it had not ended, or was not told."""
    try:
        found = text.loads(read_all(f"{bundle}/exit.json"), "exit.json")
    except (OSError, BoxshipError):
        return None
    if not isinstance(found, dict):
        return None
    values = [found.get(name) for name in ("pid", "status", "exitedAt")]
    if not all(isinstance(value, int) for value in values):
        return None
    pid, status, at_ns = values
    return pid, status, at_ns  # type: ignore[return-value]


def read_pid(path: str) -> int:
    """A pid file's number. Raises BoxshipError."""
    try:
        pid = int(read_all(path))
    except (OSError, ValueError):
        pid = 0
    if pid <= 0:
        raise BoxshipError(f"the runtime wrote no pid to {os.path.basename(path)}")
    return pid
