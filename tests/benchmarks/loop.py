"""How late the event loop of the Jupyter server is: idle, while a real engine loads, and under many streams."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from support import JupyterServer, missing

from benchmarks.contenders import LLMKIT_PATH, jupyter, load_mock, of_server
from benchmarks.loadgen import Job
from benchmarks.payloads import SLOW
from benchmarks.processes import BenchmarkError, Generator, Upstream, family


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    idle_seconds: float = 10.0
    streams: int = 200
    stream_seconds: float = 10.0
    engine: bool = True


def measure(settings: Settings) -> dict[str, Any]:
    """Give the lateness of a beat of 10 ms: count, p50, p99 and the worst in ms, by what the server does."""
    figures: dict[str, Any] = {}
    with Upstream() as upstream, Generator() as generator, jupyter("bench_loop") as server:
        reset(server)
        time.sleep(settings.idle_seconds)
        figures["idle"] = read(server)

        if settings.engine:
            if reason := missing("vllm"):
                raise BenchmarkError(reason)
            config_id = server.configure("demo")
            reset(server)
            began = time.monotonic()
            server.load(config_id)
            figures["load of an engine"] = {**read(server), "seconds": time.monotonic() - began}
            answer = server.request("POST", "llm/unload_model/demo", timeout=60)
            if not answer.is_success:
                raise BenchmarkError(f"the engine could not be unloaded: {answer.text[:300]}")

        load_mock(server, upstream.base_url)
        contender = of_server("llmkit", server, LLMKIT_PATH, "bench")
        job = Job(
            request=contender.request(stream=True, mode=SLOW),
            check="stream",
            clients=settings.streams,
            warmup=0.5,
            seconds=settings.stream_seconds,
            port=contender.port,
            pids=contender.pids(),
            helpers=family(upstream.process.pid),
        )
        reset(server)
        result = generator.run(job, f"{settings.streams} streams at once")
        figures[f"{settings.streams} streams"] = {
            **read(server),
            "seconds": result.seconds,
            "chunks_per_s": result.progress * 64 / result.seconds,
            "cpu_share": result.cpu / result.seconds,
        }
    return figures


def reset(server: JupyterServer) -> None:
    """Forget the beats so far."""
    answer = server.request("DELETE", "bench/loop")
    if not answer.is_success:
        raise BenchmarkError(f"no heartbeat: {answer.status_code} {answer.text[:300]}")


def read(server: JupyterServer) -> dict[str, float]:
    """Give the lateness since `reset`."""
    figures: dict[str, float] = server.request("GET", "bench/loop").json()
    return figures
