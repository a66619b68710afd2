"""The event exchange, and the services that publish to it and subscribe.

Runs in: the daemon, on its event loop.
Spec: containerd's events service; topics `/tasks/exit` and the like. There is no history: a subscriber sees what is published
after its first step. The one exception are the first seconds of a daemon: shims that waited for it are quicker than
subscribers, who have to find out first that it is back, and an exit that nobody heard is lost to them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable
from typing import Any

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError, Message

from boxship.api.any import pack, unpack
from boxship.api.containerd import pb
from boxship.api.containerd.call import Call, check_identifier
from boxship.containerd.filters import Filter, parse_all
from boxship.kit.errors import BoxshipError, InvalidArgument, ResourceExhausted

log = logging.getLogger("boxship.events")

# A subscriber that does not read is told so and let go, before what waits for it fills the memory.
WAITING_MAX = 65536

# How long after the start ends of tasks are kept for those who come.
REPLAY_S = 30.0
REPLAYED = frozenset(("/tasks/exit", "/tasks/oom", "/tasks/delete"))
REPLAY_MAX = 4096


def check_topic(topic: str) -> None:
    """Raise InvalidArgument unless `topic` is a path of identifiers."""
    try:
        if not topic:
            raise InvalidArgument("must not be empty: invalid argument")
        if topic[0] != "/":
            raise InvalidArgument("must start with '/': invalid argument")
        if len(topic) == 1:
            raise InvalidArgument("must have at least one component: invalid argument")
        for component in topic[1:].split("/"):
            check_identifier(component)
    except InvalidArgument as error:
        raise InvalidArgument(f'envelope topic "{topic}": {error}') from None


def event_field(message: Message, path: list[str]) -> str | None:
    """What a filter sees at `path` of an event: its texts and switches, its labels, and those of messages within."""
    if not path:
        return None
    field = message.DESCRIPTOR.fields_by_name.get(path[0])
    if field is None:
        return None
    value = getattr(message, path[0])
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return value.get(".".join(path[1:])) or None
    if isinstance(value, str):
        return value or None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Message) and message.HasField(path[0]):
        return event_field(value, path[1:])
    return None


def envelope_field(envelope: Any, path: list[str]) -> str | None:
    """What a filter sees at `path` of an envelope: `namespace`, `topic`, `event.…`."""
    if path[0] == "namespace":
        return envelope.namespace or None
    if path[0] == "topic":
        return envelope.topic or None
    if path[0] == "event":
        try:
            event = unpack(envelope.event)
        except DecodeError:
            return None
        return None if event is None else event_field(event, path[1:])
    return None


class Subscription:
    """A queue of the envelopes that pass a filter; an asynchronous iterator. Made by `Exchange.subscribe`."""

    def __init__(self, exchange: Exchange, accept: Filter, limit: int) -> None:
        self._exchange = exchange
        self._accept = accept
        self._limit = limit
        self._queue: deque[Any] = deque()
        self._ready = asyncio.Event()
        self._error: BoxshipError | None = None

    def offer(self, envelope: Any) -> None:
        """Queue the envelope if it passes."""
        if not self._accept(lambda path: envelope_field(envelope, path)):
            return
        if len(self._queue) >= self._limit:
            self._error = ResourceExhausted(f"subscriber is more than {self._limit} events behind")
            self.close()
            return
        self._queue.append(envelope)
        self._ready.set()

    def close(self) -> None:
        """Take no more; what is queued is still given out."""
        self._exchange.forget(self)
        self._ready.set()

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> Any:
        while not self._queue:
            if self._error is not None:
                raise self._error
            if not self._exchange.knows(self):
                raise StopAsyncIteration
            self._ready.clear()
            await self._ready.wait()
        return self._queue.popleft()


class Exchange:
    """Takes events and gives each to the subscribers whose filter it passes."""

    def __init__(self, replay_s: float = REPLAY_S) -> None:
        self._subscriptions: set[Subscription] = set()
        self._replay_until = time.monotonic() + replay_s
        self._early: deque[Any] = deque(maxlen=REPLAY_MAX)

    def publish(self, namespace: str, topic: str, event: Message) -> None:
        """Publish `event` now. Raises InvalidArgument."""
        envelope = pb.types.Envelope(namespace=namespace, topic=topic, event=pack(event))
        envelope.timestamp.FromNanoseconds(time.time_ns())
        self.forward(envelope)

    def forward(self, envelope: Any) -> None:
        """Publish what another one composed. Raises InvalidArgument."""
        check_identifier(envelope.namespace)
        check_topic(envelope.topic)
        if not envelope.HasField("timestamp"):
            raise InvalidArgument("timestamp must be set on forwarded event: invalid argument")
        if envelope.topic in REPLAYED and self._replays():
            self._early.append(envelope)
        log.debug("event %s", envelope.topic, extra={"namespace": envelope.namespace})
        for subscription in list(self._subscriptions):
            subscription.offer(envelope)

    def subscribe(self, filters: Iterable[str] = (), limit: int = WAITING_MAX) -> Subscription:
        """From now on, every envelope that passes one of the filters; soon after the start also the ends of tasks until then.

        Raises InvalidArgument.
        """
        made = Subscription(self, parse_all(filters), limit)
        self._subscriptions.add(made)
        if self._replays():
            for envelope in self._early:
                made.offer(envelope)
        return made

    def _replays(self) -> bool:
        if time.monotonic() < self._replay_until:
            return True
        self._early.clear()
        return False

    def knows(self, subscription: Subscription) -> bool:
        """Whether the subscription still gets events."""
        return subscription in self._subscriptions

    def forget(self, subscription: Subscription) -> None:
        """End a subscription."""
        self._subscriptions.discard(subscription)

    def close(self) -> None:
        """End all subscriptions."""
        for subscription in list(self._subscriptions):
            subscription.close()


class Events:
    """containerd.services.events.v1.Events."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    async def Publish(self, request: Any, call: Call) -> Empty:
        """Publish in the namespace of the call. Raises InvalidArgument, FailedPrecondition without a namespace."""
        envelope = pb.types.Envelope(namespace=call.required_namespace(), topic=request.topic, event=request.event)
        envelope.timestamp.FromNanoseconds(time.time_ns())
        self._exchange.forward(envelope)
        return Empty()

    async def Forward(self, request: Any, call: Call) -> Empty:
        """Publish an envelope as it is. Raises InvalidArgument."""
        self._exchange.forward(request.envelope)
        return Empty()

    async def Subscribe(self, request: Any, call: Call) -> AsyncIterator[Any]:
        """All events from now on that pass one of the filters, of every namespace. Raises InvalidArgument, ResourceExhausted."""
        subscription = self._exchange.subscribe(request.filters)
        try:
            async for envelope in subscription:
                yield envelope
        finally:
            subscription.close()


class TtrpcEvents:
    """containerd.services.events.ttrpc.v1.Events: where shims bring their events."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    async def Forward(self, request: Any, call: Call) -> Empty:
        """Publish an envelope as it is. Raises InvalidArgument."""
        self._exchange.forward(request.envelope)
        return Empty()
