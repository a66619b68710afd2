"""Clients that send too much, too little or nonsense, that read slowly, come in great number, or go away in the middle."""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.image import NAME, write_archive
from support.peers import needs
from support.stage import Stage, open_stage


@dataclass
class Engine:
    """`boxship daemon` on a stage, and the docker CLI against it."""

    stage: Stage
    socket: str
    pid: int

    def docker(self, *words: str) -> str:
        return self.stage.out("docker", "--host", f"unix://{self.socket}", *words)

    def connect(self) -> socket.socket:
        made = socket.socket(socket.AF_UNIX)
        made.settimeout(20)
        made.connect(self.socket)
        return made

    def ask(self, text: str, body: bytes = b"") -> tuple[int, str]:
        """Status and body of a request that is written as it is; the connection ends with it."""
        with self.connect() as made:
            made.sendall(text.replace("\n", "\r\n").encode() + body)
            data = b""
            while piece := made.recv(65536):
                data += piece
        head, _, rest = data.partition(b"\r\n\r\n")
        return int(head.split()[1]), rest.decode()

    def memory(self) -> int:
        """Bytes of private memory."""
        text = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        return sum(int(found) for found in re.findall(r"Private_\w+: +(\d+) kB", text)) * 1024

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    needs("ip", "docker")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    stage = open_stage()
    try:
        folder = stage.directory / "e"
        folder.mkdir()
        process = stage.start(
            Path(sys.executable).with_name("boxship"), "daemon", "--root", folder / "root", "--state", folder, log=folder / "log")
        path = f"{folder}/docker.sock"
        stage.eventually(lambda: stage.run("docker", "--host", f"unix://{path}", "version", check=False).returncode == 0, timeout=40)
        daemon = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
        made = Engine(stage, path, daemon)
        archive = tmp_path_factory.mktemp("image") / "image.tar"
        write_archive(archive)
        made.docker("load", "--input", str(archive))
        yield made
        text = (folder / "log").read_text()
        assert "Traceback" not in text, text[-3000:]
    finally:
        stage.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


POST = "POST /containers/create HTTP/1.0\nHost: d\nContent-Type: application/json\nContent-Length: {}\n\n"


@pytest.mark.parametrize(("body", "words"), [
    (b"{", "invalid JSON: unexpected EOF"),
    (b"[" * 100_000, "invalid JSON"),
    (b"{} {}", "unexpected content after JSON"),
    (b"\xff\xfe{", "invalid JSON"),
    (b'{"Image": 3}', "cannot unmarshal number into Go struct field Config.Image of type string"),
    (b'{"Image": "x", "HostConfig": {"Memory": 1e400}}', "cannot unmarshal number"),
    (b'{"Image": "x", "HostConfig": {"Memory": 9223372036854775808}}', "cannot unmarshal number"),
    (b'{"Image": "x", "HostConfig": {"Binds": {}}}', "cannot unmarshal object"),
    (b'"text"', "config cannot be empty"),
    (b"null", "config cannot be empty"),
], ids=["cut", "deep", "two", "no-text", "number-for-text", "infinite", "too-large", "object-for-list", "text", "null"])
def test_nonsense_is_a_bad_request_that_says_what_is_wrong(engine: Engine, body: bytes, words: str) -> None:
    status, text = engine.ask(POST.format(len(body)), body)
    assert status == 400
    assert words in json.loads(text)["message"]


def test_what_is_unknown_in_a_body_is_passed_over(engine: Engine) -> None:
    body = json.dumps({"Image": NAME, "Nonsense": {"a": [1]}, "HostConfig": {"NetworkMode": "none", "Future": True}}).encode()
    status, text = engine.ask(POST.format(len(body)), body)
    assert status == 201
    engine.docker("rm", json.loads(text)["Id"])


def test_a_gigabyte_of_body_is_refused_and_not_kept(engine: Engine) -> None:
    before = engine.memory()
    with engine.connect() as made:
        made.sendall(POST.format(1 << 30).replace("\n", "\r\n").encode())
        try:
            for _ in range(1024):
                made.sendall(b" " * (1 << 20))
        except (BrokenPipeError, ConnectionResetError):
            pass  # that is an answer
        try:
            data = made.recv(65536)
        except ConnectionResetError:
            data = b""
    assert not data or data.split()[1] in (b"413", b"400")
    assert engine.memory() - before < 100 << 20
    assert engine.ask("GET /_ping HTTP/1.0\nHost: d\n\n") == (200, "OK")


