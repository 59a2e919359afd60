"""A server extension that makes `vllm` an engine within the server: loads take no process and no time.

Everything else of the type is real: its arguments, its checks. The engine is the endpoint at ``OPENAI_BASE_URL``.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from scripted_engine import ScriptedEngine

from llmkit.engines.base import Endpoint, EngineContext, EngineType, Extra, load_engine_types
from llmkit.engines.vllm.engine import VLLMEngineType
from llmkit.errors import LLMKitError
from llmkit.registry import registry
from llmkit.schemas import Configuration, MemoryEstimate


class InstantVLLMEngineType(VLLMEngineType):
    """The model type ``vllm``, ready at once."""

    def unavailable(self) -> LLMKitError | None:
        return None

    def estimate(self, configuration: Configuration) -> MemoryEstimate | None:
        return MemoryEstimate(device="cpu", total_bytes=1 << 20)

    def create(self, configuration: Configuration, context: EngineContext) -> Any:
        base_url = os.environ["OPENAI_BASE_URL"]
        engine = ScriptedEngine(base_url)
        extras: frozenset[Extra] = frozenset({"metrics", "tokenize"})
        engine.endpoint = Endpoint(base_url, "gpt-3", root_url=base_url.removesuffix("/v1"), extras=extras)
        engine.ready.set()
        return engine


def _types(logger: logging.Logger) -> dict[str, EngineType]:
    return {**load_engine_types(logger), "vllm": InstantVLLMEngineType()}


def _jupyter_server_extension_points() -> list[dict[str, str]]:
    return [{"module": "documented_extension"}]


def _load_jupyter_server_extension(app: Any) -> None:
    registry.load_engine_types = _types  # before the loop runs, and with it the registry
