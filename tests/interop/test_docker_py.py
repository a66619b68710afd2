"""docker-py against the engine in `boxship daemon`: its documented calls, and streams as it reads them."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.image import NAME
from support.stage import Stage

docker = pytest.importorskip("docker", reason="docker-py is missing: pip install docker")


@pytest.fixture(scope="module")
def client(stage: Stage, archive: Path) -> Iterator[Any]:
    folder = stage.directory / "py"
    folder.mkdir()
    daemon = stage.start(
        Path(sys.executable).with_name("boxship"), "daemon", "--root", folder / "root", "--state", folder, log=folder / "log")
    # The socket is reached from outside of the stage by its file alone.
    made: list[Any] = []

    def connect() -> bool:
        made.append(docker.DockerClient(base_url=f"unix://{folder}/docker.sock"))
        return bool(made[-1].ping())

    stage.eventually(lambda: (folder / "docker.sock").exists() and connect(), timeout=40, why="the engine answering")
    client = made[-1]
    with open(archive, "rb") as file:
        assert [image.tags for image in client.images.load(file)] == [[NAME]]
    yield client
    client.close()
    stage.stop(daemon)
    assert "Traceback" not in (folder / "log").read_text()


def run(client: Any, *command: str, **options: Any) -> Any:
    return client.containers.run(NAME, list(command), network_mode="none", **options)


def test_run_returns_the_output(client: Any) -> None:
    assert run(client, "echo", "hello", remove=True) == b"hello\n"
    assert run(client, "sh", "-c", "echo out; echo err >&2", remove=True, stderr=True) == b"out\nerr\n"


def test_run_raises_with_the_exit_code_and_the_errors(client: Any) -> None:
    with pytest.raises(docker.errors.ContainerError) as caught:
        run(client, "sh", "-c", "echo bad >&2; exit 3", remove=True)
    assert caught.value.exit_status == 3
    assert caught.value.stderr == b"bad\n"
    with pytest.raises(docker.errors.ImageNotFound):
        client.containers.create("127.0.0.1:1/nothing:here")


def test_a_container_is_an_object_that_follows_its_life(client: Any) -> None:
    container = run(client, "sleep", "1000", detach=True, name="life", labels={"k": "v"})
    try:
        container.reload()
        assert container.status == "running"
        assert container.labels["k"] == "v"
        assert [each.id for each in client.containers.list(filters={"label": "k=v"})] == [container.id]
        container.pause()
        container.reload()
        assert container.status == "paused"
        container.unpause()
        assert "sleep 1000" in container.top()["Processes"][0]
        assert container.stats(stream=False)["pids_stats"]["current"] == 1
        container.rename("lives")
        container.update(mem_limit="64m", memswap_limit="128m")
        container.reload()
        assert (container.name, container.attrs["HostConfig"]["Memory"]) == ("lives", 64 << 20)
        container.kill()
        assert container.wait()["StatusCode"] == 137
        container.restart(timeout=1)
        container.reload()
        assert container.status == "running"
    finally:
        container.remove(force=True)
    with pytest.raises(docker.errors.NotFound):
        client.containers.get("lives")


def test_exec_in_all_its_forms(client: Any) -> None:
    container = run(client, "sleep", "1000", detach=True)
    try:
        words = ["sh", "-c", "echo out; echo err >&2; exit 4"]
        assert container.exec_run(words, demux=True) == (4, (b"out\n", b"err\n"))
        assert container.exec_run(words).exit_code == 4
        assert b"".join(container.exec_run(words, stream=True).output) in (b"out\nerr\n", b"err\nout\n")
        assert container.exec_run(["tty"], tty=True).output == b"/dev/pts/0\r\n"
        assert container.exec_run(["id", "-u"], user="nobody").output == b"65534\n"
        channel = container.exec_run(["cat"], stdin=True, socket=True).output
        channel._sock.sendall(b"hello\n")
        channel._sock.shutdown(1)
        data = b""
        while piece := channel.read(4096):
            data += piece
        assert data == b"\x01\0\0\0\0\0\0\x06hello\n"
    finally:
        container.remove(force=True)


def test_logs_stream_and_attach(client: Any) -> None:
    container = run(client, "sh", "-c", "for i in 1 2 3; do echo $i; sleep 0.2; done", detach=True)
    assert b"".join(container.logs(stream=True, follow=True)) == b"1\n2\n3\n"
    assert container.logs(tail=1) == b"3\n"
    assert container.logs(timestamps=True, tail=1).endswith(b"Z 3\n")
    assert container.attach(logs=True) == b"1\n2\n3\n"
    container.remove()


def test_archives(client: Any) -> None:
    container = client.containers.create(NAME, ["cat", "/in/f"], network_mode="none")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as made:
        entry = tarfile.TarInfo("in/f")
        entry.size = 5
        made.addfile(entry, io.BytesIO(b"data\n"))
    assert container.put_archive("/", buffer.getvalue())
    container.start()
    assert container.wait()["StatusCode"] == 0
    assert container.logs() == b"data\n"
    pieces, stat = container.get_archive("/in/f")
    assert (stat["name"], stat["size"]) == ("f", 5)
    with tarfile.open(fileobj=io.BytesIO(b"".join(pieces))) as found:
        member = found.extractfile("f")
        assert member is not None
        assert member.read() == b"data\n"
    assert {"Path": "/in", "Kind": 1} in container.diff()
    with pytest.raises(docker.errors.NotFound):
        container.get_archive("/nothing")
    container.remove()


def test_images_and_volumes(client: Any) -> None:
    image = client.images.get(NAME)
    assert image.id.startswith("sha256:")
    assert image.tag("py/tagged", "1")
    assert "py/tagged:1" in client.images.get(NAME).tags
    client.images.remove("py/tagged:1")
    assert image.history()[0]["Id"] == image.id
    saved = b"".join(image.save(named=True))
    with tarfile.open(fileobj=io.BytesIO(saved)) as found:
        assert "manifest.json" in found.getnames()
    container = run(client, "touch", "/made", detach=True)
    container.wait()
    committed = container.commit("py/committed", "1")
    container.remove()
    assert client.containers.run("py/committed:1", ["ls", "/made"], network_mode="none", remove=True) == b"/made\n"
    client.images.remove(committed.id)
    volume = client.volumes.create("py-volume", labels={"a": "b"})
    run(client, "touch", "/v/x", volumes={"py-volume": {"bind": "/v", "mode": "rw"}}, remove=True)
    assert run(client, "ls", "/v", volumes={"py-volume": {"bind": "/v", "mode": "ro"}}, remove=True) == b"x\n"
    assert [each.name for each in client.volumes.list(filters={"label": "a=b"})] == ["py-volume"]
    volume.remove()


def test_a_part_of_a_volume_is_mounted_and_none_leads_out_of_it(client: Any) -> None:
    client.volumes.create("parts")
    run(client, "sh", "-c", "mkdir /v/a; echo in > /v/a/f; ln -s /etc /v/out", volumes={"parts": {"bind": "/v"}}, remove=True)

    def part(path: str, *command: str) -> Any:
        mount = docker.types.Mount("/p", "parts")
        mount["VolumeOptions"] = {"Subpath": path}
        return run(client, *command, mounts=[mount], remove=True)

    assert part("a", "cat", "/p/f") == b"in\n"
    assert part("a/f", "cat", "/p") == b"in\n"
    with pytest.raises(docker.errors.APIError, match="leads out of the volume"):
        part("out", "ls", "/p")
    with pytest.raises(docker.errors.APIError, match="cannot access path"):
        part("nothing", "true")
    client.containers.prune()  # those that could not be started
    client.volumes.get("parts").remove()


def test_events_and_what_the_engine_says_of_itself(client: Any) -> None:
    events = client.events(decode=True, filters={"type": "container"})
    container = run(client, "true", detach=True)
    seen = []
    for event in events:
        seen.append(event["Action"])
        if event["Action"] == "die":
            break
    assert seen == ["create", "start", "die"]
    container.remove()
    assert client.info()["Images"] >= 1
    assert client.version()["ApiVersion"] == "1.51"
    assert client.df()["Images"]


def test_a_follower_that_goes_away_leaves_nothing_behind(client: Any) -> None:
    container = run(client, "sleep", "1000", detach=True)
    before = client.info()["NFd"]
    for _ in range(20):
        follower = container.logs(stream=True, follow=True)
        follower.close()
    subprocess.run(["sleep", "0.5"], check=True)
    assert client.info()["NFd"] < before + 10
    container.remove(force=True)
