"""Events of the metadata, published on the event loop whatever thread they happen in.

Runs in: the daemon, any thread.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from google.protobuf.message import Message

Publish = Callable[[str, str, Message], None]
"""Takes namespace, topic and event; `Exchange.publish` of boxship.containerd.events is one."""


class Publisher:
    """Hands events to `publish` in the thread of the loop that runs when this is made."""

    def __init__(self, publish: Publish) -> None:
        self._publish = publish
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()

    def __call__(self, namespace: str, topic: str, event: Message) -> None:
        """At once from the loop's own thread, soon from another."""
        if threading.get_ident() == self._thread:
            self._publish(namespace, topic, event)
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._publish, namespace, topic, event)
