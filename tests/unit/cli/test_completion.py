"""What a shell is told when Tab is pressed, asked of an engine that is none."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from boxship.cli.http.client import ConnectFailed, Connection
from boxship.cli.verbs.completion import candidates
from support.fake_engine import FakeEngine, fake_engine

CONTAINERS = [{"Names": ["/web"], "Image": "nginx", "Status": "Up"}, {"Names": ["/worker"], "Image": "job", "Status": "Exited"}]
ANSWERS = {
    "GET /containers/json": (200, json.dumps(CONTAINERS).encode()),
    "GET /images/json": (200, json.dumps([{"RepoTags": ["busybox:latest", "host:5000/a:1", "<none>:<none>"]}, {"RepoTags": None}]).encode()),
    "GET /networks": (200, json.dumps([{"Name": "bridge", "Driver": "bridge"}, {"Name": "back", "Driver": "bridge"}]).encode()),
    "GET /volumes": (200, json.dumps({"Volumes": [{"Name": "data", "Driver": "local"}]}).encode()),
}


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[FakeEngine]:
    with fake_engine(tmp_path / "s", ANSWERS) as engine:
        yield engine


@pytest.mark.parametrize(("line", "expected"), [
    ("vers", "version"), ("net", "network"), ("network r", "remove rm"), ("run --restart o", "on-failure"), ("run ", "busybox host:5000/a:1"),
    ("run --name x -it b", "busybox"), ("run --network ", "back bridge"), ("run -v d", "data"), ("run busybox ", ""), ("exec -it w", "web worker"),
    ("exec web ", ""), ("rm web w", "web worker"), ("network connect b", "back bridge"), ("network connect back we", "web"), ("volume rm ", "data"),
    ("logs --tai", "--tail"), ("logs web --foll", "--follow"), ("run busybox --re", ""), ("image rm host:5", "host:5000/a:1"), ("completion ", "bash fish zsh"),
    ("nosuch ", ""), ("cp ", ""), ("ps --format j", "json"), ("container ls --la", "--last --latest"),
])
def test_candidates(engine: FakeEngine, line: str, expected: str) -> None:
    *before, current = line.split(" ")
    assert [name for name, _ in candidates(before, current, lambda: Connection(engine.address))] == expected.split()


def test_stopped_containers_are_offered_where_they_are_of_use(engine: FakeEngine) -> None:
    for verb in ("exec", "rm"):
        candidates([verb], "", lambda: Connection(engine.address))
    assert [request for request, _ in engine.requests] == ["GET /containers/json?all=0", "GET /containers/json?all=1"]


def test_without_an_engine_there_are_no_names() -> None:
    def none() -> Connection:
        raise ConnectFailed("none")

    assert candidates(["rm"], "", none) == []
    assert candidates(["rm"], "--f", none) == [("--force", "Force the removal of a running container (uses SIGKILL)")]
