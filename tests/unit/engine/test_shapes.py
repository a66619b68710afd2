"""Bodies of requests: kinds, defaults, Go's words about what is wrong."""

from __future__ import annotations

import pytest

from boxship.engine import shapes
from boxship.kit.errors import InvalidArgument


def test_what_is_missing_has_its_zero_value_and_what_is_unknown_is_left_out() -> None:
    made = shapes.shape({"Image": "x", "Nonsense": 1, "tty": True}, shapes.CONTAINER_CONFIG, "Config")
    assert made["Image"] == "x"
    assert made["Tty"] is True
    assert made["Env"] is None
    assert "Nonsense" not in made
    assert list(made) == list(shapes.CONTAINER_CONFIG)


def test_a_command_can_be_one_word() -> None:
    assert shapes.shape({"Cmd": "true"}, shapes.CONTAINER_CONFIG, "Config")["Cmd"] == ["true"]


@pytest.mark.parametrize(("body", "words"), [
    ({"Tty": "yes"}, "cannot unmarshal string into Go struct field Config.Tty of type bool"),
    ({"Env": {"A": "b"}}, "cannot unmarshal object into Go struct field Config.Env of type []string"),
    ({"Env": [1]}, "cannot unmarshal number into Go struct field Config.Env of type string"),
    ({"Labels": [1]}, "cannot unmarshal array into Go struct field Config.Labels"),
    ({"StopTimeout": 1.5}, "cannot unmarshal number into Go struct field Config.StopTimeout of type int64"),
    ({"Healthcheck": {"Retries": True}}, "cannot unmarshal bool into Go struct field Config.Healthcheck.Retries of type int64"),
    ([], "cannot unmarshal array"),
])
def test_wrong_kinds_are_named(body: object, words: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        shapes.shape(body, shapes.CONTAINER_CONFIG, "Config")
    assert words in str(caught.value)


def test_numbers_beyond_64_bits_are_refused() -> None:
    with pytest.raises(InvalidArgument):
        shapes.shape({"Memory": 1 << 70}, shapes.HOST_CONFIG, "HostConfig")


@pytest.mark.parametrize("text", [b"{", b"", b"nul", b"[" * 100000])
def test_what_is_no_json_is_refused(text: bytes) -> None:
    with pytest.raises(InvalidArgument, match="invalid JSON"):
        shapes.parse(text)
