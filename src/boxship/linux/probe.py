"""What this kernel does, found out by trying: configuration files and version numbers say what it might.

Runs in: any single-threaded process. Everything that could be seen outside is tried in a child, in namespaces that die with it.
Spec: the manual pages of the calls that are tried.
Not here: what an answer means for the user (`boxship.cli.doctor`).
"""

from __future__ import annotations

import errno
import os
from _struct import Struct

from boxship.abi import mount as m
from boxship.abi import namespace as n
from boxship.abi import syscalls as sc
from boxship.abi.process import PR_SET_DUMPABLE
from boxship.linux import _sys, mounts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_NOBODY = 65534
_SECCOMP_GET_ACTION_AVAIL = 2


def in_child(attempt: Callable[[], object], *, uid: int | None = None) -> int:
    """Run `attempt` in a child, as another user when `uid` says so; 0, or the errno that it failed with.

    Blocks until the child has ended.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        # Child: only system calls from here on, and _exit whatever happens.
        code = errno.EIO
        try:
            if uid is not None:
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
                # A change of ids takes the process's own files in /proc away from it.
                _sys.syscall(sc.PRCTL, PR_SET_DUMPABLE, 1)
            attempt()
            code = 0
        except OSError as error:
            code = error.errno or errno.EIO
        finally:
            os.write(writer, bytes((code,)))
            os._exit(0)
    os.close(writer)
    answer = os.read(reader, 1)
    os.close(reader)
    os.waitpid(pid, 0)
    return answer[0] if answer else errno.EIO


def unshare(flags: int) -> None:
    """unshare(2). Raises OSError."""
    _sys.syscall(sc.UNSHARE, flags)


def enter_user_namespace() -> None:
    """Become root of a new user namespace that maps this user alone. Raises OSError."""
    uid, gid = os.geteuid(), os.getegid()
    unshare(n.CLONE_NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        fd = os.open(f"/proc/self/{name}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)


def _private_mounts() -> None:
    unshare(n.CLONE_NEWNS)
    mounts.mount(None, "/", None, m.MS_REC | m.MS_PRIVATE)


def user_namespace(uid: int | None = None) -> int:
    """Whether a user namespace can be made that is good for something: a policy may allow it and take its capabilities away.

    0 or an errno.
    """

    def attempt() -> None:
        enter_user_namespace()
        _private_mounts()
        mounts.mount("none", "/tmp", "tmpfs")

    return in_child(attempt, uid=uid)


def bare_user_namespace() -> bool:
    """Whether clone(2) with CLONE_NEWUSER would work for this process."""
    return in_child(lambda: unshare(n.CLONE_NEWUSER)) == 0


def namespace(kind: str, *, userns: bool) -> int:
    """Whether a namespace of that kind can be made, in a new user namespace if need be; 0 or an errno."""

    def attempt() -> None:
        if userns:
            enter_user_namespace()
        unshare(n.FLAGS[kind])

    return in_child(attempt)


def overlay(*, userns: bool) -> int:
    """Whether an overlay can be mounted over /usr with its upper layer in memory; 0 or an errno."""

    def attempt() -> None:
        if userns:
            enter_user_namespace()
        _private_mounts()
        mounts.mount("none", "/tmp", "tmpfs")
        for name in ("upper", "work", "merged"):
            os.mkdir(f"/tmp/{name}")
        data = "lowerdir=/usr,upperdir=/tmp/upper,workdir=/tmp/work" + (",userxattr" if userns else "")
        mounts.mount("overlay", "/tmp/merged", "overlay", 0, data)
        os.mkdir("/tmp/merged/probe")

    return in_child(attempt)


def implemented(number: int, *arguments: int | bytes | None) -> bool:
    """Whether the kernel has a system call at all. The arguments must be such that it can do nothing."""
    return in_child(lambda: _sys.syscall(number, *arguments)) != errno.ENOSYS


def filesystem(name: str) -> bool:
    """Whether a type of file system is there, loaded as a module if need be."""

    def attempt() -> None:
        os.close(mounts.fsopen(name))

    return in_child(attempt) not in (errno.ENODEV, errno.ENOSYS)


def idmapped_mount(path: str) -> int:
    """Whether the file system that holds `path` lets its mounts map ids; 0 or an errno."""

    def attempt() -> None:
        reader, writer = os.pipe2(os.O_CLOEXEC)
        done_reader, done_writer = os.pipe2(os.O_CLOEXEC)
        holder = os.fork()
        if holder == 0:
            # Holds a user namespace open until the other side has tried.
            try:
                os.close(done_writer)
                unshare(n.CLONE_NEWUSER)
                os.write(writer, b"1")
                os.read(done_reader, 1)
            finally:
                os._exit(0)
        os.close(writer)
        if os.read(reader, 1) != b"1":
            raise OSError(errno.EPERM, "no user namespace")
        for kind in ("uid", "gid"):
            fd = os.open(f"/proc/{holder}/{kind}_map", os.O_WRONLY | os.O_CLOEXEC)
            os.write(fd, b"0 100000 65536")
            os.close(fd)
        namespace_fd = os.open(f"/proc/{holder}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        tree = mounts.open_tree(m.AT_FDCWD, path, m.OPEN_TREE_CLONE)
        mounts.mount_setattr(tree, attr_set=m.MOUNT_ATTR_IDMAP, userns_fd=namespace_fd)

    return in_child(attempt)


def seccomp_action(number: int) -> bool:
    """Whether filters may answer with an action (SECCOMP_RET_…). Linux ≥ 4.14."""
    return in_child(lambda: _sys.syscall(sc.SECCOMP, _SECCOMP_GET_ACTION_AVAIL, 0, number.to_bytes(4, "little"))) == 0


def landlock_version() -> int:
    """The version of Landlock's interface, 0 without it. Linux ≥ 5.13."""
    try:
        return _sys.syscall(sc.LANDLOCK_CREATE_RULESET, None, 0, 1)
    except OSError:
        return 0


