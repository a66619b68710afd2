"""The shims that this daemon knows: started, found again after a restart, cleaned up when they die.

Runs in: the daemon, on its event loop.
Spec: containerd's runtime v2. A shim outlives the daemon. What is known about it is in its bundle:

    start                  bundle made → shim started → bootstrap.json written → connected → task created
    restart of the daemon  each bundle: bootstrap.json read → connected → the shim asked for its task
    connection lost        the shim is dead: `delete` kills what is left of the container and tells its exit, which is published
    bundle without a shim  the same

The order is such that a daemon killed at any point leaves a bundle that the next one can finish: a shim without a task is
shut down.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

from google.protobuf.empty_pb2 import Empty

from boxship.api.containerd import ttrpc
from boxship.api.containerd.call import Call
from boxship.api.task import pb
from boxship.containerd.events import Exchange
from boxship.containerd.tasks import bundle as bundles
from boxship.containerd.tasks.bundle import Bundle
from boxship.containerd.tasks.launch import Endpoint, Launch, Launcher, parse_endpoint
from boxship.kit.errors import AlreadyExists, BoxshipError, DeadlineExceeded, NotFound, Unavailable, Unsupported
from boxship.kit.files import write_atomic

log = logging.getLogger("boxship.shim")

LOAD_TIMEOUT_S = 5.0
ABANDON_TIMEOUT_S = 60.0
SHUTDOWN_TIMEOUT_S = 3.0
CLOSE_GRACE_S = 5.0
LOG_LINE_MAX = 8192

RESPONSES = {
    "State": pb.task.StateResponse, "Create": pb.task.CreateTaskResponse, "Start": pb.task.StartResponse,
    "Delete": pb.task.DeleteResponse, "Pids": pb.task.PidsResponse, "Pause": Empty, "Resume": Empty, "Checkpoint": Empty,
    "Kill": Empty, "Exec": Empty, "ResizePty": Empty, "CloseIO": Empty, "Update": Empty, "Wait": pb.task.WaitResponse,
    "Stats": pb.task.StatsResponse, "Connect": pb.task.ConnectResponse, "Shutdown": Empty,
}


class Shim:
    """One task's connection to its shim."""

    def __init__(self, bundle: Bundle, endpoint: Endpoint, launch: Launch) -> None:
        self.bundle = bundle
        self.endpoint = endpoint
        self.launch = launch
        self.sandboxed = False
        """Whether the shim belongs to a sandbox, which ends it."""
        self.abandoned = False
        """Whether somebody is at work on its end already."""
        self.connection: ttrpc.Connection | None = None
        self.exit: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        """Set when the shim died: a DeleteResponse."""
        self.log_fd = -1

    async def call(self, method: str, request: Any, timeout_s: float | None = None) -> Any:
        """Call a method of the task service. Raises what the shim answers, and Unavailable when it is gone.

        A shim that does not know the version of the service that it promised is asked in the older one's name from then on.
        """
        if self.connection is None:
            raise Unavailable(ttrpc.CLOSED)
        call = Call(self.bundle.namespace, timeout=timeout_s)
        try:
            return await self.connection.call(self._service(), method, request, RESPONSES[method], call)
        except Unsupported:
            if self.endpoint.version < 3 or method not in ("Create", "Connect", "State"):
                raise
            self.endpoint.version = 2
            return await self.connection.call(self._service(), method, request, RESPONSES[method], call)

    async def sandbox(self, method: str, request: Any, response: Any) -> Any:
        """Call a method of the sandbox service, whose answer is a `response`. Raises as `call` does."""
        if self.connection is None:
            raise Unavailable(ttrpc.CLOSED)
        service = "containerd.runtime.sandbox.v1.Sandbox"
        return await self.connection.call(service, method, request, response, Call(self.bundle.namespace))

    def _service(self) -> str:
        return f"containerd.task.v{self.endpoint.version}.Task"

    async def connect(self, lost: Callable[[], None] | None) -> None:
        """Connect; `lost` is called when the connection ends by itself. Raises Unavailable."""
        self.connection = await ttrpc.dial(self.endpoint.address, lost)

    def lost(self) -> bool:
        """Whether the shim is gone."""
        return self.connection is None or self.connection.closed

    def disconnect(self) -> None:
        """Close the connection and the log, without a call of `lost`."""
        if self.connection is not None:
            self.connection.abandon()
        self.close_log()

    # The FIFO is opened for writing too: the shim's end may come and go, and an end of file would come up again and again.
    def open_log(self) -> None:
        """Copy what the shim writes to its log into ours, from now on. Raises OSError."""
        path = self.bundle.file("log")
        if not os.path.exists(path):
            os.mkfifo(path, 0o700)
        self.log_fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        asyncio.get_running_loop().add_reader(self.log_fd, self._read_log)

    def _read_log(self) -> None:
        try:
            data = os.read(self.log_fd, 65536)
        except BlockingIOError:
            return
        for line in data.decode(errors="replace").splitlines():
            log.info("%s", line[:LOG_LINE_MAX], extra={"namespace": self.bundle.namespace, "id": self.bundle.id})

    def close_log(self) -> None:
        """End that."""
        if self.log_fd >= 0:
            asyncio.get_running_loop().remove_reader(self.log_fd)
            os.close(self.log_fd)
            self.log_fd = -1


