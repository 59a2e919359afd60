"""Reading the log of an engine, from its file. Both ways block: call them in a thread."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

MAX_READ_BYTES: Final = 1 << 20
LOG_TAIL_LINES: Final = 50
"""What of its log an error carries."""

# Progress bars end their lines with a carriage return alone.
_LINE_END = re.compile(rb"[\r\n]+")


class LogFollower:
    """Gives the lines that were added to a log since the last time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._rest = b""

    def read(self) -> list[str]:
        """Give the complete lines that are new; none if there is no log yet."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                new = file.read(MAX_READ_BYTES)
        except FileNotFoundError:
            return []
        self._offset += len(new)
        *lines, self._rest = _LINE_END.split(self._rest + new)
        if len(self._rest) > MAX_READ_BYTES:  # an endless line is no line
            self._rest = b""
        return [line.decode("utf-8", "replace") for line in lines]


def last_lines(path: Path, count: int) -> list[str]:
    """Give the last lines of a log, out of its last megabyte; none if it cannot be read or is empty."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - MAX_READ_BYTES))
            text = file.read(MAX_READ_BYTES).strip()
    except OSError:
        return []
    if not text:
        return []
    return [line.decode("utf-8", "replace") for line in _LINE_END.split(text)][-count:]
