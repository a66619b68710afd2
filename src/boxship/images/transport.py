"""HTTP to the servers of a registry: authentication, retries, redirects, time-outs, and errors that say what and where.

Runs in: the daemon's event loop.
Spec: distribution-spec (newest), "API" and "Error codes"; RFC 9110 (redirects, Retry-After), RFC 6585 (429), RFC 7234 5.5
(Warning, which distribution-spec still uses).

An `Authorization` header goes to the server that asked for it, and with a redirect to no other.
Not here: what the API's requests mean (`boxship.images.registry`).
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from urllib.parse import urlencode, urljoin, urlsplit
from urllib.request import getproxies_environment, proxy_bypass

import aiohttp
from yarl import URL

from boxship import __version__
from boxship.images.auth import Anonymous, Authorizer, Credentials, CredentialSource
from boxship.images.hosts import Configuration, Host, is_loopback
from boxship.kit.errors import (
    BoxshipError,
    DataLoss,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)

USER_AGENT = f"boxship/{__version__}"

MAX_REDIRECTS = 10
ERROR_BODY = 64 << 10
"""Bytes of an error's body that are read."""
TOKEN_BODY = 1 << 20
READ_BUFFER = 1 << 20

RETRIED = frozenset((408, 425, 429, 500, 502, 503, 504))
_REDIRECTS = frozenset((301, 302, 303, 307, 308))
_WARNING = re.compile(r'299\s+\S+\s+"((?:[^"\\]|\\.)*)"')

Body = Callable[[], AsyncIterator[bytes]]
"""Makes the content of a request, again for each attempt."""


class Unreachable(Unavailable):
    """There was no connection, or no answer on it."""


@dataclass(frozen=True)
class Limits:
    """How patient the client is; all times in seconds."""

    connect_s: float = 15.0
    stall_s: float = 30.0
    """Without a byte in either direction."""
    answer_s: float = 300.0
    """From the end of an upload to its answer: the registry may have to move what it got."""
    attempts: int = 5
    """Of a request, the first included."""
    backoff_s: float = 0.5
    """Before the second attempt; doubled for each further one, with up to as much again at random."""
    backoff_max_s: float = 20.0
    retry_after_max_s: float = 120.0
    """A server that wants a longer pause than this is not waited for."""
    connections: int = 16
    """At once, to one host."""


@dataclass
class Request:
    """One request to a registry; `path` is below the API's root, or a whole URL that a server gave."""

    method: str
    path: str
    repository: str = ""
    scopes: Sequence[str] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    query: Sequence[tuple[str, str]] = ()
    body: Body | None = None
    length: int | None = None
    """Bytes of the body."""
    accepted: frozenset[int] = frozenset((200,))
    """Statuses that are no error; any other is raised."""
    retry: bool = True
    """Whether it may be sent again when the connection breaks or the server is overloaded."""
    what: str = ""
    """What it is about, for errors: a reference, a digest."""


