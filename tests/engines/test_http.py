"""Connections, tries and answers of engines, over real sockets."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import json
import socket
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from raw_upstream import (
    END_OF_CHUNKS,
    NAME,
    Asked,
    Certificates,
    Peer,
    RawUpstream,
    Respond,
    answer,
    chunk,
    hang_up,
    head,
    make_certificates,
    never_accepting,
    refusing,
    replies,
    silence,
    stream_head,
    tunnel_to,
)

from llmkit.engines import http as engine_http
from llmkit.engines import sse
from llmkit.engines.base import Endpoint
from llmkit.engines.http import EngineHTTP, finish_reading, pause_before_retry, read_whole
from llmkit.errors import (
    EngineGone,
    EngineRefused,
    LLMKitError,
    ModelNameNotFound,
    RateLimited,
    TimedOut,
    UpstreamFailed,
    UpstreamRefusedKey,
    UpstreamUnreachable,
)

pytestmark = pytest.mark.timeout(30)

EVENT = b'data: {"choices": []}\n\n'
DONE = b"data: [DONE]\n\n"
RETRIED = [429, 500, 502, 503, 504]
NOT_RETRIED = [400, 401, 403, 404, 405, 408, 409, 413, 422, 501]
KEY = "sk-0123456789abcdef"


def endpoint(base_url: str, **more: Any) -> Endpoint:
    return Endpoint(base_url=base_url, model="m", **more)


@contextlib.asynccontextmanager
async def engine_at(base_url: str, **more: Any) -> AsyncIterator[EngineHTTP]:
    """Give what talks to an endpoint."""
    http = EngineHTTP(endpoint(base_url, **more))
    try:
        yield http
    finally:
        await http.close()


async def post(http: EngineHTTP) -> dict[str, Any]:
    return await http.json("POST", "/chat/completions", {"model": "m"})


async def all_events(http: EngineHTTP) -> list[dict[str, Any]]:
    return [told async for some in http.events("/chat/completions", {"stream": True}) for told in some]


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_http, "FIRST_PAUSE_SECONDS", 0.002)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Give the tries that a pause was asked for, which is none then."""
    asked_for: list[int] = []

    def no_pause(headers: Mapping[str, str], tries: int) -> float:
        del headers
        asked_for.append(tries)
        return 0.0

    monkeypatch.setattr(engine_http, "pause_before_retry", no_pause)
    return asked_for


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


# -- connections that are kept -------------------------------------------------------------------------------------


async def test_a_connection_is_used_again() -> None:
    async with RawUpstream(replies(answer({"a": 1}))) as upstream, engine_at(upstream.base_url) as http:
        for _ in range(3):
            assert await post(http) == {"a": 1}
        assert (upstream.connections, len(upstream.asked)) == (1, 3)


async def test_requests_at_the_same_time_have_a_connection_each_and_these_are_kept() -> None:
    meet = asyncio.Barrier(3)

    async def together(asked: Asked, peer: Peer) -> None:
        await meet.wait()
        await peer.send(answer())

    async with RawUpstream(together) as upstream, engine_at(upstream.base_url) as http:
        for _ in range(2):
            await asyncio.gather(*(post(http) for _ in range(3)))
        assert (upstream.connections, len(upstream.asked)) == (3, 6)


async def test_an_idle_connection_is_given_up_before_the_engine_would_close_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_http, "KEEP_ALIVE_SECONDS", 0.05)
    async with RawUpstream(replies(answer())) as upstream, engine_at(upstream.base_url) as http:
        await post(http)
        await asyncio.sleep(0.1)
        await post(http)
        assert upstream.connections == 2


async def test_a_connection_is_not_used_again_where_the_engine_says_so() -> None:
    async with RawUpstream(replies(answer(b"{}", "Connection: close"))) as upstream:
        async with engine_at(upstream.base_url) as http:
            await post(http)
            await post(http)
        assert (upstream.connections, len(upstream.asked)) == (2, 2)


@pytest.mark.parametrize("unix", [False, True])
async def test_a_kept_connection_that_was_closed_is_replaced_and_the_request_sent_once(
    unix: bool, tmp_path: Path
) -> None:
    async def answer_and_close(asked: Asked, peer: Peer) -> None:
        await peer.send(answer({"on": asked.connection}))
        peer.close()

    uds = tmp_path / "engine" if unix else None
    async with RawUpstream(answer_and_close, uds=uds) as upstream, engine_at(upstream.base_url, uds=uds) as http:
        for number in (1, 2, 3):
            assert await post(http) == {"on": number}
            await asyncio.sleep(0.02)  # the end of the connection is seen
        assert len(upstream.asked) == 3


@pytest.mark.parametrize("unix", [False, True])
async def test_a_kept_connection_that_is_found_closed_only_in_sending_is_replaced_once(
    unix: bool, tmp_path: Path
) -> None:
    loop = asyncio.get_running_loop()
    family, address = (socket.AF_UNIX, str(tmp_path / "engine")) if unix else (socket.AF_INET, ("127.0.0.1", 0))
    with socket.socket(family) as listener:
        listener.bind(address)
        listener.listen()
        listener.setblocking(False)
        base_url = "http://engine/v1" if unix else f"http://127.0.0.1:{listener.getsockname()[1]}/v1"

        async def serve() -> socket.socket:
            connection, _ = await loop.sock_accept(listener)
            assert b"POST" in await loop.sock_recv(connection, 1 << 16)
            await loop.sock_sendall(connection, answer())
            return connection

        async with engine_at(base_url, uds=Path(str(address)) if unix else None, max_retries=1) as http:
            _, first = await asyncio.gather(post(http), serve())
            first.close()  # what sends now cannot know it yet
            answered, second = await asyncio.gather(post(http), serve())
            assert answered == {}
            await asyncio.sleep(0.02)
            with pytest.raises(BlockingIOError):
                listener.accept()
            second.close()


