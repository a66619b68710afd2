"""The shim itself, once it listens, from the first call to the last.

Runs in: the shim, forked from the spawner (`boxship.shim.spawner`) by way of `boxship.shim.command`.

A shim is two processes while there is something to do, and one while there is not. The *holder* is the one that everybody knows
as the shim, the parent of its containers; it sleeps in C (`src/native/hold.c`), and passes on what containers write. A *worker*
is a fork of it that serves until nothing happens for a moment. So an idle shim's memory is the spawner's, which all shims share:
what the interpreter touches, and be it to count a reference, is a worker's own, and goes with it.
"""

from __future__ import annotations

import _socket
import os
import traceback

from boxship.abi import syscalls
from boxship.api.task.services import SANDBOX, SANDBOXES, TASK, TASK_V2, TASK_V3
from boxship.api.ttrpc.server import Server, Service
from boxship.kit.files import read_all
from boxship.kit.loop import Inbox, Loop
from boxship.linux import _sys
from boxship.shim.children import Children
from boxship.shim.forks import inline, own, programs
from boxship.shim.handover import Contents, Parcel
from boxship.shim.log import Log
from boxship.shim.publisher import Publisher
from boxship.shim.sandbox import SandboxService
from boxship.shim.service import TaskService

TYPE_CHECKING = False
if TYPE_CHECKING:
    from boxship.shim.forks import OwnRuntime

_PR_SET_NAME = 15
_SIGTERM, _SIGINT, _SIGPIPE = 15, 2, 13
_NAME = b"containerd-shim\0"
_IDLE_S = 0.3


def set_title(title: str) -> None:
    """Have ps(1) show `title`, cut to the room that the spawner's own command line and environment had. Raises OSError.

    Spec: proc(5): /proc/PID/cmdline goes on into the environment when the last byte of the arguments is no NUL.
    """
    stat = read_all("/proc/self/stat")
    start, _, _, end = (int(field) for field in stat[stat.rindex(b")") + 2 :].split(b" ")[45:49])
    room = end - start
    memory = os.open("/proc/self/mem", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.pwrite(memory, title.encode(errors="replace")[: room - 1].ljust(room, b"\0"), start)
    finally:
        os.close(memory)


def run(
    listener: _socket.socket, path: str, log: Log, namespace: str, events: str, publish: tuple[str, str],
    own_runtime: OwnRuntime, environ: bytes,
) -> None:
    """Serve until containerd says that it is enough. `path` of the socket is removed then; the others as in their classes.

    Returns in workers only. Raises OSError when there can be none.
    """
    _sys.syscall(syscalls.PRCTL, _PR_SET_NAME, _NAME, 0, 0, 0)
    control, fds = _sys.hold(listener.detach())
    # The worker.
    loop = Loop()
    inbox = Inbox(loop)
    children = Children(loop, inbox, control)
    publisher = Publisher(loop, children, log, namespace, events, publish)
    service = TaskService(loop, children, publisher, log, namespace, own(own_runtime, environ),
                          inline(own_runtime, environ, children.ended), programs(environ), loop.stop)
    sandbox = SandboxService(service)
    service.is_held = sandbox.is_held
    task = Service(TASK, service.find)
    services = {TASK_V2: task, TASK_V3: task, SANDBOX: Service(SANDBOXES, sandbox.find)}
    contents = Contents(fds) if len(fds) > 1 else None
    socket = contents.fd(1) if contents is not None else fds[0]
    server = Server(loop, _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, socket), services)

    def asked_to_end() -> None:
        # An operator's signal, or the machine's shutdown: with containers it would be their end.
        log.write("info", "shim received a signal to end", containers=len(service.containers))
        if not service.containers and not sandbox.is_held():
            loop.stop()

    for number in (_SIGTERM, _SIGINT):
        inbox.on(number, asked_to_end)
    log.write("debug", "shim is ready", pid=os.getpid(), path=path)
    if contents is not None:
        containers, connections, held = contents.state
        service.unpack(containers, contents)
        sandbox.unpack(held)
        for connection, last, calls in connections:
            server.adopt(contents.fd(connection), last, calls)
    while loop.running:
        try:
            quiet = (loop.is_idle and children.are_quiet and publisher.is_quiet and service.is_quiet
                     and server.pending() <= {"Wait", "WaitSandbox"})
            happened = loop.turn(_IDLE_S if quiet else -1.0)
            if quiet and not happened and _hand_over(loop, control, publisher, service, sandbox, server):
                return
        except Exception:  # noqa: BLE001 - a bug must not be the end of the containers
            log.write("error", f"internal error: {traceback.format_exc()}")
    server.close()
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def _hand_over(
    loop: Loop, control: int, publisher: Publisher, service: TaskService, sandbox: SandboxService, server: Server,
) -> bool:
    """Whether it was possible."""
    publisher.hang_up()
    parcel = Parcel(loop)
    parcel.put(server.fileno())
    containers = service.pack(parcel)
    connections = [
        (parcel.put(connection.fileno()), connection.last,
         [(stream, payload) for stream, (_, payload) in connection.calls.items()])
        for connection in server.connections
    ]
    return parcel.send(control, (containers, connections, sandbox.pack()))