class Transport:
    """A pool of connections and the tokens for the servers of any number of registries."""

    def __init__(
        self, configuration: Configuration | None = None, credentials: CredentialSource | None = None,
        limits: Limits | None = None, warn: Callable[[str, str], None] | None = None,
        trace: Callable[[str], None] | None = None,
    ) -> None:
        """`warn(host, text)` gets each Warning of a server once; `trace(line)` each request with its answer, and retries."""
        self.configuration = configuration or Configuration()
        self.limits = limits or Limits()
        self._credentials = credentials or Anonymous()
        self._warn = warn
        self._trace = trace
        self._warned: set[tuple[str, str]] = set()
        self._session: aiohttp.ClientSession | None = None
        self._contexts: dict[Host, ssl.SSLContext] = {}
        self._authorizers: dict[tuple[str, str], Authorizer] = {}
        self._schemes: dict[str, str] = {}
        self._probes: dict[str, asyncio.Lock] = {}

    async def close(self) -> None:
        """End all connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def __aenter__(self) -> Transport:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @asynccontextmanager
    async def send(self, host: Host, registry: str, request: Request) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer to a request, its body still to be read.

        Raises NotFound (404), Unauthenticated (401), PermissionDenied (403), ResourceExhausted (429 to the end, 413),
        InvalidArgument (other 4xx), Unavailable (5xx to the end, no connection, stalls), each with the server's own words.
        """
        for attempt in range(1, self.limits.attempts + 1):
            last = attempt == self.limits.attempts or not request.retry
            try:
                response = await self._authorized(host, registry, request)
            except Unavailable as error:
                if last:
                    raise
                await self._pause(self._backoff(attempt), str(error))
                continue
            if response.status in request.accepted:
                try:
                    yield response
                finally:
                    # Whoever did not read to the end does not want the rest; after the end the connection is free already.
                    response.close()
                return
            try:
                failure = await self._error(response, host, request)
                pause = self._retry_after(response)
            finally:
                response.close()
            if last or response.status not in RETRIED or (pause or 0) > self.limits.retry_after_max_s:
                raise failure
            await self._pause(self._backoff(attempt) if pause is None else pause, str(failure))

    async def _authorized(self, host: Host, registry: str, request: Request) -> aiohttp.ClientResponse:
        """The answer, with what the server wants to know of us sent along."""
        scheme = await self._scheme(host)
        url = self._url(host, scheme, request)
        own = _origin(host.url(scheme))
        authorizer = self._authorizer(host, registry)
        authorizer.encrypted = scheme == "https"
        for refused in (False, True):
            # A location of an upload may be on another server, which authenticates by the location itself.
            authorization = await authorizer.header(request.repository, request.scopes) if _origin(url) == own else ""
            response = await self._redirected(host, url, request, authorization)
            if response.status != 401 or _origin(str(response.url)) != own or refused:
                return response
            challenges = response.headers.getall("WWW-Authenticate", [])
            if not await authorizer.challenged(request.repository, request.scopes, challenges, authorization):
                return response
            response.close()
        raise AssertionError  # pragma: no cover - the loop returns

    def _url(self, host: Host, scheme: str, request: Request) -> str:
        url = URL(request.path if "://" in request.path else f"{host.url(scheme)}/{request.path}", encoded=True)
        query = [*request.query]
        if host.namespace and "://" not in request.path:
            query.append(("ns", host.namespace))
        return str(url.extend_query(query)) if query else str(url)

    def _authorizer(self, host: Host, registry: str) -> Authorizer:
        """Credentials of a registry are for the registry; a mirror is asked with those that are known for its own name."""
        name = host.address if host.namespace else registry
        key = (host.address, name)
        if key not in self._authorizers:
            self._authorizers[key] = Authorizer(name, self._credentials, _Tokens(self, host))
        return self._authorizers[key]

    async def _redirected(self, host: Host, url: str, request: Request, authorization: str) -> aiohttp.ClientResponse:
        """The answer after any redirects."""
        origin = _origin(url)
        method, body = request.method, request.body
        seen = set()
        for _ in range(MAX_REDIRECTS + 1):
            headers = dict(request.headers)
            if _origin(url) == origin:
                headers.update(host.headers)
                if authorization:
                    headers["Authorization"] = authorization
            response = await self._once(host, method, url, headers, body, request)
            location = response.headers.get("Location", "")
            if response.status not in _REDIRECTS or not location or response.status in request.accepted:
                return response
            response.close()
            seen.add((method, url))
            target = joined(url, location)
            if not target:
                where = f"{request.method} {_shown(url)}"
                raise InvalidArgument(f"{where}: redirected to {location[:200]!r}, which is no URL of HTTP", _ASK)
            if url.startswith("https:") and target.startswith("http:"):
                raise InvalidArgument(f"{request.method} {_shown(url)}: redirected from https to {_shown(target)}")
            if response.status == 303 and method != "HEAD":
                method, body = "GET", None
            url = target
            if (method, url) in seen:
                raise InvalidArgument(f"{request.method} {_shown(url)}: redirected in a circle", _ASK)
        raise InvalidArgument(f"{request.method} {_shown(url)}: more than {MAX_REDIRECTS} redirects", _ASK)

    async def _once(
        self, host: Host, method: str, url: str, headers: Mapping[str, str], body: Body | None, request: Request
    ) -> aiohttp.ClientResponse:
        """One request over one connection, no redirects. Raises Unavailable when there is no answer."""
        limits = self.limits
        all_headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity", **headers}
        patience = asyncio.timeout(limits.connect_s + limits.stall_s)
        data: AsyncIterator[bytes] | None = None
        if body is not None:
            data = _patient(body(), patience, limits)
            if request.length is not None:
                all_headers["Content-Length"] = str(request.length)
        elif method in ("POST", "PUT", "PATCH"):
            all_headers["Content-Length"] = "0"
        if not is_url(url):
            raise InvalidArgument(f"{method} {url[:200]!r}: no URL of HTTP", _ASK)
        proxy, proxy_headers = _proxy(url)
        if url.startswith("http:"):
            all_headers.update(proxy_headers)
        try:
            async with patience:
                response = await self._open().request(
                    method, URL(url, encoded=True), headers=all_headers, data=data, allow_redirects=False, proxy=proxy,
                    proxy_headers=proxy_headers if url.startswith("https:") else None,
                    ssl=self._context(host) if url.startswith("https:") else True,
                    timeout=aiohttp.ClientTimeout(
                        total=None, sock_connect=host.connect_timeout_s or limits.connect_s,
                        sock_read=limits.answer_s if body is not None else limits.stall_s,
                    ),
                )
        except TimeoutError:
            raise Unreachable(f"{method} {_shown(url)}: no answer within {limits.stall_s:g} s", _RETRY) from None
        except (aiohttp.ClientConnectorCertificateError, ssl.SSLCertVerificationError) as error:
            raise InvalidArgument(f"{method} {_shown(url)}: {_certificate(error)}", _TRUST.format(host.address)) from None
        except aiohttp.ClientSSLError as error:
            raise InvalidArgument(f"{method} {_shown(url)}: no TLS: {_of(error)}", _INSECURE.format(host.address)) from None
        except aiohttp.ClientConnectorDNSError as error:
            raise Unreachable(f"{method} {_shown(url)}: no such host: {_of(error)}") from None
        except aiohttp.ClientConnectorError as error:
            raise Unreachable(f"{method} {_shown(url)}: {_of(error)}") from None
        except (aiohttp.ClientError, OSError) as error:
            raise Unavailable(f"{method} {_shown(url)}: the connection broke: {_of(error)}", _RETRY) from None
        except (ValueError, UnicodeError) as error:
            # Of a host name or header that cannot be sent.
            raise InvalidArgument(f"{method} {_shown(url)}: {_printable(str(error))}", _ASK) from None
        if self._trace is not None:
            self._trace(f"{method} {_shown(url)}: {response.status} {response.reason}")
        self._warnings(host, response)
        return response

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, limit_per_host=self.limits.connections)
            self._session = aiohttp.ClientSession(
                connector=connector, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar(), read_bufsize=READ_BUFFER,
                # Only proxies are wanted of the environment (`_proxy`), not what ~/.netrc has for the host.
                trust_env=False,
            )
        return self._session

    def _context(self, host: Host) -> ssl.SSLContext:
        if host not in self._contexts:
            self._contexts[host] = host.tls.context()
        return self._contexts[host]

    async def _scheme(self, host: Host) -> str:
        """http or https; where it is open which, the server is asked once, without credentials."""
        if host.scheme:
            return host.scheme
        lock = self._probes.setdefault(host.address, asyncio.Lock())
        async with lock:
            if host.address not in self._schemes:
                self._schemes[host.address] = await self._probe(host)
        return self._schemes[host.address]

    async def _probe(self, host: Host) -> str:
        probe = Request("GET", "")
        for scheme in ("https", "http"):
            try:
                (await self._once(host, "GET", f"{host.url(scheme)}/", {}, None, probe)).close()
            except InvalidArgument:
                continue
            except Unreachable:
                raise
            except Unavailable:
                # A server that speaks HTTP only may answer the beginning of TLS by closing the connection.
                if scheme == "https":
                    continue
                raise
            return scheme
        raise Unavailable(f"{host.address}: neither HTTPS nor HTTP is spoken there")

    def _warnings(self, host: Host, response: aiohttp.ClientResponse) -> None:
        """Tell each of the server's warnings once."""
        if self._warn is None:
            return
        for header in response.headers.getall("Warning", []):
            for text in _WARNING.findall(header[:4096]):
                key = (host.address, re.sub(r"\\(.)", r"\1", text))
                if key not in self._warned and len(self._warned) < 1000:
                    self._warned.add(key)
                    self._warn(*key)

    def _backoff(self, attempt: int) -> float:
        pause: float = min(self.limits.backoff_s * 2 ** (attempt - 1), self.limits.backoff_max_s)
        return pause * (1 + random.random())

    async def _pause(self, seconds: float, why: str) -> None:
        if self._trace is not None:
            self._trace(f"{why}; trying again in {seconds:.1f} s")
        await asyncio.sleep(seconds)

    async def pause_before(self, attempt: int, why: str) -> None:
        """The back-off before attempt + 1, for who repeats more than one request."""
        await self._pause(self._backoff(attempt), why)

    def _retry_after(self, response: aiohttp.ClientResponse) -> float | None:
        """Seconds that the server asks to wait."""
        value = response.headers.get("Retry-After", "").strip()
        if value.isdecimal():
            return float(value[:9])
        try:
            return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
        except (ValueError, TypeError, IndexError):
            return None

    async def _error(self, response: aiohttp.ClientResponse, host: Host, request: Request) -> BoxshipError:
        """The error that an answer means."""
        text, codes = await _reason(response)
        reason = _printable(response.reason or "")[:100]
        where = f"{request.method} {_shown(str(response.url))}: {response.status} {reason}".rstrip()
        message = f"{request.what}: {where}{text}" if request.what else f"{where}{text}"
        status = response.status
        if (status in (401, 403) or "DENIED" in codes) and request.what:
            # The words that containerd and Docker have for it, which clients look for.
            verb = "push" if any(scope.endswith("push") for scope in request.scopes) else "pull"
            denied = f"{verb} access denied, repository does not exist or may require authorization"
            message = f"{request.what}: {denied}: {where}{text}"
        if status == 401:
            return Unauthenticated(message, f"log in to {host.namespace or host.address} first, or check the name")
        if status == 403 or "DENIED" in codes:
            return PermissionDenied(message, "the repository does not exist, or these credentials may not do this there")
        if status == 404:
            return NotFound(message)
        if status == 429 or "TOOMANYREQUESTS" in codes:
            return ResourceExhausted(message, "the registry limits how often it is asked: wait, or log in")
        if status == 413:
            return ResourceExhausted(message, "the registry does not take content of this size")
        if status >= 500 or status in RETRIED:
            return Unavailable(message, _RETRY)
        return InvalidArgument(message)


