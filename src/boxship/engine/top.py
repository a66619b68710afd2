"""The processes of a container, as ps(1) of the host shows them.

Runs in: the daemon.
Spec: Docker Engine API, ContainerTop: the columns of `ps ARGS` on the host, only the container's processes.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

from boxship.api.containerd.pb import tasks
from boxship.engine.container import Container
from boxship.engine.core import Core
from boxship.kit.errors import BoxshipError, FailedPrecondition, InvalidArgument, Unsupported


async def top(core: Core, container: Container, args: str) -> dict[str, Any]:
    """{Titles, Processes}. Raises FailedPrecondition when it does not run, InvalidArgument for arguments that ps refuses."""
    args = args or "-ef"
    if re.search(r"\s+(-[a-zA-Z]*o|--format)\s*=?\s*[^\s]*\bpid=", f" {args}") and "pid=" in args:
        raise InvalidArgument("pid= is not allowed: the column has to have its title")
    if not container.state.running:
        raise FailedPrecondition(f"container {container.id} is not running")
    if container.state.restarting:
        raise FailedPrecondition(f"Container {container.id} is restarting, wait until the container is running")
    found = await core.containerd.tasks.ListPids(tasks.ListPidsRequest(container_id=container.id), core.call)
    pids = {str(each.pid) for each in found.processes}
    try:
        process = await asyncio.create_subprocess_exec(
            "ps", *args.split(), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
    except FileNotFoundError:
        raise Unsupported("ps is missing on the host", "install procps") from None
    out, errors = await process.communicate()
    if process.returncode:
        words = errors.decode(errors="replace").strip().splitlines()
        raise BoxshipError(f"ps: {words[0] if words else f'exit status {process.returncode}'}")
    lines = out.decode(errors="replace").splitlines()
    titles = lines[0].split()
    if "PID" not in titles:
        raise BoxshipError("Couldn't find PID field in ps output")
    at = titles.index("PID")
    rows = []
    for line in lines[1:]:
        fields = line.split(None, len(titles) - 1)
        if len(fields) > at and fields[at] in pids:
            rows.append([field.rstrip() for field in fields])
    return {"Processes": rows, "Titles": titles}
