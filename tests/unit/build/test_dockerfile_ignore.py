""".dockerignore: what is left out, which folders need no look, and how long that takes."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boxship.build.dockerfile import ignore
from boxship.kit.errors import InvalidArgument


def excluded(patterns: str, *paths: str) -> list[bool]:
    matcher = ignore.compile(ignore.read(patterns.encode()))
    return [matcher.excludes(path) for path in paths]


def test_the_file_is_read_as_docker_reads_it():
    data = b"\xef\xbb\xbf# comment\n  # no comment\n\n /a/ \n./b/../c\r\n! d\n!/e/f/\n\\#g\n"
    assert ignore.read(data) == ["# no comment", "a", "c", "!d", "!e/f", "\\#g"]


def test_a_dockerfile_may_have_its_own_file():
    assert ignore.names("docker/app.Dockerfile") == ("docker/app.Dockerfile.dockerignore", ".dockerignore")


@pytest.mark.parametrize(("patterns", "out", "kept"), [
    ("*.pyc", ["a.pyc", "a.pyc/b"], ["x/a.pyc", "a.py"]), ("**/*.pyc", ["a.pyc", "x/y/a.pyc", "x/a.pyc/b"], ["a.py"]), ("node_modules", ["node_modules", "node_modules/a/b"], ["x/node_modules", "node_modulesx"]),
    ("/abs", ["abs", "abs/x"], ["x/abs"]), ("a/*/c", ["a/b/c", "a/b/c/d"], ["a/c", "a/b/d/c"]), ("a/**/c", ["a/c", "a/b/c", "a/b/d/c", "a/c/x"], ["c", "a/b"]), ("a/**", ["a/b", "a/b/c"], ["a", "ab"]), ("**", ["a", "a/b"], []), ("*", ["a", "a/b"], []),
    ("?", ["a", "é", "a/b"], ["ab"]), ("[ab]c", ["ac", "bc"], ["cc", "c"]), ("[^ab]c", ["cc"], ["ac", "/c"]), ("[a-c]x", ["bx"], ["dx"]), ("\\*", ["*"], ["a"]), ("a.b", ["a.b"], ["axb"]), ("(a|b)+$", ["(a|b)+$"], ["a"]), ("**foo", ["foo", "xfoo", "a/xfoo"], ["foox"]),
    ("foo**", ["foo", "foox/y"], ["xfoo"]), ("*a*b*c", ["abc", "xaxbxc", "aabbcc/d"], ["acb", "ab/c"]), ("**/a/**/b", ["a/b", "x/a/y/z/b"], ["b", "a"]), ("..", [], ["a"]), ("", [], ["a"]), ("# x", [], ["# x"]), ("a/./b//c/../d", ["a/b/d"], ["a/b/c"]),
    ("*\n!*.md", ["a", "a/b.md"], ["x.md"]), ("*.md\n!README*.md\nREADME-secret.md", ["x.md", "README-secret.md"], ["README.md", "README-a.md"]), ("a\n!a/b\na/b/c", ["a", "a/x", "a/b/c", "a/b/c/d"], ["a/b", "a/b/x"]), ("!a\n*", ["a", "b"], []),
    ("**\n!src/**/*.py", ["src", "src/a.txt", "x.py"], ["src/a.py", "src/x/y.py"]),
])
def test_what_is_left_out(patterns, out, kept):
    assert excluded(patterns, *out) == [True] * len(out)
    assert excluded(patterns, *kept) == [False] * len(kept)


@pytest.mark.parametrize(("patterns", "folder", "wanted"), [
    ("a", "a", True), ("a", "a/b", True), ("a", "b", False), ("a\n!a/b", "a", False), ("a\n!a/b/c", "a/b", False), ("a\n!a/b/c", "a/x", True), ("a\n!b", "a", True), ("*\n!src", "docs", True), ("*\n!src", "src", False), ("*\n!src/x", "docs", True), ("*\n!**/x", "docs", False),
    ("*\n!src/**/x", "docs", True), ("*\n!src/**/x", "src/y", False), ("!a\n*", "a", True), ("a\n!a/*/c", "a/b", False), ("a\n!a/*/c", "a/b/d", True),
])
def test_a_folder_is_pruned_when_nothing_in_it_can_be_taken_in(patterns, folder, wanted):
    assert ignore.compile(ignore.read(patterns.encode())).prunes(folder) is wanted


@pytest.mark.parametrize("pattern", ["[", "[a", "a\\", "[]a]", "[-x]", "[x-]", "!", "a/[b", "a**b**c**d**e"])
def test_what_is_no_pattern(pattern):
    with pytest.raises(InvalidArgument, match="pattern"):
        ignore.compile([pattern])


_NAME = st.text("abc.*?[]!\\-^é", min_size=1, max_size=5)
_PATH = st.lists(st.text("abc.é*", min_size=1, max_size=3), min_size=1, max_size=4).map("/".join)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(_NAME | st.just("**"), min_size=1, max_size=3).map("/".join), max_size=4), st.lists(_PATH, min_size=1, max_size=6))
def test_a_pruned_folder_hides_nothing_that_is_wanted(patterns, paths):
    try:
        matcher = ignore.compile(ignore.read("\n".join(patterns).encode()))
    except InvalidArgument:
        return
    for path in paths:
        parts = path.split("/")
        for count in range(1, len(parts)):
            assert not matcher.prunes("/".join(parts[:count])) or matcher.excludes(path)


def test_ten_thousand_files_take_a_moment():
    patterns = "\n".join([f"**/build{index}/*.o" for index in range(50)] + ["*.log", "**/__pycache__", "!keep/**/*.log", "docs", ".git"])
    matcher = ignore.compile(ignore.read(patterns.encode()))
    began = time.process_time()
    count = sum(matcher.excludes(f"src/{index % 100}/module{index}/file.py") for index in range(10_000))
    assert count == 0
    assert time.process_time() - began < 5


@pytest.mark.parametrize("pattern", ["*a*a*a*a*a*a*a*a*a*b", "**/a/**/a/**/a/**/a/**/a/**/a/**/b", "[a-z]*[a-z]*[a-z]*[a-z]*[a-z]*1", "a**a**a**b", "**a*a*a*a*a*a*a*b"])
def test_no_pattern_takes_for_ever(pattern):
    matcher = ignore.compile([pattern])
    began = time.process_time()
    assert not matcher.excludes("/".join(["a"] * 200))
    assert not matcher.excludes("a" * 2000)
    assert time.process_time() - began < 5
