from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit.engines.addresses import origin_of
from llmkit.engines.base import load_engine_types, sort_kwargs
from llmkit.engines.openai import OpenAIEngineType
from llmkit.engines.refusals import redact
from llmkit.errors import DoesNotFit
from llmkit.schemas import GenerationParameters

OPENAI = OpenAIEngineType({})
NAMES = st.sampled_from([*GenerationParameters.model_fields, *OPENAI.arguments.model_fields, "engine", "generation"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(NAMES | st.text(max_size=20), VALUES, max_size=6))
def test_whatever_is_given_is_sorted_without_loss_or_named(given_kwargs: dict[str, Any]) -> None:
    try:
        kwargs = sort_kwargs(OPENAI, given_kwargs)
    except DoesNotFit as error:
        fields = error.details["fields"]
        assert fields
        assert all(field["path"].startswith("model_kwargs") and field["message"] for field in fields)
        return
    assert set(kwargs.generation) <= set(GenerationParameters.model_fields)
    assert set(kwargs.engine) <= set(OPENAI.arguments.model_fields)
    flat = {k: v for k, v in given_kwargs.items() if k not in ("engine", "generation")}
    assert {**kwargs.engine, **kwargs.generation} == {
        **flat,
        **given_kwargs.get("engine", {}),
        **given_kwargs.get("generation", {}),
    }
    nested = {"engine": kwargs.engine, "generation": kwargs.generation}
    assert sort_kwargs(OPENAI, nested) == kwargs


def test_flat_keys_are_sorted_by_one_table_and_nested_ones_stay() -> None:
    kwargs = sort_kwargs(
        OPENAI, {"temperature": 0.5, "api": "chat", "generation": {"seed": 1}, "engine": {"timeout": 3}}
    )
    assert kwargs.engine == {"api": "chat", "timeout": 3}
    assert kwargs.generation == {"temperature": 0.5, "seed": 1}


@pytest.mark.parametrize(
    ("kwargs", "path", "words"),
    [
        ({"tempratur": 1}, "model_kwargs.tempratur", "did you mean `temperature`"),
        ({"engine": {"temperature": 1}}, "model_kwargs.engine.temperature", "did you mean `temperature`"),
        ({"engine": []}, "model_kwargs.engine", "must be an object"),
        ({"max_tokens": 1.5}, "model_kwargs.max_tokens", "integer"),
        ({"max_tokens": True}, "model_kwargs.max_tokens", "integer"),
        ({"api": "telnet"}, "model_kwargs.api", "'chat'"),
        ({"stop": [1]}, "model_kwargs.stop", "string"),
        ({"temperature": 1, "generation": {"temperature": 1}}, "model_kwargs.generation.temperature", "given twice"),
    ],
)
def test_what_does_not_fit_is_named_with_its_path(kwargs: dict[str, Any], path: str, words: str) -> None:
    with pytest.raises(DoesNotFit) as caught:
        sort_kwargs(OPENAI, kwargs)
    fields = caught.value.details["fields"]
    assert path in [field["path"].removesuffix(".str").split(".list")[0].removesuffix(".0") for field in fields]
    assert words in caught.value.message


def test_values_are_never_repeated_in_errors() -> None:
    with pytest.raises(DoesNotFit) as caught:
        sort_kwargs(OPENAI, {"temperature": "sk-secret", "stop": {"sk-secret": 1}})
    assert "sk-secret" not in str(caught.value.to_wire())


def test_both_model_types_are_installed() -> None:
    import logging

    types = load_engine_types(logging.getLogger("test"))
    assert {"openai", "vllm"} <= set(types)
    for name, engine_type in types.items():
        assert engine_type.name == name
        properties = engine_type.arguments.model_json_schema()["properties"]
        assert all(p["group"] in ("essential", "memory", "parallelism", "other") for p in properties.values())
        assert all(p["description"] for p in properties.values())


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://api.openai.com/v1", "https://api.openai.com:443"),
        ("HTTP://LocalHost/v1", "http://localhost:80"),
        ("http://[::1]:8000/v1", "http://[::1]:8000"),
    ],
)
def test_an_origin_is_scheme_host_and_port(url: str, origin: str) -> None:
    assert origin_of(url) == origin


@pytest.mark.parametrize("url", ["ftp://x", "http://", "x", "http://u:p@x", "http://x:99999", "http://[::1", "//x"])
def test_what_cannot_be_called_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        origin_of(url)


def test_a_key_and_its_ends_are_blanked() -> None:
    key = "sk-abcdefghijklmnop-1234567890"
    for said in (key, f"Incorrect key: {key[:8]}*****", f"...{key[-8:]}", f'"{key}"', key[:12] + "..." + key[-10:]):
        blanked = redact(said, key)
        assert key[:8] not in blanked
        assert key[-8:] not in blanked
        assert "[key]" in blanked
    assert redact("nothing of it", key) == "nothing of it"
    assert redact("nothing", None) == "nothing"
