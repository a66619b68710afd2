"""The helper of ports and names lives as long as containers do: it does without what the daemon is made of."""

import subprocess
import sys
from pathlib import Path

SRC = Path(__file__).parents[3] / "src"
HEAVY = {
    "asyncio", "aiohttp", "grpc", "google", "logging", "subprocess", "threading", "socket", "selectors", "dataclasses", "inspect",
    "pathlib", "tempfile", "random", "hashlib", "ssl", "sqlite3", "concurrent", "json", "re", "typing", "collections", "enum",
}


def test_the_helper_imports_little() -> None:
    program = f"import sys; sys.path.insert(0, {str(SRC)!r}); import boxship.network.proxy.helper; print(*sorted(sys.modules))"
    # -S: no site packages, which may import anything themselves.
    loaded = subprocess.run([sys.executable, "-I", "-S", "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert not HEAVY.intersection(loaded)
    own = {name.split(".")[2] for name in loaded if name.startswith("boxship.network.")}
    assert own == {"proxy", "dns"}
