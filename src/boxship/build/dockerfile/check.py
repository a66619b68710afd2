"""`--check`: the usual mistakes, by the names of BuildKit's rules, found without building anything.

Runs in: the command, the daemon.
Spec: docs.docker.com/reference/build-checks; the `check` directive of the Dockerfile reference.

    # check=skip=RULE,RULE;error=true;experimental=RULE      at the beginning of the file: for all of it
    # check=skip=RULE                                        right above an instruction: for that one

Not here: InvalidBaseImagePlatform, which needs the base image.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from boxship.build.dockerfile import instructions as typed
from boxship.build.dockerfile.ignore import Matcher
from boxship.build.dockerfile.parse import Dockerfile
from boxship.build.dockerfile.source import DockerfileError, Location, Source, excerpt, suggestion
from boxship.build.dockerfile.stages import SCRATCH, Environment, Stage, automatic, plan
from boxship.build.dockerfile.words import ExpansionError, Lexer
from boxship.images import platforms
from boxship.kit.errors import InvalidArgument
from boxship.oci import reference
from boxship.oci.image import Platform

RULES = {
    "ConsistentInstructionCasing": "All instructions should be written alike, in upper or in lower case",
    "CopyIgnoredFile": "COPY and ADD cannot find what .dockerignore leaves out",
    "DuplicateStageName": "Each stage should have a name of its own",
    "ExposeInvalidFormat": "EXPOSE takes no address and no port of the host",
    "ExposeProtoCasing": "EXPOSE's protocol should be in lower case",
    "FromAsCasing": "FROM and AS should be written alike, in upper or in lower case",
    "FromPlatformFlagConstDisallowed": "FROM --platform should not be a constant",
    "InvalidDefaultArgInFrom": "FROM should name an image without any --build-arg",
    "InvalidDefinitionDescription": "A comment right above ARG or FROM should describe it: # NAME DESCRIPTION",
    "JSONArgsRecommended": "CMD and ENTRYPOINT in shell form keep signals from the program",
    "LegacyKeyValueFormat": "NAME=VALUE should be written instead of NAME VALUE",
    "MaintainerDeprecated": "LABEL org.opencontainers.image.authors has taken the place of MAINTAINER",
    "MultipleInstructionsDisallowed": "Of several CMD, ENTRYPOINT or HEALTHCHECK in a stage only the last one counts",
    "NoEmptyContinuation": "An empty line should not be within an instruction",
    "RedundantTargetPlatform": "FROM is for $TARGETPLATFORM anyway",
    "ReservedStageName": "A stage should not be called scratch or context",
    "SecretsUsedInArgOrEnv": "ARG and ENV stay readable in the image: secrets belong into RUN --mount=type=secret",
    "StageNameCasing": "The name of a stage should be in lower case",
    "UndefinedArgInFrom": "FROM should use only arguments that are declared before it",
    "UndefinedVar": "A variable should be defined before it is used",
    "WorkdirRelativePath": "The first WORKDIR should be absolute: a relative one depends on the base image",
}
EXPERIMENTAL = frozenset(("InvalidDefinitionDescription",))

_SECRET = re.compile(
    r"(?:_|\A)(?:apikey|auth|credentials?|key|password|pword|passwd|secret|token)(?:_|\Z)", re.IGNORECASE)
_NO_SECRET = re.compile(r"(?:_|\A)(?:public|file|version)(?:_|\Z)", re.IGNORECASE)


@dataclass(frozen=True)
class Finding:
    """One mistake."""

    rule: str
    message: str
    source: Source
    location: Location

    @property
    def description(self) -> str:
        """What the rule says."""
        return RULES[self.rule]

    @property
    def url(self) -> str:
        """Where the rule is explained."""
        kebab = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", self.rule).lower()
        return f"https://docs.docker.com/go/dockerfile/rule/{kebab}/"

    def shown(self) -> str:
        """Several lines: the rule, file and line, the message, the line itself with a caret."""
        at = self.location
        return f"{self.source.name}:{at.line}:{at.column}: {self.rule}: {self.message}\n{excerpt(self.source, at)}"


class Options(NamedTuple):
    """What a `check` directive says."""

    skip: frozenset[str] = frozenset()
    skip_all: bool = False
    error: bool = False
    """Whether findings fail the build."""
    experimental: frozenset[str] = frozenset()
    experimental_all: bool = False

    def with_rules(self, name: str, rules: frozenset[str]) -> Options:
        """With the rules of one of the directive's keys."""
        every = rules == {"all"}
        if name == "skip":
            return self._replace(skip_all=True) if every else self._replace(skip=rules)
        return self._replace(experimental_all=True) if every else self._replace(experimental=rules)

    def reports(self, rule: str) -> bool:
        """Whether findings of a rule are wanted."""
        if rule in EXPERIMENTAL:
            return self.experimental_all or rule in self.experimental
        return not self.skip_all and rule not in self.skip

    def with_comments(self, comments: Iterable[str]) -> Options:
        """With what the comments above an instruction say; an error in them is ignored."""
        for each in comments:
            name, equals, value = each.partition("=")
            if equals and name.strip().lower() == "check":
                try:
                    more = parse_options(value.split(" ", 1)[0])
                except InvalidArgument:
                    return self
                return self._replace(
                    skip=self.skip | more.skip, skip_all=self.skip_all or more.skip_all,
                    experimental=self.experimental | more.experimental,
                    experimental_all=self.experimental_all or more.experimental_all)
        return self


