"""An engine inside the test's own process: every step waits for the test."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from llmkit.engines.base import Endpoint, EngineContext, EngineExit, LoadProgress
from llmkit.errors import LLMKitError
from llmkit.schemas import Capabilities, Configuration, Memory, MemoryEstimate, Strict


class ScriptedArguments(Strict):
    """Engine arguments of a ``scripted`` model."""

    size: int | None = None


class ScriptedEngine:
    """Becomes ready when `ready` is set, fails with `failure`, ends when `ended` is set."""

    def __init__(self, base_url: str, held: int = 1000) -> None:
        self.held = held
        self.endpoint = Endpoint(base_url=base_url, model="scripted-model")
        self.ready = asyncio.Event()
        self.ended = asyncio.Event()
        self.may_stop = asyncio.Event()
        self.may_stop.set()
        self.failure: Exception | None = None
        self.watch_error: Exception | None = None
        self.stops = 0

    async def start(self, report: Callable[[LoadProgress], None]) -> Capabilities:
        report(LoadProgress("weights", 0.5, "weights"))
        await self.ready.wait()
        if self.failure is not None:
            raise self.failure
        return Capabilities(api="chat", max_model_len=512)

    async def stop(self) -> Memory:
        await self.may_stop.wait()
        self.stops += 1
        return Memory(pss_bytes=self.held, verified=True)

    async def wait_exit(self) -> EngineExit:
        await self.ended.wait()
        if self.watch_error is not None:
            raise self.watch_error
        return EngineExit("The engine was killed by signal 9.", -9)

    async def memory(self) -> Memory:
        return Memory(pss_bytes=self.held)


class ScriptedEngineType:
    """The model type ``scripted``; `engines` holds every engine it made."""

    name = "scripted"
    summary = "An engine of the tests"
    arguments = ScriptedArguments

    def __init__(self, base_url: str = "http://127.0.0.1:9/v1", *, ready: bool = False) -> None:
        self.base_url = base_url
        self.ready = ready
        self.held: int | None = None
        self.failure: LLMKitError | None = None
        self.engines: list[ScriptedEngine] = []
        self.why_unavailable: LLMKitError | None = None

    def unavailable(self) -> LLMKitError | None:
        return self.why_unavailable

    def check(self, configuration: Configuration) -> None:
        return None

    def origin(self, configuration: Configuration) -> str | None:
        return None

    def default_origin(self) -> str | None:
        return None

    def estimate(self, configuration: Configuration) -> MemoryEstimate | None:
        size = configuration.model_kwargs.get("size")
        return MemoryEstimate(device="cpu", total_bytes=int(size)) if isinstance(size, int) else None

    def create(self, configuration: Configuration, context: EngineContext) -> ScriptedEngine:
        size = configuration.model_kwargs.get("size", 1000)
        engine = ScriptedEngine(self.base_url, self.held if self.held is not None else int(str(size)))
        if self.failure is not None:
            engine.failure = self.failure
            engine.ready.set()
        if self.ready:
            engine.ready.set()
        self.engines.append(engine)
        return engine
