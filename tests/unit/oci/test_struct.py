"""Structures whose annotations are the schema."""

from __future__ import annotations

import pytest

from boxship.kit.errors import InvalidArgument
from boxship.oci.struct import ZERO, Choice, Struct, camel_case, i32, u8, u16, u32, u64

Colour = str
CHOICES = {"Colour": Choice("no colour %q, really %s", "red", "green")}


class Leaf(Struct):
    name: str
    size: u32 = 0


class Base(Struct):
    _always = ("major",)
    major: u8 = 0


class Child(Base):
    minor: u16 | None = None


class Tree(Struct):
    _wire = {"leaf_id": "leafID"}
    leaf_id: u64
    text: str = ""
    flag: bool = False
    ratio: float = 0.0
    anything: object = None
    signed: i32 = 0
    colour: Colour = ""
    needed_not: Colour | None = None
    leaf: Leaf | None = None
    zero: Base = ZERO
    names: list[str] = []
    perhaps: list[str] | None = None
    leaves: list[Leaf] = []
    colours: list[Colour] = []
    table: dict[str, Leaf] = {}
    words: dict[str, str] = {}
    grid: list[list[u8]] = []
    children: list[Child] = []


class Needy(Struct):
    colour: Colour


def refuse(obj: object, path: str = "") -> str:
    with pytest.raises(InvalidArgument) as caught:
        Tree.decode(obj, path)
    return str(caught.value)


def test_absent_fields_have_their_defaults() -> None:
    tree = Tree.decode({"leafID": 7})
    assert (tree.leaf_id, tree.text, tree.flag, tree.leaf, tree.names, tree.words, tree.perhaps, tree.extra) == (
        7, "", False, None, [], {}, None, {},
    )  # fmt: skip
    assert tree.zero == Base()


def test_defaults_are_fresh_for_each_object() -> None:
    one, other = Tree.decode({"leafID": 1}), Tree.decode({"leafID": 1})
    one.names.append("x")
    one.words["a"] = "b"
    one.zero.major = 3
    one.extra["z"] = 1
    assert (other.names, other.words, other.zero.major, other.extra) == ([], {}, 0, {})
    assert Tree(leaf_id=1).names == []


def test_decoded_object_shares_no_list_with_the_text() -> None:
    obj: dict[str, object] = {"leafID": 1, "names": ["a"], "words": {"a": "b"}, "leaves": [{"name": "l"}]}
    tree = Tree.decode(obj)
    tree.names.append("b")
    tree.words["c"] = "d"
    tree.leaves.clear()
    assert obj == {"leafID": 1, "names": ["a"], "words": {"a": "b"}, "leaves": [{"name": "l"}]}


def test_null_is_absent() -> None:
    tree = Tree.decode({"leafID": 1, "names": None, "text": None, "leaf": None, "words": None})
    assert (tree.names, tree.text, tree.leaf, tree.words) == ([], "", None, {})
    assert refuse({"leafID": None}) == "leafID: is required"


def test_a_name_in_another_case_fits_when_no_exact_one_does_and_unknown_ones_are_kept() -> None:
    tree = Tree.decode({"LEAFID": 1, "Text": "x", "new": {"deep": [1]}})
    assert tree.text == "x"
    assert tree.extra == {"new": {"deep": [1]}}
    assert tree.encode() == {"leafID": 1, "text": "x", "zero": {"major": 0}, "new": {"deep": [1]}}


def test_encode_gives_back_what_was_decoded() -> None:
    obj = {
        "leafID": 2**64 - 1, "text": "t", "flag": True, "ratio": 0.5, "anything": {"a": [None]}, "signed": -5,
        "colour": "red", "leaf": {"name": "l", "size": 9, "other": 1}, "zero": {"major": 1}, "names": ["a", "b"], "perhaps": [],
        "leaves": [{"name": "x"}, {"name": "y", "size": 1}], "colours": ["red", "green"],
        "table": {"k": {"name": "v"}}, "words": {"a": "b"}, "grid": [[1], [], [2, 3]],
        "children": [{"major": 1}, {"major": 0, "minor": 2}],
    }  # fmt: skip
    tree = Tree.decode(obj)
    assert tree.encode() == obj
    assert list(tree.encode()) == list(obj)
    assert Tree.decode(tree.encode()) == tree


def test_fields_at_their_defaults_are_not_written_unless_always() -> None:
    tree = Tree.decode({"leafID": 0, "text": "", "names": [], "flag": False, "words": {}, "children": [{}]})
    assert tree.encode() == {"leafID": 0, "zero": {"major": 0}, "children": [{"major": 0}]}


def test_inherited_fields_come_first() -> None:
    assert list(Child(minor=1).encode()) == ["major", "minor"]
    assert Child.decode({"major": 255, "minor": 65535}).minor == 65535
    with pytest.raises(InvalidArgument, match=r"^minor: expected an integer from 0 to 65535, got 65536$"):
        Child.decode({"minor": 65536})


