"""How many requests of one model run, how many wait, and who goes first."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Final

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
        self._before = 0
        self._waiting: dict[Priority, deque[Slot]] = {"interactive": deque(), "batch": deque()}
        self._mean_seconds = 1.0

    @property
    def queued(self) -> int:
        """Requests waiting now."""
        return self._before + len(self._waiting["interactive"]) + len(self._waiting["batch"])

    def position(self, owner: object) -> int | None:
        """Give the place of a request in the queue, from 1 on, or None if it does not wait in it."""
        for number, slot in enumerate((*self._waiting["interactive"], *self._waiting["batch"]), 1):
            if slot.owner is owner:
                return number
        return None

    def slot(
        self,
        priority: Priority = "interactive",
        owner: object = None,
        first: Callable[[], Awaitable[None]] | None = None,
    ) -> Slot:
        """Hold one of the running places within ``async with``, or from `enter` to `leave`, after waiting for it.

        Parameters
        ----------
        priority
            The class of the request.
        owner
            What `position` finds it by.
        first
            Something to wait for before, such as a load; who waits for that counts as waiting.

        Raises
        ------
        QueueFull
            If too many wait already.
        """
        return Slot(self, priority, owner, first)

    def reject_waiting(self, error: LLMKitError) -> None:
        """End every wait with an error."""
        for waiting in self._waiting.values():
            while waiting:
                waiting.popleft().reject(error)

    # -- for slots -----------------------------------------------------------------------------------------

    async def enter(self, slot: Slot) -> None:
        """Give a slot a place, after waiting for it."""
        priority = slot.priority
        if slot.first is not None:
            self._check_room(priority, self.max_in_flight - self.in_flight)
            self._before += 1
            try:
                await slot.first()
            finally:
                self._before -= 1
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
        if priority == "interactive" and self._waiting["batch"]:
            self._waiting["batch"].pop().reject(self._full())
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


class Slot:
    """A request's place, made by `Admission.slot`; an asynchronous context manager, to be entered once."""

    # A class rather than a generator: every request passes here.
    __slots__ = ("_admission", "first", "owner", "place", "priority", "started")

    def __init__(
        self,
        admission: Admission,
        priority: Priority,
        owner: object,
        first: Callable[[], Awaitable[None]] | None,
    ) -> None:
        self._admission = admission
        self.priority: Priority = priority
        self.owner = owner
        self.first = first
        self.place: asyncio.Future[None] | None = None
        self.started = 0.0

    def __aenter__(self) -> Awaitable[None]:
        return self._admission.enter(self)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._admission.leave(self)

    def reject(self, error: LLMKitError) -> None:
        """End the wait with an error."""
        if self.place is not None and not self.place.done():
            self.place.set_exception(error)
