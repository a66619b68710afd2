"""google.protobuf.Any as containerd writes it: the full name of the message or the URL of a JSON document, and no host before it.

Runs in: the daemon and its clients, the shims. Spec: containerd/typeurl.
"""

from __future__ import annotations

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.any_pb2 import Any
from google.protobuf.message import Message

SPEC = "types.containerd.io/opencontainers/runtime-spec/1/Spec"
PROCESS = "types.containerd.io/opencontainers/runtime-spec/1/Process"
RESOURCES = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"
FEATURES = "types.containerd.io/opencontainers/runtime-spec/1/features/Features"


def pack(message: Message) -> Any:
    """`message` with its full name as type URL."""
    return Any(type_url=message.DESCRIPTOR.full_name, value=message.SerializeToString())


def unpack(value: Any) -> Message | None:
    """The message within, or None for a type that this process does not know. Raises DecodeError for bytes that are none."""
    name = value.type_url.rpartition("/")[2]
    try:
        descriptor = descriptor_pool.Default().FindMessageTypeByName(name)
    except KeyError:
        return None
    message: Message = message_factory.GetMessageClass(descriptor).FromString(value.value)
    return message