class _Tokens:
    """How the authorizer asks a token server."""

    def __init__(self, transport: Transport, host: Host) -> None:
        self._transport = transport
        self._host = host

    async def __call__(
        self, method: str, url: str, *, query: Sequence[tuple[str, str]], form: Mapping[str, str] | None, authorization: str
    ) -> tuple[int, bytes]:
        transport = self._transport
        target = str(URL(url).extend_query(list(query))) if query else url
        headers = {"Authorization": authorization} if authorization else {}
        body: Body | None = None
        length = None
        if form is not None:
            content = urlencode(form).encode()
            body, length = bytes_body(content), len(content)
            headers["Content-Type"] = "application/x-www-form-urlencoded"
        # The server's certificates are its own affair when it is not the registry itself.
        host = self._host if urlsplit(url).netloc == self._host.address else Host("", urlsplit(url).netloc)
        request = Request(method, target, headers=headers, length=length, body=body)
        for attempt in range(1, transport.limits.attempts + 1):
            last = attempt == transport.limits.attempts
            try:
                response = await transport._redirected(host, target, request, "")
                try:
                    status, answer = response.status, await read_body(response, TOKEN_BODY, "token")
                finally:
                    response.close()
                if status not in RETRIED or last:
                    return status, answer
                why = f"{method} {_shown(target)}: {status}"
            except Unavailable as error:
                if last:
                    raise
                why = str(error)
            await transport.pause_before(attempt, why)
        raise AssertionError  # pragma: no cover - the loop returns


