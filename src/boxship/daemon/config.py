"""The daemon's configuration: /etc/boxship/config.toml, what each key means, and what stands in for those that are not there.

Runs in: the daemon.

    root = "/var/lib/boxship"      state = "/run/boxship"      idle_exit_s = 0
    [containerd]  address, uid, gid, mode, enabled       the gRPC socket; its ttRPC socket is beside it, with `.ttrpc` at the end
                  remote                                 the socket of another containerd, to be used in place of ours
    [docker]      address, uid, gid, mode, enabled       the Docker engine's socket
                  group = "docker"                       the group that may use it, where there is one of that name
                  tcp = "HOST:PORT"                      the same over TCP, for clients with a certificate:
                  tls_ca, tls_cert, tls_key              whose certificates are accepted, and the server's own
                  insecure = false                       true: TCP without TLS, for everybody who reaches it
    [log]         level = "info", format = "text"        (or "json")
    [metrics]     address = "127.0.0.1:1338"             Prometheus, at /metrics and /v1/metrics
    [tracing]     endpoint, service_name                 OpenTelemetry over OTLP/gRPC, when its packages are installed
    [runtimes]    own = ["io.containerd.runc.v2", …]     which runtimes the spawner answers; all others are programs of PATH

Other tables belong to the parts that they are named after, which check them (`Config.table`). A key nobody knows is an error.
"""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from boxship.kit.errors import InvalidArgument
from boxship.kit.user import user_of

ROOT = "/var/lib/boxship"
"""Of the daemon of the whole machine."""
OWN_RUNTIMES = ("io.containerd.runc.v2", "io.containerd.boxship.v1")
PARTS = ("images", "registry", "snapshots", "gc", "engine", "content", "network", "cri", "plugins")
"""Tables that the parts of the daemon read for themselves."""


@dataclass(frozen=True)
class Socket:
    """A Unix socket to listen on."""

    address: str = ""
    """Path; "" is the default below the state folder."""
    uid: int = -1
    gid: int = -1
    mode: int = 0o660
    enabled: bool = True


@dataclass(frozen=True)
class Services(Socket):
    """containerd's services: ours on a socket, or another containerd's."""

    remote: str = ""
    """Address of a containerd to use in place of ours; then no socket of containerd's is served."""


@dataclass(frozen=True)
class Docker(Socket):
    """The Docker engine's socket, and the same over TCP."""

    group: str = "docker"
    """Owns the socket when `gid` does not say otherwise and the machine has the group."""
    tcp: str = ""
    """HOST:PORT; "" is none."""
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    insecure: bool = False


@dataclass(frozen=True)
class Log:
    """What is logged, and how."""

    level: str = "info"
    """debug, info, warning, error."""
    format: str = "text"
    """text (as containerd writes it) or json."""


@dataclass(frozen=True)
class Metrics:
    """Where Prometheus asks."""

    address: str = ""
    """HOST:PORT or a socket's path; "" is nowhere."""


@dataclass(frozen=True)
class Tracing:
    """Where spans go."""

    endpoint: str = ""
    """An OTLP/gRPC collector, as http://HOST:4317; "" makes no spans."""
    service_name: str = "boxship"


@dataclass(frozen=True)
class Runtimes:
    """Which runtimes are ours."""

    own: tuple[str, ...] = OWN_RUNTIMES


@dataclass(frozen=True)
class Config:
    """The whole configuration."""

    root: str = ""
    state: str = ""
    idle_exit_s: float = 0
    """Leave after so many seconds without clients and containers; 0 is never."""
    containerd: Services = field(default_factory=Services)
    docker: Docker = field(default_factory=Docker)
    log: Log = field(default_factory=Log)
    metrics: Metrics = field(default_factory=Metrics)
    tracing: Tracing = field(default_factory=Tracing)
    runtimes: Runtimes = field(default_factory=Runtimes)
    parts: Mapping[str, Any] = field(default_factory=dict)
    """The tables of the parts, as they were read."""

    def table(self, name: str) -> Mapping[str, Any]:
        """The table of a part; empty when there is none."""
        found: Mapping[str, Any] = self.parts.get(name, {})
        return found

    @property
    def containerd_socket(self) -> str:
        """Path of the gRPC socket."""
        return self.containerd.address or os.path.join(self.state, "containerd.sock")

    @property
    def docker_socket(self) -> str:
        """Path of the engine's socket."""
        return self.docker.address or os.path.join(self.state, "docker.sock")


