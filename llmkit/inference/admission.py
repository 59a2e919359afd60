"""How many requests of one model run, how many wait, and who goes first."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final

from llmkit.errors import LLMKitError, QueueFull
from llmkit.schemas import Priority

RESERVED_SHARE: Final = 8
"""One place in so many, and at least one of several, is never given to a batch."""
LONGEST_RETRY_SECONDS: Final = 60
_WEIGHT: Final = 0.1
"""Of the last request in the mean of their durations."""


class Admission:
    """A bounded queue in two classes: what is interactive goes before what is batch, each in the order of arrival.

    A batch leaves some places free, so that a person need not wait for the end of one of its requests, and when the
    queue is full the last request of a batch in it makes room for a person's.

    Parameters
    ----------
    model_id
        For the words of `QueueFull`.
    max_in_flight, max_queued
        Requests running and waiting at most; both may be changed at any time and hold from the next request.
    """

    def __init__(self, model_id: str, max_in_flight: int, max_queued: int) -> None:
        self.model_id = model_id
        self.max_in_flight = max_in_flight
        self.max_queued = max_queued
        self.in_flight = 0
        self._batch_in_flight = 0
        self._waiting: dict[Priority, deque[Slot]] = {"interactive": deque(), "batch": deque()}
        # Those that wait for something else before, such as a load, are in a queue of their own.
        self._before: dict[Priority, deque[Slot]] = {"interactive": deque(), "batch": deque()}
        self._mean_seconds = 1.0

    @property
    def queued(self) -> int:
        """Requests waiting now."""
        return sum(map(len, (*self._waiting.values(), *self._before.values())))

    def positions(self) -> dict[Any, int]:
        """Give the place of every request in the queue by its owner, from 1 on."""
        slots = (*self._waiting["interactive"], *self._waiting["batch"])
        return {slot.owner: number for number, slot in enumerate(slots, 1)}

    def reject_waiting(self, error: LLMKitError) -> None:
        """End every wait with an error."""
        for waiting in self._waiting.values():
            while waiting:
                waiting.popleft().reject(error)

    async def enter(self, slot: Slot) -> None:
        """Give a slot a place, after waiting for it.

        Raises
        ------
        QueueFull
            If too many wait already, or if a person's request takes the place of one of a batch in a full queue.
        """
        priority = slot.priority
        if slot.first is not None:
            self._check_room(priority, self.max_in_flight - self.in_flight)
            await self._wait_before(slot, slot.first)
        if self._has_place(priority) and not self._waiting[priority]:
            self._take(priority)
        else:
            if slot.first is None:
                self._check_room(priority)
            await self._wait(slot)
        slot.started = time.monotonic()

    def leave(self, slot: Slot) -> None:
        """Take the place of a slot back, for those who wait."""
        self._mean_seconds += _WEIGHT * (time.monotonic() - slot.started - self._mean_seconds)
        self._give_back(slot.priority)

    async def _wait_before(self, slot: Slot, first: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Wait for something else than a place; a person's request can put an end to it, as to any wait of a batch."""
        waiting = self._before[slot.priority]
        slot.place = asyncio.get_running_loop().create_future()
        waiting.append(slot)
        task = asyncio.create_task(first())
        try:
            await asyncio.wait([task, slot.place], return_when=asyncio.FIRST_COMPLETED)
            if slot.place.done():
                slot.place.result()
            await task
        finally:
            if not task.done():
                task.cancel()
            elif not task.cancelled():
                task.exception()  # perhaps nobody else has looked at it
            with contextlib.suppress(ValueError):  # it may have been taken out already
                waiting.remove(slot)

    async def _wait(self, slot: Slot) -> None:
        waiting = self._waiting[slot.priority]
        slot.place = asyncio.get_running_loop().create_future()
        waiting.append(slot)
        try:
            await slot.place
        except asyncio.CancelledError:
            if slot.place.done() and not slot.place.cancelled() and slot.place.exception() is None:
                # Admitted and cancelled in the same turn of the loop: hand the place on.
                self._give_back(slot.priority)
            else:
                with contextlib.suppress(ValueError):  # it may have been passed over already
                    waiting.remove(slot)
            raise

    def _has_place(self, priority: Priority) -> bool:
        if self.in_flight >= self.max_in_flight:
            return False
        if priority == "interactive":
            return True
        reserved = max(1, self.max_in_flight // RESERVED_SHARE) if self.max_in_flight > 1 else 0
        return self._batch_in_flight < self.max_in_flight - reserved

    def _take(self, priority: Priority) -> None:
        self.in_flight += 1
        self._batch_in_flight += priority == "batch"

    def _give_back(self, priority: Priority) -> None:
        self.in_flight -= 1
        self._batch_in_flight -= priority == "batch"
        for following, waiting in self._waiting.items():
            while waiting and self._has_place(following):
                place = waiting.popleft().place
                if place is not None and not place.done():
                    self._take(following)
                    place.set_result(None)

    def _check_room(self, priority: Priority, places: int = 0) -> None:
        """Raise `QueueFull` if no more may wait; a batch's last request in the queue makes room for a person's."""
        if self.queued < self.max_queued + max(places, 0):
            return
        batch = self._waiting["batch"] or self._before["batch"]
        if priority == "interactive" and batch:
            batch.pop().reject(self._full())
            return
        raise self._full()

    def _full(self) -> QueueFull:
        seconds = math.ceil(self._mean_seconds * (self.queued + 1) / max(self.max_in_flight, 1))
        retry_after = min(max(seconds, 1), LONGEST_RETRY_SECONDS)
        return QueueFull(
            f"{self.queued} requests wait for `{self.model_id}` already; it takes no more.",
            hint=f"Send it again in about {retry_after} s.",
            details={
                "limit": self.max_queued,
                "queued": self.queued,
                "in_flight": self.in_flight,
                "retry_after": retry_after,
            },
        )


@dataclass(eq=False, slots=True)
class Slot:
    """A request's place in a queue: between `Admission.enter` and `Admission.leave` it is one of those that run.

    Parameters
    ----------
    priority
        The class of the request.
    owner
        What `Admission.positions` names it by.
    first
        Something to wait for before, such as a load; who waits for that counts as waiting.
    """

    priority: Priority = "interactive"
    owner: Any = None
    first: Callable[[], Coroutine[Any, Any, None]] | None = None
    place: asyncio.Future[None] | None = None
    started: float = 0.0

    def reject(self, error: LLMKitError) -> None:
        """End the wait with an error."""
        if self.place is not None and not self.place.done():
            self.place.set_exception(error)
