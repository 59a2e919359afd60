"""How far a load is, read off the log of vLLM.

vLLM says it nowhere else. Lines that are not known are passed over, so another version of vLLM makes the
progress coarser, never wrong.
"""

from __future__ import annotations

import re
from typing import Final

from llmkit.engines.base import LoadProgress
from llmkit.schemas import Phase

MAX_LINE: Final = 4096

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_PREFIX = re.compile(
    r"^(?:\(\S+ pid=\d+\) )?"  # (EngineCore pid=42)
    r"(?:(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] ?)?"
)
_PERCENT = re.compile(r"(\d{1,3})%")

_MILESTONES: Final[list[tuple[re.Pattern[str], Phase, float]]] = [
    (re.compile(r"non-default args:"), "starting", 0.1),
    (re.compile(r"Resolved architecture:"), "starting", 0.2),
    (re.compile(r"Initializing a V1 LLM engine"), "starting", 0.3),
    (re.compile(r"Starting to load model"), "weights", 0.5),
    (re.compile(r"Time spent downloading weights"), "weights", 0.7),
    (re.compile(r"Loading weights took|Model loading took"), "warming", 0.85),
    (re.compile(r"KV cache size:"), "warming", 0.9),
    (re.compile(r"init engine \("), "warming", 0.97),
    (re.compile(r"Starting vLLM (?:API )?server"), "warming", 0.99),
]
"""What a line means, and the fraction of a load of a small model that is over by then."""

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

    def read(self, line: str) -> bool:
        """Take one line; say whether `progress` changed."""
        known = _understand(clean(line))
        if known is None:
            return False
        fraction = max(known.fraction or 0.0, self.progress.fraction or 0.0)
        before, self.progress = self.progress, LoadProgress(known.phase, round(fraction, 3))
        return self.progress != before


def _understand(words: str) -> LoadProgress | None:
    for pattern, phase, start, end in _BARS:
        if pattern.search(words) and (percent := _PERCENT.search(words)):
            return LoadProgress(phase, start + (end - start) * min(int(percent[1]), 100) / 100)
    for pattern, phase, fraction in _MILESTONES:
        if pattern.search(words):
            return LoadProgress(phase, fraction)
    return None
