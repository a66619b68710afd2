"""Rules of config.json that concern several fields: what cannot work, said before anything is made.

Runs in: the runtime, before create and exec.
Spec: runtime-spec 1.3.0. Where runc has a rule this has the same one in the same words (libcontainer/configs/validate
and specconv of runc 1.5), because clients match them; where runc leaves it to the kernel to answer EINVAL, the error
names the JSON path and the rule.
Not here: types and values of single fields (`boxship.oci.struct`), and whatever only the machine can tell: that the
root file system is there, that a path is a namespace, that the kernel has SELinux, resctrl or cgroup v2.
"""

from __future__ import annotations

from itertools import pairwise

from boxship.kit.errors import InvalidArgument
from boxship.oci.text import dumps as _quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from boxship.oci.config import IDMapping, Linux, Mount, Process, Seccomp, Spec

MAX_CPU = 65536
"""The highest CPU or memory node in a list; the kernel's own limit is lower."""

MAX_MAPPINGS = 340
"""Lines of /proc/PID/uid_map (UID_GID_MAP_MAX_EXTENTS, Linux 4.15)."""

MOUNT_OPTIONS = frozenset((
    "async", "atime", "bind", "defaults", "dev", "diratime", "dirsync", "exec", "idmap", "iversion",
    "lazytime", "loud", "mand", "noatime", "nodev", "nodiratime", "noexec", "noiversion", "nolazytime",
    "nomand", "norelatime", "nostrictatime", "nosuid", "nosymfollow", "private", "ratime", "rbind",
    "rdev", "rdiratime", "relatime", "remount", "rexec", "ridmap", "rnoatime", "rnodev", "rnodiratime",
    "rnoexec", "rnorelatime", "rnostrictatime", "rnosuid", "rnosymfollow", "ro", "rprivate", "rrelatime",
    "rro", "rrw", "rshared", "rslave", "rstrictatime", "rsuid", "rsymfollow", "runbindable", "rw",
    "shared", "silent", "slave", "strictatime", "suid", "symfollow", "sync", "tmpcopyup", "unbindable",
))
"""Mount options that are not the file system's own."""

_IPC_SYSCTLS = frozenset((
    "kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem", "kernel.shmall", "kernel.shmmax",
    "kernel.shmmni", "kernel.shm_rmid_forced",
))


def validate(
    spec: Spec,
    *,
    rootless: bool,
    systemd_cgroup: bool = False,
    is_host_netns: Callable[[str], bool] | None = None,
    needs_process: bool = True,
) -> list[str]:
    """Check `spec`; the warnings that come back are for the log.

    `rootless`: the caller is not root (runc's RootlessEUID). `is_host_netns` tells whether a path is the caller's
    network namespace, for the rule about sysctls; without it, a path is taken for another one's. Without `needs_process`
    there may be no process: one can be created, but not started.
    Raises InvalidArgument with the first rule that is broken.
    """
    warnings: list[str] = []
    _version(spec.oci_version)
    if spec.process is not None:
        validate_process(spec.process)
    elif needs_process:
        raise InvalidArgument("process property must not be empty")
    if spec.root is None:
        raise InvalidArgument("root must be specified")
    if not spec.root.path:
        raise InvalidArgument("root.path: must not be empty")
    for mount in spec.mounts:
        if not mount.destination.startswith("/"):
            warnings.append(
                f"mount destination {mount.destination} is not absolute. "
                "Support for non-absolute mount destinations will be removed in a future release."
            )
    linux = spec.linux
    namespaces: dict[str, str] = {}
    if linux is not None:
        _cgroup(linux, systemd_cgroup)
        for namespace in linux.namespaces:
            if namespace.type in namespaces:
                shown = f"{{{_quote(namespace.type)} {_quote(namespace.path)}}}"
                raise InvalidArgument(f"malformed spec file: duplicated ns {shown}")
            namespaces[namespace.type] = namespace.path
        _id_mappings(linux, namespaces)
        if linux.seccomp is not None:
            _seccomp(linux.seccomp)
        _resources(linux, warnings)
        _personality(linux, warnings)
        _net_devices(linux, namespaces, rootless)
    _uts(spec, namespaces)
    if linux is not None:
        if (linux.masked_paths or linux.readonly_paths) and "mount" not in namespaces:
            raise InvalidArgument("unable to restrict sys entries without a private MNT namespace")
        _namespaces(linux, namespaces)
        _sysctl(linux, namespaces, is_host_netns)
        _intel_rdt(linux)
        _devices(linux)
        if rootless:
            _rootless(spec, linux, namespaces)
    elif rootless:
        raise InvalidArgument("rootless container requires user namespaces")
    for index, mount in enumerate(spec.mounts):
        _mount(mount, f"mounts[{index}]", linux, namespaces, rootless, warnings)
    if linux is not None:
        _memory_policy(linux)
    _hooks(spec, warnings)
    return warnings


