"""The command line of `containerd-shim-boxship-v1`: `start`, `delete`, `-v`, `-info`.

Runs in: a process that the spawner forked for one call. The shim itself is another fork, which has nothing of that call in its
memory but what it needs.
Spec: containerd's runtime v2, 1.6 to 2.4. Flags that are not known are passed over: newer versions add some.

What comes in on standard input: the options' Any, or BootstrapParams since containerd 2.3. What goes out: the address as text;
JSON for a containerd that says how new a shim may be (MAX_SHIM_VERSION, since 1.7); BootstrapResult for one that sent
BootstrapParams.
containerd takes standard output and error together for the answer, so nothing else is written there.
"""

from __future__ import annotations

import _socket
import marshal
import os

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError

from boxship.api.oci_runtime.runtime import Runtime
from boxship.api.task import pb
from boxship.kit import failpoint
from boxship.kit.errors import BoxshipError, InvalidArgument
from boxship.kit.files import write_all, write_atomic
from boxship.kit.user import run_folder, user_of
from boxship.oci import text
from boxship.shim import bundle as bundles
from boxship.shim.bundle import Options
from boxship.shim.forks import own, pack_environ, programs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from boxship.api.oci_runtime.runtime import Carrier
    from boxship.shim.forks import OwnRuntime

VERSION = "0.1.0"
NAME = "io.containerd.boxship.v1"
SHIM = "containerd-shim-boxship-v1"
GROUPS = ("io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id")
_VALUES = ("namespace", "address", "publish-binary", "id", "bundle", "socket")
_SWITCHES = ("debug", "v", "info", "version")
_TASK_VERSION = 3
_DELETE_S = 30.0
_KILLED = 128 + 9
_INPUT_MAX = 4 << 20
_OOM_ADJ_MAX = 1000


class Flags:
    """The command line, read."""

    def __init__(self, argv: Sequence[str]) -> None:
        """Raises InvalidArgument when a value is missing."""
        self.values = dict.fromkeys(_VALUES, "")
        self.switches: set[str] = set()
        self.action = ""
        rest = list(argv[1:])
        while rest:
            word = rest.pop(0)
            if not word.startswith("-"):
                self.action = word
                continue
            name, equals, value = word.lstrip("-").partition("=")
            if name in _SWITCHES:
                if value.lower() not in ("false", "0", "f"):
                    self.switches.add(name)
            elif name in _VALUES:
                if not equals:
                    if not rest:
                        raise InvalidArgument(f"flag needs an argument: -{name}")
                    value = rest.pop(0)
                self.values[name] = value
            elif not equals and len(rest) > 1 and not rest[0].startswith("-"):
                rest.pop(0)  # a flag of a newer version, with its value: the last word is the action


class Caller:
    """Who asks: what containerd started, or the daemon.

    Attributes:
        stdio: its standard streams; borrowed.
        cwd: a descriptor of its folder, the bundle; borrowed.
        pid: the process, 0 where it is not known.
        umask: its mask.
    """

    def __init__(
        self, argv: Sequence[str], environ: Mapping[str, str], stdio: Sequence[int], cwd: int, pid: int = 0,
        umask: int = 0o022,
    ) -> None:
        self.argv = argv
        self.environ = environ
        self.stdio = stdio
        self.cwd = cwd
        self.pid = pid
        self.umask = umask


class Answered:
    """What a call came to: its exit code, and (after a `start` that made one) the socket of the shim that is to be, with all that
    it has to know (`boxship.shim.main.run`)."""

    def __init__(self, code: int, listener: _socket.socket | None = None, birth: bytes = b"") -> None:
        self.code = code
        self.listener = listener
        self.birth = birth


def answer(caller: Caller, own_runtime: OwnRuntime) -> Answered:
    """Do what was asked and write the answer. An error is a text on standard error and the exit code 1."""
    try:
        flags = Flags(caller.argv)
        if "v" in flags.switches or "version" in flags.switches:
            write_all(caller.stdio[1], _version(caller.argv).encode())
            return Answered(0)
        if "info" in flags.switches:
            write_all(caller.stdio[1], _info(own(own_runtime, b"")).SerializeToString())
            return Answered(0)
        if not flags.values["namespace"]:
            raise InvalidArgument("shim namespace cannot be empty")
        if flags.action == "start":
            start = Start(caller, flags)
            try:
                write_all(caller.stdio[1], start.reply)
            except OSError:
                # Who asked is gone, and nobody will ever come to the shim.
                if start.listener is not None:
                    os.unlink(start.path)
                raise
            return Answered(0, start.listener, start.birth)
        if flags.action == "delete":
            write_all(caller.stdio[1], Deletion(caller, flags, own_runtime).response.SerializeToString())
            return Answered(0)
        raise InvalidArgument(f"unknown command {flags.action!r}")
    except (BoxshipError, OSError) as error:
        name = os.path.basename(caller.argv[0]) if caller.argv else "shim"
        detail = str(error) if isinstance(error, BoxshipError) else f"{error.filename or ''}: {(error.strerror or '').lower()}"
        try:
            write_all(caller.stdio[2], f"{name}: {detail}\n".encode(errors="replace"))
        except OSError:
            pass  # nobody listens: an exit code is an answer nevertheless, without which the caller would ask again
        return Answered(1)


