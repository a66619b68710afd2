"""The record of a container, and the folder that holds it.

Runs in: the runtime.
Spec: runtime-spec 1.3.0, runtime.md "State".

    ROOT/                        0700, --root
      ID/                        0711, made exclusively by create: the name is taken from then on
        state.json               `Record`, replaced atomically, first written before anything is made in the kernel
        config.json              the configuration as create read it; the bundle's may change afterwards
        exec.fifo                while the container is created and not started: init waits for `start` to open it
        hook.stdout, hook.stderr, hook.status   what hooks that init ran left, see runtime.init
        start.json               what the last operations of init are called, for `start` to say which one failed
        claim.json               state.json as it was when create found the control group unused: from then on it is ours to
                                 kill; without control groups, as it was when init's pid was known
        notify/                  the container's side of the notify socket, if any
        criu-root/               while a restore is under way: an empty mount point

Lock order: a command that changes a container holds flock(2) on ID/ from before it reads the record until it ends;
`state`, `list` and `kill` read without, since the record is only ever replaced as a whole.
"""

from __future__ import annotations

import errno
import os

from boxship.kit import failpoint
from boxship.kit.errors import AlreadyExists, BoxshipError, FailedPrecondition, InvalidArgument, NotFound
from boxship.kit.files import is_locked, read_all, write_atomic, write_new
from boxship.linux import process
from boxship.oci import text
from boxship.runtime.executor import EXECUTOR_LINK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from boxship.linux.cgroups import Cgroup
    from boxship.oci.config import Spec
    from boxship.runtime.context import Context

CREATING, CREATED, RUNNING, PAUSED, STOPPED = "creating", "created", "running", "paused", "stopped"

_CLAIM = "claim.json"
_ID_FIRST = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_+-.")


class NotRunning(FailedPrecondition):
    """runc's "container not running"."""

    def __init__(self) -> None:
        super().__init__("container not running")


class DoesNotExist(NotFound):
    """runc's "container does not exist"."""

    def __init__(self) -> None:
        super().__init__("container does not exist")


