"""What a check says of a configuration that nobody has stored: the registry without a server."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from registry_stage import RegistryStage, configure

from llmkit.errors import (
    ConfigurationExists,
    ConfigurationNotFound,
    DoesNotFit,
    EngineNotInstalled,
    ModelIsLoaded,
    ModelLiveElsewhere,
)
from llmkit.schemas import ModelConfigRequest


def asked(model_id: str, size: int = 100, **fields: Any) -> ModelConfigRequest:
    body = {"model_id": model_id, "model_name": "n", "model_type": "scripted", "model_kwargs": {"size": size}}
    return ModelConfigRequest.model_validate(body | fields)


async def test_a_new_configuration_is_planned_and_not_stored(stage: RegistryStage) -> None:
    async with stage.registry(free=1000) as registry:
        await registry.load(await configure(registry, "a", 700))
        before = registry.snapshot().revision
        plan = await registry.check(asked("b", 700))
        assert plan is not None
        assert plan.estimate is not None
        assert (plan.model_id, plan.config_id, plan.fits, plan.evict) == ("b", "", True, ["a"])
        assert (plan.free_bytes, plan.estimate.total_bytes) == (300, 700)
        plan = await registry.check(asked("b", 1700))
        assert plan is not None
        assert (plan.fits, plan.evict) == (False, [])
        assert [one.model_id for one in registry.configurations()] == ["a"]
        assert registry.snapshot().revision == before
        assert registry.loaded_models() == ["a"]
    async with stage.registry() as registry:
        assert [one.model_id for one in registry.configurations()] == ["a"]


async def test_a_check_refuses_what_the_real_call_refuses(stage: RegistryStage) -> None:
    async with stage.registry() as registry:
        config_id = await configure(registry, "a")
        same = await registry.check(asked("a"))
        assert same is not None
        assert same.config_id == config_id
        with pytest.raises(ConfigurationExists):
            await registry.check(asked("a", 200))
        with pytest.raises(DoesNotFit, match="siez"):
            await registry.check(asked("b", model_kwargs={"siez": 1}))
        with pytest.raises(ConfigurationNotFound):
            await registry.check(asked("a"), "no-such-id")
        with pytest.raises(DoesNotFit, match="must stay"):
            await registry.check(asked("b"), config_id)


async def test_an_engine_that_is_not_installed_is_no_mistake(stage: RegistryStage) -> None:
    stage.engines.why_unavailable = EngineNotInstalled("Not here.")
    async with stage.registry() as registry:
        assert await registry.check(asked("a")) is None
        with pytest.raises(DoesNotFit):
            await registry.check(asked("a", model_kwargs={"size": "x"}))


async def test_a_replacement_of_a_live_model_is_checked_as_it_would_be_stored(stage: RegistryStage) -> None:
    async with stage.registry(free=1000) as registry:
        config_id = await configure(registry, "a", 700)
        await registry.load(config_id)
        plan = await registry.check(asked("a", 700, description="new"), config_id)
        assert plan is not None
        assert plan.reason == "it is loaded"
        with pytest.raises(ModelIsLoaded):
            await registry.check(asked("a", 900), config_id)
        # What the model holds now is free for it once it is unloaded.
        plan = await registry.check(asked("a", 900), config_id, reload=True)
        assert plan is not None
        assert (plan.fits, plan.free_bytes, plan.evict) == (True, 1000, [])
        plan = await registry.check(asked("a", 1100), config_id, reload=True)
        assert plan is not None
        assert plan.fits is False
        assert registry.configuration(config_id).description is None
        assert registry.loaded_models() == ["a"]


async def test_a_replacement_of_a_model_that_another_server_has_is_refused(stage: RegistryStage) -> None:
    async with stage.registry(url="http://there/") as there, stage.registry() as here:
        config_id = await configure(there, "a")
        await there.load(config_id)
        assert await here.check(asked("a"), config_id) is not None  # which would change nothing
        with pytest.raises(ModelLiveElsewhere, match="http://there/"):
            await here.check(asked("a", 200), config_id)


async def test_an_estimate_that_takes_its_time_holds_nobody_up(
    stage: RegistryStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage.engines, "estimate", lambda configuration: time.sleep(0.5))
    async with stage.registry() as registry:
        checking = asyncio.create_task(registry.check(asked("a")))
        longest, last = 0.0, time.perf_counter()
        while not checking.done():
            await asyncio.sleep(0.005)
            longest, last = max(longest, time.perf_counter() - last), time.perf_counter()
        assert longest < 0.3
        plan = await checking
        assert plan is not None
        assert plan.estimate is None
