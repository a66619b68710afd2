"""The task service: what a shim does for containerd.

Runs in: the shim, which is its containers' parent; single-threaded, nothing here waits.
Spec: containerd.task.v2 and v3; the behaviour of containerd-shim-runc-v2.

What clients rely on:
* events come in the order created, started, (exec-added, exec-started, exit of the exec)…, exit, deleted;
* the exit of a container's first process is told last: processes without a pid namespace of their own are killed with it, and
  the added ones' exits come before;
* a process that ends before `Start` has answered is told as any other;
* how the container ended is in its bundle before anybody is told.
"""

from __future__ import annotations

import os
import select

from google.protobuf.empty_pb2 import Empty

from boxship.api.any import pack
from boxship.api.oci_runtime.runtime import Runtime, of_kill
from boxship.api.task import pb
from boxship.kit import failpoint
from boxship.kit.errors import AlreadyExists, BoxshipError, FailedPrecondition, InvalidArgument, NotFound, from_os_error
from boxship.kit.files import write_atomic
from boxship.kit.loop import IN, Later, now, run_step
from boxship.linux.process import exit_code
from boxship.shim import bundle as bundles
from boxship.shim.bundle import Options
from boxship.shim.console import Console
from boxship.shim.forks import in_fork
from boxship.shim.logger import SCHEMES, Logger
from boxship.shim.making import Making
from boxship.shim.metrics import metrics
from boxship.shim.process import Container, Process
from boxship.shim.stdio import Stdio, split_uri

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from typing import Any

    from boxship.api.oci_runtime.runtime import Carrier
    from boxship.kit.loop import Loop
    from boxship.shim.children import Children
    from boxship.shim.handover import Contents, Parcel
    from boxship.shim.log import Log
    from boxship.shim.publisher import Publisher

    Step = Generator[Later, object, Any]

_SIGKILL = 9
_CHECKPOINT_FLAGS = (
    ("open_tcp", "--tcp-established"), ("external_unix_sockets", "--ext-unix-sk"), ("terminal", "--shell-job"),
    ("file_locks", "--file-locks"),
)


