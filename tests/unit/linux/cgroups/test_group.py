"""Group: paths stay below their start."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boxship.kit.errors import InvalidArgument
from boxship.linux.cgroups.group import below, clean


@pytest.mark.parametrize(
    ("path", "cleaned"),
    [
        ("", ""), ("/", "/"), ("/a/../b", "/b"), ("/../../etc", "/etc"), ("../../etc", "etc"), ("a/./b//c/", "a/b/c"),
        ("..", ""), ("//a", "/a"), ("/..", "/"),
    ],
)
def test_paths_are_cleaned_as_text(path: str, cleaned: str) -> None:
    assert clean(path) == cleaned


def test_a_nul_byte_is_refused() -> None:
    with pytest.raises(InvalidArgument):
        clean("/a\0b")


@given(st.lists(st.sampled_from(["..", ".", "", "a", "b c", "..."]), max_size=8).map("/".join))
def test_no_path_leads_above_its_start(path: str) -> None:
    assert ".." not in clean(path).split("/")
    assert clean(path).startswith("/") == path.startswith("/")


def test_a_sub_group_is_below() -> None:
    assert below("/cg/x", "a/b") == "/cg/x/a/b"
    assert below("/cg/x", "/") == "/cg/x"
    for wrong in ("..", "../xy", "a/../..", "/../x2"):
        with pytest.raises(InvalidArgument, match="bad sub cgroup path"):
            below("/cg/x", wrong)
