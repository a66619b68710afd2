"""Building for the engine: `POST /build` from its parameters to the image's name, and the cache's upkeep.

Runs in: the daemon, on its event loop.
Spec: Docker Engine API, ImageBuild, BuildPrune; the stream of messages as dockerd's classic builder writes it, in which the whole
language of BuildKit's frontend is understood.
Not here: how a Dockerfile is carried out (`boxship.build.solve`), where containers run (`boxship.engine.building`).
"""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import IO, Any

from boxship.build import dockerfile as language
from boxship.build import transfer
from boxship.build.cache import Cache, Record
from boxship.build.copying import Item, write_layer
from boxship.build.fetch import CONTEXT_MAX, Fetcher, is_git, is_url, opened
from boxship.build.image import write_image
from boxship.build.layers import Layer, Layers, in_thread
from boxship.build.mounts import Mounts
from boxship.build.report import Message, Report
from boxship.build.running import Limits
from boxship.build.solve import Failure, Machine, Request, Solver
from boxship.build.state import State, of_image
from boxship.build.tree import Filtered, Memory, RootTree, Subtree, TarTree, Tree, walk
from boxship.engine.building import StepRunner
from boxship.engine.core import Core
from boxship.engine.images import DANGLING, familiar
from boxship.engine.transfers import Transfers, credentials
from boxship.images import platforms
from boxship.images.auth import CredentialSource
from boxship.images.pull import CONFIG_LIMIT, Flights, decode_config
from boxship.images.service import blobs, from_message, to_message
from boxship.images.store import read
from boxship.images.transfer import images_of
from boxship.kit.errors import BoxshipError, InvalidArgument, NotFound, ResourceExhausted
from boxship.oci import reference
from boxship.oci.image import Platform

_DOCKERFILE_MAX = 4 << 20
_SECRETS_S = 600.0
_CONTEXTS = ".boxship-contexts"


@dataclass(frozen=True)
class Wish:
    """The parameters of one `POST /build`."""

    request: Request = field(default_factory=Request)
    dockerfile: str = "Dockerfile"
    """Its path in the context."""
    tags: tuple[str, ...] = ()
    remote: str = ""
    quiet: bool = False
    cache_from: tuple[str, ...] = ()
    cache_to: tuple[str, ...] = ()
    """References of registries."""
    contexts: Mapping[str, str] = field(default_factory=dict)
    """Named contexts that are images or URLs."""
    registries: Mapping[str, Any] = field(default_factory=dict)
    """X-Registry-Config: credentials by registry."""

    @property
    def shown(self) -> str:
        """What messages call the Dockerfile: clients give one from outside the context a name of their own."""
        return "Dockerfile" if self.dockerfile.startswith((".dockerfile.", ".boxship-")) else self.dockerfile


class _Bases:
    """Images for FROM and --from (boxship.build.solve.Bases)."""

    def __init__(self, core: Core, transfers: Transfers, registries: Mapping[str, Any]) -> None:
        self._core = core
        self._transfers = transfers
        self._registries = registries
        self._locks: dict[str, asyncio.Lock] = {}
        self._pulled: set[str] = set()

    async def get(self, name: str, platform: Platform, *, pull: bool, told: Callable[[Message], None]) -> State:
        """See Bases."""
        async with self._locks.setdefault(name, asyncio.Lock()):
            if not pull or name in self._pulled:
                try:
                    return await self.local(name, platform)
                except NotFound:
                    pass
            try:
                await self._pull(name, platform, told)
            except BoxshipError:
                # What was built or made here is in no registry.
                if pull and await self._is_builtin(name):
                    return await self.local(name, platform)
                raise
            self._pulled.add(name)
            return await self.local(name, platform)

    async def _is_builtin(self, name: str) -> bool:
        try:
            return self._core.images.builtin.made_here((await self._core.images.get(name)).diff_ids)
        except BoxshipError:
            return False

    async def local(self, name: str, platform: Platform) -> State:
        """An image that is here. Raises NotFound."""
        core = self._core
        _, record = await core.images.find(name)
        target = record.target if record is not None else (await core.images.get(name)).target
        store = blobs(core.containerd.content, core.call)
        matcher = platforms.only(platform)
        for manifest in await images_of(store, from_message(target)):
            raw = await read(store, manifest.config, CONFIG_LIMIT)
            config = decode_config(raw, manifest.config.digest)
            if not matcher.match(config.platform()):
                continue
            pairs = zip(manifest.layers, config.rootfs.diff_ids, strict=True)
            return of_image(json.loads(raw), [Layer(descriptor, diff_id) for descriptor, diff_id in pairs], platform)
        raise NotFound(f"No such image: {name} for {platforms.format(platform)}")

    async def _pull(self, name: str, platform: Platform, told: Callable[[Message], None]) -> None:
        parsed = reference.parse(name)
        given = self._registries.get(parsed.domain) or (
            self._registries.get("https://index.docker.io/v1/") if parsed.domain == reference.DEFAULT_DOMAIN else None)
        header = base64.urlsafe_b64encode(json.dumps(given).encode()).decode() if given else ""
        own = platforms.only(platforms.host()).match(platform)
        async for step in self._transfers.pull(name, "", header, "" if own else platforms.format(platform)):
            told(step)


