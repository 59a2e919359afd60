"""The bars: what the relay shall reach. A bar that is missed is told, and nothing else happens."""

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
    return {"relay": _relay, "engine": _engine, "loop": _loop}.get(part, lambda _: [])(figures)


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
