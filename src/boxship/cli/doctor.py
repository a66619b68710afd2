"""`boxship doctor`: what this machine offers for containers, what it lacks, and what each lack costs.

Runs in: the boxship command; changes nothing that lasts, but for the empty folder that `places` finds fit.
Spec: none; the report is for people, and with --json for programs.
Not here: how things are tried out (`boxship.linux.probe`).
"""

from __future__ import annotations

import errno
import os

from boxship.abi import syscalls as sc
from boxship.cli import flags as f
from boxship.linux import probe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

YES, PARTLY, NO = "yes", "partly", "no"

FLAGS = (f.Flag("help", f.SWITCH, "show this"), f.Flag("json", f.SWITCH, "print the report as JSON"))
USAGE = """Usage:  boxship doctor [OPTIONS]

Say what this machine offers for containers, what it lacks, and what that costs.
The exit code is 1 when no container can be run at all.

Options:
"""


class Finding:
    """What one check found.

    Attributes:
        status: YES, PARTLY or NO.
        found: what there is, in a few words.
        costs: what does not work, or works otherwise, because of what lacks; "" when nothing does.
        fatal: no container can be run.
    """

    __slots__ = ("costs", "fatal", "found", "status")

    def __init__(self, status: str, found: str, costs: str = "", *, fatal: bool = False) -> None:
        self.status = status
        self.found = found
        self.costs = costs
        self.fatal = fatal


def _say(code: int) -> str:
    return os.strerror(code).lower() if code else "yes"


# --- the kernel ------------------------------------------------------------------------------------------------------


def kernel() -> Finding:
    """The system calls without which the runtime cannot work."""
    name = os.uname()
    bad = b"\0" * 64
    calls = (
        ("pidfd_open", sc.PIDFD_OPEN, (-1, 0)), ("pidfd_getfd", sc.PIDFD_GETFD, (-1, -1, 0)), ("fsopen", sc.FSOPEN, (None, 0)),
        ("open_tree", sc.OPEN_TREE, (-1, None, 0)), ("move_mount", sc.MOVE_MOUNT, (-1, None, -1, None, 0)),
        ("openat2", sc.OPENAT2, (-1, None, bad, 0)), ("mount_setattr", sc.MOUNT_SETATTR, (-1, None, 0, bad, 0)),
    )
    missing = [call for call, number, arguments in calls if not probe.implemented(number, *arguments)]
    found = f"Linux {name.release} on {name.machine}"
    if missing:
        costs = "no container can be started; Linux 5.12 has them all"
        return Finding(NO, f"{found}, without {', '.join(missing)}", costs, fatal=True)
    return Finding(YES, found)


def namespaces() -> Finding:
    """The eight kinds."""
    from boxship.abi.namespace import FLAGS as KINDS

    root = os.geteuid() == 0
    missing = [kind for kind in KINDS if probe.namespace(kind, userns=not root)]
    if missing == ["time"]:
        return Finding(PARTLY, "all but time", "containers cannot have clocks of their own")
    needed = {"mount", "pid"} & set(missing)
    if missing:
        return Finding(
            NO if needed else PARTLY, f"without {', '.join(missing)}", "what these separate is shared with the machine",
            fatal=bool(needed),
        )
    return Finding(YES, ", ".join(KINDS))


def user_namespaces() -> Finding:
    """Whether a user namespace can be made, by root and by others."""
    own = probe.user_namespace()
    other = probe.user_namespace(probe.nobody()) if probe.nobody() is not None else own
    root = os.geteuid() == 0
    why = _policy()
    if own and root:
        costs = "root's containers have no user namespace: their capabilities are the machine's own"
        return Finding(PARTLY, f"not for root: {_say(own)}{why}", costs)
    if own:
        return Finding(NO, f"{_say(own)}{why}", "only root can run containers", fatal=True)
    if other:
        return Finding(PARTLY, f"not for ordinary users: {_say(other)}{why}", "only root can run containers")
    return Finding(YES, "for root and ordinary users" if root else "for this user")


