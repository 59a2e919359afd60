"""Clients of the ``openai`` package that ``client.openai()`` makes; over each way that leads to a server."""

from __future__ import annotations

import json
import os
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar

import openai
import pytest
from mock_upstream import ANSWER, MockUpstream

from llmkit.client import Client, connect
from llmkit.client.connection import Connection, Server

MESSAGES: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
CHAT = {
    "id": "c",
    "object": "chat.completion",
    "created": 0,
    "model": "m",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": ANSWER}}],
}


@pytest.fixture
def loaded(client: Client, upstream: MockUpstream) -> str:
    client.configure("ask", "gpt-3", "openai", {"base_url": upstream.base_url})
    client.load("ask", progress=False)
    return "ask"


def test_it_asks_the_models_of_the_server(loaded: str, client: Client) -> None:
    with client.openai() as sdk:
        answer = sdk.chat.completions.create(model=loaded, messages=MESSAGES)
        assert answer.choices[0].message.content == ANSWER
        chunks = list(sdk.chat.completions.create(model=loaded, messages=MESSAGES, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
        assert loaded in {model.id for model in sdk.models.list()}


async def test_the_asynchronous_one_does_the_same(loaded: str, client: Client) -> None:
    async with client.async_openai() as sdk:
        answer = await sdk.chat.completions.create(model=loaded, messages=MESSAGES)
        assert answer.choices[0].message.content == ANSWER


def test_arguments_of_the_package_pass(client: Client) -> None:
    with client.openai(timeout=7, max_retries=0) as sdk:
        assert (sdk.timeout, sdk.max_retries) == (7, 0)


@pytest.fixture
def mute(fake: Any) -> Any:
    fake.replies["POST", "/llm/v1/chat/completions"] = (200, CHAT)
    return fake


def test_the_token_is_its_key_and_the_environment_changes_neither(mute: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-somebody-elses")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with connect(mute.url, "canary") as client, client.openai() as sdk:
        assert sdk.chat.completions.create(model="m", messages=MESSAGES).choices[0].message.content == ANSWER
    headers = {name.lower(): value for name, value in mute.asked[-1].headers.items()}
    assert headers["authorization"] == "Bearer canary"


def test_a_server_without_token_needs_none(mute: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-somebody-elses")
    with Client(Connection(Server(mute.url))).openai() as sdk:
        sdk.chat.completions.create(model="m", messages=MESSAGES)
    assert "sk-somebody-elses" not in json.dumps(mute.asked[-1].headers)


async def test_a_certificate_of_its_own_is_trusted_where_the_client_trusts_it(
    https_fake: Any, certificate: Path
) -> None:
    https_fake.replies["POST", "/llm/v1/chat/completions"] = (200, CHAT)
    for verify in (str(certificate), False):
        with connect(https_fake.url, "t", verify=verify) as client, client.openai() as sdk:
            assert sdk.chat.completions.create(model="m", messages=MESSAGES).choices[0].message.content == ANSWER
            async with client.async_openai() as asynchronous:
                answer = await asynchronous.chat.completions.create(model="m", messages=MESSAGES)
                assert answer.choices[0].message.content == ANSWER
    with (
        Client(Connection(Server(https_fake.url, "t"))).openai(max_retries=0) as sdk,
        pytest.raises(openai.APIConnectionError),
    ):
        sdk.chat.completions.create(model="m", messages=MESSAGES)


class SocketHandler(BaseHTTPRequestHandler):
    """Answers every chat, and remembers the last one's path and key."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[tuple[str, str | None]]] = []

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append((self.path, self.headers["Authorization"]))
        data = json.dumps(CHAT).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def uds() -> Iterator[Path]:
    path = Path(os.environ["LLMKIT_RUN_DIR"]) / "s"
    with socketserver.ThreadingUnixStreamServer(str(path), SocketHandler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield path
        server.shutdown()
        thread.join()


async def test_a_unix_socket_is_the_way_of_both(uds: Path) -> None:
    client = Client(Connection(Server("http://localhost/a%40b/", "t", uds=str(uds))))
    with client.openai() as sdk:
        assert sdk.chat.completions.create(model="m", messages=MESSAGES).choices[0].message.content == ANSWER
    async with client.async_openai() as asynchronous:
        answer = await asynchronous.chat.completions.create(model="m", messages=MESSAGES)
        assert answer.choices[0].message.content == ANSWER
    assert SocketHandler.asked == [("/a%40b/llm/v1/chat/completions", "Bearer t")] * 2


def test_the_package_is_imported_by_who_asks_for_it() -> None:
    code = "import llmkit, sys; llmkit.Client; llmkit.AsyncClient; print('openai' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"
