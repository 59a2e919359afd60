"""Engine arguments of a ``vllm`` model, and the flags of ``vllm serve`` that they become.

The list is chosen, not derived: vLLM has some 300 options, and among them are ways to run code, to read and
write files, and to open ports. What is not here cannot be asked for.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, Field, JsonValue, StringConstraints, model_validator

from llmkit.schemas import Strict

MAX_TOKENS: Final = 100_000_000
MAX_BYTES: Final = 1 << 48
MAX_GIB: Final = MAX_BYTES >> 30


def _no_template(values: dict[str, Any]) -> dict[str, Any]:
    if "chat_template" in values:
        raise ValueError("a chat template cannot be given, only the values that it uses")
    return values


def _option(group: Literal["essential", "memory", "parallelism", "other"], description: str, **bounds: Any) -> Any:
    return Field(None, description=description, json_schema_extra={"group": group}, **bounds)


Reference = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f\u0085\u2028\u2029]{1,1024}$")]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
Length = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
Gibibytes = Annotated[float, Field(ge=0, le=MAX_GIB, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
TemplateValues = Annotated[dict[Name, bool | int | str], AfterValidator(_no_template), Field(max_length=64)]
Resource = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_.:-]{0,63}$")]
Amount = Annotated[float, Field(ge=0, le=MAX_BYTES, allow_inf_nan=False)]
MediaLimits = dict[Literal["image", "video", "audio"], Annotated[int, Field(ge=0, le=10_000)]]


class Replicas(Strict):
    """How many copies of a model a cluster runs: between the two numbers, by how much is asked of it."""

    min: int = Field(1, ge=0, le=1000)
    max: int | None = Field(None, ge=1, le=1000)

    @model_validator(mode="after")
    def _is_in_order(self) -> Self:
        if self.max is not None and self.max < self.min:
            raise ValueError("max must not be less than min")
        return self

    @property
    def most(self) -> int:
        """The greater number, also where only the other was given."""
        return self.max or max(self.min, 1)


class RayPlacement(Strict):
    """A place on the Ray cluster that the operator has named."""

    replicas: Replicas = Replicas()
    resources: Annotated[dict[Resource, Amount], Field(min_length=1, max_length=16)] = Field(
        default_factory=lambda: {"GPU": 1.0},
        description='What each device of a replica takes of the cluster, in Ray\'s words, for example {"GPU": 1}.',
    )


class Placement(Strict):
    """Where a model runs, if not on this machine."""

    ray: RayPlacement
    keep: bool = Field(default=False, description="Let it outlive the server, whose successor finds it again.")


class VLLMArguments(Strict):
    """Engine arguments of a ``vllm`` model; what is not given, vLLM decides."""

    api: Literal["auto", "chat", "completions"] | None = _option(
        "essential", "The API that prompts go to; auto is chat if the model has a chat template."
    )
    max_model_len: Length | Literal["auto"] | None = _option(
        "essential", "Tokens of prompt and answer together; auto takes as many as fit in memory."
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32", "half", "float"] | None = _option(
        "essential", "Number format of the weights; auto takes that of the model."
    )
    quantization: Name | None = _option(
        "essential", "How the weights are quantized, for example awq or fp8; normally the model says so."
    )
    revision: Reference | None = _option("essential", "Branch, tag or commit of the model in its hub.")
    enforce_eager: bool | None = _option("essential", "Do not compile: loads faster, answers slower.")

    gpu_memory_utilization: Share | None = _option(
        "memory", "Share of the device's memory to use; on a CPU, of main memory."
    )
    kv_cache_memory_bytes: int | None = _option(
        "memory", "Bytes of KV cache on each device; overrides the share.", ge=1, le=MAX_BYTES
    )
    kv_cache_dtype: Literal["auto", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2"] | None = _option(
        "memory", "Number format of the KV cache; fp8 holds twice as many tokens."
    )
    block_size: int | None = _option("memory", "Tokens in one block of the KV cache.", ge=1, le=4096)
    cpu_offload_gb: Gibibytes | None = _option("memory", "GiB of weights of each GPU to keep in main memory.")
    kv_offloading_size: Gibibytes | None = _option("memory", "GiB of main memory for KV cache that leaves the GPU.")
    mm_processor_cache_gb: Gibibytes | None = _option("memory", "GiB of cache for processed images and sound.")
    max_num_seqs: int | None = _option("memory", "Sequences worked on at once.", ge=1, le=1_000_000)
    max_num_batched_tokens: Length | None = _option("memory", "Tokens worked on in one step.")
    enable_prefix_caching: bool | None = _option("memory", "Reuse the KV cache of prompts that begin alike.")
    enable_chunked_prefill: bool | None = _option(
        "memory", "Work on long prompts in pieces, between the steps of other requests."
    )

    tensor_parallel_size: int | None = _option("parallelism", "Devices that share every layer.", ge=1, le=1024)
    pipeline_parallel_size: int | None = _option(
        "parallelism", "Groups of devices that each hold some of the layers.", ge=1, le=1024
    )
    data_parallel_size: int | None = _option(
        "parallelism", "Copies of the model that share the requests.", ge=1, le=1024
    )
    enable_expert_parallel: bool | None = _option(
        "parallelism", "Share out the experts of a mixture of experts, not their layers."
    )
    placement: Placement | None = _option(
        "parallelism",
        'Where it runs, if not on this machine: {"ray": {"replicas": {"min": 1, "max": 2}, "resources": {"GPU": 1}}}.',
    )
    disable_custom_all_reduce: bool | None = _option(
        "parallelism", "Use NCCL where GPUs cannot reach each other's memory."
    )

    tokenizer: Reference | None = _option("other", "Hub name or path of another tokenizer.")
    tokenizer_mode: Literal["auto", "hf", "mistral"] | None = _option("other", "Kind of the tokenizer.")
    tokenizer_revision: Reference | None = _option("other", "Branch, tag or commit of the tokenizer in its hub.")
    load_format: Literal["auto", "safetensors", "pt", "npcache", "dummy", "mistral", "sharded_state"] | None = _option(
        "other", "Format of the weight files; dummy reads none and answers nonsense."
    )
    safetensors_load_strategy: Literal["lazy", "eager", "prefetch"] | None = _option(
        "other", "How weight files are read; eager and prefetch suit network file systems."
    )
    offline: bool | None = _option("other", "Use only model files that are on this machine already; download nothing.")
    seed: int | None = _option(
        "other",
        "Seed of the engine; nested only, a flat seed is that of each answer.",
        ge=0,
        lt=1 << 32,
    )
    generation_config: Literal["auto", "vllm"] | None = _option(
        "other", "Generation defaults: auto takes the model's own, vllm takes vLLM's."
    )
    max_logprobs: int | None = _option("other", "Log probabilities that a request may ask for.", ge=0, le=100_000)
    reasoning_parser: Name | None = _option(
        "other", "Splits off what a reasoning model thinks, for example deepseek_r1 or qwen3."
    )
    enable_auto_tool_choice: bool | None = _option("other", "Let the model call tools; needs tool_call_parser.")
    tool_call_parser: Name | None = _option("other", "Reads the model's tool calls, for example hermes or llama3_json.")
    chat_template_content_format: Literal["auto", "string", "openai"] | None = _option(
        "other", "How the chat template wants the content of messages."
    )
    default_chat_template_kwargs: TemplateValues | None = _option(
        "other", 'Values for the chat template, for example {"enable_thinking": false}.'
    )
    limit_mm_per_prompt: MediaLimits | None = _option(
        "other", 'Images, videos and sounds in one prompt, for example {"image": 2}.'
    )
    trust_remote_code: bool | None = _option(
        "other", "Run code that comes with the model; only where the operator of the server allows it."
    )
    scheduling_policy: Literal["fcfs", "priority"] | None = _option("other", "Order of waiting requests.")


NO_FLAGS: Final = frozenset({"api", "offline", "placement"})
"""Arguments that llmkit itself acts on."""


def to_flags(arguments: VLLMArguments) -> list[str]:
    """Write arguments as flags of ``vllm serve``, each as one ``--name=value``.

    One word each, so that no value can be taken for another flag.
    """
    given: dict[str, JsonValue] = arguments.model_dump(exclude_none=True, exclude=set(NO_FLAGS))
    return [_flag(name.replace("_", "-"), value) for name, value in given.items()]


def _flag(name: str, value: JsonValue) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"
