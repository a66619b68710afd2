"""What a container sends to its name server, and what others send to it, does no harm."""

import os
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from boxship.linux import netns
from boxship.network.dns.client import Dns, Member, Resolver, Server
from boxship.network.dns.resolvers import FORWARDS_MAX, STREAMS_MAX
from boxship.network.proxy.client import Proxy
from support import network
from support.network import A, Reply, ask, end, inside, question, udp_server

pytestmark = pytest.mark.root


class Stage:
    def __init__(self, folder: Path, container: str) -> None:
        self.container = container
        self.proxy = Proxy(str(folder / "state"))
        self.dns = Dns(self.proxy)
        self.dns.network("n", "net")
        self.dns.join(Member("n", "e", ["web"], ["10.0.0.2"]))

    def attach(self, *servers: Server) -> None:
        self.dns.attach(Resolver("s", self.container, {"n": {}}, servers))

    @property
    def fds(self) -> int:
        return len(os.listdir(f"/proc/{self.proxy.call({'do': 'hello'})['pid']}/fd"))


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    host, container = network.make_namespace(tmp_path / "host"), network.make_namespace(tmp_path / "container")
    with inside(host):
        made = Stage(tmp_path, container)
        try:
            yield made
        finally:
            made.proxy.stop()
    netns.remove(host)
    netns.remove(container)


def client(kind: int = socket.SOCK_DGRAM) -> socket.socket:
    made = socket.socket(socket.AF_INET, kind)
    made.settimeout(20)
    made.connect(("127.0.0.11", 53))
    return made


def hostile() -> Iterator[bytes]:
    rng = random.Random(4711)
    good = question("web", A, edns=1232)
    for size in (0, 1, 11, 12, 13, 511, 65507):
        yield rng.randbytes(size)
    for at in range(len(good)):
        yield good[:at]
        yield good[:at] + b"\xff" + good[at + 1 :]
    for _ in range(500):
        packet = bytearray(good + rng.randbytes(rng.randrange(40)))
        for _ in range(rng.randrange(1, 6)):
            packet[rng.randrange(len(packet))] = rng.randrange(256)
        yield bytes(packet)
    yield good[:12] + b"\xc0\x0c\0\1\0\1"
    yield good[:12] + b"\x3f" * 400
    yield struct.pack(">HHHHHH", 1, 0, 1, 0, 0, 65535) + b"\0\0\1\0\1" + b"\0\0\x29\0\0\0\0\0\0\0\0" * 3


def test_it_goes_on_after_hostile_packets(stage: Stage) -> None:
    stage.attach()
    with inside(stage.container):
        with client() as udp:
            for packet in hostile():
                udp.send(packet)
        for packet in hostile():
            if packet and packet[0] % 3 == 0:
                with client(socket.SOCK_STREAM) as tcp:
                    tcp.sendall(packet)
        with client(socket.SOCK_STREAM) as tcp:
            # One that promises more than it sends keeps nobody waiting.
            tcp.sendall(b"\xff\xff")
            assert ask("web", A).data == ["10.0.0.2"]
        assert ask("web", A, tcp=True).data == ["10.0.0.2"]


def test_only_questions_are_passed_on_and_only_to_the_servers_named(stage: Stage) -> None:
    """A server on the host's loopback sees neither updates nor zone transfers nor other classes, whatever the container sends."""
    seen: list[bytes] = []

    def note(packet: bytes) -> bytes:
        seen.append(packet)
        return packet[:2] + b"\x81\x83" + packet[4:]

    server, other = udp_server("127.0.0.53", 53, note), udp_server("127.0.0.1", 53, note)
    stage.attach(Server("127.0.0.53", in_host=True))
    plain = question("example.com", A)
    refused = {
        "update": plain[:2] + b"\x28\0" + plain[4:],
        "notify": plain[:2] + b"\x20\0" + plain[4:],
        "transfer": question("example.com", 252),
        "version": plain[:-2] + b"\0\3",
        "two": plain[:4] + b"\0\2" + plain[6:] + plain[12:],
    }
    with inside(stage.container):
        for packet in refused.values():
            with client() as udp:
                udp.send(packet)
                assert udp.recv(600)[3] & 15 in (1, 4, 5)
        assert ask("example.com", A).code == 3
    assert [packet[2:] for packet in seen] == [plain[2:]]
    end(server)
    end(other)


def test_answers_of_others_are_not_taken(stage: Stage) -> None:
    """Wrong number, wrong question, wrong sender: the right answer comes last and is the one passed on."""
    with inside(stage.container):
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        server.bind(("127.0.0.2", 53))
        other = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        other.bind(("127.0.0.3", 53))

    def serve() -> None:
        packet, address = server.recvfrom(2000)
        answer = b"\x81\x83" + packet[4:]
        server.sendto(bytes((packet[0] ^ 1, packet[1])) + answer + b"bad", address)
        server.sendto(packet[:2] + answer.replace(b"example", b"exampel") + b"bad", address)
        other.sendto(packet[:2] + answer + b"bad", address)
        server.sendto(packet[:2] + answer + b"good", address)

    stage.attach(Server("127.0.0.2"))
    thread = threading.Thread(target=serve)
    thread.start()
    with inside(stage.container):
        assert ask("example.com", A).packet.endswith(b"good")
    thread.join()
    server.close()
    other.close()


def test_a_flood_of_questions_is_bounded_and_others_are_answered(stage: Stage, tmp_path: Path) -> None:
    second = network.make_namespace(tmp_path / "second")
    try:
        silent = udp_server("127.0.0.53", 53, lambda packet: None)
        stage.attach(Server("127.0.0.53", in_host=True))
        stage.dns.attach(Resolver("other", second, {"n": {}}, ()))
        before = stage.fds
        with inside(stage.container), client() as flood:
            for number in range(4 * FORWARDS_MAX):
                flood.send(question(f"x{number}.example", A, number))
                if number % 64 == 0:
                    time.sleep(0.001)
            # Those that are too many are refused at once.
            assert Reply(flood.recv(600)).code == 2
            with inside(second):
                assert ask("web", A).data == ["10.0.0.2"]
            assert ask("web", A).data == ["10.0.0.2"]
            assert stage.fds - before <= FORWARDS_MAX + 2
        until = time.monotonic() + 20
        while stage.fds > before + 1:
            assert time.monotonic() < until
            time.sleep(0.05)
        end(silent)
    finally:
        netns.remove(second)


def test_connections_of_one_container_are_bounded(stage: Stage) -> None:
    stage.attach()
    before = stage.fds
    with inside(stage.container):
        idle = [client(socket.SOCK_STREAM) for _ in range(2 * STREAMS_MAX)]
        assert ask("web", A).data == ["10.0.0.2"]
        assert stage.fds - before <= STREAMS_MAX
        for each in idle:
            each.close()
        assert ask("web", A, tcp=True).data == ["10.0.0.2"]


def test_it_does_not_ask_itself(stage: Stage) -> None:
    stage.attach(Server("127.0.0.11"))
    with inside(stage.container):
        assert ask("example.com", A).code == 2


def test_the_control_socket_is_its_owners_alone(stage: Stage, tmp_path: Path) -> None:
    stage.attach()
    folder = tmp_path / "state" / "network"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "socket").stat().st_mode & 0o777 == 0o600
