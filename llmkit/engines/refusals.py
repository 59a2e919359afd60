"""What an engine or endpoint says when it does not answer, in our words.

Nothing that it says is trusted: it is cut, and keys are blanked in it.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, Final

from llmkit.engines.base import Endpoint
from llmkit.errors import (
    ContextLengthExceeded,
    EngineRefused,
    LLMKitError,
    ModelNameNotFound,
    RateLimited,
    UpstreamFailed,
    UpstreamRefusedKey,
)

MAX_ERROR_BYTES: Final = 64 << 10

_CONTEXT_WORDS: Final = re.compile(
    r"context[ _]length|maximum context|max_model_len|maximum model length|too many tokens|(prompt|input) is too long|"
    r"context[ _]size|maximum number of tokens|`inputs` tokens \+ `max_new_tokens` must be",
    re.IGNORECASE,
)
_OF_TERMINALS: Final = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0e-\x1f\x7f-\x9f]")
"""Colours and other orders to a terminal, as in tracebacks that Ray sends along."""
_KEY_RUN: Final = 8
_LONGEST_RETRY_SECONDS: Final = 86_400.0


def redact(text: str, key: str | None) -> str:
    """Blank a key, and what begins or ends like it, in somebody else's words."""
    if not key:
        return text
    text = text.replace(key, "[key]")
    if len(key) > _KEY_RUN:
        text = re.sub(re.escape(key[:_KEY_RUN]) + r"[^\s\"',]*", "[key]", text)
        # From the beginning of a word only: tried from every letter of it, a long one would take minutes.
        text = re.sub(r"(?<![^\s\"',])[^\s\"',]*" + re.escape(key[-_KEY_RUN:]), "[key]", text)
    return text


def redact_all(value: Any, key: str) -> Any:
    """Blank a key in every text of a JSON value; in the JSON itself it can be escaped in many ways."""
    if isinstance(value, str):
        return redact(value, key)
    if isinstance(value, list):
        return [redact_all(one, key) for one in value]
    if isinstance(value, dict):
        return {redact(name, key): redact_all(one, key) for name, one in value.items()}
    return value


def passes_unchanged(status: int) -> bool:
    """Say whether an answer is the client's to read as it is: what was wrong with its request.

    What concerns our key, our path to the engine or the endpoint's load is told in our words.
    """
    return HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR and status not in (
        HTTPStatus.UNAUTHORIZED,
        HTTPStatus.PAYMENT_REQUIRED,
        HTTPStatus.FORBIDDEN,
        HTTPStatus.PROXY_AUTHENTICATION_REQUIRED,
        HTTPStatus.REQUEST_TIMEOUT,
        HTTPStatus.TOO_MANY_REQUESTS,
    )


def is_missing_path(status: int, body: bytes) -> bool:
    """Say whether an answer means that the engine has no such path, rather than no such model."""
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        return True
    return status == HTTPStatus.NOT_FOUND and not isinstance(_object(body).get("error"), dict | str)


def refusal(endpoint: Endpoint, name: str, status: int, body: bytes, headers: Mapping[str, str]) -> LLMKitError:
    """Give the error that an answer means.

    Parameters
    ----------
    endpoint
        Who answered.
    name
        What to call it in a sentence.
    """
    # What is said with a 401 often holds parts of the key; it is not repeated.
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        given = "the key" if endpoint.api_key else "a request without a key"
        return UpstreamRefusedKey(
            f"{name} refused {given} ({status}).",
            param="model_kwargs.api_key",
            hint="Configure the model with an api_key that this endpoint accepts, for example env:OPENAI_API_KEY.",
        )
    said = redact(_message(body), endpoint.api_key)
    if status in (HTTPStatus.BAD_REQUEST, HTTPStatus.UNPROCESSABLE_ENTITY, HTTPStatus.REQUEST_ENTITY_TOO_LARGE):
        kind = " ".join(str(_fields(body).get(name)) for name in ("code", "type"))
        if _CONTEXT_WORDS.search(said) or _CONTEXT_WORDS.search(kind[:200]):
            return ContextLengthExceeded(
                said or f"{name} says that the prompt is too long.",
                param="prompt",
                hint="Shorten the prompt, lower max_tokens, or load with a larger max_model_len.",
            )
        return EngineRefused(
            said or f"{name} refused the request ({status}).",
            param=redact((_param(body) or "")[:1000], endpoint.api_key)[:200] or None,
        )
    if status == HTTPStatus.NOT_FOUND:
        return ModelNameNotFound(
            said or f"{name} does not know `{endpoint.model}`, or has no such path.",
            param="model_name",
            hint="Check model_name and base_url.",
        )
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        seconds = retry_after(headers)
        return RateLimited(
            said or f"{name} asks to slow down.",
            hint="Wait a little, then send it again." if seconds is None else f"Send it again in {seconds:g} s.",
            details={} if seconds is None else {"retry_after": seconds},
        )
    if HTTPStatus.MULTIPLE_CHOICES <= status < HTTPStatus.BAD_REQUEST:
        return UpstreamFailed(
            f"{name} redirects elsewhere; redirects are not followed.",
            hint="Set base_url to the final address.",
        )
    words = f": {said}" if said else "."
    return UpstreamFailed(f"{name} failed ({status}){words}"[:2000], hint="Send it again later.")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Give the seconds after which an endpoint wants to be asked again, or None where it does not say.

    ``Retry-After`` is a number or a date (RFC 9110, section 10.2.3); OpenAI's ``retry-after-ms`` is finer.
    """
    for name, scale in (("retry-after-ms", 1000.0), ("Retry-After", 1.0)):
        try:
            seconds = float(headers[name]) / scale
        except (KeyError, ValueError):
            continue
        # Below nothing is now for OpenAI's own, and no number of seconds at all for the standard's.
        if math.isfinite(seconds) and (seconds >= 0 or scale > 1):
            return min(max(seconds, 0.0), _LONGEST_RETRY_SECONDS)
    try:
        seconds = parsedate_to_datetime(headers.get("Retry-After", "")).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(seconds, 0.0), _LONGEST_RETRY_SECONDS)


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _fields(body: bytes) -> dict[str, Any]:
    value = _object(body)
    error = value.get("error", value)
    return error if isinstance(error, dict) else {"message": error}


def _message(body: bytes) -> str:
    fields = _fields(body)
    said = fields.get("message") or fields.get("detail") or ("" if fields else body.decode("utf-8", "replace"))
    return " ".join(_OF_TERMINALS.sub("", str(said)).split())[:1000]


def _param(body: bytes) -> str | None:
    param = _fields(body).get("param")
    return param if isinstance(param, str) else None
