"""build, and builder prune: images out of Dockerfiles.

Runs in: the boxship command.
Spec: docker build's flags (docker/cli and buildx); POST /build of the Docker Engine API, with the parameters of our own that
`boxship.engine.routes.builds` describes. What only our engine has is asked for only when a flag needs it.
"""

from __future__ import annotations

import os

from boxship.cli.command import Command, Exit
from boxship.cli.http.client import path
from boxship.kit.errors import BoxshipError, InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from boxship.cli.command import Call

CONTEXTS = ".boxship-contexts"
"""Where named contexts lie in the archive that is sent."""
OUTSIDE = ".boxship-dockerfile"
"""A Dockerfile that is not in the context."""
_REMOTE = ("http://", "https://", "git://", "git@", "ssh://", "github.com/", "docker-image://")


class _Context:
    """What is sent: the directory, the Dockerfile, and what .dockerignore leaves."""

    def __init__(self, call: Call) -> None:
        self.where = call.words[0]
        self.remote = self.where.startswith(_REMOTE)
        given = call.text("file")
        self.text: bytes | None = None
        self.name = given or "Dockerfile"
        """As messages call it, and as it is called in the context."""
        self.shown = given or "Dockerfile"
        self.extra = b""
        if self.remote:
            return
        if self.where == "-":
            if given:
                raise InvalidArgument("a context on standard input has its Dockerfile in it, and takes no other")
            return
        if not os.path.isdir(self.where):
            raise BoxshipError(f"unable to prepare context: path {self.where} not found, or no directory")
        if given == "-":
            self.text, self.shown = _all(0), "-"
        else:
            place = given if given else _find(self.where)
            try:
                with open(place, "rb") as file:
                    self.text = file.read()
            except OSError as error:
                raise BoxshipError(
                    f"unable to read the Dockerfile {place}: {(error.strerror or '').lower()}", "name it with -f FILE") from None
            self.shown = place
            top = os.path.realpath(self.where)
            real = os.path.realpath(place)
            if real.startswith(f"{top}/"):
                self.name = real[len(top) + 1:]
                return
        self.name, self.extra = OUTSIDE, self.text

    def pieces(self, named: dict[str, str]) -> Iterator[bytes]:
        """The archive."""
        from boxship.build import packing
        from boxship.build.dockerfile import ignore

        if self.where == "-":
            while piece := os.read(0, 1 << 18):
                yield piece
            return
        rules = ignore.compile(self.ignored(self.where))
        kept = {self.name, ".dockerignore", f"{self.name}.dockerignore"}
        yield from packing.pack(self.where, lambda name: name not in kept and rules.excludes(name), rules.prunes)
        if self.extra:
            yield packing.one_file(self.name, self.extra)
        for name, directory in named.items():
            inner = ignore.compile(self.ignored(directory))
            yield from packing.pack(directory, inner.excludes, inner.prunes, prefix=f"{CONTEXTS}/{name}/")
        yield packing.close_archive()

    def ignored(self, directory: str) -> list[str]:
        """The patterns of what a directory's .dockerignore leaves out."""
        from boxship.build.dockerfile import ignore

        for name in (f"{self.shown}.dockerignore" if directory == self.where else "", os.path.join(directory, ".dockerignore")):
            try:
                with open(name, "rb") as file:
                    return ignore.read(file.read())
            except OSError:
                continue
        return []


def _find(directory: str) -> str:
    for name in ("Dockerfile", "dockerfile"):
        if os.path.exists(os.path.join(directory, name)):
            return os.path.join(directory, name)
    return os.path.join(directory, "Dockerfile")


def _all(fd: int) -> bytes:
    parts = []
    while piece := os.read(fd, 1 << 18):
        parts.append(piece)
    return b"".join(parts)