class Builds:
    """Builds, and their cache."""

    def __init__(self, core: Core, transfers: Transfers) -> None:
        self._core = core
        self._transfers = transfers
        directory = f"{core.directory}/build"
        self.mounts = Mounts(directory, core.stdio.rpartition("/")[0])
        self.mounts.sweep()
        self.fetcher = Fetcher(f"{directory}/spool")
        self.cache = Cache(core.containerd, core.call, core.snapshots.snapshotter)
        self.runner = StepRunner(core)
        self._flights = Flights()
        self._handed: dict[str, tuple[float, dict[str, bytes], dict[str, str]]] = {}

    # secrets

    def hand_over(self, values: Mapping[str, bytes], agents: Mapping[str, str]) -> str:
        """Keep secrets for the build that is about to be asked for, in memory: a token, good once and for ten minutes."""
        limit = time.monotonic()
        for token in [token for token, entry in self._handed.items() if entry[0] < limit]:
            del self._handed[token]
        token = secrets.token_hex(16)
        self._handed[token] = (limit + _SECRETS_S, dict(values), dict(agents))
        return token

    def take_over(self, token: str) -> tuple[dict[str, bytes], dict[str, str]]:
        """(secrets, agents) of a token. Raises NotFound."""
        entry = self._handed.pop(token, None)
        if entry is None or entry[0] < time.monotonic():
            raise NotFound("the secrets of this build are not here any more")
        return entry[1], entry[2]

    # building

    async def build(self, wish: Wish, body: AsyncIterator[bytes]) -> AsyncIterator[Message]:
        """Build: the messages. What is wrong with the request or the Dockerfile is raised before the first."""
        names = [str(reference.parse(tag).tagged()) for tag in wish.tags]
        tree, lone = await self._context(wish, body)
        async with AsyncExitStack() as stack:
            stack.callback(tree.close)
            text, ignored = await in_thread(lambda: _files(tree, lone, wish.dockerfile))
            try:
                parsed = language.parse(text, wish.shown)
                _check(parsed, wish.request)
                contexts = await self._named(wish, tree, stack)
                context: Tree = await in_thread(lambda: _without(tree, ignored, wish.dockerfile))
                async for message in self._built(wish, parsed, context, contexts, names):
                    yield message
            except language.DockerfileError as error:
                raise InvalidArgument(f"{error}\n{language.excerpt(error.source, error.location)}") from error

    async def _named(self, wish: Wish, tree: TarTree, stack: AsyncExitStack) -> dict[str, Tree | str]:
        """The named contexts: what lies in the archive, images, and what is fetched."""
        found: dict[str, Tree | str] = {}
        for name, value in wish.contexts.items():
            kind, _, rest = value.partition("://")
            if value.startswith("tree:"):
                found[name] = Subtree(tree, value[5:])
            elif kind == "docker-image":
                found[name] = rest
            elif is_git(value):
                fetched, _commit = await self.fetcher.git(value)
                stack.callback(fetched.close)
                found[name] = fetched
            elif is_url(value):
                spool = (await self.fetcher.url(value)).file
                archive = await in_thread(lambda spool=spool: opened(spool, owners=False))  # type: ignore[misc]
                stack.callback(archive.close)
                found[name] = archive
            else:
                raise InvalidArgument(f"context {name}: {value} is no image and no URL")
        return found

    async def _context(self, wish: Wish, body: AsyncIterator[bytes]) -> tuple[TarTree, bytes | None]:
        """(the context, the Dockerfile when that is all there is)."""
        if wish.remote:
            async for _ in body:
                pass
            if is_git(wish.remote):
                tree, _commit = await self.fetcher.git(wish.remote)
                return tree, None
            fetched = await self.fetcher.url(wish.remote)
            spool = fetched.file
        else:
            spool = self.fetcher.spool()
            await _receive(spool, body)
        spool.seek(0)
        start = spool.read(512)
        if wish.remote and start and b"\0" not in start and not start.startswith((b"\x1f\x8b", b"BZh")):
            spool.seek(0)
            text = spool.read(_DOCKERFILE_MAX)
            spool.close()
            return await in_thread(lambda: opened(self.fetcher.spool(), owners=False)), text
        return await in_thread(lambda: opened(spool, owners=False)), None

    async def _built(
        self, wish: Wish, parsed: language.Dockerfile, context: Tree, contexts: Mapping[str, Tree | str], names: list[str],
    ) -> AsyncIterator[Message]:
        core = self._core
        request = wish.request
        host = platforms.host()
        stages = language.plan(
            parsed, request.target, request.args, request.platform or host, build_platform=host, contexts=frozenset(contexts))
        report = Report(len(stages))
        async with core.snapshots.mover.leased(core.call) as call:
            layers = Layers(core.containerd, call, core.snapshots.snapshotter, self._flights)
            machine = Machine(
                layers, self.cache, self.runner, _Bases(core, self._transfers, wish.registries), self.mounts, self.fetcher)
            solver = Solver(machine, request, stages, context, report, contexts, host)

            async def work() -> None:
                try:
                    for name in wish.cache_from:
                        try:
                            count = await transfer.import_(
                                core.snapshots.mover, layers, self.cache, name, self._credentials(wish, name))
                            report.say(f"{count} results taken from the cache {name}\n")
                        except BoxshipError as error:
                            report.say(f"the cache {name} is left out: {error}\n")
                    state = await solver.solve()
                    built = await write_image(layers, state)
                    target = to_message(built.target)
                    for name in names or [f"{DANGLING}{built.target.digest}"]:
                        await core.images.put_name(name, target)
                    if names:
                        await core.images.drop_dangling(target)
                    report.flush()
                    for name in wish.cache_to:
                        await transfer.export(
                            core.snapshots.mover, layers, solver.records, name, self._credentials(wish, name))
                        report.say(f"Exported the cache to {name}\n")
                    report.tell({"aux": {"ID": built.id}})
                    report.say(f"Successfully built {built.id[7:19]}\n")
                    for name in names:
                        report.say(f"Successfully tagged {familiar(name)}\n")
                        core.events.publish("image", "tag", built.id, {"name": familiar(name)})
                    done.append(built.id)
                except BoxshipError as error:
                    report.flush()
                    if isinstance(error, Failure) and error.instruction is not None:
                        report.say(f"{error.instruction.error(str(error)).shown()}\n")
                    code = error.exit_code if isinstance(error, Failure) else 0
                    detail = {"message": str(error), **({"code": code} if code else {})}
                    report.tell({"errorDetail": detail, "error": str(error)})
                finally:
                    report.end()

            done: list[str] = []
            kept: list[Message] = []
            task = asyncio.ensure_future(work())
            try:
                while (message := await report.queue.get()) is not None:
                    report.taken()
                    if not wish.quiet or "aux" in message or "error" in message:
                        if wish.quiet and "error" in message:
                            for each in kept:
                                yield each
                        yield message
                    else:
                        kept.append(message)
                await task
                if wish.quiet and done:
                    yield {"stream": f"{done[0]}\n"}
            finally:
                if not task.done():
                    task.cancel()
                    await asyncio.wait([task])

    async def files(self, name: str) -> AsyncIterator[bytes]:
        """The files of an image as a tar. Raises NotFound before the first piece."""
        core = self._core
        state = await _Bases(core, self._transfers, {}).local(name, platforms.host())
        async with core.snapshots.mover.leased(core.call) as call:
            layers = Layers(core.containerd, call, core.snapshots.snapshotter, self._flights)
            async with layers.view(state.layers) as root:
                tree: Tree = RootTree(root) if root is not None else Memory({})
                with self.fetcher.spool() as spool:
                    def work() -> None:
                        items = [Item(path, node, tree, path) for path, node in walk(tree, "")]
                        write_layer(items, spool.write, None)

                    await in_thread(work)
                    spool.seek(0)
                    while piece := await asyncio.to_thread(spool.read, 1 << 20):
                        yield piece

    @staticmethod
    def _credentials(wish: Wish, name: str) -> CredentialSource | None:
        domain = reference.parse(name).domain
        given = wish.registries.get(domain)
        return credentials(base64.urlsafe_b64encode(json.dumps(given).encode()).decode(), domain) if given else None

    # upkeep

    async def usage(self) -> list[dict[str, Any]]:
        """The cache's records as `docker system df` shows them."""
        shown = []
        for record in await self.cache.all():
            shown.append({
                "ID": record.blob[7:32], "Parents": None, "Type": "regular", "Description": record.about, "InUse": False,
                "Shared": False, "Size": record.layer.descriptor.size if record.layer is not None else 0,
                "CreatedAt": record.created, "LastUsedAt": record.used or None, "UsageCount": 1,
            })
        for name, size in await in_thread(self.mounts.usage):
            shown.append({
                "ID": name, "Parents": None, "Type": "exec.cachemount", "Description": "cache of RUN --mount=type=cache",
                "InUse": False, "Shared": False, "Size": size, "CreatedAt": "1970-01-01T00:00:00Z", "LastUsedAt": None,
                "UsageCount": 1,
            })
        return shown

    async def prune(self, *, until: int, keep_bytes: int) -> tuple[list[str], int]:
        """Forget records last used before `until` (nanoseconds), as long as more than `keep_bytes` are left: (ids, bytes)."""
        from boxship.engine import times

        records: list[Record] = sorted(await self.cache.all(), key=lambda record: record.used)
        left = sum(record.layer.descriptor.size for record in records if record.layer is not None)
        gone, space = [], 0
        for record in records:
            if times.nanoseconds(record.used or record.created) >= until or (keep_bytes and left <= keep_bytes):
                continue
            size = record.layer.descriptor.size if record.layer is not None else 0
            await self.cache.forget(record)
            gone.append(record.blob[7:32])
            left -= size
            space += size
        if not keep_bytes:
            for name, size in await in_thread(self.mounts.prune):
                gone.append(name)
                space += size
        return gone, space


