"""Everything that crosses the wire or lies on disk, as pydantic models.

Durations are seconds, sizes bytes, times ISO 8601 in UTC. A value that could not be measured is null and a
``reason`` beside it says why; it is never 0.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, StringConstraints

API_VERSION: Final = "1"
"""Grows when a client of the older version can no longer work."""

MODEL_ID_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}$"
MAX_CONFIGURATION_BYTES: Final = 1 << 20
MAX_PROMPT_BYTES: Final = 32 << 20
MAX_CONVERSATION_BYTES: Final = 4 << 20


def _no_control_characters(text: str) -> str:
    if any(ord(c) < 0x20 or ord(c) == 0x7F for c in text):
        raise ValueError("control characters are not allowed")
    return text


# In pydantic's regex engine `$` matches at the very end only, so this is a full match.
ModelId = Annotated[
    str,
    StringConstraints(pattern=MODEL_ID_PATTERN),
    Field(
        title="Model ID",
        description="Your unique name for the model: letters, digits and . _ : @ -, at most 128 characters.",
        examples=["demo", "llama3:8b"],
    ),
]
ModelName = Annotated[
    str,
    StringConstraints(min_length=1, max_length=1024),
    AfterValidator(_no_control_characters),
    Field(
        title="Model name",
        description="What the engine calls the model: a hub name, a path, or the name at the remote endpoint.",
        examples=["llmkit/demo", "gpt-4o-mini"],
    ),
]
ModelType = Annotated[
    str,
    StringConstraints(min_length=1, max_length=64),
    Field(title="Type", description="The engine that runs it.", examples=["vllm", "openai"]),
]
ConversationId = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"),
    Field(description="Chosen by the client: letters, digits and . _ -, at most 64 characters."),
]
RequestId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$")]

IdleTTL = Annotated[
    float,
    Field(
        ge=-1e9,
        le=1e9,
        allow_inf_nan=False,
        title="Idle TTL",
        description="Seconds without a request after which the model is unloaded: 0 as soon as it is idle, negative "
        "never, none the server's default.",
    ),
]
Restart = Literal["never", "on_failure"]
Status = Literal["unloaded", "loading", "loaded", "unloading", "failed"]
Phase = Literal["queued", "starting", "downloading", "weights", "warming", "ready"]
API = Literal["chat", "completions"]


class Strict(BaseModel):
    """What a client sends: unknown fields and wrong types are errors, never ignored or converted."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class Wire(BaseModel):
    """What the server sends; a client of an older minor version ignores what it does not know."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


def may_lack(*names: str) -> ConfigDict:
    """Say in the JSON schema that an answer leaves these out where there is nothing to say."""

    def mend(schema: dict[str, Any]) -> None:
        schema["required"] = [name for name in schema.get("required", []) if name not in names]

    return ConfigDict(json_schema_extra=mend)


# -- configurations ----------------------------------------------------------------------------------------


class Prices(Strict):
    """Price of a million tokens."""

    input: float = Field(ge=0, description="A million prompt tokens.")
    output: float = Field(ge=0, description="A million answer tokens.")
    currency: Annotated[str, StringConstraints(pattern=r"^[A-Z]{3}$")] = "USD"


class ModelConfigRequest(Strict):
    """Body of ``POST /llm/configure_model/``."""

    model_id: ModelId
    model_name: ModelName
    model_type: ModelType
    model_kwargs: Annotated[
        dict[str, JsonValue],
        Field(description="Engine arguments and generation defaults: flat, or nested under `engine` and `generation`."),
    ] = {}
    description: str | None = Field(None, max_length=2000, description="For people.")
    auto_load: bool | None = Field(None, description="Load at the first request.")
    idle_ttl: IdleTTL | None = None
    restart: Restart | None = Field(None, description="What follows when the engine of the loaded model fails.")
    max_in_flight: int | None = Field(None, ge=1, le=10_000, description="Requests running at once.")
    max_queued: int | None = Field(None, ge=0, le=100_000, description="Requests waiting at most.")
    prices: Prices | None = None
    fallback: Annotated[ModelId | None, Field(description="The model that answers when this one fails.")] = None


OPTIONAL_FIELDS: Final = (
    "description",
    "auto_load",
    "idle_ttl",
    "restart",
    "max_in_flight",
    "max_queued",
    "prices",
    "fallback",
)
"""Fields of a configuration that appear in answers only if they were set."""


SERVERS_OWN: Final = ("config_id", "declared", "configured_by")
"""Fields of a configuration that the server alone decides."""


class StoredConfigRequest(ModelConfigRequest):
    """Body of ``PUT /llm/configuration/{config_id}``: also what a GET of it answers."""

    config_id: str | None = None
    declared: bool = False
    configured_by: str | None = Field(None, description="Whose it is, on a server that many people share.")

    def request(self) -> ModelConfigRequest:
        """Give the part that a client decides."""
        return ModelConfigRequest.model_validate(self.model_dump(exclude=set(SERVERS_OWN)))


class Configuration(StoredConfigRequest):
    """A stored configuration."""

    config_id: str

    model_config = may_lack(*OPTIONAL_FIELDS, "declared", "configured_by")

    def to_wire(self) -> dict[str, Any]:
        """Give the JSON object of the configuration, identifiers first."""
        fields: dict[str, Any] = {
            "config_id": self.config_id,
            "model_id": self.model_id,
            "model_name": self.model_name,
            "model_type": self.model_type,
            "model_kwargs": self.model_kwargs,
        }
        fields |= {k: v for k, v in self.model_dump(include=set(OPTIONAL_FIELDS)).items() if v is not None}
        if self.declared:
            fields["declared"] = True
        if self.configured_by is not None:
            fields["configured_by"] = self.configured_by
        return fields


class GenerationParameters(Strict):
    """Generation defaults of a configuration; a request's own parameters win."""

    temperature: float | None = Field(None, ge=0, le=2, description="Randomness; 0 takes the likeliest token.")
    top_p: float | None = Field(
        None, gt=0, le=1, description="Sample from the likeliest tokens that have this total probability."
    )
    max_tokens: int | None = Field(None, ge=1, description="Tokens of the answer at most.")
    max_completion_tokens: int | None = Field(None, ge=1, description="OpenAI's newer name of max_tokens.")
    seed: int | None = Field(None, description="Makes sampling repeatable where the engine can.")
    stop: str | list[str] | None = Field(None, description="The answer ends before any of these texts.")
    presence_penalty: float | None = Field(None, ge=-2, le=2, description="Positive values favour new topics.")
    frequency_penalty: float | None = Field(None, ge=-2, le=2, description="Positive values avoid repetition.")
    top_k: int | None = Field(None, ge=-1, description="Sample from this many likeliest tokens (vLLM).")
    min_p: float | None = Field(None, ge=0, le=1, description="Least probability relative to the likeliest (vLLM).")
    repetition_penalty: float | None = Field(None, gt=0, description="Above 1 avoids repetition (vLLM).")
    min_tokens: int | None = Field(None, ge=0, description="Tokens of the answer at least (vLLM).")
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = Field(
        None, description="How long a reasoning model thinks."
    )
    response_format: dict[str, JsonValue] | None = Field(
        None, description="For example a JSON schema that the answer follows."
    )
    logit_bias: dict[str, float] | None = Field(None, description="Bias of tokens by their ID.")


