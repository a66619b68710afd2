"""The messages that the services of containerd's API share: mounts, descriptors, platforms, processes, the envelope of events.

Runs in: the daemon, the shims and the spawner.
Spec: containerd API v1, packages containerd.types and containerd.v1.types (proto/containerd/types).
"""

from __future__ import annotations

from boxship.api._gen.containerd.types.descriptor_pb2 import Descriptor
from boxship.api._gen.containerd.types.event_pb2 import Envelope
from boxship.api._gen.containerd.types.introspection_pb2 import RuntimeInfo, RuntimeRequest, RuntimeVersion
from boxship.api._gen.containerd.types.metrics_pb2 import Metric
from boxship.api._gen.containerd.types.mount_pb2 import ActivationInfo, ActiveMount, Mount
from boxship.api._gen.containerd.types.platform_pb2 import Platform
from boxship.api._gen.containerd.types.sandbox_pb2 import Sandbox
from boxship.api._gen.containerd.types.task.task_pb2 import (
    CREATED,
    PAUSED,
    PAUSING,
    RUNNING,
    STOPPED,
    UNKNOWN,
    Process,
    ProcessInfo,
    Status,
)

__all__ = [
    "CREATED", "PAUSED", "PAUSING", "RUNNING", "STOPPED", "UNKNOWN",
    "ActivationInfo", "ActiveMount", "Descriptor", "Envelope", "Metric", "Mount", "Platform", "Process", "ProcessInfo",
    "RuntimeInfo", "RuntimeRequest", "RuntimeVersion", "Sandbox", "Status",
]
