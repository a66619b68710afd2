"""Seccomp filters: from the runtime-spec's profile to the program that the kernel loads.

Runs in: the runtime, before the container exists; init only loads the finished bytes. libseccomp (through ctypes, which is
slow to import) comes in only for a profile that neither this process nor the cache has seen.
Spec: runtime-spec 1.3.0, config-linux.md "Seccomp"; seccomp(2); libseccomp ≥ 2.3.1, 2.5.0 for SCMP_ACT_NOTIFY, 2.6.0 for
WAIT_KILLABLE_RECV.

In front of libseccomp's program stands a stub of our own, as in runc. A profile that answers EPERM to what it does not list
breaks C libraries that try a new system call and fall back on ENOSYS. So system calls newer than the newest one that
the profile names answer ENOSYS: its author cannot have judged them.

    ld  [arch]
    jeq X86_64, section of x86_64          one line per architecture
    ja  filter                             other architectures are the filter's business
    section: ld [nr]
    jset x32 bit, section of x32           x86_64 only
    jgt  newest, enosys                    (s390: also nr 0, the multiplexer's spare number)
    ja   filter
    enosys: ret ERRNO(ENOSYS)
    filter: libseccomp's program

Not here: loading it (init does, with seccomp(2)), and sending the listener to its agent (`boxship.runtime`).
"""

from __future__ import annotations

import errno
import os
from _struct import Struct

from boxship.abi import seccomp as abi
from boxship.kit.errors import InvalidArgument, Unsupported
from boxship.kit.files import read_all, write_atomic

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    Profile = Mapping[str, Any]
    Target = str | int

_INSTRUCTION = Struct("=HBBI")  # struct sock_filter {u16 code; u8 jt, jf; u32 k}
_CONDITION = Struct("=IiQQ")  # struct scmp_arg_cmp {unsigned arg; enum op; u64 datum_a, datum_b}
_HEADER = Struct("=8sII")  # magic, flags, size of the program
_MAGIC = b"boxscmp1"
_DIGEST_SIZE = 32
_CACHE_ENTRIES = 64
_ENOSYS = abi.SECCOMP_RET_ERRNO | errno.ENOSYS
_PERMISSIVE = ("SCMP_ACT_ALLOW", "SCMP_ACT_LOG", "SCMP_ACT_TRACE")
"""Default actions that need no stub: a tracer looks after system calls that it does not know."""

# flag: (filter attribute, kernel's flag, name in libseccomp-golang, API level, libseccomp version)
_FLAGS = {
    "SECCOMP_FILTER_FLAG_SPEC_ALLOW": (abi.SCMP_FLTATR_CTL_SSB, abi.SECCOMP_FILTER_FLAG_SPEC_ALLOW, "SetSSB", 4, (2, 5, 0)),
    "SECCOMP_FILTER_FLAG_LOG": (abi.SCMP_FLTATR_CTL_LOG, abi.SECCOMP_FILTER_FLAG_LOG, "SetLogBit", 3, (2, 4, 0)),
    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV": (
        abi.SCMP_FLTATR_CTL_WAITKILL, abi.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, "SetWaitKill", 7, (2, 6, 0),
    ),
}
_TSYNC = "SECCOMP_FILTER_FLAG_TSYNC"
"""Accepted and without effect: init has one thread."""
_SPEC_ALLOW = "SECCOMP_FILTER_FLAG_SPEC_ALLOW"

_memo: dict[bytes, tuple[bytes, int]] = {}


class Filter:
    """A compiled profile.

    Attributes:
        program: array of struct sock_filter; empty when the profile says nothing, so that there is nothing to load.
        flags: SECCOMP_FILTER_FLAG_ bits for seccomp(2).
        notify: whether loading it answers a listener descriptor (NEW_LISTENER is in `flags`).
        listener_path, listener_metadata: where the profile wants the listener sent to, and with what; "" if it does not say.
    """

    __slots__ = ("flags", "listener_metadata", "listener_path", "notify", "program")

    def __init__(self, program: bytes, flags: int, listener_path: str = "", listener_metadata: str = "") -> None:
        self.program = program
        self.flags = flags
        self.notify = bool(flags & abi.SECCOMP_FILTER_FLAG_NEW_LISTENER)
        self.listener_path = listener_path
        self.listener_metadata = listener_metadata

    def __len__(self) -> int:
        """Instructions, for the `len` of struct sock_fprog."""
        return len(self.program) // _INSTRUCTION.size