def parse_options(text: str) -> Options:
    """`skip=…;error=…;experimental=…`. Raises InvalidArgument."""
    found = Options()
    for part in filter(None, (each.strip() for each in text.split(";"))):
        name, equals, value = (each.strip() for each in part.partition("="))
        rules = frozenset(each.strip() for each in value.split(","))
        if name == "error" and value.lower() in ("true", "1", "t", "false", "0", "f"):
            found = found._replace(error=value.lower() in ("true", "1", "t"))
        elif name in ("skip", "experimental") and equals:
            found = found.with_rules(name, rules)
        else:
            raise InvalidArgument(f'invalid check option "{part}"', "skip=RULE,…;error=true|false;experimental=RULE,…")
    return found


def options(dockerfile: Dockerfile) -> Options:
    """What the file's `check` directive says. Raises DockerfileError."""
    value, line = dockerfile.text.directives.get("check", ("", 0))
    try:
        return parse_options(value.split(" ", 1)[0])
    except InvalidArgument as error:
        source = dockerfile.text.source
        at = Location(line, 1, line, len(source.lines[line - 1]))
        raise DockerfileError(str(error.args[0]), source, at, error.hint) from None


def check(
    dockerfile: Dockerfile, target: str = "", build_args: Mapping[str, str] | None = None, platform: Platform | None = None, *,
    build_platform: Platform | None = None, environments: Mapping[str, Mapping[str, str]] | None = None,
    ignored: Matcher | None = None, contexts: Collection[str] = (),
) -> list[Finding]:
    """The mistakes, in the order of the file. Without a target all stages are looked at.

    `environments`: ENV of base images by name; of one that is not in it no variable can be called undefined. `ignored`: the
    context's .dockerignore. Raises DockerfileError for a file that cannot be built at all.
    """
    checker = _Checker(dockerfile, options(dockerfile), environments or {}, ignored)
    given = dict(build_args or {})
    every = range(len(dockerfile.blocks)) if not target else ()
    stages = plan(dockerfile, target, given, platform, build_platform=build_platform, also=every, contexts=contexts)
    build = build_platform or platforms.host()
    checker.text()
    checker.names()
    checker.casing()
    checker.bases(automatic(platform or build, build, "", given), given)
    checker.stages(stages)
    return sorted(dict.fromkeys(checker.found), key=lambda each: (each.location, each.rule))


