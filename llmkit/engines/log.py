"""Reading the log of an engine, from its file. Both ways block: call them in a thread."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

MAX_READ_BYTES: Final = 1 << 20
LOG_TAIL_LINES: Final = 50
"""What of its log an error carries."""

# Progress bars end their lines with a carriage return alone.
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")
"""Of a hub; libraries print it in the headers of a failed request."""
_LINE_END = re.compile(rb"[\r\n]+")


class LogFollower:
    """Gives the lines that were added to a log since the last time; another log in its place from its start."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._rest = b""
        self._inode = 0

    def skip_to_last(self, count: int) -> list[str]:
        """Give the last lines, and go on after them."""
        lines = self.read()
        while more := self.read():
            lines = [*lines, *more][-max(count, 1) :]
        return lines[-count:] if count else []

    def read(self) -> list[str]:
        """Give the complete lines that are new; none if there is no log yet."""
        try:
            with self._path.open("rb") as file:
                found = os.fstat(file.fileno())
                inode = found.st_ino
                if inode != self._inode or found.st_size < self._offset:  # a number can be given anew
                    self._inode, self._offset, self._rest = inode, 0, b""
                file.seek(self._offset)
                new = file.read(MAX_READ_BYTES)
        except FileNotFoundError:
            return []
        self._offset += len(new)
        *lines, self._rest = _LINE_END.split(self._rest + new)
        if len(self._rest) > MAX_READ_BYTES:  # an endless line is no line
            self._rest = b""
        return [_text(line) for line in lines]


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
    return [_text(line) for line in _LINE_END.split(text)[-count:]] if count else []


def _text(line: bytes) -> str:
    return _TOKEN.sub("[key]", line.decode("utf-8", "replace"))
