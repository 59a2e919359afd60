"""HTTP to an engine: sessions, requests, and its failures in our words.

Nothing an upstream says is trusted: redirects and authentication challenges are not followed, answers are
bounded, compressed ones are neither asked for nor unpacked, and keys are blanked in its words.
"""

from __future__ import annotations

import asyncio
import io
import json
import re
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from pydantic_core import to_json

from llmkit.engines.base import Endpoint
from llmkit.errors import (
    ContextLengthExceeded,
    EngineGone,
    EngineRefused,
    LLMKitError,
    ModelNameNotFound,
    QueueFull,
    TimedOut,
    UpstreamFailed,
    UpstreamRefusedKey,
    UpstreamUnreachable,
)

MAX_ANSWER_BYTES = 64 << 20
MAX_ERROR_BYTES = 64 << 10
MAX_EVENT_BYTES = 4 << 20
MAX_PIECE_BYTES = 256 << 10
CONNECT_SECONDS = 10.0
# uvicorn closes an idle connection after 5 s; who keeps it longer writes into a closed one.
KEEP_ALIVE_SECONDS = 4.0

_CONTEXT_WORDS = re.compile(
    r"context[ _]length|maximum context|max_model_len|maximum model length|too many tokens|prompt is too long",
    re.IGNORECASE,
)
_HOST = re.compile(r"(?!.{254})[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?")
_KEY_RUN = 8
_JSON = {"Content-Type": "application/json"}


def redact(text: str, key: str | None) -> str:
    """Blank a key, and what begins or ends like it, in somebody else's words."""
    if not key:
        return text
    text = text.replace(key, "[key]")
    if len(key) > _KEY_RUN:
        text = re.sub(re.escape(key[:_KEY_RUN]) + r"[^\s\"',]*", "[key]", text)
        text = re.sub(r"[^\s\"',]*" + re.escape(key[-_KEY_RUN:]), "[key]", text)
    return text


