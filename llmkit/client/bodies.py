"""What a client sends: JSON that every server can read, or an error that says which part is none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llmkit.errors import DoesNotFit

_LEVELS = 64
"""The server takes no deeper ones."""


def as_body(value: Any) -> bytes:
    r"""Give a value as JSON.

    Raises
    ------
    DoesNotFit
        If it is none: an object, a set, NaN, half a character; ``param`` names the part.

    Examples
    --------
    >>> as_body({"prompt": "Zürich"})
    b'{"prompt":"Z\xc3\xbcrich"}'
    >>> as_body({"inference_kwargs": {"stop": {"."}}})
    Traceback (most recent call last):
    llmkit.errors.DoesNotFit: inference_kwargs.stop: Object of type set is not JSON serializable
    """
    try:
        return _encode(value)
    except (RecursionError, TypeError, ValueError) as error:
        if isinstance(error, RecursionError) or "Circular" in str(error):
            raise DoesNotFit("What was given is nested too deeply, or holds itself.") from None
        place, part = _find("", value)
        reason = "half a character, which no text can have" if isinstance(error, UnicodeError) else str(error)
        if isinstance(part, float):
            reason = f"{part} is no number that JSON has"
        raise DoesNotFit(f"{place}: {reason}" if place else reason, param=place or None) from None


def _encode(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _find(place: str, value: Any) -> tuple[str, Any]:
    """Give the innermost part that is no JSON, and where it is."""
    for _ in range(_LEVELS):
        if isinstance(value, Mapping):
            parts = [(str(name), part) for name, part in value.items()]
        else:
            parts = [(str(at), part) for at, part in enumerate(value)] if isinstance(value, list | tuple) else []
        inner = next(((name, part) for name, part in parts if not _fits(part)), None)
        if inner is None:
            break
        place, value = f"{place}.{inner[0]}" if place else inner[0], inner[1]
    return place, value


def _fits(value: Any) -> bool:
    try:
        _encode(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
