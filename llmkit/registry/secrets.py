"""Keys of remote endpoints: which may go where, and the files that hold the raw ones.

``api_key`` is ``"env:NAME"``, a variable of the server, or a raw key. A raw key goes to a file of its
configuration (0600, in a 0700 folder), bound to scheme, host and port of the endpoint; everywhere else stands
``{"secret": true, "set_at": ...}`` in its place.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from pydantic import JsonValue

from llmkit.engines.addresses import origin_of
from llmkit.errors import KeyMissing, KeyNotAllowed
from llmkit.schemas import Configuration

ARGUMENT = "api_key"
DEFAULT_VARIABLE = "OPENAI_API_KEY"
_REFERENCE = re.compile(r"env:([A-Za-z_][A-Za-z0-9_]{0,127})")
_DEFAULT_NAMES = re.compile(r"\w+(_API_KEY|_TOKEN)")
# Tokens of the Jupyter server or Hub open terminals; they are never for a model's endpoint.
_NEVER = re.compile(r"(JUPYTER|JPY_|LLMKIT_|CONFIGPROXY_)\w*", re.IGNORECASE)
_HEADER_TEXT = re.compile(r"[\x21-\x7e]{1,4096}")
_ORPHAN_AGE_SECONDS = 60.0


@dataclass(frozen=True)
class KeyPolicy:
    """Which variables of the server may go to which origin.

    ``secret_origins`` maps names of variables to origins such as ``https://api.openai.com``. Empty: any name
    that ends in ``_API_KEY`` or ``_TOKEN`` may be named; not empty: nothing else than what it says.
    """

    secret_origins: Mapping[str, Sequence[str]]

    def allows(self, name: str, origin: str) -> bool:
        """Tell whether the variable may be sent to the origin."""
        if self.secret_origins:
            return origin in map(origin_of, self.secret_origins.get(name, ()))
        return bool(_DEFAULT_NAMES.fullmatch(name)) and not _NEVER.fullmatch(name)

    def check_reference(self, reference: str, origin: str) -> str:
        """Give the name of the variable that ``env:NAME`` refers to.

        Raises
        ------
        KeyNotAllowed
            If it is no name, or may not go to the origin.
        """
        match = _REFERENCE.fullmatch(reference)
        if not match:
            raise KeyNotAllowed(
                "api_key starts with `env:` but what follows is no name of a variable.",
                param="model_kwargs.api_key",
                hint="Write env:NAME, for example env:OPENAI_API_KEY.",
            )
        name = match[1]
        if not self.allows(name, origin):
            rule = (
                "The operator's c.LLMKitApp.secret_origins says which variables may go where."
                if self.secret_origins
                else "Name a variable that ends in _API_KEY or _TOKEN, and none of Jupyter's own."
            )
            raise KeyNotAllowed(
                f"The variable {name} may not be sent to {origin}.", param="model_kwargs.api_key", hint=rule
            )
        return name

    def check_person(self, api_key: JsonValue) -> None:
        """Raise `KeyNotAllowed` if one of many people, no administrator, names a key of the server's.

        Unless the operator has said where each one goes, they could have it sent to an endpoint of their own.
        """
        if isinstance(api_key, str) and api_key.startswith("env:") and not self.secret_origins:
            raise KeyNotAllowed(
                "The keys of this server are named by its administrators alone.",
                param="model_kwargs.api_key",
                hint="Give a key of your own. The operator can say which may go where: c.LLMKitApp.secret_origins.",
            )

    def resolve(
        self,
        api_key: JsonValue,
        origin: str,
        environ: Mapping[str, str],
        secret: Secret | None,
        *,
        is_default: bool,
    ) -> str | None:
        """Give the key to send to an origin, or None to call without one.

        Parameters
        ----------
        api_key
            The stored value: ``env:NAME``, the mark of a raw key, or None.
        origin
            Where the configuration sends its requests.
        environ
            The server's environment.
        secret
            The raw key of the configuration, if it has one.
        is_default
            Whether the origin is the only one that ``OPENAI_API_KEY`` goes to without being named.

        Raises
        ------
        KeyMissing, KeyNotAllowed
            If there should be a key and none can be used.
        """
        if isinstance(api_key, str):
            name = self.check_reference(api_key, origin)
            if not _HEADER_TEXT.fullmatch(environ.get(name, "").strip()):
                raise KeyMissing(
                    f"The server has no environment variable {name}, or what is in it can be no key.",
                    param="model_kwargs.api_key",
                    hint=f"Set {name} before the Jupyter server starts, or configure another api_key.",
                )
            return environ[name].strip()
        if api_key is not None:
            if secret is None:
                raise KeyMissing(
                    "The key of this configuration is gone from the server.",
                    param="model_kwargs.api_key",
                    hint="Send the configuration again with its api_key.",
                )
            if secret.origin != origin:
                raise KeyNotAllowed(
                    f"The stored key is for {secret.origin}, not for {origin}.",
                    param="model_kwargs.api_key",
                    hint="Send the configuration again with the api_key for the new address.",
                )
            return secret.value
        if is_default and (not self.secret_origins or self.allows(DEFAULT_VARIABLE, origin)):
            return environ.get(DEFAULT_VARIABLE, "").strip() or None
        return None


@dataclass(frozen=True, repr=False)
class Secret:
    """A raw key and where it may go."""

    value: str
    origin: str
    set_at: str

    def mark(self) -> dict[str, JsonValue]:
        """Give what stands for the key wherever it can be seen."""
        return {"secret": True, "set_at": self.set_at}

    def holds(self, value: str) -> bool:
        """Tell whether a key is this one, by digest."""
        ours, theirs = (hashlib.sha256(text.encode()).digest() for text in (self.value, value))
        return hmac.compare_digest(ours, theirs)


def new_secret(value: str, origin: str) -> Secret:
    """Bind a raw key to an origin, now."""
    return Secret(value, origin, datetime.now(UTC).isoformat(timespec="microseconds"))


def is_mark(value: object) -> bool:
    """Tell whether a value stands for a key."""
    return isinstance(value, dict) and value.get("secret") is True


class SecretFiles:
    """One 0600 file for each raw key. All methods block.

    A file a key, named after its configuration and the time at which it was set, rather than one that is overwritten:
    the configuration says which one holds, so that a crash in the middle of a change leaves the old key with the old
    configuration; and two servers never overwrite each other's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "secrets"
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder.chmod(0o700)

    def _path(self, config_id: str, set_at: str) -> Path:
        return self.folder / f"{UUID(config_id)}.{_name_of(set_at)}.json"

    def read(self, configuration: Configuration) -> Secret | None:
        """Read the key that a configuration refers to."""
        set_at = set_at_of(configuration)
        if set_at is None:
            return None
        try:
            secret = Secret(**json.loads(self._path(configuration.config_id, set_at).read_text("utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            return None
        return secret if secret.set_at == set_at else None

    def write(self, config_id: str, secret: Secret) -> None:
        """Write a key; after a crash the file is whole or not there."""
        path = self._path(config_id, secret.set_at)
        scratch = path.with_suffix(f".{uuid4().hex}.new")
        body = {"value": secret.value, "origin": secret.origin, "set_at": secret.set_at}
        try:
            with os.fdopen(
                os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8"
            ) as file:
                json.dump(body, file)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)

    def delete(self, config_id: str, secret: Secret | None) -> None:
        """Delete a key of a configuration, if there is one."""
        if secret is not None:
            self._path(config_id, secret.set_at).unlink(missing_ok=True)

    def delete_orphans(self, known: Mapping[str, Configuration | None]) -> None:
        """Delete keys that nothing refers to, which a crash between two writes can leave.

        A file younger than a minute stays: its configuration may be on the way in another server.

        Parameters
        ----------
        known
            Every configuration by its ``config_id``; None for one that cannot be read, whose keys stay.
        """
        kept = {
            f"{config_id}.{_name_of(set_at)}.json"
            for config_id, configuration in known.items()
            if configuration is not None and (set_at := set_at_of(configuration)) is not None
        }
        unread = {config_id for config_id, configuration in known.items() if configuration is None}
        for path in self.folder.iterdir():
            if path.name in kept or path.name.split(".")[0] in unread:
                continue
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _ORPHAN_AGE_SECONDS:
                    path.unlink()


def _name_of(set_at: str) -> str:
    return hashlib.sha256(set_at.encode()).hexdigest()[:16]


def set_at_of(configuration: Configuration) -> str | None:
    """Give when the raw key of a configuration was set, or None if it has none."""
    mark = key_of(configuration.model_kwargs)
    return str(mark.get("set_at")) if isinstance(mark, dict) and is_mark(mark) else None


def key_of(model_kwargs: Mapping[str, Any]) -> JsonValue:
    """Give the ``api_key`` of a configuration, wherever it stands."""
    engine = model_kwargs.get("engine")
    nested = engine.get(ARGUMENT) if isinstance(engine, dict) else None
    value: JsonValue = nested if nested is not None else model_kwargs.get(ARGUMENT)
    return value


def with_key(model_kwargs: Mapping[str, Any], value: JsonValue) -> dict[str, JsonValue]:
    """Copy ``model_kwargs`` with another value in the place of its ``api_key``."""
    engine = model_kwargs.get("engine")
    if isinstance(engine, dict) and ARGUMENT in engine:
        return {**model_kwargs, "engine": {**engine, ARGUMENT: value}}
    return {**model_kwargs, ARGUMENT: value}
