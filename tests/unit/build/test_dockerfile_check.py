"""The linter: each rule where it must be found, where it must not, and how it is turned off."""

from __future__ import annotations

import pytest

from boxship.build import dockerfile as language
from boxship.build.dockerfile import DockerfileError
from boxship.oci.image import Platform

AMD64 = Platform(os="linux", architecture="amd64")
KNOWN = {"x": {"PATH": "/bin", "FROM_BASE": "1"}}


def found(text: str, **more):
    options = {"platform": AMD64, "build_platform": AMD64, "environments": KNOWN, **more}
    return [(each.rule, each.location.line) for each in language.check(language.parse(text.encode()), **options)]


RULES = [
    ("StageNameCasing", 1, "FROM x AS Big"), ("FromAsCasing", 1, "FROM x as y"), ("FromAsCasing", 1, "from x AS y"), ("ConsistentInstructionCasing", 3, "FROM x\nRUN a\nrun b"), ("ConsistentInstructionCasing", 2, "FROM x\nRun b"),
    ("DuplicateStageName", 2, "FROM x AS a\nFROM x AS a"), ("ReservedStageName", 1, "FROM x AS scratch"), ("ReservedStageName", 1, "FROM x AS context"), ("NoEmptyContinuation", 3, "FROM x\nRUN a \\\n\n b"),
    ("MaintainerDeprecated", 2, "FROM x\nMAINTAINER me"), ("UndefinedArgInFrom", 1, "FROM x:$TAG"), ("UndefinedArgInFrom", 2, "ARG TAG=1\nFROM x:$TAGG"), ("InvalidDefaultArgInFrom", 2, "ARG TAG\nFROM x:$TAG"),
    ("UndefinedVar", 2, "FROM x\nCOPY $NO /x"), ("UndefinedVar", 2, "FROM x\nENV A=$B"), ("UndefinedVar", 2, "FROM x\nENV A=1 B=$A"), ("UndefinedVar", 2, "FROM x\nRUN --mount=type=cache,target=$NO make"), ("UndefinedVar", 2, "FROM x\nCOPY <<E /x\n$NO\nE"), ("UndefinedVar", 2, "FROM x\nARG A=$B"), ("UndefinedVar", 2, "FROM scratch\nUSER $WHO"),
    ("LegacyKeyValueFormat", 2, "FROM x\nENV A 1"), ("LegacyKeyValueFormat", 2, "FROM x\nLABEL a 1"), ("JSONArgsRecommended", 2, "FROM x\nCMD a"), ("JSONArgsRecommended", 2, "FROM x\nENTRYPOINT a b"), ("MultipleInstructionsDisallowed", 2, 'FROM x\nCMD ["a"]\nCMD ["b"]'), ("MultipleInstructionsDisallowed", 2, "FROM x\nHEALTHCHECK NONE\nHEALTHCHECK CMD a"),
    ("WorkdirRelativePath", 2, "FROM x\nWORKDIR src"), ("ExposeProtoCasing", 2, "FROM x\nEXPOSE 80/TCP"), ("ExposeInvalidFormat", 2, "FROM x\nEXPOSE 80:80"), ("SecretsUsedInArgOrEnv", 2, "FROM x\nARG GITHUB_TOKEN"), ("SecretsUsedInArgOrEnv", 2, "FROM x\nENV DB_PASSWORD=x"), ("SecretsUsedInArgOrEnv", 2, "FROM x\nENV AUTH=x"),
    ("RedundantTargetPlatform", 1, "FROM --platform=$TARGETPLATFORM x"), ("FromPlatformFlagConstDisallowed", 1, "FROM --platform=linux/arm64 x AS y"), ("InvalidDefinitionDescription", 3, "# check=experimental=all\n# something else\nARG A\nFROM x"),
]


@pytest.mark.parametrize(("rule", "line", "text"), RULES)
def test_a_rule_finds_its_mistake(rule, line, text):
    assert (rule, line) in found(text)


@pytest.mark.parametrize(("rule", "line", "text"), [each for each in RULES if "check=" not in each[2]])
def test_a_rule_can_be_turned_off_for_the_file(rule, line, text):
    assert rule not in dict(found(f"# check=skip={rule}\n{text}"))
    assert rule not in dict(found(f"# check=skip=all\n{text}"))
    assert (rule, line + 1) in found(f"# check=skip=Another\n{text}")


