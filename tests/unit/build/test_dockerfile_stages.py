"""Which stages a target needs, and what variables are worth in them."""

from __future__ import annotations

import pytest

from boxship.build import dockerfile as language
from boxship.build.dockerfile import DockerfileError
from boxship.kit.errors import InvalidArgument
from boxship.oci.image import Platform

AMD64 = Platform(os="linux", architecture="amd64")
ARM64 = Platform(os="linux", architecture="arm64")


def planned(text: str, target: str = "", **more):
    return language.plan(language.parse(text.encode()), target, **more)


def evaluated(stages, env=None):
    """Each stage's variables at its end, by index; `env` is the base image's."""
    found: dict[int, language.Environment] = {}
    for stage in stages:
        config = dict(env or {})
        if stage.parent is not None:
            config = found[stage.parent].config
        environment = stage.environment(config, found.get(stage.parent))
        for each in stage.instructions:
            if isinstance(each, language.Arg):
                environment.declare(each)
            elif isinstance(each, language.Env):
                config = {**config, **dict(environment.assign(each))}
        environment.config = config
        found[stage.index] = environment
    return found


THREE = """
FROM debian AS one
FROM alpine AS Two
COPY --from=one /a /a
FROM two
RUN --mount=type=bind,from=1,target=/x true
FROM scratch AS unused
COPY --from=one a b
FROM scratch AS last
COPY --from=2 a b
"""


@pytest.mark.parametrize(("target", "wanted"), [
    ("", [0, 1, 2, 4]), ("last", [0, 1, 2, 4]), ("LAST", [0, 1, 2, 4]), ("unused", [0, 3]), ("two", [0, 1]), ("0", [0]), ("2", [0, 1, 2]),
])
def test_only_what_the_target_needs_is_built_and_the_target_is_last(target, wanted):
    assert [stage.index for stage in planned(THREE, target)] == wanted


def test_an_unknown_target_names_what_is_meant():
    with pytest.raises(InvalidArgument, match=r'target stage "unsued" could not be found \(did you mean unused\?\)'):
        planned(THREE, "unsued")


def test_a_stage_begins_with_a_stage_of_before_or_with_an_image():
    stages = planned("FROM a AS a\nFROM a AS b\nFROM c\nFROM b AS c\nCOPY --from=2 x y\n")
    assert [(stage.image, stage.parent) for stage in stages] == [("a", None), ("a", 0), ("c", None), ("b", 1)]


def test_of_stages_with_one_name_the_last_one_before_counts():
    stages = planned("FROM x AS a\nFROM y AS a\nFROM a\nCOPY --from=a b c\nFROM z AS a\nFROM scratch\nCOPY --from=2 / /\n")
    assert [stage.index for stage in stages] == [1, 2, 4]


@pytest.mark.parametrize(("text", "message"), [
    ("FROM a AS b\nCOPY --from=b x y\n", "cannot copy from itself"),
    ("FROM a\nCOPY --from=later x y\nFROM b AS later\nFROM scratch\nCOPY --from=0 x y\n", "needs to be defined before"),
    ("FROM a\nCOPY --from=0 x y\n", "invalid stage index 0"),
    ("FROM a\nCOPY --from=7 x y\n", "invalid stage index 7"),
    ("FROM a\nCOPY --from=99999999999999999999999 x y\n", "invalid stage index"),
    ("FROM a\nCOPY --from=$X x y\n", "variable expansion is not supported for --from"),
    ("FROM $X\n", r"base name \(\$X\) should not be blank"),
    ("FROM ${X\n", "missing '}'"),
    ("ARG A=${B\nFROM x\n", "missing '}'"),
    ("FROM --platform=$X a\n", "empty platform value"),
    ("FROM --platform=moon/cheese/a/b a\n", "failed to parse platform"),
    ("FROM a\nRUN --mount=type=nfs,target=/x true\n", "unsupported mount type"),
])
def test_what_cannot_be_planned_is_an_error_with_a_place(text, message):
    with pytest.raises(DockerfileError, match=message):
        planned(text)


def test_a_mistake_in_a_stage_that_is_not_needed_stops_nothing():
    assert len(planned("FROM a\nRUN --mount=type=nfs,target=/x true\nFROM b\n")) == 1


def test_a_trigger_of_a_stage_is_a_need_of_the_one_that_begins_with_it():
    stages = planned("FROM x AS tools\nFROM y AS base\nONBUILD COPY --from=tools a b\nFROM base\n")
    assert [stage.index for stage in stages] == [0, 1, 2]
    assert stages[2].needs == {0, 1}


