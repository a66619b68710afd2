"""A container as the engine knows it: what was asked for, what became of it, and what is under way.

Runs in: the daemon, on its event loop.
Spec: Docker Engine API (ContainerInspectResponse, ContainerState). The record in the store has everything but what is under way.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

from boxship.engine import times
from boxship.engine.logs import LogFile
from boxship.engine.stdio import Streams

_STATE = ("running", "paused", "restarting", "oom_killed", "dead", "removing", "pid", "exit_code", "error", "started_at",
    "finished_at")


class State:
    """Where a container is in its life."""

    __slots__ = _STATE

    def __init__(self) -> None:
        self.running = False
        self.paused = False
        self.restarting = False
        self.oom_killed = False
        self.dead = False
        self.removing = False
        self.pid = 0
        self.exit_code = 0
        self.error = ""
        self.started_at = times.ZERO
        self.finished_at = times.ZERO

    @property
    def status(self) -> str:
        """Docker's one word."""
        if self.running and self.paused:
            return "paused"
        if self.restarting:
            return "restarting"
        if self.running:
            return "running"
        if self.removing:
            return "removing"
        if self.dead:
            return "dead"
        return "created" if self.started_at == times.ZERO else "exited"

    def record(self) -> dict[str, Any]:
        """For the store."""
        return {name: getattr(self, name) for name in _STATE}

    def shown(self) -> dict[str, Any]:
        """For answers."""
        return {
            "Status": self.status, "Running": self.running, "Paused": self.paused, "Restarting": self.restarting,
            "OOMKilled": self.oom_killed, "Dead": self.dead, "Pid": self.pid, "ExitCode": self.exit_code, "Error": self.error,
            "StartedAt": self.started_at, "FinishedAt": self.finished_at,
        }

    def summary(self, health: str) -> str:
        """As `docker ps` says it."""
        if self.running or self.restarting:
            since = times.ago(time.time_ns() - times.nanoseconds(self.started_at))
            if self.paused:
                return f"Up {since} (Paused)"
            if self.restarting:
                return f"Restarting ({self.exit_code}) {times.ago(time.time_ns() - times.nanoseconds(self.finished_at))} ago"
            shown = "health: starting" if health == "starting" else health
            return f"Up {since}" + (f" ({shown})" if shown and shown != "none" else "")
        if self.removing:
            return "Removal In Progress"
        if self.dead:
            return "Dead"
        if self.started_at == times.ZERO:
            return "Created"
        if self.finished_at == times.ZERO:
            return ""
        return f"Exited ({self.exit_code}) {times.ago(time.time_ns() - times.nanoseconds(self.finished_at))} ago"


class Health:
    """What the checks of a container's health found."""

    def __init__(self) -> None:
        self.status = "starting"
        self.failing_streak = 0
        self.log: list[dict[str, Any]] = []

    def shown(self) -> dict[str, Any]:
        """For answers."""
        return {"Status": self.status, "FailingStreak": self.failing_streak, "Log": self.log}


class Container:
    """One container."""

    def __init__(self, record: dict[str, Any], directory: str) -> None:
        self.directory = directory
        self.id: str = record["id"]
        self.name: str = record["name"]
        self.created: str = record["created"]
        self.config: dict[str, Any] = record["config"]
        self.host: dict[str, Any] = record["host"]
        self.path: str = record["path"]
        self.args: list[str] = record["args"]
        self.image_id: str = record["image_id"]
        self.image_name: str = record["image_name"]
        self.snapshotter: str = record["snapshotter"]
        self.mounts: list[dict[str, Any]] = record["mounts"]
        self.networks: dict[str, Any] = record.get("networks", {})
        self.restart_count: int = record.get("restart_count", 0)
        self.manually_stopped: bool = record.get("manually_stopped", False)
        self.fresh: bool = record.get("fresh", False)
        """Nothing has written to its root yet, so that it is as the image has it."""
        self.machine: bool = record.get("machine", False)
        """The machine's own programs are part of its root (boxship.images.builtin)."""
        self.state = State()
        for name, value in record.get("state", {}).items():
            setattr(self.state, name, value)

        # under way
        self.lock = asyncio.Lock()
        self.streams: Streams | None = None
        self.log: LogFile | None = None
        self.health: Health | None = None
        self.health_task: asyncio.Task[None] | None = None
        self.restart_task: asyncio.Task[None] | None = None
        self.restart_delay = 0.0
        self.execs: dict[str, Any] = {}
        self.next_exit: list[asyncio.Future[None]] = []
        self.removed: list[asyncio.Future[None]] = []
        self.shm_mounted = False

    def record(self) -> dict[str, Any]:
        """For the store."""
        return {
            "id": self.id, "name": self.name, "created": self.created, "config": self.config, "host": self.host,
            "path": self.path,
            "args": self.args, "image_id": self.image_id, "image_name": self.image_name, "snapshotter": self.snapshotter,
            "mounts": self.mounts, "networks": self.networks, "restart_count": self.restart_count,
            "manually_stopped": self.manually_stopped, "fresh": self.fresh, "machine": self.machine, "state": self.state.record(),
        }

    @property
    def log_driver(self) -> str:
        """The log driver."""
        return str(self.host["LogConfig"]["Type"])

    @property
    def log_path(self) -> str:
        """Where its log is; "" when it keeps none."""
        if self.log_driver == "local":
            return f"{self.directory}/local-logs/container.log"
        return f"{self.directory}/{self.id}-json.log" if self.log_driver == "json-file" else ""

    def file(self, name: str) -> str:
        """A file of its own on the host, such as `hosts`."""
        return os.path.join(self.directory, name)

    @property
    def health_status(self) -> str:
        """"" for none."""
        return self.health.status if self.health is not None and self.state.running else ""

    @property
    def labels(self) -> dict[str, str]:
        """Its labels."""
        return self.config["Labels"] or {}

    def attributes(self, **more: str) -> dict[str, str]:
        """What its events say."""
        return {**self.labels, "image": self.image_name, "name": self.name, **more}

    def wake(self, waiting: list[asyncio.Future[None]]) -> None:
        """Wake those who wait for an exit or for the removal."""
        for future in waiting:
            if not future.done():
                future.set_result(None)
        waiting.clear()

    def wait_for(self, waiting: list[asyncio.Future[None]]) -> asyncio.Future[None]:
        """A future for the next exit (`next_exit`) or the removal (`removed`)."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting[:] = [each for each in waiting if not each.done()]  # those whose clients went away
        waiting.append(future)
        return future
