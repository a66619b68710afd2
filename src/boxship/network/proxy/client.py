"""The daemon's side of the helper: ports to be published, and whatever else is to be told again to a new helper.

Runs in: the daemon, in any thread; calls block, some milliseconds when a helper has to be started.

The client remembers what is to be. When the helper was killed, the next call (or the one that watches, `watch`) starts another
and tells it all; connections of the former are lost, and nothing else. `sync` makes a helper of a former daemon agree.
"""

from __future__ import annotations

import array
import fcntl
import json
import logging
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from boxship.kit.errors import BoxshipError, Internal, Unavailable, from_code
from boxship.network.proxy import control
from boxship.network.proxy.control import PortMapping

__all__ = ["PortMapping", "Proxy"]

log = logging.getLogger("boxship.network.proxy")

PATIENCE_S = 15.0
_NOTHING = "nothing"
_BATCH = 32
"""Messages on their way at a time; their answers fit into the socket's buffer."""

Message = dict[str, Any]


class Proxy:
    """All ports that the helper is to serve. Thread-safe."""

    def __init__(self, state_dir: str) -> None:
        self.folder = control.folder(state_dir)
        self.lock = threading.RLock()
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._told = ""
        """The instance of the helper that knows all of it; "" before this daemon has met one."""
        self._ports: dict[PortMapping, None] = {}
        self._tellers: list[Callable[[], Iterable[Message]]] = [self._tell_ports]
        self._closing = threading.Event()
        self._connected = threading.Event()
        """Set once there is something to watch, and at the end."""

    # ports

    def ensure(self) -> None:
        """A helper runs and serves all that was asked for. Raises BoxshipError."""
        with self.lock:
            self._connect()

    def publish(self, mapping: PortMapping, listener: socket.socket | None = None) -> None:
        """Serve a port; it listens when this returns. `listener` (borrowed) is a socket that is bound already.

        Publishing it again does nothing; another target of the same host port replaces the former.
        Raises BoxshipError with dockerd's text when the port is in use, Unsupported when the kernel lacks the protocol.
        """
        with self.lock:
            self._do({"do": "publish", "port": mapping}, [] if listener is None else [listener.fileno()])
            self._ports[mapping] = None

    def withdraw(self, mapping: PortMapping) -> None:
        """Stop serving a port: it is free, and its connections are closed, when this returns. It may be that it is not served."""
        with self.lock:
            self._ports.pop(mapping, None)
            if self.running():
                self.call({"do": "withdraw", "port": mapping})

    def sync(self, mappings: Iterable[PortMapping]) -> None:
        """Serve exactly these; ports that stay keep their connections. What cannot be served is logged. Raises BoxshipError."""
        with self.lock:
            self._ports = dict.fromkeys(mappings)
            if self._ports or self.running():
                self.tell(self._tell_ports())

    def _tell_ports(self) -> list[Message]:
        return [
            {"do": "begin", "what": "ports"},
            *({"do": "publish", "port": each} for each in self._ports),
            {"do": "end", "what": "ports"},
        ]

    # for the other parts that the helper serves

    def also_tell(self, teller: Callable[[], Iterable[Message]]) -> None:
        """What a new helper is to be told as well."""
        with self.lock:
            self._tellers.append(teller)

    def running(self) -> bool:
        """Whether there is a helper, without starting one; a new one is told everything when it is started."""
        with self.lock:
            try:
                return self._socket is not None or self._attach()
            except BoxshipError:
                return False

    def call(self, message: Message) -> Message:
        """One message, one answer. Raises BoxshipError as the helper says."""
        with self.lock:
            return self._do(message, [])

    def tell(self, messages: Iterable[Message]) -> None:
        """Many messages; what fails is logged. Raises BoxshipError when there is no helper."""
        with self.lock:
            self._connect()
            self._tell(list(messages))

    def watch(self) -> None:
        """Start a thread that replaces a helper that ends while there is something for it to do; until `close`."""
        threading.Thread(target=self._watch, name="network-helper", daemon=True).start()

    def close(self) -> None:
        """Let the helper be: it goes on with what it serves."""
        self._closing.set()
        self._connected.set()
        with self.lock:
            self._drop()

    def stop(self) -> None:
        """End the helper, and with it all ports and connections."""
        with self.lock:
            self._ports.clear()
            if self.running():
                try:
                    self._exchange([{"do": "stop"}], [])
                except Unavailable:
                    pass  # it may be gone before it has answered
            self.close()
            if self._process is not None:
                self._process.wait()
                self._process = None

    # the connection

    def _do(self, message: Message, fds: list[int]) -> Message:
        """All that can be asked for may be asked for twice; so that a helper that ends meanwhile is nobody's trouble, it is."""
        self._connect()
        try:
            return self._exchange([message], fds)[0]
        except Unavailable:
            self._connect()
            return self._exchange([message], fds)[0]

    def _connect(self) -> None:
        """A helper is there and knows everything."""
        if self._socket is not None:
            if not _ended(self._socket):
                return
            self._drop()
        deadline = time.monotonic() + PATIENCE_S
        pause_s = 0.001
        while not self._attach():
            if self._start():
                self._told = _NOTHING
                continue
            if time.monotonic() > deadline:
                raise Unavailable(f"the network helper does not answer at {self.folder}/{control.SOCKET}", "see its log there")
            # It is about to end, or another daemon is starting it.
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, 0.1)

    def _attach(self) -> bool:
        """Connect to a helper that runs; False when there is none."""
        try:
            folder_fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            made.settimeout(PATIENCE_S)
            made.connect(control.address(folder_fd))
            self._socket = made
            hello = self._exchange([{"do": "hello"}], [])[0]
            if hello.get("version") != control.VERSION:
                # One of another version of this package: its connections end with it.
                self._exchange([{"do": "stop"}], [])
                self._drop()
                return False
            # Before this daemon has said anything, what is there is a former daemon's, which `sync` decides about.
            if self._told and hello["instance"] != self._told:
                self._tell([message for teller in self._tellers for message in teller()])
            self._told = str(hello["instance"])
            self._connected.set()
        except (OSError, Unavailable):
            self._drop()
            made.close()
            return False
        finally:
            os.close(folder_fd)
        return True

    def _start(self) -> bool:
        """Start a helper; False when somebody else is doing that, or one still runs. Raises Unavailable."""
        if self._process is not None:
            self._process.poll()
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        folder_fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        lock = os.open(control.LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=folder_fd)
        output = -1
        try:
            try:
                # The lock belongs to the open file, which the helper inherits: it is free when the helper is gone.
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            try:
                os.unlink(control.SOCKET, dir_fd=folder_fd)
            except FileNotFoundError:
                pass
            # The socket is made here, so that it can be connected to while the helper is still starting.
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
                listener.bind(control.address(folder_fd))
                os.chmod(control.SOCKET, 0o600, dir_fd=folder_fd)
                listener.listen(16)
                output = os.open(control.LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600, dir_fd=folder_fd)
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-m", "boxship.network.proxy", str(listener.fileno())],
                    stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd="/",
                    pass_fds=[lock, listener.fileno()], start_new_session=True, env={},
                )
            return True
        except OSError as error:
            raise Unavailable(f"the network helper cannot be started: {(error.strerror or str(error)).lower()}") from error
        finally:
            for fd in (output, lock, folder_fd):
                if fd >= 0:
                    os.close(fd)

    def _drop(self) -> None:
        if self._socket is not None:
            try:
                self._socket.shutdown(socket.SHUT_RDWR)  # wakes the one that watches
            except OSError:
                pass  # the other side is gone already
            self._socket.close()
            self._socket = None

    def _tell(self, messages: list[Message]) -> None:
        for at in range(0, len(messages), _BATCH):
            for answer in self._ask(messages[at : at + _BATCH], []):
                if "error" in answer:
                    log.warning("%s", answer["error"])

    def _exchange(self, messages: list[Message], fds: list[int]) -> list[Message]:
        answers = self._ask(messages, fds)
        for answer in answers:
            if "error" in answer:
                raise from_code(int(answer.get("code", 2)), str(answer["error"]))
        return answers

    def _ask(self, messages: list[Message], fds: list[int]) -> list[Message]:
        """Raises Unavailable when the helper ends meanwhile."""
        assert self._socket is not None
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        answers: list[Message] = []
        try:
            for message in messages:
                data = json.dumps(message, separators=(",", ":")).encode()
                if len(data) > control.MESSAGE_MAX:
                    raise Internal(f"a message of {len(data)} bytes to the network helper is too long")
                self._socket.sendmsg([data], rights)
            for _ in messages:
                data = self._socket.recv(control.MESSAGE_MAX)
                if not data:
                    raise ConnectionResetError
                answers.append(json.loads(data))
        except OSError as error:
            self._drop()
            raise Unavailable(f"the network helper ended or does not answer: {error}", "see its log") from error
        except BaseException:
            self._drop()  # answers that nobody has read would be taken for those of the next question
            raise
        return answers

    def _watch(self) -> None:
        while not self._closing.is_set():
            self._connected.wait()
            with self.lock:
                watched = self._socket
                fd = -1 if watched is None else os.dup(watched.fileno())
            if fd >= 0:
                poll = select.poll()
                poll.register(fd, 0)  # its end alone, which is always told of
                poll.poll()
                os.close(fd)
            if not self._closing.is_set():
                self._replace(watched)

    def _replace(self, ended: socket.socket | None) -> None:
        """Start another helper when there is something for it to do."""
        with self.lock:
            if ended is not None and self._socket is ended:
                self._drop()
            if self._socket is not None:
                return
            try:
                if any(message["do"] not in ("begin", "end") for teller in self._tellers for message in teller()):
                    log.warning("the network helper has ended; another one is started")
                    self._connect()
                else:
                    self._connected.clear()
                return
            except BoxshipError as error:
                log.error("%s", error)
        self._closing.wait(1.0)


def _ended(connected: socket.socket) -> bool:
    """Whether the other side is gone. It says nothing unasked."""
    poll = select.poll()
    poll.register(connected, select.POLLIN)
    return bool(poll.poll(0))