_RETRY = "try again later"
_ASK = "the registry or something before it is misconfigured"
_TRUST = "put the authority's certificate into a certs.d directory of {}"
_INSECURE = "when {} speaks plain HTTP, list it as an insecure registry"


def bytes_body(content: bytes) -> Body:
    """A body that is in memory."""

    async def body() -> AsyncIterator[bytes]:
        yield content

    return body


async def _patient(body: AsyncIterator[bytes], patience: asyncio.Timeout, limits: Limits) -> AsyncIterator[bytes]:
    """The body, while each chunk that the server takes renews the time that is left."""
    loop = asyncio.get_running_loop()
    async for chunk in body:
        patience.reschedule(loop.time() + limits.connect_s + limits.stall_s)
        yield chunk
    patience.reschedule(loop.time() + limits.answer_s)


async def read_body(response: aiohttp.ClientResponse, limit: int, what: str) -> bytes:
    """A small body, whole. Raises ResourceExhausted above `limit` bytes, Unavailable when it does not arrive."""
    url = _shown(str(response.url))
    parts = []
    size = 0
    try:
        async for chunk in response.content.iter_any():
            size += len(chunk)
            if size > limit:
                raise ResourceExhausted(f"{what}: {url} sends more than {limit} bytes")
            parts.append(chunk)
    except TimeoutError:
        raise Unavailable(f"{what}: {url}: the transfer stalled after {size} bytes", _RETRY) from None
    except (aiohttp.ClientError, OSError) as error:
        raise Unavailable(f"{what}: {url}: the connection broke after {size} bytes: {_of(error)}", _RETRY) from None
    return b"".join(parts)


