"""The bars: what relay and loads shall reach. A bar that is missed is told, and nothing else happens."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from benchmarks.relay import ratio

CLIENTS = "16"
Sign = Literal[">=", "<="]


@dataclass(frozen=True)
class Bar:
    """One figure, and the least or most that it shall be."""

    what: str
    value: float
    limit: float
    sign: Sign
    unit: str

    @property
    def passes(self) -> bool:
        """Whether the figure reaches the limit."""
        return self.value >= self.limit if self.sign == ">=" else self.value <= self.limit

    def row(self) -> list[str]:
        """Give it as a row of a table."""
        value = f"{self.value:.2f}{self.unit}"
        return [self.what, f"{self.sign} {self.limit:g}{self.unit}", value, "PASS" if self.passes else "MISSES"]

    def to_json(self) -> dict[str, Any]:
        """Give it for the file of figures."""
        return {**asdict(self), "passes": self.passes}


HEAD = ["bar", "limit", "measured", ""]


def bars(part: str, figures: dict[str, Any]) -> list[Bar]:
    """Give the bars of a part, as far as its figures have what they need."""
    made = {"relay": _relay, "engine": _engine, "loop": _loop, "loads": _loads, "growth": _growth}
    return made.get(part, lambda _: [])(figures)


def _relay(figures: dict[str, Any]) -> list[Bar]:
    found: list[Bar] = []

    def compare(kind: str, other: str, key: str, what: str, sign: Sign, limit: float) -> None:
        case = figures.get(kind, {}).get(CLIENTS, {})
        if "llmkit" in case and other in case:
            value = ratio(case["llmkit"]["rounds"], case[other]["rounds"], key)
            found.append(Bar(f"{what}, {CLIENTS} clients", value, limit, sign, "x"))

    cpu, rate = "cpu_ms_per_request", "requests_per_s"
    compare("plain", "bare", cpu, "CPU per request, to bare", "<=", 1.3)
    compare("paced", "bare", cpu, "CPU per chunk, chunks one by one, to bare", "<=", 1.3)
    compare("stream", "bare", cpu, "CPU per chunk, chunks at once, to bare", "<=", 1.3)
    compare("plain", "jupyter-server-proxy", rate, "requests/s, to jupyter-server-proxy", ">=", 2)
    compare("plain", "litellm", rate, "requests/s, to LiteLLM", ">=", 8)
    compare("stream", "jupyter-server-proxy", rate, "streams/s, to jupyter-server-proxy", ">=", 2)
    return found


def _engine(figures: dict[str, Any]) -> list[Bar]:
    return [Bar("tokens/s of real vLLM, to direct, 8 clients", figures["median_of_ratios"]["llmkit"], 0.95, ">=", "x")]


def _loop(figures: dict[str, Any]) -> list[Bar]:
    found = []
    for state, lags in figures.items():
        limits = {"p99_ms": 50.0, "max_ms": 250.0} if state.endswith("streams") else {"p99_ms": 10.0}
        for key, limit in limits.items():
            found.append(Bar(f"loop lag {key.removesuffix('_ms')}, {state}", lags[key], limit, "<=", " ms"))
    return found


def _growth(figures: dict[str, Any]) -> list[Bar]:
    two = figures["llmkit"].get("2")
    return [Bar("chunks/s of two upstreams through the relay, to one", two["to_one"], 1.8, ">=", "x")] if two else []


def _loads(figures: dict[str, Any]) -> list[Bar]:
    plain = figures["vllm serve"]

    def to_plain(way: str, key: str) -> float:
        return ratio(figures[way]["rounds"], plain["rounds"], key)

    switch = next(way for way in figures if way.startswith("standby, "))
    return [
        Bar("seconds of a load with a standby, to vllm serve", to_plain("standby", "seconds"), 0.25, "<=", "x"),
        Bar("seconds without a standby, to vllm serve", to_plain("without a standby", "seconds"), 1.05, "<=", "x"),
        Bar("seconds of unload and load of another, to vllm serve", to_plain(switch, "seconds"), 0.35, "<=", "x"),
        Bar(
            "memory of a standby, to a bare import", figures["standby_mib"] / figures["bare_import_mib"], 1.2, "<=", "x"
        ),
        Bar("memory of a loaded engine, to vllm serve", to_plain("standby", "pss_mib"), 1.0, "<=", "x"),
        Bar("loop lag p99 all through", figures["loop_p99_ms"], 10.0, "<=", " ms"),
    ]
