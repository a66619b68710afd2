"""Building: /build, /build/prune, and what `boxship build` has beside them.

Runs in: the daemon, on its event loop.
Spec: Docker Engine API v1.51, ImageBuild, BuildPrune.
Beyond it: the parameters `contexts` (JSON, named contexts), `cacheto`, `nocachefilter`, `secrets` (a token), `steptimeout` and
`pidslimit`; GET /build/files?image=ID, the files of an image as a tar; POST /build/secrets, by which secrets get here without
being written anywhere.
"""

from __future__ import annotations

import base64
import time
from typing import Any

from aiohttp import web

from boxship.build.solve import Request
from boxship.build.transfer import reference_of
from boxship.engine import builds, times
from boxship.engine.events import parse_filters
from boxship.engine.http import Routes, Stream, answer, body_of, flag, number, progress
from boxship.engine.transfers import platform
from boxship.kit.errors import InvalidArgument, Unsupported

routes = Routes()


@routes.post("/build")
async def build(engine: Any, request: web.Request) -> web.StreamResponse:
    query = request.query
    if query.get("version") == "2" or query.get("remote") == "client-session":
        raise Unsupported(
            "BuildKit's session protocol is not there", "set DOCKER_BUILDKIT=0: the classic way builds the same files")
    if flag(request, "squash"):
        raise Unsupported("squash is not there", "use a stage of its own and COPY --from")
    args = builds.arguments(query.get("buildargs", ""))
    chosen = platform(query.get("platform", ""))
    given, agents = engine.builds.take_over(query["secrets"]) if query.get("secrets") else ({}, {})
    hosts = [entry for text in query.getall("extrahosts", []) for entry in text.split(",") if entry]
    wanted = Request(
        target=query.get("target", ""), args=args,
        labels={name: str(value) for name, value in builds.json_object(query.get("labels", ""), "labels").items()},
        platform=chosen[0] if chosen else None, no_cache=flag(request, "nocache"),
        no_cache_stages=frozenset(filter(None, query.get("nocachefilter", "").split(","))), pull=flag(request, "pull"),
        network=query.get("networkmode") or "default", hosts=tuple(hosts), limits=builds.limits(query),
        epoch=builds.epoch(args), secrets=given, agents=agents)
    wish = builds.Wish(
        request=wanted, dockerfile=query.get("dockerfile") or "Dockerfile", tags=tuple(filter(None, query.getall("t", []))),
        remote=query.get("remote", ""), quiet=flag(request, "q"),
        contexts={name: str(value) for name, value in builds.json_object(query.get("contexts", ""), "contexts").items()},
        cache_from=tuple(map(reference_of, builds.json_list(query.get("cachefrom", ""), "cachefrom"))),
        cache_to=tuple(map(reference_of, builds.json_list(query.get("cacheto", ""), "cacheto"))),
        registries=builds.registries(request.headers.get("X-Registry-Config", "")))
    return await progress(request, engine.builds.build(wish, request.content.iter_chunked(1 << 20)))


@routes.post("/build/secrets")
async def hand_over(engine: Any, request: web.Request) -> web.StreamResponse:
    body = await body_of(request)
    values: dict[str, bytes] = {}
    try:
        for name, value in (body.get("Secrets") or {}).items():
            values[str(name)] = base64.b64decode(value, validate=True)
        agents = {str(name): str(value) for name, value in (body.get("Agents") or {}).items()}
    except (AttributeError, TypeError, ValueError):
        raise InvalidArgument("secrets: expected an object of base64 texts") from None
    return answer({"Id": engine.builds.hand_over(values, agents)}, 201)


@routes.get("/build/files")
async def files(engine: Any, request: web.Request) -> web.StreamResponse:
    stream = Stream(request, "application/x-tar")
    async for piece in engine.builds.files(request.query.get("image", "")):
        await stream.send(piece)
    return await stream.end()


@routes.post("/build/prune")
async def prune(engine: Any, request: web.Request) -> web.StreamResponse:
    filters = parse_filters(request.query.get("filters", ""), frozenset((
        "until", "unused-for", "id", "parent", "type", "description", "inuse", "shared", "private")))
    limit = time.time_ns()
    for text in [*filters.get("until", []), *filters.get("unused-for", [])]:
        limit = min(limit, times.moment(text))
    keep = number(request, "keep-storage", 0) or number(request, "reserved-space", 0) or 0
    deleted, space = await engine.builds.prune(until=limit, keep_bytes=keep)
    engine.core.events.publish("builder", "prune", "", {"reclaimed": str(space)})
    return answer({"CachesDeleted": deleted or None, "SpaceReclaimed": space})
