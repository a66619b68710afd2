"""What a caller of a runtime gets from it beside its output: descriptors through sockets, and what terminals say."""

from __future__ import annotations

import array
import os
import select
import socket
import time
from pathlib import Path


class Receiver:
    """A socket to which descriptors are sent, as conmon and containerd-shim have one."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.bind(self.path)
        self.socket.listen()
        self.socket.settimeout(20)
        self.fds: list[int] = []

    def take(self) -> tuple[bytes, int]:
        """(payload, descriptor) of the next message, which must bring exactly one."""
        conn, _ = self.socket.accept()
        with conn:
            data, ancillary, _, _ = conn.recvmsg(4096, socket.CMSG_SPACE(4 * 8))
        fds = array.array("i")
        for _, _, raw in ancillary:
            fds.frombytes(raw)
        self.fds += fds
        assert len(fds) == 1
        return data, fds[0]

    def close(self) -> None:
        self.socket.close()
        for fd in self.fds:
            os.close(fd)


def read_until(fd: int, wanted: bytes) -> bytes:
    data, deadline = b"", time.monotonic() + 20
    while wanted not in data:
        assert time.monotonic() < deadline, data
        if select.select([fd], [], [], 0.2)[0]:
            try:
                data += os.read(fd, 4096)
            except OSError:  # the last one on the other side has gone
                break
    return data
