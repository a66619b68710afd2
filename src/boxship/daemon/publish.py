"""`boxshipd publish`: an event brought to a daemon by a shim that speaks no ttRPC to it.

Runs in: a process of its own that a shim started, as `PROGRAM --address A publish --topic T --namespace N`; the event, an Any, is
on its standard input. Spec: containerd's `publish` sub-command.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from boxship.kit.errors import BoxshipError, InvalidArgument

TIMEOUT_S = 5.0


async def _send(address: str, topic: str, namespace: str, event: bytes) -> None:
    from google.protobuf.any_pb2 import Any

    from boxship.api.containerd import pb
    from boxship.api.containerd.call import Call
    from boxship.api.containerd.client import connect

    async with connect(address) as client:
        request = pb.events.PublishRequest(topic=topic, event=Any.FromString(event))
        await client.events.Publish(request, Call(namespace, timeout=TIMEOUT_S))


def main(address: str, arguments: Sequence[str]) -> int:
    """Publish what comes on standard input; returns the exit code."""
    values = {"topic": "", "namespace": ""}
    words = iter(arguments)
    for word in words:
        name, equals, value = word.lstrip("-").partition("=")
        if name not in values or not word.startswith("-"):
            sys.stderr.write(f"boxshipd publish: unknown argument {word}\n")
            return 1
        values[name] = value if equals else next(words, "")
    try:
        if not values["topic"] or not values["namespace"]:
            raise InvalidArgument("topic and namespace are required to publish an event")
        asyncio.run(_send(address, values["topic"], values["namespace"], sys.stdin.buffer.read()))
    except BoxshipError as error:
        sys.stderr.write(f"boxshipd publish: {error}\n")
        return 1
    return 0
