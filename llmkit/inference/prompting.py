"""``POST /llm/inference/`` in OpenAI's terms: the body that goes to the engine, the answer that comes back."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import JsonValue, ValidationError

from llmkit.engines.base import does_not_fit, validation_details
from llmkit.engines.http import MAX_ANSWER_BYTES
from llmkit.errors import ParameterForbidden, UpstreamFailed
from llmkit.schemas import (
    API,
    Cost,
    GenerationParameters,
    InferenceAnswer,
    InferenceOptions,
    InferenceRequest,
    Prices,
    Timings,
    Usage,
)

# What would choose another model, replace the prompt, run a template of the sender, or fetch for the sender.
FORBIDDEN = {
    "model": "model_id says which model answers.",
    "prompt": "The prompt stands beside inference_kwargs.",
    "input": "The prompt stands beside inference_kwargs.",
    "stream_options": "Every answer carries its usage.",
    "chat_template": "A template of the request is code that the engine would run.",
    "chat_template_kwargs": "The configuration decides how prompts are rendered.",
    "media_io_kwargs": "The configuration decides how media are read.",
    "mm_processor_kwargs": "The configuration decides how media are read.",
    "vllm_xargs": "Engine internals are not for requests.",
    "kv_transfer_params": "Engine internals are not for requests.",
}
_ALIASES = ({"max_tokens", "max_completion_tokens"},)


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
) -> tuple[str, dict[str, Any]]:
    """Make path and body of the engine's request; the request's own parameters win over the configuration's.

    Raises
    ------
    ParameterForbidden
        If a model without a chat template is given a system prompt or messages.
    """
    given = options.model_extra or {}
    parameters = dict(defaults)
    for names in _ALIASES:
        if names & given.keys():
            parameters = {k: v for k, v in parameters.items() if k not in names}
    body: dict[str, Any] = {**parameters, **given, "model": model, "stream": options.stream}
    if options.stream:
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


@dataclass
class Clock:
    """When the steps of one request happened, in seconds of `time.monotonic`."""

    start: float = field(default_factory=time.monotonic)
    queue: float = 0.0
    load: float = 0.0
    sent: float | None = None
    first_token: float | None = None

    def timings(self, usage: Usage | None) -> Timings:
        """Give the durations up to now."""
        now = time.monotonic()
        tokens = usage.completion_tokens if usage else None
        generating = now - (self.sent if self.sent is not None else self.start)
        return Timings(
            queue=round(self.queue, 6),
            load=round(self.load, 6),
            first_token=None if self.first_token is None else round(self.first_token - self.start, 6),
            total=round(now - self.start, 6),
            tokens_per_second=round(tokens / generating, 3) if tokens and generating > 0 else None,
        )


class Collector:
    """Puts the pieces of an answer together, streamed or not."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.reasoning: list[str] = []
        self.tool_calls: dict[int, dict[str, Any]] = {}
        self.finish_reason: str | None = None
        self.usage: Usage | None = None
        self.size = 0

    def add(self, piece: Mapping[str, Any]) -> dict[str, Any]:
        """Take one chunk, or the whole answer; give what is new in it as a frame, empty if nothing is."""
        try:
            return self._add(piece)
        except (TypeError, AttributeError, ValueError) as error:
            raise UpstreamFailed(
                "The endpoint's answer has not the form of OpenAI's API.", hint="Check base_url and api."
            ) from error

    def add_whole(self, answer: Mapping[str, Any]) -> None:
        """Take an answer that came in one piece, or raise `UpstreamFailed` if it is none."""
        if not answer.get("choices"):
            raise UpstreamFailed("The endpoint answered without an answer.", hint="Check base_url and model_name.")
        self.add(answer)

    def _add(self, piece: Mapping[str, Any]) -> dict[str, Any]:
        if isinstance(piece.get("usage"), dict):
            self.usage = Usage.model_validate({k: piece["usage"].get(k) for k in Usage.model_fields})
        choices = piece.get("choices")
        if not choices:
            return {}
        choice = choices[0]
        self.finish_reason = _text(choice.get("finish_reason") or self.finish_reason or "") or None
        part = choice.get("delta") or choice.get("message") or choice
        text = _text(part.get("content") or part.get("text") or "")
        reasoning = _text(part.get("reasoning") or part.get("reasoning_content") or "")
        self.size += len(text) + len(reasoning)
        if self.size > MAX_ANSWER_BYTES:
            raise UpstreamFailed("The answer does not end.")
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
        return frame

    def _add_tool_call(self, call: Mapping[str, Any]) -> None:
        # In a stream a call arrives in pieces of one index; the arguments are cut anywhere.
        known = self.tool_calls.setdefault(
            call.get("index", len(self.tool_calls)),
            {"type": "function", "function": {"name": "", "arguments": ""}},
        )
        if call.get("id"):
            known["id"] = call["id"]
        function = call.get("function") or {}
        for name in ("name", "arguments"):
            known["function"][name] += function.get(name) or ""

    def answer(self, model_id: str, request_id: str, clock: Clock, prices: Prices | None) -> InferenceAnswer:
        """Give the whole answer."""
        return InferenceAnswer(
            response="".join(self.text),
            model_id=model_id,
            request_id=request_id,
            finish_reason=self.finish_reason,
            reasoning="".join(self.reasoning) or None,
            tool_calls=[self.tool_calls[i] for i in sorted(self.tool_calls)] or None,
            usage=self.usage,
            timings=clock.timings(self.usage),
            cost=_cost(self.usage, prices),
        )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} in the place of text")
    # Half a surrogate pair cannot be sent on as UTF-8.
    return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _cost(usage: Usage | None, prices: Prices | None) -> Cost | None:
    if prices is None or usage is None or usage.prompt_tokens is None or usage.completion_tokens is None:
        return None
    amount = (usage.prompt_tokens * prices.input + usage.completion_tokens * prices.output) / 1_000_000
    return Cost(amount=round(amount, 12), currency=prices.currency)