def _policy() -> str:
    settings = (
        ("/proc/sys/user/max_user_namespaces", "0", "user.max_user_namespaces is 0"),
        ("/proc/sys/kernel/unprivileged_userns_clone", "0", "kernel.unprivileged_userns_clone is 0"),
        ("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1", "kernel.apparmor_restrict_unprivileged_userns is 1"),
    )
    reasons = [text for path, value, text in settings if _first_line(path) == value]
    return f" ({'; '.join(reasons)})" if reasons else ""


def id_maps() -> Finding:
    """More than one id for containers of ordinary users."""
    from boxship.cli import idmap

    if os.geteuid() == 0:
        tools = [name for name in ("newuidmap", "newgidmap") if not _which(name)]
        if tools:
            costs = "containers of ordinary users have one user id only; Debian's package is uidmap"
            return Finding(PARTLY, f"without {' and '.join(tools)}", costs)
        return Finding(YES, "newuidmap and newgidmap")
    maps = idmap.caller(os.environ, os.geteuid(), os.getegid())
    if maps.single():
        lacks = [name for name in ("newuidmap", "newgidmap") if not _which(name)] or ["a range in /etc/subuid and /etc/subgid"]
        costs = "a container has one user id, root: --user and many package managers fail"
        return Finding(PARTLY, f"without {' and '.join(lacks)}", costs)
    return Finding(YES, f"{sum(entry['size'] for entry in maps.uids)} ids")


def overlays() -> Finding:
    """Copy-on-write layers."""
    in_userns = probe.overlay(userns=True)
    plain = probe.overlay(userns=False) if os.geteuid() == 0 else in_userns
    if plain and in_userns:
        return Finding(NO, _say(plain), "the image `host` and directories are read-only")
    if in_userns:
        return Finding(PARTLY, f"not in user namespaces: {_say(in_userns)}", "for ordinary users the image `host` is read-only")
    return Finding(YES, "also in user namespaces")


def idmapped_mounts() -> Finding:
    """Mounts that map ids."""
    if os.geteuid() != 0:
        return Finding(PARTLY, "not for ordinary users", "the mount options idmap and ridmap need root")
    code = probe.idmapped_mount("/usr")
    if code:
        return Finding(NO, f"not for the file system of /usr: {_say(code)}", "the mount options idmap and ridmap fail there")
    return Finding(YES, "for the file system of /usr")


def images() -> Finding:
    """File systems for image layers."""
    missing = [name for name in ("erofs", "fuse") if not probe.filesystem(name)]
    if missing:
        return Finding(PARTLY, f"without {', '.join(missing)}", "layers are unpacked into directories")
    return Finding(YES, "erofs, fuse")


# --- confinement -----------------------------------------------------------------------------------------------------


def seccomp() -> Finding:
    """Filters of system calls."""
    from boxship.linux import seccomp as library

    version = library.version()
    if version == "0.0.0":
        return Finding(NO, "no libseccomp", "configurations with a seccomp profile are refused; Debian's package is libseccomp2")
    if not probe.seccomp_action(0x7FFC0000):
        return Finding(NO, "the kernel has no seccomp filters", "configurations with a seccomp profile are refused")
    if not probe.seccomp_action(0x7FC00000):
        return Finding(PARTLY, f"libseccomp {version}, no user notification", "SCMP_ACT_NOTIFY is refused")
    return Finding(YES, f"libseccomp {version}, with user notification")


def security_modules() -> Finding:
    """AppArmor, SELinux, Landlock."""
    from boxship.linux import lsm

    found = [
        name for name, there in (("AppArmor", lsm.apparmor_enabled()), ("SELinux", lsm.selinux_enabled())) if there
    ]
    landlock = probe.landlock_version()
    if landlock:
        found.append(f"Landlock {landlock}")
    if not set(found) & {"AppArmor", "SELinux"}:
        costs = "labels in a configuration are refused, and none are given by default"
        return Finding(PARTLY, ", ".join([*found, "no AppArmor, no SELinux"]), costs)
    return Finding(YES, ", ".join(found))


_CAPABILITY_COSTS = {
    "CAP_SYS_RESOURCE": "limits and oom_score_adj are clamped to what is allowed",
    "CAP_SYS_ADMIN": "root cannot run containers without a user namespace",
    "CAP_NET_ADMIN": "no networks can be made",
    "CAP_MKNOD": "devices are bound instead of made",
    "CAP_BPF": "device rules on cgroup v2 may fail",
    "CAP_PERFMON": "device rules on cgroup v2 may fail",
    "CAP_CHECKPOINT_RESTORE": "checkpoint and restore may fail",
}


