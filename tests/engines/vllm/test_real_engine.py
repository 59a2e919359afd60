"""The same with real vLLM and the embedded demo model; each start takes most of a minute, so there are few."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import ANSWER, QUESTION

from llmkit.engines.base import EngineContext, LoadProgress
from llmkit.engines.http import EngineHTTP
from llmkit.engines.vllm.engine import VLLMEngine, VLLMEngineType
from llmkit.errors import ModelNameNotFound
from llmkit.process.guardian import marked
from llmkit.schemas import Configuration

pytestmark = pytest.mark.vllm

GB = 10**9
Make = Callable[..., VLLMEngine]


@pytest.fixture
def run_root() -> Path:
    return Path(os.environ["LLMKIT_RUN_DIR"])


@pytest.fixture
def make(run_root: Path, jp_asyncio_loop: asyncio.AbstractEventLoop) -> Iterator[Make]:
    """Make an engine; at the end of the test no process or folder of it is left."""
    made: list[VLLMEngine] = []

    def make(model_name: str, **model_kwargs: Any) -> VLLMEngine:
        configuration = Configuration(
            config_id="c", model_id="demo", model_name=model_name, model_type="vllm", model_kwargs=model_kwargs
        )
        # As long as it may be at all.
        place = run_root / "".ljust(70 - len(str(run_root)) - 1, "x")
        context = EngineContext(place, run_root / "engine.log", None, logging.getLogger("test"))
        made.append(VLLMEngineType().create(configuration, context))
        return made[-1]

    yield make
    for engine in made:
        assert jp_asyncio_loop.run_until_complete(engine.stop()).verified
        assert marked(engine.engine_id) == []
    assert [path.name for path in run_root.iterdir()] == ["engine.log"]


def shared_memory(processes: list[psutil.Process]) -> set[Path]:
    mapped = {Path(m.path) for process in processes for m in process.memory_maps() if m.path.startswith("/dev/shm/")}
    return {path for path in mapped if path.exists()}


def ignore(_: LoadProgress) -> None:
    pass


async def test_the_demo_model_answers_and_stop_leaves_nothing(make: Make) -> None:
    engine = make("llmkit/demo")
    phases: list[str] = []
    started = time.monotonic()
    capabilities = await engine.start(lambda progress: phases.append(progress.phase))
    print(f"\nready after {time.monotonic() - started:.1f} s")
    assert list(dict.fromkeys(phases)) == ["starting", "weights", "warming", "ready"]
    assert capabilities.api == "chat"
    assert capabilities.max_model_len
    assert capabilities.engine_version.startswith("0.")

    http = EngineHTTP(engine.endpoint)
    # The shortest prompt comes first: it killed an engine that had not warmed up, on processors with AMX.
    assert (await http.json("POST", "/completions", {"model": "demo", "prompt": "Hi", "max_tokens": 1}))["choices"]
    body = {"model": "demo", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 50}
    answer = await http.json("POST", "/chat/completions", body)
    assert answer["choices"][0]["message"]["content"] == ANSWER
    streamed = http.events("/chat/completions", {**body, "stream": True})
    deltas = [event["choices"][0]["delta"] async for events in streamed for event in events]
    assert "".join(delta.get("content") or "" for delta in deltas) == ANSWER
    await http.close()

    tree = [psutil.Process(process.pid) for process in marked(engine.engine_id)]
    # Every process still shows the marker, though vLLM's rename themselves.
    assert set(psutil.Process().children(recursive=True)) <= set(tree)
    assert any("VLLM::EngineCore" in " ".join(process.cmdline()) for process in tree)
    listeners = [c.laddr.ip for p in tree for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert set(listeners) <= {"127.0.0.1"}
    shared = shared_memory(tree)
    assert shared
    memory = await engine.memory()
    assert memory.pss_bytes
    assert memory.pss_bytes < 2 * GB

    started = time.monotonic()
    freed = await engine.stop()
    print(f"{len(listeners)} listeners, {freed.pss_bytes} bytes, gone after {time.monotonic() - started:.1f} s")
    assert freed.verified
    assert freed.pss_bytes
    assert not [path for path in shared if path.exists()]


async def test_a_load_that_is_cancelled_is_gone_within_5_seconds(make: Make) -> None:
    engine = make("llmkit/demo")
    under_way = asyncio.Event()
    starting = asyncio.create_task(engine.start(lambda progress: under_way.set() if progress.fraction else None))
    await asyncio.wait_for(under_way.wait(), 120)
    starting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await starting
    started = time.monotonic()
    assert (await engine.stop()).verified
    assert time.monotonic() - started < 5.0
    assert marked(engine.engine_id) == []


async def test_a_model_that_does_not_exist_is_named(make: Make) -> None:
    with pytest.raises(ModelNameNotFound, match="no model `nobody/nothing`") as caught:
        await make("nobody/nothing", offline=True).start(ignore)
    assert caught.value.details["log_tail"]
