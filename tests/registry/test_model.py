"""The life of one model, with an engine that waits for the test at every step."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

import pytest
from model_stage import Stage

from llmkit.errors import (
    EngineGone,
    LoadCancelled,
    LoadFailed,
    ModelNotLoaded,
    ModelUnloaded,
    QueueFull,
    ServerStopping,
    WrongState,
)
from llmkit.inference.running import Running
from llmkit.registry.policies import LoadRecord


async def test_callers_of_load_share_one_start(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    callers = [asyncio.create_task(stage.model.ensure_loaded()) for _ in range(5)]
    (await stage.until_engine()).ready.set()
    await asyncio.gather(*callers)
    assert len(stage.engine_type.engines) == 1
    assert stage.model.status == "loaded"
    await stage.model.ensure_loaded()
    assert len(stage.engine_type.engines) == 1
    await stage.model.unload()


async def test_a_caller_that_leaves_does_not_end_the_load_of_the_others(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    leaver, stayer = (asyncio.create_task(stage.model.ensure_loaded()) for _ in range(2))
    engine = await stage.until_engine()
    leaver.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await leaver
    engine.ready.set()
    await stayer
    assert stage.model.status == "loaded"
    await stage.model.unload()


async def test_status_and_phase_are_told_from_the_first_moment(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.model.start_loading()
    assert stage.model.snapshot().status == "loading"
    assert stage.model.snapshot().phase == "queued"
    await stage.until_engine()
    assert (stage.model.snapshot().phase, stage.model.snapshot().progress) == ("weights", 0.5)
    stage.engine.ready.set()
    await stage.model.ensure_loaded()
    snapshot = stage.model.snapshot()
    assert (snapshot.phase, snapshot.progress) == ("ready", 1.0)
    assert snapshot.memory.pss_bytes == 1000
    assert snapshot.load_seconds is not None
    assert stage.changes == [("status", "loading"), ("progress", "loading"), ("status", "loaded")]
    await stage.model.unload()


async def test_unload_during_a_load_cancels_it_for_everybody(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    caller = asyncio.create_task(stage.model.ensure_loaded())
    engine = await stage.until_engine()
    freed = await stage.model.unload()
    assert freed.verified
    assert (stage.model.status, engine.stops) == ("unloaded", 1)
    with pytest.raises(LoadCancelled):
        await caller


async def test_unload_while_a_failed_load_is_cleaned_up_still_stops_the_engine(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    caller = asyncio.create_task(stage.model.ensure_loaded())
    engine = await stage.until_engine()
    engine.failure = LoadFailed("no")
    engine.may_stop.clear()
    engine.ready.set()
    await asyncio.sleep(0.01)  # now inside the stop that follows the failure
    unloading = asyncio.create_task(stage.model.unload())
    await asyncio.sleep(0.01)
    engine.may_stop.set()
    await unloading
    assert (stage.model.status, engine.stops) == ("unloaded", 1)
    with pytest.raises(LoadCancelled):
        await caller


async def test_unload_is_idempotent_in_every_status(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    assert (await stage.model.unload()).verified
    await stage.loaded()
    first, second = await asyncio.gather(stage.model.unload(), stage.model.unload())
    assert first == second
    assert stage.engine.stops == 1
    assert (await stage.model.unload()).reason == "not loaded"


async def test_a_load_asked_for_during_an_unload_starts_after_it(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    await stage.loaded()
    first = stage.engine
    first.may_stop.clear()
    unloading = asyncio.create_task(stage.model.unload())
    await asyncio.sleep(0)
    loading = asyncio.create_task(stage.model.ensure_loaded())
    await asyncio.sleep(0.01)
    assert stage.model.status == "unloading"
    first.may_stop.set()
    await asyncio.gather(unloading, loading)
    assert stage.model.status == "loaded"
    assert stage.engine is not first
    await stage.model.unload()


async def test_a_failed_load_tells_every_caller_why_and_can_be_tried_again(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    (tmp_path / "m.log").write_text("\n".join(f"line {i}" for i in range(80)))
    callers = [asyncio.create_task(stage.model.ensure_loaded()) for _ in range(2)]
    engine = await stage.until_engine()
    engine.failure = LoadFailed("Out of memory.", hint="Use less.", details={"fix": {"max_model_len": 8}})
    engine.ready.set()
    for caller in callers:
        with pytest.raises(LoadFailed, match="Out of memory"):
            await caller
    error = stage.model.snapshot().error
    assert error is not None
    assert (error.code, error.hint, error.fix) == ("load_failed", "Use less.", {"max_model_len": 8})
    assert error.log_tail[-1] == "line 79"
    assert len(error.log_tail) == 50
    assert engine.stops == 1
    await stage.loaded()
    assert stage.model.snapshot().error is None
    await stage.model.unload()


async def test_an_engine_that_raises_something_unexpected_fails_the_model_only(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    caller = asyncio.create_task(stage.model.ensure_loaded())
    engine = await stage.until_engine()
    engine.failure = ZeroDivisionError("secret words")
    engine.ready.set()
    with pytest.raises(EngineGone, match="ZeroDivisionError") as caught:
        await caller
    assert "secret words" not in str(caught.value)
    assert stage.model.status == "failed"


async def test_unload_forgets_a_failure(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    caller = asyncio.create_task(stage.model.ensure_loaded())
    engine = await stage.until_engine()
    engine.failure = LoadFailed("no")
    engine.ready.set()
    with pytest.raises(LoadFailed):
        await caller
    await stage.model.unload()
    assert stage.model.status == "unloaded"
    assert stage.model.snapshot().error is None


async def test_an_engine_that_ends_by_itself_fails_the_model_and_its_requests(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    await stage.loaded()

    async def request() -> None:
        async with stage.model.use(Running("m", "inference", "r")):
            await asyncio.Event().wait()

    running = asyncio.create_task(request())
    await asyncio.sleep(0)
    assert stage.model.snapshot().in_flight == 1
    stage.engine.ended.set()
    with pytest.raises(EngineGone, match="signal 9"):
        await running
    assert stage.model.status == "failed"
    while not stage.engine.stops:
        await asyncio.sleep(0)
    assert stage.engine.stops == 1
    assert stage.model.snapshot().in_flight == 0


async def test_after_a_crash_loads_and_unloads_wait_until_the_old_engine_is_gone(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    await stage.loaded()
    first = stage.engine
    first.may_stop.clear()
    first.ended.set()
    while stage.model.status == "loaded":
        await asyncio.sleep(0)
    with pytest.raises(ModelNotLoaded, match="failed"):
        async with stage.model.use(Running("m", "inference", "r")):
            pass
    loading = stage.model.start_loading()
    told = stage.model.snapshot()
    assert (told.status, told.phase, told.error) == ("loading", "queued", None)
    await asyncio.sleep(0.01)
    assert len(stage.engine_type.engines) == 1
    first.may_stop.set()
    assert await loading is None
    assert (stage.model.status, first.stops, len(stage.engine_type.engines)) == ("loaded", 1, 2)
    await stage.model.unload()
    assert stage.engine.stops == 1


async def test_a_retired_model_starts_no_engine_even_for_who_waits(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    await stage.loaded()
    stage.engine.may_stop.clear()
    unloading = asyncio.create_task(stage.model.unload())
    await asyncio.sleep(0)
    waiting = asyncio.create_task(stage.model.ensure_loaded())
    await asyncio.sleep(0)
    stage.model.retire(ServerStopping("The server is stopping."))
    stage.engine.may_stop.set()
    await unloading
    with pytest.raises(ServerStopping):
        await waiting
    assert len(stage.engine_type.engines) == 1


async def test_an_unload_without_a_drain_ends_the_drain_of_another(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    await stage.loaded()

    async def request() -> None:
        async with stage.model.use(Running("m", "inference", "r")):
            await asyncio.Event().wait()

    running = asyncio.create_task(request())
    await asyncio.sleep(0)
    patient = asyncio.create_task(stage.model.unload(drain=3600))
    await asyncio.sleep(0.01)
    await asyncio.wait_for(stage.model.unload(), 5)
    await patient
    with pytest.raises(ModelUnloaded):
        await running


async def test_unload_ends_running_and_waiting_requests(tmp_path: Path) -> None:
    stage = Stage(tmp_path, max_in_flight=1)
    await stage.loaded()

    async def request(name: str) -> None:
        async with stage.model.use(Running("m", "inference", name)):
            await asyncio.Event().wait()

    requests = [asyncio.create_task(request(name)) for name in "ab"]
    await asyncio.sleep(0)
    assert (stage.model.snapshot().in_flight, stage.model.snapshot().queued) == (1, 1)
    await stage.model.unload()
    for outcome in await asyncio.gather(*requests, return_exceptions=True):
        assert isinstance(outcome, ModelUnloaded)


async def test_drain_lets_a_running_request_finish(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    await stage.loaded()
    finish = asyncio.Event()

    async def request() -> str:
        async with stage.model.use(Running("m", "inference", "r")):
            await finish.wait()
            return "whole"

    running = asyncio.create_task(request())
    await asyncio.sleep(0)
    unloading = asyncio.create_task(stage.model.unload(drain=30))
    await asyncio.sleep(0.01)
    with pytest.raises(ModelNotLoaded):
        async with stage.model.use(Running("m", "inference", "late")):
            pass
    finish.set()
    assert await running == "whole"
    await asyncio.wait_for(unloading, 5)


async def test_a_full_queue_says_so_and_loses_nobody(tmp_path: Path) -> None:
    stage = Stage(tmp_path, max_in_flight=1, max_queued=1)
    await stage.loaded()
    order: list[str] = []
    hold = asyncio.Event()

    async def request(name: str) -> None:
        async with stage.model.use(Running("m", "inference", name)):
            order.append(name)
            await hold.wait()

    running = [asyncio.create_task(request(name)) for name in "ab"]
    await asyncio.sleep(0)
    with pytest.raises(QueueFull) as caught:
        await request("c")
    assert caught.value.details == {"limit": 1, "queued": 1, "in_flight": 1, "retry_after": 2}
    hold.set()
    await asyncio.gather(*running)
    assert order == ["a", "b"]
    await stage.model.unload()


async def test_a_model_that_is_not_loaded_says_how_to_load_it(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    with pytest.raises(ModelNotLoaded, match="POST /llm/load_model/c"):
        async with stage.model.use(Running("m", "inference", "r")):
            pass


async def test_force_reaches_who_makes_the_engine(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.engine_type.ready = True
    await stage.model.ensure_loaded(force=True)
    assert stage.forced == [True]
    await stage.model.unload()


async def test_the_second_load_tells_how_long_it_will_take(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    await stage.loaded()
    await stage.model.unload()
    stage.records[-1] = LoadRecord(20.0, {"weights": 0.0})
    stage.engine_type.ready = False
    stage.model.start_loading()
    await stage.until_engine()
    first = stage.model.snapshot()
    assert first.eta_seconds is not None
    assert 19.0 < first.eta_seconds <= 20.0
    told = len(stage.changes)
    await asyncio.sleep(1.2)
    second = stage.model.snapshot()
    assert second.eta_seconds is not None
    assert second.eta_seconds < first.eta_seconds
    assert (second.progress or 0) >= (first.progress or 0)
    assert len(stage.changes) > told  # told by itself, also while the engine says nothing
    await stage.model.unload()
    assert stage.model.snapshot().eta_seconds is None


async def test_a_model_expires_after_its_last_request(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.model.configuration = stage.model.configuration.model_copy(update={"idle_ttl": 60.0})
    await stage.loaded()
    before = stage.model.snapshot().expires_at
    assert before is not None
    async with stage.model.use(Running("m", "inference", "r")):
        assert stage.model.snapshot().expires_at is None
    after = stage.model.snapshot().expires_at
    assert after is not None
    assert after > before
    async with stage.model.use(Running("m", "inference", "s"), idle_ttl=-1.0):
        pass
    assert stage.model.snapshot().expires_at is None
    async with stage.model.use(Running("m", "inference", "t")):
        pass
    assert stage.model.snapshot().expires_at is not None
    await stage.model.unload()
    assert stage.model.snapshot().expires_at is None


async def test_an_eviction_says_why_and_no_request_comes_in_after_the_decision(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    await stage.loaded()
    unloading = stage.model.start_unloading(reason="idle for 5 s")
    with pytest.raises(ModelNotLoaded, match="being unloaded"):
        async with stage.model.use(Running("m", "inference", "late")):
            pass
    await unloading
    assert stage.model.snapshot().reason == "idle for 5 s"


async def test_an_unload_cancels_the_load_that_waits_for_another_unload(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    await stage.loaded()
    stage.engine.may_stop.clear()
    first = asyncio.create_task(stage.model.unload())
    await asyncio.sleep(0)
    waiting = stage.model.start_loading()
    assert stage.model.status == "unloading"
    second = asyncio.create_task(stage.model.unload())
    await asyncio.sleep(0)
    stage.engine.may_stop.set()
    await asyncio.gather(first, second)
    assert isinstance(await waiting, LoadCancelled)
    await asyncio.sleep(0.01)
    assert (stage.model.status, len(stage.engine_type.engines)) == ("unloaded", 1)


async def test_a_load_after_an_unload_follows_it_without_a_gap(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    await stage.loaded()
    unloading = stage.model.start_unloading()
    waiting = stage.model.start_loading()
    assert stage.model.start_loading() is waiting
    await unloading
    assert stage.model.status == "loading"
    while len(stage.engine_type.engines) < 2:
        await asyncio.sleep(0)
    stage.engine.ready.set()
    assert await waiting is None
    await stage.model.unload()


async def test_of_two_drains_the_one_that_ends_first_counts(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    await stage.loaded()
    running = asyncio.create_task(hold(stage))
    await asyncio.sleep(0)
    patient = asyncio.create_task(stage.model.unload(drain=3600))
    await asyncio.sleep(0)
    started = time.monotonic()
    await asyncio.wait_for(stage.model.unload(drain=0.1), 5)
    assert 0.08 < time.monotonic() - started < 2
    await patient
    with pytest.raises(ModelUnloaded):
        await running


async def hold(stage: Stage, seconds: float = 60.0) -> str:
    async with stage.model.use(Running("m", "inference", "r")):
        await asyncio.sleep(seconds)
    return "done"


async def test_requests_that_wait_are_answered_in_the_drain_too(tmp_path: Path) -> None:
    stage = Stage(tmp_path, max_in_flight=1)
    await stage.loaded()
    requests = [asyncio.create_task(hold(stage, 0.02)) for _ in range(3)]
    await asyncio.sleep(0)
    assert (stage.model.admission.in_flight, stage.model.admission.queued) == (1, 2)
    await stage.model.unload(drain=10)
    assert await asyncio.gather(*requests) == ["done"] * 3


async def test_requests_that_wait_longer_than_the_drain_are_ended(tmp_path: Path) -> None:
    stage = Stage(tmp_path, max_in_flight=1)
    await stage.loaded()
    requests = [asyncio.create_task(hold(stage)) for _ in range(3)]
    await asyncio.sleep(0)
    await stage.model.unload(drain=0.05)
    ended = await asyncio.gather(*requests, return_exceptions=True)
    assert [type(one) for one in ended] == [ModelUnloaded] * 3
    assert not stage.model.busy


async def test_requests_that_load_a_model_wait_in_its_queue_and_can_be_cancelled(tmp_path: Path) -> None:
    stage = Stage(tmp_path, max_in_flight=2, max_queued=1)

    async def request(running: Running) -> str:
        running.task = asyncio.current_task()
        async with stage.model.use(running, auto_load=True):
            assert running.load > 0
        return "done"

    running = [Running("m", "inference", str(number)) for number in range(5)]
    requests = [asyncio.create_task(request(one)) for one in running]
    while not stage.engine_type.engines:
        await asyncio.sleep(0)
    assert stage.model.admission.queued == 3
    assert all(isinstance(one.exception(), QueueFull) for one in requests[3:])
    running[0].abort(WrongState("The request was cancelled."))
    await asyncio.sleep(0.01)
    assert isinstance(requests[0].exception(), WrongState)
    stage.engine.ready.set()
    assert await asyncio.gather(*requests[1:3]) == ["done"] * 2
    assert len(stage.engine_type.engines) == 1
    await stage.model.unload()


async def test_requests_do_not_load_again_and_again_what_fails(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.engine_type.failure = LoadFailed("It is broken.")
    for _ in range(20):
        with pytest.raises(LoadFailed, match="broken"):
            async with stage.model.use(Running("m", "inference", "r"), auto_load=True):
                pass
    assert len(stage.engine_type.engines) == 1
    with pytest.raises(LoadFailed):
        await stage.model.ensure_loaded()  # who asks for it gets it
    assert len(stage.engine_type.engines) == 2


async def test_an_engine_that_cannot_be_watched_any_more_has_failed(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    await stage.loaded()
    stage.engine.watch_error = OSError("no more files")
    stage.engine.ended.set()
    while stage.model.status == "loaded":
        await asyncio.sleep(0)
    assert stage.model.status == "failed"
    await stage.model.unload()
    assert stage.engine.stops == 1


async def test_a_load_that_a_stopping_server_cancels_says_so(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    loading = asyncio.create_task(stage.model.ensure_loaded())
    while not stage.engine_type.engines:
        await asyncio.sleep(0)
    stage.model.retire(ServerStopping("The server is stopping."))
    await stage.model.unload()
    with pytest.raises(ServerStopping):
        await loading
