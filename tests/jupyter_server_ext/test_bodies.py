"""R4, R5: ids by one rule, bodies as strict JSON of a bounded size."""

from __future__ import annotations

import contextlib
import json
import random
import re
import socket
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from support import JupyterServer

from llmkit.schemas import MAX_CONFIGURATION_BYTES

GOOD = {"model_id": "m", "model_name": "n", "model_type": "openai"}


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
        b'{"a": [' + b"1," * 200_000 + b"1]}",
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
@pytest.mark.parametrize("path", ["llm/configure_model/", "llm/inference/"])
async def test_what_is_not_a_strict_json_object_is_a_400(call: Any, path: str, raw: bytes) -> None:
    answer = await call("POST", path, raw=raw)
    assert (answer.status, answer.json["error"]["code"]) == (400, "malformed_request")


async def test_depth_64_is_read(call: Any) -> None:
    deep: Any = 1
    for _ in range(62):
        deep = [deep]
    answer = await call("POST", "llm/configure_model", {**GOOD, "model_kwargs": {"x": deep}})
    assert answer.status == 422


async def test_a_configuration_over_1_mib_is_a_413_and_a_prompt_of_that_size_is_not(call: Any, upstream: Any) -> None:
    large = "x" * MAX_CONFIGURATION_BYTES
    answer = await call("POST", "llm/configure_model", {**GOOD, "description": large})
    assert (answer.status, answer.json["error"]["code"]) == (413, "too_large")
    assert (await call("POST", "llm/inference", {"model_id": "m", "prompt": large})).status == 404
    config_id = (await call("POST", "llm/configure_model", {**GOOD, "model_name": "gpt-3"})).json["config_id"]
    await call("POST", f"llm/load_model/{config_id}")
    answer = await call("POST", "llm/inference", {"model_id": "m", "prompt": large})
    assert answer.status == 200


def test_a_get_without_credentials_is_not_let_send_a_body(server: JupyterServer) -> None:
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
def test_300_mb_without_credentials_fill_no_memory(server: JupyterServer, chunked: bool) -> None:
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


async def test_a_body_that_is_too_large_fills_no_memory_with_credentials_either(call: Any) -> None:
    process = psutil.Process()
    raw = b"x" * (40 << 20)
    before = process.memory_info().rss
    answer = await call("POST", "llm/configure_model", raw=raw)
    assert answer.status == 413
    assert process.memory_info().rss - before < 15e6


IDS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}")
HOSTILE = [
    "", " ", ".", "..", "../x", "..%2fx", "a/b", "a\\b", "a\x00", "a\n", "\na", "a\r\nX: y", "--flag", "-x", "_x",
    "a b",
    "a\t", "a" * 129, "é", "a\u0301", "\u202ea", "a\u200b", "ａ", "a;b", "a|b", "a&b", "$HOME", "`id`", "a'b", 'a"b',
    "<script>", "%00", "a%", "a?b", "a#b", "{}", "[x]", "~", "a*", "\ufeffa", "\U0001f600", "a,b", "a=b", "a+b", "(a)",
]  # fmt: skip
FINE = ["a", "7", "demo", "llama3:8b", "gpt-4o-mini", "A.b_c-d@e:f", "a" * 128, "0" * 128, "a--", "a..b"]


async def test_ids_by_one_rule(app: Any) -> None:
    from pydantic import TypeAdapter, ValidationError

    from llmkit.schemas import ModelId

    adapter = TypeAdapter(ModelId)
    chance = random.Random(4)
    alphabet = "abzAZ09._:@-/ \\\n\r\t\x00%é\u202e"
    generated = ["".join(chance.choice(alphabet) for _ in range(chance.randint(0, 8))) for _ in range(10_000)]
    corpus = [*HOSTILE, *(f"{h}x" for h in HOSTILE), *(f"x{h}" for h in HOSTILE), *FINE]
    accepted = 0
    for text in [*corpus, *generated]:
        try:
            adapter.validate_python(text)
        except ValidationError:
            assert not IDS.fullmatch(text), repr(text)
        else:
            assert IDS.fullmatch(text), repr(text)
            accepted += 1
    print(f"R4: {len(corpus)} + {len(generated)} strings, {accepted} accepted, all by the rule")


async def test_hostile_ids_never_reach_anything(call: Any) -> None:
    for text in HOSTILE:
        answer = await call("POST", "llm/configure_model", raw=json.dumps({**GOOD, "model_id": text}).encode())
        assert answer.status in (400, 422), repr(text)
    for path in ("..%2f..%2fetc", "%2e%2e", "%00", "a%0d%0aX:%20y", "--help", "%ff"):
        for prefix in ("llm/configuration/", "llm/models/"):
            assert (await call("GET", prefix + path)).status in (400, 404), path
