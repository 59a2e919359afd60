"""What is given on the command line as ``key=value``."""

from __future__ import annotations

import argparse
import json
import math
import re
from datetime import datetime, timedelta
from typing import Any

KEY = "api_key"

_DURATION = re.compile(r"([0-9]{1,5})([mhd])")
_UNITS = {"m": 60, "h": 3600, "d": 86400}


def assignment(text: str) -> tuple[str, Any]:
    """Read ``key=value``; a value that is no JSON is taken as a text.

    Examples
    --------
    >>> assignment("temperature=0.5"), assignment("stop=[1, 2]"), assignment("base_url=http://a/v1")
    (('temperature', 0.5), ('stop', [1, 2]), ('base_url', 'http://a/v1'))
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"{text!r} is not key=value")
    try:
        return key, json.loads(value, parse_constant=_refuse)
    except ValueError:
        return key, value
    except RecursionError:
        raise argparse.ArgumentTypeError(f"the value of {key!r} is nested too deeply") from None


def assignment_without_key(text: str) -> tuple[str, Any]:
    """Read ``key=value``, but take no API key from where other users and the shell's history see it."""
    name, value = assignment(text)
    for given in (value if name == KEY else None, value.get(KEY) if isinstance(value, dict) else None):
        if given is not None and not str(given).startswith("env:"):
            raise argparse.ArgumentTypeError(
                "other users see a key on the command line: `llmkit configure` asks for it with --ask-key, or "
                "names a variable of the server with --key-from-env NAME"
            )
    return name, value


def end_of_key(text: str) -> timedelta | datetime:
    """Read a duration such as ``30d``, or a day or time such as ``2030-01-31``, in this machine's time zone.

    Examples
    --------
    >>> end_of_key("12h")
    datetime.timedelta(seconds=43200)
    """
    duration = _DURATION.fullmatch(text)
    if duration:
        return timedelta(seconds=int(duration[1]) * _UNITS[duration[2]])
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a duration (30d, 12h, 90m) nor a date") from None


def finite(text: str) -> float:
    """Read a number that is one: neither infinite nor ``nan``.

    Examples
    --------
    >>> finite("0.5")
    0.5
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is no number")
    return number


def truth(text: str) -> bool:
    """Read ``true`` or ``false``."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def _refuse(text: str) -> None:
    raise ValueError(f"{text} is no JSON")
