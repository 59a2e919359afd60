"""What a relay takes from a real engine: the same vLLM directly, through ``/llm/v1`` and through the yardstick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from support import JupyterServer, missing

from benchmarks.contenders import BARE_PATH, LLMKIT_PATH, http_request, jupyter, of_server
from benchmarks.loadgen import Job, Result
from benchmarks.payloads import CHUNKS, chat_body
from benchmarks.processes import BenchmarkError, Generator
from benchmarks.relay import Figures, ratio, times

DEMO_MODEL = "demo"
WAYS = ("direct", "llmkit", "bare")


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    rounds: int = 10
    seconds: float = 2.5
    warmup: float = 0.5
    clients: int = 8


def measure(settings: Settings) -> dict[str, Any]:
    """Give tokens/s and the time to the first token of each way, and the relays' ratios to the direct one."""
    if reason := missing("vllm"):
        raise BenchmarkError(reason)
    with Generator() as generator, jupyter("bench_bare") as server:
        print("loading the demo model into vLLM", flush=True)
        server.load(server.configure(DEMO_MODEL))
        jobs = {way: job(settings, server, way) for way in WAYS}
        for way in WAYS:
            generator.run(jobs[way], f"{way}, warming up")
        rounds: dict[str, list[Figures]] = {way: [] for way in WAYS}
        for number in range(settings.rounds):
            shift = number % len(WAYS)
            for way in WAYS[shift:] + WAYS[:shift]:
                rounds[way].append(figures(generator.run(jobs[way], f"the engine, {way}")))
    medians = {way: {key: median(one[key] for one in some) for key in some[0]} for way, some in rounds.items()}
    return {
        **{way: {**medians[way], "rounds": rounds[way]} for way in WAYS},
        "ratio_of_medians": {way: medians[way]["tokens_per_s"] / medians["direct"]["tokens_per_s"] for way in WAYS},
        "median_of_ratios": {way: ratio(rounds[way], rounds["direct"], "tokens_per_s") for way in WAYS},
    }


def job(settings: Settings, server: JupyterServer, way: str) -> Job:
    """Give the job of one way: the same body, to the engine's own socket or to the Jupyter server."""
    contender = of_server(way, server, BARE_PATH if way == "bare" else LLMKIT_PATH, DEMO_MODEL)
    body = chat_body(DEMO_MODEL, stream=True, temperature=0, ignore_eos=True, stream_options={"include_usage": True})
    path = "/v1/chat/completions" if way == "direct" else contender.path
    return Job(
        request=http_request(path, server.token, body, stream=True),
        check="tokens",
        clients=settings.clients,
        warmup=settings.warmup,
        seconds=settings.seconds,
        port=contender.port,
        unix=str(engine_socket(server.run_dir)) if way == "direct" else None,
        pids=[contender.pid],
    )


def engine_socket(run_dir: Path) -> Path:
    """Find the socket of the one engine that runs."""
    if len(found := list(run_dir.rglob("engine.sock"))) != 1:
        raise BenchmarkError(f"not one socket of an engine in {run_dir}: {found}")
    return found[0]


def figures(result: Result) -> Figures:
    """Give the figures of one window."""
    return {
        "tokens_per_s": result.progress * CHUNKS / result.seconds,
        **times("first_token", result.first),
        **times("latency", result.latencies),
        "server_cpu_share": result.cpu / result.seconds,
        "parts_per_stream": result.parts,
    }
