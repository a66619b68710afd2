"""What a container goes through: stop, restart, kill, rm, wait, pause, unpause, rename, update; and its ports.

Runs in: the boxship command.
Spec: docker's commands of these names; Docker Engine API, /containers/{id}/….
"""

from __future__ import annotations

from boxship.cli import flags as f
from boxship.cli.command import MANY, Command, each
from boxship.cli.http.client import path, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from boxship.cli.command import Call


def target(name: str, verb: str = "") -> str:
    """The path of a container, or of something that is done with it."""
    return f"/containers/{quote(name).replace('/', '%2F')}" + (f"/{verb}" if verb else "")


def _stop(verb: str) -> Callable[[Call], int]:
    def act(call: Call) -> int:
        seconds = call.number("timeout") if call.number("timeout") is not None else call.number("time")
        query = {"t": seconds, "signal": call.text("signal") or None}
        return each(call, call.words, lambda name: call.engine.send("POST", path(target(name, verb), query)).read())

    return act


def _kill(call: Call) -> int:
    query = {"signal": call.text("signal") or "KILL"}
    return each(call, call.words, lambda name: call.engine.send("POST", path(target(name, "kill"), query)).read())


def _rm(call: Call) -> int:
    from boxship.cli.http.client import ApiError
    from boxship.cli.show.table import write

    missing: list[str] = []
    query = {"v": call.on("volumes"), "link": call.on("link"), "force": call.on("force")}

    def remove(name: str) -> None:
        name = name.strip("/")
        if not name:
            raise ApiError(400, "container name cannot be empty")
        try:
            call.engine.send("DELETE", path(target(name), query)).read()
        except ApiError as error:
            if not call.on("force") or error.status != 404:
                raise
            missing.append(str(error))
            return
        write(f"{name}\n")

    code = each(call, call.words, remove, echo=False)
    # What is not there was to be gone: said, but no failure.
    write("".join(f"{text}\n" for text in missing), 2)
    return code


def _plain(verb: str) -> Callable[[Call], int]:
    return lambda call: each(call, call.words, lambda name: call.engine.send("POST", target(name, verb)).read())


def _wait(call: Call) -> int:
    from boxship.cli.show.table import write

    def wait(name: str) -> None:
        answer = call.engine.send("POST", target(name, "wait")).json()
        write(f"{answer['StatusCode']}\n")

    return each(call, call.words, wait, echo=False)


def _rename(call: Call) -> int:
    from boxship.cli.http.client import ApiError
    from boxship.kit.errors import BoxshipError

    old, new = (word.strip() for word in call.words)
    if not old or not new:
        raise BoxshipError("Error: Neither old nor new names may be empty")
    try:
        call.engine.send("POST", path(target(old, "rename"), {"name": new})).read()
    except ApiError as error:
        from boxship.cli.show.table import write

        write(f"{error}\nError: failed to rename container named {old}\n", 2)
        return 1
    return 0


def resources(call: Call) -> dict[str, Any]:
    """The limits that `update` and `create` have in common. Raises UsageError."""
    from boxship.cli import values
    from boxship.kit.errors import InvalidArgument

    found: dict[str, Any] = {}
    sizes = {"memory": "Memory", "memory-reservation": "MemoryReservation", "memory-swap": "MemorySwap"}
    shown = {flag: f"--{flag}" for flag in sizes} | {"memory": "-m, --memory"}
    for flag, key in sizes.items():
        text = call.text(flag)
        if text:
            try:
                found[key] = -1 if text == "-1" and flag == "memory-swap" else values.size(text)
            except InvalidArgument as error:
                raise f.UsageError(f'invalid argument "{text}" for "{shown[flag]}" flag: {error}') from None
    for flag, key in (
        ("cpu-shares", "CpuShares"),
        ("cpu-period", "CpuPeriod"),
        ("cpu-quota", "CpuQuota"),
        ("pids-limit", "PidsLimit"),
        ("blkio-weight", "BlkioWeight"),
        ("cpu-rt-period", "CpuRealtimePeriod"),
        ("cpu-rt-runtime", "CpuRealtimeRuntime"),
    ):
        number = call.number(flag)
        if number is not None:
            found[key] = number
    for flag, key in (("cpuset-cpus", "CpusetCpus"), ("cpuset-mems", "CpusetMems")):
        if call.text(flag):
            found[key] = call.text(flag)
    if call.text("cpus"):
        found["NanoCpus"] = nano_cpus(call.text("cpus"))
    if call.text("restart"):
        found["RestartPolicy"] = restart_policy(call.text("restart"))
    return found


def nano_cpus(text: str) -> int:
    """Billionths of "1.5" processors. Raises UsageError."""
    whole, _, fraction = text.partition(".")
    digits = (whole or "0") + fraction
    if not digits.isdigit() or len(fraction) > 9:
        why = "value is too precise" if digits.isdigit() else f"failed to parse {text} as a rational number"
        raise f.UsageError(f'invalid argument "{text}" for "--cpus" flag: {why}')
    return int((whole or "0") + fraction.ljust(9, "0"))


