"""What `boxship.linux` prepares, carried out by the real kernel in children of the test."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from struct import Struct

import pytest

from boxship.abi import capability, mount, namespace, syscalls
from boxship.abi import process as abi
from boxship.kit.errors import BoxshipError, InvalidArgument
from boxship.linux import _sys, capabilities, idmaps, keyring, lsm, mounts, netdevice, rlimits, scheduler, seccomp
from boxship.linux import namespaces as namespaces_of
from support.machine import capability_sets

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]


def in_child(function: Callable[[], str]) -> str:
    """What `function` returns in a forked child; its failures fail the test."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.write(write_end, function().encode())
            code = 0
        except BaseException as error:  # noqa: BLE001 - all of them must end in the child
            os.write(write_end, repr(error).encode())
        finally:
            os._exit(code)
    os.close(write_end)
    output = b""
    while chunk := os.read(read_end, 4096):
        output += chunk
    os.close(read_end)
    status = os.waitpid(pid, 0)[1]
    assert status == 0, (status, output)
    return output.decode()


def status_field(name: str) -> str:
    with open("/proc/self/status") as file:
        return next(line.split(None, 1)[1].strip() for line in file if line.startswith(f"{name}:"))


# Seccomp.


def load(compiled: seccomp.Filter) -> int:
    """seccomp(2) on the calling process."""
    code = bytearray(compiled.program)
    prog = Struct("=HxxxxxxQ").pack(len(compiled), _sys.address(code))
    return _sys.syscall(syscalls.SECCOMP, 1, compiled.flags, prog)


def attempt(nr: int, *args: object) -> str:
    try:
        _sys.syscall(nr, *args)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "ok"


def test_the_kernel_answers_as_the_profile_says() -> None:
    profile = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [
            {"names": ["mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno.EXDEV},
            {"names": ["personality"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 0, "op": "SCMP_CMP_EQ", "value": 8}]},
        ],
    }

    def child() -> str:
        load(seccomp.compile_filter(profile, cache_dir=None))
        answers = [
            attempt(syscalls.MKDIRAT, -100, b"/nope/x\0", 0o700), attempt(syscalls.PERSONALITY, 8),
            attempt(syscalls.PERSONALITY, 0xFFFFFFFF),
        ]
        return " ".join(answers) + " " + status_field("Seccomp")

    assert in_child(child) == "EXDEV EPERM ok 2"


def test_calls_that_the_profile_cannot_have_known_are_enosys() -> None:
    # What the interpreter needs to go on, and openat2 (437) as the newest.
    allowed = [
        "read", "write", "close", "exit_group", "openat", "fstat", "lseek", "mmap", "munmap", "brk", "getpid", "fcntl",
        "newfstatat", "rt_sigaction", "rt_sigprocmask", "futex", "madvise", "mprotect", "openat2", "ioctl",
    ]
    profile = {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": allowed, "action": "SCMP_ACT_ALLOW"}]}
    compiled = seccomp.compile_filter(profile, cache_dir=None)

    def child() -> str:
        load(compiled)
        return " ".join(attempt(nr) for nr in (syscalls.GETPID, syscalls.UNSHARE, syscalls.FACCESSAT2, 600))

    # faccessat2 is 439.
    assert in_child(child) == "ok EPERM ENOSYS ENOSYS"


def test_a_notify_filter_answers_a_listener() -> None:
    profile = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}]}

    def child() -> str:
        fd = load(seccomp.compile_filter(profile, cache_dir=None))
        return os.readlink(f"/proc/self/fd/{fd}")

    assert in_child(child) == "anon_inode:seccomp notify"


@pytest.mark.parametrize("flag", ["LOG", "SPEC_ALLOW", "TSYNC"])
def test_the_kernel_takes_the_flags(flag: str) -> None:
    rules = [{"names": ["mkdir"], "action": "SCMP_ACT_KILL"}]
    profile = {"defaultAction": "SCMP_ACT_ALLOW", "flags": [f"SECCOMP_FILTER_FLAG_{flag}"], "syscalls": rules}
    assert in_child(lambda: str(load(seccomp.compile_filter(profile, cache_dir=None)))) == "0"


# Capabilities.


