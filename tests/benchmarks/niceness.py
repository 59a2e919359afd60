"""What it does to a reader that engine core and worker stand back: two equal engines, one with niceness 0."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any

from support import missing

from benchmarks import engine
from benchmarks.contenders import jupyter
from benchmarks.processes import BenchmarkError, Generator
from benchmarks.relay import Figures

ARGS = {"0": ["--LLMKitApp.engine_niceness=0"], "default": []}
"""The command line of the server, by what is measured."""


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    rounds: int = 6
    seconds: float = 3.0
    clients: tuple[int, ...] = (1, 8)


def measure(settings: Settings) -> dict[str, Any]:
    """Give the figures of streams through ``/llm/v1``, by number of clients and niceness, windows alternating."""
    if reason := missing("vllm"):
        raise BenchmarkError(reason)
    with ExitStack() as stack:
        generator = stack.enter_context(Generator())
        servers = {}
        for name, args in ARGS.items():
            print(f"loading the demo model into vLLM, niceness {name}", flush=True)
            server = jupyter()
            server.args += args
            stack.enter_context(server)
            server.load(server.configure(engine.DEMO_MODEL))
            servers[name] = server
        found: dict[str, Any] = {}
        for clients in settings.clients:
            one = engine.Settings(clients=clients, seconds=settings.seconds)
            jobs = {name: engine.job(one, server, "llmkit") for name, server in servers.items()}
            rounds: dict[str, list[Figures]] = {name: [] for name in jobs}
            for number in range(settings.rounds + 1):
                for name in list(jobs)[:: -1 if number % 2 else 1]:
                    figures = engine.figures(generator.run(jobs[name], f"niceness {name}, {clients} clients"))
                    if number:  # the first one warms up
                        rounds[name].append(figures)
            found[str(clients)] = {
                name: {**{key: median(one[key] for one in some) for key in some[0]}, "rounds": some}
                for name, some in rounds.items()
            }
    return found