def _folders(environ: Mapping[str, str], uid: int) -> tuple[str, str, str]:
    """(root, state, configuration file) of this user."""
    if uid == 0:
        return ROOT, "/run/boxship", "/etc/boxship/config.toml"
    home = environ.get("HOME", "/")
    data = environ.get("XDG_DATA_HOME") or os.path.join(home, ".local/share")
    runtime = environ.get("XDG_RUNTIME_DIR") or f"/tmp/boxship-{uid}"
    config = environ.get("XDG_CONFIG_HOME") or os.path.join(home, ".config")
    return os.path.join(data, "boxship"), os.path.join(runtime, "boxship"), os.path.join(config, "boxship/config.toml")


def _of(kind: type[Any], table: object, where: str) -> Any:
    if not isinstance(table, dict):
        raise InvalidArgument(f"{where} is not a table")
    known = {each.name: each for each in dataclasses.fields(kind)}
    values = {}
    for key, value in table.items():
        name = f"{where}.{key}"
        if key not in known:
            raise InvalidArgument(f"unknown key {name}")
        default = known[key].default
        if isinstance(default, tuple):
            if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
                raise InvalidArgument(f"{name} is not a list of texts")
            value = tuple(value)
        elif type(value) is not type(default):
            raise InvalidArgument(f"{name} is not of the kind of {default!r}")
        values[key] = value
    return kind(**values)


def parse(text: str, where: str, environ: Mapping[str, str], uid: int) -> Config:
    """The configuration in `text`. Raises InvalidArgument, which names the key and the file `where`."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidArgument(f"{where}: {error}") from None
    root, state, _ = _folders(environ, uid)
    tables = {"containerd": Services, "docker": Docker, "log": Log, "metrics": Metrics, "tracing": Tracing, "runtimes": Runtimes}
    values: dict[str, Any] = {"root": root, "state": state}
    parts: dict[str, Any] = {}
    try:
        for key, value in document.items():
            if key in tables:
                values[key] = _of(tables[key], value, key)
            elif key in PARTS:
                if not isinstance(value, dict):
                    raise InvalidArgument(f"{key} is not a table")
                parts[key] = value
            elif key in ("root", "state"):
                if not isinstance(value, str) or not os.path.isabs(value):
                    raise InvalidArgument(f"{key} is not an absolute path")
                values[key] = value
            elif key == "idle_exit_s":
                if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
                    raise InvalidArgument("idle_exit_s is not a number of seconds")
                values[key] = float(value)
            else:
                raise InvalidArgument(f"unknown key {key}")
        config = Config(**values, parts=parts)
        check_log(config.log)
    except InvalidArgument as error:
        raise InvalidArgument(f"{where}: {error}") from None
    return config


def check_log(settings: Log) -> None:
    """Raise InvalidArgument for a level or format that does not exist."""
    if settings.level not in ("debug", "info", "warning", "error"):
        raise InvalidArgument(f"log.level is {settings.level!r}, not debug, info, warning or error")
    if settings.format not in ("text", "json"):
        raise InvalidArgument(f"log.format is {settings.format!r}, not text or json")


def with_flags(config: Config, flags: Mapping[str, str]) -> Config:
    """The configuration with what the command line says in place of what the file says. Raises InvalidArgument."""
    changes: dict[str, Any] = {}
    for name in ("root", "state"):
        if name in flags:
            changes[name] = os.path.abspath(flags[name])
    if "address" in flags:
        changes["containerd"] = dataclasses.replace(config.containerd, address=os.path.abspath(flags["address"].removeprefix("unix://")))
    if "containerd" in flags:
        changes["containerd"] = dataclasses.replace(changes.get("containerd", config.containerd), remote=flags["containerd"])
    settings = {key.removeprefix("log-"): flags[key] for key in ("log-level", "log-format") if key in flags}
    if settings:
        changes["log"] = dataclasses.replace(config.log, **settings)
        check_log(changes["log"])
    if "bridge" in flags:
        changes["parts"] = {**config.parts, "network": {**config.table("network"), "bridge": flags["bridge"]}}
    if "metrics" in flags:
        changes["metrics"] = Metrics(flags["metrics"])
    if "idle-exit" in flags:
        try:
            changes["idle_exit_s"] = float(flags["idle-exit"])
        except ValueError:
            raise InvalidArgument(f"--idle-exit: {flags['idle-exit']!r} is not a number of seconds") from None
    return dataclasses.replace(config, **changes)


def load(path: str = "", environ: Mapping[str, str] = os.environ, uid: int | None = None) -> Config:
    """Read the file `path`, or the default one if it is there. Raises InvalidArgument, OSError for a file that was named."""
    uid = user_of(environ) if uid is None else uid
    where = path or _folders(environ, uid)[2]
    try:
        with open(where, encoding="utf-8") as file:
            text = file.read()
    except FileNotFoundError:
        if path:
            raise
        text = ""
    except UnicodeDecodeError:
        raise InvalidArgument(f"{where}: not UTF-8") from None
    return parse(text, where, environ, uid)
