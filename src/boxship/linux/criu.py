"""CRIU, which saves and restores trees of processes: its requests, its answers, and how it is started.

Runs in: the runtime. CRIU is a program of its own, `criu swrk 3`, that answers on descriptor 3.
Spec: CRIU's images/rpc.proto (4.1), criu(8); https://criu.org/RPC. The messages are protocol buffers (proto2), of which
only varints and length-delimited fields occur.
Not here: what a container has to be told about (`boxship.runtime.checkpoint`).
"""

from __future__ import annotations

import _socket
import os

from boxship.kit.errors import BoxshipError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import TypeAlias

    Fields: TypeAlias = Mapping[str, object]
    Schema: TypeAlias = "Mapping[str, tuple[int, Schema | None]]"

SOCKET_FD = 3
"""Where CRIU is given its end of the connection."""

DUMP, RESTORE, PRE_DUMP, NOTIFY, FEATURE_CHECK, VERSION = 1, 2, 4, 6, 9, 10
KINDS = {
    DUMP: "DUMP", RESTORE: "RESTORE", PRE_DUMP: "PRE_DUMP", NOTIFY: "NOTIFY", FEATURE_CHECK: "FEATURE_CHECK", VERSION: "VERSION",
}
CGROUP_MODES = {"": 6, "ignore": 0, "soft": 3, "full": 4, "strict": 5}

_PAIR: Schema = {"key": (1, None), "val": (2, None)}
_OPTIONS: Schema = {
    "images_dir_fd": (1, None), "pid": (2, None), "leave_running": (3, None), "ext_unix_sk": (4, None),
    "tcp_established": (5, None), "evasive_devices": (6, None), "shell_job": (7, None), "file_locks": (8, None),
    "log_level": (9, None), "log_file": (10, None), "ps": (11, {"address": (1, None), "port": (2, None)}),
    "notify_scripts": (12, None), "root": (13, None), "parent_img": (14, None), "track_mem": (15, None), "auto_dedup": (16, None),
    "work_dir_fd": (17, None), "link_remap": (18, None), "ext_mnt": (23, _PAIR), "manage_cgroups": (24, None),
    "cg_root": (25, {"ctrl": (1, None), "path": (2, None)}), "rst_sibling": (26, None),
    "inherit_fd": (27, {"key": (1, None), "fd": (2, None)}), "manage_cgroups_mode": (34, None), "external": (37, None),
    "empty_ns": (38, None), "join_ns": (39, {"ns": (1, None), "ns_file": (2, None)}), "freeze_cgroup": (44, None),
    "tcp_skip_in_flight": (46, None), "lazy_pages": (48, None), "status_fd": (49, None), "orphan_pts_master": (50, None),
    "config_file": (51, None), "lsm_profile": (53, None), "lsm_mount_context": (63, None),
}
_FEATURES: Schema = {"mem_track": (1, None), "lazy_pages": (2, None)}
_REQUEST: Schema = {
    "type": (1, None), "opts": (2, _OPTIONS), "notify_success": (3, None), "features": (5, _FEATURES),
}
# What of an answer is read: field numbers.
_TYPE, _SUCCESS, _NOTIFY, _ERRNO, _FEATURES_ANSWER, _VERSION = 1, 2, 5, 7, 8, 10
_LIMIT = 1 << 16


def encode(schema: Schema, fields: Fields) -> bytes:
    """A message: int and bool as varints, str as bytes, mappings as messages, sequences as repeated fields."""
    parts = []
    for name, value in fields.items():
        number, inner = schema[name]
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, int):
                parts.append(_varint(number << 3) + _varint(item))
            else:
                data = encode(inner, item) if inner is not None else os.fsencode(item)  # type: ignore[arg-type]
                parts.append(_varint(number << 3 | 2) + _varint(len(data)) + data)
    return b"".join(parts)


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative numbers are sign-extended
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def decode(data: bytes) -> dict[int, int | bytes]:
    """The fields of a message by number, the last of each. Raises BoxshipError when it is no message."""
    fields: dict[int, int | bytes] = {}
    at = 0
    try:
        while at < len(data):
            key, at = _read_varint(data, at)
            kind = key & 7
            if kind == 0:
                fields[key >> 3], at = _read_varint(data, at)
            elif kind == 2:
                size, at = _read_varint(data, at)
                if at + size > len(data):
                    raise IndexError
                fields[key >> 3] = data[at : at + size]
                at += size
            elif kind in (1, 5):
                at += 8 if kind == 1 else 4
            else:
                raise IndexError
    except IndexError:
        raise BoxshipError("unable to parse the response of criu") from None
    return fields


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


class Answer:
    """An answer: `kind` as in the request, or NOTIFY with the `script`'s name, the `pid` and `fds` that came with it."""

    __slots__ = ("errno", "fds", "features", "kind", "pid", "script", "success", "version")

    def __init__(self, data: bytes, fds: list[int]) -> None:
        fields = decode(data)
        self.fds = fds
        self.kind = _number(fields, _TYPE)
        self.success = bool(_number(fields, _SUCCESS))
        self.errno = _number(fields, _ERRNO)
        notify = decode(_bytes(fields, _NOTIFY))
        self.script = _bytes(notify, 1).decode(errors="replace")
        self.pid = _number(notify, 2)
        self.features = {name: bool(decode(_bytes(fields, _FEATURES_ANSWER)).get(n, 0)) for name, (n, _) in _FEATURES.items()}
        version = decode(_bytes(fields, _VERSION))
        # As CRIU itself counts: 4.2.1 is 40201; a development version (with a git id) counts as the next minor one.
        self.version = _number(version, 1) * 10000 + _number(version, 2) * 100 + _number(version, 4)
        if 3 in version:
            self.version = self.version // 100 * 100 + 100


