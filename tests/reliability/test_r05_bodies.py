"""R5: bodies are strict JSON objects of a bounded size, and who is not let in fills no memory."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from openapi_story import story_server
from support import JupyterServer, scaled

from jupyter_server_ext.handlers.base import MAX_VALUES, _parse_object
from llmkit.errors import MalformedRequest
from llmkit.schemas import MAX_CONFIGURATION_BYTES, MAX_CONVERSATION_BYTES, MAX_PROMPT_BYTES

GOOD = {"model_id": "m", "model_name": "gpt-3", "model_type": "openai"}
BODIES = {
    "llm/configure_model/": "POST",
    "llm/inference/": "POST",
    "llm/v1/chat/completions": "POST",
    "llm/conversations/c": "PUT",
}
"""One address of each handler that reads a body."""


@pytest.fixture(scope="module")
def answering() -> Iterator[JupyterServer]:
    """Give a server whose endpoint is a mock."""
    with story_server() as (running, _):
        yield running


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"3",
        b"{",
        b'{"model_id": "m"} x',
        b'{"model_id": NaN}',
        b'{"model_id": Infinity}',
        b'{"model_id": 1e999}',
        b'{"model_id": -Infinity}',
        b'{"model_id": "\\ud800"}',
        b'{"model_id": "\xff"}',
        b"\xef\xbb\xbf{}",
        "{'model_id': 'm'}".encode("utf-16"),
        b'{"a": ' + b"[" * 65 + b"]" * 65 + b"}",
        b'{"a": ' * 70 + b"1" + b"}" * 70,
        b"[" * 100_000,
    ],
)
def test_r05_what_is_not_a_strict_json_object_is_a_400(answering: JupyterServer, raw: bytes) -> None:
    for path, one in BODIES.items():
        answer = answering.request(one, path, content=raw)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "malformed_request"), path


def test_r05_very_many_values_are_a_400(answering: JupyterServer) -> None:
    for path, method in BODIES.items():
        # Prompts of OpenAI's API can be lists of tokens.
        raw = b'{"a": [' + b"1," * (1_100_000 if "/v1/" in path else 200_000) + b"1]}"
        assert len(raw) < MAX_CONVERSATION_BYTES
        assert answering.request(method, path, content=raw).status_code == 400, path


def test_r05_depth_64_is_read(answering: JupyterServer) -> None:
    for inner, status in ((62, 422), (63, 400)):
        deep: Any = 1
        for _ in range(inner):
            deep = [deep]
        body = {**GOOD, "model_kwargs": {"x": deep}}
        assert answering.request("POST", "llm/configure_model", json=body).status_code == status


def test_r05_each_route_has_its_limit(answering: JupyterServer) -> None:
    for path, method in BODIES.items():
        most = MAX_PROMPT_BYTES if "inference" in path or "/v1/" in path else MAX_CONFIGURATION_BYTES
        most = MAX_CONVERSATION_BYTES if "conversations" in path else most
        within, beyond = (answering.request(method, path, content=b" " * size) for size in (most, most + 1))
        assert within.status_code == 400, path  # it is read, and is no object
        assert (beyond.status_code, beyond.json()["error"]["code"]) == (413, "too_large"), path


def test_r05_a_prompt_of_a_megabyte_is_answered(answering: JupyterServer) -> None:
    answering.load(answering.configure(**GOOD))
    body = {"model_id": "m", "prompt": "x" * MAX_CONFIGURATION_BYTES}
    assert answering.request("POST", "llm/inference", json=body).status_code == 200


def test_r05_a_body_that_is_too_large_fills_no_memory_with_credentials_either(answering: JupyterServer) -> None:
    assert answering.process is not None
    process = psutil.Process(answering.process.pid)
    answering.request("GET", "llm/health")
    before = process.memory_info().rss
    assert answering.request("POST", "llm/configure_model", content=b"x" * (40 << 20)).status_code == 413
    grown = (process.memory_info().rss - before) / 1e6
    print(f"\nR5: grew by {grown:.1f} MB of 40 MB that somebody known sent to a place for 1")
    assert grown <= 5


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=10,
)
PIECES = st.sampled_from(
    [b"{", b"}", b"[", b"]", b'"a"', b":", b",", b"1", b"NaN", b"-", b"1e999", b"\\ud800", b"\xff", b" "]
)


@settings(max_examples=scaled(2000), deadline=None, database=None)
@given(
    JSON.map(lambda told: json.dumps(told).encode())
    | st.dictionaries(st.text(max_size=4), JSON, max_size=4).map(lambda told: json.dumps(told).encode())
    | st.binary(max_size=40)
    | st.lists(PIECES, max_size=20).map(b"".join)
)
@example(b'{"a": 123456789012345678901234567890}')
@example(b'{"a": 1e400}')
@example(b'{"a": "\\ud83d\\ude00"}')
def test_r05_whatever_is_sent_is_read_as_strict_json_or_refused(raw: bytes) -> None:
    try:
        read = _parse_object(raw, MAX_VALUES)
    except MalformedRequest:
        strict = strictly(raw)
        assert not isinstance(strict, dict), strict
        return
    assert read == strictly(raw)
    json.dumps(read, allow_nan=False).encode()


def strictly(raw: bytes) -> Any:
    """Read JSON with Python's own parser and the rules on top of it; anything but an object is refused."""

    def refuse(word: str) -> Any:
        raise ValueError(word)

    try:
        told = json.loads(raw.decode("utf-8"), parse_constant=refuse)
        json.dumps(told, allow_nan=False, ensure_ascii=False).encode("utf-8")  # an infinite number, a lone surrogate
    except (ValueError, RecursionError):
        return None
    return told


