"""HTTP to an engine: sessions, requests, tries.

Nothing an upstream says is trusted: redirects and authentication challenges are not followed, answers are
bounded, and compressed ones are neither asked for nor unpacked.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import json
import os
import random
from collections.abc import AsyncGenerator, Mapping
from http import HTTPStatus
from types import TracebackType
from typing import Any, Final

import aiohttp
from pydantic_core import to_json
from yarl import URL

from llmkit.engines.addresses import GuardedResolver, NotCalled, origin_of, why_not_called
from llmkit.engines.answer_memory import whole_answer
from llmkit.engines.base import Endpoint
from llmkit.engines.refusals import MAX_ERROR_BYTES, refusal, retry_after
from llmkit.engines.sse import DONE, EventCutter, data_of, split_events
from llmkit.errors import EngineGone, LLMKitError, TimedOut, UpstreamFailed, UpstreamUnreachable

MAX_ANSWER_BYTES: Final = 36 << 20
"""Of one that is only passed on; OpenAI's largest, 2,048 embeddings of 3,072 numbers in base64, has 33 MiB."""
MAX_PARSED_BYTES: Final = 8 << 20
"""Of an answer that is not only passed on."""
MAX_CONTAINERS: Final = 200_000
"""Lists and objects in it; an answer of 4,000 tokens with 20 log probabilities each has nearly as many."""
IN_THREAD_BYTES: Final = 256 << 10
"""What is longer is parsed beside the event loop."""
MAX_PIECE_BYTES: Final = 256 << 10
CONNECT_SECONDS: Final = 10.0
KEEP_ALIVE_SECONDS: Final = 4.0
"""uvicorn closes an idle connection after 5 s; who keeps it longer writes into a closed one."""
READ_BYTES: Final = 64 << 10
BUFFER_BYTES: Final = 16 << 10
"""aiohttp stops reading at twice as much: what a client does not take stays with the engine."""

RETRIED: Final = frozenset(
    {
        HTTPStatus.TOO_MANY_REQUESTS,
        HTTPStatus.INTERNAL_SERVER_ERROR,
        HTTPStatus.BAD_GATEWAY,
        HTTPStatus.SERVICE_UNAVAILABLE,
        HTTPStatus.GATEWAY_TIMEOUT,
    }
)
FIRST_PAUSE_SECONDS: Final = 0.5
LONGEST_PAUSE_SECONDS: Final = 8.0
END_SECONDS: Final = 0.2
"""So long is the end of a stream waited for after its last event."""
LONGEST_WAIT_SECONDS: Final = 60.0
"""An endpoint that wants to be left alone for longer is not waited for."""

NO_HEADERS: Final[Mapping[str, str]] = {}


def pause_before_retry(headers: Mapping[str, str], tries: int) -> float | None:
    """Give the seconds to wait before a request is sent again, or None to leave it.

    Parameters
    ----------
    headers
        Of the answer; its ``Retry-After`` counts.
    tries
        How often it was sent again already.
    """
    asked = retry_after(headers)
    if asked is not None:
        return asked if asked <= LONGEST_WAIT_SECONDS else None
    # Not all at the same moment: a quarter of it is chance.
    pause = min(FIRST_PAUSE_SECONDS * 2.0**tries, LONGEST_PAUSE_SECONDS)
    return pause * (1 - 0.25 * random.random())  # noqa: S311  # no secret


