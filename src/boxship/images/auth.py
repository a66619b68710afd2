"""Credentials for registries and the tokens that they are exchanged for.

Runs in: the daemon; tools on behalf of a person.
Spec: RFC 7235 (challenges), RFC 7617 (Basic), RFC 6750 (Bearer); distribution's token specifications (GET, and OAuth 2 by
POST); Docker's config.json (auths, credsStore, credHelpers, identity tokens) and its protocol of credential helpers;
containers-auth.json(5) of podman, whose keys may also name a namespace below a host.

Secrets are kept out of errors and of `repr`.
"""

from __future__ import annotations

import asyncio
import binascii
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import urlsplit

from boxship.images.hosts import DOCKER_HUB, DOCKER_HUB_SERVER, is_loopback
from boxship.kit.errors import InvalidArgument, PermissionDenied, Unavailable

DOCKER_HUB_KEY = "https://index.docker.io/v1/"
"""The name under which Docker keeps what it knows of its own hub."""

IDENTITY_TOKEN_USER = "<token>"
"""The user name with which a helper says that the secret is an identity token."""

CLIENT_ID = "boxship-client"

_HELPER_TIMEOUT_S = 60.0
_SHORTEST_S = 60.0
_EARLY_S = 10.0
_FILE_LIMIT = 4 << 20


@dataclass(frozen=True)
class Credentials:
    """What proves who asks: a user with a secret, an identity (refresh) token, or a token that registries take as it is."""

    username: str = ""
    secret: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    registry_token: str = field(default="", repr=False)
    header: str = field(default="", repr=False)
    """The whole value of an Authorization header."""

    def __bool__(self) -> bool:
        return bool(self.secret or self.identity_token or self.registry_token or self.header)

    def basic(self) -> str:
        """The value of an Authorization header."""
        pair = f"{self.username}:{self.secret}".encode()
        return "Basic " + binascii.b2a_base64(pair, newline=False).decode()


class CredentialSource(Protocol):
    """Where credentials come from."""

    async def get(self, host: str, repository: str, challenges: Sequence[str]) -> Credentials | None:
        """For a registry (as in references) and, where that matters, a repository of it. Raises BoxshipError."""


class Given:
    """The same credentials for one registry, and none for any other."""

    def __init__(self, host: str, credentials: Credentials) -> None:
        self._host = host
        self._credentials = credentials

    async def get(self, host: str, repository: str, challenges: Sequence[str]) -> Credentials | None:
        return self._credentials if host == self._host else None


class Anonymous:
    """No credentials."""

    async def get(self, host: str, repository: str, challenges: Sequence[str]) -> Credentials | None:
        return None


class ConfigFiles:
    """Docker's config.json and podman's auth.json; the first file that knows the host is asked."""

    def __init__(self, paths: Iterable[str] | None = None, environment: Mapping[str, str] | None = None) -> None:
        self._environment = dict(os.environ if environment is None else environment)
        self._paths = list(default_files(self._environment) if paths is None else paths)

    async def get(self, host: str, repository: str, challenges: Sequence[str]) -> Credentials | None:
        for path in self._paths:
            config = _read(path)
            if config is None:
                continue
            helper = _helper(config, host)
            found = await self._ask(helper, host) if helper else None
            found = found or _from_auths(config, host, repository, path)
            if found:
                return found
        return None

    async def _ask(self, helper: str, host: str) -> Credentials | None:
        server = DOCKER_HUB_KEY if host == DOCKER_HUB else host
        answer = await run_helper(helper, "get", server.encode(), self._environment)
        if answer is None:
            return None
        try:
            entry = json.loads(answer)
            username, secret = entry.get("Username", ""), entry.get("Secret", "")
            if not isinstance(username, str) or not isinstance(secret, str):
                raise ValueError
        except (ValueError, AttributeError):
            raise InvalidArgument(f"docker-credential-{helper}: its answer is not as the protocol has it") from None
        if username == IDENTITY_TOKEN_USER:
            return Credentials(identity_token=secret)
        return Credentials(username, secret) if secret else None


def default_files(environment: Mapping[str, str]) -> list[str]:
    """Where credentials of the person lie, Docker's first."""
    home = environment.get("HOME", "")
    found = []
    if environment.get("REGISTRY_AUTH_FILE"):
        found.append(environment["REGISTRY_AUTH_FILE"])
    docker = environment.get("DOCKER_CONFIG") or (f"{home}/.docker" if home else "")
    if docker:
        found.append(f"{docker}/config.json")
    if environment.get("XDG_RUNTIME_DIR"):
        found.append(f"{environment['XDG_RUNTIME_DIR']}/containers/auth.json")
    config = environment.get("XDG_CONFIG_HOME") or (f"{home}/.config" if home else "")
    if config:
        found.append(f"{config}/containers/auth.json")
    return found


