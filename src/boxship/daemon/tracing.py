"""Spans of the daemon's calls for OpenTelemetry, when they are configured and its packages are installed.

Runs in: the daemon.
"""

from __future__ import annotations

from boxship.api.containerd.server import Observer
from boxship.daemon.config import Tracing
from boxship.kit.errors import Unsupported


class Spans:
    """Hands calls on to another Observer and makes a span of each."""

    def __init__(self, settings: Tracing, below: Observer) -> None:
        """Raises Unsupported when the packages are not there."""
        try:
            from opentelemetry import trace  # type: ignore[import-not-found, unused-ignore]
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (  # type: ignore[import-not-found, unused-ignore]
                OTLPSpanExporter,
            )
            from opentelemetry.sdk.resources import Resource  # type: ignore[import-not-found, unused-ignore]
            from opentelemetry.sdk.trace import TracerProvider  # type: ignore[import-not-found, unused-ignore]
            from opentelemetry.sdk.trace.export import BatchSpanProcessor  # type: ignore[import-not-found, unused-ignore]
        except ImportError as error:
            raise Unsupported(f"tracing is configured, but {error.name} is not installed",
                              "pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-grpc") from None
        self._below = below
        self._provider = TracerProvider(resource=Resource.create({"service.name": settings.service_name}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=settings.endpoint, insecure=True)))
        self._tracer = self._provider.get_tracer("boxship")
        self._kind = trace.SpanKind.SERVER

    def started(self, kind: str, service: str, method: str) -> object:
        """Of Observer."""
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method}
        span = self._tracer.start_span(f"{service}/{method}", kind=self._kind, attributes=attributes)
        return self._below.started(kind, service, method), span

    def handled(self, token: object, kind: str, service: str, method: str, code: str) -> None:
        """Of Observer."""
        assert isinstance(token, tuple)
        below, span = token
        span.set_attribute("rpc.grpc.status", code)
        span.end()
        self._below.handled(below, kind, service, method, code)

    def close(self) -> None:
        """Send what waits."""
        self._provider.shutdown()
