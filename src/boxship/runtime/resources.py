"""`linux.resources` of config.json, and of `update`, as limits of a control group.

Runs in: the runtime.
Spec: runtime-spec 1.3.0, config-linux.md "Control groups"; which devices every container may use is runc's list.
"""

from __future__ import annotations

from boxship.kit.errors import FailedPrecondition, InvalidArgument, Unsupported
from boxship.linux.cgroups.limits import ANY, DeviceRule, Limits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from boxship.oci.config import BlockIO, CgroupDevice, Resources, ThrottleDevice
    from boxship.runtime.state import Container

# (path of the node or "", rule). The nodes themselves: boxship.runtime.rootfs.
_DEFAULT_DEVICES = (
    ("", ("c", ANY, ANY, "m")), ("", ("b", ANY, ANY, "m")),  # making a node opens nothing
    ("/dev/null", ("c", 1, 3, "rwm")), ("/dev/random", ("c", 1, 8, "rwm")), ("/dev/full", ("c", 1, 7, "rwm")),
    ("/dev/tty", ("c", 5, 0, "rwm")), ("/dev/zero", ("c", 1, 5, "rwm")), ("/dev/urandom", ("c", 1, 9, "rwm")),
    ("", ("c", 136, ANY, "rwm")), ("", ("c", 5, 2, "rwm")),  # /dev/pts/*, /dev/ptmx
    ("", ("c", 10, 200, "rwm")),  # /dev/net/tun: removing it broke too many users
)


def device_rules(rules: list[CgroupDevice], node_paths: Iterable[str] = ()) -> list[DeviceRule]:
    """The rules of config.json in their order, then those that every container needs.

    The latter come last because a list usually begins with "deny all", and the defaults would be lost before it. A default
    is left out when config.json makes that node itself (`node_paths`): then its own rules count.
    """
    result = []
    for position, rule in enumerate(rules):
        if not rule.access:
            raise InvalidArgument(f"device access at {position} field cannot be empty")
        kind = "c" if rule.type == "u" else rule.type or "a"
        if kind not in ("a", "b", "c"):
            raise InvalidArgument(f'invalid cgroup device type "{kind}"')
        major = ANY if rule.major is None else rule.major
        minor = ANY if rule.minor is None else rule.minor
        result.append(DeviceRule(rule.allow, kind, major, minor, rule.access))
    own = set(node_paths)
    for path, (kind, major, minor, access) in _DEFAULT_DEVICES:
        if not path or path not in own:
            result.append(DeviceRule(True, kind, major, minor, access))
    return result


def limits(resources: Resources | None, *, devices: bool = True, node_paths: Iterable[str] = ()) -> Limits:
    """The limits that `resources` asks for. Without `devices` (an update) the device rules stay as they are.

    Raises InvalidArgument.
    """
    result = Limits()
    if devices:
        result.devices = device_rules(resources.devices if resources else [], node_paths)
    if resources is None:
        return result
    memory, cpu, network = resources.memory, resources.cpu, resources.network
    if memory is not None:
        result.memory_limit = memory.limit
        result.memory_reservation = memory.reservation
        result.memory_swap = memory.swap
        result.memory_kernel = memory.kernel
        result.memory_kernel_tcp = memory.kernel_tcp
        result.memory_swappiness = memory.swappiness
        result.memory_disable_oom_killer = memory.disable_oom_killer
        result.memory_use_hierarchy = memory.use_hierarchy
        result.memory_check_before_update = memory.check_before_update
    if cpu is not None:
        result.cpu_shares = cpu.shares
        result.cpu_quota = cpu.quota
        result.cpu_burst = cpu.burst
        result.cpu_period = cpu.period
        result.cpu_realtime_runtime = cpu.realtime_runtime
        result.cpu_realtime_period = cpu.realtime_period
        result.cpu_cpus = cpu.cpus
        result.cpu_mems = cpu.mems
        result.cpu_idle = cpu.idle
    if resources.pids is not None:
        result.pids_limit = resources.pids.limit
    if resources.block_io is not None:
        _block_io(resources.block_io, result)
    result.hugepages = [(limit.page_size, limit.limit) for limit in resources.hugepage_limits]
    if network is not None:
        result.net_classid = network.class_id
        result.net_priorities = [(priority.name, priority.priority) for priority in network.priorities]
    result.rdma = {name: (limit.hca_handles, limit.hca_objects) for name, limit in resources.rdma.items()}
    result.unified = dict(resources.unified)
    return result


def _block_io(block_io: BlockIO, result: Limits) -> None:
    def rates(devices: list[ThrottleDevice]) -> list[tuple[int, int, int]]:
        return [(device.major, device.minor, device.rate) for device in devices]

    result.blkio_weight = block_io.weight
    result.blkio_leaf_weight = block_io.leaf_weight
    result.blkio_weight_device = [
        (device.major, device.minor, device.weight, device.leaf_weight) for device in block_io.weight_device
    ]
    result.blkio_throttle_read_bps = rates(block_io.throttle_read_bps_device)
    result.blkio_throttle_write_bps = rates(block_io.throttle_write_bps_device)
    result.blkio_throttle_read_iops = rates(block_io.throttle_read_iops_device)
    result.blkio_throttle_write_iops = rates(block_io.throttle_write_iops_device)


