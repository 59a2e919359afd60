"""``POST /llm/inference/`` in OpenAI's terms: the body that goes to the engine, the answer that comes back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic import JsonValue, ValidationError
from pydantic_core import to_json

from llmkit.engines.base import does_not_fit, validation_details
from llmkit.engines.http import MAX_PARSED_BYTES
from llmkit.errors import LLMKitError, ParameterForbidden, UpstreamFailed
from llmkit.inference import openai_api
from llmkit.inference.bounds import check_schemas
from llmkit.inference.openai_api import with_defaults
from llmkit.inference.running import Running, read_usage
from llmkit.schemas import API, GenerationParameters, InferenceAnswer, InferenceOptions, InferenceRequest, Usage

# What would choose another model or replace the prompt.
FORBIDDEN = {
    "model": "model_id says which model answers.",
    "prompt": "The prompt stands beside inference_kwargs.",
    "input": "The prompt stands beside inference_kwargs.",
    "stream_options": "Every answer carries its usage.",
    **openai_api.FORBIDDEN,
}

_CALL_BYTES: Final = 64
"""What a piece of a tool call counts for at least."""


def read_options(request: InferenceRequest) -> InferenceOptions:
    """Check ``inference_kwargs``.

    Raises
    ------
    DoesNotFit
        With every wrong field and its path.
    ParameterForbidden
        For a parameter that a request may not carry.
    """
    for name, why in FORBIDDEN.items():
        if name in request.inference_kwargs:
            raise ParameterForbidden(
                f"`{name}` is not allowed in a request.", param=f"inference_kwargs.{name}", hint=why
            )
    check_schemas(request.inference_kwargs, "inference_kwargs")
    known = {k: v for k, v in request.inference_kwargs.items() if k in GenerationParameters.model_fields}
    try:
        GenerationParameters.model_validate(known)  # the engine would say the same, less clearly
        return InferenceOptions.model_validate(request.inference_kwargs)
    except ValidationError as error:
        details = validation_details(error, InferenceOptions, ("inference_kwargs",))
        hint = (
            "Send the request several times for several answers."
            if any(d["path"].endswith(".n") for d in details)
            else None
        )
        raise does_not_fit(details, hint=hint) from None


def to_openai(
    request: InferenceRequest,
    options: InferenceOptions,
    defaults: Mapping[str, JsonValue],
    api: API,
    model: str,
    *,
    stream_options: bool = True,
) -> tuple[str, dict[str, Any]]:
    """Make path and body of the engine's request; the request's own parameters win over the configuration's.

    ``stream_options`` says whether the engine can be asked for the usage of a stream.

    Raises
    ------
    ParameterForbidden
        If a model without a chat template is given a system prompt or messages.
    """
    parameters = with_defaults(defaults, options.model_extra or {})
    body: dict[str, Any] = {**parameters, "model": model, "stream": options.stream}
    if options.stream and stream_options:
        body["stream_options"] = {"include_usage": True}
    if api == "chat":
        messages: list[dict[str, Any]] = [{"role": "system", "content": options.system}] if options.system else []
        body["messages"] = [*messages, *(options.messages or []), {"role": "user", "content": request.prompt}]
        path = "/chat/completions"
    else:
        for name in ("system", "messages"):
            if getattr(options, name) is not None:
                raise ParameterForbidden(
                    f"`{request.model_id}` completes text; it has no chat template for `{name}`.",
                    param=f"inference_kwargs.{name}",
                    hint="Put everything into the prompt, or configure the model with api: chat.",
                )
        body["prompt"] = request.prompt
        path = "/completions"
    return path, body


@dataclass(slots=True)
class ToolCall:
    """A tool call, as far as it has come."""

    id: str | None = None
    name: str = ""
    arguments: list[str] = field(default_factory=list)

    def to_wire(self) -> dict[str, Any]:
        """Give it as OpenAI's API does."""
        function = {"name": self.name, "arguments": "".join(self.arguments)}
        return {"type": "function", "function": function, **({"id": self.id} if self.id else {})}


