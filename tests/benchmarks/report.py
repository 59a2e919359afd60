"""Figures as tables, on the terminal and in Markdown, and as files."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import growth
from benchmarks.bars import HEAD, Bar
from benchmarks.venvs import python_of

RESULTS = Path(__file__).resolve().parent / "results"
PICTURES = {"relay": "requests/s of each contender", "loads": "seconds of a load, and memory of the engine"}
PLOT = Path(__file__).with_name("plot.py")
KINDS = {
    "plain": "whole answers",
    "stream": "streams of 64 chunks, as fast as they come",
    "paced": "streams of 64 chunks, 5 ms apart",
}


class Table(NamedTuple):
    """A table, with what it is about."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def text(self) -> str:
        """Give it for a terminal."""
        widths = [max(map(len, column)) for column in zip(self.head, *self.rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) if place == 0 else cell.rjust(width) for place, cell, width in cells).rstrip()
            for cells in ([*zip(range(len(widths)), row, widths, strict=True)] for row in (self.head, *self.rows))
        ]
        return "\n".join([f"\n{self.title}", *lines])

    def markdown(self) -> str:
        """Give it as Markdown."""
        lines = [self.head, ["---", *["---:"] * (len(self.head) - 1)], *self.rows]
        return "\n".join([f"### {self.title}", "", *("| " + " | ".join(line) + " |" for line in lines), ""])


def tables(part: str, figures: dict[str, Any]) -> list[Table]:
    """Give the tables of a part."""
    return _MAKERS[part](figures)


def _relay(figures: dict[str, Any]) -> list[Table]:
    found = []
    for kind, cases in figures.items():
        for clients, case in cases.items():
            rows = [_relay_row(kind, name, some) for name, some in case.items()]
            head = ["contender", "requests/s", "spread", "to bare", "p50 ms", "p90 ms", "CPU ms", "to bare"]
            if kind != "plain":
                head += ["1st p50 ms", "1st p90 ms", "chunks/s", "CPU us/chunk", "parts"]
            plural = "client" if clients == "1" else "clients"
            found.append(Table(f"Relay: {KINDS[kind]}, {clients} {plural}", head, rows))
    return found


def _relay_row(kind: str, name: str, some: dict[str, Any]) -> list[str]:
    to_bare = some.get("to_bare", {})

    def ratio(key: str) -> str:
        return f"{to_bare[key]:.2f}" if key in to_bare else "-"

    row = [
        name,
        f"{some['requests_per_s']:.1f}",
        f"{some['spread']:.0%}",
        ratio("requests_per_s"),
        f"{some['latency_p50_ms']:.2f}",
        f"{some['latency_p90_ms']:.2f}",
        f"{some['cpu_ms_per_request']:.3f}",
        ratio("cpu_ms_per_request"),
    ]
    if kind != "plain":
        row += [
            f"{some['first_chunk_p50_ms']:.2f}",
            f"{some['first_chunk_p90_ms']:.2f}",
            f"{some['chunks_per_s']:.0f}",
            f"{some['cpu_us_per_chunk']:.1f}",
            f"{some['parts_per_stream']:.0f}",
        ]
    return row


def _engine(figures: dict[str, Any]) -> list[Table]:
    rows = []
    for way, to_direct in figures["median_of_ratios"].items():
        some = figures[way]
        rows.append(
            [
                way,
                f"{some['tokens_per_s']:.0f}",
                f"{to_direct:.3f}",
                f"{figures['ratio_of_medians'][way]:.3f}",
                f"{some['first_token_p50_ms']:.1f}",
                f"{some['first_token_p90_ms']:.1f}",
                f"{some['latency_p50_ms']:.1f}",
                f"{some['server_cpu_share']:.2f}",
                f"{some['parts_per_stream']:.0f}",
            ]
        )
    head = [
        "way",
        "tokens/s",
        "to direct",
        "of medians",
        "1st p50 ms",
        "1st p90 ms",
        "p50 ms",
        "server's CPUs",
        "parts",
    ]
    return [Table("Engine: tokens of one vLLM, directly and through relays, 8 clients", head, rows)]


def _niceness(figures: dict[str, Any]) -> list[Table]:
    rows = [
        [
            f"{name}, {clients} {'client' if clients == '1' else 'clients'}",
            f"{some['tokens_per_s']:.0f}",
            f"{some['first_token_p50_ms']:.1f}",
            f"{some['first_token_p90_ms']:.1f}",
            f"{some['latency_p50_ms']:.1f}",
            f"{some['latency_p90_ms']:.1f}",
            f"{some['parts_per_stream']:.0f}",
        ]
        for clients, case in figures.items()
        for name, some in case.items()
    ]
    head = ["niceness", "tokens/s", "1st p50 ms", "1st p90 ms", "p50 ms", "p90 ms", "parts"]
    return [Table("Niceness of engine core and worker: streams of 64 tokens through /llm/v1", head, rows)]


def _loop(figures: dict[str, Any]) -> list[Table]:
    keys = ("p50_ms", "p99_ms", "max_ms")
    rows = [[state, f"{lags['count']}", *(f"{lags[key]:.2f}" for key in keys)] for state, lags in figures.items()]
    return [Table("Loop: lateness of the server's event loop", ["state", "beats", "p50 ms", "p99 ms", "max ms"], rows)]


