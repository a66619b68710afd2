"""Network namespaces of the tests' own, clients and servers in them, and a helper of published ports and names."""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from boxship.linux import netns
from boxship.linux.netlink import Socket
from boxship.linux.netns import Inside
from boxship.linux.rtnetlink import set_link

A, PTR, AAAA, TXT = 1, 12, 28, 16


def make_namespace(path: Path) -> str:
    """Pinned to `path`, its loopback up."""
    fd = netns.create(str(path))
    with Inside(fd), Socket() as route:
        route.run([set_link(1, up=True)])
    os.close(fd)
    return str(path)


@contextmanager
def inside(path: str) -> Iterator[None]:
    """The calling thread, and the threads and processes that it starts, are in that namespace."""
    fd = os.open(path, os.O_RDONLY)
    try:
        with Inside(fd):
            yield
    finally:
        os.close(fd)


def tcp_server(address: str, port: int, serve: Callable[[socket.socket], None]) -> socket.socket:
    """A thread for each connection; shut the listener down to end it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, port), family=family, backlog=1024)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=one, args=(connection,), daemon=True).start()

    def one(connection: socket.socket) -> None:
        with connection:
            try:
                serve(connection)
            except OSError:
                pass

    threading.Thread(target=accept, daemon=True).start()
    return listener


def echo(connection: socket.socket) -> None:
    while data := connection.recv(1 << 16):
        connection.sendall(data)


def udp_server(address: str, port: int, answer: Callable[[bytes], bytes | None]) -> socket.socket:
    made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    made.bind((address, port))

    def serve() -> None:
        while True:
            try:
                data, client = made.recvfrom(1 << 16)
                if client is None:
                    return  # shut down
                said = answer(data)
                if said is not None:
                    made.sendto(said, client)
            except OSError:
                return

    threading.Thread(target=serve, daemon=True).start()
    return made


def end(server: socket.socket) -> None:
    """Wakes the thread that reads from it."""
    try:
        server.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    server.close()


def wait_readable(fd: int, limit_s: float = 30) -> None:
    """For the end of a process, by its pidfd."""
    assert select.select([fd], [], [], limit_s)[0], "it did not happen in time"


def everything(connection: socket.socket) -> bytes:
    parts = []
    while data := connection.recv(1 << 20):
        parts.append(data)
    return b"".join(parts)


def question(name: str, kind: int, number: int = 4711, *, edns: int = 0) -> bytes:
    labels = b"".join(bytes((len(each),)) + each.encode() for each in name.split(".") if each)
    packet = struct.pack(">HHHHHH", number, 0x0100, 1, 0, 0, 1 if edns else 0) + labels + b"\0" + struct.pack(">HH", kind, 1)
    return packet + (b"\0" + struct.pack(">HHIH", 41, edns, 0, 0) if edns else b"")


class Reply:
    """An answer taken apart, the simple way; names in records are what the test reads as bytes."""

    def __init__(self, packet: bytes) -> None:
        self.packet = packet
        self.id, flags, _, count, _, _ = struct.unpack_from(">HHHHHH", packet)
        self.code = flags & 15
        self.truncated = bool(flags & 0x200)
        at = 12
        while packet[at]:
            at += 1 + packet[at]
        at += 5
        self.data = []
        for _ in range(count):
            if packet[at] < 0xC0:
                while packet[at]:
                    at += 1 + packet[at]
                at -= 1  # one byte where a pointer has two
            kind, _, self.ttl_s, size = struct.unpack_from(">HHIH", packet, at + 2)
            data = packet[at + 12 : at + 12 + size]
            at += 12 + size
            if kind in (A, AAAA):
                self.data.append(socket.inet_ntop(socket.AF_INET if kind == A else socket.AF_INET6, data))
            else:
                self.data.append(_name(data))


def _name(data: bytes) -> str:
    labels = []
    while data and data[0]:
        labels.append(data[1 : 1 + data[0]].decode())
        data = data[1 + data[0] :]
    return ".".join(labels)


def ask(name: str, kind: int, *, tcp: bool = False, edns: int = 0, timeout_s: float = 20) -> Reply:
    """As a container does, of the name server in the present namespace."""
    packet = question(name, kind, edns=edns)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM) as made:
        made.settimeout(timeout_s)
        made.connect(("127.0.0.11", 53))
        if not tcp:
            made.send(packet)
            return Reply(made.recv(65535))
        made.sendall(len(packet).to_bytes(2) + packet)
        received = b""
        while len(received) < 2 or len(received) < 2 + int.from_bytes(received[:2]):
            data = made.recv(65535)
            assert data, "the connection ended in the middle"
            received += data
        return Reply(received[2:])