async def run_helper(helper: str, verb: str, request: bytes, environment: Mapping[str, str]) -> bytes | None:
    """What `docker-credential-HELPER VERB` answers; None when it knows no credentials.

    Raises Unavailable when it is not installed, fails or takes longer than a minute.
    """
    name = f"docker-credential-{helper}"
    if not helper or "/" in helper:
        raise InvalidArgument(f"invalid credential helper {helper!r}")
    try:
        process = await asyncio.create_subprocess_exec(
            name, verb, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
            env=dict(environment),
        )
    except OSError as error:
        hint = "install it, or take it out of config.json"
        raise Unavailable(f"credential helper {name}: {(error.strerror or str(error)).lower()}", hint) from None
    try:
        async with asyncio.timeout(_HELPER_TIMEOUT_S):
            answer, _ = await process.communicate(request)
    except TimeoutError:
        raise Unavailable(f"credential helper {name}: no answer in {_HELPER_TIMEOUT_S:.0f} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode == 0:
        return answer
    text = answer.decode("utf-8", "replace").strip()
    if "credentials not found" in text:
        return None
    raise Unavailable(f"credential helper {name} {verb}: {text[:500] or f'exit status {process.returncode}'}")


def _read(path: str) -> dict[str, object] | None:
    try:
        with open(path, "rb") as file:
            data = json.loads(file.read(_FILE_LIMIT))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"{path}: {error}") from None
    if not isinstance(data, dict):
        raise InvalidArgument(f"{path}: an object is expected")
    return data


def _helper(config: Mapping[str, object], host: str) -> str:
    """The name of the helper that is responsible for the host; "" when none is."""
    helpers = config.get("credHelpers")
    if isinstance(helpers, dict):
        for key in _keys(host, ""):
            if isinstance(helpers.get(key), str):
                return str(helpers[key])
    store = config.get("credsStore")
    return store if isinstance(store, str) else ""


def _keys(host: str, repository: str) -> list[str]:
    """The names under which credentials for a repository may be kept, the most specific first."""
    keys = []
    parts = repository.split("/") if repository else []
    for length in range(len(parts), 0, -1):
        keys.append("/".join([host, *parts[:length]]))
    keys.append(host)
    if host == DOCKER_HUB:
        keys += [DOCKER_HUB_KEY, "index.docker.io", DOCKER_HUB_SERVER]
    return keys


def _from_auths(config: Mapping[str, object], host: str, repository: str, path: str) -> Credentials | None:
    auths = config.get("auths")
    if not isinstance(auths, dict):
        return None
    # Old files have URLs as keys.
    by_host = {_host_of(key): key for key in auths if "://" in key}
    for key in _keys(host, repository):
        entry = auths.get(key)
        if entry is None and key in by_host:
            entry = auths.get(by_host[key])
        if isinstance(entry, dict):
            found = decode_entry(entry, f"{path}: auths: {key}")
            if found:
                return found
    return None


def _host_of(url: str) -> str:
    return urlsplit(url).netloc


def decode_entry(entry: Mapping[str, object], name: str) -> Credentials:
    """An entry of `auths`, which is also what the engine's API gets in X-Registry-Auth. Raises InvalidArgument."""

    def text(key: str) -> str:
        value = entry.get(key, "")
        return value if isinstance(value, str) else ""

    username, secret = text("username"), text("password")
    if text("auth") and not secret:
        try:
            pair = binascii.a2b_base64(text("auth")).decode()
        except (binascii.Error, UnicodeDecodeError):
            raise InvalidArgument(f"{name}: auth is not base64 of user:password") from None
        username, colon, secret = pair.partition(":")
        if not colon:
            raise InvalidArgument(f"{name}: auth is not base64 of user:password")
        secret = secret.rstrip("\0")
    return Credentials(username, secret, text("identitytoken"), text("registrytoken"))


@dataclass(frozen=True)
class Challenge:
    """One of the ways to authenticate that a server offers."""

    scheme: str
    """In lower case."""
    parameters: Mapping[str, str]


