"""Control groups that systemd makes: a transient scope (or slice) for each container.

Runs in: the runtime. systemd owns the hierarchy then; what it has no property for is written to the files as without it.
Spec: org.freedesktop.systemd1(5), systemd.resource-control(5), https://systemd.io/CGROUP_DELEGATION. Properties, and from
which version of systemd on they are used: runc's.

A scope exists by having processes, so the group comes to be by `add` of the first one.
"""

from __future__ import annotations

import os

from boxship.kit.errors import BoxshipError, InvalidArgument, Unsupported
from boxship.linux.cgroups.arrangement import CONTROLLERS, arrangement, not_mounted
from boxship.linux.cgroups.devices import Policy, access_text, reduce_rules
from boxship.linux.cgroups.files import explain
from boxship.linux.cgroups.group import Cgroup, clean
from boxship.linux.cgroups.limits import ANY, Limits, bitmap, cpu_weight
from boxship.linux.cgroups.v1 import UNIFIED, V1Group
from boxship.linux.cgroups.v2 import V2Group
from boxship.linux.dbus import CallError, Connection, Variant, connect_systemd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    Property = tuple[str, Variant]

_INFINITY = (1 << 64) - 1
_DEFAULT_PERIOD = 100000
_NAME, _OBJECT = "org.freedesktop.systemd1", "/org/freedesktop/systemd1"
_MANAGER = "org.freedesktop.systemd1.Manager"
PREFIX = "boxrun"
"""Of the names of scopes for which no cgroupsPath is given."""


# --- names -----------------------------------------------------------------------------------------------------------


class Unit:
    """A scope or slice by name.

    Attributes:
        name: "prefix-id.scope", or the id itself when it is a slice.
        slice: the slice that it is in.
        title: the container's id.
        user: whether it is the user's own systemd that runs it.
    """

    __slots__ = ("name", "slice", "title", "user")

    def __init__(self, name: str, slice_name: str, title: str, *, user: bool) -> None:
        self.name = name
        self.slice = slice_name
        self.title = title
        self.user = user


def parse_path(cgroups_path: str, container_id: str, *, user: bool) -> Unit:
    """The unit for "slice:prefix:name", or the default one. Raises InvalidArgument."""
    parent, prefix, title = "", PREFIX, container_id
    if cgroups_path:
        parts = cgroups_path.split(":")
        if len(parts) != 3:
            raise InvalidArgument(
                'expected cgroupsPath to be of format "slice:prefix:name" for systemd cgroups, '
                f'got "{cgroups_path}" instead'
            )
        parent, prefix, title = parts
    name = title if title.endswith(".slice") else f"{prefix}-{title}.scope"
    if "/" in name or "\0" in name:
        raise InvalidArgument(f'invalid unit name: "{name}"')
    return Unit(name, parent or ("user.slice" if user else "system.slice"), title, user=user)


def expand_slice(name: str) -> str:
    """The path of a slice: "a-b.slice" lies in "/a.slice/a-b.slice". Raises InvalidArgument."""
    stem = name.removesuffix(".slice")
    if stem == name or "/" in name:
        raise InvalidArgument(f"invalid slice name: {name}")
    if stem == "-":
        return "/"
    path = prefix = ""
    for part in stem.split("-"):
        if not part:
            raise InvalidArgument(f"invalid slice name: {name}")
        path += f"/{prefix}{part}.slice"
        prefix += part + "-"
    return path


