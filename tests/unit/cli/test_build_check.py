"""`boxship build` looks at the Dockerfile before it sends anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from boxship.cli.main import main

NOWHERE = {"BOXSHIP_HOST": "unix:///nonexistent/socket"}


@pytest.fixture
def context(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("a")
    return tmp_path


def build(context: Path, text: str, *flags: str) -> int:
    (context / "Dockerfile").write_text(text)
    return main(["build", *flags, str(context)], NOWHERE)


def test_check_finds_mistakes_without_an_engine(context, capfd):
    (context / ".dockerignore").write_text("*.txt\n")
    assert build(context, "FROM scratch AS Base\nCOPY a.txt $NO /\nCMD a\n", "--check") == 1
    shown = capfd.readouterr().out
    assert f"{context}/Dockerfile:1:17: StageNameCasing" in shown
    assert "2:6: CopyIgnoredFile" in shown and "2:13: UndefinedVar" in shown and "JSONArgsRecommended" in shown
    assert shown.endswith("4 warnings found\n")


def test_check_of_a_good_file(context, capfd):
    assert build(context, 'FROM scratch\nCOPY a.txt /\nCMD ["/a"]\n', "--check") == 0
    assert capfd.readouterr().out == "Check complete, no warnings found.\n"


@pytest.mark.parametrize("flags", [(), ("--check",)])
def test_an_error_is_shown_with_its_line_before_anything_is_sent(context, capfd, flags):
    assert build(context, "FROM scratch\nCOPPY a.txt /\n", *flags) == 1
    shown = capfd.readouterr()
    assert shown.out == ""
    assert shown.err == (
        f"{context}/Dockerfile:2:1: unknown instruction: COPPY\n  1 | FROM scratch\n> 2 | COPPY a.txt /\n    | ^\n"
        "hint: did you mean COPY?\n")
