"""One request of a model, and how others can end it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from llmkit.errors import LLMKitError


@dataclass(eq=False)
class Running:
    """A request, from the moment in which it is known to its end."""

    request_id: str
    task: asyncio.Task[Any] | None = field(default_factory=asyncio.current_task)
    error: LLMKitError | None = None

    def abort(self, error: LLMKitError) -> None:
        """End the request with an error; the first one counts."""
        if self.error is None:
            self.error = error
            if self.task is not None:
                self.task.cancel()

    @contextmanager
    def told(self) -> Iterator[None]:
        """Let the cancellation of an `abort` leave as the error that it stands for."""
        try:
            yield
        except (asyncio.CancelledError, LLMKitError):
            if self.error is None:
                raise
            if self.task is not None:
                self.task.uncancel()
            raise self.error from None
