"""What a shim sees of containerd: a bundle, a socket that takes events, and calls. Works with any containerd-shim-*-v*."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from google.protobuf.any_pb2 import Any as AnyMessage

from boxship.api.any import PROCESS, pack, unpack
from boxship.api.task import pb
from boxship.api.task.services import EVENTS, TASK, TASK_V2
from boxship.api.ttrpc import wire
from boxship.api.ttrpc.client import Client
from boxship.kit.errors import NotFound, Unavailable
from boxship.oci.defaults import default_spec
from support import image

SHIM = Path(sys.executable).with_name("containerd-shim-boxship-v1")
NAMESPACE = "t-shim"


class Events:
    """containerd's ttRPC socket: every event that was forwarded, in order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.got: list[tuple[str, Any]] = []
        self._socket: socket.socket | None = None
        self._open: list[socket.socket] = []

    def up(self) -> None:
        """Answer from now on."""
        self.path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(self.path))
        self._socket.listen()
        threading.Thread(target=self._accept, args=(self._socket,), daemon=True).start()

    def down(self) -> None:
        """As a daemon that was killed: connections are closed, the socket's file stays."""
        assert self._socket is not None
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for conn in self._open:
            conn.shutdown(socket.SHUT_RDWR)
            conn.close()
        self._open = []

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                conn, _ = listener.accept()
            except OSError:
                return
            self._open.append(conn)
            threading.Thread(target=self._serve, args=(conn,), daemon=True).start()

    def _serve(self, conn: socket.socket) -> None:
        frames = wire.Frames()
        while True:
            try:
                data = conn.recv(65536)
            except OSError:
                return
            if not data:
                return
            for stream, _kind, _flags, payload in frames.feed(data):
                request = pb.ttrpc.Request.FromString(payload or b"")
                assert (request.service, request.method) == (EVENTS, "Forward")
                envelope = pb.events_service.ForwardRequest.FromString(request.payload).envelope
                assert envelope.namespace == NAMESPACE
                self.got.append((envelope.topic, unpack(envelope.event)))
                conn.sendall(wire.response(stream, b""))

    @property
    def topics(self) -> list[str]:
        """What happened, in short."""
        return [topic.removeprefix("/tasks/") for topic, _ in self.got]


def eventually(question: Callable[[], object], why: str = "", within_s: float = 10) -> Any:
    """Ask until the answer is true, and return it."""
    deadline = time.monotonic() + within_s
    while not (answer := question()):
        assert time.monotonic() < deadline, why or question
        time.sleep(0.005)
    return answer


class Daemon:
    """A stand-in for containerd: its folder, its socket for events, and the shims that it starts.

    Attributes:
        environ: added to that of shims.
        options: what containers are created with.
    """

    def __init__(self, shim: str | Path = SHIM, **options: Any) -> None:
        self.shim = str(shim)
        self.folder = Path(tempfile.mkdtemp(prefix="shim-", dir="/tmp"))
        self.address = str(self.folder / "containerd.sock")
        self.events = Events(self.folder / "containerd.sock.ttrpc")
        self.events.up()
        self.environ: dict[str, str] = {}
        self.publish = "/bin/false"
        self.options = pb.runc_options.Options(root=str(self.folder / "runtime"), **options)
        self.rootfs = self.folder / "rootfs"
        image.unpack(self.rootfs)
        self.tasks: list[Task] = []

    def task(self, name: str, *words: str, **settings: Any) -> Task:
        """A task on its way; see `Task`."""
        task = Task(self, f"{self.folder.name}-{name}", *words, **settings)
        self.tasks.append(task)
        return task

    def close(self) -> list[str]:
        """End everything; what is left of it, which should be nothing."""
        for task in self.tasks:
            task.clean()
        left = [line for line in Path("/proc/mounts").read_text().splitlines() if str(self.folder) in line]
        for name in os.listdir("/sys/fs/cgroup"):
            left += [str(path) for path in Path("/sys/fs/cgroup", name).glob(f"{self.folder.name}*")]
        shutil.rmtree(self.folder, ignore_errors=True)
        return left


