"""`linux.resources` of config.json, and of `update`, as limits of a control group.

Runs in: the runtime.
Spec: runtime-spec 1.3.0, config-linux.md "Control groups"; which devices every container may use is runc's list.
"""

from __future__ import annotations

from boxship.kit.errors import FailedPrecondition, InvalidArgument
from boxship.linux.cgroups.limits import ANY, DeviceRule, Limits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

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


# What is called the same in the configuration and in `Limits`, where a prefix says of what.
_SAME_NAMES = {
    prefix: tuple(name.removeprefix(prefix) for name in Limits.__slots__ if name.startswith(prefix))
    for prefix in ("memory_", "cpu_")
}


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
    for prefix, group in (("memory_", resources.memory), ("cpu_", resources.cpu)):
        if group is not None:
            for name in _SAME_NAMES[prefix]:
                setattr(result, prefix + name, getattr(group, name))
    if resources.pids is not None:
        result.pids_limit = resources.pids.limit
    if resources.block_io is not None:
        _block_io(resources.block_io, result)
    result.hugepages = [(limit.page_size, limit.limit) for limit in resources.hugepage_limits]
    if resources.network is not None:
        result.net_classid = resources.network.class_id
        result.net_priorities = [(priority.name, priority.priority) for priority in resources.network.priorities]
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
