"""What an answer knows of where it comes from, keys that are asked for, and what results look like."""

from __future__ import annotations

import json
import logging
import os
import pickle
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from aiohttp import web
from fake_engine_type import PLUGIN
from mock_upstream import ANSWER, MockUpstream, chat_answer
from support import JupyterServer

from llmkit import __version__
from llmkit.client import Answer, Client, Configuration, connect
from llmkit.errors import DoesNotFit, KeyMissing, LLMKitError, ModelIsLoaded, ModelNotFound
from llmkit.schemas import Timings

CANARY = "sk-canary-Zq3vT8"


@pytest.fixture
def loaded(client: Client, upstream: MockUpstream) -> str:
    client.configure("ask", "gpt-3", "openai", {"base_url": upstream.base_url, "seed": 5})
    client.load("ask", progress=False)
    return "ask"


def configured(**kwargs: Any) -> Configuration:
    return Configuration(config_id="c", model_id="m", model_name="gpt-3", model_type="openai", model_kwargs=kwargs)


# -- provenance ----------------------------------------------------------------------------------------------------


def test_an_answer_knows_its_configuration_and_its_parameters(loaded: str, client: Client) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    answer = client.prompt(loaded, "Hello", temperature=0.25, messages=messages, request_id="req-mine")
    (stored,) = [one for one in client.configurations() if one.model_id == loaded]
    told = answer.provenance
    sent = datetime.fromisoformat(told.pop("time"))
    assert timedelta(0) < datetime.now(UTC) - sent < timedelta(seconds=30)
    assert told == {
        "model_id": "ask",
        "model_name": "gpt-3",
        "configuration_hash": stored.hash,
        "parameters": {"temperature": 0.25},
        "seed": 5,
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 8, "completion_tokens": 7, "total_tokens": 15},
        "timings": answer.timings.model_dump(),
        "engine": "openai",
        "engine_version": None,
        "llmkit_version": __version__,
        "request_id": "req-mine",
    }
    assert json.loads(json.dumps(told)) == told
    assert pickle.loads(pickle.dumps(answer)).provenance["configuration_hash"] == stored.hash  # noqa: S301


def test_a_streamed_answer_knows_the_same(loaded: str, client: Client) -> None:
    whole = client.prompt(loaded, "Hello", seed=7)
    with client.stream(loaded, "Hello", seed=7) as stream:
        assert "".join(stream) == ANSWER
    assert stream.answer is not None
    varying = ("time", "timings", "request_id")
    told, expected = ({k: v for k, v in one.provenance.items() if k not in varying} for one in (stream.answer, whole))
    assert told == expected
    assert told["seed"] == 7


def test_a_change_of_the_configuration_shows_at_the_next_prompt(loaded: str, client: Client) -> None:
    before = client.prompt(loaded, "Hello").provenance["configuration_hash"]
    assert client.prompt(loaded, "Hello").provenance["configuration_hash"] == before
    client.update(loaded, description="the same model")
    assert client.prompt(loaded, "Hello").provenance["configuration_hash"] == before
    changed = client.update(loaded, model_kwargs={**client.configurations()[-1].model_kwargs, "seed": 6})
    assert client.prompt(loaded, "Hello").provenance["configuration_hash"] == changed.hash != before


@pytest.mark.skipif(sys.platform != "linux", reason="engines are kept on Linux only")
def test_the_version_is_that_of_the_engine_that_answered_also_just_after_another_was_loaded() -> None:
    path = os.pathsep.join(filter(None, (PLUGIN["PYTHONPATH"], os.environ.get("PYTHONPATH", ""))))
    with JupyterServer("server", env={"PYTHONPATH": path}) as own, connect(own.url, own.token) as client:
        client.configure("engine", "any --version=1.2.3", "fake")
        assert client.model("engine").capabilities.engine_version is None
        client.load("engine", progress=False)
        (told,) = own.request("GET", "llm/models/").json()["models"]
        assert told["capabilities"]["engine_version"] == "1.2.3"
        assert '<td style="text-align: left">fake 1.2.3</td>' in client.models()._repr_html_()
        answer = client.prompt("engine", "Hello")
        assert answer.provenance["engine_version"] == "1.2.3"
        assert "1.2.3" in answer.provenance._repr_html_()
        with client.stream("engine", "Hello") as stream:
            assert "".join(stream) == "Hello"
        assert stream.answer is not None
        assert stream.answer.provenance["engine_version"] == "1.2.3"
        client.update("engine", model_name="any --version=1.2.4", reload=True)
        client.load("engine", progress=False)
        told = json.loads(client.prompt("engine", "Hello").model_dump_json())
        assert told["engine_version"] == "1.2.4"
        client.unload("engine")
        assert client.model("engine").capabilities.engine_version is None


