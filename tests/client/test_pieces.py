"""Streams of models that think before they answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from aiohttp import web
from mock_upstream import MockUpstream, event

from llmkit.client import Client, Piece
from llmkit.errors import EngineGone

DELTAS: list[dict[str, Any]] = [
    {"reasoning_content": "Capital"},
    {"reasoning_content": " of France?"},
    {"reasoning_content": " Easy.", "content": "Pa"},
    {"content": "ris"},
]
PIECES = [Piece("", "Capital"), Piece("", " of France?"), Piece("Pa", " Easy."), Piece("ris", "")]


@pytest.fixture
def thinking(client: Client, upstream: MockUpstream) -> Iterator[str]:
    """Load a model that thinks; give its model_id."""

    async def stream(request: web.Request, body: dict[str, Any]) -> web.StreamResponse | None:
        if not body.get("stream"):
            return None
        events = [event({"choices": [{"delta": delta}]}) for delta in DELTAS]
        events.append(event({"choices": [{"delta": {}, "finish_reason": "stop"}]}))
        return web.Response(body=b"".join(events) + b"data: [DONE]\n\n", content_type="text/event-stream")

    upstream.respond = stream
    client.configure("thinker", "gpt-3", "openai", {"base_url": upstream.base_url})
    client.load("thinker", progress=False)
    yield "thinker"
    client.unload("thinker")


def test_pieces_tell_reasoning_and_text_apart(client: Client, thinking: str) -> None:
    stream = client.stream(thinking, "What is the capital of France?")
    assert list(stream.pieces()) == PIECES
    assert (stream.text, stream.reasoning) == ("Paris", "Capital of France? Easy.")
    assert stream.answer is not None
    assert (stream.answer.response, stream.answer.reasoning) == (stream.text, stream.reasoning)
    assert list(stream.pieces()) == []


def test_the_loop_over_the_stream_itself_gives_text_alone_and_collects_the_rest(client: Client, thinking: str) -> None:
    stream = client.stream(thinking, "What is the capital of France?")
    assert list(stream) == ["Pa", "ris"]
    assert stream.reasoning == "Capital of France? Easy."


def test_both_loops_take_from_the_same_stream(client: Client, thinking: str) -> None:
    with client.stream(thinking, "What is the capital of France?") as stream:
        assert next(stream.pieces()) == PIECES[0]
        assert next(stream) == "Pa"
        assert list(stream.pieces()) == PIECES[3:]


def test_pieces_that_break_off_are_no_answer(fake: Any) -> None:
    from llmkit.client import connect

    fake.replies["POST", "/llm/inference/"] = (200, 'data: {"delta": "", "reasoning": "Hm"}\n\n')
    with connect(fake.url) as client:
        stream = client.stream("m", "Hello")
        pieces = stream.pieces()
        assert next(pieces) == Piece("", "Hm")
        with pytest.raises(EngineGone, match="before it was complete"):
            next(pieces)
        assert stream.answer is None