@pytest.mark.parametrize(
    ("obj", "error"),
    [
        ([], "expected an object, got a list"),
        ({}, "leafID: is required"),
        ({"leafID": "abc"}, 'leafID: expected an integer from 0 to 18446744073709551615, got "abc"'),
        ({"leafID": -1}, "leafID: expected an integer from 0 to 18446744073709551615, got -1"),
        ({"leafID": 2**64}, f"leafID: expected an integer from 0 to 18446744073709551615, got {2**64}"),
        ({"leafID": 10**300}, "leafID: expected an integer from 0 to 18446744073709551615, got a number of more than 128 bits"),
        ({"leafID": True}, "leafID: expected an integer from 0 to 18446744073709551615, got true"),
        ({"leafID": 1.0}, "leafID: expected an integer from 0 to 18446744073709551615, got 1.0"),
        ({"leafID": 1, "signed": -(2**31) - 1}, "signed: expected an integer from -2147483648 to 2147483647, got -2147483649"),
        ({"leafID": 1, "text": 5}, "text: expected a string, got 5"),
        ({"leafID": 1, "text": "a\0b"}, "text: string contains null byte"),
        ({"leafID": 1, "flag": 1}, "flag: expected true or false, got 1"),
        ({"leafID": 1, "ratio": "1"}, 'ratio: expected a number, got "1"'),
        ({"leafID": 1, "names": "a"}, 'names: expected a list, got "a"'),
        ({"leafID": 1, "names": ["a", None]}, "names[1]: expected a string, got null"),
        ({"leafID": 1, "names": ["a", "\0"]}, "names[1]: string contains null byte"),
        ({"leafID": 1, "leaves": {}}, "leaves: expected a list, got an object"),
        ({"leafID": 1, "leaves": [{"name": "a"}, {"name": []}]}, "leaves[1].name: expected a string, got a list"),
        ({"leafID": 1, "leaves": [{}]}, "leaves[0].name: is required"),
        ({"leafID": 1, "leaf": {"name": "", "size": -2}}, "leaf.size: expected an integer from 0 to 4294967295, got -2"),
        ({"leafID": 1, "words": []}, "words: expected an object, got a list"),
        ({"leafID": 1, "words": {"key": 1}}, "words.key: expected a string, got 1"),
        ({"leafID": 1, "words": {"a.b": 1}}, 'words["a.b"]: expected a string, got 1'),
        ({"leafID": 1, "words": {"a\0": "x"}}, 'words["a\\u0000"]: string contains null byte'),
        ({"leafID": 1, "table": {"k": {"size": ""}}}, 'table.k.size: expected an integer from 0 to 4294967295, got ""'),
        ({"leafID": 1, "grid": [[1], [2, 256]]}, "grid[1][1]: expected an integer from 0 to 255, got 256"),
        ({"leafID": 1, "colour": "blue"}, 'colour: no colour "blue", really blue (one of green, red)'),
        ({"leafID": 1, "colour": 3}, "colour: expected a string, got 3"),
        ({"leafID": 1, "neededNot": "x"}, 'neededNot: no colour "x", really x (one of green, red)'),
        ({"leafID": 1, "colours": ["red", ""]}, 'colours[1]: no colour "", really  (one of green, red)'),
        ({"leafID": 1, "text": ["x" * 500]}, "text: expected a string, got a list"),
    ],
)  # fmt: skip
def test_error_names_path_and_rule(obj: object, error: str) -> None:
    assert refuse(obj) == error


def test_path_of_the_object_itself_is_put_in_front() -> None:
    assert refuse({"leafID": 1, "names": [1]}, "top[3]") == "top[3].names[0]: expected a string, got 1"
    assert refuse([], "top") == "top: expected an object, got a list"


def test_long_values_are_shortened_in_errors() -> None:
    assert len(refuse({"leafID": "x" * 1_000_000})) < 200
    assert len(refuse({"leafID": 1, "colour": "x" * 1_000_000})) < 300


def test_required_choice_says_what_can_be_chosen() -> None:
    with pytest.raises(InvalidArgument, match=r'^colour: no colour "", really  \(one of green, red\)$'):
        Needy.decode({})


def test_made_by_hand_as_a_dataclass_is() -> None:
    leaf = Leaf(name="x", size=3)
    assert (leaf.name, leaf.size, leaf.extra) == ("x", 3, {})
    assert leaf == Leaf.decode({"name": "x", "size": 3})
    assert leaf != Leaf(name="x")
    assert leaf != "x"
    with pytest.raises(TypeError, match="name"):
        Leaf(size=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="colour"):
        Leaf(name="x", colour="red")  # type: ignore[call-arg]


def test_repr_shows_the_json() -> None:
    assert repr(Leaf(name="x")) == 'Leaf({"name":"x"})'


def test_camel_case() -> None:
    assert [camel_case(name) for name in ("uid", "class_", "rootfs_propagation", "l3_cache_schema")] == [
        "uid", "class", "rootfsPropagation", "l3CacheSchema",
    ]  # fmt: skip
