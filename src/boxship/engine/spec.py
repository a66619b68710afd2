"""The runtime configuration of a container: what dockerd makes of a container's configuration.

Runs in: the daemon.
Spec: runtime-spec 1.2, config.md and config-linux.md; the defaults are dockerd's (capabilities, masked paths, devices, mounts).
Not here: where names are looked up (users, volumes, other containers' namespaces): those come in as `Inputs`.
"""

from __future__ import annotations

import json
import os
import stat
from typing import Any, NamedTuple

from boxship.abi.capability import NAMES
from boxship.kit.errors import InvalidArgument
from boxship.oci import seccomp_profile

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
INIT = "/sbin/docker-init"
SHM_SIZE = 64 << 20

DEFAULT_CAPABILITIES = (
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID", "CAP_SETUID",
    "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
)
MASKED = (
    "/proc/asound", "/proc/acpi", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
    "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap",
)
READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")

_MOUNTS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("/proc", "proc", "proc", ("nosuid", "noexec", "nodev")),
    ("/dev", "tmpfs", "tmpfs", ("nosuid", "strictatime", "mode=755", "size=65536k")),
    ("/dev/pts", "devpts", "devpts", ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5")),
    ("/sys", "sysfs", "sysfs", ("nosuid", "noexec", "nodev", "ro")),
    ("/sys/fs/cgroup", "cgroup", "cgroup", ("ro", "nosuid", "noexec", "nodev")),
    ("/dev/mqueue", "mqueue", "mqueue", ("nosuid", "noexec", "nodev")),
    ("/dev/shm", "tmpfs", "shm", ("nosuid", "noexec", "nodev", "mode=1777")),
)
_DEVICES = ((1, 5), (1, 3), (1, 9), (1, 8), (5, 0), (5, 1))
_RLIMITS = frozenset((
    "as", "core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile", "nproc", "rss", "rtprio", "rttime",
    "sigpending", "stack",
))


class Inputs(NamedTuple):
    """What is found out at the start of a container, beside its configuration."""

    uid: int
    gid: int
    groups: list[int]
    home: str
    mounts: list[dict[str, Any]]
    """Volumes, binds, tmpfs and the files of /etc, as the specification's mounts."""
    namespaces: dict[str, str | None]
    """By type: a path to join, "" for a new one, None for the host's."""
    hostname: str
    cgroups_path: str
    shm_path: str
    """Host directory of a shared /dev/shm; "" for one of its own."""
    init: str
    """Path of the init program on the host when one was asked for."""
    rootless: bool = False
    """Whether who starts it is root of a user namespace only."""


def build(config: dict[str, Any], host: dict[str, Any], command: list[str], inputs: Inputs) -> dict[str, Any]:
    """The whole config.json. Raises InvalidArgument for values that no container can have."""
    privileged = host["Privileged"]
    capabilities = capability_set(host["CapAdd"] or [], host["CapDrop"] or [], privileged=privileged)
    args = [INIT, "--", *command] if inputs.init else command
    process: dict[str, Any] = {
        "terminal": config["Tty"], "user": user(inputs), "args": args, "env": environment(config, inputs),
        "cwd": config["WorkingDir"] or "/", "capabilities": process_capabilities(capabilities, inputs.uid),
        "oomScoreAdj": host["OomScoreAdj"],
    }
    if config["Tty"] and any(host["ConsoleSize"]):
        process["consoleSize"] = {"height": host["ConsoleSize"][0], "width": host["ConsoleSize"][1]}
    if rlimits := [_rlimit(each) for each in host["Ulimits"] or []]:
        process["rlimits"] = rlimits
    limits = resources(host)
    if limits.get("pids") == {"limit": -1}:
        del limits["pids"]  # a new group has none, and a user who may make no group can be asked for none
    security = security_options(host["SecurityOpt"] or [])
    if security.get("no-new-privileges"):
        process["noNewPrivileges"] = True
    if security.get("apparmor") and security["apparmor"] != "unconfined":
        process["apparmorProfile"] = security["apparmor"]
    linux: dict[str, Any] = {
        "resources": {"devices": _device_rules(host), **limits}, "cgroupsPath": inputs.cgroups_path,
        "namespaces": [
            {"type": kind, **({"path": path} if path else {})} for kind, path in inputs.namespaces.items() if path is not None
        ],
        "maskedPaths": _paths(host["MaskedPaths"], MASKED, privileged=privileged),
        "readonlyPaths": _paths(host["ReadonlyPaths"], READ_ONLY, privileged=privileged),
    }
    if inputs.namespaces.get("user") is not None:
        linux["uidMappings"], linux["gidMappings"] = _same_ids("/proc/self/uid_map"), _same_ids("/proc/self/gid_map")
    if sysctls := _sysctls(config, host, inputs):
        linux["sysctl"] = sysctls
    if devices := _devices(host):
        linux["devices"] = devices
    if (filters := _seccomp(security.get("seccomp"), capabilities, privileged=privileged)) is not None:
        linux["seccomp"] = filters
    spec: dict[str, Any] = {
        "ociVersion": "1.2.0", "process": process, "root": {"path": "rootfs", "readonly": host["ReadonlyRootfs"]},
        "mounts": _mounts(config, host, inputs), "linux": linux,
    }
    if inputs.namespaces.get("uts") is not None:
        spec["hostname"] = inputs.hostname
    if host["Annotations"]:
        spec["annotations"] = dict(host["Annotations"])
    propagations = [option for mount in inputs.mounts for option in mount["options"] if option in ("rshared", "shared", "rslave",
        "slave")]
    if propagations:
        linux["rootfsPropagation"] = "shared" if any("shared" in each for each in propagations) else "rslave"
    return spec


