"""The messages of containerd's API, one module per service, and those of its events and transfers.

Runs in: the daemon and its clients.
Spec: containerd API v1 (proto/containerd). What services share is in `types`; the shim's are in boxship.api.task.pb.
"""

from __future__ import annotations

from boxship.api import types
from boxship.api._gen.containerd.events import container_pb2 as container_events
from boxship.api._gen.containerd.events import content_pb2 as content_events
from boxship.api._gen.containerd.events import image_pb2 as image_events
from boxship.api._gen.containerd.events import namespace_pb2 as namespace_events
from boxship.api._gen.containerd.events import sandbox_pb2 as sandbox_events
from boxship.api._gen.containerd.events import snapshot_pb2 as snapshot_events
from boxship.api._gen.containerd.events import task_pb2 as task_events
from boxship.api._gen.containerd.services.containers.v1 import containers_pb2 as containers
from boxship.api._gen.containerd.services.content.v1 import content_pb2 as content
from boxship.api._gen.containerd.services.diff.v1 import diff_pb2 as diff
from boxship.api._gen.containerd.services.events.v1 import events_pb2 as events
from boxship.api._gen.containerd.services.images.v1 import images_pb2 as images
from boxship.api._gen.containerd.services.introspection.v1 import introspection_pb2 as introspection
from boxship.api._gen.containerd.services.leases.v1 import leases_pb2 as leases
from boxship.api._gen.containerd.services.mounts.v1 import mounts_pb2 as mounts
from boxship.api._gen.containerd.services.namespaces.v1 import namespace_pb2 as namespaces
from boxship.api._gen.containerd.services.sandbox.v1 import sandbox_pb2 as sandbox
from boxship.api._gen.containerd.services.snapshots.v1 import snapshots_pb2 as snapshots
from boxship.api._gen.containerd.services.streaming.v1 import streaming_pb2 as streaming
from boxship.api._gen.containerd.services.tasks.v1 import tasks_pb2 as tasks
from boxship.api._gen.containerd.services.transfer.v1 import transfer_pb2 as transfer
from boxship.api._gen.containerd.services.ttrpc.events.v1 import events_pb2 as ttrpc_events
from boxship.api._gen.containerd.services.version.v1 import version_pb2 as version
from boxship.api._gen.containerd.types.runc.options import oci_pb2 as runc_options
from boxship.api._gen.containerd.types.runtimeoptions.v1 import api_pb2 as runtime_options
from boxship.api._gen.containerd.types.transfer import container_pb2 as transfer_container
from boxship.api._gen.containerd.types.transfer import imagestore_pb2 as transfer_imagestore
from boxship.api._gen.containerd.types.transfer import importexport_pb2 as transfer_importexport
from boxship.api._gen.containerd.types.transfer import progress_pb2 as transfer_progress
from boxship.api._gen.containerd.types.transfer import registry_pb2 as transfer_registry
from boxship.api._gen.containerd.types.transfer import streaming_pb2 as transfer_streaming
from boxship.api._gen.google.rpc import status_pb2 as status
from boxship.api._gen.grpc.health.v1 import health_pb2 as health

__all__ = [
    "container_events", "containers", "content", "content_events", "diff", "events", "health", "image_events", "images",
    "introspection", "leases", "mounts", "namespace_events", "namespaces", "runc_options", "runtime_options", "sandbox",
    "sandbox_events", "snapshot_events", "snapshots", "status", "streaming", "task_events", "tasks", "transfer",
    "transfer_container", "transfer_imagestore", "transfer_importexport", "transfer_progress", "transfer_registry",
    "transfer_streaming", "ttrpc_events", "types", "version",
]
