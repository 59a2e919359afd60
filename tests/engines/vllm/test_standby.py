"""Engines that were started by a standby, with real vLLM: as those that ``vllm serve`` starts, and sooner there."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from benchmarks.loads import VLLM_SERVE
from support import ANSWER, QUESTION, scaled, wait_until

from llmkit.demo import DEMO_MODEL_NAME
from llmkit.engines.base import EngineContext, LoadProgress
from llmkit.engines.http import EngineHTTP
from llmkit.engines.vllm import tested
from llmkit.engines.vllm.devices import processors
from llmkit.engines.vllm.engine import VLLMEngine, VLLMEngineType
from llmkit.engines.vllm.launcher import SOCKET_NAME
from llmkit.process.guardian import RECORD, marked, name_of
from llmkit.process.keeper import KeptProcess
from llmkit.schemas import Configuration

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(tested.build() is None, reason="this vLLM is none that standbys were tried with"),
]

LOG = logging.getLogger("test")
CYCLES = scaled(4)
PLACES = ("France", "Japan", "Peru", "Italy", "Kenya", "Spain", "Egypt", "Norway", "Canada", "India")
FORMS = (
    "What is the capital of {}?",
    "Which city is the capital of {}?",
    "Tell me the capital of {}.",
    "{}",
    "Where is {}?",
    "The capital of {} is",
    "Is Paris the capital of {}?",
    "Name a river in {}.",
    "Write a poem about {}.",
    "How many people live in {}?",
)
PROMPTS = [form.format(place) for place in PLACES for form in FORMS]


@pytest.fixture
def run_root() -> Path:
    return Path(os.environ["LLMKIT_RUN_DIR"])


def configuration(**model_kwargs: Any) -> Configuration:
    return Configuration(
        config_id="c", model_id="demo", model_name=DEMO_MODEL_NAME, model_type="vllm", model_kwargs=model_kwargs
    )


Reports = list[LoadProgress]


@asynccontextmanager
async def loaded(
    engine_type: VLLMEngineType, folder: Path, **model_kwargs: Any
) -> AsyncIterator[tuple[VLLMEngine, EngineHTTP, Reports]]:
    """Give a loaded engine, a way to ask it, and what it reported; nothing is left of it afterwards."""
    engine = engine_type.create(configuration(**model_kwargs), EngineContext(folder, Path(f"{folder}.log"), None, LOG))
    reports: Reports = []
    http = None
    try:
        await engine.start(reports.append)
        http = EngineHTTP(engine.endpoint)
        yield engine, http, reports
    except BaseException as error:
        error.add_note(Path(f"{folder}.log").read_text()[-4000:])
        raise
    finally:
        if http is not None:
            await http.close()
        assert (await engine.stop()).verified
        assert marked(engine.engine_id) == []


async def have_standby(engine_type: VLLMEngineType, folder: Path) -> KeptProcess:
    """Return when a standby waits."""
    assert await engine_type.prepare(configuration(), folder, LOG)
    await asyncio.to_thread(wait_until, (folder / SOCKET_NAME).exists, "a standby that waits", 60)
    kept = engine_type._launcher.standby
    assert kept is not None
    return kept


async def ask(http: EngineHTTP, prompt: str, **more: Any) -> str:
    body = {"model": "demo", "messages": [{"role": "user", "content": prompt}], "temperature": 0, **more}
    answer: str = (await http.json("POST", "/chat/completions", body))["choices"][0]["message"]["content"]
    return answer


def state_of(engine: VLLMEngine) -> dict[str, dict[str, Any]]:
    """Give what is to be the same of each process of an engine, by its name; the first one's is its role."""
    assert engine.endpoint.uds is not None
    record = json.loads((engine.endpoint.uds.parent / RECORD).read_text())
    names = {process.pid: name_of(process.pid) for process in marked(engine.engine_id)}
    named = {pid: name for pid, name in names.items() if name.startswith("VLLM::")}
    return {name: _state_of(pid) for pid, name in {**named, record["engine"][0]: "API server"}.items()}


def _state_of(pid: int) -> dict[str, Any]:
    place = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines() if ":" in line)
    files = {int(file.name): str(file.readlink()) for file in (place / "fd").iterdir()}
    return {
        **{key: status[key].strip() for key in ("SigBlk", "SigIgn", "SigCgt", "Cpus_allowed_list")},
        "niceness": os.getpriority(os.PRIO_PROCESS, pid),
        "input and output": [files[number].rpartition("/")[2] for number in (0, 1, 2)],
        "folder": str((place / "cwd").readlink()),
        "files": len(files),
    }