class Collector:
    """Puts the pieces of an answer together, streamed or not."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.reasoning: list[str] = []
        self.tool_calls: dict[int, ToolCall] = {}
        self.logprobs: dict[str, list[Any]] = {}
        self.finish_reason: str | None = None
        self.usage: Usage | None = None
        self.size = 0

    def add(self, piece: Mapping[str, Any]) -> dict[str, Any]:
        """Take one chunk, or the whole answer; give what is new in it as a frame, empty if nothing is."""
        try:
            return self._add(piece)
        except (TypeError, AttributeError, ValueError, LookupError) as error:
            raise UpstreamFailed(
                "The endpoint's answer has not the form of OpenAI's API.", hint="Check base_url and api."
            ) from error

    def add_all(self, pieces: Iterable[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], LLMKitError | None]:
        """Take chunks up to the first that is wrong; give what is new in them as frames, and what was wrong."""
        frames: list[dict[str, Any]] = []
        for piece in pieces:
            try:
                frame = self.add(piece)
            except LLMKitError as error:
                return frames, error
            if frame:
                frames.append(frame)
        return frames, None

    def add_whole(self, answer: Mapping[str, Any]) -> None:
        """Take an answer that came in one piece, or raise `UpstreamFailed` if it is none."""
        if not answer.get("choices"):
            raise UpstreamFailed("The endpoint answered without an answer.", hint="Check base_url and model_name.")
        self.add(answer)

    def _add(self, piece: Mapping[str, Any]) -> dict[str, Any]:
        told = piece.get("usage")
        if isinstance(told, dict):
            usage = read_usage(told)
            if usage is None and told.keys() & Usage.model_fields.keys():
                raise TypeError("usage that is no numbers")
            self.usage = usage or self.usage
        choices = piece.get("choices")
        if not choices:
            return {}
        choice = choices[0]
        self.finish_reason = _text(choice.get("finish_reason") or self.finish_reason or "") or None
        part = choice.get("delta") or choice.get("message") or choice
        text = _text(part.get("content") or part.get("text") or "")
        reasoning = _text(part.get("reasoning") or part.get("reasoning_content") or "")
        self._count(len(text) + len(reasoning))
        frame: dict[str, Any] = {}
        if text:
            self.text.append(text)
            frame["delta"] = text
        if reasoning:
            self.reasoning.append(reasoning)
            frame.setdefault("delta", "")
            frame["reasoning"] = reasoning
        for call in part.get("tool_calls") or []:
            self._add_tool_call(call)
        logprobs = choice.get("logprobs")
        if logprobs:
            self._add_logprobs(logprobs)
            frame.setdefault("delta", "")
            frame["logprobs"] = logprobs
        return frame

    def _count(self, size: int) -> None:
        self.size += size
        if self.size > MAX_PARSED_BYTES:
            raise UpstreamFailed("The answer does not end.")

    def _add_logprobs(self, logprobs: Mapping[str, Any]) -> None:
        # Lists in parallel, one entry a token: `content` and `refusal` of chat, `tokens` and others of completions.
        for name, values in logprobs.items():
            if isinstance(values, list):
                self._count(len(to_json(values)))
                self.logprobs.setdefault(name, []).extend(values)

    def _add_tool_call(self, call: Mapping[str, Any]) -> None:
        # In a stream a call arrives in pieces of one index; the arguments are cut anywhere.
        known = self.tool_calls.setdefault(call.get("index", len(self.tool_calls)), ToolCall())
        known.id = call.get("id") or known.id
        function = call.get("function") or {}
        name, arguments = (_text(function.get(key) or "") for key in ("name", "arguments"))
        self._count(_CALL_BYTES + len(name) + len(arguments))
        known.name += name
        known.arguments.append(arguments)

    def answer(self, running: Running, engine_version: str | None) -> InferenceAnswer:
        """Give the whole answer of an engine of this version."""
        return InferenceAnswer(
            response="".join(self.text),
            model_id=running.answered_by or running.model_id,
            request_id=running.request_id,
            finish_reason=self.finish_reason,
            reasoning="".join(self.reasoning) or None,
            tool_calls=[self.tool_calls[i].to_wire() for i in sorted(self.tool_calls)] or None,
            logprobs=self.logprobs or None,
            engine_version=engine_version,
            usage=self.usage,
            timings=running.timings(),
            cost=running.cost(),
        )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} in the place of text")
    # Half a surrogate pair cannot be sent on as UTF-8.
    return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
