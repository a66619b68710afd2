"""What a call asks of the engine, step by step, without doing it: the sync and the async API carry out the same steps.

Runs in: the caller's program.
Spec: Docker Engine API 1.51.

A step is an `Ask`; what carries it out sends the answer into the generator, or throws the engine's refusal into it.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from boxship.cli.http.client import path, quote
from boxship.cli.verbs.images import split
from boxship.cli.verbs.start import exit_code
from boxship.kit import errors
from boxship.oci import text
from boxship.sdk import models
from boxship.sdk.errors import StartFailed
from boxship.sdk.options import Options, request

T = TypeVar("T")


@dataclass(frozen=True)
class Ask:
    """One request, and what is made of its answer: JSON, bytes, or JSON documents one a line."""

    method: str
    target: str
    body: object = None
    upload: bytes | None = None
    answer: Literal["json", "bytes", "lines"] = "json"
    headers: Mapping[str, str] = field(default_factory=dict)


Steps = Generator[Ask, Any, T]
Filters = Mapping[str, str | Iterable[str]]


def of(kind: str, name: str, rest: str = "") -> str:
    """`/kind/name/rest`."""
    return f"/{kind}/{quote(name)}{f'/{rest}' if rest else ''}"


def _filters(given: Filters | None) -> dict[str, list[str]]:
    return {name: [value] if isinstance(value, str) else list(value) for name, value in (given or {}).items()}


# containers


def create(image: str, command: str | Iterable[str] | None, options: Options, own: bool) -> Steps[str]:
    """Make a container, pulling its image if need be: its id."""
    body = request(image, command, options, own=own)
    pulling = options.get("pull", "missing")
    ask = Ask("POST", path("/containers/create", {"name": options.get("name"), "platform": options.get("platform")}), body)
    if pulling == "always":
        yield from pull(image, options.get("platform"))
    try:
        answer = yield ask
    except errors.NotFound as error:
        if pulling != "missing" or "o such image" not in str(error):
            raise
        yield from pull(image, options.get("platform"))
        answer = yield ask
    return str(answer["Id"])


def start(name: str) -> Steps[None]:
    """Start. Raises StartFailed for a command that cannot be run."""
    try:
        yield Ask("POST", of("containers", name, "start"))
    except errors.BoxshipError as error:
        if isinstance(error, (errors.Unavailable, errors.PermissionDenied)) or "o such container" in str(error):
            raise
        raise StartFailed(str(error), exit_code(str(error))) from None


def inspect(name: str) -> Steps[Any]:
    """The whole answer on a container."""
    return (yield Ask("GET", of("containers", name, "json")))


def containers(everything: bool, filters: Filters | None) -> Steps[list[str]]:
    """Ids of containers: of those that run, or of all."""
    answer = yield Ask("GET", path("/containers/json", {"all": everything, "filters": _filters(filters)}))
    return [each["Id"] for each in answer]


def act(name: str, verb: str, **query: object) -> Steps[None]:
    """A verb on a container that answers nothing."""
    yield Ask("POST", path(of("containers", name, verb), query), answer="bytes")


def remove(name: str, force: bool, volumes: bool) -> Steps[None]:
    """Remove a container."""
    yield Ask("DELETE", path(of("containers", name), {"force": force, "v": volumes}), answer="bytes")


def waiting(name: str, condition: str = "not-running") -> Steps[int]:
    """The exit code, when it has ended."""
    answer = yield Ask("POST", path(of("containers", name, "wait"), {"condition": condition}))
    if message := (answer.get("Error") or {}).get("Message"):
        raise errors.BoxshipError(message)
    return int(answer["StatusCode"])


def logs_target(name: str, **query: object) -> str:
    """Where a container's logs are."""
    return path(of("containers", name, "logs"), query)


def exec_create(name: str, command: list[str], env: list[str], **settings: object) -> Steps[str]:
    """Make a process beside the first: its id."""
    body = {"AttachStdout": True, "AttachStderr": True, "Cmd": command, "Env": env, **settings}
    return str((yield Ask("POST", of("containers", name, "exec"), body))["Id"])


def exec_code(identity: str) -> Steps[int]:
    """How it ended."""
    return int((yield Ask("GET", f"/exec/{identity}/json"))["ExitCode"] or 0)


def port(name: str, inside: int | str) -> Steps[tuple[str, int]]:
    """(address, port) of the machine where a port of the container is published. Raises NotFound."""
    key = f"{inside}" if "/" in str(inside) else f"{inside}/tcp"
    bindings = (yield from inspect(name))["NetworkSettings"]["Ports"].get(key)
    if not bindings:
        raise errors.NotFound(f"port {key} of {name} is not published")
    return bindings[0]["HostIp"], int(bindings[0]["HostPort"])


def put(name: str, target: str, data: bytes, mode: int) -> Steps[None]:
    """Write a file in a container; its folder is there."""
    folder, _, base = target.rpartition("/")
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        entry = tarfile.TarInfo(base)
        entry.size, entry.mode = len(data), mode
        tar.addfile(entry, io.BytesIO(data))
    where = path(of("containers", name, "archive"), {"path": folder or "/"})
    yield Ask("PUT", where, upload=archive.getvalue(), answer="bytes")


def get(name: str, source: str) -> Steps[bytes]:
    """A file's content. Raises NotFound, InvalidArgument when it is no file."""
    data = yield Ask("GET", path(of("containers", name, "archive"), {"path": source}), answer="bytes")
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        first = tar.next()
        file = tar.extractfile(first) if first is not None and first.isfile() else None
        if file is None:
            raise errors.InvalidArgument(f"{source} is not a file")
        return file.read()


# images


