"""Figures of the daemon in Prometheus' text format, and the small HTTP server that hands them out.

Runs in: the daemon, on its event loop.
Spec: Prometheus exposition format 0.0.4; names of grpc-prometheus (`grpc_server_started_total`, …) as containerd has them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable

import boxship

log = logging.getLogger("boxship.metrics")
Sample = tuple[str, dict[str, str], float]

BUCKETS_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)


class Calls:
    """Counts calls: an Observer of boxship.api.containerd.server."""

    def __init__(self) -> None:
        self.open = 0
        """Calls under way."""
        self.last = time.monotonic()
        """When the last one began or ended."""
        self._started: Counter[tuple[str, str, str]] = Counter()
        self._handled: Counter[tuple[str, str, str, str]] = Counter()
        self._seconds: Counter[tuple[str, str, str]] = Counter()
        self._buckets: Counter[tuple[str, str, str, float]] = Counter()

    def started(self, kind: str, service: str, method: str) -> object:
        """Of Observer."""
        self.open += 1
        self._started[kind, service, method] += 1
        return time.monotonic()

    def handled(self, token: object, kind: str, service: str, method: str, code: str) -> None:
        """Of Observer."""
        self.last = time.monotonic()
        self.open -= 1
        took = self.last - token if isinstance(token, float) else 0.0
        self._handled[kind, service, method, code] += 1
        self._seconds[kind, service, method] += took  # type: ignore[assignment]
        for limit in BUCKETS_S:
            if took <= limit:
                self._buckets[kind, service, method, limit] += 1

    def lines(self) -> list[str]:
        """In the text format."""
        text = _header("grpc_server_started_total", "counter", "Total number of RPCs started on the server.")
        for key, count in sorted(self._started.items()):
            text.append(_line("grpc_server_started_total", _labels(*key), count))
        text += _header("grpc_server_handled_total", "counter", "Total number of RPCs completed on the server, by code.")
        handled: Counter[tuple[str, str, str]] = Counter()
        for (kind, service, method, code), count in sorted(self._handled.items()):
            handled[kind, service, method] += count
            text.append(_line("grpc_server_handled_total", {**_labels(kind, service, method), "grpc_code": code}, count))
        text += _header("grpc_server_handling_seconds", "histogram", "Time until an RPC was answered.")
        for key, count in sorted(handled.items()):
            labels = _labels(*key)
            for limit in BUCKETS_S:
                within = self._buckets[*key, limit]
                text.append(_line("grpc_server_handling_seconds_bucket", {**labels, "le": f"{limit:g}"}, within))
            text.append(_line("grpc_server_handling_seconds_bucket", {**labels, "le": "+Inf"}, count))
            text.append(_line("grpc_server_handling_seconds_sum", labels, self._seconds[key]))
            text.append(_line("grpc_server_handling_seconds_count", labels, count))
        return text


def _labels(kind: str, service: str, method: str) -> dict[str, str]:
    return {"grpc_method": method, "grpc_service": service, "grpc_type": kind}


def _header(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]


def _line(name: str, labels: dict[str, str], value: float) -> str:
    def escaped(text: str) -> str:
        return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

    inside = ",".join(f'{key}="{escaped(text)}"' for key, text in labels.items())
    return f"{name}{{{inside}}} {value:g}" if inside else f"{name} {value:g}"


def gauge(name: str, text: str, samples: Iterable[tuple[dict[str, str], float]]) -> list[str]:
    """A gauge in the text format."""
    return _header(name, "gauge", text) + [_line(name, labels, value) for labels, value in samples]


def process() -> list[str]:
    """Figures of this process, by the usual names."""
    with open("/proc/self/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    ticks, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    text = gauge("boxship_build_info", "The release that runs.", [({"version": boxship.__version__}, 1)])
    text += _header("process_cpu_seconds_total", "counter", "User and system CPU time.")
    text.append(_line("process_cpu_seconds_total", {}, (int(fields[11]) + int(fields[12])) / ticks))
    text += gauge("process_resident_memory_bytes", "Resident memory.", [({}, int(fields[21]) * page)])
    text += gauge("process_open_fds", "Open file descriptors.", [({}, len(os.listdir("/proc/self/fd")))])
    return text


class Endpoint:
    """An HTTP server that knows /metrics (also /v1/metrics, containerd's) and nothing else."""

    def __init__(self, sources: Iterable[Callable[[], list[str]]]) -> None:
        self._sources = list(sources)
        self._server: asyncio.Server | None = None

    async def listen(self, address: str) -> None:
        """Answer at HOST:PORT, or on the socket of a path. Raises OSError."""
        if address.startswith("/"):
            self._server = await asyncio.start_unix_server(self._serve, address)
        else:
            host, _, port = address.rpartition(":")
            self._server = await asyncio.start_server(self._serve, host.strip("[]") or None, int(port))

    @property
    def addresses(self) -> list[object]:
        """Where it listens."""
        return [each.getsockname() for each in self._server.sockets] if self._server else []

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(10):
                request = (await reader.readline()).split()
                while (await reader.readline()).strip():
                    pass
                path = request[1].partition(b"?")[0] if len(request) == 3 else b""
                found = path in (b"/metrics", b"/v1/metrics") and request[0] in (b"GET", b"HEAD")
                body = "".join(f"{line}\n" for source in self._sources for line in source()).encode() if found else b"not found\n"
                status = "200 OK" if found else "404 Not Found"
                writer.write(f"HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n"
                             f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode())
                if request[:1] != [b"HEAD"]:
                    writer.write(body)
                await writer.drain()
        except (TimeoutError, OSError, ValueError) as error:
            log.debug("metrics: %s", error)
        finally:
            writer.close()

    async def close(self) -> None:
        """Listen no more."""
        if self._server is not None:
            self._server.close()
