"""Terminals: the caller's connected to a container's, and descriptors handed to whoever keeps the other side.

Runs in: the runtime, in the foreground of `run` and `exec`.
Spec: termios(3), ioctl_tty(2); runc's docs/terminals.md for the console socket.
"""

from __future__ import annotations

import os

import _socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    import select

_TIOCGWINSZ, _TIOCSWINSZ = 0x5413, 0x5414
_POLLIN, _POLLOUT, _POLLERR, _POLLHUP = 1, 4, 8, 16
_BUFFER = 32768


def send_fd(path: str, fd: int, payload: bytes) -> None:
    """Connect to the AF_UNIX stream socket at `path` and send one message with one descriptor. Raises OSError."""
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0)
    try:
        try:
            sock.connect(path)
        except OSError as error:
            raise OSError(error.errno, error.strerror, path) from None
        rights = fd.to_bytes(4, "little")
        sock.sendmsg([payload], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])
    finally:
        sock.close()


class Session:
    """Bytes between the caller's terminal and the master side of a container's. Takes `master`; borrows the others.

    The caller's terminal, if it is one, is in raw mode until `close`.
    """

    def __init__(self, master: int, stdin: int, stdout: int) -> None:
        self.master = master
        self.stdin = stdin
        self.stdout = stdout
        self._to_master = b""
        self._before: list[object] | None = None
        self._eof = False
        if os.isatty(stdin):
            import termios
            import tty

            self._before = termios.tcgetattr(stdin)
            tty.setraw(stdin, termios.TCSANOW)
            # Output keeps its newline translation off only on the container's side: its terminal did that already.
        self.resize()

    def resize(self) -> None:
        """Give the container's terminal the caller's size."""
        from fcntl import ioctl

        for fd in (self.stdin, self.stdout):
            try:
                size = ioctl(fd, _TIOCGWINSZ, bytes(8))
            except OSError:
                continue  # not a terminal
            ioctl(self.master, _TIOCSWINSZ, size)
            return

    def register(self, poll: select.poll) -> None:
        """Tell `poll` what is waited for now."""
        if self.master >= 0:
            poll.register(self.master, _POLLIN | (_POLLOUT if self._to_master else 0))
        if not self._eof and not self._to_master:
            try:
                poll.register(self.stdin, _POLLIN)
            except PermissionError:
                self._eof = True  # a regular file cannot be polled by epoll; poll(2) takes it, so this is a closed one
        else:
            try:
                poll.unregister(self.stdin)
            except KeyError:
                pass

    def copy(self, ready: dict[int, int]) -> None:
        """Move what is there, after poll(2) said so."""
        if self.stdin in ready and not self._eof and not self._to_master:
            data = os.read(self.stdin, _BUFFER)
            if data:
                self._to_master = data
            else:
                # End of file for a terminal is a character that its line discipline knows.
                self._eof = True
                self._to_master = b"\4"
        if self._to_master and ready.get(self.master, 0) & _POLLOUT:
            self._to_master = self._to_master[os.write(self.master, self._to_master) :]
        if ready.get(self.master, 0) & (_POLLIN | _POLLHUP | _POLLERR):
            self._drain_once()

    def _drain_once(self) -> bool:
        try:
            data = os.read(self.master, _BUFFER)
        except OSError:
            return False  # EIO: nobody holds the slave side any more
        view = memoryview(data)
        while view:
            view = view[os.write(self.stdout, view) :]
        return bool(data)

    def close(self) -> None:
        """Print what is left, restore the caller's terminal, release the master."""
        try:
            os.set_blocking(self.master, False)
            while self._drain_once():
                pass
        finally:
            os.close(self.master)
            self.master = -1
            if self._before is not None:
                import termios

                termios.tcsetattr(self.stdin, termios.TCSANOW, self._before)
