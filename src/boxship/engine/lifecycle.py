"""A container's life: start, stop, kill, pause, its exit and what follows, and finding it again after the daemon was gone.

Runs in: the daemon, on its event loop. A container's lock is held while its state changes.
Spec: Docker Engine API; containerd's Tasks service and its task events.

    created ──start──► running ⇄ paused
       ▲                  │ exit (event of containerd, or found at the daemon's start)
       │                  ▼
       └─ restart ◄─ restarting / exited ──rm──► gone
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from typing import Any

from boxship.api.containerd.pb import containers, events, task_events, tasks, types
from boxship.engine import create, networking, times, validate
from boxship.engine.container import Container
from boxship.engine.core import LABEL, Core, packed
from boxship.engine.errors import Failed, NotModified
from boxship.engine.health import Checker
from boxship.engine.logs import open_log
from boxship.engine.startup import Accounts, release, specification
from boxship.engine.stdio import Streams
from boxship.kit.errors import BoxshipError, FailedPrecondition, InvalidArgument, NotFound, Unavailable, from_os_error
from boxship.oci.text import dumps

RESOURCES_URL = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"
_DRAIN_S = 2.0
_KILL_S = 10.0
_BACKOFF_S, _BACKOFF_MAX_S, _STEADY_S = 0.1, 60.0, 10.0


class Lifecycle:
    """Runs containers. `open` finds again what runs; `close` leaves it running."""

    def __init__(self, core: Core, accounts: Accounts) -> None:
        self._core = core
        self._accounts = accounts
        self._background: set[asyncio.Task[Any]] = set()
        self._listener: asyncio.Task[None] | None = None
        self._closing = False
        self.checker = Checker(core, self.spawn)
        self.exec_exited: Any = None
        """Called with (container, exec id, exit status) by the event of a process beside the first."""

    def spawn(self, work: Any) -> asyncio.Task[Any]:
        """Run something beside; its failure is the event loop's to report."""
        task: asyncio.Task[Any] = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    # start

    async def start(self, container: Container) -> None:
        """Start. Raises NotModified when it runs, Failed with the runtime's words."""
        async with container.lock:
            if container.state.paused:
                raise FailedPrecondition("cannot start a paused container, try unpause instead")
            if container.state.running and not container.state.restarting:
                raise NotModified("")
            if container.state.removing or container.state.dead:
                raise FailedPrecondition("container is marked for removal and cannot be started")
            self._cancel_restart(container)
            container.state.restarting = False
            container.manually_stopped = False
            container.restart_delay, container.restart_count = 0.0, 0
            await self._start(container)

    async def _start(self, container: Container) -> None:
        core = self._core
        streams = self.streams(container)
        connected: asyncio.Future[None] | None = None
        try:
            sandbox = await networking.prepare(core, container)
            if sandbox is not None:
                connected = asyncio.ensure_future(core.networks.realize(sandbox))
            spec = await specification(core, self._accounts, container)
            self._open_streams(container, streams)
            record = containers.Container(id=container.id, spec=packed(create.SPEC_URL, dumps(spec).encode()))
            update = containers.UpdateContainerRequest(container=record)
            update.update_mask.paths.append("spec")
            await core.containerd.containers.Update(update, core.call)
            rootfs = await core.snapshots.mounts(container.id)
            if connected is not None:
                await connected
            made = await core.containerd.tasks.Create(tasks.CreateTaskRequest(
                container_id=container.id, rootfs=rootfs, stdin=streams.stdin, stdout=streams.stdout, stderr=streams.stderr,
                terminal=streams.terminal), core.call)
            container.state.pid = made.pid
            container.fresh = False
            await core.containerd.tasks.Start(tasks.StartRequest(container_id=container.id), core.call)
        except (BoxshipError, OSError) as error:
            failed = error if isinstance(error, BoxshipError) else from_os_error(error, "starting the container")
            if connected is not None:
                (also,) = await asyncio.gather(connected, return_exceptions=True)
                failed = networking.refused(error) if also is error and isinstance(error, BoxshipError) else failed
            raise await self._failed(container, streams, failed) from None
        streams.started.set()
        state = container.state
        state.running, state.paused, state.dead = True, False, False
        state.exit_code, state.error, state.oom_killed = 0, "", False
        state.started_at = times.now()
        core.save(container)
        core.announce(container, "start")
        self.checker.begin(container)

    def streams(self, container: Container) -> Streams:
        """The streams of the present or the next run; whoever attaches before the start gets them too."""
        if container.streams is None:
            container.streams = Streams(
                f"{self._core.stdio}/{container.id}", stdin=container.config["OpenStdin"], terminal=container.config["Tty"])
        return container.streams

    def _open_streams(self, container: Container, streams: Streams) -> None:
        streams.create()
        self._open_log(container, streams)
        streams.open()

    def _open_log(self, container: Container, streams: Streams) -> None:
        config = container.host["LogConfig"]["Config"] or {}
        path = container.log_path
        if container.log_driver == "local":
            os.makedirs(path.rpartition("/")[0], mode=0o700, exist_ok=True)
        attrs = {key: container.labels[key] for key in config.get("labels", "").split(",") if key in container.labels}
        env = dict(word.partition("=")[::2] for word in container.config["Env"] or [])
        attrs |= {key: env[key] for key in config.get("env", "").split(",") if key in env}
        container.log = open_log(path, container.log_driver, config, attrs)
        if container.log is not None:
            streams.write_log = container.log.write

    async def _failed(self, container: Container, streams: Streams, error: BoxshipError) -> BoxshipError:
        """Undo a start that failed, and say so in Docker's way."""
        core = self._core
        try:
            await core.containerd.tasks.Delete(tasks.DeleteTaskRequest(container_id=container.id), core.call)
        except BoxshipError:
            try:
                await core.containerd.tasks.Kill(tasks.KillRequest(container_id=container.id, signal=9, all=True), core.call)
                await core.containerd.tasks.Delete(tasks.DeleteTaskRequest(container_id=container.id), core.call)
            except BoxshipError:
                pass  # there was none
        await streams.drain(0.2)
        streams.close()
        self._close_log(container)
        container.streams = None
        release(core, container)
        networking.release(core, container)
        failure = Failed.of(error)
        state = container.state
        state.running, state.restarting, state.pid = False, False, 0
        state.exit_code, state.error = failure.exit_code, str(failure)
        core.save(container)
        container.wake(container.next_exit)
        if container.host["AutoRemove"]:
            await create.remove(core, container, with_volumes=True)
        return failure

    @staticmethod
    def _close_log(container: Container) -> None:
        if container.log is not None:
            container.log.close()
            container.log = None

    # exit

    async def _exited(self, container: Container, pid: int, code: int, at: str) -> None:
        """The first process is gone."""
        core = self._core
        async with container.lock:
            state = container.state
            if not state.running or state.restarting or (pid and state.pid != pid):
                return  # told twice: by the event and by the look at the daemon's start
            # At the daemon's start the event may come before the look: what waits in the FIFOs has to be read all the same.
            streams = self._reopen(container)
            await streams.drain(_DRAIN_S)
            streams.close()
            container.streams = None
            self._close_log(container)
            release(core, container)
            self.checker.end(container)
            ran = times.nanoseconds(at) - times.nanoseconds(state.started_at)
            state.running, state.paused, state.pid = False, False, 0
            state.exit_code, state.finished_at = code, at
            again = self._restarts(container, code)
            if again:
                container.restart_count += 1
                state.running, state.restarting = True, True
            core.save(container)
            networking.release(core, container)
            core.announce(container, "die", exitCode=str(code), execDuration=str(max(0, ran) // 1_000_000_000))
            container.wake(container.next_exit)
            for each in container.execs.values():
                each.gone()
            # Whoever waits has the answer. What the container had is taken down after that, before anything else is done to it.
            removed = container.host["AutoRemove"] and not again and not state.removing
            if removed:
                create.forget(core, container, with_volumes=True)
            await self._end_task(container)
            if removed:
                await create.discard(core, container)
            if again and not self._closing:
                container.restart_task = self.spawn(self._restart_later(container, ran / 1e9))

    async def _end_task(self, container: Container) -> None:
        """Let containerd forget a task that is over."""
        try:
            await self._core.containerd.tasks.Delete(tasks.DeleteTaskRequest(container_id=container.id), self._core.call)
        except NotFound:
            pass
        except BoxshipError as error:
            container.state.error = str(error)
            self._core.save(container)

    @staticmethod
    def _restarts(container: Container, code: int) -> bool:
        policy = container.host["RestartPolicy"]
        if container.manually_stopped or container.state.removing:
            return False
        if policy["Name"] in ("always", "unless-stopped"):
            return True
        limit = policy["MaximumRetryCount"]
        return policy["Name"] == "on-failure" and code != 0 and (not limit or container.restart_count < limit)

    async def _restart_later(self, container: Container, ran_s: float) -> None:
        delay = container.restart_delay
        delay = _BACKOFF_S if not delay or ran_s >= _STEADY_S else min(delay * 2, _BACKOFF_MAX_S)
        container.restart_delay = delay
        await asyncio.sleep(delay)
        async with container.lock:
            if not container.state.restarting or container.manually_stopped or container.state.removing:
                return
            container.restart_task = None
            container.state.restarting = False
            try:
                await self._start(container)
            except BoxshipError:
                # What cannot be started is tried again like what ended.
                if self._restarts(container, container.state.exit_code) and not self._closing:
                    container.restart_count += 1
                    container.state.running, container.state.restarting = True, True
                    container.restart_task = self.spawn(self._restart_later(container, 0.0))
                self._core.save(container)

    def _cancel_restart(self, container: Container) -> bool:
        task, container.restart_task = container.restart_task, None
        if task is not None:
            task.cancel()
        return task is not None

    # signals

    async def kill(self, container: Container, text: str) -> None:
        """Send a signal. Raises FailedPrecondition when it does not run."""
        try:
            number = validate.signal(text) if text else signal.SIGKILL
        except InvalidArgument as error:
            raise InvalidArgument(f"cannot kill container: {container.name}: {error}") from None
        self._require_running(container, "cannot kill container")
        async with container.lock:
            self._require_running(container, "cannot kill container")
            ends = number in (signal.SIGKILL, self.stop_signal(container))
            if ends:
                container.manually_stopped = True
                self._core.save(container)
            if container.state.restarting:
                if ends:
                    self._end_restarting(container)
                return
            await self._signal(container, number)
            paused = container.state.paused and ends
        self._core.announce(container, "kill", signal=str(int(number)))
        if paused:
            await self.unpause(container)
        if number == signal.SIGKILL:
            await self.wait_exit(container, 10)

    @staticmethod
    def _require_running(container: Container, doing: str) -> None:
        if not container.state.running:
            raise FailedPrecondition(f"{doing}: {container.name}: container {container.id} is not running")

    @staticmethod
    def stop_signal(container: Container) -> int:
        """The signal that asks it to end."""
        return validate.signal(container.config["StopSignal"] or "SIGTERM")

    async def _signal(self, container: Container, number: int) -> None:
        try:
            await self._core.containerd.tasks.Kill(tasks.KillRequest(container_id=container.id, signal=number), self._core.call)
        except NotFound:
            pass  # it ended by itself; the event is on its way

    def _end_restarting(self, container: Container) -> None:
        """A container that waits to be started again stays stopped."""
        self._cancel_restart(container)
        container.state.running, container.state.restarting = False, False
        self._core.save(container)
        container.wake(container.next_exit)

    async def stop(self, container: Container, timeout_s: int | None, sent: str = "") -> None:
        """Ask it to end, and after `timeout_s` seconds (-1: never) kill it. Raises NotModified when it does not run."""
        if not container.state.running:
            raise NotModified("")
        number = validate.signal(sent) if sent else self.stop_signal(container)
        if timeout_s is None:
            configured = container.config["StopTimeout"]
            timeout_s = 10 if configured is None else configured
        async with container.lock:
            container.manually_stopped = True
            self._core.save(container)
            if container.state.restarting:
                self._end_restarting(container)
                self._core.announce(container, "stop")
                return
        paused = container.state.paused
        await self._signal(container, number)
        self._core.announce(container, "kill", signal=str(int(number)))
        if paused:
            await self.unpause(container)
        if not await self.wait_exit(container, None if timeout_s < 0 else timeout_s):
            await self._signal(container, signal.SIGKILL)
            self._core.announce(container, "kill", signal="9")
            if not await self.wait_exit(container, 10):
                raise Unavailable(
                    f"cannot stop container: {container.id}: tried to kill container, but did not receive an exit event")
        self._core.announce(container, "stop")

    async def wait_exit(self, container: Container, limit: float | None) -> bool:
        """Wait until it does not run, at most `limit` seconds; whether that is so."""
        if not container.state.running:
            return True
        future = container.wait_for(container.next_exit)
        try:
            await asyncio.wait_for(future, limit)
        except TimeoutError:
            pass
        return not container.state.running

    async def restart(self, container: Container, timeout_s: int | None, sent: str = "") -> None:
        """Stop and start."""
        removes = container.host["AutoRemove"]
        container.host["AutoRemove"] = False
        try:
            try:
                await self.stop(container, timeout_s, sent)
            except NotModified:
                pass
            await self.start(container)
        finally:
            container.host["AutoRemove"] = removes
        self._core.announce(container, "restart")

    async def pause(self, container: Container) -> None:
        """Freeze. Raises FailedPrecondition."""
        async with container.lock:
            if not container.state.running:
                raise FailedPrecondition(f"container {container.id} is not running")
            if container.state.paused:
                raise FailedPrecondition(f"container {container.id} is already paused")
            if container.state.restarting:
                raise FailedPrecondition(f"container {container.id} is restarting, wait until the container is running")
            await self._core.containerd.tasks.Pause(tasks.PauseTaskRequest(container_id=container.id), self._core.call)
            container.state.paused = True
            self._core.save(container)
        self._core.announce(container, "pause")

    async def unpause(self, container: Container) -> None:
        """Thaw. Raises FailedPrecondition."""
        async with container.lock:
            if not container.state.paused:
                raise FailedPrecondition(f"Container {container.id} is not paused")
            await self._core.containerd.tasks.Resume(tasks.ResumeTaskRequest(container_id=container.id), self._core.call)
            container.state.paused = False
            self._core.save(container)
        self._core.announce(container, "unpause")

    async def resize(self, container: Container, width: int, height: int) -> None:
        """Resize its terminal. Raises FailedPrecondition."""
        if not container.state.running:
            raise FailedPrecondition(f"container {container.id} is not running")
        await self._core.containerd.tasks.ResizePty(
            tasks.ResizePtyRequest(container_id=container.id, width=width, height=height), self._core.call)
        self._core.announce(container, "resize", height=str(height), width=str(width))

    async def remove(self, container: Container, *, force: bool, with_volumes: bool) -> None:
        """Remove, after killing it with `force`. Raises FailedPrecondition when it runs."""
        state = container.state
        if state.removing:
            raise FailedPrecondition(f"removal of container {container.name} is already in progress")
        if state.running:
            if not force:
                how = ("is paused and must be unpaused first" if state.paused else
                       "is running: stop the container before removing or force remove")
                raise FailedPrecondition(f'cannot remove container "{container.name}": container {how}')
            container.manually_stopped = True
            container.host["AutoRemove"] = False
            if state.restarting:
                async with container.lock:
                    self._end_restarting(container)
            else:
                await self._signal(container, signal.SIGKILL)
                self._core.announce(container, "kill", signal=str(int(signal.SIGKILL)))
                if state.paused:
                    try:
                        await self.unpause(container)
                    except BoxshipError:
                        pass  # killed while it was frozen
                if not await self.wait_exit(container, 10):
                    raise Unavailable(f"could not kill container {container.id}")
        async with container.lock:
            await create.remove(self._core, container, with_volumes=with_volumes)

    async def update(self, container: Container, values: dict[str, Any]) -> None:
        """Change limits, on the running container too."""
        from boxship.engine import spec

        async with container.lock:
            host = {**container.host, **values}
            validate.resources(host)
            container.host = host
            self._core.save(container)
            if container.state.running and not container.state.restarting:
                await self._core.containerd.tasks.Update(tasks.UpdateTaskRequest(
                    container_id=container.id, resources=packed(RESOURCES_URL, json.dumps(spec.resources(host)).encode())),
                    self._core.call)
        self._core.announce(container, "update")

    # the daemon's own start and end

    async def open(self) -> None:
        """Find everything again, then follow the events."""
        core = self._core
        core.networks.open()
        for record in core.store.containers():
            core.restore(Container(record, f"{core.directory}/containers/{record['id']}"))
        await core.networks.sweep()
        ready = asyncio.Event()
        self._listener = self.spawn(self._listen(ready))
        await ready.wait()
        await self._reconcile()
        await self._reconcile_networks()
        await self._clean()
        for container in core.containers():
            if self._starts_with_the_daemon(container):
                self.spawn(self._start_again(container))

    @staticmethod
    def _starts_with_the_daemon(container: Container) -> bool:
        """Docker's rule: `always` also what was stopped by hand, `unless-stopped` what was not; neither what never ran."""
        state, policy = container.state, container.host["RestartPolicy"]["Name"]
        if state.running or state.restarting or state.removing or state.dead or state.started_at == times.ZERO:
            return False
        return policy == "always" or (policy == "unless-stopped" and not container.manually_stopped)

    async def _start_again(self, container: Container) -> None:
        try:
            await self.start(container)
        except BoxshipError:
            pass  # it runs already, or cannot be started: its record says why

    async def _reconcile_networks(self) -> None:
        """Take down the networks of containers that run no more."""
        networks = self._core.networks
        for container_id in networks.containers():
            container = self._core.by_id.get(container_id)
            if container is None or (not container.state.running and not container.lock.locked()):
                networks.release(container_id)
        await networks.resume()

    async def _reconcile(self) -> None:
        """Compare what the records say with the tasks that there are."""
        core = self._core
        # Only those that nobody is about to change: what happens after the list was made, the list does not know.
        before = {each.id: each.state.pid for each in core.containers() if not each.lock.locked()}
        found = await core.containerd.tasks.List(tasks.ListTasksRequest(), core.call)
        running = {task.container_id or task.id: task for task in found.tasks}
        for container in core.containers():
            task = running.get(container.id)
            state = container.state
            if container.lock.locked() or before.get(container.id) != state.pid:
                continue
            taken = container.streams is not None and container.streams.started.is_set()
            if state.running and taken and task is not None and task.status == types.RUNNING:
                continue
            if state.removing:
                async with container.lock:
                    state.removing = False
                    await create.remove(core, container, with_volumes=container.host["AutoRemove"])
            elif (task is not None and task.status == types.STOPPED and not state.running
                  and _time(task.exited_at) == state.finished_at):
                self.spawn(self._end_task(container))  # the daemon was killed between the answer and this
            elif task is not None and task.status in (types.RUNNING, types.PAUSED, types.PAUSING, types.STOPPED):
                async with container.lock:
                    self._take_up(container, task)
                if task.status == types.STOPPED:
                    self.spawn(self._exited(container, 0, task.exit_status, _time(task.exited_at)))
            elif task is not None:
                # Created and never started: the daemon was killed in between.
                await self._failed(container, self.streams(container),
                    Unavailable("the daemon ended while the container was started"))
            elif state.running and not state.restarting:
                self.spawn(self._exited(container, 0, 255, times.now()))
            elif state.restarting:
                container.restart_task = self.spawn(self._restart_later(container, 0.0))
            elif container.host["AutoRemove"] and state.finished_at != times.ZERO:
                async with container.lock:
                    await create.remove(core, container, with_volumes=True)

    def _take_up(self, container: Container, task: Any) -> None:
        """A task that outlived the former daemon: its streams, its log, its checks."""
        state = container.state
        self._reopen(container)
        if not state.running or state.restarting:
            state.started_at = times.now()
        state.running, state.restarting, state.pid = True, False, task.pid
        state.paused = task.status in (types.PAUSED, types.PAUSING)
        container.fresh = False
        self._core.save(container)
        if task.status != types.STOPPED:
            self.checker.begin(container)

    def _reopen(self, container: Container) -> Streams:
        """The streams of a container that a former daemon started, opened when they are not yet."""
        streams = self.streams(container)
        if not streams.started.is_set():
            try:
                self._open_log(container, streams)
                streams.open()
            except OSError:
                streams.close()  # the FIFOs are gone with the machine's /run; the container lives on without them
            streams.started.set()
        return streams

    async def _clean(self) -> None:
        """Take away what a killed daemon had begun to make."""
        core = self._core
        request = containers.ListContainersRequest(filters=[f'labels."{LABEL}"=={core.store.id}'])
        for each in (await core.containerd.containers.List(request, core.call)).containers:
            if each.id not in core.by_id:
                try:
                    await core.containerd.tasks.Kill(tasks.KillRequest(container_id=each.id, signal=9, all=True), core.call)
                    # The step of a build, in which the daemon was killed: what runs cannot be deleted.
                    await asyncio.wait_for(
                        core.containerd.tasks.Wait(tasks.WaitRequest(container_id=each.id), core.call), _KILL_S)
                except (BoxshipError, TimeoutError):
                    pass  # it is over, as nearly always
                try:
                    await core.containerd.tasks.Delete(tasks.DeleteTaskRequest(container_id=each.id), core.call)
                except BoxshipError:
                    pass  # there was none
                await create.discard(core, Container({
                    "id": each.id, "name": "", "created": "", "config": {}, "host": {}, "path": "", "args": [], "image_id": "",
                    "image_name": "", "snapshotter": each.snapshotter, "mounts": []}, f"{core.directory}/containers/{each.id}"))
        for folder in (f"{core.directory}/containers", core.stdio):
            if os.path.isdir(folder):
                create.sweep(*(f"{folder}/{name}" for name in os.listdir(folder) if name not in core.by_id))

    async def _listen(self, ready: asyncio.Event) -> None:
        """Follow containerd's task events for ever; after a break look at all tasks again."""
        core = self._core
        filters = [f"namespace=={core.settings.namespace},topic~=|^/tasks/|"]
        first = True
        while True:
            try:
                stream = core.containerd.events.Subscribe(events.SubscribeRequest(filters=filters), core.call)
                waiting = asyncio.ensure_future(anext(aiter(stream)))
                # The subscription is made by the first step of the stream, which does not return before an event comes.
                await asyncio.sleep(0.02)
                if first:
                    first = False
                    ready.set()
                else:
                    await self._reconcile()
                # A server may take longer to begin than to answer the first look; what fell in between is found by the second.
                self.spawn(self._look_again())
                self._handle(await waiting)
                async for envelope in stream:
                    self._handle(envelope)
            except (BoxshipError, StopAsyncIteration):
                pass  # containerd is away
            await asyncio.sleep(0.2)

    async def _look_again(self) -> None:
        await asyncio.sleep(1.0)
        try:
            await self._reconcile()
        except BoxshipError:
            pass  # containerd is away again: the next connection looks anew

    def _handle(self, envelope: Any) -> None:
        kind = envelope.topic.removeprefix("/tasks/")
        made: Any = {"exit": task_events.TaskExit, "oom": task_events.TaskOOM, "paused": task_events.TaskPaused,
                "resumed": task_events.TaskResumed}.get(kind)
        if made is None:
            return
        event = made.FromString(envelope.event.value)
        container = self._core.by_id.get(event.container_id)
        if container is None:
            return
        if kind == "exit" and event.id == event.container_id:
            self.spawn(self._exited(container, event.pid, event.exit_status, _time(event.exited_at)))
        elif kind == "exit" and self.exec_exited is not None:
            self.exec_exited(container, event.id, event.exit_status)
        elif kind == "oom":
            container.state.oom_killed = True
            self._core.announce(container, "oom")

    async def close(self) -> None:
        """End what is under way; containers run on."""
        self._closing = True
        for task in list(self._background):
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        for container in self._core.containers():
            if container.log is not None:
                container.log.close()
        await self._core.networks.close()
        self._core.store.close()


def _time(stamp: Any) -> str:
    ns = stamp.ToNanoseconds()
    return times.rfc3339(ns) if ns else times.now()
