"""Compiling seccomp profiles: verdicts of the programs, texts of the errors, the cache."""

from __future__ import annotations

import errno
import json
import os
import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boxship.kit.errors import InvalidArgument, Unsupported
from boxship.linux import seccomp
from support.bpf import I386, X86_64, verdict

pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers are x86_64's")

ALLOW, KILL_PROCESS, KILL_THREAD = 0x7FFF0000, 0x80000000, 0
TRAP, LOG, NOTIFY = 0x00030000, 0x7FFC0000, 0x7FC00000
READ, WRITE, OPEN, CLOSE, GETPID, PERSONALITY, KEXEC, OPENAT2, FCHMODAT2 = 0, 1, 2, 3, 39, 135, 246, 437, 452
PERSONALITY_I386 = 136


def ERRNO(number: int) -> int:
    return 0x00050000 | number


def TRACE(number: int) -> int:
    return 0x7FF00000 | number


def rule(names: str, action: str, **more: object) -> dict[str, object]:
    return {"names": names.split(), "action": f"SCMP_ACT_{action}", **more}


def profile(default: str, *rules: dict[str, object], **more: object) -> dict[str, object]:
    return {"defaultAction": f"SCMP_ACT_{default}", "syscalls": list(rules), **more}


def program(default: str, *rules: dict[str, object], **more: object) -> bytes:
    return seccomp.compile_filter(profile(default, *rules, **more), cache_dir=None).program


@pytest.fixture(autouse=True)
def no_memo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seccomp, "_memo", {})


@pytest.mark.parametrize(
    ("action", "more", "value"),
    [
        ("KILL", {}, KILL_THREAD), ("KILL_THREAD", {}, KILL_THREAD), ("KILL_PROCESS", {}, KILL_PROCESS),
        ("TRAP", {}, TRAP), ("LOG", {}, LOG), ("NOTIFY", {}, NOTIFY),
        ("ERRNO", {}, ERRNO(errno.EPERM)), ("ERRNO", {"errnoRet": 99}, ERRNO(99)), ("ERRNO", {"errnoRet": 0}, ERRNO(0)),
        ("TRACE", {}, TRACE(errno.EPERM)), ("TRACE", {"errnoRet": 7}, TRACE(7)),
    ],
)
def test_every_action_becomes_the_kernels_value(action: str, more: dict[str, object], value: int) -> None:
    code = program("ALLOW", rule("getpid", action, **more))
    assert verdict(code, GETPID) == value
    assert verdict(code, READ) == ALLOW


@pytest.mark.parametrize(
    ("default", "more", "value"),
    [
        ("ERRNO", {}, ERRNO(errno.EPERM)), ("ERRNO", {"defaultErrnoRet": 5}, ERRNO(5)),
        ("KILL", {}, KILL_THREAD), ("KILL_PROCESS", {}, KILL_PROCESS), ("TRAP", {}, TRAP),
    ],
)
def test_the_default_action_answers_what_is_not_listed(default: str, more: dict[str, object], value: int) -> None:
    code = program(default, rule("read openat2", "ALLOW"), **more)
    assert verdict(code, READ) == ALLOW
    assert verdict(code, GETPID) == value


@pytest.mark.parametrize(
    ("op", "value", "value_two", "hits", "misses"),
    [
        ("EQ", 5, 0, [5], [4, 6, 5 + (1 << 32)]), ("NE", 5, 0, [4, 5 + (1 << 40)], [5]), ("LT", 5, 0, [0, 4], [5, 1 << 33]),
        ("LE", 5, 0, [5], [6, 1 << 33]), ("GT", 5, 0, [6, 1 << 33], [5]), ("GE", 1 << 33, 0, [1 << 33], [5, (1 << 33) - 1]),
        ("MASKED_EQ", 0xF0, 0x30, [0x35, 0xF30], [0x45, 0]), ("EQ", 0xFFFFFFFFFFFFFFFF, 0, [0xFFFFFFFFFFFFFFFF], [0xFFFFFFFF]),
    ],
)
def test_every_operator_compares_all_64_bits(op: str, value: int, value_two: int, hits: list[int], misses: list[int]) -> None:
    arg = {"index": 0, "op": f"SCMP_CMP_{op}", "value": value, "valueTwo": value_two}
    code = program("ALLOW", rule("personality", "ERRNO", args=[arg]))
    for hit in hits:
        assert verdict(code, PERSONALITY, (hit,)) == ERRNO(errno.EPERM), hex(hit)
    for miss in misses:
        assert verdict(code, PERSONALITY, (miss,)) == ALLOW, hex(miss)


