"""The model type ``parrot``, an example to copy: an engine that is a program of its own and repeats what it is told.

`ParrotType` is what the entry point names: what a configuration may say, and how to make an engine. `Parrot` is one
load: it starts the program, waits until it answers, and ends it. llmkit does the rest: the queue, streams,
OpenAI's API, the panel's form, the record, and the end of the program if the server is killed.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from http import HTTPStatus

from pydantic import Field

from llmkit.engines.base import (
    Endpoint,
    EngineContext,
    EngineExit,
    EngineType,
    LoadProgress,
    does_not_fit,
    sort_kwargs,
)
from llmkit.engines.http import EngineHTTP
from llmkit.engines.log import last_lines
from llmkit.errors import EngineGone, LLMKitError, LoadFailed, TimedOut
from llmkit.process.keeper import KeptProcess
from llmkit.schemas import Capabilities, Configuration, Memory, MemoryEstimate, Strict

VOICES = ("plain", "loud")
POLL_SECONDS = 0.05


class ParrotArguments(Strict):
    """Engine arguments of a ``parrot`` model; all are optional, and the panel makes a form of them."""

    times: int | None = Field(
        None,
        ge=1,
        le=10,
        description="How often everything is said; 1 if not given.",
        json_schema_extra={"group": "essential"},
    )


class ParrotType:
    """The model type ``parrot``; its models are called as the parrot's voice is: plain or loud."""

    name = "parrot"
    summary = "A parrot: it repeats what it is told"
    arguments = ParrotArguments

    def unavailable(self) -> LLMKitError | None:
        """Say why there can be no parrot here, or None."""
        return None if sys.platform == "linux" else LLMKitError("A parrot needs Linux.")

    def check(self, configuration: Configuration) -> None:
        """Raise `DoesNotFit` if there is no such voice; arguments have been checked by their schema."""
        if configuration.model_name not in VOICES:
            raise does_not_fit([{"path": "model_name", "message": f"must be one of {', '.join(VOICES)}"}])

    def origin(self, configuration: Configuration) -> str | None:
        """Say that no key goes anywhere."""
        return None

    def default_origin(self) -> str | None:
        """Say that no key goes anywhere."""
        return None

    def estimate(self, configuration: Configuration) -> MemoryEstimate | None:
        """Say what a load will take: a Python with a small server."""
        return MemoryEstimate(device="cpu", total_bytes=64 << 20)

    def create(self, configuration: Configuration, context: EngineContext) -> Parrot:
        """Make the engine of one load."""
        return Parrot(configuration, context, sort_kwargs(self, configuration.model_kwargs).engine.get("times") or 1)


class Parrot:
    """One parrot: made for a load, thrown away after its stop."""

    def __init__(self, configuration: Configuration, context: EngineContext, times: int) -> None:
        socket = context.run_dir / "parrot.sock"
        self.endpoint = Endpoint("http://parrot/v1", model=configuration.model_name, uds=socket)
        self._context = context
        # Its whole process tree ends with the server, whatever happens to that.
        self._kept = KeptProcess(
            [sys.executable, "-m", "llmkit_parrot.program", str(socket), configuration.model_name, str(times)],
            {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ},
            run_dir=context.run_dir,
            log_file=context.log_file,
        )

    async def start(self, report: Callable[[LoadProgress], None]) -> Capabilities:
        """Return when the program answers."""
        report(LoadProgress("starting", 0.0))
        await self._kept.start()
        http = EngineHTTP(Endpoint("http://parrot/v1", self.endpoint.model, self.endpoint.uds, timeout=2.0))
        try:
            async with asyncio.timeout(self._context.stall_seconds):
                while not await self._answers(http):
                    if self._kept.ended:
                        raise await self._failure("The parrot died.")
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError:
            raise await self._failure("The parrot does not answer.") from None
        finally:
            await http.close()
        report(LoadProgress("ready", 1.0))
        return Capabilities(api="chat")

    async def _answers(self, http: EngineHTTP) -> bool:
        try:
            status, _ = await http.status("/models")
        except (EngineGone, TimedOut):
            return False  # it does not listen yet
        return status == HTTPStatus.OK

    async def _failure(self, message: str) -> LoadFailed:
        lines = await asyncio.to_thread(last_lines, self._context.log_file, 50)
        return LoadFailed(message, hint="Its log says why.", details={"log_tail": lines})

    async def stop(self) -> Memory:
        """End the program and say what it held."""
        held = await self.memory()
        return held.model_copy(update={"verified": await self._kept.stop()})

    async def wait_exit(self) -> EngineExit:
        """Return when the program ended without being asked to."""
        ended = await self._kept.wait_exit()
        return EngineExit("The parrot flew away.", ended.returncode)

    async def memory(self) -> Memory:
        """Measure what the program holds."""
        pss = await self._kept.pss_bytes()
        return Memory(pss_bytes=pss, verified=pss is not None, reason="it runs on the CPU")


_checked: EngineType = ParrotType()  # a type checker says here what is missing