def capabilities() -> Finding:
    """What root lacks of root."""
    from boxship.linux import capabilities as library

    if os.geteuid() != 0:
        return Finding(YES, "none needed by an ordinary user")
    missing = [name for name in library.known() if name not in library.names(library.effective())]
    if missing:
        costs = dict.fromkeys(_CAPABILITY_COSTS.get(name, "containers that ask for it do not get it") for name in missing)
        return Finding(PARTLY, f"without {', '.join(missing)}", "; ".join(costs))
    return Finding(YES, "all")


# --- cgroups ---------------------------------------------------------------------------------------------------------

_WANTED = {"cpu": "--cpus", "memory": "--memory", "pids": "--pids-limit"}


def cgroups() -> Finding:
    """The arrangement, and which limits can be set in it."""
    from boxship.linux.cgroups import arrangement as cg

    there = cg.arrangement()
    if not there.hierarchies and not there.unified:
        return Finding(NO, "not mounted", "no limits, no pause, no statistics")
    own = cg.membership()
    if there.pure_v2:
        folder = os.path.normpath(f"{there.unified}/{own.get('', '/')}")
        controllers = _first_line(f"{folder}/cgroup.controllers").split()
        name, writable = "v2", os.access(folder, os.W_OK)
    else:
        controllers = [name for name in there.by_controller if not name.startswith("name=")]
        name = "hybrid (limits through v1)" if there.unified else "v1"
        writable = all(os.access(h.directory(own.get(h.controllers[0], "/")), os.W_OK) for h in there.hierarchies)
    found = f"{name}: {', '.join(sorted(controllers)) or 'no controllers'}"
    if not writable:
        costs = "containers run without limits, and asking for them fails"
        if systemd_here():
            costs += ": delegation by systemd would allow them"
        return Finding(PARTLY, f"{found}; not this user's to change", costs)
    missing = [flag for controller, flag in _WANTED.items() if controller not in controllers]
    if missing:
        return Finding(PARTLY, found, f"{', '.join(missing)} fail")
    return Finding(YES, found)


def devices() -> Finding:
    """How access to devices is limited."""
    from boxship.linux.cgroups import arrangement as cg

    there = cg.arrangement()
    if os.geteuid() != 0:
        return Finding(YES, "by the user namespace: devices cannot be made in it")
    if not there.pure_v2:
        if "devices" in there.by_controller:
            return Finding(YES, "by the v1 devices controller")
        return Finding(NO, "no devices controller", "containers without a user namespace can use any device that they make")
    code = probe.bpf_device_program()
    if code:
        return Finding(NO, f"BPF device programs: {_say(code)}", "containers without a user namespace cannot be started")
    return Finding(YES, "by BPF programs")


def systemd_here() -> bool:
    """Whether systemd runs this machine."""
    from boxship.linux.cgroups.arrangement import systemd_runs

    return systemd_runs()


def systemd() -> Finding:
    """The systemd cgroup driver."""
    if systemd_here():
        return Finding(YES, "runs this machine")
    return Finding(PARTLY, "does not run this machine", "boxrun --systemd-cgroup is refused; cgroups are made directly")


# --- around it -------------------------------------------------------------------------------------------------------


def network() -> Finding:
    """Devices and rules for networks between containers."""
    if os.geteuid() != 0:
        code = probe.link_kind("veth", userns=True)
        costs = "containers have loopback only, or the caller's network"
        return Finding(PARTLY, f"in a user namespace: veth {_say(code)}", costs)
    missing = [kind for kind in ("bridge", "veth") if probe.link_kind(kind, userns=False)]
    if probe.nftables():
        missing.append("nftables")
    tools = [name for name in ("nft", "iptables") if _which(name)]
    if missing:
        return Finding(PARTLY, f"without {', '.join(missing)}", "containers have loopback only, or the machine's own network")
    return Finding(YES, ", ".join(["bridge, veth, nftables", *(f"{name} command" for name in tools)]))