def warnings(resources: Resources | None) -> list[str]:
    """What the user should know about settings that have no effect."""
    memory = resources.memory if resources is not None else None
    if memory is not None and (memory.kernel is not None or memory.kernel_tcp is not None):
        return ["Kernel memory settings are ignored and will be removed"]
    return []


# --- update ----------------------------------------------------------------------------------------------------------

# flag: (member of LinuxResources, its member, how the text is read)
_UPDATE_FLAGS = {
    "blkio-weight": ("blockIO", "weight", "int"), "cpu-period": ("cpu", "period", "uint"), "cpu-quota": ("cpu", "quota", "int"),
    "cpu-burst": ("cpu", "burst", "uint"), "cpu-share": ("cpu", "shares", "uint"),
    "cpu-rt-period": ("cpu", "realtimePeriod", "uint"), "cpu-rt-runtime": ("cpu", "realtimeRuntime", "int"),
    "cpu-idle": ("cpu", "idle", "int"), "cpuset-cpus": ("cpu", "cpus", ""), "cpuset-mems": ("cpu", "mems", ""),
    "memory": ("memory", "limit", "size"), "memory-swap": ("memory", "swap", "size"),
    "memory-reservation": ("memory", "reservation", "size"), "kernel-memory": ("memory", "kernel", "size"),
    "kernel-memory-tcp": ("memory", "kernelTCP", "size"), "pids-limit": ("pids", "limit", "int"),
}
_UNITS = "bkmgtp"


def ram_in_bytes(text: str) -> int:
    """Bytes for "64m", "1.5 GiB" and the like: powers of 1024, as docker's and runc's flags take them. Raises InvalidArgument."""
    number = text.rstrip("bBiIkKmMgGtTpP")
    suffix = text[len(number) :].lower()
    number = number.removesuffix(" ") if suffix else number
    unit = suffix[:1] or "b"
    if suffix not in ("", unit, unit + "b", unit + "ib") or suffix in ("bb", "bib") or unit not in _UNITS:
        raise InvalidArgument(f"invalid suffix: '{suffix}'")
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if not number[:1].isdecimal() or not 0 <= value < 2**63:
        raise InvalidArgument(f"invalid size: '{text}'")
    return int(value * 1024 ** _UNITS.index(unit))


def _number(text: str, *, signed: bool) -> int:
    digits = text[1:] if text[:1] == "+" or (signed and text[:1] == "-") else text
    function = "ParseInt" if signed else "ParseUint"
    if not (digits.isascii() and digits.isdecimal()):
        raise InvalidArgument(f'strconv.{function}: parsing "{text}": invalid syntax')
    value = int(text)
    if not (-(1 << 63) <= value < 1 << 63 if signed else value < 1 << 64):
        raise InvalidArgument(f'strconv.{function}: parsing "{text}": value out of range')
    return value


def resources_from_flags(values: Mapping[str, object]) -> dict[str, object]:
    """The LinuxResources object for the flags of `update` that were given. Raises InvalidArgument, Unsupported."""
    change: dict[str, object] = {}
    for flag, given in values.items():
        if flag in ("l3-cache-schema", "mem-bw-schema") and given:
            raise Unsupported(
                "Intel RDT/CAT: l3 cache schema is not enabled" if flag == "l3-cache-schema"
                else "Intel RDT/MBA: memory bandwidth schema is not enabled"
            )
        if flag not in _UPDATE_FLAGS:
            continue
        group, member, kind = _UPDATE_FLAGS[flag]
        value = given
        if isinstance(given, str):
            if not given:
                continue
            try:
                if kind == "size":
                    value = -1 if given == "-1" else ram_in_bytes(given)
                elif kind:
                    value = _number(given, signed=kind == "int")
            except InvalidArgument as error:
                raise InvalidArgument(f"invalid value for {flag}: {error}") from None
        elif flag == "blkio-weight" and not given:
            continue
        members = change.setdefault(group, {})
        assert isinstance(members, dict)
        members[member] = value
    return change


def update_limits(container: Container, change: dict[str, object]) -> None:
    """Carry out `update`: set what `change` (a LinuxResources object) names, and leave the rest. Device rules do not change.

    Raises BoxshipError, naming the file that was refused.
    """
    from boxship.oci.config import Resources

    resources = Resources.decode(change, "")
    cgroup = container.control_group()
    if cgroup is None:
        raise FailedPrecondition("cgroup not exist")
    for warning in warnings(resources):
        container.context.warn(warning)
    cgroup.apply(limits(resources, devices=False))
