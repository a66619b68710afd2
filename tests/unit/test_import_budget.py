"""The thin set imports nothing at module level that costs a container its start."""

import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src"
THIN = ("abi", "kit", "linux", "oci", "runtime")
SLOW = {
    "argparse", "asyncio", "collections", "contextlib", "ctypes", "dataclasses", "enum", "functools", "hashlib", "importlib",
    "inspect", "json", "logging", "pathlib", "re", "shutil", "signal", "socket", "struct", "subprocess", "tempfile", "threading",
    "typing", "aiohttp", "grpc", "pyroute2", "rich", "msgspec",
}
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
before = set(sys.modules)
__import__(sys.argv[2])
print(*sorted(set(sys.modules) - before))
"""


def modules() -> list[str]:
    files = [path for name in THIN for path in sorted((SRC / "boxship" / name).rglob("*.py")) if path.name != "__main__.py"]
    return [".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__") for path in files]


@pytest.mark.parametrize("module", modules())
def test_thin_module_imports_quickly(module: str) -> None:
    """Only built-in modules, os and what the interpreter has loaded by itself come along."""
    # -S, -I: no site packages and no environment, which may import anything themselves.
    command = [sys.executable, "-I", "-S", "-c", PROGRAM, str(SRC), module]
    loaded = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert not SLOW.intersection(loaded)
