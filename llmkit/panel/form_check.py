"""When a form is checked: a moment after the last change, one check at a time, late answers dropped."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from llmkit.errors import LLMKitError
from llmkit.panel.lane import Lane

QUIET_SECONDS = 0.4
T = TypeVar("T")


class Checker(Generic[T]):
    """Asks the server about what changes. Everything happens on the panel's thread.

    Parameters
    ----------
    begin
        Called when it is time: gives what asks the server, or None if there is nothing to check.
    then, failed
        Called with the answer, if nothing has changed meanwhile.
    """

    def __init__(
        self,
        lane: Lane,
        begin: Callable[[], Callable[[], T] | None],
        then: Callable[[T], object],
        failed: Callable[[LLMKitError], object],
    ) -> None:
        self._lane = lane
        self._begin = begin
        self._then = then
        self._failed = failed
        self._version = 0
        self._changed_at = 0.0
        self._waiting = False
        self._running = False
        self._due = False

    def changed(self) -> None:
        """Check what is there now, unless it changes again at once."""
        self.drop()
        self._changed_at = time.monotonic()
        if not self._waiting:
            self._waiting = True
            self._wait(QUIET_SECONDS)

    def drop(self) -> None:
        """Care no longer about an answer that is on its way."""
        self._version += 1

    def _wait(self, seconds: float) -> None:
        timer = threading.Timer(seconds, lambda: self._lane.call(self._look))
        timer.daemon = True
        timer.start()

    def _look(self) -> None:
        left = self._changed_at + QUIET_SECONDS - time.monotonic()
        if left > 0:
            self._wait(left)
            return
        self._waiting = False
        if self._running:
            self._due = True
        else:
            self._ask()

    def _ask(self) -> None:
        work = self._begin()
        if work is None:
            return
        version = self._version
        self._running = True

        def end(tell: Callable[[], object]) -> None:
            self._running = False
            if version == self._version:
                tell()
            if self._due:
                self._due = False
                self._ask()

        self._lane.ask(
            work, lambda answer: end(lambda: self._then(answer)), lambda error: end(lambda: self._failed(error))
        )
