"""A published port through our helper and through docker-proxy, driven by the same clients: a table of docs/performance.md.

Runs in: root, with docker-proxy, wrk, iperf3 and gcc on PATH; network namespaces of its own, which are removed at the end. Both
take turns in each figure. Besides what the clients see, the processor time of the proxy itself is counted: on a machine with few
processors, on which client and server take most of the time, that is what tells them apart.

    python -m bench.proxy [--rounds 5] [--seconds 2] [--docker-proxy PATH] [--only close,keep,bulk,datagrams,ports]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from boxship.network.proxy.client import PortMapping, Proxy

HOST, CONTAINER = f"bench{os.getpid()}h", f"bench{os.getpid()}c"
HOST_IP, CONTAINER_IP = "10.213.7.1", "10.213.7.2"
HTTP, IPERF = 9000, 9001
SERVER_C = r"""
#define _GNU_SOURCE
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>
int main(int argc, char **argv)
{
	static const char answer[] = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
	struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[argc - 1]))};
	int on = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), epoll = epoll_create1(0);
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
	setsockopt(listener, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
	if (bind(listener, (void *)&at, sizeof at) || listen(listener, 4096))
		return 1;
	struct epoll_event events[64], event = {.events = EPOLLIN, .data.fd = listener};
	epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &event);
	for (;;) {
		int count = epoll_wait(epoll, events, 64, -1);
		for (int i = 0; i < count; i++) {
			char text[4096];
			int fd = events[i].data.fd;
			if (fd == listener) {
				while ((fd = accept4(listener, 0, 0, SOCK_NONBLOCK)) >= 0) {
					event.data.fd = fd;
					epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
				}
				continue;
			}
			ssize_t n = recv(fd, text, sizeof text - 1, 0);
			if (n <= 0) {
				close(fd);
				continue;
			}
			text[n] = 0;
			send(fd, answer, sizeof answer - 1, MSG_NOSIGNAL);
			if (strstr(text, "close"))
				close(fd);
		}
	}
}
"""


def run(*argv: str, netns: str = "") -> str:
    """Standard output. Raises CalledProcessError."""
    prefix = ["ip", "netns", "exec", netns] if netns else []
    return subprocess.run([*prefix, *argv], check=True, capture_output=True, text=True).stdout


@contextmanager
def networks() -> Iterator[None]:
    """Two namespaces and a pair of devices, as the host and a container have them."""
    run("ip", "netns", "add", HOST)
    run("ip", "netns", "add", CONTAINER)
    try:
        run("ip", "link", "add", "h0", "netns", HOST, "type", "veth", "peer", "name", "c0", "netns", CONTAINER)
        for netns, device, address in ((HOST, "h0", HOST_IP), (CONTAINER, "c0", CONTAINER_IP)):
            run("ip", "address", "add", f"{address}/24", "dev", device, netns=netns)
            run("ip", "link", "set", device, "up", netns=netns)
            run("ip", "link", "set", "lo", "up", netns=netns)
        yield
    finally:
        run("ip", "netns", "del", HOST)
        run("ip", "netns", "del", CONTAINER)


def cpu_s(pids: list[int]) -> float:
    """Processor time of processes, in seconds."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def pss_mb(pids: list[int]) -> float:
    """Memory of processes, shared pages by their share."""
    total = 0
    for pid in pids:
        found = re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
        total += int(found[1]) if found else 0
    return total / 1024


class Ours:
    """The helper."""

    name = "boxship"

    def __init__(self, folder: str) -> None:
        self._proxy = Proxy(folder)

    def publish(self, protocol: str, port: int, to: int) -> None:
        """A port of 127.0.0.1."""
        self._proxy.publish(PortMapping(protocol, "127.0.0.1", port, CONTAINER_IP, to))

    @property
    def pids(self) -> list[int]:
        """Its processes."""
        return [self._proxy.call({"do": "hello"})["pid"]]

    def close(self) -> None:
        """All of it."""
        self._proxy.stop()


class Theirs:
    """A docker-proxy for each port, started as dockerd does."""

    name = "docker-proxy"

    def __init__(self, program: str) -> None:
        self._program = program
        self._running: list[subprocess.Popen[bytes]] = []

    def publish(self, protocol: str, port: int, to: int) -> None:
        """Waits for its word on descriptor 3."""
        readable, writable = os.pipe()
        # pass_fds keeps the number; the word is expected on 3.
        command = f'exec 3>&{writable}; exec "$0" "$@"'
        self._running.append(subprocess.Popen(
            ["sh", "-c", command, self._program, "-proto", protocol, "-host-ip", "127.0.0.1", "-host-port", str(port),
             "-container-ip", CONTAINER_IP, "-container-port", str(to)],
            pass_fds=[writable], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        ))
        os.close(writable)
        with os.fdopen(readable, "rb") as said:
            word = said.read(2)
        if word != b"0\n":
            raise RuntimeError(f"{self._program}: {word!r}")

    @property
    def pids(self) -> list[int]:
        """Its processes."""
        return [each.pid for each in self._running]

    def close(self) -> None:
        """All of them."""
        for each in self._running:
            each.send_signal(signal.SIGTERM)
        for each in self._running:
            each.wait()


Peer = Ours | Theirs


