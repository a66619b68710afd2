"""A machine for classic BPF, so that tests can ask a seccomp filter for its verdict without loading it."""

from __future__ import annotations

from functools import cache
from struct import Struct, unpack_from

INSTRUCTION = Struct("=HBBI")
X86_64, X32, I386 = 0xC000003E, 0x4000003E, 0x40000003

_COMPARE = {
    0x10: lambda a, k: a == k,
    0x20: lambda a, k: a > k,
    0x30: lambda a, k: a >= k,
    0x40: lambda a, k: bool(a & k),
}
_ALU = {0x50: lambda a, k: a & k, 0x40: lambda a, k: a | k, 0x00: lambda a, k: (a + k) & 0xFFFFFFFF}


@cache
def _decoded(program: bytes) -> list[tuple[int, int, int, int]]:
    assert len(program) % 8 == 0, "not whole instructions"
    code = [INSTRUCTION.unpack_from(program, i) for i in range(0, len(program), 8)]
    assert 0 < len(code) <= 4096, f"the kernel takes 1 to 4096 instructions, this is {len(code)}"
    return code


def verdict(program: bytes, nr: int, args: tuple[int, ...] = (), arch: int = X86_64) -> int:
    """What the kernel would be told for system call `nr`; x32 calls carry bit 30."""
    data = Struct("=iIQ6Q").pack(nr, arch, 0, *args, *([0] * (6 - len(args))))
    code = _decoded(program)
    accumulator, memory, at = 0, [0] * 16, 0
    while True:
        op, jt, jf, k = code[at]
        at += 1
        kind = op & 0x07
        if op == 0x20:
            (accumulator,) = unpack_from("=I", data, k)
        elif op == 0x60:
            accumulator = memory[k]
        elif op == 0x02:
            memory[k] = accumulator
        elif op == 0x05:
            at += k
        elif kind == 0x05:
            at += jt if _COMPARE[op & 0xF0](accumulator, k) else jf
        elif kind == 0x04 and not op & 0x08:
            accumulator = _ALU[op & 0xF0](accumulator, k)
        elif op == 0x06:
            return k
        else:
            raise AssertionError(f"instruction {op:#x} is not expected in a filter")
