"""The tables of the configuration that say how images are moved.

Runs in: the daemon.

    [registry]
    directories = ["/etc/boxship/certs.d", …]    with hosts.toml and certificates, see `boxship.images.hosts`
    insecure = ["registry.lan:5000", "10.0.0.0/8"]
    plain_http = false                           HTTP for every registry
    connect_s = 15.0   stall_s = 30.0   answer_s = 300.0   attempts = 5   retry_after_max_s = 120.0   connections = 16
    [registry.mirrors]
    "docker.io" = ["https://mirror.example"]
    [registry.headers]
    "X-Name" = "value"

    [images]
    downloads = 4    uploads = 4                 blobs of one image at once
    snapshotter = ""                             "": the namespace's, or the best that there is
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from boxship.images.hosts import Configuration
from boxship.images.transfer import Config
from boxship.images.transport import Limits
from boxship.kit.errors import InvalidArgument

_REGISTRY = frozenset(("directories", "insecure", "plain_http", "mirrors", "headers"))


def configure(
    images: Mapping[str, Any], registry: Mapping[str, Any], warn: Callable[[str, str], None] | None = None
) -> Config:
    """What the tables say; raises InvalidArgument, naming the key."""
    limits = {each.name: type(each.default) for each in fields(Limits)}
    for key in registry:
        if key not in _REGISTRY and key not in limits:
            raise InvalidArgument(f"unknown key registry.{key}")
    defaults = Configuration()
    hosts = Configuration(
        directories=_strings(registry.get("directories", list(defaults.directories)), "registry.directories"),
        insecure=_strings(registry.get("insecure", []), "registry.insecure"),
        plain_http=_typed(registry.get("plain_http", False), bool, "registry.plain_http"),
        mirrors={
            name: _strings(urls, f"registry.mirrors.{name}")
            for name, urls in _typed(registry.get("mirrors", {}), dict, "registry.mirrors").items()
        },
        headers={
            name: _typed(value, str, f"registry.headers.{name}")
            for name, value in _typed(registry.get("headers", {}), dict, "registry.headers").items()
        },
    )
    # A mirror that is none is found now, and not by the first pull.
    for name in hosts.mirrors:
        Configuration(directories=(), mirrors=hosts.mirrors).hosts(name, "pull")
    given: dict[str, Any] = {
        key: _number(registry[key], kind, f"registry.{key}") for key, kind in limits.items() if key in registry
    }
    for key in images:
        if key not in ("downloads", "uploads", "snapshotter"):
            raise InvalidArgument(f"unknown key images.{key}")
    return Config(
        registries=hosts, limits=Limits(**given),
        downloads=_number(images.get("downloads", Config.downloads), int, "images.downloads"),
        uploads=_number(images.get("uploads", Config.uploads), int, "images.uploads"),
        snapshotter=_typed(images.get("snapshotter", ""), str, "images.snapshotter"), warn=warn,
    )


def _typed(value: Any, kind: type[Any], name: str) -> Any:
    if not isinstance(value, kind):
        raise InvalidArgument(f"{name} is not of the kind of {kind()!r}")
    return value


def _strings(value: Any, name: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise InvalidArgument(f"{name} is not a list of texts")
    return value


def _number(value: Any, kind: type[Any], name: str) -> Any:
    """Positive; seconds may have a fraction."""
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int) or value <= 0:
        raise InvalidArgument(f"{name} is no {'number' if kind is float else 'whole number'} above 0")
    return value
