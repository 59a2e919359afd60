"""What a server holds, looked at every few seconds, and whether it has grown."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil
from benchmarks.accounting import pss_kib
from support import JupyterServer

SHARED_MEMORY: Final = Path("/dev/shm")
MIB: Final = 1 << 20
DATABASES: Final = ("llmkit", "requests", "conversations")


@dataclass(frozen=True)
class Tolerance:
    """How much more than before is no growth: a share, and an amount that is about the noise of the work itself."""

    share: float
    amount: float

    def allows(self, before: float, after: float) -> bool:
        """Say whether it is no growth."""
        return after <= before * (1 + self.share) + self.amount


IN_WORK: Final = {
    "rss_mib": Tolerance(0.10, 12),
    "pss_mib": Tolerance(0.10, 12),
    "files": Tolerance(0.25, 12),
    "threads": Tolerance(0.0, 6),
    "processes": Tolerance(0.25, 6),
    "tasks": Tolerance(0.25, 12),
    "shm_entries": Tolerance(0.0, 4),
    "run_dir_entries": Tolerance(0.25, 12),
    "state_dir_entries": Tolerance(0.0, 6),
    "tmp_entries": Tolerance(0.0, 3),
    "sqlite_requests_mib": Tolerance(0.10, 4.5),
    "sqlite_llmkit_mib": Tolerance(0.10, 4.5),
    "sqlite_conversations_mib": Tolerance(0.10, 4.5),
}
"""Between the medians of the second and the last fifth, while everything works. SQLite's log (-wal) may have 4 MiB."""
AT_REST: Final = {
    "rss_mib": Tolerance(0.10, 20),
    "pss_mib": Tolerance(0.10, 20),
    "files": Tolerance(0.0, 2),
    "threads": Tolerance(0.0, 4),
    "processes": Tolerance(0.0, 0),
    "tasks": Tolerance(0.0, 1),
    "shm_entries": Tolerance(0.0, 0),
    "run_dir_entries": Tolerance(0.0, 0),
    "state_dir_entries": Tolerance(0.0, 1),
    "tmp_entries": Tolerance(0.0, 0),
}
"""Between two moments in which nothing is asked and nothing is loaded: after the warm-up, and at the end."""

Sample = Mapping[str, float]


class Look:
    """Looks at a server, and remembers which shared memory its processes have had: that of others does not count."""

    def __init__(self, server: JupyterServer, tmp: Path) -> None:
        self._server = server
        self._tmp = tmp
        self._segments: set[Path] = set()

    def __call__(self) -> dict[str, float]:
        """Give what the server holds now; a process that ends meanwhile is left out."""
        server = self._server
        assert server.process is not None
        process = psutil.Process(server.process.pid)
        tasks: dict[str, int] = server.request("GET", "probe").json()["tasks"]
        family = process.children(recursive=True)
        for one in family:
            self._segments |= _segments_of(one.pid)
        return {
            "rss_mib": process.memory_info().rss / MIB,
            "pss_mib": pss_kib(process.pid) / 1024,
            "files": process.num_fds(),
            "threads": process.num_threads(),
            "processes": len(family),
            "tasks": sum(tasks.values()),
            "shm_entries": len(self.segments()),
            "run_dir_entries": _entries(server.run_dir),
            "state_dir_entries": _entries(server.state_dir),
            "tmp_entries": _entries(self._tmp),
            **{f"sqlite_{name}_mib": _size(server.state_dir, name) / MIB for name in DATABASES},
        }

    def segments(self) -> list[Path]:
        """Give the shared memory of the server's processes that there still is."""
        return sorted(path for path in self._segments if path.exists())


def _segments_of(pid: int) -> set[Path]:
    try:
        maps = Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return set()
    words = (line.split(maxsplit=5) for line in maps.splitlines())
    return {Path(one[5]) for one in words if len(one) == 6 and one[5].startswith(f"{SHARED_MEMORY}/")}


def _entries(folder: Path) -> int:
    count = 0
    with contextlib.suppress(OSError):  # of a folder that goes while it is read
        for _ in folder.rglob("*"):
            count += 1
    return count


def _size(folder: Path, name: str) -> int:
    total = 0
    for path in folder.glob(f"{name}.sqlite*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total


def fifths(samples: Sequence[Sample]) -> tuple[dict[str, float], dict[str, float]]:
    """Give the medians of the second and of the last fifth."""
    fifth = len(samples) // 5
    if not fifth:
        raise ValueError("five samples at least are needed")

    def medians(some: Sequence[Sample]) -> dict[str, float]:
        return {name: statistics.median(sample[name] for sample in some) for name in some[0] if name != "seconds"}

    return medians(samples[fifth : 2 * fifth]), medians(samples[-fifth:])


def growth(before: Sample, after: Sample, tolerances: Mapping[str, Tolerance]) -> list[str]:
    """Say what has grown by more than is tolerated."""
    return [
        f"{name} has grown from {before[name]:.1f} to {after[name]:.1f}"
        for name, tolerance in tolerances.items()
        if not tolerance.allows(before[name], after[name])
    ]


def table(columns: Mapping[str, Sample]) -> str:
    """Write samples side by side."""
    names = next(iter(columns.values()))
    head = f"{'':26}" + "".join(f"{title:>14}" for title in columns)
    rows = [f"{name:26}" + "".join(f"{one[name]:14.1f}" for one in columns.values()) for name in names]
    return "\n".join([head, *rows])


def summary(samples: Sequence[Sample], rests: Sequence[Sample]) -> dict[str, Any]:
    """Give figures and findings of a run."""
    second, last = fifths(samples)
    found = [f"in work: {words}" for words in growth(second, last, IN_WORK)]
    found += [f"at rest: {words}" for words in growth(rests[0], rests[-1], AT_REST)]
    return {
        "second_fifth": second,
        "last_fifth": last,
        "rest_before": rests[0],
        "rest_after": rests[-1],
        "findings": found,
    }
