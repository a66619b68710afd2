"""Events on their way to containerd, in their order, kept until it has taken them.

Runs in: the shim's loop.
Spec: containerd.services.events.ttrpc.v1.Events/Forward; for a containerd that tells no ttRPC address, its command `publish`.

One event is under way at a time. While containerd is down its socket's folder is watched, so that it has the events as soon as
it is back, and it is tried now and then.
"""

from __future__ import annotations

import _socket
import os
import time
from collections import deque

from boxship.abi import syscalls
from boxship.api.any import pack
from boxship.api.oci_runtime.runtime import execute
from boxship.api.task import pb
from boxship.api.task.services import EVENTS
from boxship.api.ttrpc import wire
from boxship.api.ttrpc.client import socket_address
from boxship.kit.errors import BoxshipError
from boxship.kit.loop import IN, Later
from boxship.linux import _sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from boxship.kit.loop import Loop, Timer
    from boxship.shim.children import Children
    from boxship.shim.log import Log

TOPICS = {
    "TaskCreate": "/tasks/create", "TaskStart": "/tasks/start", "TaskOOM": "/tasks/oom", "TaskExit": "/tasks/exit",
    "TaskDelete": "/tasks/delete", "TaskExecAdded": "/tasks/exec-added", "TaskExecStarted": "/tasks/exec-started",
    "TaskPaused": "/tasks/paused", "TaskResumed": "/tasks/resumed", "TaskCheckpointed": "/tasks/checkpointed",
}
_QUEUE_MAX = 4096
_ANSWER_S = 5.0
_RETRY_FIRST_S, _RETRY_LAST_S = 0.02, 5.0
_TRIES = 5
"""For an event that containerd is there for and refuses."""
_IN_CREATED = 0x100 | 0x80  # CREATE, MOVED_TO


