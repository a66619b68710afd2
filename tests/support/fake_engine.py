"""An engine that answers what it is told to: for tests of the command that need no daemon."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Answer = tuple[int, bytes] | tuple[int, bytes, str]


class FakeEngine:
    """Answers by "METHOD /path" (without the query); what was asked is in `requests`."""

    def __init__(self, path: Path, answers: dict[str, Answer | Callable[[bytes], Answer]]) -> None:
        self.address = f"unix://{path}"
        self.requests: list[tuple[str, bytes]] = []
        self.connections = 0
        self._answers = answers
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(16)
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as lines:
            while first := lines.readline():
                method, target, _ = first.decode().split()
                headers = {}
                while (line := lines.readline().strip()):
                    name, _, value = line.decode().partition(":")
                    headers[name.lower()] = value.strip()
                body = b""
                if headers.get("transfer-encoding") == "chunked":
                    while size := int(lines.readline(), 16):
                        body += lines.read(size)
                        lines.readline()
                    lines.readline()
                elif "content-length" in headers:
                    body = lines.read(int(headers["content-length"]))
                self.requests.append((f"{method} {target}", body))
                answer = self._answers.get(f"{method} {target.partition('?')[0]}", (404, b'{"message":"page not found"}'))
                status, content, *kind = answer(body) if callable(answer) else answer
                connection.sendall(_written(status, content, kind[0] if kind else "length"))
                if kind == ["close"]:
                    return


def _written(status: int, content: bytes, kind: str) -> bytes:
    head = f"HTTP/1.1 {status} Whatever\r\nContent-Type: application/json\r\n".encode()
    if kind == "chunked":
        # One byte a chunk is the hardest that a peer can do.
        return head + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(b"1\r\n%c\r\n" % byte for byte in content) + b"0\r\n\r\n"
    if kind == "close":
        return head + b"Connection: close\r\n\r\n" + content
    return head + b"Content-Length: %d\r\n\r\n" % len(content) + content


@contextmanager
def fake_engine(path: Path, answers: dict[str, Answer | Callable[[bytes], Answer]]) -> Iterator[FakeEngine]:
    engine = FakeEngine(path, answers)
    try:
        yield engine
    finally:
        engine.close()
