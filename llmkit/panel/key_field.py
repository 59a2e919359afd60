"""A field for a key, which is in no widget state and in no saved notebook."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from llmkit.errors import LLMKitError, TimedOut

ANSWER_SECONDS = 5.0


class KeyField(anywidget.AnyWidget):
    """Keeps what is typed in the browser: `collect` asks for it, and `forget` lets the browser forget it.

    Parameters
    ----------
    label
        What the field is called.
    placeholder
        What stands in it while it is empty.

    Attributes
    ----------
    is_typed
        Whether anything was typed; the page says no more than that.
    on_typed
        Called when that changes, on another thread.
    """

    _esm = Path(__file__).parent / "static" / "key_field.js"
    label = traitlets.Unicode().tag(sync=True)
    placeholder = traitlets.Unicode().tag(sync=True)

    def __init__(self, label: str, placeholder: str, **values: Any) -> None:
        self._waiting: dict[int, tuple[Callable[[str], None], threading.Timer]] = {}
        self._requests = 0
        self.is_typed = False
        self.on_typed: Callable[[], object] = lambda: None
        super().__init__(label=label, placeholder=placeholder, **values)
        self.on_msg(self._receive)

    def collect(self, then: Callable[[str], None], failed: Callable[[LLMKitError], None]) -> None:
        """Ask for what was typed; returns at once.

        Parameters
        ----------
        then
            Called with it, empty if nothing was typed, on another thread.
        failed
            Called instead if the browser does not answer.
        """
        self._requests += 1
        request = self._requests

        def give_up() -> None:
            if self._waiting.pop(request, None) is not None:
                failed(TimedOut("The key field did not answer.", hint="Reload the page, then run the cell again."))

        timer = threading.Timer(ANSWER_SECONDS, give_up)
        timer.daemon = True
        self._waiting[request] = (then, timer)
        timer.start()
        self.send({"type": "collect", "request": request})

    def forget(self) -> None:
        """Let the browser forget what was typed."""
        self.is_typed = False
        self.send({"type": "forget"})

    def _receive(self, _: Any, content: Any, __: Any) -> None:
        if not isinstance(content, dict):
            return
        if content.get("type") == "typed":
            self.is_typed = content.get("any") is True
            self.on_typed()
        if content.get("type") != "key":
            return
        # The first page that answers is the one; another that shows the same widget comes too late.
        waiting = self._waiting.pop(content.get("request", 0), None)
        if waiting is not None:
            then, timer = waiting
            timer.cancel()
            value = str(content.get("value") or "")
            # A page that was loaded anew has lost it.
            self.is_typed = bool(value)
            then(value)
