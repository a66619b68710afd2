"""What is typed all day starts quickly: nothing that is slow to import comes along."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.fake_engine import fake_engine

SRC = Path(__file__).parents[3] / "src"
SLOW = {
    "argparse", "asyncio", "collections", "contextlib", "ctypes", "dataclasses", "enum", "functools", "hashlib", "http", "http.client",
    "importlib", "inspect", "json", "logging", "pathlib", "re", "shutil", "signal", "socket", "string", "struct", "subprocess", "tempfile",
    "threading", "typing", "urllib", "aiohttp", "grpc", "google", "rich", "selectors", "ssl", "email", "tarfile",
}
PROGRAM = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import os
from boxship.cli.main import main
code = main(sys.argv[1:], dict(os.environ))
os.write(2, " ".join(["MODULES", str(code), *sys.modules]).encode())
os._exit(0)
"""
IDENTITY = "0123456789ab" + "0" * 52
CONTAINER = {"Id": IDENTITY, "Names": ["/a"], "Image": "busybox", "ImageID": "sha256:1", "Command": "sh", "Created": 1, "State": "running",
             "Status": "Up 2 seconds", "Ports": [], "Labels": {}, "Mounts": [], "NetworkSettings": {"Networks": {}}}
INSPECT = {"Id": IDENTITY, "Config": {"Tty": False}}
ANSWERS = {
    "GET /containers/json": (200, json.dumps([CONTAINER]).encode()),
    "GET /images/json": (200, json.dumps([{"Id": "sha256:12", "RepoTags": ["a:b"], "Created": 1, "Size": 5}]).encode()),
    "GET /containers/a/json": (200, json.dumps(INSPECT).encode()),
    f"GET /containers/{IDENTITY}/logs": (200, b"\1\0\0\0\0\0\0\3hi\n"),
    "POST /containers/a/stop": (204, b""), "POST /containers/a/kill": (204, b""), "DELETE /containers/a": (204, b""),
    "POST /containers/a/start": (204, b""), "POST /containers/a/wait": (200, b'{"StatusCode":0}'),
}


@pytest.mark.parametrize("words", [
    ["--version"], ["--help"], ["ps", "-a"], ["ps", "--help"], ["images"], ["inspect", "a"], ["logs", "a"], ["stop", "a"], ["kill", "a"],
    ["rm", "a"], ["start", "a"], ["wait", "a"], ["container", "ls"], ["ps", "--format", "{{.ID}} {{json .Names}}"],
], ids=" ".join)
def test_a_hot_verb_imports_nothing_slow(words: list[str], tmp_path: Path) -> None:
    """-I and -S: no site packages and no environment, which may import anything themselves."""
    with fake_engine(tmp_path / "s", ANSWERS) as engine:
        done = subprocess.run([sys.executable, "-I", "-S", "-c", PROGRAM, str(SRC), *words], capture_output=True, text=True,
                              env={"BOXSHIP_HOST": engine.address}, check=True)
    before, mark, loaded = done.stderr.partition("MODULES ")
    code, *modules = loaded.split()
    assert (before, mark, code) == ("", "MODULES ", "0")
    assert not SLOW.intersection(modules)
