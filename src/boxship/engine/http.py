"""The HTTP side of the engine: versions, routing, errors, parameters, streamed answers.

Runs in: the daemon, on its event loop.
Spec: Docker Engine API v1.24 to v1.51: every path with and without `/v1.NN`, errors as {"message": …}.

Own routing instead of aiohttp's: names in the middle of a path may have slashes, and each path exists with a version in front.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from aiohttp import web

import boxship
from boxship.engine import shapes
from boxship.engine.errors import status_of
from boxship.engine.hijack import HEADERS
from boxship.kit.errors import BoxshipError, InvalidArgument, NotFound, from_os_error

API_MAX, API_MIN = (1, 51), (1, 24)
API_VERSION, API_MIN_VERSION = "1.51", "1.24"
BODY_MAX = 16 << 20
SERVER = f"Docker/{boxship.__version__} (linux)"

Handler = Callable[..., Awaitable[web.StreamResponse]]

_VERSION = re.compile(r"/v(\d+)\.(\d+)(?=/)")
VERSION: Any = web.RequestKey("version", tuple) if hasattr(web, "RequestKey") else "version"
"""In a request: the version of the API that the client speaks, as (major, minor)."""

_DATA_JSON = "application/json"


class Routes:
    """A table of endpoints: `@routes.get("/containers/{name}/json")`; `{name}` may have slashes in it."""

    def __init__(self) -> None:
        self._table: dict[tuple[str, str], list[tuple[re.Pattern[str], Handler]]] = {}
        self._paths: list[re.Pattern[str]] = []

    def add(self, method: str, path: str) -> Callable[[Handler], Handler]:
        """Register a handler (engine, request, **parameters)."""
        pattern = re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>.+)", path) + r"\Z")
        first = path.split("/")[1]

        def register(handler: Handler) -> Handler:
            self._table.setdefault((method, first), []).append((pattern, handler))
            self._paths.append(pattern)
            return handler

        return register

    def get(self, path: str) -> Callable[[Handler], Handler]:
        """GET."""
        return self.add("GET", path)

    def post(self, path: str) -> Callable[[Handler], Handler]:
        """POST."""
        return self.add("POST", path)

    def delete(self, path: str) -> Callable[[Handler], Handler]:
        """DELETE."""
        return self.add("DELETE", path)

    def find(self, method: str, path: str) -> tuple[Handler, dict[str, str]]:
        """The handler and its parameters. Raises NotFound, web.HTTPMethodNotAllowed's status through InvalidArgument never."""
        for pattern, handler in self._table.get((method, path.split("/", 2)[1]), ()):
            if found := pattern.match(path):
                return handler, found.groupdict()
        raise NotFound("page not found")

    def extend(self, other: Routes) -> None:
        """Take in another table."""
        for key, entries in other._table.items():
            self._table.setdefault(key, []).extend(entries)
        self._paths += other._paths


def version_of(path: str) -> tuple[tuple[int, int], str]:
    """(version asked for, path without it). Raises InvalidArgument for one that is not spoken here."""
    found = _VERSION.match(path)
    if not found:
        return API_MAX, path
    version = (int(found[1]), int(found[2]))
    shown = f"{version[0]}.{version[1]}"
    if version < API_MIN:
        raise InvalidArgument(
            f"client version {shown} is too old. Minimum supported API version is {API_MIN_VERSION}, please upgrade your client"
            " to a newer version")
    if version > API_MAX:
        raise InvalidArgument(f"client version {shown} is too new. Maximum supported API version is {API_VERSION}")
    return version, path[found.end() :]


def headers() -> dict[str, str]:
    """What every answer has."""
    return {"Api-Version": API_VERSION, "Docker-Experimental": "false", "Ostype": "linux", "Server": SERVER}


