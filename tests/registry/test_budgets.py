"""What each of many people may ask: nothing is spent twice, nothing is lost, and a killed server forgets nothing."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmkit.errors import BudgetExhausted
from llmkit.registry.budgets import DAY, LIMITS, MINUTE, Budgets, Charge

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


@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_happens_it_is_what_a_plain_list_says(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / secrets.token_hex(8)
    folder.mkdir()
    asyncio.run(_whatever_happens(folder, data))


async def _whatever_happens(folder: Path, data: st.DataObject) -> None:
    clock = Clock()
    limits = data.draw(st.fixed_dictionaries({}, optional=dict.fromkeys(LIMITS, st.integers(1, 12))))
    budgets = make(folder, clock, **limits)
    await budgets.open()
    charged: list[Charge] = []  # all that were not taken back, in the order of arrival
    open_ones: list[Charge] = []

    def used(user: str) -> dict[str, int]:
        found = {}
        for span, seconds in (("minute", MINUTE), ("day", DAY)):
            inside = [one for one in charged if one.user == user and one.started_at > clock.now - seconds]
            found[f"requests_per_{span}"] = len(inside)
            found[f"tokens_per_{span}"] = sum(one.tokens for one in inside)
        return found

    try:
        for _ in range(data.draw(st.integers(1, 25))):
            step = data.draw(st.sampled_from(["reserve", "reserve", "settle", "take back", "wait"]))
            if step == "wait":
                clock.now += data.draw(st.sampled_from([1.0, 20.0, MINUTE, DAY / 2]))
            elif step == "reserve":  # several at once
                asked = data.draw(st.lists(st.tuples(st.sampled_from(["ada", "ben"]), st.integers(0, 8)), max_size=5))
                fits = []
                before = {user: used(user) for user in ("ada", "ben")}
                for user, tokens in asked:
                    then = {name: n + (1 if "requests" in name else tokens) for name, n in before[user].items()}
                    fits.append(all(then[name] <= limit for name, limit in limits.items()))
                    if fits[-1]:
                        before[user] = then
                found = await asyncio.gather(
                    *(budgets.reserve(user, "m", tokens) for user, tokens in asked), return_exceptions=True
                )
                assert [isinstance(one, Charge) for one in found] == fits
                made = [one for one in found if isinstance(one, Charge)]
                charged += made
                open_ones += made
            elif open_ones:
                charge = open_ones.pop(data.draw(st.integers(0, len(open_ones) - 1)))
                if step == "settle":
                    budgets.settle(charge, data.draw(st.none() | st.integers(0, charge.tokens)))
                else:
                    budgets.take_back(charge)
                    charged.remove(charge)
            for user in ("ada", "ben"):
                assert all(used(user)[name] <= limit for name, limit in limits.items())  # never overdrawn
                assert budgets.left(user) == {
                    name: limits[name] - used(user)[name] for name in LIMITS if name in limits
                }
        told = {(one.user, one.day): (one.requests, one.tokens) for one in await budgets.by_day()}
        assert sum(requests for requests, _ in told.values()) == len(charged)
        assert sum(tokens for _, tokens in told.values()) == sum(one.tokens for one in charged)
    finally:
        await budgets.close()


async def test_a_clock_that_is_set_back_gives_nothing_away(tmp_path: Path, clock: Clock) -> None:
    async with opened(tmp_path, clock) as budgets:
        charge = await budgets.reserve("ada", "m", 600)
        clock.now -= DAY
        await budgets.reserve("ada", "m", 300)
        with pytest.raises(BudgetExhausted) as caught:
            await budgets.reserve("ada", "m", 200)
        assert caught.value.details["retry_after"] <= DAY
        budgets.settle(charge, 700)  # more than was reserved: the truth counts
        assert budgets.left("ada")["tokens_per_day"] == 0
        clock.now += 2 * DAY
        assert budgets.left("ada")["tokens_per_day"] == 1000
