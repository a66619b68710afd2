"""The notify socket: a container's "I am ready", carried to the service manager that started the runtime.

Runs in: the runtime, and never in a warm worker: systemd tells whose word it is by the sender's pid and cgroup.
Spec: sd_notify(3), sd_pid_notify_with_fds(3) "BARRIER=1"; runc's notify_socket.go.

    host                        ROOT/ID/notify/               container
      $NOTIFY_SOCKET              notify.sock                   /run/notify/notify.sock  (bind mount of the folder)
                                                                NOTIFY_SOCKET=/run/notify/notify.sock
      ◄── READY=1 ───────────── start, run ◄────────────────── READY=1
      ◄── MAINPID=…
      ◄── BARRIER=1 + pipe        until the other side closes it

`create` makes the folder and the mount, `start` and `run` the socket, before the user's program begins. The manager's own
socket is never in the container: nothing but readiness gets through.
"""

from __future__ import annotations

import os
import select
import time

from boxship.kit.errors import BoxshipError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket

    from boxship.oci.config import Spec
    from boxship.runtime.context import Context
    from boxship.runtime.state import Container

FOLDER = "notify"
IN_CONTAINER = "/run/notify"
_SOCKET = "notify.sock"
_BARRIER_S = 30.0


def prepare(context: Context, container: Container, spec: Spec) -> None:
    """Let the container being created have a notify socket, if the caller has one. Raises OSError."""
    if not context.environ.get("NOTIFY_SOCKET"):
        return
    from boxship.oci.config import Mount

    os.mkdir(FOLDER, dir_fd=container.fd)
    os.chmod(FOLDER, 0o755, dir_fd=container.fd)
    options = ["bind", "nosuid", "noexec", "nodev", "ro"]
    mount = Mount(destination=IN_CONTAINER, source=f"{container.path}/{FOLDER}", options=options)
    spec.mounts = [*spec.mounts, mount]
    if spec.process is not None:
        spec.process.env = [*spec.process.env, f"NOTIFY_SOCKET={IN_CONTAINER}/{_SOCKET}"]


def listen(context: Context, container: Container) -> _socket.socket | None:
    """Bind the container's socket; None when the caller has none, or had none at create. Raises OSError."""
    if not context.environ.get("NOTIFY_SOCKET"):
        return None
    import _socket

    try:
        folder = os.open(FOLDER, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=container.fd)
    except FileNotFoundError:
        return None
    # By way of the folder's descriptor: struct sockaddr_un has room for 107 bytes.
    path = f"/proc/self/fd/{folder}/{_SOCKET}"
    try:
        sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM, 0)
        try:
            sock.bind(path)
            os.chmod(path, 0o777)
        except BaseException:
            sock.close()
            raise
    finally:
        os.close(folder)
    return sock


def forward(context: Context, sock: _socket.socket, pid: int, main_pid: int) -> None:
    """Wait until the container says that it is ready, or init (`pid`) ends, and tell the manager; closes `sock`.

    `main_pid` is whom the manager is to watch from then on. Raises BoxshipError when the manager cannot be told.
    """
    try:
        ready = _wait(sock, pid)
        if ready:
            _tell(context, ready, main_pid)
    except OSError as error:
        raise BoxshipError(f"notify socket {context.environ['NOTIFY_SOCKET']}: {(error.strerror or '').lower()}") from None
    finally:
        sock.close()


def forward_or_warn(context: Context, sock: _socket.socket, pid: int, main_pid: int) -> None:
    """`forward`, where a manager that cannot be told is no reason for the command to fail."""
    try:
        forward(context, sock, pid, main_pid)
    except BoxshipError as error:
        context.warn(str(error))


def forward_beside(context: Context, sock: _socket.socket, pid: int) -> None:
    """`forward` in a thread, while the command itself waits for the container."""
    import _thread

    # The manager goes on watching the runtime, which ends when the container does.
    _thread.start_new_thread(forward_or_warn, (context, sock, pid, context.parent.pid))


def _wait(sock: _socket.socket, pid: int) -> bytes:
    """The line READY=…, or nothing when init ended without one."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return b""
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLIN)
    poll.register(handle, select.POLLIN)
    try:
        while True:
            events = {fd for fd, _ in poll.poll()}
            if sock.fileno() in events:
                for line in sock.recv(4096).split(b"\n"):
                    if line.startswith(b"READY="):
                        return line
            elif handle in events:
                return b""  # all that it sent was read before
    finally:
        os.close(handle)


def _tell(context: Context, ready: bytes, main_pid: int) -> None:
    import _socket

    path = context.environ["NOTIFY_SOCKET"]
    # "@" is how an abstract address is written.
    address = "\0" + path[1:] if path.startswith("@") else path
    manager = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM, 0)
    try:
        manager.connect(address)
        manager.send(ready + b"\n", _socket.MSG_NOSIGNAL)
        manager.send(b"MAINPID=%d\n" % main_pid, _socket.MSG_NOSIGNAL)
        _barrier(context, manager)
    finally:
        manager.close()


def _barrier(context: Context, manager: _socket.socket) -> None:
    """Wait until the manager has read it all: it closes the pipe then."""
    import _socket

    end, theirs = os.pipe2(os.O_CLOEXEC)
    try:
        try:
            rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, theirs.to_bytes(4, "little"))]
            manager.sendmsg([b"BARRIER=1"], rights, _socket.MSG_NOSIGNAL)
        finally:
            os.close(theirs)
        poll = select.poll()
        poll.register(end, select.POLLIN)
        deadline = time.monotonic() + _BARRIER_S
        while not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            if time.monotonic() >= deadline:
                context.warn("Timeout after waiting 30s for barrier. Ignored.")
                return
        if os.read(end, 1):
            raise BoxshipError("unexpected read from synchronization pipe")
    finally:
        os.close(end)
