from __future__ import annotations

import asyncio
import contextlib
import random

import pytest

from llmkit.errors import ModelUnloaded, QueueFull
from llmkit.inference.admission import Admission


async def test_places_are_given_in_the_order_of_arrival() -> None:
    admission = Admission("m", 2, 100)
    order: list[int] = []

    async def request(number: int) -> None:
        async with admission.slot():
            order.append(number)
            assert admission.in_flight <= 2
            await asyncio.sleep(0)

    await asyncio.gather(*(request(number) for number in range(20)))
    assert order == list(range(20))
    assert (admission.in_flight, admission.queued) == (0, 0)


async def test_cancelling_at_any_moment_gives_every_place_back() -> None:
    chance = random.Random(1)
    admission = Admission("m", 3, 50)

    async def request() -> None:
        async with admission.slot():
            await asyncio.sleep(chance.random() / 500)

    tasks = []
    for _ in range(400):
        tasks.append(asyncio.create_task(request()))
        if chance.random() < 0.5:
            chance.choice(tasks).cancel()
        if chance.random() < 0.3:
            await asyncio.sleep(0)
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError, QueueFull):
            await task
    assert (admission.in_flight, admission.queued) == (0, 0)


async def test_waiting_requests_are_ended_with_the_error_given() -> None:
    admission = Admission("m", 1, 5)

    async def request() -> None:
        async with admission.slot():
            await asyncio.Event().wait()

    running, waiting = (asyncio.create_task(request()) for _ in range(2))
    await asyncio.sleep(0)
    admission.reject_waiting(ModelUnloaded("gone"))
    with pytest.raises(ModelUnloaded):
        await waiting
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    assert admission.in_flight == 0


async def test_a_raised_limit_holds_from_the_next_request() -> None:
    admission = Admission("m", 1, 0)
    async with admission.slot():
        with pytest.raises(QueueFull):
            async with admission.slot():
                pass
        admission.max_in_flight = 2
        async with admission.slot():
            assert admission.in_flight == 2
