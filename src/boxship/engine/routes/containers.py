"""/containers and /exec.

Runs in: the daemon, on its event loop.
Spec: Docker Engine API v1.51, Container and Exec.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from aiohttp import WSMsgType, web

from boxship.engine import create, hijack, logs, networking, shapes, show, stats, validate
from boxship.engine.attach import chosen, serve, until_one_ends
from boxship.engine.events import parse_filters
from boxship.engine.http import VERSION, Routes, Stream, answer, body_of, encoded, flag, nothing, number
from boxship.engine.top import top
from boxship.kit.errors import BoxshipError, FailedPrecondition, InvalidArgument, Unsupported

routes = Routes()

_DETACH_KEYS = "ctrl-p,ctrl-q"


async def whole(work: Any) -> Any:
    """Carry on although the client goes away in the middle."""
    return await asyncio.shield(asyncio.ensure_future(work))


def _detach(text: str) -> bytes:
    try:
        return hijack.detach_keys(text or _DETACH_KEYS)
    except ValueError as error:
        raise InvalidArgument(f"Invalid escape keys ({text}) provided: {error}") from None


# one and many


@routes.get("/containers/json")
@routes.get("/containers/ps")
async def list_containers(engine: Any, request: web.Request) -> web.StreamResponse:
    filters = parse_filters(request.query.get("filters", ""), show.LIST_FILTERS)
    limit = number(request, "limit", 0) or 0
    return answer(await show.listed(
        engine.core, filters, everything=flag(request, "all"), limit=limit, with_size=flag(request, "size")))


@routes.post("/containers/create")
async def create_container(engine: Any, request: web.Request) -> web.StreamResponse:
    body = await body_of(request)
    container, warnings = await whole(create.create(
        engine.core, body, request.query.get("name", ""), request.query.get("platform", "")))
    return answer({"Id": container.id, "Warnings": warnings}, 201)


@routes.post("/containers/prune")
async def prune_containers(engine: Any, request: web.Request) -> web.StreamResponse:
    filters = parse_filters(request.query.get("filters", ""), frozenset(("until", "label", "label!")))
    deleted, space = await whole(engine.prune_containers(filters))
    return answer({"ContainersDeleted": deleted or None, "SpaceReclaimed": space})


@routes.get("/containers/{name}/json")
async def inspect_container(engine: Any, request: web.Request, name: str) -> web.StreamResponse:
    container = engine.core.get(name)
    shown = show.inspect(engine.core, container, request[VERSION])
    if flag(request, "size"):
        shown |= await show.sizes(engine.core, container)
    return answer(shown)


@routes.delete("/containers/{name}")
async def remove_container(engine: Any, request: web.Request, name: str) -> web.StreamResponse:
    if flag(request, "link"):
        networking.unlink(engine.core, name)
        return nothing()
    container = engine.core.get(name)
    await whole(engine.life.remove(container, force=flag(request, "force"), with_volumes=flag(request, "v")))
    return nothing()


# its life


@routes.post("/containers/{name}/start")
async def start_container(engine: Any, request: web.Request, name: str) -> web.StreamResponse:
    if request.query.get("checkpoint"):
        raise Unsupported("checkpoints")
    await whole(engine.life.start(engine.core.get(name)))
    return nothing()


@routes.post("/containers/{name}/stop")
async def stop_container(engine: Any, request: web.Request, name: str) -> web.StreamResponse:
    await whole(engine.life.stop(engine.core.get(name), number(request, "t"), request.query.get("signal", "")))
    return nothing()


@routes.post("/containers/{name}/restart")
async def restart_container(engine: Any, request: web.Request, name: str) -> web.StreamResponse:
    await whole(engine.life.restart(engine.core.get(name), number(request, "t"), request.query.get("signal", "")))
    return nothing()


@routes.post("/containers/{name}/kill")
async def kill_container(engine: Any, request: web.Request, name: str) -> web.StreamResponse:
    await whole(engine.life.kill(engine.core.get(name), request.query.get("signal", "")))
    return nothing()


@routes.post("/containers/{name}/pause")
async def pause_container(engine: Any, request: web.Request, name: str) -> web.StreamResponse:
    await whole(engine.life.pause(engine.core.get(name)))
    return nothing()


@routes.post("/containers/{name}/unpause")
async def unpause_container(engine: Any, request: web.Request, name: str) -> web.StreamResponse:
    await whole(engine.life.unpause(engine.core.get(name)))
    return nothing()


@routes.post("/containers/{name}/rename")
async def rename_container(engine: Any, request: web.Request, name: str) -> web.StreamResponse:
    wanted = request.query.get("name", "")
    if not wanted:
        raise InvalidArgument("Neither old nor new names may be empty")
    container = engine.core.get(name)
    former = container.name
    try:
        wanted = validate.name(wanted)
        if wanted == former:
            raise InvalidArgument("Renaming a container with the same name as its current name")
        engine.core.rename(container, wanted)
    except (InvalidArgument, FailedPrecondition) as error:
        if wanted == former:
            raise
        raise type(error)(f"Error when allocating new name: {error}") from None
    engine.core.announce(container, "rename", oldName=f"/{former}")
    return nothing()


@routes.post("/containers/{name}/update")
async def update_container(engine: Any, request: web.Request, name: str) -> web.StreamResponse:
    body = await body_of(request)
    container = engine.core.get(name)
    given = {key.lower() for key in body} if isinstance(body, dict) else set()
    values = {key: value for key, value in shapes.shape(body, shapes.RESOURCES, "UpdateConfig").items()
              if key.lower() in given and value not in (None, 0, "", [])}
    policy = shapes.member(body, "RestartPolicy")
    if policy and shapes.member(policy, "Name"):
        values["RestartPolicy"] = shapes.shape(policy, shapes.RESTART_POLICY, "RestartPolicy")
        validate.restart_policy(values["RestartPolicy"], auto_remove=container.host["AutoRemove"])
    if "MemorySwap" not in values and 0 < container.host["MemorySwap"] < values.get("Memory", 0):
        raise InvalidArgument(
            "Memory limit should be smaller than already set memoryswap limit, update the memoryswap at the same time")
    await whole(engine.life.update(container, values))
    return answer({"Warnings": None})


@routes.post("/containers/{name}/wait")
async def wait_container(engine: Any, request: web.Request, name: str) -> web.StreamResponse:
    condition = request.query.get("condition", "") or "not-running"
    if condition not in ("not-running", "next-exit", "removed"):
        raise InvalidArgument(f'invalid condition: "{condition}"')
    container = engine.core.get(name)
    stream = Stream(request, "application/json")
    if condition == "removed":
        future = container.wait_for(container.removed)
    elif condition == "next-exit" or container.state.running:
        future = container.wait_for(container.next_exit)
    else:
        future = None
    if request[VERSION] >= (1, 30):
        await stream.begin()
    if future is not None:
        await future
    result: dict[str, Any] = {"StatusCode": container.state.exit_code}
    if container.state.error and condition != "removed":  # why a start failed is told to who asked for the start
        result["Error"] = {"Message": container.state.error}
    await stream.send(encoded(result))
    return await stream.end()


# what it says and what it is told


@routes.post("/containers/{name}/attach")
async def attach_container(engine: Any, request: web.Request, name: str) -> web.StreamResponse:
    container = engine.core.get(name)
    state = container.state
    if state.paused:
        raise FailedPrecondition(f"container {name} is paused, unpause the container before attach")
    if state.restarting:
        raise FailedPrecondition(f"container {name} is restarting, wait until the container is running")
    detach = _detach(request.query.get("detachKeys", ""))
    wanted = chosen(stdout=flag(request, "stdout"), stderr=flag(request, "stderr"))
    stdin = flag(request, "stdin") and container.config["OpenStdin"]
    await request.read()
    multiplexed = not container.config["Tty"]
    # An exited container's streams are those of its next run: `docker start -a` attaches first.
    streams = engine.life.streams(container)
    streaming = flag(request, "stream")
    subscriber = streams.subscribe(wanted) if streaming else None
    connection = hijack.hijack(request, hijack.MULTIPLEXED if multiplexed and request[VERSION] >= (1, 42) else hijack.RAW)
    engine.core.announce(container, "attach")
    if flag(request, "logs") and container.log_path:
        await connection.settled()
        async for entries in logs.read(container.log_path, logs.Wanted(wanted), container.log):
            connection.write(logs.render(entries, multiplexed=multiplexed, timestamps=False, details=False))
            await connection.drain()
    if subscriber is not None:

        async def end_stdin() -> None:
            streams.close_stdin()
            await engine.close_stdin(container)

        once = container.config["StdinOnce"] and not container.config["Tty"]
        detached = await serve(
            connection, streams, subscriber, stdin=stdin, multiplexed=multiplexed, detach=detach,
            close_stdin=end_stdin if once else None)
        if detached:
            engine.core.announce(container, "detach")
    connection.close()
    return hijack.Done()


@routes.get("/containers/{name}/attach/ws")
async def attach_websocket(engine: Any, request: web.Request, name: str) -> web.StreamResponse:
    container = engine.core.get(name)
    streams = engine.life.streams(container)
    wanted = chosen(stdout=flag(request, "stdout"), stderr=flag(request, "stderr"))
    subscriber = streams.subscribe(wanted)
    socket = web.WebSocketResponse(max_msg_size=1 << 20)
    await socket.prepare(request)
    engine.core.announce(container, "attach")

    async def output() -> None:
        if flag(request, "logs") and container.log_path:
            async for entries in logs.read(container.log_path, logs.Wanted(wanted), container.log):
                await socket.send_bytes(logs.render(entries, multiplexed=False, timestamps=False, details=False))
        while flag(request, "stream") and (piece := await subscriber.get()) is not None:
            await socket.send_bytes(piece[1])

    async def input_() -> None:
        async for message in socket:
            if flag(request, "stdin") and message.type in (WSMsgType.BINARY, WSMsgType.TEXT):
                await streams.started.wait()
                await streams.write_stdin(message.data if isinstance(message.data, bytes) else message.data.encode())

    try:
        await until_one_ends(output(), input_())
    finally:
        streams.unsubscribe(subscriber)
    await socket.close()
    return socket


@routes.get("/containers/{name}/logs")
async def container_logs(engine: Any, request: web.Request, name: str) -> web.StreamResponse:
    container = engine.core.get(name)
    wanted = chosen(stdout=flag(request, "stdout"), stderr=flag(request, "stderr"))
    if not wanted:
        raise InvalidArgument("Bad parameters: you must choose at least one stream")
    if not container.log_path:
        raise Unsupported("configured logging driver does not support reading")
    ask = logs.wanted(request.query, wanted, follow=flag(request, "follow"))
    multiplexed = not container.config["Tty"]
    new = request[VERSION] >= (1, 42)
    stream = Stream(request, hijack.MULTIPLEXED if multiplexed and new else hijack.RAW)
    await stream.begin()
    async for entries in logs.read(container.log_path, ask, container.log):
        await stream.send(logs.render(
            entries, multiplexed=multiplexed, timestamps=flag(request, "timestamps"), details=flag(request, "details")))
    return await stream.end()


@routes.post("/containers/{name}/resize")
async def resize_container(engine: Any, request: web.Request, name: str) -> web.StreamResponse:
    height, width = _size(request)
    await engine.life.resize(engine.core.get(name), width, height)
    return nothing(200)


def _size(request: web.Request) -> tuple[int, int]:
    found = []
    for key in ("h", "w"):
        text = request.query.get(key, "")
        if not text.isdecimal() or int(text) >= 1 << 32:
            raise InvalidArgument(f"invalid resize {'height' if key == 'h' else 'width'} \"{text}\": invalid syntax")
        found.append(int(text))
    return found[0], found[1]


# what it does


@routes.get("/containers/{name}/top")
async def top_container(engine: Any, request: web.Request, name: str) -> web.StreamResponse:
    container = engine.core.get(name)
    found = await top(engine.core, container, request.query.get("ps_args", ""))
    engine.core.announce(container, "top")
    return answer(found)


@routes.get("/containers/{name}/stats")
async def container_stats(engine: Any, request: web.Request, name: str) -> web.StreamResponse:
    container = engine.core.get(name)
    streaming = flag(request, "stream", default=True)
    once = flag(request, "one-shot")
    if streaming and once:
        raise InvalidArgument("cannot have stream=true and one-shot=true")
    stream = Stream(request, "application/json")
    former = stats.EMPTY
    if not streaming and not once:
        former = await stats.sample(engine.core, container)
        await asyncio.sleep(1)
    while True:
        began = time.monotonic()
        present = await stats.sample(engine.core, container)
        await stream.send(encoded(stats.shown(container, present, former)))
        if not streaming or container.id not in engine.core.by_id:
            return await stream.end()
        former = present
        await asyncio.sleep(max(0.05, 1 - (time.monotonic() - began)))


@routes.get("/containers/{name}/checkpoints")
@routes.post("/containers/{name}/checkpoints")
@routes.delete("/containers/{name}/checkpoints/{checkpoint}")
async def checkpoints(engine: Any, request: web.Request, name: str, checkpoint: str = "") -> web.StreamResponse:
    engine.core.get(name)
    raise Unsupported("checkpoints", "ctr tasks checkpoint, on containerd's socket, makes them")


# exec


@routes.post("/containers/{name}/exec")
async def create_exec(engine: Any, request: web.Request, name: str) -> web.StreamResponse:
    config = shapes.shape(await body_of(request), shapes.EXEC_CONFIG, "ExecConfig")
    made = engine.execs.create(engine.core.get(name), config, _detach(config["DetachKeys"]))
    return answer({"Id": made.id}, 201)


@routes.post("/exec/{exec_id}/start")
async def start_exec(engine: Any, request: web.Request, exec_id: str) -> web.StreamResponse:
    options = shapes.shape(await body_of(request, optional=True), shapes.EXEC_START, "ExecStartConfig")
    found = engine.execs.get(exec_id)
    if options["Detach"]:
        await whole(engine.execs.start(found, options["ConsoleSize"]))
        return nothing(200)
    if found.started:
        raise FailedPrecondition(f"exec command {found.id} has already run" if found.exit_code is not None else
                                 f"exec command {found.id} is already running")
    if found.container.state.paused or not found.container.state.running:
        raise FailedPrecondition(f"container {found.container.id} is not running")
    config = found.config
    new = request[VERSION] >= (1, 42)
    subscriber = found.streams.subscribe(chosen(stdout=config["AttachStdout"], stderr=config["AttachStderr"]))
    # The request to start says how the client reads the stream, not the one that made the exec.
    multiplexed = not options["Tty"]
    connection = hijack.hijack(request, hijack.MULTIPLEXED if multiplexed and new else hijack.RAW)
    try:
        await whole(engine.execs.start(found, options["ConsoleSize"]))
    except BoxshipError as error:
        text = f"{error}\r\n".encode()
        await connection.settled()
        connection.write(text if not multiplexed else hijack.frame(2 if config["AttachStderr"] else 1, text))
    else:
        await engine.execs.attach(found, connection, subscriber, multiplexed=multiplexed)
    connection.close()
    return hijack.Done()


@routes.post("/exec/{exec_id}/resize")
async def resize_exec(engine: Any, request: web.Request, exec_id: str) -> web.StreamResponse:
    height, width = _size(request)
    await engine.execs.resize(engine.execs.get(exec_id), width, height)
    return nothing(200)


@routes.get("/exec/{exec_id}/json")
async def inspect_exec(engine: Any, request: web.Request, exec_id: str) -> web.StreamResponse:
    return answer(engine.execs.get(exec_id).shown())
