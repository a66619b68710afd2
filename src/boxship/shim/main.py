"""The shim itself, once it listens, from the first call to the last.

Runs in: the shim, forked from the spawner (`boxship.shim.spawner`), after what made it was answered (`boxship.shim.command`).

A shim is two processes while there is something to do, and one while there is not. The *holder* is the one that everybody knows
as the shim, the parent of its containers; it sleeps in C (`src/native/hold.c`), and passes on what containers write. A *worker*
is a fork of it that serves until nothing happens for a moment. So an idle shim's memory is the spawner's, which all shims share:
what the interpreter touches, and be it to count a reference, is a worker's own, and goes with it.
"""

from __future__ import annotations

import _socket
import marshal
import os
import traceback
from _struct import Struct

from boxship.abi import syscalls
from boxship.api.task.services import SANDBOX, SANDBOXES, TASK, TASK_V2, TASK_V3
from boxship.api.ttrpc.server import Server, Service
from boxship.kit import failpoint
from boxship.kit.errors import BoxshipError
from boxship.kit.files import read_all
from boxship.kit.loop import Inbox, Loop
from boxship.linux import _sys
from boxship.shim.children import Children
from boxship.shim.command import SHIM
from boxship.shim.forks import inline, own, programs, unpack_environ
from boxship.shim.handover import Contents, Parcel
from boxship.shim.log import Log
from boxship.shim.publisher import Publisher
from boxship.shim.sandbox import SandboxService
from boxship.shim.service import TaskService

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from boxship.shim.forks import OwnRuntime

_PR_SET_NAME = 15
_SIGTERM, _SIGINT, _SIGPIPE = 15, 2, 13
_NAME = b"containerd-shim\0"
_IDLE_S = 0.3
_TITLE = Struct("=QQ")
_TITLE_MAX = 2048


def settle(control: int, birth: bytes) -> None:
    """In the first worker: have the holder, and this process, be what the caller wants. Raises nothing: a shim that is not quite
    so is better than none."""
    know = marshal.loads(birth)
    log = Log(f"{know['bundle']}/log", debug=know["debug"])
    both = os.getppid(), os.getpid()
    for pid in both:
        _adjust_oom(pid, know["oom"])
    try:
        _set_title(control, f"{SHIM} -namespace {know['namespace']} -id {know['id']} -address {know['publish'][1]}")
    except OSError as error:
        log.write("debug", f"the process keeps the spawner's name: {error}")
    if know["cgroup"]:
        try:
            _enter_cgroup(know["cgroup"], both)
        except (BoxshipError, OSError) as error:
            log.write("error", f"failed to add shim to cgroup {know['cgroup']}: {error}")
    log.close()


def _set_title(control: int, title: str) -> None:
    """Have ps(1) show `title`, cut to the room that the spawner's own command line and environment had.

    Spec: proc(5): /proc/PID/cmdline goes on into the environment when the last byte of the arguments is no NUL.
    """
    stat = read_all("/proc/self/stat")
    start, _, _, end = (int(field) for field in stat[stat.rindex(b")") + 2 :].split(b" ")[45:49])
    room = end - start
    text = title.encode(errors="replace")[: min(room - 1, _TITLE_MAX)]
    os.write(control, _TITLE.pack(start, room) + text)
    _sys.syscall(syscalls.PRCTL, _PR_SET_NAME, _NAME, 0, 0, 0)
    memory = os.open("/proc/self/mem", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.pwrite(memory, text.ljust(room, b"\0"), start)
    finally:
        os.close(memory)


def _adjust_oom(pid: int, wanted: int | None) -> None:
    if wanted:
        try:
            fd = os.open(f"/proc/{pid}/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, str(wanted).encode())
            finally:
                os.close(fd)
        except OSError:
            pass  # lowering it needs CAP_SYS_RESOURCE


def _enter_cgroup(path: str, pids: Iterable[int]) -> None:
    from boxship.linux.cgroups import Cgroup
    from boxship.linux.cgroups.limits import Limits

    group = Cgroup.plan(path, "", systemd=False, rootless=os.geteuid() != 0)
    if group is not None:
        if not group.exists():
            group.create(Limits())
        for pid in pids:
            group.add(pid)


def run(control: int, birth: bytes, own_runtime: OwnRuntime, listener: int, contents: Contents | None = None) -> None:
    """In a worker: serve until there is nothing to do, or containerd says that it is enough.

    `birth`: what the shim has to know, see `boxship.shim.command.Start`; `listener`: the socket; `contents`: of the worker
    before.
    """
    know = marshal.loads(birth)
    os.umask(know["umask"])
    kept = contents.fd(contents.state[1]) if contents is not None else -1
    log = Log(f"{know['bundle']}/log", debug=know["debug"], kept=kept)
    environ, namespace = know["environ"], know["namespace"]
    if b"BOXSHIP_FAILPOINT=" in environ:
        failpoint.load(unpack_environ(environ))
    loop = Loop()
    inbox = Inbox(loop)
    children = Children(loop, inbox, control)
    publisher = Publisher(loop, children, log, namespace, know["events"], know["publish"])
    service = TaskService(loop, children, publisher, log, namespace, own(own_runtime, environ),
                          inline(own_runtime, environ, children.ended), programs(environ), loop.stop)
    sandbox = SandboxService(service)
    service.is_held = sandbox.is_held
    task = Service(TASK, service.find)
    services = {TASK_V2: task, TASK_V3: task, SANDBOX: Service(SANDBOXES, sandbox.find)}
    server = Server(loop, _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, listener), services)

    there = [know["path"]]

    def withdraw() -> None:
        # Once, and at the beginning of the end: another may take the place before this one is over.
        while there:
            try:
                os.unlink(there.pop())
            except FileNotFoundError:
                pass

    service.withdraw = withdraw

    def asked_to_end() -> None:
        # An operator's signal, or the machine's shutdown: with containers it would be their end.
        log.write("info", "shim received a signal to end", containers=len(service.containers))
        if not service.containers and not sandbox.is_held():
            withdraw()
            loop.stop()

    for number in (_SIGTERM, _SIGINT):
        inbox.on(number, asked_to_end)
    log.write("debug", "shim is ready", pid=os.getppid(), path=know["path"])
    if contents is not None:
        _, _, containers, connections, held = contents.state
        service.unpack(containers, contents)
        sandbox.unpack(held)
        for connection, last, calls in connections:
            server.adopt(contents.fd(connection), last, calls)
    while loop.running:
        try:
            quiet = (loop.is_idle and children.are_quiet and publisher.is_quiet and service.is_quiet
                     and server.pending() <= {"Wait", "WaitSandbox"})
            happened = loop.turn(_IDLE_S if quiet else -1.0)
            if quiet and not happened and _hand_over(loop, control, birth, publisher, service, sandbox, server):
                return
        except Exception:  # noqa: BLE001 - a bug must not be the end of the containers
            log.write("error", f"internal error: {traceback.format_exc()}")
    server.close()


def _hand_over(
    loop: Loop, control: int, birth: bytes, publisher: Publisher, service: TaskService, sandbox: SandboxService, server: Server,
) -> bool:
    """Whether it was possible."""
    publisher.hang_up()
    parcel = Parcel(loop)
    parcel.put(server.fileno())
    log = parcel.put(service.log.fileno())
    containers = service.pack(parcel)
    connections = [
        (parcel.put(connection.fileno()), connection.last,
         [(stream, payload) for stream, (_, payload) in connection.calls.items()])
        for connection in server.connections
    ]
    return parcel.send(control, (birth, log, containers, connections, sandbox.pack()))
