"""Programs that people have, on ``/llm/v1``: the ``openai`` package, LangChain, requests, curl; unmodified.

Each journey runs twice: against a mock upstream, for speed, and against the demo model in a real vLLM.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import httpx
import openai
import pytest
import requests
from langchain_core.messages import AIMessage
from langchain_openai import ChatOpenAI
from mock_upstream import MockUpstream
from pydantic import BaseModel, SecretStr
from support import ANSWER, QUESTION, JupyterServer, wait_until

MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "capital", "schema": SCHEMA, "strict": True}}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "capital", "parameters": SCHEMA, "strict": True}}]


@dataclass(frozen=True)
class Target:
    """A loaded model, and the address that OpenAI clients are given."""

    server: JupyterServer
    model: str

    @property
    def base_url(self) -> str:
        return self.server.url + "llm/v1"

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.base_url, api_key=self.server.token, max_retries=0)

    def chat_openai(self, **more: Any) -> ChatOpenAI:
        return ChatOpenAI(
            model=self.model, base_url=self.base_url, api_key=SecretStr(self.server.token), max_retries=0, **more
        )


@pytest.fixture(scope="module")
def mock_target(server: JupyterServer) -> Iterator[Target]:
    with MockUpstream() as upstream:
        fields = {"model_name": "gpt-3", "model_type": "openai", "model_kwargs": {"base_url": upstream.base_url}}
        config_id = server.configure("mock", **fields)
        server.load(config_id)
        yield Target(server, "mock")
        server.request("DELETE", f"llm/configuration/{config_id}?unload=true")


@pytest.fixture(params=["mock", pytest.param("vllm", marks=pytest.mark.vllm)])
def target(request: pytest.FixtureRequest, server: JupyterServer) -> Target:
    if request.param == "mock":
        found: Target = request.getfixturevalue("mock_target")
        return found
    return Target(server, request.getfixturevalue("loaded_model").model_id)


@pytest.fixture
def real(server: JupyterServer, loaded_model: Any) -> Target:
    return Target(server, loaded_model.model_id)


# -- both ------------------------------------------------------------------------------------------------------------


def test_the_openai_package_chats(target: Target) -> None:
    with target.client() as client:
        answer = client.chat.completions.create(model=target.model, messages=MESSAGES)
        assert answer.choices[0].message.content == ANSWER
        assert answer.usage is not None
        assert answer.usage.completion_tokens > 0
        assert str(answer._request_id).startswith("req-")
        assert target.model in {model.id for model in client.models.list()}
        assert client.models.retrieve(target.model).id == target.model


def test_the_openai_package_streams_with_and_without_usage(target: Target) -> None:
    with target.client() as client:
        chunks = list(client.chat.completions.create(model=target.model, messages=MESSAGES, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
        assert len(chunks) > 3
        assert all(chunk.usage is None for chunk in chunks)
        *_, last = client.chat.completions.create(
            model=target.model, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        assert last.usage is not None
        assert last.usage.total_tokens > 0


async def test_the_asynchronous_openai_package_does_the_same(target: Target) -> None:
    async with openai.AsyncOpenAI(base_url=target.base_url, api_key=target.server.token) as client:
        answer = await client.chat.completions.create(model=target.model, messages=MESSAGES)
        assert answer.choices[0].message.content == ANSWER
        text = ""
        async for chunk in await client.chat.completions.create(model=target.model, messages=MESSAGES, stream=True):
            text += chunk.choices[0].delta.content or ""
        assert text == ANSWER


def test_errors_are_those_of_the_openai_package(target: Target) -> None:
    with target.client() as client:
        with pytest.raises(openai.NotFoundError, match="There is no model 'nobody'"):
            client.chat.completions.create(model="nobody", messages=MESSAGES)
        with pytest.raises(openai.UnprocessableEntityError, match="chat_template") as caught:
            client.chat.completions.create(model=target.model, messages=MESSAGES, extra_body={"chat_template": "x"})
        assert caught.value.code == "parameter_forbidden"
        wrong = client.with_options(api_key="wrong")
        with pytest.raises(openai.PermissionDeniedError, match="Not authenticated"):
            wrong.chat.completions.create(model=target.model, messages=MESSAGES)


def test_langchain_invokes_and_streams(target: Target) -> None:
    chat = target.chat_openai()
    answer = chat.invoke(QUESTION)
    assert answer.content == ANSWER
    assert isinstance(answer, AIMessage)
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["total_tokens"] > 0
    pieces = list(chat.stream(QUESTION))
    assert "".join(str(piece.content) for piece in pieces) == ANSWER
    assert len(pieces) > 3


async def test_langchain_does_the_same_asynchronously(target: Target) -> None:
    answers = await target.chat_openai().abatch([QUESTION] * 4)
    assert [answer.content for answer in answers] == [ANSWER] * 4


def test_requests_reads_a_stream_line_by_line(target: Target) -> None:
    body = {"model": target.model, "messages": MESSAGES, "stream": True}
    headers = {"Authorization": f"Bearer {target.server.token}"}
    with requests.post(
        f"{target.base_url}/chat/completions", json=body, headers=headers, stream=True, timeout=60
    ) as answer:
        lines = [line.decode().removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    assert "".join(json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines[:-1]) == ANSWER


def test_curl_chats_and_streams(target: Target) -> None:
    curl = shutil.which("curl")
    assert curl is not None, "curl is not installed"
    for stream in (False, True):
        body = {"model": target.model, "messages": MESSAGES, "stream": stream}
        command = [curl, "-sSN", f"{target.base_url}/chat/completions", "-d", json.dumps(body)]
        command += ["-H", f"Authorization: Bearer {target.server.token}"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        if stream:
            assert said.endswith("data: [DONE]\n\n")
        else:
            assert json.loads(said)["choices"][0]["message"]["content"] == ANSWER


# -- what only a real engine can show --------------------------------------------------------------------------------


@pytest.mark.vllm
def test_parameters_reach_a_real_engine(real: Target) -> None:
    with real.client() as client:
        create = client.chat.completions.create
        cut = create(model=real.model, messages=MESSAGES, max_completion_tokens=2)
        assert cut.choices[0].finish_reason == "length"
        stopped = create(model=real.model, messages=MESSAGES, stop=["Paris"])
        assert stopped.choices[0].message.content == ANSWER.partition("Paris")[0]
        told = create(model=real.model, messages=MESSAGES, logprobs=True, top_logprobs=2).choices[0].logprobs
        assert told is not None
        assert told.content is not None
        assert "".join(one.token for one in told.content).startswith("The capital")
        assert len(told.content[0].top_logprobs) == 2
        several = create(model=real.model, messages=MESSAGES, n=3, temperature=1.0, seed=7)
        again = create(model=real.model, messages=MESSAGES, n=3, temperature=1.0, seed=7)
        assert [c.message.content for c in several.choices] == [c.message.content for c in again.choices]
        assert len(several.choices) == 3


@pytest.mark.vllm
def test_an_answer_follows_a_json_schema(real: Target) -> None:
    with real.client() as client:
        created = client.chat.completions.create(
            model=real.model, messages=MESSAGES, response_format=FORMAT, max_tokens=100, logit_bias=_no_space(real)
        )
        assert json.loads(created.choices[0].message.content or "")["city"] in ("Paris", "Rome")

    class Capital(BaseModel):
        city: Literal["Paris", "Rome"]

    chat = real.chat_openai(max_tokens=100, logit_bias=_no_space(real))
    found = chat.with_structured_output(Capital, method="json_schema").invoke(QUESTION)
    assert isinstance(found, Capital)


def _no_space(target: Target) -> dict[str, int]:
    """Forbid white space between the tokens of JSON, which this small model would go on with for ever."""
    found: dict[str, int] = {}
    for text in (" ", "\n", "\t"):
        body = {"model": target.model, "prompt": text, "add_special_tokens": False}
        told = target.server.request("POST", "llm/v1/tokenize", json=body).json()
        found |= {str(token): -100 for token in told["tokens"]}
    return found


@pytest.mark.vllm
def test_responses_pass_through_and_embeddings_are_refused_clearly(real: Target) -> None:
    with real.client() as client:
        assert client.responses.create(model=real.model, input=QUESTION).output_text == ANSWER
        kinds = [event.type for event in client.responses.create(model=real.model, input=QUESTION, stream=True)]
        assert kinds[0] == "response.created"
        assert kinds[-1] == "response.completed"
        with pytest.raises(openai.UnprocessableEntityError, match="has no embeddings") as caught:
            client.embeddings.create(model=real.model, input="Hi")
        assert caught.value.code == "not_supported"
        with pytest.raises(openai.BadRequestError, match="maximum context length"):
            client.chat.completions.create(model=real.model, messages=[{"role": "user", "content": "word " * 2000}])
        image: list[Any] = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}]
        with pytest.raises(openai.BadRequestError, match="not a multimodal model"):
            client.chat.completions.create(model=real.model, messages=[{"role": "user", "content": image}])
        assert client.completions.create(model=real.model, prompt="Hi", max_tokens=3).choices[0].text
    recent = real.server.request("GET", "llm/requests/?limit=6").json()["recent"]
    streamed = next(one for one in recent if one["api"] == "responses" and one["stream"])
    assert streamed["outcome"] == "ok"
    assert streamed["usage"]["completion_tokens"] > 0
    assert streamed["timings"]["first_token"] > 0


@pytest.mark.vllm
@pytest.mark.timeout(400)
def test_tools_are_called_by_a_real_engine(server: JupyterServer) -> None:
    kwargs = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}
    config_id = server.configure("tools", model_kwargs=kwargs)
    server.load(config_id)
    target = Target(server, "tools")
    try:
        bias, named = _no_space(target), {"type": "function", "function": {"name": "capital"}}
        with target.client() as client:
            create: Any = client.chat.completions.create
            given = {"model": "tools", "messages": MESSAGES, "tools": TOOLS, "max_tokens": 100, "logit_bias": bias}
            message = create(**given, tool_choice=named).choices[0].message
            assert message.tool_calls[0].function.name == "capital"
            chunks = list(create(**given, tool_choice=named, stream=True))
            calls = [call for c in chunks for call in c.choices[0].delta.tool_calls or []]
            assert calls[0].function.name == "capital"
            assert json.loads("".join(call.function.arguments or "" for call in calls)) is not None
            # Left to itself it talks.
            assert create(**given).choices[0].message.content == ANSWER
        kwargs = {"tools": TOOLS, "tool_choice": named, "max_tokens": 100, "logit_bias": bias}
        body = {"model_id": "tools", "prompt": QUESTION, "inference_kwargs": kwargs}
        answer = server.request("POST", "llm/inference/", json=body).json()
        assert answer["tool_calls"][0]["function"]["name"] == "capital"
    finally:
        server.request("DELETE", f"llm/configuration/{config_id}?unload=true", timeout=30)


@pytest.mark.vllm
def test_a_real_engine_stops_generating_when_the_client_leaves(real: Target) -> None:
    endless = {"model": real.model, "messages": MESSAGES, "max_tokens": 480, "ignore_eos": True}
    url, headers = f"{real.base_url}/chat/completions", {"Authorization": f"Bearer {real.server.token}"}

    def generated() -> float:
        text = real.server.request("GET", f"llm/models/{real.model}/metrics").text
        return float(re.findall(r"^vllm:generation_tokens_total\{.*\} ([\d.e+]+)$", text, re.MULTILINE)[0])

    def settled() -> float:
        """Give the tokens generated so far, once there come no more."""
        counts = [generated()]
        while len(counts) < 2 or counts[-1] != counts[-2]:
            time.sleep(0.3)
            counts.append(generated())
        return counts[-1]

    whole = settled()
    httpx.post(url, json=endless, headers=headers, timeout=60).raise_for_status()
    assert settled() - whole == 480
    for stream in (True, False):
        before = settled()
        if stream:
            with httpx.stream("POST", url, json={**endless, "stream": True}, headers=headers) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(url, json=endless, headers=headers, timeout=0.15)
        wait_until(
            lambda: real.server.request("GET", f"llm/models/{real.model}").json()["in_flight"] == 0, "a free place"
        )
        assert settled() - before < 400
