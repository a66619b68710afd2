"""Events reach those who asked for them, in order, and one who does not read harms nobody."""

import asyncio

import pytest

from boxship.api.containerd import pb
from boxship.api.containerd.call import Call
from boxship.containerd.events import Events, Exchange, check_topic, envelope_field
from boxship.kit.errors import FailedPrecondition, InvalidArgument, ResourceExhausted


def test_a_subscriber_gets_what_passes_its_filters_in_order():
    async def run():
        exchange = Exchange()
        subscription = exchange.subscribe(['topic~=|^/tasks/|,namespace==a'])
        for namespace, topic in (("a", "/tasks/start"), ("b", "/tasks/start"), ("a", "/images/create"), ("a", "/tasks/exit")):
            exchange.publish(namespace, topic, pb.task_events.TaskStart(container_id="x"))
        subscription.close()
        return [envelope.topic async for envelope in subscription]

    assert asyncio.run(run()) == ["/tasks/start", "/tasks/exit"]


def test_a_subscriber_that_does_not_read_is_let_go_and_told():
    async def run():
        exchange = Exchange()
        slow, quick = exchange.subscribe(limit=2), exchange.subscribe()
        for _ in range(5):
            exchange.publish("a", "/tasks/start", pb.task_events.TaskStart())
        got = [await anext(slow), await anext(slow)]
        with pytest.raises(ResourceExhausted):
            await anext(slow)
        quick.close()
        return len(got), len([1 async for _ in quick])

    assert asyncio.run(run()) == (2, 5)


def test_ends_of_tasks_wait_for_subscribers_after_a_start():
    async def run():
        exchange = Exchange(replay_s=0.2)
        for topic, event in (("/tasks/start", pb.task_events.TaskStart()), ("/tasks/exit", pb.task_events.TaskExit(exit_status=6))):
            exchange.publish("a", topic, event)
        first, other = exchange.subscribe(["namespace==a"]), exchange.subscribe(["namespace==b"])
        await asyncio.sleep(0.25)
        late = exchange.subscribe()
        seen = []
        for subscription in (first, other, late):
            subscription.close()
            seen.append([envelope.topic async for envelope in subscription])
        return seen

    assert asyncio.run(run()) == [["/tasks/exit"], [], []]


def test_the_service_gives_a_subscription_up_with_its_call():
    async def run():
        exchange = Exchange()
        service = Events(exchange)
        stream = service.Subscribe(pb.events.SubscribeRequest(), Call())
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        await service.Publish(pb.events.PublishRequest(topic="/x"), Call("ns"))
        envelope = await waiting
        await stream.aclose()
        assert not exchange._subscriptions
        return envelope.namespace, envelope.timestamp.seconds > 0

    assert asyncio.run(run()) == ("ns", True)


def test_what_is_no_event_is_refused():
    async def run():
        service = Events(Exchange())
        with pytest.raises(FailedPrecondition):
            await service.Publish(pb.events.PublishRequest(topic="/x"), Call())
        with pytest.raises(InvalidArgument, match="timestamp must be set"):
            await service.Forward(pb.events.ForwardRequest(envelope=pb.types.Envelope(namespace="a", topic="/x")), Call())

    asyncio.run(run())
    for topic in ("", "tasks", "/", "/a//b", "/a/-"):
        with pytest.raises(InvalidArgument):
            check_topic(topic)


def test_filters_see_into_events():
    exchange_event = pb.task_events.TaskCreate(container_id="c1", pid=7, io=pb.task_events.TaskIO(terminal=True, stdin="/f"))
    envelope = pb.types.Envelope(namespace="n", topic="/tasks/create")
    envelope.event.type_url = "containerd.events.TaskCreate"
    envelope.event.value = exchange_event.SerializeToString()
    seen = [envelope_field(envelope, path.split(".")) for path in
            ("event.container_id", "event.io.stdin", "event.io.terminal", "event.pid", "event.none", "event", "namespace")]
    assert seen == ["c1", "/f", "true", None, None, None, "n"]