def _memory(figures: dict[str, Any]) -> list[Table]:
    rows = [
        [
            name,
            f"{some['streams']}",
            f"{some['before_kib'] / 1024:.1f}",
            f"{some['open_kib'] / 1024:.1f}",
            f"{some['after_kib'] / 1024:.1f}",
            f"{some['kib_per_stream']:.1f}",
        ]
        for name, some in figures.items()
    ]
    head = ["server", "streams", "before MiB", "open MiB", "after MiB", "KiB per stream"]
    return [Table("Memory: proportional set size of the Jupyter server", head, rows)]


def _loads(figures: dict[str, Any]) -> list[Table]:
    found = [(way, some) for way, some in figures.items() if isinstance(some, dict)]
    ways = dict(sorted(found, key=lambda one: -one[1]["seconds"]))  # a file of figures is sorted by name
    plain = ways["vllm serve"]
    spans = {way: [one["seconds"] for one in some["rounds"]] for way, some in ways.items()}
    rows = [
        [
            way if way == "vllm serve" else f"llmkit, {way}",
            f"{some['seconds']:.2f}",
            f"{min(spans[way]):.2f} to {max(spans[way]):.2f}",
            f"{some['seconds'] / plain['seconds']:.3f}",
            f"{some['pss_mib']:.0f}",
        ]
        for way, some in ways.items()
    ]
    rows.append(["a standby that waits", "", "", "", f"{figures['standby_mib']:.0f}"])
    rows.append(["a bare import of the same modules", "", "", "", f"{figures['bare_import_mib']:.0f}"])
    head = ["load of the demo model", "seconds", "from, to", "to vllm serve", "PSS MiB"]
    return [Table("Loads: seconds until the engine answers, and what it holds", head, rows)]


def _growth(figures: dict[str, Any]) -> list[Table]:
    rows = [
        [
            f"{way}, {count} {'upstream' if count == '1' else 'upstreams'}",
            f"{int(count) * growth.STREAMS}",
            f"{some['chunks_per_s']:.0f}",
            f"{some['spread']:.0%}",
            f"{some['to_one']:.2f}",
            f"{some['chunks_per_s'] / (int(count) * growth.ASKED_PER_S):.0%}",
            f"{some['first_chunk_p50_ms']:.1f}",
            *(
                (f"{some['cpu_share']:.2f}", f"{some['cpu_us_per_chunk']:.1f}", f"{_readers(some)}")
                if some["cpu_share"]
                else ("-", "-", "-")
            ),
            f"{some['others_cpu_share']:.2f}",
        ]
        for way, cases in figures.items()
        for count, some in sorted(cases.items(), key=lambda case: int(case[0]))
    ]
    head = ["way", "streams", "chunks/s", "spread", "to one", "of the pace", "1st p50 ms"]
    head += ["relay's CPUs", "CPU us/chunk", "readers of a CPU", "others' CPUs"]
    return [Table("Growth: upstreams that each write 64 chunks, 5 ms apart, to 16 streams", head, rows)]


def _readers(some: dict[str, Any]) -> int:
    """Say how many streams at the pace of a reader take one processor of the relay."""
    return int(1e6 / some["cpu_us_per_chunk"] / growth.READER_PER_S)


_MAKERS = {
    "relay": _relay,
    "engine": _engine,
    "niceness": _niceness,
    "loop": _loop,
    "memory": _memory,
    "loads": _loads,
    "growth": _growth,
}
"""What makes the tables of each part."""


def bars_table(found: Sequence[Bar]) -> Table:
    """Give the bars of a part."""
    return Table("Bars", HEAD, [bar.row() for bar in found])


def keep(part: str, figures: dict[str, Any], found: Sequence[Bar], about: dict[str, Any], folder: Path) -> None:
    """Write a part's figures to the files; those of other parts stay as they were."""
    folder.mkdir(parents=True, exist_ok=True)
    latest = folder / "latest.json"
    kept: dict[str, Any] = json.loads(latest.read_text()) if latest.exists() else {}
    kept[part] = {**about, "figures": figures, "bars": [bar.to_json() for bar in found]}
    latest.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    (folder / "RESULTS.md").write_text(_document(kept))
    if part in PICTURES:
        plot = [python_of("plot"), PLOT, part, latest, folder / f"{part}.png"]
        subprocess.run(plot, check=True, stdin=subprocess.DEVNULL)


def _document(kept: dict[str, Any]) -> str:
    lines = [
        "# Results of the benchmarks",
        "",
        "Written by `make bench`; [README.md](../README.md) says how to read it.",
    ]
    for part in _MAKERS:
        if part not in kept:
            continue
        some = kept[part]
        machine = some["machine"]
        where = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory']}, {machine['kernel']}"
        what = ", ".join(f"{name} {version}" for name, version in some["versions"].items())
        lines += ["", f"## {part.capitalize()}", "", f"{some['date']}: {where}; {what}.", ""]
        if part in PICTURES:
            lines += [f"![{PICTURES[part]}]({part}.png)", ""]
        found = [Bar(**{key: bar[key] for key in Bar.__dataclass_fields__}) for bar in some["bars"]]
        if found:
            lines += [bars_table(found).markdown()]
        lines += [table.markdown() for table in tables(part, some["figures"])]
    return "\n".join(lines).rstrip() + "\n"
