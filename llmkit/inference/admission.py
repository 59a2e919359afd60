"""How many requests of one model run, and how many wait."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable

from llmkit.errors import LLMKitError, QueueFull


class Admission:
    """A bounded queue, first come first served.

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
        self._before = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def queued(self) -> int:
        """Requests waiting now."""
        return self._before + len(self._waiting)

    @contextlib.asynccontextmanager
    async def slot(self, first: Callable[[], Awaitable[None]] | None = None) -> AsyncIterator[None]:
        """Hold one of the running places, after waiting for it.

        Parameters
        ----------
        first
            Something to wait for before, such as a load; who waits for that counts as waiting.

        Raises
        ------
        QueueFull
            If too many wait already.
        """
        if first is not None:
            self._check_room(self.max_in_flight - self.in_flight)
            self._before += 1
            try:
                await first()
            finally:
                self._before -= 1
        if self.in_flight < self.max_in_flight and not self._waiting:
            self.in_flight += 1
        else:
            if first is None:
                self._check_room(0)
            await self._wait()
        try:
            yield
        finally:
            self.in_flight -= 1
            self._wake()

    def _check_room(self, places: int) -> None:
        if self.queued >= self.max_queued + max(places, 0):
            raise QueueFull(
                f"{self.queued} requests wait for `{self.model_id}` already; it takes no more.",
                hint="Send it again a little later.",
                details={"limit": self.max_queued, "queued": self.queued, "in_flight": self.in_flight},
            )

    async def _wait(self) -> None:
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled() and place.exception() is None:
                # Admitted and cancelled in the same turn of the loop: hand the place on.
                self.in_flight -= 1
                self._wake()
            else:
                with contextlib.suppress(ValueError):  # `_wake` may have passed it over already
                    self._waiting.remove(place)
            raise

    def _wake(self) -> None:
        while self._waiting and self.in_flight < self.max_in_flight:
            place = self._waiting.popleft()
            if not place.done():
                self.in_flight += 1
                place.set_result(None)

    def reject_waiting(self, error: LLMKitError) -> None:
        """End every wait with an error."""
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_exception(error)