def validate_process(process: Process, path: str = "process") -> None:
    """Check a process by itself: that of the configuration, or one that joins (`path` is its place in the JSON).

    Raises InvalidArgument.
    """
    if not process.cwd:
        raise InvalidArgument("Cwd property must not be empty")
    if not process.cwd.startswith("/"):
        raise InvalidArgument("Cwd must be an absolute path")
    if not process.args:
        raise InvalidArgument("args must not be empty")
    for variable in process.env:
        name, equals, _ = variable.partition("=")
        if not equals:
            raise InvalidArgument("invalid environment variable: missing '='")
        if not name:
            raise InvalidArgument("invalid environment variable: name cannot be empty")
    seen = set()
    for index, limit in enumerate(process.rlimits):
        if limit.type in seen:
            raise InvalidArgument(f"{path}.rlimits[{index}].type: duplicated rlimit {limit.type}")
        seen.add(limit.type)
        if limit.soft > limit.hard:
            raise InvalidArgument(
                f"{path}.rlimits[{index}].soft: {limit.soft} is above the hard limit {limit.hard} of {limit.type}"
            )
    if process.oom_score_adj is not None and not -1000 <= process.oom_score_adj <= 1000:
        raise InvalidArgument(f"{path}.oomScoreAdj: expected an integer from -1000 to 1000, got {process.oom_score_adj}")
    _scheduler(process)
    priority = process.io_priority
    if priority is not None and not 0 <= priority.priority <= 7:
        raise InvalidArgument(f"invalid ioPriority.Priority: {priority.priority}")
    affinity = process.exec_cpu_affinity
    if affinity is not None:
        parse_list(affinity.initial, "bad CPUAffinity.Initial")
        parse_list(affinity.final, "bad CPUAffinity.Final")


def _version(version: str) -> None:
    """Any version of major 1: minor ones only add, and what they add is kept."""
    core, _, build = version.partition("+")
    numbers, _, pre = core.partition("-")
    parts = numbers.split(".")
    tags = [tag for tags in (build, pre) if tags for tag in tags.split(".")]
    if (
        len(parts) != 3
        or not all(part.isascii() and part.isdigit() and (part == "0" or part[0] != "0") for part in parts)
        or not all(tag and tag.isascii() and tag.replace("-", "a").isalnum() for tag in tags)
        or version.endswith(("+", "-"))
    ):
        raise InvalidArgument(f"ociVersion: {_quote(version)} is not a version as in semver.org")
    if parts[0] != "1":
        raise InvalidArgument(f"ociVersion: unsupported version {_quote(version)}", "this runtime reads 1.x")


def _scheduler(process: Process) -> None:
    scheduler = process.scheduler
    if scheduler is None:
        return
    policy = scheduler.policy
    if policy in ("SCHED_OTHER", "SCHED_BATCH") and not -20 <= scheduler.nice <= 19:
        raise InvalidArgument(f"invalid scheduler.nice: {scheduler.nice} when scheduler.policy is {policy}")
    if scheduler.priority != 0 and policy not in ("SCHED_FIFO", "SCHED_RR"):
        raise InvalidArgument("scheduler.priority can only be specified for SchedFIFO or SchedRR policy")
    if policy != "SCHED_DEADLINE" and (scheduler.runtime or scheduler.deadline or scheduler.period):
        raise InvalidArgument("scheduler runtime/deadline/period can only be specified for SchedDeadline policy")


