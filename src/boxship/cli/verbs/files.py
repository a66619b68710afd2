"""Files of containers: cp, export, diff, commit.

Runs in: the boxship command.
Spec: docker's commands of these names; Docker Engine API, /containers/{id}/archive, export, changes, POST /commit.
"""

from __future__ import annotations

import os
import stat

from boxship.cli.command import Command
from boxship.cli.http.client import ApiError, path
from boxship.cli.show.table import write
from boxship.cli.verbs.archives import refuse_terminal, save_to
from boxship.cli.verbs.lifecycle import target
from boxship.kit.errors import BoxshipError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import IO, Any

    from boxship.cli.command import Call

_SYMLINK = 1 << 27
"""os.ModeSymlink of Go, in the `mode` of X-Docker-Container-Path-Stat."""
_DIRECTORY = 1 << 31


def _split(word: str) -> tuple[str, str]:
    """(container, path) of "CONTAINER:PATH"; the container is "" for what is here."""
    if word == "-" or os.path.isabs(word):
        return "", word
    container, colon, inside = word.partition(":")
    if not colon or container.startswith(".") or "/" in container:
        return "", word
    return container, inside


class _Reader:
    """The body of an answer as a file to read from, for tarfile."""

    def __init__(self, source: Iterator[bytes]) -> None:
        self._source = source
        self._rest = b""

    def read(self, size: int = -1) -> bytes:
        while size < 0 or len(self._rest) < size:
            piece = next(self._source, b"")
            if not piece:
                break
            self._rest += piece
        piece, self._rest = (self._rest, b"") if size < 0 else (self._rest[:size], self._rest[size:])
        return piece


def _stat(call: Call, container: str, inside: str) -> dict[str, Any] | None:
    import binascii

    from boxship.oci import text

    try:
        response = call.engine.send("HEAD", path(target(container, "archive"), {"path": inside}))
    except ApiError as error:
        if error.status == 404:
            return None
        raise
    found = text.loads(
        binascii.a2b_base64(response.headers.get("x-docker-container-path-stat", "e30=")), "X-Docker-Container-Path-Stat"
    )
    return found if isinstance(found, dict) else None


def _cp(call: Call) -> int:
    source, destination = call.words
    from_container, from_path = _split(source)
    to_container, to_path = _split(destination)
    if from_container and to_container:
        raise BoxshipError("copying between containers is not supported")
    if not from_container and not to_container:
        raise BoxshipError("must specify at least one container source")
    if from_container:
        return _from_container(call, from_container, from_path, to_path)
    return _to_container(call, from_path, to_container, to_path)


def _from_container(call: Call, container: str, source: str, destination: str) -> int:
    if destination != "-" and destination and not os.path.lexists(os.path.dirname(os.path.abspath(destination))):
        raise BoxshipError(f'invalid output path: directory "{os.path.dirname(os.path.abspath(destination))}" does not exist')
    if call.on("follow-link"):
        found = _stat(call, container, source)
        if found and found.get("mode", 0) & _SYMLINK and found.get("linkTarget"):
            source = os.path.join(os.path.dirname(source), found["linkTarget"])
    # docker asks for what a folder holds by `/.` at the end.
    response = call.engine.send("GET", path(target(container, "archive"), {"path": source}))
    if destination == "-":
        for piece in response.pieces():
            write(piece)
        return 0
    size = _extract(response.pieces(), source, destination)
    _tell(call, size, f"{container}:{source}", destination)
    return 0


def _extract(body: Iterator[bytes], source: str, destination: str) -> int:
    """Unpack as cp does: into a folder that is there, or under the new name. Raises BoxshipError."""
    import tarfile

    into = os.path.isdir(destination)
    contents = source.endswith("/.") or source == "."
    if not into and destination.endswith("/") and not contents:
        pass  # a folder may be copied to a name that ends so; a file may not, which is seen below
    size = 0
    with tarfile.open(fileobj=_stream(_Reader(body)), mode="r|") as archive:
        for member in archive:
            first, slash, rest = member.name.strip("/").partition("/")
            if member.name.startswith("/") or ".." in member.name.split("/"):
                raise BoxshipError(f"the engine's archive names a path outside of it: {member.name}")
            if into:
                name = os.path.join(destination, rest if contents else member.name)
            else:
                name = os.path.join(destination, rest) if slash else destination
            if not into and not slash and not member.isdir() and destination.endswith("/"):
                raise BoxshipError(f'destination directory "{destination}" must exist to copy a file')
            _put(archive, member, name.rstrip("/") or destination, os.path.realpath(destination), first)
            size += member.size
    return size


