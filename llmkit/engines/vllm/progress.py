"""How far a load is, read off the log of vLLM.

vLLM says it nowhere else. Lines that are not known are passed over, so another version of vLLM makes the
progress coarser, never wrong.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Final

from llmkit.engines.base import LoadProgress
from llmkit.schemas import Download, Phase

MAX_LINE: Final = 4096
RATE_SECONDS: Final = 5.0
LEAST_RATE_SECONDS: Final = 0.5

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_PREFIX = re.compile(
    r"^(?:\(\S+ pid=\d+\) )?"  # (EngineCore pid=42)
    r"(?:(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] ?)?"
)
_PERCENT = re.compile(r"(\d{1,3})%")

_MILESTONES: Final[list[tuple[re.Pattern[str], Phase, float, str]]] = [
    (re.compile(r"non-default args:"), "starting", 0.1, "arguments"),
    (re.compile(r"Resolved architecture:"), "starting", 0.2, "architecture"),
    (re.compile(r"Initializing a V1 LLM engine"), "starting", 0.3, "core"),
    (re.compile(r"Starting to load model"), "weights", 0.5, "weights"),
    (re.compile(r"Time spent downloading weights"), "weights", 0.7, "downloaded"),
    (re.compile(r"Loading weights took|Model loading took"), "warming", 0.85, "weights loaded"),
    (re.compile(r"KV cache size:"), "warming", 0.9, "KV cache"),
    (re.compile(r"init engine \("), "warming", 0.97, "engine"),
    (re.compile(r"Starting vLLM (?:API )?server"), "warming", 0.99, "server"),
]
"""What a line means, the fraction of a load of a small model that is over by then, and the name of the step."""
_TO_DOWNLOAD = re.compile(r"^llmkit: to download: \d+ files, (\d+) bytes, into (.+)$")
_WHILE_DOWNLOADING: Final = (0.5, 0.7)

_BARS: Final[list[tuple[re.Pattern[str], Phase, float, float]]] = [
    # Files of a hub: their number, or the bytes of one of them.
    (re.compile(r"^Fetching \d+ files:"), "downloading", 0.5, 0.7),
    (re.compile(r"^Downloading\b.*%\||^\S+\.(?:safetensors|bin|pt|gguf):.*%\|"), "downloading", 0.5, 0.5),
    (re.compile(r"^Loading \S+ checkpoint shards:"), "weights", 0.7, 0.85),
    (re.compile(r"^Capturing CUDA graphs"), "warming", 0.9, 0.97),
]
"""Progress bars, and the part of a load that each covers."""


def clean(line: str) -> str:
    """Take colours, and what vLLM puts before its words, off a line of its log."""
    return _PREFIX.sub("", _ESCAPES.sub("", line[:MAX_LINE]).rstrip(), count=1)


class LoadLog:
    """Reads the progress of one load from its log, line by line. The fraction never goes back."""

    def __init__(self) -> None:
        self.progress = LoadProgress("starting", 0.0)
        self.download_folder: Path | None = None
        """Where the files come, if any have to; known from the first moments of a load."""
        self.download_bytes = 0

    def read(self, line: str) -> bool:
        """Take one line; say whether `progress` changed."""
        words = clean(line)
        if plan := _TO_DOWNLOAD.match(words):
            self.download_bytes, self.download_folder = int(plan[1][:18]), Path(plan[2])
            return False
        known = _understand(words)
        if known is None:
            return False
        if known.step == "weights" and self.download_folder is not None:
            known = replace(known, phase="downloading")  # they have to come first
        return self._move(known)

    def downloaded(self, download: Download) -> bool:
        """Take how far the download is; say whether `progress` changed."""
        if self.progress.phase != "downloading":
            return False  # before it, only a few small files come
        start, end = _WHILE_DOWNLOADING
        fraction = start + (end - start) * download.done_bytes / max(self.download_bytes, 1)
        if download.done_bytes >= self.download_bytes:
            return self._move(LoadProgress("weights", fraction))
        return self._move(LoadProgress("downloading", fraction, download=download))

    def _move(self, known: LoadProgress) -> bool:
        fraction = max(known.fraction or 0.0, self.progress.fraction or 0.0)
        step = known.step or self.progress.step
        before, self.progress = self.progress, LoadProgress(known.phase, round(fraction, 3), step, known.download)
        return self.progress != before


def _understand(words: str) -> LoadProgress | None:
    for pattern, phase, start, end in _BARS:
        if pattern.search(words) and (percent := _PERCENT.search(words)):
            return LoadProgress(phase, start + (end - start) * min(int(percent[1]), 100) / 100)
    for pattern, phase, fraction, step in _MILESTONES:
        if pattern.search(words):
            return LoadProgress(phase, fraction, step)
    return None


class DownloadMeter:
    """Measures a download by the files that grow in a folder. All methods block.

    Parameters
    ----------
    folder
        Where the files come.
    total_bytes
        What is to come.
    """

    def __init__(self, folder: Path, total_bytes: int) -> None:
        self._folder = folder
        self._total = total_bytes
        self._before = self._size()
        self._looks: deque[tuple[float, int]] = deque()

    def read(self, now: float) -> Download:
        """Give bytes and rate; ``now`` is a monotonic time in seconds."""
        done = min(max(0, self._size() - self._before), self._total)
        self._looks.append((now, done))
        while len(self._looks) > 2 and now - self._looks[0][0] > RATE_SECONDS:
            self._looks.popleft()
        since, then = self._looks[0]
        rate = (done - then) / (now - since) if now - since >= LEAST_RATE_SECONDS else None
        left = round((self._total - done) / rate, 1) if rate else None
        return Download(done_bytes=done, total_bytes=self._total, bytes_per_second=rate, eta_seconds=left)

    def _size(self) -> int:
        total = 0
        with contextlib.suppress(OSError):
            for entry in os.scandir(self._folder):
                with contextlib.suppress(OSError):  # renamed meanwhile, because it is complete
                    # Blocks, not the length: a file can be made as long as it will be before anything is in it.
                    found = entry.stat(follow_symlinks=False)
                    total += min(found.st_size, found.st_blocks * 512)
        return total