def _version(argv: Sequence[str]) -> str:
    name = argv[0] if argv else SHIM
    return f"{name}:\n  Version:  {VERSION}\n  Revision: v{VERSION}\n\n"


def _info(own_runtime: Carrier) -> Any:
    from boxship.api.any import FEATURES

    info = pb.types.RuntimeInfo(name=NAME)
    info.version.version = VERSION
    command = Runtime(bundles.OWN_RUNTIME, "/nonexistent", "/dev/null", carrier=own_runtime).features()
    features = command.finish(os.waitpid(command.pid, 0)[1])
    info.features.CopyFrom(AnyMessage(type_url=FEATURES, value=features))
    return info


def _read_all(fd: int) -> bytes:
    parts = []
    size = 0
    while chunk := os.read(fd, 65536):
        size += len(chunk)
        if size > _INPUT_MAX:
            raise InvalidArgument("standard input is too long")
        parts.append(chunk)
    return b"".join(parts)


# --- start ----------------------------------------------------------------------------------------------------------


class Start:
    """`start`: a new shim, or the address of the one that has the container's group.

    Attributes:
        reply: for standard output.
        listener: of the new shim, or None.
        birth: for `boxship.shim.main.run`.
    """

    def __init__(self, caller: Caller, flags: Flags) -> None:
        self._environ = dict(caller.environ)
        self.namespace = flags.values["namespace"]
        self.id = flags.values["id"]
        if not self.id:
            raise InvalidArgument("shim id cannot be empty")
        self.bundle = os.readlink(f"/proc/self/fd/{caller.cwd}")
        self._debug = "debug" in flags.switches
        self._address = flags.values["address"] or self._environ.get("GRPC_ADDRESS", "")
        self._publish_binary = flags.values["publish-binary"]
        given = _read_all(caller.stdio[0])
        params = bootstrap_params(given, self.id, self.namespace)
        self._options = _options(given, params)
        folder = ""
        if params is not None:
            self._environ.setdefault("TTRPC_ADDRESS", params.containerd_ttrpc_address)
            self._address = self._address or params.containerd_grpc_address
            self._publish_binary = self._publish_binary or params.containerd_binary
            self._debug = self._debug or params.log_level < 0
            folder = params.socket_dir
        group = _group(self.bundle) or self.id
        self.listener, self.path = _listen(folder or _socket_folder(), self._address, self.namespace, group)
        address = f"unix://{self.path}"
        try:
            write_atomic(f"{self.bundle}/address", address.encode())
        except OSError:
            # The bundle is gone: who asked was killed, and another has tidied up.
            if self.listener is not None:
                os.unlink(self.path)
            raise
        failpoint.hit("shim.start.listens")
        self.reply = reply(address, params is not None, self._environ.get("MAX_SHIM_VERSION", ""))

        self.birth = marshal.dumps({
            "path": self.path, "id": group, "bundle": self.bundle, "namespace": self.namespace, "debug": self._debug,
            "umask": caller.umask,
            "events": self._environ.get("TTRPC_ADDRESS", ""), "publish": (self._publish_binary, self._address),
            "oom": _oom_score(caller.pid), "cgroup": self._options.shim_cgroup, "environ": pack_environ(self._environ),
        })


def bootstrap_params(given: bytes, id: str, namespace: str) -> Any | None:  # noqa: A002
    """The message BootstrapParams in what `start` reads; None when it is the options' Any, or nothing."""
    try:
        params = pb.bootstrap.BootstrapParams.FromString(given)
    except DecodeError:
        return None
    return params if params.instance_id == id and params.namespace == namespace else None


def _options(given: bytes, params: Any | None) -> Options:
    if params is not None:
        for extension in params.extensions:
            if extension.value.type_url.endswith("runc.v1.Options"):
                return Options.unpack(extension.value)
        return Options()
    try:
        return Options.unpack(AnyMessage.FromString(given))
    except DecodeError:
        return Options()  # another kind of options, or a form that comes later: Create brings them again


