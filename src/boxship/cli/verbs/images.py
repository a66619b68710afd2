"""Images in the store: images, rmi, tag, history.

Runs in: the boxship command.
Spec: docker's commands of these names; Docker Engine API, /images/….
"""

from __future__ import annotations

from boxship.cli.command import LISTING, MANY, Command
from boxship.cli.http.client import ApiError, path, quote
from boxship.cli.show import units
from boxship.cli.show.table import Listing, write
from boxship.kit.errors import BoxshipError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from boxship.cli.command import Call

HEADINGS = {
    "ID": "IMAGE ID",
    "Repository": "REPOSITORY",
    "Tag": "TAG",
    "Digest": "DIGEST",
    "CreatedSince": "CREATED",
    "CreatedAt": "CREATED AT",
    "Size": "SIZE",
    "Containers": "CONTAINERS",
    "VirtualSize": "SIZE",
    "SharedSize": "SHARED SIZE",
    "UniqueSize": "UNIQUE SIZE",
}
_NONE = "<none>"


def split(name: str) -> tuple[str, str]:
    """(repository, tag) of "host:5000/a/b:tag"; the tag is "" when there is none."""
    front, colon, tag = name.rpartition(":")
    return (front, tag) if colon and "/" not in tag else (name, "")


def familiar_name(name: str) -> str:
    """Without the parts that docker leaves out: docker.io/library/."""
    for prefix in ("docker.io/library/", "docker.io/"):
        if name.startswith(prefix):
            return name[len(prefix) :]
    return name


def rows(image: dict[str, Any], *, full: bool = False, digests: bool = False) -> list[dict[str, object]]:
    """The lines of one image in a list: one for each name."""
    tags: dict[str, list[str]] = {}
    for name in image.get("RepoTags") or []:
        repository, tag = split(familiar_name(name))
        if name != f"{_NONE}:{_NONE}":
            tags.setdefault(repository, []).append(tag)
    sums: dict[str, list[str]] = {}
    for name in image.get("RepoDigests") or []:
        repository, _, digest = name.partition("@")
        if name != f"{_NONE}@{_NONE}":
            sums.setdefault(familiar_name(repository), []).append(digest)
    found: list[tuple[str, str, str]] = []
    for repository, names in tags.items():
        mine = sums.pop(repository, [])
        if digests and mine:
            found += [(repository, tag, digest) for tag in names for digest in mine]
        else:
            found += [(repository, tag, _NONE) for tag in names]
    for repository, mine in sums.items():
        found += [(repository, _NONE, digest) for digest in mine] if digests else [(repository, _NONE, _NONE)]
    identity = str(image["Id"])
    shared, size = image.get("SharedSize", -1), image.get("Size") or 0

    def fields(repository: str, tag: str, digest: str) -> dict[str, object]:
        return {
            "ID": identity if full else identity.partition(":")[2][:12] or identity[:12],
            "Repository": repository,
            "Tag": tag,
            "Digest": digest,
            "CreatedSince": lambda: units.ago(image["Created"]) if image.get("Created", 0) > 0 else "N/A",
            "CreatedAt": lambda: units.local(image["Created"]),
            "Size": lambda: units.size(size, 3),
            "VirtualSize": lambda: units.size(size),
            "SharedSize": lambda: units.size(shared) if shared is not None and shared >= 0 else "N/A",
            "UniqueSize": lambda: units.size(size - shared) if shared is not None and shared >= 0 else "N/A",
            "Containers": lambda: (
                str(image["Containers"])
                if (image.get("Containers") or -1) >= 0 and image.get("Containers") is not None
                else "N/A"
            ),
        }

    return [fields(*each) for each in found or [(_NONE, _NONE, _NONE)]]


def _images(call: Call) -> int:
    names = ["Repository", "Tag", "ID", "CreatedSince", "Size"]
    if call.on("digests"):
        names.insert(2, "Digest")
    listing = Listing(call.format(), names, HEADINGS, quiet="ID" if call.on("quiet") else "", go_type="*formatter.imageContext")
    filters = call.filters()
    if call.words:
        filters.setdefault("reference", {})[call.words[0]] = True
    found = call.engine.send("GET", path("/images/json", {"all": call.on("all"), "filters": filters})).json()
    digests = call.on("digests") or listing.needs("Digest")
    lines = [line for image in found for line in rows(image, full=call.on("no-trunc"), digests=digests)]
    listing.show(lines)
    return 0


