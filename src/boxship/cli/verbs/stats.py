"""What containers use and run: stats, top.

Runs in: the boxship command.
Spec: docker stats and top; Docker Engine API, /containers/{id}/stats, /containers/{id}/top.
"""

from __future__ import annotations

import os

from boxship.cli.command import LISTING, MANY, Command
from boxship.cli.http.client import ApiError, path
from boxship.cli.show import units
from boxship.cli.show.table import Listing, columns, write
from boxship.cli.verbs.lifecycle import target

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from boxship.cli.command import Call

_HEADINGS = {
    "Container": "CONTAINER",
    "ID": "CONTAINER ID",
    "Name": "NAME",
    "CPUPerc": "CPU %",
    "MemUsage": "MEM USAGE / LIMIT",
    "MemPerc": "MEM %",
    "NetIO": "NET I/O",
    "BlockIO": "BLOCK I/O",
    "PIDs": "PIDS",
}
_DEFAULT = ("ID", "Name", "CPUPerc", "MemUsage", "MemPerc", "NetIO", "BlockIO", "PIDs")


def fields(name: str, now: dict[str, Any], before: dict[str, Any] | None, *, full: bool) -> dict[str, object]:
    """One line, from an answer of the engine and the one before it."""
    cpu, memory = now.get("cpu_stats") or {}, now.get("memory_stats") or {}
    last = before or now.get("precpu_stats") or {}
    used = (cpu.get("cpu_usage") or {}).get("total_usage", 0) - (last.get("cpu_usage") or {}).get("total_usage", 0)
    system = cpu.get("system_cpu_usage", 0) - (last.get("system_cpu_usage") or 0)
    processors = cpu.get("online_cpus") or len((cpu.get("cpu_usage") or {}).get("percpu_usage") or []) or 1
    percent = used / system * processors * 100 if used > 0 and system > 0 else 0.0
    details = memory.get("stats") or {}
    # What the kernel would give back is not counted: v1 total_inactive_file, v2 inactive_file.
    inactive = details.get("total_inactive_file", details.get("inactive_file", 0))
    usage, limit = memory.get("usage", 0), memory.get("limit", 0)
    usage = usage - inactive if inactive < usage else usage
    received = sum(net.get("rx_bytes", 0) for net in (now.get("networks") or {}).values())
    sent = sum(net.get("tx_bytes", 0) for net in (now.get("networks") or {}).values())
    blocks = {"read": 0, "write": 0}
    for entry in (now.get("blkio_stats") or {}).get("io_service_bytes_recursive") or []:
        if entry["op"].lower() in blocks:
            blocks[entry["op"].lower()] += entry["value"]
    identity = str(now.get("id") or "")
    gone = not identity and not memory
    shown: dict[str, object] = {
        "Container": name,
        "ID": (identity if full else identity[:12]) or name,
        "Name": str(now.get("name") or "").removeprefix("/") or "--",
        "CPUPerc": f"{percent:.2f}%",
        "MemUsage": f"{units.binary_size(usage)} / {units.binary_size(limit)}",
        "MemPerc": f"{usage / limit * 100 if limit else 0:.2f}%",
        "NetIO": f"{units.size(received, 3)} / {units.size(sent, 3)}",
        "BlockIO": f"{units.size(blocks['read'], 3)} / {units.size(blocks['write'], 3)}",
        "PIDs": str((now.get("pids_stats") or {}).get("current", 0)),
    }
    if gone:
        shown |= {"CPUPerc": "--", "MemUsage": "-- / --", "MemPerc": "--", "NetIO": "--", "BlockIO": "--", "PIDs": "--"}
    return shown


def _names(call: Call) -> list[str]:
    if call.words:
        return list(call.words)
    found = call.engine.send("GET", path("/containers/json", {"all": call.on("all")})).json()
    return [str(container["Id"])[:12] for container in found]


def _stats(call: Call) -> int:
    form = call.format()
    listing = Listing(form, _DEFAULT, _HEADINGS)
    before: dict[str, dict[str, Any]] = {}
    query = {"stream": "0"}
    for name in call.words:
        call.engine.send("GET", target(name, "json")).read()  # names the one that is not there
    fancy = os.isatty(1) and not call.on("no-stream") and form in ("", "table")
    first = True
    while True:
        lines = []
        for name in _names(call):
            try:
                # Without one-shot the engine itself waits for a second sample.
                answer = call.engine.send(
                    "GET", path(target(name, "stats"), query if first else {**query, "one-shot": "1"})
                ).json()
            except ApiError as error:
                if error.status != 404:
                    raise
                continue
            lines.append(fields(name, answer, before.get(name), full=call.on("no-trunc")))
            before[name] = answer.get("cpu_stats") or {}
        text = listing.text(lines)
        if fancy:
            # Home, each line cleared behind its end, and what is below.
            text = "\x1b[H" + ("\x1b[J" if first else "") + "".join(f"{line}\x1b[K\n" for line in text.splitlines()) + "\x1b[J"
        write(text)
        if call.on("no-stream") or (not call.words and not lines and not fancy):
            return 0
        first = False
        import time

        time.sleep(1)


def _top(call: Call) -> int:
    words: Sequence[str] = call.words[1:]
    found = call.engine.send("GET", path(target(call.words[0], "top"), {"ps_args": " ".join(words) or None})).json()
    rows = [found["Titles"], *(found["Processes"] or [])]
    write(columns(rows, least=20))
    return 0


COMMANDS = {
    "stats": Command(
        " [OPTIONS] [CONTAINER...]",
        "Display a live stream of container(s) resource usage statistics",
        _stats,
        LISTING
        + """
a,all | Show all containers (default shows just running)
no-stream | Disable streaming stats and only pull the first result
no-trunc | Do not truncate output
""",
        most=MANY,
    ),
    "top": Command(
        " CONTAINER [ps OPTIONS]", "Display the running processes of a container", _top, least=1, most=MANY, interspersed=False
    ),
}