def test_the_kernel_takes_the_sets() -> None:
    wanted, _ = capabilities.bits(["CAP_KILL", "CAP_BPF", "CAP_CHOWN"])
    wanted &= capabilities.bounding()

    def child() -> str:
        header, data = capabilities.capset_data(wanted & 1, wanted, wanted)
        _sys.syscall(syscalls.CAPSET, header, data)
        if wanted >> 5 & 1:
            _sys.syscall(syscalls.PRCTL, capability.PR_CAP_AMBIENT, capability.PR_CAP_AMBIENT_RAISE, 5, 0, 0)
        return json.dumps(capability_sets(Path("/proc/self/status").read_text()))

    sets = json.loads(in_child(child))
    assert sets["CapBnd"] == capabilities.bounding()
    assert sets["CapEff"] == wanted & 1
    assert sets["CapPrm"] == sets["CapInh"] == wanted
    assert sets["CapAmb"] == wanted & 1 << 5


# Keyrings.


def test_the_session_keyring_has_the_permissions() -> None:
    def child() -> str:
        ring = _sys.syscall(syscalls.KEYCTL, keyring.JOIN_SESSION, b"_ses.boxship-test\0")
        text = bytearray(200)
        _sys.syscall(syscalls.KEYCTL, abi.KEYCTL_DESCRIBE, ring, text, len(text))
        fresh = int(bytes(text).split(b";")[3], 16)
        for userns in (True, False):
            _sys.syscall(syscalls.KEYCTL, keyring.SETPERM, ring, keyring.permissions(userns=userns))
            size = _sys.syscall(syscalls.KEYCTL, abi.KEYCTL_DESCRIBE, ring, text, len(text))
            found = int(bytes(text[:size]).split(b";")[3], 16)
            # runc reads the permissions and adds one; the constant must come to the same.
            assert found == fresh | (abi.KEY_OTH_SEARCH if userns else abi.KEY_USR_SEARCH), hex(found)
        return bytes(text[: size - 1]).split(b";")[4].decode()

    try:
        assert in_child(child) == "_ses.boxship-test"
    except AssertionError as error:
        if "ENOSYS" in str(error) or "Function not implemented" in str(error):
            pytest.skip("the kernel has no keyrings")
        raise


# Limits and scheduling.


def test_limits_are_set_on_another_process_and_clamped() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        _, hard = rlimits.get(child.pid, rlimits.number("RLIMIT_NOFILE"))
        assert rlimits.apply(child.pid, "RLIMIT_NOFILE", 10, hard - 1) == (10, hard - 1)
        in_force = rlimits.apply(child.pid, "RLIMIT_NOFILE", 5, rlimits.INFINITY)
        assert rlimits.get(child.pid, rlimits.number("RLIMIT_NOFILE")) == in_force
        assert in_force[0] == 5
        if not capabilities.effective() >> 24 & 1:
            assert in_force == (5, hard - 1)
    finally:
        child.communicate(b"\n")


@pytest.mark.parametrize(
    ("policy", "more"),
    [("SCHED_BATCH", {"nice": 5}), ("SCHED_IDLE", {}), ("SCHED_OTHER", {"flags": ["SCHED_FLAG_RESET_ON_FORK"]})],
)
def test_the_kernel_takes_the_scheduling_attributes(policy: str, more: dict[str, object]) -> None:
    attr = scheduler.sched_attr(policy, **more)  # type: ignore[arg-type]

    def child() -> str:
        _sys.syscall(syscalls.SCHED_SETATTR, 0, attr, 0)
        found = bytearray(56)
        _sys.syscall(syscalls.SCHED_GETATTR, 0, found, 56, 0)
        return str(struct.unpack("=IIQi", found[:20])[1:])

    expected = (abi.SCHED_POLICIES[policy], 1 if "flags" in more else 0, more.get("nice", 0))
    assert in_child(child) == str(expected)


def test_the_kernel_takes_the_io_priority_and_the_memory_policy() -> None:
    def child() -> str:
        _sys.syscall(syscalls.IOPRIO_SET, abi.IOPRIO_WHO_PROCESS, 0, scheduler.io_priority("IOPRIO_CLASS_BE", 6))
        found = _sys.syscall(syscalls.IOPRIO_GET, abi.IOPRIO_WHO_PROCESS, 0)
        try:
            for policy in ("MPOL_BIND", "0"), ("MPOL_LOCAL", ""), ("MPOL_DEFAULT", ""):
                mode, nodes, maxnode = scheduler.memory_policy(*policy)
                _sys.syscall(syscalls.SET_MEMPOLICY, mode, nodes or None, maxnode)
        except OSError as error:
            if error.errno != errno.ENOSYS:
                raise
        return f"{found >> 13} {found & 7}"

    assert in_child(child) == "2 6"


# User namespaces.


