"""config.json as `boxship run` makes it: docker's defaults, and the changes that flags ask for.

Runs in: the boxship command.
Spec: runtime-spec 1.3.0; the defaults of dockerd (capabilities, masked and read-only paths, mounts).
Not here: what an image brings (`boxship.cli.image`), reading of the flags' values (`boxship.cli.values`).
"""

from __future__ import annotations

from boxship.cli.idmap import identity

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from boxship.cli.idmap import Maps
    from boxship.oci.users import User

PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

CAPABILITIES = (
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID", "CAP_SETUID",
    "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
)
MASKED = (
    "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/sched_debug",
    "/proc/scsi", "/proc/timer_list", "/proc/timer_stats", "/sys/devices/virtual/powercap", "/sys/firmware",
)
READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")

_NAMESPACES = ("mount", "pid", "ipc", "uts", "cgroup")
_PLAIN = ["nosuid", "noexec", "nodev"]


def mounts(*, devpts_group: bool, sysfs: bool, cgroup: bool) -> list[dict[str, Any]]:
    """The kernel's own file systems.

    `devpts_group`: the container has the group tty (5). `sysfs`: a new one may be mounted; otherwise the host's is bound,
    with the container's own cgroups over the host's.
    """
    pts = ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", *(["gid=5"] if devpts_group else [])]
    sys: dict[str, Any] = {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": [*_PLAIN, "ro"]}
    if not sysfs:
        sys = {"destination": "/sys", "type": "bind", "source": "/sys", "options": ["rbind", "rprivate", *_PLAIN, "ro", "rro"]}
    dev = ["nosuid", "strictatime", "mode=755", "size=65536k"]
    result = [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": list(_PLAIN)},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": dev},
        {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": pts},
        sys,
        {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": list(_PLAIN)},
        {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": [*_PLAIN, "mode=1777", "size=65536k"]},
    ]
    if cgroup:
        options = [*_PLAIN, "relatime", "ro"]
        result.insert(4, {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": options})
    return result


def default(hostname: str, maps: Maps | None, *, own_network: bool) -> dict[str, Any]:
    """A configuration without root, image mounts and process arguments."""
    namespaces = [{"type": name} for name in _NAMESPACES]
    if own_network:
        namespaces.append({"type": "network"})
    linux: dict[str, Any] = {
        "namespaces": namespaces, "maskedPaths": list(MASKED), "readonlyPaths": list(READ_ONLY),
        "resources": {"devices": [{"allow": False, "access": "rwm"}]},
    }
    spec: dict[str, Any] = {
        "ociVersion": "1.3.0",
        "process": {
            "user": {"uid": 0, "gid": 0}, "args": [], "env": [PATH, f"HOSTNAME={hostname}"], "cwd": "/",
            "capabilities": {kind: list(CAPABILITIES) for kind in ("bounding", "effective", "permitted")},
        },
        "root": {"path": "rootfs"},
        "hostname": hostname,
        # sysfs belongs to the network namespace: only who owns that one may mount it.
        "mounts": mounts(devpts_group=(maps or identity()).holds(0, 5), sysfs=own_network or maps is None, cgroup=True),
        "linux": linux,
    }
    add_user_namespace(spec, maps)
    return spec


def add_user_namespace(spec: dict[str, Any], maps: Maps | None) -> None:
    """Give a configuration a user namespace of its own, unless it says something about that already."""
    linux = spec.setdefault("linux", {})
    namespaces = linux.setdefault("namespaces", [])
    if maps is None or any(entry["type"] == "user" for entry in namespaces):
        return
    namespaces.append({"type": "user"})
    linux["uidMappings"], linux["gidMappings"] = maps.uids, maps.gids


def confine(spec: dict[str, Any]) -> bool:
    """Filter the process's system calls; False on a machine that there is no profile for."""
    from boxship.oci.seccomp_profile import profile

    filters = profile(spec["process"]["capabilities"]["bounding"])
    if filters is None:
        return False
    spec["linux"]["seccomp"] = filters
    return True


def share_network(spec: dict[str, Any]) -> None:
    """Leave the container in the caller's network."""
    linux = spec.setdefault("linux", {})
    linux["namespaces"] = [entry for entry in linux.get("namespaces", []) if entry["type"] != "network"]


def own_network(spec: dict[str, Any]) -> None:
    """Give the container a network with a loopback device and nothing else."""
    share_network(spec)
    spec["linux"]["namespaces"].append({"type": "network"})


def set_user(spec: dict[str, Any], user: User) -> None:
    """Run the process as `user`. Anybody but root begins without capabilities, as with docker."""
    process = spec["process"]
    process["user"] = {"uid": user.uid, "gid": user.gid, **({"additionalGids": user.groups} if user.groups else {})}
    if user.uid:
        capabilities = process.get("capabilities", {})
        for kind in ("effective", "permitted", "inheritable", "ambient"):
            capabilities.pop(kind, None)


def set_environment(spec: dict[str, Any], words: list[str]) -> None:
    """Add variables; a later one of the same name takes the place of an earlier one."""
    names: dict[str, str] = {}
    for word in [*spec["process"].get("env", []), *words]:
        names[word.partition("=")[0]] = word
    spec["process"]["env"] = list(names.values())


def set_default_environment(spec: dict[str, Any], words: list[str]) -> None:
    """Add those variables whose names are not there yet."""
    present = {word.partition("=")[0] for word in spec["process"].get("env", [])}
    set_environment(spec, [word for word in words if word.partition("=")[0] not in present])


def limit(spec: dict[str, Any], *, memory: int | None, swap: bool, cpu: tuple[int, int] | None, pids: int | None) -> None:
    """Limits as docker translates them; with `swap` as much swap space as memory is allowed, i.e. twice the sum."""
    resources = spec.setdefault("linux", {}).setdefault("resources", {})
    if memory is not None:
        resources["memory"] = {**resources.get("memory", {}), "limit": memory}
        resources["memory"].pop("swap", None)
        if swap:
            resources["memory"]["swap"] = 2 * memory
    if cpu is not None:
        resources["cpu"] = {**resources.get("cpu", {}), "quota": cpu[0], "period": cpu[1]}
    if pids is not None:
        resources["pids"] = {"limit": pids}