async def read_json(response: aiohttp.ClientResponse, limit: int, what: str) -> object:
    """A JSON body; raises DataLoss when it is something else, as what stands before a registry likes to answer."""
    body = await read_body(response, limit, what)
    try:
        return json.loads(body)
    except ValueError:
        kind = response.headers.get("Content-Type", "nothing").partition(";")[0]
        url = _shown(str(response.url))
        raise DataLoss(f"{what}: {url} answered with {kind} in place of JSON{_snippet(body)}", _PORTAL) from None


_PORTAL = "is this a registry? a proxy or a login page may stand before it"


async def _reason(response: aiohttp.ClientResponse) -> tuple[str, set[str]]:
    """What the server says about an error, in one line, and the codes of distribution-spec in it."""
    try:
        async with asyncio.timeout(5):
            body = await response.content.read(ERROR_BODY)
    except (aiohttp.ClientError, OSError):
        return "", set()
    try:
        errors = json.loads(body)["errors"]
        pairs = [(str(entry.get("code", "")), str(entry.get("message", ""))) for entry in errors if isinstance(entry, dict)]
    except (ValueError, KeyError, TypeError, AttributeError):
        return _snippet(body), set()
    said = "; ".join(": ".join(part for part in pair if part) for pair in pairs)[:500]
    return (f": {_printable(said)}" if said else ""), {code for code, _ in pairs}


def _snippet(body: bytes) -> str:
    text = " ".join(_printable(body[:400].decode("utf-8", "replace")).split())
    return f": {text[:200]!r}" if text else ""


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _proxy(url: str) -> tuple[URL | None, dict[str, str]]:
    """The proxy that the environment has for a URL (http_proxy, https_proxy, no_proxy), none for this machine itself; and what
    it is to be told of who asks.
    """
    parts = urlsplit(url)
    found = getproxies_environment().get(parts.scheme, "")
    if not found or is_loopback(parts.hostname or "") or proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None, {}
    proxy = URL(found if "://" in found else f"http://{found}")
    user = {"Proxy-Authorization": Credentials(proxy.user, proxy.password or "").basic()} if proxy.user else {}
    return proxy.with_user(None), user


def is_url(text: str) -> bool:
    """Whether a request can be sent there; what servers say of other places is not always a URL."""
    try:
        parts = urlsplit(text)
        host = parts.hostname or ""
        if parts.scheme not in ("http", "https") or not host or parts.port == 0 or not URL(text, encoded=True).host:
            return False
        host.encode("ascii" if host.isascii() else "idna")
    except (ValueError, UnicodeError):
        return False
    return ":" in host or all(0 < len(label) < 64 for label in host.rstrip(".").split("."))


def joined(base: str, location: str) -> str:
    """Where `location` leads from `base`; "" when it is no URL of HTTP."""
    try:
        target = urljoin(base, location)
    except ValueError:
        return ""
    return target if is_url(target) else ""


def _shown(url: str) -> str:
    """A URL for people: without the query, which may hold signatures, and without any user."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _origin(url: str) -> str:
    parts = urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)
    return f"{parts.scheme}://{(parts.hostname or '').lower()}:{port}"


def _of(error: BaseException) -> str:
    if isinstance(error, aiohttp.ClientConnectorError) and isinstance(error.os_error, OSError):
        return (error.os_error.strerror or str(error.os_error)).lower()
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return _printable(str(error))[:300] or type(error).__name__


def _certificate(error: BaseException) -> str:
    inner = getattr(error, "certificate_error", error)
    return f"certificate: {getattr(inner, 'verify_message', '') or inner}"