async def test_a_request_that_the_engine_may_have_acted_on_is_not_sent_again_unasked() -> None:
    first = True

    async def answer_then_hang_up(asked: Asked, peer: Peer) -> None:
        nonlocal first
        if first:
            first = False
            await peer.send(answer())
        else:
            peer.close()

    async with RawUpstream(answer_then_hang_up) as upstream, engine_at(upstream.base_url) as http:
        await post(http)
        with pytest.raises(UpstreamUnreachable, match="the connection broke"):
            await post(http)
        assert [asked.connection for asked in upstream.asked] == [1, 1]


# -- streams and their connections ---------------------------------------------------------------------------------


def streaming(*parts: bytes, end: bytes = END_OF_CHUNKS, pause: float = 0.0) -> Respond:
    """Answer with a stream of these parts, and end it after a pause."""

    async def respond(asked: Asked, peer: Peer) -> None:
        del asked
        await peer.send(stream_head() + b"".join(map(chunk, parts)))
        await asyncio.sleep(pause)
        await peer.send(end)

    return respond


@pytest.mark.parametrize("pause", [0.0, 0.05])
async def test_a_connection_is_used_again_after_a_whole_stream(pause: float) -> None:
    async with RawUpstream(streaming(EVENT, EVENT, DONE, pause=pause)) as upstream:
        async with engine_at(upstream.base_url) as http:
            for _ in range(3):
                assert await all_events(http) == [{"choices": []}] * 2
        assert (upstream.connections, len(upstream.asked)) == (1, 3)


@pytest.mark.parametrize("pause", [0.0, 0.05])
async def test_reading_to_the_end_after_the_last_event_frees_the_connection(pause: float) -> None:
    async with RawUpstream(streaming(EVENT + DONE, pause=pause)) as upstream, engine_at(upstream.base_url) as http:
        for _ in range(2):
            async with http.open("/chat/completions", b"{}") as response:
                assert await response.content.readany() == EVENT + DONE
                await finish_reading(response)
                assert response.content.at_eof()
        assert upstream.connections == 1


async def test_a_stream_that_does_not_end_after_its_last_event_is_left_soon() -> None:
    async def without_end(asked: Asked, peer: Peer) -> None:
        await peer.send(stream_head() + chunk(EVENT + DONE))
        await peer.wait_left()

    async with RawUpstream(without_end) as upstream, engine_at(upstream.base_url) as http:
        begun = time.monotonic()
        assert await all_events(http) == [{"choices": []}]
        assert time.monotonic() - begun < 2
        await asyncio.wait_for(upstream.peers[0].left.wait(), 5)
        await all_events(http)
        assert upstream.connections == 2


async def test_a_connection_that_breaks_after_the_last_event_spoils_nothing() -> None:
    async def break_off(asked: Asked, peer: Peer) -> None:
        await peer.send(stream_head() + chunk(EVENT + DONE))
        await asyncio.sleep(0.02)
        peer.close()

    async with RawUpstream(break_off) as upstream, engine_at(upstream.base_url) as http:
        for _ in range(2):
            assert await all_events(http) == [{"choices": []}]


async def endless_stream(asked: Asked, peer: Peer) -> None:
    await peer.send(stream_head() + chunk(EVENT))
    await peer.wait_left()


async def test_a_stream_that_is_left_early_is_ended_at_the_engine() -> None:
    async with RawUpstream(endless_stream) as upstream, engine_at(upstream.base_url) as http:
        async with contextlib.aclosing(http.events("/chat/completions", {})) as events:
            assert await anext(events) == [{"choices": []}]
        await asyncio.wait_for(upstream.peers[0].left.wait(), 5)
        async with http.open("/chat/completions", b"{}") as response:
            await response.content.readany()
        await asyncio.wait_for(upstream.peers[1].left.wait(), 5)
        assert upstream.connections == 2


@pytest.mark.parametrize("respond", [silence, endless_stream])
async def test_a_request_that_is_cancelled_is_ended_at_the_engine(
    respond: Respond,
) -> None:
    async with RawUpstream(respond) as upstream, engine_at(upstream.base_url, max_retries=2) as http:
        asking = asyncio.create_task(all_events(http))
        while not upstream.asked:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.02)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await asyncio.wait_for(upstream.peers[0].left.wait(), 5)
        assert len(upstream.asked) == 1


async def test_what_is_not_read_stays_with_the_engine() -> None:
    sent = 0

    async def flood(asked: Asked, peer: Peer) -> None:
        nonlocal sent
        await peer.send(head("Content-Type: text/event-stream"))
        while True:
            await peer.send(EVENT * 1000)
            sent += len(EVENT) * 1000
            await asyncio.sleep(0)

    async with (
        RawUpstream(flood) as upstream,
        engine_at(upstream.base_url) as http,
        http.open("/chat/completions", b"{}") as response,
    ):
        await response.content.readany()
        before = -1
        while before != sent:
            before = sent
            await asyncio.sleep(0.1)
        held = response.content.total_bytes
        assert held < 1 << 20
        assert sent < 32 << 20  # what the system's sockets hold


# -- tries ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", RETRIED)
async def test_a_busy_or_failing_endpoint_is_asked_again(status: int) -> None:
    busy = answer(b"{}", status=f"{status} Busy")
    async with RawUpstream(replies(busy, busy, answer({"a": 1}))) as upstream:
        async with engine_at(upstream.base_url, max_retries=2) as http:
            assert await post(http) == {"a": 1}
        assert len(upstream.asked) == 3
        assert {asked.body for asked in upstream.asked} == {b'{"model":"m"}'}


@pytest.mark.parametrize("max_retries", [0, 1, 2])
@pytest.mark.parametrize("status", RETRIED)
async def test_an_endpoint_that_goes_on_failing_is_asked_so_often_and_no_more(status: int, max_retries: int) -> None:
    async with RawUpstream(replies(answer(b"{}", status=f"{status} Busy"))) as upstream:
        async with engine_at(upstream.base_url, max_retries=max_retries) as http:
            with pytest.raises(RateLimited if status == 429 else UpstreamFailed):
                await post(http)
        assert len(upstream.asked) == max_retries + 1


