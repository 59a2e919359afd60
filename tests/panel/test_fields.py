from __future__ import annotations

import json
from typing import Any

import ipywidgets as w
import pytest
from support import wait_until

from llmkit.engines.openai import OpenAIArguments
from llmkit.engines.vllm.arguments import VLLMArguments
from llmkit.panel.fields import Argument, Field, read_arguments
from llmkit.panel.key_field import KeyField
from llmkit.panel.widgets import Kit
from llmkit.schemas import GenerationParameters, ModelConfigRequest


def read(schema: type[Any]) -> dict[str, Argument]:
    return {one.name: one for one in read_arguments(schema.model_json_schema())}


def test_every_argument_of_every_type_becomes_a_field() -> None:
    kit = Kit()
    for schema in (OpenAIArguments, VLLMArguments, GenerationParameters):
        arguments = read(schema)
        assert arguments.keys() == schema.model_fields.keys()
        for argument in arguments.values():
            assert Field(kit, argument).given == {}


def test_kinds_groups_and_words_are_read_wherever_pydantic_put_them() -> None:
    openai = read(OpenAIArguments)
    assert (openai["api_key"].kind, openai["api_key"].group) == ("secret", "essential")
    assert (openai["base_url"].kind, openai["base_url"].group) == ("string", "essential")
    assert openai["api"].choices == ("auto", "chat", "completions")
    assert openai["timeout"].kind == "number"
    assert openai["timeout"].description.startswith("Seconds")
    generation = read(GenerationParameters)
    assert (generation["seed"].kind, generation["response_format"].kind) == ("integer", "json")
    assert generation["stop"].kind == "json"  # a text or a list of texts
    vllm = read(VLLMArguments)
    assert vllm["max_model_len"].kind == "mixed"  # a number or "auto"
    assert vllm["enforce_eager"].kind == "boolean"
    request = read(ModelConfigRequest)
    assert request["model_id"].examples


@pytest.mark.parametrize(
    ("kind", "entered", "given"),
    [
        ("string", "0123", "0123"),
        ("integer", "512", 512),
        ("integer", "many", "many"),  # the server says what is wrong with it
        ("number", "0.5", 0.5),
        ("mixed", "auto", "auto"),
        ("mixed", "512", 512),
        ("json", '{"a": [1]}', {"a": [1]}),
        ("json", "{half", "{half"),
        ("boolean", True, True),
        ("boolean", False, False),
        ("choice", "b", "b"),
    ],
)
def test_what_is_entered_becomes_json(kind: str, entered: Any, given: Any) -> None:
    field = Field(Kit(), Argument("x", kind, choices=("a", "b") if kind == "choice" else ()))
    field.control.value = entered
    assert field.given == {"x": given}
    assert type(field.given["x"]) is type(given)
    field.clear()
    assert field.given == {}


def test_a_complaint_is_shown_and_taken_back() -> None:
    field = Field(Kit(), Argument("x", "string"))
    field.complain("<b>wrong</b>")
    assert "&lt;b&gt;wrong" in field._error.value
    assert "llmkit-wrong" in field.control._dom_classes
    field.complain()
    assert field._error.value == ""
    assert "llmkit-wrong" not in field.control._dom_classes


class Browser:
    """Stands for the page: answers a key field as its JavaScript would."""

    def __init__(self, field: KeyField, typed: str) -> None:
        self.typed = typed
        self.sent: list[Any] = []
        self._field = field
        field.send = self.receive

    def receive(self, message: dict[str, Any]) -> None:
        self.sent.append(message)
        value, self.typed = self.typed, ""
        self._field._receive(None, {"type": "key", "request": message["request"], "value": value}, None)


def test_a_key_is_given_once_and_is_in_no_state() -> None:
    field = Kit().make(KeyField, "api_key", "a key")
    browser = Browser(field, "sk-canary")
    got: list[str] = []
    field.collect(got.append, pytest.fail)
    field.collect(got.append, pytest.fail)
    assert got == ["sk-canary", ""]
    assert "canary" not in json.dumps(field.get_state(), default=str)
    assert "canary" not in json.dumps(w.Widget.get_manager_state(), default=str)
    assert "canary" not in json.dumps(browser.sent)
    assert not any("canary" in repr(value) for value in vars(field).values())


def test_a_browser_that_does_not_answer_is_an_error_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmkit.panel.key_field.ANSWER_SECONDS", 0.05)
    field = Kit().make(KeyField, "api_key", "a key")
    failed: list[Exception] = []
    field.collect(pytest.fail, failed.append)
    wait_until(lambda: failed, "the complaint", 2)
    assert "Reload the page" in str(failed[0])


@pytest.mark.parametrize("message", ["key", {}, {"type": "key"}, {"type": "key", "request": 99, "value": "x"}, None])
def test_a_message_that_nobody_asked_for_does_nothing(message: Any) -> None:
    Kit().make(KeyField, "api_key", "a key")._receive(None, message, None)
