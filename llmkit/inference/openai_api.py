"""OpenAI's API under ``/llm/v1``: a client's body made into the one that goes to an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydantic import JsonValue
from pydantic_core import to_json

from llmkit.engines.base import does_not_fit
from llmkit.errors import NotSupported, ParameterForbidden
from llmkit.inference.bounds import check_schemas
from llmkit.schemas import API

PATHS: Final = {
    "chat/completions": "/chat/completions",
    "completions": "/completions",
    "embeddings": "/embeddings",
    "responses": "/responses",
    "tokenize": "//tokenize",
}
"""What may be asked of an engine, and its path there, as `EngineHTTP.open` takes it."""

FORBIDDEN: Final = {
    "api_key": "The configuration has the key; one of the request would be sent on, and noted with its parameters.",
    "chat_template": "A template of the request is code that the engine would run.",
    "chat_template_kwargs": "The configuration decides how prompts are rendered: default_chat_template_kwargs.",
    "media_io_kwargs": "The configuration decides how media are read.",
    "mm_processor_kwargs": "The configuration decides how media are read.",
    "prompt_embeds": "Embeddings in the place of a prompt are objects that the engine would unpack.",
    "vllm_xargs": "Engine internals are not for requests.",
    "kv_transfer_params": "Engine internals are not for requests.",
    "ec_transfer_params": "Engine internals are not for requests.",
    "logits_processors": "Engine internals are not for requests.",
    "mm_payload": "The engine would unpack it; send media as data URLs.",
    "return_mm_kwargs": "Engine internals are not for requests.",
}
"""What no request may carry, and why."""

_FORBIDDEN_HERE: Final = {**FORBIDDEN, "request_id": "The server makes the id; X-Request-Id of the answer says it."}
_ALIASES: Final = ({"max_tokens", "max_completion_tokens"},)
_GENERATING: Final = ("chat/completions", "completions")


@dataclass(frozen=True, slots=True)
class Call:
    """A request as the engine gets it."""

    path: str
    body: bytes
    stream: bool = False
    wants_usage: bool = True
    """Whether the client reads the frame with the usage; we ask for it in any case."""
    adds_options: bool = False
    """Whether it carries ``stream_options`` that the client has not sent."""
    lacks_options: bool = False
    """Whether it would, if the engine knew them."""


def model_of(body: Mapping[str, Any]) -> str:
    """Give the ``model`` of a body, or raise `DoesNotFit`."""
    model = body.get("model")
    if not isinstance(model, str) or not model:
        message = "is missing" if "model" not in body else "must be the model_id of a model"
        raise does_not_fit([{"path": "model", "message": message}], hint="GET /llm/v1/models lists the models.")
    return model


def is_stream(body: Mapping[str, Any]) -> bool:
    """Say whether a stream is asked for, or raise `DoesNotFit`."""
    stream = body.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise does_not_fit([{"path": "stream", "message": "must be true or false"}])
    return bool(stream)


def check(body: Mapping[str, Any]) -> None:
    """Refuse what no request may carry, before anything waits or is loaded for it.

    Raises
    ------
    ParameterForbidden, DoesNotFit
    """
    for name in _FORBIDDEN_HERE.keys() & body.keys():
        raise ParameterForbidden(f"`{name}` is not allowed in a request.", param=name, hint=_FORBIDDEN_HERE[name])
    check_schemas(body)


def to_call(
    api: str,
    body: Mapping[str, Any],
    defaults: Mapping[str, JsonValue],
    model: str,
    *,
    model_api: API | None,
    stream_options: bool,
) -> Call:
    """Make the engine's request out of a client's; the client's own parameters win over the configuration's.

    Parameters
    ----------
    api
        One of `PATHS`.
    body
        What the client sent, which `check` let pass.
    defaults
        Generation parameters of the configuration.
    model
        What the engine calls the model.
    model_api
        What the model can do, where that is known.
    stream_options
        Whether the engine can be asked for the usage of a stream.

    Raises
    ------
    NotSupported
        If it is known that the model cannot do this.
    """
    if api == "chat/completions" and model_api == "completions":
        raise NotSupported(
            f"`{body['model']}` completes text; it has no chat template.",
            param="messages",
            hint="Use /llm/v1/completions, or configure the model with api: chat.",
        )
    sent = {**_defaults_for(api, defaults, body), **body, "model": model}
    if not (is_stream(body) and api in _GENERATING):
        return Call(PATHS[api], to_json(sent), stream=is_stream(body))
    options = body.get("stream_options")
    given: dict[str, Any] = options if isinstance(options, dict) else {}
    if stream_options and (options is None or isinstance(options, dict)):
        sent["stream_options"] = {**given, "include_usage": True}
    return Call(
        PATHS[api],
        to_json(sent),
        stream=True,
        wants_usage=bool(given.get("include_usage")),
        adds_options=stream_options and options is None,
        lacks_options=not stream_options and options is None,
    )


def with_defaults(defaults: Mapping[str, JsonValue], given: Mapping[str, Any]) -> dict[str, Any]:
    """Join generation parameters; what was given wins, also under a parameter's other name."""
    parameters: dict[str, Any] = dict(defaults)
    for names in _ALIASES:
        if parameters and names & given.keys():
            parameters = {k: v for k, v in parameters.items() if k not in names}
    return {**parameters, **given}


def _defaults_for(api: str, defaults: Mapping[str, JsonValue], body: Mapping[str, Any]) -> dict[str, Any]:
    """Give the defaults that an API knows; embeddings and tokens are not generated."""
    if not defaults:
        return {}
    if api in _GENERATING:
        return with_defaults(defaults, {k: body[k] for names in _ALIASES for k in names if k in body})
    if api != "responses":
        return {}
    found: dict[str, Any] = {name: defaults[name] for name in ("temperature", "top_p") if name in defaults}
    most = defaults.get("max_completion_tokens", defaults.get("max_tokens"))
    if most is not None:
        found["max_output_tokens"] = most
    if "reasoning_effort" in defaults:
        found["reasoning"] = {"effort": defaults["reasoning_effort"]}
    return found
