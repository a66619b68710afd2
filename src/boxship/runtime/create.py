"""create: from a bundle to a container whose init waits for the word to start.

Runs in: the runtime.
Spec: runtime-spec 1.3.0, runtime.md "Create" and "Lifecycle", steps 1 to 5.

The order protects from being killed at any step: the record is written before anything is made in the kernel, and says
where the cgroup is; init ends by itself when the runtime is gone; so `delete --force` always finds what to remove.
"""

from __future__ import annotations

import errno
import os
import stat
import time

from boxship.abi.namespace import FILES
from boxship.kit import failpoint
from boxship.kit.errors import BoxshipError, InvalidArgument, Unsupported
from boxship.kit.files import read_all, write_all, write_atomic, write_new
from boxship.linux import keyring, namespaces
from boxship.linux.cgroups import Cgroup
from boxship.linux.remote import RemoteError, RemoteGone
from boxship.oci import text
from boxship.oci.config import Process, Spec
from boxship.runtime import hooks, notify, state
from boxship.runtime.executor import executor
from boxship.runtime.init import Story
from boxship.runtime.options import CreateOptions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from boxship.oci.config import Hook
    from boxship.runtime.context import Context
    from boxship.runtime.state import Container

SPEC_LIMIT = 64 << 20
_MAX_PASSED = 1 << 20  # fs.nr_open as kernels come; the caller's limit of open files is what counts
EXEC_FAILED = 255
"""The exit code of a process whose program could not be executed, as runc's init has it."""


def unmount(container: Container, spec: Spec) -> None:
    """Take away the mounts of a container without a mount namespace of its own: they were made in the caller's."""
    if not container.rootfs or (any(ns.type == "mount" for ns in spec.linux.namespaces) if spec.linux else False):
        return
    from boxship.linux.mounts import umount_below

    umount_below(container.rootfs)


def load_spec(context: Context, bundle: str) -> tuple[Spec, bytes]:
    """The configuration of a bundle, decoded and checked, and its bytes. Raises InvalidArgument, NotFound."""
    path = os.path.join(bundle, "config.json")
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise InvalidArgument(f"cannot read {path}: not a regular file")  # nobody waits for a FIFO's writer
        data = read_all(path, SPEC_LIMIT)
    except FileNotFoundError:
        raise InvalidArgument(f"JSON specification file {path} not found") from None
    except OSError as error:
        raise InvalidArgument(f"cannot read {path}: {(error.strerror or '').lower()}") from None
    return Spec.decode(text.loads(data, path), ""), data


def create(
    context: Context, container_id: str, bundle: str, options: CreateOptions | None = None, *,
    spec: dict[str, object] | None = None,
) -> Container:
    """Make the container; its init waits. `spec` stands in for the bundle's config.json.

    Raises BoxshipError; then nothing is left of it.
    """
    options = options or CreateOptions()
    made = prepare(context, container_id, bundle, options, spec, needs_process=False)
    try:
        check_terminal(made.spec, options, detach=True)
        made.tell(waits=True)
    except BaseException as error:
        explained = explain(made.story, error, container=made.container)
        made.undo()
        raise explained from error
    return made.container


def check_terminal(spec: Spec, options: CreateOptions, *, detach: bool) -> None:
    """Somebody has to hold a terminal's other side. Raises InvalidArgument."""
    terminal = bool(spec.process and spec.process.terminal)
    if detach and terminal and not options.console_socket:
        raise InvalidArgument("cannot allocate tty if runc will detach without setting console socket")
    if (not detach or not terminal) and options.console_socket:
        raise InvalidArgument("cannot use console socket if runc will not detach or allocate tty")


