"""Decisions, without anything that could happen."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit.registry.policies import (
    Candidate,
    LoadRecord,
    effective_ttl,
    expires_at,
    forecast,
    fraction_done,
    make_room,
    restart_delay,
)
from llmkit.schemas import Download

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("asked", "configured", "default", "ceiling", "ttl"),
    [
        (None, None, -1, None, None),
        (None, None, 60, None, 60),
        (None, 30, 60, None, 30),
        (5, 30, 60, None, 5),
        (0, 30, 60, None, 0),
        (-1, 30, 60, None, None),
        (None, -1, 60, 120, 120),
        (500, None, 60, 120, 120),
        (None, None, 60, 120, 60),
        (None, None, -1, -1, None),
        (None, None, math.inf, None, None),
        (None, None, 1e12, 60, 60),
        (None, None, math.nan, math.inf, None),
    ],
)
def test_the_first_ttl_that_is_given_counts_up_to_the_ceiling(
    asked: float | None, configured: float | None, default: float, ceiling: float | None, ttl: float | None
) -> None:
    assert effective_ttl(asked, configured, default, ceiling) == ttl


def test_the_time_starts_at_the_end_of_the_last_request() -> None:
    used = NOON + timedelta(seconds=100)
    assert expires_at(60, NOON, None, busy=False) == NOON + timedelta(seconds=60)
    assert expires_at(60, NOON, used, busy=False) == used + timedelta(seconds=60)
    assert expires_at(60, NOON, used, busy=True) is None
    assert expires_at(None, NOON, used, busy=False) is None


def test_what_was_used_before_this_load_does_not_count() -> None:
    assert expires_at(60, NOON, NOON - timedelta(hours=1), busy=False) == NOON + timedelta(seconds=60)


def test_a_ttl_of_zero_waits_for_the_first_request() -> None:
    assert expires_at(0, NOON, NOON, busy=False) == NOON
    assert expires_at(0, NOON, None, busy=False) == NOON + timedelta(minutes=5)
    assert expires_at(0, NOON, None, busy=False, ceiling=60) == NOON + timedelta(minutes=1)
    assert expires_at(0, NOON, None, busy=False, ceiling=0) == NOON + timedelta(minutes=5)


def test_restarts_back_off_and_end_at_the_third_failure() -> None:
    assert restart_delay([0.0], 0.0) == 1.0
    assert restart_delay([0.0, 2.0], 2.0) == 4.0
    assert restart_delay([0.0, 2.0, 7.0], 7.0) is None
    assert restart_delay([0.0, 2.0, 400.0], 400.0) == 1.0


def candidate(name: str, size: int | None, minute: int, *, busy: bool = False, device: int = 0) -> Candidate:
    return Candidate(name, {} if size is None else {device: size}, NOON + timedelta(minutes=minute), busy)


def test_nobody_goes_where_there_is_room() -> None:
    room = make_room(10, {0: 20}, [candidate("a", 5, 0)])
    assert (room.evict, room.fits) == ([], True)


def test_the_least_recently_used_idle_model_goes_first() -> None:
    models = [candidate("new", 10, 9), candidate("old", 10, 1), candidate("busy", 10, 0, busy=True)]
    assert make_room(15, {0: 6}, models).evict == ["old"]
    assert make_room(25, {0: 6}, models).evict == ["old", "new"]


def test_a_busy_model_goes_only_by_force_and_last() -> None:
    models = [candidate("busy", 10, 0, busy=True), candidate("idle", 10, 9)]
    assert make_room(26, {0: 6}, models).fits is False
    assert make_room(26, {0: 6}, models).evict == []
    assert make_room(26, {0: 6}, models, force=True).evict == ["idle", "busy"]
    assert make_room(1000, {0: 6}, models, force=True).fits is True


def test_no_more_go_than_have_to() -> None:
    models = [candidate("small", 2, 0), candidate("large", 50, 1)]
    assert make_room(40, {0: 0}, models).evict == ["large"]


def test_who_holds_another_device_is_spared() -> None:
    models = [candidate("elsewhere", 50, 0, device=1), candidate("here", 50, 9, device=0)]
    assert make_room(60, {0: 40, 1: 5}, models).evict == ["here"]
    assert make_room(56, {0: 4, 1: 5}, models).fits is False  # not 60 in all, on two devices
    assert make_room(50, {0: 40, 1: 5}, models, count=2).evict == ["elsewhere", "here"]
    assert make_room(50, {0: 50, 1: 5}, models, count=2).evict == ["elsewhere"]
    assert make_room(1, {0: 40}, models, count=2).fits is False


def test_where_sizes_are_not_known_memory_does_not_count() -> None:
    assert make_room(None, {0: 5}, [candidate("a", 5, 0)]).evict == []
    assert make_room(None, {0: 5}, [candidate("a", 5, 0)]).fits is None
    assert make_room(None, {0: 5}, [candidate("a", None, 0)], surplus=1).evict == ["a"]


def test_a_limit_of_models_that_are_all_busy_cannot_be_met() -> None:
    assert make_room(1, {0: 5}, [candidate("a", 5, 0, busy=True)], surplus=1).fits is False


@given(
    st.one_of(st.none(), st.integers(0, 200)),
    st.one_of(st.none(), st.integers(0, 200)),
    st.lists(st.tuples(st.one_of(st.none(), st.integers(0, 100)), st.integers(0, 50), st.booleans()), max_size=6),
    st.integers(0, 3),
)
def test_evicting_is_never_in_vain_and_never_hits_a_busy_model(
    needed: int | None, free: int | None, models: list[tuple[int | None, int, bool]], surplus: int
) -> None:
    candidates = [candidate(str(i), size, minute, busy=busy) for i, (size, minute, busy) in enumerate(models)]
    by_name = {c.model_id: c for c in candidates}
    room = make_room(needed, None if free is None else {0: free}, candidates, surplus=surplus)
    assert not any(by_name[name].busy for name in room.evict)
    if room.fits is False:
        assert room.evict == []
    elif room.fits and needed is not None and free is not None:
        assert free + sum(by_name[name].held.get(0, 0) for name in room.evict) >= needed
        assert len(room.evict) >= surplus


EARLIER = LoadRecord(30.0, {"arguments": 8.0, "core": 16.0, "weights": 24.0})


def test_what_is_left_is_learnt_from_the_last_load() -> None:
    assert forecast(None, "core", 5.0, 6.0) is None
    assert forecast(EARLIER, None, 0.0, 0.0) == 30.0
    assert forecast(EARLIER, None, 0.0, 5.0) == 25.0
    assert forecast(EARLIER, "arguments", 8.0, 10.0) == 20.0
    # Twice as slow as last time until here: probably so in what follows.
    assert forecast(EARLIER, "core", 32.0, 32.0) == 28.0
    # A step that takes longer than last time holds the clock.
    assert forecast(EARLIER, "weights", 24.0, 500.0) == 0.0
    assert forecast(EARLIER, "a step of another version", 3.0, 4.0) == 29.0


def test_a_download_counts_by_its_bytes() -> None:
    half = Download(done_bytes=50, total_bytes=100, bytes_per_second=10.0, eta_seconds=5.0)
    assert forecast(None, None, 0.0, 1.0, half) is None  # what follows the download is not known
    assert forecast(EARLIER, "arguments", 8.0, 9.0, half) == 27.0
    assert forecast(EARLIER, None, 0.0, 1.0, Download(done_bytes=50)) is None


def test_the_fraction_ends_before_the_end() -> None:
    assert fraction_done(0.0, 10.0) == 0.0
    assert fraction_done(5.0, 5.0) == 0.5
    assert fraction_done(10.0, 0.0) == 0.99
    assert fraction_done(0.0, 0.0) == 0.0
