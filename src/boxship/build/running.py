"""What a RUN step asks of whoever runs containers.

Runs in: the daemon, on its event loop. The engine carries it out (`boxship.engine.building`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, Protocol

Output = Callable[[int, bytes], Awaitable[None]]
"""Gets (1 for stdout, 2 for stderr, bytes); the step is held back until it returns."""


class Limits(NamedTuple):
    """What RUN steps may use, as the parameters of `POST /build` say it; 0 and "" are no limit."""

    memory: int = 0
    memory_swap: int = 0
    cpu_shares: int = 0
    cpu_quota: int = 0
    cpu_period: int = 0
    cpuset_cpus: str = ""
    cpuset_mems: str = ""
    shm_size: int = 0
    pids: int = 4096
    """Processes at once: a step that forks without end fails instead of the machine."""
    ulimits: tuple[dict[str, Any], ...] = ()
    cgroup_parent: str = ""
    seconds: float = 0.0
    """How long one step may take."""


class Work(NamedTuple):
    """One command in a container."""

    key: str
    """Name of the active snapshot, and the container's id."""
    below: Sequence[str]
    """The diff ids of the layers that it is made on."""
    args: Sequence[str]
    env: Sequence[str]
    """NAME=VALUE."""
    user: str
    cwd: str
    network: str
    """"default", "none", "host", or what else the engine knows by that name."""
    insecure: bool
    """As with --privileged."""
    mounts: Sequence[dict[str, Any]]
    """As the runtime specification has them, in addition to the usual ones."""
    hosts: Sequence[str]
    """NAME:ADDRESS, for /etc/hosts."""
    limits: Limits


class Runner(Protocol):
    """Runs containers for steps."""

    async def run(self, work: Work, mounts: list[Any], output: Output) -> int:
        """Run to the end: the exit code. `mounts`: the root file system's.

        When it is cancelled, or takes longer than it may (DeadlineExceeded), nothing of the container is left. What was made in
        the root only to mount on is taken away again. Raises the engine's errors for what cannot be started.
        """
