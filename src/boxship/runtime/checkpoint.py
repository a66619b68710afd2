"""checkpoint and restore: a running container written to disk by CRIU, and brought back to life.

Runs in: the runtime, and never in a warm worker: CRIU makes the restored init a child of the process that started CRIU.
Spec: runc 1.5's checkpoint and restore; images are runc's too, `descriptors.json` included. CRIU: `boxship.linux.criu`.

CRIU saves what is in the container's namespaces. What reaches beyond them has a name instead, which must mean the same
when the container is restored:

    bind mounts, devices, file masks    external mounts, by where they are in the container
    pipes on 0, 1, 2                    descriptors.json; restored onto the caller's descriptors
    a terminal                          its master side is handed out as by `create`
    namespaces joined by path           extRootNetNS, extRootPidNS; others are joined by path again
    control groups                      made as `create` makes them, before CRIU starts in them
"""

from __future__ import annotations

import os

from boxship.abi import mount as m
from boxship.abi import syscalls as sc
from boxship.abi.namespace import CLONE_NEWNET
from boxship.kit.errors import BoxshipError, FailedPrecondition, InvalidArgument, NotFound
from boxship.kit.files import read_all, write_atomic
from boxship.linux import criu, mounts
from boxship.linux.remote import RemoteGone
from boxship.oci import text
from boxship.oci.config import Mount, Process
from boxship.runtime import hooks, notify, state
from boxship.runtime.create import announce, check_terminal, explain, hand_terminal, now, prepare
from boxship.runtime.executor import executor
from boxship.runtime.init import Story, is_bind
from boxship.runtime.lifecycle import _destroy as destroy
from boxship.runtime.rootfs import DEFAULT_DEVICES, inside
from boxship.runtime.sources import open_source
from boxship.runtime.state import open_container

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from boxship.linux.criu import Answer
    from boxship.oci.config import Spec
    from boxship.runtime.command.flags import Parsed
    from boxship.runtime.command.main import Invocation
    from boxship.runtime.context import Context
    from boxship.runtime.create import Creation
    from boxship.runtime.options import CreateOptions
    from boxship.runtime.state import Container

DESCRIPTORS = "descriptors.json"
ROOT = "criu-root"
"""In the container's folder: where CRIU finds the root file system, as a mount that nobody else sees."""

_OLDEST = 30000
_OLDEST_FOR_LABELS = 31600
_EXTERNAL = {"network": ("net", "extRootNetNS"), "pid": ("pid", "extRootPidNS")}
_JOINED = {"mount": "mnt", "uts": "uts", "ipc": "ipc", "user": "user", "time": "time"}
_LOG_LEVEL = 4
_CONFIGURATION = "/etc/criu/runc.conf"
_MAX_LINKS = 40


class Options:
    """What both commands can be told.

    Attributes:
        images, work: absolute folders; `work` "" for the images' own.
        parent: folder of the images that a pre-dump left, relative to `images`.
        switches: those of CRIU's own options that are on or off, by its names.
        cgroups: manage-cgroups-mode.
        page_server: (address, port) or None.
        status_fd: a descriptor of the caller's that is told when lazy pages can be fetched; -1 for none.
    """

    def __init__(self) -> None:
        self.images = ""
        self.work = ""
        self.parent = ""
        self.switches: dict[str, bool] = {}
        self.cgroups = ""
        self.empty_ns = CLONE_NEWNET
        self.page_server: tuple[str, int] | None = None
        self.status_fd = -1
        self.pre_dump = False
        self.lsm_profile = ""
        self.lsm_mount_context = ""


_SWITCHES = ("shell-job", "tcp-established", "ext-unix-sk", "file-locks", "auto-dedup", "lazy-pages")
_DUMP_SWITCHES = ("leave-running", "tcp-skip-in-flight", "link-remap")