def test_those_who_never_finish_their_request_hold_up_nobody(engine: Engine) -> None:
    before = engine.descriptors()
    slow = [engine.connect() for _ in range(100)]
    for index, each in enumerate(slow):
        each.sendall((b"GET /info HT", b"POST /containers/create HTTP/1.1\r\nHost: d\r\nContent-Length: 100\r\n\r\n{", b"")[index % 3])
    assert engine.ask("GET /_ping HTTP/1.0\nHost: d\n\n") == (200, "OK")
    for each in slow:
        each.close()
    engine.stage.eventually(lambda: engine.descriptors() <= before + 2)


def test_who_vanishes_in_the_middle_leaves_nothing_behind(engine: Engine) -> None:
    container = engine.docker("run", "--detach", "--network=none", "--interactive", NAME, "sh", "-c", "yes | head -c 3000000; cat")
    engine.stage.eventually(lambda: engine.docker("logs", "--tail", "1", container))
    before = engine.descriptors()
    upgrade = "Host: d\nConnection: Upgrade\nUpgrade: tcp\nContent-Length: 0\n\n"
    for request in (
        f"POST /containers/{container}/attach?stream=1&stdin=1&stdout=1&stderr=1 HTTP/1.1\n{upgrade}",
        f"GET /containers/{container}/logs?stdout=1&follow=1 HTTP/1.1\nHost: d\n\n",
        f"GET /containers/{container}/stats HTTP/1.1\nHost: d\n\n",
        "GET /events HTTP/1.1\nHost: d\n\n",
        f"GET /containers/{container}/archive?path=/ HTTP/1.1\nHost: d\n\n",
        f"PUT /containers/{container}/archive?path=/tmp HTTP/1.1\nHost: d\nContent-Length: 100000\n\n",
        "POST /images/load HTTP/1.1\nHost: d\nContent-Length: 1000000\n\n",
        f"POST /containers/{container}/wait HTTP/1.1\nHost: d\nContent-Length: 0\n\n",
    ):
        for _ in range(5):
            with engine.connect() as made:
                made.sendall(request.replace("\n", "\r\n").encode() + b"\0" * 600 * request.startswith(("PUT", "POST /images")))
                if not request.startswith(("PUT", "POST /images")):
                    made.recv(100)
    engine.stage.eventually(lambda: engine.descriptors() <= before + 2, why="all descriptors being closed")
    assert engine.docker("inspect", "--format", "{{.State.Status}}", container) == "running"
    engine.docker("rm", "--force", container)


def test_a_thousand_followers_get_every_line(engine: Engine) -> None:
    container = engine.docker("run", "--detach", "--network=none", "--interactive", NAME, "sh", "-c",
                              "read go; for i in $(busybox seq 100); do echo line $i; done")
    expected = "".join(f"line {number}\n" for number in range(1, 101)).encode()

    async def follow(started: asyncio.Semaphore) -> bytes:
        reader, writer = await asyncio.open_unix_connection(engine.socket)
        writer.write(f"GET /containers/{container}/logs?stdout=1&follow=1 HTTP/1.0\r\nHost: d\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.split()[1] == b"200"
        started.release()
        data = b""
        while True:
            try:
                header = await reader.readexactly(8)
            except asyncio.IncompleteReadError:
                writer.close()
                return data
            data += await reader.readexactly(int.from_bytes(header[4:], "big"))

    async def followers() -> list[bytes]:
        started = asyncio.Semaphore(0)
        tasks = [asyncio.ensure_future(follow(started)) for _ in range(1000)]
        for _ in tasks:
            await asyncio.wait_for(started.acquire(), 60)
        command = ["docker", "--host", f"unix://{engine.socket}", "attach", container]
        await asyncio.to_thread(engine.stage.run, *command, text="\n")
        return await asyncio.wait_for(asyncio.gather(*tasks), 60)

    before = engine.descriptors()
    assert set(asyncio.run(followers())) == {expected}
    engine.stage.eventually(lambda: engine.descriptors() <= before + 2)
    engine.docker("rm", container)


def test_ten_thousand_lines_a_second_are_all_there_and_memory_stays_flat(engine: Engine) -> None:
    seconds = int(os.environ.get("BOXSHIP_TEST_LOG_SECONDS", "5"))
    # Two hundred lines every fiftieth of a second, whatever else the machine does: a program that is late catches up.
    program = f"i=0; while [ $i -lt {seconds * 50} ]; do busybox seq $((i * 200 + 1)) $((i * 200 + 200)); i=$((i + 1)); busybox usleep 20000; done"
    container = engine.docker("run", "--detach", "--network=none", NAME, "sh", "-c", program)
    time.sleep(1)
    before = engine.memory()
    peak = before
    while engine.docker("inspect", "--format", "{{.State.Running}}", container) == "true":
        peak = max(peak, engine.memory())
        time.sleep(0.2)
    assert peak - before < 16 << 20
    done = engine.docker("logs", container)
    assert done.split() == [str(number) for number in range(1, seconds * 10_000 + 1)]
    engine.docker("rm", container)
