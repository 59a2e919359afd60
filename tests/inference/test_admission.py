from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from llmkit.errors import ModelUnloaded, QueueFull
from llmkit.inference.admission import Admission, Slot
from llmkit.schemas import Priority


@contextlib.asynccontextmanager
async def held(
    admission: Admission, priority: Priority = "interactive", owner: object = None, first: Any = None
) -> AsyncIterator[None]:
    """Hold a place."""
    slot = Slot(priority, owner, first)
    await admission.enter(slot)
    try:
        yield
    finally:
        admission.leave(slot)


async def test_places_are_given_in_the_order_of_arrival() -> None:
    admission = Admission("m", 2, 100)
    order: list[int] = []

    async def request(number: int) -> None:
        async with held(admission):
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
        async with held(admission, chance.choice(["interactive", "batch"])):
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
        async with held(admission):
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
    async with held(admission):
        with pytest.raises(QueueFull):
            async with held(admission):
                pass
        admission.max_in_flight = 2
        async with held(admission):
            assert admission.in_flight == 2


async def test_a_person_goes_before_a_batch_that_waits_longer() -> None:
    admission = Admission("m", 1, 100)
    order: list[str] = []

    async def request(name: str, priority: Priority) -> None:
        async with held(admission, priority):
            order.append(name)
            await asyncio.sleep(0.01)

    batch = [asyncio.create_task(request(f"batch {number}", "batch")) for number in range(4)]
    await asyncio.sleep(0)
    person = asyncio.create_task(request("person", "interactive"))
    await asyncio.gather(*batch, person)
    assert order == ["batch 0", "person", "batch 1", "batch 2", "batch 3"]


@pytest.mark.parametrize(("places", "for_batch"), [(1, 1), (2, 1), (8, 7), (16, 14), (64, 56)])
async def test_a_batch_leaves_places_free_for_people(places: int, for_batch: int) -> None:
    admission = Admission("m", places, 1000)
    stop = asyncio.Event()

    async def request(priority: Priority) -> None:
        async with held(admission, priority):
            await stop.wait()

    batch = [asyncio.create_task(request("batch")) for _ in range(places + 5)]
    await asyncio.sleep(0)
    assert (admission.in_flight, admission.queued) == (for_batch, places + 5 - for_batch)
    people = [asyncio.create_task(request("interactive")) for _ in range(places - for_batch)]
    await asyncio.sleep(0)
    assert (admission.in_flight, admission.queued) == (places, places + 5 - for_batch)
    stop.set()
    await asyncio.gather(*batch, *people)
    assert (admission.in_flight, admission.queued) == (0, 0)


async def test_in_a_full_queue_the_last_of_a_batch_makes_room_for_a_person() -> None:
    admission = Admission("m", 1, 2)
    stop = asyncio.Event()

    async def request(priority: Priority) -> str:
        async with held(admission, priority):
            await stop.wait()
        return priority

    batch = [asyncio.create_task(request("batch")) for _ in range(3)]
    await asyncio.sleep(0)
    person = asyncio.create_task(request("interactive"))
    await asyncio.sleep(0)
    with pytest.raises(QueueFull):
        await batch[2]
    another = asyncio.create_task(request("batch"))
    with pytest.raises(QueueFull):
        await another
    stop.set()
    assert await asyncio.gather(batch[0], batch[1], person) == ["batch", "batch", "interactive"]


async def test_a_position_counts_people_first() -> None:
    admission = Admission("m", 1, 10)
    stop = asyncio.Event()

    async def request(name: str, priority: Priority) -> None:
        async with held(admission, priority, name):
            await stop.wait()

    names: dict[str, Priority] = {"running": "interactive", "batch": "batch", "a": "interactive", "b": "interactive"}
    tasks = []
    for name, priority in names.items():
        tasks.append(asyncio.create_task(request(name, priority)))
        await asyncio.sleep(0)
    assert admission.positions() == {"a": 1, "b": 2, "batch": 3}
    stop.set()
    await asyncio.gather(*tasks)


async def test_when_to_come_again_grows_with_the_queue_and_has_an_end() -> None:
    found = []
    for queued in (0, 5, 5000):
        admission = Admission("m", 1, queued)
        tasks = [asyncio.create_task(_hold(admission)) for _ in range(queued + 1)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull) as caught:
            async with held(admission):
                pass
        found.append(caught.value.details["retry_after"])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (admission.in_flight, admission.queued) == (0, 0)
    assert found == [1, 6, 60]


async def _hold(admission: Admission) -> None:
    async with held(admission):
        await asyncio.Event().wait()


async def test_a_person_takes_the_place_of_a_batch_that_waits_for_a_load() -> None:
    admission = Admission("m", 1, 1)
    loaded, cancelled = asyncio.Event(), 0

    async def load() -> None:
        nonlocal cancelled
        try:
            await loaded.wait()
        except asyncio.CancelledError:
            cancelled += 1
            raise

    async def request(priority: Priority) -> str:
        async with held(admission, priority, first=load):
            return priority

    batch = [asyncio.create_task(request("batch")) for _ in range(2)]
    await asyncio.sleep(0.01)
    people = [asyncio.create_task(request("interactive")) for _ in range(2)]
    await asyncio.sleep(0.01)
    assert admission.queued == 2
    for one in batch:
        with pytest.raises(QueueFull):
            await one
    assert cancelled == 2
    with pytest.raises(QueueFull):
        await request("interactive")
    loaded.set()
    assert await asyncio.gather(*people) == ["interactive"] * 2
    assert (admission.in_flight, admission.queued) == (0, 0)