def plan_unit(cgroups_path: str, container_id: str, *, rootless: bool, environ: Mapping[str, str] | None = None) -> Cgroup:
    """`Cgroup.plan` for this driver."""
    unit = parse_path(cgroups_path, container_id, user=rootless)
    machine = arrangement()
    place = expand_slice(unit.slice)
    if not machine.pure_v2:
        if rootless:
            raise Unsupported("cannot use rootless systemd cgroups manager on cgroup v1")
        if "devices" not in machine.by_controller:
            raise not_mounted("devices")
        inner = clean(f"{place}/{unit.name}")
        paths = {
            name: machine.by_controller[name].mountpoint + inner for name in CONTROLLERS if name in machine.by_controller
        }
        if machine.unified:
            paths[UNIFIED] = machine.unified + inner
        return SystemdV1(paths, unit)
    if rootless:
        # For example /user.slice/user-1000.slice/user@1000.service; the Slice property does without it.
        with connect_systemd(user=True, environ=environ) as bus:
            place = str(manager_property(bus, "ControlGroup")) + place
    group = SystemdV2(machine.unified + clean(f"/{place}/{unit.name}"), unit, rootless=rootless)
    group.environ = environ
    return group


def decode_unit(record: dict[str, object]) -> Cgroup:
    """`Cgroup.decode` for this driver."""
    paths: dict[str, str] = record["paths"]  # type: ignore[assignment]
    name, slice_name, title = str(record["unit"]), str(record["slice"]), str(record["title"])
    rootless = bool(record["rootless"])
    unit = Unit(name, slice_name, title, user=rootless)
    if record["version"] == 2:
        return SystemdV2(paths[UNIFIED], unit, rootless=rootless)
    return SystemdV1(paths, unit)


# --- systemd's methods -----------------------------------------------------------------------------------------------


def manager_property(bus: Connection, name: str) -> object:
    """A property of systemd itself."""
    (variant,) = bus.call(_NAME, _OBJECT, "org.freedesktop.DBus.Properties", "Get", "ss", _MANAGER, name)
    assert isinstance(variant, Variant)
    return variant.value


def parse_version(text: str) -> int:
    """The number in "v245.4-1.fc32", "252.22-1~deb12u1" and the like; -1 without."""
    digits = ""
    for char in text.lstrip('"v'):
        if not char.isdecimal():
            break
        digits += char
    return int(digits or -1)


_version = 0


def version(bus: Connection) -> int:
    """systemd's version, asked once."""
    global _version
    if not _version:
        _version = parse_version(str(manager_property(bus, "Version")))
    return _version


