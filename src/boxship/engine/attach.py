"""A client at a process's streams: what attach and exec have in common.

Runs in: the daemon, on its event loop.
Spec: Docker Engine API, "Attach to a container"; dockerd's rules for the end of stdin and for the detach keys.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from boxship.engine.hijack import Connection, Detacher, frame
from boxship.engine.stdio import STDERR, STDOUT, Streams, Subscriber


def chosen(*, stdout: bool, stderr: bool) -> frozenset[int]:
    """The streams that a client wants to read."""
    return frozenset([*([STDOUT] if stdout else []), *([STDERR] if stderr else [])])


async def until_one_ends(*work: Coroutine[Any, Any, None]) -> None:
    """Run all side by side until the first is over; the others are cancelled, and waited for."""
    running = [asyncio.ensure_future(each) for each in work]
    try:
        await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in running:
            each.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def serve(
    connection: Connection, streams: Streams, subscriber: Subscriber, *, stdin: bool, multiplexed: bool, detach: bytes,
    close_stdin: Callable[[], Awaitable[None]] | None,
) -> bool:
    """Pass bytes until the process ends, the client goes, or it types the detach keys (True).

    `close_stdin` is called at the end of the client's input; None: that ends the client's session instead.
    """
    detached = False

    async def output() -> None:
        piece = await subscriber.get()
        await connection.settled()
        while piece is not None:
            stream, data = piece
            connection.write(frame(stream, data) if multiplexed else data)
            await connection.drain()
            piece = await subscriber.get()

    async def input_() -> None:
        nonlocal detached
        await streams.started.wait()
        detacher = Detacher(detach if streams.terminal else b"")
        while data := await connection.read():
            data, detached = detacher.feed(data)
            if data:
                await streams.write_stdin(data)
            if detached:
                return
        if close_stdin is not None and not connection.lost.is_set():
            await close_stdin()
            await asyncio.Event().wait()  # what the process still writes is wanted; the output's end ends the session

    async def watch() -> None:
        if stdin:
            await connection.lost.wait()
            return
        while await connection.read():
            continue  # nothing of it is for the process
        await connection.lost.wait()

    try:
        await until_one_ends(output(), watch(), *([input_()] if stdin else []))
    finally:
        streams.unsubscribe(subscriber)
    return detached