def dispatcher(engine: Any, routes: Routes) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """aiohttp's one handler."""

    async def dispatch(request: web.Request) -> web.StreamResponse:
        request[HEADERS] = common = headers()
        try:
            path = request.path
            version, path = version_of(path)
            request[VERSION] = version
            if request.method == "OPTIONS":
                return web.Response(headers=common)
            handler, parameters = routes.find(request.method, path)
            response = await handler(engine, request, **parameters)
        except BoxshipError as error:
            return failure(error, common)
        except web.HTTPException as error:  # aiohttp's own: a body that is too large, a web socket that is none
            return web.Response(
                status=error.status, body=encoded({"message": error.text or error.reason}), content_type=_DATA_JSON,
                headers=common)
        except ConnectionResetError:
            raise asyncio.CancelledError from None
        except OSError as error:
            return failure(from_os_error(error, f"{request.method} {path}"), common)
        if not response.prepared:
            response.headers.update(common)
        return response

    return dispatch


def failure(error: BoxshipError, extra: dict[str, str]) -> web.Response:
    """An error as an answer."""
    status = status_of(error)
    if status == 304:
        return web.Response(status=304, headers=extra)
    return web.Response(
        status=status, body=encoded({"message": str(error)}), content_type=_DATA_JSON, headers=extra)


_FOR_HTML = str.maketrans({letter: f"\\u{ord(letter):04x}" for letter in "<>&\u2028\u2029"})


def encoded(value: Any, *, html: bool = False) -> bytes:
    """A line of JSON in the very bytes that Go's encoder writes: nothing between the tokens, text as UTF-8.

    With `html` as its default has it: <, > and & are written as numbers (they are in strings only).
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return (text.translate(_FOR_HTML) if html else text).encode("utf-8", "replace") + b"\n"


def answer(value: Any, status: int = 200) -> web.Response:
    """JSON."""
    return web.Response(status=status, body=encoded(value), content_type=_DATA_JSON)


def nothing(status: int = 204) -> web.Response:
    """No body."""
    return web.Response(status=status)


async def body_of(request: web.Request, *, optional: bool = False) -> Any:
    """The request's JSON body. Raises InvalidArgument."""
    data = await request.read()
    if not data.strip():
        if optional:
            return {}
        raise InvalidArgument("invalid JSON: got EOF while reading request body")
    kind = request.headers.get("Content-Type", "")
    if kind and kind.split(";")[0].strip().lower() != _DATA_JSON:
        raise InvalidArgument(f"unsupported Content-Type header ({kind}): must be 'application/json'")
    return shapes.parse(data)


def flag(request: web.Request, name: str, *, default: bool = False) -> bool:
    """A parameter as Docker reads booleans: absent, empty, 0, no, false and none are false."""
    value = request.query.get(name)
    if value is None:
        return default
    return value.strip().lower() not in ("", "0", "no", "false", "none")


def number(request: web.Request, name: str, default: int | None = None) -> int | None:
    """A parameter as a number. Raises InvalidArgument."""
    value = request.query.get(name, "")
    if value == "":
        return default
    try:
        return int(value)
    except ValueError:
        raise InvalidArgument(f'strconv.Atoi: parsing "{value}": invalid syntax') from None


class Stream:
    """A body that is sent piece by piece. The first `send` (or `begin`) sends the head."""

    def __init__(self, request: web.Request, content_type: str, status: int = 200) -> None:
        self._request = request
        self.response = web.StreamResponse(status=status, headers={**request[HEADERS], "Content-Type": content_type})

    async def begin(self) -> None:
        """Send the head."""
        if not self.response.prepared:
            await self.response.prepare(self._request)

    async def send(self, data: bytes) -> None:
        """Send a piece. Raises ConnectionResetError when the client is gone."""
        await self.begin()
        await self.response.write(data)

    async def end(self) -> web.StreamResponse:
        """The end."""
        await self.begin()
        await self.response.write_eof()
        return self.response


async def progress(request: web.Request, steps: AsyncIterator[dict[str, Any]], *, at_once: bool = False) -> web.StreamResponse:
    """A stream of JSON objects. What fails before the first is an HTTP error, later (or with `at_once`) it is an object."""
    stream = Stream(request, _DATA_JSON)
    if at_once:
        await stream.begin()
    try:
        async for step in steps:
            await stream.send(encoded(step)[:-1] + b"\r\n")
    except BoxshipError as error:
        if not stream.response.prepared:
            raise
        text = {"errorDetail": {"message": str(error)}, "error": str(error)}
        await stream.send(encoded(text)[:-1] + b"\r\n")
    return await stream.end()