class TaskService:
    """The service of one shim, for all containers of its pod."""

    def __init__(
        self, loop: Loop, children: Children, publisher: Publisher, log: Log, namespace: str, own_runtime: Carrier,
        own_inline: Carrier, programs: Carrier, leave: Callable[[], object],
    ) -> None:
        """`own_runtime` carries boxrun's commands out, `own_inline` those that take no time, `programs` other runtimes';
        `leave` is called when the shim shall end."""
        self._loop = loop
        self._children = children
        self._publisher = publisher
        self.log = log
        self._namespace = namespace
        self._own_runtime = own_runtime
        self._own_inline = own_inline
        self._programs = programs
        self._leave = leave
        self.containers: dict[str, Container] = {}
        self.withdraw: Callable[[], object] = lambda: None
        """Called when the shim is about to end: it takes no more callers."""
        self.is_held: Callable[[], bool] = lambda: False
        """Whether the shim stays without containers too."""

    def find(self, name: str) -> Callable[[Any], Later]:
        """The function for a method of the service. For `boxship.api.ttrpc.server`."""
        return answering(getattr(self, name.lower()))

    # --- finding

    def _container(self, id: str) -> Container:  # noqa: A002
        container = self.containers.get(id)
        if container is None or not container.created:
            raise NotFound("container not created: not found")
        return container

    def _process(self, request: Any) -> tuple[Container, Process]:
        container = self._container(request.id)
        if not request.exec_id:
            return container, container.init
        process = container.execs.get(request.exec_id)
        if process is None:
            raise NotFound(f"process {request.exec_id}: not found")
        return container, process

    # --- create

    def create(self, request: Any) -> Step:
        """Mount the root file system, open the streams, and let the runtime make the container."""
        if request.id in self.containers:
            raise AlreadyExists(f"container {request.id}: already exists")
        options = Options.unpack(request.options if request.HasField("options") else None)
        bundle = request.bundle
        runtime = self._runtime(options, bundle)
        init = Process("", request.terminal, (request.stdin, request.stdout, request.stderr))
        container = Container(request.id, bundle, options, runtime, init)
        container.checkpoint = request.checkpoint
        self.containers[request.id] = container
        try:
            yield from self._open_streams(container, init)
            failpoint.hit("shim.create.begin")
            making = Making(container, request.rootfs)
            if container.checkpoint:
                yield from making.finished(self._children.end(in_fork(lambda: making(lambda: 0))))
            else:
                command = runtime.create(
                    container.id, bundle, init.io.fds if isinstance(init.io, Stdio) else None, pid_file=f"{bundle}/init.pid",
                    console_socket=init.io.path if isinstance(init.io, Console) else "", no_pivot=options.no_pivot_root,
                    no_new_keyring=options.no_new_keyring, around=making)
                yield from making.finished(run_step(self._carried_out(command, "OCI runtime create failed")))
                failpoint.hit("shim.create.made")
                self._born(container)
        except BaseException:
            self._undo_create(container, bool(request.rootfs))
            raise
        finally:
            self._loop.soon(container.made.set)
        container.created = True
        self._publisher.publish(pb.events.TaskCreate(
            container_id=container.id, bundle=bundle, rootfs=request.rootfs, checkpoint=request.checkpoint, pid=init.pid,
            io=pb.events.TaskIO(stdin=request.stdin, stdout=request.stdout, stderr=request.stderr, terminal=request.terminal)))
        failpoint.hit("shim.create.done")
        return pb.task.CreateTaskResponse(pid=init.pid)

    def _runtime(self, options: Options, bundle: str, own: Carrier | None = None) -> Runtime:
        return Runtime(
            options.binary, options.root_of(self._namespace), f"{bundle}/log.json", systemd_cgroup=options.systemd_cgroup,
            carrier=(own or self._own_runtime) if options.binary == bundles.OWN_RUNTIME else self._programs,
            debug=self.log.is_debug)

    def _quick(self, container: Container) -> Runtime:
        """For commands that take no time with this container, unless it is one of a pod: the others shall not wait at all."""
        if container.is_quick and len(self.containers) == 1 and self._is_direct(container):
            return self._runtime(container.options, container.bundle, self._own_inline)
        return container.runtime

    def _carried_out(self, command: Any, what: str) -> Step:
        try:
            return (yield from self._children.carry_out(command))
        except BoxshipError as error:
            raise type(error)(f"{what}: {error}") from None

    def _open_streams(self, container: Container, process: Process) -> Step:
        logger = None
        stdin, stdout, stderr = process.streams
        if split_uri(stdout)[0] in SCHEMES:
            logger = Logger(self._loop, self._children)
            yield from logger.start(stdout, container.id, self._namespace)
        try:
            if process.terminal:
                process.io = Console(self._loop, logger)
                process.io.listen(container.bundle, f"{process.exec_id or 'init'}.pty")
            else:
                process.io = Stdio(self._loop, logger, (container.options.io_uid, container.options.io_gid))
            process.io.open(stdin, stdout, stderr)
        except BaseException:
            if process.io is None and logger is not None:
                logger.close()
            process.close()
            raise

    def _born(self, container: Container) -> None:
        """The container's first process is there: watch it."""
        init = container.init
        init.pid = bundles.read_pid(f"{container.bundle}/init.pid")
        assert init.io is not None
        # The end may be known already. It is told after whoever asked for the process has heard of it.
        end = self._children.end(init.pid)
        self._loop.soon(lambda: end.then(lambda later: self._init_ended(container, later)))
        init.io.handed_over()
        try:
            if container.cgroup is not None:
                container.oom = container.cgroup.oom_events()
                self._watch_memory(container)
        except (BoxshipError, OSError) as error:
            self.log.write("debug", f"out of memory is not watched: {error}", id=container.id)

    def _undo_create(self, container: Container, mounted: bool) -> None:
        del self.containers[container.id]
        container.init.close()
        self._forget_memory(container)
        if mounted:
            try:
                bundles.unmount_rootfs(container.bundle)
            except OSError as error:
                self.log.write("warning", f"failed to cleanup rootfs mount: {error}", id=container.id)

    # --- start

    def start(self, request: Any) -> Step:
        """Let the first process go on, or start an added one."""
        container, process = self._process(request)
        yield process.lock.take()
        try:
            if process.ended.done and process is container.init:
                raise FailedPrecondition("cannot start a container that has stopped")
            if process.started or process.ended.done:
                raise FailedPrecondition("cannot start a process that has been started")
            yield from (self._start_init(container) if process is container.init else self._start_exec(container, process))
        finally:
            process.lock.give()
        return pb.task.StartResponse(pid=process.pid)

    def _start_init(self, container: Container) -> Step:
        container.starting = starting = Later()
        # After the answer: whoever waits for it is told of the end then.
        try:
            failpoint.hit("shim.start.begin")
            if container.checkpoint:
                yield from self._restore(container)
            else:
                command = self._quick(container).start(container.id)
                yield from self._carried_out(command, "OCI runtime start failed")
            container.init.started = True
            failpoint.hit("shim.start.done")
            self._publisher.publish(pb.events.TaskStart(container_id=container.id, pid=container.init.pid))
        finally:
            container.starting = None
            self._loop.soon(starting.set)

    def _restore(self, container: Container) -> Step:
        io = container.init.io
        options = container.options
        work = options.criu_work_path or f"{container.bundle}/criu-work"
        os.makedirs(work, 0o700, exist_ok=True)
        making = Making(container, ())
        command = container.runtime.restore(
            container.id, container.bundle, io.fds if isinstance(io, Stdio) else None, image=container.checkpoint, work=work,
            pid_file=f"{container.bundle}/init.pid", console_socket=io.path if isinstance(io, Console) else "",
            no_pivot=options.no_pivot_root, around=making)
        yield from making.finished(run_step(self._carried_out(command, "OCI runtime restore failed")))
        self._born(container)

    def _start_exec(self, container: Container, process: Process) -> Step:
        if container.init.ended.done or container.exit is not None:
            raise FailedPrecondition(f"container {container.id} init process is not running")
        name = process.exec_id
        pid_file, spec = f"{container.bundle}/{name}.pid", f"{container.bundle}/{name}.process.json"
        try:
            write_atomic(spec, process.spec)
            yield from self._open_streams(container, process)
            command = container.runtime.exec(
                container.id, spec, process.io.fds if isinstance(process.io, Stdio) else None, pid_file=pid_file,
                console_socket=process.io.path if isinstance(process.io, Console) else "")
            yield from self._carried_out(command, "OCI runtime exec failed")
            process.pid = bundles.read_pid(pid_file)
            end = self._children.end(process.pid)
            assert process.io is not None
            process.io.handed_over()
        except BaseException:
            process.close()
            process.end(255, 0)
            raise
        finally:
            for path in (spec, pid_file):
                _unlink(path)
        process.started = True
        self._publisher.publish(pb.events.TaskExecStarted(container_id=container.id, exec_id=name, pid=process.pid))
        self._loop.soon(lambda: end.then(lambda later: self._exec_ended(container, process, later)))

    # --- ends

    def _init_ended(self, container: Container, later: Later) -> None:
        assert isinstance(later.value, tuple)
        status, at_ns = later.value
        container.exit = exit_code(status), at_ns
        failpoint.hit("shim.exit.seen")
        try:
            bundles.write_exit(container.bundle, container.init.pid, *container.exit)
        except OSError as error:
            self.log.write("error", f"the exit is not kept: {error}", id=container.id)
        failpoint.hit("shim.exit.kept")
        if not container.private_pids and container.cgroup is not None:
            try:
                container.cgroup.kill(_SIGKILL)
            except (BoxshipError, OSError) as error:
                self.log.write("warning", f"failed to kill init's children: {error}", id=container.id)
        self._tell_exit(container)

    def _tell_exit(self, container: Container) -> None:
        """When it is time to."""
        if container.exit is None or container.init.ended.done or container.running_execs():
            return
        if container.starting is not None:
            container.starting.then(lambda later: self._tell_exit(container))
            return
        self._memory(container)  # what the kernel killed it for is told before that it is dead
        status, at_ns = container.exit
        container.paused = False
        self._publish_exit(container, container.init, status, at_ns)

    def _exec_ended(self, container: Container, process: Process, later: Later) -> None:
        assert isinstance(later.value, tuple)
        status, at_ns = later.value
        self._publish_exit(container, process, exit_code(status), at_ns)
        self._tell_exit(container)

    def _publish_exit(self, container: Container, process: Process, status: int, at_ns: int) -> None:
        event = pb.events.TaskExit(
            container_id=container.id, id=process.exec_id or container.id, pid=process.pid, exit_status=status)
        event.exited_at.FromNanoseconds(at_ns)
        self._publisher.publish(event)
        process.end(status, at_ns)

    # --- workers

    @property
    def is_quiet(self) -> bool:
        """Whether nothing is under way."""
        return all(container.is_quiet for container in self.containers.values())

    def pack(self, parcel: Parcel) -> list[object]:
        """For `unpack`, in the next worker. Only while it is quiet."""
        return [container.pack(parcel) for container in self.containers.values()]

    def unpack(self, packed: list[Any], contents: Contents) -> None:
        """Undo `pack`, with a fresh one."""
        for one in packed:
            container = Container.unpack(one, contents, self._loop, self._children, self._runtime)
            self.containers[container.id] = container
            if container.oom is not None:
                self._watch_memory(container)
            for process in (*container.execs.values(), container.init):
                if process.running and not (process is container.init and container.exit is not None):
                    self._watch_end(container, process)

    def _watch_end(self, container: Container, process: Process) -> None:
        ended = self._children.end(process.pid)
        if process is container.init:
            ended.then(lambda later: self._init_ended(container, later))
        else:
            ended.then(lambda later: self._exec_ended(container, process, later))

    # --- lack of memory

    def _watch_memory(self, container: Container) -> None:
        assert container.oom is not None
        self._loop.add(container.oom.fileno(), IN, lambda events: self._memory(container))

    def _memory(self, container: Container) -> None:
        if container.oom is None:
            return
        # It may have been read since the loop saw it: before the exit, which came in the same turn.
        poll = select.poll()
        poll.register(container.oom.fileno(), select.POLLIN)
        if not poll.poll(0):
            return
        happened = container.oom.read()
        if happened:
            self._publisher.publish(pb.events.TaskOOM(container_id=container.id))
        elif happened is False:
            self._forget_memory(container)

    def _forget_memory(self, container: Container) -> None:
        if container.oom is not None:
            self._loop.remove(container.oom.fileno())
            container.oom.close()
            container.oom = None

    # --- delete

    def delete(self, request: Any) -> Step:
        """Forget a process that has ended; with the first one the container."""
        making = self.containers.get(request.id)
        if making is not None and not making.created:
            # A daemon that finds the shim in the middle of a create that an earlier one has asked for does not want it any more.
            yield making.made
        container, process = self._process(request)
        yield process.lock.take()
        try:
            if process.running and process.started:
                raise FailedPrecondition("cannot delete a running process" if process.exec_id else
                                         f"cannot delete container {container.id} that is not stopped: it is running")
            if process is container.init:
                yield from self._delete_container(container)
            else:
                if process.io is not None:
                    yield process.io.drained()
                process.close()
                container.execs.pop(process.exec_id, None)
        finally:
            process.lock.give()
        response = pb.task.DeleteResponse(pid=process.pid, exit_status=process.exit_status)
        if process.exited_at:
            response.exited_at.FromNanoseconds(process.exited_at)
        return response

    def _delete_container(self, container: Container) -> Step:
        failpoint.hit("shim.delete.begin")
        init = container.init
        if init.pid:
            command = (self._quick(container) if init.started else container.runtime).delete(container.id, force=not init.started)
            try:
                yield from self._carried_out(command, "failed to delete task")
            except BoxshipError as error:
                if "does not exist" not in str(error):
                    raise
            if init.running:
                yield init.ended  # it was never started, and has just been killed
        failpoint.hit("shim.delete.gone")
        if init.io is not None and init.started:
            yield init.io.drained()
        for process in container.execs.values():
            process.close()
        init.close()
        self._forget_memory(container)
        try:
            bundles.unmount_rootfs(container.bundle)
        except OSError as error:
            self.log.write("warning", f"failed to cleanup rootfs mount: {error}", id=container.id)
        failpoint.hit("shim.delete.unmounted")
        event = pb.events.TaskDelete(container_id=container.id, pid=init.pid, exit_status=init.exit_status)
        if init.exited_at:
            event.exited_at.FromNanoseconds(init.exited_at)
        self._publisher.publish(event)
        del self.containers[container.id]

    # --- added processes

    def exec(self, request: Any) -> Empty:
        """Remember a process that `Start` will start."""
        container = self._container(request.id)
        name = request.exec_id
        if not name or "/" in name or name in (".", ".."):
            raise InvalidArgument(f"exec id {name!r} is no name")
        if name in container.execs:
            raise AlreadyExists(f"id {name}: already exists")
        process = Process(name, request.terminal, (request.stdin, request.stdout, request.stderr))
        process.spec = request.spec.value
        if request.terminal:
            process.spec = _with_terminal(request.spec.value)
        container.execs[name] = process
        self._publisher.publish(pb.events.TaskExecAdded(container_id=container.id, exec_id=name))
        return Empty()

    # --- what can be done to them

    def kill(self, request: Any) -> Step:
        """Send a signal."""
        container, process = self._process(request)
        yield process.lock.take()
        try:
            if process is not container.init:
                if not process.pid and not process.ended.done:
                    raise FailedPrecondition("process not created")
                if not process.running:
                    raise NotFound("process already finished")
                _send(process.pid, request.signal)
            elif process.ended.done or (container.exit is not None and not request.all):
                raise NotFound("process already finished")
            elif not process.pid:
                raise FailedPrecondition("cannot kill a container that is not started")
            elif self._is_direct(container) and not request.all and not container.paused and container.private_pids:
                # The number is its own as long as we have not waited for it.
                _send(process.pid, request.signal)
            else:
                command = container.runtime.kill(container.id, request.signal, all=request.all)
                try:
                    yield from self._children.carry_out(command)
                except BoxshipError as error:
                    raise of_kill(error) from None
        finally:
            process.lock.give()
        return Empty()

    def _is_direct(self, container: Container) -> bool:
        return container.options.binary == bundles.OWN_RUNTIME

    def pause(self, request: Any) -> Step:
        """Freeze."""
        container = self._container(request.id)
        yield from self._locked(container, container.runtime.pause, "OCI runtime pause failed")
        container.paused = True
        self._publisher.publish(pb.events.TaskPaused(container_id=container.id))
        return Empty()

    def resume(self, request: Any) -> Step:
        """Let go on."""
        container = self._container(request.id)
        yield from self._locked(container, container.runtime.resume, "OCI runtime resume failed")
        container.paused = False
        self._publisher.publish(pb.events.TaskResumed(container_id=container.id))
        return Empty()

    def _locked(self, container: Container, begin: Callable[[str], Any], what: str) -> Step:
        lock = container.init.lock
        yield lock.take()
        try:
            if container.init.ended.done:
                raise FailedPrecondition(f"{what}: container not running")
            return (yield from self._carried_out(begin(container.id), what))
        finally:
            lock.give()

    def update(self, request: Any) -> Step:
        """Change limits."""
        container = self._container(request.id)
        resources = request.resources.value
        yield from self._locked(container, lambda name: container.runtime.update(name, resources), "OCI runtime update failed")
        return Empty()

    def checkpoint(self, request: Any) -> Step:
        """Write the processes' state to a folder."""
        container = self._container(request.id)
        options = pb.runc_options.CheckpointOptions()
        if request.HasField("options") and request.options.type_url.endswith("CheckpointOptions"):
            options.ParseFromString(request.options.value)
        flags = [flag for name, flag in _CHECKPOINT_FLAGS if getattr(options, name)]
        if not options.exit:
            flags.append("--leave-running")
        if options.cgroups_mode:
            flags += ["--manage-cgroups-mode", options.cgroups_mode]
        for namespace in options.empty_namespaces:
            flags += ["--empty-ns", namespace]
        image = options.image_path or request.path
        work = options.work_path or f"{container.bundle}/criu-work"
        os.makedirs(work, 0o700, exist_ok=True)
        yield from self._locked(
            container, lambda name: container.runtime.checkpoint(name, image=image, work=work, flags=flags),
            "OCI runtime checkpoint failed")
        self._publisher.publish(pb.events.TaskCheckpointed(container_id=container.id, checkpoint=request.path))
        return Empty()

    # --- streams

    def resizepty(self, request: Any) -> Empty:
        """Give the terminal another size; nothing happens without one."""
        _, process = self._process(request)
        if isinstance(process.io, Console):
            process.io.resize(request.width, request.height)
        return Empty()

    def closeio(self, request: Any) -> Empty:
        """Let the process read the end of its input."""
        _, process = self._process(request)
        if request.stdin and process.io is not None:
            process.io.close_stdin()
        return Empty()

    # --- looking

    def state(self, request: Any) -> Any:
        """What is known about a process."""
        container, process = self._process(request)
        stdin, stdout, stderr = process.streams
        response = pb.task.StateResponse(
            id=request.exec_id or container.id, bundle=container.bundle, pid=process.pid, stdin=stdin, stdout=stdout,
            stderr=stderr, terminal=process.terminal, exit_status=process.exit_status, exec_id=process.exec_id)
        response.status = container.status_of(process)  # type: ignore[assignment]
        if process.exited_at:
            response.exited_at.FromNanoseconds(process.exited_at)
        return response

    def wait(self, request: Any) -> Step:
        """Answered when the process has ended."""
        _, process = self._process(request)
        yield process.ended
        response = pb.task.WaitResponse(exit_status=process.exit_status)
        if process.exited_at:
            response.exited_at.FromNanoseconds(process.exited_at)
        return response

    def pids(self, request: Any) -> Step:
        """All processes of the container; the added ones by name. After the end, until its deletion, the first one: containerd 2
        takes a shim without processes for a leftover when it is started again, and the exit with it."""
        from boxship.oci import text

        container = self._container(request.id)
        if container.init.ended.done:
            return pb.task.PidsResponse(processes=[pb.types.ProcessInfo(pid=container.init.pid)])
        output = yield from self._children.carry_out(container.runtime.ps(container.id))
        found = text.loads(output, "ps")
        names = {process.pid: name for name, process in container.execs.items()}
        response = pb.task.PidsResponse()
        for pid in found if isinstance(found, list) else []:
            info = response.processes.add(pid=pid)
            if pid in names:
                info.info.CopyFrom(pack(pb.runc_options.ProcessDetails(exec_id=names[pid])))
        return response

    def stats(self, request: Any) -> Any:
        """What the control group counts."""
        container = self._container(request.id)
        if container.cgroup is None or not container.cgroup.exists():
            raise NotFound("cgroup does not exist")
        return pb.task.StatsResponse(stats=pack(metrics(container.cgroup)))

    def connect(self, request: Any) -> Any:
        """Who the shim is, and the container."""
        container = self._container(request.id)
        return pb.task.ConnectResponse(shim_pid=os.getppid(), task_pid=container.init.pid)

    def shutdown(self, request: Any) -> Empty:
        """End the shim, unless it still has containers, or a sandbox."""
        if not self.containers and not self.is_held():
            self.leave()
        return Empty()

    def leave(self) -> None:
        """End the shim. What is to be said is said first, the answer to the call that this is part of too."""
        self.withdraw()
        self._loop.soon(lambda: self._publisher.idle().then(lambda later: self._leave()))
        self._loop.after(5.0, self._leave)

    # --- all of a sandbox

    def kill_all(self) -> Step:
        """Kill every container, and wait for their ends."""
        for container in [*self.containers.values()]:
            yield container.made if not container.created else now()
            if container.id not in self.containers:
                continue
            try:
                yield from self.kill(pb.task.KillRequest(id=container.id, signal=_SIGKILL, all=True))
            except (NotFound, FailedPrecondition):
                continue  # it is over, or never was
            yield container.init.ended

    def remove_all(self) -> Step:
        """Kill and delete every container."""
        yield from self.kill_all()
        for container in [*self.containers.values()]:
            try:
                yield from self.delete(pb.task.DeleteRequest(id=container.id))
            except NotFound:
                continue  # somebody else was faster


