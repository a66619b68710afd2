"""The D-Bus client against the reference implementation's bus."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from boxship.linux.dbus import CallError, Connection, Variant, marshal

DAEMON = shutil.which("dbus-daemon")
pytestmark = pytest.mark.skipif(DAEMON is None, reason="needs dbus-daemon")

BUS = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus")
CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>session</type><listen>unix:path={path}</listen><auth>EXTERNAL</auth><policy context="default">
<allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/><allow own="*"/></policy></busconfig>
"""


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[Connection]:
    socket = tmp_path / "bus"
    (tmp_path / "bus.conf").write_text(CONFIG.format(path=socket))
    assert DAEMON is not None
    command = [DAEMON, f"--config-file={tmp_path}/bus.conf", "--nofork", "--nopidfile"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as daemon:
        try:
            for _ in range(100):
                if socket.exists():
                    break
                time.sleep(0.02)
            with Connection(os.fsencode(socket), direct=False, timeout_s=10) as connection:
                yield connection
        finally:
            daemon.terminate()


def test_methods_answer_and_signals_arrive(bus: Connection) -> None:
    (names,) = bus.call(*BUS, "ListNames")
    assert isinstance(names, list)
    assert "org.freedesktop.DBus" in names
    assert bus.call(*BUS, "RequestName", "su", "org.example.X", 0) == [1]
    assert bus.wait_signal("NameAcquired", 0, "org.example.X").body == ["org.example.X"]
    assert bus.call(*BUS, "GetConnectionUnixUser", "s", "org.example.X") == [os.getuid()]
    bus.call(*BUS, "AddMatch", "s", "type='signal',member='NameOwnerChanged'")


def test_errors_have_name_and_text(bus: Connection) -> None:
    with pytest.raises(CallError, match=r"org\.nope") as caught:
        bus.call(*BUS, "GetNameOwner", "s", "org.nope")
    assert caught.value.name == "org.freedesktop.DBus.Error.NameHasNoOwner"


def test_a_deep_body_passes_the_bus_unharmed(bus: Connection) -> None:
    # The bus checks what passes, and disconnects who sends something malformed.
    bus.call(*BUS, "RequestName", "su", "org.example.X", 0)
    properties = [
        ("Description", Variant("s", "x")), ("PIDs", Variant("au", [4, 5])), ("DeviceAllow", Variant("a(ss)", [("a", "b")])),
        ("AllowedCPUs", Variant("ay", b"\x01\x02\x03")), ("Empty", Variant("a(ss)", [])), ("Delegate", Variant("b", True)),
    ]
    signature = "ssa(sv)a(sa(sv))"
    assert marshal(signature, ("u", "replace", properties, []))
    with pytest.raises(CallError) as caught:
        bus.call(*BUS, "GetNameOwner", signature, "u", "replace", properties, [])
    assert caught.value.name == "org.freedesktop.DBus.Error.InvalidArgs"