def _run_job(bus: Connection, method: str, signature: str, *values: object) -> str:
    """Start a job and wait for its end; returns its result."""
    if not bus.direct:
        rule = f"type='signal',interface='{_MANAGER}',member='JobRemoved'"
        bus.call("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "AddMatch", "s", rule)
        bus.call(_NAME, _OBJECT, _MANAGER, "Subscribe")
    (job,) = bus.call(_NAME, _OBJECT, _MANAGER, method, signature, *values)
    return str(bus.wait_signal("JobRemoved", 1, job).body[3])


def start_unit(bus: Connection, unit: str, properties: list[Property]) -> None:
    """StartTransientUnit. A failed unit of the same name is cleared away first. Raises BoxshipError."""
    for attempt in (0, 1):
        try:
            result = _run_job(bus, "StartTransientUnit", "ssa(sv)a(sa(sv))", unit, "replace", properties, [])
            break
        except CallError as error:
            if error.name != "org.freedesktop.systemd1.UnitExists" or attempt:
                raise BoxshipError(f'unable to start unit "{unit}": {error}') from None
            reset_failed(bus, unit)
    if result != "done":
        reset_failed(bus, unit)
        raise BoxshipError(f"error creating systemd unit `{unit}`: got `{result}`")


def stop_unit(bus: Connection, unit: str) -> None:
    """StopUnit and ResetFailedUnit; a unit that is not there is no error."""
    try:
        _run_job(bus, "StopUnit", "ss", unit, "replace")
    except CallError:
        pass
    reset_failed(bus, unit)


def reset_failed(bus: Connection, unit: str) -> None:
    """ResetFailedUnit, so that systemd forgets the unit."""
    try:
        bus.call(_NAME, _OBJECT, _MANAGER, "ResetFailedUnit", "s", unit)
    except CallError:
        pass


def set_properties(bus: Connection, unit: str, properties: list[Property]) -> None:
    """SetUnitProperties, until the next boot only. Raises BoxshipError."""
    if not properties:
        return
    try:
        bus.call(_NAME, _OBJECT, _MANAGER, "SetUnitProperties", "sba(sv)", unit, True, properties)
    except CallError as error:
        raise BoxshipError(f"unable to set unit properties: {error}") from None


def attach(bus: Connection, unit: str, pid: int) -> None:
    """AttachProcessesToUnit: for a user whose own write the kernel would refuse."""
    try:
        bus.call(_NAME, _OBJECT, _MANAGER, "AttachProcessesToUnit", "ssau", unit, "/", [pid])
    except CallError as error:
        raise BoxshipError(str(error)) from None


# --- properties ------------------------------------------------------------------------------------------------------


def unit_properties(unit: Unit, pid: int, *, io: str, further: list[tuple[str, str, object]]) -> list[Property]:
    """Properties of a new unit with its first process; `io` names the accounting of block I/O ("IO", v1: "BlockIO")."""
    properties = [("Description", Variant("s", f"{PREFIX} container {unit.title}"))]
    if unit.name.endswith(".slice"):
        properties.append(("Wants", Variant("as", [unit.slice])))
    else:
        properties += [("Slice", Variant("s", unit.slice)), ("Delegate", Variant("b", True))]
    properties.append(("PIDs", Variant("au", [pid])))
    properties += [(f"{name}Accounting", Variant("b", True)) for name in ("Memory", "CPU", io, "Tasks")]
    properties.append(("DefaultDependencies", Variant("b", False)))
    properties += [(name, Variant(signature, value)) for name, signature, value in further]
    return properties


def device_properties(policy: Policy, systemd_version: int) -> list[Property]:
    """DevicePolicy and DeviceAllow; what systemd cannot express is in the files, or in our own BPF program, all the same."""
    properties = [("DeviceAllow", Variant("a(ss)", [])), ("DevicePolicy", Variant("s", "strict"))]
    if policy.allow:
        if not policy.exceptions:
            properties[1] = ("DevicePolicy", Variant("s", "auto"))
        return properties
    allowed = []
    for (kind, major, minor), bits in policy.exceptions.items():
        folder = "block" if kind == "b" else "char"
        if major == ANY:
            if minor != ANY:
                continue
            path = f"{folder}-*"
        elif minor == ANY:
            path = f"{folder}-{major}" if systemd_version >= 240 else _device_group(folder, major)
        else:
            path = f"/dev/{folder}/{major}:{minor}"
            if systemd_version < 240 and not os.path.exists(path):
                continue
        if path:
            allowed.append((path, access_text(bits)))
    properties.append(("DeviceAllow", Variant("a(ss)", allowed)))
    return properties


def _device_group(folder: str, major: int) -> str:
    """The name of a driver in /proc/devices, as systemd before 240 wants it; "" without."""
    with open("/proc/devices") as opened:
        section = ""
        for line in opened:
            words = line.split()
            if line.endswith("devices:\n"):
                section = "char" if words[0] == "Character" else "block"
            elif section == folder and words[:1] == [str(major)]:
                return f"{folder}-{words[1]}"
    return ""


def cpu_quota(quota: int, period: int, systemd_version: int) -> tuple[list[Property], int]:
    """Properties for a quota, and the quota as systemd rounds it: up to a whole percent of a CPU. 0 is unset."""
    properties = []
    if period and systemd_version >= 242:
        properties.append(("CPUQuotaPeriodUSec", Variant("t", period)))
    if quota or period:
        per_second = _INFINITY
        if quota > 0:
            period = period or _DEFAULT_PERIOD
            per_second = quota * 1000000 // period
            if per_second % 10000:
                per_second = (per_second // 10000 + 1) * 10000
                quota = per_second * period // 1000000
        properties.append(("CPUQuotaPerSecUSec", Variant("t", per_second)))
    return properties, quota


def _tasks_max(limit: int) -> list[Property]:
    return [("TasksMax", Variant("t", _INFINITY if limit < 0 else limit or 1))]


def _cpuset(limits: Limits, systemd_version: int) -> list[Property]:
    properties = []
    if systemd_version >= 244:
        for name, ranges in (("AllowedCPUs", limits.cpu_cpus), ("AllowedMemoryNodes", limits.cpu_mems)):
            if ranges:
                try:
                    properties.append((name, Variant("ay", bitmap(ranges))))
                except InvalidArgument as error:
                    what = "Cpus" if name == "AllowedCPUs" else "Mems"
                    raise InvalidArgument(f'resources.CPU.{what}="{ranges}" conversion error: {error}') from None
    return properties


def limit_properties_v1(limits: Limits, systemd_version: int) -> tuple[list[Property], int]:
    """Limits as properties, for v1, and the CPU quota after rounding."""
    properties: list[Property] = []
    if limits.devices is not None:
        properties += device_properties(reduce_rules(limits.devices), systemd_version)
    if limits.memory_limit:
        properties.append(("MemoryLimit", Variant("t", limits.memory_limit & _INFINITY)))
    if limits.cpu_shares:
        properties.append(("CPUShares", Variant("t", limits.cpu_shares)))
    more, quota = cpu_quota(limits.cpu_quota or 0, limits.cpu_period or 0, systemd_version)
    properties += more
    if limits.blkio_weight:
        properties.append(("BlockIOWeight", Variant("t", limits.blkio_weight)))
    if limits.pids_limit is not None:
        properties += _tasks_max(limits.pids_limit)
    return properties + _cpuset(limits, systemd_version), quota


def limit_properties_v2(limits: Limits, systemd_version: int, swap: int) -> tuple[list[Property], int]:
    """Limits as properties, for v2, and the CPU quota after rounding; `swap` is that of v2, 0 for unset."""
    properties: list[Property] = []
    if limits.devices is not None:
        try:
            policy = reduce_rules(limits.devices)
        except InvalidArgument:
            policy = Policy(True)  # a hole in a wildcard: our own program has it
        properties += device_properties(policy, systemd_version)
    if limits.memory_limit:
        properties.append(("MemoryMax", Variant("t", limits.memory_limit & _INFINITY)))
    if limits.memory_reservation:
        properties.append(("MemoryLow", Variant("t", limits.memory_reservation & _INFINITY)))
    if swap:
        properties.append(("MemorySwapMax", Variant("t", swap & _INFINITY)))
    # A CPUWeight of 0 means cpu.idle.
    idle = limits.cpu_idle == 1 and systemd_version >= 252
    if idle:
        properties.append(("CPUWeight", Variant("t", 0)))
    elif limits.cpu_shares:
        properties.append(("CPUWeight", Variant("t", cpu_weight(limits.cpu_shares))))
    more, quota = cpu_quota(limits.cpu_quota or 0, limits.cpu_period or 0, systemd_version)
    properties += more
    if limits.pids_limit is not None:
        properties += _tasks_max(limits.pids_limit)
    properties += _cpuset(limits, systemd_version)
    return properties + unified_properties(limits.unified, systemd_version), quota


_UNIFIED_SIZES = {
    "memory.high": "MemoryHigh", "memory.low": "MemoryLow", "memory.min": "MemoryMin", "memory.max": "MemoryMax",
    "memory.swap.max": "MemorySwapMax", "pids.max": "TasksMax",
}


def unified_properties(unified: dict[str, str], systemd_version: int) -> list[Property]:
    """v2 files as properties, where systemd has one; the files are written afterwards in any case. Raises InvalidArgument."""
    properties: list[Property] = []
    idle = unified.get("cpu.idle", "").strip() == "1" and systemd_version >= 252
    for name, value in unified.items():
        if "/" in name:
            raise InvalidArgument(f'unified resource "{name}" must be a file name (no slashes)')
        if name.find(".") <= 0:
            raise InvalidArgument(f'unified resource "{name}" must be in the form CONTROLLER.PARAMETER')
        value = value.strip()
        try:
            if name == "cpu.idle":
                if idle:
                    properties.append(("CPUWeight", Variant("t", 0)))
            elif name == "cpu.max":
                words = value.split()
                if len(words) not in (1, 2):
                    raise InvalidArgument(f'unified resource "{name}" value invalid: "{value}"')
                quota = 0 if words[0] == "max" else int(words[0])
                properties += cpu_quota(quota, int(words[1]) if len(words) > 1 else _DEFAULT_PERIOD, systemd_version)[0]
            elif name == "cpu.weight":
                if not idle:
                    properties.append(("CPUWeight", Variant("t", int(value))))
            elif name in ("cpuset.cpus", "cpuset.mems"):
                bits = bitmap(value)
                if systemd_version >= 244:
                    key = "AllowedCPUs" if name == "cpuset.cpus" else "AllowedMemoryNodes"
                    properties.append((key, Variant("ay", bits)))
            elif name in _UNIFIED_SIZES:
                number = _INFINITY if value == "max" else int(value)
                if name == "pids.max":
                    number = number or 1
                properties.append((_UNIFIED_SIZES[name], Variant("t", number)))
        except ValueError:
            raise InvalidArgument(f'unified resource "{name}" value conversion error: "{value}"') from None
    return properties


def oom_policy(unified: dict[str, str], systemd_version: int) -> list[Property]:
    """memory.oom.group as OOMPolicy, which systemd takes only while it makes the unit."""
    policy = {"0": "continue", "1": "kill"}.get(unified.get("memory.oom.group", "").strip())
    return [("OOMPolicy", Variant("s", policy))] if policy and systemd_version >= 253 else []


# --- the groups ------------------------------------------------------------------------------------------------------


def _record(group: SystemdV1 | SystemdV2, record: dict[str, object]) -> dict[str, object]:
    return {**record, "unit": group.unit.name, "slice": group.unit.slice, "title": group.unit.title}


class SystemdV1(V1Group):
    """A unit on a machine with v1 controllers."""

    __slots__ = ("_limits", "unit")

    driver = "systemd"
    needs_pid = True

    def __init__(self, paths: dict[str, str], unit: Unit) -> None:
        super().__init__(paths, rootless=False, explicit=True)
        self.unit = unit
        self._limits: Limits | None = None

    def encode(self) -> dict[str, object]:
        """See `Cgroup`."""
        return _record(self, super().encode())

    def create(self, limits: Limits) -> None:
        """Remember the limits, and look whether the name is free; `add` makes the unit."""
        if limits.unified:
            raise InvalidArgument("invalid configuration: cannot use unified on cgroup v1")
        self.check_unused()
        self._limits = limits

    def add(self, pid: int) -> None:
        """Make the unit with its first process; afterwards, move a process into it."""
        limits = self._limits
        if limits is not None:
            self._limits = None
            with connect_systemd(user=False) as bus:
                start_unit(bus, self.unit.name, unit_properties(self.unit, pid, io="BlockIO", further=self.properties))
            # systemd makes directories only for the controllers that it uses.
            self.make(limits, check=False)
            self.fresh = True
        super().add(pid)

    def apply(self, limits: Limits) -> None:
        """See `Cgroup`."""
        with connect_systemd(user=False) as bus:
            properties, quota = limit_properties_v1(limits, version(bus))
            # systemd sets device rules by "deny all" first, whichever property changes: nobody may run meanwhile.
            freeze = not self.fresh and not self.frozen()
            if freeze:
                self.freeze()
            try:
                set_properties(bus, self.unit.name, properties)
            finally:
                if freeze:
                    self.thaw()
        given, limits.cpu_quota = limits.cpu_quota, quota or limits.cpu_quota
        try:
            super().apply(limits)
        finally:
            limits.cpu_quota = given

    def delete(self) -> None:
        """See `Cgroup`."""
        if self.foreign:
            return
        try:
            with connect_systemd(user=False) as bus:
                stop_unit(bus, self.unit.name)
        finally:
            super().delete()


class SystemdV2(V2Group):
    """A unit on a machine with v2, of the system's or the user's systemd."""

    __slots__ = ("_limits", "unit")

    driver = "systemd"
    needs_pid = True

    def __init__(self, path: str, unit: Unit, *, rootless: bool) -> None:
        super().__init__(path, rootless=rootless, explicit=True)
        self.unit = unit
        self._limits: Limits | None = None

    def encode(self) -> dict[str, object]:
        """See `Cgroup`."""
        return _record(self, super().encode())

    def _bus(self) -> Connection:
        return connect_systemd(user=self.unit.user, environ=self.environ)

    def create(self, limits: Limits) -> None:
        """Remember the limits, and look whether the name is free; `add` makes the unit."""
        if self.exists():
            self.check_unused()
        self._limits = limits

    def add(self, pid: int) -> None:
        """Make the unit with its first process; afterwards, move a process into it."""
        limits = self._limits
        with self._bus() as bus:
            if limits is None:
                attach(bus, self.unit.name, pid)
                return
            self._limits = None
            properties = unit_properties(self.unit, pid, io="IO", further=self.properties)
            if "memory.oom.group" in limits.unified:
                properties += oom_policy(limits.unified, version(bus))
            start_unit(bus, self.unit.name, properties)
        try:
            self.make(limits, check=False)
        except OSError as error:
            raise explain(error) from None
        self.fresh = True

    def apply(self, limits: Limits) -> None:
        """See `Cgroup`."""
        # Before systemd does it: a limit below what is in use would end the container, and the unit with it.
        self.check_memory(limits)
        swap_text = self.swap_limit(limits) if limits.has_memory() else ""
        swap = -1 if swap_text == "max" else int(swap_text or 0)
        given = limits.cpu_quota, limits.cpu_period
        if bool(limits.cpu_quota) != bool(limits.cpu_period):
            limits.cpu_quota, limits.cpu_period = self.cpu_max(limits)
        try:
            with self._bus() as bus:
                properties, quota = limit_properties_v2(limits, version(bus), swap)
                set_properties(bus, self.unit.name, properties)
            limits.cpu_quota = quota or limits.cpu_quota
            super().apply(limits)
        finally:
            limits.cpu_quota, limits.cpu_period = given

    def delete(self) -> None:
        """See `Cgroup`."""
        if self.foreign:
            return
        try:
            with self._bus() as bus:
                stop_unit(bus, self.unit.name)
        finally:
            super().delete()


def annotated_properties(annotations: Mapping[str, str]) -> list[tuple[str, str, object]]:
    """The unit properties in "org.systemd.property.NAME" annotations, with values in GVariant's text format.

    A name that ends in Sec is one in µs for D-Bus. Raises InvalidArgument.
    """
    from boxship.linux.dbus import parse_variant

    properties = []
    for key, text in annotations.items():
        name = key.removeprefix("org.systemd.property.")
        if name == key:
            continue
        if len(name) < 3:
            raise InvalidArgument(f"annotation {key} name incorrect: too short")
        if not (name.isascii() and name.isalpha()):
            raise InvalidArgument(f"annotation {key} name incorrect: contains non-alphabetic character")
        try:
            variant = parse_variant(text)
        except InvalidArgument as error:
            raise InvalidArgument(f"annotation {key}={text} value parse error: {error}") from None
        if name.endswith("Sec") and name[-4:-3].islower():
            if variant.signature not in ("y", "n", "q", "i", "u", "x", "t", "d"):
                raise InvalidArgument(f"annotation {key}={text} value parse error: not a number")
            assert isinstance(variant.value, int | float)
            variant = Variant("t", int(variant.value * 1000000) & _INFINITY)
            name = name[:-3] + "USec"
        properties.append((name, variant.signature, variant.value))
    return properties
