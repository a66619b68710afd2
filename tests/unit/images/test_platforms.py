"""Platforms: people's words, and the order in which images fit a machine, as containerd has it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boxship.images import platforms
from boxship.kit.errors import InvalidArgument
from boxship.oci.image import Descriptor, Platform


def plain(platform: Platform) -> str:
    return platforms.format(platform)


@pytest.mark.parametrize(("text", "found"), [
    ("linux/amd64", "linux/amd64"), ("linux/x86_64", "linux/amd64"), ("linux/amd64/v1", "linux/amd64"), ("linux/amd64/v3", "linux/amd64/v3"),
    ("linux/aarch64", "linux/arm64"), ("linux/arm64/v8", "linux/arm64/v8"), ("linux/arm64/8", "linux/arm64/v8"), ("linux/armhf", "linux/arm"),
    ("linux/arm/7", "linux/arm/v7"), ("linux/armel", "linux/arm/v6"), ("linux/i386", "linux/386"), ("windows/amd64", "windows/amd64"),
    ("LINUX/AMD64", "linux/amd64"), ("macos/arm64", "darwin/arm64"), ("arm64", "linux/arm64"), ("s390x", "linux/s390x"),
])
def test_a_platform_is_read_as_people_write_it(text: str, found: str) -> None:
    assert plain(platforms.parse(text)) == found


def test_a_platform_may_carry_a_version_and_features() -> None:
    found = platforms.parse("windows(10.0.17763+win32k)/amd64")
    assert (found.os, found.os_version, found.os_features) == ("windows", "10.0.17763", ["win32k"])


@pytest.mark.parametrize("text", ["", "linux/*", "nothing", "linux/", "/amd64", "linux/amd64/v1/more", "linux(/amd64", "li nux/amd64"])
def test_what_is_no_platform_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        platforms.parse(text)


@pytest.mark.parametrize(("machine", "order"), [
    ("linux/amd64", ["linux/amd64", "linux/386"]),
    ("linux/amd64/v3", ["linux/amd64/v3", "linux/amd64/v2", "linux/amd64", "linux/386"]),
    ("linux/arm/v7", ["linux/arm/v7", "linux/arm/v6", "linux/arm/v5"]),
    ("linux/arm64", ["linux/arm64", "linux/arm/v8", "linux/arm/v7", "linux/arm/v6", "linux/arm/v5"]),
    ("linux/arm64/v8.2", ["linux/arm64/v8.2", "linux/arm64/v8.1", "linux/arm64", "linux/arm/v8"]),
    ("linux/arm64/v9.1", ["linux/arm64/v9.1", "linux/arm64/v9", "linux/arm64/v8.6", "linux/arm64", "linux/arm/v7"]),
    ("linux/riscv64", ["linux/riscv64"]),
])
def test_what_a_machine_runs_is_ranked(machine: str, order: list[str]) -> None:
    matcher = platforms.only(platforms.parse(machine))
    ranks = [matcher.rank(platforms.parse(each)) for each in order]
    assert None not in ranks
    assert ranks == sorted(ranks) and len(set(ranks)) == len(ranks)


@pytest.mark.parametrize(("machine", "image"), [
    ("linux/amd64", "linux/amd64/v2"), ("linux/amd64", "linux/arm64"), ("linux/arm/v6", "linux/arm/v7"), ("linux/386", "linux/amd64"),
    ("linux/amd64", "windows/amd64"), ("linux/arm64", "linux/arm64/v8.1"),
])
def test_what_a_machine_does_not_run_does_not_match(machine: str, image: str) -> None:
    assert not platforms.only(platforms.parse(machine)).match(platforms.parse(image))


def test_strict_takes_no_relatives() -> None:
    assert not platforms.strict(platforms.parse("linux/amd64")).match(platforms.parse("linux/386"))
    assert platforms.strict(platforms.parse("linux/arm64")).match(platforms.parse("linux/arm64/v8"))


def test_the_best_manifest_comes_first_and_one_without_a_platform_last() -> None:
    def manifest(name: str, platform: str) -> Descriptor:
        return Descriptor(media_type=name, digest=f"sha256:{'0' * 64}", size=1, platform=platforms.parse(platform) if platform else None)

    index = [manifest("none", ""), manifest("old", "linux/arm/v6"), manifest("arm64", "linux/arm64/v8"), manifest("x86", "linux/amd64"),
             manifest("new", "linux/arm/v7")]
    found = platforms.choose(index, platforms.only(platforms.parse("linux/arm64")))
    assert [each.media_type for each in found] == ["arm64", "new", "old", "none"]


@given(st.text(alphabet="linuxamd64rv8/.()+-_*windows ", max_size=30))
def test_any_text_is_a_platform_or_refused(text: str) -> None:
    try:
        found = platforms.parse(text)
    except InvalidArgument:
        return
    assert platforms.only(found).match(found)
    assert platforms.parse(platforms.format(found)) == platforms.parse(platforms.format(platforms.parse(platforms.format(found))))
