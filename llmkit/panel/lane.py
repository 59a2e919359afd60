"""Who may touch the widgets: one thread, in order; and who may wait for the server: others.

A click is handled on whatever thread the kernel chooses, also beside a running cell. It only puts work here.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from llmkit.errors import LLMKitError

TICK_SECONDS = 1.0
T = TypeVar("T")
log = logging.getLogger(__name__)


class Lane:
    """Does work one piece after the other on a thread of its own.

    Parameters
    ----------
    tick
        Called about once a second while `ticking` is set.
    """

    def __init__(self, tick: Callable[[], None] = lambda: None) -> None:
        self.ticking = False
        self._tick = tick
        self._queue: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="llmkit-panel", daemon=True)
        self._thread.start()

    def call(self, work: Callable[[], Any]) -> None:
        """Do something to the widgets, after what was asked for before; returns at once."""
        self._queue.put(work)

    def ask(
        self,
        work: Callable[[], T],
        then: Callable[[T], Any] = lambda _: None,
        failed: Callable[[LLMKitError], Any] = lambda _: None,
    ) -> None:
        """Wait for the server on another thread, then do something with its answer on this one."""

        def run() -> None:
            try:
                answer = work()
            except LLMKitError as error:
                told = error
                self.call(lambda: failed(told))
            except Exception as error:
                log.exception("an action of the panel failed")
                unexpected = LLMKitError(
                    f"The panel failed: {type(error).__name__}.", hint="The kernel's log says more."
                )
                self.call(lambda: failed(unexpected))
            else:
                self.call(lambda: then(answer))

        threading.Thread(target=run, name="llmkit-panel-ask", daemon=True).start()

    def settle(self, seconds: float) -> bool:
        """Wait until everything asked for up to now is done; say whether it is."""
        done = threading.Event()
        self.call(done.set)
        return done.wait(seconds)

    def close(self) -> None:
        """End the thread after what was asked for up to now."""
        self._queue.put(None)

    def _run(self) -> None:
        due = time.monotonic() + TICK_SECONDS
        while True:
            try:
                work = self._queue.get(timeout=max(0.0, due - time.monotonic()) if self.ticking else None)
            except queue.Empty:
                work = _nothing
            if work is None:
                return
            self._do(work)
            if time.monotonic() >= due:  # also where there is always work
                due = time.monotonic() + TICK_SECONDS
                if self.ticking:
                    self._do(self._tick)

    def _do(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except Exception:
            # One mistake must not leave every later click without an answer.
            log.exception("the panel could not be drawn")


def _nothing() -> None:
    """Stand in for work where there is none."""
