from __future__ import annotations

import json
from typing import Any

import ipywidgets as w
import pytest
from support import wait_until

from llmkit.engines.openai import OpenAIArguments
from llmkit.engines.vllm.arguments import VLLMArguments
from llmkit.panel.fields import Argument, Field, _parse, read_arguments
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


@pytest.mark.parametrize("entered", ["NaN", "Infinity", "-Infinity", "1e999", "[" * 100_000])
def test_what_is_no_json_goes_to_the_server_as_it_was_typed(entered: str) -> None:
    field = Field(Kit(), Argument("x", "json"))
    field.control.value = entered
    assert field.given == {"x": entered}


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("string", "0123"),
        ("string", ""),
        ("text", "two\nlines"),
        ("integer", 512),
        ("number", 0.1),
        ("number", 1),
        ("mixed", "auto"),
        ("mixed", "512"),
        ("mixed", 512),
        ("json", "END"),
        ("json", "1"),
        ("json", ["a", "é"]),
        ("json", {"a": {"b": [1.0]}}),
        ("boolean", False),
        ("choice", "b"),
        ("choice", "of a newer server"),
        ("integer", None),
    ],
)
def test_a_value_that_is_shown_comes_back_as_it_was(kind: str, value: Any) -> None:
    changes: list[None] = []
    argument = Argument("x", kind, choices=("a", "b") if kind == "choice" else ())
    field = Field(Kit(), argument, lambda: changes.append(None))
    field.put(value)
    assert field.given == {"x": value}
    assert type(field.given["x"]) is type(value)
    assert not field.touched
    # What is typed anew by hand means the same.
    if isinstance(field.control.value, str) and kind not in ("choice", "boolean") and value not in ("", None):
        assert _parse(argument, field.control.value) == value
    field.clear()
    assert field.given == {}
    assert not field.touched


def test_a_field_that_is_emptied_gives_nothing_of_what_it_showed() -> None:
    changes: list[bool] = []
    field = Field(Kit(), Argument("x", "integer"), lambda: changes.append(field.touched))
    field.put(5)
    changes.clear()
    field.control.value = ""
    assert (field.given, field.is_set, field.touched) == ({}, False, True)
    assert changes == [True]


def test_a_complaint_is_shown_and_taken_back() -> None:
    field = Field(Kit(), Argument("x", "string"))
    field.complain("<b>wrong</b>")
    assert "&lt;b&gt;wrong" in field._error.value
    assert "llmkit-wrong" in field.control._dom_classes
    field.complain()
    assert field._error.value == ""
    assert "llmkit-wrong" not in field.control._dom_classes


class Page:
    """Stands for the page: keeps what is typed, as the JavaScript of a key field does."""

    def __init__(self, field: KeyField) -> None:
        self.typed = ""
        self.sent: list[Any] = []
        self._field = field
        field.send = self.receive

    def type(self, text: str) -> None:
        self.typed = text
        self._field._receive(None, {"type": "typed", "any": bool(text)}, None)

    def receive(self, message: dict[str, Any]) -> None:
        self.sent.append(message)
        if message["type"] == "forget":
            self.typed = ""
        else:
            answer = {"type": "key", "request": message["request"], "value": self.typed}
            self._field._receive(None, answer, None)


def test_a_key_stays_in_the_page_until_it_is_forgotten_and_is_in_no_state() -> None:
    field = Kit().make(KeyField, "api_key", "a key")
    page = Page(field)
    told: list[bool] = []
    field.on_typed = lambda: told.append(field.is_typed)
    page.type("sk-canary")
    got: list[str] = []
    field.collect(got.append, pytest.fail)
    field.collect(got.append, pytest.fail)  # after a refusal nobody has to type it again
    field.forget()
    field.collect(got.append, pytest.fail)
    assert got == ["sk-canary", "sk-canary", ""]
    assert told == [True]
    assert field.is_typed is False
    assert "canary" not in json.dumps(field.get_state(), default=str)
    assert "canary" not in json.dumps(w.Widget.get_manager_state(), default=str)
    assert "canary" not in json.dumps(page.sent)
    assert not any("canary" in repr(value) for value in vars(field).values())


MARK = {"secret": True, "set_at": "2026-01-01T00:00:00+00:00"}


@pytest.mark.parametrize(("stored", "said"), [(MARK, "a key is stored"), ("env:A_TOKEN", "env:A_TOKEN")])
def test_a_stored_key_is_kept_until_another_is_typed_or_it_is_removed(stored: Any, said: str) -> None:
    changes: list[bool] = []
    field = Field(Kit(), Argument("api_key", "secret"), lambda: changes.append(field.touched))
    assert isinstance(field.control, KeyField)
    assert field.forget is not None
    page = Page(field.control)
    assert (field.given, field.is_set) == ({}, False)
    field.put(stored)
    assert field.control.placeholder == f"{said}; type to replace it"
    assert (field.given, field.is_set) == ({"api_key": stored}, True)
    page.type("sk-canary")
    assert (field.given, field.is_set, changes) == ({}, True, [True])
    field.refresh()
    assert "llmkit-hidden" in field.forget._dom_classes
    page.type("")
    assert field.given == {"api_key": stored}
    field.refresh()
    assert "llmkit-hidden" not in field.forget._dom_classes
    field.forget.click()
    field.refresh()
    assert (field.given, field.is_set) == ({}, False)
    assert "llmkit-hidden" in field.forget._dom_classes
    assert "stored" not in field.control.placeholder
    page.type("sk-canary")
    field.clear()
    assert (page.typed, field.is_set, field.touched) == ("", False, False)


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
