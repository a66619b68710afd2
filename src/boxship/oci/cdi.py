"""The Container Device Interface: what a vendor says has to be changed in a container's configuration to give it a device.

Runs in: the services that make configurations.
Spec: container-device-interface 1.0, SPEC.md. A device is named VENDOR/CLASS=NAME; its edits and, once for each container, those
of its document are applied to the runtime's configuration.
Not here: where the documents lie (CDI_DIRECTORIES by default), and what stat(2) says of a device node: both come in as arguments.
"""

from __future__ import annotations

from boxship.kit.errors import InvalidArgument, NotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    NodeOf = Callable[[str], dict[str, Any]]
    """A path on the host → {type, major, minor} of the device node there. Raises InvalidArgument."""

CDI_DIRECTORIES = ("/etc/cdi", "/var/run/cdi")
"""A later one takes precedence."""
_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?/[A-Za-z0-9](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?=[A-Za-z0-9_.:-]+\Z"
_HOOKS = frozenset(("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"))


class Device:
    """One device that a document offers."""

    __slots__ = ("document", "edits")

    def __init__(self, edits: dict[str, Any], document: dict[str, Any]) -> None:
        self.edits = edits
        self.document = document


def is_name(text: str) -> bool:
    """Whether a text is the full name of a device."""
    import re  # not for those who only import this: a shim, a runtime

    return re.match(_NAME, text) is not None


def registry(documents: Iterable[tuple[int, dict[str, Any]]]) -> dict[str, Device]:
    """All devices of some documents by full name.

    A document comes with its directory's rank: of two that offer a device the higher wins, of equal ones neither can be had.
    """
    found: dict[str, Device] = {}
    ranks: dict[str, int] = {}
    for rank, document in documents:
        kind = document.get("kind")
        for device in document.get("devices") or []:
            if not isinstance(kind, str) or not isinstance(device, dict) or not is_name(name := f"{kind}={device.get('name')}"):
                continue
            if ranks.get(name, -1) == rank:
                found.pop(name, None)
            elif ranks.get(name, -1) < rank:
                ranks[name] = rank
                found[name] = Device(device.get("containerEdits") or {}, document)
    return found


def inject(config: dict[str, Any], names: list[str], devices: dict[str, Device], node_of: NodeOf) -> None:
    """Give the devices to a container: changes its runtime configuration. Raises NotFound for those that nobody offers."""
    missing = [name for name in names if name not in devices]
    if missing:
        raise NotFound(f"CDI device injection failed: unresolvable CDI devices {', '.join(missing)}")
    seen: list[int] = []
    edits: list[dict[str, Any]] = []
    for name in dict.fromkeys(names):
        device = devices[name]
        if id(device.document) not in seen:
            seen.append(id(device.document))
            edits.append(device.document.get("containerEdits") or {})
        edits.append(device.edits)
    for each in edits:
        _apply(config, each, node_of)


def _apply(config: dict[str, Any], edits: dict[str, Any], node_of: NodeOf) -> None:
    process, linux = config.setdefault("process", {}), config.setdefault("linux", {})
    for word in edits.get("env") or []:
        name = word.partition("=")[0]
        process["env"] = [*(other for other in process.get("env") or [] if other.partition("=")[0] != name), word]
    for node in edits.get("deviceNodes") or []:
        _add_node(linux, node, node_of)
    for mount in edits.get("mounts") or []:
        target = mount["containerPath"]
        config["mounts"] = [each for each in config.get("mounts") or [] if each["destination"] != target]
        config["mounts"].append({
            "destination": target, "type": mount.get("type") or "bind", "source": mount["hostPath"],
            "options": list(mount.get("options") or ["rbind", "rprivate"])})
    for hook in edits.get("hooks") or []:
        if hook.get("hookName") not in _HOOKS:
            raise InvalidArgument(f"CDI device injection failed: unknown hook name {hook.get('hookName')!r}")
        made = {key: hook[key] for key in ("path", "args", "env", "timeout") if hook.get(key)}
        config.setdefault("hooks", {}).setdefault(hook["hookName"], []).append(made)
    groups = [gid for gid in edits.get("additionalGids") or [] if gid]
    if groups:
        user = process.setdefault("user", {"uid": 0, "gid": 0})
        user["additionalGids"] = list(dict.fromkeys([*(user.get("additionalGids") or []), *groups]))
    if rdt := edits.get("intelRdt"):
        linux["intelRdt"] = rdt


def _add_node(linux: dict[str, Any], node: dict[str, Any], node_of: NodeOf) -> None:
    path = node["path"]
    known = {key: node[key] for key in ("type", "major", "minor") if node.get(key) not in (None, "")}
    if len(known) < 3:
        known = node_of(node.get("hostPath") or path) | known
    made = {"path": path, **known, **{key: node[key] for key in ("fileMode", "uid", "gid") if node.get(key) is not None}}
    linux["devices"] = [*(each for each in linux.get("devices") or [] if each["path"] != path), made]
    if known["type"] in ("b", "c"):
        linux.setdefault("resources", {}).setdefault("devices", []).append({
            "allow": True, "type": known["type"], "major": known["major"], "minor": known["minor"],
            "access": node.get("permissions") or "rwm"})