async def _receive(spool: IO[bytes], body: AsyncIterator[bytes]) -> None:
    """The context into its file. Raises ResourceExhausted."""
    size = 0
    async for piece in body:
        size += len(piece)
        if size > CONTEXT_MAX:
            raise ResourceExhausted(f"the build context is larger than {CONTEXT_MAX} bytes", "exclude files by .dockerignore")
        spool.write(piece)
    spool.flush()


def _check(parsed: language.Dockerfile, request: Request) -> None:
    """Raises InvalidArgument where the Dockerfile says that findings of its checks are errors, and there are some."""
    if not language.options(parsed).error:
        return
    found = language.check(parsed, request.target, request.args, request.platform)
    if found:
        rules = ", ".join(dict.fromkeys(each.rule for each in found))
        raise InvalidArgument("\n".join([f"lint violation found for rules: {rules}", *(each.shown() for each in found)]))


def _files(tree: TarTree, lone: bytes | None, name: str) -> tuple[bytes, bytes]:
    """(the Dockerfile, the .dockerignore that goes with it). Raises NotFound."""
    if lone is not None:
        return lone, b""
    text = tree.read(name, _DOCKERFILE_MAX)
    if text is None and name == "Dockerfile":
        text = tree.read("dockerfile", _DOCKERFILE_MAX)
    if text is None:
        raise NotFound(f"Cannot locate specified Dockerfile: {name}")
    own = tree.read(f"{name}.dockerignore", _DOCKERFILE_MAX)
    return text, (tree.read(".dockerignore", _DOCKERFILE_MAX) or b"") if own is None else own


