"""A registry without a server: engines that do what the test says, and memory of the size that it says."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from mock_upstream import MockUpstream
from scripted_engine import ScriptedEngineType

from llmkit.process.devices import Devices
from llmkit.registry.registry import ModelRegistry, Settings
from llmkit.schemas import InferenceRequest, ModelConfigRequest

LOG = logging.getLogger("test")


class FixedRAM(Devices):
    """A machine with so much free memory before any model is loaded."""

    def __init__(self, free: int, engines: ScriptedEngineType) -> None:
        super().__init__()
        self._free = free
        self._engines = engines

    def free_ram(self) -> int:
        return self._free - sum(engine.held for engine in self._engines.engines if not engine.stops)


class RegistryStage:
    """A folder, an endpoint, and a registry of models whose engines hold what their argument ``size`` says."""

    def __init__(self, folder: Path, upstream: MockUpstream) -> None:
        self._folder = folder
        self._count = 0
        self.engines = ScriptedEngineType(upstream.base_url, ready=True)

    @asynccontextmanager
    async def registry(
        self, free: int = 1 << 50, *, devices: Devices | None = None, **settings: Any
    ) -> AsyncIterator[ModelRegistry]:
        self._count += 1
        run_dir = self._folder / "run" / f"s{self._count}"
        run_dir.mkdir(parents=True)
        chosen = Settings(state_dir=self._folder / "state", run_dir=run_dir, **settings)
        devices = devices or FixedRAM(free, self.engines)
        registry = ModelRegistry(chosen, lambda event: None, LOG, {}, {"scripted": self.engines}, devices)
        await registry.start()
        try:
            yield registry
        finally:
            await registry.close()


async def configure(registry: ModelRegistry, model_id: str, size: int = 100, **fields: Any) -> str:
    body = {"model_id": model_id, "model_name": "n", "model_type": "scripted", "model_kwargs": {"size": size}, **fields}
    return (await registry.configure(ModelConfigRequest.model_validate(body))).config_id


def ask(model_id: str, **kwargs: Any) -> InferenceRequest:
    return InferenceRequest(model_id=model_id, prompt="Hi", inference_kwargs=kwargs)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)
