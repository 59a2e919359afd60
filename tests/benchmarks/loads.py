"""How long a load takes: ``vllm serve``, llmkit without a standby, llmkit with one; and what each holds.

The same flags, environment, guardian and watch for all three, one after the other in turns, and an answer is checked
each time. A heartbeat in the same event loop says how late it was meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from support import ANSWER, QUESTION, missing

from benchmarks.accounting import pss_kib
from benchmarks.processes import BenchmarkError
from llmkit.demo import DEMO_MODEL_NAME
from llmkit.engines.base import EngineContext, LoadProgress
from llmkit.engines.http import EngineHTTP
from llmkit.engines.vllm.engine import VLLMEngine, VLLMEngineType
from llmkit.engines.vllm.launcher import SOCKET_NAME
from llmkit.errors import LLMKitError
from llmkit.schemas import Configuration

WAYS = ("vllm serve", "without a standby", "standby")
SWITCH = "standby, another model unloaded first"
_SERVE = """
import sys
from llmkit.engines.vllm.launch import name_the_cpu_build, run
name_the_cpu_build()
run(sys.argv[1:])
"""
VLLM_SERVE = (sys.executable, "-c", _SERVE)
"""vLLM's own command line; the CPU build is found under its other name, and nothing else is done."""
BARE_IMPORT = """
import contextlib, importlib, sys
from llmkit.engines.vllm.launch import name_the_cpu_build
name_the_cpu_build()
for name in sys.argv[1:]:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
print("imported", flush=True)
sys.stdin.read()
"""
HEARTBEAT_SECONDS = 0.01
READY_SECONDS = 120.0
SETTLE_SECONDS = 2.0
LOG = logging.getLogger("benchmark")


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    rounds: int = 6


def measure(settings: Settings) -> dict[str, Any]:
    """Give seconds and memory of loads by way, the memory of a standby, and the lag of the event loop."""
    if reason := missing("vllm"):
        raise BenchmarkError(reason)
    return asyncio.run(_measure(settings))


async def _measure(settings: Settings) -> dict[str, Any]:
    lags: list[float] = []
    beating = asyncio.create_task(_beat(lags))
    rounds: dict[str, list[dict[str, float]]] = {way: [] for way in (*WAYS, SWITCH)}
    standby: list[float] = []
    plain, ours = VLLMEngineType(VLLM_SERVE), VLLMEngineType()
    try:
        await _load(plain)  # whatever is cached, is cached
        for number in range(settings.rounds):
            shift = number % len(WAYS)
            for way in WAYS[shift:] + WAYS[:shift]:
                if way == "standby":
                    standby.append(await _have_standby(ours))
                rounds[way].append(await _load(plain if way == "vllm serve" else ours))
            rounds[SWITCH].append(await _switch(ours))
            print(f"round {number + 1} of {settings.rounds}", flush=True)
    finally:
        beating.cancel()
        await ours.put_away()
    lags.sort()
    ways = {
        way: {**{key: median(one[key] for one in some) for key in some[0]}, "rounds": some}
        for way, some in rounds.items()
    }
    return {
        **ways,
        "standby_mib": median(standby),
        "bare_import_mib": _bare_import_mib(),
        "loop_p99_ms": lags[int(len(lags) * 0.99)] * 1000,
        "loop_max_ms": lags[-1] * 1000,
    }


async def _beat(lags: list[float]) -> None:
    while True:
        began = time.perf_counter()
        await asyncio.sleep(HEARTBEAT_SECONDS)
        lags.append(time.perf_counter() - began - HEARTBEAT_SECONDS)


@contextlib.asynccontextmanager
async def _engine(engine_type: VLLMEngineType, model_id: str) -> AsyncIterator[VLLMEngine]:
    folder = Path(tempfile.mkdtemp(prefix="lk-", dir="/tmp"))
    configuration = Configuration(
        config_id="c", model_id=model_id, model_name=DEMO_MODEL_NAME, model_type="vllm", model_kwargs={}
    )
    engine = engine_type.create(configuration, EngineContext(folder / "e", folder / "log", None, LOG))
    try:
        yield engine
    finally:
        await engine.stop()
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


async def _load(engine_type: VLLMEngineType) -> dict[str, float]:
    """Load, ask, measure and unload."""
    async with _engine(engine_type, "demo") as engine:
        return await _measured_start(engine)


async def _switch(engine_type: VLLMEngineType) -> dict[str, float]:
    """Unload a model and load another one, with a standby that came when the first was loaded."""
    async with _engine(engine_type, "first") as first, _engine(engine_type, "second") as second:
        await _measured_start(first)
        await _have_standby(engine_type)
        began = time.perf_counter()
        await first.stop()
        gone = time.perf_counter() - began
        found = await _measured_start(second)
        return {**found, "seconds": found["seconds"] + gone}


async def _measured_start(engine: VLLMEngine) -> dict[str, float]:
    began = time.perf_counter()
    try:
        await engine.start(_ignore)
    except LLMKitError as error:
        raise BenchmarkError(f"a load failed: {error} {error.details.get('log_tail')}") from error
    seconds = time.perf_counter() - began
    http = EngineHTTP(engine.endpoint)
    try:
        model = engine.endpoint.model
        body = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
        answer = await http.json("POST", "/chat/completions", body)
    finally:
        await http.close()
    if (said := answer["choices"][0]["message"]["content"]) != ANSWER:
        raise BenchmarkError(f"the engine answered {said!r}")
    pss = (await engine.memory()).pss_bytes or 0
    return {"seconds": seconds, "pss_mib": pss / (1 << 20)}


async def _have_standby(engine_type: VLLMEngineType) -> float:
    """Return when a standby is ready and quiet, with what it holds in MiB."""
    folder = Path(tempfile.mkdtemp(prefix="lk-", dir="/tmp")) / "s"
    configuration = Configuration(
        config_id="c", model_id="demo", model_name=DEMO_MODEL_NAME, model_type="vllm", model_kwargs={}
    )
    if not await engine_type.prepare(configuration, folder, LOG):
        raise BenchmarkError("there can be no standby here: is this vLLM one that it was tried with?")
    deadline = time.monotonic() + READY_SECONDS
    while not (folder / SOCKET_NAME).exists():
        if time.monotonic() > deadline:
            raise BenchmarkError("the standby does not get ready")
        await asyncio.sleep(0.05)
    await asyncio.sleep(SETTLE_SECONDS)
    return (await engine_type.prepared_bytes() or 0) / (1 << 20)


def _bare_import_mib() -> float:
    """Give what a Python holds that has imported the same modules and done nothing else."""
    command = [sys.executable, "-c", BARE_IMPORT, *modules()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout
        assert process.stdin
        if process.stdout.readline() != b"imported\n":
            raise BenchmarkError("the modules of vLLM cannot be imported")
        time.sleep(SETTLE_SECONDS)
        held = pss_kib(process.pid) / 1024
        process.stdin.close()
    return held


def modules() -> list[str]:
    """Give the names of what a standby for the demo model imports."""
    from llmkit.engines.vllm import tested, warm

    build = tested.build()
    assert build is not None
    return [*warm.MODULES, *warm.WORKERS[build[0]], "vllm.model_executor.models.llama"]


def _ignore(_: LoadProgress) -> None:
    pass
