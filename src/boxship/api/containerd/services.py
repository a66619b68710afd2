"""The services of containerd's API by attribute, and the bundle of them that engine and CRI are given.

Runs in: the daemon and its clients.
A service is an object with the methods of its .proto: `async def Get(request, call)`; a method whose answer is a stream returns
an asynchronous iterator; one whose request is a stream takes an asynchronous iterator of requests.
"""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

from google.protobuf import descriptor, message_factory

from boxship.kit.errors import Unsupported

SERVICES = {
    "containers": ("containers", "Containers"),
    "content": ("content", "Content"),
    "diff": ("diff", "Diff"),
    "events": ("events", "Events"),
    "images": ("images", "Images"),
    "introspection": ("introspection", "Introspection"),
    "leases": ("leases", "Leases"),
    "mounts": ("mounts", "Mounts"),
    "namespaces": ("namespaces", "Namespaces"),
    "sandbox_controller": ("sandbox", "Controller"),
    "sandbox_store": ("sandbox", "Store"),
    "snapshots": ("snapshots", "Snapshots"),
    "streaming": ("streaming", "Streaming"),
    "tasks": ("tasks", "Tasks"),
    "transfer": ("transfer", "Transfer"),
    "ttrpc_events": ("ttrpc_events", "Events"),
    "version": ("version", "Version"),
    "health": ("health", "Health"),
}
"""Attribute of the bundle → (module of boxship.api.containerd.pb, name of the service in it)."""


class Method(NamedTuple):
    """One method of a service as a transport needs it."""

    name: str
    request: Any
    """The class of its requests."""
    response: Any
    client_streaming: bool
    server_streaming: bool


def descriptor_of(attribute: str) -> descriptor.ServiceDescriptor:
    """The service descriptor of an attribute of the bundle."""
    module, name = SERVICES[attribute]
    pb = importlib.import_module("boxship.api.containerd.pb")
    found: descriptor.ServiceDescriptor = getattr(pb, module).DESCRIPTOR.services_by_name[name]
    return found


def methods_of(service: descriptor.ServiceDescriptor) -> list[Method]:
    """The methods of a service with their message classes."""
    return [
        Method(
            each.name,
            message_factory.GetMessageClass(each.input_type), message_factory.GetMessageClass(each.output_type),
            bool(each.client_streaming), bool(each.server_streaming),
        )
        for each in service.methods
    ]


class Missing:
    """A service that is not there: each of its methods says so."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, method: str) -> Callable[..., Awaitable[Any]]:
        if method.startswith("_"):
            raise AttributeError(method)
        raise Unsupported(f"unknown service {self._name}: not implemented")


class Containerd:
    """The bundle of services: ours in the same process, or a client of one that listens elsewhere.

    An asynchronous context manager: `close` ends what the bundle holds (connections, background work).
    """

    containers: Any
    content: Any
    diff: Any
    events: Any
    health: Any
    images: Any
    introspection: Any
    leases: Any
    mounts: Any
    namespaces: Any
    sandbox_controller: Any
    sandbox_store: Any
    snapshots: Any
    streaming: Any
    tasks: Any
    transfer: Any
    ttrpc_events: Any
    version: Any

    def __init__(self, services: dict[str, Any], close: Callable[[], Awaitable[None]] | None = None) -> None:
        for attribute in SERVICES:
            setattr(self, attribute, services.get(attribute) or Missing(descriptor_of(attribute).full_name))
        self._close = close
        self.leave: Callable[[], None] = lambda: None
        """Ends calls that would wait for ever, before the others get their time to end."""
        self.reload: Callable[[Mapping[str, Any]], None] = lambda tables: None
        """Takes the parts' tables of the configuration as they are now; raises InvalidArgument, and then nothing is changed."""
        self.running: Callable[[], int] = lambda: 0
        """How many tasks live in this process's care; 0 for what is elsewhere."""

    def on_close(self, close: Callable[[], Awaitable[None]]) -> None:
        """What `close` does, for a bundle that was put together step by step."""
        self._close = close

    def present(self) -> list[str]:
        """The attributes of the services that are there."""
        return [attribute for attribute in SERVICES if not isinstance(getattr(self, attribute), Missing)]

    async def close(self) -> None:
        """End what the bundle holds; a second time does nothing."""
        close, self._close = self._close, None
        if close is not None:
            await close()

    async def __aenter__(self) -> Containerd:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()
