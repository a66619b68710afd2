"""Devices: lists of rules, and the v2 program that stands for one."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boxship.kit.errors import InvalidArgument
from boxship.linux.cgroups import DeviceRule
from boxship.linux.cgroups.bpf import compile_rules
from boxship.linux.cgroups.devices import parse_list, reduce_rules, transition


def rule(text: str) -> DeviceRule:
    """ "+c 1:3 rw" allows, "-c 1:3 rw" denies."""
    kind, numbers, access = text[1:].split(" ")
    major, minor = (-1 if number == "*" else int(number) for number in numbers.split(":"))
    return DeviceRule(text[0] == "+", kind, major, minor, access)


def texts(rules: list[DeviceRule]) -> list[str]:
    return [("+" if r.allow else "-") + str(r) for r in rules]


def test_without_rules_nothing_is_allowed() -> None:
    assert texts(transition(None, reduce_rules([]))) == ["-a *:* rwm"]


def test_the_order_of_rules_is_kept() -> None:
    rules = [rule(r) for r in ("-a *:* rwm", "+c 10:229 rwm", "+b 8:20 rw", "+b 10:200 r", "+c 1:3 rwm")]
    assert texts(transition(None, reduce_rules(rules))) == texts(rules)


def test_rules_for_one_device_are_merged() -> None:
    policy = reduce_rules([rule("+c 1:3 r"), rule("+c 1:3 w"), rule("-c 1:3 r")])
    assert policy.exceptions == {("c", 1, 3): 2}


def test_allow_all_forgets_what_was_before() -> None:
    policy = reduce_rules([rule("+c 1:3 r"), rule("+a *:* rwm"), rule("-c 1:5 rw")])
    assert policy.allow
    assert texts(transition(None, policy)) == ["+a *:* rwm", "-c 1:5 rw"]


def test_unknown_letters_of_access_mean_nothing() -> None:
    assert reduce_rules([rule("+c 1:3 rwa")]).exceptions == {("c", 1, 3): 3}
    assert reduce_rules([rule("-c 1:3 rwa")]).exceptions == {}


def test_a_hole_in_a_wildcard_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="cannot punch hole in existing wildcard rule"):
        reduce_rules([rule("+c *:* rwm"), rule("-c 1:3 w")])
    reduce_rules([rule("+c *:* m"), rule("-c 1:3 w")])


def test_a_fifo_cannot_be_ruled() -> None:
    with pytest.raises(InvalidArgument, match="non-cgroup type"):
        reduce_rules([DeviceRule(True, "p")])


def test_a_transition_writes_only_what_differs() -> None:
    now = parse_list("c 1:3 rwm\nc 1:5 rwm\nb 8:* r\n")
    target = reduce_rules([rule("+c 1:3 rw"), rule("+c 1:5 rwm"), rule("+c 7:7 r")])
    assert texts(transition(now, target)) == ["-c 1:3 m", "-b 8:* r", "+c 7:7 r"]
    assert transition(now, parse_list("c 1:3 rwm\nc 1:5 rwm\nb 8:* r\n")) == []


def test_from_allow_all_there_is_no_gentle_way() -> None:
    assert texts(transition(parse_list("a *:* rwm\n"), reduce_rules([rule("+c 1:3 rw")]))) == ["-a *:* rwm", "+c 1:3 rw"]


# --- the program -----------------------------------------------------------------------------------------------------

KIND = {"b": 1, "c": 2}
BIT = {"m": 1, "r": 2, "w": 4}


def run(program: bytes, kind: str, major: int, minor: int, access: str) -> bool:
    """Interpret the few instructions that the compiler emits."""
    from struct import iter_unpack

    code = list(iter_unpack("=BBhi", program))
    context = {0: KIND[kind] | sum(BIT[char] for char in access) << 16, 4: major, 8: minor}
    registers = [0] * 10
    at = 0
    while True:
        op, packed, off, imm = code[at]
        dst, src = packed & 15, packed >> 4
        at += 1
        imm &= 0xFFFFFFFF
        if op == 0x61:
            registers[dst] = context[off]
        elif op == 0x54:
            registers[dst] &= imm
        elif op == 0x74:
            registers[dst] >>= imm
        elif op == 0xBC:
            registers[dst] = registers[src]
        elif op == 0xB7:
            registers[dst] = imm
        elif op == 0x56:
            at += off if registers[dst] != imm else 0
        elif op == 0x16:
            at += off if registers[dst] == imm else 0
        elif op == 0x95:
            return bool(registers[0])
        else:
            raise AssertionError(hex(op))


def meaning(rules: list[DeviceRule], kind: str, major: int, minor: int, access: str) -> bool:
    """The specification: for each letter the last rule that covers it decides."""
    for letter in access:
        allowed = False
        for r in rules:
            covers = r.kind == "a" or (
                r.kind == kind and r.major in (-1, major) and r.minor in (-1, minor) and letter in r.access
            )
            if covers:
                allowed = r.allow
        if not allowed:
            return False
    return True


RULES = st.lists(
    st.builds(
        DeviceRule, st.booleans(), st.sampled_from("abcc"), st.sampled_from([-1, 1, 0xFFFFFFFF]), st.sampled_from([-1, 3, 5]),
        st.sampled_from(["r", "w", "m", "rw", "rwm", "wm"]),
    ),
    max_size=6,
)


@given(RULES)
def test_the_program_carries_out_the_rules_in_order(rules: list[DeviceRule]) -> None:
    program = compile_rules(rules)
    for kind, major, minor, access in product("bc", (1, 2, 0xFFFFFFFF), (3, 5, 9), ("r", "w", "m", "rw", "rwm")):
        expected = meaning(rules, kind, major, minor, access)
        assert run(program, kind, major, minor, access) == expected, (texts(rules), kind, major, minor, access)


def test_the_program_may_have_holes_in_wildcards() -> None:
    program = compile_rules([rule("+c *:* rwm"), rule("-c 1:3 w")])
    assert run(program, "c", 1, 3, "r")
    assert not run(program, "c", 1, 3, "rw")
    assert run(program, "c", 1, 4, "rw")


def test_numbers_must_fit() -> None:
    with pytest.raises(InvalidArgument, match="invalid minor 4294967296"):
        compile_rules([DeviceRule(True, "c", 1, 1 << 32)])
