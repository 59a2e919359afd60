"""Models behind any OpenAI-compatible endpoint.

To load one is to find out that it can be used: the endpoint answers, takes the key and knows the model.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from http import HTTPStatus
from typing import Annotated, Any, Literal
from urllib.parse import quote, urlsplit

from pydantic import Field, JsonValue, StringConstraints

from llmkit.engines.addresses import origin_of, why_not_called
from llmkit.engines.base import (
    Endpoint,
    EngineContext,
    EngineExit,
    Extra,
    LoadProgress,
    does_not_fit,
    sort_kwargs,
)
from llmkit.engines.http import EngineHTTP
from llmkit.engines.outgoing import proxy_for, trusted_certificates
from llmkit.engines.refusals import redact
from llmkit.errors import LLMKitError, ModelNameNotFound, UpstreamFailed
from llmkit.schemas import Capabilities, Configuration, Memory, MemoryEstimate, Strict

DEFAULT_BASE_URL = "https://api.openai.com/v1"
DEFAULT_TIMEOUT_SECONDS = 600.0
DEFAULT_RETRIES = 2
PROBE_SECONDS = 30.0
_REFUSED = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
# Printable ASCII only: anything else could not stand in a header.
_HeaderText = Annotated[str, StringConstraints(pattern=r"^[\x21-\x7e]{1,256}$")]
_Key = Annotated[str, StringConstraints(pattern=r"^[\x21-\x7e]{1,4096}$")]


class SecretMark(Strict):
    """What stands for a raw key wherever it can be seen."""

    secret: Literal[True]
    set_at: str


class OpenAIArguments(Strict):
    """Engine arguments of an ``openai`` model."""

    base_url: str | None = Field(
        None,
        max_length=2048,
        description="The address, usually ending in /v1. Default: OPENAI_BASE_URL of the server, or OpenAI.",
        json_schema_extra={"group": "essential"},
    )
    api_key: _Key | SecretMark | None = Field(
        None,
        description="env:NAME names a variable of the server; anything else is a key, which the server keeps.",
        json_schema_extra={"group": "essential", "secret": True},
    )
    api: Literal["auto", "chat", "completions"] | None = Field(
        None, description="The API that prompts go to; auto is chat.", json_schema_extra={"group": "other"}
    )
    organization: _HeaderText | None = Field(
        None, description="OpenAI organization.", json_schema_extra={"group": "other"}
    )
    project: _HeaderText | None = Field(None, description="OpenAI project.", json_schema_extra={"group": "other"})
    timeout: float | None = Field(
        None,
        gt=0,
        le=86400,
        description="Seconds without a sign of life after which a request is given up.",
        json_schema_extra={"group": "other"},
    )
    max_retries: int | None = Field(
        None,
        ge=0,
        le=10,
        description="How often a request is sent again if the endpoint is busy or fails before it answers; "
        f"{DEFAULT_RETRIES} if not given.",
        json_schema_extra={"group": "other"},
    )


class OpenAIEngineType:
    """The model type ``openai``."""

    name = "openai"
    summary = "A model behind an OpenAI-compatible endpoint"
    arguments = OpenAIArguments

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._environ = environ

    def unavailable(self) -> LLMKitError | None:
        """Say why no model of this type can be loaded here: there is never a reason."""
        return None

    @property
    def default_base_url(self) -> str:
        """The address of a configuration without ``base_url``."""
        return self._environ.get("OPENAI_BASE_URL") or DEFAULT_BASE_URL

    def check(self, configuration: Configuration) -> None:
        """Raise `DoesNotFit` if ``base_url`` cannot be called."""
        try:
            host = urlsplit(self.origin(configuration)).hostname or ""
            why = why_not_called(host)
            if why is not None:
                raise ValueError(f"{host} {why}")
        except ValueError as error:
            detail = {"path": "model_kwargs.base_url", "message": str(error)}
            raise does_not_fit([detail], hint="For example https://api.openai.com/v1.") from None

    def origin(self, configuration: Configuration) -> str:
        """Give the only place that this configuration's key goes to."""
        return origin_of(self._base_url(configuration))

    def default_origin(self) -> str | None:
        """Give the only place that the server's ``OPENAI_API_KEY`` goes to without being named."""
        try:
            return origin_of(self.default_base_url)
        except ValueError:
            return None  # a wrong OPENAI_BASE_URL; models with an address of their own do not care

    def estimate(self, configuration: Configuration) -> MemoryEstimate | None:
        """Say that the model takes no memory of this machine."""
        del configuration
        return None

    def create(self, configuration: Configuration, context: EngineContext) -> OpenAIEngine:
        """Make the engine of one load."""
        arguments = sort_kwargs(self, configuration.model_kwargs).engine
        headers = {
            header: arguments[name]
            for name, header in (("organization", "OpenAI-Organization"), ("project", "OpenAI-Project"))
            if arguments.get(name)
        }
        base_url = self._base_url(configuration)
        retries = arguments.get("max_retries")
        endpoint = Endpoint(
            base_url=base_url,
            model=configuration.model_name,
            api_key=context.api_key,
            headers=headers,
            timeout=arguments.get("timeout") or DEFAULT_TIMEOUT_SECONDS,
            max_retries=DEFAULT_RETRIES if retries is None else retries,
            proxy=proxy_for(base_url, self._environ),
            fetches=True,
        )
        return OpenAIEngine(endpoint, arguments, self._environ)

    def _base_url(self, configuration: Configuration) -> str:
        given = sort_kwargs(self, configuration.model_kwargs).engine.get("base_url")
        return given or self.default_base_url


