"""The services that moving images needs, in memory: they keep containerd's promises about names, leases and errors, and no more."""

from __future__ import annotations

import gzip
import hashlib

from google.protobuf.empty_pb2 import Empty

from boxship.api.containerd import pb
from boxship.api.containerd.services import Containerd
from boxship.kit.errors import AlreadyExists, NotFound
from support.blobs import MemoryStore


class Content:
    def __init__(self):
        self.namespaces = {}
        self.leases = set()

    def store(self, call):
        self.leases.add(call.lease)
        return self.namespaces.setdefault(call.required_namespace(), MemoryStore())


class Images:
    def __init__(self):
        self.records = {}

    async def Get(self, request, call):
        if (call.namespace, request.name) not in self.records:
            raise NotFound(f'image "{request.name}": not found')
        return pb.images.GetImageResponse(image=self.records[call.namespace, request.name])

    async def Create(self, request, call):
        key = call.namespace, request.image.name
        if key in self.records:
            raise AlreadyExists(f'image "{request.image.name}": already exists')
        self.records[key] = request.image
        return pb.images.CreateImageResponse(image=request.image)

    async def Update(self, request, call):
        image = self.records[call.namespace, request.image.name]
        for path in request.update_mask.paths:
            if path == "target":
                image.target.CopyFrom(request.image.target)
            else:
                key = path.removeprefix("labels.")
                image.labels[key] = request.image.labels[key]
        return pb.images.UpdateImageResponse(image=image)

    def names(self, namespace="default"):
        return sorted(name for space, name in self.records if space == namespace)


class Leases:
    def __init__(self):
        self.held = {}

    async def Create(self, request, call):
        self.held[request.id] = dict(request.labels)
        return pb.leases.CreateResponse(lease=pb.leases.Lease(id=request.id))

    async def List(self, request, call):
        return pb.leases.ListResponse(leases=[pb.leases.Lease(id=name, labels=labels) for name, labels in self.held.items()])

    async def Delete(self, request, call):
        if self.held.pop(request.id, None) is None:
            raise NotFound(f'lease "{request.id}": not found')
        return Empty()


class Snapshots:
    def __init__(self):
        self.active = {}
        self.committed = {}

    async def Stat(self, request, call):
        if request.key not in self.committed:
            raise NotFound(f"snapshot {request.key}: not found")
        return pb.snapshots.StatSnapshotResponse(info=pb.snapshots.Info(name=request.key, parent=self.committed[request.key][0]))

    async def Prepare(self, request, call):
        if request.parent and request.parent not in self.committed:
            raise NotFound(f"parent snapshot {request.parent}: not found")
        self.active[request.key] = (request.parent, dict(request.labels), request.snapshotter)
        return pb.snapshots.PrepareSnapshotResponse(mounts=[pb.types.Mount(type="bind", source=request.key)])

    async def Commit(self, request, call):
        if request.name in self.committed:
            raise AlreadyExists(f"snapshot {request.name}: already exists")
        self.committed[request.name] = self.active.pop(request.key)
        return Empty()

    async def Remove(self, request, call):
        if self.active.pop(request.key, None) is None:
            raise NotFound(f"snapshot {request.key}: not found")
        return Empty()


class Diff:
    def __init__(self, content):
        self.content = content
        self.applied = []

    async def Apply(self, request, call):
        data = self.content.store(call).blobs[request.diff.digest]
        plain = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        self.applied.append(request.diff.digest)
        digest = "sha256:" + hashlib.sha256(plain).hexdigest()
        return pb.diff.ApplyResponse(applied=pb.types.Descriptor(digest=digest, size=len(plain)))


class Namespaces:
    async def List(self, request, call):
        return pb.namespaces.ListNamespacesResponse(namespaces=[pb.namespaces.Namespace(name="default")])

    async def Get(self, request, call):
        return pb.namespaces.GetNamespaceResponse(namespace=pb.namespaces.Namespace(name=request.name))


class Introspection:
    async def Plugins(self, request, call):
        return pb.introspection.PluginsResponse(plugins=[
            pb.introspection.Plugin(type="io.containerd.snapshotter.v1", id=name) for name in ("native", "overlayfs")
        ])


def containerd():
    """A bundle; its parts are its attributes."""
    content = Content()
    return Containerd({
        "content": content, "images": Images(), "leases": Leases(), "snapshots": Snapshots(), "diff": Diff(content),
        "namespaces": Namespaces(), "introspection": Introspection(),
    })
