"""The engine's events, as `docker events` shows them, and the filters of that and of other lists.

Runs in: the daemon, on its event loop.
Spec: Docker Engine API, "Monitor events": the last 256 are kept for `since`; a listener that falls 1024 behind loses the oldest.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from boxship.kit.errors import InvalidArgument

_KEPT = 256
_QUEUE = 1024
_FILTERS = frozenset((
    "config", "container", "daemon", "event", "image", "label", "network", "node", "plugin", "scope", "secret", "service", "type",
    "volume",
))

Filters = dict[str, list[str]]


def parse_filters(text: str, known: frozenset[str]) -> Filters:
    """The parameter `filters`: {name: [value …]} or the older {name: {value: true}}.

    Raises InvalidArgument in dockerd's words.
    """
    if not text:
        return {}
    try:
        found = json.loads(text)
    except ValueError:
        raise InvalidArgument("invalid filter") from None
    if not isinstance(found, dict):
        raise InvalidArgument("invalid filter")
    made: Filters = {}
    for name, values in found.items():
        if name not in known:
            raise InvalidArgument(f"invalid filter '{name}'")
        if isinstance(values, dict):
            values = [value for value, wanted in values.items() if wanted]
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise InvalidArgument(f"invalid filter '{name}'")
        if values:
            made[name] = list(values)
    return made


def truth(filters: Filters, name: str, *, default: bool) -> bool:
    """A filter that is true or false. Raises InvalidArgument."""
    values = filters.get(name)
    if values is None:
        return default
    if len(values) != 1 or values[0].lower() not in ("true", "t", "1", "false", "f", "0"):
        raise InvalidArgument(f"invalid filter '{name}=[{' '.join(values)}]'")
    return values[0].lower() in ("true", "t", "1")


def labelled(labels: dict[str, str], wanted: list[str]) -> bool:
    """Whether all of `KEY` and `KEY=VALUE` are there."""
    for each in wanted:
        key, equals, value = each.partition("=")
        if key not in labels or (equals and labels[key] != value):
            return False
    return True


class Listener:
    """One `docker events`."""

    def __init__(self, filters: Filters) -> None:
        self.filters = filters
        self.items: deque[dict[str, Any]] = deque(maxlen=_QUEUE)
        self.event = asyncio.Event()


class Events:
    """Publishes and keeps them."""

    def __init__(self) -> None:
        self._kept: deque[dict[str, Any]] = deque(maxlen=_KEPT)
        self._listeners: list[Listener] = []

    @property
    def listeners(self) -> int:
        """How many listen."""
        return len(self._listeners)

    def publish(self, kind: str, action: str, identifier: str, attributes: dict[str, str]) -> None:
        """Something happened now."""
        stamp = time.time_ns()
        event: dict[str, Any] = {}
        if kind in ("container", "image"):
            event = {"status": action} | ({"id": identifier} if identifier else {})
            if kind == "container" and attributes.get("image"):
                event["from"] = attributes["image"]
        event |= {
            "Type": kind, "Action": action, "Actor": {"ID": identifier, "Attributes": dict(sorted(attributes.items()))},
            "scope": "local",
            "time": stamp // 1_000_000_000, "timeNano": stamp,
        }
        self._kept.append(event)
        for listener in self._listeners:
            if matches(event, listener.filters):
                listener.items.append(event)
                listener.event.set()

    async def listen(self, since: int, until: int, filters: Filters) -> AsyncIterator[dict[str, Any]]:
        """Events from `since` to `until` (nanoseconds since the epoch, 0: none kept, and for ever)."""
        listener = Listener(filters)
        if since or until:
            listener.items.extend(
                event for event in self._kept
                if since <= event["timeNano"] and (not until or event["timeNano"] <= until) and matches(event, filters))
        self._listeners.append(listener)
        try:
            while True:
                while listener.items:
                    yield listener.items.popleft()
                left = None if not until else (until - time.time_ns()) / 1e9
                if left is not None and left <= 0:
                    return
                listener.event.clear()
                try:
                    await asyncio.wait_for(listener.event.wait(), left)
                except TimeoutError:
                    return
        finally:
            self._listeners.remove(listener)


def event_filters(text: str) -> Filters:
    """The filters of /events. Raises InvalidArgument."""
    return parse_filters(text, _FILTERS)


def matches(event: dict[str, Any], filters: Filters) -> bool:
    """Whether an event is wanted."""
    actor = event["Actor"]
    attributes = actor["Attributes"]
    for name, wanted in filters.items():
        if name == "event":
            action = event["Action"]
            if not any(action == each or action.startswith(f"{each}:") for each in wanted):
                return False
        elif name == "type":
            if event["Type"] not in wanted:
                return False
        elif name == "scope":
            if event["scope"] not in wanted:
                return False
        elif name == "label":
            if not labelled(attributes, wanted):
                return False
        elif name == "image":
            shown = attributes.get("image", "") if event["Type"] == "container" else attributes.get("name", "")
            if not any(each in (shown, shown.rpartition(":")[0],
                actor["ID"] if event["Type"] == "image" else None) for each in wanted):
                return False
        elif name in ("container", "volume", "network", "daemon", "plugin"):
            if event["Type"] != name:
                return False
            if not any(actor["ID"].startswith(each) or attributes.get("name") == each for each in wanted):
                return False
        else:
            return False
    return True
