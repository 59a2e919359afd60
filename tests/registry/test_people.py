"""Many people at one registry, without a server: whose a load is, what a batch keeps, and what a request costs."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from aiohttp import web
from mock_upstream import USAGE, MockUpstream
from registry_stage import RegistryStage, ask, configure, until

from llmkit.errors import BudgetExhausted, LLMKitError, ModelNotLoaded, NoRoom, NotAllowed, RequestCancelled
from llmkit.inference.reserving import RESERVED_TOKENS, most_tokens
from llmkit.registry import policies
from llmkit.registry.people import Person
from llmkit.registry.registry import ModelRegistry
from llmkit.schemas import UsageOfDay

ADA, BEN, GRACE = Person("ada"), Person("ben"), Person("grace", administers=True)


async def usage(registry: ModelRegistry, by: Person) -> UsageOfDay | None:
    told = (await registry.usage(by)).usage
    return next((one for one in told if one.user == by.name), None)


# -- whose it is ----------------------------------------------------------------------------------------------


async def test_where_nobody_is_told_apart_everybody_may(stage: RegistryStage) -> None:
    async with stage.registry() as registry:
        config_id = await configure(registry, "a")
        await registry.load(config_id, force=True)
        assert registry.model("a").loaded_by is None
        await registry.unload("a")
        await registry.delete(config_id)


async def test_a_load_that_waits_for_an_unload_is_that_of_who_asked_for_it(stage: RegistryStage) -> None:
    async with stage.registry(shared=True) as registry:
        config_id = await configure(registry, "a")
        await registry.load(config_id, by=ADA)
        unloading = asyncio.create_task(registry.unload("a", by=ADA))
        await asyncio.sleep(0)  # its first step
        assert registry.model("a").status == "unloading"
        await registry.load(config_id, by=BEN)
        await unloading
        assert (registry.model("a").status, registry.model("a").loaded_by) == ("loaded", "ben")
        with pytest.raises(NotAllowed, match="that of ben"):
            await registry.unload("a", by=ADA)
        # Nobody has configured it as one of many people: that is the administrators' alone.
        with pytest.raises(NotAllowed, match="administrators"):
            await registry.delete(config_id, unload=True, by=BEN)
        await registry.delete(config_id, unload=True, by=GRACE)


async def test_everybody_is_told_what_would_be_refused_to_them_in_the_words_of_the_refusal(
    stage: RegistryStage,
) -> None:
    async with stage.registry(shared=True) as registry:
        config_id = await configure(registry, "a")
        await registry.load(config_id, by=ADA)
        assert registry.model("a", GRACE).refuses == {}
        assert registry.model("a").refuses is None
        ada, ben = registry.model("a", ADA).refuses, registry.model("a", BEN).refuses
        assert ada is not None
        assert ada.keys() == {"update", "delete"}  # it was there before the server was shared, but the load is hers
        assert ben is not None
        assert ben.keys() == {"unload", "update", "delete"}
        with pytest.raises(NotAllowed) as refused:
            await registry.unload("a", by=BEN)
        assert ben["unload"] == str(refused.value)
        with pytest.raises(NotAllowed) as refused:
            await registry.delete(config_id, by=BEN)
        assert ben["delete"] == str(refused.value)
        (told,) = registry.snapshot(BEN).models
        assert told.refuses == ben


async def test_what_a_request_has_loaded_is_not_the_asking_ones(stage: RegistryStage) -> None:
    async with stage.registry(shared=True) as registry:
        await configure(registry, "a", auto_load=True)
        await registry.requests.infer(ask("a"), by=ADA)
        assert registry.model("a").loaded_by is None
        with pytest.raises(NotAllowed):
            await registry.unload("a", by=ADA)


async def test_a_batch_of_somebody_keeps_its_model_between_two_requests(
    stage: RegistryStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stage.registry(shared=True, max_loaded_models=1) as registry:
        first, second = await configure(registry, "a"), await configure(registry, "b")
        await registry.load(first, by=ADA)
        await registry.requests.infer(ask("a"), priority="batch", by=ADA)
        with pytest.raises(NoRoom, match=r"`a`.*\(busy\)"):
            await registry.load(second, by=BEN)
        with pytest.raises(NotAllowed):
            await registry.load(second, force=True, by=BEN)
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + policies.LEASE_SECONDS + 1)
        await registry.load(second, by=BEN)
        assert registry.loaded_models() == ["b"]


# -- what a request costs -------------------------------------------------------------------------------------


async def test_an_answer_costs_what_the_engine_counted(stage: RegistryStage) -> None:
    async with stage.registry(shared=True, user_limits={"tokens_per_day": 2000}) as registry:
        await registry.load(await configure(registry, "a"))
        await registry.requests.infer(ask("a", max_tokens=50), by=ADA)
        body = {"model": "a", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 50}
        await registry.requests.relay("chat/completions", body, _no_stream, by=ADA)
        told = await usage(registry, ADA)
        assert told is not None
        assert (told.requests, told.tokens) == (2, 2 * USAGE["total_tokens"])
        assert (await registry.usage(ADA)).left == {"tokens_per_day": 2000 - 2 * USAGE["total_tokens"]}


async def _no_stream(*_: Any, **__: Any) -> None:
    raise AssertionError("no stream was asked for")


async def test_what_never_reaches_an_engine_costs_nothing(stage: RegistryStage) -> None:
    async with stage.registry(shared=True, user_limits={"requests_per_day": 1}) as registry:
        config_id = await configure(registry, "a")
        with pytest.raises(ModelNotLoaded):
            await registry.requests.infer(ask("a"), by=ADA)
        await registry.load(config_id)
        await registry.requests.infer(ask("a"), by=ADA)
        with pytest.raises(BudgetExhausted):
            await registry.requests.infer(ask("a"), by=ADA)
        await registry.requests.infer(ask("a"), by=BEN)
        recent = (await registry.requests.overview(10, by=ADA)).recent
        assert [(one.outcome, one.error) for one in recent] == [
            ("rejected", "budget_exhausted"),
            ("ok", None),
            ("refused", "model_not_loaded"),
        ]


async def test_what_the_engine_refuses_costs_a_request_and_no_tokens(
    stage: RegistryStage, upstream: MockUpstream
) -> None:
    async def refuse(*_: Any) -> web.StreamResponse:
        return web.json_response({"error": {"message": "no"}}, status=400)

    async with stage.registry(shared=True) as registry:
        await registry.load(await configure(registry, "a"))
        upstream.respond = refuse
        with pytest.raises(LLMKitError):
            await registry.requests.infer(ask("a"), by=ADA)
        told = await usage(registry, ADA)
        assert told is not None
        assert (told.requests, told.tokens) == (1, 0)


async def test_what_is_cancelled_half_way_costs_what_was_reserved(stage: RegistryStage, upstream: MockUpstream) -> None:
    async with stage.registry(shared=True) as registry:
        await registry.load(await configure(registry, "a"))
        upstream.never_end("word ", 0.01)
        sent = asyncio.Event()

        async def send(*_: Any) -> None:
            sent.set()

        asking = asyncio.create_task(
            registry.requests.infer(ask("a", max_tokens=30, request_id="r", stream=True), send, by=ADA)
        )
        await sent.wait()
        registry.requests.cancel("r", by=ADA)
        with pytest.raises(RequestCancelled):
            await asking
        told = await usage(registry, ADA)
        assert told is not None
        assert told.tokens == most_tokens({"prompt": "Hi", "request_id": "r"}, 30)


async def test_a_request_that_is_cancelled_before_it_is_charged_says_so(stage: RegistryStage) -> None:
    async with stage.registry(shared=True, user_limits={"requests_per_day": 5}) as registry:
        await registry.load(await configure(registry, "a"))
        asking = asyncio.create_task(
            registry.requests.infer(
                ask("a", request_id="r"), by=ADA, known=lambda _: registry.requests.cancel("r", by=ADA)
            )
        )
        with pytest.raises(RequestCancelled):
            await asking
        assert (await registry.usage(ADA)).left == {"requests_per_day": 5}
        assert await usage(registry, ADA) is None


# -- what a request can take ----------------------------------------------------------------------------------

CHAT = {"model": "a", "messages": [{"role": "user", "content": "Hi"}]}


def _last_body(upstream: MockUpstream) -> dict[str, Any]:
    return next(body for path, _, body in reversed(upstream.requests) if path == "/v1/chat/completions")


async def test_an_answer_is_bounded_only_where_tokens_are_limited(stage: RegistryStage, upstream: MockUpstream) -> None:
    async with stage.registry(shared=True, user_limits={"tokens_per_day": 5000}) as registry:
        await registry.load(await configure(registry, "a"))
        longest = registry.model("a").capabilities.max_model_len
        assert longest is not None
        half = longest // 2  # an engine refuses to be asked for more than fits
        assert half < RESERVED_TOKENS
        for body in (CHAT, {**CHAT, "max_tokens": None}):
            await registry.requests.relay("chat/completions", body, _no_stream, by=ADA)
            assert _last_body(upstream)["max_tokens"] == half
        await registry.requests.infer(ask("a"), by=ADA)
        assert _last_body(upstream)["max_tokens"] == half
        await registry.requests.infer(ask("a", max_completion_tokens=2000), by=ADA)
        assert _last_body(upstream)["max_completion_tokens"] == 2000
        assert "max_tokens" not in _last_body(upstream)
        for by in (GRACE, None):
            await registry.requests.infer(ask("a"), by=by)
            assert "max_tokens" not in _last_body(upstream)
    async with stage.registry(shared=True, user_limits={"requests_per_day": 50}) as registry:
        await registry.load(registry.model("a").config_id)
        await registry.requests.relay("chat/completions", {**CHAT, "max_tokens": -1}, _no_stream, by=ADA)
        assert _last_body(upstream)["max_tokens"] == -1


async def test_a_fallback_keeps_within_what_was_reserved_and_is_charged_once(
    stage: RegistryStage, upstream: MockUpstream
) -> None:
    async with stage.registry(shared=True, user_limits={"tokens_per_day": 5000}) as registry:
        await registry.load(await configure(registry, "b", model_kwargs={"size": 100, "max_tokens": 4000}))
        await configure(registry, "a", model_kwargs={"size": 100, "max_tokens": 70}, fallback="b")
        bodies: list[dict[str, Any]] = []

        async def refuse_first(request: web.Request, body: dict[str, Any]) -> web.StreamResponse | None:
            if request.path != "/v1/chat/completions":
                return None
            bodies.append(body)
            return web.json_response({"error": {"message": "busy"}}, status=429) if len(bodies) == 1 else None

        await registry.load(registry.model("a").config_id)
        upstream.respond = refuse_first
        answer = await registry.requests.infer(ask("a"), by=ADA)
        assert answer.model_id == "b"
        assert [body["max_tokens"] for body in bodies] == [70, 70]
        told = await usage(registry, ADA)
        assert told is not None
        assert (told.requests, told.tokens) == (1, USAGE["total_tokens"])


async def test_who_leaves_the_queue_is_charged_nothing(stage: RegistryStage, upstream: MockUpstream) -> None:
    limits = {"tokens_per_day": 5000, "requests_per_day": 9}
    async with stage.registry(shared=True, user_limits=limits) as registry:
        await registry.load(await configure(registry, "a", max_in_flight=1))
        upstream.never_end("word ", 0.01)
        sent = asyncio.Event()

        async def send(*_: Any) -> None:
            sent.set()

        running = asyncio.create_task(registry.requests.infer(ask("a", stream=True), send, by=BEN))
        await sent.wait()
        waiting = asyncio.create_task(registry.requests.infer(ask("a"), by=ADA))
        await until(lambda: registry.model("a").queued == 1)
        assert registry.budgets is not None
        assert registry.budgets.left("ada")["requests_per_day"] == 8
        waiting.cancel()
        running.cancel()
        await asyncio.gather(waiting, running, return_exceptions=True)
        assert registry.budgets.left("ada") == limits
        assert registry.budgets.left("ben")["tokens_per_day"] < 5000 - RESERVED_TOKENS


async def test_tokenizing_costs_no_tokens(stage: RegistryStage) -> None:
    async with stage.registry(shared=True, user_limits={"tokens_per_day": 10}) as registry:
        await registry.load(await configure(registry, "a"))
        body = {"model": "a", "prompt": "a text of more than ten bytes"}
        with pytest.raises(LLMKitError) as caught:  # the endpoint has no such path
            await registry.requests.relay("tokenize", body, _no_stream, by=ADA)
        assert not isinstance(caught.value, BudgetExhausted)
