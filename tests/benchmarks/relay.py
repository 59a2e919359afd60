"""The benchmark of relays: all contenders in front of one upstream, in turns, so that what else the machine does
meets all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import mean, median, quantiles
from typing import Any

import httpx

from benchmarks.contenders import CONTENDERS, YARDSTICK, Contender
from benchmarks.loadgen import Job
from benchmarks.payloads import CHUNKS, NOW, PACED, chat_body
from benchmarks.processes import BenchmarkError, Generator, Upstream, family

STREAMS = {"stream": NOW, "paced": PACED}
"""Kinds of streams, by how the upstream sends them; the other kind is a plain answer."""
PACED_CLIENTS = 16
SETTLE_CLIENTS = 4
RATIOS = ("requests_per_s", "cpu_ms_per_request")

Figures = dict[str, float]


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    rounds: int = 5
    seconds: float = 2.5
    warmup: float = 0.3
    clients: Sequence[int] = (1, 16, 64)
    contenders: Sequence[str] = tuple(CONTENDERS)
    mode: str | None = None

    def cases(self) -> dict[str, Sequence[int]]:
        """Give what is measured: kinds of requests, and with how many clients."""
        return {"plain": self.clients, "stream": self.clients, "paced": (PACED_CLIENTS,)}


def measure(settings: Settings) -> dict[str, Any]:
    """Measure all contenders; give ``{kind: {clients: {contender: figures}}}``."""
    with ExitStack() as stack:
        upstream = stack.enter_context(Upstream())
        generator = stack.enter_context(Generator())
        running = []
        for name in settings.contenders:
            print(f"starting {name}", flush=True)
            contender = stack.enter_context(CONTENDERS[name](upstream))
            try_out(contender, settings.mode or NOW)
            running.append(contender)
        bench = Bench(settings, upstream, generator)
        for contender in running:
            for kind in ("plain", "stream"):
                bench.once(contender, kind, SETTLE_CLIENTS)
        return {
            kind: {str(count): bench.case(running, kind, count) for count in counts}
            for kind, counts in settings.cases().items()
        }


def try_out(contender: Contender, mode: str) -> None:
    """Ask once, so that what does not work is told before anything is measured."""
    body = chat_body(contender.model, stream=False, mode=mode)
    url = f"http://127.0.0.1:{contender.port}{contender.path}"
    headers = {"Authorization": f"Bearer {contender.token}", "Content-Type": "application/json"}
    try:
        answer = httpx.post(url, content=body, headers=headers, trust_env=False, timeout=60)
    except httpx.TransportError as error:
        raise BenchmarkError(f"{contender.name} does not answer: {error!r}") from None
    if not answer.is_success:
        raise BenchmarkError(f"{contender.name} answers {answer.status_code}: {answer.text[:300]}")


class Bench:
    """Rounds of measurements with one generator and one upstream."""

    def __init__(self, settings: Settings, upstream: Upstream, generator: Generator) -> None:
        self.settings = settings
        self.upstream = upstream
        self.generator = generator

    def case(self, running: list[Contender], kind: str, clients: int) -> dict[str, Any]:
        """Measure all contenders with one kind of request and one number of clients, in rounds."""
        rounds: dict[str, list[Figures]] = {contender.name: [] for contender in running}
        for number in range(self.settings.rounds):
            shift = number % len(running)
            for contender in running[shift:] + running[:shift]:
                rounds[contender.name].append(self.once(contender, kind, clients))
        print(f"measured {kind}, {clients} clients", flush=True)
        return {name: summary(some, rounds.get(YARDSTICK)) for name, some in rounds.items()}

    def once(self, contender: Contender, kind: str, clients: int) -> Figures:
        """Measure one contender for one window."""
        stream = kind in STREAMS
        job = Job(
            request=contender.request(stream=stream, mode=STREAMS.get(kind, NOW)),
            check="stream" if stream else "plain",
            clients=clients,
            warmup=self.settings.warmup,
            seconds=self.settings.seconds,
            port=contender.port,
            pids=contender.pids(),
            helpers=family(self.upstream.process.pid),
        )
        what = f"{contender.name}, {kind}, {clients} clients"
        result = self.generator.run(job, what)
        contender.check()
        self.upstream.check()
        # A slow relay ends few streams in a window; what it has sent of others counts, too.
        done = result.progress if stream else result.completed
        if done <= 0:
            raise BenchmarkError(f"{what}: nothing came in {self.settings.seconds:g} s")
        figures = {
            "requests_per_s": done / result.seconds,
            **times("latency", result.latencies),
            "cpu_ms_per_request": result.cpu / done * 1000,
            "cpu_share": result.cpu / result.seconds,
            "upstream_cpu_share": result.helpers_cpu / result.seconds,
            "generator_cpu_share": result.generator_cpu / result.seconds,
        }
        if stream:
            figures |= {
                **times("first_chunk", result.first),
                "chunks_per_s": done * CHUNKS / result.seconds,
                "cpu_us_per_chunk": result.cpu / done / CHUNKS * 1e6,
                "parts_per_stream": result.parts,
            }
        return figures


def times(name: str, seconds: list[float]) -> Figures:
    """Give median and p90 in milliseconds."""
    p90 = quantiles(seconds, n=10)[8] if len(seconds) > 1 else seconds[0]
    return {f"{name}_p50_ms": median(seconds) * 1000, f"{name}_p90_ms": p90 * 1000}


def summary(rounds: list[Figures], yardstick: list[Figures] | None) -> dict[str, Any]:
    """Give the medians over rounds, and the median of the ratios that each round has to the yardstick's."""
    figures: dict[str, Any] = {key: median(some[key] for some in rounds) for key in rounds[0]}
    figures["spread"] = spread([some["requests_per_s"] for some in rounds])
    if yardstick:
        figures["to_bare"] = {key: ratio(rounds, yardstick, key) for key in RATIOS}
    figures["rounds"] = rounds
    return figures


def ratio(rounds: list[Figures], others: list[Figures], key: str) -> float:
    """Give the median of the ratios of rounds; 0 where nothing was used, as in a window of a moment."""
    return median(one[key] / other[key] if other[key] else 0.0 for one, other in zip(rounds, others, strict=True))


def spread(values: list[float]) -> float:
    """Give how far rounds lie apart: the largest less the smallest, as a part of the mean."""
    return (max(values) - min(values)) / mean(values)
