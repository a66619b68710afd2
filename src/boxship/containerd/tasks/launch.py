"""How shims are started, and how what dead ones leave is cleaned: the seam, and the programs of PATH behind it.

Runs in: the daemon.
Spec: containerd's runtime v2, the command line of a shim: `start` prints where the shim listens (a line of text, JSON, or the
protobuf message BootstrapResult), `delete` prints a DeleteResponse. What `start` reads is the options' Any before containerd 2.3
and BootstrapParams since; a shim of one kind refuses the other, so what a program takes is found out at its first start.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import shutil
import subprocess
from typing import Any, Protocol

from google.protobuf.message import DecodeError

import boxship
from boxship.api.task import pb
from boxship.containerd.tasks.bundle import Bundle
from boxship.kit.errors import BoxshipError, InvalidArgument, NotFound, Unsupported
from boxship.kit.user import run_folder, user_of

log = logging.getLogger("boxship.shim")

START_TIMEOUT_S = 60.0
DELETE_TIMEOUT_S = 30.0
VERSION_MAX = 3


class Endpoint:
    """Where a shim listens: what `bootstrap.json` keeps."""

    __slots__ = ("address", "protocol", "version")

    def __init__(self, address: str, version: int = 2, protocol: str = "ttrpc") -> None:
        self.address = address
        """`unix://PATH`, or the name of an abstract socket."""
        self.version = version
        """2 or 3: the version of the task service."""
        self.protocol = protocol

    def json(self) -> bytes:
        """As in `bootstrap.json`."""
        return json.dumps({"version": self.version, "address": self.address, "protocol": self.protocol}).encode()


class Launch:
    """What a shim is started for."""

    __slots__ = ("bundle", "options", "runtime")

    def __init__(self, bundle: Bundle, runtime: str, options: Any | None) -> None:
        self.bundle = bundle
        self.runtime = runtime
        """Name (`io.containerd.runc.v2`) or absolute path."""
        self.options = options
        """The options, an Any, or None."""


class Launcher(Protocol):
    """One way to start shims."""

    async def start(self, launch: Launch) -> Endpoint:
        """Start a shim, or find the one that holds the container's group. Raises BoxshipError."""

    async def delete(self, launch: Launch) -> Any:
        """Clean up after a dead shim: a DeleteResponse of the task service. Raises BoxshipError."""

    async def info(self, runtime: str, options: Any | None) -> Any:
        """What the runtime tells about itself, a RuntimeInfo. Raises BoxshipError."""

    def unheard(self, bundle: Bundle) -> Endpoint | None:
        """Where the shim of a bundle would listen whose daemon was killed before it was told; None when that cannot be known."""


def parse_endpoint(reply: bytes) -> Endpoint:
    """Read what a shim's `start` printed, in any of the forms. Raises Unsupported, BoxshipError."""
    endpoint = _binary_endpoint(reply) or _text_endpoint(reply.strip())
    if endpoint.version > VERSION_MAX:
        raise Unsupported(f"unsupported shim version ({endpoint.version}): not implemented")
    if not endpoint.address:
        raise BoxshipError("shim did not tell where it listens")
    if endpoint.protocol.lower() != "ttrpc":
        raise Unsupported(f'shim speaks "{endpoint.protocol}", not ttrpc: not implemented')
    return endpoint


def _binary_endpoint(reply: bytes) -> Endpoint | None:
    # A text begins with a letter or a brace, and the first byte of the message is the number of its first field.
    if not reply or reply[0] > 0x1F:
        return None
    try:
        result = pb.bootstrap.BootstrapResult.FromString(reply)
    except DecodeError:
        return None
    return Endpoint(result.address, result.version or 2, result.protocol or "ttrpc") if result.address else None


def _text_endpoint(reply: bytes) -> Endpoint:
    text = reply.decode(errors="replace")
    if text.startswith("{"):
        try:
            found = json.loads(text)
            if int(found.get("version", 0)) >= 2:
                return Endpoint(str(found.get("address", "")), int(found["version"]), str(found.get("protocol") or "ttrpc"))
        except (ValueError, TypeError, AttributeError):
            pass
    return Endpoint(text)


def binary_name(runtime: str) -> str:
    """`containerd-shim-runc-v2` for `io.containerd.runc.v2`. Raises InvalidArgument for what is no name."""
    parts = runtime.split(".")
    if "/" in runtime or len(parts) < 2 or not parts[0]:
        raise InvalidArgument(f"invalid runtime name {runtime}, correct runtime name should be either format like "
                              "`io.containerd.runc.v2` or a full path to the binary: invalid argument")
    return f"containerd-shim-{parts[-2]}-{parts[-1]}"


def find_binary(runtime: str) -> str:
    """The program of a runtime. Raises InvalidArgument, NotFound."""
    if not runtime:
        raise InvalidArgument("no runtime name: invalid argument")
    if os.path.isabs(runtime):
        if not os.path.exists(runtime):
            raise NotFound(f"invalid custom binary path: stat {runtime}: no such file or directory")
        return runtime
    name = binary_name(runtime)
    found = shutil.which(name)
    if found is None:
        raise NotFound(f'runtime "{runtime}" binary not installed "{name}": file does not exist')
    return os.path.abspath(found)


