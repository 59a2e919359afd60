"""Answers that a handler puts together, and bodies that only an engine understands: what `schemas` has no model of."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from llmkit.schemas import LoadPlan, Memory, Status, Wire, may_lack

# -- errors ----------------------------------------------------------------------------------------------


class ErrorDetail(Wire):
    """What went wrong, for people and for programs."""

    message: str
    """What went wrong, for a person."""
    type: str
    """OpenAI's coarse class of the error."""
    code: str
    """What went wrong, for a program: one of a fixed list."""
    param: str | None
    """The field, argument or path parameter that was at fault."""
    hint: str | None
    """What to do about it, for a person."""
    details: dict[str, JsonValue] | None = None
    """Facts that a program may use, for example every wrong field with its path."""

    model_config = may_lack("details")


class ErrorAnswer(Wire):
    """The one form that errors have."""

    message: str
    reason: str
    """The phrase of the HTTP status."""
    error: ErrorDetail


# -- configurations and models ---------------------------------------------------------------------------


class Configured(Wire):
    """Answer of ``POST /llm/configure_model/``."""

    config_id: str


class ConfigurationDeleted(Wire):
    """Answer of ``DELETE /llm/configuration/{config_id}``."""

    detail: str


class ModelTypeDescription(Wire):
    """What there is to know about a model type before a model of it is configured."""

    name: str
    summary: str
    available: bool
    """Whether models of it can be loaded on this server."""
    reason: str | None
    """Why not."""
    arguments: dict[str, Any]
    """JSON schema of its engine arguments."""
    generation: dict[str, Any]
    """JSON schema of its generation defaults."""
    table: dict[str, Literal["engine", "generation"]]
    """Where a flat key of `model_kwargs` belongs."""


class ModelTypeList(Wire):
    """Answer of ``GET /llm/model_types/``."""

    model_types: list[ModelTypeDescription]


class Checked(Wire):
    """Answer of a dry run of a configuration: nothing was changed."""

    plan: LoadPlan | None
    """What loading it would take; null if nothing of its type can be loaded on this server."""


class Loaded(Wire):
    """Answer of ``POST /llm/load_model/{config_id}``."""

    message: str
    model_id: str
    load_seconds: float | None
    """That the load took; null if it is not known."""


class Unloaded(Wire):
    """Answer of ``POST /llm/unload_model/{model_id}``."""

    message: str
    model_id: str
    freed: Memory


# -- requests and conversations --------------------------------------------------------------------------


class Cancelled(Wire):
    """Answer of ``DELETE /llm/inference/{request_id}``."""

    message: str
    request_id: str


class ConversationStored(Wire):
    """Answer of ``PUT /llm/conversations/{conversation_id}``."""

    conversation_id: str
    revision: int
    updated_at: datetime


class ConversationDeleted(Wire):
    """Answer of ``DELETE /llm/conversations/{conversation_id}``."""

    message: str
    conversation_id: str


# -- OpenAI's API ----------------------------------------------------------------------------------------


class OpenAIModel(Wire):
    """A model, as OpenAI's API tells of one; `root` and what follows are ours."""

    id: str
    """The model_id."""
    object: Literal["model"] = "model"
    created: int
    """Seconds since 1970."""
    owned_by: str = "llmkit"
    root: str
    """What the engine calls it."""
    status: Status
    max_model_len: int | None


class OpenAIModelList(Wire):
    """Answer of ``GET /llm/v1/models``."""

    object: Literal["list"] = "list"
    data: list[OpenAIModel]


class OpenAIRequest(BaseModel):
    """What every body of OpenAI's API has; all else is the engine's to understand."""

    model_config = ConfigDict(extra="allow")

    model: str = Field(min_length=1, description="A model_id.")
    stream: bool | None = Field(None, description="Answer as server-sent events.")


class ChatCompletionRequest(OpenAIRequest):
    """Body of ``POST /llm/v1/chat/completions``."""

    messages: list[dict[str, Any]] = Field(description="The conversation: objects with `role` and `content`.")


class CompletionRequest(OpenAIRequest):
    """Body of ``POST /llm/v1/completions``."""

    prompt: str | list[Any] = Field(description="A text, several, or tokens.")


class EmbeddingRequest(OpenAIRequest):
    """Body of ``POST /llm/v1/embeddings``."""

    input: str | list[Any] = Field(description="A text, several, or tokens.")


class ResponseRequest(OpenAIRequest):
    """Body of ``POST /llm/v1/responses``."""

    input: str | list[dict[str, Any]] = Field(description="A text, or the items of a conversation.")


class TokenizeRequest(OpenAIRequest):
    """Body of ``POST /llm/v1/tokenize``: vLLM's, with a prompt or messages."""

    prompt: str | None = Field(None, description="A text.")
    messages: list[dict[str, Any]] | None = Field(None, description="A conversation.")


# -- keys for tools --------------------------------------------------------------------------------------


class KeyRevoked(Wire):
    """Answer of ``DELETE /llm/keys/{name}``."""

    message: str
    name: str