class Task:
    """One container, and the connection to its shim."""

    def __init__(self, daemon: Daemon, id: str, *words: str, terminal: bool = False, mount: bool = True,  # noqa: A002
                 change: Callable[[dict[str, Any]], object] = lambda config: None) -> None:
        self.daemon = daemon
        self.id = id
        self.terminal = terminal
        self.bundle = daemon.folder / "tasks" / id
        self.bundle.mkdir(parents=True)
        (self.bundle / "rootfs").mkdir()
        config: Any = default_spec()
        config["process"]["args"] = list(words) or ["sleep", "1000"]
        config["process"]["terminal"] = terminal
        config["root"] = {"path": "rootfs", "readonly": False}
        config["linux"]["cgroupsPath"] = f"/{id}"
        config["ociVersion"] = "1.0.2"
        change(config)
        (self.bundle / "config.json").write_text(json.dumps(config))
        os.mkfifo(self.bundle / "log")
        self.log = os.open(self.bundle / "log", os.O_RDWR | os.O_NONBLOCK)
        self.streams: dict[str, str] = {}
        self.mounts = [pb.types.Mount(type="bind", source=str(daemon.rootfs), options=["rbind", "rw"])] if mount else []
        self.address = ""
        self.pid = 0
        self.client: Client | None = None
        self.fds: dict[str, int] = {}

    # --- the command line

    def run_shim(self, *action: str, given: bytes = b"", **settings: Any) -> subprocess.CompletedProcess[bytes]:
        """The shim's program, as containerd calls it."""
        environ = dict(os.environ, TTRPC_ADDRESS=str(self.daemon.events.path), GRPC_ADDRESS=self.daemon.address) | self.daemon.environ
        words = [self.daemon.shim, "-namespace", NAMESPACE, "-address", self.daemon.address, "-publish-binary", self.daemon.publish,
                 "-id", self.id, *action]
        return subprocess.run(words, cwd=self.bundle, env=environ, input=given, capture_output=True, timeout=30, **settings)

    def start_shim(self) -> Task:
        """`start`, and connect."""
        done = self.run_shim("start", given=pack(self.daemon.options).SerializeToString())
        assert done.returncode == 0, done
        self.address = done.stdout.decode().strip()
        self.connect()
        return self

    def connect(self) -> None:
        """Anew, as a daemon that was restarted."""
        self.client = Client(self.address)

    def delete_shim(self) -> Any:
        """`delete`, for a shim that is dead."""
        done = self.run_shim("-bundle", str(self.bundle), "delete")
        assert done.returncode == 0, done
        return pb.task.DeleteResponse.FromString(done.stdout)

    # --- calls

    def call(self, method: str, *, service: str = TASK_V2, timeout_s: float = 20, **fields: Any) -> Any:
        """A method of the task service for this container."""
        assert self.client is not None
        request, response = TASK[method]
        fields.setdefault("id", self.id)
        return self.client.call(service, method, request(**fields), response, namespace=NAMESPACE, timeout_s=timeout_s)

    def fifos(self, *names: str, where: str = "") -> dict[str, str]:
        """FIFOs for streams, opened at this end; the descriptors are in `fds`."""
        for name in names:
            path = str(self.bundle / f"{where}{name}")
            os.mkfifo(path)
            self.fds[where + name] = os.open(path, os.O_RDWR if name == "stdin" else os.O_RDONLY | os.O_NONBLOCK)
            self.streams[name] = path
        return {name: str(self.bundle / f"{where}{name}") for name in names}

    def create(self, **fields: Any) -> int:
        """Create; the pid."""
        fields = {"bundle": str(self.bundle), "rootfs": self.mounts, "terminal": self.terminal,
                  "options": pack(self.daemon.options)} | self.streams | fields
        self.pid = int(self.call("Create", **fields).pid)
        return self.pid

    def start(self, exec_id: str = "") -> int:
        """Start; the pid."""
        return int(self.call("Start", exec_id=exec_id).pid)

    def run(self) -> Task:
        """All of it."""
        self.start_shim()
        self.create()
        self.start()
        return self

    def exec(self, name: str, *words: str, terminal: bool = False, **streams: str) -> int:
        """Add a process and start it; the pid."""
        config = json.loads((self.bundle / "config.json").read_text())["process"]
        spec = AnyMessage(type_url=PROCESS, value=json.dumps(config | {"args": list(words), "terminal": terminal}).encode())
        self.call("Exec", exec_id=name, spec=spec, terminal=terminal, **streams)
        return self.start(name)

    def wait(self, exec_id: str = "") -> int:
        """Wait; the exit status."""
        return int(self.call("Wait", exec_id=exec_id).exit_status)

    def read(self, name: str, until: bytes | None = None, within_s: float = 10) -> bytes:
        """What comes out, to its end, or until something has come."""
        got = b""
        deadline = time.monotonic() + within_s
        while until is None or until not in got:
            assert time.monotonic() < deadline, got
            try:
                data = os.read(self.fds[name], 65536)
            except BlockingIOError:
                time.sleep(0.002)
                continue
            if not data:
                if until is None:
                    return got
                time.sleep(0.002)
            got += data
        return got

    def delete(self) -> Any:
        """Delete the container, and end the shim."""
        deleted = self.call("Delete")
        self.call("Shutdown")
        return deleted

    def shim_pid(self) -> int:
        """The shim's process."""
        return int(self.call("Connect").shim_pid)

    def clean(self) -> None:
        """Whatever state it is in."""
        if self.address:
            # A connection of its own: a test may have broken the other.
            try:
                self.connect()
                try:
                    os.kill(self.shim_pid(), signal.SIGKILL)
                except NotFound:
                    self.call("Shutdown")
            except Unavailable:
                pass
        self.run_shim("-bundle", str(self.bundle), "delete")
        if self.log >= 0:
            os.close(self.log)
            self.log = -1
        for fd in self.fds.values():
            os.close(fd)
        self.fds = {}
