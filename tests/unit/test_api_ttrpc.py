"""ttRPC's frames, as the shim has them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boxship.api.task import pb
from boxship.api.ttrpc import wire
from boxship.kit.errors import Internal, NotFound, ResourceExhausted

FRAME = st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 255), st.integers(0, 255), st.binary(max_size=60))


@given(frames=st.lists(FRAME, max_size=5), cuts=st.lists(st.integers(1, 40)))
def test_frames_come_out_as_they_went_in_however_they_are_cut(frames: list[tuple[int, int, int, bytes]], cuts: list[int]) -> None:
    data = b"".join(wire.frame(*frame) for frame in frames)
    parser = wire.Frames()
    got = []
    for cut in [*cuts, len(data)]:
        got += list(parser.feed(data[:cut]))
        data = data[cut:]
    assert got == frames


def test_a_frame_that_is_too_long_is_skipped_and_the_next_one_is_read() -> None:
    parser = wire.Frames()
    length = wire.DATA_MAX + 3
    got = list(parser.feed(wire.HEADER.pack(length, 1, wire.REQUEST, 0)))
    for start in range(0, length, 1 << 20):
        got += list(parser.feed(bytes(min(1 << 20, length - start))))
    got += list(parser.feed(wire.frame(3, wire.REQUEST, 0, b"x")))
    assert got == [(1, wire.REQUEST, 0, None), (3, wire.REQUEST, 0, b"x")]


def test_an_answer_that_is_too_long_becomes_an_error() -> None:
    [(_, _, _, payload)] = list(wire.Frames().feed(wire.response(1, bytes(wire.DATA_MAX + 1))))
    with pytest.raises(ResourceExhausted):
        wire.result(payload, pb.task.StateResponse)


def test_errors_keep_their_kind_and_text() -> None:
    [(_, _, _, payload)] = list(wire.Frames().feed(wire.failure(1, NotFound("no such thing"))))
    with pytest.raises(NotFound, match="no such thing"):
        wire.result(payload, pb.task.StateResponse)


def test_what_is_no_message_is_an_error() -> None:
    with pytest.raises(Internal):
        wire.result(b"\xff\xff\xff", pb.task.StateResponse)


def test_a_request_says_whose_it_is() -> None:
    [(stream, kind, flags, payload)] = list(wire.Frames().feed(wire.request(5, "s", "M", b"p", "ns", 1.5)))
    envelope = pb.ttrpc.Request.FromString(payload or b"")
    assert (stream, kind, flags) == (5, wire.REQUEST, 0)
    assert (envelope.service, envelope.method, envelope.payload, envelope.timeout_nano) == ("s", "M", b"p", 1_500_000_000)
    assert [(pair.key, pair.value) for pair in envelope.metadata] == [("containerd-namespace-ttrpc", "ns")]
