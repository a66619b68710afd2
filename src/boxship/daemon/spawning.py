"""Our own shims: asked for at the spawner, without the program in between that a real containerd has to start.

Runs in: the daemon, in worker threads.
Spec: the message of src/native/caller.h: {version, argc, envc, umask} with the descriptors 0, 1, 2, the folder, and a file of all
strings, each with a NUL behind it; the answer is {EXIT, code}. What is said and answered is the command line of
`containerd-shim-boxship-v1`, which is started instead when no spawner answers, and starts one.
"""

from __future__ import annotations

import array
import os
import socket
import struct
import subprocess

from boxship.containerd.tasks.launch import Programs

SHIM = "containerd-shim-boxship-v1"
WORD = struct.Struct("=iiii")
VERSION, EXIT = 1, 5
SOCKET_VARIABLE = "BOXSHIP_SPAWNER"
FILE_MAX = 1 << 20


class Own(Programs):
    """The launcher of our own shims."""

    def __init__(
        self, program: str, spawner: str, address: str, ttrpc_address: str, publish_binary: str, debug: bool = False,
    ) -> None:
        """`program` is the path of the shim's native entry, `spawner` that of the spawner's socket."""
        super().__init__(address, ttrpc_address, publish_binary, debug)
        self._program = program
        self._spawner = spawner
        # Now, while there is one thread: to read it is to change it for a moment.
        self._umask = os.umask(0o022)
        os.umask(self._umask)

    def binary(self, runtime: str) -> str:
        """Of Programs: ours, whatever the runtime is called."""
        return self._program

    def execute(
        self, argv: list[str], cwd: str, environ: dict[str, str], stdin: bytes, limit_s: float,
    ) -> tuple[int, bytes, bytes]:
        """Of Programs: in a fork of the spawner."""
        # Only a shim of version 3 is asked to take the containers of its sandbox.
        environ = {**environ, SOCKET_VARIABLE: self._spawner, "MAX_SHIM_VERSION": "3"}
        if argv[0] == self._program:
            answer = self._ask(argv, cwd, environ, stdin, limit_s)
            if answer is not None:
                return answer
        return super().execute(argv, cwd, environ, stdin, limit_s)

    def _ask(
        self, argv: list[str], cwd: str, environ: dict[str, str], stdin: bytes, limit_s: float,
    ) -> tuple[int, bytes, bytes] | None:
        """None: there is no spawner, or it went away without a word."""
        strings = [*argv, *(f"{key}={value}" for key, value in environ.items())]
        data = b"".join(os.fsencode(text) + b"\0" for text in strings)
        fds: list[int] = []
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as peer:
            peer.settimeout(limit_s)
            try:
                peer.connect(self._spawner)
                for name, content in (("stdin", stdin), ("stdout", b""), ("stderr", b"")):
                    fds.append(_file(name, content))
                fds.append(os.open(cwd, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
                fds.append(_file("strings", data))
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
                peer.sendmsg([WORD.pack(VERSION, len(argv), len(environ), self._umask)], [rights])
                word = peer.recv(WORD.size)
                if len(word) != WORD.size:
                    return None
                what, code, _, _ = WORD.unpack(word)
                return (code, _content(fds[1]), _content(fds[2])) if what == EXIT else None
            except (ConnectionError, FileNotFoundError):
                return None
            except TimeoutError:
                raise subprocess.TimeoutExpired(argv, limit_s) from None
            finally:
                for fd in fds:
                    os.close(fd)


def _file(name: str, content: bytes) -> int:
    fd = os.memfd_create(f"boxship-{name}", os.MFD_CLOEXEC)
    os.pwrite(fd, content, 0)
    return fd


def _content(fd: int) -> bytes:
    return os.pread(fd, FILE_MAX, 0)
