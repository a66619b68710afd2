"""A registry that speaks no good HTTP, or none at all: every answer ends as one of our errors, soon, with nothing left behind."""

from __future__ import annotations

import asyncio
import os
import random

import pytest

from boxship.images.hosts import Configuration
from boxship.images.pull import Fetcher
from boxship.images.push import Pusher
from boxship.images.registry import Repository
from boxship.images.store import LocalBlobs
from boxship.images.transport import Limits, Transport
from boxship.kit.errors import BoxshipError
from boxship.oci import reference
from boxship.oci.image import Descriptor
from support.blobs import MemoryStore
from support.registry import Registry, digest_of

LIMITS = Limits(connect_s=1, stall_s=0.5, answer_s=1, attempts=2, backoff_s=0.01, backoff_max_s=0.01)

ANSWERS = {
    "nothing": b"",
    "noise": os.urandom(3000),
    "no status": b"hello\r\n\r\n",
    "bad status": b"HTTP/1.1 abc OK\r\n\r\n",
    "status 0": b"HTTP/1.1 0 OK\r\n\r\n",
    "status 999": b"HTTP/1.1 999 Odd\r\nContent-Length: 0\r\n\r\n",
    "old": b"HTTP/0.9 200 OK\r\n\r\nbody",
    "header without colon": b"HTTP/1.1 200 OK\r\nnonsense\r\n\r\n",
    "header with NUL": b"HTTP/1.1 200 OK\r\nX-A: a\0b\r\nContent-Length: 0\r\n\r\n",
    "endless header": b"HTTP/1.1 200 OK\r\nX-A: " + b"a" * 200_000 + b"\r\n\r\n",
    "endless headers": b"HTTP/1.1 200 OK\r\n" + b"".join(b"X-%d: a\r\n" % number for number in range(50_000)) + b"\r\n",
    "length that is none": b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
    "negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "bad chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n",
    "unended chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel",
    "huge chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nhello",
    "switching": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    "continue for ever": b"HTTP/1.1 100 Continue\r\n\r\n" * 100,
    "to nowhere": b"HTTP/1.1 302 Found\r\nLocation: \r\nContent-Length: 0\r\n\r\n",
    "to noise": b"HTTP/1.1 302 Found\r\nLocation: http://[::1\r\nContent-Length: 0\r\n\r\n",
    "to a bad port": b"HTTP/1.1 302 Found\r\nLocation: http://a:99999/\r\nContent-Length: 0\r\n\r\n",
    "to a bad host": b"HTTP/1.1 302 Found\r\nLocation: http://a..b\x7f/\r\nContent-Length: 0\r\n\r\n",
    "to a long host": b"HTTP/1.1 302 Found\r\nLocation: http://" + b"a" * 300 + b"/\r\nContent-Length: 0\r\n\r\n",
    "odd challenge": b'HTTP/1.1 401 No\r\nWWW-Authenticate: Bearer realm="http://[::1",service="x\r\nContent-Length: 0\r\n\r\n',
    "challenge with a bad port": b'HTTP/1.1 401 No\r\nWWW-Authenticate: Bearer realm="http://a:99999/t"\r\nContent-Length: 0\r\n\r\n',
    "bytes in a challenge": b'HTTP/1.1 401 No\r\nWWW-Authenticate: Bearer realm="\xff\xfe"\r\nContent-Length: 0\r\n\r\n',
    "odd retry": b"HTTP/1.1 429 No\r\nRetry-After: 99999999999999999999\r\nContent-Length: 0\r\n\r\n",
    "retry at no date": b"HTTP/1.1 429 No\r\nRetry-After: Mon, 99 Foo 99999 99:99:99 GMT\r\nContent-Length: 0\r\n\r\n",
    "odd digest": b"HTTP/1.1 200 OK\r\nContent-Type: application/vnd.oci.image.manifest.v1+json\r\nDocker-Content-Digest: x:../../y\r\nContent-Length: 2\r\n\r\n{}",
    "deep JSON": b"HTTP/1.1 200 OK\r\nContent-Length: 200000\r\n\r\n" + b"[" * 200_000,
    "JSON of bytes": b"HTTP/1.1 404 No\r\nContent-Length: 4\r\n\r\n\xff\xfe\xfd\xfc",
    "errors that are none": b'HTTP/1.1 403 No\r\nContent-Length: 24\r\n\r\n{"errors":{"code":[1,2]}}',
    "packed": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 5\r\n\r\nhello",
    "cookies": b"HTTP/1.1 200 OK\r\nSet-Cookie: a=b; Domain=.com\r\nContent-Length: 0\r\n\r\n",
}


