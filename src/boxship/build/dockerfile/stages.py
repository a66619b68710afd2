"""Stages: which ones a target needs, and what their words are expanded with.

Runs in: whatever builds or checks.
Spec: the Dockerfile reference, FROM, ARG, ENV, "Automatic platform ARGs in the global scope".

Where a variable's value comes from:

    before FROM     --build-arg, else the ARG's default; the automatic ones (TARGETPLATFORM …) without an ARG
    in a stage      ENV of the base image, then ENV and ARG in the order of the file: the last one counts
    ARG NAME        --build-arg, else the default, else the value of before FROM
    FROM a stage    begins with that stage's variables, its ARGs included

Not here: values of instructions beyond their words (the state of an image).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from boxship.build.dockerfile import instructions as typed
from boxship.build.dockerfile.mounts import MountFlag
from boxship.build.dockerfile.parse import Block, Dockerfile, trigger
from boxship.build.dockerfile.source import suggestion
from boxship.build.dockerfile.words import ExpansionError, Lexer
from boxship.images import platforms
from boxship.kit.errors import InvalidArgument
from boxship.oci.image import Platform

MAX_VARIABLES = 8 << 20
"""Characters in the variables of one stage."""
_DOCUMENT = 32 << 20
SCRATCH = "scratch"


class Environment:
    """The variables of a stage while it is evaluated."""

    def __init__(
        self, escape: str, build_args: Mapping[str, str], outer: Mapping[str, str], values: Mapping[str, str],
        arguments: Mapping[str, str | None],
    ) -> None:
        self._lexer = Lexer(escape)
        self._build_args = build_args
        self._outer = outer
        self._values = dict(values)
        self._size = sum(map(len, self._values.values()))
        self.arguments = dict(arguments)
        """The ARGs that are declared, in their order, with the value each got; None for none."""
        self.unset: set[str] = set()
        """Names that were expanded without having a value."""

    @property
    def values(self) -> Mapping[str, str]:
        """All variables: what a RUN step gets as its environment."""
        return self._values

    @property
    def declared(self) -> dict[str, str]:
        """The ARGs that have a value, with what they are worth now: an ENV of that name after them counts."""
        return {name: self._values[name] for name in self.arguments if name in self._values}

    def expand(self, word: str) -> str:
        """A word with its variables, without its quotes. Raises ExpansionError."""
        return self._lexer.expand(word, self._values, self.unset)

    def words(self, text: str) -> list[str]:
        """The words that a text expands to. Raises ExpansionError."""
        return self._lexer.words(text, self._values)

    def document(self, text: str) -> str:
        """A here-document: quotes have no meaning in it. Raises ExpansionError."""
        return Lexer("\\", quotes=False, limit=_DOCUMENT).expand(text, self._values, self.unset)

    def declare(self, instruction: typed.Arg) -> list[tuple[str, str | None]]:
        """Evaluate ARG: its names with the values that they have now. Raises ExpansionError."""
        found = []
        for name, default in instruction.pairs:
            value = self._build_args.get(name)
            if value is None:
                value = self._outer.get(name) if default is None else self.expand(default)
            if value is not None:
                self._set(name, value)
            self.arguments[name] = value
            found.append((name, value))
        return found

    def assign(self, instruction: typed.Env) -> list[tuple[str, str]]:
        """Evaluate ENV: its names and values, which are expanded with what was there before. Raises ExpansionError."""
        pairs = [(self.expand(name), self.expand(value)) for name, value in instruction.pairs]
        for name, value in pairs:
            self._set(name, value)
        return pairs

    def _set(self, name: str, value: str) -> None:
        self._size += len(value) - len(self._values.get(name, ""))
        if self._size > MAX_VARIABLES:
            raise ExpansionError(f"the variables are longer than {MAX_VARIABLES} characters")
        self._values[name] = value


@dataclass(frozen=True)
class Stage:
    """One stage to be built."""

    index: int
    """Its number in the file."""
    name: str
    """In lower case; "" for none."""
    source: typed.From
    image: str
    """What it begins with, expanded: an image, SCRATCH, a context. Without meaning if there is a parent."""
    parent: int | None
    """The stage that it begins with."""
    platform: Platform | None
    """FROM --platform; None for the one that the build is for."""
    instructions: tuple[typed.Instruction, ...]
    needs: frozenset[int]
    """The stages that must be there: the parent, and those that files come from."""
    escape: str = "\\"
    build_args: Mapping[str, str] = field(default_factory=dict, repr=False)
    outer: Mapping[str, str] = field(default_factory=dict, repr=False)
    """The variables before FROM."""
    _names: Mapping[str, list[int]] = field(default_factory=dict, repr=False)

    def lookup(self, name: str) -> int | None:
        """The stage before this one that `--from=NAME` means, by name or number; None if it means an image or a context.

        Raises InvalidArgument for a stage that is not before this one.
        """
        return _lookup(self._names, self.index, name)

    def environment(self, env: Mapping[str, str], inherited: Environment | None = None) -> Environment:
        """The variables that it begins with. `env`: the configuration's so far; `inherited`: what the parent stage ended with."""
        values, arguments = (inherited.values, inherited.arguments) if inherited is not None else ({}, {})
        return Environment(self.escape, self.build_args, self.outer, {**values, **env}, arguments)


