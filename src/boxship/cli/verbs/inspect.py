"""Low-level information: inspect, and container, image, network and volume inspect.

Runs in: the boxship command.
Spec: docker inspect; Docker Engine API, /containers/{id}/json, /images/{name}/json and the other kinds'.
"""

from __future__ import annotations

from boxship.cli.command import MANY, Command
from boxship.cli.http.client import ApiError, path, quote
from boxship.cli.show.table import write
from boxship.cli.verbs.lifecycle import target
from boxship.kit.errors import BoxshipError
from boxship.oci import text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from boxship.cli.command import Call

_KINDS = ("config", "container", "image", "network", "volume", "node", "service", "task", "plugin", "secret")


def _get(call: Call, kind: str, name: str) -> Any:
    if kind == "container":
        return call.engine.send("GET", path(target(name, "json"), {"size": call.parsed.values.get("size") is True})).json()
    if kind == "image":
        return call.engine.send(
            "GET", path(f"/images/{quote(name)}/json", {"platform": call.parsed.values.get("platform") or None})
        ).json()
    place = {"plugin": f"/plugins/{quote(name)}/json"}.get(kind, f"/{kind}s/{quote(name)}")
    return call.engine.send("GET", place).json()


def _any(call: Call, name: str) -> Any:
    kinds: Sequence[str] = ("container", "image", "network", "volume")
    if call.text("type"):
        if call.text("type") not in _KINDS:
            names = ", ".join(f'"{kind}"' for kind in sorted(_KINDS))
            raise BoxshipError(f'unknown type: "{call.text("type")}": must be one of {names}')
        kinds = (call.text("type"),)
    for kind in kinds:
        try:
            return _get(call, kind, name)
        except ApiError as error:
            # An engine without this kind of object has none of that name.
            if len(kinds) == 1 or (error.status not in (404, 501, 503) and not (len(kinds) > 1 and error.status in (400, 405))):
                raise
    what = call.text("type") or "object"
    raise BoxshipError(f"Error: No such {what}: {name}")


def _show(call: Call, get: Callable[[str], Any]) -> int:
    found, failures = [], []
    for name in call.words:
        try:
            found.append(get(name))
        except BoxshipError as error:
            if not isinstance(error, ApiError) and not str(error).startswith("Error"):
                raise
            failures.append(str(error))
    form = call.format()
    if form in ("", "json"):
        body = text.dumps(found, indent=None if form == "json" else "    ", html=False)
        write(body + "\n")
    else:
        from boxship.cli.show.gotemplate import Template

        template = Template(form.replace("\\t", "\t").replace("\\n", "\n"))
        for item in found:
            try:
                write(template.render(item) + "\n")
            except BoxshipError as error:
                write("\n")
                failures.append(str(error))
                break
        if not found:
            write("\n")
    for failure in failures:
        write(f"{failure}\n", 2)
    return 1 if failures else 0


_FLAGS = """
f,format string | Format output using a custom template: 'json' or a Go template
json | Print the output as JSON on one line
"""
_SIZE = "s,size | Display total file sizes if the type is container\n"

COMMANDS = {
    "inspect": Command(
        " [OPTIONS] NAME|ID [NAME|ID...]",
        "Return low-level information on objects",
        lambda call: _show(call, lambda name: _any(call, name)),
        _FLAGS
        + _SIZE
        + """
type string | Only inspect objects of the given type
platform string |
""",
        least=1,
        most=MANY,
    ),
    "container inspect": Command(
        " [OPTIONS] CONTAINER [CONTAINER...]",
        "Display detailed information on one or more containers",
        lambda call: _show(call, lambda name: _get(call, "container", name)),
        _FLAGS + _SIZE,
        least=1,
        most=MANY,
    ),
    "image inspect": Command(
        " [OPTIONS] IMAGE [IMAGE...]",
        "Display detailed information on one or more images",
        lambda call: _show(call, lambda name: _get(call, "image", name)),
        _FLAGS
        + """
size |
platform string | Inspect this platform's image
""",
        least=1,
        most=MANY,
    ),
    "network inspect": Command(
        " [OPTIONS] NETWORK [NETWORK...]",
        "Display detailed information on one or more networks",
        lambda call: _show(call, lambda name: _get(call, "network", name)),
        _FLAGS + "v,verbose | Verbose output for diagnostics\n",
        least=1,
        most=MANY,
    ),
    "volume inspect": Command(
        " [OPTIONS] VOLUME [VOLUME...]",
        "Display detailed information on one or more volumes",
        lambda call: _show(call, lambda name: _get(call, "volume", name)),
        _FLAGS,
        least=1,
        most=MANY,
    ),
}
