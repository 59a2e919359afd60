"""How answers leave the server: events at once, and with a line in the log where that is read."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from aiohttp import web
from mock_upstream import MockUpstream, event
from prometheus_client import REGISTRY
from tornado import iostream

from jupyter_server_ext.app import LLMKitApp
from jupyter_server_ext.handlers import streaming

BODY = {"model": "example_model", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
CHAT = "llm/v1/chat/completions"
TOKEN = event({"choices": [{"index": 0, "delta": {"content": "a"}}]})
DONE = b"data: [DONE]\n\n"


@pytest.fixture
def nodelay(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bytes, int]]:
    """What was handed to a connection, and whether Nagle's algorithm was off then."""
    written = []
    write = iostream.IOStream.write

    def noted(stream: iostream.IOStream, data: bytes) -> Any:
        if isinstance(stream.socket, socket.socket) and b"data: " in data:
            written.append((bytes(data), stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)))
        return write(stream, data)

    monkeypatch.setattr(iostream.IOStream, "write", noted)
    return written


@pytest.mark.parametrize("path", [CHAT, "llm/inference/"])
async def test_no_event_waits_for_the_word_that_the_one_before_has_come(
    call: Any, configure: Any, upstream: MockUpstream, nodelay: list[tuple[bytes, int]], path: str
) -> None:
    config_id = await configure()
    await call("POST", f"llm/load_model/{config_id}")
    asked = (
        BODY if path == CHAT else {"model_id": "example_model", "prompt": "Hi", "inference_kwargs": {"stream": True}}
    )
    for _ in range(2):  # Tornado would turn it on again after the first
        await call("POST", path, asked)
    assert nodelay
    assert {off for _, off in nodelay} == {1}


async def test_an_answer_that_is_whole_at_once_has_a_length(call: Any, configure: Any, upstream: MockUpstream) -> None:
    config_id = await configure()
    await call("POST", f"llm/load_model/{config_id}")

    async def at_once(request: web.Request, body: dict[str, Any]) -> web.Response:
        return web.Response(body=TOKEN + DONE, content_type="text/event-stream")

    upstream.respond = at_once
    answer = await call("POST", CHAT, BODY)
    assert answer.text.encode() == TOKEN + DONE
    assert answer.headers["Content-Length"] == str(len(TOKEN + DONE))
    assert answer.headers["Content-Type"] == "text/event-stream"


@pytest.mark.parametrize("leaves", [True, False])
async def test_who_does_not_take_the_last_piece_is_noticed(
    call: Any,
    configure: Any,
    upstream: MockUpstream,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    jp_serverapp: Any,
    jp_http_port: int,
    *,
    leaves: bool,
) -> None:
    """The whole answer is one piece, larger than what the connection holds."""
    send_at_once = streaming._send_at_once

    def with_small_buffer(stream: iostream.IOStream) -> None:
        send_at_once(stream)
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

    monkeypatch.setattr(streaming, "_send_at_once", with_small_buffer)
    monkeypatch.setattr(streaming, "FLUSH_SECONDS", 60.0 if leaves else 0.3)
    config_id = await configure()
    await call("POST", f"llm/load_model/{config_id}")

    async def at_once(request: web.Request, body: dict[str, Any]) -> web.Response:
        return web.Response(body=TOKEN * 900 + DONE, content_type="text/event-stream")

    upstream.respond = at_once
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(("127.0.0.1", jp_http_port))
        body = json.dumps(BODY)
        head = f"POST {jp_serverapp.base_url}{CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        client.sendall(f"{head}Authorization: token {jp_serverapp.identity_provider.token}\r\n\r\n{body}".encode())
        await asyncio.sleep(0.2)
        if leaves:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
        for _ in range(100):
            told = (await call("GET", "llm/requests")).json
            if not told["running"] and told["recent"]:
                break
            await asyncio.sleep(0.05)
    assert [one["outcome"] for one in told["recent"]] == ["cancelled"]
    assert "Exception in callback" not in caplog.text


# -- the log -------------------------------------------------------------------------------------------------------


@contextmanager
def listening(logger: logging.Logger, level: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Give what a logger's one handler writes."""
    lines: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    with monkeypatch.context() as patched:
        patched.setattr(logger, "handlers", [Kept(level)])
        patched.setattr(logger, "propagate", False)
        patched.setattr(logger, "level", logging.DEBUG)
        yield lines


def requests_counted(handler: str) -> float:
    """Give how many requests Jupyter's own metrics have seen."""
    return sum(
        sample.value
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name == "http_request_duration_seconds_count" and handler in sample.labels["handler"]
    )


@pytest.mark.parametrize(("level", "is_written"), [(logging.DEBUG, True), (logging.INFO, False)])
async def test_what_goes_well_is_logged_where_somebody_reads_that_and_counted_in_any_case(
    call: Any, app: LLMKitApp, monkeypatch: pytest.MonkeyPatch, level: int, is_written: bool
) -> None:
    before = requests_counted("ModelsHandler")
    with listening(app.log, level, monkeypatch) as lines:
        await call("GET", "llm/models/")
        await call("GET", "llm/models/nothing")
    assert any(line.startswith("200 GET") for line in lines) == is_written
    assert any(line.startswith("404 GET") for line in lines)
    assert requests_counted("ModelsHandler") == before + 1