def _build(call: Call) -> int:
    context = _Context(call)
    local, others = _named(call)
    if context.text is not None:
        parsed = _parsed(call, context, context.text, {*local, *others})
        if call.on("check"):
            return _check(call, context, parsed)
    elif call.on("check"):
        raise InvalidArgument("--check takes a Dockerfile that is here", "give a directory, or -f -")
    query: dict[str, object] = {
        "dockerfile": context.name, "t": call.all("tag"), "target": call.text("target") or None,
        "nocache": "1" if call.on("no-cache") else None, "pull": "1" if call.on("pull") else None,
        "nocachefilter": ",".join(call.all("no-cache-filter")) or None,
        "networkmode": call.text("network") or None, "platform": call.text("platform") or None,
        "extrahosts": call.all("add-host") or None, "memory": _bytes(call, "memory"), "memswap": _bytes(call, "memory-swap"),
        "shmsize": _bytes(call, "shm-size"), "cpushares": call.number("cpu-shares"), "cpuquota": call.number("cpu-quota"),
        "cpuperiod": call.number("cpu-period"), "cpusetcpus": call.text("cpuset-cpus") or None,
        "cpusetmems": call.text("cpuset-mems") or None, "cgroupparent": call.text("cgroup-parent") or None,
        "steptimeout": call.number("timeout"), "pidslimit": call.number("pids-limit"),
        "remote": context.where if context.remote else None,
        "buildargs": _json(_arguments(call)), "labels": _json(_pairs(call.all("label"))), "ulimits": _json(_ulimits(call)),
        "cachefrom": _json(call.all("cache-from")), "cacheto": _json(call.all("cache-to")),
        "contexts": _json({**{name: f"tree:{CONTEXTS}/{name}" for name in local}, **others}),
        "secrets": _hand_over(call),
    }
    headers = {"Content-Type": "application/x-tar"} | _registries(call)
    upload = () if context.remote else context.pieces(local)
    response = call.engine.send("POST", path("/build", query), headers=headers, upload=upload)
    identity = _follow(call, response)
    if name := call.text("iidfile"):
        with open(name, "w", encoding="ascii") as file:
            file.write(identity)
    for output in [*call.all("output"), *(["type=registry"] if call.on("push") else [])]:
        _output(call, output, identity)
    return 0


def _parsed(call: Call, context: _Context, text: bytes, contexts: set[str]) -> Any:
    """The Dockerfile. Raises Exit with the place of an error: nothing is sent then."""
    from boxship.build import dockerfile

    try:
        parsed = dockerfile.parse(text, context.shown)
        dockerfile.plan(parsed, call.text("target"), _given(call), _platform(call), contexts=contexts)
    except dockerfile.DockerfileError as error:
        raise Exit(1, error.shown()) from None
    return parsed


def _given(call: Call) -> dict[str, str]:
    return {name: value for name, value in _arguments(call).items() if value is not None}


def _platform(call: Call) -> Any:
    from boxship.images import platforms

    return platforms.parse(call.text("platform")) if call.text("platform") else None


def _check(call: Call, context: _Context, parsed: Any) -> int:
    """Show what the checks find: 1 if there is something, as docker build --check answers."""
    from boxship.build import dockerfile
    from boxship.cli.show.table import write

    environments = {}
    stages = dockerfile.plan(parsed, "", _given(call), _platform(call), also=range(len(parsed.blocks)))
    for image in {stage.image for stage in stages if stage.parent is None} - {dockerfile.SCRATCH}:
        try:
            shown = call.engine.send("GET", path(f"/images/{image}/json")).json()
            environments[image] = dict(word.partition("=")[::2] for word in shown["Config"].get("Env") or [])
        except BoxshipError:
            continue  # without the image none of its variables is known: the check goes on without
    rules = [] if context.where == "-" else context.ignored(context.where)
    found = dockerfile.check(
        parsed, call.text("target"), _given(call), _platform(call), environments=environments,
        ignored=dockerfile.ignore.compile(rules))
    for each in found:
        write(f"{each.shown()}\nhint: {each.description}: {each.url}\n\n")
    write(f"{len(found)} warning{'' if len(found) == 1 else 's'} found\n" if found else "Check complete, no warnings found.\n")
    return 1 if found else 0


def _follow(call: Call, response: Any) -> str:
    """Show the messages until the end: the image's id. Raises Exit with the failed command's code."""
    from boxship.cli.show.progress import plain
    from boxship.cli.show.table import write
    from boxship.oci import text

    raw, quiet = call.text("progress") in ("json", "rawjson"), call.on("quiet")
    identity = ""
    said: list[str] = []
    for line in response.lines():
        message = text.loads(line, "the engine's answer")
        if raw:
            write(line.strip() + b"\n")
        if not isinstance(message, dict):
            continue
        detail = message.get("errorDetail") or {}
        if message.get("error"):
            if quiet:
                write("".join(said), 2)
            code = detail.get("code")
            raise Exit(code if isinstance(code, int) and code else 1, str(detail.get("message") or message["error"]))
        aux = message.get("aux")
        if isinstance(aux, dict) and aux.get("ID"):
            identity = str(aux["ID"])
        elif aux is None and not raw:
            if quiet:
                said.append(plain(message))
            else:
                write(plain(message))
    if quiet and not raw:
        write(f"{identity}\n")
    return identity