# -- live state --------------------------------------------------------------------------------------------


class Memory(Wire):
    """What a model's processes hold."""

    pss_bytes: int | None = None
    gpu_bytes: int | None = None
    gpus: dict[int, int] = {}
    """Bytes on each GPU, by its index; only of GPUs on which it holds any."""
    verified: bool = False
    reason: str | None = None


class Capabilities(Wire):
    """What a loaded model can do; null where it is not known."""

    api: API | None = None
    embeddings: bool | None = None
    tools: bool | None = None
    vision: bool | None = None
    max_model_len: int | None = None
    engine_version: str | None = None
    """Of the engine that runs, as it tells itself; a remote endpoint tells none."""


class ModelError(Wire):
    """Why a model failed."""

    code: str
    message: str
    hint: str | None = None
    fix: dict[str, Any] | None = None
    log_tail: list[str] = []


class Download(Wire):
    """How far the download of a model's files is; bytes that were there before the load do not count."""

    done_bytes: int
    total_bytes: int | None = None
    bytes_per_second: float | None = None
    eta_seconds: float | None = None


Refusable = Literal["unload", "update", "delete"]
"""What only some people may do to a model that they share."""


class Model(Wire):
    """The live side of a configuration."""

    model_id: str
    config_id: str
    model_name: str
    model_type: str
    status: Status = "unloaded"
    reason: str | None = None
    phase: Phase | None = None
    progress: float | None = None
    elapsed_seconds: float | None = None
    eta_seconds: float | None = None
    download: Download | None = None
    load_seconds: float | None = None
    loaded_at: datetime | None = None
    last_used_at: datetime | None = None
    expires_at: datetime | None = None
    in_flight: int = 0
    queued: int = 0
    memory: Memory = Memory()
    capabilities: Capabilities = Capabilities()
    owner: str | None = None
    """Address of another Jupyter server of this home that has the model loaded."""
    configured_by: str | None = None
    """Who has made the configuration, on a server that many people share."""
    loaded_by: str | None = None
    """Who has loaded the model there; None also if a request did, or the server."""
    refuses: dict[Refusable, str] | None = None
    """What the server would refuse there to who asks, and why; None where it says nothing of it, as in events."""
    error: ModelError | None = None