class Damaged(BoxshipError):
    """state.json is not as `Container.save` wrote it: the machine crashed, or somebody edited it."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"{path}/state.json is damaged: {why}", "delete --force removes the container")


_RECORD: dict[str, type] = {
    "ociVersion": str, "pid": int, "pidStart": int, "bundle": str, "rootfs": str, "created": str, "owner": int,
    "annotations": dict, "cgroup": dict, "namespaces": dict, "creating": bool, "rootless": bool, "noPivot": bool,
}


def check_id(container_id: str) -> None:
    """Refuse what is not a container id: letters, digits and "_+-.", neither "." nor ".."."""
    if not container_id:
        raise InvalidArgument("container id cannot be empty")
    if not _ID_FIRST.issuperset(container_id) or container_id in (".", "..") or len(container_id) > 1024:
        raise InvalidArgument("invalid container ID format")


def start_of(pid: int) -> int:
    """The start time that tells a process from a later one of its number, 0 when it is gone already: see `Container.alive`."""
    try:
        return process.start_time(pid)
    except ProcessLookupError:
        return 0


class Container:
    """A container's record, opened: its folder, and what state.json says.

    Attributes mirror state.json. `fd` is the folder; `locked` whether this command may change it.
    """

    __slots__ = (
        "_saved", "annotations", "bundle", "cgroup", "context", "created", "creating", "fd", "id", "namespaces", "no_pivot",
        "oci_version", "owner", "path", "pid", "pid_start", "rootfs", "rootless",
    )

    def __init__(self, context: Context, container_id: str, path: str, fd: int) -> None:
        self.context = context
        self.id = container_id
        self.path = path
        self.fd = fd
        self.oci_version = "1.3.0"
        self.pid = 0
        self.pid_start = 0
        self.bundle = ""
        self.rootfs = ""
        self.created = ""
        self.owner = os.geteuid()
        self.annotations: dict[str, str] = {}
        self.cgroup: dict[str, object] = {}
        self.namespaces: dict[str, str] = {}
        self.creating = True
        self.rootless = False
        self.no_pivot = False
        self._saved = b""

    def close(self) -> None:
        """Release the folder, and with it the lock."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Container:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def lock(self) -> bool:
        """Keep others from changing it again; False when one has deleted it meanwhile."""
        _lock(self.fd)
        return os.fstat(self.fd).st_nlink > 0

    def unlock(self) -> None:
        """Let other commands change the container again."""
        import fcntl

        fcntl.flock(self.fd, fcntl.LOCK_UN)

    def has_pid_namespace(self) -> bool:
        """Whether it is in a pid namespace of its own, where the end of init is the end of all."""
        try:
            return os.stat(f"/proc/{self.pid}/ns/pid").st_ino != os.stat("/proc/self/ns/pid").st_ino
        except FileNotFoundError:
            linux = self.spec().linux
            return linux is not None and any(ns.type == "pid" for ns in linux.namespaces)

    def record(self) -> dict[str, object]:
        """What state.json says."""
        return {
            "ociVersion": self.oci_version, "id": self.id, "pid": self.pid, "pidStart": self.pid_start,
            "bundle": self.bundle, "rootfs": self.rootfs, "created": self.created, "owner": self.owner,
            "annotations": self.annotations, "cgroup": self.cgroup, "namespaces": self.namespaces,
            "creating": self.creating, "rootless": self.rootless, "noPivot": self.no_pivot,
        }

    def save(self) -> None:
        """Write state.json."""
        self._saved = text.dumps(self.record()).encode()
        write_atomic("state.json", self._saved, dir_fd=self.fd)

    def load(self) -> None:
        """Read state.json; a folder without one belonged to a create that was killed at its very start. Raises Damaged."""
        if not self._load("state.json") and self._claimed():
            raise Damaged(self.path, "it is not there")

    def recover(self) -> bool:
        """Where state.json is damaged: take what create wrote into claim.json. False when that does not tell either."""
        try:
            found = self._load(_CLAIM)
            self.control_group()
        except (OSError, Damaged):
            self.cgroup, self.pid = {}, 0
            return False
        return found

    def _load(self, name: str) -> bool:
        try:
            data = read_all(name, dir_fd=self.fd)
        except FileNotFoundError:
            return False
        try:
            record = text.loads(data, name)
        except InvalidArgument as error:
            raise Damaged(self.path, str(error)) from None
        if not isinstance(record, dict):
            raise Damaged(self.path, "not an object")
        for key, kind in _RECORD.items():
            if type(record.get(key)) is not kind:
                raise Damaged(self.path, f"{key} is missing or of another type")
        self.oci_version = record["ociVersion"]
        self.pid, self.pid_start = record["pid"], record["pidStart"]
        self.bundle, self.rootfs, self.created = record["bundle"], record["rootfs"], record["created"]
        self.owner, self.annotations = record["owner"], record["annotations"]
        self.cgroup, self.namespaces = record["cgroup"], record["namespaces"]
        self.creating, self.rootless, self.no_pivot = record["creating"], record["rootless"], record["noPivot"]
        return True

    def spec(self) -> Spec:
        """The configuration that the container was created from."""
        from boxship.oci.config import Spec

        return Spec.decode(text.loads(read_all("config.json", dir_fd=self.fd), "config.json"), "")

    def claim(self) -> None:
        """Note that create has made the control group its own: what is in it from now on is the container's.

        The note is a second copy of what was saved last. state.json can only be damaged from outside (a crash of the machine,
        an editor); then this still says where the container's processes, groups and mounts are.
        """
        write_new(_CLAIM, self._saved, dir_fd=self.fd)

    def owns_cgroup(self) -> bool:
        """Whether the group is the container's, and not perhaps another's that a killed create had not looked at yet."""
        return not self.creating or self._claimed()

    def _claimed(self) -> bool:
        try:
            os.stat(_CLAIM, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def control_group(self) -> Cgroup | None:
        """The container's cgroup as create saved it; None when it was created without any. Raises Damaged."""
        if not self.cgroup:
            return None
        from boxship.linux.cgroups import Cgroup

        try:
            group = Cgroup.decode(self.cgroup)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise Damaged(self.path, "cgroup is not as it was written") from None
        group.environ = self.context.environ
        return group

    def alive(self) -> bool:
        """Whether init, that very process and not a later one of its number, is there and no zombie."""
        if not self.pid:
            return False
        return process.is_alive(self.pid, self.pid_start)

    def status(self) -> str:
        """The spec's status of this moment, or "paused"."""
        if not self.alive():
            return CREATING if self.creating and self.locked_by_other() else STOPPED
        if self.creating:
            return CREATING if self.locked_by_other() else STOPPED
        if self.waits_for_start():
            status = CREATED
        else:
            status = RUNNING
        cgroup = self.control_group()
        if cgroup is not None and cgroup.frozen():
            return PAUSED
        return status

    def waits_for_start(self) -> bool:
        """Whether init still waits for `start`."""
        try:
            os.stat("exec.fifo", dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        # A `start` that was killed in the middle may have left the FIFO of a container that runs.
        try:
            return os.readlink(f"/proc/{self.pid}/exe") == EXECUTOR_LINK
        except PermissionError:
            return True  # nobody may look into init, see `boxship.runtime.init`
        except FileNotFoundError:
            return False

    def locked_by_other(self) -> bool:
        """Whether another command is at work on this container now."""
        return is_locked(".", self.fd)

    def open_note(self, name: str) -> int:
        """A new, empty file of the container's folder, open for init to append to."""
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(name, flags, 0o600, dir_fd=self.fd)

    def hook_failure(self, what: str) -> str:
        """The message for a hook that init ran and that failed; `what` is the description of the failed step."""
        from boxship.runtime.hooks import describe_status

        notes = [read_all(f"hook.{name}", dir_fd=self.fd) for name in ("status", "stdout", "stderr")]
        status = int.from_bytes(notes[0][-4:], "little")
        out, err = (note.decode(errors="replace") for note in notes[1:])
        return f"{what.split('@', 2)[2]}{describe_status(status)}, stdout: {out}, stderr: {err}"

    def describe(self, status: str | None = None) -> dict[str, object]:
        """The `state` command's object, with runc's keys."""
        status = status or self.status()
        return {
            "ociVersion": self.oci_version, "id": self.id, "pid": 0 if status == STOPPED else self.pid, "status": status,
            "bundle": self.bundle, "rootfs": self.rootfs, "created": self.created,
            **({"annotations": self.annotations} if self.annotations else {}), "owner": "",
        }

    def hook_state(self, status: str, pid: int | None = None) -> bytes:
        """The spec's state as hooks read it on standard input."""
        state: dict[str, object] = {"ociVersion": self.oci_version, "id": self.id, "status": status}
        pid = self.pid if pid is None else pid
        if pid and status != STOPPED:
            state["pid"] = pid
        state["bundle"] = self.bundle
        if self.annotations:
            state["annotations"] = self.annotations
        return text.dumps(state).encode()


def _lock(fd: int) -> None:
    import fcntl

    fcntl.flock(fd, fcntl.LOCK_EX)


def make(context: Context, container_id: str) -> Container:
    """Take the id: make its folder and lock it. Raises AlreadyExists."""
    check_id(container_id)
    path = os.path.join(context.root, container_id)
    for attempt in (0, 1):
        try:
            os.mkdir(path, 0o711)
            break
        except FileExistsError:
            raise AlreadyExists("container with given ID already exists") from None
        except FileNotFoundError:
            if attempt:
                raise
            os.makedirs(context.root, 0o700, exist_ok=True)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    _lock(fd)
    return Container(context, container_id, path, fd)


def open_container(context: Context, container_id: str, *, lock: bool = False, load: bool = True) -> Container:
    """The container of that id; with `lock`, after every other command on it has ended. Raises DoesNotExist, Damaged.

    Without `load` only its folder is known.
    """
    check_id(container_id)
    path = os.path.join(context.root, container_id)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        raise DoesNotExist from None
    container = Container(context, container_id, path, fd)
    try:
        if lock:
            _lock(fd)
            if os.fstat(fd).st_nlink == 0:
                raise DoesNotExist  # deleted while we waited
        if load:
            container.load()
    except BaseException:
        container.close()
        raise
    return container


# The claim first: it must never outlive the group that it is for.
_FILES = (_CLAIM, "state.json", "config.json", "exec.fifo", "start.json")
_FOLDERS = ("notify", "criu-root")


def discard(container: Container) -> None:
    """Remove the folder: the id is free again. What it describes must be gone before.

    The usual case takes no descriptor: there may be none left.
    """
    for name in _FILES:
        try:
            os.unlink(name, dir_fd=container.fd)
        except FileNotFoundError:
            continue
        # A kill here leaves a folder that tells nothing, or only what is gone by now: delete --force takes it.
        failpoint.hit("delete.file")
    try:
        os.rmdir(container.path)
        return
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
    for folder in (*_FOLDERS, ""):
        path = f"{container.path}/{folder}" if folder else container.path
        try:
            names = os.listdir(path)
        except FileNotFoundError:
            continue
        for name in names:
            if name not in _FOLDERS:
                os.unlink(f"{path}/{name}")
        if folder:
            os.rmdir(path)
    os.rmdir(container.path)


def identifiers(context: Context) -> list[str]:
    """The ids of all containers below the root, sorted; none when the root is not there."""
    try:
        names = os.listdir(context.root)
    except FileNotFoundError:
        return []
    return sorted(name for name in names if _ID_FIRST.issuperset(name) and os.path.isdir(f"{context.root}/{name}"))
