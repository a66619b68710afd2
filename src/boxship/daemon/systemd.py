"""What systemd and a service tell one another: state changes, and sockets that were opened before.

Runs in: the daemon. Spec: sd_notify(3), sd_listen_fds(3). Nothing happens where the environment names no systemd.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import MutableMapping

FIRST_FD = 3


def notify(state: str, environ: MutableMapping[str, str] = os.environ) -> bool:
    """Send `READY=1` and the like; says whether there was somebody to tell."""
    address = environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            sender.sendto(state.encode(), address)
        except OSError:
            return False  # whoever started us does not listen any more
    return True


def reloading() -> str:
    """The state to tell before a reload."""
    return f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}"


def listening(environ: MutableMapping[str, str] = os.environ) -> dict[str, socket.socket]:
    """Sockets that were handed to this process, by path (or HOST:PORT). They are its own then: the variables are removed."""
    count, pid = environ.pop("LISTEN_FDS", "0"), environ.pop("LISTEN_PID", "")
    environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdigit():
        return {}
    found = {}
    for fd in range(FIRST_FD, FIRST_FD + int(count)):
        os.set_inheritable(fd, False)
        listener = socket.socket(fileno=fd)
        name = listener.getsockname()
        found[name if isinstance(name, str) else f"{name[0]}:{name[1]}"] = listener
    return found
