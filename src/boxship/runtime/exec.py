"""exec: one more process in a container that exists.

Runs in: the runtime; the story's steps in a second process that joins the container, see `boxship.runtime.init`.
Spec: the command line of runc; runtime-spec 1.3.0 config.md "Process" (execCPUAffinity).
"""

from __future__ import annotations

import os

from boxship.abi import namespace as n
from boxship.abi import syscalls as sc
from boxship.kit import failpoint
from boxship.kit.errors import BoxshipError, FailedPrecondition, InvalidArgument
from boxship.kit.files import read_all
from boxship.linux import _sys, keyring, namespaces
from boxship.linux.remote import NEXT
from boxship.linux.scheduler import ALL_CPUS, cpu_mask
from boxship.oci import text
from boxship.oci.config import Process, Spec
from boxship.runtime import create, state
from boxship.runtime.executor import executor
from boxship.runtime.init import Story
from boxship.runtime.options import ExecOptions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from boxship.runtime.context import Context
    from boxship.runtime.state import Container


def execute(context: Context, container_id: str, process: Process, options: ExecOptions) -> int:
    """Run `process` in the container. Returns its exit status (128 + n for signal n), or 0 at once when detached.

    Raises DoesNotExist, FailedPrecondition (stopped, paused), BoxshipError when it could not be started.
    """
    with state.open_container(context, container_id) as container:
        status = container.status()
        if status in (state.STOPPED, state.CREATING):
            raise FailedPrecondition("cannot exec in a stopped container")
        if status == state.PAUSED and not options.ignore_paused:
            raise FailedPrecondition("cannot exec in a paused container (use --ignore-paused to override)")
        detach = options.detach
        spec = container.spec()
        check = Spec.decode({"ociVersion": spec.oci_version, "process": {"cwd": process.cwd, "terminal": process.terminal}}, "")
        create.check_terminal(check, options, detach=detach)
        joining = _Joining(context, container, spec, process, options)
        try:
            started = joining.tell()
        except BaseException as error:
            explained = create.explain(joining.story, error, "error executing setns process")
            joining.undo()
            raise explained from error
        if not started:
            joining.undo()
            return create.EXEC_FAILED
        pid, terminal = joining.story.remote.pid, joining.terminal
        joining.story.close_fds()
        joining.story.remote.close()
    if detach:
        return 0
    return context.parent.attend(pid, terminal)


def process_of(container: Container) -> Process:
    """The process that `exec` starts from when it is given none: the bundle's of now, or else the one it was created with."""
    try:
        path = os.path.join(container.bundle, "config.json")
        spec = Spec.decode(text.loads(read_all(path, create.SPEC_LIMIT), path), "")
    except OSError:
        spec = container.spec()
    if spec.process is None:
        raise InvalidArgument("process property must not be empty")
    return spec.process


def sub_cgroups(arguments: list[str]) -> dict[str, str]:
    """`--cgroup` arguments: a path by controller, "" for all. Raises InvalidArgument in runc's words."""
    paths: dict[str, str] = {}
    for argument in arguments:
        controllers, colon, path = argument.partition(":")
        if not colon:
            if len(arguments) != 1:
                raise InvalidArgument(f"invalid --cgroup argument: {argument} (missing <controller>: prefix)")
            paths[""] = argument
            continue
        for controller in controllers.split(","):
            if not controller:
                raise InvalidArgument(f"invalid --cgroup argument: {argument} (empty <controller> prefix)")
            if controller in paths:
                raise InvalidArgument(f"invalid --cgroup argument(s): controller {controller} specified multiple times")
            paths[controller] = path
    return paths


