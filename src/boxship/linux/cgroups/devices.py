"""Which devices the processes of a group may use: v1's files, and v2's BPF program.

Runs in: the runtime.
Spec: kernel Documentation/admin-guide/cgroup-v1/devices.rst; runtime-spec 1.3.0, config-linux.md "Allowed Device list": the
entries are applied in the listed order.

v1 knows a default and exceptions to it. A list of rules is first reduced to that (`reduce_rules`), with the order kept; what
v1 cannot express, a hole in a wildcard exception, is refused rather than silently ignored, as the kernel would do. A group
that is in use goes from one state to the other by the fewest writes, so that no process sees a device denied in between that
both states allow. v2 has no such limits: see `boxship.linux.cgroups.bpf`.
"""

from __future__ import annotations

from boxship.kit.errors import FailedPrecondition, InvalidArgument
from boxship.linux.cgroups import files
from boxship.linux.cgroups.limits import ANY, DeviceRule

TYPE_CHECKING = False
if TYPE_CHECKING:
    Device = tuple[str, int, int]  # kind, major, minor

_BITS = {"r": 1, "w": 2, "m": 4}


def access_bits(access: str) -> int:
    """r = 1, w = 2, m = 4; other letters mean nothing."""
    bits = 0
    for char in access:
        bits |= _BITS.get(char, 0)
    return bits


def access_text(bits: int) -> str:
    """The letters of `access_bits`, in the kernel's order."""
    return "".join(char for char, bit in _BITS.items() if bits & bit)


class Policy:
    """A default and the exceptions to it, as v1 has them.

    Attributes:
        allow: what happens to a device without an exception.
        exceptions: device to access bits, in the order in which they came to be.
    """

    __slots__ = ("allow", "exceptions")

    def __init__(self, allow: bool = False) -> None:
        self.allow = allow
        self.exceptions: dict[Device, int] = {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Policy) and self.allow == other.allow and self.exceptions == other.exceptions

    __hash__ = None  # type: ignore[assignment]

    def add(self, rule: DeviceRule) -> None:
        """Carry out one rule. Raises InvalidArgument for a hole in a wildcard, or a kind of device that is none."""
        if rule.kind == "a":
            self.allow = rule.allow
            self.exceptions = {}
            return
        if rule.kind not in ("b", "c"):
            raise InvalidArgument(f'cannot add rule [{rule}] with non-cgroup type "{rule.kind}"')
        device = (rule.kind, rule.major, rule.minor)
        bits = access_bits(rule.access)
        if rule.allow != self.allow:
            self.exceptions[device] = self.exceptions.get(device, 0) | bits
        else:
            self._take_back(device, bits)

    def _take_back(self, device: Device, bits: int) -> None:
        kind, major, minor = device
        for wider in ((kind, ANY, minor), (kind, major, ANY), (kind, ANY, ANY)):
            if wider != device and self.exceptions.get(wider, 0) & bits:
                what = "deny" if self.allow else "allow"
                raise InvalidArgument(
                    f"unable to remove '{what}' exception: requested rule [{_text(device, bits)}] not supported by devices "
                    f"cgroupv1 (cannot punch hole in existing wildcard rule [{_text(wider, self.exceptions[wider])}])"
                )
        rest = self.exceptions.get(device, 0) & ~bits
        if rest:
            self.exceptions[device] = rest
        else:
            self.exceptions.pop(device, None)


def _text(device: Device, bits: int) -> str:
    return str(DeviceRule(True, *device, access_text(bits)))


def reduce_rules(rules: list[DeviceRule]) -> Policy:
    """What a list of rules comes to, starting from "nothing is allowed"."""
    policy = Policy()
    for rule in rules:
        policy.add(rule)
    return policy


def parse_list(text: str) -> Policy:
    """The policy that devices.list shows. "a *:* rwm" stands for "all allowed", with denials that it does not show."""
    policy = Policy()
    for line in text.splitlines():
        kind, numbers, access = line.split(" ")
        if kind == "a":
            policy.add(DeviceRule(True))
            continue
        major, _, minor = numbers.partition(":")
        policy.add(DeviceRule(True, kind, ANY if major == "*" else int(major), ANY if minor == "*" else int(minor), access))
    return policy


def transition(current: Policy | None, target: Policy) -> list[DeviceRule]:
    """The fewest rules that lead from one policy to the other; `current` None: unknown."""
    rules = []
    old: dict[Device, int] = {}
    if current is None or current.allow or target.allow:
        # From or to "all allowed" there is no way but through the default, which drops all exceptions.
        rules.append(DeviceRule(target.allow))
    else:
        old = current.exceptions
    for device, bits in old.items():
        dropped = bits & ~target.exceptions.get(device, 0)
        if dropped:
            rules.append(DeviceRule(target.allow, *device, access_text(dropped)))
    for device, bits in target.exceptions.items():
        gained = bits & ~old.get(device, 0)
        if gained:
            rules.append(DeviceRule(not target.allow, *device, access_text(gained)))
    return rules


def set_v1(directory: str, rules: list[DeviceRule], *, fresh: bool) -> None:
    """Make the devices group at `directory` follow `rules`. `fresh`: nothing is in it yet, so its state is not looked at.

    Raises FileError, InvalidArgument, FailedPrecondition when the kernel did something else.
    """
    target = reduce_rules(rules)
    current = None if fresh else parse_list(files.read(directory + "/devices.list"))
    batch: list[str] = []
    allow = False
    # Runs of one kind go through one open file.
    for rule in transition(current, target):
        if rule.allow != allow:
            _write_rules(directory, batch, allow=allow)
            batch, allow = [], rule.allow
        batch.append(str(rule))
    _write_rules(directory, batch, allow=allow)
    if not fresh:
        result = parse_list(files.read(directory + "/devices.list"))
        if result.allow != target.allow:
            raise FailedPrecondition("resulting devices cgroup doesn't match target mode")
        if not target.allow and result != target:
            raise FailedPrecondition("resulting devices cgroup doesn't precisely match target")


def _write_rules(directory: str, batch: list[str], *, allow: bool) -> None:
    files.write_each(directory + ("/devices.allow" if allow else "/devices.deny"), batch)