# flags


def _json(value: object) -> str | None:
    import json

    return json.dumps(value) if value else None


def _bytes(call: Call, name: str) -> int | None:
    from boxship.cli.values import size

    word = call.text(name)
    return (-1 if word == "-1" else size(word)) if word else None


def _pairs(words: list[str]) -> dict[str, str]:
    return dict(word.partition("=")[::2] for word in words)


def _arguments(call: Call) -> dict[str, str | None]:
    """--build-arg NAME=VALUE, or NAME for what the environment has; the proxies of the environment are taken along."""
    found: dict[str, str | None] = {}
    for word in call.all("build-arg"):
        name, equals, value = word.partition("=")
        found[name] = value if equals else call.environ.get(name)
    if "SOURCE_DATE_EPOCH" in call.environ:
        found.setdefault("SOURCE_DATE_EPOCH", call.environ["SOURCE_DATE_EPOCH"])
    return found


def _ulimits(call: Call) -> list[dict[str, Any]]:
    from boxship.cli.verbs.create import ulimit

    return [ulimit(word) for word in call.all("ulimit")]


def _fields(text: str, what: str) -> dict[str, str]:
    found = {}
    for word in text.split(","):
        name, equals, value = word.partition("=")
        if not equals and name not in ("required",):
            raise InvalidArgument(f"invalid field {word} of {what} {text}", "fields are NAME=VALUE, with commas between")
        found[name.strip().lower()] = value
    return found


def _named(call: Call) -> tuple[dict[str, str], dict[str, str]]:
    """--build-context: (directories, images and URLs) by name."""
    local, others = {}, {}
    for word in call.all("build-context"):
        name, equals, value = word.partition("=")
        if not equals or not name or not value:
            raise InvalidArgument(f"invalid build context {word}, expected NAME=VALUE")
        if value.startswith(_REMOTE):
            others[name] = value
        elif os.path.isdir(value):
            local[name] = value
        else:
            raise InvalidArgument(f"build context {name}: {value} is no directory")
    return local, others


def _hand_over(call: Call) -> str | None:
    """Give the engine the secrets; what they are taken by."""
    import base64

    secrets: dict[str, str] = {}
    for word in call.all("secret"):
        fields = _fields(word, "--secret")
        name = fields.get("id", "")
        source = fields.get("src") or fields.get("source") or ""
        if not name:
            raise InvalidArgument(f"--secret {word} has no id")
        kind = fields.get("type", "")
        variable = fields.get("env") or (name if kind == "env" or not source else "")
        if source:
            try:
                with open(os.path.expanduser(source), "rb") as file:
                    value = file.read((500 << 10) + 1)
            except OSError as error:
                raise BoxshipError(f"secret {name}: {source}: {(error.strerror or '').lower()}") from None
        elif variable in call.environ:
            value = os.fsencode(call.environ[variable])
        else:
            raise BoxshipError(f"secret {name}: there is no {variable} in the environment", "give src=FILE or env=NAME")
        if len(value) > 500 << 10:
            raise BoxshipError(f"secret {name} is larger than 500 KiB")
        secrets[name] = base64.b64encode(value).decode()
    agents: dict[str, str] = {}
    for word in call.all("ssh"):
        name, _, socket = word.partition("=")
        agents[name] = os.path.abspath(socket) if socket else call.environ.get("SSH_AUTH_SOCK", "")
        if not agents[name]:
            raise BoxshipError(
                f"--ssh {word}: there is no SSH_AUTH_SOCK in the environment", "start an agent, or name its socket")
    if not secrets and not agents:
        return None
    answer = call.engine.send("POST", "/build/secrets", {"Secrets": secrets, "Agents": agents}).json()
    return str(answer["Id"])


def _registries(call: Call) -> dict[str, str]:
    """X-Registry-Config, of the logins that are stored here."""
    from boxship.cli.verbs.account import credentials, encoded, load

    config = load(call.environ)
    names = [*(config.get("auths") or {}), *(config.get("credHelpers") or {})]
    found = {name: given for name in names if (given := credentials(call.environ, name))}
    return {"X-Registry-Config": encoded(found)} if found else {}


# outputs