class Snapshot(Wire):
    """Answer of ``GET /llm/models/``."""

    epoch: str
    revision: int
    models: list[Model]


class LogTail(Wire):
    """Answer of ``GET /llm/models/{model_id}/logs``."""

    model_id: str
    lines: list[str]


class MemoryEstimate(Wire):
    """What a load is expected to take, before it is tried; null where it is not known, and ``reason`` says why."""

    device: Literal["cpu", "gpu"]
    device_count: int = 1
    """GPUs that share the model."""
    weights_bytes: int | None = None
    kv_cache_bytes: int | None = None
    overhead_bytes: int | None = None
    total_bytes: int | None = None
    """On all devices together."""
    measured: bool = False
    """Whether `total_bytes` is what an earlier load of the same configuration held."""
    elastic: bool = False
    """Whether the engine takes as much as it finds free; `total_bytes` is then the least that makes sense."""
    reason: str | None = None


class LoadPlan(Wire):
    """Answer of ``POST /llm/load_model/{config_id}?dry_run=true``: what a load would take, and from whom."""

    model_id: str
    config_id: str
    estimate: MemoryEstimate | None
    """None if the model takes no memory of this machine."""
    free_bytes: int | None = None
    """Free now, where the model would go."""
    evict: list[str] = []
    """Models that would be unloaded to make room."""
    evictable_bytes: int | None = None
    """What all idle models hold together."""
    fits: bool | None
    """Whether it can be loaded, perhaps after eviction; null if that is not known."""
    reason: str | None = None


class Share(Wire):
    """What one model holds of a device."""

    model_id: str
    bytes: int | None


class CPUDevice(Wire):
    """The processor."""

    name: str | None
    cores: float
    """That this server may use; a cgroup can allow a fraction."""
    load: float | None
    """Processes that ran or waited to run, on average over the last minute."""