def test_conditions_on_different_arguments_must_all_hold() -> None:
    args = [{"index": 0, "op": "SCMP_CMP_EQ", "value": 1}, {"index": 2, "op": "SCMP_CMP_EQ", "value": 3}]
    code = program("ALLOW", rule("write", "ERRNO", args=args))
    assert verdict(code, WRITE, (1, 0, 3)) == ERRNO(errno.EPERM)
    assert verdict(code, WRITE, (1, 0, 4)) == ALLOW
    assert verdict(code, WRITE, (2, 0, 3)) == ALLOW


def test_of_conditions_on_one_argument_any_suffices() -> None:
    args = [{"index": 0, "op": "SCMP_CMP_EQ", "value": v} for v in (1, 2)] + [{"index": 1, "op": "SCMP_CMP_EQ", "value": 9}]
    code = program("ALLOW", rule("personality", "ERRNO", args=args))
    assert [verdict(code, PERSONALITY, a) for a in ((1,), (2,), (3, 9))] == [ERRNO(errno.EPERM)] * 3
    assert verdict(code, PERSONALITY, (3, 8)) == ALLOW


def test_names_that_nobody_knows_are_skipped() -> None:
    code = program("ERRNO", rule("read frobnicate_the_kernel openat2", "ALLOW"))
    assert verdict(code, READ) == ALLOW


def test_rules_with_the_default_action_are_skipped() -> None:
    code = program("ERRNO", rule("getpid", "ERRNO", errnoRet=1), rule("read openat2", "ALLOW"))
    assert verdict(code, GETPID) == ERRNO(errno.EPERM)


# The stub.


def test_calls_newer_than_the_profile_answer_enosys() -> None:
    code = program("ERRNO", rule("read openat2", "ALLOW"))
    assert verdict(code, OPENAT2) == ALLOW
    assert verdict(code, OPENAT2 + 1) == ERRNO(errno.ENOSYS)
    assert verdict(code, 1000) == ERRNO(errno.ENOSYS)
    assert verdict(code, OPENAT2 - 1) == ERRNO(errno.EPERM)


def test_a_rule_that_says_what_the_default_says_still_counts_for_the_newest_call() -> None:
    code = program("ERRNO", rule("read", "ALLOW"), rule("openat2", "ERRNO"))
    assert verdict(code, OPENAT2) == ERRNO(errno.EPERM)
    assert verdict(code, OPENAT2 + 1) == ERRNO(errno.ENOSYS)


@pytest.mark.parametrize("default", ["ALLOW", "LOG", "TRACE"])
def test_permissive_defaults_get_no_stub(default: str) -> None:
    code = program(default, rule("read", "ERRNO"))
    assert verdict(code, 1000) == {"ALLOW": ALLOW, "LOG": LOG, "TRACE": TRACE(1)}[default]


@pytest.mark.parametrize("default", ["KILL", "KILL_PROCESS", "TRAP"])
def test_deadly_defaults_get_the_stub_too(default: str) -> None:
    assert verdict(program(default, rule("getpid", "ALLOW")), 1000) == ERRNO(errno.ENOSYS)


def test_each_architecture_has_a_newest_call_of_its_own() -> None:
    archs = ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]
    code = program("ERRNO", rule("read personality", "ALLOW"), architectures=archs)
    x32 = 1 << 30
    assert verdict(code, PERSONALITY) == verdict(code, PERSONALITY_I386, arch=I386) == verdict(code, PERSONALITY | x32) == ALLOW
    assert verdict(code, PERSONALITY - 1) == ERRNO(errno.EPERM)
    for nr, arch in ((PERSONALITY + 1, X86_64), (PERSONALITY_I386 + 1, I386), ((PERSONALITY + 1) | x32, X86_64)):
        assert verdict(code, nr, arch=arch) == ERRNO(errno.ENOSYS)


def test_the_native_architecture_is_always_part_of_it() -> None:
    code = program("ERRNO", rule("read personality", "ALLOW"), architectures=["SCMP_ARCH_X86"])
    assert verdict(code, READ) == ALLOW
    assert verdict(code, PERSONALITY + 1) == ERRNO(errno.ENOSYS)