class Creation:
    """A container on its way: the record, and the story that is being told."""

    def __init__(self, context: Context, container: Container, spec: Spec, options: CreateOptions) -> None:
        self.context = context
        self.container = container
        self.spec = spec
        self.options = options
        self.cgroup: Cgroup | None = None
        self.terminal = -1
        self.story: Story | None = None
        self.made_cgroup = False

    def tell(self, *, waits: bool) -> None:
        """Everything up to the moment at which init waits: for `start` (`waits`), or for the parent's word."""
        container, spec, context = self.container, self.spec, self.context
        story = self.story
        assert story is not None
        process = story.process
        story.executor = executor()
        # What the container finds as /proc/self/exe is a sealed clone: runc's words, which its tests look for.
        context.debug("runc exeseal: using /proc/self/exe clone")
        if waits:
            self._make_fifo(story)
        cgroup = self.cgroup
        self.made_cgroup = cgroup is not None
        if cgroup is not None:
            story.born_in = cgroup.birthplace()
        if story.born_in >= 0:
            # Init is cloned while its other groups are made.
            story.be_born(story.executor)
            self.make_cgroup(story)
        else:
            self.make_cgroup(story)
            story.be_born(story.executor)
        failpoint.hit("create.cgroup")
        context.debug("nsexec container setup")
        if cgroup is not None and cgroup.needs_pid:
            # systemd makes the scope around a process that is there.
            cgroup.add(story.remote.pid)
            owner = cgroup_owner(spec)
            if owner is not None:
                cgroup.delegate(owner)
            if not story.forks:
                cgroup.apply(self.limits)
        failpoint.hit("create.born")
        story.enter()
        if self.cgroup is not None and story.forks:
            # Not before init's own fork: a limit of one process is for the user's. And not while init is at work:
            # device rules are replaced one by one, and in between nothing is allowed.
            story.perform()
            self.cgroup.apply(self.limits)
        story.keep_fifo()
        # From here on the next step is written while init carries out the one before.
        story.go()
        failpoint.hit("create.entered")
        context.debug("child process in init()")
        self._move_devices(story)
        story.make_file_system()
        story.go()
        if spec.hooks:
            self._know_init(story)
        if self._has_runtime_hooks():
            story.done()
            failpoint.hit("create.files")
            self._runtime_hooks()
            failpoint.hit("create.hooks")
        story.change_root()
        if process.terminal:
            story.open_terminal(mount="mount" in story.new)
        story.close_file_system()
        story.look_up_home()
        story.go()
        story.complete_environment()
        tell_identity(story, start_hooks=spec.hooks.start_container if spec.hooks else [])
        story.done()
        failpoint.hit("create.root")
        if process.terminal:
            self.terminal = story.remote.descriptors.pop()
            self.terminal = hand_terminal(self.options, self.terminal)
        take_limits(context, story)
        if waits and cgroup is None:
            # From its answer on init waits for `start` and not for us, and no control group tells who it is.
            self._know_init(story)
            container.save()
        story.go()
        failpoint.hit("create.ready")
        self._settle(story, waits=waits)
        failpoint.hit("create.done")

    # --- before init ---------------------------------------------------------------------------------------------

    def make_cgroup(self, story: Story) -> None:
        """Make and limit the container's cgroup, as far as that goes without a process, and open its doors to init."""
        linux = self.spec.linux
        cgroup = self.cgroup
        if cgroup is None:
            return
        from boxship.runtime.resources import limits as limits_of

        nodes = [device.path for device in linux.devices] if linux else []
        self.limits = limits_of(linux.resources if linux else None, node_paths=nodes)
        cgroup.create(self.limits)
        failpoint.hit("create.unclaimed")
        self.container.claim()
        if cgroup.needs_pid:
            return
        if not story.forks:
            cgroup.apply(self.limits)
        if story.born_in < 0:
            story.born_in = cgroup.clone_fd()
        story.join_cgroups = cgroup.join_fds(unified=False)

    def _make_fifo(self, story: Story) -> None:
        path = f"{self.container.path}/exec.fifo"
        os.mkfifo(path, 0o600)
        # Init opens it as the container's user. To write to it is nothing: only a reader, who must own it, is the word.
        os.chmod(path, 0o622)
        story.exec_fifo = story.own(os.open(path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW))
        failpoint.hit("create.fifo")

    def _know_init(self, story: Story) -> None:
        self.container.pid = story.remote.pid
        self.container.pid_start = state.start_of(story.remote.pid)

    # --- beside init ---------------------------------------------------------------------------------------------

    def _move_devices(self, story: Story) -> None:
        linux = self.spec.linux
        if linux and linux.net_devices:
            from boxship.linux.netdevice import move

            story.perform()
            fd = os.open(f"/proc/{story.remote.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            try:
                for name, device in linux.net_devices.items():
                    move(name, fd, device.name or name)
            finally:
                os.close(fd)

    def _has_runtime_hooks(self) -> bool:
        h = self.spec.hooks
        return bool(h and (h.prestart or h.create_runtime))

    def _runtime_hooks(self) -> None:
        h = self.spec.hooks
        assert h is not None
        data = self.container.hook_state(state.CREATING)
        # The oldest kind, from when there was no `createRuntime`: what reads its state expects "created".
        hooks.run_hooks("prestart", h.prestart, self.container.hook_state(state.CREATED))
        hooks.run_hooks("createRuntime", h.create_runtime, data)

    def _settle(self, story: Story, *, waits: bool) -> None:
        container = self.container
        self._know_init(story)
        wait_ready(story)
        self.context.debug("init: closing the pipe to signal completion")
        if waits:
            texts = {str(i): what for i, what in enumerate(story.remote.descriptions) if i > story.ready and what}
            write_atomic("start.json", text.dumps(texts).encode(), dir_fd=container.fd)
            failpoint.hit("create.texts")
        container.namespaces = {
            kind: f"/proc/{container.pid}/ns/{name}" for kind, name in FILES.items()
        }
        container.creating = False
        container.save()
        if self.cgroup is None:
            container.claim()
        failpoint.hit("create.saved")
        announce(self.context, self.options, container.pid, b"standard")
        if waits:
            story.remote.close()
        self.close_fds()

    def close_fds(self) -> None:
        """Close what was only needed for the telling."""
        story = self.story
        if story is not None:
            story.close_fds()

    def undo(self) -> None:
        """Leave nothing: init, cgroup, folder."""
        story = self.story
        if self.terminal >= 0:
            os.close(self.terminal)
        if story is not None:
            story.abandon()
            story.close_fds()
        if self.cgroup is not None and self.made_cgroup:
            self.cgroup.abandon()
        unmount(self.container, self.spec)
        state.discard(self.container)
        self.container.close()


def prepare(
    context: Context, container_id: str, bundle: str, options: CreateOptions, given: dict[str, object] | None, *,
    needs_process: bool = True,
) -> Creation:
    """Read and check everything, take the id, and plan: nothing in the kernel yet but the container's folder."""
    state.check_id(container_id)
    bundle = os.path.normpath(os.path.join(context.cwd, bundle or "."))
    if given is None:
        spec, data = load_spec(context, bundle)
    else:
        spec, data = Spec.decode(given, ""), text.dumps(given).encode()
    check(context, spec, needs_process=needs_process)
    root = spec.root
    rootfs = os.path.realpath(os.path.join(bundle, root.path if root else ""))
    if not os.path.isdir(rootfs):
        raise InvalidArgument(f"invalid rootfs: stat {rootfs}: no such file or directory")
    container = state.make(context, container_id)
    try:
        failpoint.hit("create.folder")
        container.oci_version = spec.oci_version
        container.bundle, container.rootfs = bundle, rootfs
        container.annotations = dict(spec.annotations)
        container.rootless = context.rootless
        container.no_pivot = options.no_pivot
        container.created = now()
        linux = spec.linux
        creation = Creation(context, container, spec, options)
        creation.cgroup = None if context.no_cgroups else Cgroup.plan(
            (linux.cgroups_path if linux else "") or "", container_id, systemd=context.systemd_cgroup, rootless=context.rootless,
            caller=context.parent.pid, environ=context.environ,
        )
        if creation.cgroup is not None and creation.cgroup.driver == "systemd":
            from boxship.linux.cgroups.systemd import annotated_properties

            creation.cgroup.properties = annotated_properties(spec.annotations)
        container.cgroup = creation.cgroup.encode() if creation.cgroup else {}
        container.save()
        failpoint.hit("create.record")
        write_new("config.json", data, dir_fd=container.fd)
        failpoint.hit("create.config")
        notify.prepare(context, container, spec)
        creation.story = plan(context, container, spec, options, rootfs, bundle, creation.cgroup)
    except BaseException:
        state.discard(container)
        container.close()
        raise
    return creation


def cgroup_owner(spec: Spec) -> int | None:
    """The host's uid of the user who may make groups below the container's: where that is visible and writable for him."""
    linux = spec.linux
    own = linux is not None and any(ns.type == "cgroup" and not ns.path for ns in linux.namespaces)
    writable = any(
        mount.source == "cgroup" and os.path.normpath(mount.destination) == "/sys/fs/cgroup" and "ro" not in mount.options
        for mount in spec.mounts
    )
    if linux is None or not own or not writable:
        return None
    uid = (spec.process.user.uid or 0) if spec.process and spec.process.user else 0
    if not any(ns.type == "user" for ns in linux.namespaces):
        return uid
    for ids in linux.uid_mappings:
        if ids.container_id <= uid < ids.container_id + ids.size:
            return ids.host_id + uid - ids.container_id
    return None


def check(context: Context, spec: Spec, *, needs_process: bool) -> None:
    """The rules that hold between fields; warnings go to the log."""
    from boxship.oci.validate import validate

    if spec.linux and spec.linux.intel_rdt is not None:
        # resctrl is not there yet; to run without the limits that were asked for would be worse than not to run.
        raise Unsupported("intelRdt is specified in config, but Intel RDT is not supported or enabled")
    own = os.stat("/proc/self/ns/net").st_ino

    def is_host_netns(path: str) -> bool:
        try:
            return os.stat(path).st_ino == own
        except OSError:
            return False  # `open_namespace` says what is wrong with it

    rootless, systemd = os.geteuid() != 0, context.systemd_cgroup
    for warning in validate(spec, rootless=rootless, systemd_cgroup=systemd, is_host_netns=is_host_netns,
                            needs_process=needs_process):
        context.warn(warning)


def plan(
    context: Context, container: Container, spec: Spec, options: CreateOptions, rootfs: str, bundle: str, cgroup: Cgroup | None
) -> Story:
    """The story of a container, with what is decided before it begins: namespaces, filter, environment."""
    story = Story(context, spec, spec.process or Process(cwd="/"), rootfs=rootfs, bundle=bundle)
    story.cgroup = cgroup
    story.no_pivot = options.no_pivot
    story.keyring = "" if options.no_new_keyring else keyring.session_name(container.id)
    story.state = container.hook_state
    story.open_note = container.open_note
    linux = spec.linux
    user_ns = next((ns for ns in linux.namespaces if ns.type == "user"), None) if linux else None
    if linux and user_ns is not None and not user_ns.path:
        from boxship.linux.idmaps import maps_only_self

        gids = [(x.container_id, x.host_id, x.size) for x in linux.gid_mappings]
        # An ordinary user's own single map comes with setgroups(2) denied.
        story.may_set_groups = os.geteuid() == 0 or not maps_only_self(gids, os.getegid())
    else:
        # Denied for ever in the user namespace that we are in already, perhaps.
        story.may_set_groups = b"deny" not in read_all("/proc/self/setgroups")
    for ns in linux.namespaces if linux else []:
        if ns.path:
            story.joined[ns.type] = namespaces.open_namespace(ns.path, ns.type)
        else:
            story.new.add(ns.type)
    take_filter(context, spec, story, container)
    take_environment(context, story, options)
    return story


def take_filter(context: Context, spec: Spec, story: Story, container: Container) -> None:
    """Compile the seccomp filter, or take the compiled one, and see who gets its listener."""
    linux = spec.linux
    if not (linux and linux.seccomp):
        return
    from boxship.linux.seccomp import compile_filter, listener_message

    # "@" is in no container id.
    story.filter = compile_filter(linux.seccomp.encode(), cache_dir=os.path.join(context.root, "@seccomp"))
    if not story.filter.program:
        story.filter = None
    else:
        context.debug(f"seccomp filter flags: {story.filter.flags}")
    if story.filter is None or not story.filter.notify:
        return

    def hand(fd: int) -> None:
        from boxship.linux.terminal import send_fd

        assert story.filter is not None
        described = text.loads(container.hook_state(state.CREATING if container.creating else state.RUNNING), "state")
        assert isinstance(described, dict)
        message = listener_message(described, story.remote.pid, story.filter.listener_metadata)
        try:
            send_fd(story.filter.listener_path, fd, message)
        except OSError as error:
            raise BoxshipError(
                "failed to connect with seccomp agent specified in the seccomp profile: dial unix"
                f" {story.filter.listener_path}: connect: {(error.strerror or '').lower()}"
            ) from None

    story.hand_listener = hand


def take_environment(context: Context, story: Story, options: CreateOptions) -> None:
    """Descriptors to pass on, and what of the environment the runtime itself decides."""
    count = options.preserve_fds
    listen = context.environ.get("LISTEN_FDS", "")
    if listen.isascii() and listen.isdigit() and int(listen[:10]) > 0:
        story.env += [f"LISTEN_FDS={listen}", "LISTEN_PID=1"]
        count += int(listen[:10])
    if not 0 <= count <= _MAX_PASSED:
        raise InvalidArgument(f"preserve-fds: expected 0 to {_MAX_PASSED} descriptors, got {count}")
    if count:
        try:
            story.preserve_fds = context.parent.inherited(count)
        except OSError as error:
            if error.errno == errno.EMFILE:
                raise InvalidArgument(f"preserve-fds: {count} descriptors: {os.strerror(errno.EMFILE).lower()}") from None
            raise InvalidArgument(f"preserve-fds: some of the descriptors 3 to {count + 2} are not open") from None


def take_limits(context: Context, story: Story) -> None:
    """Limits and oom_score_adj, set from outside while init rests: its own work is done, its ids are still the runtime's.

    What may not be raised or lowered is clamped.
    """
    from boxship.linux import rlimits

    process, pid = story.process, story.remote.pid
    for limit in process.rlimits:
        rlimits.apply(pid, limit.type, limit.soft, limit.hard, context.debug)
    if process.oom_score_adj is not None:
        _oom_score_adj(context, pid, process.oom_score_adj)


def _oom_score_adj(context: Context, pid: int, value: int) -> None:
    path = f"/proc/{pid}/oom_score_adj"
    try:
        _write(path, str(value))
    except PermissionError:
        # Lowering takes CAP_SYS_RESOURCE: then the lowest that we may, as containerd's restrict_oom_score_adj.
        current = int(read_all(path))
        context.debug(f"oom_score_adj {value} is not permitted, stays {current}")
        if value > current:
            raise


def _write(path: str, value: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def tell_identity(story: Story, *, start_hooks: Sequence[Hook] = ()) -> None:
    """The last program: who the process is, what it may, and its exec. Shared with `exec`."""
    process = story.process
    story.apply_label()
    story.take_scheduling()
    story.pass_descriptors()
    story.enter_directory()
    if not process.no_new_privileges:
        story.load_filter()
    story.become_user()
    path = story.find_program() if process.args else None
    if process.no_new_privileges:
        story.load_filter()
    story.wait_for_start()
    if start_hooks:
        story.run_hooks("startContainer", list(start_hooks), state.CREATED, default_env=story.env)
    if path is not None:
        story.execute(path)
    else:
        story.give_up()


def wait_ready(story: Story) -> None:
    """Wait until init says that it is ready, serving what it hands over on the way."""
    while True:
        index = story.answer()
        if index >= 0:
            return
        handle = os.pidfd_open(story.remote.pid)
        try:
            fd = namespaces.pidfd_getfd(handle, ~index)
        finally:
            os.close(handle)
        try:
            assert story.hand_listener is not None
            story.hand_listener(fd)
        finally:
            os.close(fd)
        story.remote.fetched()


def let_go(story: Story, *, detach: bool) -> bool:
    """Let init execute the program; False when that failed in the foreground, as a shell has it: a line and an exit code.

    Raises RemoteError when it failed and nobody waits for the process.
    """
    try:
        story.remote.release()
    except RemoteError as error:
        if detach or not error.what.startswith("exec "):
            raise
        write_all(story.context.parent.stdio[2], f"{error}\n".encode(errors="surrogateescape"))
        return False
    return True


def hand_terminal(options: CreateOptions, master: int) -> int:
    """Give the terminal's master side to who asked for it, and close it then; -1, or the descriptor that is still ours."""
    from boxship.linux.terminal import clear_onlcr, send_fd

    if not options.console_socket:
        # Now, before the container's process can read it: our side's terminal translates already.
        clear_onlcr(master)
        return master
    try:
        send_fd(options.console_socket, master, f"/dev/pts/{_terminal_number(master)}".encode())
    finally:
        os.close(master)
    return -1


def _terminal_number(master: int) -> int:
    from fcntl import ioctl

    return int.from_bytes(ioctl(master, 0x80045430, bytes(4)), "little")  # TIOCGPTN


def announce(context: Context, options: CreateOptions, pid: int, kind: bytes) -> None:
    """Tell those who asked who the new process is: a pidfd through the socket, the number in the file."""
    if options.pidfd_socket:
        from boxship.linux.terminal import send_fd

        fd = os.pidfd_open(pid)
        try:
            send_fd(options.pidfd_socket, fd, kind)
        finally:
            os.close(fd)
    write_pid_file(context, options.pid_file, pid)


def write_pid_file(context: Context, path: str, pid: int) -> None:
    """The pid in decimal; readers see all of it or no file."""
    if path:
        path = os.path.join(context.cwd, path)
        folder, name = os.path.split(path)
        temporary = os.path.join(folder, f".{name}")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            try:
                os.write(fd, str(pid).encode())
            finally:
                os.close(fd)
            os.rename(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise


def now() -> str:
    """RFC 3339 with nanoseconds, UTC, as Go prints times."""
    ns = time.time_ns()
    seconds, fraction = divmod(ns, 1_000_000_000)
    t = time.gmtime(seconds)
    digits = f"{fraction:09d}".rstrip("0")
    return f"{t[0]:04d}-{t[1]:02d}-{t[2]:02d}T{t[3]:02d}:{t[4]:02d}:{t[5]:02d}{'.' + digits if digits else ''}Z"


def explain(
    story: Story | None, error: BaseException, doing: str = "error during container init", container: Container | None = None
) -> BaseException:
    """The error for the user: a failed step of init in runc's words; others as they are."""
    if isinstance(error, RemoteError):
        what = str(error)
        linux = story.spec.linux if story is not None else None
        if error.what == "error setting scheduler" and error.errno == errno.EPERM and linux and linux.resources \
                and linux.resources.cpu and linux.resources.cpu.cpus:
            what = "process scheduler can't be used together with AllowedCPUs"
        if error.what.startswith("@") and container is not None:
            what = container.hook_failure(error.what)
        return BoxshipError(f"unable to start container process: {doing}: {what}")
    if isinstance(error, RemoteGone) and story is not None:
        try:
            _ = story.remote.pid
        except OSError as reason:
            error = reason  # it was not even born
    if isinstance(error, RemoteGone):
        if story is not None and story.cgroup is not None and story.cgroup.exists() and story.cgroup.oom_kills():
            return BoxshipError("unable to start container process: container init was OOM-killed (memory limit too low?)")
        return BoxshipError(f"unable to start container process: {error}")
    if isinstance(error, BoxshipError):
        return type(error)(f"unable to start container process: {error}")
    if isinstance(error, OSError):
        # On v2 the limits are there before init, and the clone is on the container's account.
        if error.errno == errno.ENOMEM and story is not None and story.born_in >= 0:
            return BoxshipError("unable to start container process: container init was OOM-killed (memory limit too low?)")
        where = f" {error.filename}" if error.filename else ""
        return BoxshipError(f"unable to start container process: {error.strerror}{where}")
    return error