class _Joining:
    """A process on its way into a container."""

    def __init__(
        self, context: Context, container: Container, spec: Spec, process: Process, options: ExecOptions
    ) -> None:
        self.context = context
        self.container = container
        self.process = process
        self.options = options
        self.terminal = -1
        story = Story(context, spec, process, rootfs=container.rootfs, bundle=container.bundle)
        story.keyring = "" if options.no_new_keyring else keyring.session_name(container.id)
        story.state = container.hook_state
        story.may_set_groups = b"deny" not in read_all(f"/proc/{container.pid}/setgroups")
        create.take_filter(context, spec, story, container)
        create.take_environment(context, story, options)
        self.story = story

    def tell(self) -> bool:
        """As `Creation.tell`, with doors that are there already instead of walls to build. False: see `create.let_go`."""
        story = self.story
        sub = sub_cgroups(self.options.cgroup)
        if not sub:
            self._cgroup(story)
        affinity = self.process.exec_cpu_affinity
        story.executor = executor()
        self._be_born(story)
        self.context.debug("nsexec container setup")
        failpoint.hit("exec.born")
        if sub:
            self._sub_cgroup(story, sub)
        if affinity and affinity.initial:
            self._bind(story, affinity.initial)
        self._enter(story)
        failpoint.hit("exec.entered")
        if self.process.terminal:
            story.open_terminal(mount=False)
        story.look_up_home()
        story.perform()
        self.context.debug("child process in init()")
        if affinity and affinity.final:
            self._bind(story, affinity.final)
        story.complete_environment()
        failpoint.hit("exec.looked")
        if self.process.terminal:
            self.terminal = story.remote.descriptors.pop()
            self.terminal = create.hand_terminal(self.options, self.terminal)
        create.take_limits(self.context, story)
        create.tell_identity(story)
        story.go()
        create.wait_ready(story)
        self.context.debug("setns_init: about to exec")
        failpoint.hit("exec.ready")
        create.announce(self.context, self.options, story.remote.pid, b"setns")
        return create.let_go(story, detach=self.options.detach)

    def _cgroup(self, story: Story) -> None:
        story.cgroup = cgroup = self.container.control_group()
        if cgroup is not None:
            story.born_in = cgroup.clone_fd(self.container.pid)
            story.join_cgroups = cgroup.join_fds(unified=False, init_pid=self.container.pid)

    def _be_born(self, story: Story) -> None:
        try:
            story.be_born(story.executor)
            if self.context.rootless:
                _ = story.remote.pid  # now is when it matters whether that worked
        except PermissionError:
            if story.born_in < 0 or not self.context.rootless or story.cgroup is None:
                raise
            # To enter a group takes write access to the nearest group above both. systemd has it, and moves processes for
            # its users; with cgroupfs the process stays where the caller is, as with runc.
            os.close(story.born_in)
            story.born_in = -1
            story.be_born(story.executor)
            try:
                story.cgroup.add(story.remote.pid)
            except (BoxshipError, OSError) as error:
                self.context.debug(f"the process stays in its caller's cgroup: {error}")

    def _sub_cgroup(self, story: Story, sub: dict[str, str]) -> None:
        story.cgroup = cgroup = self.container.control_group()
        if cgroup is None:
            raise InvalidArgument("--cgroup: the container has no cgroup")
        try:
            story.join_cgroups = cgroup.join_fds(sub, init_pid=self.container.pid)
        except BoxshipError as error:
            raise type(error)(f"error adding pid {story.remote.pid} to cgroups: {error}") from None

    def _enter(self, story: Story) -> None:
        """Join cgroup and namespaces, all at once through init's pidfd, in the order that the kernel knows best."""
        p = story.p
        pid = self.container.pid
        flags = 0
        for kind, flag in n.FLAGS.items():
            try:
                theirs = namespaces.identity(kind, pid)
            except FileNotFoundError:
                raise FailedPrecondition("container not running") from None
            if theirs != namespaces.identity(kind):
                flags |= flag
        story.not_dumpable()
        p.call(sc.SETSID, on_err=NEXT)
        story.open_proc()
        story.join()
        affinity = self.process.exec_cpu_affinity
        if not (affinity and (affinity.initial or affinity.final)):
            # Whatever CPUs the caller was bound to; the container's cpuset says which of them it may use.
            p.call(sc.SCHED_SETAFFINITY, 0, len(ALL_CPUS), ALL_CPUS, on_err=NEXT)
        if flags:
            handle = os.pidfd_open(pid)
            story.own(handle)
            door = story.send(handle)
            p.call(sc.SETNS, door, flags, what="failed to setns into the container's namespaces")
            story.fs.close(door)
        if flags & n.CLONE_NEWUSER:
            story.joined_user = True
            p.call(sc.SETRESGID, 0, 0, 0, what="unable to become root of the user namespace")
            p.call(sc.SETRESUID, 0, 0, 0, what="unable to become root of the user namespace")
            story.not_dumpable()
        if flags & (n.CLONE_NEWPID | n.CLONE_NEWTIME):
            story.become_child()
            p = story.p
        if story.keyring:
            story.join_keyring(new=False)

    def _bind(self, story: Story, cpus: str) -> None:
        """Set the CPU affinity. Raises BoxshipError."""
        pid = story.remote.pid
        mask = cpu_mask(cpus) or b""
        try:
            _sys.syscall(sc.SCHED_SETAFFINITY, pid, len(mask), mask)
        except OSError as error:
            raise BoxshipError(f"error setting CPU affinity to {cpus}: {(error.strerror or '').lower()}") from None
        self.context.debug(f"nsexec[{pid}]: affinity: {int.from_bytes(mask, 'little'):#x}")

    def undo(self) -> None:
        """Nothing of it stays."""
        if self.terminal >= 0:
            os.close(self.terminal)
        self.story.abandon()
        self.story.close_fds()

