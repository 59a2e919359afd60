"""A long run of mixed work on one real server, and whether anything of it grows.

.. code-block:: text

    make long-run ENGINE=fake MINUTES=20
    make long-run ENGINE=vllm MINUTES=10

Streams read to their end and left at a random token, loads, cancelled loads, engines killed, configurations made and
deleted, conversations, kernels with a panel started and restarted, all at once. Every few seconds the server's memory,
descriptors, threads, processes, tasks and files are looked at. Nothing may grow between the second and the last fifth
of the run, nor between rest before and rest after (`long_run_figures` has what is tolerated), the record stays
within its bound, and nothing is left when the server has ended. The exit status is 1 if something was found.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import psutil

TESTS: Final = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent), str(Path(__file__).parent)]

from benchmarks.venvs import python_of  # noqa: E402
from long_run_figures import AT_REST, Look, growth, summary, table  # noqa: E402
from long_run_work import Work  # noqa: E402
from relayed import relayed  # noqa: E402
from support import DEMO, wait_until  # noqa: E402

RESULTS: Final = Path(__file__).with_name("results")
MAX_RECORD_BYTES: Final = 1 << 20
RECORD_SLACK_BYTES: Final = 6 << 20
"""Of the file beside the record itself: pages that are free again, and SQLite's log."""
FAKE: Final = {"model_type": "fake", "model_name": "any --setsid --phase-seconds=0.1 --tokens-per-second=100"}


@dataclass(frozen=True)
class Settings:
    """What a run is: times in seconds."""

    engine: str = "fake"
    seconds: float = 1200.0
    warm_up: float = 60.0
    interval: float = 3.0
    rest: float = 45.0
    """So long may it take until what was held is given back: idle connections are kept for some seconds."""
    env: Mapping[str, str] = field(default_factory=dict)

    def engines(self) -> dict[str, dict[str, Any]]:
        """Give the models that are loaded and killed: two of fake engines, one of vLLM."""
        return {"live": dict(DEMO)} if self.engine == "vllm" else {"live": dict(FAKE), "other": dict(FAKE)}


def run(settings: Settings) -> dict[str, Any]:
    """Do it, and give figures and findings."""
    samples: list[dict[str, float]] = []
    rests: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="llmkit-long-") as folder:
        tmp = Path(folder)
        args = [f"--LLMKitApp.max_record_bytes={MAX_RECORD_BYTES}", "--LLMKitApp.record_bodies=True"]
        args += ["--LLMKitApp.max_conversations=20"]
        env = {"TMPDIR": folder, **settings.env}
        with relayed(extensions=["probe_extension"], plugin=True, args=args, env=env) as running:
            work = Work(running, settings.engines(), 240.0 if settings.engine == "vllm" else 60.0)
            look = Look(running.server, tmp)
            work.start()
            time.sleep(settings.warm_up)
            work.end()
            rests.append(rest(look, settings.rest))
            work.start()
            began = time.monotonic()
            while (elapsed := time.monotonic() - began) < settings.seconds:
                samples.append({"seconds": elapsed, **look()})
                time.sleep(settings.interval)
            work.end()
            rests.append(rest(look, settings.rest, rests[0]))
            server, run_dir = running.server, running.server.run_dir
            assert server.process is not None
            family = psutil.Process(server.process.pid).children(recursive=True)
            server.stop()
            left = [f"process {process.pid}" for process in family if process.is_running()]
            left += [f"process {process.pid}" for process in server.left_behind()]
            left += [str(path) for place in (run_dir, tmp) for path in place.rglob("*")]
    left += map(str, look.segments())
    figures = {**summary(samples, rests), "done": dict(work.done), "samples": samples, "seconds": settings.seconds}
    record = max(sample["sqlite_requests_mib"] for sample in samples) * (1 << 20)
    if record > MAX_RECORD_BYTES + RECORD_SLACK_BYTES:
        figures["findings"].append(f"the record of requests has {record:.0f} bytes; its bound is {MAX_RECORD_BYTES}")
    figures["findings"] += [f"left behind: {one}" for one in left]
    figures["findings"] += [f"failed: {one}" for one in dict.fromkeys(work.errors)]
    return figures


def rest(look: Look, seconds: float, before: Mapping[str, float] | None = None) -> dict[str, float]:
    """Look at the server when nothing is asked of it; wait a while for what was held to be given back."""
    found = look()

    def quiet() -> bool:
        nonlocal found
        time.sleep(1)
        previous, found = found, look()
        if before is not None:
            return not growth(before, found, AT_REST)
        counted = ("files", "processes", "tasks", "shm_entries", "run_dir_entries")
        return found["processes"] == 0 and all(previous[name] == found[name] for name in counted)

    with contextlib.suppress(AssertionError):  # what has grown is told with the figures
        wait_until(quiet, "rest", seconds, 0.0)
    return found


def write(figures: dict[str, Any], settings: Settings, folder: Path) -> Path:
    """Write the figures of a run to a file, and give it."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = {"cores": os.cpu_count(), "memory_gib": round(psutil.virtual_memory().total / (1 << 30), 1)}
    about = {"date": datetime.now(UTC).isoformat(timespec="minutes"), "python": platform.python_version(), **machine}
    source = folder / f"long_run_{settings.engine}.json"
    source.write_text(json.dumps({"long_run": {**about, "figures": figures}}, indent=1) + "\n")
    return source


def draw(source: Path) -> None:
    """Draw the plot of a run beside its figures."""
    command = [python_of("plot"), TESTS / "benchmarks" / "plot.py", "long_run", source, source.with_suffix(".png")]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def main() -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", choices=["fake", "vllm"], default="fake")
    parser.add_argument("--minutes", type=float, default=20.0, help="after the warm-up")
    parser.add_argument("--warm-up", type=float, default=60.0, metavar="SECONDS", help="of the same work, not counted")
    parser.add_argument("--interval", type=float, default=3.0, metavar="SECONDS", help="between two looks")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    given = parser.parse_args()
    settings = Settings(given.engine, given.minutes * 60, given.warm_up, given.interval)
    figures = run(settings)
    source = write(figures, settings, given.results)
    columns = ("second_fifth", "last_fifth", "rest_before", "rest_after")
    print(table({name.replace("_", " "): figures[name] for name in columns}))
    print("done: " + ", ".join(f"{count} {what}" for what, count in sorted(figures["done"].items())))
    for finding in figures["findings"]:
        print(f"FOUND {finding}")
    print(f"{len(figures['findings'])} findings in {given.minutes:g} minutes; see {source}")
    draw(source)
    return 1 if figures["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
