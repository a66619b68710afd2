"""The story of how a container comes to be: everything between fork and exec, in order.

Runs in: the runtime (the *parent*), which tells the story; each step is carried out by *init*, the container's first
process, as a program of system calls (`boxship.linux.remote`). What can only be done from outside (id maps, hooks of the
runtime namespace, limits) the parent does between two programs.
Spec: runtime-spec 1.3.0, runtime.md "Lifecycle", config.md, config-linux.md.

    parent                                              init
      spawn (clone with the new namespaces) ──────────►  a copy of init.c waits for a program
      ── enter: cgroups, namespaces ──────────────────►
      id maps, network devices, limits
      ── file system: mounts, devices ────────────────►
      hooks prestart, createRuntime
      ── root: hooks createContainer, pivot, console ─►
      reads /etc/passwd where $HOME is wanted
      ── identity: user, capabilities, seccomp ───────►  answers "ready"
      hands the seccomp listener to its agent
      writes the record; `create` ends                   waits on exec.fifo
      `start` writes to exec.fifo ────────────────────►  hooks startContainer, execve

Not here: what each mount takes (`boxship.runtime.rootfs`), and how a second process joins (`boxship.runtime.exec`), which
shares the last part, from `Story.take_limits` on.
"""

from __future__ import annotations

import errno
import os
import stat
from _struct import Struct

from boxship.abi import mount as m
from boxship.abi import namespace as n
from boxship.abi import syscalls as sc
from boxship.kit.errors import BoxshipError, InvalidArgument
from boxship.linux import mounts
from boxship.linux.remote import CTL, NEXT, SCRATCH, SCRATCH_SIZE, Label, Program, Reg, Remote, received
from boxship.linux.scheduler import ALL_CPUS
from boxship.runtime.rootfs import Rootfs, Source, inside

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from boxship.linux.cgroups import Cgroup
    from boxship.linux.seccomp import Filter
    from boxship.oci.config import Hook, Mount, Process, Spec
    from boxship.runtime.context import Context

_FPROG = Struct("=HxxxxxxQ")
_PR_SET_DUMPABLE, _PR_SET_KEEPCAPS, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 4, 8, 24, 38, 47
_SIGCHLD = 17
_TIOCSPTLCK, _TIOCGPTPEER, _TIOCSCTTY, _TIOCSWINSZ = 0x40045431, 0x5441, 0x540E, 0x5414
_SIOCSIFFLAGS = 0x8914
# To setresuid(2) -1 is "as it was": the process would stay root.
_NO_ID = 0xFFFFFFFF
_CHUNK = 150
"""Operations after which the parent lets init begin: few enough to keep both at work, many enough to pay for the way."""
_FDS_AT_ONCE = 200  # SCM_RIGHTS takes 253
_PASSED_AT_ONCE = 100
_CTL_AT_LEAST = 1000  # where init.c puts its end of the control socket, if it may


