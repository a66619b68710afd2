"""restore: a container that CRIU saved, brought back to life.

Runs in: the runtime, and never in a warm worker: CRIU makes the restored init a child of the process that started CRIU.
Spec: runc 1.5's restore; see `boxship.runtime.checkpoint` for what is in the images.

    runtime                                              init.c                     CRIU
      prepare: record, plan
      mount points, made in passing ───────────────────► (one that ends)
      cgroups
      spawn, with a mount namespace ───────────────────► cgroups; the root
                                                         file system as a mount
                                                         execve ──────────────────► swrk
      request ─────────────────────────────────────────────────────────────────►
      ◄──────────────────────────────────────────────────── setup-namespaces, orphan-pts-master, post-restore
      hooks, terminal, record                                                        ends; init is the runtime's child
"""

from __future__ import annotations

import os
from _struct import Struct

from boxship.abi import mount as m
from boxship.abi import syscalls as sc
from boxship.kit import failpoint
from boxship.kit.errors import BoxshipError, FailedPrecondition, InvalidArgument, NotFound
from boxship.kit.files import read_all
from boxship.linux import criu, mounts
from boxship.linux.cgroups.arrangement import arrangement
from boxship.linux.remote import RemoteGone
from boxship.oci import text
from boxship.oci.config import Mount, Process
from boxship.runtime import hooks, notify, state
from boxship.runtime.checkpoint import (
    DESCRIPTORS,
    EXTERNAL,
    Folders,
    check_version,
    common,
    external_mounts,
    keep_v2_options,
    quote_errors,
    resolve,
)
from boxship.runtime.create import announce, check_terminal, explain, hand_terminal, now, prepare
from boxship.runtime.executor import executor
from boxship.runtime.init import Story, is_bind
from boxship.runtime.lifecycle import destroy
from boxship.runtime.rootfs import inside
from boxship.runtime.sources import open_source

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from boxship.linux.criu import Answer
    from boxship.runtime.checkpoint import Options
    from boxship.runtime.context import Context
    from boxship.runtime.create import Creation
    from boxship.runtime.options import CreateOptions

ROOT = "criu-root"
"""In the container's folder: where CRIU finds the root file system, as a mount that nobody else sees."""

_ACL = "system.posix_acl_access"
_OLDEST_FOR_LABELS = 31600
_JOINED = {"mount": "mnt", "uts": "uts", "ipc": "ipc", "user": "user", "time": "time"}


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
            version = check_version(self.context)
            if version < _OLDEST_FOR_LABELS:
                flag = "--lsm-profile" if self.options.lsm_profile else "--lsm-mount-context"
                raise FailedPrecondition(f"{flag} requires at least CRIU 3.16")
        else:
            check_version(self.context)
        folders = Folders(self.options, "restore.log")
        v2_options = arrangement().unified_options
        try:
            request = self._request()
            self._open_images()
            self._make_mount_points()
            failpoint.hit("restore.points")
            self._start(request, folders)
            failpoint.hit("restore.started")
            try:
                self._converse(request)
            except BoxshipError as error:
                quote_errors(self.context, folders.log)
                raise BoxshipError(f"{error}\nlog file: {folders.log}") from None
        finally:
            folders.close()
            keep_v2_options(self.context, v2_options)

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
        request = common(self.container, options)
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
            if ns.type in EXTERNAL:
                inherited.append({"key": EXTERNAL[ns.type][1], "fd": criu.SOCKET_FD + 1 + len(self.handed)})
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
                for destination, source in external_mounts(spec, self.container.bundle, self.made.cgroup)
            ]
        finally:
            os.close(outer)
        if spec.linux and spec.linux.masked_paths:
            external.append({"key": "/dev/null", "val": "/dev/null"})
        request["ext_mnt"] = external
        return request

    def _open_images(self) -> None:
        """Let the root of the container's user namespace read the images: CRIU restores as that user, and asks for some late.

        By an access control list: nobody else may, and he may not write, as what is read here is believed.
        """
        linux = self.spec.linux
        root = next((ids.host_id for ids in linux.uid_mappings if not ids.container_id), 0) if linux else 0
        if not root:
            return
        images = self.options.images
        try:
            for name in os.listdir(images):
                if name.endswith(".img"):
                    os.setxattr(f"{images}/{name}", _ACL, _readable_by(root, 0o6, 0o4), follow_symlinks=False)
            os.setxattr(images, _ACL, _readable_by(root, 0o7, 0o5))
        except OSError as error:
            self.context.debug(f"images in {images} are readable as they are: {(error.strerror or '').lower()}")

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

    def _start(self, request: dict[str, object], folders: Folders) -> None:
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
        made.make_cgroup(story)
        self.connection = criu.Connection()
        try:
            story.be_born(executor())
            self.criu = story.remote.pid
            failpoint.hit("restore.born")
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
            for folder in folders.paths.values():
                # CRIU makes mounts in its working folder, which it can only where the descriptor is of its own namespace.
                fd = p.new()
                p.call(sc.OPENAT, m.AT_FDCWD, folder, os.O_RDONLY | m.O_DIRECTORY | m.O_CLOEXEC, dst=fd, what=f"open {folder}")
                p.send_descriptor(fd, f"send {folder}")
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
                failpoint.hit(f"restore.{answer.script}")
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
            container.pid_start = state.start_of(answer.pid)
            container.created = now()
            container.namespaces = {}
            container.creating = False
            container.save()
            if made.cgroup is None:
                container.claim()
        elif answer.script == "orphan-pts-master" and answer.fds:
            made.terminal = hand_terminal(made.options, answer.fds.pop(0))


def _readable_by(uid: int, owner: int, user: int) -> bytes:
    """An access control list: `owner` for the owner, `user` for one more user, nothing for all others.

    Spec: acl(5), struct posix_acl_xattr_header and _entry: version 2, then (tag, permissions, id) in the order of tags.
    """
    nobody = 0xFFFFFFFF
    entries = ((0x01, owner, nobody), (0x02, user, uid), (0x04, 0, nobody), (0x10, user, nobody), (0x20, 0, nobody))
    return Struct("<I").pack(2) + b"".join(Struct("<HHI").pack(*entry) for entry in entries)


def _cgroup_roots(pid: int) -> Iterator[dict[str, str]]:
    """Where a process is in each hierarchy: what the groups in the images become."""
    for line in read_all(f"/proc/{pid}/cgroup").decode().splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            yield {"ctrl": controller, "path": path}
