"""The helper of published ports and names is killed, whenever: what was asked for is there again, and nothing leaks."""

import os
import signal
import socket
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
from support.network import A, ask, echo, end, inside, tcp_server

pytestmark = pytest.mark.root


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
    over = threading.Event()

    def killer() -> None:
        while not over.wait(0.15):
            process = proxy._process
            if process is not None and process.poll() is None:
                process.kill()

    thread = threading.Thread(target=killer)
    thread.start()
    published = []
    try:
        until = time.monotonic() + 4
        number = 8000
        while time.monotonic() < until:
            try:
                proxy.publish(port(number))
            except BoxshipError:
                continue  # it was killed: the caller is told, and may ask again
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