def _same_ids(path: str) -> list[dict[str, int]]:
    """Every id that the daemon's own user namespace has, as itself."""
    with open(path, encoding="ascii") as file:
        rows = [line.split() for line in file]
    return [{"containerID": int(row[0]), "hostID": int(row[0]), "size": int(row[2])} for row in rows]


def user(inputs: Inputs) -> dict[str, Any]:
    """process.user.

    The primary group is among the additional ones too, so that a file of that group cannot be denied by negative modes.
    """
    groups = [inputs.gid, *(group for group in inputs.groups if group != inputs.gid)]
    return {"uid": inputs.uid, "gid": inputs.gid, "additionalGids": groups}


def environment(config: dict[str, Any], inputs: Inputs) -> list[str]:
    """process.env: what dockerd adds comes first, what the configuration names wins."""
    env = {"PATH": DEFAULT_PATH, "HOSTNAME": inputs.hostname}
    if config["Tty"]:
        env["TERM"] = "xterm"
    for word in config["Env"] or []:
        name, equals, value = word.partition("=")
        if equals:
            env[name] = value
        else:
            env.pop(name, None)
    env.setdefault("HOME", inputs.home)
    return [f"{name}={value}" for name, value in env.items()]


def process_capabilities(capabilities: list[str], uid: int) -> dict[str, list[str]]:
    """process.capabilities: none of them effective for who is not root, as after execve(2) of a plain program."""
    return {"bounding": capabilities, "effective": capabilities,
        "permitted": capabilities} if uid == 0 else {"bounding": capabilities}


def capability_set(add: list[str], drop: list[str], *, privileged: bool) -> list[str]:
    """The bounding set for --cap-add and --cap-drop. Raises InvalidArgument for a name that is none."""
    known = _known_capabilities()
    if privileged:
        return known
    added, dropped = _normal(add, known), _normal(drop, known)
    if "ALL" in added:
        return [name for name in known if name not in dropped]
    base = [] if "ALL" in dropped else [name for name in DEFAULT_CAPABILITIES if name not in dropped]
    return list(dict.fromkeys([*base, *(name for name in added if name not in dropped or "ALL" in dropped)]))


def _known_capabilities() -> list[str]:
    try:
        with open("/proc/sys/kernel/cap_last_cap", encoding="ascii") as file:
            last = int(file.read())
    except OSError:
        last = len(NAMES) - 1
    # What this process itself may not have, it cannot give.
    with open("/proc/self/status", encoding="ascii") as file:
        bounding = next((int(line.split()[1], 16) for line in file if line.startswith("CapBnd:")), -1)
    return [name for number, name in enumerate(NAMES[: last + 1]) if bounding >> number & 1]


def _normal(names: list[str], known: list[str]) -> list[str]:
    made = []
    for name in names:
        upper = name.upper()
        if upper != "ALL" and not upper.startswith("CAP_"):
            upper = f"CAP_{upper}"
        if upper != "ALL" and upper not in NAMES:
            raise InvalidArgument(f'invalid capability: unknown capability: "{upper}"' if name else "invalid capability: empty")
        if upper == "ALL" or upper in known:
            made.append(upper)
    return made


