"""``/llm/v1`` over HTTP, against a mock upstream; real engines and real clients are in test_openai_clients.py."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from mock_upstream import ANSWER, USAGE, MockUpstream, chat_answer, event
from scripted_engine import ScriptedEngineType

from jupyter_server_ext.app import LLMKitApp
from jupyter_server_ext.handlers import streaming
from llmkit.engines import http as engine_http

BODY = {"model": "example_model", "messages": [{"role": "user", "content": "Hi"}]}
CHAT = "llm/v1/chat/completions"


async def loaded(call: Any, configure: Any, **fields: Any) -> str:
    config_id: str = await configure(**fields)
    answer = await call("POST", f"llm/load_model/{config_id}")
    assert answer.status == 200, answer.json
    return config_id


def frames(text: str) -> list[str]:
    return [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]


@pytest.mark.parametrize("slash", ["", "/"])
async def test_an_answer_comes_byte_for_byte_as_the_engine_gave_it(
    call: Any, configure: Any, upstream: MockUpstream, slash: str
) -> None:
    await loaded(call, configure, model_kwargs={"temperature": 0.25})
    raw = b'{ "choices":[ {"message" : {"content":"caf\\u00e9"}} ],\n "usage": {"prompt_tokens":1} , "more":[1e3] }'

    async def odd(request: web.Request, body: dict[str, Any]) -> web.Response:
        headers = {"Set-Cookie": "a=b", "x-ratelimit-remaining-requests": "7", "X-Secret": "s"}
        return web.Response(body=raw, content_type="application/json", headers=headers)

    upstream.respond = odd
    answer = await call("POST", CHAT + slash, BODY)
    assert (answer.status, answer.text.encode()) == (200, raw)
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["X-Request-Id"].startswith("req-")
    assert answer.headers["X-LLMKit-Model"] == "example_model"
    assert answer.headers["x-ratelimit-remaining-requests"] == "7"
    assert "Set-Cookie" not in answer.headers
    assert "X-Secret" not in answer.headers
    assert upstream.requests[-1][2] == {**BODY, "model": "gpt-3", "temperature": 0.25}


async def test_the_engine_sees_no_header_of_the_client_but_those_of_its_traces(
    call: Any, configure: Any, upstream: MockUpstream
) -> None:
    await loaded(call, configure)
    sent = {"traceparent": "00-1-2-03", "OpenAI-Beta": "x=1", "X-Forwarded-For": "1.2.3.4", "Cookie": "a=b"}
    await call("POST", CHAT, BODY, headers=sent)
    _, seen, _ = upstream.requests[-1]
    assert (seen["traceparent"], seen["OpenAI-Beta"], seen["User-Agent"]) == ("00-1-2-03", "x=1", "llmkit")
    assert not {"X-Forwarded-For", "Cookie", "Authorization"} & seen.keys()


async def test_a_stream_comes_as_the_engine_sent_it_without_the_usage_that_nobody_asked_for(
    call: Any, configure: Any, upstream: MockUpstream
) -> None:
    await loaded(call, configure)
    plain = await call("POST", CHAT, {**BODY, "stream": True})
    assert plain.headers["Content-Type"].startswith("text/event-stream")
    assert plain.headers["X-Accel-Buffering"] == "no"
    *events, end = frames(plain.text)
    assert end == "[DONE]"
    assert "".join(json.loads(e)["choices"][0]["delta"].get("content", "") for e in events) == ANSWER
    assert not any("usage" in json.loads(one) for one in events)
    with_usage = await call("POST", CHAT, {**BODY, "stream": True, "stream_options": {"include_usage": True}})
    assert json.loads(frames(with_usage.text)[-2]) == {"choices": [], "usage": USAGE}
    recent = (await call("GET", "llm/requests")).json["recent"]
    assert [one["usage"] for one in recent] == [USAGE, USAGE]


async def test_a_refusal_of_the_engine_passes_with_its_status_and_without_our_key(
    call: Any, configure: Any, upstream: MockUpstream
) -> None:
    await loaded(call, configure, model_kwargs={"base_url": upstream.base_url, "api_key": "sk-1234567890abcdef"})

    async def refuse(request: web.Request, body: dict[str, Any]) -> web.Response:
        said = f"temperature is wrong, says {request.headers['Authorization']}"
        return web.json_response({"error": {"message": said, "param": "temperature", "code": None}}, status=400)

    upstream.respond = refuse
    for stream in (False, True):
        answer = await call("POST", CHAT, {**BODY, "stream": stream})
        assert answer.status == 400
        error = {"message": "temperature is wrong, says Bearer [key]", "param": "temperature", "code": None}
        assert answer.json == {"error": error}


@pytest.mark.parametrize(
    ("status", "headers", "expected", "code"),
    [
        (401, {"WWW-Authenticate": 'Basic realm="x"'}, 502, "upstream_refused_key"),
        (403, {}, 502, "upstream_refused_key"),
        (302, {"Location": "http://127.0.0.1:9/"}, 502, "upstream_failed"),
        (500, {}, 502, "upstream_failed"),
        (429, {"Retry-After": "7"}, 429, "rate_limited"),
    ],
)
async def test_what_is_between_us_and_the_endpoint_is_told_in_our_words(
    call: Any,
    configure: Any,
    upstream: MockUpstream,
    status: int,
    headers: dict[str, str],
    expected: int,
    code: str,
) -> None:
    await loaded(call, configure, model_kwargs={"max_retries": 0})

    async def refuse(request: web.Request, body: dict[str, Any]) -> web.Response:
        return web.Response(status=status, headers=headers, text="no")

    upstream.respond = refuse
    answer = await call("POST", CHAT, BODY)
    assert (answer.status, answer.json["error"]["code"]) == (expected, code)
    assert "WWW-Authenticate" not in answer.headers
    assert answer.headers.get("Retry-After") == headers.get("Retry-After")


async def test_a_path_that_the_engine_does_not_have_is_named(call: Any, configure: Any, upstream: MockUpstream) -> None:
    await loaded(call, configure)

    async def missing(request: web.Request, body: dict[str, Any]) -> web.Response:
        return web.json_response({"detail": "Not Found"}, status=404)

    upstream.respond = missing
    answer = await call("POST", "llm/v1/embeddings", {"model": "example_model", "input": "x"})
    assert (answer.status, answer.json["error"]["code"]) == (422, "not_supported")
    assert "embeddings" in answer.json["message"]
    answer = await call("POST", "llm/v1/tokenize", {"model": "example_model", "prompt": "x"})
    assert (answer.status, answer.json["error"]["code"]) == (422, "not_supported")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"model": "nobody", "messages": []}, 404, "model_not_found"),
        ({"messages": []}, 422, "does_not_fit"),
        ({**BODY, "stream": "yes"}, 422, "does_not_fit"),
        ({**BODY, "chat_template": "{{ x }}"}, 422, "parameter_forbidden"),
        ([BODY], 400, "malformed_request"),
    ],
)
async def test_a_wrong_request_is_told_before_the_engine_is_asked(
    call: Any, configure: Any, upstream: MockUpstream, body: Any, status: int, code: str
) -> None:
    await loaded(call, configure)
    asked = len(upstream.requests)
    answer = await call("POST", CHAT, body)
    assert (answer.status, answer.json["error"]["code"]) == (status, code)
    assert len(upstream.requests) == asked


async def test_only_what_is_on_the_list_of_paths_can_be_reached(
    call: Any, configure: Any, upstream: MockUpstream
) -> None:
    await loaded(call, configure)
    asked = len(upstream.requests)
    for path in ("models/../health", "chat/completions/x", "audio/speech", "metrics", "load_lora_adapter", "", "files"):
        for method in ("GET", "POST"):
            assert (await call(method, f"llm/v1/{path}", BODY if method == "POST" else None)).status in (404, 405)
    assert len(upstream.requests) == asked


async def test_models_that_can_be_asked_are_listed(call: Any, configure: Any, upstream: MockUpstream) -> None:
    await configure("idle")
    await configure("waits", model_name="gpt-4o-mini", auto_load=True)
    await loaded(call, configure, model_id="ready")
    listed = (await call("GET", "llm/v1/models")).json
    assert listed["object"] == "list"
    assert {m["id"]: m["status"] for m in listed["data"]} == {"waits": "unloaded", "ready": "loaded"}
    assert all(m["object"] == "model" and m["created"] > 0 and m["owned_by"] for m in listed["data"])
    assert (await call("GET", "llm/v1/models/idle")).json["status"] == "unloaded"
    assert (await call("GET", "llm/v1/models/nobody")).status == 404


async def test_auto_load_and_not_loaded_are_as_for_prompts(call: Any, configure: Any, upstream: MockUpstream) -> None:
    config_id = await configure()
    answer = await call("POST", CHAT, BODY)
    assert (answer.status, answer.json["error"]["code"]) == (409, "model_not_loaded")
    assert config_id in answer.json["error"]["hint"]
    await configure("other", model_name="gpt-4o-mini", auto_load=True)
    assert (await call("POST", CHAT, {**BODY, "model": "other"})).status == 200


async def test_an_error_in_mid_stream_is_the_last_frame_and_there_is_no_done(
    call: Any, configure: Any, upstream: MockUpstream
) -> None:
    await loaded(call, configure)
    chunk = {"choices": [{"delta": {"content": "Half"}}]}
    endings = {b"": "engine_gone", event({"error": {"message": "broken", "code": 500}}): "upstream_failed"}
    for ending, code in endings.items():

        async def half(request: web.Request, body: dict[str, Any], ending: bytes = ending) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            await response.write(event(chunk) + ending)
            return response

        upstream.respond = half
        first, last = frames((await call("POST", CHAT, {**BODY, "stream": True})).text)
        assert json.loads(first) == chunk
        assert json.loads(last)["error"]["code"] == code
    recent = (await call("GET", "llm/requests?model_id=example_model")).json["recent"]
    assert [(one["outcome"], one["status"]) for one in recent] == [("failed", 502)] * 2


async def test_a_stream_that_waits_says_so_and_where_it_stands(
    call: Any, configure: Any, upstream: MockUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "HEARTBEAT_SECONDS", 0.2)
    await loaded(call, configure, max_in_flight=1)

    async def slow(request: web.Request, body: dict[str, Any]) -> web.StreamResponse | None:
        await asyncio.sleep(1.5)
        return None

    upstream.respond = slow
    for path, body in (
        (CHAT, {**BODY, "stream": True}),
        ("llm/inference", {"model_id": "example_model", "prompt": "Hi", "inference_kwargs": {"stream": True}}),
    ):
        answers = await asyncio.gather(call("POST", path, body), call("POST", path, body))
        first, second = sorted(answers, key=lambda answer: len(answer.text))  # who waits hears more
        assert ": running\n\n" in first.text
        assert ": queued, position 1\n\n" in second.text
        assert ": running\n\n" in second.text
        assert frames(first.text)[-1] == frames(second.text)[-1] == "[DONE]"


async def test_an_error_after_a_heartbeat_is_a_frame(
    call: Any, configure: Any, upstream: MockUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "HEARTBEAT_SECONDS", 0.1)
    await loaded(call, configure)

    async def refuse(request: web.Request, body: dict[str, Any]) -> web.Response:
        await asyncio.sleep(1.5)
        return web.json_response({"error": {"message": "too late"}}, status=400)

    upstream.respond = refuse
    answer = await call("POST", CHAT, {**BODY, "stream": True})
    assert (answer.status, [json.loads(one) for one in frames(answer.text)]) == (
        200,
        [{"error": {"message": "too late"}}],
    )


# -- retries and fallback ------------------------------------------------------------------------------------------


class Busy:
    """Refuses so many times, then lets the usual answer pass."""

    def __init__(self, times: int, status: int = 503, headers: dict[str, str] | None = None) -> None:
        self.left, self.status, self.headers = times, status, headers or {}

    async def __call__(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse | None:
        if request.method == "GET" or not self.left:
            return None
        self.left -= 1
        return web.json_response({"error": {"message": "busy"}}, status=self.status, headers=self.headers)


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_busy_endpoint_is_asked_again(
    call: Any, configure: Any, upstream: MockUpstream, monkeypatch: pytest.MonkeyPatch, status: int, stream: bool
) -> None:
    monkeypatch.setattr(engine_http, "FIRST_PAUSE_SECONDS", 0.01)
    await loaded(call, configure)
    upstream.respond = Busy(2, status)
    assert (await call("POST", CHAT, {**BODY, "stream": stream})).status == 200
    upstream.respond = Busy(3, status)
    answer = await call("POST", CHAT, {**BODY, "stream": stream})
    assert (answer.status, upstream.respond.left) == (429 if status == 429 else 502, 0)


async def test_the_fallback_answers_for_a_model_that_fails_and_is_named(
    call: Any, configure: Any, upstream: MockUpstream
) -> None:
    with MockUpstream() as other:
        kwargs = {"base_url": other.base_url, "max_retries": 0, "temperature": 0.5}
        await loaded(call, configure, model_kwargs=kwargs, fallback="second")
        await loaded(call, configure, model_id="second", prices={"input": 1, "output": 1})
        other.respond = Busy(99)
        for stream in (False, True):
            answer = await call("POST", CHAT, {**BODY, "stream": stream})
            assert (answer.status, answer.headers["X-LLMKit-Model"]) == (200, "second")
        assert "temperature" not in upstream.requests[-1][2]  # its own defaults, not the first one's
        prompt = {"model_id": "example_model", "prompt": "Hi"}
        answer = await call("POST", "llm/inference", prompt)
        assert (answer.json["response"], answer.json["model_id"]) == (ANSWER, "second")
        assert answer.json["cost"]["amount"] > 0
        recent = (await call("GET", "llm/requests")).json["recent"]
        assert {(one["model_id"], one["answered_by"], one["outcome"]) for one in recent} == {
            ("example_model", "second", "ok")
        }


async def test_a_wrong_request_a_circle_and_a_missing_fallback_end_with_the_first_error(
    call: Any, configure: Any, upstream: MockUpstream
) -> None:
    await loaded(call, configure, model_kwargs={"max_retries": 0}, fallback="second")
    await loaded(call, configure, model_id="second", model_kwargs={"max_retries": 0}, fallback="example_model")
    upstream.respond = Busy(99, 400)
    assert (await call("POST", CHAT, BODY)).status == 400
    assert upstream.respond.left == 98
    upstream.respond = Busy(99, 500)
    answer = await call("POST", CHAT, BODY)
    assert (answer.status, upstream.respond.left) == (502, 97)
    await loaded(call, configure, model_id="third", model_kwargs={"max_retries": 0}, fallback="nobody")
    assert (await call("POST", CHAT, {**BODY, "model": "third"})).status == 502


@asynccontextmanager
async def begun(call: Any, configure: Any, scripted: ScriptedEngineType) -> AsyncIterator[asyncio.Task[Any]]:
    """Make a request that an engine has begun, and will never answer; its model has a fallback."""
    asked, loop = asyncio.Event(), asyncio.get_running_loop()

    async def never(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        loop.call_soon_threadsafe(asked.set)
        await asyncio.sleep(60)
        raise AssertionError("the request was not ended")

    with MockUpstream() as slow:
        scripted.base_url, slow.respond = slow.base_url, never
        await loaded(call, configure, model_type="scripted", fallback="second")
        await loaded(call, configure, model_id="second")
        task = asyncio.create_task(call("POST", CHAT, BODY))
        await asyncio.wait_for(asked.wait(), 10)
        yield task
        task.cancel()


async def test_a_crash_in_the_middle_of_a_request_goes_to_the_fallback(
    call: Any, configure: Any, upstream: MockUpstream, scripted: ScriptedEngineType
) -> None:
    async with begun(call, configure, scripted) as asking:
        scripted.engines[0].ended.set()
        answer = await asyncio.wait_for(asking, 10)
    assert (answer.status, answer.headers["X-LLMKit-Model"]) == (200, "second")


async def test_an_endpoint_that_knows_no_stream_options_still_streams(
    call: Any, configure: Any, upstream: MockUpstream
) -> None:
    await loaded(call, configure)
    refused = 0

    async def strict(request: web.Request, body: dict[str, Any]) -> web.StreamResponse | None:
        nonlocal refused
        if "stream_options" in body:
            refused += 1
            return web.json_response({"error": {"message": "Unknown field: stream_options"}}, status=422)
        return None

    upstream.respond = strict
    for _ in range(2):
        assert frames((await call("POST", CHAT, {**BODY, "stream": True})).text)[-1] == "[DONE]"
    kwargs = {"stream": True}
    prompt = {"model_id": "example_model", "prompt": "Hi", "inference_kwargs": kwargs}
    assert frames((await call("POST", "llm/inference", prompt)).text)[-1] == "[DONE]"
    assert refused == 1
    # What the client itself asks for is its own mistake.
    wrong = {**BODY, "stream": True, "stream_options": {"include_usage": True}}
    assert (await call("POST", CHAT, wrong)).status == 422
    await call("POST", "llm/unload_model/example_model")
    await call("POST", f"llm/load_model/{(await call('GET', 'llm/models/example_model')).json['config_id']}")
    assert frames((await call("POST", "llm/inference", prompt)).text)[-1] == "[DONE]"


async def test_streams_that_find_that_out_at_once_all_get_their_answer(
    call: Any, configure: Any, upstream: MockUpstream
) -> None:
    await loaded(call, configure)

    async def strict(request: web.Request, body: dict[str, Any]) -> web.StreamResponse | None:
        await asyncio.sleep(0.2)
        if "stream_options" in body:
            return web.json_response({"error": {"message": "Unknown field: stream_options"}}, status=400)
        return None

    upstream.respond = strict
    prompt = {"model_id": "example_model", "prompt": "Hi", "inference_kwargs": {"stream": True}}
    asked = [call("POST", CHAT, {**BODY, "stream": True}) for _ in range(4)]
    asked += [call("POST", "llm/inference", prompt) for _ in range(4)]
    for answer in await asyncio.gather(*asked):
        assert (answer.status, frames(answer.text)[-1]) == (200, "[DONE]")


async def test_a_client_cannot_switch_off_the_counting_of_tokens(
    call: Any, configure: Any, upstream: MockUpstream
) -> None:
    await loaded(call, configure)

    async def echo(request: web.Request, body: dict[str, Any]) -> web.StreamResponse | None:
        if body.get("user"):
            return web.json_response({"error": {"message": f"no user {body['user']}"}}, status=400)
        return None

    upstream.respond = echo
    assert (await call("POST", CHAT, {**BODY, "stream": True, "user": "stream_options"})).status == 400
    await call("POST", CHAT, {**BODY, "stream": True})
    assert (await call("GET", "llm/requests")).json["recent"][0]["usage"] == USAGE


@pytest.mark.parametrize("pauses", range(6))
async def test_who_cancels_while_the_engine_crashes_gets_no_answer_of_a_fallback(
    call: Any, configure: Any, upstream: MockUpstream, scripted: ScriptedEngineType, app: LLMKitApp, pauses: int
) -> None:
    registry = await app.ready()
    async with begun(call, configure, scripted) as asking:
        before = len(upstream.requests)
        (running,) = registry.requests.running()
        scripted.engines[0].ended.set()
        for _ in range(pauses):  # so many steps after the crash
            await asyncio.sleep(0)
        registry.requests.cancel(running.request_id)
        answer = await asyncio.wait_for(asking, 10)
    assert (answer.status, answer.json["error"]["code"]) == (409, "request_cancelled")
    assert len(upstream.requests) - before <= (pauses > 0)  # it may have been asked before the cancellation


@pytest.mark.parametrize("value", ["sk-1234567890abcdef", "caf\u00e9", "x" * 1000])
async def test_headers_of_the_endpoint_pass_only_if_they_are_harmless(
    call: Any, configure: Any, upstream: MockUpstream, value: str
) -> None:
    await loaded(call, configure, model_kwargs={"base_url": upstream.base_url, "api_key": "sk-1234567890abcdef"})

    async def told(request: web.Request, body: dict[str, Any]) -> web.StreamResponse | None:
        if request.method == "GET":
            return None
        headers = {"x-ratelimit-reset-requests": value, "x-ratelimit-reset-tokens": "6m0s"}
        return web.json_response(chat_answer(ANSWER), headers=headers)

    upstream.respond = told
    answer = await call("POST", CHAT, BODY)
    assert (answer.status, answer.headers["x-ratelimit-reset-tokens"]) == (200, "6m0s")
    assert answer.headers.get("x-ratelimit-reset-requests", "[key]") == "[key]"


async def test_an_error_with_status_200_is_an_error(call: Any, configure: Any, upstream: MockUpstream) -> None:
    await loaded(call, configure)

    async def told(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.json_response({"error": {"message": "out of credit", "code": 402}})

    upstream.respond = told
    answer = await call("POST", CHAT, BODY)
    assert (answer.status, answer.json["error"]["code"]) == (502, "upstream_failed")


async def test_an_endpoint_that_answers_a_stream_in_one_piece_is_understood(
    call: Any, configure: Any, upstream: MockUpstream
) -> None:
    await loaded(call, configure)

    async def whole(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.json_response(chat_answer(ANSWER))

    upstream.respond = whole
    assert (await call("POST", CHAT, {**BODY, "stream": True})).json == chat_answer(ANSWER)
    kwargs = {"stream": True}
    prompt = {"model_id": "example_model", "prompt": "Hi", "inference_kwargs": kwargs}
    delta, answer, done = frames((await call("POST", "llm/inference", prompt)).text)
    assert (json.loads(delta)["delta"], json.loads(answer)["response"], done) == (ANSWER, ANSWER, "[DONE]")


async def test_tool_calls_and_log_probabilities_without_end_are_an_error(
    call: Any, configure: Any, upstream: MockUpstream
) -> None:
    await loaded(call, configure)
    call_piece = {"index": 0, "id": "c", "function": {"name": "f", "arguments": "x" * 60_000}}
    logprob = {"token": "x" * 60_000, "logprob": -1}
    for delta in ({"delta": {"tool_calls": [call_piece]}}, {"delta": {}, "logprobs": {"content": [logprob]}}):

        async def endless(
            request: web.Request, body: dict[str, Any], delta: dict[str, Any] = delta
        ) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            while True:
                await response.write(event({"choices": [delta]}))

        upstream.respond = endless
        prompt = {"model_id": "example_model", "prompt": "Hi", "inference_kwargs": {"stream": True}}
        answer = await call("POST", "llm/inference", prompt)
        told = answer.json or json.loads(frames(answer.text)[-1])  # pieces of a tool call are no frames
        assert told["error"]["message"] == "The answer does not end."


# -- cancelling ----------------------------------------------------------------------------------------------------


async def test_a_request_is_listed_while_it_runs_and_can_be_ended_by_its_id(
    call: Any, configure: Any, upstream: MockUpstream
) -> None:
    await loaded(call, configure, max_in_flight=1)
    go_on = asyncio.Event()

    async def slow(request: web.Request, body: dict[str, Any]) -> web.StreamResponse | None:
        while not go_on.is_set():
            await asyncio.sleep(0.01)
        return None

    upstream.respond = slow
    batch = {"X-LLMKit-Priority": "batch"}
    asking = [asyncio.create_task(call("POST", CHAT, BODY, headers=batch))]
    await asyncio.sleep(0.2)
    asking.append(asyncio.create_task(call("POST", CHAT, {**BODY, "stream": True})))
    await asyncio.sleep(0.2)
    first, second = (await call("GET", "llm/requests")).json["running"]
    assert (first["status"], first["position"], first["priority"], first["stream"]) == ("running", None, "batch", False)
    assert (second["status"], second["position"], second["priority"]) == ("queued", 1, "interactive")
    assert first["api"] == "chat/completions"
    assert first["elapsed_seconds"] > 0
    assert (await call("GET", "llm/models/example_model")).json["queued"] == 1
    for one in (second, first):
        assert (await call("DELETE", f"llm/inference/{one['request_id']}")).status == 200
    for answer in await asyncio.gather(*asking):
        assert (answer.status, answer.json["error"]["code"]) == (409, "request_cancelled")
    go_on.set()
    told = (await call("GET", "llm/requests")).json
    assert told["running"] == []
    assert [one["outcome"] for one in told["recent"]] == ["cancelled", "cancelled"]
    assert (await call("GET", "llm/models/example_model")).json["in_flight"] == 0


async def test_a_client_that_leaves_in_the_middle_of_its_own_body_leaves_nothing(
    call: Any, jp_http_port: int, jp_base_url: str, jp_serverapp: Any
) -> None:
    before = len(asyncio.all_tasks())
    for path in (CHAT, "llm/inference", "llm/models/x/metrics"):
        for _ in range(5):
            _, writer = await asyncio.open_connection("127.0.0.1", jp_http_port)
            head = f"POST {jp_base_url}{path} HTTP/1.1\r\nHost: 127.0.0.1:{jp_http_port}\r\nContent-Length: 1000000\r\n"
            writer.write(f"{head}Authorization: token {jp_serverapp.identity_provider.token}\r\n\r\n".encode())
            writer.write(b"x" * 500_000)
            await writer.drain()
            await asyncio.sleep(0.02)
            writer.close()
            await writer.wait_closed()
    async with asyncio.timeout(10):
        while len(asyncio.all_tasks()) > before:
            await asyncio.sleep(0.05)


async def test_a_priority_that_does_not_exist_is_a_400(call: Any, configure: Any, upstream: MockUpstream) -> None:
    await loaded(call, configure)
    answer = await call("POST", CHAT, BODY, headers={"X-LLMKit-Priority": "urgent"})
    assert (answer.status, answer.json["error"]["param"]) == (400, "X-LLMKit-Priority")


# -- figures and records -------------------------------------------------------------------------------------------


async def test_prometheus_reads_what_has_happened(
    call: Any, configure: Any, upstream: MockUpstream, jp_fetch: Any
) -> None:
    await loaded(call, configure, model_kwargs={"max_retries": 0})
    await call("POST", CHAT, BODY)
    await call("POST", CHAT, {**BODY, "stream": True})
    upstream.respond = Busy(99)
    await call("POST", CHAT, BODY)

    async def figures() -> list[str]:
        text = (await jp_fetch("metrics")).body.decode()
        return [line for line in text.splitlines() if 'model="example_model"' in line]

    lines = await figures()
    for line in (
        'llmkit_requests_total{model="example_model",outcome="ok"} 2.0',
        'llmkit_requests_total{model="example_model",outcome="failed"} 1.0',
        'llmkit_prompt_tokens_total{model="example_model"} 16.0',
        'llmkit_completion_tokens_total{model="example_model"} 14.0',
        'llmkit_first_token_seconds_count{model="example_model"} 1.0',
        'llmkit_request_seconds_count{model="example_model"} 3.0',
        'llmkit_queue_seconds_count{model="example_model"} 3.0',
        'llmkit_loads_total{model="example_model",outcome="ok"} 1.0',
        'llmkit_model_status{model="example_model",status="loaded"} 1.0',
        'llmkit_requests_in_flight{model="example_model"} 0.0',
    ):
        assert line in lines
    config_id = (await call("GET", "llm/models/example_model")).json["config_id"]
    await call("DELETE", f"llm/configuration/{config_id}?unload=true")
    assert await figures() == []


async def test_records_hold_no_words_of_anybody(call: Any, configure: Any, upstream: MockUpstream, app: Any) -> None:
    await loaded(call, configure)
    await call("POST", CHAT, {**BODY, "messages": [{"role": "user", "content": "canary-question"}]})
    record = (await call("GET", "llm/requests")).json["recent"][0]
    assert record["timings"]["total"] > 0
    assert record["usage"] == USAGE
    assert not {"request_body", "response_body"} & record.keys()
    assert "canary" not in json.dumps(record)
    assert "Paris" not in json.dumps(record)


@pytest.mark.parametrize("jp_argv", [["--LLMKitApp.record_bodies=True"]])
async def test_an_operator_can_have_bodies_recorded(call: Any, configure: Any, upstream: MockUpstream) -> None:
    await loaded(call, configure)
    await call("POST", CHAT, BODY)
    await call("POST", CHAT, {**BODY, "stream": True})
    await call("POST", "llm/inference", {"model_id": "example_model", "prompt": "Hi"})
    inference, stream, plain = (await call("GET", "llm/requests")).json["recent"]
    assert json.loads(plain["request_body"])["messages"] == BODY["messages"]
    assert json.loads(plain["response_body"]) == chat_answer(ANSWER)
    assert "Paris" in stream["response_body"]
    assert inference["response_body"] == ANSWER


async def test_logprobs_are_in_an_answer_that_asked_for_them(call: Any, configure: Any, upstream: MockUpstream) -> None:
    await loaded(call, configure)
    tokens = [{"token": text, "logprob": -0.1, "bytes": None, "top_logprobs": []} for text in ("Par", "is")]

    async def told(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        assert (body["logprobs"], body["top_logprobs"]) == (True, 1)
        if not body["stream"]:
            choice = {"message": {"content": "Paris"}, "logprobs": {"content": tokens, "refusal": None}}
            return web.json_response({"choices": [choice]})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for token in tokens:
            choice = {"delta": {"content": token["token"]}, "logprobs": {"content": [token]}}
            await response.write(event({"choices": [choice]}))
        await response.write(b"data: [DONE]\n\n")
        return response

    upstream.respond = told
    for stream in (False, True):
        kwargs = {"logprobs": True, "top_logprobs": 1, "stream": stream}
        answer = await call(
            "POST", "llm/inference", {"model_id": "example_model", "prompt": "?", "inference_kwargs": kwargs}
        )
        whole = json.loads(frames(answer.text)[-2]) if stream else answer.json
        assert (whole["response"], whole["logprobs"]) == ("Paris", {"content": tokens})


async def test_an_api_request_makes_no_login_cookie(call: Any, configure: Any, upstream: MockUpstream) -> None:
    await loaded(call, configure)
    for answer in (await call("POST", CHAT, BODY), await call("GET", "llm/models")):
        assert "Set-Cookie" not in answer.headers