def test_r05_a_get_without_credentials_is_not_let_send_a_body(server: JupyterServer) -> None:
    assert server.process is not None
    process = psutil.Process(server.process.pid)
    where = urlsplit(server.url)
    server.request("GET", "llm/health")
    before = process.memory_info().rss
    size = 31 << 20
    connections = []
    for _ in range(4):
        connection = socket.create_connection((where.hostname, where.port), timeout=30)
        head = f"GET {where.path}llm/inference HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size + 1}\r\n\r\n"
        with contextlib.suppress(ConnectionError):
            connection.sendall(head.encode() + b"x" * size)
        connections.append(connection)
    server.request("GET", "llm/health")
    grown = (process.memory_info().rss - before) / 1e6
    for connection in connections:
        connection.close()
    print(f"R5: grew by {grown:.1f} MB while 4 clients sent 31 MiB each with a GET")
    assert grown <= 5


@pytest.mark.parametrize("chunked", [False, True])
def test_r05_300_mb_without_credentials_fill_no_memory(server: JupyterServer, chunked: bool) -> None:
    size, block = 300 << 20, b"x" * (1 << 20)
    assert server.process is not None
    process = psutil.Process(server.process.pid)
    server.request("GET", "llm/health")
    where = urlsplit(server.url)
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"
    before = peak = process.memory_info().rss
    with socket.create_connection((where.hostname, where.port), timeout=30) as connection:
        head = f"POST {where.path}llm/inference HTTP/1.1\r\nHost: localhost\r\n{length}\r\n\r\n"
        connection.sendall(head.encode())
        sent = 0
        # The server answers 403 at once and closes: a client that goes on sending is cut off.
        with contextlib.suppress(ConnectionError):
            for _ in range(size >> 20):
                connection.sendall(b"%x\r\n%s\r\n" % (len(block), block) if chunked else block)
                sent += len(block)
                peak = max(peak, process.memory_info().rss)
    grown = (peak - before) / 1e6
    print(f"R5: grew by {grown:.1f} MB while a client tried to send 300 MB and could send {sent >> 20}")
    assert server.request("GET", "llm/health").status_code == 200
    assert grown <= 5