class EngineHTTP:
    """Keep-alive connections to one engine's OpenAI-compatible API."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.takes_stream_options = True
        """Whether it was not seen yet that the endpoint refuses ``stream_options``."""
        connector: aiohttp.BaseConnector
        if endpoint.uds is not None:
            connector = aiohttp.UnixConnector(str(endpoint.uds), limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS)
        else:
            connector = aiohttp.TCPConnector(
                limit=0,
                keepalive_timeout=KEEP_ALIVE_SECONDS,
                ssl=endpoint.ssl if endpoint.ssl is not None else True,
                # Every connection goes to the proxy, where there is one, and where that is, the operator says.
                resolver=None if endpoint.proxy else GuardedResolver(),
            )
        # Of each request: those of the session go to a proxy as well, and the key as if it were the proxy's.
        self._headers = {**endpoint.headers}
        if endpoint.api_key:
            self._headers["Authorization"] = f"Bearer {endpoint.api_key}"
        self._headers_with_body = {**self._headers, "Content-Type": "application/json"}
        self._session = aiohttp.ClientSession(
            connector=connector,
            headers={"Accept-Encoding": "identity", "User-Agent": "llmkit"},
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            proxy=endpoint.proxy,
            read_bufsize=BUFFER_BYTES,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=endpoint.timeout),
        )
        self._urls: dict[str, URL] = {}
        self._parsing = asyncio.Lock()

    async def close(self) -> None:
        """Close every connection."""
        await self._session.close()

    def open(
        self, path: str, body: bytes | None = None, *, method: str = "POST", headers: Mapping[str, str] | None = None
    ) -> Exchange:
        """Send a request and give the answer within ``async with``, whatever its status.

        Leaving it before the answer has ended ends it at the engine, too.

        Parameters
        ----------
        path
            Below ``base_url``; one that begins with two slashes below ``root_url``, for what is outside OpenAI's API.

        Raises
        ------
        EngineGone, TimedOut, UpstreamFailed
            If there is none, or it is compressed, or it breaks off within the block.
        """
        own = self._headers_with_body if body is not None else self._headers
        return Exchange(self, method, path, body, {**headers, **own} if headers else own)

    async def send(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str] | None
    ) -> aiohttp.ClientResponse:
        """Send a request, again where that may help and nothing was answered yet, and give the answer; for `Exchange`.

        Raises
        ------
        UpstreamFailed
            If the answer is compressed.
        aiohttp.ClientError, OSError, ValueError
            If there is none.
        """
        url = self._urls.get(path) or self._url(path)
        # A file is sent piece by piece; bytes of a large prompt in one piece would hold up the event loop.
        large = body is not None and len(body) > MAX_PIECE_BYTES
        tries, stale = 0, False
        while True:
            last = tries >= self.endpoint.max_retries
            try:
                response = await self._session.request(
                    method,
                    url,
                    data=io.BytesIO(body) if large and body is not None else body,
                    headers=headers,
                    allow_redirects=False,
                )
            except aiohttp.ClientConnectorCertificateError:
                raise
            except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
                if _was_not_sent(error) and not stale:
                    stale = True  # a kept connection that the engine had closed: once more is safe
                    continue
                if last or isinstance(getattr(error, "os_error", None), NotCalled):
                    raise
                pause = pause_before_retry(NO_HEADERS, tries)
            else:
                if last or response.status not in RETRIED:
                    return self._checked(response)
                pause = pause_before_retry(response.headers, tries)
                if pause is None:
                    return self._checked(response)
                response.close()
            tries += 1
            await asyncio.sleep(pause or 0.0)

    def _checked(self, response: aiohttp.ClientResponse) -> aiohttp.ClientResponse:
        encoding = response.headers.get("Content-Encoding")
        if encoding is not None and encoding != "identity":
            response.close()
            raise UpstreamFailed(
                f"{self.name} sends its answer compressed, which it was asked not to do.",
                hint="Check base_url: a proxy on the way may do that.",
            )
        return response

    def _url(self, path: str) -> URL:
        endpoint = self.endpoint
        base, rest = (endpoint.root_url, path[1:]) if path.startswith("//") else (endpoint.base_url, path)
        assert base is not None  # noqa: S101  # callers look whether there is a root_url
        url = URL(base.rstrip("/") + rest, encoded=True)
        if endpoint.uds is None and (why := why_not_called(url.raw_host or "")) is not None:
            raise self._never(f"its host {why}")  # stored by an earlier version, or set in the environment
        self._urls[path] = url
        return url

    # -- whole answers -------------------------------------------------------------------------------------

    async def json(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send a request and give its JSON object.

        Raises
        ------
        LLMKitError
            For any answer but a 2xx with a JSON object, and for none.
        """
        async with self.open(path, None if body is None else to_json(body), method=method) as response:
            await self.check_status(response)
            return await self._read_object(response)

    async def _read_object(self, response: aiohttp.ClientResponse) -> dict[str, Any]:
        async with whole_answer(response, MAX_PARSED_BYTES) as data:
            if len(data) <= IN_THREAD_BYTES:
                answer = _object(data)
            else:
                async with self._parsing:  # one at a time: each takes many times its bytes of memory meanwhile
                    answer = await asyncio.to_thread(_object, data)
            self._raise_error_in(answer, data)
        return answer

    async def status(self, path: str) -> tuple[int, Any]:
        """Send a GET and give its status with its JSON, or None where that is not JSON."""
        async with self.open(path, method="GET") as response:
            try:
                async with whole_answer(response, MAX_PARSED_BYTES) as data:
                    return response.status, await asyncio.to_thread(_parse, data)
            except (ValueError, RecursionError):
                return response.status, None

    async def events(self, path: str, body: dict[str, Any]) -> AsyncGenerator[list[dict[str, Any]], None]:
        """Send a request that streams, and give the JSON objects of the events, as many at once as have come.

        Raises
        ------
        LLMKitError
            As `json`; also for an error in an event, and if there is no ``[DONE]`` at the end.
        """
        cutter = EventCutter()
        async with self.open(path, to_json(body)) as response:
            await self.check_status(response)
            kind = response.headers.get("Content-Type", "")
            if "json" in kind:  # an endpoint that does not stream
                yield [await self._read_object(response)]
                return
            if kind.startswith("text/html"):
                raise UpstreamFailed(
                    f"{self.name} answers with a web page.", hint="Check base_url; it usually ends in /v1."
                )
            is_over = False
            while not is_over:
                is_over = response.content.at_eof()
                events = cutter.end() if is_over else cutter.feed(await response.content.readany())
                objects, failure, ended = self._read_events(events)
                if objects:
                    yield objects
                if failure is not None:
                    raise failure
                if ended:
                    await finish_reading(response)
                    return
        raise EngineGone("The engine ended its answer before it was complete.", hint="Send the request again.")

    def _read_events(self, events: bytes) -> tuple[list[dict[str, Any]], LLMKitError | None, bool]:
        """Give the objects of some events up to an error or the end, the error, and whether it was the end."""
        objects: list[dict[str, Any]] = []
        for event in split_events(events):
            data = (data_of(event) or b"").strip()
            if data == DONE:
                return objects, None, True
            if data:
                try:
                    told = _object(data)
                    self._raise_error_in(told, data)
                except LLMKitError as error:
                    return objects, error, False
                objects.append(told)
        return objects, None, False

    async def check_status(self, response: aiohttp.ClientResponse) -> None:
        """Raise what an answer without success means."""
        if not HTTPStatus.OK <= response.status < HTTPStatus.MULTIPLE_CHOICES:
            raise self.refusal(response.status, await read_start(response), response.headers)

    def raise_error_in(self, data: bytes) -> None:
        """Raise the error that an answer of JSON with status 200 tells, if it does."""
        self._raise_error_in(_object(data), data)

    def _raise_error_in(self, answer: dict[str, Any], data: bytes | bytearray) -> None:
        """Raise the error that some endpoints send with status 200."""
        error = answer.get("error")
        if error:
            raise self.error_of(error, bytes(data))

    def error_of(self, error: Any, data: bytes) -> LLMKitError:
        """Give the error that an answer tells within itself: its own status counts, if it is one of an error."""
        code = error.get("code") if isinstance(error, dict) else None
        known = isinstance(code, int) and HTTPStatus.BAD_REQUEST <= code < 600
        return self.refusal(code if isinstance(code, int) and known else HTTPStatus.BAD_GATEWAY, data)

    # -- failures ------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """What to call the endpoint in a sentence."""
        return "The engine" if self.endpoint.uds else origin_of(self.endpoint.base_url)

    def refusal(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> LLMKitError:
        """Give the error that an answer of the engine means."""
        return refusal(self.endpoint, self.name, status, body, headers or {})

    def explain(self, error: BaseException) -> LLMKitError | None:
        """Give our error of what the HTTP library has raised, or None if it is not of its kind."""
        if isinstance(error, TimeoutError):
            return TimedOut(f"{self.name} did not answer in time.", hint="Raise `timeout`, or ask for less.")
        # ValueError: host names and headers that cannot be sent.
        if isinstance(error, aiohttp.ClientError | OSError | ValueError):
            return self._gone(error)
        return None

    def _gone(self, error: Exception) -> LLMKitError:
        if self.endpoint.uds:
            return EngineGone("The engine ended or does not answer.", hint="Load the model again; its log says more.")
        if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientConnectorSSLError):
            why = "its certificate was not accepted"
        elif isinstance(error, aiohttp.ClientProxyConnectionError):
            why = "the proxy on the way to it cannot be reached"
        elif isinstance(error, aiohttp.ClientHttpProxyError):
            why = "the proxy on the way to it refused"
        elif isinstance(error, aiohttp.ClientConnectorDNSError) and isinstance(error.os_error, NotCalled):
            return self._never(str(error.os_error))
        elif isinstance(error, aiohttp.ClientConnectorDNSError):
            why = "its name is not known"
        elif isinstance(error, aiohttp.ClientConnectorError):
            why = os.strerror(error.os_error.errno) if error.os_error.errno else "no connection"
        else:
            why = "the connection broke"
        return UpstreamUnreachable(
            f"Nothing usable answers at {self.endpoint.base_url}: {why}.",
            param="model_kwargs.base_url",
            hint="Check base_url, and that the endpoint is up and can be reached from the Jupyter server.",
        )

    def _never(self, why: str) -> UpstreamUnreachable:
        return UpstreamUnreachable(
            f"{self.endpoint.base_url} is never called: {why}.",
            param="model_kwargs.base_url",
            hint="Set base_url to an endpoint of models.",
        )


