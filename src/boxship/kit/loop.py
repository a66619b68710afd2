"""One epoll(7) for a process with one thread: callbacks of descriptors, timers, and steps that wait for one another.

Runs in: the shim. Spec: epoll(7).

A *step* is a generator that yields what it waits for, a `Later`, and goes on with its value (or its error) when it is there:

    def create(...):
        status = yield loop.child(pid)

Not here: asyncio's loop, which costs more to import and to keep than a whole shim.
"""

from __future__ import annotations

import os
import select
import time
from _heapq import heappop, heappush

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    Step = Generator["Later", object, object]

IN, OUT, BROKEN = select.EPOLLIN, select.EPOLLOUT, select.EPOLLHUP | select.EPOLLERR


class Later:
    """A value that is not there yet. `set` and `fail` are called once; those who wait are called then, in their order."""

    __slots__ = ("_waiting", "done", "error", "value")

    def __init__(self) -> None:
        self.done = False
        self.value: object = None
        self.error: BaseException | None = None
        self._waiting: list[Callable[[Later], object]] = []

    def set(self, value: object = None) -> None:
        """It is there. Nothing happens the second time."""
        self._finish(value, None)

    def fail(self, error: BaseException) -> None:
        """It will not come."""
        self._finish(None, error)

    def _finish(self, value: object, error: BaseException | None) -> None:
        if self.done:
            return
        self.done, self.value, self.error = True, value, error
        waiting, self._waiting = self._waiting, []
        for function in waiting:
            function(self)

    def then(self, function: Callable[[Later], object]) -> None:
        """Call `function` when it is there, now if it is already."""
        if self.done:
            function(self)
        else:
            self._waiting.append(function)


def now(value: object = None) -> Later:
    """What is there already."""
    later = Later()
    later.set(value)
    return later


def run_step(step: Step) -> Later:
    """Carry out a step; the result is what it returns or raises."""
    result = Later()

    def go_on(later: Later | None) -> None:
        # A loop and not a recursion: what a step waits for is often there already.
        while True:
            try:
                if later is not None and later.error is not None:
                    waits = step.throw(later.error)
                else:
                    waits = step.send(None if later is None else later.value)
            except StopIteration as stop:
                result.set(stop.value)
                return
            except Exception as error:  # noqa: BLE001 - it is handed to whoever waits
                result.fail(error)
                return
            if not waits.done:
                waits.then(go_on)
                return
            later = waits

    go_on(None)
    return result


class Lock:
    """One step at a time, in the order of asking: `yield lock.take()` … `lock.give()`."""

    __slots__ = ("_held", "_waiting")

    def __init__(self) -> None:
        self._held = False
        self._waiting: list[Later] = []

    @property
    def is_held(self) -> bool:
        """Whether somebody has it."""
        return self._held

    def take(self) -> Later:
        """Wait until it is free."""
        later = Later()
        if self._held:
            self._waiting.append(later)
        else:
            self._held = True
            later.set()
        return later

    def give(self) -> None:
        """Let the next one go on."""
        if self._waiting:
            self._waiting.pop(0).set()
        else:
            self._held = False


class Timer:
    """Made by `Loop.after`."""

    __slots__ = ("due", "function")

    def __init__(self, due: float, function: Callable[[], object] | None) -> None:
        self.due = due
        self.function = function

    def __lt__(self, other: Timer) -> bool:
        return self.due < other.due

    def cancel(self) -> None:
        """It is not called any more."""
        self.function = None


class Loop:
    """The loop. Descriptors are borrowed: `remove` them before they are closed."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._functions: dict[int, Callable[[int], object]] = {}
        self._wanted: dict[int, int] = {}
        self._timers: list[Timer] = []
        self._soon: list[Callable[[], object]] = []
        self.running = True

    def add(self, fd: int, events: int, function: Callable[[int], object]) -> None:
        """Call `function` with the events whenever there are some. Raises OSError."""
        self._functions[fd] = function
        self._wanted[fd] = 0
        self.want(fd, events)

    def want(self, fd: int, events: int) -> None:
        """Wait for other events; 0 for none at all, not even for the end of the other side, which epoll repeats for ever."""
        before = self._wanted[fd]
        if before == events:
            return
        if not events:
            self._epoll.unregister(fd)
        elif before:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)
        self._wanted[fd] = events

    def remove(self, fd: int) -> None:
        """Forget a descriptor; nothing happens when it is not known."""
        if self._functions.pop(fd, None) is not None and self._wanted.pop(fd):
            self._epoll.unregister(fd)

    def after(self, delay_s: float, function: Callable[[], object]) -> Timer:
        """Call `function` once, in so many seconds."""
        timer = Timer(time.monotonic() + delay_s, function)
        heappush(self._timers, timer)
        return timer

    def soon(self, function: Callable[[], object]) -> None:
        """Call `function` before waiting again."""
        self._soon.append(function)

    def stop(self) -> None:
        """Let `run` return."""
        self.running = False

    def wanted(self, fd: int) -> int:
        """The events that are waited for at a descriptor."""
        return self._wanted.get(fd, 0)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is to be called before something happens at a descriptor."""
        return not self._soon and all(timer.function is None for timer in self._timers)

    def run(self) -> None:
        """Until `stop`."""
        while self.running:
            self.turn()

    def turn(self, longest_s: float = -1.0) -> bool:
        """Wait once, for so long if not for ever, and call what is due. Returns whether there was anything."""
        timeout = longest_s
        while self._timers and self._timers[0].function is None:
            heappop(self._timers)
        if self._soon:
            timeout = 0.0
        elif self._timers:
            left_s = max(0.0, self._timers[0].due - time.monotonic())
            timeout = left_s if longest_s < 0 else min(left_s, longest_s)
        happened = self._epoll.poll(timeout)
        called = bool(happened)
        for fd, events in happened:
            function = self._functions.get(fd)
            if function is not None:
                function(events)
        now_s = time.monotonic()
        while self._timers and self._timers[0].due <= now_s:
            due = heappop(self._timers).function
            if due is not None:
                due()
                called = True
        soon, self._soon = self._soon, []
        for call in soon:
            call()
        return called or bool(soon)

    def close(self) -> None:
        """Release the epoll descriptor."""
        self._epoll.close()


class Inbox:
    """Signals of this process as calls within the loop. Only in the main thread."""

    def __init__(self, loop: Loop) -> None:
        import _signal  # type: ignore[import-not-found]  # `signal` without its enums

        self._signal = _signal
        self._loop = loop
        self._functions: dict[int, Callable[[], object]] = {}
        self._fd, self._write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        _signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        loop.add(self._fd, IN, self._read)

    def on(self, number: int, function: Callable[[], object]) -> None:
        """Call `function` when the signal has come, once for several."""
        self._functions[number] = function
        self._signal.signal(number, _noted)

    def _read(self, events: int) -> None:
        for number in set(os.read(self._fd, 4096)):
            self.call(number)

    def call(self, number: int) -> None:
        """As if the signal had come."""
        function = self._functions.get(number)
        if function is not None:
            function()


def _noted(number: int, frame: object) -> None:
    """The byte on the descriptor says it all."""