def test_maps_of_a_new_user_namespace() -> None:
    script = "read x; cat /proc/self/uid_map /proc/self/gid_map"
    child = subprocess.Popen(["unshare", "-U", "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        wait_for_userns(child.pid)
        idmaps.write_id_maps(child.pid, [(0, 1000, 1), (1, 100000, 10)], [(0, 2000, 5)], deny_setgroups=False)
    finally:
        output, _ = child.communicate(b"\n")
    lines = [tuple(map(int, line.split())) for line in output.decode().splitlines()]
    assert lines == [(0, 1000, 1), (1, 100000, 10), (0, 2000, 5)]


def wait_for_userns(pid: int) -> None:
    own = os.readlink("/proc/self/ns/user")
    for _ in range(500):
        if os.readlink(f"/proc/{pid}/ns/user") != own:
            return
        time.sleep(0.01)
    raise AssertionError("no new user namespace")


def test_the_kernels_refusal_is_reported() -> None:
    with pytest.raises(BoxshipError, match=r"^failed to use newuid map on \d+"):
        idmaps.write_id_maps(os.getpid(), [(0, 0, 1)], [], deny_setgroups=False)


def test_an_unprivileged_caller_maps_its_subordinate_ids_with_the_helper_programs(tmp_path: Path) -> None:
    if not (shutil.which("newuidmap") and shutil.which("newgidmap")):
        pytest.skip("needs Debian's uidmap")
    nobody = 65534
    ranges = tmp_path / "ranges"
    ranges.write_text(f"{nobody}:200000:1000\n")

    def child() -> str:
        # In a mount namespace of our own, where this is the machine's /etc/subuid and /etc/subgid.
        _sys.syscall(syscalls.UNSHARE, namespace.CLONE_NEWNS)
        mounts.mount(None, "/", None, mount.MS_REC | mount.MS_PRIVATE)
        for name in ("subuid", "subgid"):
            mounts.mount(str(ranges), f"/etc/{name}", None, mount.MS_BIND)
        os.setgroups([])
        os.setresgid(nobody, nobody, nobody)
        os.setresuid(nobody, nobody, nobody)
        with subprocess.Popen(["unshare", "-U", "cat"], stdin=subprocess.PIPE) as other:
            wait_for_userns(other.pid)
            found = idmaps.subordinate_ranges("/etc/subuid", "nobody", nobody)
            wanted = idmaps.rootless_mappings(nobody, found)
            idmaps.write_id_maps(other.pid, wanted, wanted, deny_setgroups=True)
            text = "".join(Path(f"/proc/{other.pid}/{name}").read_text() for name in ("uid_map", "gid_map", "setgroups"))
            other.communicate(b"")
        return " ".join(text.split())

    lines = f"0 {nobody} 1 1 200000 1000"
    assert in_child(child) == f"{lines} {lines} allow"


def test_an_unprivileged_caller_maps_itself_without_help() -> None:
    nobody = 65534

    def child() -> str:
        os.setgroups([])
        os.setresgid(nobody, nobody, nobody)
        os.setresuid(nobody, nobody, nobody)
        os.environ["PATH"] = "/nowhere"
        with subprocess.Popen(["/usr/bin/unshare", "-U", "/bin/cat"], stdin=subprocess.PIPE) as other:
            wait_for_userns(other.pid)
            idmaps.write_id_maps(other.pid, [(0, nobody, 1)], [(0, nobody, 1)], deny_setgroups=True)
            text = "".join(Path(f"/proc/{other.pid}/{name}").read_text() for name in ("uid_map", "gid_map", "setgroups"))
            other.communicate(b"")
        return " ".join(text.split())

    assert in_child(child) == f"0 {nobody} 1 0 {nobody} 1 deny"


# Namespaces.


def test_a_namespace_file_is_what_it_is_taken_for(tmp_path: Path) -> None:
    for kind, name in namespace.FILES.items():
        fd = namespaces_of.open_namespace(f"/proc/self/ns/{name}", kind)
        assert os.fstat(fd).st_ino == namespaces_of.identity(kind)
        assert not os.get_inheritable(fd)
        os.close(fd)
    with pytest.raises(InvalidArgument, match="a pid namespace, not of type network"):
        namespaces_of.open_namespace("/proc/self/ns/pid", "network")
    (tmp_path / "file").touch()
    with pytest.raises(InvalidArgument, match="not a namespace, not of type network"):
        namespaces_of.open_namespace(str(tmp_path / "file"), "network")
    with pytest.raises(InvalidArgument, match="no such file or directory"):
        namespaces_of.open_namespace(str(tmp_path / "none"), "network")


def test_a_process_is_followed_into_its_namespaces() -> None:
    with subprocess.Popen(["unshare", "-u", "cat"], stdin=subprocess.PIPE) as other:
        for _ in range(500):
            if namespaces_of.identity("uts", other.pid) != namespaces_of.identity("uts"):
                break
            time.sleep(0.01)

        def child() -> str:
            namespaces_of.setns(os.pidfd_open(other.pid), namespace.CLONE_NEWUTS)
            return str(namespaces_of.identity("uts") == namespaces_of.identity("uts", other.pid))

        assert in_child(child) == "True"
        other.communicate(b"")


# Security modules.


def test_what_is_said_about_security_modules_is_what_the_kernel_says() -> None:
    try:
        with open("/sys/kernel/security/lsm") as file:
            names = file.read().strip().split(",")
    except FileNotFoundError:
        assert not lsm.apparmor_enabled()
        return
    assert lsm.apparmor_enabled() == ("apparmor" in names)
    assert lsm.selinux_enabled() == ("selinux" in names)


# Network devices.


@pytest.fixture
def namespaces() -> Iterator[tuple[int, int]]:
    """Descriptors of two network namespaces; the test runs in the first, and goes home afterwards."""
    if not shutil.which("ip"):
        pytest.skip("needs iproute2")
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    fds = []
    for _ in range(2):
        _sys.syscall(syscalls.UNSHARE, namespace.CLONE_NEWNET)
        fds.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))
    host, container = fds[1], fds[0]
    yield host, container
    _sys.syscall(syscalls.SETNS, home, namespace.CLONE_NEWNET)
    for fd in (*fds, home):
        os.close(fd)


