"""Carries a Dockerfile out: a graph of stages, each a chain of steps, with the cache in between.

Runs in: the daemon, on its event loop.
Spec: the Dockerfile reference.

Each stage is a task of its own that waits for those that it needs (FROM, COPY --from, RUN --mount from=), so that independent
ones go on side by side. A step's key in the cache is the hash of what it is made of:

    RUN         files below (chain id), command, user, directory, environment, mounts, network, platform
    COPY, ADD   files below, destination, owner and mode as they are written, content and metadata of the files without times
                (--link: without the files below); from a stage or image also: its chain id, which needs no look into it

What a secret holds is no part of any key, and neither is a predefined argument (HTTP_PROXY …) that is not declared.
"""

from __future__ import annotations

import asyncio
import secrets
import stat
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from boxship.build import dockerfile as language
from boxship.build import state as states
from boxship.build.cache import Cache, Record, key, now
from boxship.build.copying import (
    Item,
    Options,
    Taken,
    content_key,
    make_directory,
    place,
    take,
    write_layer,
)
from boxship.build.fetch import Fetcher, archive_kind, is_git, is_url, opened
from boxship.build.layers import Layer, Layers, in_thread
from boxship.build.mounts import Mounts, Step, bind, check_socket, tmpfs
from boxship.build.report import Channel, Report
from boxship.build.running import Limits, Runner, Work
from boxship.build.state import State, joined, shown
from boxship.build.tree import ROOT, FileTree, Memory, Node, RootTree, TarTree, Tree, resolve
from boxship.images.layers import apply, tar
from boxship.kit.errors import BoxshipError, InvalidArgument, NotFound
from boxship.oci import users
from boxship.oci.image import Platform