def test_many_prompts_cost_one_request_more(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"response": "x", "model_id": "m", "request_id": "r", "timings": TIMINGS.model_dump()}
    fake.replies["POST", "/llm/inference/"] = (200, told)
    fake.replies["GET", "/llm/configurations/"] = (200, [configured().to_wire()])
    with connect(fake.url) as client:
        for _ in range(5):
            assert client.prompt("m", "Hello").provenance["model_name"] == "gpt-3"
        assert [one.path for one in fake.asked].count("/llm/configurations/") == 1
        monkeypatch.setattr("llmkit.client.provenance.KEPT_SECONDS", 0)
        client._known.forget()
        client.prompt("m", "Hello")
        client.prompt("m", "Hello")
        assert [one.path for one in fake.asked].count("/llm/configurations/") == 3


@pytest.mark.parametrize("reply", [(403, {}), (200, {"a": 1}), (200, [1]), (200, "<html>"), (500, "no")])
def test_where_the_configurations_are_not_told_the_answer_comes_all_the_same(fake: Any, reply: Any) -> None:
    told = {"response": "x", "model_id": "m", "request_id": "r", "timings": TIMINGS.model_dump()}
    fake.replies["POST", "/llm/inference/"] = (200, told)
    fake.replies["GET", "/llm/configurations/"] = reply
    with connect(fake.url) as client:
        answer = client.prompt("m", "Hello", seed=3)
    assert (answer.response, answer.provenance["model_name"], answer.provenance["seed"]) == ("x", None, 3)


def test_the_hash_is_of_what_decides_the_answers_and_of_no_key() -> None:
    one = configured(temperature=0.5, base_url="http://a/v1")
    same = [
        configured(base_url="http://a/v1", temperature=0.5),
        configured(temperature=0.5, base_url="http://a/v1", api_key={"secret": True, "set_at": "now"}),
        one.model_copy(update={"model_id": "other", "config_id": "d", "description": "x", "max_queued": 3}),
    ]
    assert {other.hash for other in same} == {one.hash}
    others = [
        configured(temperature=0.6, base_url="http://a/v1"),
        configured(temperature=0.5, base_url="http://b/v1"),
        one.model_copy(update={"model_name": "gpt-4o-mini"}),
        one.model_copy(update={"model_type": "vllm"}),
    ]
    assert len({one.hash, *(other.hash for other in others)}) == 5
    nested = configured(engine={"base_url": "http://a/v1"}, generation={"seed": 4})
    assert configured(engine={"base_url": "http://a/v1", "api_key": CANARY}, generation={"seed": 4}).hash == nested.hash
    assert nested.seed == 4
    assert len(one.hash) == 64


# -- looks ---------------------------------------------------------------------------------------------------------

TIMINGS = Timings(queue=0.0, load=0.0, first_token=None, total=0.25, tokens_per_second=None)


def test_an_answer_shows_its_text_alone_and_its_provenance_as_a_table() -> None:
    answer = Answer(response="**Paris**", model_id="ask", request_id="<b>", timings=TIMINGS)
    assert answer._repr_markdown_() == "**Paris**"
    shown = answer.provenance._repr_html_()
    assert "request_id" in shown
    assert "&lt;b&gt;" in shown
    assert "<b>" not in shown
    assert "model_name" not in shown  # not known


def test_a_configuration_is_a_table_without_its_key(client: Client, upstream: MockUpstream) -> None:
    kwargs = {"base_url": upstream.base_url, "api_key": CANARY}
    made = client.configure("ask", "<script>", "openai", kwargs, description="a\n\nb")
    shown = made._repr_html_()
    assert CANARY not in shown
    assert "&lt;script&gt;" in shown
    assert "<script>" not in shown
    assert upstream.base_url in shown


