"""What calls answer with.

Runs in: the caller's program. Each has the engine's whole answer in `attrs`, under the Engine API's own names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Document = Mapping[str, Any]


@dataclass(frozen=True)
class State:
    """What a container was at the moment of asking.

    Attributes:
        status: created, running, paused, restarting, removing, exited or dead.
        pid: of its first process on the machine; 0 when it does not run.
        exit_code: of the last run.
        health: starting, healthy, unhealthy; "" without a check.
    """

    status: str
    pid: int
    exit_code: int
    oom_killed: bool
    health: str
    attrs: Document = field(repr=False)

    @classmethod
    def of(cls, attrs: Document) -> State:
        """From the answer of an inspection."""
        state = attrs["State"]
        health = (state.get("Health") or {}).get("Status") or ""
        health = "" if health == "none" else health
        return cls(state["Status"], state["Pid"], state["ExitCode"], state["OOMKilled"], health, attrs)


@dataclass(frozen=True)
class ExecResult:
    """How a command in a container ended. With a terminal all of its output is in `stdout`."""

    exit_code: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Image:
    """An image. `size` in bytes."""

    id: str
    tags: tuple[str, ...]
    size: int
    attrs: Document = field(repr=False)

    @classmethod
    def of(cls, attrs: Document) -> Image:
        """From a list or an inspection."""
        return cls(attrs["Id"], tuple(attrs.get("RepoTags") or ()), attrs.get("Size") or 0, attrs)


@dataclass(frozen=True)
class Volume:
    """A volume; `mountpoint` is on the engine's machine."""

    name: str
    driver: str
    mountpoint: str
    labels: Mapping[str, str]
    attrs: Document = field(repr=False)

    @classmethod
    def of(cls, attrs: Document) -> Volume:
        """From a list or an inspection."""
        return cls(attrs["Name"], attrs["Driver"], attrs["Mountpoint"], attrs.get("Labels") or {}, attrs)


@dataclass(frozen=True)
class Network:
    """A network; `subnets` in CIDR form."""

    name: str
    id: str
    driver: str
    subnets: tuple[str, ...]
    attrs: Document = field(repr=False)

    @classmethod
    def of(cls, attrs: Document) -> Network:
        """From a list or an inspection."""
        config = (attrs.get("IPAM") or {}).get("Config") or []
        subnets = tuple(each["Subnet"] for each in config if each.get("Subnet"))
        return cls(attrs["Name"], attrs["Id"], attrs["Driver"], subnets, attrs)