@pytest.mark.parametrize("max_retries", [0, 1, 2])
async def test_a_connection_that_is_closed_without_an_answer_is_tried_so_often_and_no_more(max_retries: int) -> None:
    async with RawUpstream(hang_up) as upstream:
        async with engine_at(upstream.base_url, max_retries=max_retries) as http:
            with pytest.raises(UpstreamUnreachable, match="the connection broke"):
                await post(http)
        assert len(upstream.asked) == max_retries + 1


@pytest.mark.parametrize("status", NOT_RETRIED)
async def test_what_would_be_answered_the_same_is_not_asked_again(status: int) -> None:
    async with RawUpstream(replies(answer(b"{}", "Retry-After: 0", status=f"{status} No"))) as upstream:
        async with engine_at(upstream.base_url, max_retries=2) as http:
            with pytest.raises(LLMKitError):
                await post(http)
        assert len(upstream.asked) == 1


@pytest.mark.parametrize(
    "line",
    [
        "Retry-After: 0",
        "Retry-After: Wed, 21 Oct 2015 07:28:00 GMT",
        "retry-after-ms: 1",
        "retry-after-ms: 1.5\r\nRetry-After: 60",
    ],
)
async def test_the_pause_that_an_endpoint_asks_for_takes_the_place_of_ours(
    line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_http, "FIRST_PAUSE_SECONDS", 600.0)
    busy = answer(b"{}", line, status="429 Too Many Requests")
    async with RawUpstream(replies(busy, answer())) as upstream:
        async with engine_at(upstream.base_url, max_retries=1) as http:
            await post(http)
        assert len(upstream.asked) == 2


@pytest.mark.parametrize(("line", "seconds"), [("retry-after-ms: 150", 0.15), ("Retry-After: 1", 1.0)])
async def test_an_endpoint_is_left_alone_as_long_as_it_asks(line: str, seconds: float) -> None:
    busy = answer(b"{}", line, status="503 Service Unavailable")
    async with RawUpstream(replies(busy, answer())) as upstream:
        async with engine_at(upstream.base_url, max_retries=1) as http:
            await post(http)
        first, second = (asked.moment for asked in upstream.asked)
        assert seconds - 0.01 <= second - first < seconds + 3


async def test_without_a_word_from_the_endpoint_there_is_a_pause_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_http, "FIRST_PAUSE_SECONDS", 0.1)
    busy = answer(b"{}", status="503 Service Unavailable")
    async with RawUpstream(replies(busy, busy, answer())) as upstream:
        async with engine_at(upstream.base_url, max_retries=2) as http:
            await post(http)
        first, second, third = (asked.moment for asked in upstream.asked)
        assert second - first >= 0.074
        assert third - second >= 0.149


@pytest.mark.parametrize("status", RETRIED)
async def test_an_endpoint_that_wants_to_be_left_alone_for_long_is_not_waited_for(status: int) -> None:
    async with RawUpstream(replies(answer(b"{}", "Retry-After: 61", status=f"{status} Busy"))) as upstream:
        async with engine_at(upstream.base_url, max_retries=2) as http:
            begun = time.monotonic()
            with pytest.raises(RateLimited if status == 429 else UpstreamFailed) as caught:
                await post(http)
            assert time.monotonic() - begun < 5
        assert len(upstream.asked) == 1
        if status == 429:
            assert caught.value.details == {"retry_after": 61.0}


async def test_a_request_that_is_cancelled_in_a_pause_is_not_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_http, "FIRST_PAUSE_SECONDS", 0.1)
    async with RawUpstream(replies(answer(b"{}", status="503 Busy"))) as upstream:
        async with engine_at(upstream.base_url, max_retries=2) as http:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(post(http), 0.03)
            await asyncio.sleep(0.15)
        assert len(upstream.asked) == 1


@pytest.mark.parametrize("max_retries", [0, 1, 2])
async def test_a_refused_connection_is_tried_so_often_and_no_more(max_retries: int, pauses: list[int]) -> None:
    with refusing() as held:
        async with engine_at(f"http://127.0.0.1:{held.getsockname()[1]}/v1", max_retries=max_retries) as http:
            with pytest.raises(UpstreamUnreachable) as caught:
                await post(http)
    assert pauses == list(range(max_retries))
    assert caught.value.param == "model_kwargs.base_url"
    assert "Nothing usable answers at" in caught.value.message


async def test_an_endpoint_that_comes_up_in_a_pause_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    with refusing() as held:
        held.setblocking(False)

        def comes_up(headers: Mapping[str, str], tries: int) -> float:
            del headers, tries
            held.listen()
            return 0.0

        monkeypatch.setattr(engine_http, "pause_before_retry", comes_up)
        async with engine_at(f"http://127.0.0.1:{held.getsockname()[1]}/v1", max_retries=1) as http:
            asking = asyncio.create_task(post(http))
            while True:
                with contextlib.suppress(OSError):
                    connection, _ = held.accept()
                    break
                await asyncio.sleep(0.005)
            with connection:
                connection.setblocking(False)
                await loop.sock_recv(connection, 1 << 16)
                await loop.sock_sendall(connection, answer({"a": 1}))
                assert await asking == {"a": 1}


@pytest.mark.parametrize(
    "begun",
    [
        stream_head() + chunk(EVENT),
        stream_head(),
        head("Content-Type: application/json", "Content-Length: 100") + b'{"choi',
        head("Content-Type: application/json", "Transfer-Encoding: chunked") + b"40\r\n{",
    ],
)
async def test_once_an_answer_has_begun_nothing_is_sent_again(begun: bytes) -> None:
    async def break_off(asked: Asked, peer: Peer) -> None:
        await peer.send(begun)
        peer.close()

    async with RawUpstream(break_off) as upstream, engine_at(upstream.base_url, max_retries=2) as http:
        with pytest.raises(UpstreamUnreachable, match="the connection broke"):
            await (all_events(http) if b"stream" in begun else post(http))
        assert len(upstream.asked) == 1


def test_pauses_grow_to_a_limit_and_are_not_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for tries, longest in enumerate((0.5, 1, 2, 4, 8, 8, 8, 8, 8, 8)):
        found = {pause_before_retry({}, tries) for _ in range(50)}
        assert len(found) > 10
        assert all(pause is not None and 0.75 * longest <= pause <= longest for pause in found)


