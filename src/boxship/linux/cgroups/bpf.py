"""v2's device rules: a BPF program that the kernel asks before a device is opened or made.

Runs in: the runtime, with CAP_BPF or CAP_SYS_ADMIN in the initial user namespace.
Spec: bpf(2), BPF_PROG_TYPE_CGROUP_DEVICE (Linux ≥ 4.15), BPF_F_REPLACE (≥ 5.6); include/uapi/linux/bpf.h; runtime-spec 1.3.0,
config-linux.md "Allowed Device list".

The program reads the list from its end: the last rule that covers the device decides about the accesses that it names, and
what remains of the request goes on to the rule before. So the policy is exactly that of the rules carried out in order, holes
in wildcards included. Registers:

    R2 type   R3 requested access (r = 2, w = 4, m = 1)   R4 major   R5 minor   R1 scratch
"""

from __future__ import annotations

import errno
import os
from _struct import Struct

from boxship.abi import syscalls
from boxship.kit.errors import InvalidArgument, from_os_error
from boxship.linux import _sys
from boxship.linux.cgroups import files
from boxship.linux.cgroups.limits import ANY, DeviceRule

_INSTRUCTION = Struct("=BBhi")

_PROG_LOAD, _PROG_ATTACH, _PROG_DETACH, _PROG_GET_FD_BY_ID, _PROG_QUERY = 5, 8, 9, 13, 16
_PROG_TYPE_CGROUP_DEVICE = 15
_CGROUP_DEVICE = 6  # attach type
_F_ALLOW_MULTI, _F_REPLACE = 2, 4

_KINDS = {"b": 1, "c": 2}
_ACCESS = {"m": 1, "r": 2, "w": 4}
_ALL = 7

# Opcodes: class | source | operation, bpf_common.h and bpf.h.
_LDX_W, _MOV32_REG, _MOV64_IMM, _AND32_IMM, _RSH32_IMM = 0x61, 0xBC, 0xB7, 0x54, 0x74
_JNE32_IMM, _JEQ32_IMM, _EXIT = 0x56, 0x16, 0x95
_R0, _R1, _R2, _R3, _R4, _R5 = range(6)


def _op(code: int, dst: int = 0, src: int = 0, off: int = 0, imm: int = 0) -> bytes:
    # Registers are bit fields of one byte, which the compiler of the kernel lays out by byte order.
    from sys import byteorder

    registers = dst | src << 4 if byteorder == "little" else dst << 4 | src
    return _INSTRUCTION.pack(code, registers, off, imm - (1 << 32) if imm >= 1 << 31 else imm)


def _answer(allow: bool) -> bytes:
    return _op(_MOV64_IMM, _R0, imm=int(allow)) + _op(_EXIT)


def compile_rules(rules: list[DeviceRule]) -> bytes:
    """The program for a list of rules, carried out in order on "nothing is allowed".

    Raises InvalidArgument for a kind of device that is none, or a number that does not fit 32 bits.
    """
    parts = [
        _op(_LDX_W, _R2, _R1, 0), _op(_AND32_IMM, _R2, imm=0xFFFF),  # access_type, lower half
        _op(_LDX_W, _R3, _R1, 0), _op(_RSH32_IMM, _R3, imm=16),  # access_type, upper half
        _op(_LDX_W, _R4, _R1, 4), _op(_LDX_W, _R5, _R1, 8),
    ]
    default = False
    for rule in reversed(rules):
        if rule.kind == "a":
            default = rule.allow
            break  # nothing before it counts
        parts.append(_rule(rule))
    parts.append(_answer(default))
    return b"".join(parts)


