"""What is passed on of an engine's stream, what is kept back, and what is learnt from it."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_upstream import END_OF_CHUNKS, Asked, Peer, RawUpstream, stream_head
from raw_upstream import chunk as as_chunk

from llmkit.engines.base import Endpoint
from llmkit.engines.http import EngineHTTP
from llmkit.errors import EngineRefused, RateLimited, UpstreamFailed, UpstreamUnreachable
from llmkit.inference import relay as module
from llmkit.inference.openai_api import Call
from llmkit.inference.relay import StreamRelay, find_usage, has_token, relay
from llmkit.inference.running import Running
from llmkit.schemas import Usage

USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
DONE = b"data: [DONE]\n\n"


def frame(told: Any, *, spaced: bool = True) -> bytes:
    """Give one event; JSON is written with or without spaces, as engines do."""
    return b"data: " + json.dumps(told, separators=None if spaced else (",", ":")).encode() + b"\n\n"


def chunk(text: str, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}}], **more}


ROLE = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
USAGE_ONLY = {"choices": [], "usage": USAGE}


class OfNobody(EngineHTTP):
    """Makes errors of an endpoint that nobody talks to."""

    def __init__(self, key: str | None = None) -> None:
        self.endpoint = Endpoint(base_url="http://127.0.0.1:9/v1", model="m", api_key=key)


def relay_of(*, wants_usage: bool = False, key: str | None = None) -> tuple[StreamRelay, Running]:
    running = Running("m", "chat/completions", task=None)
    call = Call("/chat/completions", b"{}", stream=True, wants_usage=wants_usage)
    return StreamRelay(OfNobody(key), running, call), running


@pytest.mark.parametrize("spaced", [True, False])
def test_the_usage_that_only_we_have_asked_for_is_noted_and_kept_back(spaced: bool) -> None:
    relay, running = relay_of()
    events = [frame(one, spaced=spaced) for one in (ROLE, chunk("a", usage=None), chunk("b"), USAGE_ONLY)]
    assert relay.take(b"".join(events) + DONE) == b"".join(events[:3]) + DONE
    assert running.usage == Usage(**USAGE)
    assert relay.ended


def test_usage_that_the_client_has_asked_for_passes() -> None:
    relay, running = relay_of(wants_usage=True)
    stream = frame(chunk("a")) + frame(USAGE_ONLY) + DONE
    assert relay.take(stream) == stream
    assert running.usage == Usage(**USAGE)


def test_usage_beside_a_part_of_the_answer_passes_whoever_has_asked() -> None:
    relay, running = relay_of()
    stream = frame(chunk("a", usage=USAGE)) + DONE
    assert relay.take(stream) == stream
    assert running.usage == Usage(**USAGE)


def test_the_first_token_is_not_the_role_and_is_noted_once() -> None:
    relay, running = relay_of()
    relay.take(frame(ROLE))
    assert running.first_token is None
    relay.take(frame(chunk("a")))
    first = running.first_token
    assert first is not None
    relay.take(frame(chunk("b")))
    assert running.first_token == first


def test_words_of_a_model_that_look_like_an_end_are_passed_on() -> None:
    relay, running = relay_of()
    text = 'data: [DONE] "usage": {"prompt_tokens": 9} "error": {"code": 400} \n\n data: [DONE]'
    stream = frame(chunk("a")) + frame(chunk(text)) + frame(chunk("b"))
    assert relay.take(stream) == stream
    assert (relay.ended, relay.failure, running.usage) == (False, None, None)


def test_what_follows_the_end_is_dropped() -> None:
    relay, _ = relay_of()
    assert relay.take(frame(chunk("a")) + DONE + frame(chunk("b"))) == frame(chunk("a")) + DONE


def test_comments_and_other_fields_pass() -> None:
    relay, _ = relay_of()
    stream = b": waiting\n\n" + b"event: x\nid: 4\n" + frame(chunk("a"))
    assert relay.take(stream) == stream


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"error": {"message": "too long", "code": 400}}, EngineRefused),
        ({"error": {"message": "slow down", "code": 429}}, RateLimited),
        ({"error": {"message": "broken", "code": "internal"}}, UpstreamFailed),
        ({"error": "text"}, UpstreamFailed),
        ({"type": "error", "message": "broken", "code": None}, UpstreamFailed),
    ],
)
def test_an_error_in_the_stream_ends_it_after_what_came_before(error: dict[str, Any], kind: type[Exception]) -> None:
    relay, _ = relay_of()
    assert relay.take(frame(chunk("a")) + frame(error) + frame(chunk("b"))) == frame(chunk("a"))
    assert type(relay.failure) is kind


def test_a_key_in_an_error_of_the_stream_is_blanked() -> None:
    relay, _ = relay_of(key="sk-1234567890abcdef")
    relay.take(frame({"error": {"message": "Bad key sk-1234567890abcdef"}}))
    assert relay.failure is not None
    assert "sk-12345" not in str(relay.failure)


def test_an_event_that_is_no_json_is_an_error() -> None:
    relay, _ = relay_of()
    assert relay.take(b"data: {nonsense\n\n") == b""
    assert isinstance(relay.failure, UpstreamFailed)


def test_large_events_are_passed_on_unread_but_for_usage_and_end() -> None:
    relay, running = relay_of()
    relay.take(frame(chunk("a")))
    large = frame(chunk("x" * 300_000, error={"message": "words of the model"}))
    assert relay.take(large) == large
    assert (relay.ended, relay.failure) == (False, None)
    usage = {"input_tokens": 3, "output_tokens": 2, "total_tokens": 5}
    end = frame({"type": "response.completed", "response": {"output": "x" * 300_000, "usage": usage}})
    assert relay.take(end) == end
    assert relay.ended
    assert running.usage == Usage(**USAGE)


@pytest.mark.parametrize("end", [b"data: [DONE]", b"data: [DONE]\n", b"data:[DONE] \n\n", b"data: [DONE]\r\n"])
def test_an_end_without_its_blank_line_is_an_end(end: bytes) -> None:
    relay, _ = relay_of()
    passed = relay.take(frame(chunk("a")) + end)
    if not relay.ended:
        passed += relay.end()
    assert passed.startswith(frame(chunk("a")))
    assert relay.ended


@pytest.mark.parametrize("usage", [{"total_tokens": 5}, {"prompt_tokens": 1.5}, USAGE])
def test_the_frame_that_we_have_asked_for_is_kept_back_whatever_its_numbers_are(usage: dict[str, Any]) -> None:
    relay, _ = relay_of()
    assert relay.take(frame(chunk("a")) + frame({"choices": [], "usage": usage}) + DONE) == frame(chunk("a")) + DONE


def test_empty_data_is_passed_on() -> None:
    relay, _ = relay_of()
    stream = b"data:\n\n" + b"data: \n\n" + frame(chunk("a"))
    assert relay.take(stream) == stream


def test_a_response_that_failed_is_noted_as_failed() -> None:
    relay, running = relay_of()
    stream = frame({"type": "response.failed", "response": {"error": {"message": "x"}, "usage": None}})
    assert relay.take(stream) == stream
    assert (relay.ended, running.failed) == (True, "upstream_failed")


def test_responses_end_with_their_own_event_and_have_their_own_names_of_tokens() -> None:
    relay, running = relay_of()
    created = {"type": "response.created", "response": {"error": None, "usage": None}}
    delta = {"type": "response.output_text.delta", "delta": "Par"}
    usage = {"input_tokens": 3, "output_tokens": 2, "total_tokens": 5}
    completed = {"type": "response.completed", "response": {"usage": usage}}
    stream = b"".join(f"event: {one['type']}\n".encode() + frame(one) for one in (created, delta, completed))
    assert relay.take(stream) == stream
    assert relay.ended
    assert running.usage == Usage(**USAGE)
    assert running.first_token is not None


EVENTS = st.lists(
    st.one_of(
        st.text(max_size=30).map(lambda text: frame(chunk(text))),
        st.text(max_size=10).map(lambda text: frame(chunk(text), spaced=False)),
        st.sampled_from([frame(ROLE), b": waiting\n\n", frame(chunk("x", usage=None)), frame(chunk("x", error=None))]),
    ),
    max_size=12,
)


@settings(max_examples=300, deadline=None)
@given(events=EVENTS, cuts=st.lists(st.integers(0, 2000), max_size=20), crlf=st.booleans())
def test_however_a_stream_is_cut_every_event_passes_once_and_in_order(
    events: list[bytes], cuts: list[int], crlf: bool
) -> None:
    stream = b"".join([*events, frame(USAGE_ONLY), DONE])
    sent = stream.replace(b"\n", b"\r\n") if crlf else stream
    places = sorted({0, len(sent), *(cut for cut in cuts if cut < len(sent))})
    relay, running = relay_of()
    pieces = [relay.take(sent[a:b]) for a, b in itertools.pairwise(places)]
    assert b"".join(pieces) == b"".join(events) + DONE
    assert all(piece.endswith(b"\n\n") for piece in pieces if piece)
    assert running.usage == Usage(**USAGE)
    assert relay.ended


@pytest.mark.parametrize(
    ("body", "usage"),
    [
        ({"choices": [{"message": {"content": 'say "usage": {"prompt_tokens": 1}'}}], "usage": USAGE}, Usage(**USAGE)),
        ({"usage": USAGE, "data": [{"embedding": [0.1] * 1000}]}, Usage(**USAGE)),
        ({"data": [], "usage": {"prompt_tokens": 3, "total_tokens": 3}}, Usage(prompt_tokens=3, total_tokens=3)),
        ({"usage": {"input_tokens": 3, "output_tokens": 2, "total_tokens": 5}}, Usage(**USAGE)),
        ({"usage": {**USAGE, "details": {"cached": 1}}, "x": 1}, Usage(**USAGE)),
        ({"usage": None}, None),
        ({"usage": {"prompt_tokens": "many"}}, None),
        ({"usage": {"prompt_tokens": True, "completion_tokens": -1}}, None),
        ({"text": "usage"}, None),
        ({}, None),
    ],
)
@pytest.mark.parametrize("spaced", [True, False])
def test_usage_is_found_in_a_whole_answer(body: dict[str, Any], usage: Usage | None, spaced: bool) -> None:
    assert find_usage(json.dumps(body, separators=None if spaced else (",", ":")).encode()) == usage


@given(st.binary(max_size=200))
def test_usage_of_any_bytes_is_no_error(body: bytes) -> None:
    assert find_usage(body) is None
    assert find_usage(b'"usage": {' + body) is None or b"tokens" in body


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (chunk("a"), True),
        (ROLE, False),
        ({"choices": [{"text": "a"}]}, True),
        ({"choices": [{"delta": {"reasoning_content": "hm"}}]}, True),
        ({"choices": [{"delta": {"tool_calls": [{}]}}]}, True),
        ({"choices": [{"delta": None}]}, False),
        ({"choices": ["x"]}, False),
        ({"choices": 3}, False),
        ({"type": "response.output_text.delta"}, True),
        ({"type": "response.created"}, False),
        ({}, False),
    ],
)
def test_what_counts_as_a_token(told: dict[str, Any], expected: bool) -> None:
    assert has_token(told) is expected


@pytest.mark.parametrize(("gather", "pieces"), [(0.0, 4), (0.6, 2)])
async def test_the_first_event_goes_at_once_and_what_follows_at_once_goes_together(
    monkeypatch: pytest.MonkeyPatch, gather: float, pieces: int
) -> None:
    monkeypatch.setattr(module, "GATHER_SECONDS", gather)
    token = frame(chunk("a"))

    async def one_by_one(asked: Asked, peer: Peer) -> None:
        del asked
        await peer.send(stream_head())
        for part in (token, token, token, DONE):
            await peer.send(as_chunk(part))
            await asyncio.sleep(0.1)
        await peer.send(END_OF_CHUNKS)

    written: list[tuple[bytes, bool]] = []

    async def write(events: bytes, *, is_last: bool) -> None:
        written.append((events, is_last))

    async with RawUpstream(one_by_one) as upstream:
        http = EngineHTTP(Endpoint(base_url=upstream.base_url, model="m"))
        try:
            call = Call("/chat/completions", b"{}", stream=True)
            assert await relay(http, call, Running("m", "chat/completions", stream=True), write) is None
        finally:
            await http.close()
    assert written[0] == (token, False)
    assert b"".join(events for events, _ in written) == token * 3 + DONE
    assert [is_last for _, is_last in written] == [False] * (pieces - 1) + [True]


async def test_what_waits_for_more_is_not_lost_when_the_engine_breaks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GATHER_SECONDS", 0.5)
    token = frame(chunk("a"))

    async def break_off(asked: Asked, peer: Peer) -> None:
        del asked
        await peer.send(stream_head())
        for _ in range(2):
            await peer.send(as_chunk(token))
            await asyncio.sleep(0.1)
        peer.close()

    written: list[bytes] = []

    async def write(events: bytes, *, is_last: bool) -> None:
        assert not is_last
        written.append(events)

    async with RawUpstream(break_off) as upstream:
        http = EngineHTTP(Endpoint(base_url=upstream.base_url, model="m"))
        try:
            call = Call("/chat/completions", b"{}", stream=True)
            with pytest.raises(UpstreamUnreachable):
                await relay(http, call, Running("m", "chat/completions", stream=True), write)
        finally:
            await http.close()
    assert written == [token, token]


async def test_the_end_of_an_answer_does_not_wait_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GATHER_SECONDS", 60.0)
    token = frame(chunk("a"))

    async def end_late(asked: Asked, peer: Peer) -> None:
        del asked
        await peer.send(stream_head() + as_chunk(token))
        await asyncio.sleep(0.1)
        await peer.send(as_chunk(token + DONE))
        await asyncio.sleep(0.1)
        await peer.send(END_OF_CHUNKS)

    written: list[bytes] = []

    async def write(events: bytes, *, is_last: bool) -> None:
        assert is_last == (len(written) == 1)
        written.append(events)

    async with RawUpstream(end_late) as upstream, asyncio.timeout(20):
        http = EngineHTTP(Endpoint(base_url=upstream.base_url, model="m"))
        try:
            call = Call("/chat/completions", b"{}", stream=True)
            await relay(http, call, Running("m", "chat/completions", stream=True), write)
        finally:
            await http.close()
    assert written == [token, token + DONE]