class Shims:
    """The shims by (namespace, id)."""

    def __init__(
        self, root: str, state: str, exchange: Exchange, launcher_for: Callable[[str], Launcher],
        runtime_of: Callable[[str, str], Awaitable[str]],
        on_gone: Callable[[str, str], Awaitable[None]] | None = None,
    ) -> None:
        """`launcher_for` gives the way to start a runtime; `runtime_of(namespace, id)` the runtime of a container (NotFound);
        `on_gone` is told when a task is gone."""
        self._root = root
        self._state = state
        self._exchange = exchange
        self._launcher_for = launcher_for
        self._runtime_of = runtime_of
        self._on_gone = on_gone
        self._shims: dict[tuple[str, str], Shim] = {}
        self._ending: dict[tuple[str, str], asyncio.Task[None]] = {}
        """What is left to do for tasks that are deleted: a shim of the same name would meet the one that goes."""
        self._background: set[asyncio.Task[None]] = set()
        self.closing = False
        """Whether connections end because this daemon does."""
        self._leaving = asyncio.Event()

    # --- what there is

    def get(self, namespace: str, id: str) -> Shim:  # noqa: A002 - the standard's word
        """The shim of a task. Raises NotFound."""
        found = self._shims.get((namespace, id))
        if found is None:
            raise NotFound(f"task {id} not found: not found")
        return found

    def all(self, namespace: str) -> list[Shim]:
        """The shims of a namespace ("" is all namespaces), by id."""
        return [shim for key, shim in sorted(self._shims.items()) if namespace in ("", key[0])]

    # --- start

    async def start(
        self, namespace: str, id: str, config: bytes | None, runtime: str, options: Any | None,  # noqa: A002 - the standard's word
        join: Endpoint | None = None, sandbox: str = "", host: str = "",
    ) -> Shim:
        """Make the bundle and start its shim, or use the one at `join`, that of `sandbox`. Raises AlreadyExists, BoxshipError.

        `host` is the name of the controller for which the shim holds a sandbox and not a task.
        """
        if (namespace, id) in self._shims:
            raise AlreadyExists(f"task {id}: already exists")
        if (namespace, id) in self._ending:
            await asyncio.wait([self._ending[namespace, id]])
        bundle = bundles.create(self._root, self._state, namespace, id, config)
        shim = Shim(bundle, join or Endpoint(""), Launch(bundle, runtime, options))
        try:
            if host:
                with open(bundle.file("sandboxer"), "w") as file:
                    file.write(host)
            if join is None:
                shim.open_log()
                shim.endpoint = await self._launcher_for(runtime).start(shim.launch)
            else:
                shim.sandboxed = True
                with open(bundle.file("sandbox"), "w") as file:
                    file.write(sandbox)
            write_atomic(bundle.file("bootstrap.json"), shim.endpoint.json(), 0o644)
            await shim.connect(lambda: self._lost(shim))
        except BaseException as error:
            shim.disconnect()
            await self._undo_start(shim)
            if isinstance(error, BoxshipError):
                raise type(error)(f"failed to start shim: {error}") from None
            raise
        self._shims[namespace, id] = shim
        return shim

    async def _undo_start(self, shim: Shim) -> None:
        """Remove the bundle of a shim that did not answer, and what there is of the shim itself after all."""
        if not shim.sandboxed:
            try:
                if not shim.endpoint.address:
                    shim.endpoint = self._launcher_for(shim.launch.runtime).unheard(shim.bundle) or shim.endpoint
                if shim.endpoint.address:
                    await shim.connect(None)
                    await self._shutdown(shim)
                    shim.disconnect()
            except (BoxshipError, OSError) as error:
                log.debug("the shim of %s: %s", shim.bundle.id, error)
                _unlink_socket(shim)
        shim.bundle.delete()

    async def abandon(self, shim: Shim) -> None:
        """Undo a `start` whose task could not be created: the shim goes when it has no other container, the bundle too."""
        self._shims.pop((shim.bundle.namespace, shim.bundle.id), None)
        shim.abandoned = True
        if not shim.lost():
            try:
                # It may be in the middle of a create, which it brings to its end first.
                await shim.call("Delete", pb.task.DeleteRequest(id=shim.bundle.id), ABANDON_TIMEOUT_S)
            except DeadlineExceeded as error:
                # Without its bundle nobody would find it again: the next daemon tries once more.
                log.error("the shim of %s does not let go: %s", shim.bundle.id, error, extra={"namespace": shim.bundle.namespace})
                shim.disconnect()
                return
            except BoxshipError as error:
                log.debug("delete of a failed task: %s", error)
        if shim.lost():
            shim.disconnect()
            await self._delete_dead(shim)
            return
        await self._shutdown(shim)
        shim.disconnect()
        shim.bundle.delete()

    async def _abandon(self, shim: Shim) -> None:
        try:
            await self.abandon(shim)
        finally:
            self._ending.pop((shim.bundle.namespace, shim.bundle.id), None)

    # --- end

    async def remove(self, shim: Shim, shutdown: bool = True) -> None:
        """Forget a task that its shim has deleted: the shim is told to go (`shutdown`), and the bundle is removed.

        Nobody has to wait for that but the next one of the same name.
        """
        key = (shim.bundle.namespace, shim.bundle.id)
        self._shims.pop(key, None)
        self._ending[key] = self.spawn(self._finish(shim, shutdown), f"end of {shim.bundle.id}")

    async def _finish(self, shim: Shim, shutdown: bool) -> None:
        try:
            shim.abandoned = True
            if shutdown:
                await self._shutdown(shim)
            shim.disconnect()
            await asyncio.to_thread(shim.bundle.delete)
            await self._gone(shim)
        finally:
            self._ending.pop((shim.bundle.namespace, shim.bundle.id), None)

    async def _shutdown(self, shim: Shim) -> None:
        if shim.sandboxed:
            return
        try:
            await shim.call("Shutdown", pb.task.ShutdownRequest(id=shim.bundle.id), SHUTDOWN_TIMEOUT_S)
        except Unavailable:
            _unlink_socket(shim)  # it went before it answered, or was killed
        except BoxshipError as error:
            log.warning("shutdown of the shim of %s: %s", shim.bundle.id, error)

    async def _gone(self, shim: Shim) -> None:
        if self._on_gone is not None:
            await self._on_gone(shim.bundle.namespace, shim.bundle.id)

    def _lost(self, shim: Shim) -> None:
        if not self.closing and not shim.abandoned:
            self.spawn(self._clean(shim), f"clean up after the shim of {shim.bundle.id}")

    async def _clean(self, shim: Shim) -> None:
        """What is to be done about a dead shim: end the container, tell its exit, remove the bundle."""
        namespace, id = shim.bundle.namespace, shim.bundle.id  # noqa: A001 - the standard's word
        log.info("shim disconnected", extra={"namespace": namespace, "id": id})
        shim.close_log()
        exited = await self._delete_dead(shim)
        known = self._shims.pop((namespace, id), None) is shim
        if not shim.exit.done():
            shim.exit.set_result(exited)
        if known:
            self._tell(shim, exited)
            await self._gone(shim)

    def _tell(self, shim: Shim, exited: Any) -> None:
        """Publish the end of a task in the place of its shim."""
        namespace, id = shim.bundle.namespace, shim.bundle.id  # noqa: A001 - the standard's word
        values = {"pid": exited.pid, "exit_status": exited.exit_status, "exited_at": exited.exited_at}
        self._exchange.publish(namespace, "/tasks/exit", pb.events.TaskExit(container_id=id, id=id, **values))
        self._exchange.publish(namespace, "/tasks/delete", pb.events.TaskDelete(container_id=id, **values))

    async def _delete_dead(self, shim: Shim) -> Any:
        try:
            answer = await self._launcher_for(shim.launch.runtime).delete(shim.launch)
        except (BoxshipError, OSError) as error:
            log.warning("clean-up after the shim of %s: %s", shim.bundle.id, error)
            answer = pb.task.DeleteResponse(exit_status=255)
        if answer.exited_at.seconds <= 0:
            # Go's zero time is in the year 1.
            answer.exited_at.FromNanoseconds(time.time_ns())
        if shim.lost():
            _unlink_socket(shim)
        try:
            await asyncio.to_thread(shim.bundle.delete)
        except OSError as error:
            log.error("bundle of %s: %s", shim.bundle.id, error)
        return answer

    # --- restart

    async def load(self) -> None:
        """Find the shims of an earlier daemon. What is dead is cleaned up, what never got a task is ended. Raises nothing."""
        limit = asyncio.Semaphore(16)

        async def one(namespace: str, name: str) -> None:
            async with limit:
                try:
                    await self._load_one(namespace, name)
                except (BoxshipError, OSError) as error:
                    log.error("task %s: %s", name, error, extra={"namespace": namespace})

        await asyncio.gather(*(one(*each) for each in bundles.names(self._state)))
        await asyncio.to_thread(bundles.clean_work, self._root, {*self._shims, *self._ending})

    async def _load_one(self, namespace: str, name: str) -> None:
        bundle = Bundle(self._state, namespace, name)
        if not os.path.exists(bundle.file("shim-binary-path")) and not os.path.exists(bundle.file("bootstrap.json")) \
                and not os.path.exists(bundle.file("address")):
            # Killed between the making of the bundle and the start of its shim.
            bundle.delete()
            return
        shim = Shim(bundle, Endpoint(""), Launch(bundle, await self._runtime(bundle), None))
        shim.sandboxed = os.path.exists(bundle.file("sandbox"))
        try:
            # First of all: a shim that was just started waits for somebody to read its log.
            if os.path.exists(bundle.file("log")):
                shim.open_log()
            shim.endpoint = self._endpoint(shim)
            await shim.connect(lambda: self._lost(shim))
            tasked = shim.sandboxed or os.path.exists(bundle.file("sandboxer")) or await self._has_task(shim)
        except (BoxshipError, OSError, ValueError) as error:
            log.info("shim of %s is gone: %s", name, error, extra={"namespace": namespace})
            shim.disconnect()
            self._tell(shim, await self._delete_dead(shim))
            return
        if not tasked:
            log.info("shim of %s has no task", name, extra={"namespace": namespace})
            self._ending[namespace, name] = self.spawn(self._abandon(shim), f"end of {name}")
            return
        self._shims[namespace, name] = shim

    def _endpoint(self, shim: Shim) -> Endpoint:
        bundle = shim.bundle
        try:
            with open(bundle.file("bootstrap.json"), "rb") as file:
                found = json.loads(file.read())
            return Endpoint(str(found["address"]), int(found.get("version", 2)), str(found.get("protocol", "ttrpc")))
        except (FileNotFoundError, ValueError, KeyError):
            pass
        # The daemon was killed before it could write that. Shims of containerd 1.7 and older wrote their address themselves.
        try:
            with open(bundle.file("address"), "rb") as file:
                return parse_endpoint(file.read())
        except FileNotFoundError:
            guess = self._launcher_for(shim.launch.runtime).unheard(bundle)
            if guess is None:
                raise
            return guess

    async def _has_task(self, shim: Shim) -> bool:
        try:
            answer = await shim.call("Connect", pb.task.ConnectRequest(id=shim.bundle.id), LOAD_TIMEOUT_S)
            if answer.task_pid == 0:
                await shim.call("State", pb.task.StateRequest(id=shim.bundle.id), LOAD_TIMEOUT_S)
        except NotFound:
            return False
        except DeadlineExceeded as error:
            # It lives, or the connection would be closed: slow is no reason to end somebody's container.
            log.warning("shim of %s: %s", shim.bundle.id, error, extra={"namespace": shim.bundle.namespace})
        return True

    async def _runtime(self, bundle: Bundle) -> str:
        try:
            with open(bundle.file("shim-binary-path")) as file:
                return file.read().strip()
        except OSError:
            pass
        try:
            return await self._runtime_of(bundle.namespace, bundle.id)
        except NotFound:
            return "io.containerd.runc.v2"

    # --- work that nobody waits for

    def spawn(self, work: Any, what: str) -> asyncio.Task[None]:
        """Run a coroutine; what it raises is logged."""
        async def run() -> None:
            try:
                await work
            except (BoxshipError, OSError) as error:
                log.error("%s: %s", what, error)

        task = asyncio.get_running_loop().create_task(run(), name=what)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    async def unless_leaving(self, waiting: Awaitable[Any]) -> Any:
        """What `waiting`, which may take for ever, gives. Raises Unavailable when the daemon is about to end (`leave`)."""
        work, leaving = asyncio.ensure_future(waiting), asyncio.ensure_future(self._leaving.wait())
        try:
            await asyncio.wait((work, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise Unavailable("the server is stopping")
            return await work
        finally:
            work.cancel()
            leaving.cancel()

    def leave(self) -> None:
        """End what waits for tasks; everything else goes on."""
        self._leaving.set()

    async def close(self) -> None:
        """Let go of the shims, which live on; what is at its end is ended first."""
        if self._background:
            await asyncio.wait(self._background, timeout=CLOSE_GRACE_S)
        self.closing = True
        for shim in self._shims.values():
            shim.disconnect()


def _unlink_socket(shim: Shim) -> None:
    """Of a dead one; another shim may have taken the place."""
    path = shim.endpoint.address.removeprefix("unix://")
    if path.startswith("/"):
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
            except OSError:
                pass  # it is gone, or in use
