"""Files of containers: archive, export, changes.

Runs in: the daemon, on its event loop; the files are read and written in worker threads.
Spec: Docker Engine API v1.51, Container.
"""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import Callable
from typing import Any

from aiohttp import web

from boxship.engine import archive
from boxship.engine.http import Routes, Stream, answer, flag
from boxship.kit.errors import BoxshipError, InvalidArgument
from boxship.linux.roots import Root

routes = Routes()

_WINDOW = 4


def _path(request: web.Request) -> str:
    path = request.query.get("path", "")
    if not path:
        raise InvalidArgument("bad parameter: path cannot be empty")
    return path


async def produced(work: Callable[[Callable[[bytes], None]], None], send: Callable[[bytes], Any]) -> None:
    """Run `work(put)` in a thread and send what it puts, without gathering it. A client that is gone ends the work."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[bytes | None] = asyncio.Queue(_WINDOW)
    gone = False

    def put(data: bytes) -> None:
        if gone:
            raise BrokenPipeError("the client is gone")
        asyncio.run_coroutine_threadsafe(queue.put(data), loop).result()

    def run() -> None:
        try:
            work(put)
        finally:
            if not gone:
                asyncio.run_coroutine_threadsafe(queue.put(None), loop).result()

    task = loop.run_in_executor(None, run)
    try:
        while (piece := await queue.get()) is not None:
            await send(piece)
    finally:
        # The thread uses what the caller is about to close: it is waited for, and let out of the queue.
        gone = True
        while not task.done():
            while not queue.empty():
                queue.get_nowait()
            await asyncio.wait([task], timeout=0.05)
    await task


async def _stat(spot: archive.Place, path: str) -> str:
    return await asyncio.get_running_loop().run_in_executor(None, archive.stat_header, spot, path)


@routes.add("HEAD", "/containers/{name}/archive")
async def stat_path(engine: Any, request: web.Request, name: str) -> web.StreamResponse:
    path = _path(request)
    with await archive.place(engine.core, engine.core.get(name), path) as spot:
        return web.Response(headers={"X-Docker-Container-Path-Stat": await _stat(spot, path)})


@routes.get("/containers/{name}/archive")
async def get_archive(engine: Any, request: web.Request, name: str) -> web.StreamResponse:
    path = _path(request)
    stream = Stream(request, "application/x-tar")
    container = engine.core.get(name)
    with await archive.place(engine.core, container, path) as spot:
        engine.core.announce(container, "archive-path")
        stream.response.headers["X-Docker-Container-Path-Stat"] = await _stat(spot, path)
        base = os.path.basename(archive.clean(path)) or os.path.basename(spot.path.rstrip("/")) or "."
        await produced(lambda put: archive.write_tar(spot, put, base=base), stream.send)
    return await stream.end()


@routes.get("/containers/{name}/export")
async def export(engine: Any, request: web.Request, name: str) -> web.StreamResponse:
    container = engine.core.get(name)
    mounts = await engine.core.snapshots.mounts(container.id)
    stream = Stream(request, "application/x-tar")

    def work(put: Callable[[bytes], None]) -> None:
        with archive.Place(Root(mounts, read_only=True), "/", read_only=True) as spot:
            archive.write_tar(spot, put, base="")

    await produced(work, stream.send)
    engine.core.announce(container, "export")
    return await stream.end()


@routes.get("/containers/{name}/changes")
async def changes(engine: Any, request: web.Request, name: str) -> web.StreamResponse:
    container = engine.core.get(name)
    mounts = await engine.core.snapshots.mounts(container.id)
    found = await asyncio.get_running_loop().run_in_executor(None, archive.changes, mounts)
    return answer(found or None)


class BodyFile(io.RawIOBase):
    """The request's body as a file for a worker thread."""

    def __init__(self, request: web.Request) -> None:
        self._content = request.content
        self._loop = asyncio.get_running_loop()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = asyncio.run_coroutine_threadsafe(self._content.read(len(buffer)), self._loop).result()
        buffer[: len(data)] = data
        return len(data)


@routes.add("PUT", "/containers/{name}/archive")
async def put_archive(engine: Any, request: web.Request, name: str) -> web.StreamResponse:
    path = _path(request)
    container = engine.core.get(name)
    owner = None
    if flag(request, "copyUIDGID") and container.config["User"]:
        user = await engine.accounts.find(container, container.config["User"])
        owner = (user.uid, user.gid)
    body = io.BufferedReader(BodyFile(request), 1 << 20)
    with await archive.place(engine.core, container, path, writing=True) as spot:

        def work() -> None:
            archive.extract(spot, body, no_overwrite_kind=flag(request, "noOverwriteDirNonDir"), owner=owner)

        # A client that goes away ends the body, and the thread with it; the root is needed until then.
        task = asyncio.get_running_loop().run_in_executor(None, work)
        try:
            await asyncio.shield(task)
        except BoxshipError:
            # The client is still sending: an answer before the end of the body would be lost with the connection.
            async for _ in request.content.iter_chunked(1 << 20):
                continue
            raise
        except asyncio.CancelledError:
            await asyncio.wait([task])
            raise
    engine.core.announce(container, "extract-to-dir")
    return web.Response(status=200)
