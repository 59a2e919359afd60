"""What a load will take, by the files of the model. Reads them: blocks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from llmkit.engines.vllm.arguments import VLLMArguments
from llmkit.schemas import MemoryEstimate

OVERHEAD_CPU_BYTES: Final = 1200 << 20
"""Three processes with vLLM and PyTorch, measured with the demo model."""
OVERHEAD_GPU_BYTES: Final = 1536 << 20
"""Context, kernels and activations of one GPU."""
LONGEST_CONTEXT: Final = 131_072
_BYTES: Final = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2, "float64": 8, "fp8": 1}


def find_model(model_name: str, revision: str | None, environ: Mapping[str, str]) -> Path | None:
    """Give the folder of a model that is on this machine already, itself or in the cache of its hub, or None."""
    here = Path(model_name).expanduser()
    if here.is_dir():
        return here
    repository = hub_cache(environ) / f"models--{model_name.replace('/', '--')}"
    wanted = revision or "main"
    try:
        commit = (repository / "refs" / wanted).read_text().strip()
    except OSError:
        commit = wanted
    folder = repository / "snapshots" / commit
    return folder if "/" not in commit and folder.is_dir() else None


def hub_cache(environ: Mapping[str, str]) -> Path:
    """Give the folder that Hugging Face's library caches models in, by its documented variables."""
    if cache := environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(cache).expanduser()
    home = environ.get("HF_HOME")
    if not home:
        base = environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME") or "~") / ".cache"
        home = str(Path(base) / "huggingface")
    return Path(home).expanduser() / "hub"


def estimate(model_path: Path, arguments: VLLMArguments, *, gpu: bool) -> MemoryEstimate:
    """Estimate weights, KV cache and overhead.

    Parameters
    ----------
    model_path
        The folder of the model.
    arguments
        Of its engine.
    gpu
        Whether it runs on GPUs.
    """
    parallel = (arguments.tensor_parallel_size or 1) * (arguments.pipeline_parallel_size or 1)
    devices = parallel * (arguments.data_parallel_size or 1)
    overhead = (OVERHEAD_GPU_BYTES if gpu else OVERHEAD_CPU_BYTES) * devices
    known: dict[str, Any] = {"device": "gpu" if gpu else "cpu", "device_count": devices, "overhead_bytes": overhead}
    try:
        config = json.loads((model_path / "config.json").read_text())
    except (OSError, ValueError):
        config = {}
    config = config if isinstance(config, dict) else {}
    config = {**config, **(config.get("text_config") or {})}
    weights = _weights(model_path, config, arguments)
    cache = _kv_cache(config, arguments, devices)
    if weights is None:
        return MemoryEstimate(**known, kv_cache_bytes=cache, reason="the size of the weights is not known")
    weights *= arguments.data_parallel_size or 1
    if cache is None:
        reason = "the size of the KV cache is not known: config.json does not say enough"
        return MemoryEstimate(**known, weights_bytes=weights, reason=reason)
    return MemoryEstimate(**known, weights_bytes=weights, kv_cache_bytes=cache, total_bytes=weights + cache + overhead)


def _weights(model_path: Path, config: Mapping[str, Any], arguments: VLLMArguments) -> int | None:
    for pattern in ("*.safetensors", "*.bin", "*.pt"):
        try:
            sizes = [path.stat().st_size for path in model_path.glob(pattern)]
        except OSError:
            return None
        if sizes:
            break
    else:
        return None
    stored = _BYTES.get(str(config.get("dtype") or config.get("torch_dtype")))
    wanted = _BYTES.get(str(arguments.dtype))
    if stored and wanted and not config.get("quantization_config") and not arguments.quantization:
        return sum(sizes) * wanted // stored
    return sum(sizes)


def _kv_cache(config: Mapping[str, Any], arguments: VLLMArguments, devices: int) -> int | None:
    if arguments.kv_cache_memory_bytes is not None:
        return arguments.kv_cache_memory_bytes * devices
    try:
        layers, heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
        kv_heads = int(config.get("num_key_value_heads") or heads)
        size = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
        given = arguments.max_model_len
        tokens = given if isinstance(given, int) else min(int(config["max_position_embeddings"]), LONGEST_CONTEXT)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    if str(arguments.kv_cache_dtype).startswith("fp8"):
        each = 1
    else:
        dtype = arguments.dtype if arguments.dtype not in (None, "auto") else config.get("dtype")
        each = _BYTES.get(str(dtype or config.get("torch_dtype")), 2)
    return 2 * layers * kv_heads * size * each * tokens * (arguments.data_parallel_size or 1)
