from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from llmkit.errors import ModelUnloaded, QueueFull
from llmkit.inference.admission import Admission, Slot, Turns
from llmkit.schemas import Priority


@contextlib.asynccontextmanager
async def held(
    admission: Admission,
    priority: Priority = "interactive",
    owner: object = None,
    first: Any = None,
    user: str | None = None,
) -> AsyncIterator[None]:
    """Hold a place."""
    slot = Slot(priority, owner, first, user)
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


# -- many people ----------------------------------------------------------------------------------------------


class Class:
    """People at one model that answers one request at a time, when it is told to."""

    def __init__(self, max_queued: int = 1000) -> None:
        self.admission = Admission("m", 1, max_queued)
        self.order: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self._next = asyncio.Semaphore(0)

    async def ask(self, *names: str, priority: Priority = "interactive") -> None:
        """Send requests named by user and number."""
        for name in names:
            self.tasks[name] = asyncio.create_task(self._request(name, priority))
            await asyncio.sleep(0)

    async def _request(self, name: str, priority: Priority) -> None:
        async with held(self.admission, priority, name, user=name[0]):
            self.order.append(name)
            await self._next.acquire()

    async def end(self) -> list[str]:
        """Answer all, one after the other; give those that were turned away."""
        for _ in self.tasks:
            self._next.release()
        found = await asyncio.gather(*self.tasks.values(), return_exceptions=True)
        assert (self.admission.in_flight, self.admission.queued) == (0, 0)
        return [name for name, one in zip(self.tasks, found, strict=True) if isinstance(one, QueueFull)]


async def test_people_take_turns() -> None:
    people = Class()
    await people.ask(*(f"a{number}" for number in range(200)), "b0", "b1", "c0")
    # Positions are those of the order that follows.
    promised = sorted(people.admission.positions().items(), key=lambda one: one[1])
    assert await people.end() == []
    assert people.order[:7] == ["a0", "a1", "b0", "c0", "a2", "b1", "a3"]
    assert people.order[7:] == [f"a{number}" for number in range(4, 200)]
    assert promised == [(name, number) for number, name in enumerate(people.order[1:], 1)]


async def test_who_comes_later_waits_for_one_request_of_each() -> None:
    people = Class()
    await people.ask("a0", "a1", "a2", "a3", "b0", "b1")
    people._next.release()
    while len(people.order) < 2:
        await asyncio.sleep(0)
    await people.ask("c0")  # a1 runs: it is b's turn
    await people.end()
    assert people.order == ["a0", "a1", "b0", "a2", "c0", "b1", "a3"]


async def test_people_go_before_batches_in_turns_of_their_own() -> None:
    people = Class()
    await people.ask("x0")
    await people.ask("a0", "a1", "a2", "b0", priority="batch")
    await people.ask("a3", "a4", "b1")
    promised = people.admission.positions()
    await people.end()
    assert people.order == ["x0", "a3", "b1", "a4", "a0", "b0", "a1", "a2"]
    assert promised == {name: number for number, name in enumerate(people.order) if number}


async def test_who_leaves_in_the_middle_takes_nobodys_turn() -> None:
    people = Class()
    await people.ask("x0", "a0", "a1", "b0", "c0", "c1")
    for name in ("a0", "b0", "c1"):
        people.tasks[name].cancel()
    await asyncio.sleep(0)
    assert people.admission.positions() == {"a1": 1, "c0": 2}
    await people.end()
    assert people.order == ["x0", "a1", "c0"]


async def test_nobody_alone_fills_the_queue() -> None:
    people = Class(max_queued=4)
    await people.ask("a0", "a1", "a2", "a3", "a4")
    await people.ask("a5", "b0", "b1", "c0", "b2")
    # a5 finds it full; b0, b1 and c0 take the places of a's last ones; b2 would have more than anybody else.
    assert await people.end() == ["a2", "a3", "a4", "a5", "b2"]
    assert people.order == ["a0", "a1", "b0", "c0", "b1"]


async def test_a_full_queue_of_batches_is_shared_too() -> None:
    people = Class(max_queued=3)
    await people.ask("x0")
    await people.ask("a0", "a1", "a2", "b0", priority="batch")
    await people.ask("c0", priority="interactive")
    assert await people.end() == ["a1", "a2"]
    assert people.order == ["x0", "c0", "a0", "b0"]


async def test_turns_by_chance_are_those_of_a_plain_list() -> None:
    chance = random.Random(3)
    for _ in range(50):
        turns, lists = Turns(), dict[str | None, list[Slot]]()
        for _ in range(100):
            if chance.random() < 0.6 or not lists:
                slot = Slot(user=chance.choice("abcd"))
                turns.add(slot)
                lists.setdefault(slot.user, []).append(slot)
            elif chance.random() < 0.5:
                user = next(iter(lists))
                slots = lists.pop(user)
                assert turns.next() is slots.pop(0)
                if slots:
                    lists[user] = slots
            else:
                slot = chance.choice([slot for slots in lists.values() for slot in slots])
                turns.discard(slot)
                turns.discard(slot)  # twice is once
                lists[slot.user].remove(slot)
                lists = {user: slots for user, slots in lists.items() if slots}
            assert len(turns) == sum(map(len, lists.values())) == len(list(turns))
