"""Routes and versions, hijacked streams' keys, events and their filters, mounts, errors."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from boxship.engine import hijack, http, volumes
from boxship.engine.errors import Failed, NotModified, status_of
from boxship.engine.events import Events, event_filters, matches, parse_filters
from boxship.engine.images import shown_names
from boxship.kit import errors as kit
from boxship.kit.errors import InvalidArgument, NotFound


def test_names_with_slashes_are_found_between_the_parts_of_a_path() -> None:
    routes = http.Routes()

    @routes.get("/images/{name}/json")
    async def inspect() -> Any: ...

    @routes.get("/images/json")
    async def listed() -> Any: ...

    assert routes.find("GET", "/images/a.b:5000/c/d:tag/json") == (inspect, {"name": "a.b:5000/c/d:tag"})
    assert routes.find("GET", "/images/json") == (listed, {})
    with pytest.raises(NotFound, match="page not found"):
        routes.find("POST", "/images/json")


@pytest.mark.parametrize(("path", "version", "rest"), [
    ("/v1.41/info", (1, 41), "/info"), ("/info", (1, 51), "/info"), ("/v1.24/containers/v1.2/json", (1, 24), "/containers/v1.2/json"),
])
def test_versions_are_read_from_the_path(path: str, version: tuple[int, int], rest: str) -> None:
    assert http.version_of(path) == (version, rest)


@pytest.mark.parametrize(("path", "words"), [
    ("/v1.99/info", "client version 1.99 is too new. Maximum supported API version is 1.51"),
    ("/v1.12/info", "client version 1.12 is too old. Minimum supported API version is 1.24, please upgrade your client to a newer version"),
])
def test_other_versions_are_refused_in_dockers_words(path: str, words: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        http.version_of(path)
    assert str(caught.value) == words


def test_detach_keys_are_found_across_pieces_and_nothing_else_is_kept() -> None:
    detacher = hijack.Detacher(hijack.detach_keys("ctrl-p,ctrl-q"))
    assert detacher.feed(b"abc") == (b"abc", False)
    assert detacher.feed(b"d\x10") == (b"d", False)
    assert detacher.feed(b"x") == (b"\x10x", False)
    assert detacher.feed(b"\x10") == (b"", False)
    assert detacher.feed(b"\x11rest") == (b"", True)


@pytest.mark.parametrize("text", ["ctrl-", "ctrl-pp", "nonsense", "ctrl-1"])
def test_keys_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="Unknown character"):
        hijack.detach_keys(text)


def test_events_are_kept_filtered_and_end_at_until() -> None:
    async def scene() -> list[str]:
        events = Events()
        events.publish("container", "create", "1" * 64, {"name": "a", "image": "i:1", "k": "v"})
        events.publish("container", "exec_start: sh", "1" * 64, {"name": "a", "image": "i:1"})
        events.publish("image", "pull", "i:1", {"name": "i"})
        return [event["Action"] async for event in events.listen(1, 2**62, event_filters('{"container":{"a":true}}'))]

    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(scene(), 0.05))
    event = {"Type": "container", "Action": "exec_start: sh", "scope": "local", "Actor": {"ID": "12", "Attributes": {"name": "a", "image": "i:1"}}}
    assert matches(event, {"event": ["exec_start"]})
    assert matches(event, {"image": ["i"], "container": ["1"]})
    assert not matches(event, {"event": ["exec"]})
    assert not matches(event, {"label": ["k"]})


def test_filters_have_two_forms_and_unknown_ones_are_refused() -> None:
    known = frozenset(("label",))
    assert parse_filters('{"label":["a"]}', known) == parse_filters('{"label":{"a":true,"b":false}}', known) == {"label": ["a"]}
    for text in ("{", "[]", '{"other":["x"]}', '{"label":1}', '{"label":[1]}'):
        with pytest.raises(InvalidArgument):
            parse_filters(text, known)


@pytest.mark.parametrize(("text", "kind", "source", "destination", "writable"), [
    ("/a:/b", "bind", "/a", "/b", True), ("/a:/b:ro", "bind", "/a", "/b", False), ("v1:/b", "volume", "", "/b", True),
    ("/b", "volume", "", "/b", True), ("/a:/b:ro,rshared", "bind", "/a", "/b", False), ("/a/../c/:/b/", "bind", "/c", "/b", True),
])
def test_binds(text: str, kind: str, source: str, destination: str, writable: bool) -> None:
    point = volumes.parse_bind(text)
    assert (point["Type"], point["Source"], point["Destination"], point["RW"]) == (kind, source, destination, writable)


@pytest.mark.parametrize("text", ["", ":/b", "/a:", "/a:b", "/a:/", "/a:/b:nonsense", "/a:/b:ro,rw", "a:b:c:d", "in valid:/b"])
def test_binds_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        volumes.parse_bind(text)


@pytest.mark.parametrize("mount", [
    {}, {"Type": "bind", "Source": "/nothing/here", "Target": "/b"}, {"Type": "bind", "Source": "rel", "Target": "/b"},
    {"Type": "volume", "Target": "rel"}, {"Type": "tmpfs", "Source": "/x", "Target": "/t"}, {"Type": "nonsense", "Target": "/t"},
    {"Type": "bind", "Source": "/tmp", "Target": "/b", "BindOptions": {"Propagation": "odd"}},
])
def test_mounts_that_are_none_are_refused(mount: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        volumes.parse_mount(mount)


@pytest.mark.parametrize(("text", "code", "status"), [
    ('OCI runtime create failed: exec: "x": executable file not found in $PATH: unknown', 127, 400),
    ("failed to create shim task: OCI runtime create failed: stat /x: no such file or directory: unknown", 127, 400),
    ("OCI runtime create failed: exec /etc/passwd: permission denied", 126, 400), ("OCI runtime create failed: no idea", 128, 500),
])
def test_failed_starts_have_dockers_codes(text: str, code: int, status: int) -> None:
    failure = Failed.of(kit.BoxshipError(text))
    assert (failure.exit_code, status_of(failure)) == (code, status)


@pytest.mark.parametrize(("error", "status"), [
    (kit.NotFound("x"), 404), (kit.FailedPrecondition("x"), 409), (kit.InvalidArgument("x"), 400), (kit.Unsupported("x"), 501),
    (kit.Internal("x"), 500), (NotModified("x"), 304),
])
def test_errors_have_statuses(error: Exception, status: int) -> None:
    assert status_of(error) == status


def test_names_of_an_image_are_shown_in_short_and_dangling_ones_not() -> None:
    from types import SimpleNamespace

    digest = f"sha256:{'0' * 64}"
    records = [SimpleNamespace(name=name, target=SimpleNamespace(digest=digest)) for name in (
        "docker.io/library/busybox:1", "localhost:5000/a/b:x", f"moby-dangling@{digest}")]
    assert shown_names(records) == (["busybox:1", "localhost:5000/a/b:x"], [f"busybox@{digest}", f"localhost:5000/a/b@{digest}"])