def _stream(reader: _Reader) -> IO[bytes]:
    return reader  # type: ignore[return-value]  # tarfile's stream mode only reads


def _put(archive: Any, member: Any, name: str, root: str, first: str) -> None:
    parent = os.path.realpath(os.path.dirname(os.path.abspath(name)))
    above = os.path.dirname(root)
    if parent != above and not f"{parent}/".startswith(f"{root}/"):
        raise BoxshipError(f"the engine's archive leads out of {root} by a link: {member.name}")
    if member.isdir():
        os.makedirs(name, exist_ok=True)
        os.chmod(name, member.mode & 0o7777 | stat.S_IRWXU)
        return
    if os.path.isdir(name) and not os.path.islink(name):
        raise BoxshipError(f"cannot overwrite directory {name!r} with non-directory")
    if os.path.lexists(name):
        os.unlink(name)
    if member.issym():
        os.symlink(member.linkname, name)
    elif member.islnk():
        _, slash, rest = member.linkname.partition("/")
        os.link(os.path.join(root, rest if slash and member.linkname.startswith(f"{first}/") else member.linkname), name)
    elif member.isfile():
        content = archive.extractfile(member)
        with open(name, "wb") as out:
            while piece := content.read(1 << 18):
                out.write(piece)
        os.chmod(name, member.mode & 0o7777)
        os.utime(name, (member.mtime, member.mtime))
    elif member.ischr() or member.isblk():
        kind = stat.S_IFCHR if member.ischr() else stat.S_IFBLK
        os.mknod(name, kind | member.mode & 0o7777, os.makedev(member.devmajor, member.devminor))
    elif member.isfifo():
        os.mkfifo(name, member.mode & 0o7777)


def _to_container(call: Call, source: str, container: str, destination: str) -> int:
    query: dict[str, object] = {"noOverwriteDirNonDir": "true", "copyUIDGID": "true" if call.on("archive") else None}
    if source == "-":
        from boxship.cli.verbs.archives import pieces

        call.engine.send("PUT", path(target(container, "archive"), {"path": destination, **query}), upload=pieces(0)).read()
        return 0
    contents = source.endswith("/.") or source == "."
    local = source.rstrip("/") or "/"
    if contents:
        local = os.path.normpath(source)
    try:
        status = os.stat(local) if call.on("follow-link") or source.endswith("/") else os.lstat(local)
    except OSError as error:
        raise BoxshipError(f"lstat {os.path.abspath(local)}: {(error.strerror or '').lower()}") from None
    found = _stat(call, container, destination)
    if found and found.get("mode", 0) & _SYMLINK and found.get("linkTarget"):
        linked = found["linkTarget"]
        destination = linked if linked.startswith("/") else os.path.join(os.path.dirname(destination), linked)
        found = _stat(call, container, destination)
    folder = bool(found and found.get("mode", 0) & _DIRECTORY)
    if found and not folder and stat.S_ISDIR(status.st_mode):
        raise BoxshipError("cannot copy directory")
    if not found and destination.endswith("/") and not stat.S_ISDIR(status.st_mode):
        raise BoxshipError(f"Error response from daemon: no such directory: {destination}")
    if folder:
        where, name = destination, "." if contents else os.path.basename(os.path.abspath(local))
    else:
        where, name = os.path.dirname(destination.rstrip("/")) or "/", os.path.basename(destination.rstrip("/"))
    size = [0]
    body = _pack(local, name, size, follow=call.on("follow-link"))
    call.engine.send("PUT", path(target(container, "archive"), {"path": where, **query}), upload=body).read()
    _tell(call, size[0], source, f"{container}:{destination}")
    return 0


class _Collector:
    """What tarfile writes, handed on in pieces."""

    def __init__(self) -> None:
        self.data: list[bytes] = []

    def write(self, data: bytes) -> int:
        self.data.append(bytes(data))
        return len(data)

    def drain(self) -> bytes:
        taken, self.data = b"".join(self.data), []
        return taken