# -- keys ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
def test_a_key_is_asked_for_and_nothing_else_changes(
    client: Client, upstream: MockUpstream, monkeypatch: pytest.MonkeyPatch, caplog: Any, *, nested: bool
) -> None:
    caplog.set_level(logging.DEBUG)
    upstream.key = CANARY
    kwargs: dict[str, Any] = {"base_url": upstream.base_url, "timeout": 9.0}
    if nested:
        kwargs = {"engine": kwargs, "generation": {"temperature": 0.5}}
    made = client.configure("ask", "gpt-3", "openai", kwargs, description="mine", max_queued=4)
    asked: list[str] = []
    monkeypatch.setattr("getpass.getpass", lambda prompt: asked.append(prompt) or f" {CANARY}\n")
    changed = client.set_key("ask")
    assert asked == ["API key of ask: "]
    client.load("ask", progress=False)
    assert str(client.prompt("ask", "Hello")) == ANSWER
    place = changed.model_kwargs["engine"] if nested else changed.model_kwargs
    assert place.pop("api_key")["secret"] is True
    assert changed == made
    assert CANARY not in repr(changed) + changed._repr_html_() + caplog.text


def test_a_key_is_replaced_also_by_the_name_of_a_variable(client: Client, upstream: MockUpstream) -> None:
    client.configure("ask", "gpt-3", "openai", {"base_url": upstream.base_url, "api_key": CANARY})
    assert client.set_key("ask", "env:MY_API_KEY").model_kwargs["api_key"] == "env:MY_API_KEY"


def test_a_live_model_takes_a_key_with_reload(loaded: str, client: Client, upstream: MockUpstream) -> None:
    with pytest.raises(ModelIsLoaded):
        client.set_key(loaded, CANARY)
    upstream.key = CANARY
    client.set_key(loaded, CANARY, reload=True)
    client.load(loaded, progress=False)
    assert str(client.prompt(loaded, "Hello")) == ANSWER


@pytest.mark.parametrize("key", ["", " \n"])
def test_an_empty_key_changes_nothing(client: Client, upstream: MockUpstream, key: str) -> None:
    client.configure("ask", "gpt-3", "openai", {"base_url": upstream.base_url, "api_key": "env:MY_API_KEY"})
    with pytest.raises(KeyMissing):
        client.set_key("ask", key)
    assert client.configurations()[-1].model_kwargs["api_key"] == "env:MY_API_KEY"


def test_where_nobody_can_be_asked_the_error_says_what_to_write(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(_: str) -> str:
        raise EOFError

    monkeypatch.setattr("getpass.getpass", nobody)
    with pytest.raises(KeyMissing, match="env:NAME"):
        client.set_key("ask")


def test_a_key_that_does_not_fit_is_not_repeated(client: Client) -> None:
    client.configure("demo2", "llmkit/demo", "vllm")
    with pytest.raises(DoesNotFit) as raised:
        client.set_key("demo2", CANARY)
    assert CANARY not in str(raised.value) + repr(raised.value.details)


# -- requests ------------------------------------------------------------------------------------------------------


def test_the_last_requests_are_told(loaded: str, client: Client, upstream: MockUpstream) -> None:
    for _ in range(3):
        answer = client.prompt(loaded, "Hello")
    found = client.requests(limit=2, model_id=loaded)
    assert [one.outcome for one in found.recent] == ["ok", "ok"]
    assert found.recent[0].request_id == answer.request_id
    assert found.recent[0].usage == answer.usage
    with pytest.raises(ModelNotFound):
        client.requests(model_id="no-such-model")


def test_a_request_that_fails_is_told_too(loaded: str, client: Client, upstream: MockUpstream) -> None:
    async def fail(_: web.Request, body: dict[str, Any]) -> web.Response:
        return web.json_response({"error": {"message": "no"}} if body else chat_answer("x"), status=400)

    upstream.respond = fail
    with pytest.raises(LLMKitError):
        client.prompt(loaded, "Hello")
    assert client.requests(limit=1).recent[0].outcome != "ok"