@pytest.mark.parametrize(
    ("headers", "pause"),
    [
        ({"Retry-After": "0"}, 0),
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "60"}, 60),
        ({"Retry-After": "61"}, None),
        ({"Retry-After": "9" * 300}, None),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "60000"}, 60),
        ({"retry-after-ms": "60001"}, None),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"Retry-After": "Fri, 31 Dec 2999 23:59:59 GMT"}, None),
    ],
)
def test_what_an_endpoint_asks_for_counts_up_to_a_minute(headers: dict[str, str], pause: float | None) -> None:
    assert pause_before_retry(headers, 0) == pause
    assert pause_before_retry(headers, 9) == pause


def test_a_date_to_come_again_is_a_pause_until_then() -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    pause = pause_before_retry({"Retry-After": date}, 0)
    assert pause is not None
    assert 25 < pause <= 30


# -- time ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begun", [b"", stream_head(), stream_head() + chunk(EVENT)])
async def test_an_engine_that_falls_silent_is_given_up_and_not_asked_again(begun: bytes) -> None:
    async def fall_silent(asked: Asked, peer: Peer) -> None:
        await peer.send(begun)
        await peer.wait_left()

    async with RawUpstream(fall_silent) as upstream, engine_at(upstream.base_url, timeout=0.1, max_retries=2) as http:
        with pytest.raises(TimedOut) as caught:
            await all_events(http)
        assert upstream.origin in caught.value.message
        assert caught.value.hint == "Raise `timeout`, or ask for less."
        assert len(upstream.asked) == 1
        await asyncio.wait_for(upstream.peers[0].left.wait(), 5)


async def test_an_answer_may_take_longer_than_the_timeout_while_something_comes() -> None:
    async def slowly(asked: Asked, peer: Peer) -> None:
        await peer.send(stream_head())
        for _ in range(6):
            await asyncio.sleep(0.1)
            await peer.send(chunk(EVENT))
        await peer.send(chunk(DONE) + END_OF_CHUNKS)

    async with RawUpstream(slowly) as upstream, engine_at(upstream.base_url, timeout=0.4) as http:
        assert len(await all_events(http)) == 6


async def test_a_connection_that_is_not_accepted_in_time_is_given_up_and_not_tried_again(
    pauses: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_http, "CONNECT_SECONDS", 0.2)
    async with never_accepting() as port, engine_at(f"http://127.0.0.1:{port}/v1", max_retries=2) as http:
        begun = time.monotonic()
        with pytest.raises(TimedOut):
            await post(http)
        assert time.monotonic() - begun < 3
    assert pauses == []


