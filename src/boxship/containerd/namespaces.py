"""The namespaces service.

Runs in: the daemon. The names and labels are kept by the store of metadata (`NamespaceStore`), which knows what is in them.
"""

from __future__ import annotations

from typing import Any, Protocol

from google.protobuf.empty_pb2 import Empty

from boxship.api.containerd import pb
from boxship.api.containerd.call import Call, check_identifier
from boxship.containerd.events import Exchange
from boxship.kit.errors import InvalidArgument

LABEL_MAX = 4096


def check_labels(labels: dict[str, str]) -> None:
    """Raise InvalidArgument when a label, key and value together, is longer than 4,096 bytes."""
    for key, value in labels.items():
        size = len(key.encode()) + len(value.encode())
        if size > LABEL_MAX:
            raise InvalidArgument(f'label key and value length ({size} bytes) greater than maximum size ({LABEL_MAX} bytes), '
                                  f'key: {key[:64]}: invalid argument')


class NamespaceStore(Protocol):
    """What the store of metadata offers to the service."""

    def names(self) -> list[str]:
        """All namespaces, sorted."""

    def labels(self, namespace: str) -> dict[str, str]:
        """Its labels; none for a namespace that is not there."""

    def create(self, namespace: str, labels: dict[str, str]) -> None:
        """Raises AlreadyExists."""

    def set_labels(self, namespace: str, labels: dict[str, str], replace: bool) -> None:
        """Set labels, an empty value removes one; with `replace` all others go. Makes the namespace when it is not there."""

    def delete(self, namespace: str) -> None:
        """Raises NotFound, and FailedPrecondition unless it is empty."""


class Namespaces:
    """containerd.services.namespaces.v1.Namespaces."""

    def __init__(self, store: NamespaceStore, exchange: Exchange) -> None:
        self._store = store
        self._exchange = exchange

    async def Get(self, request: Any, call: Call) -> Any:
        """The labels of a namespace, none for one that is not there (as containerd answers)."""
        return pb.namespaces.GetNamespaceResponse(
            namespace=pb.namespaces.Namespace(name=request.name, labels=self._store.labels(request.name)))

    async def List(self, request: Any, call: Call) -> Any:
        """All namespaces with their labels."""
        return pb.namespaces.ListNamespacesResponse(namespaces=[
            pb.namespaces.Namespace(name=name, labels=self._store.labels(name)) for name in self._store.names()])

    async def Create(self, request: Any, call: Call) -> Any:
        """Make a namespace. Raises InvalidArgument, AlreadyExists."""
        name, labels = request.namespace.name, dict(request.namespace.labels)
        check_identifier(name)
        check_labels(labels)
        self._store.create(name, labels)
        self._exchange.publish(name, "/namespaces/create", pb.namespace_events.NamespaceCreate(name=name, labels=labels))
        return pb.namespaces.CreateNamespaceResponse(namespace=request.namespace)

    async def Update(self, request: Any, call: Call) -> Any:
        """Replace the labels, or those that the mask names as `labels.<key>`. Raises InvalidArgument."""
        name, labels = request.namespace.name, dict(request.namespace.labels)
        check_identifier(name)
        changes = labels
        if request.update_mask.paths:
            changes = {}
            for path in request.update_mask.paths:
                if not path.startswith("labels."):
                    raise InvalidArgument(f'cannot update "{path}" field')
                key = path.removeprefix("labels.")
                changes[key] = labels.get(key, "")
        check_labels(changes)
        self._store.set_labels(name, changes, replace=not request.update_mask.paths)
        self._exchange.publish(name, "/namespaces/update", pb.namespace_events.NamespaceUpdate(name=name, labels=labels))
        return pb.namespaces.UpdateNamespaceResponse(namespace=request.namespace)

    async def Delete(self, request: Any, call: Call) -> Empty:
        """Remove an empty namespace. Raises NotFound, FailedPrecondition."""
        check_identifier(request.name)
        self._store.delete(request.name)
        self._exchange.publish(request.name, "/namespaces/delete", pb.namespace_events.NamespaceDelete(name=request.name))
        return Empty()
