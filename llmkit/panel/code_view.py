"""A fold that shows what an action is as code."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import anywidget
import traitlets

from llmkit.panel.code import Code
from llmkit.panel.widgets import Kit, read_module

SHOWN_CHARACTERS = 20_000
LANGUAGES = ("python", "curl")


class CodeFold(anywidget.AnyWidget):
    """Shows code once it is opened. Until then nothing is sent, so that typing costs nothing while it is folded."""

    _esm = read_module("code_view.js")
    unfolded = traitlets.Bool(False).tag(sync=True)  # noqa: FBT003  # a trait's default has no name

    def __init__(self, **values: Any) -> None:
        # A page's words come on another thread than the panel's.
        self._lock = threading.RLock()
        self._code: tuple[tuple[str, Code], ...] = ()
        self._sent: tuple[tuple[str, Code], ...] | None = None
        super().__init__(**values)
        self.on_msg(self._receive)
        self.observe(lambda _: self._send_new(), "unfolded")

    def show(self, *titled: tuple[str, Code]) -> None:
        """Show other code, at once or when it is opened."""
        with self._lock:
            self._code = titled
            self._send_new()

    def _send_new(self) -> None:
        with self._lock:
            if self.unfolded and self._sent != self._code:
                self._sent = self._code
                self.send({"type": "code", "items": [_shown(title, code) for title, code in self._code]})

    def _receive(self, _: Any, content: Any, __: Any) -> None:
        if not isinstance(content, dict):
            return
        with self._lock:
            if content.get("type") == "hello":  # another page, or the same one after a reload
                self._sent = None
                self._send_new()
            elif content.get("type") == "whole":
                self.send({"type": "whole", "request": content.get("request"), "text": self._whole(content)})

    def _whole(self, content: dict[str, Any]) -> str:
        number, language = content.get("item"), content.get("language")
        if isinstance(number, int) and 0 <= number < len(self._code) and language in LANGUAGES:
            return str(getattr(self._code[number][1], language))
        return ""


class CodeView:
    """*Show as code*, folded.

    Parameters
    ----------
    kit
        Makes the widgets.
    opened
        Called when it is opened, for who makes the code only then.
    """

    def __init__(self, kit: Kit, opened: Callable[[], Any] = lambda: None) -> None:
        self.widget = kit.make(CodeFold)
        self.widget.observe(lambda change: opened() if change["new"] else None, "unfolded")

    @property
    def is_open(self) -> bool:
        """Whether somebody can see the code."""
        return bool(self.widget.unfolded)

    def show(self, *titled: tuple[str, Code]) -> None:
        """Show the code of these actions, each with its title, in place of what was there."""
        self.widget.show(*titled)


def _shown(title: str, code: Code) -> dict[str, Any]:
    """Give what a page gets: no more of it than a person reads, and how much there is."""
    texts = {language: str(getattr(code, language)) for language in LANGUAGES}
    cut = {language: text[:SHOWN_CHARACTERS] for language, text in texts.items()}
    return {"title": title, **cut, "characters": {language: len(text) for language, text in texts.items()}}
