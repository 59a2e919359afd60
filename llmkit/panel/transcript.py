"""Prompts and their answers, as they come."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import anywidget
import traitlets

from llmkit.panel.widgets import STATIC, read_module

KEPT_TURNS = 100
MARKDOWN_IT = STATIC / "vendor" / "markdown-it-15.0.3.umd.min.js"

State = Literal["streaming", "done", "stopped", "failed"]


def _markdown_it() -> str:
    """Give markdown-it as a constant.

    Its build offers itself to `module`, to AMD's `define` (which the classic notebook has), or to the page; here it
    finds a `module` of its own.
    """
    return (
        "const markdownit = (() => {\n"
        "const module = { exports: {} }, exports = module.exports, define = undefined;\n"
        f"{MARKDOWN_IT.read_text(encoding='utf-8')}\n"
        "return module.exports;\n"
        "})();\n"
    )


@dataclass
class Turn:
    """One prompt and its answer.

    Parameters
    ----------
    images
        Those of the prompt, as data URLs of PNG, JPEG, GIF or WebP.
    text
        The answer, as Markdown.
    tool_calls
        As OpenAI's API has them.
    note
        How the answer ended, in a few words.
    """

    model_id: str
    prompt: str
    images: list[str] = field(default_factory=list)
    text: str = ""
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    state: State = "streaming"
    note: str = ""


class Transcript(anywidget.AnyWidget):
    """Shows turns. Only what is new is sent, by messages; nothing that was said is in the widget's state.

    Every message is numbered. A page asks for everything when it starts, and again if it missed a number, as after
    a lost connection; the answer names the page that asked, and others go on with what they have.
    """

    _esm = _markdown_it() + read_module("markdown.js", "transcript.js")
    placeholder = traitlets.Unicode("Answers appear here.").tag(sync=True)
    compact = traitlets.Bool(default_value=False).tag(sync=True)

    def __init__(self, **values: Any) -> None:
        self._lock = threading.Lock()
        self._turns: deque[Turn] = deque(maxlen=KEPT_TURNS)
        self._number = 0
        super().__init__(**values)
        self.on_msg(self._greeted)

    @property
    def turns(self) -> list[Turn]:
        """What is shown."""
        with self._lock:
            return list(self._turns)

    def begin(self, model_id: str, prompt: str, images: Iterable[str] = ()) -> None:
        """Show a prompt; its answer follows."""
        with self._lock:
            self._turns.append(Turn(model_id, prompt, list(images)))
            self._tell("begin", turn=asdict(self._turns[-1]), kept=KEPT_TURNS)

    def wait(self, note: str) -> None:
        """Say what an answer waits for, of which nothing has come."""
        with self._lock:
            turn = self._open
            if turn is not None and not turn.text and not turn.reasoning and turn.note != note:
                turn.note = note
                self._tell("wait", note=note)

    def append(self, text: str = "", reasoning: str = "") -> None:
        """Show more of the answer. What comes after `end`, `clear` or `show` has no place any more and is dropped."""
        with self._lock:
            turn = self._open
            new = {name: value for name, value in (("text", text), ("reasoning", reasoning)) if value}
            if turn is None or not new:
                return
            turn.text += text
            turn.reasoning += reasoning
            turn.note = ""
            self._tell("append", **new)

    def end(self, note: str, state: State = "done", tool_calls: Iterable[dict[str, Any]] = ()) -> None:
        """Say how the answer ended."""
        with self._lock:
            turn = self._open
            if turn is None:
                return
            turn.state, turn.note, turn.tool_calls = state, note, list(tool_calls)
            self._tell("end", state=state, note=note, tool_calls=turn.tool_calls)

    def show(self, turns: Iterable[Turn]) -> None:
        """Show these turns and no others; the last `KEPT_TURNS` of them. Later changes of them are not shown."""
        with self._lock:
            self._turns = deque((replace(turn) for turn in turns), maxlen=KEPT_TURNS)
            self._tell_all()

    def clear(self) -> None:
        """Forget every turn."""
        self.show([])

    @property
    def _open(self) -> Turn | None:
        return self._turns[-1] if self._turns and self._turns[-1].state == "streaming" else None

    def _greeted(self, _: Any, content: Any, __: Any) -> None:
        if isinstance(content, dict) and content.get("type") == "hello":
            # In the lock, so that what is new is sent either with all of it or after it.
            with self._lock:
                self._tell_all(page=str(content.get("page", "")))

    def _tell_all(self, **more: str) -> None:
        self._tell("all", turns=[asdict(turn) for turn in self._turns], **more)

    def _tell(self, kind: str, **content: Any) -> None:
        self._number += 1
        self.send({"type": kind, "number": self._number, **content})