class Exchange:
    """A request and its answer, made by `EngineHTTP.open`; an asynchronous context manager, to be entered once."""

    # A class rather than a generator: every request passes here.
    __slots__ = ("_closed", "_http", "_request", "_response")

    def __init__(
        self, http: EngineHTTP, method: str, path: str, body: bytes | None, headers: Mapping[str, str] | None
    ) -> None:
        self._http = http
        self._request = (method, path, body, headers)
        self._closed: asyncio.Future[None] | None = None

    async def __aenter__(self) -> aiohttp.ClientResponse:
        try:
            response = self._response = await self._http.send(*self._request)
        except Exception as error:
            explained = self._http.explain(error)
            if explained is not None:
                raise explained from error
            raise
        connection = response.connection  # none any more where all of the answer has come
        if connection is not None and connection.protocol is not None:
            # How much is read at once; asyncio's default is four times as much.
            with contextlib.suppress(AttributeError):  # an event loop of another make
                setattr(connection.transport, "max_size", READ_BYTES)  # noqa: B010  # not of all transports
            self._closed = connection.protocol.closed
            if self._closed is not None:
                self._closed.add_done_callback(self._end_reading)
        return response

    def _end_reading(self, _: asyncio.Future[None]) -> None:
        """Tell a reader that nothing more comes: aiohttp forgets that where a chunk has no proper size."""
        content = self._response.content
        if not content.is_eof() and content.exception() is None:
            content.set_exception(aiohttp.ClientPayloadError("the answer broke off"))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._closed is not None:  # one connection serves many requests
            self._closed.remove_done_callback(self._end_reading)
        await self._response.__aexit__(kind, error, trace)
        # What is no error of HTTP was raised by who reads.
        explained = self._http.explain(error) if isinstance(error, aiohttp.ClientError | TimeoutError) else None
        if explained is not None:
            raise explained from error


