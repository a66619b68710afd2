"""Images between the engine and registries: pull, push.

Runs in: the boxship command.
Spec: docker's commands of these names; Docker Engine API, POST /images/create, POST /images/{name}/push; the credentials in
X-Registry-Auth; distribution/reference for names.
"""

from __future__ import annotations

from boxship.cli.command import Command
from boxship.cli.http.client import path, quote
from boxship.kit.errors import BoxshipError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from boxship.cli.command import Call

_LOWER = frozenset("abcdefghijklmnopqrstuvwxyz0123456789._-/")
_TAG = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-")


def domain(name: str) -> tuple[str, str]:
    """(registry, repository with what is behind it) of a name as people write it."""
    first, slash, rest = name.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost" or first != first.lower()):
        if first == "index.docker.io":
            first = "docker.io"
        return first, rest
    return "docker.io", name if slash else f"library/{name}"


def check_reference(name: str) -> None:
    """Raises BoxshipError in docker's words for what is no name of an image; says which character is wrong."""
    registry, rest = domain(name)
    body, _, digest = rest.partition("@")
    repository, colon, tag = body.rpartition(":") if ":" in body else (body, "", "")
    if repository != repository.lower():
        raise BoxshipError(f"invalid reference format: repository name ({repository}) must be lowercase")
    wrong = next((c for c in repository if c not in _LOWER), "") or next((c for c in tag if c not in _TAG), "")
    if wrong:
        raise BoxshipError(f"invalid reference format: {wrong!r} in {name!r}")
    empty = (
        not repository
        or repository.startswith(("/", "-", ".", "_"))
        or repository.endswith(("/", "-", ".", "_"))
        or "//" in repository
    )
    if empty or (colon and (not tag or tag[0] in ".-" or len(tag) > 128)) or ("@" in rest and ":" not in digest) or not registry:
        raise BoxshipError("invalid reference format")


def familiar(name: str) -> str:
    """The name with its tag, docker.io/library/ left out."""
    from boxship.cli.verbs.images import familiar_name, split

    name = familiar_name(name)
    return name if "@" in name or split(name)[1] else f"{name}:latest"


def pull(call: Call, name: str, *, platform: str = "", quiet: bool = False, all_tags: bool = False, fd: int = 1) -> None:
    """Have the engine fetch an image, showing how far it is on `fd`. Raises ApiError, BoxshipError."""
    from boxship.cli.show.progress import show
    from boxship.cli.verbs.account import registry_auth
    from boxship.cli.verbs.images import split

    check_reference(name)
    body, at, digest = name.partition("@")
    repository, tag = split(body)
    query = {
        "fromImage": repository,
        "tag": digest if at else None if all_tags else tag or "latest",
        "platform": platform or None,
    }
    headers = registry_auth(call, domain(name)[0])
    response = call.engine.send("POST", path("/images/create", query), headers=headers)
    show(response.lines(), fd=-1 if quiet else fd, environ=call.environ)


def _pull(call: Call) -> int:
    from boxship.cli.show.table import write
    from boxship.cli.verbs.images import split

    name = call.words[0]
    if call.on("all-tags") and ("@" in name or split(name)[1]):
        raise BoxshipError("tag can't be used with --all-tags/-a")
    if not call.on("all-tags") and "@" not in name and not split(name)[1] and not call.on("quiet"):
        check_reference(name)
        write("Using default tag: latest\n")
    pull(call, name, platform=call.text("platform"), quiet=call.on("quiet"), all_tags=call.on("all-tags"))
    full = name if "@" in name or call.on("all-tags") or split(name)[1] else f"{name}:latest"
    registry, rest = domain(full)
    write(f"{registry}/{rest}\n")
    return 0


def push(call: Call, name: str, *, all_tags: bool = False) -> int:
    """Have the engine send an image to its registry. Raises ApiError, BoxshipError."""
    from boxship.cli.show.progress import show
    from boxship.cli.show.table import write
    from boxship.cli.verbs.account import registry_auth
    from boxship.cli.verbs.images import split

    check_reference(name)
    repository, tag = split(name)
    if all_tags and tag:
        raise BoxshipError("tag can't be used with --all-tags/-a")
    if not all_tags and not tag:
        tag = "latest"
        if not call.on("quiet"):
            write("Using default tag: latest\n")
    registry, rest = domain(repository)
    headers = registry_auth(call, registry) or {"X-Registry-Auth": "e30="}
    query = {"tag": None if all_tags else tag, "platform": call.text("platform") or None}
    response = call.engine.send("POST", path(f"/images/{quote(repository)}/push", query), headers=headers)
    show(response.lines(), fd=-1 if call.on("quiet") else 1, environ=call.environ)
    if call.on("quiet"):
        write(f"{registry}/{rest}{f':{tag}' if tag else ''}\n")
    return 0


COMMANDS = {
    "pull": Command(
        " [OPTIONS] NAME[:TAG|@DIGEST]",
        "Download an image from a registry",
        _pull,
        """
a,all-tags | Download all tagged images in the repository
platform string | Set platform if the registry has images of several
q,quiet | Suppress verbose output
""",
        least=1,
        most=1,
    ),
    "push": Command(
        " [OPTIONS] NAME[:TAG]",
        "Upload an image to a registry",
        lambda call: push(call, call.words[0], all_tags=call.on("all-tags")),
        """
a,all-tags | Push all tags of an image to the repository
platform string | Push only this platform's image
q,quiet | Suppress verbose output
""",
        least=1,
        most=1,
    ),
}