PROXIES = frozenset(
    name for each in ("HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "NO_PROXY", "ALL_PROXY") for name in (each, each.lower()))


class Failure(BoxshipError):
    """A step failed: where it is in the Dockerfile, and the exit code where it was a command's."""

    def __init__(self, message: str, instruction: Any = None, exit_code: int = 0) -> None:
        super().__init__(message)
        self.instruction = instruction
        self.exit_code = exit_code


class Bases(Protocol):
    """Where images for FROM and --from come from."""

    async def get(self, name: str, platform: Platform, *, pull: bool, told: Callable[[dict[str, Any]], None]) -> State:
        """The image as a state; fetched when it is not here or `pull` says so. Raises NotFound and what registries raise."""


@dataclass(frozen=True)
class Request:
    """What is asked of a build, beside the Dockerfile and the context."""

    target: str = ""
    args: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    platform: Platform | None = None
    no_cache: bool = False
    no_cache_stages: frozenset[str] = frozenset()
    pull: bool = False
    network: str = "default"
    hosts: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    epoch: int | None = None
    """SOURCE_DATE_EPOCH, in seconds."""
    secrets: Mapping[str, bytes] = field(default_factory=dict)
    agents: Mapping[str, str] = field(default_factory=dict)
    """Sockets of ssh agents by the id of the mount."""


@dataclass(frozen=True)
class Machine:
    """What carries builds out; the same for all."""

    layers: Layers
    cache: Cache
    runner: Runner
    bases: Bases
    mounts: Mounts
    fetcher: Fetcher


@dataclass
class _Scope:
    """A stage under way, and at its end what it came to."""

    state: State
    variables: language.Environment
    stage: language.Stage
    channel: Channel
    cached: bool
    """Whether results of earlier builds may be used."""
    has_cmd: bool = False
    """Whether CMD was set in this stage: then ENTRYPOINT leaves it."""


class Solver:
    """One build. `solve` once."""

    def __init__(
        self, machine: Machine, request: Request, stages: Sequence[language.Stage], context: Tree, report: Report,
        contexts: Mapping[str, Tree | str], host_platform: Platform,
    ) -> None:
        """`stages`: those that the target needs, in the file's order, the target last. `contexts`: named trees or images."""
        self._machine = machine
        self._request = request
        self._stages = list(stages)
        self._context = context
        self._contexts = contexts
        self._report = report
        self._platform = request.platform or host_platform
        self._host = host_platform
        self._tasks: dict[int, asyncio.Task[_Scope]] = {}
        self._stack = AsyncExitStack()
        self._trees: dict[str, asyncio.Future[Tree]] = {}
        self.records: list[Record] = []
        """What the steps came to, for the cache's export."""
        self._total = sum(1 + len(stage.instructions) for stage in self._stages) + len(request.labels and [1])
        self._numbers: dict[int, int] = {}
        count = 0
        for stage in self._stages:
            self._numbers[stage.index] = count
            count += 1 + len(stage.instructions)

    async def solve(self) -> State:
        """The target's state. Raises Failure for a step that failed, and what base images and contexts raise."""
        async with self._stack:
            try:
                for position, stage in enumerate(self._stages):
                    self._tasks[stage.index] = asyncio.ensure_future(self._stage(stage, self._report.channel(position)))
                done, _ = await asyncio.wait(self._tasks.values(), return_when=asyncio.FIRST_EXCEPTION)
                for task in done:
                    task.result()
                state = self._tasks[self._stages[-1].index].result().state
            finally:
                for task in self._tasks.values():
                    task.cancel()
                await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        if self._request.labels:
            words = " ".join(f"{name}={value}" for name, value in self._request.labels.items())
            self._report.flush()
            self._report.say(f"Step {self._total}/{self._total} : LABEL {words}")
            self._report.say("\n")
            labels = {**(state.config.get("Labels") or {}), **self._request.labels}
            state = state.stepped(f"LABEL {words}", self._stamp(state), Labels=labels)
            self._report.say(f" ---> {_short(state)}\n")
        return state

    def _stamp(self, state: State | None = None) -> str:
        """When a step happened: by the clock for one that is carried out, with its layer's time for one that only says something.

        So that what comes wholly from the cache is the very same image.
        """
        if self._request.epoch is not None:
            from datetime import UTC, datetime

            return datetime.fromtimestamp(self._request.epoch, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return now() if state is None else state.created

    # stages

    async def _stage(self, stage: language.Stage, channel: Channel) -> _Scope:
        number = self._numbers[stage.index]
        try:
            channel.say(f"Step {number + 1}/{self._total} : {stage.source.original}")
            channel.say("\n")
            inherited = None
            try:
                if stage.parent is not None:
                    above = await asyncio.shield(self._tasks[stage.parent])
                    state, inherited = above.state, above.variables
                else:
                    state = await self._base(stage, channel)
            except Failure:
                raise
            except BoxshipError as error:
                raise Failure(str(error), stage.source) from error
            channel.say(f" ---> {_short(state)}\n")
            cached = not (self._request.no_cache or stage.name in self._request.no_cache_stages
                          or str(stage.index) in self._request.no_cache_stages)
            scope = _Scope(state, stage.environment(state.env, inherited), stage, channel, cached)
            await self._triggers(scope)
            for offset, instruction in enumerate(stage.instructions, number + 2):
                channel.say(f"Step {offset}/{self._total} : {instruction.original}")
                channel.say("\n")
                await self._guarded(scope, instruction)
                channel.say(f" ---> {_short(scope.state)}\n")
            return scope
        finally:
            channel.end()

    async def _triggers(self, scope: _Scope) -> None:
        """What the base's ONBUILD said is to be done first."""
        triggers = list(scope.state.config.get("OnBuild") or [])
        if not triggers:
            return
        scope.state = replace(
            scope.state, config={name: value for name, value in scope.state.config.items() if name != "OnBuild"})
        many = "s" if len(triggers) > 1 else ""
        scope.channel.say(f"# Executing {len(triggers)} build trigger{many}\n")
        for text in triggers:
            for instruction in language.trigger(text):
                await self._guarded(scope, instruction)

    async def _guarded(self, scope: _Scope, instruction: Any) -> None:
        try:
            await self._step(scope, instruction)
        except Failure:
            raise
        except BoxshipError as error:
            raise Failure(str(error), instruction) from error

    async def _base(self, stage: language.Stage, channel: Channel) -> State:
        platform = stage.platform or self._platform
        if stage.image == language.SCRATCH:
            return states.scratch(platform)
        named = self._contexts.get(stage.image)
        if isinstance(named, str):
            return await self._image(named, platform, channel)
        if named is not None:
            # A directory as a base: its files are the one layer.
            taken = [Taken(named, "", node, "")] if (node := named.node("")) is not None else []
            items = place(taken, None, "/", Options(uid=0, gid=0))
            layer = await self._machine.layers.write(lambda write: write_layer(items, write, self._request.epoch))
            return states.scratch(platform).stepped(f"FROM {stage.image}", self._stamp(), layer)
        return await self._image(stage.image, platform, channel)

    async def _image(self, name: str, platform: Platform, channel: Channel) -> State:
        return await self._machine.bases.get(name, platform, pull=self._request.pull, told=channel.tell)

    # steps

    async def _step(self, scope: _Scope, instruction: Any) -> None:
        state = scope.state
        expand = scope.variables.expand
        match instruction:
            case language.Run():
                await self._run(scope, instruction)
            case language.Copy() | language.Add():
                await self._copy(scope, instruction)
            case language.Workdir():
                await self._workdir(scope, joined(state.workdir, expand(instruction.path)).rstrip("/") or "/")
            case language.Arg():
                declared = scope.variables.declare(instruction)
                shown_args = " ".join(name if value is None else f"{name}={value}" for name, value in declared)
                scope.state = state.stepped(f"ARG {shown_args}", self._stamp(state))
            case language.Env():
                pairs = scope.variables.assign(instruction)
                shown_env = " ".join(f"{name}={value}" for name, value in pairs)
                scope.state = state.stepped(f"ENV {shown_env}", self._stamp(state), Env=state.with_env(pairs))
            case language.Label():
                labels = {expand(name): expand(value) for name, value in instruction.pairs}
                shown_labels = " ".join(f"{name}={value}" for name, value in labels.items())
                scope.state = state.stepped(
                    f"LABEL {shown_labels}", self._stamp(state), Labels={**(state.config.get("Labels") or {}), **labels})
            case language.User():
                user = expand(instruction.user)
                scope.state = state.stepped(f"USER {user}", self._stamp(state), User=user)
            case language.Volume():
                paths = [expand(path) for path in instruction.paths]
                if any(not path for path in paths):
                    raise InvalidArgument("VOLUME specified can not be an empty string")
                volumes = {**(state.config.get("Volumes") or {}), **{path: {} for path in paths}}
                scope.state = state.stepped(f"VOLUME {shown(paths)}", self._stamp(state), Volumes=volumes)
            case language.Expose():
                found = states.ports([word for each in instruction.ports for word in scope.variables.words(each)])
                scope.state = state.stepped(
                    f"EXPOSE {' '.join(found)}", self._stamp(state),
                    ExposedPorts={**(state.config.get("ExposedPorts") or {}), **found})
            case language.Cmd():
                words = self._command(state, instruction)
                scope.state = state.stepped(f"CMD {shown(words)}", self._stamp(state), Cmd=words)
                scope.has_cmd = True
            case language.Entrypoint():
                words = self._command(state, instruction)
                scope.state = state.stepped(
                    f"ENTRYPOINT {shown(words)}", self._stamp(state), Entrypoint=words,
                    **({} if scope.has_cmd else {"Cmd": None}))
            case language.Shell():
                scope.state = state.stepped(
                    f"SHELL {shown(instruction.words)}", self._stamp(state), Shell=list(instruction.words))
            case language.Healthcheck():
                scope.state = state.stepped(
                    instruction.original, self._stamp(state), Healthcheck=self._healthcheck(instruction))
            case language.Stopsignal():
                signal = expand(instruction.signal)
                scope.state = state.stepped(f"STOPSIGNAL {signal}", self._stamp(state), StopSignal=signal)
            case language.Onbuild():
                scope.state = state.stepped(
                    f"ONBUILD {instruction.trigger}", self._stamp(state),
                    OnBuild=[*(state.config.get("OnBuild") or []), instruction.trigger])
            case language.Maintainer():
                scope.state = replace(
                    state.stepped(f"MAINTAINER {instruction.name}", self._stamp(state)), author=instruction.name)
            case _:
                raise InvalidArgument(f"{instruction.original.split()[0]} is not known here")

    @staticmethod
    def _command(state: State, instruction: language.Cmd | language.Entrypoint) -> list[str]:
        return list(instruction.words) if instruction.words is not None else [*state.shell, instruction.text]

    @staticmethod
    def _healthcheck(instruction: language.Healthcheck) -> dict[str, Any]:
        if instruction.disabled:
            return {"Test": ["NONE"]}
        test = ["CMD", *instruction.words] if instruction.words is not None else ["CMD-SHELL", instruction.text]
        found: dict[str, Any] = {"Test": test}
        for name, value in (
            ("Interval", instruction.interval_ns), ("Timeout", instruction.timeout_ns),
            ("StartPeriod", instruction.start_period_ns), ("StartInterval", instruction.start_interval_ns),
            ("Retries", instruction.retries),
        ):
            if value:
                found[name] = value
        return found

    async def _layered(
        self, scope: _Scope, about: str, keys: Sequence[str], make: Callable[[], Any], later: Callable[[], Any] | None = None,
        **config: Any,
    ) -> None:
        """A step that changes files: out of the cache, or carried out by `make`, which gives the layer or None.

        `keys`: any of them finds the result. `later` gives another key, which takes longer to find out.
        """
        cache = self._machine.cache
        found: Record | None = None
        known = list(keys)
        if scope.cached:
            for each in known:
                found = found or await cache.find(each)
            if found is None and later is not None:
                known.append(await later())
                found = await cache.find(known[-1])
        if found is not None:
            scope.channel.say(" ---> Using cache\n")
        while found is None:
            if not await cache.once(known[0]) and scope.cached:
                found = await cache.find(known[0])
                if found is not None:
                    scope.channel.say(" ---> Using cache\n")
                continue
            try:
                layer = await make()
                record = Record(known[0], layer, self._stamp(), about)
                found = await cache.put(record, list(scope.state.layers), self._machine.layers.call)
            finally:
                cache.done(known[0])
        for each in known:
            if await cache.find(each) is None:
                await cache.put(found._replace(key=each), list(scope.state.layers), self._machine.layers.call)
            self.records.append(found._replace(key=each))
        scope.state = scope.state.stepped(about, found.created, found.layer, **config)

    async def _workdir(self, scope: _Scope, path: str) -> None:
        state, layers = scope.state, self._machine.layers
        user = state.text("User")

        def items(below: Tree | None) -> list[Item]:
            uid, gid = owner(user, below) if user else (None, None)
            return make_directory(below, path, Options(uid, gid, mtime=self._now_ns()))

        async def make() -> Layer | None:
            async with layers.view(state.layers) as root:
                below = RootTree(root) if root is not None else None
                made = await in_thread(lambda: items(below))
            return await self._written(made)

        await self._layered(scope, f"WORKDIR {path}", [key("workdir", 2, state.chain, path, user, self._request.epoch)], make,
                            WorkingDir=path)

    def _now_ns(self) -> int:
        import time

        return time.time_ns() if self._request.epoch is None else self._request.epoch * 10**9

    async def _written(self, items: Sequence[Item]) -> Layer | None:
        if not items:
            return None
        epoch = self._request.epoch
        return await self._machine.layers.write(lambda write: write_layer(items, write, epoch))

    # sources

    async def _origin(self, scope: _Scope, name: str) -> State | Tree:
        """What `--from=NAME` names: a stage or an image as its state, a context as its tree."""
        index = scope.stage.lookup(name)
        if index is not None:
            if index not in self._tasks:
                raise InvalidArgument(
                    f"the stage {name} is used by nothing but a trigger of the base image",
                    "use it in a COPY --from of the file too")
            return (await asyncio.shield(self._tasks[index])).state
        named = self._contexts.get(name)
        if named is not None and not isinstance(named, str):
            return named
        return await self._image(named or name, self._platform, scope.channel)

    async def _tree(self, origin: State | Tree) -> Tree:
        """The files of an origin; a root stays open until the build is over."""
        if not isinstance(origin, State):
            return origin
        waiting = self._trees.get(origin.chain)
        if waiting is None:
            self._trees[origin.chain] = waiting = asyncio.get_running_loop().create_future()
            try:
                root = await self._stack.enter_async_context(self._machine.layers.view(origin.layers))
                waiting.set_result(RootTree(root) if root is not None else Memory({}))
            except BaseException as error:
                del self._trees[origin.chain]
                waiting.set_exception(error)
                waiting.exception()
                raise
        return await asyncio.shield(waiting)

    # COPY and ADD

    async def _copy(self, scope: _Scope, instruction: Any) -> None:
        state = scope.state
        expand = scope.variables.expand
        adds = isinstance(instruction, language.Add)
        destination = joined(state.workdir, expand(instruction.destination))
        sources = [expand(each) for each in instruction.sources]
        chown, chmod = expand(instruction.chown), expand(instruction.chmod)
        about = f"{'ADD' if adds else 'COPY'} {' '.join([*sources, *(each.name for each in instruction.heredocs)])} {destination}"
        origin: State | Tree = self._context
        from_name = "" if adds else instruction.from_
        if from_name:
            origin = await self._origin(scope, from_name)
        if len(sources) + len(instruction.heredocs) > 1 and not destination.endswith("/") and destination != "/":
            raise InvalidArgument(
                "When using COPY with more than one source file, the destination must be a directory and end with a /"
                if not adds else
                "When using ADD with more than one source file, the destination must be a directory and end with a /")
        below_key = "" if instruction.link else state.chain
        common = [below_key, destination, chown, chmod, instruction.parents, list(instruction.exclude), self._request.epoch]
        if instruction.link and chown and not chown.replace(":", "").isdigit():
            common.append(state.chain)  # whose names they are
        heredocs = {each.name: (self._heredoc(scope, each).encode(), 0o644, self._now_ns()) for each in instruction.heredocs}
        kept = None if isinstance(origin, State) and not chown else 0
        excluded = language.excluder(instruction.exclude)
        options = Options(kept, kept, chmod, instruction.parents, excluded, self._now_ns())
        gathered: list[Taken] = []
        unpacked: list[Taken] = []

        async def gather() -> None:
            if gathered or unpacked:
                return
            if sources:
                for source in sources:
                    await self._take(scope, instruction, origin, source, from_name, gathered, unpacked)
            if heredocs:
                memory = Memory(heredocs)
                for name in heredocs:
                    node = memory.node(name)
                    assert node is not None
                    gathered.append(Taken(memory, name, node, name))

        async def by_content() -> str:
            await gather()
            def work() -> str:
                items = place(gathered, None, destination, options) if gathered else []
                own = options._replace(uid=None, gid=None)
                more = place(unpacked, None, destination.rstrip("/") + "/", own) if unpacked else []
                return key(content_key(items), content_key(more))

            return key("copy", 1, *common, await in_thread(work))

        async def make() -> Layer | None:
            await gather()
            layers = self._machine.layers
            if instruction.link and (not chown or chown.replace(":", "").isdigit()):
                return await self._placed(None, gathered, unpacked, destination, options, chown)
            async with layers.view(state.layers) as root:
                below: Tree = RootTree(root) if root is not None else Memory({})
                return await self._placed(None if instruction.link else below, gathered, unpacked, destination, options, chown,
                                          names=below)

        if isinstance(origin, State) and not heredocs:
            quick = key("copy-from", 1, *common, origin.chain, sources)
            await self._layered(scope, about, [quick], make, by_content)
        else:
            await self._layered(scope, about, [await by_content()], make)

    async def _placed(
        self, below: Tree | None, gathered: Sequence[Taken], unpacked: Sequence[Taken], destination: str, options: Options,
        chown: str, *, names: Tree | None = None,
    ) -> Layer | None:
        epoch = self._request.epoch

        def items() -> list[Item]:
            chosen = options
            if chown:
                uid, gid = owner(chown, names)
                chosen = options._replace(uid=uid, gid=gid)
            made = place(gathered, below, destination, chosen) if gathered else []
            if unpacked:
                own = chosen if chown else chosen._replace(uid=None, gid=None)
                made += place(unpacked, below, destination.rstrip("/") + "/", own)
            return made

        found = await in_thread(items)
        if not found:
            return None
        return await self._machine.layers.write(lambda write: write_layer(found, write, epoch))

    async def _take(
        self, scope: _Scope, instruction: Any, origin: State | Tree, source: str, from_name: str, gathered: list[Taken],
        unpacked: list[Taken],
    ) -> None:
        """Add what a source names to `gathered`, and the trees of archives to `unpacked`."""
        expand = scope.variables.expand
        adds = isinstance(instruction, language.Add)
        if adds and is_git(source):
            tree, _ = await self._machine.fetcher.git(
                source, keep=bool(instruction.keep_git_dir), commit=expand(instruction.checksum))
            self._stack.callback(tree.close)
            node = tree.node("")
            assert node is not None
            gathered.append(Taken(tree, "", node, ""))
            return
        if adds and is_url(source):
            await self._download(instruction, expand(instruction.checksum), source, gathered, unpacked)
            return
        tree_of = await self._tree(origin)
        found = await in_thread(lambda: take(tree_of, source, from_name, parents=instruction.parents))
        for each in found:
            archive = None
            if adds and instruction.unpack is not False and not each.node.is_dir:
                archive = await in_thread(lambda each=each: self._archive(each))  # type: ignore[misc]
            if archive is None:
                gathered.append(each)
            else:
                self._stack.callback(archive.close)
                unpacked.append(Taken(archive, "", archive.node("") or ROOT, ""))

    async def _download(
        self, instruction: Any, checksum: str, url: str, gathered: list[Taken], unpacked: list[Taken],
    ) -> None:
        fetched = await self._machine.fetcher.url(url, checksum)
        name = fetched.name
        if instruction.unpack:
            archive = await in_thread(lambda: opened(fetched.file, owners=True))
            self._stack.callback(archive.close)
            unpacked.append(Taken(archive, "", ROOT, ""))
            return
        if not name and instruction.destination.endswith("/"):
            fetched.file.close()
            raise InvalidArgument(f"cannot determine filename from url: {url}", "name the file in the destination")
        tree = FileTree(fetched.file.fileno(), Node(stat.S_IFREG, 0o600, size=fetched.size, mtime=fetched.mtime), name or "file")
        self._stack.callback(fetched.file.close)
        node = tree.node(name or "file")
        assert node is not None
        gathered.append(Taken(tree, name or "file", node, name or "file"))

    def _archive(self, taken: Taken) -> TarTree | None:
        """The tree of a source that is an archive; None for any other file."""
        if taken.node.kind != stat.S_IFREG:
            return None
        pieces = taken.tree.chunks(taken.path, taken.node)
        first = next(pieces, b"")
        if not archive_kind(first[:512]):
            return None
        spool = self._machine.fetcher.spool()
        spool.write(first)
        for piece in pieces:
            spool.write(piece)
        spool.flush()
        try:
            return opened(spool, owners=True)
        except InvalidArgument:
            return None  # compressed, and no archive inside: it is copied as it is

    def _heredoc(self, scope: _Scope, heredoc: Any) -> str:
        return scope.variables.document(heredoc.content) if heredoc.expand else str(heredoc.content)

    # RUN

    async def _run(self, scope: _Scope, instruction: Any) -> None:
        state, request = scope.state, self._request
        expand = scope.variables.expand
        files: list[tuple[str, bytes]] = []
        args = self._arguments(state, instruction, files)
        declared = {name: value for name, value in scope.variables.declared.items() if name not in state.env}
        proxies = {name: value for name, value in request.args.items() if name in PROXIES and name not in declared}
        network = request.network if instruction.network == "default" else instruction.network
        mounts = [each.expanded(expand) for each in instruction.mounts]
        described = []
        for each in mounts:
            described.append(await self._described(scope, each))
        words = [*(f"{name}={value}" for name, value in sorted(declared.items()))]
        about = "RUN " + (f"|{len(words)} {' '.join(words)} " if words else "") + " ".join(args)
        wanted = key(
            "run", 1, state.chain, args, sorted(state.config.get("Env") or []), sorted(declared.items()), state.text("User"),
            state.workdir, network, instruction.security, described, list(request.hosts),
            [state.platform.os, state.platform.architecture, state.platform.variant],
            [[name, data.decode("utf-8", "surrogateescape")] for name, data in files], request.epoch)
        env = [*(state.config.get("Env") or []), *words, *(f"{name}={value}" for name, value in proxies.items())]
        if request.epoch is not None and "SOURCE_DATE_EPOCH" not in state.env:
            env.append(f"SOURCE_DATE_EPOCH={request.epoch}")

        async def make() -> Layer | None:
            return await self._carried_out(scope, instruction, args, env, network, mounts, files)

        await self._layered(scope, about, [wanted], make)

    def _arguments(self, state: State, instruction: Any, files: list[tuple[str, bytes]]) -> list[str]:
        """The command; `files` gets those that it reads at /dev/pipes/NAME."""
        if instruction.words is not None:
            return list(instruction.words)
        if instruction.script is None:
            return [*state.shell, instruction.text]
        # Only a heredoc: the text itself is the program.
        content = str(instruction.script)
        if content.startswith("#!"):
            name = instruction.script_name or "EOF"
            files.append((name, content.encode("utf-8", "surrogateescape")))
            return [f"/dev/pipes/{name}"]
        return [*state.shell, content]

    async def _described(self, scope: _Scope, mount: Any) -> list[Any]:
        """What of a mount is part of the step's key."""
        target = mount.target
        match mount.type:
            case "bind":
                origin = await self._origin(scope, mount.from_) if mount.from_ else self._context
                if isinstance(origin, State):
                    return ["bind", target, mount.source, origin.chain, mount.read_write]
                taken = await in_thread(lambda: take(origin, mount.source or "."))
                items = await in_thread(lambda: place(taken, None, "/", Options(uid=0, gid=0)))
                return ["bind", target, mount.source, await in_thread(lambda: content_key(items)), mount.read_write]
            case "cache":
                return ["cache", target, mount.id or target, mount.sharing, mount.read_only]
            case "tmpfs":
                return ["tmpfs", target, mount.size]
            case _:
                return [mount.type, mount.id, target, mount.env, mount.required]

    async def _carried_out(
        self, scope: _Scope, instruction: Any, args: list[str], env: list[str], network: str, mounts: Sequence[Any],
        files: list[tuple[str, bytes]],
    ) -> Layer | None:
        machine, state, request = self._machine, scope.state, self._request
        layers = machine.layers
        chain = await layers.ensure(state.layers)
        name = secrets.token_hex(32)
        async with AsyncExitStack() as stack:
            step = await stack.enter_async_context(machine.mounts.step())
            made = []
            hidden: list[str] = []
            for each in mounts:
                if (mounted := await self._mounted(scope, each, step, stack, env)) is not None:
                    made.append(mounted)
                if each.type == "secret" and each.env and each.id in request.secrets:
                    # Not in the container's configuration, which is written to containerd's database.
                    place_of = f"/dev/pipes/.{each.env}"
                    made.append(step.secret(request.secrets[each.id], place_of, mode=0o444, uid=0, gid=0))
                    name_of = each.env
                    hidden.append(f'{name_of}="$(cat {place_of}; echo x)"; export {name_of}="${{{name_of}%x}}"\n')
            if hidden:
                if instruction.words is not None:
                    raise InvalidArgument("a secret in a variable needs the shell form of RUN", "or mount it as a file")
                args = [*args[:-1], "".join(hidden) + args[-1]]
            made += [step.secret(data, f"/dev/pipes/{file}", mode=0o755, uid=0, gid=0) for file, data in files]
            rootfs = await layers.prepare(name, chain, {})
            try:
                scope.channel.say(f" ---> Running in {name[:12]}\n")
                code = await machine.runner.run(Work(
                    name, [layer.diff_id for layer in state.layers], args, env, state.text("User"), state.workdir, network,
                    instruction.security == "insecure", made, request.hosts, request.limits), rootfs, scope.channel.output)
                if code:
                    shown_command = " ".join(args)
                    raise Failure(f"The command '{shown_command}' returned a non-zero code: {code}", instruction, code)
                layer = await layers.commit(name, rootfs, state.layers, request.epoch)
            except BaseException:
                await asyncio.shield(layers.remove(name))
                raise
        scope.channel.say(f"Removing intermediate container {name[:12]}\n")
        return layer

    async def _mounted(self, scope: _Scope, mount: Any, step: Step, stack: AsyncExitStack, env: list[str]) -> Any:
        """A --mount as a mount of the specification; None for a secret that is not there and not required."""
        target = joined(scope.state.workdir, mount.target).rstrip("/") or "/"
        match mount.type:
            case "tmpfs":
                return tmpfs(target, mount.size or 0)
            case "bind":
                return await self._bound(scope, mount, target, step, stack)
            case "cache":
                directory, fresh = await stack.enter_async_context(self._machine.mounts.cache(
                    f"{mount.id or mount.target}", mount.sharing or "shared", mode=mount.mode or 0o755, uid=mount.uid or 0,
                    gid=mount.gid or 0))
                if fresh and mount.from_:
                    await self._seed(scope, mount, directory)
                return bind(directory, target, read_only=mount.read_only)
            case "secret":
                value = self._request.secrets.get(mount.id)
                if value is None:
                    if mount.required:
                        raise NotFound(f"secret {mount.id}: not found", f"give it with --secret id={mount.id},src=FILE")
                    return None
                if mount.env and not mount.target_given:
                    return None
                return step.secret(value, target, mode=0o400 if mount.mode is None else mount.mode, uid=mount.uid or 0,
                                   gid=mount.gid or 0)
            case _:
                socket = self._request.agents.get(mount.id or "default")
                if socket is None:
                    if mount.required:
                        raise NotFound(f"ssh agent {mount.id or 'default'}: not found", "give it with --ssh")
                    return None
                env.append(f"SSH_AUTH_SOCK={target}")
                return bind(check_socket(socket), target, read_only=False)

    async def _bound(self, scope: _Scope, mount: Any, target: str, step: Step, stack: AsyncExitStack) -> Any:
        layers = self._machine.layers
        origin = await self._origin(scope, mount.from_) if mount.from_ else self._context
        inner = mount.source or "/"
        if isinstance(origin, State):
            chain = await layers.ensure(origin.layers)
        else:
            taken = await in_thread(lambda: take(origin, inner))
            if not taken:
                raise NotFound(f"--mount: nothing in the build context matches {inner}")
            items = await in_thread(lambda: place(taken, None, "/", Options(uid=0, gid=0)))
            layer = await self._written(items)
            chain = await layers.ensure([layer]) if layer is not None else ""
            inner = "/" if taken[0].node.is_dir else f"/{taken[0].name}"
        mounts = await stack.enter_async_context(layers.mounts(chain, writable=mount.read_write))
        return step.attach(mounts, inner, target, read_only=not mount.read_write)

    async def _seed(self, scope: _Scope, mount: Any, directory: str) -> None:
        """What a new cache begins with."""
        tree = await self._tree(await self._origin(scope, mount.from_))

        def work() -> None:
            taken = take(tree, mount.source or "/")
            items = place(taken, None, "/", Options())
            with self._machine.fetcher.spool() as spool:
                write_layer(items, spool.write, None)
                spool.flush()
                with tar.Mapped(spool.fileno()) as source:
                    apply.apply(source, directory)

        await in_thread(work)


def owner(text: str, names: Tree | None) -> tuple[int, int]:
    """--chown's ids: a number without a group is the group's too, a name has its own. Raises NotFound."""

    def read(path: str) -> str:
        if names is None:
            return ""
        real = resolve(names, path)
        node = names.node(real)
        if node is None or node.kind != stat.S_IFREG or node.size > 16 << 20:
            return ""
        return b"".join(names.chunks(real, node)).decode("utf-8", "surrogateescape")

    user, separator, _ = text.partition(":")
    found = users.find(text, read)
    return found.uid, found.uid if not separator and user.isdigit() else found.gid


def _short(state: State) -> str:
    return key(state.chain, dict(state.config), [dict(each) for each in state.history])[:12]
