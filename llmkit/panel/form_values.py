"""Configurations as values of a form, and back; nothing of a configuration is lost on the way."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping
from typing import Any

from llmkit.schemas import SERVERS_OWN

OWN, ENGINE, GENERATION = "own", "engine", "generation"
Place = tuple[str, str]
"""Which part of a configuration a value belongs to, and its name: ``seed`` is one of two parts."""
_NOT_IN_FORM = (*SERVERS_OWN, "model_type")
_LONGEST_STEM = 120
_NO_DICT: Mapping[str, Any] = {}


def spread(told: Mapping[str, Any], table: Mapping[str, str]) -> dict[Place, Any]:
    """Give every value of a configuration by its place.

    Parameters
    ----------
    told
        The configuration as the server tells it.
    table
        Where a flat key of ``model_kwargs`` belongs, as ``GET /llm/model_types/`` says it.
    """
    values: dict[Place, Any] = {}
    for name, value in told.items():
        if name == "model_kwargs":
            for key, inner in value.items():
                if key in (ENGINE, GENERATION) and isinstance(inner, Mapping):
                    values |= {(key, nested): one for nested, one in inner.items()}
                else:
                    values[table.get(key, ENGINE), key] = inner
        elif name == "prices":
            values |= {(OWN, f"prices.{key}"): one for key, one in value.items()}
        elif name not in _NOT_IN_FORM:
            values[OWN, name] = value
    return values


def gather(values: Mapping[Place, Any], table: Mapping[str, str], like: Mapping[str, Any] = _NO_DICT) -> dict[str, Any]:
    """Make the fields of a configuration from values by their places.

    Parameters
    ----------
    like
        The ``model_kwargs`` that the values come from: what was nested there stays nested. All else is flat where
        the server sorts it so.
    """
    body: dict[str, Any] = {}
    kwargs: dict[str, Any] = {}
    for (part, name), value in values.items():
        if part != OWN:
            nested = isinstance(like.get(part), Mapping) and name not in like
            (kwargs.setdefault(part, {}) if nested or table.get(name, ENGINE) != part else kwargs)[name] = value
        elif "." in name:
            outer, _, inner = name.partition(".")
            body.setdefault(outer, {})[inner] = value
        else:
            body[name] = value
    return {**body, "model_kwargs": kwargs}


def place_of(path: str, table: Mapping[str, str]) -> Place:
    """Give the place that a path of the server's words points to: ``model_kwargs.engine.dtype`` is ``dtype``."""
    head, *rest = path.split(".")
    if head == "prices" and rest:
        return OWN, f"prices.{rest[0]}"
    if head != "model_kwargs" or not rest:
        return OWN, head
    if rest[0] in (ENGINE, GENERATION) and len(rest) > 1:
        return rest[0], rest[1]
    return table.get(rest[0], ENGINE), rest[0]


def is_mark(value: object) -> bool:
    """Tell whether a value stands for a key that the server keeps."""
    return isinstance(value, Mapping) and value.get("secret") is True


def suggest_id(model_id: str, taken: Collection[str]) -> str:
    """Give a free name for a copy.

    Examples
    --------
    >>> suggest_id("demo", ["demo"]), suggest_id("demo-2", ["demo-2", "demo-3"])
    ('demo-2', 'demo-4')
    """
    stem = re.sub(r"-\d+$", "", model_id)[:_LONGEST_STEM]
    return next(name for n in itertools.count(2) if (name := f"{stem}-{n}") not in taken)