class Publisher:
    """The queue and its connection."""

    def __init__(self, loop: Loop, children: Children, log: Log, namespace: str, address: str, publish: tuple[str, str]) -> None:
        """`address` of containerd's ttRPC socket, or "" and then (program, gRPC address) of `publish`."""
        self._loop = loop
        self._children = children
        self._log = log
        self._namespace = namespace
        self._address = address
        self._publish = publish
        self._queue: deque[tuple[str, Any]] = deque()
        self._conn: _socket.socket | None = None
        self._frames = wire.Frames()
        self._stream = 0
        self._busy = False
        self._tries = 0
        self._delay = _RETRY_FIRST_S
        self._answer: Timer | None = None
        self._retry: Timer | None = None
        self._watch = -1
        self._idle: list[Later] = []

    def publish(self, event: Any) -> None:
        """Queue an event, a message of containerd.events."""
        name = event.DESCRIPTOR.name
        envelope = pb.types.Envelope(namespace=self._namespace, topic=TOPICS[name], event=pack(event))
        envelope.timestamp.FromNanoseconds(time.time_ns())
        if len(self._queue) >= _QUEUE_MAX:
            self._make_room()
        self._queue.append((name, envelope))
        self._go_on()

    def _make_room(self) -> None:
        """The oldest that is no exit goes."""
        for index, (name, _) in enumerate(self._queue):
            if name != "TaskExit" and (index or not self._busy):
                self._log.write("error", "too many events wait for containerd: one is dropped", topic=TOPICS[name])
                del self._queue[index]
                return

    @property
    def is_quiet(self) -> bool:
        """Whether everything is delivered."""
        return not self._queue

    def hang_up(self) -> None:
        """End the connection until there is an event again. Only while it is quiet."""
        self._lost("events: nothing to say")

    def idle(self) -> Later:
        """Done when everything is delivered."""
        later = Later()
        if self._queue:
            self._idle.append(later)
        else:
            later.set()
        return later

    def _go_on(self) -> None:
        if self._busy or self._retry is not None:
            return
        if not self._queue:
            waiting, self._idle = self._idle, []
            for later in waiting:
                later.set()
            return
        self._busy = True
        if not self._address:
            self._run_publish()
        elif self._connect():
            self._send()

    # --- ttRPC

    def _connect(self) -> bool:
        if self._conn is not None:
            return True
        conn = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC, 0)
        conn.setblocking(False)
        try:
            conn.connect(socket_address(self._address))
        except OSError as error:
            conn.close()
            self._wait(f"containerd is not there: {(error.strerror or str(error)).lower()}")
            return False
        self._conn = conn
        self._frames = wire.Frames()
        self._stream = -1
        self._loop.add(conn.fileno(), IN, self._ready)
        return True

    def _send(self) -> None:
        assert self._conn is not None
        envelope = self._queue[0][1]
        self._stream += 2
        request = pb.events_service.ForwardRequest(envelope=envelope)
        data = wire.request(self._stream, EVENTS, "Forward", request.SerializeToString(), self._namespace, _ANSWER_S)
        try:
            # An event fits into the socket's buffer many times, and there is never more than one in it.
            sent = self._conn.send(data, _socket.MSG_NOSIGNAL)
        except OSError as error:
            self._lost(f"events: {(error.strerror or str(error)).lower()}")
            return
        if sent < len(data):
            self._lost("events: containerd does not read")
            return
        self._answer = self._loop.after(_ANSWER_S, lambda: self._lost("events: containerd does not answer"))

    def _ready(self, events: int) -> None:
        assert self._conn is not None
        try:
            data = self._conn.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lost("events: containerd closed the connection")
            return
        for stream, kind, _, payload in self._frames.feed(data):
            if kind == wire.RESPONSE and stream == self._stream and self._busy:
                self._answered(payload)

    def _answered(self, payload: bytes | None) -> None:
        self._cancel_answer()
        try:
            wire.result(payload, pb.ttrpc.Response)
        except BoxshipError as error:
            self._tries += 1
            if self._tries < _TRIES:
                self._wait(f"events: {error}")
                return
            self._log.write("error", f"event refused: {error}", topic=self._queue[0][1].topic)
        self._delivered()

    def _delivered(self) -> None:
        self._queue.popleft()
        self._tries = 0
        self._delay = _RETRY_FIRST_S
        self._busy = False
        self._unwatch()
        self._go_on()

    def _cancel_answer(self) -> None:
        if self._answer is not None:
            self._answer.cancel()
            self._answer = None

    def _lost(self, why: str) -> None:
        """The connection is of no use any more; what was under way is sent again."""
        self._cancel_answer()
        if self._conn is not None:
            self._loop.remove(self._conn.fileno())
            self._conn.close()
            self._conn = None
        if self._busy:
            self._wait(why)

    # --- while containerd is down

    def _wait(self, why: str) -> None:
        self._log.write("debug", why)
        self._busy = False
        self._watch_folder()
        self._retry = self._loop.after(self._delay, self._again)
        self._delay = min(self._delay * 2, _RETRY_LAST_S)

    def _again(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        self._go_on()

    def _watch_folder(self) -> None:
        path = self._address.removeprefix("unix://")
        if self._watch >= 0 or not path.startswith("/"):
            return
        self._watch = _sys.syscall(syscalls.INOTIFY_INIT1, os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            _sys.syscall(syscalls.INOTIFY_ADD_WATCH, self._watch, os.fsencode(os.path.dirname(path)) + b"\0", _IN_CREATED)
        except OSError:
            os.close(self._watch)
            self._watch = -1
            return
        self._loop.add(self._watch, IN, self._folder_changed)

    def _folder_changed(self, events: int) -> None:
        try:
            os.read(self._watch, 65536)
        except BlockingIOError:
            return
        # Made, and perhaps not listened to yet: from the shortest delay on.
        self._delay = _RETRY_FIRST_S
        self._again()

    def _unwatch(self) -> None:
        if self._watch >= 0:
            self._loop.remove(self._watch)
            os.close(self._watch)
            self._watch = -1

    # --- containerd's own program

    def _run_publish(self) -> None:
        program, address = self._publish
        topic, event = self._queue[0][1].topic, self._queue[0][1].event.SerializeToString()
        given = os.memfd_create("event", os.MFD_CLOEXEC)
        null = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(given, event)
            os.lseek(given, 0, os.SEEK_SET)
            argv = [program, "--address", address, "publish", "--topic", topic, "--namespace", self._namespace]
            pid = execute(argv, (given, null, null))
        except OSError as error:
            self._log.write("error", f"{program} publish: {(error.strerror or str(error)).lower()}")
            self._delivered()
            return
        finally:
            os.close(given)
            os.close(null)

        def ended(later: Later) -> None:
            assert isinstance(later.value, tuple)
            if later.value[0] != 0:
                self._wait(f"{program} publish: wait status {later.value[0]}")
            else:
                self._delivered()

        self._children.end(pid).then(ended)