class OpenAIEngine:
    """One remote model."""

    def __init__(self, endpoint: Endpoint, arguments: dict[str, JsonValue], environ: Mapping[str, str]) -> None:
        self.endpoint = endpoint
        self._api = arguments.get("api")
        self._environ = environ

    async def start(self, report: Callable[[LoadProgress], None]) -> Capabilities:
        """Return when the endpoint has answered, taken the key and known the model.

        Raises
        ------
        UpstreamUnreachable, UpstreamRefusedKey, UpstreamFailed, ModelNameNotFound, TimedOut
            If it cannot be used.
        """
        report(LoadProgress("starting"))
        if self.endpoint.base_url.startswith("https:"):
            certificates = await asyncio.to_thread(trusted_certificates, self._environ)
            self.endpoint = replace(self.endpoint, ssl=certificates)
        # Whether it can be used shows soon; an answer may take longer.
        quick = min(self.endpoint.timeout or PROBE_SECONDS, PROBE_SECONDS)
        http = EngineHTTP(replace(self.endpoint, timeout=quick, max_retries=0))
        length = None
        try:
            entry = await self._find_model(http)
            if entry.get("owned_by") == "vllm":
                length = entry.get("max_model_len")
                self.endpoint = await _with_extras(http, self.endpoint)
        finally:
            await http.close()
        return Capabilities(
            api="completions" if self._api == "completions" else "chat",
            max_model_len=length if isinstance(length, int) else None,
        )

    async def _find_model(self, http: EngineHTTP) -> dict[str, Any]:
        """Give what the endpoint says of the model, as far as it does.

        Raises
        ------
        LLMKitError
            If it cannot be used.
        """
        name = self.endpoint.model
        status, body = await http.status("/models")
        if status in _REFUSED or status >= HTTPStatus.INTERNAL_SERVER_ERROR or 300 <= status < 400:
            raise http.refusal(status)
        if status == HTTPStatus.OK and body is None:
            raise UpstreamFailed(
                f"{self.endpoint.base_url} answers, but not with JSON.", hint="Check base_url; it usually ends in /v1."
            )
        entries = _entries(body) if status == HTTPStatus.OK else {}
        if name in entries:
            return entries[name]
        listed = list(entries)
        # Some endpoints list only part of what they serve, or know a model by more names than they list.
        status, one = await http.status(f"/models/{quote(name, safe='')}")
        if status in _REFUSED:
            raise http.refusal(status)
        if status == HTTPStatus.NOT_FOUND and listed:
            near = difflib.get_close_matches(name, listed, n=3) or listed[:5]
            raise ModelNameNotFound(
                f"{self.endpoint.base_url} has no model `{name}`.",
                param="model_name",
                hint=f"It has, for example: {redact(', '.join(near), self.endpoint.api_key)[:300]}.",
            )
        return one if status == HTTPStatus.OK and isinstance(one, dict) else {}

    async def stop(self) -> Memory:
        """Free nothing: the model runs elsewhere."""
        return Memory(verified=True, reason="runs elsewhere")

    async def wait_exit(self) -> EngineExit:
        """Wait for ever: a remote endpoint does not end with us."""
        await asyncio.Event().wait()
        raise AssertionError("nobody sets this event")

    async def memory(self) -> Memory:
        """Say that nothing of it is on this machine."""
        return Memory(reason="runs elsewhere")


def _entries(body: Any) -> dict[str, dict[str, Any]]:
    """Give every model of a list by its name."""
    data = body.get("data") if isinstance(body, dict) else None
    models = [m for m in data if isinstance(m, dict)] if isinstance(data, list) else []
    return {m["id"]: m for m in models if isinstance(m.get("id"), str)}


async def _with_extras(http: EngineHTTP, endpoint: Endpoint) -> Endpoint:
    """Add to an endpoint what a vLLM server has beside OpenAI's API, and can be reached there.

    It lies beside ``/v1``; a proxy on the way may pass on only a part, or nothing, of it.
    """
    root_url = endpoint.base_url.rstrip("/").removesuffix("/v1")
    if root_url == endpoint.base_url.rstrip("/"):
        return endpoint
    extras: set[Extra] = set()
    beside = EngineHTTP(replace(http.endpoint, root_url=root_url))
    try:
        with contextlib.suppress(LLMKitError):
            told = await beside.json("POST", "//tokenize", {"model": endpoint.model, "prompt": "Hello"})
            if isinstance(told.get("count"), int):
                extras.add("tokenize")
        with contextlib.suppress(LLMKitError):
            async with beside.open("//metrics", method="GET") as response:
                if response.status == HTTPStatus.OK and response.content_type == "text/plain":
                    extras.add("metrics")
    finally:
        await beside.close()
    return replace(endpoint, root_url=root_url, extras=frozenset(extras)) if extras else endpoint
