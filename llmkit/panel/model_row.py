"""One model in the list: its state and what can be done with it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import ipywidgets as w

from llmkit.errors import LLMKitError
from llmkit.panel import markup
from llmkit.panel.desk import Desk
from llmkit.panel.widgets import assign, beside_cells, close_all, show
from llmkit.schemas import Memory, Model

T = TypeVar("T")


class ModelRow:
    """Shows a model. Everything but the clicks happens on the panel's thread."""

    def __init__(self, desk: Desk, model: Model) -> None:
        self._desk = desk
        self.model = model
        self._received = time.monotonic()
        self._asking = False

        kit, name = desk.kit, model.model_id
        self._head = kit.html("", "llmkit-head")
        self.ask = kit.button(
            "Ask", lambda: desk.lane.call(lambda: desk.open_prompt(name)), style="primary", tip=f"Ask {name}"
        )
        self.load = kit.button("Load", self._on_load, style="primary", tip=f"Load {name}")
        self.cancel = kit.button("Cancel", self._on_cancel, tip=f"Cancel the load of {name}")
        self.unload = kit.button("Unload", self._on_unload, tip=f"Unload {name}")
        self.delete = kit.button("Delete", self._on_delete, tip=f"Delete {name}")
        self._bar = kit.make(w.FloatProgress, min=0, max=1)
        self._bar.add_class("llmkit-bar")
        self._label = kit.html()
        self._progress = kit.row(self._bar, self._label, name="llmkit-progress")
        self._error = kit.html()
        self._note = kit.html()
        self._question = kit.html()
        self.confirm = kit.button("Delete it", self._on_confirm, style="danger", tip=f"Delete {name} now")
        self.keep = kit.button("Keep it", self._on_keep, tip=f"Keep {name}")
        self._confirmation = kit.row(self._question, self.confirm, self.keep, name="llmkit-confirmation")
        self._buttons = (self.ask, self.load, self.cancel, self.unload, self.delete)

        top = kit.row(self._head, kit.row(*self._buttons, name="llmkit-buttons"), name="llmkit-row-top")
        self.widget = kit.box(top, self._progress, self._error, self._note, self._confirmation, name="llmkit-row")
        show(self._confirmation, visible=False)
        self._draw()
        beside_cells(self.widget)

    # -- showing -----------------------------------------------------------------------------------------------

    def update(self, model: Model) -> None:
        """Show a newer state."""
        if model == self.model:
            return
        if model.status != self.model.status and model.status in ("loading", "failed"):
            assign(self._note, value="")
        self.model = model
        self._received = time.monotonic()
        self._draw()

    def tick(self) -> None:
        """Show how long a load has taken by now."""
        if self.model.status == "loading":
            assign(self._label, value=markup.load_label(self.model, self._elapsed()))

    def _elapsed(self) -> float | None:
        told = self.model.elapsed_seconds
        return None if told is None else told + time.monotonic() - self._received

    def _draw(self) -> None:
        model, status = self.model, self.model.status
        assign(self._head, value=markup.model_head(model))
        visible = {
            self.ask: status == "loaded",
            self.load: status in ("unloaded", "failed"),
            self.cancel: status == "loading",
            self.unload: status in ("loaded", "unloading"),
            self.delete: status != "loading",
        }
        for each, wanted in visible.items():
            show(each, visible=wanted)
            assign(each, disabled=self._asking or status == "unloading")
        assign(self.load, description="Load again" if status == "failed" else "Load")
        show(self._progress, visible=status == "loading")
        if status == "loading":
            assign(self._label, value=markup.load_label(model, self._elapsed()))
            assign(self._bar, value=1.0 if model.progress is None else model.progress)
            if model.progress is None:
                self._bar.add_class("llmkit-unmeasured")
            else:
                self._bar.remove_class("llmkit-unmeasured")
        failed = status == "failed" and model.error is not None
        assign(self._error, value=markup.error_card(model.error) if failed and model.error else "")

    # -- doing -------------------------------------------------------------------------------------------------

    def _do(self, work: Callable[[], T], then: Callable[[T], None] = lambda _: None) -> None:
        """Ask the server; meanwhile no button of this row can be pressed."""

        def begin() -> None:
            if self._asking:
                return
            self._asking = True
            assign(self._note, value="")
            show(self._confirmation, visible=False)
            self._draw()
            self._desk.lane.ask(work, end, failed)

        def end(answer: T) -> None:
            self._asking = False
            self._draw()
            then(answer)

        def failed(error: LLMKitError) -> None:
            self._asking = False
            self._draw()
            assign(self._note, value=markup.error_card(error))

        self._desk.lane.call(begin)

    def _on_load(self) -> None:
        self._do(lambda: self._desk.client.start_loading(self.model.model_id))

    def _on_cancel(self) -> None:
        def say(_: Memory) -> None:
            assign(self._note, value=markup.note("The load was cancelled."))

        self._do(lambda: self._desk.client.unload(self.model.model_id), say)

    def _on_unload(self) -> None:
        def say(freed: Memory) -> None:
            assign(self._note, value=markup.note(markup.freed(freed)))

        self._do(lambda: self._desk.client.unload(self.model.model_id), say)

    def _on_delete(self) -> None:
        def ask() -> None:
            first = "It is unloaded first. " if self.model.status in ("loaded", "unloading") else ""
            question = f"Delete {self.model.model_id}? {first}Its configuration and its key are gone then."
            assign(self._question, value=markup.hint(question))
            show(self._confirmation, visible=True)

        self._desk.lane.call(ask)

    def _on_confirm(self) -> None:
        self._do(lambda: self._desk.client.delete(config_id=self.model.config_id, unload=True))

    def _on_keep(self) -> None:
        self._desk.lane.call(lambda: show(self._confirmation, visible=False))

    def close(self) -> None:
        """Take the widgets away."""
        close_all(self.widget)
