"""Checks of containers' health: a command that is run in them now and then.

Runs in: the daemon, on its event loop.
Spec: Docker Engine API (HealthConfig); dockerd's defaults: every 30 s, 30 s each, 3 failures, every 5 s while it starts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from boxship.engine import times
from boxship.engine.container import Container, Health
from boxship.engine.core import Core
from boxship.kit.errors import BoxshipError

_S = 1_000_000_000
_OUTPUT_MAX = 4096
_KEPT = 5


class Checker:
    """Checks all containers that want it.

    `run` is set by the part that can run commands: (container, words, limit in seconds) → (code, output).
    """

    def __init__(self, core: Core, spawn: Callable[[Any], asyncio.Task[None]]) -> None:
        self._core = core
        self._spawn = spawn
        self.run: Any = None

    def begin(self, container: Container) -> None:
        """It was started."""
        self.end(container)
        config = container.config["Healthcheck"]
        test = (config or {}).get("Test") or []
        if not test or test[0] in ("", "NONE"):
            container.health = None
            return
        container.health = Health()
        container.health_task = self._spawn(self._check(container, config, _words(container, test)))

    def end(self, container: Container) -> None:
        """It does not run any more."""
        if container.health_task is not None:
            container.health_task.cancel()
            container.health_task = None
        if container.health is not None and container.health.status != "unhealthy":
            container.health.status = "unhealthy"

    async def _check(self, container: Container, config: dict[str, Any], words: list[str]) -> None:
        interval = (config["Interval"] or 30 * _S) / _S
        limit = (config["Timeout"] or 30 * _S) / _S
        grace_until = time.monotonic() + config["StartPeriod"] / _S
        start_interval = (config["StartInterval"] or 5 * _S) / _S
        health = container.health
        assert health is not None
        while True:
            starting = health.status == "starting" and time.monotonic() < grace_until
            await asyncio.sleep(start_interval if starting else interval)
            if container.state.paused or not container.state.running:
                continue
            began = times.now()
            try:
                code, output = await self.run(container, words, limit)
            except BoxshipError as error:
                code, output = -1, str(error)
            self._note(container, health, config, began, code, output, in_grace=time.monotonic() < grace_until)

    def _note(self, container: Container, health: Health, config: dict[str, Any], began: str, code: int, output: str, *,
              in_grace: bool) -> None:
        health.log = [*health.log[1 - _KEPT :], {
            "Start": began, "End": times.now(), "ExitCode": code, "Output": output[:_OUTPUT_MAX]}]
        former = health.status
        if code == 0:
            health.failing_streak = 0
            health.status = "healthy"
        elif not (former == "starting" and in_grace):
            health.failing_streak += 1
            if health.failing_streak >= (config["Retries"] or 3):
                health.status = "unhealthy"
        if health.status != former:
            self._core.announce(container, f"health_status: {health.status}")


def _words(container: Container, test: list[str]) -> list[str]:
    if test[0] == "CMD-SHELL":
        shell = container.config["Shell"] or ["/bin/sh", "-c"]
        return [*shell, *test[1:]]
    return test[1:] if test[0] == "CMD" else test
