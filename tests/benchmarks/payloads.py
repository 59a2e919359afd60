"""What is asked and answered in the benchmarks, and how an answer is checked: known to upstream and load generator."""

from __future__ import annotations

import json
import re
from typing import Any

MODEL = "mock"
CHUNKS = 64
WORDS = 32
ANSWER = " ".join(f"word{number:02}" for number in range(WORDS))
USAGE = {"prompt_tokens": 24, "completion_tokens": WORDS, "total_tokens": 24 + WORDS}
DONE = b"data: [DONE]"

NOW, PACED, SLOW, HOLD, BROKEN = "now", "paced", "slow", "hold", "broken"
PAUSES = {NOW: 0.0, PACED: 0.005, SLOW: 0.02, HOLD: 600.0}
"""Seconds between the chunks of a stream, by the word that asks for them."""

_CREATED = 1_750_000_000
_PIECE = re.compile(rb'"content": ?"(t\d\d) "')
_PIECES = [b"t%02d" % number for number in range(CHUNKS)]


def plain_answer() -> bytes:
    """Give the whole chat completion that the upstream answers."""
    message = {"role": "assistant", "content": ANSWER, "refusal": None}
    return json.dumps(
        {
            "id": "chatcmpl-0123456789abcdef",
            "object": "chat.completion",
            "created": _CREATED,
            "model": MODEL,
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
            "usage": USAGE,
        }
    ).encode()


def _event(fields: dict[str, Any]) -> bytes:
    head = {
        "id": "chatcmpl-0123456789abcdef",
        "object": "chat.completion.chunk",
        "created": _CREATED,
        "model": MODEL,
    }
    return b"data: " + json.dumps(head | fields, separators=(",", ":")).encode() + b"\n\n"


def stream_events() -> list[bytes]:
    """Give the chunks of a stream, numbered, without what ends it."""
    events = []
    for number in range(CHUNKS):
        delta = {"content": f"t{number:02} "}
        if number == 0:
            delta = {"role": "assistant", **delta}
        finish = "stop" if number == CHUNKS - 1 else None
        events.append(_event({"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]}))
    return events


def usage_event() -> bytes:
    """Give the frame that comes last if ``stream_options.include_usage`` asks for it."""
    usage = {"prompt_tokens": 24, "completion_tokens": CHUNKS, "total_tokens": 24 + CHUNKS}
    return _event({"choices": [], "usage": usage})


def chat_body(model: str, *, stream: bool, mode: str = NOW, **more: Any) -> bytes:
    """Give the body of a request as a client would send it; `mode` tells the upstream how to answer."""
    messages = [
        {"role": "system", "content": "You answer in one sentence."},
        {"role": "user", "content": f"{mode} Tell me about the relay between a notebook and its language model."},
    ]
    body: dict[str, Any] = {"model": model, "messages": messages, "max_tokens": CHUNKS, "temperature": 0.2, **more}
    if stream:
        body["stream"] = True
    return json.dumps(body).encode()


def wrong_plain(body: bytes) -> str | None:
    """Say what is wrong with a whole answer, or None."""
    return None if ANSWER.encode() in body else f"the text is not what the upstream said: {body[:300]!r}"


def wrong_stream(payload: bytes) -> str | None:
    """Say what is wrong with a stream, or None: every chunk in order, then the end, whatever the form of the JSON."""
    if not payload.rstrip().endswith(DONE):
        return f"a stream without its end: {payload[-300:]!r}"
    if (pieces := _PIECE.findall(payload)) != _PIECES:
        return f"{len(pieces)} chunks that are not the upstream's {CHUNKS} in order: {payload[:300]!r}"
    return None


def wrong_tokens(payload: bytes) -> str | None:
    """Say what is wrong with a stream of a real engine that was asked for `CHUNKS` tokens, or None."""
    if not payload.rstrip().endswith(DONE):
        return f"a stream without its end: {payload[-300:]!r}"
    counts = re.findall(rb'"completion_tokens": ?(\d+)', payload)
    if not counts or int(counts[-1]) != CHUNKS:
        return f"not {CHUNKS} tokens: {payload[-400:]!r}"
    return None


CHECKS = {"plain": wrong_plain, "stream": wrong_stream, "tokens": wrong_tokens}
