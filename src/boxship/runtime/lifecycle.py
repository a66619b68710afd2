"""The verbs on a container that exists, and `run`: runc's commands as functions.

Runs in: the runtime.
Spec: runtime-spec 1.3.0, runtime.md "Operations", "Lifecycle".
Not here: `create` (its own module), `exec`, `checkpoint`, `events`.
"""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]  # the C part of `signal`, without its enums
import os
import select

from boxship.kit import failpoint
from boxship.kit.errors import BoxshipError, FailedPrecondition
from boxship.kit.files import read_all
from boxship.linux.cgroups import Cgroup
from boxship.oci import text
from boxship.runtime import hooks, notify, state
from boxship.runtime.create import EXEC_FAILED, check_terminal, create, explain, let_go, prepare, unmount
from boxship.runtime.options import CreateOptions
from boxship.runtime.state import Container, NotRunning, open_container

__all__ = ["create", "delete", "kill", "list_containers", "pause", "processes", "resume", "run", "start", "update"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from boxship.oci.config import Spec
    from boxship.runtime.context import Context

_DELETE_TIMEOUT_S = 10.0


def run(
    context: Context, container_id: str, bundle: str, options: CreateOptions | None = None, *, detach: bool = False,
    keep: bool = False, spec: dict[str, object] | None = None,
) -> int:
    """create and start in one; unless `detach`, wait for the process, with the caller's terminal and signals connected.

    Returns the process's exit status, 128 + n when signal n ended it; 0 when detached. Without `keep` the container is
    deleted when its process ends. Raises BoxshipError when it could not be started; then nothing is left.
    """
    options = options or CreateOptions()
    made = prepare(context, container_id, bundle, options, spec)
    try:
        check_terminal(made.spec, options, detach=detach)
        ready = notify.listen(context, made.container)
        made.tell(waits=False)
        story = made.story
        assert story is not None
        if not let_go(story, detach=detach):
            made.undo()
            return EXEC_FAILED
        story.remote.close()
        _poststart(made.container, made.spec.hooks)
    except BaseException as error:
        explained = explain(made.story, error, container=made.container)
        made.undo()
        raise explained from error
    container = made.container
    if detach:
        container.close()
        if ready is not None:
            notify.forward_or_warn(context, ready, container.pid, container.pid)
        return 0
    if ready is not None:
        notify.forward_beside(context, ready, container.pid)
    # Others may pause, exec and kill while we wait.
    container.unlock()
    with container:
        try:
            status = context.parent.attend(container.pid, made.terminal)
        finally:
            if not keep and container.lock():
                destroy(container, made.spec)
    return status


def start(context: Context, container_id: str) -> None:
    """Let a created container's init go on to the user's program. Raises FailedPrecondition, BoxshipError."""
    with open_container(context, container_id, lock=True) as container:
        status = container.status()
        if status == state.STOPPED:
            raise FailedPrecondition("cannot start a container that has stopped")
        if status == state.RUNNING:
            raise FailedPrecondition("cannot start an already running container")
        if status != state.CREATED:
            raise FailedPrecondition(f"cannot start a container in the {status} state")
        spec = container.spec()
        if spec.process is None:
            # The spec wants an error generated; crun and the validation programs want the container to end all the same.
            context.log("error", "process property must not be empty: there is nothing to start, the container ends")
        ready = notify.listen(context, container)
        _let_go(container)
        try:
            _poststart(container, spec.hooks)
        except BoxshipError:
            _kill_init(container)
            raise
    if ready is not None:
        # Not under the lock: it may take the container minutes to be ready.
        notify.forward(context, ready, container.pid, container.pid)


def _let_go(container: Container) -> None:
    """Open exec.fifo: that is the word. What comes out of it is why the exec failed; its end is the exec."""
    path = container.path
    try:
        # Before the word: afterwards init may be over and reaped at any time.
        handle = os.pidfd_open(container.pid)
    except ProcessLookupError:
        raise FailedPrecondition("cannot start a container that has stopped") from None
    answer = os.open(f"{path}/exec.fifo", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        failpoint.hit("start.opened")
        os.unlink(f"{path}/exec.fifo")
        failpoint.hit("start.word")
        poll = select.poll()
        poll.register(answer, select.POLLIN)
        poll.register(handle, select.POLLIN)
        poll.poll()
        message = os.read(answer, 8)
    except BlockingIOError:
        message = b""  # the exec is done, or init was killed at the door
    finally:
        os.close(answer)
        os.close(handle)
    if message:
        index, error = int.from_bytes(message[:4], "little"), int.from_bytes(message[4:8], "little")
        texts = text.loads(read_all("start.json", dir_fd=container.fd), "start.json")
        what = str(texts.get(str(index), "exec")) if isinstance(texts, dict) else "exec"
        raise BoxshipError(container.hook_failure(what) if what.startswith("@") else _say(what, error))


def _say(what: str, error: int) -> str:
    return what[1:] if what.startswith("!") else f"{what}: {os.strerror(error).lower()}"


def _poststart(container: Container, configured: object) -> None:
    entries = configured.poststart if configured else []  # type: ignore[attr-defined]
    if entries:
        hooks.run_hooks("poststart", entries, container.hook_state(state.RUNNING))


def kill(context: Context, container_id: str, number: int) -> None:
    """Send a signal to init; to every process where init has no pid namespace of its own and is gone already.

    Raises NotRunning, DoesNotExist.
    """
    with open_container(context, container_id) as container:
        if not container.alive():
            # Without a pid namespace the others outlive their init.
            if number == signal.SIGKILL and not container.has_pid_namespace() and _kill_rest(container):
                return
            raise NotRunning
        if number == signal.SIGKILL and not container.has_pid_namespace():
            _kill_rest(container)
            return
        _signal_init(container, number)


def _kill_rest(container: Container) -> bool:
    cgroup = container.control_group()
    if cgroup is None or not cgroup.exists() or not cgroup.pids():
        if container.alive():
            _signal_init(container, signal.SIGKILL)
            return True
        return False
    cgroup.kill(signal.SIGKILL)
    return True


def _signal_init(container: Container, number: int) -> None:
    try:
        fd = os.pidfd_open(container.pid)
    except ProcessLookupError:
        raise NotRunning from None
    try:
        # The number may be another process's by now; the descriptor cannot change any more.
        if not container.alive():
            raise NotRunning
        signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        raise NotRunning from None
    finally:
        os.close(fd)
    if number == signal.SIGKILL:
        # A frozen process does not die.
        cgroup = container.control_group()
        if cgroup is not None and cgroup.exists() and cgroup.frozen():
            cgroup.thaw()


def delete(context: Context, container_id: str, *, force: bool = False) -> None:
    """Remove a stopped or created container; with `force` any, and it is no error if there is none.

    Raises DoesNotExist, FailedPrecondition when it runs.
    """
    try:
        container = open_container(context, container_id, lock=True)
    except state.DoesNotExist:
        if force:
            return
        raise
    except state.Damaged as error:
        if not force:
            raise
        with open_container(context, container_id, lock=True, load=False) as container:
            _delete_damaged(container, error)
        return
    with container:
        status = container.status()
        if status not in (state.STOPPED, state.CREATED) and not force:
            raise FailedPrecondition(f"cannot delete container {container_id} that is not stopped: {status}")
        _kill_init(container)
        failpoint.hit("delete.killed")
        destroy(container)


def _delete_damaged(container: Container, error: state.Damaged) -> None:
    """Delete what the second copy of the record tells of; without one, what is where the configuration says it belongs."""
    context = container.context
    if not container.recover():
        try:
            spec = container.spec()
            path = (spec.linux.cgroups_path if spec.linux else "") or ""
            cgroup = None if context.no_cgroups else Cgroup.plan(
                path, container.id, systemd=path.count(":") == 2, rootless=context.rootless, caller=context.parent.pid,
                environ=context.environ,
            )
        except (FileNotFoundError, BoxshipError):
            context.warn(f"{error}: processes and control groups of {container.id}, if there are any, stay")
            state.discard(container)
            return
        if spec.root and spec.root.path.startswith("/"):
            container.rootfs = os.path.realpath(spec.root.path)
        # Not another container's: create refuses a group that is in use, and what it had not claimed is only withdrawn.
        container.cgroup = cgroup.encode() if cgroup is not None else {}
    context.warn(f"{error}: {container.id} is found by other traces and deleted")
    _kill_init(container)
    destroy(container)


def _kill_init(container: Container) -> None:
    """SIGKILL to all of it, and wait until init is gone (or a zombie that its parent will take)."""
    if container.alive():
        try:
            handle = os.pidfd_open(container.pid)
        except ProcessLookupError:
            return
        try:
            _signal_init(container, signal.SIGKILL)
            poll = select.poll()
            poll.register(handle, select.POLLIN)
            if not poll.poll(_DELETE_TIMEOUT_S * 1000):
                raise BoxshipError("container init still running")
        except NotRunning:
            pass
        finally:
            os.close(handle)


def destroy(container: Container, spec: Spec | None = None) -> None:
    """Cgroup, poststop hooks, folder, in this order: the folder is what a later delete finds the rest by.

    `spec`: the configuration, where the caller has it.
    """
    failpoint.hit("delete.begin")
    cgroup = container.control_group()
    if cgroup is not None and not container.owns_cgroup():
        cgroup.withdraw()
    elif cgroup is not None:
        if cgroup.exists() and cgroup.pids():
            cgroup.kill(signal.SIGKILL)
        cgroup.delete()
    failpoint.hit("delete.cgroup")
    try:
        spec = spec or container.spec()
    except (FileNotFoundError, BoxshipError):
        spec = None  # a create that was killed before it had written the configuration: no hooks ran either
    if spec is not None:
        unmount(container, spec)
    if spec is not None and spec.hooks and spec.hooks.poststop:
        for i, hook in enumerate(spec.hooks.poststop):
            try:
                hooks.run_hooks("poststop", [hook], container.hook_state(state.STOPPED))
            except BoxshipError as error:
                # The spec: a failing poststop hook is a warning, and the others run.
                container.context.warn(str(error).replace("hook #0", f"hook #{i}"))
    failpoint.hit("delete.hooks")
    state.discard(container)
    failpoint.hit("delete.done")


def _running_cgroup(container: Container) -> object:
    cgroup = container.control_group()
    if cgroup is None or not cgroup.exists():
        raise FailedPrecondition("cgroup not exist")
    return cgroup


def pause(context: Context, container_id: str) -> None:
    """Freeze every process of it. Raises NotRunning."""
    with open_container(context, container_id, lock=True) as container:
        if container.status() not in (state.RUNNING, state.CREATED):
            raise NotRunning
        _running_cgroup(container).freeze()  # type: ignore[attr-defined]


def resume(context: Context, container_id: str) -> None:
    """Undo `pause`. Raises FailedPrecondition when it is not paused."""
    with open_container(context, container_id, lock=True) as container:
        if container.status() != state.PAUSED:
            raise FailedPrecondition("container not paused")
        _running_cgroup(container).thaw()  # type: ignore[attr-defined]


def processes(context: Context, container_id: str) -> list[int]:
    """The pids of all processes in the container's cgroup, as the caller's pid namespace counts."""
    with open_container(context, container_id) as container:
        cgroup = container.control_group()
        if cgroup is None or not cgroup.exists():
            return [container.pid] if container.alive() else []
        return list(cgroup.pids())


def update(context: Context, container_id: str, change: dict[str, object]) -> None:
    """Apply a LinuxResources object (runtime-spec JSON) to a container that is not stopped."""
    from boxship.runtime.resources import update_limits

    with open_container(context, container_id, lock=True) as container:
        if container.status() == state.STOPPED:
            raise NotRunning
        update_limits(container, change)


def list_containers(context: Context) -> list[Container]:
    """All containers below the context's root, by id; the caller closes them."""
    found = []
    for container_id in state.identifiers(context):
        try:
            found.append(open_container(context, container_id))
        except state.DoesNotExist:
            continue  # deleted meanwhile
        except state.Damaged as error:
            context.warn(str(error))
    return found
