"""D-Bus: the wire format, and a conversation with a made-up systemd on a real socket."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boxship.kit.errors import BoxshipError, InvalidArgument, NotFound, Unavailable
from boxship.linux import dbus
from boxship.linux.dbus import Connection, Variant, marshal, parse_variant, unmarshal


def test_values_are_aligned_as_the_specification_says() -> None:
    # From the specification's chapter on marshalling: strings, an array of int64, and their padding.
    assert marshal("sss", ("foo", "+", "bar")) == (
        b"\x03\0\0\0foo\0\x01\0\0\0+\0\0\0\x03\0\0\0bar\0"
    )
    assert marshal("ax", ([5],)) == b"\x08\0\0\0\0\0\0\0\x05\0\0\0\0\0\0\0"
    assert marshal("ya(sv)", (1, [("a", Variant("b", True))])) == (
        b"\x01\0\0\0\x10\0\0\0\x01\0\0\0a\0\x01b\0\0\0\0\x01\0\0\0"
    )


def test_an_empty_array_of_structs_is_padded_all_the_same() -> None:
    assert marshal("a(sv)y", ([], 7)) == b"\0\0\0\0\0\0\0\0\x07"


LEAVES = {
    "y": st.integers(0, 255), "b": st.booleans(), "n": st.integers(-(1 << 15), (1 << 15) - 1), "q": st.integers(0, (1 << 16) - 1),
    "i": st.integers(-(1 << 31), (1 << 31) - 1), "u": st.integers(0, (1 << 32) - 1),
    "x": st.integers(-(1 << 63), (1 << 63) - 1), "t": st.integers(0, (1 << 64) - 1), "d": st.floats(allow_nan=False),
    "s": st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), "ay": st.binary(), "o": st.just("/a/b"),
}
TYPED = st.recursive(
    st.sampled_from(sorted(LEAVES)).flatmap(lambda kind: st.tuples(st.just(kind), LEAVES[kind])),
    lambda inner: st.one_of(
        inner.map(lambda typed: ("v", Variant(*typed))),
        st.lists(inner, min_size=1, max_size=4).map(
            lambda items: ("(" + "".join(kind for kind, _ in items) + ")", tuple(value for _, value in items))
        ),
        inner.filter(lambda typed: typed[0] != "y").flatmap(
            lambda typed: st.integers(0, 3).map(lambda count: ("a" + typed[0], [typed[1]] * count))
        ),
        inner.map(lambda typed: ("a{s" + typed[0] + "}", {"key": typed[1]})),
    ),
    max_leaves=8,
)


@given(st.lists(TYPED, max_size=4))
def test_what_is_written_is_read_back(typed: list[tuple[str, object]]) -> None:
    signature = "".join(kind for kind, _ in typed)
    values = [value for _, value in typed]
    assert unmarshal(signature, bytes(marshal(signature, values))) == values


def test_a_whole_message_is_read_back_with_its_size() -> None:
    data = dbus.encode_message(dbus.SIGNAL, 7, {1: "/p", 3: "Member"}, "uos", (5, "/o", "text"))
    assert dbus.message_size(data[:16]) == len(data)
    message = dbus.decode_message(data)
    assert (message.kind, message.serial, message.member, message.body) == (4, 7, "Member", [5, "/o", "text"])


def test_a_message_of_the_other_byte_order_is_understood() -> None:
    data = bytes.fromhex("4204000100000004000000090000000708016700017500000000002a")
    assert dbus.message_size(data[:16]) == len(data)
    message = dbus.decode_message(data)
    assert (message.kind, message.serial, message.body) == (dbus.SIGNAL, 9, [42])


@pytest.mark.parametrize("start", [b"HTTP/1.1 200 OK\r", b"l\x01\x00\x02" + bytes(12), b"l\x01\0\x01\xff\xff\xff\x7f" + bytes(8)])
def test_what_is_no_message_is_refused(start: bytes) -> None:
    with pytest.raises(Unavailable):
        dbus.message_size(start)


@pytest.mark.parametrize("signature", ["(", "a", "z", "a{s", "(s"])
def test_wrong_signatures_are_refused(signature: str) -> None:
    with pytest.raises(InvalidArgument):
        dbus.split_signature(signature)


def test_addresses_of_sockets_are_found() -> None:
    assert dbus.parse_address("tcp:host=x;unix:path=/run/a%20b,guid=5;unix:abstract=/tmp/x") == [b"/run/a b", b"\0/tmp/x"]


def test_a_user_without_a_bus_is_told_what_to_install() -> None:
    with pytest.raises(NotFound, match="dbus-user-session"):
        dbus.connect_systemd(user=True, environ={})


@pytest.mark.parametrize(
    ("text", "variant"),
    [
        ("5", Variant("i", 5)), ("uint64 5", Variant("t", 5)), ("@t 0x10", Variant("t", 16)), ("true", Variant("b", True)),
        ("'a\\'b'", Variant("s", "a'b")), ('"x y"', Variant("s", "x y")), ("1.5", Variant("d", 1.5)),
        ("['a', 'b']", Variant("as", ["a", "b"])), ("@as []", Variant("as", [])), ("[uint32 1, 2]", Variant("au", [1, 2])),
        ("@au [1, 2]", Variant("au", [1, 2])), ("@a(ss) [('a', 'b')]", Variant("a(ss)", [("a", "b")])),
        ("@ay [1, 2]", Variant("ay", b"\x01\x02")), (" int64 -7 ", Variant("x", -7)), ("<5>", Variant("v", Variant("i", 5))),
        ("objectpath '/a'", Variant("o", "/a")),
        ("", None), ("5 6", None), ("'a", None), ("[]", None), ("[1, 'a']", None), ("byte 256", None), ("nonsense", None),
        ("uint32 -1", None), ("@zz 1", None), ("'\\u12'", None),
    ],
)
def test_values_in_annotations_are_gvariant_text(text: str, variant: Variant | None) -> None:
    if variant is None:
        with pytest.raises(InvalidArgument):
            parse_variant(text)
    else:
        assert parse_variant(text) == variant


# --- a made-up systemd -----------------------------------------------------------------------------------------------


class Systemd(threading.Thread):
    """Answers on a socket as systemd does on /run/systemd/private, and keeps what it was asked."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self.path = path
        self.calls: list[tuple[str, list[object]]] = []
        self.results = ["done"]
        self.errors: list[tuple[str, str]] = []
        self.version = "252.22-1~deb12u1"
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        self.start()

    def run(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection:
                self.serve(connection)

    def serve(self, connection: socket.socket) -> None:
        data = b""
        while b"BEGIN\r\n" not in data:
            data += connection.recv(4096)
        assert data.startswith(b"\0AUTH EXTERNAL\r\nDATA\r\n")
        connection.sendall(b"DATA\r\nOK 0123456789abcdef\r\n")
        data = data.split(b"BEGIN\r\n", 1)[1]
        while True:
            while len(data) < 16 or len(data) < dbus.message_size(data[:16]):
                more = connection.recv(4096)
                if not more:
                    return
                data += more
            size = dbus.message_size(data[:16])
            message, data = dbus.decode_message(data[:size]), data[size:]
            self.calls.append((message.member, message.body))
            for answer in self.answers(message):
                # In pieces, as a stream may deliver it.
                connection.sendall(answer[:20])
                connection.sendall(answer[20:])

    def answers(self, message: dbus.Message) -> Iterator[bytes]:
        reply = {5: message.serial}
        if self.errors and message.member != "ResetFailedUnit":
            name, text = self.errors.pop(0)
            yield dbus.encode_message(dbus.ERROR, 1, {**reply, 4: name}, "s", (text,))
        elif message.member in ("StartTransientUnit", "StopUnit"):
            result = self.results.pop(0) if len(self.results) > 1 else self.results[0]
            unit = message.body[0]
            for job, outcome in (("/job/1", "failed"), ("/job/2", result)):
                fields: dict[int, object] = {1: "/org/freedesktop/systemd1", 3: "JobRemoved"}
                yield dbus.encode_message(dbus.SIGNAL, 1, fields, "uoss", (1, job, unit, outcome))
            yield dbus.encode_message(dbus.METHOD_RETURN, 2, reply, "o", ("/job/2",))
        elif message.member == "Get":
            values = {"Version": self.version, "ControlGroup": "/user.slice/user-1000.slice/user@1000.service"}
            yield dbus.encode_message(dbus.METHOD_RETURN, 2, reply, "v", (Variant("s", values[str(message.body[1])]),))
        else:
            yield dbus.encode_message(dbus.METHOD_RETURN, 2, reply, "", ())


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    server = Systemd(tmp_path / "private")
    yield server
    server.listener.close()


def connect(server: Systemd) -> Connection:
    return Connection(str(server.path).encode(), direct=True, timeout_s=10)


def test_a_unit_is_started_and_its_job_awaited(systemd: Systemd) -> None:
    from boxship.linux.cgroups import systemd as driver

    unit = driver.parse_path("", "abc", user=False)
    properties = driver.unit_properties(unit, 42, io="IO", further=[("TasksMax", "t", 5)])
    with connect(systemd) as bus:
        driver.start_unit(bus, unit.name, properties)
    ((method, (name, mode, sent, auxiliary)),) = systemd.calls
    assert (method, name, mode, auxiliary) == ("StartTransientUnit", "boxrun-abc.scope", "replace", [])
    assert dict(sent) == {  # type: ignore[call-overload]
        "Description": Variant("s", "boxrun container abc"), "Slice": Variant("s", "system.slice"),
        "Delegate": Variant("b", True), "PIDs": Variant("au", [42]),
        "MemoryAccounting": Variant("b", True), "CPUAccounting": Variant("b", True),
        "IOAccounting": Variant("b", True), "TasksAccounting": Variant("b", True), "DefaultDependencies": Variant("b", False),
        "TasksMax": Variant("t", 5),
    }


def test_a_failed_unit_of_the_name_is_cleared_away_once(systemd: Systemd) -> None:
    from boxship.linux.cgroups import systemd as driver

    exists = ("org.freedesktop.systemd1.UnitExists", "Unit x.scope already exists.")
    systemd.errors = [exists]
    with connect(systemd) as bus:
        driver.start_unit(bus, "x.scope", [])
        assert [method for method, _ in systemd.calls] == ["StartTransientUnit", "ResetFailedUnit", "StartTransientUnit"]
        systemd.errors = [exists, exists]
        with pytest.raises(BoxshipError, match=r'unable to start unit "x.scope": Unit x.scope already exists.'):
            driver.start_unit(bus, "x.scope", [])


def test_a_job_that_fails_is_told(systemd: Systemd) -> None:
    from boxship.linux.cgroups import systemd as driver

    systemd.results = ["dependency"]
    with connect(systemd) as bus, pytest.raises(BoxshipError, match=r"error creating systemd unit `x.scope`: got `dependency`"):
        driver.start_unit(bus, "x.scope", [])
    assert systemd.calls[-1] == ("ResetFailedUnit", ["x.scope"])


def test_stopping_a_unit_that_is_gone_is_no_error(systemd: Systemd) -> None:
    from boxship.linux.cgroups import systemd as driver

    systemd.errors = [("org.freedesktop.systemd1.NoSuchUnit", "Unit x.scope not loaded.")]
    with connect(systemd) as bus:
        driver.stop_unit(bus, "x.scope")
        driver.stop_unit(bus, "x.scope")
    assert [method for method, _ in systemd.calls] == ["StopUnit", "ResetFailedUnit", "StopUnit", "ResetFailedUnit"]


def test_the_version_is_read(systemd: Systemd, monkeypatch: pytest.MonkeyPatch) -> None:
    from boxship.linux.cgroups import systemd as driver

    monkeypatch.setattr(driver, "_version", 0)
    with connect(systemd) as bus:
        assert driver.version(bus) == 252
        assert driver.version(bus) == 252
    assert len(systemd.calls) == 1
    texts = ("v245.4-1.fc32", '"245"', "v245-1.fc32", "257", "x")
    assert [driver.parse_version(text) for text in texts] == [245, 245, 245, 257, -1]


def test_a_silent_peer_does_not_hang_us(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with pytest.raises(Unavailable, match="timed out"):
            Connection(str(tmp_path / "s").encode(), direct=True, timeout_s=0.05)


def test_a_socket_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"dial unix .*/none: no such file or directory"):
        Connection(str(tmp_path / "none").encode(), direct=True)
