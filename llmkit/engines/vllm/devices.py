"""Whether this machine has the devices that a model is to be spread over, and which processors each worker gets."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Final

from llmkit.engines.vllm.arguments import VLLMArguments
from llmkit.errors import LLMKitError, NoRoom

_SIZES: Final = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")


def device_count(arguments: VLLMArguments) -> int:
    """Give how many devices a model takes: GPUs, or on the CPU workers with processors of their own."""
    count = 1
    for name in _SIZES:
        count *= getattr(arguments, name) or 1
    return count


def processors() -> list[int]:
    """Give the processors that this server may use."""
    if sys.platform == "linux":
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def too_few_devices(arguments: VLLMArguments, environ: Mapping[str, str], *, gpu: bool) -> LLMKitError | None:
    """Say that a model is to be spread over more processors than there are, or None.

    Who sets ``VLLM_CPU_OMP_THREADS_BIND`` in the server's environment shares them out, also more than once.

    GPUs are counted where they are set aside (`llmkit.process.placement`), which says who holds them, too.
    """
    count, there = device_count(arguments), len(processors())
    if gpu or count <= max(there, 1) or "VLLM_CPU_OMP_THREADS_BIND" in environ:
        return None
    asked = " x ".join(f"{name} {value}" for name in _SIZES if (value := getattr(arguments, name) or 1) > 1)
    return NoRoom(
        f"{asked} takes {count} devices. Without a GPU each is a processor of its own; this server may use {there}.",
        param="model_kwargs." + next(name for name in _SIZES if (getattr(arguments, name) or 1) > 1),
        hint=f"Ask for {there} at most, or load the model where there are GPUs.",
    )


def processors_of(arguments: VLLMArguments) -> str | None:
    """Share out the processors among the workers of a model, as ``VLLM_CPU_OMP_THREADS_BIND`` wants it.

    Of itself vLLM gives each worker a NUMA node of its own, and stops where there are fewer of them.

    Returns
    -------
    str or None
        For example ``"0,1|2,3"``; None for a single worker, which vLLM gives all.
    """
    count, there = device_count(arguments), processors()
    if count < 2 or count > len(there):
        return None
    each = len(there) // count
    return "|".join(",".join(map(str, there[i * each : (i + 1) * each])) for i in range(count))
