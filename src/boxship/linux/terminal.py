"""Terminals: the caller's connected to a container's, and descriptors handed to whoever keeps the other side.

Runs in: the runtime, in the foreground of `run` and `exec`.
Spec: termios(3), pty(7), ioctl_tty(2), unix(7); runc's docs/terminals.md for the console socket.
Not here: making the container's terminal, which init does in the container's own devpts.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    import select
    from typing import Any

_TIOCGWINSZ, _TIOCSWINSZ = 0x5413, 0x5414
_TIOCGPTPEER = 0x5441  # Linux ≥ 4.13
_POLLIN, _POLLOUT, _POLLERR, _POLLHUP, _POLLNVAL = 1, 4, 8, 16, 32
_BROKEN = _POLLERR | _POLLHUP | _POLLNVAL
_BUFFER = 32768
_WRITE = 4096
"""As much as poll(2) promises room for (PIPE_BUF)."""
_DRAIN_LIMIT = 1 << 18
"""More than the kernel buffers for a terminal: what comes after was not written by the process that has ended."""
_SUN_PATH = 107
_END_OF_FILE = b"\4"

# Indexes into what termios.tcgetattr() returns.
_IFLAG, _OFLAG, _CFLAG, _LFLAG, _CC = 0, 1, 2, 3, 6


def send_fd(path: str, fd: int, payload: bytes) -> None:
    """Connect to the AF_UNIX stream socket at `path` and send `payload` with a copy of `fd`. Raises OSError."""
    import _socket

    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0)
    try:
        try:
            _connect(sock, path)
        except OSError as error:
            raise OSError(error.errno, error.strerror, path) from None
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, fd.to_bytes(4, "little"))]
        # The descriptor travels with the first byte, so there must be one.
        sent = sock.sendmsg([payload or b"\0"], rights, _socket.MSG_NOSIGNAL)
        while sent < len(payload):
            sent += sock.send(payload[sent:], _socket.MSG_NOSIGNAL)
    finally:
        sock.close()


def _connect(sock: Any, path: str) -> None:
    raw = os.fsencode(path)
    if len(raw) <= _SUN_PATH:
        sock.connect(raw)
        return
    # Longer than struct sockaddr_un has room for: name it by way of its folder.
    folder = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sock.connect(f"/proc/self/fd/{folder}/{os.path.basename(path)}")
    finally:
        os.close(folder)


def make_raw(fd: int) -> list[Any]:
    """Let every key pass: no echo, no line editing, no signals made from keys. Returns what `restore` takes.

    Output stays processed, as in runc: newlines become CR LF here, and not in the container's terminal too.
    Raises termios.error for what is no terminal.
    """
    import termios as t

    saved = t.tcgetattr(fd)
    mode: list[Any] = [*saved[:_CC], list(saved[_CC])]
    mode[_IFLAG] &= ~(t.IGNBRK | t.BRKINT | t.PARMRK | t.ISTRIP | t.INLCR | t.IGNCR | t.ICRNL | t.IXON)
    mode[_OFLAG] |= t.OPOST
    mode[_LFLAG] &= ~(t.ECHO | t.ECHONL | t.ICANON | t.ISIG | t.IEXTEN)
    mode[_CFLAG] = mode[_CFLAG] & ~(t.CSIZE | t.PARENB) | t.CS8
    mode[_CC][t.VMIN], mode[_CC][t.VTIME] = 1, 0
    t.tcsetattr(fd, t.TCSANOW, mode)
    return saved


def restore(fd: int, saved: list[Any]) -> None:
    """Undo `make_raw`. A terminal that has hung up by now is no error."""
    import termios as t

    try:
        t.tcsetattr(fd, t.TCSANOW, saved)
    except t.error:
        pass


def clear_onlcr(master: int) -> None:
    """Let a container's newlines pass as they are: who reads them may be a file."""
    import termios as t

    mode = t.tcgetattr(master)
    mode[_OFLAG] &= ~t.ONLCR
    t.tcsetattr(master, t.TCSANOW, mode)


