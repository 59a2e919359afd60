"""Bytes from the engine to the client, of whatever type the engine is.

A stream is cut at the ends of its events and passed on as it is. An event is parsed only until the first token was
seen, and where it carries usage, an error or the end: a relay that parses each costs several times as much.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final, Protocol

import aiohttp
from pydantic_core import to_json

from llmkit.engines.http import EngineHTTP, finish_reading, read_start, read_whole
from llmkit.engines.refusals import MAX_ERROR_BYTES, is_missing_path, passes_unchanged, redact, redact_all
from llmkit.engines.sse import DONE, EventCutter, data_of
from llmkit.errors import EngineGone, LLMKitError, NotSupported, UpstreamFailed
from llmkit.inference.openai_api import PATHS, Call
from llmkit.inference.running import Running, read_usage
from llmkit.schemas import Usage

PASSED_HEADERS: Final = (
    "Retry-After",
    "x-ratelimit-limit-requests",
    "x-ratelimit-limit-tokens",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-remaining-tokens",
    "x-ratelimit-reset-requests",
    "x-ratelimit-reset-tokens",
)
"""Of an engine's answer, to the client."""

_ENDS: Final = ("response.completed", "response.failed", "response.incomplete")
# A quote within a JSON string is escaped, so that none of these but the first can stand in the words of a model.
_USAGE_WORD: Final = b'"usage"'
_WORDS: Final = (DONE, _USAGE_WORD, b'"error"')
"""One of these is in every event that has to be looked at, or of the next ones."""
_WORDS_OF_RESPONSES: Final = (*_WORDS, *(f'"{end}"'.encode() for end in _ENDS))
_USAGE: Final = re.compile(rb'"usage"\s*:\s*(?=\{)')
GATHER_SECONDS: Final = 0.0009
"""What comes sooner after a write waits so long for more: a write costs as much as many short events. The end of an
answer does not wait."""
PIECE_BYTES: Final = 16 << 10
"""So much is taken at a time: a piece is in memory several times while its client does not read."""
_LONGEST_USAGE: Final = 4096
_LONGEST_PARSED: Final = 256 << 10
_HEAD_BYTES: Final = 256
_HEADER_VALUE: Final = re.compile(r"[\x20-\x7e]{1,200}")
_DECODER: Final = json.JSONDecoder()


class Write(Protocol):
    """Hands whole events of a stream on, and is awaited before more is read."""

    async def __call__(self, events: bytes, *, is_last: bool) -> None:
        """Hand them on; ``is_last`` if nothing follows."""


