"""Server-sent events as they come from an engine: cut at blank lines, whole events only.

The format is that of the HTML standard, section 9.2; of its three line ends, the carriage return alone is not used by
any engine and not taken for one here.
"""

from __future__ import annotations

import re
from typing import Final

from llmkit.errors import UpstreamFailed

MAX_EVENT_BYTES: Final = 2 << 20
_DATA: Final = re.compile(rb"^data: ?([^\n]*)$", re.MULTILINE)
_BLANKS: Final = (b"\n\n", b"\r\n\r\n")
DONE: Final = b"[DONE]"
"""The data of the last event of OpenAI's streams."""


class EventCutter:
    """Takes a stream in pieces of any size, and gives it in pieces that end with the end of an event."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, part: bytes) -> bytes:
        """Take a piece; give all whole events that are there now, perhaps none.

        Raises
        ------
        UpstreamFailed
            If an event is larger than any sensible one.
        """
        rest = self._rest
        if not rest and part.endswith(b"\n\n"):
            return part
        # Only what is new is searched: an event can come in very many pieces.
        start = max(len(rest) - len(_BLANKS[-1]) + 1, 0)
        rest += part
        end = 0
        for blank in _BLANKS:
            found = rest.rfind(blank, start)
            if found >= 0:
                end = max(end, found + len(blank))
        if len(rest) - end > MAX_EVENT_BYTES:
            raise UpstreamFailed("The endpoint sends an endless event.")
        if not end:
            return b""
        events = bytes(rest[:end])
        del rest[:end]
        return events

    def end(self) -> bytes:
        """Give the last event of OpenAI's streams, if that is what is left; some engines leave out its blank line."""
        data = data_of(bytes(self._rest).strip())
        return b"data: [DONE]\n\n" if data is not None and data.strip() == DONE else b""


def split_events(events: bytes) -> list[bytes]:
    """Give each of several whole events by itself, without the blank line at its end."""
    if b"\r" in events:
        events = events.replace(b"\r\n", b"\n")
    return [event for event in events.split(b"\n\n") if event]


def data_of(event: bytes) -> bytes | None:
    """Give the data of an event; None of a comment, or where there is none."""
    if event.startswith(b"data:") and b"\n" not in event:
        return event[5:].removeprefix(b" ")
    data, found = bytearray(), False  # no list of the lines: of very many short ones it takes ten times their bytes
    for line in _DATA.finditer(event):
        if found:
            data += b"\n"
        data += line[1]
        found = True
    return bytes(data) if found else None