def pull(name: str, platform: str | None = None) -> Steps[None]:
    """Fetch an image. Raises what the registry refused."""
    repository, tag = split(name.partition("@")[0])
    tag = name.partition("@")[2] or tag or "latest"
    lines = yield Ask("POST", path("/images/create", {"fromImage": repository, "tag": tag, "platform": platform}), answer="lines")
    _check(lines)


def _check(lines: list[Any]) -> None:
    for line in lines:
        if failure := line.get("error"):
            kind = errors.NotFound if "not found" in failure or "denied" in failure else errors.BoxshipError
            raise kind(failure)


def image(name: str) -> Steps[models.Image]:
    """One image."""
    return models.Image.of((yield Ask("GET", of("images", name, "json"))))


def pulled(name: str, platform: str | None) -> Steps[models.Image]:
    """Fetch, and say what it is."""
    yield from pull(name, platform)
    return (yield from image(name))


def images(filters: Filters | None) -> Steps[list[models.Image]]:
    """All images."""
    return [models.Image.of(each) for each in (yield Ask("GET", path("/images/json", {"filters": _filters(filters)})))]


def image_remove(name: str, force: bool) -> Steps[None]:
    """Remove an image or a name of it."""
    yield Ask("DELETE", path(of("images", name), {"force": force}))


def image_tag(name: str, new: str) -> Steps[None]:
    """Give an image another name."""
    repository, tag = split(new)
    yield Ask("POST", path(of("images", name, "tag"), {"repo": repository, "tag": tag or "latest"}), answer="bytes")


def image_load(data: bytes) -> Steps[list[str]]:
    """Load an archive: the names of the images in it."""
    lines = yield Ask("POST", path("/images/load", {"quiet": True}), upload=data, answer="lines")
    _check(lines)
    said = [line.get("stream", "").strip() for line in lines]
    return [word.partition(": ")[2] for word in said if word.startswith("Loaded image")]


def image_save(names: list[str]) -> Steps[bytes]:
    """An archive of images."""
    data: bytes = yield Ask("GET", path("/images/get", {"names": names}), answer="bytes")
    return data


# volumes and networks


def volume(name: str) -> Steps[models.Volume]:
    """One volume."""
    return models.Volume.of((yield Ask("GET", of("volumes", name))))


def volumes(filters: Filters | None) -> Steps[list[models.Volume]]:
    """All volumes."""
    answer = yield Ask("GET", path("/volumes", {"filters": _filters(filters)}))
    return [models.Volume.of(each) for each in answer["Volumes"] or []]


def volume_create(name: str, driver: str, options: Mapping[str, str], labels: Mapping[str, str]) -> Steps[models.Volume]:
    """Make a volume."""
    body = {"Name": name, "Driver": driver, "DriverOpts": dict(options), "Labels": dict(labels)}
    return models.Volume.of((yield Ask("POST", "/volumes/create", body)))


def volume_remove(name: str, force: bool) -> Steps[None]:
    """Remove a volume."""
    yield Ask("DELETE", path(of("volumes", name), {"force": force}), answer="bytes")


def network(name: str) -> Steps[models.Network]:
    """One network."""
    return models.Network.of((yield Ask("GET", of("networks", name))))


def networks(filters: Filters | None) -> Steps[list[models.Network]]:
    """All networks."""
    return [models.Network.of(each) for each in (yield Ask("GET", path("/networks", {"filters": _filters(filters)})))]


def network_create(
    name: str, driver: str, subnet: str, options: Mapping[str, str], labels: Mapping[str, str], internal: bool
) -> Steps[models.Network]:
    """Make a network."""
    body: dict[str, Any] = {
        "Name": name, "Driver": driver, "Options": dict(options), "Labels": dict(labels), "Internal": internal,
        "IPAM": {"Config": [{"Subnet": subnet}] if subnet else []},
    }
    identity = (yield Ask("POST", "/networks/create", body))["Id"]
    return (yield from network(identity))


def network_remove(name: str) -> Steps[None]:
    """Remove a network."""
    yield Ask("DELETE", of("networks", name), answer="bytes")


def network_act(name: str, verb: str, container: str, **more: object) -> Steps[None]:
    """Connect or disconnect a container."""
    yield Ask("POST", of("networks", name, verb), {"Container": container, **more}, answer="bytes")


def plain(method: str, target: str) -> Steps[Any]:
    """One request whose answer is the result."""
    return (yield Ask(method, target))


# streams


class Output:
    """Takes what a container printed apart: frames when it has no terminal, then lines."""

    def __init__(self, *, framed: bool) -> None:
        self._framed = framed
        self._rest = b""
        self._partial = {1: b"", 2: b""}

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """(stream, bytes) of what is whole; stream 1 or 2. Raises BoxshipError for the engine's own error (stream 3)."""
        if not self._framed:
            return [(1, data)] if data else []
        data = self._rest + data
        found = []
        while len(data) >= 8 and len(data) >= 8 + (size := int.from_bytes(data[4:8], "big")):
            if data[0] == 3:
                raise errors.BoxshipError(data[8 : 8 + size].decode("utf-8", "replace"))
            found.append((2 if data[0] == 2 else 1, data[8 : 8 + size]))
            data = data[8 + size :]
        self._rest = data
        return found

    def lines(self, data: bytes) -> list[str]:
        """Lines of both streams, as they are whole."""
        found = []
        for stream, piece in self.feed(data):
            *whole, self._partial[stream] = (self._partial[stream] + piece).split(b"\n")
            found += [line.removesuffix(b"\r").decode("utf-8", "replace") for line in whole]
        return found

    def last(self) -> list[str]:
        """What no line end followed."""
        return [rest.decode("utf-8", "replace") for rest in self._partial.values() if rest]


def document(line: bytes) -> Any:
    """A line of a stream of JSON."""
    return text.loads(line, "the engine's answer")