def _was_not_sent(error: Exception) -> bool:
    """Say whether not a byte of a request was taken by the other side."""
    if isinstance(error, aiohttp.ClientConnectionResetError):
        return True
    return isinstance(error, aiohttp.ClientOSError) and error.errno == errno.EPIPE


# -- reading -----------------------------------------------------------------------------------------------


async def read_whole(response: aiohttp.ClientResponse) -> bytes:
    """Read an answer, or raise `UpstreamFailed` if it is too large."""
    async with whole_answer(response, MAX_ANSWER_BYTES) as data:
        return bytes(data)


async def read_start(response: aiohttp.ClientResponse) -> bytes:
    """Read so much of an answer as is needed to say what it means."""
    data = bytearray()
    async for part in response.content.iter_any():
        data += part
        if len(data) >= MAX_ERROR_BYTES:
            break
    return bytes(data[:MAX_ERROR_BYTES])


async def finish_reading(response: aiohttp.ClientResponse) -> None:
    """Read the end of an answer whose last event has come, so that its connection can be used again.

    A cancellation ends the reading, and nothing else: the answer is complete.
    """
    if response.content.at_eof():
        return
    try:
        async with asyncio.timeout(END_SECONDS):
            await response.content.readany()
    except (TimeoutError, aiohttp.ClientError):
        pass  # the connection is closed then
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None:
            task.uncancel()


def _parse(data: bytes | bytearray) -> Any:
    """Parse JSON; a few bytes of it can take a hundred times as many of memory."""
    if len(data) > IN_THREAD_BYTES and data.count(b"[") + data.count(b"{") > MAX_CONTAINERS:
        raise UpstreamFailed("The endpoint's answer has too many parts.", hint="Check base_url and api.")
    return json.loads(data)


def _object(data: bytes | bytearray) -> dict[str, Any]:
    try:
        value = _parse(data)
    except (ValueError, RecursionError) as error:
        raise UpstreamFailed(
            "The endpoint's answer is not JSON.", hint="Check base_url; it usually ends in /v1."
        ) from error
    if not isinstance(value, dict):
        raise UpstreamFailed("The endpoint's answer is not a JSON object.", hint="Check base_url.")
    return value
