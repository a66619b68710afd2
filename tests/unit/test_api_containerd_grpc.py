"""Services of this process over a Unix socket: the client's methods are the services' own, errors and headers included."""

import asyncio
import os
import stat

import pytest

from boxship.api.containerd import pb
from boxship.api.containerd.call import Call, check_identifier
from boxship.api.containerd.client import connect
from boxship.api.containerd.server import Server, code_name
from boxship.api.containerd.services import Containerd
from boxship.kit import errors


class Images:
    def __init__(self):
        self.seen = None
        self.closed = asyncio.Event()

    async def Get(self, request, call):
        self.seen = (call.namespace, call.lease)
        if request.name == "none":
            raise errors.NotFound('image "none": not found')
        if request.name == "bug":
            raise ZeroDivisionError("division by zero")
        return pb.images.GetImageResponse(image=pb.images.Image(name=request.name))


class Snapshots:
    def __init__(self):
        self.closed = asyncio.Event()

    async def List(self, request, call):
        try:
            for number in range(3):
                yield pb.snapshots.ListSnapshotsResponse(info=[pb.snapshots.Info(name=str(number))])
            if request.snapshotter == "endless":
                await asyncio.Event().wait()
            if request.snapshotter == "bad":
                raise errors.OutOfRange("past the end")
        finally:
            self.closed.set()


class Content:
    async def Write(self, requests, call):
        async for request in requests:
            yield pb.content.WriteContentResponse(offset=len(request.data))


def serve(tmp_path, inside, **services):
    async def run():
        made = {name: make() for name, make in services.items()}
        server = Server(Containerd(made))
        path = str(tmp_path / "c.sock")
        server.listen(path)
        await server.start()
        try:
            async with connect(path) as client:
                return await inside(client, made, path)
        finally:
            await server.stop(0)

    return asyncio.run(run())


def test_a_call_carries_namespace_and_lease(tmp_path):
    async def inside(client, made, path):
        answer = await client.images.Get(pb.images.GetImageRequest(name="x"), Call("ns", "lease1"))
        return answer.image.name, made["images"].seen

    assert serve(tmp_path, inside, images=Images) == ("x", ("ns", "lease1"))


def test_the_socket_is_open_to_its_owner_and_group_alone(tmp_path):
    async def inside(client, made, path):
        return stat.S_IMODE(os.stat(path).st_mode)

    assert serve(tmp_path, inside, images=Images) == 0o660


@pytest.mark.parametrize(("name", "kind", "text"), [
    ("none", errors.NotFound, 'image "none": not found'), ("bug", errors.BoxshipError, "ZeroDivisionError: division by zero"),
])
def test_errors_arrive_as_the_class_that_was_raised(tmp_path, name, kind, text):
    async def inside(client, made, path):
        with pytest.raises(errors.BoxshipError) as caught:
            await client.images.Get(pb.images.GetImageRequest(name=name))
        return type(caught.value), str(caught.value)

    assert serve(tmp_path, inside, images=Images) == (kind, text)


def test_what_is_missing_is_not_implemented(tmp_path):
    async def inside(client, made, path):
        texts = []
        for ask in (client.images.List(pb.images.ListImagesRequest()), client.leases.List(pb.leases.ListRequest())):
            with pytest.raises(errors.Unsupported) as caught:
                await ask
            texts.append(str(caught.value))
        return texts

    assert serve(tmp_path, inside, images=Images) == [
        "unknown method List for service containerd.services.images.v1.Images",
        "unknown service containerd.services.leases.v1.Leases",
    ]


def test_a_stream_ends_or_fails_or_is_left(tmp_path):
    async def inside(client, made, path):
        request = pb.snapshots.ListSnapshotsRequest
        whole = [m.info[0].name async for m in client.snapshots.List(request())]
        with pytest.raises(errors.OutOfRange, match="past the end"):
            async for _ in client.snapshots.List(request(snapshotter="bad")):
                pass
        made["snapshots"].closed.clear()
        endless = client.snapshots.List(request(snapshotter="endless"))
        await anext(endless)
        await endless.aclose()
        await asyncio.wait_for(made["snapshots"].closed.wait(), 5)
        return whole

    assert serve(tmp_path, inside, snapshots=Snapshots) == ["0", "1", "2"]


def test_both_sides_stream_messages_of_the_largest_size(tmp_path):
    async def inside(client, made, path):
        async def requests():
            for size in (1, 15 << 20):
                yield pb.content.WriteContentRequest(data=bytes(size))

        return [answer.offset async for answer in client.content.Write(requests())]

    assert serve(tmp_path, inside, content=Content) == [1, 15 << 20]


def test_health_tells_of_the_services_there_are(tmp_path):
    async def inside(client, made, path):
        request = pb.health.HealthCheckRequest
        states = [(await client.health.Check(request(service=s))).status for s in ("", "containerd.services.images.v1.Images")]
        with pytest.raises(errors.NotFound):
            await client.health.Check(request(service="nothing"))
        return states

    assert serve(tmp_path, inside, images=Images) == [1, 1]


def test_every_error_class_has_a_code_of_its_own():
    kinds = errors.BoxshipError.__subclasses__()
    kinds = [kind for kind in kinds if kind.__module__ == "boxship.kit.errors"]
    assert sorted(kind.code for kind in kinds) == [1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
    for kind in kinds:
        assert type(errors.from_code(kind.code, "x")) is kind
    assert code_name(5) == "NotFound"
    assert code_name(0) == "OK"


@pytest.mark.parametrize("name", ["", "a" * 77, "-a", "a..b", "a/b", "a\n"])
def test_identifiers_that_cannot_be(name):
    with pytest.raises(errors.InvalidArgument):
        check_identifier(name)
