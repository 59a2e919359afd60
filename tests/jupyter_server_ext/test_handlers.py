"""The endpoints over HTTP, against a mock upstream; the real ones are in test_spec_examples.py."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from uuid import UUID

import pytest
from aiohttp import web
from mock_upstream import ANSWER, MockUpstream, chat_answer
from scripted_engine import ScriptedEngineType

from llmkit.errors import LoadFailed

GPT3 = {"model_id": "example_model", "model_name": "gpt-3", "model_type": "openai"}


@pytest.mark.parametrize("slash", ["", "/"])
async def test_the_eight_endpoints_answer_as_documented(call: Any, upstream: MockUpstream, slash: str) -> None:
    kwargs = {"temperature": 0.7}
    configured = await call("POST", f"llm/configure_model{slash}", {**GPT3, "model_kwargs": kwargs})
    assert (configured.status, list(configured.json)) == (200, ["config_id"])
    config_id = configured.json["config_id"]
    assert UUID(config_id)
    stored = {"config_id": config_id, **GPT3, "model_kwargs": kwargs}
    assert (await call("GET", f"llm/configurations{slash}")).json == [stored]
    assert (await call("GET", f"llm/configuration/{config_id}{slash}")).json == stored
    loaded = await call("POST", f"llm/load_model/{config_id}{slash}")
    assert (loaded.status, loaded.json["message"]) == (200, "Model loaded successfully")
    assert (await call("GET", f"llm/loaded_models{slash}")).json == ["example_model"]
    prompt = {"model_id": "example_model", "prompt": "What is the capital of France?"}
    answer = await call("POST", f"llm/inference{slash}", {**prompt, "inference_kwargs": {"max_tokens": 50}})
    assert (answer.status, answer.json["response"]) == (200, ANSWER)
    unloaded = await call("POST", f"llm/unload_model/example_model{slash}")
    assert (unloaded.status, unloaded.json["message"]) == (200, "Model unloaded successfully")
    assert (await call("GET", f"llm/loaded_models{slash}")).json == []
    deleted = await call("DELETE", f"llm/configuration/{config_id}{slash}")
    assert deleted.json == {"detail": "Configuration deleted successfully"}
    assert (await call("GET", f"llm/configurations{slash}")).json == []


async def test_generation_defaults_reach_the_engine_and_the_request_wins(
    call: Any, configure: Any, upstream: MockUpstream
) -> None:
    config_id = await configure(model_kwargs={"temperature": 0.7, "generation": {"max_tokens": 9, "seed": 3}})
    await call("POST", f"llm/load_model/{config_id}")
    kwargs = {"max_completion_tokens": 5, "top_p": 0.5, "system": "Be brief."}
    await call("POST", "llm/inference", {"model_id": "example_model", "prompt": "Hi", "inference_kwargs": kwargs})
    _, headers, body = upstream.requests[-1]
    assert body == {
        "model": "gpt-3",
        "stream": False,
        "temperature": 0.7,
        "seed": 3,
        "max_completion_tokens": 5,
        "top_p": 0.5,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    }
    assert "token" not in headers.get("Authorization", "")


async def test_an_answer_carries_usage_timings_and_cost(call: Any, configure: Any, upstream: MockUpstream) -> None:
    config_id = await configure(prices={"input": 1, "output": 2, "currency": "EUR"})
    await call("POST", f"llm/load_model/{config_id}")
    answer = (await call("POST", "llm/inference", {"model_id": "example_model", "prompt": "Hi"})).json
    assert answer["usage"] == {"prompt_tokens": 8, "completion_tokens": 7, "total_tokens": 15}
    assert answer["cost"] == {"amount": pytest.approx((8 * 1 + 7 * 2) / 1e6), "currency": "EUR"}
    assert answer["timings"]["total"] > 0
    assert answer["finish_reason"] == "stop"


def frames(text: str) -> list[Any]:
    assert text.endswith("\n\n")
    return [part.removeprefix("data: ") for part in text.strip().split("\n\n")]


async def test_a_stream_sends_deltas_then_the_whole_answer_then_done(
    call: Any, configure: Any, upstream: MockUpstream
) -> None:
    await call("POST", f"llm/load_model/{await configure()}")
    body = {"model_id": "example_model", "prompt": "Hi", "inference_kwargs": {"stream": True, "request_id": "mine"}}
    answer = await call("POST", "llm/inference", body)
    assert answer.headers["Content-Type"] == "text/event-stream"
    assert answer.headers["X-Accel-Buffering"] == "no"
    *deltas, last, done = frames(answer.text)
    assert "".join(json.loads(delta)["delta"] for delta in deltas) == ANSWER
    assert len(deltas) == 6
    whole = json.loads(last)
    assert (whole["response"], whole["request_id"], whole["finish_reason"]) == (ANSWER, "mine", "stop")
    assert whole["usage"]["completion_tokens"] == 7
    assert whole["timings"]["first_token"] is not None
    assert done == "[DONE]"


async def test_an_error_in_mid_stream_is_the_last_event(call: Any, configure: Any, upstream: MockUpstream) -> None:
    await call("POST", f"llm/load_model/{await configure()}")

    async def break_off(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b'data: {"choices": [{"delta": {"content": "The"}}]}\n\n')
        return response

    upstream.respond = break_off
    body = {"model_id": "example_model", "prompt": "Hi", "inference_kwargs": {"stream": True}}
    answer = await call("POST", "llm/inference", body)
    first, error = frames(answer.text)
    assert json.loads(first) == {"delta": "The"}
    assert json.loads(error)["error"]["code"] == "engine_gone"


async def test_a_request_can_be_cancelled_by_its_id(call: Any, configure: Any, upstream: MockUpstream) -> None:
    await call("POST", f"llm/load_model/{await configure()}")
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def never(request: web.Request, body: dict[str, Any]) -> None:
        loop.call_soon_threadsafe(asked.set)
        await asyncio.sleep(60)

    upstream.respond = never
    body = {"model_id": "example_model", "prompt": "Hi", "inference_kwargs": {"request_id": "mine"}}
    running = asyncio.create_task(call("POST", "llm/inference", body))
    await asyncio.wait_for(asked.wait(), 10)
    assert (await call("POST", "llm/inference", body)).status == 409
    assert (await call("DELETE", "llm/inference/mine")).status == 200
    assert (await running).json["error"]["message"] == "The request was cancelled."
    assert (await call("DELETE", "llm/inference/mine")).status == 404


async def test_a_client_that_leaves_ends_the_request_at_the_engine(
    call: Any, configure: Any, upstream: MockUpstream, jp_http_port: int, jp_base_url: str, jp_serverapp: Any
) -> None:
    await call("POST", f"llm/load_model/{await configure()}")
    loop = asyncio.get_running_loop()
    asked, aborted = asyncio.Event(), asyncio.Event()

    async def never(request: web.Request, body: dict[str, Any]) -> None:
        loop.call_soon_threadsafe(asked.set)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            loop.call_soon_threadsafe(aborted.set)
            raise

    upstream.respond = never
    body = b'{"model_id": "example_model", "prompt": "Hi"}'
    _, writer = await asyncio.open_connection("127.0.0.1", jp_http_port)
    token = jp_serverapp.identity_provider.token
    writer.write(
        f"POST {jp_base_url}llm/inference HTTP/1.1\r\nHost: localhost\r\nAuthorization: token {token}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    await asyncio.wait_for(asked.wait(), 10)
    assert (await call("GET", "llm/models/example_model")).json["in_flight"] == 1
    writer.close()
    await asyncio.wait_for(aborted.wait(), 10)
    while (await call("GET", "llm/models/example_model")).json["in_flight"]:
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("change", "path", "words"),
    [
        ({"model_id": None}, "model_id", "string"),
        ({"model_id": "no spaces"}, "model_id", "letters, digits"),
        ({"model_name": ""}, "model_name", "at least 1"),
        ({"model_type": "vlm"}, "model_type", "must be one of"),
        ({"model_kwargs": {"temprature": 1}}, "model_kwargs.temprature", "did you mean `temperature`"),
        ({"model_kwargs": {"temperature": "hot"}}, "model_kwargs.temperature", "number"),
        ({"model_kwargs": {"generation": {"max_tokens": 0}}}, "model_kwargs.generation.max_tokens", "greater than"),
        ({"model_kwargs": {"engine": {"base_url": "ftp://x"}}}, "model_kwargs.base_url", "http://"),
        ({"model_kwargs": {"base_url": "http://x/v1?key=k"}}, "model_kwargs.base_url", "query"),
        ({"model_kwargs": {"base_url": "http://a..b/v1"}}, "model_kwargs.base_url", "host name"),
        ({"model_kwargs": {str(i): i for i in range(300)}}, "model_kwargs", "more than 256"),
        ({"model_kwargs": {"base_url": "http://u:p@x/"}}, "model_kwargs.base_url", "user name"),
        ({"model_kwargs": {"top_p": 1, "generation": {"top_p": 1}}}, "model_kwargs.generation.top_p", "given twice"),
        ({"model_kwargs": []}, "model_kwargs", "dictionary"),
        ({"descripton": "x"}, "descripton", "did you mean `description`"),
        ({"max_in_flight": 0}, "max_in_flight", "greater than"),
    ],
)
async def test_a_wrong_field_is_named_with_its_path(call: Any, change: dict[str, Any], path: str, words: str) -> None:
    answer = await call("POST", "llm/configure_model", {**GPT3, **change})
    assert answer.status == 422
    error = answer.json["error"]
    assert error["param"] == path
    assert words in error["message"]
    assert answer.json["message"] == error["message"]
    assert (await call("GET", "llm/configurations")).json == []


async def test_every_wrong_field_is_named_at_once(call: Any) -> None:
    answer = await call("POST", "llm/configure_model", {"model_id": 3, "model_kwargs": 1, "x": 1})
    fields = {field["path"] for field in answer.json["error"]["details"]["fields"]}
    assert fields == {"model_id", "model_name", "model_type", "model_kwargs", "x"}


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", "llm/configuration/nope", "configuration_not_found"),
        ("PUT", "llm/configuration/nope", "configuration_not_found"),
        ("DELETE", "llm/configuration/00000000-0000-0000-0000-000000000000", "configuration_not_found"),
        ("POST", "llm/load_model/abcd1234-efgh-5678-ijkl-9012mnop3456", "configuration_not_found"),
        ("POST", "llm/unload_model/nope", "model_not_found"),
        ("GET", "llm/models/nope", "model_not_found"),
        ("DELETE", "llm/inference/nope", "request_not_found"),
        ("GET", "llm", "not_found"),
        ("GET", "llm/", "not_found"),
        ("GET", "llm/nothing/here/", "not_found"),
        ("POST", "llm/nothing/", "not_found"),
    ],
)
async def test_what_is_unknown_is_a_json_404(call: Any, method: str, path: str, code: str) -> None:
    answer = await call(method, path, follow_redirects=False)
    assert (answer.status, answer.json["error"]["code"]) == (404, code)
    assert answer.json["error"]["hint"] or code == "request_not_found"


async def test_a_wrong_method_is_a_json_405(call: Any) -> None:
    answer = await call("GET", "llm/configure_model/")
    assert (answer.status, answer.json["error"]["code"]) == (405, "method_not_allowed")


async def test_prompting_what_is_not_loaded_says_which_call_loads_it(call: Any, configure: Any, upstream: Any) -> None:
    config_id = await configure()
    answer = await call("POST", "llm/inference", {"model_id": "example_model", "prompt": "Hi"})
    assert (answer.status, answer.json["error"]["code"]) == (409, "model_not_loaded")
    assert f"/llm/load_model/{config_id}" in answer.json["error"]["hint"]
    unknown = await call("POST", "llm/inference", {"model_id": "exmple_model", "prompt": "Hi"})
    assert unknown.status == 404
    assert "example_model" in unknown.json["error"]["hint"]


async def test_auto_load_loads_at_the_first_request(call: Any, configure: Any, upstream: MockUpstream) -> None:
    await configure(auto_load=True)
    answer = await call("POST", "llm/inference", {"model_id": "example_model", "prompt": "Hi"})
    assert answer.json["response"] == ANSWER
    assert (await call("GET", "llm/loaded_models")).json == ["example_model"]


@pytest.mark.parametrize(
    ("kwargs", "param"),
    [
        ({"n": 2}, "inference_kwargs.n"),
        ({"stream": "yes"}, "inference_kwargs.stream"),
        ({"chat_template": "{{ x }}"}, "inference_kwargs.chat_template"),
        ({"model": "other"}, "inference_kwargs.model"),
        ({"request_id": "../x"}, "inference_kwargs.request_id"),
        ({"messages": "Hi"}, "inference_kwargs.messages"),
        ({"temperature": "hot"}, "inference_kwargs.temperature"),
        ({"max_tokens": 0}, "inference_kwargs.max_tokens"),
    ],
)
async def test_what_a_request_may_not_ask_is_refused_never_dropped(
    call: Any, configure: Any, upstream: MockUpstream, kwargs: dict[str, Any], param: str
) -> None:
    await call("POST", f"llm/load_model/{await configure()}")
    asked = len(upstream.requests)
    body = {"model_id": "example_model", "prompt": "Hi", "inference_kwargs": kwargs}
    answer = await call("POST", "llm/inference", body)
    assert (answer.status, answer.json["error"]["param"]) == (422, param)
    assert len(upstream.requests) == asked


async def test_configuring_the_same_again_gives_the_same_id_and_something_else_conflicts(
    call: Any, configure: Any, upstream: MockUpstream
) -> None:
    config_id = await configure(model_kwargs={"temperature": 1})
    assert await configure(model_kwargs={"generation": {"temperature": 1.0}}) == config_id
    answer = await call("POST", "llm/configure_model", {**GPT3, "model_kwargs": {"temperature": 0}})
    assert (answer.status, answer.json["error"]["code"]) == (409, "configuration_exists")
    assert f"PUT /llm/configuration/{config_id}" in answer.json["error"]["hint"]


async def test_get_then_put_changes_nothing(call: Any, configure: Any, upstream: MockUpstream) -> None:
    config_id = await configure(description="mine", prices={"input": 1, "output": 2})
    stored = (await call("GET", f"llm/configuration/{config_id}")).json
    before = (await call("GET", "llm/models")).json["revision"]
    assert (await call("PUT", f"llm/configuration/{config_id}", stored)).json == stored
    assert (await call("GET", f"llm/configuration/{config_id}")).json == stored
    assert (await call("GET", "llm/models")).json["revision"] == before
    other = {**stored, "config_id": "00000000-0000-0000-0000-000000000000"}
    assert (await call("PUT", f"llm/configuration/{config_id}", other)).status == 422


async def test_put_of_generation_defaults_holds_from_the_next_request(
    call: Any, configure: Any, upstream: MockUpstream
) -> None:
    config_id = await configure()
    await call("POST", f"llm/load_model/{config_id}")
    changed = {**GPT3, "model_kwargs": {"temperature": 0.1}, "description": "new"}
    assert (await call("PUT", f"llm/configuration/{config_id}", changed)).status == 200
    await call("POST", "llm/inference", {"model_id": "example_model", "prompt": "Hi"})
    assert upstream.requests[-1][2]["temperature"] == 0.1


async def test_engine_arguments_of_a_live_model_change_only_with_reload(
    call: Any, configure: Any, scripted: ScriptedEngineType
) -> None:
    body = {"model_id": "s", "model_name": "n", "model_type": "scripted", "model_kwargs": {"size": 1}}
    config_id = await configure(**body)
    await call("POST", f"llm/load_model/{config_id}")
    changed = {**body, "model_kwargs": {"size": 2}}
    answer = await call("PUT", f"llm/configuration/{config_id}", changed)
    assert (answer.status, answer.json["error"]["code"]) == (409, "model_is_loaded")
    assert (await call("GET", f"llm/configuration/{config_id}")).json["model_kwargs"] == {"size": 1}
    assert (await call("PUT", f"llm/configuration/{config_id}?reload=true", changed)).status == 200
    await call("POST", f"llm/load_model/{config_id}")
    assert len(scripted.engines) == 2


async def test_a_loaded_configuration_is_deleted_only_with_unload(call: Any, configure: Any, upstream: Any) -> None:
    config_id = await configure()
    await call("POST", f"llm/load_model/{config_id}")
    answer = await call("DELETE", f"llm/configuration/{config_id}")
    assert (answer.status, answer.json["error"]["code"]) == (409, "model_is_loaded")
    assert (await call("DELETE", f"llm/configuration/{config_id}?unload=true")).status == 200
    assert (await call("GET", "llm/models")).json["models"] == []


async def test_load_without_waiting_answers_at_once(call: Any, configure: Any, scripted: ScriptedEngineType) -> None:
    scripted.ready = False
    config_id = await configure("s", model_type="scripted")
    answer = await call("POST", f"llm/load_model/{config_id}?wait=false")
    assert (answer.status, answer.json["status"]) == (202, "loading")
    assert (await call("GET", "llm/loaded_models")).json == []
    while not scripted.engines:
        await asyncio.sleep(0.01)
    scripted.engines[0].ready.set()
    done = await call("POST", f"llm/load_model/{config_id}")
    assert (done.status, done.json["model_id"]) == (200, "s")


async def test_a_failed_load_says_why_in_the_answer_and_in_the_model(
    call: Any, configure: Any, scripted: ScriptedEngineType
) -> None:
    scripted.why_unavailable = LoadFailed("No room.", hint="Make room.", details={"log_tail": ["last words"]})
    config_id = await configure("s", model_type="scripted")
    answer = await call("POST", f"llm/load_model/{config_id}")
    assert (answer.status, answer.json["error"]["hint"]) == (502, "Make room.")
    model = (await call("GET", "llm/models/s")).json
    assert (model["status"], model["error"]["log_tail"]) == ("failed", ["last words"])


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"model_name": "gpt-3-typo"}, 422, "model_name_not_found"),
        ({"model_kwargs": {"base_url": "http://127.0.0.1:1/v1"}}, 502, "upstream_unreachable"),
        ({"model_kwargs": {"base_url": "http://no-such-host.invalid/v1"}}, 502, "upstream_unreachable"),
        ({"model_kwargs": {"api_key": "env:NO_SUCH_API_KEY"}}, 422, "key_missing"),
    ],
)
async def test_an_endpoint_that_cannot_be_used_fails_the_load_and_says_why(
    call: Any, configure: Any, upstream: MockUpstream, fields: dict[str, Any], status: int, code: str
) -> None:
    config_id = await configure(**fields)
    answer = await call("POST", f"llm/load_model/{config_id}")
    assert (answer.status, answer.json["error"]["code"]) == (status, code)
    assert answer.json["error"]["hint"]
    assert (await call("GET", "llm/models/example_model")).json["status"] == "failed"
    other = await configure("other")
    assert (await call("POST", f"llm/load_model/{other}")).status == 200


async def test_a_prompt_longer_than_the_context_is_a_422(call: Any, configure: Any, upstream: MockUpstream) -> None:
    await call("POST", f"llm/load_model/{await configure()}")

    async def too_long(request: web.Request, body: dict[str, Any]) -> web.Response:
        said = "This model's maximum context length is 512 tokens. However, you requested 9000 tokens."
        return web.json_response({"error": {"message": said, "type": "BadRequestError", "code": 400}}, status=400)

    upstream.respond = too_long
    answer = await call("POST", "llm/inference", {"model_id": "example_model", "prompt": "Hi"})
    assert (answer.status, answer.json["error"]["code"]) == (422, "context_length_exceeded")
    assert "512" in answer.json["error"]["message"]
    streamed = {"model_id": "example_model", "prompt": "Hi", "inference_kwargs": {"stream": True}}
    assert (await call("POST", "llm/inference", streamed)).status == 422


async def test_a_full_queue_is_429_with_retry_after(call: Any, configure: Any, upstream: MockUpstream) -> None:
    await call("POST", f"llm/load_model/{await configure(max_in_flight=1, max_queued=0)}")
    loop, asked, go_on = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()

    async def slow(request: web.Request, body: dict[str, Any]) -> web.Response:
        loop.call_soon_threadsafe(asked.set)
        while not go_on.is_set():
            await asyncio.sleep(0.01)
        return web.json_response(chat_answer("done"))

    upstream.respond = slow
    body = {"model_id": "example_model", "prompt": "Hi"}
    first = asyncio.create_task(call("POST", "llm/inference", body))
    await asyncio.wait_for(asked.wait(), 10)
    answer = await call("POST", "llm/inference", body)
    assert (answer.status, answer.json["error"]["code"]) == (429, "queue_full")
    assert int(answer.headers["Retry-After"]) >= 1
    assert answer.json["error"]["details"] == {"limit": 0, "queued": 0, "in_flight": 1, "retry_after": 1}
    go_on.set()
    assert (await first).json["response"] == "done"


async def test_model_types_carry_schema_and_table(call: Any) -> None:
    types = {t["name"]: t for t in (await call("GET", "llm/model_types/")).json["model_types"]}
    assert {"openai", "vllm"} <= set(types)
    openai = types["openai"]
    assert openai["available"] is True
    assert openai["table"]["temperature"] == "generation"
    assert openai["table"]["base_url"] == "engine"
    assert openai["arguments"]["properties"]["base_url"]["group"] == "essential"


async def test_configurations_survive_the_server(
    call: Any, configure: Any, upstream: MockUpstream, app: Any, scripted: Any
) -> None:
    config_id = await configure(model_kwargs={"temperature": 1})
    await app.stop_extension()
    await app.stop_extension()  # twice, as two SIGTERMs do
    assert (await call("POST", "llm/configure_model", GPT3)).status == 503
    app._registry = app._starting = app._stopping = app._folder = None  # what a new process begins with
    assert [c["config_id"] for c in (await call("GET", "llm/configurations")).json] == [config_id]


CHUNK = {"choices": [{"delta": {"content": "The"}}]}


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"choices": []},
        {"choices": ["text"]},
        {"choices": [{"message": {"content": [{"type": "text"}]}}]},
        {"choices": [{"message": {"content": 3}}]},
        {"choices": [{"message": {"content": "x", "tool_calls": ["x"]}}]},
        {"choices": [{"message": {"content": "x"}, "finish_reason": {"x": 1}}]},
        {"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": "many"}},
        {"error": {"message": "slow down", "code": "rate_limit_exceeded"}},
        {"error": "text"},
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_of_another_form_is_a_502_never_a_500(
    call: Any, configure: Any, upstream: MockUpstream, answer: dict[str, Any], stream: bool
) -> None:
    await call("POST", f"llm/load_model/{await configure()}")

    async def odd(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if not stream:
            return web.json_response(answer)
        response = web.StreamResponse()
        await response.prepare(request)
        for piece in (CHUNK, answer):
            await response.write(b"data: " + json.dumps(piece).encode() + b"\n\n")
        return response

    upstream.respond = odd
    body = {"model_id": "example_model", "prompt": "Hi", "inference_kwargs": {"stream": stream}}
    told = await call("POST", "llm/inference", body)
    if stream:
        *_, last = frames(told.text)
        assert json.loads(last)["error"]["code"] in ("upstream_failed", "engine_gone")
    else:
        assert (told.status, told.json["error"]["code"]) == (502, "upstream_failed")


async def test_half_a_surrogate_pair_in_an_answer_is_replaced(
    call: Any, configure: Any, upstream: MockUpstream
) -> None:
    await call("POST", f"llm/load_model/{await configure()}")

    async def half(request: web.Request, body: dict[str, Any]) -> web.Response:
        return web.json_response(chat_answer("caf\u00e9 \ud83d"))

    upstream.respond = half
    answer = await call("POST", "llm/inference", {"model_id": "example_model", "prompt": "Hi"})
    assert answer.json["response"] == "caf\u00e9 \ufffd"


async def test_a_stream_that_comes_in_one_burst_can_be_cancelled(
    call: Any, configure: Any, upstream: MockUpstream
) -> None:
    await call("POST", f"llm/load_model/{await configure()}")
    loop, begun = asyncio.get_running_loop(), asyncio.Event()

    async def endless(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        loop.call_soon_threadsafe(begun.set)
        while True:
            await response.write((b"data: " + json.dumps(CHUNK).encode() + b"\n\n") * 50)

    upstream.respond = endless
    kwargs = {"stream": True, "request_id": "mine"}
    body = {"model_id": "example_model", "prompt": "Hi", "inference_kwargs": kwargs}
    running = asyncio.create_task(call("POST", "llm/inference", body))
    await asyncio.wait_for(begun.wait(), 10)
    await asyncio.sleep(0.2)
    assert (await call("DELETE", "llm/inference/mine")).status == 200
    *_, last = frames((await asyncio.wait_for(running, 10)).text)
    assert json.loads(last)["error"]["message"] == "The request was cancelled."
    assert (await call("GET", "llm/models/example_model")).json["in_flight"] == 0


@pytest.mark.parametrize("status", [200, 302])
async def test_a_page_or_a_redirect_is_no_endpoint(
    call: Any, configure: Any, upstream: MockUpstream, status: int
) -> None:
    async def page(request: web.Request, body: dict[str, Any]) -> web.Response:
        return web.Response(status=status, headers={"Location": "/x"}, text="<html>", content_type="text/html")

    upstream.respond = page
    answer = await call("POST", f"llm/load_model/{await configure()}")
    assert (answer.status, answer.json["error"]["code"]) == (502, "upstream_failed")


async def test_a_wrong_openai_base_url_of_the_server_harms_no_model_with_its_own(
    call: Any, configure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MockUpstream() as upstream:
        monkeypatch.setenv("OPENAI_BASE_URL", "localhost:8000/v1")
        config_id = await configure(model_kwargs={"base_url": upstream.base_url})
        assert (await call("POST", f"llm/load_model/{config_id}")).status == 200


async def test_equal_configurations_sent_at_once_get_one_id(call: Any, upstream: MockUpstream) -> None:
    answers = await asyncio.gather(*(call("POST", "llm/configure_model", GPT3) for _ in range(8)))
    assert {answer.status for answer in answers} == {200}
    assert len({answer.json["config_id"] for answer in answers}) == 1
