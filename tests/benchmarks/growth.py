"""What one relay carries as upstreams are added, each of which writes to so many streams at once and to no more.

So does an engine: its tokens come at its own pace, to as many sequences as it works on. More upstreams carry more until
the relay, which is one thread, has no time left. The same is measured without a relay, to see what the machine can.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.contenders import LLMKIT_PATH, NO_TOKEN, http_request, jupyter, load_mock, of_server
from benchmarks.loadgen import Job
from benchmarks.payloads import CHUNKS, MODEL, PACED, PAUSES, chat_body
from benchmarks.processes import Generator, Upstream, family
from benchmarks.relay import Figures, ratio, spread

STREAMS = 16
"""Streams of one upstream at once."""
ASKED_PER_S = STREAMS / PAUSES[PACED]
"""Chunks that one upstream writes in a second, if its machine lets it."""
READER_PER_S = 20.0
"""Tokens in a second to a person who reads along; the page on scaling counts with it."""
WAYS = ("direct", "llmkit")


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    rounds: int = 5
    seconds: float = 2.5
    warmup: float = 0.5
    upstreams: tuple[int, ...] = (1, 2, 4, 8)


def measure(settings: Settings) -> dict[str, Any]:
    """Give ``{way: {number of upstreams: figures}}``, ways and numbers taking turns."""
    most = max(settings.upstreams)
    with ExitStack() as stack:
        upstreams = [stack.enter_context(Upstream()) for _ in range(most)]
        generators = [stack.enter_context(Generator()) for _ in range(most)]
        threads = stack.enter_context(ThreadPoolExecutor(most))
        print(f"starting llmkit with {most} upstreams", flush=True)
        server = stack.enter_context(jupyter())
        for number, upstream in enumerate(upstreams):
            load_mock(server, upstream.base_url, _model(number))
        relay = of_server("llmkit", server, LLMKIT_PATH, _model(0))

        def job(way: str, number: int) -> Job:
            upstream = upstreams[number]
            direct = way == "direct"
            path, token = ("/v1/chat/completions", NO_TOKEN) if direct else (relay.path, relay.token)
            body = chat_body(MODEL if direct else _model(number), stream=True, mode=PACED)
            return Job(
                request=http_request(path, token, body, stream=True),
                check="stream",
                clients=STREAMS,
                warmup=settings.warmup,
                seconds=settings.seconds,
                port=upstream.port if direct else relay.port,
                pids=[] if direct else relay.pids(),
                helpers=family(upstream.process.pid),
            )

        def window(way: str, count: int) -> Figures:
            what = f"{way}, {count} upstreams"
            jobs = [job(way, number) for number in range(count)]
            results = list(threads.map(lambda one, order: one.run(order, what), generators[:count], jobs))
            relay.check()
            chunks = sum(one.progress / one.seconds for one in results) * CHUNKS
            # All of them have counted the same relay at the same time.
            cpu = median(one.cpu / one.seconds for one in results)
            return {
                "chunks_per_s": chunks,
                "cpu_share": cpu,
                "cpu_us_per_chunk": cpu / chunks * 1e6,
                "first_chunk_p50_ms": median(one for some in results for one in some.first) * 1000,
                "others_cpu_share": sum((one.helpers_cpu + one.generator_cpu) / one.seconds for one in results),
            }

        for number in range(most):  # whatever is made at the first request, is made
            generators[number].run(job("llmkit", number), "llmkit")
        rounds: dict[str, dict[int, list[Figures]]] = {way: {n: [] for n in settings.upstreams} for way in WAYS}
        for number in range(settings.rounds):
            for count in settings.upstreams[:: -1 if number % 2 else 1]:
                for way in WAYS:
                    rounds[way][count].append(window(way, count))
            print(f"round {number + 1} of {settings.rounds}", flush=True)
    return {way: {str(n): _summary(some, rounds[way]) for n, some in rounds[way].items()} for way in WAYS}


def _model(number: int) -> str:
    return f"bench-{number}"


def _summary(rounds: list[Figures], all_of_way: dict[int, list[Figures]]) -> dict[str, Any]:
    one = all_of_way[min(all_of_way)]
    return {
        **{key: median(some[key] for some in rounds) for key in rounds[0]},
        "to_one": ratio(rounds, one, "chunks_per_s"),
        "spread": spread([some["chunks_per_s"] for some in rounds]),
        "rounds": rounds,
    }