def security_options(options: list[str]) -> dict[str, Any]:
    """--security-opt by key. Raises InvalidArgument for one that is not known."""
    found: dict[str, Any] = {}
    for option in options:
        if option == "no-new-privileges":
            found[option] = True
            continue
        key, sign, value = option.partition("=" if "=" in option else ":")
        if not sign or key not in ("label", "apparmor", "seccomp", "no-new-privileges", "systempaths", "writable-cgroups"):
            raise InvalidArgument(f'invalid --security-opt 2: "{option}"' if sign else f'invalid --security-opt 1: "{option}"')
        if key in ("no-new-privileges", "writable-cgroups"):
            if value not in ("true", "false"):
                raise InvalidArgument(f'invalid --security-opt 2: "{option}"')
            found[key] = value == "true"
        else:
            found[key] = value
    return found


def _paths(chosen: list[str] | None, default: tuple[str, ...], *, privileged: bool) -> list[str]:
    if chosen is not None:
        return list(chosen)
    return [] if privileged else list(default)


def _rlimit(limit: dict[str, Any]) -> dict[str, Any]:
    name = str(limit.get("Name", "")).lower()
    soft, hard = limit.get("Soft", 0), limit.get("Hard", 0)
    if name not in _RLIMITS or not isinstance(soft, int) or not isinstance(hard, int):
        raise InvalidArgument(f"invalid ulimit type: {name}")
    unlimited = (1 << 64) - 1
    return {"type": f"RLIMIT_{name.upper()}", "soft": unlimited if soft < 0 else soft, "hard": unlimited if hard < 0 else hard}


def resources(host: dict[str, Any]) -> dict[str, Any]:
    """linux.resources for a container's limits, without the devices; also what `docker update` hands on."""
    memory = {
        "limit": host["Memory"] if host["Memory"] > 0 else None,
        "reservation": host["MemoryReservation"] or None, "swap": host["MemorySwap"] or None,
        "swappiness": host["MemorySwappiness"] if host["MemorySwappiness"] not in (None, -1) else None,
        "disableOOMKiller": host["OomKillDisable"] or None,
    }
    quota, period = host["CpuQuota"], host["CpuPeriod"]
    if host["NanoCpus"] > 0:
        period = 100000
        quota = host["NanoCpus"] * period // 1_000_000_000
    cpu = {
        "shares": host["CpuShares"] or None, "quota": quota or None, "period": period or None, "cpus": host["CpusetCpus"] or None,
        "mems": host["CpusetMems"] or None, "realtimePeriod": host["CpuRealtimePeriod"] or None,
        "realtimeRuntime": host["CpuRealtimeRuntime"] or None,
    }
    block = {
        "weight": host["BlkioWeight"] or None,
        "weightDevice": [{**_numbers(each["Path"]),
        "weight": each["Weight"]} for each in host["BlkioWeightDevice"] or []] or None,
        **{
            key: [{**_numbers(each["Path"]), "rate": each["Rate"]} for each in host[name] or []] or None
            for key, name in (
                ("throttleReadBpsDevice", "BlkioDeviceReadBps"), ("throttleWriteBpsDevice", "BlkioDeviceWriteBps"),
                ("throttleReadIOPSDevice", "BlkioDeviceReadIOps"), ("throttleWriteIOPSDevice", "BlkioDeviceWriteIOps"))
        },
    }
    found: dict[str, Any] = {}
    for name, values in (("memory", memory), ("cpu", cpu), ("blockIO", block)):
        if set_values := {key: value for key, value in values.items() if value is not None}:
            found[name] = set_values
    if limit := host["PidsLimit"]:
        found["pids"] = {"limit": max(limit, -1)}
    return found


def _numbers(path: str) -> dict[str, int]:
    try:
        number = os.stat(path).st_rdev
    except OSError as error:
        raise InvalidArgument(f"stat {path}: {(error.strerror or '').lower()}") from None
    return {"major": os.major(number), "minor": os.minor(number)}


