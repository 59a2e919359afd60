"""Run the benchmarks: ``make bench``, or ``python tests/benchmarks/run.py [PART ...]``."""

from __future__ import annotations

import argparse
import datetime as dt
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import engine, growth, loads, loop, memory, niceness, relay, report
from benchmarks.bars import bars
from benchmarks.contenders import CONTENDERS
from benchmarks.machine import machine, versions
from benchmarks.processes import BenchmarkError

PARTS = ("relay", "engine", "niceness", "loop", "memory", "loads", "growth")
MOST_CLIENTS = 256
MOST_ROUNDS = 50
MOST_SECONDS = 60.0


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="run.py", description="Benchmarks of the relay and of loads.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all if none is named")
    parser.add_argument(
        "--rounds", type=_within(int, 1, MOST_ROUNDS), help="rounds of relay (5), engine (10), loads (6) and growth (5)"
    )
    parser.add_argument("--seconds", type=_within(float, 0.1, MOST_SECONDS), help="of one window of relay (2.5)")
    parser.add_argument("--clients", type=_counts, help="numbers of clients of relay, as in 1,16,64")
    parser.add_argument(
        "--contenders", type=_names, help=f"of relay, as in bare,llmkit; there are {', '.join(CONTENDERS)}"
    )
    parser.add_argument("--quick", action="store_true", help="short windows, to see that all works; nothing is kept")
    given = parser.parse_args(words)
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    return given


def _within(kind: Callable[[str], float], least: float, most: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be from {least:g} to {most:g}")
        return value

    return read


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(_within(int, 1, MOST_CLIENTS)(word)) for word in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(CONTENDERS):
        raise argparse.ArgumentTypeError(f"no such contender: {', '.join(sorted(unknown))}")
    return names


def relay_settings(given: argparse.Namespace) -> relay.Settings:
    """Give the settings of the relay part."""
    usual = relay.Settings(rounds=1, seconds=0.5, clients=(1, 16)) if given.quick else relay.Settings()
    return relay.Settings(
        rounds=given.rounds or usual.rounds,
        seconds=given.seconds or usual.seconds,
        clients=given.clients or usual.clients,
        contenders=given.contenders or usual.contenders,
    )


def measure(part: str, given: argparse.Namespace) -> dict[str, Any]:
    """Measure one part."""
    if part == "relay":
        return relay.measure(relay_settings(given))
    if part == "engine":
        usual = engine.Settings(rounds=1, seconds=2.0) if given.quick else engine.Settings()
        return engine.measure(engine.Settings(rounds=given.rounds or usual.rounds, seconds=usual.seconds))
    if part == "niceness":
        return niceness.measure(niceness.Settings(rounds=1, seconds=1.5) if given.quick else niceness.Settings())
    if part == "loop":
        return loop.measure(
            loop.Settings(idle_seconds=2.0, stream_seconds=3.0, engine=False) if given.quick else loop.Settings()
        )
    if part == "loads":
        return loads.measure(loads.Settings(rounds=given.rounds or (1 if given.quick else loads.Settings.rounds)))
    if part == "growth":
        usual_growth = growth.Settings(rounds=1, seconds=0.5, upstreams=(1, 2)) if given.quick else growth.Settings()
        return growth.measure(replace(usual_growth, rounds=given.rounds or usual_growth.rounds))
    return memory.measure(memory.Settings(cycles=1) if given.quick else memory.Settings())


def whole(part: str, given: argparse.Namespace) -> bool:
    """Say whether a part is measured in full, so that its figures are worth keeping."""
    return not given.quick and (part != "relay" or not (given.clients or given.contenders or given.seconds))


def run(given: argparse.Namespace) -> None:
    """Measure, print and keep what was asked for."""
    began = time.monotonic()
    for part in given.parts or PARTS:
        about = {
            "date": dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "machine": machine(),
        }
        figures = measure(part, given)
        found = bars(part, figures)
        for table in report.tables(part, figures):
            print(table.text(), flush=True)
        if found:
            print(report.bars_table(found).text(), flush=True)
        if whole(part, given):
            about["versions"] = versions(relay_settings(given).contenders if part == "relay" else ())
            report.keep(part, figures, found, about, report.RESULTS)
            print(f"\nkept in {report.RESULTS}", flush=True)
    print(f"\n{time.monotonic() - began:.0f} s", flush=True)


def main(words: Sequence[str] | None = None) -> int:
    """Run, and give the exit status: 1 if a request failed or a process died, whatever the figures."""
    given = arguments(words)
    # Ended from outside it still ends what it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        run(given)
    except BenchmarkError as error:
        print(f"\nFAILED: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