def parse_challenges(headers: Iterable[str]) -> list[Challenge]:
    """The challenges of WWW-Authenticate headers; what does not follow the grammar is left out."""
    return [challenge for header in headers for challenge in _parse_challenge(header)]


def _parse_challenge(text: str) -> list[Challenge]:
    found: list[Challenge] = []
    parameters: dict[str, str] = {}
    rest = text.strip()
    while rest:
        word, rest = _word(rest)
        if not word:
            break
        if not rest.startswith("="):
            parameters = {}
            found.append(Challenge(word.lower(), parameters))
            rest = rest.lstrip(" ,")
            continue
        rest = rest[1:].lstrip()
        value, rest = _quoted(rest) if rest.startswith('"') else _word(rest)
        if found:
            parameters[word.lower()] = value
        rest = rest.lstrip(" ,")
    return found


def _word(text: str) -> tuple[str, str]:
    end = 0
    while end < len(text) and text[end] not in ' ,="':
        end += 1
    word, rest = text[:end], text[end:]
    stripped = rest.lstrip(" ")
    return word, stripped if stripped.startswith("=") else rest.lstrip(" ,")


def _quoted(text: str) -> tuple[str, str]:
    out, index = [], 1
    while index < len(text) and text[index] != '"':
        if text[index] == "\\" and index + 1 < len(text):
            index += 1
        out.append(text[index])
        index += 1
    return "".join(out), text[index + 1:]


class TokenFetcher(Protocol):
    """How a token server is asked: the client's HTTP, with its time-outs and retries."""

    async def __call__(
        self, method: str, url: str, *, query: Sequence[tuple[str, str]], form: Mapping[str, str] | None, authorization: str
    ) -> tuple[int, bytes]:
        """Status and body (bounded)."""


@dataclass
class _Token:
    value: str
    expires: float