# -- what is sent --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 256 << 10, (256 << 10) + 1, 3 << 20])
async def test_a_body_arrives_whole_whatever_its_size(size: int) -> None:
    body = json.dumps({"text": "é" * (size // 2)}, ensure_ascii=False).encode()
    async with RawUpstream(replies(answer())) as upstream, engine_at(upstream.base_url) as http:
        for _ in range(2):
            async with http.open("/chat/completions", body) as response:
                await read_whole(response)
        for asked in upstream.asked:
            assert asked.body == body
            assert asked.headers["content-length"] == str(len(body))
            assert asked.headers["content-type"] == "application/json"
            assert "transfer-encoding" not in asked.headers
        assert upstream.connections == 1


async def test_a_large_body_is_sent_again_from_its_beginning() -> None:
    body = json.dumps({"text": "x" * (1 << 20)}).encode()
    busy = answer(b"{}", status="503 Busy")
    async with RawUpstream(replies(busy, busy, answer())) as upstream:
        async with (
            engine_at(upstream.base_url, max_retries=2) as http,
            http.open("/chat/completions", body) as response,
        ):
            assert response.status == 200
        assert [asked.body == body for asked in upstream.asked] == [True, True, True]


async def test_a_refusal_of_a_large_body_that_is_not_read_is_told() -> None:
    async def refuse(asked: Asked, peer: Peer) -> None:
        await peer.send(answer({"error": {"message": "larger than 1 MB"}}, status="413 Content Too Large"))
        await asyncio.sleep(0.05)
        peer.close()

    async with RawUpstream(refuse, takes_bodies=False) as upstream, engine_at(upstream.base_url) as http:
        with pytest.raises(EngineRefused, match="larger than 1 MB"):
            await http.json("POST", "/chat/completions", {"text": "x" * (8 << 20)})


async def test_a_request_carries_the_endpoints_headers_and_asks_for_no_compression() -> None:
    more = {"OpenAI-Organization": "org-1", "OpenAI-Project": "proj-2"}
    async with (
        RawUpstream(replies(answer())) as upstream,
        engine_at(upstream.base_url, api_key=KEY, headers=more) as http,
    ):
        await post(http)
        async with http.open("/models", method="GET", headers={"X-Request-Id": "7"}) as response:
            await read_whole(response)
    posted, got = (asked.headers for asked in upstream.asked)
    for headers in (posted, got):
        assert headers["authorization"] == f"Bearer {KEY}"
        assert headers["accept-encoding"] == "identity"
        assert headers["user-agent"] == "llmkit"
        assert (headers["openai-organization"], headers["openai-project"]) == ("org-1", "proj-2")
        assert headers["host"] == f"127.0.0.1:{upstream.port}"
    assert got["x-request-id"] == "7"
    assert "x-request-id" not in posted


async def test_no_password_of_the_users_files_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passwords = tmp_path / "netrc"
    passwords.write_text("machine 127.0.0.1 login somebody password secret\ndefault login anybody password secret\n")
    passwords.chmod(0o600)
    monkeypatch.setenv("NETRC", str(passwords))
    async with RawUpstream(replies(answer())) as upstream, engine_at(upstream.base_url) as http:
        await post(http)
        assert "authorization" not in upstream.asked[0].headers


async def test_the_environments_proxy_is_not_taken_behind_our_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with refusing() as held:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{held.getsockname()[1]}")
        async with RawUpstream(replies(answer())) as upstream, engine_at(upstream.base_url) as http:
            assert await post(http) == {}


async def test_a_challenge_is_not_answered() -> None:
    said = answer(b"{}", 'WWW-Authenticate: Basic realm="upstream"', status="401 Unauthorized")
    async with RawUpstream(replies(said)) as upstream, engine_at(upstream.base_url, api_key=KEY) as http:
        with pytest.raises(UpstreamRefusedKey):
            await post(http)
        assert len(upstream.asked) == 1


async def test_cookies_are_neither_kept_nor_sent() -> None:
    said = answer(b"{}", "Set-Cookie: session=secret; Path=/", "Set-Cookie: other=1")
    async with (
        RawUpstream(replies(said)) as upstream,
        # Of an address, unlike of a name, the HTTP library would keep none anyway.
        engine_at(f"http://{NAME}/v1", proxy=upstream.origin) as http,
    ):
        for _ in range(3):
            await post(http)
        assert len(upstream.asked) == 3
        assert all("cookie" not in asked.headers for asked in upstream.asked)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_not_followed(status: int) -> None:
    async with RawUpstream(replies(answer())) as elsewhere:
        moved = answer(b"", f"Location: {elsewhere.base_url}/chat/completions", status=f"{status} Moved")
        async with RawUpstream(replies(moved)) as upstream:
            async with engine_at(upstream.base_url, api_key=KEY, max_retries=2) as http:
                with pytest.raises(UpstreamFailed, match="redirects are not followed"):
                    await post(http)
                assert (await http.status("/models"))[0] == status
            assert len(upstream.asked) == 2
        assert elsewhere.connections == 0


@pytest.mark.parametrize(
    ("base", "root", "path", "target"),
    [
        ("/v1", None, "/models", "/v1/models"),
        ("/v1/", None, "/models", "/v1/models"),
        ("", None, "/models", "/models"),
        ("/a/b%20c", None, "/models/x%2Fy", "/a/b%20c/models/x%2Fy"),
        ("/v1", "", "//metrics", "/metrics"),
        ("/v1", "/", "//metrics", "/metrics"),
        ("/v1", "/engine", "//metrics?all=1", "/engine/metrics?all=1"),
        ("/v1", "/engine", "/models", "/v1/models"),
    ],
)
async def test_a_path_lies_below_the_base_or_with_two_slashes_below_the_root(
    base: str, root: str | None, path: str, target: str
) -> None:
    async with RawUpstream(replies(answer())) as upstream:
        root_url = None if root is None else upstream.origin + root
        async with engine_at(upstream.origin + base, root_url=root_url) as http:
            for _ in range(2):
                assert await http.status(path) == (200, {})
        assert [asked.target for asked in upstream.asked] == [target, target]


# -- what is answered ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd"])
@pytest.mark.parametrize("status", ["200 OK", "400 Bad Request"])
async def test_a_compressed_answer_is_refused(encoding: str, status: str) -> None:
    said = answer(gzip.compress(b"{}"), f"Content-Encoding: {encoding}", status=status)
    async with RawUpstream(replies(said)) as upstream, engine_at(upstream.base_url, max_retries=2) as http:
        with pytest.raises(UpstreamFailed, match="compressed") as caught:
            await post(http)
        assert caught.value.hint == "Check base_url: a proxy on the way may do that."
        assert len(upstream.asked) == 1


async def test_an_answer_that_says_it_is_not_compressed_is_taken() -> None:
    async with (
        RawUpstream(replies(answer({"a": 1}, "Content-Encoding: identity"))) as upstream,
        engine_at(upstream.base_url) as http,
    ):
        assert await post(http) == {"a": 1}


@pytest.mark.parametrize("length", [None, 1 << 40])
async def test_an_answer_that_is_too_large_is_refused_and_not_held(
    length: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_http, "MAX_ANSWER_BYTES", 2 << 20)
    monkeypatch.setattr(engine_http, "MAX_PARSED_BYTES", 1 << 20)

    async def flood(asked: Asked, peer: Peer) -> None:
        lines = [] if length is None else [f"Content-Length: {length}"]
        await peer.send(head("Content-Type: application/json", *lines))
        while True:
            await peer.send(b"x" * (64 << 10))
            await asyncio.sleep(0)

    async with RawUpstream(flood) as upstream, engine_at(upstream.base_url, max_retries=2) as http:
        for asking in (post(http), http.status("/models"), all_events(http)):
            with pytest.raises(UpstreamFailed, match="larger than 1 MiB"):
                await asking
        async with http.open("/chat/completions", b"{}") as response:
            with pytest.raises(UpstreamFailed, match="larger than 2 MiB"):
                await read_whole(response)
            assert response.content.total_bytes < 3 << 20
        assert len(upstream.asked) == 4


async def test_an_answer_of_exactly_the_limit_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_http, "MAX_ANSWER_BYTES", 1 << 20)
    monkeypatch.setattr(engine_http, "MAX_PARSED_BYTES", 1 << 20)
    whole = b'{"a": "' + b"x" * ((1 << 20) - 9) + b'"}'
    async with (
        RawUpstream(replies(answer(whole), answer(whole), answer(whole + b" "))) as upstream,
        engine_at(upstream.base_url) as http,
    ):
        assert len((await post(http))["a"]) == (1 << 20) - 9
        async with http.open("/chat/completions", b"{}") as response:
            assert await read_whole(response) == whole
        with pytest.raises(UpstreamFailed, match="larger than"):
            await post(http)


async def test_an_answer_of_very_many_parts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_http, "MAX_CONTAINERS", 100_000)
    many, more = (b'{"a": [' + b",".join([b"[],{}"] * count) + b"]}" for count in (49_999, 50_000))
    async with (
        RawUpstream(replies(answer(many), answer(more))) as upstream,
        engine_at(upstream.base_url) as http,
    ):
        assert len((await post(http))["a"]) == 99_998
        with pytest.raises(UpstreamFailed, match="too many parts"):
            await post(http)


async def test_of_an_endless_refusal_only_the_beginning_is_read() -> None:
    sent = 0

    async def flood(asked: Asked, peer: Peer) -> None:
        nonlocal sent
        await peer.send(head("Content-Type: text/plain", status="400 Bad Request") + b"too bad ")
        while True:
            await peer.send(b"x" * (64 << 10))
            sent += 64 << 10
            await asyncio.sleep(0)

    async with RawUpstream(flood) as upstream, engine_at(upstream.base_url) as http:
        with pytest.raises(EngineRefused, match=r"^too bad x") as caught:
            await post(http)
        assert len(caught.value.message) == 1000
        assert sent < 32 << 20


@pytest.mark.parametrize(
    "block",
    [b"x" * 4096, b"data: x\n" * 512, b"data: x\r\n" * 512, b": x\n" * 1024],
    ids=["line", "lf", "crlf", "comment"],
)
async def test_an_endless_event_is_refused(block: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 256 << 10)

    async def flood(asked: Asked, peer: Peer) -> None:
        await peer.send(head("Content-Type: text/event-stream") + EVENT + b"data: ")
        while True:
            await peer.send(block)
            await asyncio.sleep(0)

    async with RawUpstream(flood) as upstream, engine_at(upstream.base_url) as http:
        with pytest.raises(UpstreamFailed, match="endless event"):
            await all_events(http)


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("size", [1, 7, 10_000])
async def test_events_are_read_however_they_are_cut(line_end: str, size: int) -> None:
    told = [{"text": f"Größe {number} 🌍"} for number in range(20)]
    lines = [": a comment", ""]
    for one in told:
        lines += ["event: message", f"data: {json.dumps(one, ensure_ascii=False)}", ""]
    whole = line_end.join([*lines, "data: [DONE]", "", ""]).encode()
    parts = [whole[start : start + size] for start in range(0, len(whole), size)]
    async with RawUpstream(streaming(*parts)) as upstream, engine_at(upstream.base_url) as http:
        assert await all_events(http) == told


async def test_events_come_as_they_are_sent() -> None:
    go_on = asyncio.Event()

    async def in_two_steps(asked: Asked, peer: Peer) -> None:
        await peer.send(stream_head() + chunk(b'data: {"n": 1}\n\ndata: {"n": 2}\n\n'))
        await go_on.wait()
        await peer.send(chunk(b'data: {"n": 3}\n\n' + DONE) + END_OF_CHUNKS)

    async with RawUpstream(in_two_steps) as upstream, engine_at(upstream.base_url) as http:
        events = http.events("/chat/completions", {})
        assert await anext(events) == [{"n": 1}, {"n": 2}]
        go_on.set()
        assert [some async for some in events] == [[{"n": 3}]]


async def test_an_endpoint_that_does_not_stream_gives_its_whole_answer_as_one_event() -> None:
    async with (
        RawUpstream(replies(answer({"choices": [1]}), answer({"error": {"message": "no", "code": 400}}))) as upstream,
        engine_at(upstream.base_url) as http,
    ):
        assert await all_events(http) == [{"choices": [1]}]
        with pytest.raises(EngineRefused, match="no"):
            await all_events(http)


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\n\n"])
async def test_the_blank_line_after_the_last_event_may_be_left_out(end: bytes) -> None:
    async with RawUpstream(streaming(EVENT, b"data: [DONE]" + end)) as upstream, engine_at(upstream.base_url) as http:
        for _ in range(2):
            assert await all_events(http) == [{"choices": []}]
        assert upstream.connections == 1


async def test_events_in_which_nothing_is_said_are_passed_over() -> None:
    nothing = b": comment\n\nevent: ping\n\ndata:\n\ndata: \n\n"
    async with (
        RawUpstream(streaming(nothing + EVENT + nothing + DONE)) as upstream,
        engine_at(upstream.base_url) as http,
    ):
        assert await all_events(http) == [{"choices": []}]


async def test_a_cancellation_after_the_last_event_does_not_spoil_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_http, "END_SECONDS", 20.0)

    async def without_end(asked: Asked, peer: Peer) -> None:
        await peer.send(stream_head() + chunk(EVENT + DONE))
        await peer.wait_left()

    async with RawUpstream(without_end) as upstream, engine_at(upstream.base_url) as http:
        asking = asyncio.create_task(all_events(http))
        while not upstream.asked:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
        asking.cancel()
        assert await asking == [{"choices": []}]
        await asyncio.wait_for(upstream.peers[0].left.wait(), 5)


