from __future__ import annotations

import math
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from vllm_arguments import EVERY_ARGUMENT, parse_really

from llmkit.engines.base import sort_kwargs
from llmkit.engines.vllm.arguments import NO_FLAGS, VLLMArguments, to_flags
from llmkit.engines.vllm.engine import VLLMEngineType
from llmkit.errors import DoesNotFit

REFUSED = (
    "worker_cls",
    "worker_extension_cls",
    "logits_processors",
    "scheduler_cls",
    "middleware",
    "config",
    "chat_template",
    "hf_overrides",
    "hf_config_path",
    "hf_token",
    "download_dir",
    "tool_parser_plugin",
    "reasoning_parser_plugin",
    "allowed_local_media_path",
    "model_loader_extra_config",
    "speculative_config",
    "kv_transfer_config",
    "log_config_file",
    "api_key",
    "host",
    "port",
    "uds",
    "served_model_name",
    "max-model-len",
    "max_model_len.x",
    "--config",
)


def test_every_argument_has_a_description_and_a_group_for_the_form() -> None:
    properties = VLLMArguments.model_json_schema()["properties"]
    for name, schema in properties.items():
        assert schema["description"].endswith("."), name
        assert schema["group"] in ("essential", "memory", "parallelism", "other"), name
    assert set(properties) - NO_FLAGS == set(EVERY_ARGUMENT)


def test_each_argument_becomes_one_word() -> None:
    flags = to_flags(VLLMArguments(**EVERY_ARGUMENT))
    assert len(flags) == len(EVERY_ARGUMENT)
    assert "--max-model-len=128" in flags
    assert "--enforce-eager" in flags
    assert "--no-enable-prefix-caching" in flags
    assert '--default-chat-template-kwargs={"enable_thinking": false}' in flags
    assert to_flags(VLLMArguments(max_model_len="auto")) == ["--max-model-len=auto"]


def test_what_llmkit_acts_on_itself_and_what_is_null_becomes_no_flag() -> None:
    assert to_flags(VLLMArguments(api="chat", offline=True, dtype=None)) == []


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_run_code_or_read_files_cannot_be_asked_for(name: str) -> None:
    with pytest.raises(DoesNotFit) as caught:
        sort_kwargs(VLLMEngineType(), {name: "x"})
    assert caught.value.details["fields"][0]["path"] == f"model_kwargs.{name}"


@pytest.mark.parametrize(
    "wrong",
    [
        {"gpu_memory_utilization": math.nan},
        {"gpu_memory_utilization": math.inf},
        {"gpu_memory_utilization": 1.1},
        {"gpu_memory_utilization": True},
        {"cpu_offload_gb": -1},
        {"max_model_len": 0},
        {"max_model_len": 128.5},
        {"max_model_len": "128"},
        {"max_num_seqs": True},
        {"enforce_eager": "yes"},
        {"dtype": "int3"},
        {"tokenizer": "a\nb"},
        {"tokenizer": ""},
        {"quantization": "../../x"},
        {"generation_config": "/etc"},
        {"load_format": "tensorizer"},
        {"limit_mm_per_prompt": {"smell": 1}},
        {"default_chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
        {"default_chat_template_kwargs": {"a": {"nested": 1}}},
    ],
)
def test_wrong_values_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        VLLMArguments.model_validate(wrong)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the first value takes a second
@given(
    st.dictionaries(st.sampled_from(sorted(EVERY_ARGUMENT)), st.text() | st.integers() | st.booleans() | st.floats())
)
def test_no_accepted_value_can_become_a_flag_of_its_own(arguments: dict[str, Any]) -> None:
    try:
        accepted = VLLMArguments.model_validate(arguments)
    except ValidationError:
        return
    for flag in to_flags(accepted):
        name = flag.split("=", 1)[0].removeprefix("--").removeprefix("no-").replace("-", "_")
        assert name in arguments
        assert "\0" not in flag
        assert "\n" not in flag


@pytest.mark.vllm
def test_the_installed_vllm_has_every_option_and_takes_its_value() -> None:
    flags = to_flags(VLLMArguments(**EVERY_ARGUMENT))
    (parsed,) = parse_really([[*flags, "--max-model-len=auto"]])
    expected = {**EVERY_ARGUMENT, "max_model_len": -1}
    assert {name: parsed[name] for name in expected} == {name: repr(value) for name, value in expected.items()}


def test_choices_that_are_offered_are_written_as_they_are() -> None:
    for choice in get_args(get_args(VLLMArguments.model_fields["load_format"].annotation)[0]):
        assert to_flags(VLLMArguments(load_format=choice)) == [f"--load-format={choice}"]