def _pack(local: str, name: str, size: list[int], *, follow: bool) -> Iterable[bytes]:
    import tarfile

    out = _Collector()
    archive = tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT)  # type: ignore[call-overload]

    def add(source: str, inside: str, *, top: bool) -> Iterator[bytes]:
        info = archive.gettarinfo(os.path.realpath(source) if top and follow else source, arcname=inside)
        if info is None:
            return  # a socket has no place in an archive
        info.name = inside
        size[0] += info.size
        if info.isreg():
            with open(source, "rb") as content:
                archive.addfile(info, content)
        else:
            archive.addfile(info)
        yield out.drain()
        if info.isdir():
            for entry in sorted(os.listdir(source)):
                yield from add(os.path.join(source, entry), f"{inside}/{entry}", top=False)

    yield from add(local, name, top=True)
    archive.close()
    yield out.drain()


def _tell(call: Call, size: int, source: str, destination: str) -> None:
    if os.isatty(2) and not call.on("quiet"):
        from boxship.cli.show.units import size as shown

        write(f"Successfully copied {shown(size)} to {destination}\n", 2)


def _export(call: Call) -> int:
    refuse_terminal(call.text("output"))
    save_to(call.text("output"), call.engine.send("GET", target(call.words[0], "export")).pieces(), "export container")
    return 0


def _diff(call: Call) -> int:
    from boxship.cli.show.table import Listing

    found = call.engine.send("GET", target(call.words[0], "changes")).json() or []
    kinds = {0: "C", 1: "A", 2: "D"}
    form = call.format()
    if not form:
        write("".join(f"{kinds[change['Kind']]} {change['Path']}\n" for change in found))
        return 0
    listing = Listing(form, ("Type", "Path"), {"Type": "CHANGE TYPE", "Path": "PATH"})
    listing.show([{"Type": kinds[change["Kind"]], "Path": change["Path"]} for change in found])
    return 0


def _commit(call: Call) -> int:
    from boxship.cli.verbs.images import split
    from boxship.cli.verbs.transfer import check_reference

    repository = tag = ""
    if len(call.words) > 1:
        check_reference(call.words[1])
        repository, tag = split(call.words[1])
    pause = "pause" not in call.parsed.given or call.on("pause")
    query = {
        "container": call.words[0],
        "repo": repository or None,
        "tag": tag or None,
        "comment": call.text("message") or None,
        "author": call.text("author") or None,
        "changes": call.all("change"),
        "pause": "1" if pause and not call.on("no-pause") else "0",
    }
    answer = call.engine.send("POST", path("/commit", query), {}).json()
    write(f"{answer['Id']}\n")
    return 0


COMMANDS = {
    "commit": Command(
        " [OPTIONS] CONTAINER [REPOSITORY[:TAG]]",
        "Create a new image from a container's changes",
        _commit,
        """
a,author string | Author (e.g., "John Hannibal Smith <hannibal@a-team.com>")
c,change list | Apply Dockerfile instruction to the created image
m,message string | Commit message
p,pause | Pause container during commit (default true)
no-pause | Do not pause the container during commit
""",
        least=1,
        most=2,
    ),
    "cp": Command(
        " [OPTIONS] CONTAINER:SRC_PATH DEST_PATH|-\n\tboxship cp [OPTIONS] SRC_PATH|- CONTAINER:DEST_PATH",
        "Copy files/folders between a container and the local filesystem",
        _cp,
        """
a,archive | Archive mode (copy all uid/gid information)
L,follow-link | Always follow symlinks in SRC_PATH
q,quiet | Say nothing when it is done
""",
        least=2,
        most=2,
    ),
    "diff": Command(
        " CONTAINER",
        "Inspect changes to files or directories on a container's filesystem",
        _diff,
        """
format string | Format output using a custom template: 'table', 'json' or a Go template
json | Print the output as JSON, one object a line
""",
        least=1,
        most=1,
    ),
    "export": Command(
        " [OPTIONS] CONTAINER",
        "Export a container's filesystem as a tar archive",
        _export,
        """
o,output string | Write to a file, instead of STDOUT
""",
        least=1,
        most=1,
    ),
}