async def test_a_stream_without_its_last_event_was_broken_off() -> None:
    async with RawUpstream(streaming(EVENT)) as upstream, engine_at(upstream.base_url) as http:
        with pytest.raises(EngineGone, match="before it was complete") as caught:
            await all_events(http)
        assert type(caught.value) is EngineGone


@pytest.mark.parametrize(
    ("event", "kind", "words"),
    [
        (b'data: {"error": {"message": "out of order"}}\n\n', UpstreamFailed, r"\(502\): out of order"),
        (b'data: {"error": {"message": "wait", "code": 429}}\n\n', RateLimited, "wait"),
        (b'data: {"error": {"message": "no", "code": 400}}\n\n', EngineRefused, "no"),
        (b'data: {"error": {"message": "odd", "code": 7}}\n\n', UpstreamFailed, r"\(502\): odd"),
        (b'data: {"error": {"message": "odd", "code": "busy"}}\n\n', UpstreamFailed, r"\(502\): odd"),
        (b'data: {"error": "plain words"}\n\n', UpstreamFailed, "plain words"),
        (b"data: no JSON\n\n", UpstreamFailed, "not JSON"),
        (b"data: [1]\n\n", UpstreamFailed, "not a JSON object"),
        (b"data: " + b"[" * 100_000 + b"\n\n", UpstreamFailed, "not JSON"),
        (b"data: \xff\xfe\n\n", UpstreamFailed, "not JSON"),
    ],
)
async def test_an_event_that_tells_of_a_failure_ends_the_stream_after_what_came_before(
    event: bytes, kind: type[LLMKitError], words: str
) -> None:
    async with RawUpstream(streaming(EVENT + event + EVENT + DONE)) as upstream:
        async with engine_at(upstream.base_url, max_retries=2) as http:
            events = http.events("/chat/completions", {})
            assert await anext(events) == [{"choices": []}]
            with pytest.raises(kind, match=words) as caught:
                await anext(events)
            assert type(caught.value) is kind
        assert len(upstream.asked) == 1


