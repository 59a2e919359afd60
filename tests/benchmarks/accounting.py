"""What processes have used: processor time and memory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from pathlib import Path

_SCHEDULED = 2
"""Which of a process's clocks: the time its threads have run, as the scheduler counts it."""


def cpu_seconds(pids: Iterable[int]) -> float:
    """Give the processor time of processes, with all their threads.

    ``/proc/PID/stat`` has the same in steps of 10 ms, which is too coarse for a window in which little is done; this
    is the clock of ``clock_getcpuclockid``, in nanoseconds.
    """
    seconds = 0.0
    for pid in pids:
        with contextlib.suppress(OSError):
            seconds += time.clock_gettime(~pid << 3 | _SCHEDULED)
    return seconds


def pss_kib(pid: int) -> int:
    """Give the proportional set size of a process in KiB: its own memory, and its share of what it shares."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    raise RuntimeError(f"no PSS of process {pid}")
