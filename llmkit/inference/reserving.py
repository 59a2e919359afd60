"""The most tokens that a request can take, and what makes that exact: an answer that nobody bounds is bounded.

A budget of tokens holds only if what was reserved cannot be exceeded. So a request of somebody whose tokens are limited
must say how long its answer may be in a way that every engine reads alike; where it says nothing, we do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, TypeGuard

from pydantic import JsonValue
from pydantic_core import to_json
from yarl import URL

from llmkit.engines.base import Endpoint, does_not_fit
from llmkit.errors import ParameterForbidden
from llmkit.inference.bounds import SCHEMA_PARAMETERS

RESERVED_TOKENS: Final = 1024
"""Of an answer whose length neither the request nor the configuration bounds."""
ANSWER_FIELDS: Final[Mapping[str, tuple[str, ...]]] = {
    "inference": ("max_tokens", "max_completion_tokens"),
    "chat/completions": ("max_tokens", "max_completion_tokens"),
    "completions": ("max_tokens",),
    "responses": ("max_output_tokens",),
}
"""By API, the parameters that bound an answer; other APIs answer with nothing that is made of tokens."""
UNBOUNDED: Final = {
    "previous_response_id": "Earlier answers are part of the prompt, and nobody here knows how long they are.",
    "conversation": "A conversation of the endpoint is part of the prompt, and nobody here knows how long it is.",
    "background": "What is answered later is not counted.",
    "n_predict": "Bound the answer with max_tokens.",
    "max_new_tokens": "Bound the answer with max_tokens.",
}
"""What a request whose tokens are limited may not carry, and why."""

_DEFAULTS: Final = ("max_completion_tokens", "max_tokens")
_OPENAI: Final = ("openai.com", "openai.azure.com")
_OF_MESSAGE: Final = 16
"""Tokens that a chat template puts around a message, at most."""
_OF_MEDIA: Final = {"image_url": 4096, "audio_url": 16_384, "video_url": 16_384}
_OF_SCHEMA: Final = 2
"""Tokens of a byte of JSON, which a template may write with spaces and line ends."""


def check_bounded(api: str, asked: Mapping[str, Any], at: str = "") -> None:
    """Refuse what makes a request longer than it says, before it is charged.

    Parameters
    ----------
    api
        ``"inference"`` or one of `openai_api.PATHS`.
    asked
        The parameters of a request whose tokens are limited.
    at
        Where they stand in it, for the path of the error.

    Raises
    ------
    ParameterForbidden, DoesNotFit
    """
    path = f"{at}." if at else ""
    for name in UNBOUNDED.keys() & asked.keys():
        if asked[name] not in (None, False):
            raise ParameterForbidden(
                f"`{name}` is not allowed where tokens are limited.", param=path + name, hint=UNBOUNDED[name]
            )
    # An engine may read true as 1, "500" as 500, and -1 as without end.
    numbers = (*ANSWER_FIELDS.get(api, ()), *(("n", "best_of") if api in ANSWER_FIELDS else ()))
    wrong = [name for name in numbers if asked.get(name) is not None and not _is_count(asked[name])]
    if wrong:
        message = "must be a whole number from 1 on, since your tokens are limited"
        raise does_not_fit([{"path": path + name, "message": message} for name in wrong])


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def answer_bound(api: str, asked: Mapping[str, Any], defaults: Mapping[str, JsonValue]) -> int:
    """Give how many tokens one answer may have: by the request, else by the configuration, else `RESERVED_TOKENS`.

    Where a request says it twice, the larger number counts: engines differ in which one they take.

    Examples
    --------
    >>> answer_bound("chat/completions", {"max_tokens": 5, "max_completion_tokens": 50}, {})
    50
    """
    names = ANSWER_FIELDS.get(api)
    if names is None:
        return 0
    own = _counts(asked, names)
    return max(own or _counts(defaults, _DEFAULTS) or [RESERVED_TOKENS])


def _counts(found: Mapping[str, Any], names: Sequence[str]) -> list[int]:
    return [value for value in map(found.get, names) if _is_count(value)]


def with_bound(
    api: str, body: dict[str, Any], asked: Mapping[str, Any], bound: int | None, endpoint: Endpoint, longest: int | None
) -> dict[str, Any]:
    """Give the body that goes to an engine with a bound of its answer, unless the request itself has one.

    Parameters
    ----------
    api
        One of `openai_api.PATHS`.
    body, asked
        What is sent, and what the client has sent: defaults of a fallback may be more than was reserved.
    bound
        As `answer_bound` gave it; None leaves the body as it is.
    endpoint
        OpenAI's newer models refuse ``max_tokens``, and others know nothing else.
    longest
        Tokens of prompt and answer that the model takes, where that is known: it refuses to be asked for more.

    Examples
    --------
    >>> endpoint = Endpoint(base_url="http://127.0.0.1:8000/v1", model="m")
    >>> with_bound("responses", {"input": "Hello"}, {"input": "Hello"}, 1024, endpoint, None)
    {'input': 'Hello', 'max_output_tokens': 1024}
    """
    names = ANSWER_FIELDS.get(api, ())
    if bound is None or not names or any(asked.get(name) is not None for name in names):
        return body
    host = URL(endpoint.base_url).host or ""
    newer = api == "chat/completions" and any(host == one or host.endswith(f".{one}") for one in _OPENAI)
    most = bound if longest is None else min(bound, max(1, longest // 2))
    return {**{k: v for k, v in body.items() if k not in names}, names[-1] if newer else names[0]: most}


def most_tokens(asked: Mapping[str, Any], bound: int = 0) -> int:
    """Give what a request can take: no text has more tokens than bytes, and the answers no more than they are allowed.

    Parameters
    ----------
    asked
        The request, as in OpenAI's API or as ``inference_kwargs`` with the prompt.
    bound
        Tokens of one answer at most, as `answer_bound` gives them.

    Examples
    --------
    >>> most_tokens({"prompt": "Hello"}, 50)
    71
    """
    many = max([1, *_counts(asked, ("n", "best_of"))])
    texts = sum(
        _OF_SCHEMA * len(to_json(value)) if name in SCHEMA_PARAMETERS and value is not None else sum(_leaves(value))
        for name, value in asked.items()
        if name not in ("model", "stop")
    )
    return texts + _OF_MESSAGE + _prompts(asked.get("prompt")) * many * bound


def _prompts(prompt: Any) -> int:
    """Give how many prompts stand in one request for completions: each is answered."""
    if not isinstance(prompt, list) or all(isinstance(one, int) for one in prompt):
        return 1
    return len(prompt)


def _leaves(value: Any) -> Iterator[int]:
    level = [value]
    while level:
        one = level.pop()
        if isinstance(one, str):
            yield len(one.encode("utf-8", "replace"))
        elif isinstance(one, dict):
            yield _OF_MESSAGE
            for name, inner in one.items():
                if name in _OF_MEDIA:
                    yield _OF_MEDIA[name]
                else:
                    level.append(inner)
        elif isinstance(one, list):
            level.extend(one)
            yield sum(isinstance(item, int) for item in one)  # tokens