def wrk(seconds: int, *more: str) -> float:
    """Requests a second."""
    said = run("wrk", "-t1", "-c64", f"-d{seconds}s", *more, f"http://127.0.0.1:{HTTP}/")
    found = re.search(r"Requests/sec:\s+([\d.]+)", said)
    if not found:
        raise RuntimeError(said)
    return float(found[1])


def iperf(seconds: int, *more: str) -> float:
    """Megabits a second, as received."""
    said = json.loads(run("iperf3", "-J", "-c", "127.0.0.1", "-p", str(IPERF), "-t", str(seconds), *more))["end"]
    received = said.get("sum_received") or said["sum"]
    lost = received.get("lost_percent", 0) / 100
    return float(received["bits_per_second"]) * (1 if "sum_received" in said else 1 - lost) / 1e6


FIGURES: dict[str, list[tuple[str, str, Callable[[int], float]]]] = {
    "close": [("one request a connection", "1/s", lambda seconds: wrk(seconds, "-H", "Connection: close"))],
    "keep": [("requests on 64 connections", "1/s", wrk)],
    "bulk": [
        ("one stream to the container", "Mbit/s", iperf),
        ("one stream from the container", "Mbit/s", lambda seconds: iperf(seconds, "-R")),
        ("four streams", "Mbit/s", lambda seconds: iperf(seconds, "-P", "4")),
    ],
    "datagrams": [("datagrams of 512 bytes", "Mbit/s", lambda seconds: iperf(seconds, "-u", "-b", "0", "-l", "512"))],
}


def measure(peers: list[Callable[[], Peer]], names: list[str], rounds: int, seconds: int) -> None:
    """Print a row for each figure."""
    print("| through a published port of 127.0.0.1 | boxship | docker-proxy | ratio | processor time of the proxy, ratio |")
    print("| --- | --- | --- | --- | --- |")
    for name in names:
        for title, unit, work in FIGURES.get(name, []):
            rates: dict[str, list[float]] = {}
            costs: dict[str, list[float]] = {}
            for _ in range(rounds):
                for make in peers:
                    peer = make()
                    try:
                        for protocol, port in (("tcp", HTTP), ("tcp", IPERF), ("udp", IPERF)):
                            peer.publish(protocol, port, port)
                        pids = peer.pids
                        before = cpu_s(pids)
                        rate = work(seconds)
                        rates.setdefault(peer.name, []).append(rate)
                        costs.setdefault(peer.name, []).append((cpu_s(pids) - before) / rate)
                    finally:
                        peer.close()
            ours, theirs = (statistics.median(rates[each.name]) for each in (Ours, Theirs))
            cost = statistics.median(costs[Ours.name]) / max(statistics.median(costs[Theirs.name]), 1e-9)
            print(f"| {title}, {unit} | {ours:.0f} | {theirs:.0f} | {ours / theirs:.2f} | {cost:.2f} |", flush=True)


def measure_ports(peers: list[Callable[[], Peer]], rounds: int, count: int = 100) -> None:
    """What many ports cost."""
    found: dict[str, list[tuple[float, float, int]]] = {}
    for _ in range(rounds):
        for make in peers:
            peer = make()
            try:
                start = time.perf_counter()
                for port in range(20000, 20000 + count):
                    peer.publish("tcp", port, HTTP)
                took = time.perf_counter() - start
                found.setdefault(peer.name, []).append((took * 1000, pss_mb(peer.pids), len(peer.pids)))
            finally:
                peer.close()
    print(f"\n| {count} ports | boxship | docker-proxy | ratio |\n| --- | --- | --- | --- |")
    for at, title in enumerate(("published in, ms", "memory (PSS), MB", "processes")):
        ours, theirs = (statistics.median(each[at] for each in found[name]) for name in (Ours.name, Theirs.name))
        print(f"| {title} | {ours:.1f} | {theirs:.1f} | {ours / theirs:.2f} |")


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=2)
    parser.add_argument("--docker-proxy", default=shutil.which("docker-proxy") or "/usr/libexec/docker/docker-proxy")
    parser.add_argument("--only", default="close,keep,bulk,datagrams,ports")
    parser.add_argument("--inside", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.only.split(",")
    if not options.inside:
        with networks(), tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "server.c"
            source.write_text(SERVER_C)
            subprocess.run(["gcc", "-O2", "-o", f"{folder}/server", source], check=True)
            servers = [
                subprocess.Popen(["ip", "netns", "exec", CONTAINER, *argv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                for argv in ([f"{folder}/server", str(HTTP)], ["iperf3", "-s", "-p", str(IPERF)])
            ]
            try:
                time.sleep(0.3)
                return subprocess.run(
                    ["ip", "netns", "exec", HOST, sys.executable, "-m", "bench.proxy", *sys.argv[1:], "--inside", folder]
                ).returncode
            finally:
                for each in servers:
                    each.terminate()
                    each.wait()
    peers: list[Callable[[], Peer]] = [lambda: Ours(options.inside), lambda: Theirs(options.docker_proxy)]
    measure(peers, names, options.rounds, options.seconds)
    if "ports" in names:
        measure_ports(peers, min(options.rounds, 3))
    return 0


if __name__ == "__main__":
    sys.exit(main())
