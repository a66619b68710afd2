"""The objects that clients send, by field and kind: what is missing gets Docker's zero value, what has the wrong kind is refused.

Runs in: the daemon.
Spec: Docker Engine API v1.51, definitions ContainerConfig, HostConfig and below. The order of the fields is that of dockerd's
answers. Unknown fields are ignored and names match without regard to case, as Go's decoder does both.
Not here: rules about values (boxship.engine.validate).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from boxship.kit.errors import InvalidArgument

Json = Any

CONTAINER_CONFIG = {
    "Hostname": "string", "Domainname": "string", "User": "string", "AttachStdin": "bool", "AttachStdout": "bool",
    "AttachStderr": "bool", "ExposedPorts": "map?", "Tty": "bool", "OpenStdin": "bool", "StdinOnce": "bool", "Env": "[]string",
    "Cmd": "words", "Healthcheck": "Healthcheck", "ArgsEscaped": "bool", "Image": "string", "Volumes": "map?",
    "WorkingDir": "string", "Entrypoint": "words", "NetworkDisabled": "bool", "MacAddress": "string", "OnBuild": "[]string",
    "Labels": "map?", "StopSignal": "string", "StopTimeout": "int?", "Shell": "words",
}
_SHOWN_WHEN_SET = frozenset((
    "ExposedPorts", "Healthcheck", "ArgsEscaped", "NetworkDisabled", "MacAddress", "StopSignal", "StopTimeout", "Shell",
))

RESOURCES = {
    "CpuShares": "int", "Memory": "int", "NanoCpus": "int", "CgroupParent": "string", "BlkioWeight": "int",
    "BlkioWeightDevice": "[]object", "BlkioDeviceReadBps": "[]object", "BlkioDeviceWriteBps": "[]object",
    "BlkioDeviceReadIOps": "[]object", "BlkioDeviceWriteIOps": "[]object", "CpuPeriod": "int", "CpuQuota": "int",
    "CpuRealtimePeriod": "int", "CpuRealtimeRuntime": "int", "CpusetCpus": "string", "CpusetMems": "string",
    "Devices": "[]object", "DeviceCgroupRules": "[]string", "DeviceRequests": "[]object", "KernelMemoryTCP": "int",
    "MemoryReservation": "int", "MemorySwap": "int", "MemorySwappiness": "int?", "OomKillDisable": "bool?", "PidsLimit": "int?",
    "Ulimits": "[]object", "CpuCount": "int", "CpuPercent": "int", "IOMaximumIOps": "int", "IOMaximumBandwidth": "int",
}
HOST_CONFIG = {
    "Binds": "[]string", "ContainerIDFile": "string", "LogConfig": "LogConfig", "NetworkMode": "string", "PortBindings": "map?",
    "RestartPolicy": "RestartPolicy", "AutoRemove": "bool", "VolumeDriver": "string", "VolumesFrom": "[]string",
    "ConsoleSize": "size", "Annotations": "map?", "CapAdd": "words", "CapDrop": "words", "CgroupnsMode": "string",
    "Dns": "[]string", "DnsOptions": "[]string", "DnsSearch": "[]string", "ExtraHosts": "[]string", "GroupAdd": "[]string",
    "IpcMode": "string", "Cgroup": "string", "Links": "[]string", "OomScoreAdj": "int", "PidMode": "string", "Privileged": "bool",
    "PublishAllPorts": "bool", "ReadonlyRootfs": "bool", "SecurityOpt": "[]string", "StorageOpt": "map?", "Tmpfs": "map?",
    "UTSMode": "string", "UsernsMode": "string", "ShmSize": "int", "Sysctls": "map?", "Runtime": "string", "Isolation": "string",
    **RESOURCES, "Mounts": "[]object", "Init": "bool?", "MaskedPaths": "[]string", "ReadonlyPaths": "[]string",
}
_HOST_SHOWN_WHEN_SET = frozenset(("Annotations", "StorageOpt", "Tmpfs", "Sysctls", "Mounts", "Init", "KernelMemoryTCP"))

EXEC_CONFIG = {
    "User": "string", "Privileged": "bool", "Tty": "bool", "ConsoleSize": "size?", "AttachStdin": "bool", "AttachStderr": "bool",
    "AttachStdout": "bool", "DetachKeys": "string", "Env": "[]string", "WorkingDir": "string", "Cmd": "[]string",
    "Detach": "bool",
}
EXEC_START = {"Detach": "bool", "Tty": "bool", "ConsoleSize": "size?"}
HEALTHCHECK = {
    "Test": "[]string", "Interval": "int", "Timeout": "int", "StartPeriod": "int", "StartInterval": "int", "Retries": "int",
}
LOG_CONFIG = {"Type": "string", "Config": "map"}
RESTART_POLICY = {"Name": "string", "MaximumRetryCount": "int"}
VOLUME_CREATE = {"Name": "string", "Driver": "string", "DriverOpts": "map", "Labels": "map"}
AUTH_CONFIG = {
    "username": "string", "password": "string", "auth": "string", "serveraddress": "string", "identitytoken": "string",
    "registrytoken": "string",
}


def _kind_name(value: Json) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object"


def _wrong(value: Json, where: str, kind: str) -> InvalidArgument:
    return InvalidArgument(
        f"invalid JSON: json: cannot unmarshal {_kind_name(value)} into Go struct field {where} of type {kind}")


def _strings(value: Json, where: str) -> list[str] | None:
    if value is None:
        return None
    if not isinstance(value, list):
        raise _wrong(value, where, "[]string")
    for each in value:
        if not isinstance(each, str):
            raise _wrong(each, where, "string")
    return list(value)


def _words(value: Json, where: str) -> list[str] | None:
    return [value] if isinstance(value, str) else _strings(value, where)


def _mapping(value: Json, where: str) -> dict[str, Json] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise _wrong(value, where, "map[string]string")
    return dict(value)


def _objects(value: Json, where: str) -> list[dict[str, Json]] | None:
    if value is None:
        return None
    if not isinstance(value, list):
        raise _wrong(value, where, "[]object")
    for each in value:
        if not isinstance(each, dict):
            raise _wrong(each, where, "object")
    return list(value)


def _integer(value: Json, where: str) -> int:
    if value is None:
        return 0
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong(value, where, "int64")
    if not -(1 << 63) <= value < 1 << 63:
        raise InvalidArgument(f"json: cannot unmarshal number {value} into Go struct field {where} of type int64")
    return value


def _boolean(value: Json, where: str) -> bool:
    if value is None:
        return False
    if not isinstance(value, bool):
        raise _wrong(value, where, "bool")
    return value


def _string(value: Json, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _wrong(value, where, "string")
    return value


def _size(value: Json, where: str) -> list[int]:
    if value is None:
        return [0, 0]
    if not isinstance(value, list) or len(value) != 2:
        raise _wrong(value, where, "[2]uint")
    return [_integer(each, where) for each in value]


def _optional(read: Callable[[Json, str], Json]) -> Callable[[Json, str], Json]:
    return lambda value, where: None if value is None else read(value, where)


def _nested(table: dict[str, str], *, optional: bool = False) -> Callable[[Json, str], Json]:
    return lambda value, where: None if value is None and optional else shape({} if value is None else value, table, where)


_READ: dict[str, Callable[[Json, str], Json]] = {
    "string": _string, "bool": _boolean, "bool?": _optional(_boolean), "int": _integer, "int?": _optional(_integer),
    "[]string": _strings, "words": _words, "[]object": _objects, "map?": _mapping,
    "map": lambda value, where: _mapping(value, where) or {}, "size": _size, "size?": _optional(_size),
    "Healthcheck": _nested(HEALTHCHECK, optional=True), "LogConfig": _nested(LOG_CONFIG),
    "RestartPolicy": _nested(RESTART_POLICY),
}


def shape(value: Json, table: dict[str, str], where: str = "") -> dict[str, Json]:
    """`value` with every field of `table`, in its order. Raises InvalidArgument for a field of the wrong kind."""
    if not isinstance(value, dict):
        raise _wrong(value, where, "object")
    found = {key.lower(): each for key, each in value.items()}
    return {name: _READ[kind](found.get(name.lower()), f"{where}.{name}") for name, kind in table.items()}


def member(value: Json, name: str) -> Json:
    """The field `name` of an object, without regard to case; None when it is not there."""
    if not isinstance(value, dict):
        return None
    if name in value:
        return value[name]
    lower = name.lower()
    return next((each for key, each in value.items() if key.lower() == lower), None)


def shown_config(config: dict[str, Json]) -> dict[str, Json]:
    """A container's configuration as answers have it: fields that Go's encoder leaves out when empty are left out."""
    shown = {key: value for key, value in config.items() if value or key not in _SHOWN_WHEN_SET}
    if shown.get("Healthcheck"):
        shown["Healthcheck"] = {key: value for key, value in shown["Healthcheck"].items() if value}
    return shown


def shown_host(host: dict[str, Json]) -> dict[str, Json]:
    """A container's host configuration as answers have it."""
    return {key: value for key, value in host.items() if key not in _HOST_SHOWN_WHEN_SET or value not in (None, {}, [], 0)}


def parse(body: bytes) -> Json:
    """The JSON of a request's body; raises InvalidArgument in dockerd's words."""
    try:
        return json.loads(body)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            raise InvalidArgument("unexpected content after JSON") from None
        ended = not error.doc[error.pos :].strip()
        raise InvalidArgument(f"invalid JSON: {'unexpected EOF' if ended else str(error)}") from None
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"invalid JSON: {error}") from None
