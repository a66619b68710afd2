"""Quoting and number parsing as Go does them."""

from __future__ import annotations

import pytest

from boxship.kit.text import parse_uint, quoted


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", '""'), ("plain", '"plain"'), ('say "hi"', '"say \\"hi\\""'), ("a\\b", '"a\\\\b"'), ("\n\t\r", '"\\n\\t\\r"'),
        ("\x1b[31m", '"\\x1b[31m"'), ("\x7f", '"\\x7f"'), ("é\u200b", '"é\\u200b"'), ("\U000e0001", '"\\U000e0001"'),
        (b"\xff".decode("utf-8", "surrogateescape"), '"\\xff"'),
    ],
)
def test_text_is_quoted_as_go_quotes_it(text: str, expected: str) -> None:
    assert quoted(text) == expected


def test_numbers_have_an_upper_limit_and_no_sign() -> None:
    assert parse_uint("0", 32) == 0
    assert parse_uint("4294967295", 32) == 4294967295
    assert parse_uint("0" * 100 + "7", 8) == 7
    for text, why in (("", "invalid syntax"), ("+1", "invalid syntax"), ("1 ", "invalid syntax"), ("256", "value out of range")):
        with pytest.raises(ValueError, match=f'^strconv.ParseUint: parsing "{text.replace("+", "[+]")}": {why}$'):
            parse_uint(text, 8)
