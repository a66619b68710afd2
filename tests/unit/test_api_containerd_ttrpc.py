"""ttRPC on the event loop: what the protocol asks of a server, and what calls make of a peer that is slow, wrong or gone."""

import asyncio
import os
import struct
import uuid

import pytest

from boxship.api.containerd import pb, ttrpc
from boxship.api.containerd.call import Call
from boxship.api.containerd.server import as_error
from boxship.api.containerd.services import Containerd
from boxship.api.task import pb as shim_pb
from boxship.kit import errors

try:
    from uvloop import new_event_loop as LOOP
except ImportError:
    LOOP = asyncio.new_event_loop
SERVICE = "containerd.services.images.v1.Images"


class Images:
    def __init__(self):
        self.hold = asyncio.Event()

    async def Get(self, request, call):
        if request.name == "wait":
            await self.hold.wait()
        if request.name == "none":
            raise errors.NotFound("no such image")
        return pb.images.GetImageResponse(image=pb.images.Image(name=f"{call.namespace}/{request.name}"))


class Snapshots:
    async def List(self, request, call):
        for number in range(3):
            yield pb.snapshots.ListSnapshotsResponse(info=[pb.snapshots.Info(name=str(number))])
        if request.snapshotter:
            raise errors.Aborted("enough")


class Content:
    async def Write(self, requests, call):
        async for request in requests:
            yield pb.content.WriteContentResponse(offset=len(request.data))


def run(inside):
    async def whole():
        services = Containerd({"images": Images(), "snapshots": Snapshots(), "content": Content()})
        server = ttrpc.Server(services, ["images", "snapshots", "content"], as_error)
        path = f"/tmp/bt-{uuid.uuid4().hex[:8]}.sock"
        await server.listen(path)
        try:
            return await asyncio.wait_for(inside(path, services), 20)
        finally:
            await server.stop()
            os.unlink(path)

    with asyncio.Runner(loop_factory=LOOP) as runner:
        return runner.run(whole())


def get(connection, name, **more):
    return connection.call(SERVICE, "Get", pb.images.GetImageRequest(name=name), pb.images.GetImageResponse, Call("ns", **more))


def test_calls_are_answered_in_any_order():
    async def inside(path, services):
        connection = await ttrpc.dial(f"unix://{path}")
        slow = asyncio.ensure_future(get(connection, "wait"))
        quick = await get(connection, "a")
        assert not slow.done()
        services.images.hold.set()
        return quick.image.name, (await slow).image.name

    assert run(inside) == ("ns/a", "ns/wait")


def test_errors_limits_and_what_is_unknown():
    async def inside(path, services):
        connection = await ttrpc.dial(path)
        with pytest.raises(errors.NotFound, match="no such image"):
            await get(connection, "none")
        with pytest.raises(errors.DeadlineExceeded):
            await get(connection, "wait", timeout=0.05)
        with pytest.raises(errors.Unsupported, match=r"service a\.B"):
            await connection.call("a.B", "Get", pb.images.GetImageRequest(), pb.images.GetImageResponse)
        with pytest.raises(errors.Unsupported, match="method Nothing"):
            await connection.call(SERVICE, "Nothing", pb.images.GetImageRequest(), pb.images.GetImageResponse)
        with pytest.raises(errors.ResourceExhausted):
            await get(connection, "x" * (5 << 20))
        return (await get(connection, "still")).image.name

    assert run(inside) == "ns/still"


def test_a_lost_connection_fails_what_waits_and_is_told():
    async def inside(path, services):
        lost = asyncio.Event()
        connection = await ttrpc.dial(path, lost.set)
        waiting = asyncio.ensure_future(get(connection, "wait"))
        await asyncio.sleep(0.05)
        connection.transport.abort()
        with pytest.raises(errors.Unavailable, match="ttrpc: closed"):
            await waiting
        await lost.wait()
        with pytest.raises(errors.Unavailable):
            await get(connection, "a")
        with pytest.raises(errors.Unavailable, match="dial unix"):
            await ttrpc.dial(path + "x")

    run(inside)


class Raw:
    """A peer by hand."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    def send(self, stream, kind, flags, payload=b""):
        self.writer.write(struct.pack(">IIBB", len(payload), stream, kind, flags) + payload)

    async def receive(self):
        length, stream, kind, flags = struct.unpack(">IIBB", await self.reader.readexactly(10))
        return stream, kind, flags, await self.reader.readexactly(length)

    async def code(self):
        stream, kind, _, payload = await self.receive()
        assert kind == 2
        return stream, shim_pb.ttrpc.Response.FromString(payload).status.code


def request(service, method, message):
    return shim_pb.ttrpc.Request(service=service, method=method, payload=message.SerializeToString()).SerializeToString()


def test_stream_numbers_that_may_not_be_and_frames_that_are_too_long():
    async def inside(path, services):
        raw = Raw(*await asyncio.open_unix_connection(path))
        good = request(SERVICE, "Get", pb.images.GetImageRequest(name="a"))
        seen = []
        for stream in (3, 2, 3, 1):
            raw.send(stream, 1, 0, good)
            seen.append(await raw.code())
        raw.writer.write(struct.pack(">IIBB", (4 << 20) + 1, 5, 1, 0) + bytes((4 << 20) + 1))
        seen.append(await raw.code())
        raw.send(7, 1, 0, b"\xff\xff")
        seen.append(await raw.code())
        raw.send(9, 1, 0, good)
        seen.append(await raw.code())
        raw.send(11, 3, 0, b"")
        seen.append(await raw.code())
        return seen

    assert run(inside) == [(3, 0), (2, 3), (3, 3), (1, 3), (5, 8), (7, 3), (9, 0), (11, 3)]


def test_streams_in_one_direction_and_in_both():
    async def inside(path, services):
        raw = Raw(*await asyncio.open_unix_connection(path))
        raw.send(1, 1, 1, request("containerd.services.snapshots.v1.Snapshots", "List", pb.snapshots.ListSnapshotsRequest()))
        frames = [await raw.receive() for _ in range(4)]
        assert [(f[0], f[1], f[2]) for f in frames] == [(1, 3, 0)] * 3 + [(1, 3, 5)]
        bad = pb.snapshots.ListSnapshotsRequest(snapshotter="x")
        raw.send(3, 1, 1, request("containerd.services.snapshots.v1.Snapshots", "List", bad))
        for _ in range(3):
            await raw.receive()
        assert await raw.code() == (3, 10)
        raw.send(5, 1, 2, request("containerd.services.content.v1.Content", "Write", pb.content.WriteContentRequest()))
        for size in (1, 2):  # the first right behind the request
            raw.send(5, 3, 0, pb.content.WriteContentRequest(data=bytes(size)).SerializeToString())
            _, kind, _, payload = await raw.receive()
            assert (kind, pb.content.WriteContentResponse.FromString(payload).offset) == (3, size)
        raw.send(5, 3, 5)
        assert (await raw.receive())[1:3] == (3, 5)
        raw.send(5, 3, 0, b"")
        assert await raw.code() == (5, 3)

    run(inside)