def options_of(call: Invocation, p: Parsed) -> Options:
    """The options on a command line. Makes the folder for the images. Raises InvalidArgument, OSError."""
    result = Options()
    result.images = call.path(p.text("image-path") or "checkpoint")
    os.makedirs(result.images, 0o700, exist_ok=True)
    result.work = call.path(p.text("work-path")) if p.text("work-path") else ""
    names = _SWITCHES + tuple(name for name in _DUMP_SWITCHES if name in p.values)
    result.switches = {name.replace("-", "_"): p.yes(name) for name in names}
    result.cgroups = p.text("manage-cgroups-mode")
    for name in p.many("empty-ns"):
        if name != "network":
            raise InvalidArgument(f'namespace "{name}" is not supported')
    if "pre-dump" in p.values:
        result.pre_dump = p.yes("pre-dump")
        result.status_fd = p.number("status-fd")
        result.parent = _parent_images(result.images, p.text("parent-path"))
        result.page_server = _page_server(p.text("page-server"))
    else:
        result.lsm_profile, result.lsm_mount_context = p.text("lsm-profile"), p.text("lsm-mount-context")
    return result


def _parent_images(images: str, parent: str) -> str:
    if parent.startswith("/"):
        raise InvalidArgument("--parent-path must be relative")
    if parent:
        path = os.path.normpath(os.path.join(images, parent))
        if not os.path.isdir(path):
            problem = "not a directory" if os.path.exists(path) else "no such file or directory"
            raise InvalidArgument(f"invalid --parent-path: stat {path}: {problem}")
    return parent


def _page_server(value: str) -> tuple[str, int] | None:
    if not value:
        return None
    address, colon, port = value.rpartition(":")
    if not (colon and address and port):
        raise InvalidArgument("Use --page-server ADDRESS:PORT to specify page server")
    if not port.isdigit():
        raise InvalidArgument("Invalid port number")
    return address.strip("[]"), int(port)


# --- what both directions share --------------------------------------------------------------------------------------


class _Folders:
    """The folders that CRIU works in, by the option that takes a descriptor of each; `log` is the path of its log."""

    def __init__(self, options: Options, log: str) -> None:
        self.fields: dict[str, object] = {"log_level": _LOG_LEVEL, "log_file": log}
        self.paths = {"images_dir_fd": options.images}
        if options.work:
            os.makedirs(options.work, 0o700, exist_ok=True)
            self.paths["work_dir_fd"] = options.work
        self.log = os.path.join(options.work or options.images, log)
        self._fds: list[int] = []

    def take(self, fds: list[int]) -> dict[str, object]:
        """The options, with these descriptors of the folders; they are closed by `close`."""
        self._fds += fds
        return self.fields | dict(zip(self.paths, fds, strict=True))

    def open(self) -> dict[str, object]:
        """The options, with descriptors opened here. Raises OSError."""
        return self.take([os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) for path in self.paths.values()])

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds = []


def _common(container: Container, options: Options) -> dict[str, object]:
    """The options that mean the same in both directions."""
    if options.cgroups not in criu.CGROUP_MODES:
        raise InvalidArgument("invalid manage-cgroups-mode value")
    fields: dict[str, object] = {
        "manage_cgroups": True, "manage_cgroups_mode": criu.CGROUP_MODES[options.cgroups], "notify_scripts": True,
        "orphan_pts_master": True, "empty_ns": options.empty_ns, **options.switches,
    }
    # Says what overrides all of this, so it is an annotation that not everybody may be let to set: see `features`.
    configuration = container.annotations.get("org.criu.config", _CONFIGURATION)
    if configuration:
        fields["config_file"] = configuration
    return fields


def _check_version(context: Context) -> int:
    version = criu.version(context.environ)
    if version < _OLDEST:
        raise FailedPrecondition(f"CRIU version {version} must be {_OLDEST} or higher")
    return version


