"""Flags are read as docker reads them."""

import pytest

from boxship.cli import flags as f
from boxship.cli.verbs.start import COMMANDS

FLAGS = f.table(COMMANDS["run"].flags)


def parse(*arguments: str) -> f.Parsed:
    return f.parse(FLAGS, arguments)


def test_flags_end_at_the_first_word() -> None:
    parsed = parse("--rm", "host", "ls", "-t", "--rm=false")
    assert parsed.words == ["host", "ls", "-t", "--rm=false"]
    assert parsed.switch("rm")
    assert not parsed.switch("tty")


def test_switches_join() -> None:
    parsed = parse("-it", "host")
    assert parsed.switch("interactive")
    assert parsed.switch("tty")


@pytest.mark.parametrize("written", [["-eA=B"], ["-e", "A=B"], ["--env=A=B"], ["--env", "A=B"], ["-e=A=B"]])
def test_values_are_written_in_five_ways(written: list[str]) -> None:
    assert parse(*written, "host").list("env") == ["A=B"]


def test_a_switch_and_a_value_join() -> None:
    parsed = parse("-itv/a:/b", "host")
    assert parsed.switch("tty")
    assert parsed.list("volume") == ["/a:/b"]


def test_lists_grow_and_the_last_value_counts() -> None:
    parsed = parse("-e", "A=1", "-e", "B=2", "-w", "/a", "-w", "/b", "host")
    assert parsed.list("env") == ["A=1", "B=2"]
    assert parsed.text("workdir") == "/b"


def test_a_switch_can_be_turned_off() -> None:
    parsed = parse("--tty", "--tty=false", "host")
    assert not parsed.switch("tty")
    assert "tty" in parsed.given


def test_two_dashes_end_the_flags() -> None:
    assert parse("--", "-t", "host").words == ["-t", "host"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frob", "host"], "unknown flag: --frob"),
        (["-iZ", "host"], "unknown shorthand flag: 'Z' in -iZ"),
        (["--env"], "flag needs an argument: --env"),
        (["-e"], "flag needs an argument: 'e' in -e"),
        (["--rm=perhaps", "host"], 'invalid argument "perhaps" for "--rm" flag: strconv.ParseBool: parsing "perhaps": invalid syntax'),
    ],
)
def test_mistakes_are_named_in_dockers_words(arguments: list[str], message: str) -> None:
    with pytest.raises(f.UsageError) as caught:
        parse(*arguments)
    assert str(caught.value) == message


def test_help_names_every_flag() -> None:
    text = f.describe(FLAGS)
    assert all(f"--{flag.long}" in text for flag in FLAGS if flag.help)
    assert len({flag.short for flag in FLAGS if flag.short}) == sum(1 for flag in FLAGS if flag.short)
