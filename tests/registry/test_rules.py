"""What the operator allows of configurations."""

from __future__ import annotations

from typing import Any

import pytest

from llmkit.engines.base import EngineType, sort_kwargs
from llmkit.engines.openai import OpenAIEngineType
from llmkit.engines.vllm.engine import VLLMEngineType
from llmkit.errors import RefusedByOperator
from llmkit.registry.rules import Rules, check_pattern, is_below
from llmkit.schemas import Configuration


@pytest.mark.parametrize(
    ("url", "pattern", "allowed"),
    [
        ("https://api.openai.com/v1", "https://api.openai.com", True),
        ("https://api.openai.com/v1", "https://api.openai.com/", True),
        ("https://api.openai.com/v1", "https://api.openai.com/v1", True),
        ("https://api.openai.com/v1/", "https://api.openai.com/v1", True),
        ("https://API.openai.com:443/v1", "https://api.openai.com/v1", True),
        ("https://api.openai.com./v1", "https://api.openai.com/v1", True),
        ("http://[::1]:8000/v1", "http://[::1]:8000", True),
        ("https://eu.example.com/v1", "https://*.example.com", True),
        ("https://a.b.example.com/v1", "https://*.example.com/v1", True),
        ("http://api.openai.com/v1", "https://api.openai.com", False),
        ("https://api.openai.com:444/v1", "https://api.openai.com", False),
        ("https://api.openai.com/v2", "https://api.openai.com/v1", False),
        ("https://api.openai.com/v11", "https://api.openai.com/v1", False),
        ("https://api.openai.com/v1/../admin", "https://api.openai.com/v1", False),
        ("https://api.openai.com/v1/%2e%2E/admin", "https://api.openai.com/v1", False),
        ("https://api.openai.com/v1/..%2fadmin", "https://api.openai.com/v1", False),
        ("https://api.openai.com/v1/.%5c..", "https://api.openai.com/v1", False),
        ("https://api.openai.com.evil.com/v1", "https://api.openai.com", False),
        ("https://api.openai.com@evil.com/v1", "https://api.openai.com", False),
        ("https://evil.com/https://api.openai.com", "https://api.openai.com", False),
        ("https://evil.com/.example.com", "https://*.example.com", False),
        ("https://example.com/v1", "https://*.example.com", False),
        ("https://badexample.com/v1", "https://*.example.com", False),
        ("https://example.com.evil.com/v1", "https://*.example.com", False),
        ("ftp://api.openai.com/v1", "https://api.openai.com", False),
        ("", "https://api.openai.com", False),
    ],
)
def test_an_address_is_allowed_or_not(url: str, pattern: str, allowed: bool) -> None:
    check_pattern(pattern)
    assert is_below(url, pattern) is allowed


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "*",
        "api.openai.com",
        "https://",
        "https://*",
        "https://a.*.com",
        "https://*evil.com",
        "https://a.com/*",
        "https://user@a.com",
        "https://*.*.com",
        "https://a.com?x",
    ],
)
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"must|has no|is no|stands"):
        check_pattern(pattern)


def check(rules: Rules, engine_type: EngineType, **fields: Any) -> None:
    base = {"config_id": "c", "model_id": "m", "model_name": "org/model", "model_type": engine_type.name}
    configuration = Configuration.model_validate({**base, **fields})
    rules.check(configuration, engine_type, sort_kwargs(engine_type, configuration.model_kwargs))


VLLM, OPENAI = VLLMEngineType(), OpenAIEngineType({"OPENAI_BASE_URL": "https://default.example.com/v1"})


@pytest.mark.parametrize(
    ("rules", "engine_type", "fields", "param"),
    [
        (Rules(), VLLM, {"model_kwargs": {"trust_remote_code": True}}, "model_kwargs.trust_remote_code"),
        (Rules(), VLLM, {"model_kwargs": {"engine": {"trust_remote_code": True}}}, "model_kwargs.trust_remote_code"),
        (Rules(allowed_model_names=["org/other*"]), VLLM, {}, "model_name"),
        (Rules(allowed_model_names=["ORG/*"]), VLLM, {}, "model_name"),
        (Rules(allowed_model_names=["/models/*"]), VLLM, {"model_name": "/models/../etc"}, "model_name"),
        (Rules(allowed_model_names=["org/*"]), VLLM, {"model_kwargs": {"tokenizer": "x/y"}}, "model_kwargs.tokenizer"),
        (Rules(allowed_model_names=["gpt-*"]), OPENAI, {}, "model_name"),
        (Rules(allowed_base_urls=["https://api.openai.com"]), OPENAI, {}, "model_kwargs.base_url"),
        (
            Rules(allowed_base_urls=["https://default.example.com"]),
            OPENAI,
            {"model_kwargs": {"engine": {"base_url": "http://169.254.169.254/v1"}}},
            "model_kwargs.base_url",
        ),
    ],
)
def test_what_is_not_allowed_is_named(
    rules: Rules, engine_type: EngineType, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(RefusedByOperator) as caught:
        check(rules, engine_type, **fields)
    assert caught.value.param == param
    assert caught.value.status == 403
    check(rules, engine_type, **fields, declared=True)  # the operator's own word


def test_what_is_allowed_passes() -> None:
    check(Rules(), VLLM, model_kwargs={"trust_remote_code": False})
    check(Rules(allow_trust_remote_code=True), VLLM, model_kwargs={"trust_remote_code": True})
    check(Rules(allowed_model_names=["gpt-*", "org/*"]), VLLM, model_kwargs={"tokenizer": "org/tokenizer"})
    check(Rules(allowed_base_urls=["https://*.example.com"]), OPENAI)
    check(Rules(allowed_base_urls=["https://*.example.com"]), VLLM)  # which is reached by no address


@pytest.mark.parametrize(
    "name", ["/home/sam/model", "~sam/model", "../sam/model", "./model", "a/../../sam", "a/b/c", "."]
)
def test_who_does_not_administer_names_no_files_of_the_server(name: str) -> None:
    for fields in ({"model_name": name}, {"model_kwargs": {"tokenizer": name}}):
        with pytest.raises(RefusedByOperator, match="no files of its machine"):
            check_person(Rules(), VLLM, **fields)
        check_person(Rules(allowed_model_names=["/models/*"]), VLLM, **fields)  # `check` asks those
    check_person(Rules(), VLLM, model_name="Qwen/Qwen3-0.6B", model_kwargs={"tokenizer": "gpt2"})


def test_who_does_not_administer_names_no_address() -> None:
    with pytest.raises(RefusedByOperator, match="no remote endpoints"):
        check_person(Rules(), OPENAI)
    check_person(Rules(allowed_base_urls=["https://default.example.com"]), OPENAI)


def check_person(rules: Rules, engine_type: EngineType, **fields: Any) -> None:
    base = {"config_id": "c", "model_id": "m", "model_name": "org/model", "model_type": engine_type.name}
    configuration = Configuration.model_validate({**base, **fields})
    rules.check_person(configuration, engine_type, sort_kwargs(engine_type, configuration.model_kwargs))
