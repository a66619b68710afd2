"""The filter language narrows as containerd's does."""

import pytest

from boxship.containerd.filters import labels_field, parse, parse_all
from boxship.kit.errors import InvalidArgument

OBJECT = {"name": "foo", "topic": "/tasks/exit", "empty": ""}
LABELS = {"foo": "true", "a.b/c": "1", "très": "oui"}


def field(path):
    if path[0] == "labels":
        return labels_field(LABELS, path[1:])
    return OBJECT.get(path[0]) or None


@pytest.mark.parametrize(("text", "expected"), [
    ("", True), ("name", True), ("name==foo", True), ("name==bar", False), ("name!=bar", True), ("missing", False),
    ("missing!=x", True), ("missing==x", False), ("name~=^f", True), ("name~=x", False),
    ("name==foo,labels.foo", True), ("name==foo,labels.bar", False), ('labels."a.b/c"==1', True), ('labels."très"=="oui"', True),
    ('topic=="/tasks/exit"', True), ("topic~=|^/tasks/|", True), (r'name=="f\x6f\157"', True), (" name == foo ", True),
    ("topic~=/exit$/", True), ('name=="a,b"', False), ("empty", False),
])
def test_selectors(text, expected):
    assert parse(text)(field) is expected


@pytest.mark.parametrize("text", [
    "name=", "name==", "==x", "name=~x", "name==foo,", ",", "name name", "name==|x|", 'name=="x', r'name=="\q"', "name.", "name~=(", "a/b",
])
def test_what_is_no_filter_is_refused(text):
    with pytest.raises(InvalidArgument):
        parse(text)


def test_several_filters_are_alternatives():
    assert parse_all(["name==bar", "name==foo"])(field)
    assert not parse_all(["name==bar", "name==baz"])(field)
    assert parse_all([])(field)
