"""The registry client against a real registry (Debian's docker-registry), with skopeo at the other end of it.

The registry listens on a Unix socket; a relay in this process carries connections to it, and cuts them when a test wants it to.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import os
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import zstandard
from aiohttp import web

from boxship.images import archive, platforms
from boxship.images.auth import ConfigFiles, Credentials, CredentialSource, Given
from boxship.images.hosts import Configuration
from boxship.images.progress import Progress
from boxship.images.pull import Fetcher
from boxship.images.push import Pusher
from boxship.images.registry import Repository, referrers_tag
from boxship.images.store import LocalBlobs
from boxship.images.transport import Limits, Transport
from boxship.kit.errors import InvalidArgument, NotFound, PermissionDenied, Unauthenticated
from boxship.oci import reference
from boxship.oci.image import Descriptor
from support.archives import OCI_LAYER, Layout, digest_of, layer
from support.blobs import MemoryStore
from support.docker_registry import Server
from support.peers import needs

ONE, BIG = layer(etc__one=b"1" * 2000), layer(big=os.urandom(6_000_000))
LIMITS = Limits(connect_s=5, stall_s=5, answer_s=20, attempts=4, backoff_s=0.05, backoff_max_s=0.1)
PASSWORD = "secret word"
HASHED = "$2y$04$KK3IfZnL31qxSGmCjIXA2Or7FvYvrwYiEQXePD58239xzaj2aiIaK"


class Relay:
    """Carries connections of loopback to the registry's socket; `cuts` are bytes of answers after which one is broken."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.cuts: list[int] = []
        self.address = ""
        self.connections = 0

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        there, back = await asyncio.open_unix_connection(str(self.socket))

        async def carry(source: asyncio.StreamReader, target: asyncio.StreamWriter, answers: bool) -> None:
            passed = 0
            try:
                while data := await source.read(65536):
                    passed += len(data)
                    if answers and self.cuts and passed > self.cuts[0]:
                        self.cuts.pop(0)
                        writer.transport.abort()
                        back.transport.abort()
                        return
                    target.write(data)
                    await target.drain()
                target.close()
            except (OSError, asyncio.CancelledError):
                target.close()

        await asyncio.gather(carry(reader, back, False), carry(there, writer, True))

    async def __aenter__(self) -> Relay:
        self._server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()


class Client:
    def __init__(self, relay: Relay, credentials: CredentialSource | None = None, configuration: Configuration | None = None) -> None:
        self.relay = relay
        self.store = MemoryStore()
        self.blobs = LocalBlobs(self.store)
        self.events: list[Progress] = []
        self.transport = Transport(configuration or Configuration(directories=()), credentials, LIMITS)

    def repository(self, name: str) -> Repository:
        return Repository(self.transport, reference.parse(f"{self.relay.address}/{name}"))

    async def pull(self, name: str, platform: str = "linux/amd64") -> Descriptor:
        repository = self.repository(name)
        fetcher = Fetcher(repository, self.blobs, wanted=[platforms.parse(platform)] if platform else [], callback=self.events.append)
        target = await fetcher.resolve(repository.reference.tagged())
        await fetcher.fetch(target)
        return target

    async def push(self, name: str, target: Descriptor, tag: str, chunk: int = 0) -> Descriptor:
        return await Pusher(self.repository(name), self.blobs, callback=self.events.append, chunk=chunk).push(target, [tag])

    async def image(self, *layers: bytes, pack: Callable[[bytes], bytes] = lambda data: data, kind: str = OCI_LAYER) -> Descriptor:
        """An image that is only in the store."""
        layout = Layout()
        layout.name(layout.image(list(layers), pack, kind))
        return (await archive.load(self.blobs, stream(layout.tar()))).manifests[0]


