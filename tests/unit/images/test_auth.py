"""Credentials: where they come from, how challenges are read, and what tokens are asked for and kept."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boxship.images.auth import (
    Anonymous,
    Authorizer,
    ConfigFiles,
    Credentials,
    Given,
    decode_entry,
    default_files,
    parse_challenges,
)
from boxship.kit.errors import InvalidArgument, PermissionDenied, Unavailable

BEARER = 'Bearer realm="https://auth.example/token",service="registry.example",scope="repository:a/b:pull"'


def get(files: ConfigFiles, host: str, repository: str = "library/x") -> Credentials | None:
    return asyncio.run(files.get(host, repository, []))


def config(path: Path, **content: object) -> ConfigFiles:
    path.write_text(json.dumps(content))
    return ConfigFiles([str(path)], {"PATH": str(path.parent)})


def pair(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(("header", "found"), [
    (BEARER, [("bearer", {"realm": "https://auth.example/token", "service": "registry.example", "scope": "repository:a/b:pull"})]),
    ('Basic realm="a \\"quoted\\" realm"', [("basic", {"realm": 'a "quoted" realm'})]),
    ('Basic realm="x", Bearer realm="y",service="z"', [("basic", {"realm": "x"}), ("bearer", {"realm": "y", "service": "z"})]),
    ("Bearer realm=https://a/t, service=s", [("bearer", {"realm": "https://a/t", "service": "s"})]),
    ('BEARER Realm = "x"', [("bearer", {"realm": "x"})]), ("Negotiate", [("negotiate", {})]), ("", []), ("=,=", []), ('Bearer realm="unended', [("bearer", {"realm": "unended"})]),
])
def test_challenges_are_read(header: str, found: list[tuple[str, dict[str, str]]]) -> None:
    assert [(each.scheme, dict(each.parameters)) for each in parse_challenges([header])] == found


def test_auths_hold_users_and_tokens(tmp_path: Path) -> None:
    files = config(tmp_path / "config.json", auths={
        "registry.example": {"auth": pair("user:pass:word")}, "https://index.docker.io/v1/": {"username": "me", "password": "secret"},
        "token.example:5000": {"auth": pair("x:"), "identitytoken": "refresh"}, "https://old.example/v1/": {"auth": pair("old:way")}, "empty.example": {},
    })
    assert get(files, "registry.example") == Credentials("user", "pass:word")
    assert get(files, "docker.io") == Credentials("me", "secret")
    assert get(files, "token.example:5000") == Credentials("x", "", "refresh")
    assert get(files, "old.example") == Credentials("old", "way")
    assert get(files, "empty.example") is None
    assert get(files, "other.example") is None


def test_the_nearest_namespace_wins(tmp_path: Path) -> None:
    files = config(tmp_path / "auth.json", auths={
        "r.example": {"auth": pair("host:1")}, "r.example/team": {"auth": pair("team:1")}, "r.example/team/app": {"auth": pair("app:1")},
    })
    users = [(get(files, "r.example", name) or Credentials()).username for name in ("team/app", "team/app/x", "team/other", "teams/app", "x")]
    assert users == ["app", "app", "team", "host", "host"]


@pytest.mark.parametrize("content", ["[]", "{", '{"auths": {"r.example": {"auth": "???"}}}', '{"auths": {"r.example": {"auth": "dXNlcg=="}}}'])
def test_a_broken_file_is_named_without_its_secrets(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(InvalidArgument, match=r"config\.json"):
        get(ConfigFiles([str(path)]), "r.example")


def test_files_are_looked_for_where_docker_and_podman_have_them() -> None:
    assert default_files({"HOME": "/h", "XDG_RUNTIME_DIR": "/r", "REGISTRY_AUTH_FILE": "/a"}) == [
        "/a", "/h/.docker/config.json", "/r/containers/auth.json", "/h/.config/containers/auth.json",
    ]
    assert default_files({"DOCKER_CONFIG": "/d"}) == ["/d/config.json"]


def helper(directory: Path, name: str, script: str) -> None:
    path = directory / f"docker-credential-{name}"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def helpers(tmp_path: Path) -> ConfigFiles:
    helper(tmp_path, "good", 'read server; echo "{\\"ServerURL\\":\\"$server\\",\\"Username\\":\\"of $server\\",\\"Secret\\":\\"s\\"}"')
    helper(tmp_path, "token", """echo '{"Username":"<token>","Secret":"refresh"}'""")
    helper(tmp_path, "none", 'echo "credentials not found in native keychain"; exit 1')
    helper(tmp_path, "bad", "echo 'no JSON'")
    helper(tmp_path, "broken", "echo 'the keychain is locked'; exit 1")
    content = {"credHelpers": {"t.example": "token", "n.example": "none", "b.example": "bad", "l.example": "broken", "m.example": "missing"},
               "credsStore": "good", "auths": {"n.example": {"auth": pair("in:file")}}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    return ConfigFiles([str(tmp_path / "config.json")], {"PATH": f"{tmp_path}:/usr/bin:/bin"})


def test_helpers_are_asked(helpers: ConfigFiles, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert get(helpers, "r.example:5000") == Credentials("of r.example:5000", "s")
    assert get(helpers, "docker.io") == Credentials("of https://index.docker.io/v1/", "s")
    assert get(helpers, "t.example") == Credentials(identity_token="refresh")
    assert get(helpers, "n.example") == Credentials("in", "file")


@pytest.mark.parametrize(("host", "error", "said"), [
    ("b.example", InvalidArgument, "docker-credential-bad"), ("l.example", Unavailable, "the keychain is locked"), ("m.example", Unavailable, "docker-credential-missing"),
])
def test_a_helper_that_fails_is_named(helpers: ConfigFiles, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, host: str, error: type[Exception], said: str) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(error, match=said):
        get(helpers, host)


def test_secrets_are_not_shown() -> None:
    credentials = decode_entry({"auth": pair("user:hunter2"), "identitytoken": "hunter3", "registrytoken": "hunter4"}, "x")
    assert "hunter" not in repr(credentials)


class Tokens:
    """A token server."""

    def __init__(self, *answers: tuple[int, object]) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, str, list[tuple[str, str]], dict[str, str], str]] = []

    async def __call__(self, method, url, *, query, form, authorization):  # type: ignore[no-untyped-def]
        self.asked.append((method, url, list(query), dict(form or {}), authorization))
        status, body = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return status, body if isinstance(body, bytes) else json.dumps(body).encode()


async def authorize(authorizer: Authorizer, scope: str = "repository:a/b:pull", header: str = BEARER, sent: str = "") -> str:
    assert await authorizer.challenged("a/b", [scope], [header], sent)
    return await authorizer.header("a/b", [scope])


def test_nothing_is_sent_before_the_server_asks() -> None:
    authorizer = Authorizer("registry.example", Given("registry.example", Credentials("u", "p")), Tokens((200, {})))
    assert asyncio.run(authorizer.header("a/b", ["repository:a/b:pull"])) == ""


def test_an_anonymous_token_is_asked_for_by_get() -> None:
    server = Tokens((200, {"token": "abc"}))
    assert asyncio.run(authorize(Authorizer("registry.example", Anonymous(), server))) == "Bearer abc"
    assert server.asked == [("GET", "https://auth.example/token", [("service", "registry.example"), ("scope", "repository:a/b:pull")], {}, "")]


def test_a_user_proves_himself_to_the_token_server() -> None:
    server = Tokens((200, {"access_token": "abc", "token": "old"}))
    authorizer = Authorizer("registry.example", Given("registry.example", Credentials("u", "p")), server)
    assert asyncio.run(authorize(authorizer)) == "Bearer abc"
    assert server.asked[0][4] == "Basic " + pair("u:p")


def test_where_get_is_unknown_the_token_is_asked_for_by_post() -> None:
    server = Tokens((404, b"nothing"), (200, {"access_token": "abc", "refresh_token": "later"}))
    authorizer = Authorizer("registry.example", Given("registry.example", Credentials("u", "p")), server)
    assert asyncio.run(authorize(authorizer)) == "Bearer abc"
    method, _, _, form, _ = server.asked[1]
    assert method == "POST"
    assert (form["grant_type"], form["username"], form["password"], form["service"], form["scope"]) == (
        "password", "u", "p", "registry.example", "repository:a/b:pull"
    )


def test_an_identity_token_is_exchanged() -> None:
    server = Tokens((200, {"access_token": "abc"}))
    authorizer = Authorizer("registry.example", Given("registry.example", Credentials(identity_token="long")), server)
    assert asyncio.run(authorize(authorizer)) == "Bearer abc"
    assert server.asked[0][3]["refresh_token"] == "long"


def test_a_token_is_kept_until_it_expires_and_fetched_once_for_many() -> None:
    now = 1000.0
    server = Tokens((200, {"token": "one", "expires_in": 300}), (200, {"token": "two", "expires_in": 1}))
    authorizer = Authorizer("registry.example", Anonymous(), server, clock=lambda: now)

    async def story() -> None:
        nonlocal now
        await authorize(authorizer)
        scope = ["repository:a/b:pull"]
        assert await asyncio.gather(*(authorizer.header("a/b", scope) for _ in range(5))) == ["Bearer one"] * 5
        assert len(server.asked) == 1
        now += 295
        assert await asyncio.gather(*(authorizer.header("a/b", scope) for _ in range(5))) == ["Bearer two"] * 5
        assert len(server.asked) == 2
        # A lifetime below a minute counts as a minute.
        now += 40
        assert await authorizer.header("a/b", scope) == "Bearer two"

    asyncio.run(story())


def test_a_token_that_the_registry_refuses_is_replaced() -> None:
    server = Tokens((200, {"token": "one"}), (200, {"token": "two"}))
    authorizer = Authorizer("registry.example", Anonymous(), server)

    async def story() -> None:
        assert await authorize(authorizer) == "Bearer one"
        assert await authorize(authorizer, sent="Bearer one") == "Bearer two"

    asyncio.run(story())


def test_basic_credentials_are_tried_once() -> None:
    async def story() -> None:
        authorizer = Authorizer("registry.example", Given("registry.example", Credentials("u", "p")), Tokens((200, {})))
        header = await authorize(authorizer, header='Basic realm="r"')
        assert header == "Basic " + pair("u:p")
        assert not await authorizer.challenged("a/b", ["repository:a/b:pull"], ['Basic realm="r"'], header)
        nobody = Authorizer("registry.example", Anonymous(), Tokens((200, {})))
        assert not await nobody.challenged("a/b", [], ['Basic realm="r"'], "")

    asyncio.run(story())


@pytest.mark.parametrize(("status", "body", "error", "said"), [
    (401, {"errors": [{"code": "UNAUTHORIZED", "message": "wrong password"}]}, PermissionDenied, "wrong password"),
    (403, {"details": "banned"}, PermissionDenied, "banned"), (500, b"oops", Unavailable, "answered 500"),
    (200, b"<html>", Unavailable, "no JSON"), (200, {"token": 5}, Unavailable, "no token"), (200, {}, Unavailable, "no token"),
    (200, {"token": "a\r\nX-Evil: 1"}, Unavailable, "no token"),
])
def test_a_token_server_that_fails_is_reported(status: int, body: object, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=f"registry.example.*{said}"):
        asyncio.run(authorize(Authorizer("registry.example", Anonymous(), Tokens((status, body)))))


@pytest.mark.parametrize("realm", ["http://auth.example/token", "file:///etc/passwd", "", "auth.example"])
def test_credentials_go_to_no_unencrypted_or_strange_realm(realm: str) -> None:
    server = Tokens((200, {"token": "abc"}))
    authorizer = Authorizer("registry.example", Given("registry.example", Credentials("u", "p")), server)
    with pytest.raises(InvalidArgument):
        asyncio.run(authorize(authorizer, header=f'Bearer realm="{realm}"'))
    assert server.asked == []


def test_a_registry_without_tls_may_have_a_token_server_without() -> None:
    authorizer = Authorizer("registry.lan:5000", Anonymous(), Tokens((200, {"token": "abc"})))
    authorizer.encrypted = False
    assert asyncio.run(authorize(authorizer, header='Bearer realm="http://auth.lan/token"')) == "Bearer abc"


@given(st.text(alphabet='Bearer asic=",\\ \t;/:xé\0', max_size=60))
def test_any_challenge_is_read_to_its_end(text: str) -> None:
    for challenge in parse_challenges([text]):
        assert challenge.scheme and challenge.scheme == challenge.scheme.lower()


@given(st.text(max_size=40), st.text(max_size=40).filter(lambda text: ":" not in text))
def test_basic_credentials_are_read_as_they_are_written(secret: str, username: str) -> None:
    header = Credentials(username, secret).basic().removeprefix("Basic ")
    assert decode_entry({"auth": header}, "x") == Credentials(username, secret.rstrip("\0"))