def test_a_context_takes_the_place_of_a_stage_and_of_an_image():
    stages = planned("FROM a AS b\nRUN x\nFROM b AS c\nFROM c\n", contexts={"b"})
    assert [(stage.name, stage.image, stage.parent) for stage in stages] == [("c", "b", None), ("", "c", 1)]
    replaced = planned("FROM a AS b\nRUN x\n", contexts={"b"})
    assert (replaced[0].image, replaced[0].instructions) == ("b", ())


def test_stages_for_triggers_of_images_can_be_asked_for():
    text = "FROM a AS tools\nFROM b\n"
    assert [stage.index for stage in planned(text)] == [1]
    assert [stage.index for stage in planned(text, also=[0])] == [0, 1]
    assert planned(text)[0].lookup("tools") == 0
    assert planned(text)[0].lookup("debian:12") is None


def test_platforms():
    text = "FROM --platform=$BUILDPLATFORM a AS b\nARG TARGETARCH\nARG BUILDARCH\nENV X=$TARGETARCH/$BUILDARCH/$TARGETOS\nFROM b\n"
    stages = planned(text, platform=ARM64, build_platform=AMD64)
    assert stages[0].platform.architecture == "amd64"
    assert stages[1].platform is None
    assert evaluated(stages)[0].values["X"] == "arm64/amd64/"


@pytest.mark.parametrize(("text", "args", "env", "wanted"), [
    # before FROM
    ("ARG V=1\nFROM a\nENV X=$V", {}, {}, ""),
    ("ARG V=1\nFROM a\nARG V\nENV X=$V", {}, {}, "1"),
    ("ARG V=1\nFROM a\nARG V=2\nENV X=$V", {}, {}, "2"),
    ("ARG V=1\nFROM a\nARG V=2\nENV X=$V", {"V": "3"}, {}, "3"),
    ("ARG V=1\nARG W=${V}2\nFROM a\nARG W\nENV X=$W", {}, {}, "12"),
    ("ARG V=1\nARG W=${V}2\nFROM a\nARG W\nENV X=$W", {"V": "9"}, {}, "92"),
    ("FROM a\nARG V\nENV X=${V-unset}", {}, {}, "unset"),
    ("FROM a\nARG V=\nENV X=${V-unset}", {}, {}, ""),
    ("FROM a\nENV X=$V", {"V": "3"}, {}, ""),
    # the last one of ENV and ARG counts
    ("FROM a\nARG V=1\nENV V=2\nENV X=$V", {"V": "3"}, {}, "2"),
    ("FROM a\nENV V=2\nARG V=1\nENV X=$V", {}, {}, "1"),
    ("FROM a\nARG V\nENV X=$V", {}, {"V": "base"}, "base"),
    ("FROM a\nARG V=1\nENV X=$V", {}, {"V": "base"}, "1"),
    # one instruction sees what was before it
    ("FROM a\nENV V=1\nENV V=2 X=$V", {}, {}, "1"),
    ("FROM a\nARG V=1 W=$V\nENV X=$W", {}, {}, "1"),
    ("FROM a\nARG V=$V\nENV X=$V", {}, {"V": "base"}, "base"),
    # through FROM
    ("FROM a AS b\nARG V=1\nFROM b\nENV X=$V", {}, {}, "1"),
    ("FROM a AS b\nENV V=2\nFROM b\nENV X=$V", {}, {}, "2"),
    ("FROM a AS b\nENV V=2\nARG V=1\nFROM b\nENV X=$V", {}, {}, "2"),
    ("FROM a AS b\nARG V=1\nFROM c\nENV X=$V", {}, {}, ""),
])
def test_what_a_variable_is_worth(text, args, env, wanted):
    stages = planned(text, build_args=args)
    assert evaluated(stages, env)[stages[-1].index].values["X"] == wanted


def test_automatic_arguments_can_be_given():
    text = "ARG TARGETARCH\nFROM a:$TARGETARCH\nARG TARGETARCH\nENV X=$TARGETARCH\n"
    stages = planned(text, build_args={"TARGETARCH": "z80"}, platform=ARM64)
    assert stages[0].image == "a:z80"
    assert evaluated(stages)[0].values["X"] == "z80"


def test_declared_arguments_are_known_for_the_history():
    environment = evaluated(planned("FROM a\nARG V=1\nARG W\nARG U=2\nENV U=3\n"))[0]
    assert environment.arguments == {"V": "1", "W": None, "U": "2"}
    assert environment.declared == {"V": "1", "U": "3"}
