"""A container's terminal: its master side comes over a socket from the runtime, and is copied to and from the client's FIFOs.

Runs in: the shim's loop; nothing here waits. Spec: runc's docs/terminals.md; pty(7), ioctl_tty(2).
"""

from __future__ import annotations

import _socket
import errno
import os

from boxship.kit.errors import BoxshipError
from boxship.kit.loop import BROKEN, IN, OUT, Later
from boxship.shim.stdio import append_to, fifo_path, is_fifo, split_uri

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from boxship.kit.loop import Loop
    from boxship.shim.handover import Contents, Parcel
    from boxship.shim.logger import Logger

_READ = 32768
_DRAIN_S = 10.0
_LOOK_S = 0.05
_TIOCSWINSZ = 0x5414
_TIOCGPTPEER = 0x5441  # Linux ≥ 4.13


class Console:
    """A terminal, with the same face as `Stdio`.

    Attributes:
        path: where the runtime sends the master side to.
    """

    def __init__(self, loop: Loop, logger: Logger | None = None) -> None:
        self.fds: list[int] = []
        self.logger = logger
        self._loop = loop
        self._master = -1
        self._peer = -1
        self._input = self._input_writer = -1
        self._sink = self._sink_reader = -1
        self._sink_waits = False
        """Whether the sink is one that epoll(7) can wait for: a FIFO and not a file."""
        self._to_sink = b""
        self._to_master = b""
        self._size: tuple[int, int] | None = None
        self._folder = -1
        self._name = self.path = ""
        self._listener: _socket.socket | None = None

    def listen(self, folder: str, name: str) -> None:
        """Make the socket in `folder`, under `name`. Raises OSError."""
        self._folder = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._name = name
        # A bundle's path is often longer than a socket's address may be, and the runtime is another process.
        self.path = f"/proc/{os.getpid()}/fd/{self._folder}/{name}"
        self._listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC, 0)
        try:
            self._listener.bind(self.path)
            self._listener.listen(1)
        except OSError:
            self.close()
            raise

    def open(self, stdin: str, stdout: str, stderr: str) -> None:
        """Open the client's side. Raises NotFound, Unsupported, OSError."""
        path = fifo_path(stdin)
        if path:
            self._input = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            if is_fifo(path):
                self._input_writer = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if self.logger is not None:
            self._sink = os.dup(self.logger.stdout)
            self.logger.handed_over()
            self._sink_waits = True
        elif split_uri(stdout)[0] == "file":
            self._sink = append_to(split_uri(stdout)[1])
        elif fifo_path(stdout):
            path = fifo_path(stdout)
            if is_fifo(path):
                self._sink_reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                self._sink = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                self._sink_waits = True
            else:
                self._sink = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        if self._sink_waits:
            os.set_blocking(self._sink, False)

    def handed_over(self) -> None:
        """The runtime has ended well, so the master side is there: begin to copy. Raises BoxshipError."""
        listener, self._listener = self._listener, None
        assert listener is not None
        listener.setblocking(False)
        try:
            fd, _ = listener._accept()  # type: ignore[attr-defined]
            conn = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, fd)
            _, ancillary, _, _ = conn.recvmsg(4096, _socket.CMSG_SPACE(4), _socket.MSG_CMSG_CLOEXEC)
            conn.close()
        except BlockingIOError:
            raise BoxshipError("the runtime sent no terminal") from None
        finally:
            listener.close()
            self._remove_socket()
        for level, kind, data in ancillary:
            if (level, kind) == (_socket.SOL_SOCKET, _socket.SCM_RIGHTS):
                self._master = int.from_bytes(data[:4], "little")
        if self._master < 0:
            raise BoxshipError("the runtime sent no terminal")
        os.set_blocking(self._master, False)
        # Held, so that the terminal does not hang up when the container's processes have it all closed for a moment.
        try:
            from fcntl import ioctl

            self._peer = ioctl(self._master, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError:
            pass  # an old kernel, or a runtime's own kind of terminal
        if self._size is not None:
            self.resize(*self._size)
        self._watch()

    def _watch(self) -> None:
        if self._master >= 0:
            self._loop.add(self._master, IN, self._master_ready)
        if self._input >= 0:
            self._loop.add(self._input, IN, self._input_ready)
        if self._sink_waits and self._sink >= 0:
            self._loop.add(self._sink, 0, self._sink_ready)

    def pack(self, parcel: Parcel) -> tuple[object, ...]:
        """For `unpack`, in the next worker, of one that is handed over."""
        fds = (self._master, self._peer, self._input, self._input_writer, self._sink, self._sink_reader)
        return [parcel.put(fd) for fd in fds], self._sink_waits, self._to_sink, self._to_master

    def unpack(self, packed: tuple[Any, ...], contents: Contents) -> None:
        """Undo `pack`, with a fresh one."""
        places, self._sink_waits, self._to_sink, self._to_master = packed
        self._master, self._peer, self._input, self._input_writer, self._sink, self._sink_reader = map(contents.fd, places)
        self._watch()
        self._settle()

    def resize(self, width: int, height: int) -> None:
        """Characters by lines."""
        from fcntl import ioctl

        self._size = width, height
        if self._master >= 0:
            ioctl(self._master, _TIOCSWINSZ, b"".join(n.to_bytes(2, "little") for n in (height, width, 0, 0)))

    # --- to the client

    def _master_ready(self, events: int) -> None:
        if events & OUT:
            self._write_master()
        if not events & (IN | BROKEN) or self._to_sink:
            self._settle()
            return
        try:
            data = os.read(self._master, _READ)
        except BlockingIOError:
            self._settle()
            return
        except OSError:
            data = b""  # EIO: nobody has the other side open
        if not data:
            self._hang_up()
            return
        if self._sink >= 0:
            self._to_sink = data
            self._write_sink()
        self._settle()

    def _sink_ready(self, events: int) -> None:
        if events & BROKEN:
            self._to_sink = b""  # the logger is gone: the container shall not come to a halt for that
            self._close_sink()
            self._settle()
            return
        self._write_sink()
        if self._master < 0 and not self._to_sink:
            self._close_sink()
        self._settle()

    def _write_sink(self) -> None:
        try:
            while self._to_sink:
                self._to_sink = self._to_sink[os.write(self._sink, self._to_sink) :]
        except BlockingIOError:
            pass
        except OSError:
            self._to_sink = b""  # the disk is full

    def _hang_up(self) -> None:
        self._loop.remove(self._master)
        os.close(self._master)
        self._master = -1
        self._stop_input()
        if not self._to_sink:
            self._close_sink()

    def _close_sink(self) -> None:
        """The client reads an end of file; what is in the FIFO stays there."""
        if self._sink >= 0:
            self._loop.remove(self._sink)
            os.close(self._sink)
            self._sink = -1

    # --- from the client

    def _input_ready(self, events: int) -> None:
        if self._to_master:
            self._settle()
            return
        try:
            data = os.read(self._input, _READ)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._stop_input()
            return
        self._to_master = data
        self._write_master()
        self._settle()

    def _write_master(self) -> None:
        try:
            while self._to_master and self._master >= 0:
                self._to_master = self._to_master[os.write(self._master, self._to_master) :]
        except BlockingIOError:
            pass
        except OSError:
            self._to_master = b""

    def _stop_input(self) -> None:
        if self._input >= 0:
            self._loop.remove(self._input)
            os.close(self._input)
            self._input = -1
        self.close_stdin()

    def _settle(self) -> None:
        """Wait for exactly what can go on."""
        if self._master >= 0:
            self._loop.want(self._master, (0 if self._to_sink else IN) | (OUT if self._to_master else 0))
        if self._input >= 0:
            self._loop.want(self._input, 0 if self._to_master else IN)
        if self._sink_waits and self._sink >= 0:
            self._loop.want(self._sink, OUT if self._to_sink else 0)

    # --- the end

    def close_stdin(self) -> None:
        """Nothing more comes once the client has closed its end."""
        if self._input_writer >= 0:
            os.close(self._input_writer)
            self._input_writer = -1

    def process_ended(self) -> None:
        """From now on an end of file is one: what was written is copied, and then the client is told."""
        if self._peer >= 0:
            os.close(self._peer)
            self._peer = -1

    def drained(self) -> Later:
        """Done when what was written is where the client can read it, or in some seconds."""
        later = Later()
        deadline = self._loop.after(_DRAIN_S, later.set)
        later.then(lambda done: deadline.cancel())

        def look() -> None:
            if self._master >= 0 and not self._to_sink:
                self._master_ready(IN)
            if not self._to_sink:
                later.set()
            elif not later.done:
                self._loop.after(_LOOK_S, look)

        look()
        return later

    def _remove_socket(self) -> None:
        if self._folder >= 0:
            try:
                os.unlink(self._name, dir_fd=self._folder)
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise
            os.close(self._folder)
            self._folder = -1

    def close(self) -> None:
        """Release everything."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        self._remove_socket()
        self.process_ended()
        if self._master >= 0:
            self._drain()
        self._stop_input()
        self._close_sink()
        if self._sink_reader >= 0:
            os.close(self._sink_reader)
            self._sink_reader = -1
        if self.logger is not None:
            self.logger.close()

    def _drain(self) -> None:
        """What is there already, as far as the client takes it."""
        while self._master >= 0 and not self._to_sink:
            try:
                data = os.read(self._master, _READ)
            except OSError:
                break
            if not data:
                break
            if self._sink >= 0:
                self._to_sink = data
                self._write_sink()
        self._loop.remove(self._master)
        os.close(self._master)
        self._master = -1


