"""Network namespaces of containers: made ahead where possible, each pinned to a file below STATE/netns.

Runs in: a thread that may visit other namespaces.
Spec: network_namespaces(7). Making one takes the kernel up to some milliseconds when others are being taken apart at the same
time, so a few are kept ready once the first was needed.
"""

from __future__ import annotations

import os
import secrets
import threading

from boxship.linux import netns
from boxship.linux.netlink import Socket
from boxship.linux.netns import Inside
from boxship.linux.rtnetlink import set_link

READY = 3
_LOOPBACK = 1


def sysctl(name: str, value: str) -> None:
    """Set one of the present network namespace. Raises OSError."""
    with open(f"/proc/sys/net/{name}", "w", encoding="ascii") as file:
        file.write(value)


def _make(path: str) -> None:
    """A namespace with its loopback up, in which new devices have no IPv6 before they are given an address of it."""
    fd = netns.create(path)
    try:
        with Inside(fd):
            try:
                sysctl("ipv6/conf/default/disable_ipv6", "1")
                # As in dockerd's containers: no privilege is needed for ping and for ports below 1024.
                sysctl("ipv4/ip_unprivileged_port_start", "0")
                sysctl("ipv4/ping_group_range", "0 2147483647")
            except FileNotFoundError:
                pass  # a kernel without IPv6
            with Socket() as route:
                route.run([set_link(_LOOPBACK, up=True)])
    except BaseException:
        os.close(fd)
        netns.remove(path)
        raise
    os.close(fd)


class Pool:
    """Hands out namespaces. Thread-safe."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        os.makedirs(directory, mode=0o755, exist_ok=True)
        self._lock = threading.Lock()
        self._ready: list[str] = []

    def path(self, sandbox_id: str) -> str:
        """Where the namespace of a sandbox is pinned."""
        return f"{self.directory}/{sandbox_id[:12]}"

    def take(self) -> str:
        """The id of a new sandbox; "" when none is ready."""
        with self._lock:
            return self._ready.pop(0) if self._ready else ""

    def make_at(self, path: str) -> None:
        """Make one now. Raises OSError, BoxshipError."""
        _make(path)

    def refill(self) -> None:
        """Make as many as are to be ready. Raises OSError, BoxshipError."""
        while len(self._ready) < READY:
            made = secrets.token_hex(32)
            _make(self.path(made))
            with self._lock:
                self._ready.append(made)

    def sweep(self, keep: set[str]) -> None:
        """Remove all but those with these paths. Raises OSError."""
        with self._lock:
            keep = keep | {self.path(each) for each in self._ready}
        for name in os.listdir(self.directory):
            if (path := f"{self.directory}/{name}") not in keep:
                netns.remove(path)

    def close(self) -> None:
        """Remove those that nobody took."""
        with self._lock:
            left, self._ready = self._ready, []
        for each in left:
            netns.remove(self.path(each))