def test_an_architecture_that_is_not_part_of_it_is_killed() -> None:
    code = program("ERRNO", rule("read openat2", "ALLOW"))
    assert verdict(code, 3, arch=I386) == KILL_THREAD
    assert verdict(code, READ | 1 << 30) == KILL_THREAD


def test_names_of_other_architectures_do_not_count() -> None:
    # On x86_64 "socketcall" is known to libseccomp, and has no number.
    code = program("ERRNO", rule("getpid socketcall", "ALLOW"))
    assert verdict(code, GETPID) == ALLOW
    assert verdict(code, GETPID + 1) == ERRNO(errno.ENOSYS)


def test_all_architectures_together_still_fit_into_short_jumps() -> None:
    newest = dict.fromkeys(seccomp.abi.ARCHITECTURES.values(), 400)
    newest[seccomp.abi.ARCH_X32] = (1 << 30) + 500
    stub = seccomp.enosys_stub(newest) + b"\x06\0\0\0" + ALLOW.to_bytes(4, "little")
    for token in newest:
        arch, bit = (X86_64, 1 << 30) if token == seccomp.abi.ARCH_X32 else (token, 0)
        limit = 500 if bit else 400
        assert verdict(stub, limit | bit, arch=arch) == ALLOW
        assert verdict(stub, limit + 1 | bit, arch=arch) == ERRNO(errno.ENOSYS)
    assert verdict(stub, 0, arch=seccomp.abi.ARCH_S390X) == ERRNO(errno.ENOSYS)
    assert verdict(stub, 9999, arch=0x1234) == ALLOW


NAMES = {"read": 0, "write": 1, "close": 3, "getpid": 39, "personality": 135, "kexec_load": 246, "openat2": 437}
VALUES = {"ALLOW": ALLOW, "ERRNO": ERRNO(1), "KILL_PROCESS": KILL_PROCESS, "TRAP": TRAP, "LOG": LOG}


@settings(max_examples=60, deadline=None)
@given(
    default=st.sampled_from(sorted(VALUES)),
    rules=st.dictionaries(st.sampled_from(sorted(NAMES)), st.sampled_from(sorted(VALUES))),
)
def test_verdicts_are_those_of_the_profile(default: str, rules: dict[str, str]) -> None:
    code = program(default, *[rule(name, action) for name, action in rules.items()])
    highest = max((NAMES[name] for name in rules), default=0)
    stub = highest > 0 and default not in ("ALLOW", "LOG")
    for name, number in NAMES.items():
        expected = VALUES[rules.get(name, default)]
        assert verdict(code, number) == (ERRNO(errno.ENOSYS) if stub and number > highest else expected), name


def test_long_profiles_compile_into_a_tree_with_the_same_verdicts() -> None:
    names = """access alarm bind brk capget capset chdir chmod chown chroot clone close connect dup dup2 dup3 execve exit
        fchdir fchmod fcntl flock fork fsync getcwd getegid geteuid getgid getpgid getpid getppid getuid ioctl kill lseek
        mkdir mmap open openat2 pause pipe poll read"""
    code = program("ERRNO", rule(names, "ALLOW"))
    assert [verdict(code, n) for n in (READ, OPEN, CLOSE, GETPID, OPENAT2)] == [ALLOW] * 5
    assert verdict(code, PERSONALITY) == ERRNO(errno.EPERM)


def test_a_long_profile_that_adds_nothing_is_its_default_action() -> None:
    names = " ".join(f"no_such_call_{i}" for i in range(50))
    assert verdict(program("ERRNO", rule(names, "ALLOW")), READ) == ERRNO(errno.EPERM)


# Flags.


def test_a_profile_without_flags_asks_for_spec_allow() -> None:
    assert seccomp.compile_filter(profile("ALLOW", rule("read", "KILL")), cache_dir=None).flags == 4


@pytest.mark.parametrize(
    ("flags", "bits"),
    [([], 0), (["LOG"], 2), (["SPEC_ALLOW"], 4), (["TSYNC"], 0), (["TSYNC", "LOG", "SPEC_ALLOW"], 6)],
)
def test_flags_become_the_kernels(flags: list[str], bits: int) -> None:
    given_flags = [f"SECCOMP_FILTER_FLAG_{flag}" for flag in flags]
    compiled = seccomp.compile_filter(profile("ALLOW", rule("read", "KILL"), flags=given_flags), cache_dir=None)
    assert compiled.flags == bits


