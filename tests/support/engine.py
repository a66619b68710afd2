"""The engine alone, over a containerd by its socket: `python -m support.engine CONTAINERD ROOT STATE SOCKET`.

What `boxship daemon` does with its parts, without the others; SIGTERM ends it in order.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from aiohttp import web

from boxship.api.containerd.client import connect
from boxship.engine import Settings, app, runner

RUNC = "io.containerd.runc.v2"


async def serve(address: str, root: str, state: str, path: str) -> None:
    """Until SIGTERM."""
    runtimes = {"runc": (RUNC, ""), "crun": (RUNC, "crun")}
    if under_test := os.environ.get("BOXSHIP_ENGINE_RUNTIME"):
        runtimes["under-test"] = (RUNC, under_test)
    end = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end.set)
    async with connect(address) as containerd:
        settings = Settings(runtimes=runtimes, default_runtime="under-test" if under_test else "runc", address=address)
        server = runner(app(containerd, root, state, settings=settings))
        await server.setup()
        if os.path.exists(path):
            os.unlink(path)
        await web.UnixSite(server, path).start()
        print("ready", flush=True)
        await end.wait()
        await server.cleanup()


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:]))