@pytest.mark.parametrize(
    ("said", "kind", "words"),
    [
        (answer(b"<html>"), UpstreamFailed, "not JSON"),
        (answer(b""), UpstreamFailed, "not JSON"),
        (answer(b"[]"), UpstreamFailed, "not a JSON object"),
        (answer({"error": {"message": "broken inside"}}), UpstreamFailed, "broken inside"),
        (answer({"error": {"message": "who?", "code": 404}}), ModelNameNotFound, "who"),
        (answer({"error": {"message": "who?"}}, status="404 Not Found"), ModelNameNotFound, "who"),
    ],
)
async def test_an_answer_that_is_none_is_an_error(said: bytes, kind: type[LLMKitError], words: str) -> None:
    async with RawUpstream(replies(said)) as upstream, engine_at(upstream.base_url) as http:
        with pytest.raises(kind, match=words):
            await post(http)


async def test_an_empty_error_in_an_answer_is_none() -> None:
    async with (
        RawUpstream(replies(answer({"error": None, "a": 1}))) as upstream,
        engine_at(upstream.base_url) as http,
    ):
        assert await post(http) == {"error": None, "a": 1}


@pytest.mark.parametrize(
    ("said", "found"),
    [
        (answer({"a": 1}), (200, {"a": 1})),
        (answer(b"[1]"), (200, [1])),
        (answer(b"<html>", status="404 Not Found"), (404, None)),
        (answer(b"", status="500 Internal Server Error"), (500, None)),
    ],
)
async def test_a_status_comes_with_json_where_there_is_some(said: bytes, found: tuple[int, Any]) -> None:
    async with RawUpstream(replies(said)) as upstream, engine_at(upstream.base_url) as http:
        assert await http.status("/models") == found


# -- an engine's socket, names, certificates -----------------------------------------------------------------------


async def test_an_engine_answers_on_a_unix_socket(tmp_path: Path) -> None:
    uds = tmp_path / "engine"
    async with RawUpstream(replies(answer({"a": 1})), uds=uds) as upstream:
        async with engine_at("http://localhost/v1", uds=uds, root_url="http://localhost") as http:
            assert await post(http) == {"a": 1}
            assert await http.status("//health") == (200, {"a": 1})
        assert (upstream.connections, upstream.asked[0].headers["host"]) == (1, "localhost")


async def test_a_unix_socket_that_is_not_there_means_that_the_engine_has_ended(tmp_path: Path) -> None:
    async with engine_at("http://localhost/v1", uds=tmp_path / "none") as http:
        with pytest.raises(EngineGone) as caught:
            await post(http)
    assert type(caught.value) is EngineGone
    assert caught.value.message == "The engine ended or does not answer."
    assert str(tmp_path) not in str(caught.value.to_wire())


async def test_an_engine_that_dies_while_it_answers_has_ended(tmp_path: Path) -> None:
    uds = tmp_path / "engine"
    async with RawUpstream(hang_up, uds=uds), engine_at("http://localhost/v1", uds=uds) as http:
        with pytest.raises(EngineGone) as caught:
            await post(http)
    assert type(caught.value) is EngineGone


async def test_an_engine_on_a_unix_socket_that_is_silent_is_named_so(tmp_path: Path) -> None:
    uds = tmp_path / "engine"
    async with RawUpstream(silence, uds=uds), engine_at("http://localhost/v1", uds=uds, timeout=0.1) as http:
        with pytest.raises(TimedOut, match=r"^The engine did not answer in time\."):
            await post(http)


async def test_a_name_that_nobody_knows_is_said_to_be_the_cause() -> None:
    async with engine_at("http://nowhere.invalid/v1") as http:
        with pytest.raises(UpstreamUnreachable) as caught:
            await post(http)
    assert caught.value.message == "Nothing usable answers at http://nowhere.invalid/v1: its name is not known."
    assert caught.value.param == "model_kwargs.base_url"


async def test_a_certificate_of_nobody_known_is_refused_at_once(certificates: Certificates, pauses: list[int]) -> None:
    async with RawUpstream(replies(answer()), tls=certificates.context()) as upstream:
        for context in (None, ssl.create_default_context()):
            async with engine_at(upstream.base_url, ssl=context, max_retries=2) as http:
                with pytest.raises(UpstreamUnreachable, match="its certificate was not accepted"):
                    await post(http)
    assert (pauses, upstream.asked) == ([], [])


async def test_a_certificate_of_somebody_trusted_is_accepted(certificates: Certificates) -> None:
    trusted = ssl.create_default_context(cafile=certificates.authority)
    async with RawUpstream(streaming(EVENT, DONE), tls=certificates.context()) as upstream:
        async with engine_at(upstream.base_url, ssl=trusted) as http:
            for _ in range(2):
                assert await all_events(http) == [{"choices": []}]
        assert upstream.connections == 1


async def test_a_certificate_for_another_name_is_refused(certificates: Certificates) -> None:
    trusted = ssl.create_default_context(cafile=certificates.authority)
    async with (
        RawUpstream(replies(answer()), tls=certificates.context()) as upstream,
        RawUpstream(tunnel_to(upstream.port)) as proxy,
        engine_at("https://another.test/v1", ssl=trusted, proxy=proxy.origin) as http,
    ):
        with pytest.raises(UpstreamUnreachable, match="its certificate was not accepted"):
            await post(http)
    assert upstream.asked == []


async def test_http_to_a_server_of_https_is_a_broken_connection(certificates: Certificates) -> None:
    async with (
        RawUpstream(replies(answer()), tls=certificates.context()) as upstream,
        engine_at(upstream.base_url.replace("https", "http")) as http,
    ):
        with pytest.raises(UpstreamUnreachable, match="the connection broke"):
            await post(http)


# -- proxies -------------------------------------------------------------------------------------------------------