def criu() -> Finding:
    """Checkpoint and restore."""
    import subprocess

    path = _which("criu")
    if not path:
        return Finding(NO, "no criu", "checkpoint and restore fail")
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout.split()
    name = f"criu {version[1]}" if len(version) > 1 else "criu"
    if os.geteuid() != 0:
        return Finding(PARTLY, name, "checkpoint and restore need root")
    try:
        checked = subprocess.run([path, "check"], capture_output=True, text=True, check=False, timeout=20)
    except subprocess.TimeoutExpired:
        return Finding(PARTLY, f"{name}: its own check does not end", "checkpoint and restore may fail")
    if checked.returncode:
        reason = (checked.stderr.strip().splitlines() or ["no reason given"])[-1]
        return Finding(PARTLY, f"{name}: its own check fails: {reason}", "checkpoint and restore may fail")
    return Finding(YES, name)


def kvm() -> Finding:
    """Hardware virtualisation."""
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        costs = "nothing yet: virtual machines would be emulated in software"
        return Finding(NO, f"/dev/kvm: {_say(error.errno or errno.EIO)}", costs)
    return Finding(YES, "/dev/kvm")


def places() -> Finding:
    """Where containers of `boxship run` write to."""
    from boxship.cli import scratch

    tried = scratch.bases(os.environ, os.geteuid())
    found = next((base for base in tried if scratch.fit(base)), "")
    if not found:
        return Finding(NO, f"none of {', '.join(tried)}", "boxship run fails", fatal=True)
    return Finding(YES, found)


CHECKS: tuple[tuple[str, Callable[[], Finding]], ...] = (
    ("kernel", kernel), ("namespaces", namespaces), ("user namespaces", user_namespaces), ("id maps", id_maps),
    ("overlayfs", overlays), ("idmapped mounts", idmapped_mounts), ("image file systems", images), ("seccomp", seccomp),
    ("security modules", security_modules), ("capabilities", capabilities), ("cgroups", cgroups), ("devices", devices),
    ("systemd", systemd), ("network", network), ("criu", criu), ("kvm", kvm), ("scratch space", places),
)


def examine() -> list[tuple[str, Finding]]:
    """Carry out every check; one that fails is a finding too."""
    result = []
    for name, check in CHECKS:
        try:
            finding = check()
        except Exception as error:  # noqa: BLE001  # the others are still worth knowing
            finding = Finding(NO, f"could not be found out: {error}")
        result.append((name, finding))
    return result


def doctor(arguments: Sequence[str], say: Callable[[str], None]) -> int:
    """The command: prints the report on standard output; 1 when no container can be run."""
    parsed = f.parse(FLAGS, arguments)
    if parsed.switch("help"):
        _print(USAGE + f.describe(FLAGS))
        return 0
    if parsed.words:
        raise f.UsageError('"boxship doctor" accepts no arguments')
    findings = examine()
    fatal = any(finding.fatal for _, finding in findings)
    if parsed.switch("json"):
        from boxship import __version__
        from boxship.oci import text

        checks = [{"name": name, "status": each.status, "found": each.found, "costs": each.costs} for name, each in findings]
        _print(text.dumps({"version": __version__, "usable": not fatal, "checks": checks}))
    else:
        _print(table(findings))
    return 1 if fatal else 0


def table(findings: Sequence[tuple[str, Finding]]) -> str:
    """The report for people: a line each, and below it what a lack costs."""
    width = max(len(name) for name, _ in findings) + 2
    lines = []
    for name, finding in findings:
        lines.append(f"{name.ljust(width)}{finding.status.ljust(8)}{finding.found}")
        if finding.costs:
            lines.append(" " * (width + 8) + f"→ {finding.costs}")
    fatal = [name for name, finding in findings if finding.fatal]
    lines += ["", f"No container can be run here: see {', '.join(fatal)}." if fatal else "Containers can be run here."]
    return "\n".join(lines)


def _print(text: str) -> None:
    os.write(1, f"{text}\n".encode("utf-8", "surrogateescape"))


def _first_line(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.readline().strip()
    except OSError:
        return ""


def _which(program: str) -> str:
    folders = [*os.environ.get("PATH", "").split(":"), "/usr/sbin", "/sbin"]
    return next((path for folder in folders if folder and os.access(path := f"{folder}/{program}", os.X_OK)), "")