def _external_mounts(spec: Spec, bundle: str, cgroup: object) -> Iterator[tuple[str, str]]:
    """(where in the container, where from) of every mount that comes from outside."""
    linux = spec.linux
    own_cgroup_ns = linux is not None and any(ns.type == "cgroup" for ns in linux.namespaces)
    for mount in spec.mounts:
        if is_bind(mount):
            yield mount.destination, os.path.normpath(os.path.join(bundle, mount.source))
        elif mount.type == "cgroup" and cgroup is not None and not own_cgroup_ns:
            # On v1 each hierarchy is a bind mount of the container's group; on v2, or as root of its own, a real one.
            for name, _, directory in cgroup.v1_mounts():  # type: ignore[attr-defined]
                yield f"{mount.destination}/{name}", directory
    for name, _, _ in DEFAULT_DEVICES:
        yield f"/dev/{name}", f"/dev/{name}"
    for device in linux.devices if linux else []:
        yield device.path, device.path


def resolve(root_fd: int, path: str) -> str:
    """`path` inside the root `root_fd` with all symbolic links followed, as an absolute path there.

    What does not exist stays as it is written. Raises BoxshipError after too many links.
    """
    done: list[str] = []
    rest = path.split("/")[::-1]
    links = 0
    while rest:
        part = rest.pop()
        if part in ("", "."):
            continue
        if part == "..":
            done = done[:-1]
            continue
        done.append(part)
        try:
            how = m.RESOLVE_IN_ROOT | m.RESOLVE_NO_MAGICLINKS
            fd = mounts.openat2(root_fd, "/".join(done), m.O_PATH | m.O_NOFOLLOW, 0, how)
        except OSError:
            continue
        try:
            target = os.readlink("", dir_fd=fd)
        except OSError:
            continue  # no link
        finally:
            os.close(fd)
        links += 1
        if links > _MAX_LINKS:
            raise BoxshipError(f"too many levels of symbolic links in {path}")
        done = [] if target.startswith("/") else done[:-1]
        rest += target.split("/")[::-1]
    return "/" + "/".join(done)


def _quote_errors(context: Context, path: str) -> None:
    """Put the errors in CRIU's log, each with the five lines before it, into ours."""
    try:
        lines = read_all(path, 1 << 28).decode(errors="replace").splitlines()
    except OSError as error:
        context.warn(f"open {path}: {(error.strerror or '').lower()}")
        return
    shown = -1
    for number, line in enumerate(lines):
        if "Error" not in line:
            continue
        if shown < 0:
            context.warn(f'--- Quoting "{path}"')
        elif number - 5 > shown + 1:
            context.warn("...")
        for i in range(max(shown + 1, number - 5), number + 1):
            context.warn(f"{i + 1}:{lines[i]}")
        shown = number
    if shown >= 0:
        context.warn("---")


# --- checkpoint ------------------------------------------------------------------------------------------------------


def checkpoint(context: Context, container_id: str, options: Options) -> None:
    """Save a container, which ends thereby and is deleted unless it is left running. Raises BoxshipError."""
    if os.geteuid() != 0:
        context.warn("checkpoint is untested with rootless containers")
    with open_container(context, container_id, lock=True) as container:
        status = container.status()
        if status not in (state.RUNNING, state.PAUSED):
            raise FailedPrecondition(f"Container cannot be checkpointed in {status} state")
        _check_version(context)
        folders = _Folders(options, "dump.log")
        try:
            request = _dump_request(context, container, options) | folders.open()
            keep = _status_fd(context, options)
            service = criu.Service(context.environ)

            def notified(answer: Answer) -> None:
                context.debug(f"notify: {answer.script}")
                if answer.script == "status-ready" and keep >= 0:
                    os.write(keep, b"\0")

            try:
                service.ask({"type": criu.PRE_DUMP if options.pre_dump else criu.DUMP, "opts": request}, notified)
            except BoxshipError as error:
                _quote_errors(context, folders.log)
                raise BoxshipError(f"{error}\nlog file: {folders.log}") from None
        finally:
            folders.close()
        if not options.pre_dump and not options.switches.get("leave_running"):
            destroy(container)