def bpf_device_program() -> int:
    """Whether a program that decides about devices can be loaded (cgroup v2 has no other way); 0 or an errno."""
    from boxship.linux.cgroups import bpf

    def attempt() -> None:
        os.close(bpf.load(bpf.compile_rules([])))

    return in_child(attempt)


_MESSAGE = Struct("=IHHII")
_LINK = Struct("=BBHiII")
_RTM_NEWLINK, _REQUEST, _ACK, _CREATE, _EXCL = 16, 1, 4, 0x400, 0x200
_IFLA_IFNAME, _IFLA_LINKINFO, _IFLA_INFO_KIND = 3, 18, 1


def _attribute(kind: int, data: bytes) -> bytes:
    return Struct("=HH").pack(len(data) + 4, kind) + data + bytes(-len(data) % 4)


def link_kind(kind: str, *, userns: bool) -> int:
    """Whether a network device of that kind ("bridge", "veth") can be made; 0 or an errno. Spec: rtnetlink(7)."""

    def attempt() -> None:
        import _socket

        if userns:
            enter_user_namespace()
        unshare(n.CLONE_NEWNET)
        info = _attribute(_IFLA_LINKINFO, _attribute(_IFLA_INFO_KIND, kind.encode()))
        body = _LINK.pack(0, 0, 0, 0, 0, 0) + _attribute(_IFLA_IFNAME, b"probe\0") + info
        sock = _socket.socket(_socket.AF_NETLINK, _socket.SOCK_RAW, 0)
        sock.send(_MESSAGE.pack(16 + len(body), _RTM_NEWLINK, _REQUEST | _ACK | _CREATE | _EXCL, 1, 0) + body)
        answer = sock.recv(4096)
        code = int.from_bytes(answer[16:20], "little", signed=True)
        if code:
            raise OSError(-code, os.strerror(-code))

    return in_child(attempt)


def nftables() -> int:
    """Whether the kernel has nftables: asks for the generation of the rule set; 0 or an errno."""

    def attempt() -> None:
        import _socket

        unshare(n.CLONE_NEWNET)
        sock = _socket.socket(_socket.AF_NETLINK, _socket.SOCK_RAW, 12)  # NETLINK_NETFILTER
        # NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETGEN; struct nfgenmsg follows.
        sock.send(_MESSAGE.pack(20, 10 << 8 | 16, _REQUEST | _ACK, 1, 0) + bytes(4))
        answer = sock.recv(4096)
        if int.from_bytes(answer[4:6], "little") == 2:  # NLMSG_ERROR
            code = int.from_bytes(answer[16:20], "little", signed=True)
            if code:
                raise OSError(-code, os.strerror(-code))

    return in_child(attempt)


def nobody() -> int | None:
    """The id to try things as an ordinary user with; None when this process is one already."""
    return _NOBODY if os.geteuid() == 0 else None