class Garbage:
    """Answers every connection with the same bytes, and closes it."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.address = ""

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(self.answer)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        finally:
            writer.close()

    async def __aenter__(self) -> Garbage:
        self._server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()


async def pull(address: str, store: MemoryStore) -> None:
    async with Transport(Configuration(directories=(), plain_http=True), limits=LIMITS) as transport:
        repository = Repository(transport, reference.parse(f"{address}/lib/app:1"))
        fetcher = Fetcher(repository, LocalBlobs(store), wanted=[])
        await fetcher.fetch(await fetcher.resolve(repository.reference))


async def push(address: str, store: MemoryStore, target: Descriptor) -> None:
    async with Transport(Configuration(directories=(), plain_http=True), limits=LIMITS) as transport:
        await Pusher(Repository(transport, reference.parse(f"{address}/lib/app:1")), LocalBlobs(store)).push(target, ["1"])


def image(store: MemoryStore) -> Descriptor:
    config = store.add(b'{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}')
    data = (
        '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","layers":[],'
        f'"config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{config}","size":{len(store.blobs[config])}}}}}'
    ).encode()
    return Descriptor(media_type="application/vnd.oci.image.manifest.v1+json", digest=store.add(data), size=len(data))


@pytest.mark.parametrize("name", ANSWERS)
def test_no_good_answer(name: str) -> None:
    async def run() -> None:
        async with asyncio.timeout(20), Garbage(ANSWERS[name]) as server:
            store = MemoryStore()
            with pytest.raises(BoxshipError) as caught:
                await pull(server.address, store)
            assert "lib/app" in str(caught.value) or server.address in str(caught.value)
            assert all(letter.isprintable() for letter in str(caught.value)), "terminals are not to be played with"
            assert not store.ingests and not store.blobs and not store.busy
            try:
                # Who answers everything by "200 OK" has it all, as far as anybody can tell.
                await push(server.address, store, image(store))
            except BoxshipError as error:
                assert all(letter.isprintable() for letter in str(error))

    asyncio.run(run())


def test_an_unreliable_registry_in_the_end_gives_what_is_right_or_an_error() -> None:
    layers = tuple(os.urandom(size) for size in (300_000, 100_000, 5_000))
    chance = random.Random(7)

    async def run() -> None:
        outcomes = {True: 0, False: 0}
        async with asyncio.timeout(60), Registry() as registry:
            registry.add_image("lib/app", "1", layers)

            async def chaos(request):  # type: ignore[no-untyped-def]
                if chance.random() < 0.7:
                    return
                data = chance.choice(list(ANSWERS.values()))
                if chance.random() < 0.5:
                    data = b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n" + chance.choice(layers)[: chance.randrange(300_000)]
                request.transport.write(data)
                request.transport.close()
                await asyncio.sleep(0.01)

            registry.hooks.append(chaos)
            for _ in range(40):
                store = MemoryStore()
                try:
                    await pull(registry.address, store)
                    outcomes[True] += 1
                    assert all(digest_of(layer) in store.blobs for layer in layers)
                except BoxshipError:
                    outcomes[False] += 1
                assert all(digest_of(data) == digest for digest, data in store.blobs.items())
                assert not store.ingests and not store.busy
        assert outcomes[True] and outcomes[False], outcomes

    asyncio.run(run())