class _Call:
    """One system call of one rule of the profile."""

    __slots__ = ("action", "conditions", "name")

    def __init__(self, name: str, action: int, conditions: list[tuple[int, int, int, int]]) -> None:
        self.name = name
        self.action = action
        self.conditions = conditions


def compile_filter(profile: Profile, *, cache_dir: str | None) -> Filter:
    """The program for `profile`, the runtime-spec's `linux.seccomp` as parsed JSON.

    `cache_dir` (made if missing, mode 0700) keeps programs over the life of the process; None keeps none. A cache that cannot
    be written, or that others could write to, is done without.

    Raises InvalidArgument in runc's words; Unsupported when the machine has no libseccomp, or one too old for what is asked.
    """
    path, metadata = profile.get("listenerPath") or "", profile.get("listenerMetadata") or ""
    if not profile.get("defaultAction") and not profile.get("syscalls"):
        return Filter(b"", 0, path, metadata)
    key = _key(profile)
    compiled = _memo.get(key)
    if compiled is None:
        entry = f"{cache_dir}/{key.hex()}" if cache_dir and _own_directory(cache_dir) else None
        compiled = _read_entry(entry) if entry else None
        if compiled is None:
            compiled = _compile(profile)
            if entry and cache_dir:
                _write_entry(cache_dir, entry, *compiled)
        if len(_memo) >= _CACHE_ENTRIES:
            _memo.clear()
        _memo[key] = compiled
    return Filter(*compiled, path, metadata)


def version() -> str:
    """Of the libseccomp on this machine, as "2.5.4"; "0.0.0" without one."""
    try:
        return ".".join(map(str, _library().version))
    except Unsupported:
        return "0.0.0"


def features() -> dict[str, object]:
    """The `linux.seccomp` of the runtime-spec's features structure."""
    try:
        library = _library()
    except Unsupported:
        return {"enabled": False}
    return {
        "enabled": True,
        "actions": sorted(abi.ACTIONS),
        "operators": sorted(abi.OPERATORS),
        "archs": sorted(abi.ARCHITECTURES),
        "knownFlags": [_TSYNC, *_FLAGS],
        "supportedFlags": [_TSYNC, *(flag for flag in _FLAGS if not library.lacks(flag))],
    }