def answering(function: Callable[[Any], Any]) -> Callable[[Any], Later]:
    """A method, whether it answers at once, with a Later or as a step, as `boxship.api.ttrpc.server` calls one."""

    def call(request: Any) -> Later:
        try:
            result = function(request)
        except BoxshipError as error:
            later = Later()
            later.fail(error)
            return later
        except OSError as error:
            later = Later()
            later.fail(from_os_error(error, function.__name__))
            return later
        except Exception as error:  # noqa: BLE001 - a bug is told to the client, and the containers live on
            later = Later()
            later.fail(error)
            return later
        if isinstance(result, Later):
            return result
        return run_step(_explained(result, function.__name__)) if hasattr(result, "send") else now(result)

    return call


def _explained(step: Step, name: str) -> Step:
    try:
        return (yield from step)
    except OSError as error:
        raise from_os_error(error, name) from None


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        raise NotFound("process already finished") from None
    except OSError as error:
        raise from_os_error(error, f"kill {pid}") from None


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def _with_terminal(spec: bytes) -> bytes:
    """The request's word on the terminal counts, as in containerd's own shim."""
    from boxship.oci import text

    process = text.loads(spec, "process")
    if isinstance(process, dict) and not process.get("terminal"):
        process["terminal"] = True
        return text.dumps(process).encode()
    return spec