def _lookup(names: Mapping[str, list[int]], index: int, name: str) -> int | None:
    if name.isascii() and name.isdecimal():
        number = int(name[:9])
        if number >= index:
            raise InvalidArgument(f"invalid stage index {name[:20]}", "only stages before this one can be used")
        return number
    found = names.get(name.lower())
    if not found:
        return None
    before = bisect_left(found, index)
    if before:
        return found[before - 1]
    what = "itself" if found[0] == index else f'stage "{name}", it needs to be defined before'
    raise InvalidArgument(f"cannot copy from {what}", "move that stage above this one, or name another one")


def automatic(target: Platform, build: Platform, stage: str, build_args: Mapping[str, str]) -> dict[str, str]:
    """The variables that are there without an ARG before FROM; --build-arg changes them."""
    found = {
        "BUILDPLATFORM": platforms.format(build), "BUILDOS": build.os, "BUILDOSVERSION": build.os_version,
        "BUILDARCH": build.architecture, "BUILDVARIANT": build.variant,
        "TARGETPLATFORM": platforms.format(target), "TARGETOS": target.os, "TARGETOSVERSION": target.os_version,
        "TARGETARCH": target.architecture, "TARGETVARIANT": target.variant, "TARGETSTAGE": stage or "default",
    }
    return {name: build_args.get(name, value) for name, value in found.items()}


def plan(
    dockerfile: Dockerfile, target: str = "", build_args: Mapping[str, str] | None = None, platform: Platform | None = None, *,
    build_platform: Platform | None = None, contexts: Collection[str] = (), also: Collection[int] = (),
) -> list[Stage]:
    """The stages that `target` needs, in the file's order, the target last.

    `target`: a stage's name or number, "" for the last one. `contexts`: names that stand for other contexts than stages.
    `also`: numbers of stages that are needed too, for triggers of base images. Raises DockerfileError, and InvalidArgument for an
    unknown target.
    """
    given = dict(build_args or {})
    build = build_platform or platforms.host()
    wanted = platform or build
    blocks = dockerfile.blocks
    last = _target(blocks, target)
    outer = _outer(dockerfile, automatic(wanted, build, target.lower() or blocks[-1].start.name, given), given)
    names: dict[str, list[int]] = {}
    stages: list[Stage] = []
    for index, block in enumerate(blocks[:last + 1]):
        stages.append(_stage(dockerfile, index, block, names, outer, given, contexts))
        if block.start.name:
            names.setdefault(block.start.name, []).append(index)
    for index, block in enumerate(blocks[last + 1:], last + 1):
        if block.start.name:
            names.setdefault(block.start.name, []).append(index)
    return _needed(stages, last, also)


def _target(blocks: Sequence[Block], target: str) -> int:
    if not target:
        return len(blocks) - 1
    names = [block.start.name for block in blocks]
    if target.lower() in names:
        return len(names) - 1 - names[::-1].index(target.lower())
    if target.isascii() and target.isdecimal() and int(target[:9]) < len(blocks):
        return int(target[:9])
    known = [name for name in names if name]
    hint = suggestion(target.lower(), known) or (f"its stages are {', '.join(known[:20])}" if known else "it has no named stages")
    raise InvalidArgument(f'target stage "{target}" could not be found', hint)


