"""What a load will take, by the files of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit.demo import demo_model_path
from llmkit.engines.vllm.arguments import VLLMArguments
from llmkit.engines.vllm.estimate import OVERHEAD_CPU_BYTES, OVERHEAD_GPU_BYTES, estimate, find_model, hub_cache

MIB = 1 << 20
LLAMA = {
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_size": 512,
    "max_position_embeddings": 1000,
    "dtype": "bfloat16",
}


def make(folder: Path, config: Any = None, **sizes: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA if config is None else config))
    for name, size in (sizes or {"model": 10}).items():
        with (folder / f"{name}.safetensors").open("wb") as file:
            file.truncate(size * MIB)
    return folder


def cache_of(folder: Path, config: dict[str, Any] | None = None, **arguments: Any) -> int | None:
    return estimate(make(folder, config), VLLMArguments(**arguments), gpu=False).kv_cache_bytes


def test_the_demo_model_is_weights_cache_and_overhead() -> None:
    told = estimate(demo_model_path(), VLLMArguments(kv_cache_memory_bytes=128 * MIB), gpu=False)
    assert told.weights_bytes == (demo_model_path() / "model.safetensors").stat().st_size
    assert told.kv_cache_bytes == 128 * MIB
    assert told.total_bytes == told.weights_bytes + 128 * MIB + OVERHEAD_CPU_BYTES
    assert (told.device, told.device_count, told.elastic, told.measured) == ("cpu", 1, False, False)


def test_the_cache_holds_one_request_of_the_whole_context(tmp_path: Path) -> None:
    one_token = 2 * 4 * 2 * 64 * 2  # keys and values, layers, their heads, the size of a head, bytes
    assert cache_of(tmp_path) == one_token * 1000
    assert cache_of(tmp_path, max_model_len=100) == one_token * 100
    assert cache_of(tmp_path, kv_cache_dtype="fp8") == one_token * 500
    assert cache_of(tmp_path, dtype="float32") == one_token * 2000
    assert cache_of(tmp_path, {**LLAMA, "head_dim": 128}) == one_token * 2000
    no_groups = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
    assert cache_of(tmp_path, no_groups) == one_token * 4000
    assert cache_of(tmp_path, {"text_config": LLAMA, "vision_config": {"hidden_size": 7}}) == one_token * 1000
    assert cache_of(tmp_path, {**LLAMA, "max_position_embeddings": 10_000_000}) == one_token * 131_072


@pytest.mark.parametrize("config", [{}, {"num_hidden_layers": 4}, {**LLAMA, "kv_lora_rank": 512}])
def test_an_architecture_that_is_not_understood_is_not_guessed(tmp_path: Path, config: dict[str, Any]) -> None:
    told = estimate(make(tmp_path, config), VLLMArguments(), gpu=False)
    assert (told.kv_cache_bytes, told.total_bytes) == (None, None)
    assert told.weights_bytes == 10 * MIB
    assert "KV cache is not known" in (told.reason or "")


def test_weights_in_parts_count_once(tmp_path: Path) -> None:
    parts = {"model-00001-of-00002": 10, "model-00002-of-00002": 5, "consolidated": 15}
    assert estimate(make(tmp_path, **parts), VLLMArguments(), gpu=False).weights_bytes == 15 * MIB


def test_another_dtype_makes_weights_larger_but_not_those_that_are_quantized(tmp_path: Path) -> None:
    wider = VLLMArguments(dtype="float32")
    assert estimate(make(tmp_path), wider, gpu=False).weights_bytes == 20 * MIB
    quantized = {**LLAMA, "quantization_config": {"quant_method": "awq"}}
    assert estimate(make(tmp_path, quantized), wider, gpu=False).weights_bytes == 10 * MIB


def test_a_folder_without_weights_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    told = estimate(tmp_path, VLLMArguments(), gpu=False)
    assert told.total_bytes is None
    assert "weights" in (told.reason or "")


@pytest.mark.parametrize(
    ("arguments", "elastic"),
    [({}, True), ({"gpu_memory_utilization": 0.5}, False), ({"kv_cache_memory_bytes": MIB}, False)],
)
def test_on_a_gpu_who_says_no_size_takes_what_is_free(tmp_path: Path, arguments: Any, elastic: bool) -> None:
    told = estimate(make(tmp_path), VLLMArguments(**arguments), gpu=True)
    assert (told.device, told.elastic) == ("gpu", elastic)
    assert told.total_bytes == (told.weights_bytes or 0) + (told.kv_cache_bytes or 0) + OVERHEAD_GPU_BYTES


def test_every_gpu_has_its_overhead_and_every_replica_its_weights(tmp_path: Path) -> None:
    arguments = VLLMArguments(tensor_parallel_size=2, data_parallel_size=2)
    told = estimate(make(tmp_path), arguments, gpu=True)
    assert (told.device_count, told.overhead_bytes) == (4, 4 * OVERHEAD_GPU_BYTES)
    assert told.weights_bytes == 20 * MIB


def test_a_model_that_is_not_here_still_says_how_many_gpus_it_takes() -> None:
    told = estimate(None, VLLMArguments(tensor_parallel_size=2), gpu=True)
    assert (told.device_count, told.elastic, told.total_bytes) == (2, True, None)
    assert "not on this machine" in (told.reason or "")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*LLAMA, "text_config"]), inner),
    max_leaves=8,
)


@given(JSON)
def test_no_config_whatever_is_in_it_is_an_error(tmp_path_factory: pytest.TempPathFactory, config: Any) -> None:
    folder = tmp_path_factory.getbasetemp() / "any"
    estimate(make(folder, config), VLLMArguments(), gpu=False)
    (folder / "config.json").write_text('{"num_hidden_layers": ' + "[" * 3000)
    assert estimate(folder, VLLMArguments(), gpu=False).total_bytes is None


def test_a_model_is_found_where_the_hub_keeps_it(tmp_path: Path) -> None:
    environ = {"HF_HOME": str(tmp_path)}
    snapshot = make(tmp_path / "hub" / "models--some--model" / "snapshots" / "abc")
    assert find_model("some/model", None, environ) is None
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    assert find_model("some/model", None, environ) == snapshot
    assert find_model("some/model", "abc", environ) == snapshot
    assert find_model("some/model", "v2", environ) is None
    assert find_model("some/model", "../../abc", environ) is None
    assert find_model(str(snapshot), None, {}) == snapshot


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"HF_HUB_CACHE": "/a"}, "/a"),
        ({"HF_HOME": "/b"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({"HOME": "/d"}, "/d/.cache/huggingface/hub"),
    ],
)
def test_the_cache_is_where_its_variables_say(environ: dict[str, str], folder: str) -> None:
    assert hub_cache(environ) == Path(folder)
