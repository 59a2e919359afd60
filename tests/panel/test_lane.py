from __future__ import annotations

import threading
import time

import pytest
from support import wait_until

from llmkit.errors import LLMKitError, NotReady
from llmkit.panel.lane import Lane


def test_work_is_done_in_order_on_one_thread(lane: Lane) -> None:
    done: list[tuple[int, str]] = []
    for number in range(50):
        lane.call(lambda number=number: done.append((number, threading.current_thread().name)))
    assert lane.settle(5)
    assert [number for number, _ in done] == list(range(50))
    assert {name for _, name in done} == {"llmkit-panel"}


def test_waiting_for_the_server_holds_nothing_up(lane: Lane) -> None:
    answer: list[str] = []
    release = threading.Event()
    lane.ask(lambda: str(release.wait(5)), answer.append)
    assert lane.settle(1)
    assert answer == []
    release.set()
    wait_until(lambda: answer == ["True"], "the answer", 2)


def test_an_error_of_the_server_and_a_mistake_of_ours_both_come_back(
    lane: Lane, caplog: pytest.LogCaptureFixture
) -> None:
    failed: list[LLMKitError] = []

    def refuse() -> None:
        raise NotReady("not now")

    def blunder() -> None:
        raise ZeroDivisionError

    lane.ask(refuse, failed=failed.append)
    wait_until(lambda: len(failed) == 1, "the error")
    lane.ask(blunder, failed=failed.append)
    wait_until(lambda: len(failed) == 2, "the mistake")
    assert isinstance(failed[0], NotReady)
    assert "ZeroDivisionError" in str(failed[1])
    assert "an action of the panel failed" in caplog.text


def test_a_mistake_while_drawing_does_not_end_the_lane(lane: Lane, caplog: pytest.LogCaptureFixture) -> None:
    lane.call(lambda: 1 / 0)
    assert lane.settle(2)
    assert "could not be drawn" in caplog.text


def test_it_ticks_only_when_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmkit.panel.lane.TICK_SECONDS", 0.01)
    ticks: list[float] = []
    lane = Lane(lambda: ticks.append(time.monotonic()))
    try:
        assert lane.settle(1)
        time.sleep(0.1)
        assert ticks == []
        lane.ticking = True
        assert lane.settle(1)
        wait_until(lambda: len(ticks) > 3, "the ticks", 2)
    finally:
        lane.close()


def test_closing_ends_the_thread(lane: Lane) -> None:
    lane.close()
    lane._thread.join(2)
    assert not lane._thread.is_alive()
