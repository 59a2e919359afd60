"""What follows when an engine fails by itself: restarts, their pauses, and their end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from model_stage import Stage

from llmkit.errors import LoadFailed, ServerStopping
from llmkit.inference.running import Running
from llmkit.registry import policies


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "FIRST_RESTART_SECONDS", 0.01)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.002)


async def crash(stage: Stage) -> None:
    engine = stage.engine
    engine.ended.set()
    await until(lambda: engine.stops > 0)


async def test_without_a_word_about_it_a_crashed_model_stays_failed(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    await stage.loaded()
    await crash(stage)
    await asyncio.sleep(0.05)
    assert stage.model.status == "failed"
    error = stage.model.snapshot().error
    assert error is not None
    assert error.code == "engine_crashed"
    assert len(stage.engine_type.engines) == 1


async def test_a_crashed_model_is_started_again_and_answers(tmp_path: Path) -> None:
    stage = Stage(tmp_path, restart="on_failure")
    await stage.loaded()
    await crash(stage)
    assert stage.model.status == "failed"
    await until(lambda: "started again in 0.01 s" in (stage.model.snapshot().reason or ""))
    await until(lambda: stage.model.status == "loaded")
    async with stage.model.use(Running("m", "inference", "r")):
        pass
    assert len(stage.engine_type.engines) == 2
    await stage.model.unload()


async def test_the_third_failure_in_five_minutes_is_the_last(tmp_path: Path) -> None:
    stage = Stage(tmp_path, restart="on_failure")
    await stage.loaded()
    for number in range(1, 4):
        await until(lambda: stage.model.status == "loaded")
        assert len(stage.engine_type.engines) == number
        await crash(stage)
    await until(lambda: "left alone" in (stage.model.snapshot().reason or ""))
    await asyncio.sleep(0.1)
    assert (stage.model.status, len(stage.engine_type.engines)) == ("failed", 3)
    await stage.model.ensure_loaded()  # somebody asks: it counts anew
    await crash(stage)
    await until(lambda: stage.model.status == "loaded")
    await stage.model.unload()


async def test_a_restart_that_fails_counts_as_a_failure(tmp_path: Path) -> None:
    stage = Stage(tmp_path, restart="on_failure")
    await stage.loaded()
    stage.engine_type.failure = LoadFailed("no memory")
    await crash(stage)
    await until(lambda: "left alone" in (stage.model.snapshot().reason or ""))
    error = stage.model.snapshot().error
    assert error is not None
    assert error.message == "no memory"
    assert len(stage.engine_type.engines) == 3


async def test_a_first_load_that_fails_is_not_tried_again(tmp_path: Path) -> None:
    stage = Stage(tmp_path, restart="on_failure")
    stage.engine_type.failure = LoadFailed("no memory")
    with pytest.raises(LoadFailed):
        await stage.loaded()
    await asyncio.sleep(0.05)
    assert len(stage.engine_type.engines) == 1


async def test_unload_forgets_a_restart_that_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "FIRST_RESTART_SECONDS", 0.2)
    stage = Stage(tmp_path, restart="on_failure")
    await stage.loaded()
    await crash(stage)
    await until(lambda: "started again" in (stage.model.snapshot().reason or ""))
    await stage.model.unload()
    await asyncio.sleep(0.3)
    assert (stage.model.status, len(stage.engine_type.engines)) == ("unloaded", 1)


async def test_a_server_that_stops_starts_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "FIRST_RESTART_SECONDS", 0.1)
    stage = Stage(tmp_path, restart="on_failure")
    await stage.loaded()
    await crash(stage)
    stage.model.retire(ServerStopping("The server is stopping."))
    await stage.model.unload()
    await asyncio.sleep(0.2)
    assert len(stage.engine_type.engines) == 1
