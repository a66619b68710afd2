"""`boxship logs`.

Runs in: the boxship command.
Spec: docker logs; Docker Engine API, GET /containers/{id}/logs.
"""

from __future__ import annotations

from boxship.cli.command import Command
from boxship.cli.http.client import path
from boxship.cli.verbs.lifecycle import target

TYPE_CHECKING = False
if TYPE_CHECKING:
    from boxship.cli.command import Call


def _moment(text: str, what: str) -> str | None:
    from boxship.cli.show.units import moment
    from boxship.kit.errors import BoxshipError, InvalidArgument

    if not text:
        return None
    try:
        return moment(text)
    except InvalidArgument:
        raise BoxshipError(f'invalid value for "{what}": failed to parse value as time or duration: "{text}"') from None


def _logs(call: Call) -> int:
    from boxship.cli.http.stream import Frames, to_standard

    query = {
        "stdout": True,
        "stderr": True,
        "follow": call.on("follow"),
        "since": _moment(call.text("since"), "since"),
        "until": _moment(call.text("until"), "until"),
        "timestamps": call.on("timestamps"),
        "details": call.on("details"),
        "tail": call.text("tail") or "all",
    }
    found = call.engine.send("GET", target(call.words[0], "json")).json()
    response = call.engine.send("GET", path(target(found["Id"], "logs"), query))
    if found["Config"]["Tty"]:
        for piece in response.pieces():
            to_standard(1, piece)
        return 0
    frames = Frames(to_standard)
    for piece in response.pieces():
        frames.feed(piece)
    return 0


COMMANDS = {
    "logs": Command(
        " [OPTIONS] CONTAINER",
        "Fetch the logs of a container",
        _logs,
        """
details | Show extra details provided to logs
f,follow | Follow log output
since string | Show logs since timestamp (e.g. "2013-01-02T13:23:37Z") or relative (e.g. "42m" for 42 minutes)
n,tail string | Number of lines to show from the end of the logs
t,timestamps | Show timestamps
until string | Show logs before a timestamp (e.g. "2013-01-02T13:23:37Z") or relative (e.g. "42m" for 42 minutes)
""",
        least=1,
        most=1,
    )
}