def _rule(rule: DeviceRule) -> bytes:
    kind = _KINDS.get(rule.kind)
    if kind is None:
        raise InvalidArgument(f'invalid device type "{rule.kind}"')
    for name, number in (("major", rule.major), ("minor", rule.minor)):
        if number >= 1 << 32:
            raise InvalidArgument(f"invalid {name} {number}")
    access = 0
    for char in rule.access:
        access |= _ACCESS.get(char, 0)
    if rule.allow:
        # Strike out what is allowed; all of it: yes. Otherwise the rules before this one decide about the rest.
        action = [_op(_AND32_IMM, _R3, imm=_ALL & ~access), _op(_JNE32_IMM, _R3, off=2, imm=0), _answer(True)]
        if access == _ALL:
            action = [_answer(True)]
    else:
        action = [
            _op(_MOV32_REG, _R1, _R3), _op(_AND32_IMM, _R1, imm=access), _op(_JEQ32_IMM, _R1, off=2, imm=0), _answer(False),
        ]
        if access == _ALL:
            action = [_answer(False)]
    body = b"".join(action)
    # The tests stand in front, so the distance to the next rule grows while they are put there from the last to the first.
    for register, number in ((_R5, rule.minor), (_R4, rule.major), (_R2, kind)):
        if number != ANY:
            body = _op(_JNE32_IMM, register, off=len(body) // _INSTRUCTION.size, imm=number) + body
    return body


def _bpf(command: int, attributes: bytearray) -> int:
    return _sys.syscall(syscalls.BPF, command, attributes, len(attributes))


def load(program: bytes, log: bytearray | None = None) -> int:
    """BPF_PROG_LOAD: a descriptor. Raises OSError; `log` takes the verifier's complaint."""
    # struct: prog_type, insn_cnt, insns, license, log_level, log_size, log_buf.
    text = b"Apache\0"
    attributes = bytearray(
        Struct("=IIQQIIQ").pack(
            _PROG_TYPE_CGROUP_DEVICE, len(program) // _INSTRUCTION.size, _sys.address(program), _sys.address(text),
            1 if log else 0, len(log) if log else 0, _sys.address(log) if log else 0,
        )
    )
    for _ in range(30):
        try:
            return _bpf(_PROG_LOAD, attributes)
        except OSError as error:
            if error.errno != errno.EAGAIN:  # a signal came while the verifier was at work
                raise
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def attached(directory_fd: int) -> list[int]:
    """Descriptors of the device programs attached to a group; those that a security module hides are left out."""
    count = 64  # the kernel's limit for one group
    while True:
        ids = bytearray(4 * count)
        # struct: target_fd, attach_type, query_flags, attach_flags, prog_ids, prog_cnt, then what kernels from 6.17 on write
        # to whether there is room or not.
        attributes = bytearray(Struct("=IIIIQII").pack(directory_fd, _CGROUP_DEVICE, 0, 0, _sys.address(ids), count, 0))
        attributes += bytes(32)
        try:
            _bpf(_PROG_QUERY, attributes)
            break
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            count *= 2
    found = Struct("=I").unpack_from(attributes, 24)[0]
    fds = []
    for number in memoryview(ids).cast("I")[:found]:
        try:
            fds.append(_bpf(_PROG_GET_FD_BY_ID, bytearray(Struct("=I").pack(number))))
        except OSError as error:
            if not files.refused(error):
                for fd in fds:
                    os.close(fd)
                raise
    return fds


def _attach(directory_fd: int, program_fd: int, flags: int, replaced_fd: int = 0) -> None:
    _bpf(_PROG_ATTACH, bytearray(Struct("=IIIII").pack(directory_fd, program_fd, _CGROUP_DEVICE, flags, replaced_fd)))


def _detach(directory_fd: int, program_fd: int) -> None:
    _bpf(_PROG_DETACH, bytearray(Struct("=III").pack(directory_fd, program_fd, _CGROUP_DEVICE)))


def restrict_devices(path: str, rules: list[DeviceRule]) -> None:
    """Make the v2 group at `path` follow `rules`, with no moment in which neither the old nor the new ones hold.

    Raises FileError, InvalidArgument, and others of BoxshipError when bpf(2) fails.
    """
    program = compile_rules(rules)
    directory = files.open_file(path, os.O_RDONLY | os.O_DIRECTORY)
    held = [directory]
    doing = "failed to call BPF_PROG_QUERY"
    try:
        old = attached(directory)
        held += old
        doing = "failed to call BPF_PROG_LOAD"
        new = load(program)
        held.append(new)
        doing = "failed to call BPF_PROG_ATTACH"
        if len(old) == 1:
            try:
                _attach(directory, new, _F_ALLOW_MULTI | _F_REPLACE, old[0])
                return
            except OSError as error:
                if error.errno != errno.EINVAL:  # Linux before 5.6
                    raise
        # All programs of a group must agree, so for a moment old and new hold together.
        _attach(directory, new, _F_ALLOW_MULTI)
        doing = "failed to call BPF_PROG_DETACH (BPF_CGROUP_DEVICE) on old filter program"
        for fd in old:
            _detach(directory, fd)
    except OSError as error:
        if doing.endswith("LOAD"):
            doing += _complaint(program)
        raise from_os_error(OSError(error.errno, error.strerror), doing) from None
    finally:
        for fd in held:
            os.close(fd)


def _complaint(program: bytes) -> str:
    """What the verifier says about a program that it refused."""
    log = bytearray(1 << 16)
    try:
        os.close(load(program, log))
    except OSError:
        pass
    text = log.rstrip(b"\0").decode("utf-8", "replace").strip()
    return f" ({text})" if text else ""