def restart_policy(text: str) -> dict[str, object]:
    """ "on-failure:3" as the engine takes it. Raises InvalidArgument."""
    from boxship.kit.errors import InvalidArgument

    name, colon, count = text.partition(":")
    if colon and not name:
        raise InvalidArgument("invalid restart policy format: no policy provided before colon")
    if colon:
        try:
            return {"Name": name, "MaximumRetryCount": int(count)}
        except ValueError:
            raise InvalidArgument("invalid restart policy format: maximum retry count must be an integer") from None
    return {"Name": name, "MaximumRetryCount": 0}


def _update(call: Call) -> int:
    from boxship.cli.show.table import write
    from boxship.kit.errors import BoxshipError

    if not call.parsed.given:
        raise BoxshipError("you must provide one or more flags when using this command")
    body = resources(call)
    warnings: list[str] = []

    def update(name: str) -> None:
        answer = call.engine.send("POST", target(name, "update"), body).json() or {}
        warnings.extend(answer.get("Warnings") or [])

    code = each(call, call.words, update)
    for text in warnings:
        write(f"{text}\n", 1)
    return code


def _port(call: Call) -> int:
    from boxship.cli.show.table import write
    from boxship.kit.errors import BoxshipError

    found = (call.engine.send("GET", target(call.words[0], "json")).json().get("NetworkSettings") or {}).get("Ports") or {}
    if len(call.words) > 1:
        wanted = call.words[1] if "/" in call.words[1] else f"{call.words[1]}/tcp"
        if not found.get(wanted):
            raise BoxshipError(f"Error: No public port '{call.words[1]}' published for {call.words[0]}")
        lines = [_binding(binding) for binding in found[wanted]]
    else:
        lines = [f"{port} -> {_binding(binding)}" for port in sorted(found, key=_port_key) for binding in found[port] or []]
    write("".join(f"{line}\n" for line in lines))
    return 0


def _port_key(text: str) -> tuple[int, str]:
    number, _, protocol = text.partition("/")
    return int(number), protocol


def _binding(binding: dict[str, str]) -> str:
    address = binding.get("HostIp") or "0.0.0.0"  # how docker shows every address
    return f"[{address}]:{binding['HostPort']}" if ":" in address else f"{address}:{binding['HostPort']}"


LIMITS = """
blkio-weight int | Block IO (relative weight), between 10 and 1000, or 0 to disable
cpu-period int | Limit CPU CFS (Completely Fair Scheduler) period
cpu-quota int | Limit CPU CFS (Completely Fair Scheduler) quota
cpu-rt-period int | Limit the CPU real-time period in microseconds
cpu-rt-runtime int | Limit the CPU real-time runtime in microseconds
c,cpu-shares int | CPU shares (relative weight)
cpus decimal | Number of CPUs
cpuset-cpus string | CPUs in which to allow execution (0-3, 0,1)
cpuset-mems string | MEMs in which to allow execution (0-3, 0,1)
m,memory bytes | Memory limit
memory-reservation bytes | Memory soft limit
memory-swap bytes | Swap limit: memory plus swap, -1 for no limit
pids-limit int | Limit of processes and threads, -1 for none
restart string | Restart policy to apply when a container exits
"""
_SEVERAL = " CONTAINER [CONTAINER...]"
_STOP = """
s,signal string | Signal to send to the container
t,timeout int | Seconds to wait before killing the container
time int |
"""

COMMANDS = {
    "kill": Command(
        f" [OPTIONS]{_SEVERAL}",
        "Kill one or more running containers",
        _kill,
        "s,signal string | Signal to send to the container",
        least=1,
        most=MANY,
    ),
    "pause": Command(_SEVERAL, "Pause all processes within one or more containers", _plain("pause"), least=1, most=MANY),
    "port": Command(" CONTAINER [PRIVATE_PORT[/PROTO]]", "List port mappings of a container", _port, least=1, most=2),
    "rename": Command(" CONTAINER NEW_NAME", "Rename a container", _rename, least=2, most=2),
    "restart": Command(f" [OPTIONS]{_SEVERAL}", "Restart one or more containers", _stop("restart"), _STOP, least=1, most=MANY),
    "rm": Command(
        f" [OPTIONS]{_SEVERAL}",
        "Remove one or more containers",
        _rm,
        """
f,force | Force the removal of a running container (uses SIGKILL)
l,link | Remove the specified link
v,volumes | Remove anonymous volumes associated with the container
""",
        least=1,
        most=MANY,
    ),
    "stop": Command(f" [OPTIONS]{_SEVERAL}", "Stop one or more running containers", _stop("stop"), _STOP, least=1, most=MANY),
    "unpause": Command(_SEVERAL, "Unpause all processes within one or more containers", _plain("unpause"), least=1, most=MANY),
    "update": Command(
        f" [OPTIONS]{_SEVERAL}", "Update the configuration of one or more containers", _update, LIMITS, least=1, most=MANY
    ),
    "wait": Command(_SEVERAL, "Block until one or more containers stop, then print their exit codes", _wait, least=1, most=MANY),
}
