"""Keys of remote endpoints on their way from a person to the server; nothing here keeps or shows them."""

from __future__ import annotations

import getpass
from collections.abc import Mapping
from typing import Any

from llmkit.client.results import KEY
from llmkit.errors import KeyMissing

HINT = 'Give it: client.set_key(model_id, key), or "env:NAME" for a variable of the server.'


def ask_key(model_id: str) -> str:
    """Ask the person for a key, without showing it.

    Raises
    ------
    KeyMissing
        If nobody can be asked here, as where a notebook is run by a program.
    """
    try:
        return getpass.getpass(f"API key of {model_id}: ")
    except (EOFError, NotImplementedError):  # the latter is what a kernel without a person raises
        raise KeyMissing(f"Nobody can be asked for the key of `{model_id}` here.", hint=HINT) from None


def clean_key(key: str) -> str:
    """Take blanks and line ends away that copying leaves.

    Raises
    ------
    KeyMissing
        If nothing is left.
    """
    if not key.strip():
        raise KeyMissing("The key is empty; nothing was changed.", hint=HINT)
    return key.strip()


def key_of(model_kwargs: Mapping[str, Any]) -> Any:
    """Give the mark of a key, or the name of its variable, wherever it stands; None where there is no key.

    Examples
    --------
    >>> key_of({"engine": {"api_key": "env:A_API_KEY"}})
    'env:A_API_KEY'
    """
    engine = model_kwargs.get("engine")
    places = (engine if isinstance(engine, dict) else {}, model_kwargs)
    return next((place[KEY] for place in places if place.get(KEY) is not None), None)


def with_key(model_kwargs: Mapping[str, Any], key: Any) -> dict[str, Any]:
    """Copy the arguments of a configuration with this key, or its mark, in them, where keys stand there.

    Examples
    --------
    >>> with_key({"temperature": 1}, "env:A_API_KEY")
    {'temperature': 1, 'api_key': 'env:A_API_KEY'}
    >>> with_key({"engine": {"timeout": 9}}, "env:A_API_KEY")
    {'engine': {'timeout': 9, 'api_key': 'env:A_API_KEY'}}
    """
    engine = model_kwargs.get("engine")
    if isinstance(engine, dict) and KEY not in model_kwargs:
        return {**model_kwargs, "engine": {**engine, KEY: key}}
    return {**model_kwargs, KEY: key}
