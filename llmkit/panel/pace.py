"""Slow a stream of small pieces down to a rate that a page can follow."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Iterator

from llmkit.client import Piece

INTERVAL_SECONDS = 0.04


def paced(pieces: Iterable[Piece], interval: float = INTERVAL_SECONDS) -> Iterator[Piece]:
    """Give the first piece at once, then what has come in the meantime, at most every so many seconds.

    The pieces are read on a thread of their own, so that a pause of theirs holds nothing back. An error of theirs is
    raised here, after what came before it.
    """
    arrived: queue.SimpleQueue[Piece | BaseException | None] = queue.SimpleQueue()

    def read() -> None:
        try:
            for piece in pieces:
                arrived.put(piece)
            arrived.put(None)
        except BaseException as error:  # noqa: BLE001  # whatever it is, it is raised on the other thread
            arrived.put(error)

    threading.Thread(target=read, name="llmkit-panel-read", daemon=True).start()
    while True:
        batch = [arrived.get()]
        while not arrived.empty():
            batch.append(arrived.get())
        if come := [piece for piece in batch if isinstance(piece, Piece)]:
            yield Piece("".join(piece.text for piece in come), "".join(piece.reasoning for piece in come))
        last = batch[-1]
        if last is None:
            return
        if isinstance(last, BaseException):
            raise last
        time.sleep(interval)