@dataclass(frozen=True, slots=True)
class WholeAnswer:
    """An answer in one piece, as the client gets it."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


async def relay(
    http: EngineHTTP, call: Call, running: Running, write: Write, headers: Mapping[str, str] | None = None
) -> WholeAnswer | None:
    """Send a request to the engine and hand on what it answers.

    Parameters
    ----------
    http
        The engine.
    call
        The request.
    running
        What is noted of it: first token, usage.
    write
        Hands a stream on.
    headers
        Of the client's request, those that the engine may see.

    Returns
    -------
    WholeAnswer or None
        None if the answer was a stream; it is complete then.

    Raises
    ------
    LLMKitError
        If there is no answer that the client could use; after a part of a stream was written, too.
    """
    async with http.open(call.path, call.body, headers=headers) as response:
        status, kind = response.status, response.headers.get("Content-Type", "")
        if not HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES:
            return _refused(http, call, status, await read_start(response), response.headers)
        if kind.startswith("text/event-stream"):
            if not call.stream:
                raise UpstreamFailed(f"{http.name} streams an answer that was to come in one piece.")
            await _relay_stream(http, call, running, write, response)
            return None
        if "json" not in kind:
            raise UpstreamFailed(f"{http.name} answers, but not with JSON.", hint="Check base_url and api.")
        body = await read_whole(response)
        if len(body) <= _LONGEST_PARSED:
            http.raise_error_in(body)
        elif not (body[:1] == b"{" and body.rstrip()[-1:] == b"}"):
            raise UpstreamFailed(f"{http.name} answers, but not with a JSON object.", hint="Check base_url and api.")
        running.usage = find_usage(body)
        running.answering = running.complete = True
        running.keep(body)
        return WholeAnswer(status, body, _passed(http, response.headers))


async def _relay_stream(
    http: EngineHTTP, call: Call, running: Running, write: Write, response: aiohttp.ClientResponse
) -> None:
    relaying = StreamRelay(http, running, call)
    content, written_at = response.content, 0.0
    while not relaying.ended:
        is_over = content.at_eof()
        part = b"" if is_over else await content.read(PIECE_BYTES)
        if time.monotonic() < written_at + GATHER_SECONDS and not content.is_eof() and DONE not in part:
            await asyncio.sleep(GATHER_SECONDS)
            if content.exception() is None:  # else the next read raises it, after what came before is written
                part += content.read_nowait(PIECE_BYTES - len(part))
        events = relaying.end() if is_over else relaying.take(part)
        if events:
            running.answering = True
            running.keep(events)
            await write(events, is_last=relaying.ended)
            written_at = time.monotonic()
        if relaying.failure is not None:
            raise relaying.failure
        if is_over and not relaying.ended:
            raise EngineGone("The engine ended its answer before it was complete.", hint="Send the request again.")
    running.complete = True
    await finish_reading(response)


def _refused(http: EngineHTTP, call: Call, status: int, body: bytes, headers: Mapping[str, str]) -> WholeAnswer:
    if is_missing_path(status, body):
        raise NotSupported(
            f"{http.name} has no {call.path.lstrip('/')}, so this model cannot be asked for that.",
            hint="GET /llm/models/ says what a loaded model can do. In Python: client.model(...).capabilities.",
        )
    key = http.endpoint.api_key
    try:
        told = json.loads(body) if passes_unchanged(status) and len(body) < MAX_ERROR_BYTES else None
        if not isinstance(told, dict):
            raise http.refusal(status, body, headers)
        clean = redact_all(told, key) if key else told
        return WholeAnswer(status, body if clean == told else to_json(clean), _passed(http, headers))
    except (ValueError, RecursionError):
        raise http.refusal(status, body, headers) from None


def _passed(http: EngineHTTP, headers: Mapping[str, str]) -> dict[str, str]:
    found = {name: headers[name] for name in PASSED_HEADERS if name in headers}
    if not found:
        return found
    key = http.endpoint.api_key
    return {name: redact(value, key) for name, value in found.items() if _HEADER_VALUE.fullmatch(value)}


def find_usage(body: bytes) -> Usage | None:
    """Read the usage of an answer without reading the rest, which can be megabytes of embeddings."""
    found = _USAGE.match(body, max(body.rfind(b'"usage"'), 0))
    if found is None:
        return None
    text = body[found.end() : found.end() + _LONGEST_USAGE].decode("utf-8", "replace")
    try:
        told, _ = _DECODER.raw_decode(text)
    except ValueError:
        return None
    return read_usage(told)


class StreamRelay:
    """Takes an engine's stream in pieces and gives what goes to the client.

    Attributes
    ----------
    ended
        Whether the last event of the answer was seen.
    failure
        What an event has told instead of going on with the answer.
    """

    __slots__ = ("_cutter", "_http", "_running", "_wants_usage", "_words", "ended", "failure")

    def __init__(self, http: EngineHTTP, running: Running, call: Call) -> None:
        self._http = http
        self._running = running
        self._wants_usage = call.wants_usage
        self._words = _WORDS_OF_RESPONSES if call.path == PATHS["responses"] else _WORDS
        self._cutter = EventCutter()
        self.ended = False
        self.failure: LLMKitError | None = None

    def take(self, part: bytes) -> bytes:
        """Take a piece and give the whole events that are to be passed on, perhaps none."""
        return self._look_at(self._cutter.feed(part))

    def end(self) -> bytes:
        """Give what is to be passed on of a stream that is over."""
        return self._look_at(self._cutter.end())

    def _look_at(self, events: bytes) -> bytes:
        if b"\r" in events:
            events = events.replace(b"\r\n", b"\n")
        found = {word: place for word in self._words if (place := events.find(word)) >= 0}
        if not found and self._running.first_token is not None:
            return events
        notable = _Notable(events, found)
        kept, at = [], 0
        while at < len(events) and not self.ended and self.failure is None:
            if self._running.first_token is not None:
                begin = notable.next_event(at)
                if begin != at:
                    kept.append(events[at:begin])
                    at = begin
                    continue
            end = events.index(b"\n\n", at)
            if self._is_passed(events[at:end]):
                kept.append(events[at : end + 2])
            at = end + 2
        return kept[0] if len(kept) == 1 else b"".join(kept)

    def _is_passed(self, event: bytes) -> bool:
        """Note what an event tells, and say whether the client gets it."""
        data = (data_of(event) or b"").strip()
        if not data or data == DONE:
            self.ended = data == DONE
            return True
        if len(data) > _LONGEST_PARSED:  # it would take the time of others
            self.ended = any(f'"{end}"'.encode() in data[:_HEAD_BYTES] for end in _ENDS)
            self._running.usage = find_usage(data) or self._running.usage
            return True
        try:
            told = json.loads(data)
        except (ValueError, RecursionError):
            self.failure = UpstreamFailed("The endpoint's answer is not JSON.", hint="Check base_url and api.")
            return False
        if not isinstance(told, dict):
            return True
        error, kind = told.get("error"), told.get("type")
        if error or kind == "error":
            self.failure = self._http.error_of(error, data)
            return False
        running = self._running
        if running.first_token is None and has_token(told):
            running.first_token = time.monotonic()
        if kind in _ENDS:
            self.ended = True
            running.failed = UpstreamFailed.code if kind == "response.failed" else None
            whole = told.get("response")
            running.usage = read_usage(whole.get("usage")) if isinstance(whole, dict) else None
            return True
        usage = told.get("usage")
        if isinstance(usage, dict):
            running.usage = read_usage(usage) or running.usage
            # The frame that we have asked for, and the client has not.
            return told.get("choices") != [] or self._wants_usage
        return True


class _Notable:
    """Finds, in some events, those that have to be looked at; each word is searched for once through all of them.

    Searching for words is many times as quick as one expression of them all.
    """

    __slots__ = ("_events", "_found")

    def __init__(self, events: bytes, found: dict[bytes, int]) -> None:
        self._events = events
        self._found = found

    def next_event(self, at: int) -> int:
        """Give where the next one begins, from ``at`` on, or the end if there is none; ``at`` must not go back."""
        events = self._events
        first = len(events)
        for word, found in list(self._found.items()):
            place = found
            # Many endpoints say in every event that they will tell the usage later: null.
            while place >= 0 and (place < at or (word == _USAGE_WORD and not _USAGE.match(events, place))):
                place = events.find(word, max(place + len(word), at))
            if place < 0:
                del self._found[word]
                continue
            self._found[word] = place
            first = min(first, place)
        if first == len(events):
            return first
        blank = events.rfind(b"\n\n", at, first)
        return at if blank < 0 else blank + 2


def has_token(told: Mapping[str, Any]) -> bool:
    """Say whether an event carries a part of the answer: not its role alone, not its usage."""
    kind = told.get("type")
    if isinstance(kind, str):
        return kind.endswith(".delta")
    choices = told.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        return False
    delta = choice.get("delta")
    part = delta if isinstance(delta, dict) else choice
    return any(part.get(name) for name in ("content", "text", "reasoning", "reasoning_content", "tool_calls"))
