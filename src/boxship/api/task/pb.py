"""The messages of the shim's API: task service v2 and v3, sandbox service, start-up, events, options, figures; and ttRPC's own.

Runs in: the shims, the spawner, and the daemon. Imports protobuf, and not gRPC.
Spec: containerd's runtime v2 (proto/containerd/runtime), ttRPC (proto/ttrpc), cgroups' metrics (proto/cgroups).
"""

from __future__ import annotations

from boxship.api import types
from boxship.api._gen.cgroups.v1 import metrics_pb2 as metrics_v1
from boxship.api._gen.cgroups.v2 import metrics_pb2 as metrics_v2
from boxship.api._gen.containerd.events import task_pb2 as events
from boxship.api._gen.containerd.runtime.bootstrap.v1 import bootstrap_pb2 as bootstrap
from boxship.api._gen.containerd.runtime.sandbox.v1 import sandbox_pb2 as sandbox
from boxship.api._gen.containerd.runtime.task.v2 import shim_pb2 as task_v2
from boxship.api._gen.containerd.runtime.task.v3 import shim_pb2 as task
from boxship.api._gen.containerd.services.ttrpc.events.v1 import events_pb2 as events_service
from boxship.api._gen.containerd.types.runc.options import oci_pb2 as runc_options
from boxship.api._gen.containerd.types.runtimeoptions.v1 import api_pb2 as runtime_options
from boxship.api._gen.google.rpc import status_pb2 as status
from boxship.api._gen.ttrpc import request_pb2 as ttrpc

__all__ = [
    "bootstrap", "events", "events_service", "metrics_v1", "metrics_v2", "runc_options", "runtime_options", "sandbox",
    "status", "task", "task_v2", "ttrpc", "types",
]
