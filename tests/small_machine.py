"""A machine within this one, for programs that are to run on a small one: little memory, and one core.

The kernel's own limit is set where a control group may be made: below our own, so that every limit that holds for us
still holds. Elsewhere the memory of the programs is only watched; `SmallMachine.how` says which it was.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import psutil

MOUNT = Path("/sys/fs/cgroup")
LOOK_SECONDS = 0.5
GONE_SECONDS = 10.0
MIB = 1 << 20


class Files(NamedTuple):
    """What the files of a memory control group are called."""

    limit: str
    swap: str
    usage: str
    most: str
    kills: str


VERSIONS = {
    1: Files(
        "memory.limit_in_bytes",
        "memory.memsw.limit_in_bytes",
        "memory.usage_in_bytes",
        "memory.max_usage_in_bytes",
        "memory.oom_control",
    ),
    2: Files("memory.max", "memory.swap.max", "memory.current", "memory.peak", "memory.events"),
}


class SmallMachine:
    """Limits what is started with `prefix`, and measures it.

    Parameters
    ----------
    limit_bytes
        Of memory, page cache included.

    Attributes
    ----------
    how
        What keeps the limit.
    most_bytes
        The most that the programs were seen to hold (PSS: a page that several share is counted once).
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.most_bytes = 0
        self.core = min(os.sched_getaffinity(0))
        self._group, self._files = make_group(limit_bytes)
        self.how = f"a control group of {self._group}" if self._group else "nobody: the memory was only watched"
        self._first: int | None = None
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    @property
    def prefix(self) -> list[str]:
        """What to put before a command; the process stays the same."""
        join = f"echo $$ > {self._group}/cgroup.procs && " if self._group else ""
        return ["sh", "-c", f'{join}exec taskset --cpu-list {self.core} "$@"', "sh"]

    def watch(self, pid: int) -> None:
        """Measure this process, and all below it, until the end."""
        self._first = pid
        self._watcher.start()

    def _watch(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            self.most_bytes = max(self.most_bytes, sum(map(pss_bytes, self.processes())))

    def processes(self) -> list[psutil.Process]:
        """Give every process on the machine."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            if self._group:
                pids = [int(line) for line in (self._group / "cgroup.procs").read_text().split()]
                for pid in pids:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        found.append(psutil.Process(pid))
            elif self._first is not None:
                first = psutil.Process(self._first)
                found = [first, *first.children(recursive=True)]
        return found

    @property
    def kills(self) -> int:
        """How many processes the kernel has killed for want of memory."""
        if self._group is None or self._files is None:
            return 0
        told = dict(line.split() for line in (self._group / self._files.kills).read_text().splitlines())
        return int(told["oom_kill"])

    def describe(self) -> str:
        """Say what it was limited by, and what it held."""
        said = f"most {self.most_bytes // MIB} MiB (PSS) of {self.limit_bytes // MIB}, limit kept by {self.how}"
        if self._group and self._files:
            with_cache = int((self._group / self._files.most).read_text())
            said += f"; with page cache {with_cache // MIB} MiB, killed {self.kills}"
        return said

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._first is not None:
            self._watcher.join()
        if self._group is None:
            return
        deadline = time.monotonic() + GONE_SECONDS
        while True:
            for process in self.processes():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            try:
                self._group.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
            else:
                return


def make_group(limit_bytes: int) -> tuple[Path, Files] | tuple[None, None]:
    """Make a control group below our own, without swap; nothing where that is not possible."""
    for version, folder in our_groups():
        files = VERSIONS[version]
        group = folder / f"llmkit-{os.getpid()}-{time.monotonic_ns()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / files.limit).write_text(str(limit_bytes))
            with contextlib.suppress(OSError):  # a kernel without swap has no such limit
                (group / files.swap).write_text(str(limit_bytes) if version == 1 else "0")
            # It may be there and still not be ours to enter.
            subprocess.run(["sh", "-c", f"echo $$ > {group}/cgroup.procs"], check=True, capture_output=True)
            assert (group / files.kills).exists()
        except (OSError, AssertionError, subprocess.CalledProcessError):
            with contextlib.suppress(OSError):
                group.rmdir()
            continue
        return group, files
    return None, None


def our_groups() -> list[tuple[int, Path]]:
    """Give the folder of our own control group, of each version of the interface that knows about memory."""
    found = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, names, path = line.split(":", 2)
            if "memory" in names.split(","):
                found.append((1, MOUNT / "memory" / path.lstrip("/")))
            elif not names:
                found.append((2, MOUNT / path.lstrip("/")))
    return sorted(found)


def pss_bytes(process: psutil.Process) -> int:
    """Measure what a process holds, its share of what it shares included; 0 when it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0
