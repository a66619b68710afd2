"""What a build tells while it goes on, in the order of the Dockerfile although stages run side by side.

Runs in: the daemon, on its event loop.
Spec: the stream of `POST /build` (docker/docker jsonmessage): {"stream": …}, {"aux": {"ID": …}}, {"errorDetail", "error"}. The
words ("Step 1/3 : …", " ---> Using cache", "Successfully built") are those that tools look for.

The stage that comes first in the file speaks directly; what later ones say waits until it is over.
"""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import Callable
from typing import Any

Message = dict[str, Any]
_AHEAD = 256
"""Messages that may wait for the client."""
_HELD = 16 << 20
"""Characters of output that may wait for a stage's turn."""


class Report:
    """All of a build's messages, as a queue: None is the end."""

    def __init__(self, stages: int) -> None:
        self.queue: asyncio.Queue[Message | None] = asyncio.Queue()
        self._channels = [Channel(self, index) for index in range(stages)]
        self._speaking = 0
        self._changed = asyncio.Event()

    def channel(self, index: int) -> Channel:
        """Of a stage, by its place among those that are built."""
        return self._channels[index]

    def tell(self, message: Message) -> None:
        """At once, whatever stages do."""
        self.queue.put_nowait(message)

    def taken(self) -> None:
        """A message was taken from the queue: who waits for room looks again."""
        self._changed.set()

    async def until(self, ready: Callable[[], bool]) -> None:
        """Wait until something that messages being taken or stages ending change is so."""
        while not ready():
            self._changed.clear()
            await self._changed.wait()

    def say(self, text: str) -> None:
        """A line, at once."""
        self.tell({"stream": text})

    def end(self) -> None:
        """No more will come."""
        self.queue.put_nowait(None)

    def flush(self) -> None:
        """Tell what waits: the build is over, and what follows is its error or its result."""
        for channel in self._channels:
            channel.release()

    def over(self) -> None:
        """A stage ended: the next that has not takes its turn."""
        while self._speaking < len(self._channels) and self._channels[self._speaking].ended:
            self._speaking += 1
            if self._speaking < len(self._channels):
                self._channels[self._speaking].release()
        self._changed.set()

    def speaks(self, index: int) -> bool:
        """Whether it is the stage's turn."""
        return index == self._speaking


class Channel:
    """One stage's messages."""

    def __init__(self, report: Report, index: int) -> None:
        self._report = report
        self._index = index
        self._waiting: list[Message] = []
        self._held = 0
        self._decoders: dict[int, codecs.IncrementalDecoder] = {}
        self.ended = False

    def tell(self, message: Message) -> None:
        """In the stage's turn."""
        if self._report.speaks(self._index):
            self._report.tell(message)
        else:
            self._waiting.append(message)

    def say(self, text: str) -> None:
        """Text of the build itself."""
        self.tell({"stream": text})

    async def output(self, stream: int, data: bytes) -> None:
        """What a step writes; a character may come in two pieces. Waits while the client is behind: then the step waits too."""
        await self._report.until(self._has_room)
        decoder = self._decoders.setdefault(stream, codecs.getincrementaldecoder("utf-8")("replace"))
        if text := decoder.decode(data):
            self._held += len(text)
            self.say(text)

    def _has_room(self) -> bool:
        return self._report.queue.qsize() < _AHEAD if self._report.speaks(self._index) else self._held < _HELD

    def release(self) -> None:
        """Tell what waited."""
        for message in self._waiting:
            self._report.tell(message)
        self._waiting.clear()
        self._held = 0

    def end(self) -> None:
        """The stage is over."""
        self._decoders.clear()
        self.ended = True
        self._report.over()
