"""Containers and their processes as the shim knows them: data, and what follows from it.

Runs in: the shim. Not here: what is done with them (`boxship.shim.service`).
"""

from __future__ import annotations

from boxship.api.task import pb
from boxship.kit.errors import BoxshipError
from boxship.kit.loop import Later, Lock
from boxship.linux.cgroups import Cgroup
from boxship.shim.bundle import Options
from boxship.shim.console import Console
from boxship.shim.logger import Logger
from boxship.shim.stdio import Stdio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from boxship.api.oci_runtime.runtime import Runtime
    from boxship.kit.loop import Loop
    from boxship.linux.cgroups.group import OomEvents
    from boxship.shim.children import Children
    from boxship.shim.handover import Contents, Parcel


class Process:
    """A container's first process (`exec_id` is "") or an added one.

    Attributes:
        pid: 0 before it was started.
        started: whether it has been let go.
        ended: set with the exit status, when clients may know it.
        exit_status, exited_at: valid once `ended` is done; time in ns.
        lock: one command at a time.
    """

    def __init__(self, exec_id: str, terminal: bool, streams: tuple[str, str, str]) -> None:
        self.exec_id = exec_id
        self.terminal = terminal
        self.streams = streams
        self.io: Stdio | Console | None = None
        self.pid = 0
        self.started = False
        self.ended = Later()
        self.exit_status = 0
        self.exited_at = 0
        self.lock = Lock()
        self.spec = b""

    @property
    def running(self) -> bool:
        """Whether there is a process."""
        return self.pid > 0 and not self.ended.done

    def end(self, status: int, at_ns: int) -> None:
        """It is over."""
        self.exit_status, self.exited_at = status, at_ns
        self.ended.set(status)
        if self.io is not None:
            self.io.process_ended()

    def pack(self, parcel: Parcel) -> tuple[object, ...]:
        """For `unpack`, in the next worker."""
        io = self.io
        logger = io.logger.pid if io is not None and io.logger is not None else -1
        return (self.exec_id, self.terminal, self.streams, self.pid, self.started, self.ended.done, self.exit_status,
                self.exited_at, self.spec, io and io.pack(parcel), logger)

    @classmethod
    def unpack(cls, packed: tuple[Any, ...], contents: Contents, loop: Loop, children: Children) -> Process:
        """Undo `pack`."""
        exec_id, terminal, streams, pid, started, ended, exit_status, exited_at, spec, io, logger_pid = packed
        process = cls(exec_id, terminal, streams)
        process.pid, process.started, process.spec = pid, started, spec
        if ended:
            process.end(exit_status, exited_at)
        if io is not None:
            logger = None
            if logger_pid >= 0:
                logger = Logger(loop, children)
                logger.pid = logger_pid
            process.io = Console(loop, logger) if terminal else Stdio(loop, logger)
            process.io.unpack(io, contents)
        return process

    def close(self) -> None:
        """Release its streams."""
        if self.io is not None:
            self.io.close()
            self.io = None


class Container:
    """One container of the shim.

    Attributes:
        made: set when it was created, or could not be.
        starting: while `start` is under way: set when its answer is given.
        exit: the first process's end while it must not be told yet, (status, time).
        private_pids: whether all its processes die with the first.
        is_quick: whether starting and deleting it waits for nobody.
        checkpoint: the folder that it is to be started from, or "".
    """

    def __init__(self, id: str, bundle: str, options: Options, runtime: Runtime, init: Process) -> None:  # noqa: A002
        self.id = id
        self.bundle = bundle
        self.options = options
        self.runtime = runtime
        self.init = init
        self.execs: dict[str, Process] = {}
        self.created = False
        self.made = Later()
        self.paused = False
        self.private_pids = True
        self.is_quick = False
        self.checkpoint = ""
        self.starting: Later | None = None
        self.exit: tuple[int, int] | None = None
        self.cgroup: Cgroup | None = None
        self.oom: OomEvents | None = None

    def status_of(self, process: Process) -> int:
        """In the words of the API."""
        if process.ended.done:
            return pb.types.STOPPED
        if process is not self.init:
            return pb.types.RUNNING if process.started else pb.types.CREATED
        if self.paused:
            return pb.types.PAUSED
        return pb.types.RUNNING if process.started else pb.types.CREATED

    @property
    def is_quiet(self) -> bool:
        """Whether nothing is under way with it."""
        processes = [self.init, *self.execs.values()]
        return self.created and self.starting is None and not any(process.lock.is_held for process in processes)

    def pack(self, parcel: Parcel) -> tuple[object, ...]:
        """For `unpack`, in the next worker."""
        return (self.id, self.bundle, [getattr(self.options, name) for name in Options.FIELDS], self.init.pack(parcel),
                [process.pack(parcel) for process in self.execs.values()], self.paused, self.private_pids, self.is_quick,
                self.checkpoint, self.exit, self.cgroup and self.cgroup.encode(),
                [parcel.put(fd) for fd in self.oom.fds] if self.oom is not None else [])

    @classmethod
    def unpack(
        cls, packed: tuple[Any, ...], contents: Contents, loop: Loop, children: Children,
        runtime: Callable[[Options, str], Runtime],
    ) -> Container:
        """Undo `pack`; `runtime` of options and a bundle."""
        id, bundle, values, init, execs, paused, private_pids, is_quick, checkpoint, exit, cgroup, oom = packed  # noqa: A001
        options = Options()
        for name, value in zip(Options.FIELDS, values, strict=True):
            setattr(options, name, value)
        container = cls(id, bundle, options, runtime(options, bundle), Process.unpack(init, contents, loop, children))
        for one in execs:
            process = Process.unpack(one, contents, loop, children)
            container.execs[process.exec_id] = process
        container.created = True
        container.made.set()
        container.paused, container.private_pids, container.is_quick = paused, private_pids, is_quick
        container.checkpoint, container.exit = checkpoint, exit
        if cgroup is not None:
            container.cgroup = Cgroup.decode(cgroup)
            if oom:
                try:
                    container.oom = container.cgroup.oom_events([contents.fd(place) for place in oom])
                except (BoxshipError, OSError):
                    pass  # the group is gone
        return container

    def running_execs(self) -> list[Process]:
        """Added processes that have not ended."""
        return [process for process in self.execs.values() if process.running]
