"""CRIU's messages, against bytes that its own protobuf library writes."""

from __future__ import annotations

import pytest

from boxship.kit.errors import BoxshipError
from boxship.linux import criu


def test_a_request_is_the_bytes_that_protobuf_writes() -> None:
    request = {
        "type": criu.DUMP,
        "opts": {
            "images_dir_fd": 5, "pid": 300, "leave_running": True, "tcp_established": False, "log_file": "dump.log",
            "ext_mnt": [{"key": "/a", "val": "/b"}], "external": ["net[1]:x", "pid[2]:y"],
        },
    }
    options = bytes.fromhex("080510ac0218012800") + b"\x52\x08dump.log" + b"\xba\x01\x08\x0a\x02/a\x12\x02/b"
    options += b"\xaa\x02\x08net[1]:x" + b"\xaa\x02\x08pid[2]:y"
    assert criu.encode(criu._REQUEST, request) == b"\x08\x01" + b"\x12" + bytes([len(options)]) + options


def test_negative_numbers_take_ten_bytes() -> None:
    assert criu.encode({"n": (1, None)}, {"n": -1}) == b"\x08" + b"\xff" * 9 + b"\x01"


def test_what_is_written_is_read_again() -> None:
    data = criu.encode({"a": (1, None), "b": (700, None), "c": (3, {"d": (1, None)})}, {"a": 1 << 40, "b": "ü", "c": {"d": 7}})
    fields = criu.decode(data)
    assert fields == {1: 1 << 40, 700: "ü".encode(), 3: b"\x08\x07"}


def test_fields_of_fixed_size_are_passed_over() -> None:
    assert criu.decode(b"\x09" + bytes(8) + b"\x15" + bytes(4) + b"\x18\x05") == {3: 5}


@pytest.mark.parametrize("data", [b"\x08", b"\x0a\x05ab", b"\x0f", b"\x08\xff", b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\x7f"])
def test_what_is_no_message_is_an_error(data: bytes) -> None:
    with pytest.raises(BoxshipError, match="unable to parse the response of criu"):
        criu.decode(data)


@pytest.mark.parametrize(
    ("fields", "version"),
    [({"major": 4, "minor": 2, "sub": 1}, 40201), ({"major": 3, "minor": 17}, 31700), ({"major": 3, "minor": 16, "git": "v3.16-1"}, 31700)],
)
def test_versions_count_as_criu_counts_them(fields: dict[str, object], version: int) -> None:
    schema = {"type": (1, None), "success": (2, None), "version": (10, {"major": (1, None), "minor": (2, None), "git": (3, None), "sub": (4, None)})}
    answer = criu.Answer(criu.encode(schema, {"type": criu.VERSION, "success": True, "version": fields}), [])
    assert answer.success and answer.version == version


def test_without_criu_the_error_is_a_shells() -> None:
    with pytest.raises(BoxshipError, match=r'^CRIU version check failed: exec: "criu": executable file not found in \$PATH$'):
        criu.version({"PATH": "/nonexistent"})