def ip(*args: str, inside: int | None = None) -> str:
    enter = ["nsenter", f"--net=/proc/self/fd/{inside}"] if inside is not None else []
    fds = (inside,) if inside is not None else ()
    return subprocess.run([*enter, "ip", *args], check=True, capture_output=True, text=True, pass_fds=fds).stdout


def test_a_device_moves_with_name_addresses_mtu_and_mac(namespaces: tuple[int, int]) -> None:
    _, container = namespaces
    ip("link", "add", "veth0", "type", "veth", "peer", "name", "peer0")
    ip("link", "set", "veth0", "mtu", "1400", "address", "02:00:00:00:00:05", "up")
    for address in ("192.0.2.7/24", "192.0.2.8/32", "2001:db8::7/64"):
        ip("addr", "add", address, "dev", "veth0", *(["nodad"] if ":" in address else []))
    ip("addr", "add", "192.0.2.9/24", "dev", "veth0", "valid_lft", "1000", "preferred_lft", "1000")
    ip("addr", "add", "127.0.0.33/32", "scope", "host", "dev", "veth0")
    ip("addr", "add", "198.51.100.1", "peer", "198.51.100.2/32", "dev", "veth0")
    netdevice.move("veth0", container, "eth0")
    with pytest.raises(subprocess.CalledProcessError):
        ip("link", "show", "veth0")
    shown = ip("addr", "show", "eth0", inside=container)
    assert "mtu 1400" in shown
    assert "02:00:00:00:00:05" in shown
    assert "UP" in shown.split(">")[0]
    for address in ("192.0.2.7/24", "192.0.2.8/32", "2001:db8::7/64", "198.51.100.1 peer 198.51.100.2/32"):
        assert f" {address} " in shown, address
    for gone in ("192.0.2.9", "127.0.0.33"):
        assert gone not in shown


def test_a_device_keeps_its_name_unless_told_otherwise(namespaces: tuple[int, int]) -> None:
    _, container = namespaces
    ip("link", "add", "br7", "type", "bridge")
    ip("link", "add", "veth0", "type", "veth", "peer", "name", "peer0")
    netdevice.move("veth0", container)
    assert "veth0" in ip("link", "show", "veth0", inside=container)


def test_a_device_that_is_not_there_is_named(namespaces: tuple[int, int]) -> None:
    host, container = namespaces
    with pytest.raises(BoxshipError) as caught:
        netdevice.move("nope0", container)
    assert str(caught.value) == "link not found for interface nope0 on runtime namespace: Link nope0 not found"
    assert os.fstat(host).st_ino == os.stat("/proc/thread-self/ns/net").st_ino, "the caller is where it was"


def test_a_taken_name_leaves_the_device_where_it_is(namespaces: tuple[int, int]) -> None:
    host, container = namespaces
    ip("link", "add", "veth0", "type", "veth", "peer", "name", "peer0")
    with pytest.raises(BoxshipError, match=r"^fail to move network device veth0 to network namespace /proc/1/ns/x: file exists$"):
        netdevice.move("veth0", container, "lo", path="/proc/1/ns/x")
    assert "veth0" in ip("link", "show", "veth0")
    assert os.fstat(host).st_ino == os.stat("/proc/thread-self/ns/net").st_ino
