"""What each of many people may ask: nothing is spent twice, nothing is lost, and a killed server forgets nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from llmkit.errors import BudgetExhausted
from llmkit.registry.budgets import DAY, MINUTE, RESERVED_TOKENS, Budgets, most_tokens

LOG = logging.getLogger("test")


class Clock:
    now = 1_764_028_800.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make(folder: Path, clock: Clock, **limits: int) -> Budgets:
    return Budgets(folder, limits, LOG, clock)


@asynccontextmanager
async def opened(folder: Path, clock: Clock, **limits: int) -> AsyncIterator[Budgets]:
    budgets = make(folder, clock, **(limits or {"requests_per_minute": 3, "tokens_per_day": 1000}))
    await budgets.open()
    try:
        yield budgets
    finally:
        await budgets.close()


async def test_concurrent_requests_cannot_overdraw(tmp_path: Path, clock: Clock) -> None:
    budgets = make(tmp_path, clock, tokens_per_day=1000)
    await budgets.open()
    found = await asyncio.gather(*(budgets.reserve("ada", "m", 90) for _ in range(60)), return_exceptions=True)
    charges = [one for one in found if not isinstance(one, BaseException)]
    assert len(charges) == 11
    assert all(isinstance(one, BudgetExhausted) for one in found if isinstance(one, BaseException))
    assert budgets.left("ada") == {"tokens_per_day": 10}
    for charge in charges:
        budgets.settle(charge, 7)
        budgets.settle(charge, 7)  # twice is once
    assert budgets.left("ada") == {"tokens_per_day": 1000 - 77}
    (day,) = await budgets.by_day()
    assert (day.user, day.requests, day.tokens, day.day) == ("ada", 11, 77, "2025-11-25")
    await budgets.close()


async def test_one_user_does_not_spend_what_is_anothers(tmp_path: Path, clock: Clock) -> None:
    async with opened(tmp_path, clock) as budgets:
        await budgets.reserve("ada", "m", 1000)
        with pytest.raises(BudgetExhausted):
            await budgets.reserve("ada", "m", 1)
        await budgets.reserve("ben", "m", 1000)


async def test_a_refusal_says_when_to_come_back(tmp_path: Path, clock: Clock) -> None:
    async with opened(tmp_path, clock) as budgets:
        for _ in range(3):
            await budgets.reserve("ada", "m", 10)
            clock.now += 10
        with pytest.raises(BudgetExhausted, match="3 requests a minute") as caught:
            await budgets.reserve("ada", "m", 10)
        assert caught.value.status == 429
        assert caught.value.details["retry_after"] == pytest.approx(MINUTE - 30)
        clock.now += caught.value.details["retry_after"]
        await budgets.reserve("ada", "m", 10)
        with pytest.raises(BudgetExhausted, match="a minute"):
            await budgets.reserve("ada", "m", 10)


async def test_what_never_fits_does_not_ask_to_wait(tmp_path: Path, clock: Clock) -> None:
    async with opened(tmp_path, clock) as budgets:
        with pytest.raises(BudgetExhausted, match="could take 1001 tokens; you have 1000 a day") as caught:
            await budgets.reserve("ada", "m", 1001)
        assert caught.value.details["retry_after"] == DAY  # no client tries again at once
        assert caught.value.param == "max_tokens"


async def test_what_is_not_sent_costs_nothing(tmp_path: Path, clock: Clock) -> None:
    async with opened(tmp_path, clock) as budgets:
        charge = await budgets.reserve("ada", "m", 1000)
        budgets.take_back(charge)
        budgets.settle(charge, 5)  # too late
        assert budgets.left("ada") == {"requests_per_minute": 3, "tokens_per_day": 1000}
        assert await budgets.by_day() == []


async def test_what_nobody_has_counted_stays_as_it_was_reserved(tmp_path: Path, clock: Clock) -> None:
    async with opened(tmp_path, clock) as budgets:
        budgets.settle(await budgets.reserve("ada", "m", 400), None)
        assert budgets.left("ada")["tokens_per_day"] == 600


async def test_administrators_are_recorded_and_not_limited(tmp_path: Path, clock: Clock) -> None:
    async with opened(tmp_path, clock) as budgets:
        for _ in range(5):
            await budgets.reserve("grace", "m", 900, limited=False)
        (day,) = await budgets.by_day("grace")
        assert (day.requests, day.tokens) == (5, 4500)


async def test_a_killed_server_forgets_nothing(tmp_path: Path, clock: Clock) -> None:
    first = make(tmp_path, clock, tokens_per_day=1000)
    await first.open()
    budget = await first.reserve("ada", "m", 300)
    await first.reserve("ada", "m", 500)  # not settled when the server ends
    first.settle(budget, 100)
    await first.by_day()  # the thread has done all before
    second = make(tmp_path, clock, tokens_per_day=1000)  # while the first one still has its connection
    await second.open()
    assert second.left("ada") == {"tokens_per_day": 400}
    with pytest.raises(BudgetExhausted):
        await second.reserve("ada", "m", 401)
    await second.reserve("ada", "m", 400)
    clock.now += DAY
    assert second.left("ada") == {"tokens_per_day": 1000}
    await second.close()
    await first.close()


async def test_a_cancelled_reservation_leaves_nothing(tmp_path: Path, clock: Clock) -> None:
    budgets = make(tmp_path, clock, requests_per_day=5)
    await budgets.open()
    for turns in range(8):
        task = asyncio.create_task(budgets.reserve("ada", "m", 1))
        for _ in range(turns % 4):
            await asyncio.sleep(0)
        if task.cancel():
            with pytest.raises(asyncio.CancelledError):
                await task
    assert budgets.left("ada") == {"requests_per_day": 5}
    assert await budgets.by_day() == []
    await budgets.close()


async def test_what_leaves_a_window_while_it_runs_is_settled_once(tmp_path: Path, clock: Clock) -> None:
    async with opened(tmp_path, clock) as budgets:
        charge = await budgets.reserve("ada", "m", 500)
        clock.now += MINUTE + 1
        await budgets.reserve("ada", "m", 100)
        budgets.settle(charge, 50)
        assert budgets.left("ada") == {"requests_per_minute": 2, "tokens_per_day": 850}


# -- what a request can take ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "most"),
    [
        ({"prompt": "", "max_tokens": 50}, 66),
        ({"prompt": "héllo", "max_tokens": 50}, 72),
        ({"prompt": ""}, 16 + RESERVED_TOKENS),
        ({"prompt": "", "max_tokens": 50, "n": 3}, 166),
        ({"prompt": [1, 2, 3], "max_tokens": 0}, 19),
        ({"messages": [{"role": "user", "content": "abc"}], "max_completion_tokens": 1}, 16 + 16 + 4 + 3 + 1),
        ({"messages": [{"image_url": {"url": "data:" + "x" * 100_000}}], "max_tokens": 1}, 16 + 16 + 4096 + 1),
        ({"input": "data:" + "x" * 100_000, "max_output_tokens": 1}, 16 + 100_005 + 1),
    ],
)
def test_the_most_that_a_request_takes(asked: dict[str, object], most: int) -> None:
    assert most_tokens(asked) == most


def test_the_default_of_a_configuration_bounds_an_answer_too() -> None:
    assert most_tokens({"prompt": ""}, 20) == 36
    assert most_tokens({"prompt": "", "max_tokens": 30}, 20) == 46
    assert most_tokens({"input": "abc"}, 0) == 19