class Authorizer:
    """The Authorization headers for one registry host. Tokens are kept until they expire, and fetched once for many who wait."""

    def __init__(
        self, registry: str, credentials: CredentialSource, fetch: TokenFetcher, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._registry = registry
        self._source = credentials
        self._fetch = fetch
        self.encrypted = True
        """Whether the registry is reached by TLS: credentials for it must not leave it then."""
        self._clock = clock
        self._challenge: Challenge | None = None
        self._credentials: dict[str, Credentials | None] = {}
        self._tokens: dict[tuple[str, ...], _Token] = {}
        self._refresh: dict[str, str] = {}
        self._extra: dict[tuple[str, ...], list[str]] = {}
        self._locks: dict[tuple[str, ...], asyncio.Lock] = {}

    async def header(self, repository: str, scopes: Sequence[str]) -> str:
        """The header's value for a request; "" as long as the server has asked for nothing."""
        challenge = self._challenge
        if challenge is None:
            return ""
        credentials = self._credentials.get(repository)
        if credentials and credentials.header:
            return credentials.header
        if challenge.scheme == "basic":
            return credentials.basic() if credentials and credentials.secret else ""
        if credentials and credentials.registry_token:
            return f"Bearer {credentials.registry_token}"
        return f"Bearer {await self._token(challenge, repository, credentials, self._wanted(scopes))}"

    async def challenged(self, repository: str, scopes: Sequence[str], headers: Sequence[str], sent: str) -> bool:
        """Take note of a 401; False when there is no use in asking again. `sent` is the header that was refused.

        A Bearer token that was refused is thrown away; the caller asks again only once more, so that a server which
        refuses every token ends it.
        """
        challenges = parse_challenges(headers)
        chosen = next((c for c in challenges if c.scheme == "bearer"), None) or next(
            (c for c in challenges if c.scheme == "basic"), None
        )
        if chosen is None:
            return False
        if repository not in self._credentials:
            self._credentials[repository] = await self._source.get(self._registry, repository, list(headers))
        self._challenge = chosen
        credentials = self._credentials[repository]
        if chosen.scheme == "basic" or (credentials and (credentials.header or credentials.registry_token)):
            return bool(credentials) and not sent
        wanted = self._wanted(scopes)
        token = self._tokens.get(wanted)
        if token is not None and sent == f"Bearer {token.value}":
            del self._tokens[wanted]
        self._extra[tuple(scopes)] = _scopes(chosen)
        return True

    def _wanted(self, scopes: Sequence[str]) -> tuple[str, ...]:
        """Our own idea of what a request needs, and the server's."""
        return tuple(sorted({*scopes, *self._extra.get(tuple(scopes), ())}))

    async def _token(
        self, challenge: Challenge, repository: str, credentials: Credentials | None, scopes: tuple[str, ...]
    ) -> str:
        lock = self._locks.setdefault(scopes, asyncio.Lock())
        async with lock:
            token = self._tokens.get(scopes)
            if token is None or token.expires <= self._clock():
                token = await self._exchange(challenge, repository, credentials, scopes)
                self._tokens[scopes] = token
        return token.value

    async def _exchange(
        self, challenge: Challenge, repository: str, credentials: Credentials | None, scopes: tuple[str, ...]
    ) -> _Token:
        """Ask the token server: by POST when there is something to prove, by GET otherwise and where POST is unknown."""
        realm = challenge.parameters.get("realm", "")
        service = challenge.parameters.get("service", "")
        _check_realm(realm, self._registry, encrypted=self.encrypted)
        refresh = self._refresh.get(repository) or (credentials.identity_token if credentials else "")
        status, body = 0, b""
        if refresh:
            form = {"grant_type": "refresh_token", "refresh_token": refresh}
            status, body = await self._post(realm, service, scopes, form)
        elif credentials and credentials.secret:
            authorization = credentials.basic()
            status, body = await self._get(realm, service, scopes, authorization)
            if status in (404, 405):
                form = {"grant_type": "password", "username": credentials.username, "password": credentials.secret,
                        "access_type": "offline"}
                status, body = await self._post(realm, service, scopes, form)
        else:
            status, body = await self._get(realm, service, scopes, "")
        if status == 401 or status == 403:
            hint = "the user name or password is wrong" if credentials else "log in first"
            raise PermissionDenied(f"{self._registry}: the token server {_origin(realm)} refused: {_reason(body, status)}", hint)
        if status != 200:
            raise Unavailable(f"{self._registry}: the token server {_origin(realm)} answered {status}: {_reason(body, status)}")
        return self._decode(body, realm, repository)

    async def _get(self, realm: str, service: str, scopes: Sequence[str], authorization: str) -> tuple[int, bytes]:
        query = [("service", service)] if service else []
        query += [("scope", scope) for scope in scopes]
        return await self._fetch("GET", realm, query=query, form=None, authorization=authorization)

    async def _post(self, realm: str, service: str, scopes: Sequence[str], form: Mapping[str, str]) -> tuple[int, bytes]:
        fields = {**form, "service": service, "client_id": CLIENT_ID}
        if scopes:
            fields["scope"] = " ".join(scopes)
        return await self._fetch("POST", realm, query=(), form=fields, authorization="")

    def _decode(self, body: bytes, realm: str, repository: str) -> _Token:
        try:
            answer = json.loads(body)
            value = answer.get("access_token") or answer.get("token")
            lifetime = float(answer.get("expires_in") or _SHORTEST_S)
            refresh = answer.get("refresh_token")
        except (ValueError, TypeError, AttributeError):
            raise Unavailable(f"{self._registry}: the token server {_origin(realm)} answered with no JSON of a token") from None
        if not isinstance(value, str) or not value or any(ord(letter) <= 32 or ord(letter) > 126 for letter in value):
            raise Unavailable(f"{self._registry}: the token server {_origin(realm)} gave no token")
        if isinstance(refresh, str) and refresh:
            self._refresh[repository] = refresh
        return _Token(value, self._clock() + max(lifetime, _SHORTEST_S) - _EARLY_S)


def _scopes(challenge: Challenge) -> list[str]:
    return challenge.parameters.get("scope", "").split()


def _check_realm(realm: str, registry: str, *, encrypted: bool) -> None:
    """Credentials travel to the realm: it must be a URL, and encrypted as the registry is unless it is this machine."""
    try:
        parts = urlsplit(realm)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        known = False
    if not known:
        raise InvalidArgument(f"{registry}: invalid token server {realm[:200]!r} in its challenge")
    if parts.scheme == "http" and encrypted and not is_loopback(parts.hostname or ""):
        raise InvalidArgument(f"{registry}: the token server {realm[:200]!r} would get credentials unencrypted")


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _reason(body: bytes, status: int) -> str:
    """What the server says, in one line."""
    try:
        answer = json.loads(body)
        errors = answer.get("errors")
        if isinstance(errors, list) and errors and isinstance(errors[0], dict):
            return f"{errors[0].get('code', '')}: {errors[0].get('message', '')}"[:300]
        return str(answer.get("details") or answer.get("error_description") or answer.get("error") or status)[:300]
    except (ValueError, AttributeError):
        return f"status {status}"


