"""A vLLM server that somebody started elsewhere: its metrics and tokens are there as those of an engine of our own."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from mock_upstream import MockUpstream

from llmkit.engines.openai import OpenAIEngineType
from llmkit.errors import NotSupported
from llmkit.registry.registry import ModelRegistry, Settings
from llmkit.schemas import ModelConfigRequest

LOG = logging.getLogger("test")
METRICS = "vllm:num_requests_running 0.0\n"


class RemoteVLLM(MockUpstream):
    """Says what vLLM says; `hides` are paths that a proxy on the way does not pass on."""

    def __init__(self) -> None:
        super().__init__(key="secret-key")
        self.owner = "vllm"
        self.hides: set[str] = set()
        self.respond = self._respond

    async def _respond(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse | None:
        path = request.path
        if request.headers.get("Authorization") != "Bearer secret-key" or path in self.hides:
            return None
        if path == "/v1/models":
            entry = {"id": "some/model", "owned_by": self.owner, "max_model_len": 4096}
            return web.json_response({"object": "list", "data": [entry]})
        if path == "/tokenize":
            return web.json_response({"count": len(body["prompt"].split()), "max_model_len": 4096, "tokens": [1]})
        return web.Response(text=METRICS) if path == "/metrics" else None


@pytest.fixture
def remote() -> Iterator[RemoteVLLM]:
    with RemoteVLLM() as running:
        yield running


@asynccontextmanager
async def loaded(folder: Path, base_url: str) -> AsyncIterator[ModelRegistry]:
    (folder / "run").mkdir()
    settings = Settings(state_dir=folder / "state", run_dir=folder / "run")
    registry = ModelRegistry(settings, lambda event: None, LOG, {}, {"openai": OpenAIEngineType({})})
    await registry.start()
    try:
        kwargs = {"base_url": base_url, "api_key": "secret-key"}
        body = {"model_id": "m", "model_name": "some/model", "model_type": "openai", "model_kwargs": kwargs}
        configuration = await registry.configure(ModelConfigRequest.model_validate(body))
        await registry.load(configuration.config_id)
        yield registry
    finally:
        await registry.close()


async def count(registry: ModelRegistry) -> int:
    async def never(events: bytes, *, is_last: bool) -> None:
        raise AssertionError((events, is_last))

    answer = await registry.requests.relay("tokenize", {"model": "m", "prompt": "three short words"}, never)
    assert answer is not None
    told: int = json.loads(answer.body)["count"]
    return told


def asked(remote: RemoteVLLM) -> set[str]:
    return {path for path, _, _ in remote.requests}


async def test_what_vllm_has_beside_openais_api_is_found_at_load(tmp_path: Path, remote: RemoteVLLM) -> None:
    async with loaded(tmp_path, remote.base_url) as registry:
        assert registry.model("m").capabilities.max_model_len == 4096
        assert (await registry.engine_metrics("m")).decode() == METRICS
        assert await count(registry) == 3


async def test_what_a_proxy_does_not_pass_on_is_not_offered(tmp_path: Path, remote: RemoteVLLM) -> None:
    remote.hides = {"/metrics"}
    async with loaded(tmp_path, remote.base_url) as registry:
        with pytest.raises(NotSupported):
            await registry.engine_metrics("m")
        assert await count(registry) == 3


async def test_no_other_endpoint_is_asked_for_what_only_vllm_has(tmp_path: Path, remote: RemoteVLLM) -> None:
    remote.owner = "somebody"
    async with loaded(tmp_path, remote.base_url) as registry:
        assert asked(remote) == {"/v1/models"}
        with pytest.raises(NotSupported):
            await registry.engine_metrics("m")