def _output(call: Call, word: str, identity: str) -> None:
    """One --output: type=image, registry, docker, oci, tar or local, or only a directory."""
    from boxship.cli.verbs.archives import refuse_terminal, save_to

    fields = _fields(word, "--output") if "=" in word else {"type": "tar" if word == "-" else "local", "dest": word}
    kind, target = fields.get("type", ""), fields.get("dest", "")
    if kind == "image":
        return
    if kind == "registry":
        from boxship.cli.verbs.transfer import push

        for tag in call.all("tag"):
            push(call, tag)
        return
    if target == "-":
        target = ""
    if kind in ("docker", "oci"):
        refuse_terminal(target)
        names = call.all("tag") or [identity]
        save_to(target, call.engine.send("GET", path("/images/get", {"names": names})).pieces(), "save image")
        return
    if kind not in ("tar", "local"):
        raise InvalidArgument(f"--output {word}: unknown type {kind}", "one of image, registry, docker, oci, tar, local")
    body = call.engine.send("GET", path("/build/files", {"image": identity})).pieces()
    if kind == "tar":
        refuse_terminal(target)
        save_to(target, body, "write files")
    else:
        if not target:
            raise InvalidArgument(f"--output {word}: dest is missing")
        _extract(body, target)


def _extract(body: Iterator[bytes], target: str) -> None:
    """The files below a directory, as the caller's own."""
    import io
    import tarfile

    class Reader(io.RawIOBase):
        rest = b""

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            while not self.rest:
                piece = next(body, None)
                if piece is None:
                    return 0
                self.rest = piece
            count = min(len(buffer), len(self.rest))
            buffer[:count], self.rest = self.rest[:count], self.rest[count:]
            return count

    os.makedirs(target, exist_ok=True)
    try:
        with tarfile.open(fileobj=io.BufferedReader(Reader()), mode="r|") as archive:
            archive.extractall(target, filter="data" if os.geteuid() else "tar")
    except tarfile.TarError as error:
        raise BoxshipError(f"writing files to {target}: {error}") from None


def _builder_prune(call: Call) -> int:
    from boxship.cli.verbs.prune import build_prune

    return build_prune(call)


FLAGS = """
add-host stringArray | Add a custom host-to-IP mapping (host:ip)
build-arg stringArray | Set build-time variables
build-context stringArray | Additional build contexts (name=path)
cache-from stringArray | Exported caches to take results from (type=registry,ref=NAME)
cache-to stringArray | Where to export the cache (type=registry,ref=NAME)
cgroup-parent string | Set the parent cgroup of RUN's containers
cpu-period int | Limit the CPU CFS period
cpu-quota int | Limit the CPU CFS quota
check | Only look for usual mistakes in the Dockerfile
c,cpu-shares int | CPU shares (relative weight)
cpuset-cpus string | CPUs in which to allow execution
cpuset-mems string | MEMs in which to allow execution
f,file string | Name of the Dockerfile (default: "PATH/Dockerfile")
force-rm | Intermediate containers are always removed; for compatibility
iidfile string | Write the image ID to a file
label stringArray | Set metadata for an image
m,memory bytes | Memory limit of each step
memory-swap bytes | Swap limit equal to memory plus swap
network string | Networking of RUN steps: default, none, host
no-cache | Do not use the cache
no-cache-filter stringArray | Do not use the cache for these stages
o,output stringArray | Where the result goes: a directory, or "type=local|tar|oci|docker|registry,dest=path"
pids-limit int | Processes that a step may have at once (default 4096)
platform string | Set target platform
progress string | How progress is shown: auto, plain, json
pull | Always attempt to pull the base images
push | Push the result
q,quiet | Suppress the output, print the image ID
rm | Intermediate containers are always removed; for compatibility
secret stringArray | Secret for RUN --mount=type=secret ("id=ID,src=FILE" or "id=ID,env=NAME")
shm-size bytes | Size of /dev/shm
ssh stringArray | SSH agent for RUN --mount=type=ssh ("default" or "ID=SOCKET")
t,tag stringArray | Name of the image ("name:tag")
target string | Set the target build stage
timeout int | Seconds that a step may take
ulimit ulimit | Ulimit options
"""
COMMANDS = {
    "build": Command(" [OPTIONS] PATH | URL | -", "Build an image from a Dockerfile", _build, FLAGS, least=1, most=1),
    "builder prune": Command(
        " [OPTIONS]", "Remove build cache", _builder_prune,
        "a,all | Remove all unused build cache, not just dangling ones\nf,force | Do not prompt for confirmation\n"
        "filter filter | Provide filter values (e.g. \"until=24h\")\nkeep-storage bytes | Amount of disk space to keep\n"),
}
