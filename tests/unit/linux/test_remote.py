"""Programs for init: how operations and data lie in memory, which src/native/init.c reads."""

from __future__ import annotations

import resource
import sys
from struct import Struct, unpack_from

import pytest

from boxship.linux.remote import BASE, CTL, NEXT, Label, Program, Reg, received

OP = Struct("=IHHIIqQQQQQQ")
END, SET, EXPECT = 0x10000, 0x10005, 0x10004


def operations(program: Program) -> list[tuple[int, ...]]:
    """(nr, dst, regs, on_ok, on_err, result, arguments …) of each, as they lie in the image."""
    image = program.image()
    return [OP.unpack_from(image, i * OP.size) for i in range(len(program))]


def data(program: Program, address: int) -> bytes:
    """The string that an address leads to."""
    image = program.image()
    return image[address - BASE : image.index(b"\0", address - BASE)]


def test_numbers_registers_strings_and_buffers_are_arguments() -> None:
    p = Program()
    fd = p.new()
    assert p.call(7, -1, 1 << 63, fd, None, "/etc", b"\1\2\3\0", dst=fd, what="try") == 0
    (nr, dst, regs, on_ok, on_err, result, *arguments), = operations(p)
    assert (nr, dst, regs, on_ok, on_err, result) == (7, fd.number, 1 << 2, 0, 0, 0)
    assert arguments[:4] == [(1 << 64) - 1, 1 << 63, fd.number, 0]
    assert data(p, arguments[4]) == b"/etc"
    assert data(p, arguments[5]) == b"\1\2\3" and arguments[5] % 8 == 0


def test_a_string_is_there_once() -> None:
    p = Program()
    p.call(1, "same", "other")
    p.call(2, "same")
    first, second = operations(p)
    assert first[6] == second[6] != first[7]
    assert p.image().count(b"same\0") == 1


def test_names_that_are_not_unicode_reach_the_kernel_as_they_are() -> None:
    p = Program()
    p.call(1, "caf\udce9")
    assert data(p, operations(p)[0][6]) == b"caf\xe9"


def test_a_nul_in_a_string_is_refused() -> None:
    with pytest.raises(ValueError, match="NUL byte"):
        Program().call(1, "a\0b")


def test_labels_lead_forwards_and_backwards_on_success_and_on_failure() -> None:
    p = Program()
    good, bad, again = Label(), Label(), Label()
    p.mark(again)
    p.call(1, on_ok=good, on_err=bad)
    p.call(2, on_err=NEXT)
    p.mark(bad)
    p.call(3, on_err=bad, on_ok=again)
    p.mark(good)
    p.end()
    found = [op[3:5] for op in operations(p)]
    assert found == [(3, 2), (0, 2), (0, 2), (0, 0)]
    assert operations(p)[3][0] == END


def test_a_label_of_another_program_is_refused() -> None:
    one, other, label = Program(), Program(), Label()
    one.call(1, on_ok=label)
    with pytest.raises(ValueError, match="another program's"):
        other.mark(label)


def test_pointers_go_to_arguments_and_into_data() -> None:
    p = Program()
    target = p.place(b"target\0")
    holder = p.place(bytes(16))
    index = p.call(1, 0, 5)
    p.point(index, 0, holder)
    p.embed(holder + 8, target)
    image, op = p.image(), operations(p)[0]
    assert op[6] == BASE + p.data_base + holder and op[7] == 5
    assert data(p, unpack_from("=Q", image, op[6] - BASE + 8)[0]) == b"target"
    # Again: the data has moved behind one more operation.
    p.end()
    image, op = p.image(), operations(p)[0]
    assert op[6] == BASE + p.data_base + holder
    assert data(p, unpack_from("=Q", image, op[6] - BASE + 8)[0]) == b"target"


def test_a_description_has_its_context_in_front_and_keeps_its_mark() -> None:
    p = Program()
    p.context = "error mounting: "
    for what in ("open", "!no such thing", "@12@ended with", ""):
        p.call(1, what=what)
    p.context = ""
    p.call(1, what="open")
    assert p.descriptions == ["error mounting: open", "!error mounting: no such thing", "@12@error mounting: ended with", "", "open"]
    assert p.what(1) == p.descriptions[1]


def test_registers_come_again_only_after_a_long_time_and_never_those_received_or_kept() -> None:
    p = Program()
    numbers = [p.new().number for _ in range(200)]
    assert numbers[:62] == list(range(2, 64))
    assert set(numbers[62:]) == set(range(32, 64))
    assert received(0).number == 64 and p.keep().number >= 400 and CTL.number == 1


def test_a_failed_operation_can_be_asked_for() -> None:
    p = Program()
    absent = Label()
    tried = p.call(1, on_err=NEXT)
    p.if_failed(tried, 2, absent)
    p.end()
    p.mark(absent)
    p.end()
    op = operations(p)[1]
    assert op[0] == EXPECT and op[3:5] == (3, 2)
    assert op[6:11] == (BASE + tried * OP.size + 16, 0xFFFFFFFF, -2 & 0xFFFFFFFF, 0, 2)


@pytest.mark.parametrize(
    "mistake",
    [
        lambda p: p.call(), lambda p: p.call(1, 2, 3, 4, 5, 6, 7, 8), lambda p: p.call("1"), lambda p: p.call(1, "x", 1.5),
        lambda p: p.call(1, dst=5), lambda p: p.call(1, on_ok=5), lambda p: p.call(1, "x", on_err="x"), lambda p: p.call(1, what=b"x"),
        lambda p: p.call(1, other=1), lambda p: p.place("text"), lambda p: p.place(b"", 0), lambda p: p.point(0, 0, 0),
        lambda p: p.embed(0, 0), lambda p: p.mark(5), lambda p: Label(1), lambda p: Reg("x"), lambda p: p.call(-1),
    ],
)
def test_mistakes_are_exceptions_and_leave_the_program_usable(mistake: object) -> None:
    p = Program()
    with pytest.raises((TypeError, ValueError, IndexError, OverflowError)):
        mistake(p)  # type: ignore[operator]
    p.call(SET, 1)
    assert len(p) == len(p.texts) == len(p.contexts) == 1 and operations(p)[0][6] == 1


def test_programs_give_back_their_memory() -> None:
    def many() -> None:
        for _ in range(300):
            p = Program()
            label, fd = Label(), p.new()
            for i in range(100):
                p.call(i, "text", b"bytes" * 10, fd, dst=fd, what="what", on_ok=label, on_err=label)
            p.mark(label)
            p.image()

    many()
    text = "what"
    references, peak = sys.getrefcount(text), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(20):
        many()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 4096, "KiB"
    assert sys.getrefcount(text) <= references + 10