class Session:
    """Bytes between the caller's terminal and the master side of a container's. Takes `master`; borrows the others.

    The caller's terminal, if it is one, is in raw mode until `close`. The caller's descriptors stay blocking, since other
    programs share them: no more is written at once than poll(2) promises room for.
    """

    def __init__(self, master: int, stdin: int, stdout: int) -> None:
        self.master = master
        self.stdin = stdin
        self.stdout = stdout
        self._to_master = b""
        self._to_stdout = b""
        self._eof = False
        self._hung_up = False
        self._deaf = False
        """Nobody reads stdout any more. The container shall not come to a halt for that."""
        self._peer = _open_peer(master)
        """The container's side, held so that it does not hang up whenever the container has it closed for a moment, as an
        init system does that opens /dev/console anew for each of its children."""
        os.set_blocking(master, False)
        clear_onlcr(master)
        self._before = make_raw(stdin) if os.isatty(stdin) else None
        self.resize()

    def resize(self) -> None:
        """Give the container's terminal the caller's size; the kernel then tells the container's foreground processes."""
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
        wanted = {self.master: 0, self.stdin: 0, self.stdout: 0}
        if not self._hung_up:
            wanted[self.master] = (0 if self._to_stdout else _POLLIN) | (_POLLOUT if self._to_master else 0)
        if not self._eof and not self._to_master:
            wanted[self.stdin] |= _POLLIN
        if self._to_stdout:
            wanted[self.stdout] |= _POLLOUT
        for fd, events in wanted.items():
            if events:
                poll.register(fd, events)
                continue
            # Errors are reported even where nothing is asked for, so it must not be registered at all.
            try:
                poll.unregister(fd)
            except KeyError:
                pass

    def copy(self, ready: dict[int, int]) -> None:
        """Move what is there, after poll(2) said so."""
        if ready.get(self.stdin, 0) & (_POLLIN | _BROKEN) and not self._eof and not self._to_master:
            self._read_stdin()
        if ready.get(self.master, 0) & _POLLOUT and self._to_master:
            self._write_master()
        if ready.get(self.stdout, 0) & (_POLLOUT | _BROKEN) and self._to_stdout:
            self._write_stdout()
        if ready.get(self.master, 0) & (_POLLIN | _BROKEN) and not self._to_stdout:
            self._read_master()

    def _read_stdin(self) -> None:
        try:
            self._to_master = os.read(self.stdin, _BUFFER)
        except BlockingIOError:
            return
        except OSError:
            self._eof = True  # the caller's terminal has hung up, or there is no stdin
            return
        if not self._to_master:
            # End of file for a terminal is a character that its line discipline knows.
            self._eof = True
            self._to_master = _END_OF_FILE

    def _write_master(self) -> None:
        try:
            self._to_master = self._to_master[os.write(self.master, self._to_master) :]
        except BlockingIOError:
            pass
        except OSError:
            self._to_master = b""

    def _read_master(self) -> bool:
        """False when there is nothing to read now, or no more ever."""
        try:
            self._to_stdout = os.read(self.master, _BUFFER)
        except BlockingIOError:
            return False
        except OSError:
            # EIO: the container's side is closed, and poll(2) would say so over and over.
            self._hung_up = True
            return False
        if self._deaf:
            self._to_stdout = b""
        return True

    def _write_stdout(self) -> None:
        try:
            self._to_stdout = self._to_stdout[os.write(self.stdout, self._to_stdout[:_WRITE]) :]
        except BlockingIOError:
            pass
        except OSError:
            self._deaf = True
            self._to_stdout = b""

    def close(self) -> None:
        """Print what is left, restore the caller's terminal, release the master."""
        try:
            self._drain()
        finally:
            os.close(self.master)
            self.master = -1
            if self._peer >= 0:
                os.close(self._peer)
                self._peer = -1
            if self._before is not None:
                restore(self.stdin, self._before)

    def _drain(self) -> None:
        """What the process wrote before it ended: the kernel hands over all of it before it answers EAGAIN."""
        import select

        drained = 0
        while True:
            drained += len(self._to_stdout)
            while self._to_stdout:
                poll = select.poll()
                poll.register(self.stdout, _POLLOUT)
                poll.poll()
                self._write_stdout()
            if drained > _DRAIN_LIMIT or not self._read_master():
                return


def _open_peer(master: int) -> int:
    """The other side of a terminal, whatever devpts it is in; -1 where the kernel cannot."""
    from fcntl import ioctl

    try:
        return ioctl(master, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return -1
