"""How many requests of one model run, how many wait, and who goes first."""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Iterator
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
    """A bounded queue in two classes: what is interactive goes before what is batch.

    Within a class the users take turns, each with their requests in the order of arrival; on a server of one person all
    requests are those of one user. A batch leaves some places free, so that a person need not wait for the end of one
    of its requests. In a full queue a batch's request makes room for a person's, and the last one of whoever has most
    of them waiting makes room for somebody who has fewer: nobody alone can fill it.

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
        self._waiting: dict[Priority, Turns] = {"interactive": Turns(), "batch": Turns()}
        # Those that wait for something else before, such as a load, are in a queue of their own.
        self._before: dict[Priority, Turns] = {"interactive": Turns(), "batch": Turns()}
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
            while waiting.users:
                waiting.next().reject(error)

    async def enter(self, slot: Slot) -> None:
        """Give a slot a place, after waiting for it.

        Raises
        ------
        QueueFull
            If too many wait already, or if a person's request takes the place of one of a batch in a full queue.
        """
        priority = slot.priority
        if slot.first is not None:
            self._check_room(slot, self.max_in_flight - self.in_flight)
            await self._wait_before(slot, slot.first)
        if self._has_place(priority) and not self._waiting[priority].users:
            self._take(priority)
        else:
            if slot.first is None:
                self._check_room(slot)
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
        waiting.add(slot)
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
            waiting.discard(slot)

    async def _wait(self, slot: Slot) -> None:
        waiting = self._waiting[slot.priority]
        slot.place = asyncio.get_running_loop().create_future()
        waiting.add(slot)
        try:
            await slot.place
        except asyncio.CancelledError:
            if slot.place.done() and not slot.place.cancelled() and slot.place.exception() is None:
                # Admitted and cancelled in the same turn of the loop: hand the place on.
                self._give_back(slot.priority)
            else:
                waiting.discard(slot)
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
            while waiting.users and self._has_place(following):
                place = waiting.next().place
                if place is not None and not place.done():
                    self._take(following)
                    place.set_result(None)

    def _check_room(self, slot: Slot, places: int = 0) -> None:
        """Raise `QueueFull` if no more may wait, unless another request makes room."""
        if self.queued < self.max_queued + max(places, 0):
            return
        other = self._to_make_room(slot)
        if other is None:
            raise self._full()
        other.reject(self._full())

    def _to_make_room(self, slot: Slot) -> Slot | None:
        """Take the request out of the queue that has less right to be in it than one that comes, or give None."""
        own = (self._waiting[slot.priority], self._before[slot.priority])
        if slot.priority == "interactive":
            for turns in (self._waiting["batch"], self._before["batch"]):
                if turns.users:
                    return turns.last_of(turns.greediest())
        has = sum(turns.count(slot.user) for turns in own)
        for turns in own:
            if turns.users:
                user = turns.greediest()
                if turns.count(user) > has + 1:
                    return turns.last_of(user)
        return None

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
    user
        Who takes turns with others; None where all are one.
    """

    priority: Priority = "interactive"
    owner: Any = None
    first: Callable[[], Coroutine[Any, Any, None]] | None = None
    user: str | None = None
    place: asyncio.Future[None] | None = None
    started: float = 0.0

    def reject(self, error: LLMKitError) -> None:
        """End the wait with an error."""
        if self.place is not None and not self.place.done():
            self.place.set_exception(error)


class Turns:
    """Requests that wait, in the order in which they go: one of each user, then the next of each.

    Everything but `greediest` and iterating takes the same time however many wait.

    Attributes
    ----------
    users
        The requests of each user in the order of arrival; the user whose turn is next comes first. Read it alone.
    """

    __slots__ = ("_count", "users")

    def __init__(self) -> None:
        # Of both, the first and the last one are taken out at once, as those of a plain dict are not.
        self.users: OrderedDict[str | None, OrderedDict[Slot, None]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Slot]:
        following = deque(map(iter, self.users.values()))
        while following:
            slots = following.popleft()
            slot = next(slots, None)
            if slot is not None:
                yield slot
                following.append(slots)

    def add(self, slot: Slot) -> None:
        """Put a request behind those of its user, and a user who had none behind the others."""
        slots = self.users.get(slot.user)
        if slots is None:
            slots = self.users[slot.user] = OrderedDict()
        slots[slot] = None
        self._count += 1

    def next(self) -> Slot:
        """Take out the request whose turn it is; its user's next one comes after one of each of the others."""
        user, slots = next(iter(self.users.items()))
        slot = next(iter(slots))
        self.users.move_to_end(user)
        self.discard(slot)
        return slot

    def discard(self, slot: Slot) -> None:
        """Take a request out, if it is still there; nobody's turn changes."""
        slots = self.users.get(slot.user)
        if slots is None or slot not in slots:
            return
        del slots[slot]
        self._count -= 1
        if not slots:
            del self.users[slot.user]

    def count(self, user: str | None) -> int:
        """Give how many requests of a user wait."""
        return len(self.users.get(user, ()))

    def greediest(self) -> str | None:
        """Give the user of whom most requests wait; there must be one."""
        return max(self.users, key=self.count)

    def last_of(self, user: str | None) -> Slot:
        """Take out the last request of a user."""
        slot = next(reversed(self.users[user]))
        self.discard(slot)
        return slot
