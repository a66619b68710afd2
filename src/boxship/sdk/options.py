"""The keyword arguments of `run` and `create`, and the engine's request that they stand for.

Runs in: the caller's program.
Spec: Docker Engine API, POST /containers/create; the words are those of docker run.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

from boxship.cli import values
from boxship.cli.verbs.create import own_defaults, ports

Words = Iterable[str]
Pairs = Mapping[str, str] | Iterable[str]


class Options(TypedDict, total=False):
    """What may be said about a container; everything may be left out."""

    name: str
    env: Pairs
    """{"NAME": "value"}, or words as NAME=value."""
    volumes: Pairs
    """{"/on/the/machine or a volume's name": "/in/the/container[:ro]"}, or words as for -v."""
    tmpfs: Pairs
    """{"/path": "size=64m"}, or paths."""
    ports: Mapping[int | str, int | str | None] | Iterable[int | str]
    """{inside: outside}, as {80: 8080}, {"53/udp": "127.0.0.1:53"}; outside None, and ports alone: any free one."""
    network: str
    aliases: Words
    """More names of the container on its network."""
    hostname: str
    dns: Words
    extra_hosts: Mapping[str, str]
    memory: int | str
    """Bytes, or "64m"."""
    cpus: float
    pids_limit: int
    shm_size: int | str
    user: str
    workdir: str
    entrypoint: str | Words
    labels: Pairs
    read_only: bool
    privileged: bool
    cap_add: Words
    cap_drop: Words
    security_opt: Words
    devices: Words
    """Paths of devices of the machine."""
    sysctls: Mapping[str, str]
    init: bool
    tty: bool
    stdin: bool
    """Keep standard input open."""
    stop_signal: str
    restart: str
    """no, always, unless-stopped, on-failure[:N]."""
    runtime: str
    pid: str
    ipc: str
    userns: str
    platform: str
    pull: str
    """missing (as usual), always, never."""


def request(image: str, command: str | Words | None, options: Options, *, own: bool) -> dict[str, Any]:
    """The body of POST /containers/create. `own`: the engine is this user's own daemon.

    Raises TypeError for an option that there is not, InvalidArgument for a value that none can have.
    """
    unknown = sorted(set(options) - set(Options.__annotations__))
    if unknown:
        raise TypeError(f"there is no option {unknown[0]!r}")
    exposed, bindings = ports(_published(options.get("ports") or ()), ())
    host: dict[str, Any] = {
        "Binds": [_bind(word) for word in _words(options.get("volumes"), ":")],
        "Tmpfs": _pairs(options.get("tmpfs")),
        "NetworkMode": options.get("network") or "default",
        "PortBindings": bindings,
        "RestartPolicy": _restart(options.get("restart", "no")),
        "Dns": list(options.get("dns", ())),
        "ExtraHosts": [f"{name}:{address}" for name, address in options.get("extra_hosts", {}).items()],
        "Memory": _size(options.get("memory", 0)),
        "NanoCpus": round(options.get("cpus", 0) * 1e9),
        "ShmSize": _size(options.get("shm_size", 0)),
        "ReadonlyRootfs": options.get("read_only", False),
        "Privileged": options.get("privileged", False),
        "CapAdd": list(options.get("cap_add", ())),
        "CapDrop": list(options.get("cap_drop", ())),
        "SecurityOpt": list(options.get("security_opt", ())),
        "Devices": [
            {"PathOnHost": path, "PathInContainer": path, "CgroupPermissions": "rwm"} for path in options.get("devices", ())
        ],
        "Sysctls": dict(options.get("sysctls", {})),
        "Runtime": options.get("runtime", ""),
        "PidMode": options.get("pid", ""),
        "IpcMode": options.get("ipc", ""),
        "UsernsMode": options.get("userns", ""),
    }
    if "pids_limit" in options:
        host["PidsLimit"] = options["pids_limit"]
    if "init" in options:
        host["Init"] = options["init"]
    body: dict[str, Any] = {
        "Image": image,
        "Cmd": _command(command),
        "Hostname": options.get("hostname", ""),
        "User": options.get("user", ""),
        "WorkingDir": options.get("workdir", ""),
        "Env": _words(options.get("env"), "="),
        "Labels": _pairs(options.get("labels")),
        "Tty": options.get("tty", False),
        "OpenStdin": options.get("stdin", False),
        "AttachStdin": options.get("stdin", False),
        "AttachStdout": True,
        "AttachStderr": True,
        "ExposedPorts": exposed,
        "HostConfig": host,
    }
    if "entrypoint" in options:
        body["Entrypoint"] = _command(options["entrypoint"])
    if "stop_signal" in options:
        body["StopSignal"] = options["stop_signal"]
    if "aliases" in options:
        body["NetworkingConfig"] = {"EndpointsConfig": {host["NetworkMode"]: {"Aliases": list(options["aliases"])}}}
    if image == "host":
        own_defaults(
            host,
            networked=bool({"network", "ports", "aliases"} & set(options)),
            sharing=bool({"pid", "ipc", "userns", "privileged"} & set(options)),
            own=own,
        )
    return body


def _command(command: str | Words | None) -> list[str] | None:
    """A text is one word: what splits it is said, as ["sh", "-c", text]."""
    return None if command is None else [command] if isinstance(command, str) else [str(word) for word in command]


def _pairs(given: Pairs | None) -> dict[str, str]:
    if given is None:
        return {}
    return dict(given) if isinstance(given, Mapping) else {word.partition("=")[0]: word.partition("=")[2] for word in given}


def _words(given: Pairs | None, between: str) -> list[str]:
    if given is None:
        return []
    return [f"{name}{between}{value}" for name, value in given.items()] if isinstance(given, Mapping) else list(given)


def _bind(word: str) -> str:
    source, colon, rest = word.partition(":")
    return f"{os.path.abspath(source)}:{rest}" if colon and source.startswith((".", "~")) else word


def _published(given: Mapping[int | str, int | str | None] | Iterable[int | str]) -> list[str]:
    if not isinstance(given, Mapping):
        return [str(each) for each in given]
    return [str(inside) if outside is None else f"{outside}:{inside}" for inside, outside in given.items()]


def _restart(text: str) -> dict[str, Any]:
    name, _, count = text.partition(":")
    return {"Name": name, "MaximumRetryCount": int(count or 0)}


def _size(given: int | str) -> int:
    return given if isinstance(given, int) else values.size(given)
