"""Containers and their processes as the shim knows them: data, and what follows from it.

Runs in: the shim. Not here: what is done with them (`boxship.shim.service`).
"""

from __future__ import annotations

from boxship.api.task import pb
from boxship.kit.loop import Later, Lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from boxship.api.oci_runtime.runtime import Runtime
    from boxship.linux.cgroups import Cgroup
    from boxship.linux.cgroups.group import OomEvents
    from boxship.shim.bundle import Options
    from boxship.shim.console import Console
    from boxship.shim.stdio import Stdio


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

    def close(self) -> None:
        """Release its streams."""
        if self.io is not None:
            self.io.close()
            self.io = None


class Container:
    """One container of the shim.

    Attributes:
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

    def running_execs(self) -> list[Process]:
        """Added processes that have not ended."""
        return [process for process in self.execs.values() if process.running]
