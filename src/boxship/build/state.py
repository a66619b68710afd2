"""What a stage has become after a step: its layers, its configuration, its history. Immutable: a step makes a new one.

Runs in: the daemon.
Spec: image-spec 1.1.1 config.md, with what Docker adds (Healthcheck, OnBuild, Shell); the Dockerfile reference for what each
instruction changes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from boxship.build.layers import Layer
from boxship.images.unpack import chain_ids
from boxship.kit.errors import InvalidArgument
from boxship.oci.image import Platform

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
DEFAULT_SHELL = ("/bin/sh", "-c")
EPOCH = "1970-01-01T00:00:00Z"


@dataclass(frozen=True)
class State:
    """One state of a stage."""

    platform: Platform
    config: Mapping[str, Any] = field(default_factory=dict)
    """The containers' defaults, in Docker's names."""
    layers: tuple[Layer, ...] = ()
    history: tuple[Mapping[str, Any], ...] = ()
    created: str = EPOCH
    author: str = ""

    @property
    def chain(self) -> str:
        """The name of its files: the chain id of its layers, "" for none."""
        return chain_ids([layer.diff_id for layer in self.layers])[-1] if self.layers else ""

    @property
    def env(self) -> dict[str, str]:
        """The configuration's environment."""
        return dict(word.partition("=")[::2] for word in self.config.get("Env") or [])

    @property
    def shell(self) -> list[str]:
        """What runs commands in shell form."""
        return list(self.config.get("Shell") or DEFAULT_SHELL)

    @property
    def workdir(self) -> str:
        """Absolute."""
        return str(self.config.get("WorkingDir") or "/")

    def text(self, key: str) -> str:
        """A text of the configuration."""
        return str(self.config.get(key) or "")

    # steps

    def stepped(self, created_by: str, created: str, layer: Layer | None = None, **config: Any) -> State:
        """After a step: with its entry of the history, its layer if there is one, and what it sets in the configuration."""
        entry: dict[str, Any] = {"created": created, "created_by": created_by, "comment": "boxship"}
        if layer is None:
            entry["empty_layer"] = True
        merged = {key: value for key, value in {**self.config, **config}.items() if value not in (None, "")}
        return replace(
            self, config=merged, layers=self.layers if layer is None else (*self.layers, layer), created=created,
            history=(*self.history, entry))

    def with_env(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        """Env after setting names: a name keeps its place."""
        found = self.env
        for name, value in pairs:
            found[name] = value
        return [f"{name}={value}" for name, value in found.items()]

    def document(self) -> dict[str, Any]:
        """The image's configuration blob."""
        platform = self.platform
        return {
            "created": self.created, **({"author": self.author} if self.author else {}),
            "architecture": platform.architecture, **({"variant": platform.variant} if platform.variant else {}),
            "os": platform.os, "config": dict(self.config),
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in self.layers]},
            "history": [dict(each) for each in self.history],
        }


def scratch(platform: Platform) -> State:
    """FROM scratch."""
    return State(platform, {"Env": [f"PATH={DEFAULT_PATH}"], "WorkingDir": "/"})


def of_image(document: Mapping[str, Any], layers: Sequence[Layer], platform: Platform) -> State:
    """The state that an image is: FROM it."""
    config = {key: value for key, value in (document.get("config") or {}).items()
              if key in _KEPT and value not in (None, "", [], {})}
    if not any(word.startswith("PATH=") for word in config.get("Env") or []):
        config["Env"] = [f"PATH={DEFAULT_PATH}", *(config.get("Env") or [])]
    return State(
        Platform(os=document.get("os") or platform.os, architecture=document.get("architecture") or platform.architecture,
                 variant=document.get("variant") or ""),
        config, tuple(layers), tuple(document.get("history") or ()), str(document.get("created") or EPOCH),
        str(document.get("author") or ""))


_KEPT = frozenset((
    "User", "ExposedPorts", "Env", "Entrypoint", "Cmd", "Volumes", "WorkingDir", "Labels", "StopSignal", "Healthcheck", "Shell",
    "OnBuild", "ArgsEscaped",
))


def joined(workdir: str, path: str) -> str:
    """A path of an instruction as an absolute one; a slash at its end stays, since it says "directory"."""
    whole = path if path.startswith("/") else f"{workdir.rstrip('/')}/{path}"
    done: list[str] = []
    for part in whole.split("/"):
        if part == "..":
            done[-1:] = []
        elif part not in ("", "."):
            done.append(part)
    slash = "/" if done and (whole.endswith(("/", "/.")) or path in (".", "./")) else ""
    return "/" + "/".join(done) + slash


_PORT = re.compile(r"(\d+)(?:-(\d+))?(?:/(tcp|udp|sctp))?\Z", re.IGNORECASE)


def ports(words: Sequence[str]) -> dict[str, Any]:
    """EXPOSE's ports as the configuration has them. Raises InvalidArgument."""
    found: dict[str, Any] = {}
    for word in words:
        parsed = _PORT.match(word.rpartition(":")[2])
        first = int(parsed[1]) if parsed else 0
        last = int(parsed[2] or first) if parsed else 0
        if parsed is None or not 0 < first <= last <= 65535:
            raise InvalidArgument(f"invalid containerPort: {word}")
        for port in range(first, last + 1):
            found[f"{port}/{(parsed[3] or 'tcp').lower()}"] = {}
    return found


def shown(words: Sequence[str]) -> str:
    """Words as the history has them: a JSON array."""
    return json.dumps(list(words), separators=(",", ":"), ensure_ascii=False)
