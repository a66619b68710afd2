"""The services of a shim: their names, and request and response of each method.

Runs in: the shims, and whoever talks to them.
Spec: containerd.task.v2, containerd.task.v3 (the same messages under another name, field for field, so that one class reads
both), containerd.runtime.sandbox.v1.
"""

from __future__ import annotations

from google.protobuf.empty_pb2 import Empty

from boxship.api.task import pb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

TASK_V2 = "containerd.task.v2.Task"
TASK_V3 = "containerd.task.v3.Task"
SANDBOX = "containerd.runtime.sandbox.v1.Sandbox"
EVENTS = "containerd.services.events.ttrpc.v1.Events"

TASK: dict[str, tuple[Any, Any]] = {
    "State": (pb.task.StateRequest, pb.task.StateResponse),
    "Create": (pb.task.CreateTaskRequest, pb.task.CreateTaskResponse),
    "Start": (pb.task.StartRequest, pb.task.StartResponse),
    "Delete": (pb.task.DeleteRequest, pb.task.DeleteResponse),
    "Pids": (pb.task.PidsRequest, pb.task.PidsResponse),
    "Pause": (pb.task.PauseRequest, Empty),
    "Resume": (pb.task.ResumeRequest, Empty),
    "Checkpoint": (pb.task.CheckpointTaskRequest, Empty),
    "Kill": (pb.task.KillRequest, Empty),
    "Exec": (pb.task.ExecProcessRequest, Empty),
    "ResizePty": (pb.task.ResizePtyRequest, Empty),
    "CloseIO": (pb.task.CloseIORequest, Empty),
    "Update": (pb.task.UpdateTaskRequest, Empty),
    "Wait": (pb.task.WaitRequest, pb.task.WaitResponse),
    "Stats": (pb.task.StatsRequest, pb.task.StatsResponse),
    "Connect": (pb.task.ConnectRequest, pb.task.ConnectResponse),
    "Shutdown": (pb.task.ShutdownRequest, Empty),
}

SANDBOXES: dict[str, tuple[Any, Any]] = {
    "CreateSandbox": (pb.sandbox.CreateSandboxRequest, pb.sandbox.CreateSandboxResponse),
    "StartSandbox": (pb.sandbox.StartSandboxRequest, pb.sandbox.StartSandboxResponse),
    "Platform": (pb.sandbox.PlatformRequest, pb.sandbox.PlatformResponse),
    "StopSandbox": (pb.sandbox.StopSandboxRequest, pb.sandbox.StopSandboxResponse),
    "WaitSandbox": (pb.sandbox.WaitSandboxRequest, pb.sandbox.WaitSandboxResponse),
    "SandboxStatus": (pb.sandbox.SandboxStatusRequest, pb.sandbox.SandboxStatusResponse),
    "PingSandbox": (pb.sandbox.PingRequest, pb.sandbox.PingResponse),
    "ShutdownSandbox": (pb.sandbox.ShutdownSandboxRequest, pb.sandbox.ShutdownSandboxResponse),
    "SandboxMetrics": (pb.sandbox.SandboxMetricsRequest, pb.sandbox.SandboxMetricsResponse),
}