def _without(tree: TarTree, ignored: bytes, dockerfile: str) -> Tree:
    """The context without what .dockerignore names; clients leave most of it out, and not always all.

    Nor with what clients put into the archive beside the context: a Dockerfile from elsewhere, named contexts.
    """
    hidden = {name for name in (dockerfile, _CONTEXTS) if name.startswith((".dockerfile.", ".boxship-"))}
    if not ignored.strip():
        return Filtered(tree, frozenset(hidden)) if hidden else tree
    matcher = language.ignore.compile(language.ignore.read(ignored))
    kept = set()
    for path, _ in walk(tree, ""):
        if matcher.excludes(path):
            hidden.add(path)
        else:
            above = path.rpartition("/")[0]
            while above and above not in kept:
                kept.add(above)
                above = above.rpartition("/")[0]
    return Filtered(tree, frozenset(hidden - kept)) if hidden else tree


# parameters


def json_object(text: str, what: str) -> dict[str, Any]:
    if not text:
        return {}
    try:
        found = json.loads(text)
    except ValueError as error:
        raise InvalidArgument(f"invalid {what}: {error}") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise InvalidArgument(f"invalid {what}: not an object")
    return found


def json_list(text: str, what: str) -> list[str]:
    """A parameter that is a list of texts in JSON. Raises InvalidArgument."""
    try:
        found = json.loads(text) if text else []
    except ValueError as error:
        raise InvalidArgument(f"invalid {what}: {error}") from None
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise InvalidArgument(f"invalid {what}: not a list of texts")
    return found