def _cgroup(linux: Linux, systemd_cgroup: bool) -> None:
    if systemd_cgroup and linux.cgroups_path and linux.cgroups_path.count(":") != 2:
        raise InvalidArgument(
            'expected cgroupsPath to be of format "slice:prefix:name" for systemd cgroups, '
            f"got {_quote(linux.cgroups_path)} instead"
        )


def _id_mappings(linux: Linux, namespaces: dict[str, str]) -> None:
    joined = namespaces.get("user")
    if joined is None:
        if linux.uid_mappings or linux.gid_mappings:
            raise InvalidArgument(
                "user namespace mappings specified, but user namespace isn't enabled in the config"
            )
        return
    _ranges(linux.uid_mappings, "linux.uidMappings")
    _ranges(linux.gid_mappings, "linux.gidMappings")
    if joined:
        return  # whether mappings given as well are those of the namespace, only the machine can tell
    for kind, mappings in (("uid", linux.uid_mappings), ("gid", linux.gid_mappings)):
        if not mappings:
            raise InvalidArgument(f"user namespaces enabled, but no {kind} mappings found")
        if host_id(mappings, 0) is None:
            raise InvalidArgument(f"user namespaces enabled, but no mapping found for {kind} 0")


def _ranges(mappings: list[IDMapping], path: str) -> None:
    """What the kernel answers EINVAL to: too many ranges, empty ones, too long ones, overlaps (user_namespaces(7))."""
    if len(mappings) > MAX_MAPPINGS:
        raise InvalidArgument(f"{path}: {len(mappings)} mappings, the kernel takes {MAX_MAPPINGS}")
    for index, mapping in enumerate(mappings):
        if mapping.size == 0:
            raise InvalidArgument(f"{path}[{index}].size: must not be 0")
        for wire, first in (("containerID", mapping.container_id), ("hostID", mapping.host_id)):
            if first + mapping.size > 0xFFFFFFFF:
                raise InvalidArgument(
                    f"{path}[{index}]: {wire} {first} and size {mapping.size} reach beyond id 4294967294"
                )
    for wire, attribute in (("containerID", "container_id"), ("hostID", "host_id")):
        starts = sorted((getattr(mapping, attribute), index) for index, mapping in enumerate(mappings))
        for (first, before), (second, after) in pairwise(starts):
            if second < first + mappings[before].size:
                low, high = sorted((before, after))
                raise InvalidArgument(f"{path}[{high}]: the range of {wire} overlaps that of {path}[{low}]")


def host_id(mappings: list[IDMapping], inside: int) -> int | None:
    """The id on the host of the id `inside` a user namespace with these mappings; None when it has none."""
    for mapping in mappings:
        if mapping.container_id <= inside < mapping.container_id + mapping.size:
            return mapping.host_id + inside - mapping.container_id
    return None


def _seccomp(seccomp: Seccomp) -> None:
    if not seccomp.default_action:
        if seccomp.syscalls:
            raise InvalidArgument("linux.seccomp.defaultAction: string  is not a valid action for seccomp")
        return
    notify = seccomp.default_action == "SCMP_ACT_NOTIFY"
    for index, rule in enumerate(seccomp.syscalls):
        where = f"linux.seccomp.syscalls[{index}]"
        if "" in rule.names:
            raise InvalidArgument(f"{where}.names: empty string is not a valid syscall")
        for number, arg in enumerate(rule.args):
            if arg.index > 5:
                raise InvalidArgument(
                    f"{where}.args[{number}].index: syscalls only have up to 6 arguments ({arg.index} given)"
                )
        if rule.action == "SCMP_ACT_NOTIFY":
            notify = True
            if "write" in rule.names:
                # Init tells its parent the listener's number by write(2), when the filter already holds.
                raise InvalidArgument("SCMP_ACT_NOTIFY cannot be used for the write syscall")
    if seccomp.default_action == "SCMP_ACT_NOTIFY":
        raise InvalidArgument("SCMP_ACT_NOTIFY cannot be used as default action")
    if notify and not seccomp.listener_path:
        raise InvalidArgument("seccomp listenerPath is not set")
    if seccomp.listener_metadata and not seccomp.listener_path:
        raise InvalidArgument("linux.seccomp.listenerMetadata: must not be set without listenerPath")