class Story:
    """One container's (or one `exec`'s) way to its program, as it is being told.

    Attributes:
        context, spec, process: whose story it is; `process` is spec.process, or exec's own.
        rootfs: absolute path of the root file system on the host.
        bundle: absolute path; relative mount sources start there.
        cgroup: the container's, made and limited already; None without.
        born_in: the cgroup's directory in the v2 hierarchy, for init to be cloned into; -1 for none.
        join_cgroups: descriptors to write "0" to; closed at the end.
        new, joined: namespaces to make, and to enter (descriptor by type).
        filter: the compiled seccomp filter.
        state: gives the spec's state for hooks, for a status.
        open_note: opens a file of the container's folder for init to write to.
        hand_terminal, hand_listener: take the descriptor of the terminal's master side, of the seccomp listener.
        exec_fifo: an O_PATH descriptor of exec.fifo, when `start` is another command; -1 otherwise.
        preserve_fds: descriptors that become 3, 4, …
        ready: index of the operation at which init answered that it is ready.
    """

    def __init__(self, context: Context, spec: Spec, process: Process, *, rootfs: str, bundle: str) -> None:
        self.context = context
        self.spec = spec
        self.process = process
        self.rootfs = rootfs
        self.bundle = bundle
        self.cgroup: Cgroup | None = None
        self.born_in = -1
        self.join_cgroups: list[int] = []
        self.new: set[str] = set()
        self.joined: dict[str, int] = {}
        self.filter: Filter | None = None
        self.state: Callable[[str], bytes] = lambda status: b"{}"
        self.open_note: Callable[[str], int]
        self.hand_terminal: Callable[[int], None] | None = None
        self.hand_listener: Callable[[int], None] | None = None
        self.exec_fifo = -1
        self.preserve_fds: list[int] = []
        self.env: list[str] = list(process.env)
        self.no_pivot = False
        self.keyring = ""
        self.rootless = context.rootless
        self.may_set_groups = True
        self._passwd = b""
        self.ready = -1
        self._remote: Remote | None = None
        self.executor = -1
        self.joined_user = False
        self._in_flight = False
        self._to_learn: list[Callable[[], None]] = []  # from the program that is being written
        self._learning: list[Callable[[], None]] = []  # from the one that init carries out
        self.p = Program()
        self.fds: list[int] = []
        self._opened: list[int] = []
        self.proc = self.p.keep()
        self.root = self.p.keep()
        self.null = self.p.keep()
        self.fs = Rootfs(self.p, self.root, rootfs, perform=self.perform)
        self.fs.remote = lambda: self.remote
        if spec.linux and spec.linux.mount_label:
            from boxship.linux import lsm

            self.fs.label = spec.linux.mount_label if lsm.selinux_enabled() else ""

    @property
    def remote(self) -> Remote:
        """Init, from `be_born` on."""
        assert self._remote is not None
        return self._remote

    @property
    def userns(self) -> bool:
        """Whether the container has a user namespace of its own."""
        return self.joined_user or "user" in self.new or "user" in self.joined

    @property
    def forks(self) -> bool:
        """Whether init itself has to fork to get into its namespaces (see `be_born`)."""
        return self.userns or "pid" in self.joined or "time" in self.new | self.joined.keys()

    # --- telling -------------------------------------------------------------------------------------------------

    def send(self, fd: int) -> Reg:
        """Let `fd` travel with the program that is being written; its register there."""
        self.fds.append(fd)
        return received(len(self.fds) - 1)

    def own(self, fd: int) -> int:
        """Close `fd` when the story ends."""
        self._opened.append(fd)
        return fd

    def go(self) -> None:
        """Let init begin with what was written so far, once it is through with what it was told before.

        The parent writes the next program meanwhile; `done` waits.
        """
        self.done()
        self.p.end()
        self.remote.send(self.p, self.fds)
        self._in_flight = True
        self._learning, self._to_learn = self._to_learn, []
        self.p = Program()
        self.fds = []
        self.fs.use(self.p)

    def done(self) -> None:
        """Wait until init came to the end of what it was told. Raises RemoteError, RemoteGone."""
        if self._in_flight:
            self.answer()
            for learn in self._learning:
                learn()

    def answer(self) -> int:
        """The next answer to the program that was sent last, see `Remote.wait`."""
        self._in_flight = False
        return self.remote.wait()

    def perform(self) -> None:
        """`go` and `done`."""
        if len(self.p):
            self.go()
        self.done()

    def close_fds(self) -> None:
        """Close what the parent opened for the telling."""
        fds = [*self.join_cgroups, *self.joined.values(), *self._opened, *([self.born_in] if self.born_in >= 0 else [])]
        for fd in fds:
            os.close(fd)
        self.join_cgroups, self.joined, self._opened, self.born_in = [], {}, [], -1
        self.fs.close_host()

    def abandon(self) -> None:
        """Kill init, if there is one, and wait for it: nothing is started that is not wanted any more."""
        if self._remote is None:
            return
        remote, self._remote = self._remote, None
        remote.close()
        try:
            os.kill(remote.pid, 9)
        except ProcessLookupError:
            pass
        except OSError:
            return  # it was not even born
        self.context.parent.wait(remote.pid)

    # --- 1. birth ------------------------------------------------------------------------------------------------

    def be_born(self, exe: int) -> None:
        """Start init from the sealed copy `exe`, in as many of its namespaces as clone(2) can make at once.

        A new user namespace has to wait, since its ids are mapped from outside before anything else is made in it; with
        a namespace to join the order matters, and a time namespace begins only for children. Those take `enter`.
        """
        self.at_once = 0
        if not self.forks:
            for kind in self.new - {"cgroup"}:
                self.at_once |= n.FLAGS[kind]
        stdio = self._stdio()
        try:
            self._remote = self.context.parent.spawn(exe, "boxrun-init", stdio, self.at_once, self.born_in)
        finally:
            if self.process.terminal:
                os.close(stdio[0])

    def rehearse(self, remote: Remote) -> None:
        """Instead of `be_born`: tell it all to `remote`, which only listens (see `boxship.runtime.rehearsal`)."""
        self.at_once = ~0
        self._remote = remote

    def _stdio(self) -> list[int]:
        if self.process.terminal:
            null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
            return [null] * 3
        return list(self.context.parent.stdio)

    # --- 2. cgroups and namespaces -------------------------------------------------------------------------------

    def enter(self) -> None:
        """Join the cgroups, then enter or make the namespaces, each as soon as what it needs is there."""
        p = self.p
        p.context = ""
        if not self.userns or not self.rootless:
            # From here on no process of the container may look into init, which holds descriptors of the host
            # (CVE-2016-9962). With id maps to be written by an ordinary user it has to wait: the files in /proc would
            # belong to root.
            self.not_dumpable()
        p.call(sc.UMASK, 0)
        p.call(sc.SETSID, on_err=NEXT)
        # The host's own procfs, from before anything of the container can stand in its place (CVE-2025-52881). What is
        # written through it concerns the writer: its network namespace, its security attributes.
        self.open_proc()
        # Cgroups come first of all: what the kernel allocates for the namespaces is then on the container's account, and a
        # cgroup namespace shows as its root where its maker was. Each process writes itself ("0"): moving another one
        # makes the kernel wait for every process of the machine.
        self.join()
        # Whatever CPUs the caller was bound to; the cpuset says which of them it may use.
        p.call(sc.SCHED_SETAFFINITY, 0, len(ALL_CPUS), ALL_CPUS, on_err=NEXT)
        if "user" in self.new | self.joined.keys():
            self._enter_user_namespace()
        else:
            for kind, fd in self.joined.items():
                self._setns(kind, fd)
        rest = 0
        for kind in self.new - {"user"}:
            rest |= n.FLAGS[kind]
        rest &= ~self.at_once
        if rest:
            self.p.call(sc.UNSHARE, rest, what="unable to unshare namespaces")
        if "time" in self.new and self.spec.linux and self.spec.linux.time_offsets:
            self.perform()
            self._time_offsets()
        if rest & n.CLONE_NEWPID or "pid" in self.joined or "time" in self.new | self.joined.keys():
            self.become_child()
        if self.keyring:
            self.join_keyring(new=True)
        if "network" in self.new:
            self._loopback()

    def open_proc(self) -> None:
        """Open the host's /proc, for as long as init is ours."""
        p = self.p
        fd = p.new()
        p.call(sc.OPENAT, m.AT_FDCWD, "/proc", m.O_PATH | m.O_DIRECTORY | m.O_CLOEXEC, dst=fd, what="open /proc")
        self._keep(fd, self.proc)

    def _keep(self, fd: Reg, register: Reg) -> int:
        """Move a descriptor out of the numbers that `pass_descriptors` fills, into `register`; the operation's index."""
        index = self.p.call(sc.FCNTL, fd, 1030, self._lowest_own(), dst=register, what="dup")  # F_DUPFD_CLOEXEC
        self.fs.close(fd)
        return index

    def join(self) -> None:
        """Enter the cgroups of `join_cgroups`."""
        for fd in self.join_cgroups:
            file = self.send(fd)
            self.p.call(sc.WRITE, file, b"0", 1, what="unable to join the container's cgroup")
            self.fs.close(file)

    def not_dumpable(self) -> None:
        """Let no process of the container look into init from here on (CVE-2016-9962)."""
        self.p.call(sc.PRCTL, _PR_SET_DUMPABLE, 0, 0, 0, 0, what="prctl(PR_SET_DUMPABLE)")

    def _setns(self, kind: str, fd: int) -> None:
        path = next((ns.path for ns in self.spec.linux.namespaces if ns.type == kind), "") if self.spec.linux else ""
        door = self.send(fd)
        self.p.call(sc.SETNS, door, n.FLAGS[kind], what=f"failed to setns into {kind} namespace {path}".rstrip())
        self.fs.close(door)

    def _enter_user_namespace(self) -> None:
        from boxship.linux.namespaces import owner_of

        p = self.p
        inner: list[tuple[str, int]] = []
        if "user" in self.joined:
            user = os.fstat(self.joined["user"]).st_ino
            for kind, fd in self.joined.items():
                if kind == "user":
                    continue
                # Entering takes privilege in the namespace's owner: those of the host's before we leave it, the others after.
                (inner.append((kind, fd)) if owner_of(fd) == user else self._setns(kind, fd))
            self._setns("user", self.joined["user"])
            for kind, fd in inner:
                self._setns(kind, fd)
        else:
            for kind, fd in self.joined.items():
                self._setns(kind, fd)
            p.call(sc.UNSHARE, n.CLONE_NEWUSER, what="unable to unshare the user namespace")
            self.perform()
            self._map_ids()
            p = self.p
        # Root of the namespace, so that what is made from here on belongs to it.
        p.call(sc.SETRESGID, 0, 0, 0, what="unable to become root of the user namespace")
        p.call(sc.SETRESUID, 0, 0, 0, what="unable to become root of the user namespace")
        if not (self.rootless and "time" in self.new):
            self.not_dumpable()

    def _map_ids(self) -> None:
        from boxship.linux.idmaps import write_id_maps

        linux = self.spec.linux
        assert linux is not None
        uids = [(x.container_id, x.host_id, x.size) for x in linux.uid_mappings]
        gids = [(x.container_id, x.host_id, x.size) for x in linux.gid_mappings]
        write_id_maps(self.remote.pid, uids, gids, deny_setgroups=self.rootless)

    def _time_offsets(self) -> None:
        # From outside: the file is not init's own once it is no longer dumpable.
        assert self.spec.linux is not None
        lines = "".join(f"{clock} {o.secs} {o.nanosecs}\n" for clock, o in self.spec.linux.time_offsets.items())
        path = f"/proc/{self.remote.pid}/timens_offsets"
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, lines.encode())
            finally:
                os.close(fd)
        except OSError as error:
            raise BoxshipError(f"failed to update {path}: {(error.strerror or '').lower()}") from None

    def become_child(self) -> None:
        """Go on in a child: a pid or time namespace takes in children only.

        CLONE_PARENT: the child is the caller's, as containerd-shim and conmon expect of init.
        """
        p = self.p
        parent = Label()
        pid = p.fork(n.CLONE_PARENT | _SIGCHLD, parent=parent, takes_over=True, what="unable to fork into the pid namespace")
        after = Label()
        p.jump(after)
        p.mark(parent)
        p.call(sc.EXIT_GROUP, 0)
        p.mark(after)
        before = self.remote.pid
        self.perform()
        self.remote.pid = int.from_bytes(self.remote.data(pid, 4), "little")
        self.context.parent.wait(before)
        self.not_dumpable()
        # A terminal has to be taken by the leader of a session, which the child of one is not.
        self.p.call(sc.SETSID, on_err=NEXT)

    def join_keyring(self, *, new: bool) -> None:
        """Enter the container's session keyring, not to keep the caller's, whose keys are the host's; `new`: it is made."""
        from boxship.linux import lsm
        from boxship.linux.keyring import JOIN_SESSION, SETPERM, permissions

        attributes = lsm.key_attributes(self.process.selinux_label or "")
        self._write_attributes(attributes, "unable to label session keyring")
        ring = self.p.new()
        self.p.call(sc.KEYCTL, JOIN_SESSION, self.keyring, dst=ring, what="unable to join session keyring")
        if new:
            self.p.call(sc.KEYCTL, SETPERM, ring, permissions(userns=self.userns), what="unable to mod keyring permissions")
        # The user's own keys are labelled by the policy.
        self._write_attributes([(path, b"") for path, _ in attributes], "unable to label session keyring")

    def _loopback(self) -> None:
        p = self.p
        request = Struct("=16sHxxxxxxxxxxxxxxxxxxxxxx").pack(b"lo", 0x41)  # struct ifreq: IFF_UP | IFF_RUNNING
        fd = p.new()
        p.call(sc.SOCKET, 2, 2 | m.O_CLOEXEC, 0, dst=fd, what="unable to set up the loopback device")
        p.call(sc.IOCTL, fd, _SIOCSIFFLAGS, request, what="unable to set up the loopback device")
        self.fs.close(fd)

    # --- 3. the file system --------------------------------------------------------------------------------------

    def make_file_system(self) -> None:
        """Mounts in their order, then devices: all still beside the host's tree, where sources and device nodes are found."""
        p = self.p
        linux = self.spec.linux
        propagation = 0
        if linux and linux.rootfs_propagation.endswith("unbindable"):
            propagation = m.MS_PRIVATE | m.MS_REC  # of the root alone, and at the end: until then we bind from the host's tree
        elif linux and linux.rootfs_propagation:
            propagation = mounts.PROPAGATION.get("r" + linux.rootfs_propagation.removeprefix("r"), 0)
        p.call(sc.OPENAT, m.AT_FDCWD, "/dev/null", m.O_PATH | m.O_CLOEXEC, dst=self.null, what="open /dev/null")
        if "mount" in self.new:
            self.fs.take_root(self.rootfs, propagation)
        else:
            # The mounts are made all the same, as runc does, in a namespace that is others' too; delete takes them away.
            flags = m.O_PATH | m.O_DIRECTORY | m.O_CLOEXEC
            p.call(sc.OPENAT, m.AT_FDCWD, self.rootfs, flags, dst=self.root, what=f"open {self.rootfs}")
        for mount in self.spec.mounts:
            self._mount(mount)
            if len(self.p) > _CHUNK or len(self.fds) > _FDS_AT_ONCE:
                # Init mounts these while the parent writes the next.
                self.go()
        if self.has_own_dev:
            kcore = os.path.exists("/proc/kcore")
            self.fs.devices(linux.devices if linux else [], kcore=kcore)

    @property
    def has_own_dev(self) -> bool:
        """Whether /dev is the container's to fill, not a directory of the host's bound there."""
        for mount in self.spec.mounts:
            if inside(mount.destination) == "dev" and is_bind(mount):
                return False
        return True

    def _mount(self, mount: Mount) -> None:
        self.fs.userns = self.userns
        if mount.destination.startswith(self.rootfs + "/"):
            # Some callers give the host's path of the mount point; runc has always understood that.
            mount.destination = mount.destination.removeprefix(self.rootfs)
        from boxship.runtime.sources import copy_up, open_source

        options = mounts.parse_options(mount.options)
        if mount.type in ("cgroup", "cgroup2"):
            self._mount_cgroup(mount, options)
            return
        source: Source | None = None
        if is_bind(mount):
            source, fd = open_source(self, mount, options)
            if fd >= 0:
                source.received = len(self.fds)
                self.fds.append(self.own(fd))
        if options.copy_up and source is None:
            copy_up(self, mount, options)
            return
        self.fs.mount(mount, options, source)

    def _mount_cgroup(self, mount: Mount, options: mounts.Options) -> None:
        from boxship.linux.cgroups.arrangement import arrangement

        own_ns = "cgroup" in self.new or "cgroup" in self.joined
        machine = arrangement()
        if machine.pure_v2:
            path = self.cgroup.v2_path if self.cgroup else ""
            self.fs.cgroup_v2(mount, options, path or "/sys/fs/cgroup", [] if own_ns else machine.unified_options)
        else:
            listed = self.cgroup.v1_mounts() if self.cgroup else []
            self.fs.cgroup_v1(mount, options, listed, own_ns=own_ns)

    # --- 4. the root ---------------------------------------------------------------------------------------------

    def change_root(self) -> None:
        """Hooks that still see the host, masks while there is something to bind from, then the new root for good."""
        p = self.p
        linux = self.spec.linux
        own_mounts = "mount" in self.new
        p.call(sc.FCHDIR, self.root, what="chdir to rootfs")
        if self.spec.hooks and self.spec.hooks.create_container:
            self.run_hooks("createContainer", self.spec.hooks.create_container, "creating")
        if own_mounts and linux:
            self.fs.read_only_paths(linux.readonly_paths)
            if linux.masked_paths:
                self.fs.masks(linux.masked_paths, self.null)
        self.fs.close(self.null)
        if own_mounts and self.no_pivot:
            self.fs.hide_host(self.rootfs)
        self.fs.change_root(pivot=not self.no_pivot, rootfs=self.rootfs, has_mount_ns=own_mounts)
        if own_mounts and linux and linux.rootfs_propagation in ("shared", "unbindable"):
            flag = m.MS_SHARED if linux.rootfs_propagation == "shared" else m.MS_UNBINDABLE
            self.fs.set_attributes(self.root, what="unable to apply root propagation flags", propagation=flag)
        if own_mounts and self.has_own_dev:
            self._container_null()
        if inside(self.process.cwd or ""):
            cwd = p.new()
            self.fs.make_directories(inside(self.process.cwd), f"mkdir {self.process.cwd}", cwd)
            self.fs.close(cwd)

    def _container_null(self) -> None:
        # Standard streams on the host's /dev/null become the container's: an open file leads to its file system.
        p = self.p
        for target, fd in enumerate(self.context.parent.stdio):
            if self.process.terminal or not _is_null(fd):
                continue
            null = self.fs.open("dev/null", os.O_RDWR, "error reopening /dev/null inside container")
            self._check_null(null)
            p.call(sc.DUP3, null, target, 0, what="error reopening /dev/null inside container")
            self.fs.close(null)

    def _check_null(self, fd: Reg) -> None:
        buffer = self.p.place(bytes(256))
        self.p.point(self.p.call(sc.STATX, fd, "", m.AT_EMPTY_PATH, 0x7FF, 0, what="stat /dev/null"), 4, buffer)
        complaint = "!error reopening /dev/null inside container: not a character device 1:3"
        self.p.expect(buffer + 28, stat.S_IFCHR, mask=stat.S_IFMT(0xFFFF), error=errno.EPERM, what=complaint)
        self.p.expect(buffer + 128, 1, error=errno.EPERM, what=complaint)
        self.p.expect(buffer + 132, 3, error=errno.EPERM, what=complaint)

    def open_terminal(self, *, mount: bool) -> None:
        """A terminal of the container's own devpts: the slave on /dev/console and 0, 1, 2; the master to the parent.

        The slave comes from the master itself (TIOCGPTPEER), never from a path below /dev/pts (CVE-2025-52565).
        """
        p = self.p
        p.context = "error opening the container's terminal: "
        master, slave = p.new(), p.new()
        how = mounts.open_how(os.O_RDWR | m.O_NOCTTY, 0, m.RESOLVE_NO_MAGICLINKS | (m.RESOLVE_IN_ROOT if mount else 0))
        folder = self.root if mount else m.AT_FDCWD
        p.call(sc.OPENAT2, folder, "dev/ptmx" if mount else "/dev/ptmx", how, 24, dst=master, what="open /dev/ptmx")
        p.call(sc.IOCTL, master, _TIOCSPTLCK, bytes(4), what="unlock")
        p.call(sc.IOCTL, master, _TIOCGPTPEER, os.O_RDWR | m.O_NOCTTY | m.O_CLOEXEC, dst=slave, what="open the slave side")
        size = self.process.console_size
        if size and size.height and size.width:
            p.call(sc.IOCTL, master, _TIOCSWINSZ, Struct("=HHHH").pack(size.height, size.width, 0, 0), what="set window size")
        if mount:
            dev, node, bound = p.new(), p.new(), p.new()
            self.fs.make_directories("dev", "open /dev", dev)
            # O_NONBLOCK: an image may have a FIFO there.
            flags = os.O_CREAT | m.O_NOFOLLOW | m.O_NOCTTY | os.O_NONBLOCK
            how = mounts.open_how(flags, 0o666, m.RESOLVE_BENEATH | m.RESOLVE_NO_SYMLINKS)
            p.call(sc.OPENAT2, dev, "console", how, 24, dst=node, what="create /dev/console")
            clone = m.OPEN_TREE_CLONE | m.OPEN_TREE_CLOEXEC | m.AT_EMPTY_PATH
            p.call(sc.OPEN_TREE, slave, "", clone, dst=bound, what="bind /dev/console")
            onto = m.MOVE_MOUNT_F_EMPTY_PATH | m.MOVE_MOUNT_T_EMPTY_PATH
            p.call(sc.MOVE_MOUNT, bound, "", node, "", onto, what="bind /dev/console")
            self.fs.close(dev, node, bound)
        p.send_descriptor(master, "send the master side")
        for fd in range(3):
            p.call(sc.DUP3, slave, fd, 0, what="dup")
        self.fs.close(master, slave)
        p.call(sc.IOCTL, 0, _TIOCSCTTY, 0, what="ioctl(setctty)")
        p.context = ""

    def look_up_home(self) -> None:
        """Read the container's /etc/passwd, where the environment names no home: only init sees the right one."""
        if len(next((e for e in reversed(self.env) if e.startswith("HOME=")), "HOME=")) > len("HOME="):
            return
        p = self.p
        none = Label()
        fd = p.new()
        # An image's link through /proc/self/fd would lead along our descriptor of the host's procfs, to files of the host.
        how = mounts.open_how(os.O_RDONLY | os.O_NONBLOCK | m.O_NOCTTY, 0, m.RESOLVE_NO_MAGICLINKS)
        p.call(sc.OPENAT2, m.AT_FDCWD, "/etc/passwd", how, 24, dst=fd, on_err=none)
        index = p.call(sc.READ, fd, SCRATCH, SCRATCH_SIZE, on_err=NEXT)
        self.fs.close(fd)
        p.mark(none)

        def learn() -> None:
            self._passwd = self.remote.scratch(max(self.remote.result(index), 0))

        self._to_learn.append(learn)

    def complete_environment(self) -> None:
        """The last of each name wins, and HOME is there."""
        seen: dict[str, str] = {}
        for entry in reversed(self.env):
            key, equals, _ = entry.partition("=")
            if not equals:
                raise InvalidArgument("invalid environment variable: missing '='")
            if not key:
                raise InvalidArgument("invalid environment variable: name cannot be empty")
            if key not in seen:
                seen[key] = entry
        if len(seen.get("HOME", "HOME=")) == len("HOME="):
            seen.pop("HOME", None)
            seen = {"HOME": "HOME=" + self._home(), **seen}
        self.env = list(reversed(seen.values()))

    def _home(self) -> str:
        self.done()  # what `look_up_home` told
        uid = str(self.process.user.uid or 0) if self.process.user else "0"
        for line in self._passwd.split(b"\n"):
            fields = line.split(b":")
            if len(fields) > 5 and fields[2].decode("ascii", "replace") == uid:
                return os.fsdecode(fields[5])
        return "/"

    def close_file_system(self) -> None:
        """What could not be read-only while it was being filled; names; sysctls; the security module's label."""
        p = self.p
        if "mount" in self.new:
            for mount in self.spec.mounts:
                flags = mounts.parse_options(mount.options).flags
                if flags & m.MS_RDONLY and (mount.type == "tmpfs" or inside(mount.destination) == "dev"):
                    self.fs.read_only(mount.destination)
            if self.spec.root and self.spec.root.readonly:
                self.fs.set_attributes(self.root, what="error setting rootfs as readonly", attr_set=m.MOUNT_ATTR_RDONLY)
        if self.spec.hostname:
            name = self.spec.hostname.encode()
            p.call(sc.SETHOSTNAME, name, len(name), what="sethostname")
        if self.spec.domainname:
            name = self.spec.domainname.encode()
            p.call(sc.SETDOMAINNAME, name, len(name), what="setdomainname")
        if self.spec.linux:
            from boxship.oci.validate import sysctl_path

            for key, value in self.spec.linux.sysctl.items():
                fd = p.new()
                how = mounts.open_how(os.O_WRONLY, 0, m.RESOLVE_BENEATH | m.RESOLVE_NO_SYMLINKS)
                p.call(sc.OPENAT2, self.proc, "sys/" + sysctl_path(key), how, 24, dst=fd, what=f"open sysctl {key} file")
                data = value.encode()
                p.call(sc.WRITE, fd, data, len(data), what=f"failed to write sysctl {key} value")
                self.fs.close(fd)
        self.fs.close(self.root)

    # --- 5. the identity (also exec's) ---------------------------------------------------------------------------

    def apply_label(self) -> None:
        """Ask the security module for the profile that execve(2) shall switch to."""
        from boxship.linux import lsm

        profile, label = self.process.apparmor_profile or "", self.process.selinux_label or ""
        doing = "unable to apply apparmor profile: apparmor failed to apply profile"
        self._write_attributes(lsm.exec_attributes(profile, ""), doing)
        self._write_attributes(lsm.exec_attributes("", label), "can't set process label")

    def _write_attributes(self, attributes: list[tuple[str, bytes]], doing: str) -> None:
        p = self.p
        for path, data in attributes:
            fd = p.new()
            path = f"self/{path}"
            p.call(sc.OPENAT, self.proc, path, os.O_WRONLY | m.O_CLOEXEC, dst=fd, what=f"{doing}: open /proc/{path}")
            p.call(sc.WRITE, fd, data, len(data), what=f"{doing}: write /proc/{path}")
            self.fs.close(fd)

    def take_scheduling(self) -> None:
        """Scheduler, I/O priority, memory policy, personality; umask last, after the last file was made."""
        from boxship.linux import personality, scheduler

        p = self.p
        process = self.process
        if process.no_new_privileges:
            p.call(sc.PRCTL, _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, what="prctl(SET_NO_NEW_PRIVS)")
        if process.scheduler:
            s = process.scheduler
            attr = scheduler.sched_attr(
                s.policy, nice=s.nice or 0, priority=s.priority or 0, flags=list(s.flags), runtime=s.runtime or 0,
                deadline=s.deadline or 0, period=s.period or 0,
            )
            p.call(sc.SCHED_SETATTR, 0, attr, 0, what="error setting scheduler")
        if process.io_priority:
            value = scheduler.io_priority(process.io_priority.class_, process.io_priority.priority or 0)
            p.call(sc.IOPRIO_SET, 1, 0, value, what="error setting I/O priority")
        linux = self.spec.linux
        if linux and linux.personality:
            p.call(sc.PERSONALITY, personality.domain(linux.personality.domain), what="unable to set personality")
        if linux and linux.memory_policy:
            policy = linux.memory_policy
            mode, nodes, count = scheduler.memory_policy(policy.mode, policy.nodes or "", list(policy.flags))
            p.call(sc.SET_MEMPOLICY, mode, nodes or 0, count, what="set_mempolicy")
        umask = process.user.umask if process.user else None
        p.call(sc.UMASK, 0o022 if umask is None else umask)

    def pass_descriptors(self) -> None:
        """Put the descriptors that the caller asked to keep into place, from 3 on; all others close at exec."""
        fds, place = self.preserve_fds, 3
        if self._lowest_own() > _CTL_AT_LEAST:
            # The control socket itself would be in the way.
            old = self.p.new()
            self.p.set(old, CTL)
            self.p.call(sc.FCNTL, CTL, 1030, self._lowest_own(), dst=CTL, what="dup")
            self.fs.close(old)
        for start in range(0, len(fds), _PASSED_AT_ONCE):
            if start:
                self.go()
            came = [self.send(fd) for fd in fds[start : start + _PASSED_AT_ONCE]]
            high = self.p.new()
            for number, register in enumerate(came, place):
                # First all out of the way of one another.
                self.p.call(sc.FCNTL, register, 1030, 3 + len(fds), dst=high, what=f"pass descriptor {number}")
                self.fs.close(register)
                self.p.set(register, high)
            for number, register in enumerate(came, place):
                self.p.call(sc.DUP3, register, number, 0, what=f"pass descriptor {number}")
                self.fs.close(register)
            place += len(came)

    def _lowest_own(self) -> int:
        """The first number that `pass_descriptors` does not use."""
        return 4 + len(self.preserve_fds) + min(len(self.preserve_fds), _PASSED_AT_ONCE)

    def enter_directory(self) -> None:
        """Go to process.cwd while still the runtime's identity; `become_user` tries again where that one may not.

        Before the filter is loaded, which may know nothing of chdir(2) and getcwd(2).
        """
        p = self.p
        self._pending = p.place(b"\1\0\0\0")
        if not self.process.cwd:
            return
        tried, again = Label(), Label()
        p.call(sc.CHDIR, self.process.cwd, on_ok=tried, on_err=again)
        p.mark(tried)
        p.store(self._pending, 0)
        self._directory_is_inside()
        p.mark(again)

    def _directory_is_inside(self) -> None:
        # A directory outside the root shows as "(unreachable)…": a leaked descriptor as cwd (CVE-2024-21626).
        p = self.p
        where = p.place(bytes(4104))
        outside = (
            "!current working directory is outside of container mount namespace root"
            " -- possible container breakout detected"
        )
        p.point(p.call(sc.GETCWD, 0, 4096, what=outside), 0, where)
        p.expect(where, ord("/"), mask=0xFF, error=errno.ENOENT, what=outside)

    def become_user(self) -> None:
        """From the runtime's identity to the process's: bounding set, ids, directory, capabilities, in that order.

        The directory is tried before and after the change of ids, since either identity may be the one that can reach it.
        The bounding set needs CAP_SETPCAP, the ids need CAP_SETUID, so capabilities come last, kept over setuid(2).
        """
        p = self.p
        there = Label()
        bounding = self._bounding_set()
        p.call(sc.PRCTL, _PR_SET_KEEPCAPS, 1, 0, 0, 0, what="unable to set keep caps")
        self._ids()
        if self.process.cwd:
            p.expect(self._pending, 1, error=errno.EEXIST, on_err=there)
            p.call(sc.CHDIR, self.process.cwd, what=f'chdir to cwd ("{self.process.cwd}") set in config.json failed')
            self._directory_is_inside()
            p.mark(there)
        p.call(sc.PRCTL, _PR_SET_KEEPCAPS, 0, 0, 0, 0, what="unable to clear keep caps")
        self._capabilities(bounding)

    def _bounding_set(self) -> int:
        from boxship.linux import capabilities

        everything = (1 << capabilities.last_cap() + 1) - 1
        # The maker of a user namespace has all capabilities in it, also those that the runtime lacks outside.
        held = everything if self.userns else capabilities.bounding()
        if self.process.capabilities is None:
            return held
        unknown: set[str] = set()
        masks = {}
        for kind in ("bounding", "effective", "inheritable", "permitted", "ambient"):
            masks[kind], missing = capabilities.bits(getattr(self.process.capabilities, kind))
            unknown.update(missing)
            lacking = masks[kind] & ~held
            if lacking:
                unknown.update(capabilities.names(lacking))
                masks[kind] &= held
        if unknown:
            self.context.warn(f"ignoring unknown or unavailable capabilities: [{' '.join(sorted(unknown))}]")
        self.masks = masks
        for number in range(capabilities.last_cap() + 1):
            if not masks["bounding"] >> number & 1:
                self.p.call(sc.PRCTL, _PR_CAPBSET_DROP, number, 0, 0, 0, what="unable to apply bounding set")
        return masks["bounding"]

    def _ids(self) -> None:
        p = self.p
        user = self.process.user
        uid, gid, groups = (user.uid or 0, user.gid or 0, list(user.additional_gids)) if user else (0, 0, [])
        for kind, number in (("uid", uid), ("gid", gid), *(("gid", number) for number in groups)):
            if number == _NO_ID:
                raise InvalidArgument(f"unable to setup user: {number} is not a {kind}")
        for fd, ours in enumerate(self.context.parent.stdio):
            # The process must be able to open its own /proc/self/fd/1; whose file it is on the host decides.
            if self.process.terminal or not (_is_null(ours) or (not self.userns and os.fstat(ours).st_uid == uid)):
                p.call(sc.FCHOWN, fd, uid, -1, on_err=NEXT)
        if self.may_set_groups:
            p.call(sc.SETGROUPS, len(groups), Struct(f"={len(groups)}I").pack(*groups) if groups else 0, what="setgroups")
        p.call(sc.SETRESGID, gid, gid, gid, what=f"unable to setup user: cannot setgid to gid {gid}")
        p.call(sc.SETRESUID, uid, uid, uid, what=f"unable to setup user: cannot setuid to uid {uid}")

    def _capabilities(self, bounding: int) -> None:
        from boxship.linux import capabilities

        if self.process.capabilities is None:
            return
        masks = self.masks
        header, data = capabilities.capset_data(masks["effective"] & masks["permitted"], masks["permitted"], masks["inheritable"])
        self.p.call(sc.CAPSET, header, data, what="unable to apply caps")
        self.p.call(sc.PRCTL, _PR_CAP_AMBIENT, 4, 0, 0, 0, on_err=NEXT)  # PR_CAP_AMBIENT_CLEAR_ALL
        for number in range(capabilities.last_cap() + 1):
            if not masks["ambient"] >> number & 1:
                continue
            if (masks["permitted"] & masks["inheritable"]) >> number & 1:
                self.p.call(sc.PRCTL, _PR_CAP_AMBIENT, 2, number, 0, 0, what="can't raise ambient capability")
            else:
                name = capabilities.names(1 << number)[0]
                self.context.warn(f"can't raise ambient capability {name}: operation not permitted")

    def load_filter(self) -> None:
        """Install the seccomp filter, and hand its listener over.

        Without no_new_privs that takes CAP_SYS_ADMIN, so it comes before capabilities go; with it as late as can be, so
        that the profile has to allow as little as possible for us: read, write, close and execve.
        """
        if self.filter is None:
            return
        p = self.p
        code = p.place(self.filter.program)
        prog = p.place(_FPROG.pack(len(self.filter.program) // 8, 0))
        p.embed(prog + 8, code)
        listener = p.new()
        index = p.call(sc.SECCOMP, 1, self.filter.flags, 0, dst=listener, what="unable to init seccomp")
        p.point(index, 2, prog)
        if self.filter.notify:
            p.hand_over(listener, CTL, 0)

    # --- 6. the program ------------------------------------------------------------------------------------------

    def find_program(self) -> Reg:
        """The path of args[0] as execve(2) takes it, looked up in the container's PATH before anybody waits for it."""
        p = self.p
        name = self.process.args[0]
        path = p.keep()
        if "/" in name:
            p.set(path, name)
            self._check_executable(path, f"exec: \"{name}\": stat {name}", f'exec: "{name}"')
            return path
        found = Label()
        search = next((e[5:] for e in reversed(self.env) if e.startswith("PATH=")), "")
        if not name:
            raise BoxshipError('exec: "": executable file not found in $PATH')
        for folder in search.split(":") if search else []:
            # Go's rule, which runc follows: an empty element is the current directory, whose programs are refused.
            candidate = f"{folder or '.'}/{name}"
            nope = Label()
            p.set(path, candidate)
            self._may_execute(candidate, on_err=nope)
            fd = p.new()
            missing = Label()
            p.call(sc.OPENAT, m.AT_FDCWD, candidate, m.O_PATH | m.O_DIRECTORY | m.O_CLOEXEC, dst=fd, on_err=missing)
            self.fs.close(fd)
            p.jump(nope)
            p.mark(missing)  # not a directory: what we want
            p.jump(found)
            p.mark(nope)
        p.fail(errno.ENOENT, f'!exec: "{name}": executable file not found in $PATH')
        p.mark(found)
        return path

    def _check_executable(self, path: Reg, missing: str, bad: str) -> None:
        p = self.p
        name = self.process.args[0]
        buffer = p.place(bytes(256))
        p.point(p.call(sc.STATX, m.AT_FDCWD, path, 0, 0x7FF, 0, what=missing), 4, buffer)
        p.expect(
            buffer + 28, stat.S_IFDIR, mask=0o170000, differs=True, error=errno.EISDIR, what=f'!exec: "{name}": is a directory'
        )
        self._may_execute(path, what=bad)

    def _may_execute(self, path: str | Reg, *, what: str = "", on_err: int | Label = 0) -> None:
        # The first call counts capabilities too; a filter older than it (Linux 5.8) refuses it, but knows the second.
        allowed = Label()
        self.p.call(sc.FACCESSAT2, m.AT_FDCWD, path, 1, m.AT_EACCESS, on_ok=allowed, on_err=NEXT)
        self.p.call(sc.FACCESSAT, m.AT_FDCWD, path, 1, what=what, on_err=on_err)
        self.p.mark(allowed)

    def wait_for_start(self) -> None:
        """Say "ready", and sleep until the word comes: from the parent in `run`, or by `start` opening exec.fifo.

        Only read(2), write(2), openat(2) and close(2) from here to the exec: the filter may stop all else.
        """
        p = self.p
        self.ready = p.answer()
        if self.exec_fifo < 0:
            p.call(sc.READ, CTL, bytes(8), 8, what="waiting for the word to start")
            self.fs.close(self.proc)
            return
        self.fs.close(CTL)
        # Opening it for writing waits for a reader; what is written to it from now on is why the exec failed.
        flags = os.O_WRONLY | m.O_CLOEXEC
        p.call(sc.OPENAT, self.proc, f"self/fd/{self._fifo_number}", flags, dst=CTL, what="open exec.fifo")
        self.fs.close(self.proc)

    def keep_fifo(self) -> None:
        """Take exec.fifo along; only init knows under which number."""
        if self.exec_fifo >= 0:
            index = self._keep(self.send(self.exec_fifo), self.p.keep())

            def learn() -> None:
                self._fifo_number = self.remote.result(index)

            self._to_learn.append(learn)

    def execute(self, path: Reg) -> None:
        """Become the user's program."""
        p = self.p
        argv = _vector(p, self.process.args)
        envp = _vector(p, self.env)
        index = p.call(sc.EXECVE, path, 0, 0, what=f'exec {self.process.args[0]}')
        p.point(index, 1, argv)
        p.point(index, 2, envp)

    def give_up(self) -> None:
        """End: there is no program."""
        self.p.call(sc.EXIT_GROUP, 1)

    # --- hooks that init runs ------------------------------------------------------------------------------------

    def run_hooks(self, kind: str, hooks: list[Hook], status: str, *, default_env: list[str] | None = None) -> None:
        """Let init fork and run each hook, wait for it (`timeout` in seconds), and stop at the first that fails.

        What a hook prints, and its wait status, go to files of the container's folder: whoever gets the error reads them,
        which for startContainer is `start`.
        """
        p = self.p
        out, err, result = (self.send(self.own(self.open_note(name))) for name in ("hook.stdout", "hook.stderr", "hook.status"))
        for i, hook in enumerate(hooks):
            p.context = f"error running {kind} hook #{i}: "
            state = os.memfd_create("state", os.MFD_CLOEXEC)
            self.own(state)
            os.write(state, self.state(status))
            stdin = self.send(state)
            p.call(sc.LSEEK, stdin, 0, 0, what="rewind the state")
            parent, ended, good = Label(), Label(), Label()
            child, handle = p.new(), p.new()
            pid = p.fork(_SIGCHLD, parent=parent, takes_over=False, what="fork")
            for number, fd in enumerate((stdin, out, err)):
                p.call(sc.DUP3, fd, number, 0, what="dup")
            args = hook.args or [hook.path]
            env = hook.env if hook.env else (default_env or [])
            argv, envp = _vector(p, args), _vector(p, env)
            index = p.call(sc.EXECVE, hook.path, 0, 0, what="exec")
            p.point(index, 1, argv)
            p.point(index, 2, envp)
            p.mark(parent)
            p.load(pid, child)
            status_at = p.place(bytes(8))
            if hook.timeout:
                p.call(sc.PIDFD_OPEN, child, 0, dst=handle, what="pidfd_open")
                poll = p.place(Struct("=iHH").pack(0, 1, 0))
                p.store(poll, handle)
                ready = p.new()
                limit = p.place(Struct("=qq").pack(hook.timeout, 0))
                index = p.call(sc.PPOLL, 0, 1, 0, 0, 8, dst=ready, what="poll")
                p.point(index, 0, poll)
                p.point(index, 2, limit)
                revents = poll + 4
                p.expect(revents, 0, mask=0xFFFF0000, differs=True, error=errno.ETIME, on_err=ended)
                p.jump(good)
                p.mark(ended)
                p.call(sc.KILL, child, 9, on_err=NEXT)
                p.call(sc.WAIT4, child, 0, 0, 0, on_err=NEXT)
                p.fail(errno.ETIME, f"!hook ran past specified timeout of {float(hook.timeout):.1f}s")
                p.mark(good)
            index = p.call(sc.WAIT4, child, 0, 0, 0, what="wait")
            p.point(index, 1, status_at)
            p.point(p.call(sc.WRITE, result, 0, 4, what="write down the status"), 1, status_at)
            p.expect(status_at, 0, error=errno.EIO, what="@hook@")
            self.fs.close(stdin)
        p.context = ""
        self.fs.close(out, err, result)


def is_bind(mount: Mount) -> bool:
    """Whether a mount of the configuration is a bind mount: by its type, or by its options whatever the type says."""
    return mount.type == "bind" or "bind" in mount.options or "rbind" in mount.options


def _vector(p: Program, strings: list[str]) -> int:
    offsets = []
    for text in strings:
        raw = text.encode("utf-8", "surrogateescape")
        if b"\0" in raw:
            raise InvalidArgument(f"{text!r} contains a NUL byte")
        offsets.append(p.place(raw + b"\0", 1))
    table = p.place(bytes(8 * (len(offsets) + 1)))
    for i, offset in enumerate(offsets):
        p.embed(table + 8 * i, offset)
    return table


def _is_null(fd: int) -> bool:
    try:
        info = os.fstat(fd)
    except OSError:
        return False
    return stat.S_ISCHR(info.st_mode) and info.st_rdev == os.makedev(1, 3)