def listener_message(state: Mapping[str, object], pid: int, metadata: str) -> bytes:
    """What goes to the agent along with the listener: the runtime-spec's container process state, as JSON.

    `state` is the container's state; `pid` the process that the filter is on, as the agent sees it.
    """
    import json

    message: dict[str, object] = {"ociVersion": state.get("ociVersion", ""), "fds": ["seccompFd"], "pid": pid}
    if metadata:
        message["metadata"] = metadata
    message["state"] = dict(state)
    return json.dumps(message, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogateescape")


# From the profile to rules.


def _compile(profile: Profile) -> tuple[bytes, int]:
    """(program, flags)."""
    library = _library()
    flags = _flags(library, profile)
    architectures = [_token(abi.ARCHITECTURES, name, "arch") for name in profile.get("architectures") or ()]
    default_name = profile.get("defaultAction") or ""
    default = _action(default_name, profile.get("defaultErrnoRet"))
    calls = _calls(profile)
    notified = [call.name for call in calls if call.action == abi.SECCOMP_RET_USER_NOTIF]
    if notified:
        _check_notify(library, notified)
    if default == abi.SECCOMP_RET_USER_NOTIF:
        raise _invalid("SCMP_ACT_NOTIFY cannot be used as default action")
    program = library.build(default, architectures, flags, calls)
    if default_name not in _PERMISSIVE and default != _ENOSYS:
        program = enosys_stub(_newest(library, {library.native, *architectures}, calls)) + program
    bits = 0
    for flag in flags:
        bits |= _FLAGS[flag][1]
    if notified:
        bits |= abi.SECCOMP_FILTER_FLAG_NEW_LISTENER
    return program, bits


def _invalid(message: str) -> InvalidArgument:
    return InvalidArgument(f"unable to init seccomp: {message}")


def _flags(library: _Library, profile: Profile) -> list[str]:
    """The flags that have an effect; SPEC_ALLOW, if it can be had, for a profile that does not speak of flags."""
    wanted = profile.get("flags")
    if wanted is None:
        return [] if library.lacks(_SPEC_ALLOW) else [_SPEC_ALLOW]
    for flag in wanted:
        if flag == _TSYNC:
            continue
        if flag not in _FLAGS:
            raise InvalidArgument(f"seccomp flag {flag} is not known to runc")
        lack = library.lacks(flag)
        if lack:
            raise Unsupported(lack)
    return [flag for flag in wanted if flag != _TSYNC]


def _token(table: Mapping[str, int], name: str, kind: str) -> int:
    value = table.get(name)
    if value is None:
        raise InvalidArgument(f"string {name} is not a valid {kind} for seccomp")
    return value


def _action(name: str, errno_ret: int | None) -> int:
    """The kernel's return value; ERRNO and TRACE carry 16 bits, EPERM unless the profile gives them."""
    action = _token(abi.ACTIONS, name, "action")
    if action in (abi.SECCOMP_RET_ERRNO, abi.SECCOMP_RET_TRACE):
        action |= (errno.EPERM if errno_ret is None else errno_ret) & 0xFFFF
    return action


def _calls(profile: Profile) -> list[_Call]:
    calls = []
    for rule in profile.get("syscalls") or ():
        action = _action(rule.get("action") or "", rule.get("errnoRet"))
        conditions = []
        for arg in rule.get("args") or ():
            operator = _token(abi.OPERATORS, arg.get("op") or "", "operator")
            conditions.append((arg.get("index", 0), operator, arg.get("value", 0), arg.get("valueTwo", 0)))
        calls += [_Call(name, action, conditions) for name in rule.get("names") or ()]
    return calls


def _check_notify(library: _Library, names: list[str]) -> None:
    if library.api < 6:
        raise Unsupported(
            f"unable to init seccomp: seccomp notify unsupported: API level: got {library.api}, want at least 6. "
            "Please try with libseccomp >= 2.5.0 and Linux >= 5.7"
        )
    if "write" in names:
        # Init tells the number of the listener with write(2), after the filter is on: nobody could answer that notification.
        raise _invalid("SCMP_ACT_NOTIFY cannot be used for the write syscall")


# The stub.


def _newest(library: _Library, architectures: set[int], calls: Sequence[_Call]) -> dict[int, int]:
    """The highest number that the profile names, for each architecture on which it names any."""
    newest = {}
    names = {call.name.encode("utf-8", "surrogateescape") for call in calls}
    for architecture in sorted(architectures):
        # Names unknown there are -1, and names that only other architectures have are below that.
        highest = max((library.resolve(architecture, name) for name in names), default=0)
        if highest > 0:
            newest[architecture] = highest
    return newest


def enosys_stub(newest: Mapping[int, int]) -> bytes:
    """Instructions that answer ENOSYS above the number given for each SCMP_ARCH_ token, and else run on past their end."""
    if not newest:
        return b""
    lines: list[tuple[int, int, Target, Target]] = []  # code, k, jump if true, jump if false; names are places
    places: dict[str, int] = {}
    audits = sorted({abi.ARCH_X86_64 if token == abi.ARCH_X32 else token for token in newest})
    lines.append((abi.BPF_LD_W_ABS, abi.DATA_ARCH, 0, 0))
    lines += [(abi.BPF_JEQ_K, audit, f"{audit}", 0) for audit in audits]
    lines.append((abi.BPF_JA, 0, "filter", 0))
    for audit in audits:
        places[f"{audit}"] = len(lines)
        lines.append((abi.BPF_LD_W_ABS, abi.DATA_NR, 0, 0))
        if audit == abi.ARCH_X86_64:
            x32 = "x32" if abi.ARCH_X32 in newest else "filter"
            lines.append((abi.BPF_JSET_K, abi.X32_SYSCALL_BIT, x32, 0))
        elif audit in (abi.ARCH_S390, abi.ARCH_S390X):
            # setup(2), unused since ever: what remains when the multiplexed number is one that the kernel does not know.
            lines.append((abi.BPF_JEQ_K, 0, "enosys", 0))
        if audit in newest:
            lines.append((abi.BPF_JGT_K, newest[audit], "enosys", 0))
        lines.append((abi.BPF_JA, 0, "filter", 0))
        if audit == abi.ARCH_X86_64 and abi.ARCH_X32 in newest:
            places["x32"] = len(lines)
            lines.append((abi.BPF_JGT_K, newest[abi.ARCH_X32], "enosys", 0))
            lines.append((abi.BPF_JA, 0, "filter", 0))
    places["enosys"] = len(lines)
    lines.append((abi.BPF_RET_K, _ENOSYS, 0, 0))
    places["filter"] = len(lines)
    return b"".join(_assemble(at, line, places) for at, line in enumerate(lines))


def _assemble(at: int, line: tuple[int, int, Target, Target], places: Mapping[str, int]) -> bytes:
    """One instruction at index `at`. Conditional jumps reach 255 instructions; all architectures together need fewer."""
    code, k, true, false = line
    skip = places[true] - at - 1 if isinstance(true, str) else true
    if code == abi.BPF_JA:
        return _INSTRUCTION.pack(code, 0, 0, skip)
    return _INSTRUCTION.pack(code, skip, false, k)


# libseccomp.


class _Library:
    """The few functions of libseccomp.so.2, bound once."""

    def __init__(self) -> None:
        import ctypes

        try:
            library = ctypes.CDLL("libseccomp.so.2")
        except OSError:
            raise Unsupported(
                "seccomp: config provided but seccomp not supported", "install libseccomp; Debian's package is libseccomp2"
            ) from None
        pointer, text, number, word = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint32

        def bind(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            return function  # type: ignore[no-any-return]

        address = bind("seccomp_version", pointer)()
        self.version: tuple[int, ...] = tuple((word * 3).from_address(address))
        try:
            self.api: int = bind("seccomp_api_get", ctypes.c_uint)()
        except AttributeError:  # before 2.4
            self.api = 0
        self.native: int = bind("seccomp_arch_native", word)()
        self._init = bind("seccomp_init", pointer, word)
        self._release = bind("seccomp_release", None, pointer)
        self._arch_add = bind("seccomp_arch_add", number, pointer, word)
        self._attr_set = bind("seccomp_attr_set", number, pointer, number, word)
        self._rule_add = bind("seccomp_rule_add_array", number, pointer, word, number, ctypes.c_uint, text)
        self._export = bind("seccomp_export_bpf", number, pointer, number)
        self.resolve: Callable[[int, bytes], int] = bind("seccomp_syscall_resolve_name_arch", number, word, text)

    def lacks(self, flag: str) -> str:
        """Why `flag` cannot be had here; "" if it can."""
        _, _, call, api, needed = _FLAGS[flag]
        text = f"{call} requires libseccomp >= {'.'.join(map(str, needed))}"
        current = f"(current version: {'.'.join(map(str, self.version))}"
        if self.api < api:
            return f"{text} and API level >= {api} {current}, API level: {self.api})"
        return "" if self.version >= needed else f"{text} {current})"

    def build(self, default: int, architectures: Sequence[int], flags: Sequence[str], calls: Sequence[_Call]) -> bytes:
        """libseccomp's program for the rules."""
        context = self._init(default)
        if not context:
            raise _invalid("error creating filter: could not create filter")
        try:
            for architecture in architectures:
                self._check(self._arch_add(context, architecture), "error adding architecture to seccomp filter", errno.EEXIST)
            for flag in flags:
                self._check(self._attr_set(context, _FLAGS[flag][0], 1), f"error adding {flag} to seccomp filter")
            self._check(self._attr_set(context, abi.SCMP_FLTATR_CTL_NNP, 0), "error setting no new privileges")
            added = sum(self._add(context, default, call) for call in calls)
            if added > 32:
                # A binary tree instead of a list; not for few, because up to 2.5.4 a tree of no rules is wrong. Older
                # libraries do not know the attribute, and need no answer.
                self._attr_set(context, abi.SCMP_FLTATR_CTL_OPTIMIZE, 2)
            return self._exported(context)
        finally:
            self._release(context)

    def _add(self, context: int, default: int, call: _Call) -> bool:
        """Add the rules of one call; False when there is nothing to add."""
        if not call.name:
            raise _invalid("empty string is not a valid syscall")
        if call.action == default:
            return False
        number = self.resolve(self.native, call.name.encode("utf-8", "surrogateescape"))
        if number == abi.NR_SCMP_ERROR:
            return False
        if not call.conditions:
            result = self._rule_add(context, call.action, number, 0, None)
            self._check(result, f"error adding seccomp filter rule for syscall {call.name}")
            return True
        packed = [_condition(call.name, *condition) for condition in call.conditions]
        indexes = {condition[0] for condition in call.conditions}
        # libseccomp takes one condition per argument. More of them become rules of their own, so that any one
        # suffices: not what the words of the profile suggest, but what every runtime has always done with them.
        groups = [[one] for one in packed] if len(indexes) < len(packed) else [packed]
        for group in groups:
            result = self._rule_add(context, call.action, number, len(group), b"".join(group))
            self._check(result, f"error adding seccomp rule for syscall {call.name}")
        return True

    def _exported(self, context: int) -> bytes:
        # A memory file rather than a pipe: nobody has to read while libseccomp writes.
        fd = os.memfd_create("seccomp", os.MFD_CLOEXEC)
        try:
            self._check(self._export(context, fd), "error loading seccomp filter into kernel: error exporting BPF")
            return os.pread(fd, os.fstat(fd).st_size, 0)
        finally:
            os.close(fd)

    @staticmethod
    def _check(result: int, doing: str, fine: int = 0) -> None:
        if result < 0 and -result != fine:
            raise _invalid(f"{doing}: {os.strerror(-result).lower()}")


def _condition(name: str, index: int, operator: int, value: int, value_two: int) -> bytes:
    if not 0 <= index <= 5:
        raise _invalid(
            f"error creating seccomp syscall condition for syscall {name}: syscalls only have up to 6 arguments ({index} given)"
        )
    mask = (1 << 64) - 1
    return _CONDITION.pack(index, operator, value & mask, value_two & mask)


_loaded: _Library | None = None


def _library() -> _Library:
    global _loaded
    if _loaded is None:
        _loaded = _Library()
    return _loaded


# The cache. An entry is a header (magic, flags, size), the SHA-256 of header and program, and the program.


def _sha256(data: bytes) -> bytes:
    try:
        from _sha2 import sha256  # type: ignore[import-not-found,unused-ignore]  # Python 3.12
    except ImportError:
        try:
            from _sha256 import sha256  # type: ignore[import-not-found,unused-ignore]
        except ImportError:  # an interpreter built with OpenSSL's only
            from _hashlib import openssl_sha256 as sha256
    return bytes(sha256(data).digest())


def _key(profile: Profile) -> bytes:
    """Of everything that the program depends on. Whether it is sent to an agent, and with what, is not part of that."""
    parts = [profile.get(name) for name in ("defaultAction", "defaultErrnoRet", "architectures", "flags", "syscalls")]
    # repr() of parsed JSON is unambiguous, and a hundred times as fast to have as the json module is to import.
    machine = (os.uname().machine, os.uname().release, _library_identity())
    return _sha256(repr((_MAGIC, machine, parts)).encode("utf-8", "surrogatepass"))


def _library_identity() -> object:
    """What changes when libseccomp is upgraded, without loading it; its version where it is in an unusual place."""
    import sys

    multiarch = getattr(sys.implementation, "_multiarch", "")
    for folder in (f"/usr/lib/{multiarch}", f"/lib/{multiarch}", "/usr/lib64", "/lib64", "/usr/lib", "/lib"):
        try:
            found = os.stat(f"{folder}/libseccomp.so.2")
        except OSError:
            continue
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
    return version()


def _own_directory(path: str) -> bool:
    """Make the folder if it is missing; False unless it is ours and nobody else may write: a planted entry is a filter."""
    try:
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            os.makedirs(path, 0o700, exist_ok=True)
            found = os.lstat(path)
    except OSError:
        return False
    return (found.st_mode & 0o170022) == 0o040000 and found.st_uid == os.geteuid()


def _read_entry(path: str) -> tuple[bytes, int] | None:
    try:
        data = read_all(path)
    except OSError:
        return None
    start = _HEADER.size + _DIGEST_SIZE
    header, digest, program = data[: _HEADER.size], data[_HEADER.size : start], data[start:]
    if len(header) < _HEADER.size:
        return None
    magic, flags, size = _HEADER.unpack(header)
    if magic != _MAGIC or size != len(program) or digest != _sha256(header + program):
        return None
    return program, flags


def _write_entry(cache_dir: str, path: str, program: bytes, flags: int) -> None:
    header = _HEADER.pack(_MAGIC, flags, len(program))
    try:
        _prune(cache_dir)
        write_atomic(path, header + _sha256(header + program) + program)
    except OSError:
        pass  # a full or read-only disk costs the next start some milliseconds, and nothing else


def _prune(cache_dir: str) -> None:
    """Keep the folder small: generated profiles would fill it for ever."""
    names = os.listdir(cache_dir)
    if len(names) < _CACHE_ENTRIES:
        return
    aged = []
    for name in names:
        try:
            aged.append((os.lstat(f"{cache_dir}/{name}").st_mtime_ns, name))
        except FileNotFoundError:
            continue
    for _, name in sorted(aged)[: len(aged) - _CACHE_ENTRIES // 2]:
        try:
            os.unlink(f"{cache_dir}/{name}")
        except FileNotFoundError:
            continue