def reply(address: str, binary: bool, newest: str) -> bytes:
    """What `start` prints: `binary` for one who sent BootstrapParams; `newest` is MAX_SHIM_VERSION, or ""."""
    if binary:
        message = pb.bootstrap.BootstrapResult(version=_TASK_VERSION, address=address, protocol="ttrpc")
        return bytes(message.SerializeToString())
    if newest.isdigit() and int(newest) >= 2:
        version = min(_TASK_VERSION, int(newest))
        return text.dumps({"version": version, "address": address, "protocol": "ttrpc"}).encode()
    return address.encode()


def _group(bundle: str) -> str:
    try:
        annotations = bundles.load_config(bundle).get("annotations")
    except FileNotFoundError:
        return ""  # of a sandbox, which need not have one
    if isinstance(annotations, dict):
        for name in GROUPS:
            if annotations.get(name):
                return str(annotations[name])
    return ""


def _socket_folder() -> str:
    # As root where containerd's own shims have theirs.
    return "/run/containerd/s" if user_of(os.environ) == 0 else f"{run_folder(os.environ)}/boxship/s"


def _listen(folder: str, address: str, namespace: str, group: str) -> tuple[_socket.socket | None, str]:
    """A socket that listens, and its path; None when a shim listens there already. Raises OSError."""
    import fcntl
    from _sha256 import sha256  # type: ignore[import-not-found]

    os.makedirs(folder, 0o700, exist_ok=True)
    path = f"{folder}/{sha256(os.path.join(address, namespace, group).encode()).hexdigest()}"
    door = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Two containers of one pod may be started at once.
        fcntl.flock(door, fcntl.LOCK_EX)
        if os.path.lexists(path):
            if _is_served(path):
                return None, path
            os.unlink(path)
        listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC, 0)
        before = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(before)
        listener.listen(128)
        return listener, path
    finally:
        os.close(door)


def _is_served(path: str) -> bool:
    probe = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC, 0)
    try:
        probe.connect(path)
    except OSError:
        return False
    finally:
        probe.close()
    return True


def _oom_score(caller: int) -> int | None:
    """A little dearer to the kernel than the daemon, as containerd's shim: when memory is short the daemon goes last."""
    try:
        with open(f"/proc/{caller or 'self'}/oom_score_adj") as file:
            return min(int(file.read()) + 1, _OOM_ADJ_MAX)
    except OSError:
        return None  # it is gone


# --- delete ---------------------------------------------------------------------------------------------------------


class Deletion:
    """`delete`: what a dead shim left is removed, and how its container ended is told. May be repeated."""

    def __init__(self, caller: Caller, flags: Flags, own_runtime: OwnRuntime) -> None:
        container = flags.values["id"]
        bundle = os.readlink(f"/proc/self/fd/{caller.cwd}")
        if flags.values["bundle"]:
            bundle = os.path.join(bundle, flags.values["bundle"])
        elif os.path.basename(bundle) != container:
            bundle = os.path.join(os.path.dirname(bundle), container)
        options = Options.load(bundle)
        environ = pack_environ(dict(caller.environ))
        carrier = own(own_runtime, environ) if options.binary == bundles.OWN_RUNTIME else programs(environ)
        log = f"{bundle}/log.json" if os.path.isdir(bundle) else "/dev/null"
        runtime = Runtime(options.binary, options.root_of(flags.values["namespace"]), log,
                          systemd_cgroup=options.systemd_cgroup, carrier=carrier)
        command = runtime.delete(container, force=True)
        try:
            command.finish(os.waitpid(command.pid, 0)[1])
        except BoxshipError as error:
            write_all(caller.stdio[2], f"failed to remove runc container: {error}\n".encode())
        bundles.unmount_rootfs(bundle)
        self._remove_socket(bundle)
        self.response = pb.task.DeleteResponse()
        ended = bundles.read_exit(bundle)
        if ended is not None:
            self.response.pid, self.response.exit_status, at_ns = ended
            self.response.exited_at.FromNanoseconds(at_ns)
            return
        try:
            self.response.pid = bundles.read_pid(f"{bundle}/init.pid")
        except BoxshipError:
            pass  # it had not come that far
        self.response.exit_status = _KILLED
        self.response.exited_at.GetCurrentTime()

    def _remove_socket(self, bundle: str) -> None:
        """The socket of a shim that is dead; one that serves is another container's of the pod."""
        try:
            with open(f"{bundle}/address") as file:
                path = file.read().strip().removeprefix("unix://")
        except OSError:
            return
        if os.path.lexists(path) and not _is_served(path):
            os.unlink(path)
