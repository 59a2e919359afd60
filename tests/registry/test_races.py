"""What happens at once: changes, loads, unloads and deletions that cross, in one server and in two."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from fake_nvml import FakeGPU, FakeNVML
from mock_upstream import MockUpstream
from registry_stage import RegistryStage, configure, until

from llmkit.engines.base import EngineContext
from llmkit.errors import (
    ConfigurationNotFound,
    LoadCancelled,
    ModelIsLoaded,
    ModelNotFound,
    NoRoom,
    NotReady,
)
from llmkit.process.devices import Devices
from llmkit.registry import policies
from llmkit.registry.registry import ModelRegistry
from llmkit.schemas import Configuration, MemoryEstimate, ModelConfigRequest


def changed(size: int, **fields: Any) -> ModelConfigRequest:
    body = {"model_id": "a", "model_name": "n", "model_type": "scripted", "model_kwargs": {"size": size}, **fields}
    return ModelConfigRequest.model_validate(body)


def slow_writes(registry: ModelRegistry, monkeypatch: pytest.MonkeyPatch, name: str) -> asyncio.Event:
    """Make the store wait before a write; give what says that it has begun."""
    begun = asyncio.Event()
    original = getattr(registry._stored, name)

    async def slow(*args: Any) -> Any:
        begun.set()
        await asyncio.sleep(0.05)
        return await original(*args)

    monkeypatch.setattr(registry._stored, name, slow)
    return begun


async def test_of_two_changes_at_once_the_engine_runs_the_one_that_is_stored(stage: RegistryStage) -> None:
    async with stage.registry() as registry:
        config_id = await configure(registry, "a", 100)
        await registry.load(config_id)
        both = (registry.update(config_id, changed(size), reload=True) for size in (200, 300))
        done = await asyncio.gather(*both, return_exceptions=True)
        assert not [one for one in done if isinstance(one, BaseException)]
        await until(lambda: registry.model("a").status == "loaded")
        stored = (await registry._stored.read())[0]
        assert stored == registry.configuration(config_id)
        running = [engine for engine in stage.engines.engines if not engine.stops]
        assert [engine.held for engine in running] == [stored.model_kwargs["size"]]


async def test_a_change_without_reload_does_not_end_a_load_that_begins_meanwhile(
    stage: RegistryStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stage.registry() as registry:
        config_id = await configure(registry, "a", 100)
        begun = slow_writes(registry, monkeypatch, "replace")
        changing = asyncio.create_task(registry.update(config_id, changed(200)))
        await begun.wait()
        assert (await registry.load(config_id)).status == "loaded"
        await changing
        assert registry.model("a").status == "loaded"
        assert [engine.held for engine in stage.engines.engines] == [200]


async def test_a_change_that_cannot_be_written_is_taken_back(
    stage: RegistryStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stage.registry() as registry:
        config_id = await configure(registry, "a", 100)

        async def fail(*_: Any) -> None:
            raise NotReady("The disk is on fire.")

        monkeypatch.setattr(registry._stored, "replace", fail)
        with pytest.raises(NotReady):
            await registry.update(config_id, changed(200))
        assert registry.configuration(config_id).model_kwargs == {"size": 100}


async def test_a_deletion_without_unload_lets_no_load_in_and_ends_none(
    stage: RegistryStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stage.registry() as registry:
        config_id = await configure(registry, "a")
        begun = slow_writes(registry, monkeypatch, "delete")
        deleting = asyncio.create_task(registry.delete(config_id))
        await begun.wait()
        with pytest.raises(ModelNotFound):
            await registry.load(config_id)
        await deleting
        assert stage.engines.engines == []
        config_id = await configure(registry, "a")
        await registry.load(config_id)
        with pytest.raises(ModelIsLoaded):
            await registry.delete(config_id)


async def test_a_deletion_that_fails_leaves_a_model_that_can_be_loaded(
    stage: RegistryStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stage.registry() as registry:
        config_id = await configure(registry, "a")

        async def fail(_: Configuration) -> None:
            raise NotReady("The disk is on fire.")

        with monkeypatch.context() as patched:
            patched.setattr(registry._stored, "delete", fail)
            with pytest.raises(NotReady):
                await registry.delete(config_id)
        assert (await registry.load(config_id)).status == "loaded"


async def test_a_load_waits_for_the_room_of_a_model_that_is_being_deleted(stage: RegistryStage) -> None:
    async with stage.registry(free=1000) as registry:
        first, second = await configure(registry, "a", 700), await configure(registry, "b", 700)
        await registry.load(first)
        stage.engines.engines[0].may_stop.clear()
        deleting = asyncio.create_task(registry.delete(first, unload=True))
        await until(lambda: "a" not in [model.model_id for model in registry.snapshot().models])
        loading = asyncio.create_task(registry.load(second))
        await asyncio.sleep(0.02)
        assert registry.model("b").phase == "queued"
        stage.engines.engines[0].may_stop.set()
        await deleting
        assert (await loading).status == "loaded"


async def test_a_load_waits_for_the_room_of_a_model_that_has_crashed(stage: RegistryStage) -> None:
    async with stage.registry(free=1000, max_loaded_models=1) as registry:
        first, second = await configure(registry, "a", 700), await configure(registry, "b", 700)
        await registry.load(first)
        engine = stage.engines.engines[0]
        engine.may_stop.clear()
        engine.ended.set()
        await until(lambda: registry.model("a").status == "failed")
        loading = asyncio.create_task(registry.load(second))
        await asyncio.sleep(0.02)
        assert registry.model("b").phase == "queued"
        engine.may_stop.set()
        assert (await loading).status == "loaded"


async def test_who_waits_for_a_load_behind_an_unload_hears_of_the_next_unload(stage: RegistryStage) -> None:
    async with stage.registry() as registry:
        config_id = await configure(registry, "a")
        await registry.load(config_id)
        stage.engines.engines[0].may_stop.clear()
        unloading = asyncio.create_task(registry.unload("a"))
        await until(lambda: registry.model("a").status == "unloading")
        assert (await registry.load(config_id, wait=False)).status == "unloading"
        waiting = asyncio.create_task(registry.load(config_id))
        await asyncio.sleep(0)
        again = asyncio.create_task(registry.unload("a"))
        await asyncio.sleep(0)
        stage.engines.engines[0].may_stop.set()
        await asyncio.gather(unloading, again)
        with pytest.raises(LoadCancelled):
            await waiting
        assert registry.model("a").status == "unloaded"


# -- two servers ---------------------------------------------------------------------------------------------


async def test_what_another_server_deletes_is_not_started_again(
    stage: RegistryStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policies, "FIRST_RESTART_SECONDS", 1.0)
    async with stage.registry() as registry, stage.registry() as other:
        config_id = await configure(registry, "a", restart="on_failure")
        await registry.load(config_id)
        stage.engines.engines[0].ended.set()
        await until(lambda: "started again" in (registry.model("a").reason or ""))
        await until(lambda: bool(other.configurations()))
        await until(lambda: not registry._models["a"].leaving)
        await asyncio.sleep(0.05)
        await other.delete(config_id)
        await until(lambda: not registry.configurations())
        await asyncio.sleep(1.2)
        assert len(stage.engines.engines) == 1


async def test_a_claim_whose_release_fails_is_released_later(
    stage: RegistryStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stage.registry() as registry, stage.registry(url="http://second/") as other:
        config_id = await configure(registry, "a")
        await until(lambda: bool(other.configurations()))
        await other.load(config_id)
        await until(lambda: registry.model("a").owner == "http://second/")

        async def fail(_: str) -> None:
            raise NotReady("Another server holds the database.")

        with monkeypatch.context() as patched:
            patched.setattr(other._stored, "release", fail)
            await other.unload("a")
            await asyncio.sleep(0.05)
            assert registry.model("a").owner == "http://second/"
        await until(lambda: registry.model("a").owner is None)
        await registry.delete(config_id)


async def test_a_change_is_made_of_what_another_server_has_just_written(stage: RegistryStage) -> None:
    async with stage.registry() as registry, stage.registry() as other:
        config_id = await configure(registry, "a", 100)
        await until(lambda: bool(other.configurations()))
        await other.update(config_id, changed(200))
        # Equal to what this server still remembers, and all the same not what is stored.
        await registry.update(config_id, changed(100))
        assert (await registry._stored.read())[0].model_kwargs == {"size": 100}
        await other.delete(config_id)
        with pytest.raises(ConfigurationNotFound):
            await registry.update(config_id, changed(300))


# -- GPUs ----------------------------------------------------------------------------------------------------

GIB = 1 << 30


class GPUStage(RegistryStage):
    """Engines on GPUs: `size` GiB on one, or all that is free where they are elastic."""

    elastic = True

    def __init__(self, folder: Path, upstream: MockUpstream) -> None:
        super().__init__(folder, upstream)
        self.contexts: list[EngineContext] = []
        create = self.engines.create

        def estimate(configuration: Configuration) -> MemoryEstimate:
            size = int(str(configuration.model_kwargs["size"])) * GIB
            return MemoryEstimate(device="gpu", total_bytes=size, elastic=self.elastic)

        def note(configuration: Configuration, context: EngineContext) -> Any:
            self.contexts.append(context)
            return create(configuration, context)

        self.engines.estimate = estimate  # type: ignore[method-assign]
        self.engines.create = note  # type: ignore[method-assign]


@pytest.fixture
def gpus(tmp_path: Path, upstream: MockUpstream) -> GPUStage:
    return GPUStage(tmp_path, upstream)


async def test_two_elastic_loads_at_once_get_gpus_of_their_own_and_a_third_none(gpus: GPUStage) -> None:
    gpus.engines.ready = False
    devices = Devices(FakeNVML(FakeGPU(80 * GIB), FakeGPU(80 * GIB)))
    async with gpus.registry(devices=devices) as registry:
        ids = [await configure(registry, name, 10) for name in "abc"]
        loads = [asyncio.create_task(registry.load(one)) for one in ids[:2]]
        await until(lambda: len(gpus.contexts) == 2)
        assert sorted(context.gpus for context in gpus.contexts) == [(0,), (1,)]
        assert [context.gpu_memory_utilization for context in gpus.contexts] == [0.9, 0.9]
        with pytest.raises(NoRoom, match=r"0\.0 GiB"):
            await registry.load(ids[2])
        for engine in gpus.engines.engines:
            engine.ready.set()
        await asyncio.gather(*loads)
        assert registry._loader.placement.reservations() == {}


async def test_a_share_leaves_what_other_loads_have_set_aside(gpus: GPUStage) -> None:
    gpus.engines.ready = False
    gpus.elastic = False
    async with gpus.registry(devices=Devices(FakeNVML(FakeGPU(80 * GIB)))) as registry:
        ids = [await configure(registry, name, 20) for name in "ab"]
        loads = [asyncio.create_task(registry.load(one)) for one in ids]
        await until(lambda: len(gpus.contexts) == 2)
        assert [context.gpu_memory_utilization for context in gpus.contexts] == [0.9, 0.74]
        await registry.unload("a")
        await registry.unload("b")
        assert registry._loader.placement.reservations() == {}
        await asyncio.gather(*loads, return_exceptions=True)


async def test_a_load_that_is_cancelled_while_a_gpu_is_chosen_keeps_none(
    gpus: GPUStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with gpus.registry(devices=Devices(FakeNVML(FakeGPU(80 * GIB)))) as registry:
        placement = registry._loader.placement
        reserve, begun = placement.reserve, asyncio.Event()
        loop = asyncio.get_running_loop()

        def slow(*args: Any, **kwargs: Any) -> Any:
            import time

            loop.call_soon_threadsafe(begun.set)
            time.sleep(0.2)
            return reserve(*args, **kwargs)

        monkeypatch.setattr(placement, "reserve", slow)
        loading = asyncio.create_task(registry.load(await configure(registry, "a", 10)))
        await begun.wait()
        await registry.unload("a")
        with pytest.raises(LoadCancelled):
            await loading
        await asyncio.sleep(0.3)
        assert placement.reservations() == {}


async def test_where_no_gpu_can_be_seen_the_engine_decides(gpus: GPUStage) -> None:
    async with gpus.registry(devices=Devices(FakeNVML())) as registry:
        config_id = await configure(registry, "a", 10)
        assert (await registry.plan(config_id)).fits is None
        assert (await registry.load(config_id)).status == "loaded"
        assert gpus.contexts[0].gpus == ()
        assert gpus.contexts[0].gpu_memory_utilization is None


async def test_nobody_goes_for_room_on_another_gpu(gpus: GPUStage) -> None:
    gpus.elastic = False
    devices = Devices(FakeNVML(FakeGPU(80 * GIB, used=75 * GIB), FakeGPU(80 * GIB, used=40 * GIB)))
    async with gpus.registry(devices=devices) as registry:
        first, second = await configure(registry, "a", 3), await configure(registry, "b", 60)
        await registry.load(first)
        plan = await registry.plan(second)
        assert (plan.fits, plan.evict, plan.free_bytes) == (False, [], 40 * GIB)
        with pytest.raises(NoRoom):
            await registry.load(second)
        assert registry.loaded_models() == ["a"]
