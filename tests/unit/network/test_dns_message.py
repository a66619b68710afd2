"""DNS messages: what is no query is never more than refused, and answers fit."""

import ipaddress
import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from boxship.network.dns import message
from boxship.network.dns.message import Malformed, parse
from support.network import Reply, question

LABELS = st.lists(st.text("abcdefghijklmnopqrstuvwxyz0123456789-_", min_size=1, max_size=63), min_size=1, max_size=3)


@given(st.binary(max_size=600))
@example(b"\0" * 12)
@example(question("a.b", 1)[:-1])
@example(question("a.b", 1, edns=1232)[:-1])
def test_any_bytes_are_a_query_or_malformed(packet: bytes) -> None:
    try:
        query = parse(packet)
    except Malformed as error:
        assert error.answer == b"" or (error.answer[:2] == packet[:2] and len(error.answer) == 12 and error.answer[2] & 0x80)
    else:
        assert query.question == packet[12 : 12 + len(query.question)]
        Reply(message.answer(query)) if query.question[0] < 64 else None


@given(st.data())
def test_a_changed_query_is_a_query_or_malformed(data: st.DataObject) -> None:
    packet = bytearray(question("web.example", 28, edns=1232))
    for _ in range(data.draw(st.integers(1, 4))):
        packet[data.draw(st.integers(0, len(packet) - 1))] = data.draw(st.integers(0, 255))
    try:
        parse(bytes(packet[: data.draw(st.integers(0, len(packet)))]))
    except Malformed:
        pass


@given(LABELS, st.integers(0, 65535), st.integers(1, 255), st.integers(0, 65535))
def test_a_query_is_read_as_it_was_written(labels: list[str], number: int, kind: int, edns: int) -> None:
    query = parse(question(".".join(labels).upper(), kind, number, edns=edns))
    assert (query.id, query.name, query.kind, query.klass) == (number, ".".join(labels), kind, 1)
    assert query.edns == bool(edns)
    assert query.payload == max(512, edns)


@pytest.mark.parametrize(
    ("packet", "code"),
    [
        (question("a", 1)[:11], None),
        (b"\0\1\x81\0" + question("a", 1)[4:], None),  # an answer
        (b"\0\1\x28\0" + question("a", 1)[4:], message.NOTIMP),  # UPDATE
        (b"\0\1\1\0\0\0" + question("a", 1)[6:], message.FORMERR),
        (b"\0\1\1\0\0\2" + question("a", 1)[6:], message.FORMERR),
        (question("a", 1)[:12] + b"\xc0\x0c\0\1\0\1", message.FORMERR),  # a name that points to itself
        (question("a", 1)[:12] + b"\x3f" + b"a" * 20, message.FORMERR),
        (question(".".join(["a" * 60] * 5), 1), message.FORMERR),  # more than 255 bytes
        (question("a", 1, edns=1232) + b"", 0),
        (question("a", 1, edns=1232)[:-3], message.FORMERR),
    ],
)
def test_what_is_refused_and_how(packet: bytes, code: int | None) -> None:
    if code == 0:
        parse(packet)
        return
    with pytest.raises(Malformed) as caught:
        parse(packet)
    assert (caught.value.answer[3] & 15 if caught.value.answer else None) == code


def test_a_dot_within_a_label_makes_no_other_name() -> None:
    query = parse(struct.pack(">HHHHHH", 1, 0, 1, 0, 0, 0) + b"\x07web.net\0\0\1\0\1")
    assert query.name == ""


def test_an_answer_that_is_too_long_says_so() -> None:
    query = parse(question("many", 1, edns=600))
    records = [message.address_record(f"10.0.{each}.1", 600) for each in range(60)]
    whole, cut = Reply(message.answer(query, records)), Reply(message.answer(query, records, limit=600))
    assert (len(whole.data), whole.truncated) == (60, False)
    assert cut.truncated
    assert len(cut.packet) <= 600
    assert cut.data == whole.data[: len(cut.data)]


@given(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)))
def test_addresses_of_reverse_names(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    found = message.address_of(address.reverse_pointer)
    assert ipaddress.ip_address(found) == address


@given(st.text(max_size=80))
def test_other_names_are_of_no_address(name: str) -> None:
    assert message.address_of(f"{name}.example") == ""
    message.address_of(f"{name}.in-addr.arpa")
    message.address_of(f"{name}.ip6.arpa")


def test_only_the_answer_to_the_question_is_taken() -> None:
    query = parse(question("Web.example", 1))
    good = bytearray(question("wEB.example", 1, 99))
    good[2:4] = b"\x81\x80"
    assert message.answers(query, 99, bytes(good)) == message.NOERROR
    assert message.answers(query, 98, bytes(good)) == -1
    assert message.answers(query, 99, question("web.example", 1, 99)) == -1
    assert message.answers(query, 99, bytes(good).replace(b"example", b"exampel")) == -1
    assert message.answers(query, 99, bytes(good[:11])) == -1
    assert message.answers(query, 99, b"\0\x63\x81\x85" + bytes(8)) == message.REFUSED
    assert message.answers(query, 99, b"\0\x63\x81\x80" + bytes(8)) == -1