def test_wait_killable_is_used_where_libseccomp_has_it() -> None:
    wanted = profile("ALLOW", rule("read", "KILL"), flags=["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"])
    if tuple(map(int, seccomp.version().split("."))) >= (2, 6, 0):
        assert seccomp.compile_filter(wanted, cache_dir=None).flags == 1 << 5
    else:
        with pytest.raises(Unsupported, match=r"^SetWaitKill requires libseccomp >= 2\.6\.0 and API level >= 7 \(current"):
            seccomp.compile_filter(wanted, cache_dir=None)


def test_a_notify_rule_makes_a_listener() -> None:
    wanted = profile("ALLOW", rule("mkdir", "NOTIFY"), flags=[], listenerPath="/run/agent.sock", listenerMetadata="m")
    compiled = seccomp.compile_filter(wanted, cache_dir=None)
    assert compiled.notify
    assert compiled.flags == 8
    assert (compiled.listener_path, compiled.listener_metadata) == ("/run/agent.sock", "m")
    assert not seccomp.compile_filter(profile("ALLOW", rule("mkdir", "ERRNO")), cache_dir=None).notify


def test_an_empty_profile_is_no_filter() -> None:
    compiled = seccomp.compile_filter({}, cache_dir=None)
    assert (compiled.program, compiled.flags, len(compiled)) == (b"", 0, 0)


# Errors.

