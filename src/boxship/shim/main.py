"""The shim itself, once it listens: its loop, from the first call to the last.

Runs in: the shim, forked from the spawner (`boxship.shim.spawner`) by way of `boxship.shim.command`.
"""

from __future__ import annotations

import os
import traceback

from boxship.abi import syscalls
from boxship.api.task.services import TASK, TASK_V2, TASK_V3
from boxship.api.ttrpc.server import Server, Service
from boxship.kit.files import read_all
from boxship.kit.loop import Inbox, Loop
from boxship.linux import _sys
from boxship.shim.children import Children
from boxship.shim.forks import inline, own, programs
from boxship.shim.log import Log
from boxship.shim.publisher import Publisher
from boxship.shim.service import TaskService

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket

    from boxship.shim.forks import OwnRuntime

_PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 15, 36
_SIGTERM, _SIGINT, _SIGPIPE = 15, 2, 13
_NAME = b"containerd-shim\0"


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
    """Serve until containerd says that it is enough. `path` of the socket is removed then; the others as in their classes."""
    _sys.syscall(syscalls.PRCTL, _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    _sys.syscall(syscalls.PRCTL, _PR_SET_NAME, _NAME, 0, 0, 0)
    loop = Loop()
    inbox = Inbox(loop)
    children = Children(inbox)
    publisher = Publisher(loop, children, log, namespace, events, publish)
    service = TaskService(loop, children, publisher, log, namespace, own(own_runtime, environ),
                          inline(own_runtime, environ, children.ended), programs(environ), loop.stop)
    task = Service(TASK, service.find)
    server = Server(loop, listener, {TASK_V2: task, TASK_V3: task})

    def asked_to_end() -> None:
        # An operator's signal, or the machine's shutdown: with containers it would be their end.
        log.write("info", "shim received a signal to end", containers=len(service.containers))
        if not service.containers:
            loop.stop()

    for number in (_SIGTERM, _SIGINT):
        inbox.on(number, asked_to_end)
    log.write("debug", "shim is ready", pid=os.getpid(), path=path)
    while loop.running:
        try:
            loop.turn()
        except Exception:  # noqa: BLE001 - a bug must not be the end of the containers
            log.write("error", f"internal error: {traceback.format_exc()}")
    server.close()
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
