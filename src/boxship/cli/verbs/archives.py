"""Images and archives: load, save, import.

Runs in: the boxship command.
Spec: docker's commands of these names; Docker Engine API, /images/load, /images/get, POST /images/create?fromSrc=.
"""

from __future__ import annotations

import os

from boxship.cli.command import MANY, Command
from boxship.cli.http.client import path
from boxship.kit.errors import BoxshipError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from boxship.cli.command import Call

PIECE = 1 << 18


def pieces(fd: int, seen: Callable[[int], None] | None = None) -> Iterator[bytes]:
    """All of a descriptor; `seen` is told how much in all so far."""
    total = 0
    while piece := os.read(fd, PIECE):
        total += len(piece)
        yield piece
        if seen is not None:
            seen(total)


def open_input(name: str) -> int:
    """A descriptor for a file that is given by name. Raises BoxshipError."""
    try:
        return os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise BoxshipError(f"open {name}: {(error.strerror or '').lower()}") from None


def save_to(name: str, body: Iterable[bytes], what: str, shown: Callable[[int], None] | None = None) -> None:
    """Write a stream to a file, which is whole or not there, or to standard output, which must not be a terminal."""
    from boxship.cli.show.table import write

    if not name:
        for piece in body:
            write(piece)
        return
    if os.path.isdir(name) or (os.path.dirname(name) and not os.path.isdir(os.path.dirname(name))):
        why = (
            f'invalid output path: directory "{os.path.dirname(name)}" does not exist'
            if not os.path.isdir(name)
            else f'invalid output path: "{name}" must be a directory or a regular file'
        )
        raise BoxshipError(f"failed to {what}: {why}")
    if os.path.exists(name) and not os.path.isfile(name):
        with open(name, "wb", buffering=0) as out:
            for piece in body:
                write(piece, out.fileno())
        return
    temporary = f"{os.path.dirname(name) or '.'}/.boxship_temp_{os.urandom(6).hex()}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    total = 0
    try:
        for piece in body:
            write(piece, fd)
            total += len(piece)
            if shown is not None:
                shown(total)
        os.rename(temporary, name)
    except BaseException:
        os.unlink(temporary)
        raise
    finally:
        os.close(fd)


def refuse_terminal(name: str) -> None:
    """Raises BoxshipError when the archive would go to a terminal."""
    if not name and os.isatty(1):
        raise BoxshipError("cowardly refusing to save to a terminal. Use the -o flag or redirect")


def _load(call: Call) -> int:
    from boxship.cli.show.progress import show

    name = call.text("input")
    fd = open_input(name) if name else 0
    if not name and os.isatty(0):
        raise BoxshipError("requested load from stdin, but stdin is empty")
    quiet = call.on("quiet") or not os.isatty(1)
    query: dict[str, object] = {"quiet": "1" if quiet else "0", "platform": call.text("platform") or None}
    response = call.engine.send("POST", path("/images/load", query), upload=pieces(fd))
    if "json" in response.headers.get("content-type", ""):
        show(response.lines(), environ=call.environ)
    else:
        from boxship.cli.show.table import write

        for piece in response.pieces():
            write(piece)
    return 0


def _save(call: Call) -> int:
    refuse_terminal(call.text("output"))
    query = {"names": list(call.words), "platform": call.text("platform") or None}
    save_to(call.text("output"), call.engine.send("GET", path("/images/get", query)).pieces(), "save image")
    return 0


def _import(call: Call) -> int:
    from boxship.cli.show.progress import show
    from boxship.cli.verbs.images import split
    from boxship.cli.verbs.transfer import check_reference

    source = call.words[0]
    repository = tag = ""
    if len(call.words) > 1:
        check_reference(call.words[1])
        repository, tag = split(call.words[1])
    query = {
        "repo": repository or None,
        "tag": tag or None,
        "message": call.text("message") or None,
        "changes": call.all("change"),
        "platform": call.text("platform") or None,
    }
    if source.startswith(("http://", "https://")):
        response = call.engine.send("POST", path("/images/create", {"fromSrc": source, **query}))
    else:
        fd = 0 if source == "-" else open_input(source)
        response = call.engine.send("POST", path("/images/create", {"fromSrc": "-", **query}), upload=pieces(fd))
    show(response.lines(), environ=call.environ)
    return 0


COMMANDS = {
    "import": Command(
        " [OPTIONS] file|URL|- [REPOSITORY[:TAG]]",
        "Import the contents from a tarball to create a filesystem image",
        _import,
        """
c,change list | Apply Dockerfile instruction to the created image
m,message string | Set commit message for imported image
platform string | Set platform if the engine has images of several
""",
        least=1,
        most=2,
    ),
    "load": Command(
        " [OPTIONS]",
        "Load an image from a tar archive or STDIN",
        _load,
        """
i,input string | Read from tar archive file, instead of STDIN
platform string | Load only this platform's image
q,quiet | Suppress the load output
""",
    ),
    "save": Command(
        " [OPTIONS] IMAGE [IMAGE...]",
        "Save one or more images to a tar archive (streamed to STDOUT by default)",
        _save,
        """
o,output string | Write to a file, instead of STDOUT
platform string | Save only this platform's image
""",
        least=1,
        most=MANY,
    ),
}