async def stream(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def skopeo(*words: str | Path, check: bool = True) -> str:
    """What skopeo prints; without TLS, and with no configuration of the machine's."""
    process = await asyncio.create_subprocess_exec(
        "skopeo", "--insecure-policy", *map(str, words), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, stdin=asyncio.subprocess.DEVNULL,
    )
    out, err = await process.communicate()
    assert not check or process.returncode == 0, err.decode()
    return out.decode()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    needs("docker-registry", "skopeo")
    server = Server(tmp_path_factory.mktemp("registry"))
    yield server
    server.stop()


@asynccontextmanager
async def meet(server: Server, credentials: CredentialSource | None = None, configuration: Configuration | None = None) -> AsyncIterator[Client]:
    async with asyncio.timeout(60), Relay(server.socket) as relay:
        client = Client(relay, credentials, configuration)
        async with client.transport:
            yield client


def story(server: Server, work: Callable[[Client], Awaitable[None]], **options: object) -> None:
    async def run() -> None:
        async with meet(server, **options) as client:
            await work(client)

    asyncio.run(run())


@pytest.mark.parametrize("form", ["oci", "v2s2"])
def test_what_skopeo_pushes_is_pulled(server: Server, tmp_path: Path, form: str) -> None:
    async def work(client: Client) -> None:
        layout = Layout()
        layout.name(layout.image([ONE, BIG]), "1")
        (tmp_path / "a.tar").write_bytes(layout.tar())
        await skopeo("copy", "--dest-tls-verify=false", "--format", form, f"oci-archive:{tmp_path}/a.tar", f"docker://{client.relay.address}/in/{form}:1")
        target = await client.pull(f"in/{form}:1")
        assert ("docker" in target.media_type) is (form == "v2s2")
        told = json.loads(await skopeo("inspect", "--tls-verify=false", f"docker://{client.relay.address}/in/{form}:1"))
        assert told["Digest"] == target.digest
        manifest = json.loads(client.store.blobs[target.digest])
        contents = [client.store.blobs[each["digest"]] for each in manifest["layers"]]
        assert [gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data for data in contents] == [ONE, BIG]

    story(server, work)


@pytest.mark.parametrize("chunk", [0, 1_000_000])
def test_what_is_pushed_skopeo_reads(server: Server, tmp_path: Path, chunk: int) -> None:
    async def work(client: Client) -> None:
        target = await client.image(ONE, BIG + bytes([chunk % 7]))
        await client.push(f"out/{chunk}", target, "1", chunk)
        await skopeo("copy", "--src-tls-verify=false", f"docker://{client.relay.address}/out/{chunk}:1", f"dir:{tmp_path}/copy")
        assert (tmp_path / "copy/manifest.json").read_bytes() == client.store.blobs[target.digest]
        assert (tmp_path / "copy" / digest_of(ONE)[7:]).read_bytes() == ONE

    story(server, work)


@pytest.mark.parametrize(("pack", "suffix"), [(gzip.compress, "+gzip"), (zstandard.compress, "+zstd")])
def test_compressed_layers_go_there_and_back(server: Server, pack: Callable[[bytes], bytes], suffix: str) -> None:
    async def work(client: Client) -> None:
        target = await client.image(BIG, pack=pack, kind=OCI_LAYER + suffix)
        await client.push("packed/x", target, suffix[1:])
        before = dict(client.store.blobs)
        client.store.blobs.clear()
        assert (await client.pull(f"packed/x:{suffix[1:]}")).digest == target.digest
        assert client.store.blobs.items() <= before.items()

    story(server, work)


def test_blobs_are_mounted_across_repositories(server: Server) -> None:
    async def work(client: Client) -> None:
        target = await client.image(BIG, ONE)
        await client.push("mount/a", target, "1")
        client.events.clear()
        await client.push("mount/b", target, "1")
        mounted = [each for each in client.events if each.event == "mounted"]
        assert {each.detail for each in mounted} == {"mount/a"} and len(mounted) == 3
        client.store.blobs.clear()
        assert (await client.pull("mount/b:1")).digest == target.digest

    story(server, work)


def test_a_pull_over_a_connection_that_keeps_breaking(server: Server) -> None:
    async def work(client: Client) -> None:
        target = await client.image(BIG)
        await client.push("broken/x", target, "1")
        client.store.blobs.clear()
        client.relay.cuts = [1_000_000, 1_500_000, 700_000, 1_200_000, 300_000]
        await client.pull("broken/x:1")
        assert client.store.blobs[digest_of(BIG)] == BIG
        assert not client.relay.cuts
        assert any("trying again" in each.detail for each in client.events)

    story(server, work)


def test_an_index_of_two_platforms(server: Server) -> None:
    async def work(client: Client) -> None:
        layout = Layout()
        both = [layout.image([name.encode()], architecture=name) for name in ("amd64", "arm64")]
        layout.name(layout.index(both))
        target = (await archive.load(client.blobs, stream(layout.tar()))).manifests[0]
        await client.push("both/x", target, "1")
        client.store.blobs.clear()
        await client.pull("both/x:1", "linux/arm64")
        assert digest_of(b"arm64") in client.store.blobs
        assert digest_of(b"amd64") not in client.store.blobs
        told = json.loads(await skopeo("inspect", "--raw", "--tls-verify=false", f"docker://{client.relay.address}/both/x:1"))
        assert [each["platform"]["architecture"] for each in told["manifests"]] == ["amd64", "arm64"]

    story(server, work)


def test_tags_are_listed_and_what_is_not_there_is_said(server: Server) -> None:
    async def work(client: Client) -> None:
        target = await client.image(ONE)
        for tag in ("c", "a", "b"):
            await client.push("tags/x", target, tag)
        assert sorted(await client.repository("tags/x").tags()) == ["a", "b", "c"]
        with pytest.raises(NotFound, match=r"tags/x:nope.*404"):
            await client.pull("tags/x:nope")
        with pytest.raises(NotFound, match="NAME_UNKNOWN"):
            await client.repository("tags/nothing").tags()

    story(server, work)


def test_a_manifest_is_removed(server: Server) -> None:
    async def work(client: Client) -> None:
        target = await client.image(ONE)
        await client.push("remove/x", target, "1")
        repository = client.repository("remove/x")
        await repository.delete_manifest(target.digest)
        with pytest.raises(NotFound):
            await client.pull("remove/x:1")
        with pytest.raises(NotFound):
            await repository.delete_manifest(target.digest)

    story(server, work)


def test_referrers_are_kept_under_a_tag_where_there_is_no_api(server: Server) -> None:
    async def work(client: Client) -> None:
        target = await client.image(ONE)
        await client.push("refer/x", target, "1")
        repository = client.repository("refer/x")
        document = {
            "schemaVersion": 2, "mediaType": target.media_type, "artifactType": "application/x.sbom", "layers": [],
            "config": json.loads(client.store.blobs[target.digest])["config"],
            "subject": {"mediaType": target.media_type, "digest": target.digest, "size": target.size},
        }
        await repository.push_manifest(json.dumps(document).encode(), target.media_type, [])
        [found] = await repository.referrers(target.digest)
        assert found.artifact_type == "application/x.sbom"
        assert referrers_tag(target.digest) in await repository.tags()

    story(server, work)


# Who may do what.


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A registry with one user."""
    needs("docker-registry", "skopeo")
    directory = tmp_path_factory.mktemp("guarded")
    (directory / "htpasswd").write_text(f"me:{HASHED}\n")
    server = Server(directory, more=f"auth:\n  htpasswd: {{realm: here, path: {directory}/htpasswd}}\n")
    yield server
    server.stop()


def test_a_user_and_his_password(guarded: Server) -> None:
    async def run() -> None:
        async with meet(guarded) as client:
            with pytest.raises(Unauthenticated, match="log in"):
                await client.push("a/b", await client.image(ONE), "1")
        async with meet(guarded) as client:
            client.transport._credentials = Given(client.relay.address, Credentials("me", "wrong"))
            with pytest.raises(Unauthenticated):
                await client.push("a/b", await client.image(ONE), "1")
        async with meet(guarded) as client:
            client.transport._credentials = Given(client.relay.address, Credentials("me", PASSWORD))
            target = await client.image(ONE)
            await client.push("a/b", target, "1")
            client.store.blobs.clear()
            assert (await client.pull("a/b:1")).digest == target.digest

    asyncio.run(run())


def test_what_skopeo_login_wrote_is_used(guarded: Server, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        path = tmp_path / "auth.json"
        await skopeo("login", "--tls-verify=false", "--authfile", path, "--username", "me", "--password", PASSWORD, client.relay.address)
        client.transport._credentials = ConfigFiles([str(path)])
        await client.push("a/c", await client.image(ONE), "1")

    story(guarded, work)


class TokenServer:
    """An authority for a registry with `auth: token`: everybody may pull `public/…`, the user may do everything."""

    def __init__(self, directory: Path) -> None:
        self.key, self.certificate = directory / "key.pem", directory / "cert.pem"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", self.key, "-out", self.certificate, "-subj", "/CN=tokens", "-days", "2"],
            check=True, capture_output=True,
        )
        self.socket = directory / "tokens.sock"
        self.asked: list[str] = []

    def token(self, scopes: list[str], user: str) -> str:
        access = []
        for scope in scopes:
            kind, name, actions = scope.split(":")
            allowed = [each for each in actions.split(",") if user or (each == "pull" and name.startswith("public/"))]
            access.append({"type": kind, "name": name, "actions": allowed})
        certificate = "".join(line for line in self.certificate.read_text().splitlines() if "-----" not in line)
        now = int(time.time())
        claims = {"iss": "tokens", "sub": user, "aud": "here", "exp": now + 60, "nbf": now - 10, "iat": now, "jti": str(now), "access": access}
        parts = ".".join(encode(json.dumps(part).encode()) for part in ({"typ": "JWT", "alg": "RS256", "x5c": [certificate]}, claims))
        signature = subprocess.run(["openssl", "dgst", "-sha256", "-sign", self.key], input=parts.encode(), capture_output=True, check=True).stdout
        return f"{parts}.{encode(signature)}"

    async def serve(self, request: web.Request) -> web.Response:
        scopes = request.query.getall("scope", [])
        self.asked.append(" ".join(scopes))
        given = request.headers.get("Authorization", "")
        if given and given != Credentials("me", PASSWORD).basic():
            return web.json_response({"details": "wrong password"}, status=401)
        return web.json_response({"token": self.token(scopes, "me" if given else ""), "expires_in": 60})


def encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def test_tokens(tmp_path: Path) -> None:
    needs("docker-registry", "openssl")
    tokens = TokenServer(tmp_path)

    async def run() -> None:
        app = web.Application()
        app.router.add_get("/token", tokens.serve)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        realm = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/token"
        server = Server(
            tmp_path, more=f"auth:\n  token: {{realm: '{realm}', service: here, issuer: tokens, rootcertbundle: {tokens.certificate}}}\n"
        )
        try:
            async with meet(server) as client:
                target = await client.image(ONE)
                with pytest.raises((Unauthenticated, PermissionDenied)):
                    await client.push("public/x", target, "1")
                client.transport._credentials = Given(client.relay.address, Credentials("me", "wrong"))
                client.transport._authorizers.clear()
                with pytest.raises(PermissionDenied, match="wrong password"):
                    await client.push("public/x", target, "1")
                client.transport._credentials = Given(client.relay.address, Credentials("me", PASSWORD))
                client.transport._authorizers.clear()
                await client.push("public/x", target, "1")
                await client.push("private/y", target, "1")
                assert any("repository:public/x:pull" in scope and "private/y" in scope for scope in tokens.asked)
            async with meet(server) as client:
                assert (await client.pull("public/x:1")).digest == target.digest
                with pytest.raises((Unauthenticated, PermissionDenied)):
                    await client.pull("private/y:1")
        finally:
            server.stop()
            await runner.cleanup()

    asyncio.run(run())


def test_certificates_are_checked_where_the_configuration_says_so(tmp_path: Path) -> None:
    needs("docker-registry", "openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-subj", "/CN=registry", "-days", "2",
         "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True,
    )
    server = Server(tmp_path, http=f"  tls: {{certificate: {certificate}, key: {key}}}\n")

    async def run() -> None:
        async with meet(server) as client:
            # This machine's own loopback is believed without.
            target = await client.image(ONE)
            await client.push("a/b", target, "1")
        async with meet(server) as client:
            folder = tmp_path / "certs.d" / client.relay.address
            folder.mkdir(parents=True)
            (folder / "hosts.toml").write_text(f'server = "https://{client.relay.address}"\n')
            client.transport.configuration = Configuration(directories=[str(tmp_path / "certs.d")])
            with pytest.raises(InvalidArgument, match=r"certificate.*certs\.d"):
                await client.pull("a/b:1")
            (folder / "hosts.toml").write_text(f'server = "https://{client.relay.address}"\nca = "{certificate}"\n')
            assert (await client.pull("a/b:1")).digest == target.digest

    try:
        asyncio.run(run())
    finally:
        server.stop()
