"""A Jupyter server in the test's own process, with a mock upstream and an engine that waits for the test."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from mock_upstream import MockUpstream
from scripted_engine import ScriptedEngineType
from tornado.httpclient import HTTPClientError, HTTPResponse

from jupyter_server_ext.app import LLMKitApp
from llmkit.engines.base import load_engine_types


@dataclass
class Answer:
    """What came back."""

    status: int
    json: Any
    text: str
    headers: Any


Call = Callable[..., Awaitable[Answer]]


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> Iterator[MockUpstream]:
    with MockUpstream() as running:
        monkeypatch.setenv("OPENAI_BASE_URL", running.base_url)
        yield running


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> ScriptedEngineType:
    engine_type = ScriptedEngineType(ready=True)
    monkeypatch.setattr(
        "llmkit.registry.registry.load_engine_types",
        lambda logger: {**load_engine_types(logger), "scripted": engine_type},
    )
    return engine_type


@pytest.fixture
def jp_server_config() -> dict[str, Any]:
    return {"ServerApp": {"jpserver_extensions": {"jupyter_server_ext": True}}, "LLMKitApp": {"standby": "off"}}


@pytest.fixture
def app(scripted: ScriptedEngineType, jp_serverapp: Any, http_server: Any) -> LLMKitApp:
    (extension,) = jp_serverapp.extension_manager.extension_apps["jupyter_server_ext"]
    assert isinstance(extension, LLMKitApp)
    return extension


@pytest.fixture
def call(app: LLMKitApp, jp_fetch: Any) -> Call:
    """Call the API with the server's token; any status is an answer."""

    async def fetch(method: str, path: str, body: Any = None, *, raw: bytes | None = None, **kwargs: Any) -> Answer:
        path, _, query = path.partition("?")
        params = dict(pair.split("=", 1) for pair in query.split("&")) if query else None
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        if method in ("POST", "PUT", "PATCH") and data is None:
            data = b""
        try:
            response: HTTPResponse = await jp_fetch(
                path, method=method, body=data, params=params, allow_nonstandard_methods=True, **kwargs
            )
        except HTTPClientError as error:
            if error.response is None:
                raise
            response = error.response
        text = response.body.decode() if response.body else ""
        is_json = "json" in response.headers.get("Content-Type", "")
        return Answer(response.code, json.loads(text) if is_json and text else None, text, response.headers)

    return fetch


@pytest.fixture
def configure(call: Call) -> Callable[..., Awaitable[str]]:
    """Configure a model and give its config_id."""

    async def do(model_id: str = "example_model", **fields: Any) -> str:
        body = {"model_id": model_id, "model_name": "gpt-3", "model_type": "openai", **fields}
        answer = await call("POST", "llm/configure_model/", body)
        assert answer.status == 200, answer.json
        config_id: str = answer.json["config_id"]
        return config_id

    return do