def _resources(linux: Linux, warnings: list[str]) -> None:
    resources = linux.resources
    if resources is None:
        return
    for index, device in enumerate(resources.devices):
        if not device.access:
            raise InvalidArgument(f"device access at {index} field cannot be empty")
        if device.access.strip("rwm"):
            warnings.append(
                f"linux.resources.devices[{index}].access: expected letters of rwm, got {_quote(device.access)}"
            )
    memory = resources.memory
    if memory is not None and (memory.kernel is not None or memory.kernel_tcp is not None):
        warnings.append("Kernel memory settings are ignored and will be removed")
    for key in resources.unified:
        if "/" in key:
            raise InvalidArgument(f"unified resource {_quote(key)} must be a file name (no slashes)")
        if "." not in key.strip("."):
            raise InvalidArgument(f"unified resource {_quote(key)} must be in the form CONTROLLER.PARAMETER")
    for index, limit in enumerate(resources.hugepage_limits):
        if not limit.page_size or "/" in limit.page_size:  # it becomes part of a file name
            raise InvalidArgument(
                f"linux.resources.hugepageLimits[{index}].pageSize: expected a size as in 2MB, "
                f"got {_quote(limit.page_size)}"
            )


def _personality(linux: Linux, warnings: list[str]) -> None:
    if linux.personality is not None and linux.personality.flags:
        shown = " ".join(linux.personality.flags)
        warnings.append(
            f"ignoring unsupported personality flags: [{shown}] "
            "because personality flag has not supported at this time"
        )


def _net_devices(linux: Linux, namespaces: dict[str, str], rootless: bool) -> None:
    if not linux.net_devices:
        return
    if "network" not in namespaces:
        raise InvalidArgument("unable to move network devices without a NET namespace")
    if rootless:
        raise InvalidArgument("network devices are not supported for rootless containers")
    targets = set()
    for name, device in linux.net_devices.items():
        for candidate in (name, device.name or name):
            # The kernel's rule (dev_valid_name), with room for the terminating zero in IFNAMSIZ.
            size = len(candidate.encode())
            if not 0 < size < 16 or candidate in (".", "..") or any(c in "/:" or c.isspace() for c in candidate):
                raise InvalidArgument(f"invalid network device name {_quote(candidate)}")
        target = device.name or name
        if target in targets:
            raise InvalidArgument(f"linux.netDevices: two devices would be named {_quote(target)}")
        targets.add(target)


def _uts(spec: Spec, namespaces: dict[str, str]) -> None:
    for kind, value in (("hostname", spec.hostname), ("domainname", spec.domainname)):
        if value and "uts" not in namespaces:
            raise InvalidArgument(f"unable to set {kind} without a private UTS namespace")
        if len(value.encode()) > 64:
            raise InvalidArgument(f"{kind}: longer than 64 bytes")


def _namespaces(linux: Linux, namespaces: dict[str, str]) -> None:
    if not linux.time_offsets:
        return
    if "time" not in namespaces:
        raise InvalidArgument("time namespace offsets specified, but time namespace isn't enabled in the config")
    if namespaces["time"]:
        raise InvalidArgument(
            "time namespace enabled, but both namespace path and time offsets specified"
            " -- you may only provide one"
        )
    for clock, offset in linux.time_offsets.items():
        if clock not in ("monotonic", "boottime"):
            raise InvalidArgument(f"linux.timeOffsets: unknown clock {_quote(clock)} (one of boottime, monotonic)")
        if offset.nanosecs >= 1_000_000_000:
            raise InvalidArgument(
                f"linux.timeOffsets.{clock}.nanosecs: expected an integer from 0 to 999999999, got {offset.nanosecs}"
            )


