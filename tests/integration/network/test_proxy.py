"""Published ports through the helper: what dockerd's docker-proxy does, by one process."""

import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from boxship.kit.errors import BoxshipError, InvalidArgument, Unsupported
from boxship.linux import netns
from boxship.network.proxy import control
from boxship.network.proxy.client import PortMapping, Proxy
from support import network
from support.network import echo, end, everything, tcp_server, udp_server

pytestmark = pytest.mark.root

CLIENT = """
import sys
from boxship.network.proxy.client import PortMapping, Proxy
proxy = Proxy(sys.argv[1])
proxy.publish(PortMapping("tcp", "127.0.0.1", 8000, "127.0.0.1", 9000))
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def state(tmp_path: Path) -> Iterator[str]:
    """The calling thread is in a network of its own."""
    path = network.make_namespace(tmp_path / "host")
    try:
        with network.inside(path):
            yield str(tmp_path / "state")
    finally:
        netns.remove(path)


@pytest.fixture
def proxy(state: str) -> Iterator[Proxy]:
    made = Proxy(state)
    yield made
    made.stop()


def tcp(host: str = "127.0.0.1", target: str = "127.0.0.1", port: int = 8000) -> PortMapping:
    return PortMapping("tcp", host, port, target, 9000)


def wait_for(what: object, limit_s: float = 20) -> None:
    assert callable(what)
    until = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.01)


def connections(proxy: Proxy) -> int:
    return int(proxy.call({"do": "hello"})["connections"])


@pytest.mark.parametrize(
    ("host", "asked", "target"),
    [("127.0.0.1", "127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.7", "127.0.0.1"), ("::", "::1", "127.0.0.1"),
     ("::1", "::1", "::1"), ("127.0.0.1", "127.0.0.1", "::1")],
)
def test_bytes_go_both_ways_and_each_end_is_passed_on_alone(proxy: Proxy, host: str, asked: str, target: str) -> None:
    """The server answers after the client has said that nothing more comes."""
    def serve(connection: socket.socket) -> None:
        connection.sendall(b"all of it: " + everything(connection))

    server = tcp_server(target, 9000, serve)
    proxy.publish(tcp(host, target))
    with socket.create_connection((asked, 8000), 20) as client:
        client.sendall(b"one ")
        client.sendall(b"two")
        client.shutdown(socket.SHUT_WR)
        assert everything(client) == b"all of it: one two"
    end(server)


def test_the_server_may_end_first(proxy: Proxy) -> None:
    got: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        connection.sendall(b"hello")
        connection.shutdown(socket.SHUT_WR)
        got.append(everything(connection))

    server = tcp_server("127.0.0.1", 9000, serve)
    proxy.publish(tcp())
    with socket.create_connection(("127.0.0.1", 8000), 20) as client:
        assert everything(client) == b"hello"
        client.sendall(b"still here")
    wait_for(lambda: got)
    assert got == [b"still here"]
    end(server)


def test_much_data_arrives_whole_in_both_directions_at_once(proxy: Proxy) -> None:
    server = tcp_server("127.0.0.1", 9000, echo)
    proxy.publish(tcp())
    data = os.urandom(1 << 20) * 24
    with socket.create_connection(("127.0.0.1", 8000), 20) as client:
        def send() -> None:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        assert everything(client) == data
        sender.join()
    wait_for(lambda: connections(proxy) == 0)
    end(server)


def test_who_does_not_read_holds_the_sender_back(proxy: Proxy) -> None:
    server = tcp_server("127.0.0.1", 9000, lambda connection: time.sleep(100))
    proxy.publish(tcp())
    pid = proxy.call({"do": "hello"})["pid"]
    with socket.create_connection(("127.0.0.1", 8000), 20) as client:
        client.setblocking(False)
        sent = 0
        # Until nothing goes for a while: what the sockets and one pipe hold.
        while select.select([], [client], [], 0.5)[1]:
            sent += client.send(bytes(1 << 20))
            assert sent < 200 << 20
        assert memory_kb(pid) < 40_000
    end(server)


def memory_kb(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") // 1024


def test_a_reset_is_passed_on(proxy: Proxy) -> None:
    def serve(connection: socket.socket) -> None:
        connection.recv(1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    server = tcp_server("127.0.0.1", 9000, serve)
    proxy.publish(tcp())
    with socket.create_connection(("127.0.0.1", 8000), 20) as client:
        client.sendall(b"x")
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    end(server)


def test_nobody_in_the_container_listens(proxy: Proxy) -> None:
    proxy.publish(tcp())
    with socket.create_connection(("127.0.0.1", 8000), 20) as client:
        try:
            assert client.recv(1) == b""
        except ConnectionResetError:
            pass
    wait_for(lambda: connections(proxy) == 0)


def test_a_thousand_connections_cost_little_and_leave_nothing(proxy: Proxy) -> None:
    server = tcp_server("127.0.0.1", 9000, echo)
    proxy.publish(tcp())
    pid = proxy.call({"do": "hello"})["pid"]
    before_kb, before_fds = memory_kb(pid), len(os.listdir(f"/proc/{pid}/fd"))
    for _ in range(2):
        clients = [socket.create_connection(("127.0.0.1", 8000), 20) for _ in range(500)]
        for number, client in enumerate(clients):
            client.sendall(b"%d" % number)
        for number, client in enumerate(clients):
            assert client.recv(100) == b"%d" % number
        assert connections(proxy) == 500
        assert memory_kb(pid) - before_kb < 4000
        for client in clients:
            client.close()
        wait_for(lambda: connections(proxy) == 0)
        assert len(os.listdir(f"/proc/{pid}/fd")) <= before_fds
    end(server)


def test_datagrams_find_their_way_back(proxy: Proxy) -> None:
    """Also from an address of the host that the kernel would not have chosen, and several clients at once."""
    server = udp_server("127.0.0.1", 9000, lambda data: data.upper())
    proxy.publish(PortMapping("udp", "0.0.0.0", 8000, "127.0.0.1", 9000))
    proxy.publish(PortMapping("udp", "::1", 8000, "127.0.0.1", 9000))
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "127.0.0.9"), (socket.AF_INET6, "::1")):
        clients = [socket.socket(family, socket.SOCK_DGRAM) for _ in range(5)]
        for number, client in enumerate(clients):
            client.settimeout(20)
            client.connect((address, 8000))
            client.send(b"from %d" % number)
        for number, client in enumerate(clients):
            assert client.recv(100) == b"FROM %d" % number
            client.send(b"")
            assert client.recv(100) == b""
            client.close()
    assert connections(proxy) == 15
    end(server)


def test_clients_of_datagrams_are_bounded_and_the_oldest_is_forgotten(proxy: Proxy) -> None:
    server = udp_server("127.0.0.1", 9000, lambda data: data)
    proxy.publish(PortMapping("udp", "127.0.0.1", 8000, "127.0.0.1", 9000))
    pid = proxy.call({"do": "hello"})["pid"]
    if int(Path(f"/proc/{pid}/limits").read_text().partition("Max open files")[2].split()[0]) < 5000:
        pytest.skip("the limit of open files is below what a port takes: raise ulimit -Hn")
    for number in range(4200):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.bind((f"127.0.{1 + number // 250}.{1 + number % 250}", 0))
            client.sendto(b"x", ("127.0.0.1", 8000))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(1)
        client.connect(("127.0.0.1", 8000))
        for _ in range(20):  # after so many at once one may be dropped, as datagrams may
            client.send(b"last")
            try:
                assert client.recv(10) == b"last"
                break
            except TimeoutError:
                continue
        else:
            pytest.fail("no answer to any of 20")
    assert 1000 < connections(proxy) <= 4096
    assert len(os.listdir(f"/proc/{pid}/fd")) < 4150
    end(server)


def test_silent_clients_of_datagrams_are_forgotten(state: str) -> None:
    """With a shorter time than the one that ports have."""
    program = """
