"""What is told while images move: typed events with totals, in the words that containerd's transfer service uses.

Runs in: the daemon's event loop; the callbacks too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from boxship.images import media
from boxship.oci.image import Descriptor

WAITING = "waiting"
DOWNLOADING = "downloading"
UPLOADING = "uploading"
COMPLETE = "complete"
EXISTS = "already exists"
MOUNTED = "mounted"
EXTRACTING = "extracting"
EXTRACTED = "extracted"
LOADING = "loading"
EXPORTING = "exporting"
SAVED = "saved"

INTERVAL_S = 0.1
"""Events about the same blob that only say how far it is come no more often."""


@dataclass(frozen=True)
class Progress:
    """One event. Those about content carry its descriptor; others are a line for people in `event`."""

    event: str
    name: str = ""
    """Of the content, as the ref of its ingest; or of the image."""
    parents: tuple[str, ...] = ()
    """Names of what refers to it."""
    progress: int = 0
    """Bytes so far."""
    total: int = 0
    """Bytes in all; 0: not known."""
    descriptor: Descriptor | None = None
    detail: str = ""
    """For MOUNTED the repository that it came from, otherwise what people may like to know, such as a retry."""


Callback = Callable[[Progress], None]


class Meter:
    """Turns what is known of one piece of content into events, no more than are of use."""

    def __init__(self, callback: Callback | None, descriptor: Descriptor, parents: tuple[str, ...] = ()) -> None:
        self._callback = callback
        self._descriptor = descriptor
        self._parents = parents
        self._next = 0.0
        self.name = media.ref(descriptor)

    def tell(self, event: str, progress: int = 0, detail: str = "") -> None:
        """An event that is always told."""
        if self._callback is not None:
            self._callback(Progress(event, self.name, self._parents, progress, self._descriptor.size, self._descriptor, detail))

    def moved(self, event: str, progress: int) -> None:
        """How far it is; left out when the last one was told just before."""
        if self._callback is None:
            return
        now = asyncio.get_running_loop().time()
        if now >= self._next:
            self._next = now + INTERVAL_S
            self.tell(event, progress)
