"""The seccomp program of `boxship.linux.seccomp` against the one that runc loads for the same profile.

runc's is read back from a container that it started, with PTRACE_SECCOMP_GET_FILTER. RUNC names another runc than that in PATH.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import uuid
from pathlib import Path

import pytest

from boxship.linux import _sys, seccomp
from support.bpf import I386, X86_64, verdict

RUNC = os.environ.get("RUNC") or shutil.which("runc")
BUSYBOX = shutil.which("busybox")
pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers are x86_64's"),
    pytest.mark.skipif(not RUNC, reason="needs runc"),
    pytest.mark.skipif(not BUSYBOX, reason="needs a static busybox"),
]
PTRACE, SEIZE, INTERRUPT, DETACH, GET_FILTER = 101, 0x4206, 0x4207, 17, 0x420C
CONTAINERS_PROFILE = Path("/usr/share/containers/seccomp.json")
ALL_ARCHITECTURES = ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]
# Neither runc's own steps nor the container's sleep need these, so any action on them lets the container live.
NAMES = [
    "acct", "add_key", "afs_syscall", "bpf", "chroot", "clock_settime", "create_module", "delete_module",
    "fanotify_init", "finit_module", "flock", "fsmount", "fsopen", "getxattr", "init_module", "io_setup", "io_submit",
    "kcmp", "kexec_load", "link", "lookup_dcookie", "mbind", "migrate_pages", "mknod", "mlock", "mq_open", "msgget",
    "name_to_handle_at", "nfsservctl", "open_by_handle_at", "perf_event_open", "pivot_root", "process_vm_readv",
    "ptrace", "quotactl", "reboot", "rename", "semget", "setdomainname", "sethostname", "setns", "settimeofday",
    "shmget", "splice", "swapon", "sync", "symlink", "sysfs", "syslog", "tee", "truncate", "umount2", "unshare",
    "uselib", "userfaultfd", "ustat", "vmsplice", "futex_waitv", "memfd_secret",
]


def filter_of(pid: int) -> bytes:
    """The newest filter on a process."""
    _sys.syscall(PTRACE, SEIZE, pid, 0, 0)
    try:
        _sys.syscall(PTRACE, INTERRUPT, pid, 0, 0)
        os.waitpid(pid, 0x40000000)  # __WALL
        code = bytearray(_sys.syscall(PTRACE, GET_FILTER, pid, 0, 0) * 8)
        _sys.syscall(PTRACE, GET_FILTER, pid, 0, code)
    finally:
        _sys.syscall(PTRACE, DETACH, pid, 0, 0)
    return bytes(code)


def filter_by_runc(profile: dict[str, object], bundle: Path) -> bytes:
    """What runc makes of the profile."""
    assert RUNC
    assert BUSYBOX
    (bundle / "rootfs").mkdir()
    shutil.copy(BUSYBOX, bundle / "rootfs" / "busybox")
    subprocess.run([RUNC, "spec"], cwd=bundle, check=True)
    config = json.loads((bundle / "config.json").read_text())
    config["process"].update(terminal=False, args=["/busybox", "sleep", "60"])
    config["linux"]["seccomp"] = profile
    (bundle / "config.json").write_text(json.dumps(config))
    name = f"seccomp-{uuid.uuid4().hex[:8]}"
    runc = [RUNC, "--root", str(bundle / "state")]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([*runc, "run", "-d", name], cwd=bundle, check=True, **streams)  # type: ignore[call-overload]
    try:
        state = subprocess.run([*runc, "state", name], check=True, capture_output=True)
        return filter_of(json.loads(state.stdout)["pid"])
    finally:
        subprocess.run([*runc, "delete", "--force", name], check=True)


def differences(ours: bytes, theirs: bytes) -> list[str]:
    found = []
    for arch, bit in ((X86_64, 0), (X86_64, 1 << 30), (I386, 0), (0x40000028, 0)):
        for nr in (*range(480), 500, 547, 1000):
            for args in ((0,), (1,), (5, 5, 5), (1 << 31,), (1 << 33, 1), (6, 0, 1)):
                a, b = verdict(ours, nr | bit, args, arch), verdict(theirs, nr | bit, args, arch)
                if a != b:
                    found.append(f"{arch:#x} {nr}{args}: {a:#x}, runc {b:#x}")
    return found


def made_up(seed: int) -> dict[str, object]:
    """A profile of random rules; the default action lets the container live."""
    choose = random.Random(seed)
    rules: list[dict[str, object]] = []
    for name in choose.sample(NAMES, choose.choice((5, 20, 50))):
        action = choose.choice(["ALLOW", "ERRNO", "KILL_PROCESS", "KILL_THREAD", "TRAP", "LOG", "TRACE"])
        rule: dict[str, object] = {"names": [name], "action": f"SCMP_ACT_{action}"}
        if action in ("ERRNO", "TRACE") and choose.random() < 0.5:
            rule["errnoRet"] = choose.randrange(100)
        if choose.random() < 0.5:
            rule["args"] = [
                {
                    "index": choose.choice((0, 0, 1, 2)), "op": choose.choice(sorted(seccomp.abi.OPERATORS)),
                    "value": choose.choice((0, 1, 5, 1 << 31, 1 << 33)), "valueTwo": choose.choice((0, 1, 5)),
                }
                for _ in range(choose.choice((1, 1, 2, 3)))
            ]
        rules.append(rule)
    architectures = choose.choice([[], ["SCMP_ARCH_X86_64"], ["SCMP_ARCH_X86"], ALL_ARCHITECTURES])
    default = choose.choice(["SCMP_ACT_ALLOW", "SCMP_ACT_LOG"])
    return {"defaultAction": default, "architectures": architectures, "syscalls": rules}


@pytest.mark.parametrize("seed", range(5))
def test_made_up_profiles_have_runcs_verdicts(seed: int, tmp_path: Path) -> None:
    profile = made_up(seed)
    ours = seccomp.compile_filter(profile, cache_dir=None).program
    assert differences(ours, filter_by_runc(profile, tmp_path)) == []


@pytest.mark.skipif(not CONTAINERS_PROFILE.exists(), reason="needs golang-github-containers-common")
# Without the native one: before 1.2 runc's stub left it out, so that is not compared here.
@pytest.mark.parametrize("architectures", [["SCMP_ARCH_X86_64"], ALL_ARCHITECTURES])
@pytest.mark.parametrize("errno_ret", [None, 5, 38])
def test_the_profile_that_engines_use_has_runcs_verdicts(architectures: list[str], errno_ret: int | None, tmp_path: Path) -> None:
    known = ("names", "action", "args", "errnoRet")
    rules = json.loads(CONTAINERS_PROFILE.read_text())["syscalls"]
    profile: dict[str, object] = {
        "defaultAction": "SCMP_ACT_ERRNO", "architectures": architectures,
        "syscalls": [{key: rule[key] for key in known if rule.get(key) is not None} for rule in rules],
    }
    if errno_ret is not None:
        profile["defaultErrnoRet"] = errno_ret
    ours = seccomp.compile_filter(profile, cache_dir=None).program
    assert differences(ours, filter_by_runc(profile, tmp_path)) == []