import socket, time
from boxship.network.proxy import _relay
_relay.start(2)
made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
made.bind(("127.0.0.1", 8000))
made.setblocking(False)
port = _relay.listen(made.detach(), "127.0.0.1", 9000, 17, 1)
client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
client.sendto(b"x", ("127.0.0.1", 8000))
while _relay.connections(port) != 1:
    time.sleep(0.01)
while _relay.connections(port):
    time.sleep(0.01)
client.sendto(b"x", ("127.0.0.1", 8000))
while _relay.connections(port) != 1:
    time.sleep(0.01)
_relay.withdraw(port)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_port_that_somebody_has_is_refused_in_dockers_words(proxy: Proxy) -> None:
    taken = socket.create_server(("127.0.0.1", 8000))
    with pytest.raises(BoxshipError, match=r"^failed to bind host port for 127\.0\.0\.1:8000:127\.0\.0\.1:9000/tcp: address already in use$"):
        proxy.publish(tcp())
    taken.close()
    proxy.publish(tcp())
    with pytest.raises(BoxshipError, match="cannot assign requested address"):
        proxy.publish(tcp("192.0.2.1"))
    with pytest.raises(InvalidArgument, match="invalid IP address: localhost"):
        proxy.publish(tcp("localhost"))
    with pytest.raises(InvalidArgument, match="malformed message"):
        proxy.call({"do": "publish"})


