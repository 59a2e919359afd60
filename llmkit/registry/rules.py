"""What the operator allows of configurations: asked when one is made or changed, and again at each load."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final
from urllib.parse import urlsplit

from llmkit.engines.addresses import origin_of
from llmkit.engines.base import EngineType, SortedKwargs
from llmkit.errors import RefusedByOperator
from llmkit.schemas import Configuration

TRUST_REMOTE_CODE: Final = "trust_remote_code"
TOKENIZER: Final = "tokenizer"
_DOT_SEGMENT: Final = re.compile(r"(?:\.|%2e){1,2}", re.IGNORECASE)
_HUB_NAME: Final = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
"""No path: neither an absolute one, nor one that goes up, nor a home."""
_SEPARATOR: Final = re.compile(r"[/\\]|%2f|%5c", re.IGNORECASE)


@dataclass(frozen=True)
class Rules:
    """What configurations may ask for; those that the operator declares are not asked.

    Attributes
    ----------
    allow_trust_remote_code
        Whether code may run that comes with a model.
    allowed_model_names
        Patterns of ``model_name``, and of another tokenizer's name; none: every name.
    allowed_base_urls
        Where requests may be sent, see `is_below`; none: everywhere.
    """

    allow_trust_remote_code: bool = False
    allowed_model_names: Sequence[str] = ()
    allowed_base_urls: Sequence[str] = ()

    def check(self, configuration: Configuration, engine_type: EngineType, kwargs: SortedKwargs) -> None:
        """Raise `RefusedByOperator` if a configuration asks for what the operator does not allow."""
        if configuration.declared:
            return
        if kwargs.engine.get(TRUST_REMOTE_CODE) and not self.allow_trust_remote_code:
            raise RefusedByOperator(
                "Code that comes with a model would run as the account of this server; its operator does not allow it.",
                param=f"model_kwargs.{TRUST_REMOTE_CODE}",
                hint="The operator can: c.LLMKitApp.allow_trust_remote_code = True.",
            )
        names = {"model_name": configuration.model_name, f"model_kwargs.{TOKENIZER}": kwargs.engine.get(TOKENIZER)}
        for param, name in names.items():
            if self.allowed_model_names and name and not _is_allowed(name, self.allowed_model_names):
                raise RefusedByOperator(
                    f"The operator of this server does not allow `{name[:200]}`.",
                    param=param,
                    hint=f"Allowed are: {', '.join(self.allowed_model_names)[:500]}.",
                )
        origin = engine_type.origin(configuration)
        if origin is not None and self.allowed_base_urls:
            given = kwargs.engine.get("base_url")
            url = given if isinstance(given, str) else getattr(engine_type, "default_base_url", origin)
            if not any(is_below(url, one) for one in self.allowed_base_urls):
                raise RefusedByOperator(
                    f"The operator of this server does not allow requests to {url[:200]}.",
                    param="model_kwargs.base_url",
                    hint=f"Allowed are: {', '.join(self.allowed_base_urls)[:500]}.",
                )

    def check_person(self, configuration: Configuration, engine_type: EngineType, kwargs: SortedKwargs) -> None:
        """Raise `RefusedByOperator` for what one of many people, no administrator, may not have done in their name.

        A server that is shared can reach what they cannot: addresses of its own machine and network, and the files of
        its account. A folder that they name, their own, can have links to those files in it, which an engine follows.
        """
        if engine_type.origin(configuration) is not None:
            if not self.allowed_base_urls:
                raise RefusedByOperator(
                    "The operator of this server allows no remote endpoints but those that administrators configure.",
                    param="model_kwargs.base_url",
                    hint="The operator can allow some for all: c.LLMKitApp.allowed_base_urls.",
                )
            return
        names = {"model_name": configuration.model_name, f"model_kwargs.{TOKENIZER}": kwargs.engine.get(TOKENIZER)}
        for param, name in names.items():
            if isinstance(name, str) and not self.allowed_model_names and not _HUB_NAME.fullmatch(name):
                raise RefusedByOperator(
                    "The operator of this server allows no files of its machine but those that administrators name.",
                    param=param,
                    hint="Give the name of a model in its hub, such as Qwen/Qwen3-0.6B. The operator can allow folders "
                    "that administrators alone write: c.LLMKitApp.allowed_model_names.",
                )

    @property
    def hidden_arguments(self) -> frozenset[str]:
        """Engine arguments that nobody can use here, so that no form offers them."""
        return frozenset() if self.allow_trust_remote_code else frozenset({TRUST_REMOTE_CODE})


def check_pattern(pattern: str) -> None:
    """Raise `ValueError` if a text is no pattern of `is_below`."""
    _parts(pattern.replace("://*.", "://", 1))
    if "*" in pattern.replace("://*.", "://", 1):
        raise ValueError("a * stands for the first parts of a host alone, as in https://*.example.com")


def is_below(url: str, pattern: str) -> bool:
    """Say whether a URL is one of those that a pattern allows.

    A pattern is the address of an endpoint, or the beginning of its path; with ``*.`` before the host it is every
    host of that domain.

    Examples
    --------
    >>> is_below("https://api.openai.com/v1", "https://api.openai.com")
    True
    >>> is_below("https://eu.example.com/a/v1", "https://*.example.com/a")
    True
    >>> is_below("https://evil.com/.example.com/a", "https://*.example.com/a")
    False
    """
    try:
        scheme, host, port, path = _parts(url)
        wanted_scheme, wanted_host, wanted_port, wanted_path = _parts(pattern.replace("://*.", "://", 1))
    except ValueError:
        return False
    if any(_DOT_SEGMENT.fullmatch(part) for part in _SEPARATOR.split(path)):
        return False  # the path is in truth another one
    is_host = host.endswith(f".{wanted_host}") if "://*." in pattern else host == wanted_host
    is_path = f"{path}/".startswith(f"{wanted_path.rstrip('/')}/")
    return is_host and is_path and (scheme, port) == (wanted_scheme, wanted_port)


def _parts(url: str) -> tuple[str, str, str, str]:
    scheme, _, place = origin_of(url).partition("://")
    host, _, port = place.rpartition(":")
    return scheme, host.rstrip("."), port, urlsplit(url).path


def _is_allowed(name: str, patterns: Sequence[str]) -> bool:
    # A path that goes up again is in truth another one.
    return ".." not in name.split("/") and any(fnmatchcase(name, pattern) for pattern in patterns)