def dotted_sysctl(name: str) -> str:
    """`net/ipv4/conf/eno2.100/rp_filter` as `net.ipv4.conf.eno2/100.rp_filter`: the first separator tells which."""
    for letter in name:
        if letter == ".":
            return name
        if letter == "/":
            return name.translate({46: "/", 47: "."})
    return name


def sysctl_path(name: str) -> str:
    """The file below /proc/sys for a key in either notation."""
    return dotted_sysctl(name).translate({46: "/", 47: "."})


def _sysctl(linux: Linux, namespaces: dict[str, str], is_host_netns: Callable[[str], bool] | None) -> None:
    host_net: bool | None = None
    for key in linux.sysctl:
        name = dotted_sysctl(key)
        if not {"", ".", ".."}.isdisjoint(sysctl_path(key).split("/")):
            # net/../kernel/core_pattern begins as if it were the network namespace's.
            raise InvalidArgument(f"sysctl {_quote(key)} is not in a separate kernel namespace")
        if name in _IPC_SYSCTLS or name.startswith("fs.mqueue."):
            if "ipc" not in namespaces:
                raise InvalidArgument(f"sysctl {_quote(name)} is not allowed in the hosts ipc namespace")
        elif name.startswith("net."):
            if host_net is None:
                path = namespaces.get("network")
                host_net = path is None or bool(path and is_host_netns is not None and is_host_netns(path))
            if host_net:
                raise InvalidArgument(f"sysctl {_quote(name)} not allowed in host network namespace")
        elif name == "kernel.domainname" and "uts" in namespaces:
            pass  # the specification has no field of its own for the value that the kernel shows here
        elif name == "kernel.hostname" and "uts" in namespaces:
            raise InvalidArgument(f'sysctl {_quote(name)} is not allowed as it conflicts with the OCI "hostname" field')
        elif name.startswith("user."):
            # In the first user namespace these are limits of the whole machine.
            if "user" not in namespaces:
                raise InvalidArgument(f"setting ucounts without a user namespace not allowed: {name}")
        else:
            raise InvalidArgument(f"sysctl {_quote(name)} is not in a separate kernel namespace")


def _intel_rdt(linux: Linux) -> None:
    if linux.intel_rdt is None:
        return
    clos = linux.intel_rdt.clos_id
    if clos in (".", "..") or (len(clos) > 1 and "/" in clos):  # "/" alone is the default class
        raise InvalidArgument(f"invalid intelRdt.ClosID {_quote(clos)}")


def _devices(linux: Linux) -> None:
    for index, device in enumerate(linux.devices):
        # mknod(2) takes 12 bits of major and 20 bits of minor; -1 is any in device rules, and no device.
        if device.type != "p" and not (0 <= device.major < 1 << 12 and 0 <= device.minor < 1 << 20):
            raise InvalidArgument(
                f"linux.devices[{index}]: {device.major}:{device.minor} is not the number of a device"
            )


def _rootless(spec: Spec, linux: Linux, namespaces: dict[str, str]) -> None:
    if "user" not in namespaces:
        raise InvalidArgument("rootless container requires user namespaces")
    if namespaces["user"]:
        return  # the mappings are those of the namespace that is joined
    if not linux.uid_mappings:
        raise InvalidArgument("rootless containers requires at least one UID mapping")
    if not linux.gid_mappings:
        raise InvalidArgument("rootless containers requires at least one GID mapping")
    for mount in spec.mounts:
        for options in mount.options:
            for option in options.split(","):
                kind, equals, number = option.partition("=")
                if not equals or kind not in ("uid", "gid") or not (number.isascii() and number.isdigit()):
                    continue
                mappings = linux.uid_mappings if kind == "uid" else linux.gid_mappings
                if host_id(mappings, int(number)) is None:
                    raise InvalidArgument(
                        f"cannot specify {option} mount option for rootless container: "
                        f"user namespaces enabled, but no mapping found for {kind} {number}"
                    )


