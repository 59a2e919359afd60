from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import wait_until

from llmkit.errors import LLMKitError, NotReady
from llmkit.panel.form_check import Checker
from llmkit.panel.lane import Lane

QUIET = 0.1


class Asked:
    """A checker whose server answers when the test lets it."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.state: Any = None
        self.asked: list[Any] = []
        self.told: list[Any] = []
        self.under_way = 0
        self.most_under_way = 0
        self.answer = threading.Semaphore(0)
        self.checker: Checker[Any] = Checker(lane, self._begin, self.told.append, self.told.append)

    def change(self, state: Any) -> None:
        self.state = state
        self.lane.call(self.checker.changed)

    def _begin(self) -> Callable[[], Any] | None:
        state = self.state
        return None if state is None else lambda: self._work(state)

    def _work(self, state: Any) -> Any:
        self.asked.append(state)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        self.answer.acquire(timeout=5)
        self.under_way -= 1
        if isinstance(state, LLMKitError):
            raise state
        return state


@pytest.fixture
def asked(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    monkeypatch.setattr("llmkit.panel.form_check.QUIET_SECONDS", QUIET)
    made = Asked(lane)
    yield made
    made.answer.release(10)


def test_the_last_change_of_many_is_checked_a_moment_later(asked: Asked) -> None:
    for number in range(10):
        asked.change(number)
        time.sleep(QUIET / 5)
    assert asked.asked == []
    started = time.monotonic()
    wait_until(lambda: asked.asked, "the check", 2, 0.005)
    assert time.monotonic() - started >= QUIET / 2
    asked.answer.release()
    wait_until(lambda: asked.told == [9], "the answer", 2)
    assert asked.asked == [9]


def test_a_late_answer_is_dropped_and_two_checks_are_never_under_way(asked: Asked) -> None:
    asked.change("old")
    wait_until(lambda: asked.asked == ["old"], "the first check", 2)
    asked.change("newer")
    asked.change("newest")
    time.sleep(QUIET * 3)
    assert asked.asked == ["old"]
    asked.answer.release()
    wait_until(lambda: asked.asked == ["old", "newest"], "the second check", 2)
    asked.answer.release()
    wait_until(lambda: asked.told, "the answer", 2)
    assert asked.told == ["newest"]
    assert asked.most_under_way == 1


def test_a_refusal_is_told_and_what_comes_after_is_checked(asked: Asked) -> None:
    error = NotReady("Not now.")
    asked.change(error)
    asked.answer.release()
    wait_until(lambda: asked.told == [error], "the refusal", 2)
    asked.change("next")
    asked.answer.release()
    wait_until(lambda: asked.told == [error, "next"], "the answer", 2)


def test_nothing_to_check_is_not_checked(asked: Asked) -> None:
    asked.change(None)
    time.sleep(QUIET * 3)
    assert asked.lane.settle(2)
    assert asked.asked == []


def test_an_answer_that_is_dropped_is_not_told(asked: Asked) -> None:
    asked.change("one")
    wait_until(lambda: asked.asked, "the check", 2)
    asked.lane.call(asked.checker.drop)
    assert asked.lane.settle(2)
    asked.answer.release()
    wait_until(lambda: asked.under_way == 0, "the end", 2)
    assert asked.lane.settle(2)
    assert asked.told == []


def test_a_check_that_is_to_come_is_dropped_too(asked: Asked) -> None:
    asked.change("one")
    asked.lane.call(asked.checker.drop)
    time.sleep(QUIET * 3)
    assert asked.lane.settle(2)
    assert asked.asked == []
    asked.change("two")
    asked.answer.release()
    wait_until(lambda: asked.told == ["two"], "the answer", 2)