def origin_of(url: str) -> str:
    """Give ``scheme://host:port`` of a URL, with the port always written.

    Raises
    ------
    ValueError
        If it is no http or https URL with a host, or carries a user name or password.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise ValueError("the address must begin with http:// or https://")
    if not parts.hostname:
        raise ValueError("the address has no host")
    if "@" in parts.netloc:
        raise ValueError("the address must not carry a user name or password")
    if "?" in url or "#" in url:
        raise ValueError("the address must not have a query or a fragment")
    if not _HOST.fullmatch(parts.hostname) and ":" not in parts.hostname:
        raise ValueError("the host is no host name in ASCII letters")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}:{parts.port or (443 if parts.scheme == 'https' else 80)}"


class EngineHTTP:
    """Keep-alive connections to one engine's OpenAI-compatible API."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        connector: aiohttp.BaseConnector
        if endpoint.uds is not None:
            connector = aiohttp.UnixConnector(str(endpoint.uds), limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS)
        else:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS)
        headers = {"Accept-Encoding": "identity", "User-Agent": "llmkit", **endpoint.headers}
        if endpoint.api_key:
            headers["Authorization"] = f"Bearer {endpoint.api_key}"
        self._session = aiohttp.ClientSession(
            connector=connector,
            headers=headers,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=endpoint.timeout),
        )

    async def close(self) -> None:
        """Close every connection."""
        await self._session.close()

    async def json(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send a request and give its JSON object.

        Raises
        ------
        LLMKitError
            For any answer but a 2xx with a JSON object, and for none.
        """
        async with self._request(method, path, body) as response:
            data = await _read(response, MAX_ANSWER_BYTES)
            answer = _object(data)
            self._raise_error_in(answer, data)
            return answer

    def _raise_error_in(self, answer: dict[str, Any], data: bytes) -> None:
        """Raise the error that some endpoints send with status 200."""
        error = answer.get("error")
        if error:
            code = error.get("code") if isinstance(error, dict) else None
            known = isinstance(code, int) and HTTPStatus.BAD_REQUEST <= code < 600
            raise self.refusal(code if isinstance(code, int) and known else HTTPStatus.BAD_GATEWAY, data)

    async def status(self, path: str) -> tuple[int, Any]:
        """Send a GET and give its status with its JSON, or None where that is not JSON."""
        async with self._open("GET", path, None) as response:
            try:
                return response.status, json.loads(await _read(response, MAX_ANSWER_BYTES))
            except ValueError:
                return response.status, None

    async def events(self, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Send a request that streams, and give the JSON object of each server-sent event until ``[DONE]``."""
        async with self._request("POST", path, body) as response:
            async for data in _sse(response):
                if data == b"[DONE]":
                    return
                event = _object(data)
                self._raise_error_in(event, data)
                yield event
        raise EngineGone("The engine ended its answer before it was complete.", hint="Send the request again.")

    @asynccontextmanager
    async def _request(
        self, method: str, path: str, body: dict[str, Any] | None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        async with self._open(method, path, body) as response:
            if not HTTPStatus.OK <= response.status < HTTPStatus.MULTIPLE_CHOICES:
                raise self.refusal(response.status, await _read(response, MAX_ERROR_BYTES, cut=True))
            yield response

    @asynccontextmanager
    async def _open(self, method: str, path: str, body: dict[str, Any] | None) -> AsyncIterator[aiohttp.ClientResponse]:
        url = self.endpoint.base_url.rstrip("/") + path
        encoded = None if body is None else to_json(body)

        def send() -> Awaitable[aiohttp.ClientResponse]:
            # A file is sent piece by piece; bytes of a large prompt in one piece would hold up the event loop.
            data = io.BytesIO(encoded) if encoded and len(encoded) > MAX_PIECE_BYTES else encoded
            headers = _JSON if encoded else None
            return self._session.request(method, url, data=data, headers=headers, allow_redirects=False)

        try:
            try:
                response = await send()
            except aiohttp.ClientConnectionResetError:
                # A kept connection that the engine had closed: nothing was sent, so once more is safe.
                response = await send()
            async with response:
                yield response
        except (TimeoutError, aiohttp.ServerTimeoutError) as error:
            raise TimedOut(f"{self._name} did not answer in time.", hint="Raise `timeout`, or ask for less.") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            # ValueError: host names and headers that cannot be sent.
            raise self._gone(error) from error

    @property
    def _name(self) -> str:
        return "The engine" if self.endpoint.uds else origin_of(self.endpoint.base_url)

    def _gone(self, error: Exception) -> LLMKitError:
        if self.endpoint.uds:
            return EngineGone("The engine ended or does not answer.", hint="Load the model again; its log says more.")
        if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientConnectorSSLError):
            why = "its certificate was not accepted"
        elif isinstance(error, aiohttp.ClientConnectorDNSError):
            why = "its name is not known"
        elif isinstance(error, aiohttp.ClientConnectorError):
            why = error.os_error.strerror or "no connection"
        else:
            why = "the connection broke"
        return UpstreamUnreachable(
            f"Nothing usable answers at {self.endpoint.base_url}: {why}.",
            param="model_kwargs.base_url",
            hint="Check base_url, and that the endpoint is up and can be reached from the Jupyter server.",
        )

    def refusal(self, status: int, body: bytes = b"") -> LLMKitError:
        """Give the error that an answer of the engine means."""
        # What is said with a 401 often holds parts of the key; it is not repeated.
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            given = "the key" if self.endpoint.api_key else "a request without a key"
            return UpstreamRefusedKey(
                f"{self._name} refused {given} ({status}).",
                param="model_kwargs.api_key",
                hint="Configure the model with an api_key that this endpoint accepts, for example env:OPENAI_API_KEY.",
            )
        said = redact(_message(body), self.endpoint.api_key)
        if status in (
            HTTPStatus.BAD_REQUEST,
            HTTPStatus.UNPROCESSABLE_ENTITY,
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        ):
            if _CONTEXT_WORDS.search(said):
                return ContextLengthExceeded(
                    said,
                    param="prompt",
                    hint="Shorten the prompt, lower max_tokens, or load with a larger max_model_len.",
                )
            return EngineRefused(
                said or f"{self._name} refused the request ({status}).",
                param=redact(_param(body) or "", self.endpoint.api_key)[:200] or None,
            )
        if status == HTTPStatus.NOT_FOUND:
            return ModelNameNotFound(
                said or f"{self._name} does not know `{self.endpoint.model}`, or has no such path.",
                param="model_name",
                hint="Check model_name and base_url.",
            )
        if status == HTTPStatus.TOO_MANY_REQUESTS:
            return QueueFull(said or f"{self._name} asks to slow down.", hint="Wait a little, then send it again.")
        if HTTPStatus.MULTIPLE_CHOICES <= status < HTTPStatus.BAD_REQUEST:
            return UpstreamFailed(
                f"{self._name} redirects elsewhere; redirects are not followed.",
                hint="Set base_url to the final address.",
            )
        return UpstreamFailed(f"{self._name} failed ({status}): {said}"[:2000], hint="Send it again later.")


async def _read(response: aiohttp.ClientResponse, limit: int, *, cut: bool = False) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in response.content.iter_any():
        parts.append(part)
        size += len(part)
        if size > limit:
            if cut:
                break
            raise UpstreamFailed(f"The answer is larger than {limit >> 20} MiB.")
    return b"".join(parts)[:limit]


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UpstreamFailed(
            "The endpoint's answer is not JSON.", hint="Check base_url; it usually ends in /v1."
        ) from error
    if not isinstance(value, dict):
        raise UpstreamFailed("The endpoint's answer is not a JSON object.", hint="Check base_url.")
    return value


def _fields(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    error = value.get("error", value) if isinstance(value, dict) else {}
    return error if isinstance(error, dict) else {"message": error}


def _message(body: bytes) -> str:
    fields = _fields(body)
    said = fields.get("message") or fields.get("detail") or ("" if fields else body.decode("utf-8", "replace"))
    return " ".join(str(said).split())[:1000]


def _param(body: bytes) -> str | None:
    param = _fields(body).get("param")
    return param if isinstance(param, str) else None


async def _sse(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Give the data of each server-sent event; comments and other fields are passed over."""
    buffer = b""
    data: list[bytes] = []
    async for part in response.content.iter_any():
        *lines, buffer = (buffer + part).split(b"\n")
        if len(buffer) > MAX_EVENT_BYTES:
            raise UpstreamFailed("The endpoint sends an endless line.")
        for raw in lines:
            line = raw.removesuffix(b"\r")
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
                if sum(map(len, data)) > MAX_EVENT_BYTES:
                    raise UpstreamFailed("The endpoint sends an endless event.")
            elif not line and data:
                yield b"\n".join(data)
                data = []
        await asyncio.sleep(0)  # one part can hold thousands of events; others have a turn too
    if data:
        yield b"\n".join(data)
