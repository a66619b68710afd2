"""The instructions of a Dockerfile, typed, their words not expanded yet.

Runs in: whatever evaluates a Dockerfile.
Spec: the Dockerfile reference.

What is expanded when an instruction is evaluated is said at each field with "expanded"; all else is taken as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from boxship.build.dockerfile.lines import Heredoc, Line
from boxship.build.dockerfile.mounts import MountFlag
from boxship.build.dockerfile.source import DockerfileError, Location

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """What all have."""

    keyword: str
    """In upper case."""
    written: str
    """The keyword as it is written."""
    source: Line
    """Its text."""

    @property
    def original(self) -> str:
        """The whole instruction on one line, as it is written."""
        return self.source.text.strip()

    @property
    def location(self) -> Location:
        """Where it stands."""
        return self.source.location

    @property
    def line(self) -> int:
        """Its first line."""
        return self.location.line

    @property
    def last_line(self) -> int:
        """Its last line, the end of a here-document included."""
        return self.location.end_line

    @property
    def comments(self) -> tuple[str, ...]:
        """The comments right above, without `#`."""
        return self.source.comments

    def error(self, message: str, near: str = "", hint: str = "") -> DockerfileError:
        """An error that shows this instruction, with the caret at `near` if that is part of it."""
        offset = self.source.text.find(near) if near else -1
        return self.source.error(message, max(offset, 0), len(near) if offset >= 0 else len(self.original), hint)


@dataclass(frozen=True, kw_only=True)
class From(Instruction):
    """FROM: the beginning of a stage."""

    image: str
    """An image, a stage before, or "scratch"; expanded with global arguments."""
    name: str = ""
    """AS, in lower case; "" for none."""
    platform: str = ""
    """Expanded with global arguments."""
    as_written: str = ""
    """The word between image and name."""
    name_written: str = ""


@dataclass(frozen=True, kw_only=True)
class Arg(Instruction):
    """ARG."""

    pairs: tuple[tuple[str, str | None], ...]
    """(name, default); both expanded, a default only if no other value is given."""


@dataclass(frozen=True, kw_only=True)
class Env(Instruction):
    """ENV."""

    pairs: Pairs
    """Both expanded."""
    legacy: bool = False
    """`ENV name value`."""


@dataclass(frozen=True, kw_only=True)
class Label(Instruction):
    """LABEL."""

    pairs: Pairs
    """Both expanded."""
    legacy: bool = False


@dataclass(frozen=True, kw_only=True)
class ShellOrExec(Instruction):
    """An instruction with a command in one of two forms."""

    words: tuple[str, ...] | None = None
    """The command in exec form; None in shell form."""
    text: str = ""
    """The command in shell form: what the shell gets, which expands it."""


@dataclass(frozen=True, kw_only=True)
class Run(ShellOrExec):
    """RUN. In shell form with here-documents, `text` has them."""

    script: str | None = None
    """The text of the only here-document if the command is nothing else: a program if it begins with `#!`, else for the shell."""
    script_name: str = ""
    """Its name: the program's file name."""
    mounts: tuple[MountFlag, ...] = ()
    network: str = "default"
    """default, none or host."""
    security: str = "sandbox"
    """sandbox or insecure."""
    devices: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Cmd(ShellOrExec):
    """CMD."""


@dataclass(frozen=True, kw_only=True)
class Entrypoint(ShellOrExec):
    """ENTRYPOINT."""


@dataclass(frozen=True, kw_only=True)
class Healthcheck(ShellOrExec):
    """HEALTHCHECK; 0 is the default."""

    disabled: bool = False
    """NONE."""
    interval_ns: int = 0
    timeout_ns: int = 0
    start_period_ns: int = 0
    start_interval_ns: int = 0
    retries: int = 0


@dataclass(frozen=True)
class Inline:
    """A source of COPY or ADD that is written in the Dockerfile."""

    name: str
    """Of the file."""
    content: str
    expand: bool
    """Whether variables are expanded in it (`Environment.document`)."""


@dataclass(frozen=True, kw_only=True)
class Copying(Instruction):
    """What COPY and ADD have in common."""

    sources: tuple[str, ...]
    """Expanded."""
    heredocs: tuple[Inline, ...]
    destination: str
    """Expanded."""
    chown: str = ""
    """Expanded."""
    chmod: str = ""
    """Expanded."""
    link: bool = False
    parents: bool = False
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Copy(Copying):
    """COPY."""

    from_: str = ""
    """A stage by name or number, an image or a context; "" for the main context."""


@dataclass(frozen=True, kw_only=True)
class Add(Copying):
    """ADD."""

    checksum: str = ""
    """Expanded."""
    keep_git_dir: bool | None = None
    """None if it is not said."""
    unpack: bool | None = None
    """None if it is not said: local archives are unpacked, remote ones are not."""


@dataclass(frozen=True, kw_only=True)
class Expose(Instruction):
    """EXPOSE."""

    ports: tuple[str, ...]
    """Expanded into words; each PORT[-PORT][/PROTOCOL]."""


@dataclass(frozen=True, kw_only=True)
class Volume(Instruction):
    """VOLUME."""

    paths: tuple[str, ...]
    """Expanded."""


@dataclass(frozen=True, kw_only=True)
class User(Instruction):
    """USER."""

    user: str
    """Expanded."""


@dataclass(frozen=True, kw_only=True)
class Workdir(Instruction):
    """WORKDIR."""

    path: str
    """Expanded."""


@dataclass(frozen=True, kw_only=True)
class Stopsignal(Instruction):
    """STOPSIGNAL."""

    signal: str
    """Expanded."""


@dataclass(frozen=True, kw_only=True)
class Shell(Instruction):
    """SHELL."""

    words: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Onbuild(Instruction):
    """ONBUILD."""

    trigger: str
    """The instruction, with its here-documents: what `parse.trigger` reads."""


@dataclass(frozen=True, kw_only=True)
class Maintainer(Instruction):
    """MAINTAINER."""

    name: str


__all__ = [
    "Add", "Arg", "Cmd", "Copy", "Copying", "Entrypoint", "Env", "Expose", "From", "Healthcheck", "Heredoc", "Inline",
    "Instruction", "Label", "Maintainer", "Onbuild", "Run", "Shell", "ShellOrExec", "Stopsignal", "User", "Volume", "Workdir",
]