def _dump_request(context: Context, container: Container, options: Options) -> dict[str, object]:
    request = _common(container, options)
    request["root"] = container.rootfs
    request["pid"] = container.pid
    spec = container.spec()
    request["external"] = list(_external_namespaces(spec))
    cgroup = container.control_group()
    freezer = _freezer(cgroup)
    if freezer:
        request["freeze_cgroup"] = freezer
    if options.page_server is not None:
        request["ps"] = dict(zip(("address", "port"), options.page_server, strict=True))
    if options.parent:
        request["parent_img"], request["track_mem"] = options.parent, True
    if options.pre_dump:
        _need(context, "mem_track", "MemTrack")
        return request
    if options.switches["lazy_pages"]:
        _need(context, "lazy_pages", "LazyPages")
    _complete_spec(container, spec)
    request["ext_mnt"] = [{"key": key, "val": value} for key, value in _dump_mounts(container, spec, cgroup)]
    write_atomic(os.path.join(options.images, DESCRIPTORS), text.dumps(_descriptors(container.pid)).encode())
    return request


def _need(context: Context, feature: str, name: str) -> None:
    if criu.lacking(context.environ, feature):
        raise FailedPrecondition(f"criu is missing features: [{name}]")


def _external_namespaces(spec: Spec) -> Iterator[str]:
    for ns in spec.linux.namespaces if spec.linux else []:
        if ns.path and ns.type in _EXTERNAL:
            kind, key = _EXTERNAL[ns.type]
            yield f"{kind}[{os.stat(ns.path).st_ino}]:{key}"


def _freezer(cgroup: object) -> str:
    from boxship.linux.cgroups.arrangement import arrangement

    if cgroup is None:
        return ""
    paths: dict[str, str] = cgroup.encode()["paths"]  # type: ignore[attr-defined]
    return cgroup.v2_path if arrangement().pure_v2 else paths.get("freezer", "")  # type: ignore[attr-defined]


def _complete_spec(container: Container, spec: Spec) -> None:
    """Add the mount that is not in the configuration."""
    folder = f"{container.path}/{notify.FOLDER}"
    if os.path.isdir(folder):
        spec.mounts = [*spec.mounts, Mount(destination=notify.IN_CONTAINER, source=folder, options=["bind"])]


def _dump_mounts(container: Container, spec: Spec, cgroup: object) -> Iterator[tuple[str, str]]:
    """(the mount point in the container, its name in the images) of each external mount."""
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    inner = os.open(f"/proc/{container.pid}/root", flags)
    outer = os.open(container.rootfs, flags)
    try:
        for destination, _ in _external_mounts(spec, container.bundle, cgroup):
            path = inside(destination.removeprefix(container.rootfs + "/"))
            # The name is what restore can find out too, where no mount is made yet that could hold a link.
            yield resolve(inner, path), resolve(outer, path)
        for masked in spec.linux.masked_paths if spec.linux else []:
            try:
                fd = mounts.openat2(inner, inside(masked) or ".", m.O_PATH, 0, m.RESOLVE_IN_ROOT | m.RESOLVE_NO_MAGICLINKS)
            except FileNotFoundError:
                continue
            try:
                if not os.path.isdir(f"/proc/self/fd/{fd}"):
                    yield masked, "/dev/null"
            finally:
                os.close(fd)
    finally:
        os.close(inner)
        os.close(outer)


def _descriptors(pid: int) -> list[str]:
    """Where the standard streams lead, in the kernel's words."""
    found = []
    for fd in range(3):
        try:
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
        except OSError:
            found.append("")
    return found


