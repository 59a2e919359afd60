"""Draw the figures of a part, where there is matplotlib: ``python plot.py relay latest.json relay.png``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

# The upstream itself is many times faster than every relay and would flatten all bars.
RELAYS = {
    "llmkit": "#d1495b",
    "bare": "#66788a",
    "bare-noauth": "#aab7c4",
    "jupyter-server-proxy": "#edae49",
    "litellm": "#2e86ab",
}
TITLES = {"plain": "whole answers", "stream": "streams of 64 chunks"}
WIDTH = 0.16


def draw(axes: Axes, cases: dict[str, Any], title: str) -> None:
    """Draw one kind of request."""
    clients = sorted(cases, key=int)
    names = [name for name in RELAYS if name in cases[clients[0]]]
    for place, name in enumerate(names):
        positions = [number + (place - (len(names) - 1) / 2) * WIDTH for number in range(len(clients))]
        values = [cases[count][name]["requests_per_s"] for count in clients]
        drawn = axes.bar(positions, values, WIDTH * 0.92, label=name, color=RELAYS[name])
        axes.bar_label(drawn, [f"{value:,.0f}" for value in values], fontsize=6.5, padding=2, rotation=90)
    axes.set_title(title, fontsize=10)
    axes.set_xticks(range(len(clients)), [f"{count} client{'' if count == '1' else 's'}" for count in clients])
    axes.set_ylabel("requests/s")
    axes.margins(y=0.18)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def draw_relay(figures: dict[str, Any], target: str) -> None:
    """Draw requests/s of each relay."""
    figure, both = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for axes, (kind, title) in zip(both, TITLES.items(), strict=True):
        draw(axes, figures[kind], title)
    handles, labels = both[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    figure.savefig(target, dpi=110)


def draw_loads(figures: dict[str, Any], target: str) -> None:
    """Draw the seconds of a load and what the engine holds, by the way it was started."""
    found = [(way, some) for way, some in figures.items() if isinstance(some, dict)]
    ways = dict(sorted(found, key=lambda one: -one[1]["seconds"]))
    figure, both = plt.subplots(1, 2, figsize=(10, 2.4), layout="constrained", sharey=True)
    labels = [way if way == "vllm serve" else "llmkit, " + way.replace(", ", ",\n") for way in ways]
    for axes, key, title in zip(both, ("seconds", "pss_mib"), ("seconds of a load", "MiB of the engine"), strict=True):
        values = [some[key] for some in ways.values()]
        colours = [RELAYS["bare" if way == "vllm serve" else "llmkit"] for way in ways]
        drawn = axes.barh(labels, values, 0.7, color=colours)
        axes.bar_label(
            drawn, [f"{value:,.1f}" if key == "seconds" else f"{value:,.0f}" for value in values], padding=3, fontsize=8
        )
        axes.set_title(title, fontsize=10)
        axes.margins(x=0.12)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    both[0].invert_yaxis()
    figure.savefig(target, dpi=110)


def draw_long_run(figures: dict[str, Any], target: str) -> None:
    """Draw what a server held over a long run: memory, what is counted, databases."""
    samples = figures["samples"]
    minutes = [sample["seconds"] / 60 for sample in samples]
    parts = {
        "memory of the server, MiB": ("rss_mib", "pss_mib"),
        "counted": ("files", "threads", "processes", "tasks"),
        "entries of folders": ("run_dir_entries", "state_dir_entries", "tmp_entries", "shm_entries"),
        "databases, MiB": ("sqlite_llmkit_mib", "sqlite_requests_mib", "sqlite_conversations_mib"),
    }
    figure, four = plt.subplots(2, 2, figsize=(10, 5.6), layout="constrained", sharex=True)
    for axes, (title, names) in zip(four.flat, parts.items(), strict=True):
        for name in names:
            axes.plot(minutes, [sample[name] for sample in samples], linewidth=1, label=name)
        axes.set_title(title, fontsize=10)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=7)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in four[1]:
        axes.set_xlabel("minutes", fontsize=8)
    figure.savefig(target, dpi=110)


def main(part: str, source: str, target: str) -> None:
    """Draw the figures of one file into another."""
    figures = json.loads(Path(source).read_text())[part]["figures"]
    {"relay": draw_relay, "loads": draw_loads, "long_run": draw_long_run}[part](figures, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