def _outer(dockerfile: Dockerfile, values: dict[str, str], build_args: Mapping[str, str]) -> dict[str, str]:
    """The variables before the first FROM."""
    environment = Environment(dockerfile.escape, build_args, values, values, {})
    for each in dockerfile.arguments:
        try:
            environment.declare(each)
        except ExpansionError as error:
            raise each.error(str(error.args[0])) from None
    return dict(environment.values)


def _stage(
    dockerfile: Dockerfile, index: int, block: Block, names: Mapping[str, list[int]], outer: Mapping[str, str],
    build_args: Mapping[str, str], contexts: Collection[str],
) -> Stage:
    start = block.start
    lexer = Lexer(dockerfile.escape)
    try:
        image = lexer.expand(start.image, outer)
        wanted = lexer.expand(start.platform, outer)
    except ExpansionError as error:
        raise start.error(str(error.args[0])) from None
    if not image:
        raise start.error(
            f"base name ({start.image}) should not be blank", start.image, "give the ARG before FROM a default, or --build-arg")
    platform = None
    if start.platform:
        if not wanted:
            raise start.error(f"empty platform value from expression {start.platform}", start.platform)
        try:
            platform = platforms.parse(wanted)
        except InvalidArgument as error:
            raise start.error(f"failed to parse platform {start.platform}: {error}", start.platform) from None
    parent = None
    commands = block.instructions
    if start.name and start.name in contexts:
        image, commands = start.name, ()
    elif image not in contexts and (before := names.get(image.lower())):
        parent = before[-1]
    return Stage(
        index, start.name, start, image, parent, platform, commands, frozenset(), dockerfile.escape, build_args, outer, names)


def _needed(stages: list[Stage], last: int, also: Collection[int]) -> list[Stage]:
    wanted = {last, *also}
    found: list[Stage] = []
    for stage in reversed(stages):  # what a stage needs is always before it
        if stage.index in wanted:
            needs = _needs(stage, stages)
            wanted |= needs
            found.append(replace(stage, needs=needs))
    return found[::-1]


def _needs(stage: Stage, stages: Sequence[Stage]) -> frozenset[int]:
    """The stages that it takes files from or begins with. Raises DockerfileError for what cannot be had."""
    found = set()
    if stage.parent is not None:
        found.add(stage.parent)
        for each in stages[stage.parent].instructions:
            if isinstance(each, typed.Onbuild):
                for triggered in trigger(each.trigger):
                    found |= _sources(stage, triggered, each)
    for each in stage.instructions:
        found |= _sources(stage, each, each)
    return frozenset(found)


def _sources(stage: Stage, instruction: typed.Instruction, shown: typed.Instruction) -> set[int]:
    """The stages that an instruction takes files from; errors point at `shown`."""
    names = []
    if isinstance(instruction, typed.Copy) and instruction.from_:
        if "$" in instruction.from_:
            raise shown.error(
                "variable expansion is not supported for --from", f"--from={instruction.from_}",
                "define a new stage with FROM using ARG from global scope as a workaround")
        names.append(instruction.from_)
    elif isinstance(instruction, typed.Run):
        for each in instruction.mounts:
            _check_mount(stage, each, shown)
            names += [each.from_] if each.from_ else []
    found = set()
    for name in names:
        try:
            index = stage.lookup(name)
        except InvalidArgument as error:
            raise shown.error(str(error.args[0]), name, error.hint) from None
        if index is not None:
            found.add(index)
    return found


def _check_mount(stage: Stage, mount: MountFlag, shown: typed.Instruction) -> None:
    """A mount without variables can be checked before anything is built."""
    if not mount.constant:
        return
    lexer = Lexer(stage.escape)
    try:
        mount.expanded(lambda word: lexer.expand(word, {}))
    except InvalidArgument as error:
        raise shown.error(str(error.args[0]), mount.text, error.hint) from None