def test_a_rule_can_be_turned_off_for_an_instruction():
    text = "FROM x\n# check=skip=JSONArgsRecommended\nCMD a\nENTRYPOINT b\n"
    assert found(text) == [("JSONArgsRecommended", 4)]


@pytest.mark.parametrize("text", [
    "ARG TAG=1\nFROM x:$TAG AS build\nARG TAG\nRUN echo $UNDEFINED_FOR_THE_SHELL\nENV A=$TAG\nCOPY $A /x\nCMD [\"a\"]\n", "from x as y\nrun a\ncmd [\"b\"]\n", "FROM x\nENV A=$FROM_BASE B=$PATH\n", "FROM x\nSHELL [\"/bin/bash\", \"-c\"]\nCMD a\n",
    "FROM x\nWORKDIR /a\nWORKDIR b\n", "FROM x AS a\nWORKDIR /a\nFROM a\nWORKDIR b\n", "FROM x\nENV PUBLIC_KEY=1 KEY_FILE=/k KEYBOARD=de MONKEY=1 TOKEN_VERSION=2\n", "FROM --platform=$BUILDPLATFORM x\n", "FROM --platform=linux/arm64 x AS build-arm64\n", "FROM unknown\nCOPY $FROM_WHEREVER /x\n",
    "FROM x\nARG A\nENV B=$A\n", "FROM x\nEXPOSE 80-90/udp $PORT\n", "FROM x\nRUN a \\\n# c\n b\n", "FROM x\nCMD [\"a\"]\nFROM x\nCMD [\"a\"]\n", "# any comment\nARG A=1\nFROM x\n", "FROM x\nRUN <<EOF\n\nmake \\\n\nEOF\n",
])
def test_what_is_right_is_not_found(text):
    assert found(text) == []


def test_files_that_are_ignored():
    ignored = language.ignore.compile(["*.md", "secret"])
    text = "FROM x AS y\nCOPY README.md a.txt /\nADD ./secret/key /\nCOPY --from=z x.md /\nCOPY . /\nADD https://x/y.md /\n"
    assert found(text, ignored=ignored) == [("CopyIgnoredFile", 2), ("CopyIgnoredFile", 3)]
    assert found(text, ignored=language.ignore.compile(["*.md", "!README.md"])) == []


def test_a_base_that_only_an_argument_names():
    assert found("ARG BASE\nFROM $BASE", build_args={"BASE": "x"}) == [("InvalidDefaultArgInFrom", 2)]


def test_only_the_stages_of_a_target_are_evaluated():
    text = 'FROM x AS a\nCMD a\nFROM x AS b\nCMD b\n'
    assert found(text) == [("JSONArgsRecommended", 2), ("JSONArgsRecommended", 4)]
    assert found(text, target="a") == [("JSONArgsRecommended", 2)]


def test_a_finding_shows_the_place_and_names_what_is_meant():
    (finding,) = language.check(language.parse(b"FROM x\nCOPY $PAHT /x\n"), environments=KNOWN)
    assert finding.shown() == (
        "Dockerfile:2:7: UndefinedVar: $PAHT is not defined: did you mean PATH?\n  1 | FROM x\n> 2 | COPY $PAHT /x\n    |       ^")
    assert finding.url == "https://docs.docker.com/go/dockerfile/rule/undefined-var/"
    assert finding.description


def test_every_rule_has_an_address():
    parsed = language.parse(b"FROM x\n")
    urls = {rule: language.Finding(rule, "", parsed.text.source, parsed.blocks[0].start.location).url.rsplit("/", 2)[1] for rule in ("JSONArgsRecommended", "SecretsUsedInArgOrEnv", "FromPlatformFlagConstDisallowed")}
    assert list(urls.values()) == ["json-args-recommended", "secrets-used-in-arg-or-env", "from-platform-flag-const-disallowed"]


@pytest.mark.parametrize("option", ["bogus=1", "skip", "error=maybe", "x"])
def test_a_wrong_directive_is_an_error_with_its_line(option):
    with pytest.raises(DockerfileError, match=r"line 2: invalid check option"):
        language.options(language.parse(f"# syntax=x\n# check={option}\nFROM x\n".encode()))