def _status_fd(context: Context, options: Options) -> int:
    """The caller's descriptor that waits for word, or -1. Raises InvalidArgument."""
    fd = options.status_fd
    if fd < 0 or not options.switches["lazy_pages"]:
        return -1
    import fcntl

    try:
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    except OSError as error:
        raise InvalidArgument(f"invalid --status-fd argument {fd}: {(error.strerror or '').lower()}") from None
    if flags & os.O_ACCMODE == os.O_RDONLY:
        raise InvalidArgument(f"invalid --status-fd argument {fd}: not writable")
    return fd


# --- restore ---------------------------------------------------------------------------------------------------------


def restore(
    context: Context, container_id: str, bundle: str, create_options: CreateOptions, options: Options, *, detach: bool
) -> int:
    """Make a container that goes on where the saved one stood. As `run`: the exit status, 0 when detached.

    Raises BoxshipError; then nothing is left of it.
    """
    if os.geteuid() != 0:
        context.warn("restore is untested with rootless containers")
    made = prepare(context, container_id, bundle, create_options, None)
    restoring = _Restoring(made, options)
    try:
        check_terminal(made.spec, create_options, detach=detach)
        ready = notify.listen(context, made.container)
        restoring.perform()
        announce(context, create_options, made.container.pid, b"standard")
    except BaseException as error:
        explained = explain(None, error) if isinstance(error, (OSError, RemoteGone)) else error
        restoring.end()
        made.undo()
        if explained is error:
            raise
        raise explained from error
    made.close_fds()
    container = made.container
    container.unlock()
    with container:
        if detach:
            if ready is not None:
                notify.forward_or_warn(context, ready, container.pid, container.pid)
            return 0
        if ready is not None:
            notify.forward_beside(context, ready, container.pid)
        try:
            return context.parent.attend(container.pid, made.terminal)
        finally:
            if container.lock():
                destroy(container, made.spec)


