"""The clock of one load: how far it is, and how long it will still take."""

from __future__ import annotations

import time

from llmkit.engines.base import LoadProgress
from llmkit.registry import policies
from llmkit.registry.policies import LoadRecord
from llmkit.schemas import Download, Memory


class LoadClock:
    """Joins what the engine says, what an earlier load has taught, and the time."""

    def __init__(self) -> None:
        self.earlier: LoadRecord | None = None
        self.fraction: float | None = 0.0
        self.download: Download | None = None
        self._asked = self._started = time.monotonic()
        self._steps: dict[str, float] = {}
        self._step: str | None = None
        self._launch: str | None = None
        self._downloading_since: float | None = None
        self._download_seconds = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since the load was asked for."""
        return time.monotonic() - self._asked

    def begin(self) -> None:
        """Note that the engine starts now: the wait for room was no part of the work."""
        self._started = time.monotonic()

    @property
    def eta(self) -> float | None:
        """Seconds that it will still take, or None."""
        at = self._steps.get(self._step, 0.0) if self._step else 0.0
        left = policies.forecast(self.earlier, self._step, at, self._working_seconds(), self.download)
        return None if left is None else round(left, 1)

    def _working_seconds(self) -> float:
        under_way = time.monotonic() - self._downloading_since if self._downloading_since else 0.0
        return time.monotonic() - self._started - self._download_seconds - under_way

    def take(self, progress: LoadProgress) -> None:
        """Take what the engine says."""
        self._launch = progress.launch or self._launch
        self.download = progress.download if progress.phase == "downloading" else None
        if (progress.phase == "downloading") != (self._downloading_since is not None):
            now = time.monotonic()
            if self._downloading_since is not None:
                self._download_seconds += now - self._downloading_since
                self._downloading_since = None
            else:
                self._downloading_since = now
        if progress.step is not None and progress.step not in self._steps:
            self._steps[progress.step] = round(self._working_seconds(), 3)
            self._step = progress.step
        if self.earlier is None or progress.fraction is None:
            self.fraction = progress.fraction
        self.tick()

    def tick(self) -> None:
        """Move on with the clock; never back."""
        eta = self.eta if self.earlier is not None else None
        if eta is not None:
            self.fraction = round(
                max(self.fraction or 0.0, policies.fraction_done(time.monotonic() - self._started, eta)), 3
            )

    def record(self, memory: Memory) -> LoadRecord:
        """Give what the next load can learn of this one."""
        seconds = round(self._working_seconds(), 3)
        return LoadRecord(seconds, self._steps, memory.pss_bytes, memory.gpu_bytes, self._launch)
