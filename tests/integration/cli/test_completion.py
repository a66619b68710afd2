"""Tab completion in the shells themselves: each reads what `boxship completion` prints, and is asked what it would offer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.fake_engine import FakeEngine, fake_engine

BIN = str(Path(sys.executable).parent)
ANSWERS = {
    "GET /containers/json": (200, json.dumps([{"Names": ["/web-1"], "Image": "nginx", "Status": "Up"}, {"Names": ["/web-2"], "Image": "n", "Status": "Up"}]).encode()),
    "GET /images/json": (200, json.dumps([{"RepoTags": ["host:5000/app:1", "host:5000/app:2"]}]).encode()),
}
# What completes a line, in each shell's own words; the line is $1.
SHELLS = {
    "bash": r"""
        source <(boxship completion bash)
        COMP_LINE=$1 COMP_POINT=${#1} COMP_WORDBREAKS=$' \t\n"'"'"'><=;|&(:'
        _boxship
        printf '%s\n' "${COMPREPLY[@]}"
    """,
    # compadd is what would show the candidates.
    "zsh": r"""
        compdef() { : }
        compadd() { print -l -- "${(@P)2}" }
        _files() { : }
        source <(boxship completion zsh)
        words=("${(@s: :)1}") CURRENT=${#words}
        _boxship
    """,
    "fish": r"""
        boxship completion fish | source
        complete -C $argv[1] | string split -f1 \t
    """,
}


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[FakeEngine]:
    with fake_engine(tmp_path / "s", ANSWERS) as engine:
        yield engine


def ask(shell: str, line: str, engine: FakeEngine, home: Path) -> list[str]:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed: apt-get install {shell}")
    environ = {"PATH": f"{BIN}:/usr/bin:/bin", "HOME": str(home), "BOXSHIP_HOST": engine.address, "TERM": "dumb", "LC_ALL": "C.UTF-8"}
    words = {"bash": ["bash", "--norc", "-c", SHELLS[shell], "bash", line], "zsh": ["zsh", "-f", "-c", SHELLS[shell], "zsh", line],
             "fish": ["fish", "--no-config", "-c", SHELLS[shell], line]}[shell]
    done = subprocess.run(words, capture_output=True, text=True, env=environ, timeout=60, cwd=home)
    assert done.stderr == "", os.linesep.join((done.stdout, done.stderr))
    return sorted(done.stdout.split())


@pytest.mark.parametrize("shell", SHELLS)
def test_words_flags_and_names_are_completed(shell: str, engine: FakeEngine, tmp_path: Path) -> None:
    assert ask(shell, "boxship networ", engine, tmp_path) == ["network"]
    assert ask(shell, "boxship logs --foll", engine, tmp_path) == ["--follow"]
    assert ask(shell, "boxship rm -f web", engine, tmp_path) == ["web-1", "web-2"]
    assert ask(shell, "boxship run --rm host:5000/", engine, tmp_path) == (
        # bash completes what follows the last colon.
        ["5000/app:1", "5000/app:2"] if shell == "bash" else ["host:5000/app:1", "host:5000/app:2"])
