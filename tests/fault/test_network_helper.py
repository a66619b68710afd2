"""The helper of published ports and names is killed, whenever: what was asked for is there again, and nothing leaks."""

import os
import random
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from boxship.kit.errors import BoxshipError
from boxship.linux import netns
from boxship.network.dns.client import Dns, Member, Resolver
from boxship.network.proxy.client import PortMapping, Proxy
from support import network
from support.network import A, ask, echo, end, inside, tcp_server, udp_server

pytestmark = pytest.mark.root

HARD = struct.pack("ii", 1, 0)
"""SO_LINGER: closing resets."""


@pytest.fixture
def container(tmp_path: Path) -> Iterator[str]:
    """The calling thread is in a network of its own; the value is another one."""
    host, made = network.make_namespace(tmp_path / "host"), network.make_namespace(tmp_path / "container")
    with inside(host):
        yield made
    netns.remove(host)
    netns.remove(made)


def port(number: int) -> PortMapping:
    return PortMapping("tcp", "127.0.0.1", number, "127.0.0.1", 9000)


def pid_of(proxy: Proxy) -> int:
    return int(proxy.call({"do": "hello"})["pid"])


def kill(proxy: Proxy) -> None:
    pid = pid_of(proxy)
    gone = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    network.wait_readable(gone)
    os.close(gone)


def works(number: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", number), 20) as client:
            client.sendall(b"x")
            return client.recv(1) == b"x"
    except OSError:
        return False


def test_a_killed_helper_is_replaced_and_told_everything(tmp_path: Path, container: str) -> None:
    server = tcp_server("127.0.0.1", 9000, echo)
    proxy = Proxy(str(tmp_path / "state"))
    dns = Dns(proxy)
    # Said before there is a helper, and never again.
    dns.network("n", "net")
    dns.join(Member("n", "e", ["web"], ["10.0.0.2"]))
    dns.attach(Resolver("s", container, {"n": {}}))
    for number in range(8000, 8100):
        proxy.publish(port(number))
    proxy.withdraw(port(8050))
    kill(proxy)
    assert not works(8000)
    proxy.ensure()
    assert all(works(number) == (number != 8050) for number in range(8000, 8100))
    with inside(container):
        assert ask("web", A).data == ["10.0.0.2"]
    # A call does what `ensure` does.
    kill(proxy)
    proxy.publish(port(8100))
    assert works(8000)
    assert works(8100)
    proxy.stop()
    end(server)


def test_the_one_that_watches_replaces_it_unasked(tmp_path: Path, container: str) -> None:
    server = tcp_server("127.0.0.1", 9000, echo)
    proxy = Proxy(str(tmp_path / "state"))
    proxy.watch()
    proxy.publish(port(8000))
    for _ in range(2):
        kill(proxy)
        until = time.monotonic() + 20
        while not works(8000):
            assert time.monotonic() < until
            time.sleep(0.02)
    proxy.stop()
    end(server)


def test_kills_in_the_middle_of_publishing_lose_nothing(tmp_path: Path, container: str) -> None:
    server = tcp_server("127.0.0.1", 9000, echo)
    state = str(tmp_path / "state")
    proxy = Proxy(state)
    over, some = threading.Event(), threading.Event()

    def killer() -> None:
        # Each helper gets to serve something, however slow the machine is; then it has some milliseconds more.
        for delay_ms in range(0, 30, 3):
            some.clear()
            while not some.wait(0.05):
                if over.is_set():
                    return
            time.sleep(delay_ms / 1000)
            process = proxy._process
            if process is not None and process.poll() is None:
                process.kill()
        over.set()

    thread = threading.Thread(target=killer)
    thread.start()
    published: list[int] = []
    number = 8000
    until = time.monotonic() + 60
    try:
        while not over.is_set():
            assert time.monotonic() < until
            try:
                proxy.publish(port(number))
            except BoxshipError:
                continue  # it was killed: the caller is told, and may ask again
            some.set()
            published.append(number)
            number += 1
            if len(published) > 5:
                try:
                    proxy.withdraw(port(published[0]))
                except BoxshipError:
                    pass
                del published[0]
    finally:
        over.set()
        thread.join()
    proxy.ensure()
    assert proxy.call({"do": "hello"})["ports"] == len(published)
    assert all(works(number) for number in published)
    proxy.stop()
    end(server)


def send(client: socket.socket, data: bytes) -> None:
    client.sendall(data)
    client.shutdown(socket.SHUT_WR)


def test_ports_that_come_and_go_under_load_lose_no_byte_of_others(tmp_path: Path, container: str) -> None:
    """Whole transfers through one port; resets, half connections and datagrams through others, which are withdrawn all the time."""
    servers = [
        tcp_server("127.0.0.1", 9000, echo),
        tcp_server("127.0.0.1", 9001, lambda connection: connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, HARD)),
        udp_server("127.0.0.1", 9003, lambda data: data),
    ]
    proxy = Proxy(str(tmp_path / "state"))
    proxy.publish(port(8000))
    unsteady = [
        PortMapping("tcp", "127.0.0.1", 8001, "127.0.0.1", 9001), PortMapping("tcp", "127.0.0.1", 8002, "127.0.0.1", 9002),
        PortMapping("udp", "127.0.0.1", 8003, "127.0.0.1", 9003),
    ]
    over = threading.Event()
    wrong: list[object] = []
    whole: list[int] = []

    def transfer(seed: int) -> None:
        rng = random.Random(seed)
        while not over.is_set():
            data = rng.randbytes(rng.randrange(1, 1 << 20))
            with socket.create_connection(("127.0.0.1", 8000), 20) as client:
                sender = threading.Thread(target=send, args=(client, data))
                sender.start()
                if network.everything(client) != data:
                    wrong.append(len(data))
                sender.join()
            whole.append(len(data))

    def disturb(number: int) -> None:
        while not over.is_set():
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM if number == 8003 else socket.SOCK_STREAM) as client:
                client.settimeout(0.2)
                try:
                    client.connect(("127.0.0.1", number))
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, HARD)
                    client.send(bytes(30_000))
                    client.recv(10)
                except OSError:
                    pass

    threads = [threading.Thread(target=transfer, args=(each,)) for each in range(3)]
    threads += [threading.Thread(target=disturb, args=(number,)) for number in (8001, 8002, 8003)]
    try:
        for thread in threads:
            thread.start()
        until = time.monotonic() + 3
        while time.monotonic() < until:
            for each in unsteady:
                proxy.publish(each)
            time.sleep(0.02)
            for each in unsteady:
                proxy.withdraw(each)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert whole
    assert not wrong
    proxy.withdraw(port(8000))
    assert proxy.call({"do": "hello"})["connections"] == 0
    assert len(os.listdir(f"/proc/{pid_of(proxy)}/fd")) < 60
    proxy.stop()
    for server in servers:
        end(server)