class _Restoring:
    """A container on its way back."""

    def __init__(self, made: Creation, options: Options) -> None:
        self.made = made
        self.options = options
        self.context = made.context
        self.container = made.container
        self.spec = made.spec
        self.criu = 0
        """CRIU's pid, while it is to be waited for."""
        self.connection: criu.Connection | None = None

    def perform(self) -> None:
        """All of it. Raises BoxshipError, OSError, RemoteGone."""
        if self.options.lsm_profile or self.options.lsm_mount_context:
            version = _check_version(self.context)
            if version < _OLDEST_FOR_LABELS:
                flag = "--lsm-profile" if self.options.lsm_profile else "--lsm-mount-context"
                raise FailedPrecondition(f"{flag} requires at least CRIU 3.16")
        else:
            _check_version(self.context)
        folders = _Folders(self.options, "restore.log")
        try:
            request = self._request()
            self._make_mount_points()
            self._start(request, folders)
            try:
                self._converse(request)
            except BoxshipError as error:
                _quote_errors(self.context, folders.log)
                raise BoxshipError(f"{error}\nlog file: {folders.log}") from None
        finally:
            folders.close()

    def end(self) -> None:
        """Stop CRIU, wherever it is; it takes what it has restored so far with it."""
        if self.connection is not None:
            self.connection.close()
        if self.criu:
            self._wait()

    def _wait(self) -> int:
        pid, self.criu = self.criu, 0
        status = self.context.parent.wait(pid)
        try:
            os.rmdir(ROOT, dir_fd=self.container.fd)
        except FileNotFoundError:
            pass
        return status

    # --- before CRIU ---------------------------------------------------------------------------------------------

    def _request(self) -> dict[str, object]:
        spec, options = self.spec, self.options
        request = _common(self.container, options)
        request |= {"root": f"{self.container.path}/{ROOT}", "evasive_devices": True, "rst_sibling": True}
        if options.lsm_profile:
            request["lsm_profile"] = options.lsm_profile
        if options.lsm_mount_context:
            request["lsm_mount_context"] = options.lsm_mount_context
        inherited = []
        self.handed: list[int] = []
        joins = []
        planned = self.made.story
        assert planned is not None
        for ns in spec.linux.namespaces if spec.linux else []:
            if not ns.path:
                continue
            if ns.type in _EXTERNAL:
                inherited.append({"key": _EXTERNAL[ns.type][1], "fd": criu.SOCKET_FD + 1 + len(self.handed)})
                self.handed.append(planned.joined[ns.type])
            elif ns.type in _JOINED:
                joins.append({"ns": _JOINED[ns.type], "ns_file": ns.path})
            else:
                raise InvalidArgument(f"Do not know how to handle namespace {ns.type}")
        for fd, link in enumerate(self._saved_descriptors()):
            if "pipe:" in link:
                inherited.append({"key": link, "fd": fd})
        request["inherit_fd"], request["join_ns"] = inherited, joins
        outer = os.open(self.container.rootfs, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            external = [
                {"key": resolve(outer, inside(destination.removeprefix(self.container.rootfs + "/"))), "val": source}
                for destination, source in _external_mounts(spec, self.container.bundle, self.made.cgroup)
            ]
        finally:
            os.close(outer)
        if spec.linux and spec.linux.masked_paths:
            external.append({"key": "/dev/null", "val": "/dev/null"})
        request["ext_mnt"] = external
        return request

    def _saved_descriptors(self) -> list[str]:
        path = os.path.join(self.options.images, DESCRIPTORS)
        try:
            saved = text.loads(read_all(path), path)
        except FileNotFoundError:
            raise NotFound(f"open {path}: no such file or directory") from None
        if not isinstance(saved, list) or not all(isinstance(link, str) for link in saved) or len(saved) > 3:
            raise InvalidArgument(f"{path}: expected a list of three strings")
        return [str(link) for link in saved]

    def _make_mount_points(self) -> None:
        """Make the mount points that are missing in the image, as `create` would: by making the mounts, for a moment.

        Some mount points lie in other mounts, so it takes the mounts. They are made in a namespace that ends with this.
        """
        context, container = self.context, self.container
        process = Process(cwd="/")
        process.terminal = True  # nothing of the caller's for it
        story = Story(context, self.spec, process, rootfs=container.rootfs, bundle=container.bundle)
        story.new = {"mount"}
        try:
            story.be_born(executor())
            story.fs.take_root(container.rootfs, m.MS_SLAVE | m.MS_REC)
            for mount in self.spec.mounts:
                self._make_mount_point(story, mount)
                if len(story.fds) > 100:
                    story.perform()
            story.perform()
        finally:
            story.abandon()
            story.close_fds()

    def _make_mount_point(self, story: Story, mount: Mount) -> None:
        if mount.type in ("cgroup", "cgroup2"):
            return  # below a file system that CRIU restores
        destination = "/" + inside(mount.destination.removeprefix(story.rootfs + "/"))
        plain = Mount(destination=destination, type=mount.type, source=mount.source, options=[])
        if is_bind(mount):
            plain.options = ["rbind"]
            options = mounts.parse_options(plain.options)
            source, fd = open_source(story, plain, options)
            if fd >= 0:
                source.received = len(story.fds)
                story.fds.append(story.own(fd))
            story.fs.mount(plain, options, source)
        elif mount.type == "tmpfs":
            story.fs.mount(plain, mounts.parse_options([]), None)
        else:
            story.fs.check_destination(destination, mount.type, None)
            story.fs.close(story.fs.target(inside(destination), "make mountpoint", is_dir=True))

    # --- CRIU ----------------------------------------------------------------------------------------------------

    def _start(self, request: dict[str, object], folders: _Folders) -> None:
        """Have CRIU run in the container's control groups, and where the root file system is a mount of its own."""
        context, container, made = self.context, self.container, self.made
        program = criu.find(context.environ)
        process = Process(cwd="/")
        process.args = [program, "swrk", str(criu.SOCKET_FD)]
        process.env = [f"{name}={value}" for name, value in context.environ.items()]
        process.terminal = bool(self.spec.process and self.spec.process.terminal)
        story = Story(context, self.spec, process, rootfs=container.rootfs, bundle=container.bundle)
        story.new = {"mount"}
        os.mkdir(ROOT, 0o700, dir_fd=container.fd)
        made.made_cgroup = made.cgroup is not None
        made._make_cgroup(story)
        self.connection = criu.Connection()
        try:
            story.be_born(executor())
            self.criu = story.remote.pid
            if made.cgroup is not None and made.cgroup.needs_pid:
                made.cgroup.add(self.criu)
                made.cgroup.apply(made.limits)
            p = story.p
            story.join()
            p.call(sc.MOUNT, 0, "/", 0, m.MS_SLAVE | m.MS_REC, 0, what="set propagation of /")
            tree = p.new()
            flags = m.OPEN_TREE_CLONE | m.OPEN_TREE_CLOEXEC | m.AT_RECURSIVE
            p.call(sc.OPEN_TREE, m.AT_FDCWD, container.rootfs, flags, dst=tree, what=f"open {container.rootfs}")
            where = f"{container.path}/{ROOT}"
            p.call(sc.MOVE_MOUNT, tree, "", m.AT_FDCWD, where, m.MOVE_MOUNT_F_EMPTY_PATH, what=f"mount {where}")
            for path in folders.paths.values():
                # Not ours: CRIU makes mounts in its working folder, and can do so only in its own mount namespace.
                fd = p.new()
                p.call(sc.OPENAT, m.AT_FDCWD, path, os.O_RDONLY | m.O_DIRECTORY | m.O_CLOEXEC, dst=fd, what=f"open {path}")
                p.send_descriptor(fd, f"send {path}")
            story.perform()
            request |= folders.take(story.remote.descriptors)
            story.remote.descriptors = []
            request["cg_root"] = list(_cgroup_roots(self.criu))
            story.preserve_fds = [self.connection.theirs, *self.handed]
            story.pass_descriptors()
            path = story.p.keep()
            story.p.set(path, program)
            story.execute(path)
            story.go()
            try:
                story.done()
            except RemoteGone:
                pass  # the exec closed our connection: it is CRIU now
        except BaseException:
            if self.criu:
                os.kill(self.criu, 9)
            raise
        finally:
            story.close_fds()
            if self.criu:
                story.remote.close()
        self.connection.started()

    def _converse(self, request: dict[str, object]) -> None:
        assert self.connection is not None
        for name, value in request.items():
            self.context.debug(f"CRIU option {name} with value {value}")
        for answer in self.connection.ask({"type": criu.RESTORE, "opts": request}):
            if answer.kind == criu.NOTIFY:
                self.context.debug(f"notify: {answer.script}")
                self._notified(answer)
        self.connection.finish()
        status = self._wait()
        if status:
            raise BoxshipError(f"criu failed: {hooks.describe_status(status)}")
        if not self.container.pid:
            raise BoxshipError("criu failed: it restored nothing")

    def _notified(self, answer: Answer) -> None:
        container, made = self.container, self.made
        if answer.script == "setup-namespaces" and self.spec.hooks:
            told = container.hook_state(state.CREATING, answer.pid)
            hooks.run_hooks("prestart", self.spec.hooks.prestart, told)
            hooks.run_hooks("createRuntime", self.spec.hooks.create_runtime, told)
        elif answer.script == "post-restore":
            container.pid = answer.pid
            container.pid_start = state.process_stat(answer.pid)[1]
            container.created = now()
            container.namespaces = {}
            container.creating = False
            container.save()
        elif answer.script == "orphan-pts-master" and answer.fds:
            made.terminal = hand_terminal(made.options, answer.fds.pop(0))


def _cgroup_roots(pid: int) -> Iterator[dict[str, str]]:
    """Where a process is in each hierarchy: what the groups in the images become."""
    for line in read_all(f"/proc/{pid}/cgroup").decode().splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            yield {"ctrl": controller, "path": path}