class RAMDevice(Wire):
    """Main memory; where a cgroup allows less than the machine has, that counts."""

    total_bytes: int
    used_bytes: int
    free_bytes: int
    """What can be had without ending anything: memory that merely caches files counts as free."""
    limited_by: Literal["machine", "cgroup"]
    shares: list[Share] = []
    standby_bytes: int | None = None
    """Held by what was made ready for the next load; None if there is nothing."""


class GPUDevice(Wire):
    """One GPU."""

    index: int
    uuid: str
    name: str
    total_bytes: int
    used_bytes: int
    free_bytes: int
    reserved_bytes: int = 0
    """Set aside for models that are loading now, here or in another server of this machine."""
    utilization: float | None = None
    """Share of the last moments in which it worked, 0 to 1."""
    shares: list[Share] = []


class Devices(Wire):
    """Answer of ``GET /llm/devices``."""

    cpu: CPUDevice
    ram: RAMDevice
    gpus: list[GPUDevice] = []
    reason: str | None = None
    """Why there is nothing about GPUs."""


class StoreCondition(Wire):
    """How the configurations are stored."""

    path: str
    journal_mode: str
    """``wal``, or ``delete`` where the file system cannot do that."""
    schema_version: int


class Health(Wire):
    """Answer of ``GET /llm/health``."""

    status: Literal["ok", "degraded", "stopping"]
    version: str
    api_version: str
    epoch: str
    problems: list[str] = []
    store: StoreCondition | None = None


# -- inference ---------------------------------------------------------------------------------------------


class InferenceRequest(Strict):
    """Body of ``POST /llm/inference/``."""

    model_id: ModelId
    prompt: str
    inference_kwargs: Annotated[
        dict[str, JsonValue],
        Field(description="OpenAI's generation parameters, and `stream`, `system`, `messages`, `request_id`."),
    ] = {}


class InferenceOptions(BaseModel):
    """The keys of ``inference_kwargs`` that llmkit itself reads; all others are for the engine."""

    model_config = ConfigDict(extra="allow", strict=True)

    stream: bool = False
    system: str | None = None
    messages: list[dict[str, JsonValue]] | None = None
    request_id: RequestId | None = None
    idle_ttl: IdleTTL | None = None
    n: Annotated[int, Field(ge=1, le=1)] | None = None


class Usage(Wire):
    """Tokens of one request."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None


class Timings(Wire):
    """Seconds of one request; `first_token` is null where the answer came in one piece."""

    queue: float
    load: float
    first_token: float | None
    total: float
    tokens_per_second: float | None


class Cost(Wire):
    """Price of one request."""

    amount: float
    currency: str


Priority = Literal["interactive", "batch"]
"""A batch never keeps a person waiting: what is interactive goes first."""
Outcome = Literal["ok", "refused", "rejected", "failed", "cancelled"]
"""How a request ended: answered; wrong; no room in the queue; engine or endpoint failed; client left or somebody
cancelled it."""


class RequestRecord(Wire):
    """A request that is over, as ``GET /llm/requests/`` tells it."""

    request_id: str
    model_id: str
    """That was asked."""
    answered_by: str | None = None
    """The model that answered: another one if that failed and its configuration has a fallback."""
    api: str
    """``inference``, or the path below ``/llm/v1``."""
    priority: Priority = "interactive"
    stream: bool = False
    tool_key: str | None = None
    """Name of the key for tools that it came with; null for a user of the server."""
    started_at: datetime
    outcome: Outcome
    status: int
    """HTTP status of the answer; of a stream that failed half-way, the one that it would have been."""
    error: str | None = None
    """The error's code."""
    usage: Usage | None = None
    timings: Timings
    cost: Cost | None = None
    request_body: str | None = None
    """Only if the operator has bodies recorded."""
    response_body: str | None = None
    user: str | None = None
    """Who has asked; only on a server that many people share."""

    model_config = may_lack("request_body", "response_body", "user")


