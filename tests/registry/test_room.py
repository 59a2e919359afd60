"""Models that make room for each other, expire, and tell what a load would take: the registry without a server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp import web
from mock_upstream import MockUpstream, chat_answer
from registry_stage import RegistryStage, ask, configure, until

from llmkit.errors import NoRoom


class Slow:
    """Holds every request until it may go on."""

    def __init__(self, upstream: MockUpstream) -> None:
        self.go_on = False
        upstream.respond = self._answer

    async def _answer(self, *_: Any) -> Any:
        while not self.go_on:
            await asyncio.sleep(0.01)
        return web.json_response(chat_answer("done"))


async def test_the_least_recently_used_model_makes_room(stage: RegistryStage) -> None:
    async with stage.registry(max_loaded_models=2) as registry:
        ids = {name: await configure(registry, name) for name in "abc"}
        await registry.load(ids["a"])
        await registry.load(ids["b"])
        await registry.requests.infer(ask("a"))
        await registry.load(ids["c"])
        assert registry.loaded_models() == ["a", "c"]
        assert registry.model("b").reason == "evicted to make room for c"


async def test_loads_at_once_keep_to_the_limit(stage: RegistryStage) -> None:
    async with stage.registry(max_loaded_models=2) as registry:
        ids = [await configure(registry, f"m{number}") for number in range(6)]
        most = 0

        async def count() -> None:
            nonlocal most
            while True:
                live = [m for m in registry.snapshot().models if m.status in ("loaded", "unloading")]
                most = max(most, len(live))
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        done = await asyncio.gather(*(registry.load(config_id) for config_id in ids), return_exceptions=True)
        counting.cancel()
        assert all(not isinstance(one, BaseException) or isinstance(one, NoRoom) for one in done), done
        assert len(registry.loaded_models()) == 2
        assert most <= 2


async def test_memory_makes_models_go_as_few_as_are_enough(stage: RegistryStage) -> None:
    async with stage.registry(free=1000) as registry:
        ids = {name: await configure(registry, name, size) for name, size in {"a": 300, "b": 600, "c": 500}.items()}
        await registry.load(ids["a"])
        await registry.load(ids["b"])
        await registry.load(ids["c"])  # 100 are free: a alone is not enough, b alone is
        assert registry.loaded_models() == ["a", "c"]


async def test_a_busy_model_stays_unless_it_is_forced_to_go(stage: RegistryStage, upstream: MockUpstream) -> None:
    async with stage.registry(free=1000) as registry:
        first, second = await configure(registry, "a", 700), await configure(registry, "b", 700)
        await registry.load(first)
        slow = Slow(upstream)
        asking = asyncio.create_task(registry.requests.infer(ask("a")))
        await until(lambda: registry.model("a").in_flight == 1)
        with pytest.raises(NoRoom, match=r"`a`.*\(busy\)") as raised:
            await registry.load(second)
        assert "force" in raised.value.hint
        assert registry.model("b").status == "failed"
        assert registry.loaded_models() == ["a"]
        slow.go_on = True
        assert (await asking).response == "done"

        slow.go_on = False
        asking = asyncio.create_task(registry.requests.infer(ask("a")))
        await until(lambda: registry.model("a").in_flight == 1)
        await registry.load(second, force=True)
        assert registry.loaded_models() == ["b"]
        with pytest.raises(Exception, match="was unloaded"):
            await asking


async def test_what_can_never_fit_makes_nobody_go_and_says_the_numbers(stage: RegistryStage) -> None:
    async with stage.registry(free=4 << 30) as registry:
        small, large = await configure(registry, "small", 1 << 30), await configure(registry, "large", 9 << 30)
        await registry.load(small)
        with pytest.raises(NoRoom, match=r"needs about 9\.0 GiB of memory, and 3\.0 GiB are free"):
            await registry.load(large)
        assert registry.loaded_models() == ["small"]


async def test_two_loads_do_not_count_on_the_same_free_memory(stage: RegistryStage) -> None:
    async with stage.registry(free=1000) as registry:
        ids = [await configure(registry, name, 600) for name in "ab"]
        stage.engines.ready = False
        first = asyncio.create_task(registry.load(ids[0]))
        await until(lambda: len(stage.engines.engines) == 1)
        with pytest.raises(NoRoom):
            await registry.load(ids[1])
        stage.engines.engines[0].ready.set()
        assert (await first).status == "loaded"


async def test_a_plan_says_what_would_go_and_changes_nothing(stage: RegistryStage) -> None:
    async with stage.registry(free=1000) as registry:
        first, second = await configure(registry, "a", 700), await configure(registry, "b", 700)
        await registry.load(first)
        plan = await registry.plan(second)
        assert (plan.fits, plan.evict, plan.free_bytes, plan.evictable_bytes) == (True, ["a"], 300, 700)
        assert plan.estimate is not None
        assert plan.estimate.total_bytes == 700
        third = await configure(registry, "c", 1700)
        plan = await registry.plan(third)
        assert (plan.fits, plan.evict) == (False, [])
        assert registry.loaded_models() == ["a"]


async def test_the_second_estimate_is_what_the_first_load_held(stage: RegistryStage) -> None:
    async with stage.registry() as registry:
        config_id = await configure(registry, "a", 700)
        plan = await registry.plan(config_id)
        assert plan.estimate is not None
        assert not plan.estimate.measured
        stage.engines.held = 650
        await registry.load(config_id)
        await registry.unload("a")

        async def measured() -> int | None:
            estimate = (await registry.plan(config_id)).estimate
            return estimate.total_bytes if estimate is not None and estimate.measured else None

        async with asyncio.timeout(5):
            while (held := await measured()) is None:
                await asyncio.sleep(0.01)
        assert held == 650


async def test_an_idle_model_goes_and_a_request_winds_the_clock_up_again(
    stage: RegistryStage, upstream: MockUpstream
) -> None:
    async with stage.registry(idle_ttl=1.0) as registry:
        await registry.load(await configure(registry, "a"))
        slow = Slow(upstream)
        asking = asyncio.create_task(registry.requests.infer(ask("a")))
        await until(lambda: registry.model("a").in_flight == 1)
        assert registry.model("a").expires_at is None  # busy
        await asyncio.sleep(1.3)
        assert registry.loaded_models() == ["a"]
        slow.go_on = True
        await asking
        told = registry.model("a")
        assert told.expires_at is not None
        assert told.last_used_at is not None
        assert (told.expires_at - told.last_used_at).total_seconds() == 1.0
        assert registry.loaded_models() == ["a"]
        await until(lambda: registry.model("a").status == "unloaded")
        assert registry.model("a").reason == "idle for 1 s"


async def test_a_request_says_how_long_it_may_be_idle_but_not_beyond_the_ceiling(stage: RegistryStage) -> None:
    async with stage.registry(max_idle_ttl=5.0) as registry:
        await registry.load(await configure(registry, "a", idle_ttl=-1))
        assert registry.model("a").expires_at is not None  # the ceiling holds for "never", too
        await registry.requests.infer(ask("a", idle_ttl=100))
        told = registry.model("a")
        assert told.expires_at is not None
        assert told.last_used_at is not None
        assert (told.expires_at - told.last_used_at).total_seconds() == 5.0
        await registry.requests.infer(ask("a", idle_ttl=0))
        await until(lambda: registry.model("a").status == "unloaded")
