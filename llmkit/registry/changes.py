"""What is told of every change: counted, in order, progress not too often."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import Any

from llmkit.registry.model import Model

PROGRESS_INTERVAL_SECONDS = 0.25

Event = dict[str, Any]


class Changes:
    """Counts the changes of one registry and tells each as an event.

    Parameters
    ----------
    emit
        Called with the data of every event, in the order of their revisions.

    Attributes
    ----------
    epoch
        Changes when the server starts.
    revision
        Grows with every change.
    """

    def __init__(self, emit: Callable[[Event], None]) -> None:
        self.epoch = os.urandom(16).hex()
        self.revision = 0
        self._emit = emit
        self._due: dict[Model, asyncio.TimerHandle] = {}
        self._sent: dict[Model, float] = {}

    def tell(self, model: Model, change: str) -> None:
        """Count a change and tell it: at once, progress at most four times a second for one model."""
        self.revision += 1
        if change != "progress":
            self._tell_now(model, change)
        elif model not in self._due:
            wait = self._sent.get(model, 0.0) + PROGRESS_INTERVAL_SECONDS - time.monotonic()
            loop = asyncio.get_running_loop()
            self._due[model] = loop.call_later(max(0.0, wait), self._tell_now, model, change)

    def _tell_now(self, model: Model, change: str) -> None:
        # What is told now says more than a progress that was to follow.
        due = self._due.pop(model, None)
        if due is not None:
            due.cancel()
        if change == "progress":
            self._sent[model] = time.monotonic()
        else:
            self._sent.pop(model, None)
        self._emit(
            {
                "epoch": self.epoch,
                "revision": self.revision,
                "change": change,
                "model_id": model.configuration.model_id,
                "config_id": model.configuration.config_id,
                "model": None if change == "deleted" else model.snapshot().model_dump(mode="json"),
            }
        )

    def close(self) -> None:
        """Tell nothing that is still due."""
        for handle in self._due.values():
            handle.cancel()
        self._due.clear()