def _device_rules(host: dict[str, Any]) -> list[dict[str, Any]]:
    if host["Privileged"]:
        return [{"allow": True, "access": "rwm"}]
    rules: list[dict[str, Any]] = [{"allow": False, "access": "rwm"}]
    rules += [{"allow": True, "type": "c", "major": major, "minor": minor, "access": "rwm"} for major, minor in _DEVICES]
    for each in host["Devices"] or []:
        for device in _device_nodes(each):
            rules.append({
                "allow": True, "type": device["type"], "major": device["major"], "minor": device["minor"],
                "access": each.get("CgroupPermissions") or "rwm",
            })
    for rule in host["DeviceCgroupRules"] or []:
        words = rule.split()
        if len(words) != 3 or words[0] not in "abc" or ":" not in words[1] or set(words[2]) - set("rwm"):
            raise InvalidArgument(f"invalid device cgroup rule format: '{rule}'")
        major, minor = words[1].split(":", 1)
        made: dict[str, Any] = {"allow": True, "type": words[0], "access": words[2]}
        for key, word in (("major", major), ("minor", minor)):
            if word != "*":
                if not word.isdigit():
                    raise InvalidArgument(f"invalid device cgroup rule format: '{rule}'")
                made[key] = int(word)
        rules.append(made)
    return rules


def _device_nodes(mapping: dict[str, Any]) -> list[dict[str, Any]]:
    """The device, or the devices of a directory, that --device names."""
    source = str(mapping.get("PathOnHost", ""))
    target = str(mapping.get("PathInContainer", "") or source)
    try:
        real = os.path.realpath(source)
        if os.path.isdir(real):
            found = []
            for folder, _, names in os.walk(real):
                for name in names:
                    path = os.path.join(folder, name)
                    try:
                        found.append(_device_node(path, target + path[len(real) :]))
                    except InvalidArgument:
                        continue
            return found
        return [_device_node(real, target)]
    except OSError as error:
        raise InvalidArgument(
            f'error gathering device information while adding custom device "{source}": {(error.strerror or "").lower()}'
        ) from None


def device_numbers(path: str) -> dict[str, Any]:
    """{type, major, minor} of a device node of the host. Raises InvalidArgument."""
    try:
        node = _device_node(path, path)
    except OSError as error:
        raise InvalidArgument(f"device {path}: {(error.strerror or '').lower()}") from None
    return {key: node[key] for key in ("type", "major", "minor")}


def _device_node(path: str, target: str) -> dict[str, Any]:
    info = os.stat(path)
    if stat.S_ISCHR(info.st_mode):
        kind = "c"
    elif stat.S_ISBLK(info.st_mode):
        kind = "b"
    else:
        raise InvalidArgument(f'error gathering device information while adding custom device "{path}": not a device node')
    return {
        "path": target, "type": kind, "major": os.major(info.st_rdev), "minor": os.minor(info.st_rdev),
        "fileMode": stat.S_IMODE(info.st_mode), "uid": info.st_uid, "gid": info.st_gid,
    }


