"""JSON text: strict in, like Go out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boxship.kit.errors import InvalidArgument
from boxship.oci import text

SRC = Path(__file__).parents[3] / "src"

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
    max_leaves=20,
)


@given(values)
def test_what_is_written_reads_back(value: object) -> None:
    assert text.loads(text.dumps(value).encode(), "x") == value
    assert text.loads(text.dumps(value, indent="\t").encode(), "x") == value


@given(values)
def test_written_text_is_json_for_others_too(value: object) -> None:
    assert json.loads(text.dumps(value)) == value
    assert json.loads(text.dumps(value, indent=2)) == value


@given(st.text(st.sampled_from(list('{}[]",:\\ue10-+.tfn \n\x00NaI')), max_size=30))
def test_no_text_makes_anything_but_a_value_or_the_error(data: str) -> None:
    try:
        text.loads(data, "x")
    except InvalidArgument as error:
        assert str(error).startswith("x: ")


@given(st.binary(max_size=30))
def test_no_bytes_make_anything_but_a_value_or_the_error(data: bytes) -> None:
    try:
        text.loads(data, "x")
    except InvalidArgument as error:
        assert str(error).startswith("x: ")


@given(st.text(st.sampled_from(list('{}[]",:\\e10-+.tfn ua')), max_size=20))
def test_what_json_refuses_is_refused(data: str) -> None:
    try:
        json.loads(data)
    except ValueError:
        with pytest.raises(InvalidArgument):
            text.loads(data, "x")


@pytest.mark.parametrize(
    ("data", "where", "words"),
    [
        (b"", "line 1, column 1", "unexpected end of JSON input"),
        (b" \n ", "line 2, column 2", "unexpected end of JSON input"),
        (b"{", "line 1, column 2", "unexpected end of JSON input"),
        (b'{"a": 1', "line 1, column 8", "unexpected end of JSON input"),
        (b'{"a"\n:\nx}', "line 3, column 1", "a value is expected"),
        (b"[1,]", "line 1, column 4", "a value is expected"),
        (b"{'a': 1}", "line 1, column 2", "expecting property name enclosed in double quotes"),
        (b'{"a": 1}\n\n{}', "line 3, column 1", "data after the end of the value"),
        (b'{"a": 1}\0', "line 1, column 9", "data after the end of the value"),
        (b'{"a": "b\0"}', "line 1, column 9", "invalid control character"),
        (b'["\n"]', "line 1, column 3", "invalid control character"),
        (b'\n["\xff"]', "line 2, column 3", "not UTF-8"),
        (b'["\xed\xa0\x80"]', "line 1, column 3", "not UTF-8"),
        (b"\xef\xbb\xbf{}", "line 1, column 1", "a value is expected"),
        (b'["NaN", "\\\\", "\\"", \nNaN]', "line 2, column 1", "NaN is not a number in JSON"),
        (b'{"a": -Infinity}', "line 1, column 7", "-Infinity is not a number in JSON"),
        (b'["1e999", 1e999]', "line 1, column 11", "1e999 is not a number in JSON"),
        (b"[1,\n" + b"9" * 5000 + b"]", "line 2, column 1", "a number with too many digits"),
    ],
)
def test_error_says_where_and_why(data: bytes, where: str, words: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        text.loads(data, "config.json")
    assert str(caught.value).startswith(f"config.json: {where}: {words}")


def test_hundred_levels_are_read_and_one_more_is_not() -> None:
    assert text.loads("[" * 100 + "]" * 100, "x")
    for opening, closing in (("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")):
        count = 101 // (opening.count("[") + opening.count("{")) + 1
        with pytest.raises(InvalidArgument, match="nested more than 100 levels deep"):
            text.loads(opening * count + "1" + closing * count, "x")


def test_many_shallow_values_are_not_deep() -> None:
    assert len(text.loads("[" + ",".join(["{}"] * 10_000) + "]", "x")) == 10_000  # type: ignore[arg-type]


@pytest.mark.parametrize("data", [b"[" * 5_000_000, b'{"a":' * 1_000_000, b"[" * 500 + b"]" * 500])
def test_bottomless_nesting_is_refused_cleanly(data: bytes) -> None:
    with pytest.raises(InvalidArgument, match="nested more than 100 levels deep"):
        text.loads(data, "x")


@pytest.mark.parametrize(
    "data",
    [b'{"a": "' + b"x" * 100_000_000 + b'"}', b" " * 100_000_000 + b"{}", b"{}" + b"\n" * 100_000_000],
    ids=["string", "space before", "space after"],
)
def test_hundred_megabytes_are_only_large(data: bytes) -> None:
    assert isinstance(text.loads(data, "x"), dict)


def test_surrogates_become_what_the_kernel_can_take() -> None:
    assert text.loads(rb'["\ud800", "\uDC80x", "\ud83d\ude00"]', "x") == ["\ufffd", "\ufffdx", "\U0001f600"]
    assert text.loads(rb'{"\ud800": {"a": "\udfff"}}', "x") == {"\ufffd": {"a": "\ufffd"}}
    assert text.loads('["\ud800"]', "x") == ["\ufffd"]


def test_last_of_equal_names_counts() -> None:
    assert text.loads('{"a": 1, "a": 2}', "x") == {"a": 2}


def test_writes_as_go_does() -> None:
    value = {"html": "<a>&", "line": "\u2028\u2029", "e": "é", "control": "\x01\n\t\x7f", "n": None, "l": [], "o": {}}
    assert text.dumps(value) == (
        '{"html":"\\u003ca\\u003e\\u0026","line":"\\u2028\\u2029","e":"é","control":"\\u0001\\n\\t\x7f",'
        '"n":null,"l":[],"o":{}}'
    )


def test_indents_as_go_does() -> None:
    assert text.dumps({"a": [1, {"b": True}], "c": [], "d": {}}, indent="\t") == (
        '{\n\t"a": [\n\t\t1,\n\t\t{\n\t\t\t"b": true\n\t\t}\n\t],\n\t"c": [],\n\t"d": {}\n}'
    )
    assert text.dumps([1], indent=2) == "[\n  1\n]"


def test_file_name_that_is_not_unicode_can_be_written() -> None:
    assert text.dumps(["\udcff"]) == '["\ufffd"]'


def test_refuses_to_write_what_json_has_not() -> None:
    with pytest.raises(TypeError):
        text.dumps({"a": object()})
    with pytest.raises(ValueError):
        text.dumps([float("nan")])


def test_reading_imports_neither_json_nor_re() -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from boxship.oci import text;"
        "text.dumps(text.loads('{\"a\": [1.5, true]}', 'x'), indent=2);"
        "print(*{'json', 're'}.intersection(sys.modules))"
    )
    command = [sys.executable, "-I", "-S", "-c", program, str(SRC)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == ""


def test_errors_are_the_same_when_json_was_not_imported() -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from boxship.oci import text\n"
        "try: text.loads('{\"a\" 1}', 'x')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    command = [sys.executable, "-I", "-S", "-c", program, str(SRC)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    assert said == "InvalidArgument x: line 1, column 6: expecting ':' delimiter"