def registries(header: str) -> dict[str, Any]:
    """X-Registry-Config: base64 of an object of credentials by registry. Raises InvalidArgument."""
    if not header:
        return {}
    try:
        text = base64.urlsafe_b64decode(header.replace("+", "-").replace("/", "_") + "=" * (-len(header) % 4))
    except ValueError as error:
        raise InvalidArgument(f"invalid X-Registry-Config header: {error}") from None
    return json_object(text.decode("utf-8", "replace"), "X-Registry-Config header")


def limits(query: Mapping[str, str]) -> Limits:
    """The parameters that limit steps. Raises InvalidArgument."""

    def number(name: str, default: int = 0) -> int:
        try:
            return int(query.get(name) or default)
        except ValueError:
            raise InvalidArgument(f'invalid {name}: "{query.get(name)}" is no number') from None

    found = json.loads(query.get("ulimits") or "[]") or []
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise InvalidArgument("invalid ulimits: not a list of objects")
    return Limits(
        memory=number("memory"), memory_swap=number("memswap"), cpu_shares=number("cpushares"), cpu_quota=number("cpuquota"),
        cpu_period=number("cpuperiod"), cpuset_cpus=query.get("cpusetcpus") or "", cpuset_mems=query.get("cpusetmems") or "",
        shm_size=number("shmsize"), pids=number("pidslimit", 4096), ulimits=tuple(found),
        cgroup_parent=query.get("cgroupparent") or "", seconds=float(number("steptimeout")))


def arguments(text: str) -> dict[str, str]:
    """buildargs: names and values; null takes nothing. Raises InvalidArgument."""
    found = json_object(text, "buildargs")
    return {name: str(value) for name, value in found.items() if value is not None}


def epoch(args: Mapping[str, str]) -> int | None:
    """SOURCE_DATE_EPOCH of the arguments. Raises InvalidArgument."""
    text = args.get("SOURCE_DATE_EPOCH", "")
    if not text:
        return None
    if not text.isdigit():
        raise InvalidArgument(f"SOURCE_DATE_EPOCH is {text}, and should be seconds since 1970")
    return int(text)
