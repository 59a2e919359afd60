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


def architectures_of(model: Path) -> list[str]:
    """Read which classes a model in a local folder needs; none if there is no such folder."""
    try:
        told = json.loads((model / "config.json").read_text())["architectures"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    # They become arguments of a program, which cannot be just any text.
    return [name for name in told if isinstance(name, str) and name.isidentifier()] if isinstance(told, list) else []


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


def estimate(model_path: Path | None, arguments: VLLMArguments, *, gpu: bool) -> MemoryEstimate:
    """Estimate weights, KV cache and overhead.

    Parameters
    ----------
    model_path
        The folder of the model; None if it is not on this machine yet.
    arguments
        Of its engine.
    gpu
        Whether it runs on GPUs. One that is told no size takes what it finds free there: what is estimated then is
        the least with which it can answer, a KV cache for one request.
    """
    replicas = arguments.data_parallel_size or 1
    devices = (arguments.tensor_parallel_size or 1) * (arguments.pipeline_parallel_size or 1) * replicas
    sized = arguments.gpu_memory_utilization is not None or arguments.kv_cache_memory_bytes is not None
    overhead = (OVERHEAD_GPU_BYTES if gpu else OVERHEAD_CPU_BYTES) * devices
    known: dict[str, Any] = {"device": "gpu" if gpu else "cpu", "device_count": devices, "elastic": gpu and not sized}
    if model_path is None:
        return MemoryEstimate(**known, reason="the model is not on this machine yet")
    known["overhead_bytes"] = overhead
    config = _config(model_path)
    weights = _weights(model_path, config, arguments)
    cache = _kv_cache(config, arguments, devices)
    if weights is None:
        return MemoryEstimate(**known, kv_cache_bytes=cache, reason="the size of the weights is not known")
    weights *= replicas
    if cache is None:
        reason = "the size of the KV cache is not known: config.json does not say enough"
        return MemoryEstimate(**known, weights_bytes=weights, reason=reason)
    return MemoryEstimate(**known, weights_bytes=weights, kv_cache_bytes=cache, total_bytes=weights + cache + overhead)


def _config(model_path: Path) -> dict[str, Any]:
    try:
        config = json.loads((model_path / "config.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(config, dict):
        return {}
    text = config.get("text_config")  # of a model that takes images, too
    return {**config, **text} if isinstance(text, dict) else config


def takes_images(model_path: Path) -> bool | None:
    """Say whether a model was trained on images, too; None if its configuration cannot be read."""
    config = _config(model_path)
    return "vision_config" in config if config else None


def _weights(model_path: Path, config: Mapping[str, Any], arguments: VLLMArguments) -> int | None:
    for pattern in ("*.safetensors", "*.bin", "*.pt"):
        try:
            # The same weights once more, as Mistral's own programs read them.
            files = [path for path in model_path.glob(pattern) if not path.name.startswith("consolidated")]
            sizes = [path.stat().st_size for path in files]
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
    except (KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError):
        return None
    if min(layers, kv_heads, size, tokens) < 1 or "kv_lora_rank" in config:  # a latent cache has another shape
        return None
    if str(arguments.kv_cache_dtype).startswith("fp8"):
        each = 1
    else:
        dtype = arguments.dtype if arguments.dtype not in (None, "auto") else config.get("dtype")
        each = _BYTES.get(str(dtype or config.get("torch_dtype")), 2)
    return 2 * layers * kv_heads * size * each * tokens * (arguments.data_parallel_size or 1)