def _number(fields: Mapping[int, int | bytes], number: int) -> int:
    value = fields.get(number, 0)
    return value if isinstance(value, int) else 0


def _bytes(fields: Mapping[int, int | bytes], number: int) -> bytes:
    value = fields.get(number, b"")
    return value if isinstance(value, bytes) else b""


class Connection:
    """The runtime's end of a conversation with one CRIU process, which serves one request."""

    def __init__(self) -> None:
        self._ours, self._theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0)

    @property
    def theirs(self) -> int:
        """The end that CRIU is to have as `SOCKET_FD`."""
        return self._theirs.fileno()

    def started(self) -> None:
        """CRIU has its end: from now on its death ends the conversation."""
        self._theirs.close()

    def close(self) -> None:
        """Hang up."""
        self._ours.close()
        self._theirs.close()

    def ask(self, request: Fields) -> Iterator[Answer]:
        """Send a request. Yields a NOTIFY answer for each thing to be done meanwhile, then the last answer.

        Raises BoxshipError in runc's words when CRIU fails or dies. After each notification CRIU is told to go on; to
        stop it, close the connection instead of asking for the next answer.
        """
        self._send(request)
        while True:
            answer = self._receive()
            if not answer.success:
                kind = KINDS.get(answer.kind, str(answer.kind))
                raise BoxshipError(f"criu failed: type {kind} errno {answer.errno}")
            yield answer
            for fd in answer.fds:
                os.close(fd)
            if answer.kind != NOTIFY:
                return
            self._send({"type": NOTIFY, "notify_success": True})

    def finish(self) -> None:
        """No more requests: CRIU may end."""
        try:
            self._ours.shutdown(_socket.SHUT_WR)
        except OSError:
            pass  # it has ended already

    def _send(self, request: Fields) -> None:
        try:
            self._ours.send(encode(_REQUEST, request), _socket.MSG_NOSIGNAL)
        except (BrokenPipeError, ConnectionResetError):
            raise BoxshipError("criu ended unexpectedly") from None

    def _receive(self) -> Answer:
        try:
            data, ancillary, _, _ = self._ours.recvmsg(_LIMIT, _socket.CMSG_SPACE(64), _socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:
            data, ancillary = b"", []
        fds = [int.from_bytes(part[i : i + 4], "little") for _, _, part in ancillary for i in range(0, len(part), 4)]
        if not data:
            raise BoxshipError("criu ended unexpectedly")
        return Answer(data, fds)


def find(environ: Mapping[str, str]) -> str:
    """The program's path, by the caller's PATH. Raises BoxshipError."""
    for folder in environ.get("PATH", "").split(":"):
        path = f"{folder}/criu"
        if folder.startswith("/") and os.access(path, os.X_OK) and not os.path.isdir(path):
            return path
    raise BoxshipError('exec: "criu": executable file not found in $PATH')


class Service:
    """A CRIU process as a child of this one, for what need not have a special parent, cgroup or namespace."""

    def __init__(self, environ: Mapping[str, str], keep: Sequence[tuple[int, int]] = ()) -> None:
        """`keep`: (descriptor here, number there)."""
        path = find(environ)
        self.connection = Connection()
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        actions = [(os.POSIX_SPAWN_DUP2, null, fd) for fd in range(3)]
        actions += [(os.POSIX_SPAWN_DUP2, self.connection.theirs, SOCKET_FD)]
        actions += [(os.POSIX_SPAWN_DUP2, fd, number) for fd, number in keep]
        try:
            self.pid = os.posix_spawn(path, [path, "swrk", str(SOCKET_FD)], environ, file_actions=actions)
        except OSError as error:
            self.connection.close()
            raise BoxshipError(f"fork/exec {path}: {(error.strerror or '').lower()}") from None
        finally:
            os.close(null)
        self.connection.started()

    def ask(self, request: Fields, on_notify: Callable[[Answer], None] = lambda answer: None) -> Answer:
        """Have it do one thing, and wait for its end. Raises BoxshipError."""
        last: Answer | None = None
        try:
            for answer in self.connection.ask(request):
                if answer.kind == NOTIFY:
                    on_notify(answer)
                last = answer
            self.connection.finish()
        finally:
            self.connection.close()
            status = os.waitpid(self.pid, 0)[1]
        assert last is not None
        # After a pre-dump CRIU waits for the dump that is to follow, and takes it ill that none does.
        if status and request["type"] != PRE_DUMP:
            raise BoxshipError(f"criu failed: {_describe(status)}")
        return last


def _describe(status: int) -> str:
    return f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit status {os.WEXITSTATUS(status)}"


def version(environ: Mapping[str, str]) -> int:
    """CRIU's version, 4.2.1 as 40201. Raises BoxshipError when there is none that answers."""
    try:
        return Service(environ).ask({"type": VERSION}).version
    except BoxshipError as error:
        raise BoxshipError(f"CRIU version check failed: {error}") from None


def lacking(environ: Mapping[str, str], *wanted: str) -> list[str]:
    """Those of `wanted` ("mem_track", "lazy_pages") that CRIU or the kernel cannot do. Raises BoxshipError."""
    try:
        answer = Service(environ).ask({"type": FEATURE_CHECK, "features": dict.fromkeys(wanted, True)})
    except BoxshipError as error:
        raise BoxshipError(f"CRIU feature check failed: {error}") from None
    return [name for name in wanted if not answer.features[name]]