class Programs:
    """Shims that are programs of PATH (or of a path of their own)."""

    def __init__(self, address: str, ttrpc_address: str, publish_binary: str, debug: bool = False) -> None:
        """The addresses of this server's sockets, and the program that shims publish with (`… publish --topic T`)."""
        self._address = address
        self._ttrpc_address = ttrpc_address
        self._publish_binary = publish_binary
        self._debug = debug
        self._takes_params: dict[str, bool] = {}

    def binary(self, runtime: str) -> str:
        """The program of a runtime. Raises InvalidArgument, NotFound."""
        return find_binary(runtime)

    def _run(self, binary: str, bundle: Bundle, action: list[str], stdin: bytes, limit_s: float) -> bytes:
        """What the program prints. Raises BoxshipError with what it says when it fails."""
        arguments = [binary, "-namespace", bundle.namespace, "-address", self._address,
                     "-publish-binary", self._publish_binary, "-id", bundle.id]
        if self._debug:
            arguments.append("-debug")
        environ = dict(os.environ, GOMAXPROCS="2", MAX_SHIM_VERSION="2", TTRPC_ADDRESS=self._ttrpc_address,
                       GRPC_ADDRESS=self._address, NAMESPACE=bundle.namespace)
        name = os.path.basename(binary)
        try:
            code, stdout, stderr = self.execute([*arguments, *action], bundle.path, environ, stdin, limit_s)
        except subprocess.TimeoutExpired:
            raise BoxshipError(f"{name} {action[-1]}: no answer within {limit_s:g} s") from None
        except OSError as error:
            raise BoxshipError(f"{binary}: {(error.strerror or str(error)).lower()}") from None
        if code != 0:
            text = (stderr + stdout).decode(errors="replace").strip()
            status = f"exit status {code}" if code > 0 else f"signal {-code}"
            raise BoxshipError(f"{text}: {status}" if text else f"{name} {action[-1]}: {status}")
        if stderr.strip():
            log.warning("%s: %s", name, stderr.decode(errors="replace").strip())
        return stdout

    def execute(
        self, argv: list[str], cwd: str, environ: dict[str, str], stdin: bytes, limit_s: float,
    ) -> tuple[int, bytes, bytes]:
        """Run a program to its end, in any thread: code, standard output and error. Raises OSError, subprocess.TimeoutExpired."""
        done = subprocess.run(argv, cwd=cwd, env=environ, input=stdin, capture_output=True, timeout=limit_s, check=False)
        return done.returncode, done.stdout, done.stderr

    def _params(self, launch: Launch) -> bytes:
        params = pb.bootstrap.BootstrapParams(
            instance_id=launch.bundle.id, namespace=launch.bundle.namespace,
            containerd_version=boxship.__version__, containerd_ttrpc_address=self._ttrpc_address,
            containerd_grpc_address=self._address, containerd_binary=self._publish_binary,
        )
        if launch.options is not None and launch.options.type_url:
            params.extensions.add().value.CopyFrom(launch.options)
        return bytes(params.SerializeToString())

    def _start(self, binary: str, launch: Launch) -> bytes:
        options = launch.options.SerializeToString() if launch.options is not None else b""
        first = self._takes_params.get(binary, False)
        try:
            reply = self._run(binary, launch.bundle, ["start"], self._params(launch) if first else options, START_TIMEOUT_S)
        except BoxshipError as error:
            if binary in self._takes_params:
                raise
            try:
                reply = self._run(binary, launch.bundle, ["start"], self._params(launch), START_TIMEOUT_S)
            except BoxshipError:
                raise error from None
            first = True
        self._takes_params[binary] = first
        return reply

    async def start(self, launch: Launch) -> Endpoint:
        """Of Launcher. Keeps the path of the program in the bundle, for `delete`."""
        binary = self.binary(launch.runtime)
        with open(launch.bundle.file("shim-binary-path"), "w") as file:
            file.write(binary)
        return parse_endpoint(await asyncio.to_thread(self._start, binary, launch))

    async def delete(self, launch: Launch) -> Any:
        """Of Launcher."""
        try:
            with open(launch.bundle.file("shim-binary-path")) as file:
                binary = file.read().strip()
        except OSError:
            binary = self.binary(launch.runtime)
        action = ["-bundle", launch.bundle.path, "delete"]
        reply = await asyncio.to_thread(self._run, binary, launch.bundle, action, b"", DELETE_TIMEOUT_S)
        try:
            return pb.task.DeleteResponse.FromString(reply)
        except DecodeError:
            raise BoxshipError(f"{os.path.basename(binary)} delete: what it printed is no answer") from None

    def unheard(self, bundle: Bundle) -> Endpoint | None:
        """Of Launcher: by the convention of containerd's own shims."""
        name = hashlib.sha256(f"{self._address}/{bundle.namespace}/{bundle.id}".encode()).hexdigest()
        folder = "/run/containerd/s" if user_of(os.environ) == 0 else f"{run_folder(os.environ)}/boxship/s"
        path = f"{folder}/{name}"
        # The newer version: an older shim says that it does not know it.
        return Endpoint(f"unix://{path}", VERSION_MAX) if os.path.exists(path) else None

    async def info(self, runtime: str, options: Any | None) -> Any:
        """Of Launcher. Raises Unsupported for a shim that does not know `-info`."""
        binary = self.binary(runtime)

        def ask() -> bytes:
            given = options.SerializeToString() if options is not None else b""
            try:
                done = subprocess.run([binary, "-info"], input=given, capture_output=True, timeout=10, check=False)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise BoxshipError(f"failed to run {binary} -info: {error}") from None
            if done.returncode != 0:
                raise Unsupported(f"{os.path.basename(binary)} does not tell about itself: not implemented")
            return bytes(done.stdout)

        told = await asyncio.to_thread(ask)
        return pb.types.RuntimeInfo.FromString(told)


