"""`boxship events`.

Runs in: the boxship command.
Spec: docker events; Docker Engine API, GET /events.
"""

from __future__ import annotations

import time

from boxship.cli.command import Command
from boxship.cli.http.client import path
from boxship.cli.show.table import write
from boxship.kit.errors import BoxshipError, InvalidArgument
from boxship.oci import text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from boxship.cli.command import Call


def line(event: dict[str, Any]) -> str:
    """ "TIME TYPE ACTION ID (key=value, …)"."""
    nanoseconds = event.get("timeNano") or event.get("time", 0) * 10**9
    seconds, fraction = divmod(nanoseconds, 10**9)
    at = time.localtime(seconds)
    zone = time.strftime("%z", at)
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", at) + f".{fraction:09d}" + ("Z" if zone == "+0000" else f"{zone[:3]}:{zone[3:]}")
    actor = event.get("Actor") or {}
    attributes = actor.get("Attributes") or {}
    shown = ", ".join(f"{key}={attributes[key]}" for key in sorted(attributes))
    return f"{stamp} {event.get('Type')} {event.get('Action')} {actor.get('ID')}" + (f" ({shown})" if shown else "")


def _moment(value: str) -> str | None:
    from boxship.cli.show.units import moment

    if not value:
        return None
    try:
        return moment(value)
    except InvalidArgument:
        raise BoxshipError(f'failed to parse value as time or duration: "{value}"') from None


def _events(call: Call) -> int:
    query = {"since": _moment(call.text("since")), "until": _moment(call.text("until")), "filters": call.filters()}
    form = call.format()
    template = None
    if form not in ("", "json"):
        from boxship.cli.show.gotemplate import Template

        template = Template(form)
    for raw in call.engine.send("GET", path("/events", query)).lines():
        event = text.loads(raw, "the engine's answer")
        assert isinstance(event, dict)
        attributes = (event.get("Actor") or {}).get("Attributes")
        if attributes:
            event["Actor"]["Attributes"] = {key: attributes[key] for key in sorted(attributes)}
        if form == "json":
            write(text.dumps(event) + "\n")
        else:
            write(
                (
                    template.render(
                        {
                            **event,
                            "Time": event.get("time"),
                            "TimeNano": event.get("timeNano"),
                            "ID": event.get("id"),
                            "Status": event.get("status"),
                            "From": event.get("from"),
                        }
                    )
                    if template
                    else line(event)
                )
                + "\n"
            )
    return 0


COMMANDS = {
    "events": Command(
        " [OPTIONS]",
        "Get real time events from the server",
        _events,
        """
f,filter filter | Filter output based on conditions provided
format string | Format output using a custom template: 'json' or a Go template
json | Print the output as JSON, one object a line
since string | Show all events created since timestamp
until string | Stream events until this timestamp
""",
    )
}
