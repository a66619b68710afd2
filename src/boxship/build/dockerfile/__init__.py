"""The Dockerfile language as BuildKit's frontend knows it: pure, without I/O.

Runs in: the daemon for a build, the command for `--check`.
Spec: the Dockerfile reference (frontend 1.26).

    bytes ─ parse ─► Dockerfile ─ plan ─► [Stage] ─ environment ─► words expanded, when the base image is known
                                  check ─► findings
    .dockerignore ─ ignore.read, ignore.compile ─► Matcher

Not here: carrying anything out.
"""

from __future__ import annotations

from boxship.build.dockerfile import ignore
from boxship.build.dockerfile.check import Finding, Options, check, options
from boxship.build.dockerfile.ignore import excluder
from boxship.build.dockerfile.instructions import (
    Add,
    Arg,
    Cmd,
    Copy,
    Entrypoint,
    Env,
    Expose,
    From,
    Healthcheck,
    Inline,
    Instruction,
    Label,
    Maintainer,
    Onbuild,
    Run,
    Shell,
    Stopsignal,
    User,
    Volume,
    Workdir,
)
from boxship.build.dockerfile.mounts import Mount, MountFlag
from boxship.build.dockerfile.parse import Block, Dockerfile, parse, trigger
from boxship.build.dockerfile.source import DockerfileError, Location, Source, excerpt
from boxship.build.dockerfile.stages import SCRATCH, Environment, Stage, plan
from boxship.build.dockerfile.words import ExpansionError

__all__ = [
    "SCRATCH", "Add", "Arg", "Block", "Cmd", "Copy", "Dockerfile", "DockerfileError", "Entrypoint", "Env", "Environment",
    "ExpansionError", "Expose", "Finding", "From", "Healthcheck", "Inline", "Instruction", "Label", "Location", "Maintainer",
    "Mount", "MountFlag", "Onbuild", "Options", "Run", "Shell", "Source", "Stage", "Stopsignal", "User", "Volume", "Workdir",
    "check", "excerpt", "excluder", "ignore", "options", "parse", "plan", "trigger",
]
