"""A hijacked connection and this terminal: bytes both ways, frames taken apart, keys to detach, signals passed on.

Runs in: the boxship command, main thread.
Spec: Docker Engine API, "Attach to a container": without a terminal each frame is {stream, 0, 0, 0, length: 4 bytes, big-endian}.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from collections.abc import Callable
    from typing import Any

_BUFFER = 65536
_POLLIN, _POLLHUP = 1, 16
_SHUT_WR = 1
_SIGWINCH, _SIGCHLD, _SIGURG, _SIGPIPE, _SIGINT = 28, 17, 23, 13, 2
_TIOCGWINSZ = 0x5413
DETACHED, ENDED = "detached", "ended"


def window(fd: int = 1) -> tuple[int, int]:
    """(rows, columns) of the terminal; (0, 0) where there is none."""
    from fcntl import ioctl

    for each in (fd, 0, 2):
        try:
            size = ioctl(each, _TIOCGWINSZ, bytes(8))
        except OSError:
            continue
        return int.from_bytes(size[:2], "little"), int.from_bytes(size[2:4], "little")
    return 0, 0


def keys(text: str) -> bytes:
    """The bytes of "ctrl-p,ctrl-q". Raises InvalidArgument."""
    from boxship.kit.errors import InvalidArgument

    found = b""
    for key in (text or "ctrl-p,ctrl-q").split(","):
        if len(key) == 1 and key.isascii():
            found += key.encode()
        elif key.startswith("ctrl-") and len(key) == 6 and ("a" <= key[5] <= "z" or key[5] in "@[\\]^_"):
            found += bytes([ord(key[5].upper()) & 0x1F])
        else:
            raise InvalidArgument(f"invalid detach keys ({text}): Unknown character: '{key}'")
    return found


class Frames:
    """Takes the multiplexed stream apart."""

    def __init__(self, out: Callable[[int, bytes], None]) -> None:
        self._out = out
        self._rest = b""
        self._left = 0
        self._stream = 1

    def feed(self, data: bytes) -> None:
        """Give what has come to `out(stream, data)`, stream 1 or 2. Raises BoxshipError for the engine's own error (stream 3)."""
        data = self._rest + data
        self._rest = b""
        while data:
            if not self._left:
                if len(data) < 8:
                    self._rest = data
                    return
                self._stream, self._left = data[0], int.from_bytes(data[4:8], "big")
                data = data[8:]
                continue
            piece, data = data[: self._left], data[self._left :]
            self._left -= len(piece)
            if self._stream == 3:
                from boxship.kit.errors import BoxshipError

                raise BoxshipError(f"error from daemon in stream: {piece.decode('utf-8', 'replace')}")
            self._out(2 if self._stream == 2 else 1, piece)


def to_standard(stream: int, data: bytes) -> None:
    """The usual `out`: the stream with the same number."""
    from boxship.cli.show.table import write

    write(data, stream)


class Session:
    """One attachment.

    `terminal`: the container has one, so that ours is made raw; `stdin`: whether input is sent; `detach`: the keys, b"" for none;
    `on_resize(rows, columns)` and `on_signal(number)` are called meanwhile, on_signal only without a terminal.
    """

    def __init__(
        self,
        sock: _socket.socket,
        early: bytes,
        *,
        terminal: bool,
        stdin: bool,
        detach: bytes = b"",
        on_resize: Callable[[int, int], None] | None = None,
        on_signal: Callable[[int], None] | None = None,
    ) -> None:
        self._socket = sock
        self._early = early
        self._terminal = terminal
        self._stdin = stdin
        self._detach = detach
        self._typed = b""
        self._on_resize = on_resize
        self._on_signal = on_signal
        self._saved: list[Any] | None = None
        self._signals: Any = None
        self._frames = Frames(to_standard)

    def __enter__(self) -> Session:
        from boxship.linux.process import Signals

        if self._on_signal is not None or self._terminal:
            self._signals = Signals()
        if self._terminal and self._stdin and os.isatty(0):
            from boxship.linux import terminal

            self._saved = terminal.make_raw(0)
        return self

    def __exit__(self, *reason: object) -> None:
        if self._saved is not None:
            from boxship.linux import terminal

            terminal.restore(0, self._saved)
            self._saved = None
        if self._signals is not None:
            self._signals.close()
            self._signals = None
        self._socket.close()

    def resize(self) -> None:
        """Tell the container the size of our terminal."""
        if self._on_resize is not None:
            rows, columns = window()
            if rows and columns:
                self._on_resize(rows, columns)

    def run(self) -> str:
        """Pass bytes on until the container's side ends (ENDED) or the keys are pressed (DETACHED).

        Raises OSError, BoxshipError.
        """
        import select

        poll = select.poll()
        poll.register(self._socket.fileno(), _POLLIN)
        if self._stdin:
            poll.register(0, _POLLIN)
        if self._signals is not None:
            poll.register(self._signals.fd, _POLLIN)
        if self._early:
            self._show(self._early)
        while True:
            ready = dict(poll.poll())
            if self._signals is not None and self._signals.fd in ready:
                self._pass_signals()
            if self._socket.fileno() in ready:
                try:
                    data = self._socket.recv(_BUFFER)
                except ConnectionResetError:
                    data = b""
                if not data:
                    return ENDED
                self._show(data)
            if 0 in ready and self._stdin and not self._input(poll):
                return DETACHED

    def _show(self, data: bytes) -> None:
        if self._terminal:
            to_standard(1, data)
        else:
            self._frames.feed(data)

    def _input(self, poll: Any) -> bool:
        try:
            data = os.read(0, _BUFFER)
        except OSError:
            data = b""
        if not data:
            self._stdin = False
            poll.unregister(0)
            try:
                self._socket.shutdown(_SHUT_WR)
            except OSError:
                pass  # the container's side was faster
            return True
        data, detached = self._without_keys(data)
        try:
            if data:
                self._socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            self._stdin = False
            poll.unregister(0)
        return not detached

    def _without_keys(self, data: bytes) -> tuple[bytes, bool]:
        """(what is to be sent, whether the keys were pressed): a beginning of the keys is held back until it is known."""
        if not self._detach or self._saved is None:
            return data, False
        out = b""
        for byte in data:
            self._typed += bytes([byte])
            while self._typed and not self._detach.startswith(self._typed):
                out += self._typed[:1]
                self._typed = self._typed[1:]
            if self._typed == self._detach:
                return out, True
        return out, False

    def _pass_signals(self) -> None:
        try:
            numbers = os.read(self._signals.fd, 512)
        except BlockingIOError:
            return
        for number in numbers:
            if number == _SIGWINCH:
                if self._terminal:
                    self.resize()
            elif number not in (_SIGCHLD, _SIGURG, _SIGPIPE) and self._on_signal is not None:
                self._on_signal(number)