class RunningRequest(Wire):
    """A request that is not over yet, as ``GET /llm/requests/`` tells it."""

    request_id: str
    model_id: str
    api: str
    priority: Priority
    stream: bool
    tool_key: str | None = None
    """As in `RequestRecord`."""
    started_at: datetime
    status: Literal["queued", "loading", "running"]
    position: int | None = None
    """In the queue: 1 is the next. None if it does not wait there."""
    elapsed_seconds: float
    user: str | None = None
    """Who asks; only on a server that many people share."""

    model_config = may_lack("user")


class RequestList(Wire):
    """Answer of ``GET /llm/requests/``: oldest first what runs, newest first what is over."""

    running: list[RunningRequest]
    recent: list[RequestRecord]


class UsageOfDay(Wire):
    """What one user has asked of one model on one day."""

    day: str
    """Of UTC, as ``2026-11-25``."""
    user: str
    model_id: str
    requests: int
    tokens: int
    """Of prompts and answers; what nobody has counted is what was reserved for it."""


class UsageList(Wire):
    """Answer of ``GET /llm/usage/``: who has used how much, and what is left to who asks."""

    usage: list[UsageOfDay]
    limits: dict[str, int]
    """``requests_per_minute`` and the like, for everybody but administrators; what is not named is not limited."""
    left: dict[str, int]
    kept: bool = True
    """Whether the server keeps usage at all: one that tells no people apart does not."""


ANSWER_MAY_LACK: Final = ("reasoning", "tool_calls", "logprobs", "cost")
"""Fields of an answer that appear only if there is something in them."""


class InferenceAnswer(Wire):
    """Answer of ``POST /llm/inference/``, and the last frame of its stream."""

    model_config = may_lack(*ANSWER_MAY_LACK)

    response: str
    model_id: str
    request_id: str
    finish_reason: str | None = None
    reasoning: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    logprobs: dict[str, Any] | None = None
    """As in OpenAI's API, of all tokens of the answer; only if they were asked for."""
    engine_version: str | None = None
    """Of the engine that answered; null where it tells none, as a remote endpoint."""
    usage: Usage | None = None
    timings: Timings
    cost: Cost | None = None


# -- conversations -----------------------------------------------------------------------------------------


class ConversationTurn(Strict):
    """One prompt of a conversation and its answer, which has ended."""

    model_id: ModelId
    prompt: str
    images: list[str] = Field(default_factory=list, description="Data URLs that went with the prompt.")
    response: str = ""
    reasoning: str | None = None
    tool_calls: list[dict[str, JsonValue]] | None = None
    state: Literal["done", "stopped", "failed"] = "done"
    note: str = Field("", description="What the answer took, or why there is none; for people.")


class ConversationRequest(Strict):
    """Body of ``PUT /llm/conversations/{conversation_id}``: the whole conversation as it is now."""

    title: str = Field("", max_length=200)
    model_id: ModelId | None = Field(None, description="The model that is asked next.")
    system: str = ""
    draft: str = Field("", description="The next prompt, as far as it is written.")
    parameters: dict[str, JsonValue] = Field(default_factory=dict, description="Generation parameters of the next one.")
    turns: list[ConversationTurn] = Field(default_factory=list)
    revision: int | None = Field(
        None, ge=0, description="Revision that this one follows: 409 if the stored one is another. None: whichever."
    )


class Conversation(ConversationRequest):
    """A conversation that the server keeps."""

    conversation_id: str
    revision: int
    updated_at: Annotated[datetime, Field(strict=False)]  # text, in JSON


class ConversationSummary(Wire):
    """A conversation in the answer of ``GET /llm/conversations/``."""

    conversation_id: str
    title: str
    model_id: str | None = None
    turns: int
    """How many."""
    revision: int
    updated_at: datetime


class ConversationList(Wire):
    """Answer of ``GET /llm/conversations/``: what was changed last comes first."""

    conversations: list[ConversationSummary]
    kept: bool = True
    """Whether this server keeps conversations; an operator can turn that off."""
