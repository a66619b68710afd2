"""The loop of processes with one thread."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

from boxship.kit.loop import IN, Later, Lock, Loop, now, run_step


def test_a_step_goes_on_with_what_it_waited_for() -> None:
    later = Later()

    def step() -> Generator[Later, object, str]:
        first = yield later
        second = yield now("b")
        return f"{first}{second}"

    result = run_step(step())
    assert not result.done
    later.set("a")
    assert result.value == "ab"


def test_an_error_is_raised_where_it_was_waited_for() -> None:
    later = Later()

    def step() -> Generator[Later, object, str]:
        try:
            yield later
        except ValueError:
            return "caught"
        return "missed"

    result = run_step(step())
    later.fail(ValueError())
    assert result.value == "caught"


def test_what_a_step_raises_is_its_result() -> None:
    def step() -> Generator[Later, object, None]:
        yield now()
        raise KeyError("x")

    assert isinstance(run_step(step()).error, KeyError)


def test_many_steps_that_need_not_wait_need_no_stack() -> None:
    def step() -> Generator[Later, object, int]:
        for _ in range(100_000):
            yield now()
        return 1

    assert run_step(step()).value == 1


def test_a_value_is_set_once() -> None:
    later = Later()
    seen: list[object] = []
    later.then(lambda done: seen.append(done.value))
    later.set(1)
    later.set(2)
    later.fail(ValueError())
    later.then(lambda done: seen.append(done.value))
    assert seen == [1, 1]


def test_a_lock_is_given_in_the_order_of_asking() -> None:
    lock = Lock()
    order: list[str] = []
    first, second, third = lock.take(), lock.take(), lock.take()
    for name, later in (("first", first), ("second", second), ("third", third)):
        later.then(lambda done, name=name: order.append(name))  # type: ignore[misc]
    assert order == ["first"]
    lock.give()
    assert order == ["first", "second"]
    lock.give()
    lock.give()
    assert lock.take().done


def test_timers_come_in_their_order_and_a_cancelled_one_does_not() -> None:
    loop = Loop()
    seen: list[int] = []
    loop.after(0.02, lambda: seen.append(2))
    loop.after(0.01, lambda: seen.append(1))
    loop.after(0.015, lambda: seen.append(9)).cancel()
    loop.after(0.03, loop.stop)
    loop.run()
    loop.close()
    assert seen == [1, 2]


def test_a_descriptor_for_which_nothing_is_wanted_does_not_wake_even_at_its_end() -> None:
    loop = Loop()
    reader, writer = os.pipe()
    events: list[int] = []
    loop.add(reader, IN, events.append)
    loop.want(reader, 0)
    os.close(writer)
    loop.after(0.01, loop.stop)
    loop.run()
    assert events == []
    loop.want(reader, IN)
    loop.running = True
    loop.turn()
    assert len(events) == 1
    loop.remove(reader)
    loop.remove(reader)
    os.close(reader)
    loop.close()


def test_an_unknown_descriptor_is_an_error() -> None:
    with pytest.raises(KeyError):
        Loop().want(1, IN)