class _Checker:
    """One run over a Dockerfile."""

    def __init__(
        self, dockerfile: Dockerfile, wanted: Options, environments: Mapping[str, Mapping[str, str]], ignored: Matcher | None,
    ) -> None:
        self._file = dockerfile
        self._options = wanted
        self._environments = environments
        self._ignored = ignored if ignored is not None and not ignored.has_exceptions else None
        self._lexer = Lexer(dockerfile.escape)
        self.found: list[Finding] = []
        self._all: list[typed.Instruction] = [
            *dockerfile.arguments, *(each for block in dockerfile.blocks for each in (block.start, *block.instructions))]

    def _report(self, rule: str, message: str, instruction: typed.Instruction, near: str = "") -> None:
        if self._options.with_comments(instruction.comments).reports(rule):
            at = instruction.error("", near).location
            self.found.append(Finding(rule, message, instruction.source.source, at))

    # what can be seen in the text

    def text(self) -> None:
        for each in self._all:
            for number in each.source.blanks:
                if self._options.with_comments(each.comments).reports("NoEmptyContinuation"):
                    self.found.append(Finding(
                        "NoEmptyContinuation", f"an empty line within {each.keyword}: remove it, or make it a comment",
                        each.source.source, Location(number, 1, number, 1)))
            if isinstance(each, typed.Maintainer):
                self._report("MaintainerDeprecated", "use LABEL org.opencontainers.image.authors instead", each)
            elif isinstance(each, typed.From):
                self._from(each)
            elif isinstance(each, typed.Arg):
                self._description(each, [name for name, _ in each.pairs])

    def _from(self, start: typed.From) -> None:
        if start.name_written != start.name_written.lower():
            self._report(
                "StageNameCasing", f"the name '{start.name_written}' should be '{start.name}'", start, start.name_written)
        if start.as_written:
            alike = start.as_written.lower if start.written == start.written.lower() else start.as_written.upper
            consistent = start.written in (start.written.lower(), start.written.upper())
            if consistent and start.as_written != alike():
                message = f"'{start.as_written}' should be '{alike()}', as '{start.written}' is"
                self._report("FromAsCasing", message, start, start.as_written)
        if start.name:
            self._description(start, [start.name])

    def _description(self, instruction: typed.Instruction, known: Sequence[str]) -> None:
        if instruction.comments and instruction.comments[-1].split(" ")[0] not in known:
            self._report(
                "InvalidDefinitionDescription",
                f"the comment above should be `# {known[0]} DESCRIPTION`, or have an empty line below it", instruction)

    def names(self) -> None:
        seen = set()
        for block in self._file.blocks:
            name = block.start.name
            if name in ("scratch", "context"):
                self._report("ReservedStageName", f"'{name}' means something else: choose another name", block.start, name)
            if name and name in seen:
                self._report("DuplicateStageName", f"'{name}' is the name of a stage above", block.start,
                             block.start.name_written)
            seen.add(name)

    def casing(self) -> None:
        inner = [each for block in self._file.blocks for each in (block.start, *block.instructions)]
        lower = sum(each.written == each.written.lower() for each in inner)
        upper = sum(each.written == each.written.upper() for each in inner)
        change: Callable[[str], str] = str.lower if lower > upper else str.upper
        for each in inner:
            if each.written != change(each.written):
                self._report(
                    "ConsistentInstructionCasing", f"'{each.written}' should be '{change(each.written)}', as most are", each,
                    each.written)

    # FROM

    def bases(self, automatics: Mapping[str, str], build_args: Mapping[str, str]) -> None:
        declared = {name for each in self._file.arguments for name, _ in each.pairs}
        defaults = self._outer(automatics, {})
        values = self._outer(automatics, build_args)
        for block in self._file.blocks:
            start = block.start
            if defaults is not None and (image := self._expanded(start.image, defaults)[0]) is not None and not _is_name(image):
                self._report(
                    "InvalidDefaultArgInFrom", f"without --build-arg {start.image} is '{image}', which names no image", start,
                    start.image)
            if values is not None:
                self._undeclared(start, start.image, values, declared)
                self._undeclared(start, start.platform, values, declared)
                self._platform(start, values)

    def _outer(self, automatics: Mapping[str, str], build_args: Mapping[str, str]) -> dict[str, str] | None:
        environment = Environment(self._file.escape, build_args, automatics, automatics, {})
        try:
            for each in self._file.arguments:
                environment.declare(each)
        except ExpansionError:
            return None
        return dict(environment.values)

    def _expanded(self, word: str, values: Mapping[str, str]) -> tuple[str | None, set[str]]:
        unset: set[str] = set()
        try:
            return self._lexer.expand(word, values, unset), unset
        except ExpansionError:
            return None, unset

    def _undeclared(self, start: typed.From, word: str, values: Mapping[str, str], declared: set[str]) -> None:
        for name in sorted(self._expanded(word, values)[1] - declared):
            hint = suggestion(name, sorted({*declared, *values}))
            self._report(
                "UndefinedArgInFrom", f"no ARG {name} stands before the first FROM{f': {hint}' if hint else ''}", start, name)

    def _platform(self, start: typed.From, values: Mapping[str, str]) -> None:
        word = start.platform
        if not word:
            return
        value, unset = self._expanded(word, values)
        if value == values["TARGETPLATFORM"] and re.fullmatch(r"\$(TARGETPLATFORM|\{TARGETPLATFORM\})", word):
            self._report("RedundantTargetPlatform", f"--platform={word} can be left out", start, word)
        if "$" in word or unset or value is None:
            return
        try:
            parsed = platforms.parse(value)
        except InvalidArgument:
            return
        if parsed.os not in start.name and parsed.architecture not in start.name:
            self._report(
                "FromPlatformFlagConstDisallowed",
                f"'{value}' makes the file build for one platform only: use $BUILDPLATFORM, or name the stage after it", start,
                word)

    # what stands in the stages

    def stages(self, stages: Sequence[Stage]) -> None:
        ended: dict[int, _Scope] = {}
        for stage in stages:
            scope = _Scope(stage, ended.get(stage.parent) if stage.parent is not None else None, self._environments)
            for each in stage.instructions:
                self._words(scope, each)
                self._rules(scope, each)
            ended[stage.index] = scope

    def _words(self, scope: _Scope, instruction: typed.Instruction) -> None:
        environment = scope.environment
        environment.unset.clear()
        try:
            _evaluate(scope, instruction)
        except InvalidArgument:
            pass  # building says it better; what was found unset until there still counts
        if not scope.known:
            return
        for name in sorted(environment.unset - set(environment.arguments)):
            hint = suggestion(name, sorted(environment.values))
            self._report("UndefinedVar", f"${name} is not defined{f': {hint}' if hint else ''}", instruction, name)

    def _rules(self, scope: _Scope, each: typed.Instruction) -> None:
        if isinstance(each, typed.Env | typed.Label) and each.legacy:
            name, value = each.pairs[0]
            self._report("LegacyKeyValueFormat", f"write {each.keyword} {name}=… instead of {each.keyword} {name} …", each, value)
        if isinstance(each, typed.Env | typed.Arg):
            for name, _ in each.pairs:
                if _SECRET.search(name) and not _NO_SECRET.search(name):
                    self._report(
                        "SecretsUsedInArgOrEnv",
                        f"{each.keyword} {name} stays readable in the image: use RUN --mount=type=secret,env={name}", each, name)
        if isinstance(each, typed.Cmd | typed.Entrypoint | typed.Healthcheck):
            self._once(scope, each)
        if isinstance(each, typed.Cmd | typed.Entrypoint) and each.words is None and not scope.shell:
            self._report(
                "JSONArgsRecommended", f'a shell takes the signals that are for the program: write {each.keyword} ["PROGRAM", …]',
                each)
        if isinstance(each, typed.Shell):
            scope.shell = True
        if isinstance(each, typed.Workdir):
            self._workdir(scope, each)
        if isinstance(each, typed.Expose):
            self._expose(scope, each)
        if isinstance(each, typed.Copying) and self._ignored is not None:
            self._copy(scope, each, self._ignored)

    def _once(self, scope: _Scope, each: typed.Instruction) -> None:
        before = scope.last.get(each.keyword)
        if before is not None:
            self._report(
                "MultipleInstructionsDisallowed", f"this {each.keyword} does not count: another one follows on line {each.line}",
                before)
        scope.last[each.keyword] = each

    def _workdir(self, scope: _Scope, each: typed.Workdir) -> None:
        try:
            path = scope.environment.expand(each.path)
        except ExpansionError:
            return
        if not scope.workdir and not path.startswith("/"):
            message = f"'{path}' is below whatever the base image says: begin with a slash"
            self._report("WorkdirRelativePath", message, each, each.path)
        scope.workdir = True

    def _expose(self, scope: _Scope, each: typed.Expose) -> None:
        for written in each.ports:
            try:
                words = scope.environment.words(written)
            except ExpansionError:
                continue
            for word in words:
                protocol = word.rpartition(":")[2].partition("/")[2]
                if protocol != protocol.lower():
                    self._report("ExposeProtoCasing", f"'{protocol}' should be '{protocol.lower()}'", each, written)
                if ":" in word:
                    message = f"'{word}' should be '{word.rpartition(':')[2]}': docker run -p says the rest"
                    self._report("ExposeInvalidFormat", message, each, written)

    def _copy(self, scope: _Scope, each: typed.Copying, ignored: Matcher) -> None:
        if isinstance(each, typed.Copy) and each.from_:
            return
        from posixpath import normpath

        for written in each.sources:
            try:
                path = normpath(scope.environment.expand(written)).lstrip("/")
            except ExpansionError:
                continue
            if path not in ("", ".") and "://" not in written and ignored.excludes(path):
                self._report("CopyIgnoredFile", f"'{path}' is left out of the context by .dockerignore", each, written)