def _devices(host: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    if host["Privileged"]:
        for folder, folders, names in os.walk("/dev"):
            folders[:] = [name for name in folders if name not in ("pts", "shm", "fd", "mqueue", ".lxc", ".lxd-mounts", ".udev")]
            for name in names:
                path = os.path.join(folder, name)
                if name == "console" or os.path.islink(path):
                    continue
                try:
                    found.append(_device_node(path, path))
                except (InvalidArgument, OSError):
                    continue  # a socket, or gone in the meantime
    taken = {each["path"] for each in found}
    for mapping in host["Devices"] or []:
        found += [each for each in _device_nodes(mapping) if each["path"] not in taken]
    return found


def _sysctls(config: dict[str, Any], host: dict[str, Any], inputs: Inputs) -> dict[str, str]:
    found = {}
    if config["Domainname"] and inputs.namespaces.get("uts") is not None:
        found["kernel.domainname"] = config["Domainname"]  # the specification's `domainname` is unknown to older runtimes
    if inputs.namespaces.get("network") == "" and inputs.namespaces.get("user") is None:
        for name, value in (("net.ipv4.ping_group_range", "0 2147483647"), ("net.ipv4.ip_unprivileged_port_start", "0")):
            # The range ends with the last group that there is; rootless that is another one, and 0 is allowed anyway.
            ranges_too_far = inputs.rootless and name.endswith("ping_group_range")
            if not ranges_too_far and os.path.exists("/proc/sys/" + name.replace(".", "/")):
                found[name] = value
    return found | {str(key): str(value) for key, value in (host["Sysctls"] or {}).items()}


def _is_group(number: int) -> bool:
    """Whether the group exists in this process's user namespace."""
    with open("/proc/self/gid_map", encoding="ascii") as file:
        return any(int(first) <= number < int(first) + int(count) for first, _, count in map(str.split, file))


_SHOWS = {"/sys": "network", "/proc": "pid", "/dev/mqueue": "ipc"}
"""The kind of namespace that a file system shows."""


def _mounts(config: dict[str, Any], host: dict[str, Any], inputs: Inputs) -> list[dict[str, Any]]:
    taken = {mount["destination"] for mount in inputs.mounts}
    mounts: list[dict[str, Any]] = []
    for destination, kind, source, options in _MOUNTS:
        if destination in taken:
            continue
        chosen = list(options)
        if destination == "/dev/shm":
            if host["IpcMode"] == "none":
                continue
            if inputs.shm_path:
                mounts.append({"destination": destination, "type": "bind", "source": inputs.shm_path,
                    "options": ["rbind", "rprivate"]})
                continue
            chosen.append(f"size={host['ShmSize'] or SHM_SIZE}")
        if host["Privileged"] and destination in ("/sys", "/sys/fs/cgroup"):
            chosen = [option for option in chosen if option != "ro"]
        if inputs.rootless and destination == "/dev/pts" and not _is_group(5):
            chosen.remove("gid=5")
        shows = _SHOWS.get(destination)
        if inputs.rootless and shows and inputs.namespaces.get(shows) is None:
            # New mounts of these are for who owns the namespace that they show.
            kind, source, chosen = "bind", destination, ["rbind", *chosen]
        mounts.append({"destination": destination, "type": kind, "source": source, "options": chosen})
    mounts += sorted(inputs.mounts, key=lambda mount: mount["destination"].count("/") if mount["destination"] != "/" else 0)
    if inputs.init:
        mounts.append({"destination": INIT, "type": "bind", "source": inputs.init, "options": ["bind", "ro"]})
    return mounts


def _seccomp(choice: str | None, capabilities: list[str], *, privileged: bool) -> dict[str, Any] | None:
    if choice == "unconfined" or (privileged and not choice):
        return None
    if not choice or choice == "builtin":
        return seccomp_profile.profile(capabilities)
    try:
        profile = json.loads(choice)
    except ValueError as error:
        raise InvalidArgument(f"decoding seccomp profile failed: {error}") from None
    if not isinstance(profile, dict) or not isinstance(profile.get("defaultAction"), str):
        raise InvalidArgument("decoding seccomp profile failed: defaultAction is missing")
    return _own_profile(profile, capabilities)


_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "riscv64": "riscv64"}


def _own_profile(profile: dict[str, Any], capabilities: list[str]) -> dict[str, Any]:
    """A profile in Docker's format as the specification's: its conditions (capabilities, architectures) are decided here."""
    machine = os.uname().machine
    architecture = _ARCHITECTURES.get(machine, machine)
    native = f"SCMP_ARCH_{machine.upper()}"
    architectures = list(profile.get("architectures") or [])
    for each in profile.get("archMap") or []:
        if each.get("architecture") == native:
            architectures = [native, *(each.get("subArchitectures") or [])]
    calls = []
    for rule in profile.get("syscalls") or []:
        includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
        if includes.get("arches") and architecture not in includes["arches"]:
            continue
        if architecture in (excludes.get("arches") or []):
            continue
        if any(name not in capabilities for name in includes.get("caps") or []):
            continue
        if any(name in capabilities for name in excludes.get("caps") or []):
            continue
        names = list(rule.get("names") or []) + ([rule["name"]] if rule.get("name") else [])
        made = {"names": names, "action": rule.get("action", "")}
        if rule.get("args"):
            made["args"] = rule["args"]
        if rule.get("errnoRet") is not None:
            made["errnoRet"] = rule["errnoRet"]
        calls.append(made)
    found = {"defaultAction": profile["defaultAction"], "architectures": architectures, "syscalls": calls}
    if profile.get("defaultErrnoRet") is not None:
        found["defaultErrnoRet"] = profile["defaultErrnoRet"]
    if profile.get("flags"):
        found["flags"] = profile["flags"]
    return found
