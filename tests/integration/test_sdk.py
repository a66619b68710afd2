"""`import boxship`, with the daemon that it starts: the page for its users, run as it stands, and what the page leaves out."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import boxship
from boxship import aio
from support.daemon import clear

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run the tests as root")]
PAGE = (Path(__file__).parents[2] / "docs/python.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module", autouse=True)
def daemon() -> Iterator[None]:
    """A daemon of these tests' own, which the first call starts."""
    folder = Path("/tmp", f"bd-{secrets.token_hex(4)}")
    folder.mkdir(mode=0o755)
    (folder / "root").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DOCKER_HOST", "BOXSHIP_HOST"):
            patch.delenv(name, raising=False)
        patch.setenv("BOXSHIP_ROOT", f"{folder}/root")
        patch.setenv("BOXSHIP_STATE", f"{folder}/state")
        yield
    clear(folder)


def test_the_page_runs_from_top_to_bottom() -> None:
    *examples, in_pytest = EXAMPLES
    assert len(examples) == 5
    assert "def test_" in in_pytest
    done = subprocess.run([sys.executable, "-W", "error", "-"], input="\n".join(examples), capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    assert boxship.containers.list(all=True) == []


def test_the_pages_test_passes_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "test_page.py").write_text(EXAMPLES[-1])
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_page.py"], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout
    assert boxship.containers.list(all=True) == []
    assert boxship.volumes.list() == []


def test_pytest_does_not_notice_the_plugin_until_it_is_used(tmp_path: Path) -> None:
    (tmp_path / "test_other.py").write_text(
        "import sys\ndef test_other():\n    assert 'boxship.pytest_plugin' in sys.modules\n"
        "    assert not {'boxship.sdk', 'boxship.cli', 'asyncio', 'grpc', 'aiohttp'} & set(sys.modules)\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:rerunfailures", "-p", "no:hypothesispytest", "test_other.py"], cwd=tmp_path,
        capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout


def test_much_goes_through_a_command_both_ways_at_once() -> None:
    data = os.urandom(3 << 20).hex()
    with boxship.run("host", ["sleep", "600"]) as c:
        assert c.exec(["cat"], input=data).stdout == data
        assert list(c.exec(["sh", "-c", "echo one; printf two"], stream=True)) == ["one", "two"]
        with pytest.raises(boxship.CommandFailed) as failed:
            c.exec(["sh", "-c", "echo why >&2; exit 3"], check=True)
    assert (failed.value.exit_code, failed.value.stderr) == (3, "why\n")


def test_what_is_wrong_has_its_own_error() -> None:
    with boxship.run("host", ["sleep", "600"], name="sdk-taken") as c:
        with pytest.raises(boxship.AlreadyExists):
            boxship.create("host", name="sdk-taken")
        with pytest.raises(boxship.FailedPrecondition):
            c.remove()
        with pytest.raises(TimeoutError):
            c.wait(timeout_s=0.2)
        with pytest.raises(TypeError, match="no option 'memroy'"):
            boxship.run("host", memroy="1g")  # type: ignore[call-arg]
    with pytest.raises(boxship.InvalidArgument):
        boxship.run("host", memory="lots")
    with pytest.raises(boxship.NotFound):
        c.inspect()
    with pytest.raises(boxship.Unavailable):
        boxship.Client("unix:///nowhere/docker.sock").version()


def test_lines_left_unread_hold_up_nothing() -> None:
    with boxship.run("host", ["sh", "-c", "while :; do echo line; sleep 0.01; done"]) as c:
        lines = c.logs(stream=True)
        assert [next(lines) for _ in range(3)] == ["line"] * 3
        assert c.logs(tail=2) == "line\nline\n"


def test_async_calls_wait_beside_one_another() -> None:
    async def main() -> None:
        async with aio.run("host", ["sleep", "600"]) as c:
            # More than a pool of threads would have.
            waiting = [asyncio.ensure_future(c.wait()) for _ in range(60)]
            assert (await c.exec(["cat"], input="x" * 300_000)).stdout == "x" * 300_000
            with pytest.raises(TimeoutError):
                await c.wait(timeout_s=0.1)
            await c.kill()
            assert set(await asyncio.gather(*waiting)) == {137}
        with pytest.raises(boxship.NotFound):
            await c.inspect()
        with pytest.raises(boxship.StartFailed) as failed:
            await aio.run("host", ["no-such-program"])
        assert failed.value.exit_code == 127

    begun = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - begun < 60