class _Scope:
    """A stage while it is looked at."""

    def __init__(self, stage: Stage, parent: _Scope | None, environments: Mapping[str, Mapping[str, str]]) -> None:
        self.known: bool = parent.known if parent else stage.image == SCRATCH or stage.image in environments
        """Whether the base image's variables are known."""
        own = {"PATH": "/bin", **(environments.get(stage.image) or {})}
        self.config: dict[str, str] = dict(parent.config) if parent else own
        self.environment: Environment = stage.environment(self.config, parent.environment if parent else None)
        self.workdir: bool = parent.workdir if parent else False
        self.shell: bool = parent.shell if parent else False
        self.last: dict[str, typed.Instruction] = {}


def _evaluate(scope: _Scope, each: typed.Instruction) -> None:
    """Expand an instruction's words as building would; what is unset gets known. Raises ExpansionError, InvalidArgument."""
    environment = scope.environment
    expand = environment.expand
    words: list[str] = []
    match each:
        case typed.Arg():
            environment.declare(each)
        case typed.Env():
            scope.config.update(environment.assign(each))
        case typed.Label():
            words += [word for pair in each.pairs for word in pair]
        case typed.Copying():
            words += [each.chown, each.chmod, *each.sources, each.destination]
            words += [each.checksum] if isinstance(each, typed.Add) else []
            for document in each.heredocs:
                if document.expand:
                    environment.document(document.content)
        case typed.Run():
            for mount in each.mounts:
                mount.expanded(expand)
        case typed.User():
            words.append(each.user)
        case typed.Workdir():
            words.append(each.path)
        case typed.Stopsignal():
            words.append(each.signal)
        case typed.Volume():
            words += each.paths
        case _:
            pass
    for word in words:
        expand(word)


def _is_name(image: str) -> bool:
    try:
        reference.parse(image)
    except InvalidArgument:
        return False
    return True