async def test_an_engine_of_a_standby_is_as_one_of_vllm_serve(run_root: Path) -> None:
    engine_type = VLLMEngineType()
    async with loaded(VLLMEngineType(VLLM_SERVE), run_root / "e") as (engine, http, _):
        plain = state_of(engine)
        plain_answers = [await ask(http, prompt, max_tokens=24) for prompt in PROMPTS]
        plain_pss = (await engine.memory()).pss_bytes
    await have_standby(engine_type, run_root / "s")
    async with loaded(engine_type, run_root / "e") as (engine, http, reports):
        assert [one.launch for one in reports if one.launch] == ["standby"]
        found = state_of(engine)
        answers = [await ask(http, prompt, max_tokens=24) for prompt in PROMPTS]
        pss = (await engine.memory()).pss_bytes
    assert len(PROMPTS) == 100
    assert answers == plain_answers
    assert answers[0] == ANSWER
    assert set(found) == set(plain) == {"API server", "VLLM::EngineCor", "VLLM::Worker"}
    for name, state in plain.items():
        files, plain_files = found[name].pop("files"), state.pop("files")
        assert found[name] == state, name
        # The end of the pipe that the fork server lives as long as, and a connection more or less.
        assert abs(files - plain_files) <= 2, name
    assert plain_pss
    assert pss
    assert pss < plain_pss


two_processors = pytest.mark.skipif(len(processors()) < 2, reason="two workers want a processor each")


def affinities(engine: VLLMEngine) -> list[set[int]]:
    """Give the processors of each worker."""
    workers = [p for p in marked(engine.engine_id) if name_of(p.pid).startswith("VLLM::Worker")]
    return sorted((os.sched_getaffinity(worker.pid) for worker in workers), key=min)


def halves() -> list[set[int]]:
    there = processors()
    half = len(there) // 2
    return [set(there[:half]), set(there[half : 2 * half])]


@two_processors
async def test_several_workers_are_forked_too(run_root: Path) -> None:
    engine_type = VLLMEngineType()
    await have_standby(engine_type, run_root / "s")
    async with loaded(engine_type, run_root / "e", tensor_parallel_size=2) as (engine, http, reports):
        assert [one.launch for one in reports if one.launch] == ["standby"]
        assert await ask(http, QUESTION) == ANSWER
        assert affinities(engine) == halves()


@two_processors
async def test_copies_of_a_model_share_the_requests(run_root: Path) -> None:
    async with loaded(VLLMEngineType(), run_root / "e", data_parallel_size=2) as (engine, http, _):
        assert await asyncio.gather(*(ask(http, QUESTION) for _ in range(8))) == [ANSWER] * 8
        assert affinities(engine) == halves()
        figures = await metrics(http)
        assert {line.split('engine="')[1][0] for line in figures if line.startswith("vllm:request_success")} == {
            "0",
            "1",
        }


async def metrics(http: EngineHTTP) -> list[str]:
    async with http.open("//metrics", method="GET") as response:
        return (await response.text()).splitlines()


async def test_a_failure_of_vllm_reads_as_ever(run_root: Path) -> None:
    engine_type = VLLMEngineType()
    await have_standby(engine_type, run_root / "s")
    with pytest.raises(Exception, match="max_model_len") as caught:
        async with loaded(engine_type, run_root / "e", max_model_len=100_000):
            pass
    print(caught.value)


async def test_load_and_unload_again_and_again_leave_nothing(run_root: Path) -> None:
    engine_type = VLLMEngineType()
    me = psutil.Process()

    def held() -> dict[str, Any]:
        return {
            "processes": len(me.children(recursive=True)),
            "files": me.num_fds(),
            "folders": sorted(path.name for path in run_root.iterdir() if path.is_dir()),
        }

    before, shared = held(), {path.name for path in Path("/dev/shm").iterdir()}
    resident = []
    for number in range(CYCLES):
        await have_standby(engine_type, run_root / f"s{number}")
        async with loaded(engine_type, run_root / f"e{number}") as (_, http, reports):
            assert [one.launch for one in reports if one.launch] == ["standby"]
            assert await ask(http, QUESTION) == ANSWER
        assert held() == before
        assert {path.name for path in Path("/dev/shm").iterdir()} <= shared
        resident.append(me.memory_info().rss)
    print([size >> 20 for size in resident])
    assert resident[-1] - resident[1] < 16 << 20


async def test_a_standby_that_is_put_away_leaves_nothing(run_root: Path) -> None:
    engine_type = VLLMEngineType()
    kept = await have_standby(engine_type, run_root / "s")
    assert len(marked(kept.engine_id)) >= 2
    held = await engine_type.prepared_bytes()
    assert held
    assert 200 << 20 < held < 1 << 30
    await engine_type.put_away()
    assert marked(kept.engine_id) == []
    assert not (run_root / "s").exists()
    assert await engine_type.prepared_bytes() is None
