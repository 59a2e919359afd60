"""Prompts and their answers, as they come."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import anywidget
import traitlets

KEPT_TURNS = 100


@dataclass
class Turn:
    """One prompt and its answer."""

    model_id: str
    prompt: str
    text: str = ""
    state: Literal["streaming", "done", "failed"] = "streaming"
    note: str = ""


class Transcript(anywidget.AnyWidget):
    """Shows turns. Only what is new is sent, by messages; no text is in the widget's state."""

    _esm = Path(__file__).parent / "static" / "transcript.js"
    placeholder = traitlets.Unicode("Answers appear here. Every prompt is asked by itself.").tag(sync=True)

    def __init__(self, **values: Any) -> None:
        self._lock = threading.Lock()
        self._turns: deque[Turn] = deque(maxlen=KEPT_TURNS)
        super().__init__(**values)
        self.on_msg(self._greeted)

    @property
    def turns(self) -> list[Turn]:
        """What is shown."""
        return list(self._turns)

    def begin(self, model_id: str, prompt: str) -> None:
        """Show a prompt; its answer follows."""
        with self._lock:
            self._turns.append(Turn(model_id, prompt))
            self.send({"type": "begin", "turn": asdict(self._turns[-1])})

    def append(self, text: str) -> None:
        """Show more of the answer."""
        with self._lock:
            self._turns[-1].text += text
            self.send({"type": "append", "text": text})

    def end(self, note: str, *, failed: bool = False) -> None:
        """Say how the answer ended."""
        with self._lock:
            turn = self._turns[-1]
            turn.state, turn.note = "failed" if failed else "done", note
            self.send({"type": "end", "state": turn.state, "note": note})

    def clear(self) -> None:
        """Forget every turn."""
        with self._lock:
            self._turns.clear()
            self._send_all()

    def _greeted(self, _: Any, content: Any, __: Any) -> None:
        if isinstance(content, dict) and content.get("type") == "hello":
            # In the lock, so that what is new is sent either with all of it or after it.
            with self._lock:
                self._send_all()

    def _send_all(self) -> None:
        self.send({"type": "all", "turns": [asdict(turn) for turn in self._turns]})
