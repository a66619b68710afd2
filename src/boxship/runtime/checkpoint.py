"""checkpoint: a running container written to disk by CRIU; and what `restore` shares with it.

Runs in: the runtime, and never in a warm worker: a descriptor of the caller's may be named by its number.
Spec: runc 1.5's checkpoint and restore; images are runc's too, `descriptors.json` included. CRIU: `boxship.linux.criu`.

CRIU saves what is in the container's namespaces. What reaches beyond them has a name instead, which must mean the same
when the container is restored:

    bind mounts, devices, file masks    external mounts, by where they are in the container
    pipes on 0, 1, 2                    descriptors.json; restored onto the caller's descriptors
    a terminal                          its master side is handed out as by `create`
    namespaces joined by path           extRootNetNS, extRootPidNS; others are joined by path again
    control groups                      made as `create` makes them, before CRIU starts in them

Not here: the way back (`boxship.runtime.restore`).
"""

from __future__ import annotations

import os

from boxship.abi import mount as m
from boxship.abi.namespace import CLONE_NEWNET
from boxship.kit.errors import BoxshipError, FailedPrecondition, InvalidArgument
from boxship.kit.files import read_all, write_atomic
from boxship.linux import criu, mounts
from boxship.linux.cgroups.arrangement import arrangement, restore_options
from boxship.oci import text
from boxship.oci.config import Mount
from boxship.runtime import notify, state
from boxship.runtime.init import is_bind
from boxship.runtime.lifecycle import destroy
from boxship.runtime.rootfs import DEFAULT_DEVICES, inside
from boxship.runtime.state import open_container

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from boxship.linux.cgroups import Cgroup
    from boxship.linux.criu import Answer
    from boxship.oci.config import Spec
    from boxship.runtime.command.flags import Parsed
    from boxship.runtime.command.main import Invocation
    from boxship.runtime.context import Context
    from boxship.runtime.state import Container

DESCRIPTORS = "descriptors.json"

_OLDEST = 30000
EXTERNAL = {"network": ("net", "extRootNetNS"), "pid": ("pid", "extRootPidNS")}
"""Namespaces that are not saved when they were joined by path: CRIU's name of the kind, and the key in the images."""
_LOG_LEVEL = 4
_CONFIGURATION = "/etc/criu/runc.conf"


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


class Folders:
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


def common(container: Container, options: Options) -> dict[str, object]:
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


def check_version(context: Context) -> int:
    version = criu.version(context.environ)
    if version < _OLDEST:
        raise FailedPrecondition(f"CRIU version {version} must be {_OLDEST} or higher")
    return version


def external_mounts(spec: Spec, bundle: str, cgroup: Cgroup | None) -> Iterator[tuple[str, str]]:
    """(where in the container, where from) of every mount that comes from outside."""
    linux = spec.linux
    userns = linux is not None and any(ns.type == "user" for ns in linux.namespaces)
    own_cgroup_ns = linux is not None and any(ns.type == "cgroup" for ns in linux.namespaces)
    for mount in spec.mounts:
        if is_bind(mount):
            yield mount.destination, os.path.normpath(os.path.join(bundle, mount.source))
        elif mount.type in ("cgroup", "cgroup2") and cgroup is not None and not own_cgroup_ns:
            # On v1 each hierarchy is a bind mount of the container's group. On v2, or as root of its own, it is a real one,
            # which the kernel does not let a user namespace have without a cgroup namespace.
            hierarchies = cgroup.v1_mounts()
            for name, _, directory in hierarchies:
                yield f"{mount.destination}/{name}", directory
            if userns and not hierarchies:
                yield mount.destination, cgroup.v2_path
    for name, _, _ in DEFAULT_DEVICES:
        yield f"/dev/{name}", f"/dev/{name}"
    for device in linux.devices if linux else []:
        yield device.path, device.path


def resolve(root_fd: int, path: str) -> str:
    """`path` inside the root `root_fd` with all symbolic links followed, as an absolute path there.

    What does not exist stays as it is written. Raises BoxshipError after too many links.
    """
    try:
        return "/" + mounts.follow_links(root_fd, path)
    except OSError:
        raise BoxshipError(f"too many levels of symbolic links in {path}") from None


def keep_v2_options(context: Context, options: list[str]) -> None:
    """Undo what CRIU's own mounts have done to the machine's v2 hierarchy."""
    try:
        restore_options(options)
    except OSError as error:
        context.warn(f"cannot give the cgroup2 mount its options {options} back: {(error.strerror or '').lower()}")


def quote_errors(context: Context, path: str) -> None:
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
        check_version(context)
        folders = Folders(options, "dump.log")
        v2_options = arrangement().unified_options
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
                quote_errors(context, folders.log)
                raise BoxshipError(f"{error}\nlog file: {folders.log}") from None
        finally:
            folders.close()
            keep_v2_options(context, v2_options)
        if not options.pre_dump and not options.switches.get("leave_running"):
            destroy(container)


def _dump_request(context: Context, container: Container, options: Options) -> dict[str, object]:
    request = common(container, options)
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
        if ns.path and ns.type in EXTERNAL:
            kind, key = EXTERNAL[ns.type]
            yield f"{kind}[{os.stat(ns.path).st_ino}]:{key}"


def _freezer(cgroup: Cgroup | None) -> str:
    if cgroup is None:
        return ""
    paths: dict[str, str] = cgroup.encode()["paths"]  # type: ignore[assignment]
    return cgroup.v2_path if arrangement().pure_v2 else paths.get("freezer", "")


def _complete_spec(container: Container, spec: Spec) -> None:
    """Add the mount that is not in the configuration."""
    folder = f"{container.path}/{notify.FOLDER}"
    if os.path.isdir(folder):
        spec.mounts = [*spec.mounts, Mount(destination=notify.IN_CONTAINER, source=folder, options=["bind"])]


def _dump_mounts(container: Container, spec: Spec, cgroup: Cgroup | None) -> Iterator[tuple[str, str]]:
    """(the mount point in the container, its name in the images) of each external mount."""
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    inner = os.open(f"/proc/{container.pid}/root", flags)
    outer = os.open(container.rootfs, flags)
    try:
        for destination, _ in external_mounts(spec, container.bundle, cgroup):
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