UNABLE = "unable to init seccomp: "


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (profile("NOPE"), "string SCMP_ACT_NOPE is not a valid action for seccomp"),
        ({"syscalls": [rule("read", "ALLOW")]}, "string  is not a valid action for seccomp"),
        (profile("ALLOW", rule("read", "NOPE")), "string SCMP_ACT_NOPE is not a valid action for seccomp"),
        (profile("ALLOW", architectures=["SCMP_ARCH_VAX"]), "string SCMP_ARCH_VAX is not a valid arch for seccomp"),
        (
            profile("ALLOW", rule("read", "KILL", args=[{"index": 0, "op": "SCMP_CMP_XX", "value": 1}])),
            "string SCMP_CMP_XX is not a valid operator for seccomp",
        ),
        (profile("ALLOW", flags=["SECCOMP_FILTER_FLAG_X"]), "seccomp flag SECCOMP_FILTER_FLAG_X is not known to runc"),
        (
            profile("ALLOW", rule("write", "NOTIFY")),
            "unable to init seccomp: SCMP_ACT_NOTIFY cannot be used for the write syscall",
        ),
        (profile("NOTIFY", rule("read", "ALLOW")), "unable to init seccomp: SCMP_ACT_NOTIFY cannot be used as default action"),
        (
            profile("ALLOW", {"names": [""], "action": "SCMP_ACT_KILL"}),
            "unable to init seccomp: empty string is not a valid syscall",
        ),
        (
            profile("ALLOW", rule("read", "KILL", args=[{"index": 6, "op": "SCMP_CMP_EQ", "value": 1}])),
            UNABLE
            + "error creating seccomp syscall condition for syscall read: syscalls only have up to 6 arguments (6 given)",
        ),
        (
            profile("ALLOW", rule("read", "ERRNO", errnoRet=0xFFF0)),
            "unable to init seccomp: error adding seccomp filter rule for syscall read: invalid argument",
        ),
        (
            profile("ERRNO", rule("read", "ALLOW"), defaultErrnoRet=0xFFF0),
            "unable to init seccomp: error creating filter: could not create filter",
        ),
    ],
)
def test_errors_are_in_runcs_words(bad: dict[str, object], text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        seccomp.compile_filter(bad, cache_dir=None)
    assert str(caught.value) == text


def test_a_machine_without_libseccomp_is_told_which_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes

    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(seccomp, "_loaded", None)
    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(Unsupported, match=r"seccomp not supported .*libseccomp2"):
        seccomp.compile_filter(profile("ALLOW"), cache_dir=None)
    assert seccomp.version() == "0.0.0"
    assert seccomp.features() == {"enabled": False}


# The cache.

SAMPLE = profile("ERRNO", rule("read openat2", "ALLOW"))


def entries(folder: os.PathLike[str]) -> list[str]:
    return [os.path.join(folder, name) for name in os.listdir(folder)]


@pytest.fixture
def cache(tmp_path: object) -> str:
    return f"{tmp_path}/seccomp"


def test_the_second_time_libseccomp_is_not_needed(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = seccomp.compile_filter(SAMPLE, cache_dir=cache)
    monkeypatch.setattr(seccomp, "_memo", {})
    monkeypatch.setattr(seccomp, "_library", lambda: pytest.fail("libseccomp was loaded"))
    second = seccomp.compile_filter(SAMPLE, cache_dir=cache)
    assert (second.program, second.flags) == (first.program, first.flags)
    assert stat.S_IMODE(os.stat(cache).st_mode) == 0o700
    assert [stat.S_IMODE(os.stat(path).st_mode) for path in entries(cache)] == [0o600]


def test_the_memo_serves_where_there_is_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    first = seccomp.compile_filter(SAMPLE, cache_dir=None)
    monkeypatch.setattr(seccomp, "_library", lambda: pytest.fail("libseccomp was loaded"))
    assert seccomp.compile_filter(SAMPLE, cache_dir=None).program == first.program


def test_another_profile_is_another_entry(cache: str) -> None:
    seccomp.compile_filter(SAMPLE, cache_dir=cache)
    seccomp.compile_filter({**SAMPLE, "defaultErrnoRet": 5}, cache_dir=cache)
    seccomp.compile_filter({**SAMPLE, "listenerPath": "/elsewhere"}, cache_dir=cache)
    assert len(entries(cache)) == 2


@pytest.mark.parametrize("damage", [b"", b"short", b"x" * 200, None])
def test_a_damaged_entry_is_ignored_and_rewritten(cache: str, damage: bytes | None, monkeypatch: pytest.MonkeyPatch) -> None:
    good = seccomp.compile_filter(SAMPLE, cache_dir=cache).program
    (path,) = entries(cache)
    with open(path, "rb") as file:
        whole = file.read()
    with open(path, "wb") as file:
        file.write(whole[:-8] + b"\x06\0\0\0\0\0\xff\x7f" if damage is None else damage)
    monkeypatch.setattr(seccomp, "_memo", {})
    assert seccomp.compile_filter(SAMPLE, cache_dir=cache).program == good
    with open(path, "rb") as file:
        assert file.read() == whole


def test_a_folder_that_others_can_write_to_is_no_cache(cache: str) -> None:
    os.mkdir(cache)
    os.chmod(cache, 0o777)
    seccomp.compile_filter(SAMPLE, cache_dir=cache)
    assert entries(cache) == []


def test_a_link_is_no_cache(cache: str, tmp_path: object) -> None:
    os.mkdir(f"{tmp_path}/elsewhere", 0o700)
    os.symlink(f"{tmp_path}/elsewhere", cache)
    seccomp.compile_filter(SAMPLE, cache_dir=cache)
    assert entries(cache) == []


def test_a_cache_that_cannot_be_made_is_done_without(tmp_path: object) -> None:
    with open(f"{tmp_path}/file", "w"):
        pass
    assert seccomp.compile_filter(SAMPLE, cache_dir=f"{tmp_path}/file/seccomp").program


def test_the_cache_does_not_grow_for_ever(cache: str) -> None:
    for number in range(100):
        seccomp.compile_filter(profile("ERRNO", rule("read", "ALLOW"), defaultErrnoRet=number + 100), cache_dir=cache)
    assert 0 < len(entries(cache)) <= 64


# What others are told.


def test_features_lists_what_runc_lists() -> None:
    features = seccomp.features()
    assert features["enabled"] is True
    assert features["actions"] == [
        "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_KILL_THREAD", "SCMP_ACT_LOG",
        "SCMP_ACT_NOTIFY", "SCMP_ACT_TRACE", "SCMP_ACT_TRAP",
    ]
    assert len(features["operators"]) == 7  # type: ignore[arg-type]
    assert len(features["archs"]) == 18  # type: ignore[arg-type]
    assert features["knownFlags"] == [
        "SECCOMP_FILTER_FLAG_TSYNC", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_LOG",
        "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
    ]
    assert set(features["supportedFlags"]) <= set(features["knownFlags"])  # type: ignore[call-overload]


def test_the_agent_is_told_about_the_container() -> None:
    state = {"ociVersion": "1.3.0", "id": "c1", "status": "creating", "pid": 42, "bundle": "/b"}
    message = json.loads(seccomp.listener_message(state, 42, "meta"))
    assert message == {"ociVersion": "1.3.0", "fds": ["seccompFd"], "pid": 42, "metadata": "meta", "state": state}
    assert "metadata" not in json.loads(seccomp.listener_message(state, 42, ""))
