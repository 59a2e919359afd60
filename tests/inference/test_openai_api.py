"""A client's body under ``/llm/v1``, and the one that goes to the engine."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmkit.errors import DoesNotFit, NotSupported, ParameterForbidden
from llmkit.inference.openai_api import FORBIDDEN, Call, check, is_stream, model_of, to_call
from llmkit.schemas import API

MESSAGES = [{"role": "user", "content": "Hi"}]


def call_of(
    api: str,
    body: dict[str, Any],
    defaults: dict[str, Any] | None = None,
    *,
    model_api: API | None = "chat",
    stream_options: bool = True,
) -> tuple[Call, dict[str, Any]]:
    call = to_call(
        api, {"model": "mine", **body}, defaults or {}, "theirs", model_api=model_api, stream_options=stream_options
    )
    return call, json.loads(call.body)


def test_the_engine_gets_its_own_name_of_the_model_and_everything_else_as_it_is() -> None:
    body = {"messages": MESSAGES, "n": 3, "logit_bias": {"5": 1}, "unheard_of": {"a": [None, 1.5]}}
    call, sent = call_of("chat/completions", body)
    assert sent == {"model": "theirs", **body}
    assert (call.path, call.stream) == ("/chat/completions", False)


@pytest.mark.parametrize("api", ["chat/completions", "completions"])
def test_defaults_fill_in_what_the_client_does_not_say(api: str) -> None:
    defaults = {"temperature": 0.5, "max_tokens": 9, "seed": 3}
    _, sent = call_of(api, {"temperature": 0, "max_completion_tokens": 5}, defaults)
    assert sent == {"model": "theirs", "temperature": 0, "max_completion_tokens": 5, "seed": 3}


def test_responses_get_the_defaults_that_they_know_by_their_own_names() -> None:
    defaults = {"temperature": 0.5, "max_tokens": 9, "seed": 3, "reasoning_effort": "low", "stop": "x"}
    _, sent = call_of("responses", {"input": "Hi"}, defaults)
    assert sent == {
        "model": "theirs",
        "input": "Hi",
        "temperature": 0.5,
        "max_output_tokens": 9,
        "reasoning": {"effort": "low"},
    }
    _, sent = call_of("responses", {"input": "Hi", "max_output_tokens": 2}, defaults)
    assert sent["max_output_tokens"] == 2


@pytest.mark.parametrize("api", ["embeddings", "tokenize"])
def test_what_is_not_generated_gets_no_defaults(api: str) -> None:
    _, sent = call_of(api, {"input": "Hi"}, {"temperature": 0.5, "max_tokens": 9})
    assert sent == {"model": "theirs", "input": "Hi"}


@pytest.mark.parametrize(
    ("options", "sent_options", "wants"),
    [
        (None, {"include_usage": True}, False),
        ({}, {"include_usage": True}, False),
        ({"include_usage": True}, {"include_usage": True}, True),
        ({"include_usage": False}, {"include_usage": True}, False),
        ({"continuous_usage_stats": True}, {"continuous_usage_stats": True, "include_usage": True}, False),
        ("nonsense", "nonsense", False),
    ],
)
def test_the_usage_of_a_stream_is_always_asked_for(options: Any, sent_options: Any, wants: bool) -> None:
    body = {"messages": MESSAGES, "stream": True, **({"stream_options": options} if options is not None else {})}
    call, sent = call_of("chat/completions", body)
    assert (call.stream, call.wants_usage) == (True, wants)
    assert sent["stream_options"] == sent_options


def test_an_endpoint_that_knows_no_stream_options_is_not_sent_any() -> None:
    _, sent = call_of("chat/completions", {"messages": MESSAGES, "stream": True}, stream_options=False)
    assert "stream_options" not in sent
    _, sent = call_of("responses", {"input": "Hi", "stream": True})
    assert "stream_options" not in sent


@pytest.mark.parametrize("name", sorted(FORBIDDEN))
def test_what_a_request_may_not_carry_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ParameterForbidden) as caught:
        check({"model": "m", "messages": MESSAGES, name: {}})
    assert (caught.value.param, caught.value.hint) == (name, FORBIDDEN[name])


def test_a_model_without_a_chat_template_says_what_to_do_instead() -> None:
    with pytest.raises(NotSupported) as caught:
        call_of("chat/completions", {"messages": MESSAGES}, model_api="completions")
    assert "/llm/v1/completions" in str(caught.value.hint)
    call_of("completions", {"prompt": "Hi"}, model_api="completions")


@pytest.mark.parametrize("body", [{}, {"model": None}, {"model": 3}, {"model": ""}, {"model": ["m"]}])
def test_a_body_without_a_model_is_told_where_the_models_are(body: dict[str, Any]) -> None:
    with pytest.raises(DoesNotFit) as caught:
        model_of(body)
    assert (caught.value.param, caught.value.hint) == ("model", "GET /llm/v1/models lists the models.")


def test_stream_is_true_or_false_and_nothing_that_looks_like_it() -> None:
    assert [is_stream({"stream": value}) for value in (True, False, None)] == [True, False, False]
    for value in (1, "true", "yes", [], {}):
        with pytest.raises(DoesNotFit):
            is_stream({"stream": value})