def _rmi(call: Call) -> int:
    query = {"force": call.on("force"), "noprune": call.on("no-prune"), "platforms": call.text("platform") or None}
    errors, fatal = [], False
    for name in call.words:
        try:
            for item in call.engine.send("DELETE", path(f"/images/{quote(name)}", query)).json() or []:
                write("".join(f"{word}: {item[word]}\n" for word in ("Deleted", "Untagged") if item.get(word)))
        except ApiError as error:
            fatal = fatal or error.status != 404
            errors.append(str(error))
    for text in errors:
        write(f"{text}\n", 2)
    return 1 if errors and (fatal or not call.on("force")) else 0


def _tag(call: Call) -> int:
    from boxship.cli.verbs.transfer import check_reference

    source, name = call.words
    try:
        check_reference(name)
    except BoxshipError as error:
        raise BoxshipError(f'Error parsing reference: "{name}" is not a valid repository/tag: {error}') from None
    repository, tag = split(name)
    call.engine.send("POST", path(f"/images/{quote(source)}/tag", {"repo": repository, "tag": tag or None})).read()
    return 0


_HISTORY = {
    "ID": "IMAGE",
    "CreatedSince": "CREATED",
    "CreatedAt": "CREATED AT",
    "CreatedBy": "CREATED BY",
    "Size": "SIZE",
    "Comment": "COMMENT",
}


def _history(call: Call) -> int:
    human = "human" not in call.parsed.given or call.on("human")
    full = call.on("no-trunc")
    listing = Listing(
        call.format(),
        ("ID", "CreatedSince" if human else "CreatedAt", "CreatedBy", "Size", "Comment"),
        _HISTORY,
        quiet="ID" if call.on("quiet") else "",
    )

    def fields(layer: dict[str, Any]) -> dict[str, object]:
        identity = str(layer.get("Id") or "")
        by = str(layer.get("CreatedBy") or "").replace("\t", " ")
        created = layer.get("Created") or 0
        moment = _rfc(created)
        return {
            "ID": identity
            if full
            else (identity.partition(":")[2] or identity)[:12]
            if identity.startswith("sha256:")
            else identity[:12],
            "CreatedAt": moment,
            "CreatedSince": (units.ago(created) if created > 0 else "N/A") if human else moment,
            "CreatedBy": by if full else units.shorten(by, 45),
            "Size": units.size(layer["Size"], 3) if human else str(layer["Size"]),
            "Comment": layer.get("Comment") or "",
        }

    query = {"platform": call.text("platform") or None}
    found = call.engine.send("GET", path(f"/images/{quote(call.words[0])}/history", query)).json()
    listing.show([fields(layer) for layer in found])
    return 0


def _rfc(stamp: float) -> str:
    import time

    at = time.localtime(stamp)
    zone = time.strftime("%z", at)
    return time.strftime("%Y-%m-%dT%H:%M:%S", at) + ("Z" if zone == "+0000" else f"{zone[:3]}:{zone[3:]}")


COMMANDS = {
    "history": Command(
        " [OPTIONS] IMAGE",
        "Show the history of an image",
        _history,
        LISTING
        + """
H,human | Print sizes and dates in human readable format (default true)
no-trunc | Don't truncate output
platform string | Show the history of this platform's image
q,quiet | Only show image IDs
""",
        least=1,
        most=1,
    ),
    "images": Command(
        " [OPTIONS] [REPOSITORY[:TAG]]",
        "List images",
        _images,
        LISTING
        + """
a,all | Show all images (default hides intermediate images)
digests | Show digests
f,filter filter | Filter output based on conditions provided
no-trunc | Don't truncate output
q,quiet | Only show image IDs
""",
        most=1,
    ),
    "rmi": Command(
        " [OPTIONS] IMAGE [IMAGE...]",
        "Remove one or more images",
        _rmi,
        """
f,force | Force removal of the image
no-prune | Do not delete untagged parents
platform string | Remove only this platform's part
""",
        least=1,
        most=MANY,
    ),
    "tag": Command(
        " SOURCE_IMAGE[:TAG] TARGET_IMAGE[:TAG]", "Create a tag TARGET_IMAGE that refers to SOURCE_IMAGE", _tag, least=2, most=2
    ),
}