async def test_a_proxy_is_asked_for_the_whole_address() -> None:
    async with (
        RawUpstream(replies(answer({"a": 1}))) as proxy,
        engine_at(f"http://{NAME}/v1", proxy=proxy.origin) as http,
    ):
        for _ in range(2):
            assert await post(http) == {"a": 1}
    assert proxy.connections == 1
    for asked in proxy.asked:
        assert asked.target == f"http://{NAME}/v1/chat/completions"
        assert asked.headers["host"] == NAME


async def test_a_proxy_gets_its_own_name_and_password_and_the_endpoint_its_key() -> None:
    async with RawUpstream(replies(answer())) as proxy:
        with_password = proxy.origin.replace("//", "//user:secret@")
        async with engine_at(f"http://{NAME}/v1", proxy=with_password, api_key=KEY) as http:
            await post(http)
    headers = proxy.asked[0].headers
    assert headers["proxy-authorization"] == "Basic " + base64.b64encode(b"user:secret").decode()
    assert headers["authorization"] == f"Bearer {KEY}"


async def test_a_proxy_that_is_down_is_said_to_be_the_cause_and_its_password_is_not_repeated() -> None:
    with refusing() as held:
        proxy = f"http://user:secret@127.0.0.1:{held.getsockname()[1]}"
        for scheme in ("http", "https"):
            async with engine_at(f"{scheme}://{NAME}/v1", proxy=proxy) as http:
                with pytest.raises(UpstreamUnreachable) as caught:
                    await post(http)
            told = f"Nothing usable answers at {scheme}://{NAME}/v1: the proxy on the way to it cannot be reached."
            assert caught.value.message == told
            assert "secret" not in str(caught.value.to_wire())


async def test_https_goes_through_a_tunnel_and_the_proxy_sees_nothing_of_it(certificates: Certificates) -> None:
    trusted = ssl.create_default_context(cafile=certificates.authority)
    async with (
        RawUpstream(replies(answer({"a": 1})), tls=certificates.context()) as upstream,
        RawUpstream(tunnel_to(upstream.port)) as proxy,
        engine_at(f"https://{NAME}/v1", ssl=trusted, proxy=proxy.origin, api_key=KEY) as http,
    ):
        for _ in range(3):
            assert await post(http) == {"a": 1}
    assert [(asked.method, asked.target) for asked in proxy.asked] == [("CONNECT", f"{NAME}:443")]
    assert "authorization" not in proxy.asked[0].headers
    assert [asked.target for asked in upstream.asked] == ["/v1/chat/completions"] * 3
    assert {asked.headers["authorization"] for asked in upstream.asked} == {f"Bearer {KEY}"}
    assert upstream.connections == 1


@pytest.mark.parametrize("status", ["403 Forbidden", "407 Proxy Authentication Required", "502 Bad Gateway"])
async def test_a_proxy_that_makes_no_tunnel_is_said_to_be_the_cause(status: str) -> None:
    async with (
        RawUpstream(replies(answer(b"{}", status=status))) as proxy,
        engine_at(f"https://{NAME}/v1", proxy=proxy.origin, max_retries=2) as http,
    ):
        with pytest.raises(UpstreamUnreachable, match="the proxy on the way to it refused"):
            await post(http)
    assert len(proxy.asked) == 1


async def test_a_proxy_without_a_password_does_not_get_the_endpoints_key(certificates: Certificates) -> None:
    async with (
        RawUpstream(replies(answer()), tls=certificates.context()) as upstream,
        RawUpstream(tunnel_to(upstream.port)) as proxy,
    ):
        trusted = ssl.create_default_context(cafile=certificates.authority)
        more = {"OpenAI-Project": "proj-1"}
        endpoint = Endpoint(f"https://{NAME}/v1", "m", api_key=KEY, proxy=proxy.origin, ssl=trusted, headers=more)
        http = EngineHTTP(endpoint)
        await http.json("POST", "/chat/completions", {})
        await http.close()
    assert KEY not in str(proxy.asked)
    assert "proj-1" not in str(proxy.asked)


async def test_a_proxy_of_http_does_not_get_the_key_as_its_own() -> None:
    async with RawUpstream(replies(answer())) as proxy:
        http = EngineHTTP(Endpoint(f"http://{NAME}/v1", "m", api_key=KEY, proxy=proxy.origin))
        await http.json("POST", "/chat/completions", {})
        await http.close()
    assert "proxy-authorization" not in proxy.asked[0].headers


async def test_a_kept_unix_connection_that_was_closed_is_replaced_where_no_byte_was_sent(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "engine"))
        listener.listen()
        listener.setblocking(False)

        async def serve() -> socket.socket:
            connection, _ = await loop.sock_accept(listener)
            await loop.sock_recv(connection, 1 << 16)
            await loop.sock_sendall(connection, answer())
            return connection

        http = EngineHTTP(Endpoint("http://engine/v1", "m", uds=tmp_path / "engine"))
        _, first = await asyncio.gather(http.json("POST", "/x", {}), serve())
        first.close()
        serving = asyncio.create_task(serve())
        try:
            assert await http.json("POST", "/x", {}) == {}
            (await serving).close()
        finally:
            serving.cancel()
            await http.close()


async def test_json_that_is_nested_too_deeply_is_none_of_a_status() -> None:
    async with RawUpstream(replies(answer(b"[" * 100_000))) as upstream:
        http = EngineHTTP(Endpoint(upstream.base_url, "m"))
        try:
            assert await http.status("/models") == (200, None)
        finally:
            await http.close()


async def test_a_stream_that_ends_within_an_event_was_broken_off() -> None:
    said = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n" + b'data: {"cho'

    async def break_off(asked: Asked, peer: Peer) -> None:
        await peer.send(said)
        peer.close()

    async with RawUpstream(break_off) as upstream:
        http = EngineHTTP(Endpoint(upstream.base_url, "m"))
        with pytest.raises(LLMKitError, match="before it was complete"):
            [_ async for _ in http.events("/x", {})]
        await http.close()


async def test_a_refused_connection_is_told_in_plain_words() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        http = EngineHTTP(Endpoint(f"http://127.0.0.1:{held.getsockname()[1]}/v1", "m"))
        with pytest.raises(LLMKitError) as caught:
            await http.status("/models")
        await http.close()
    assert "('127.0.0.1'" not in caught.value.message