def _mount(
    mount: Mount, path: str, linux: Linux | None, namespaces: dict[str, str], rootless: bool, warnings: list[str]
) -> None:
    def refuse(rule: str) -> InvalidArgument:
        return InvalidArgument(f"invalid mount {mount.destination}: {rule}", path)

    bind = "bind" in mount.options or "rbind" in mount.options
    if bind and not MOUNT_OPTIONS.issuperset(mount.options):
        # They have no effect: a bind mount shows a superblock that has its options already. runc refuses, crun ignores, and
        # the validation programs of runtime-tools have such a mount.
        extra = ", ".join(o for o in mount.options if o not in MOUNT_OPTIONS)
        warnings.append(f"mount {mount.destination}: bind mounts cannot have filesystem-specific options, ignored: {extra}")
    mapped = bool(mount.uid_mappings or mount.gid_mappings)
    if not mapped and "idmap" not in mount.options and "ridmap" not in mount.options:
        return
    if not bind:
        raise refuse("id-mapped mounts are only supported for bind-mounts")
    if rootless:
        raise refuse("id-mapped mounts are not supported for rootless containers")
    if mapped:
        uids, gids = mount.uid_mappings, mount.gid_mappings
    elif namespaces.get("user"):
        return  # mapped as the user namespace that is joined
    else:
        uids = linux.uid_mappings if linux is not None else []
        gids = linux.gid_mappings if linux is not None else []
    if not uids or not gids:
        raise refuse("id-mapped mounts must have both uid and gid mappings specified")
    _ranges(uids, f"{path}.uidMappings")
    _ranges(gids, f"{path}.gidMappings")


def _memory_policy(linux: Linux) -> None:
    policy = linux.memory_policy
    if policy is None:
        return
    nodes = len(parse_list(policy.nodes, f"invalid memory policy nodes {_quote(policy.nodes)}"))
    if policy.mode in ("MPOL_DEFAULT", "MPOL_LOCAL"):
        if nodes:
            raise InvalidArgument(f"memory policy mode requires 0 nodes but got {nodes}")
    elif policy.mode != "MPOL_PREFERRED" and not nodes:
        raise InvalidArgument("memory policy mode requires at least one node but got 0")


def parse_list(text: str, what: str) -> set[int]:
    """The numbers in a list of CPUs or memory nodes as "0-3, 7"; "" is the empty set.

    Raises InvalidArgument that begins with `what`; a list without a number in it is an error.
    """
    numbers: set[int] = set()
    if not text:
        return numbers
    for part in text.split(","):
        part = part.strip()
        if not part:
            continue
        first, dash, last = part.partition("-")
        low = _number(first, what)
        high = _number(last, what) if dash else low
        if low > high:
            raise InvalidArgument(f"{what}: invalid range: {part}")
        numbers.update(range(low, high + 1))
    if not numbers:
        raise InvalidArgument(f"{what}: no members found in set {_quote(text)}")
    return numbers


def _number(text: str, what: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise InvalidArgument(f"{what}: parsing {_quote(text)}: invalid syntax")
    if len(text) > 10 or int(text) > MAX_CPU:
        raise InvalidArgument(f"{what}: values larger than {MAX_CPU} are not supported")
    return int(text)


def _hooks(spec: Spec, warnings: list[str]) -> None:
    hooks = spec.hooks
    if hooks is None:
        return
    for kind, entries in (
        ("prestart", hooks.prestart), ("createRuntime", hooks.create_runtime),
        ("createContainer", hooks.create_container), ("startContainer", hooks.start_container),
        ("poststart", hooks.poststart), ("poststop", hooks.poststop),
    ):
        for index, hook in enumerate(entries):
            if hook.timeout is not None and hook.timeout <= 0:
                raise InvalidArgument(f"hooks.{kind}[{index}].timeout: must be greater than zero, got {hook.timeout}")
            if not hook.path.startswith("/"):
                warnings.append(f"hooks.{kind}[{index}].path: {hook.path} is not absolute")
