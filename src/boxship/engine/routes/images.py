"""/images, /commit and /distribution.

Runs in: the daemon, on its event loop.
Spec: Docker Engine API v1.51, Image.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web

from boxship.engine import shapes
from boxship.engine.events import parse_filters
from boxship.engine.http import VERSION, Routes, Stream, answer, body_of, flag, progress
from boxship.engine.images import familiar
from boxship.engine.transfers import changed
from boxship.kit.errors import BoxshipError, InvalidArgument, Unsupported
from boxship.oci import reference

routes = Routes()

_LIST = frozenset(("before", "dangling", "label", "label!", "reference", "since", "until"))


@routes.get("/images/json")
async def list_images(engine: Any, request: web.Request) -> web.StreamResponse:
    core = engine.core
    filters = parse_filters(request.query.get("filters", ""), _LIST)
    if request.query.get("filter"):
        filters.setdefault("reference", []).append(request.query["filter"])
    rows = await core.images.listed(filters, core.image_users())
    for row in rows:
        if request[VERSION] < (1, 44):
            row["VirtualSize"] = row["Size"]
        if request[VERSION] < (1, 43) and not row["RepoTags"]:
            row["RepoTags"], row["RepoDigests"] = ["<none>:<none>"], row["RepoDigests"] or ["<none>@<none>"]
    return answer(rows)


@routes.post("/images/create")
async def create_image(engine: Any, request: web.Request) -> web.StreamResponse:
    query = request.query
    header = request.headers.get("X-Registry-Auth", "")
    if source := query.get("fromSrc", ""):
        name = ""
        if repository := query.get("repo", ""):
            tag = query.get("tag", "")
            name = str(reference.parse(f"{repository}:{tag}" if tag else repository).tagged())
        if source != "-":
            raise Unsupported("import from a URL", "download it, and pipe it into `docker import -`")
        return await progress(request, engine.transfers.import_(
            request.content.iter_chunked(1 << 20), name, query.get("message", ""), query.getall("changes", []),
            query.get("platform", "")))
    name = query.get("fromImage", "")
    if not name:
        raise InvalidArgument("invalid reference format")
    return await progress(request, engine.transfers.pull(name, query.get("tag", ""), header, query.get("platform", "")))


@routes.get("/images/search")
async def search(engine: Any, request: web.Request) -> web.StreamResponse:
    raise Unsupported("registries have no search", "their web sites have")


@routes.post("/images/load")
async def load(engine: Any, request: web.Request) -> web.StreamResponse:
    return await progress(request, engine.transfers.load(
        request.content.iter_chunked(1 << 20), quiet=flag(request, "quiet"), platform_text=request.query.get("platform", "")),
        at_once=True)


async def _save(engine: Any, request: web.Request, names: list[str]) -> web.StreamResponse:
    stream = Stream(request, "application/x-tar")
    pieces: AsyncIterator[bytes] = engine.transfers.save(names, request.query.get("platform", ""))
    async for piece in pieces:
        await stream.send(piece)
    return await stream.end()


@routes.get("/images/get")
async def save(engine: Any, request: web.Request) -> web.StreamResponse:
    names = [name for text in request.query.getall("names", []) for name in text.split(",") if name]
    if not names:
        raise InvalidArgument("no image names given")
    return await _save(engine, request, names)


@routes.post("/images/prune")
async def prune(engine: Any, request: web.Request) -> web.StreamResponse:
    filters = parse_filters(request.query.get("filters", ""), frozenset(("dangling", "label", "label!", "until")))
    deleted, space = await engine.prune_images(filters)
    return answer({"ImagesDeleted": deleted or None, "SpaceReclaimed": space})


@routes.get("/images/{name}/get")
async def save_one(engine: Any, request: web.Request, name: str) -> web.StreamResponse:
    return await _save(engine, request, [name])


@routes.get("/images/{name}/json")
async def inspect(engine: Any, request: web.Request, name: str) -> web.StreamResponse:
    shown = await engine.core.images.inspect(name, legacy=request[VERSION] < (1, 50))
    if request[VERSION] < (1, 44):
        shown["VirtualSize"] = shown["Size"]
    return answer(shown)


@routes.get("/images/{name}/history")
async def history(engine: Any, request: web.Request, name: str) -> web.StreamResponse:
    return answer(await engine.core.images.history(name))


@routes.post("/images/{name}/push")
async def push(engine: Any, request: web.Request, name: str) -> web.StreamResponse:
    await request.read()
    header = request.headers.get("X-Registry-Auth", "")
    return await progress(request,
        engine.transfers.push(name, request.query.get("tag", ""), header, request.query.get("platform", "")))


@routes.post("/images/{name}/tag")
async def tag(engine: Any, request: web.Request, name: str) -> web.StreamResponse:
    core = engine.core
    repository, wanted = request.query.get("repo", ""), request.query.get("tag", "")
    image = await core.images.get(name)
    parsed = reference.parse(f"{repository}:{wanted}" if wanted else repository)
    if parsed.digest:
        raise InvalidArgument("refusing to create a tag with a digest reference")
    if parsed.familiar_name() == "sha256":
        raise InvalidArgument('refusing to create an ambiguous tag using digest algorithm as name')
    await core.images.tag(image, str(parsed.tagged()))
    await core.images.drop_dangling(image.target)
    core.announce_image("tag", image, familiar(str(parsed.tagged())))
    return web.Response(status=201)


@routes.delete("/images/{name}")
async def delete(engine: Any, request: web.Request, name: str) -> web.StreamResponse:
    core = engine.core
    image = await core.images.get(name)
    removed = await core.images.delete(name, force=flag(request, "force"), users=list(core.containers()))
    for step in removed:
        kind = "untag" if "Untagged" in step else "delete"
        if kind == "untag" or step["Deleted"] == image.id:
            core.announce_image(kind, image)
    return answer(removed)


@routes.post("/commit")
async def commit(engine: Any, request: web.Request) -> web.StreamResponse:
    query = request.query
    container = engine.core.get(query.get("container", ""))
    body = await body_of(request, optional=True)
    given = shapes.shape(body or {}, shapes.CONTAINER_CONFIG, "Config")
    present = {key.lower() for key in body} if isinstance(body, dict) else set()
    base = container.config
    keep = ("User", "ExposedPorts", "Env", "Entrypoint", "Cmd", "Volumes", "WorkingDir", "Labels", "StopSignal", "Healthcheck",
        "Shell")
    config = {key: given[key] if key.lower() in present and given[key] else base[key] for key in keep}
    config = changed({key: value for key, value in config.items() if value}, query.getall("changes", []))
    pauses = flag(request, "pause", default=True) and container.state.running and not container.state.paused
    if pauses:
        try:
            await engine.life.pause(container)
        except BoxshipError:
            pauses = False  # it ended just now: nothing changes any more
    try:
        image_id = await engine.transfers.commit(
            container, query.get("repo", ""), query.get("tag", ""), query.get("comment", ""), query.get("author", ""), config)
    finally:
        if pauses and container.state.paused:
            await engine.life.unpause(container)
    return answer({"Id": image_id}, 201)


@routes.get("/distribution/{name}/json")
async def distribution(engine: Any, request: web.Request, name: str) -> web.StreamResponse:
    return answer(await engine.transfers.distribution(name, request.headers.get("X-Registry-Auth", "")))