def test_sctp_where_the_kernel_has_it(proxy: Proxy) -> None:
    mapping = PortMapping("sctp", "127.0.0.1", 8000, "127.0.0.1", 9000)
    try:
        server = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 132)
    except OSError:
        with pytest.raises(Unsupported, match="the kernel has no SCTP"):
            proxy.publish(mapping)
        return
    server.bind(("127.0.0.1", 9000))
    server.listen()
    proxy.publish(mapping)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, 132) as client:
        client.connect(("127.0.0.1", 8000))
        client.sendall(b"x")
        connection, _ = server.accept()
        assert connection.recv(10) == b"x"
        connection.close()
    server.close()


def test_a_withdrawn_port_is_free_and_its_connections_are_closed(proxy: Proxy) -> None:
    server = tcp_server("127.0.0.1", 9000, echo)
    proxy.publish(tcp())
    proxy.publish(tcp(port=8001))
    one, other = (socket.create_connection(("127.0.0.1", port), 20) for port in (8000, 8001))
    for client in (one, other):
        client.sendall(b"x")
        assert client.recv(1) == b"x"
    proxy.withdraw(tcp())
    proxy.withdraw(tcp())
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", 8000))
    socket.create_server(("127.0.0.1", 8000)).close()
    with pytest.raises(ConnectionResetError):
        one.recv(1)
    other.sendall(b"y")
    assert other.recv(1) == b"y"
    for client in (one, other):
        client.close()
    end(server)


def test_a_socket_that_the_daemon_holds_already_is_taken_over_with_who_waits_there(proxy: Proxy) -> None:
    server = tcp_server("127.0.0.1", 9000, echo)
    held = socket.create_server(("127.0.0.1", 8000))
    early = socket.create_connection(("127.0.0.1", 8000), 20)
    early.sendall(b"early")
    proxy.publish(tcp(), held)
    held.close()
    assert early.recv(10) == b"early"
    early.close()
    end(server)


def test_connections_outlive_the_daemon_and_the_next_one_decides_what_stays(state: str) -> None:
    server = tcp_server("127.0.0.1", 9000, echo)
    daemon = subprocess.Popen(
        [sys.executable, "-c", CLIENT, state], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert daemon.stdout is not None
    assert daemon.stdout.readline() == "ready\n"
    client = socket.create_connection(("127.0.0.1", 8000), 20)
    client.sendall(b"before")
    assert client.recv(10) == b"before"
    daemon.kill()
    daemon.communicate()
    client.sendall(b"between")
    assert client.recv(10) == b"between"
    proxy = Proxy(state)
    try:
        proxy.ensure()
        assert connections(proxy) == 1
        proxy.sync([tcp(), tcp(port=8001)])
        client.sendall(b"after")
        assert client.recv(10) == b"after"
        socket.create_connection(("127.0.0.1", 8001), 20).close()
        proxy.sync([tcp(port=8001)])
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        # The container got another address.
        proxy.sync([PortMapping("tcp", "127.0.0.1", 8001, "127.0.0.2", 9000)])
        proxy.sync([PortMapping("tcp", "127.0.0.1", 8001, "127.0.0.1", 9000)])
        with socket.create_connection(("127.0.0.1", 8001), 20) as again:
            again.sendall(b"x")
            assert again.recv(1) == b"x"
    finally:
        client.close()
        proxy.stop()
        end(server)


def test_it_ends_when_it_has_nothing_to_do_and_no_daemon_is_there(state: str) -> None:
    proxy = Proxy(state)
    proxy.publish(tcp())
    pid = proxy.call({"do": "hello"})["pid"]
    gone = os.pidfd_open(pid)
    proxy.withdraw(tcp())
    proxy.close()
    assert select.select([gone], [], [], 30)[0]
    os.close(gone)
    # And the next one is started.
    proxy = Proxy(state)
    proxy.sync([])
    assert not proxy.running()
    proxy.publish(tcp())
    assert proxy.running()
    proxy.stop()


def test_a_helper_of_another_version_is_replaced(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old = Proxy(state)
    old.publish(tcp())
    pid = old.call({"do": "hello"})["pid"]
    monkeypatch.setattr(control, "VERSION", control.VERSION + 1)
    hello = Proxy._exchange

    def lie(self: Proxy, messages: list[dict[str, object]], fds: list[int]) -> list[dict[str, object]]:
        answers = hello(self, messages, fds)  # type: ignore[arg-type]
        return [{**each, "version": control.VERSION} if each.get("pid") not in (None, pid) else each for each in answers]

    monkeypatch.setattr(Proxy, "_exchange", lie)
    new = Proxy(state)
    new.publish(tcp())
    assert new.call({"do": "hello"})["pid"] != pid
    old.close()
    new.stop()
