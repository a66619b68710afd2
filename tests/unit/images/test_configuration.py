"""The tables of the configuration about images: what they set, and that mistakes in them are named."""

from __future__ import annotations

import pytest

from boxship.images.configuration import configure
from boxship.images.hosts import DIRECTORIES
from boxship.images.transport import Limits
from boxship.kit.errors import InvalidArgument


def test_nothing_needs_to_be_configured() -> None:
    config = configure({}, {})
    assert (config.limits, config.registries.directories, config.snapshotter) == (Limits(), list(DIRECTORIES), "")


def test_every_key_arrives() -> None:
    config = configure(
        {"downloads": 8, "uploads": 2, "snapshotter": "native"},
        {"directories": ["/c"], "insecure": ["r.lan"], "plain_http": True, "mirrors": {"docker.io": ["https://m.example"]},
         "headers": {"X-A": "b"}, "stall_s": 5, "attempts": 2},
    )
    assert (config.downloads, config.uploads, config.snapshotter) == (8, 2, "native")
    hosts = config.registries
    assert (hosts.directories, hosts.insecure, hosts.plain_http, hosts.headers) == (["/c"], ["r.lan"], True, {"X-A": "b"})
    assert hosts.hosts("docker.io", "pull")[0].address == "m.example"
    assert (config.limits.stall_s, config.limits.attempts, config.limits.connect_s) == (5, 2, 15)


@pytest.mark.parametrize(("images", "registry", "named"), [
    ({"download": 1}, {}, "images.download"), ({"downloads": 0}, {}, "images.downloads"), ({"downloads": True}, {}, "images.downloads"),
    ({"snapshotter": 1}, {}, "images.snapshotter"), ({}, {"mirror": {}}, "registry.mirror"), ({}, {"insecure": "r.lan"}, "registry.insecure"),
    ({}, {"mirrors": {"docker.io": "https://m"}}, "registry.mirrors.docker.io"), ({}, {"stall_s": "1"}, "registry.stall_s"),
    ({}, {"attempts": 1.5}, "registry.attempts"), ({}, {"mirrors": {"docker.io": ["ftp://m"]}}, "ftp://m"), ({}, {"plain_http": 1}, "registry.plain_http"),
])
def test_mistakes_are_named(images: dict[str, object], registry: dict[str, object], named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        configure(images, registry)
