"""One model in the list: its state and what can be done with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar

import ipywidgets as w

from llmkit.errors import LLMKitError
from llmkit.panel import code, markup
from llmkit.panel.code_view import CodeView
from llmkit.panel.desk import Desk
from llmkit.panel.log_drawer import LogDrawer
from llmkit.panel.widgets import assign, beside_cells, close_all, show
from llmkit.schemas import Memory, Model, Refusable

COUNTERS = ("in_flight", "queued", "memory", "last_used_at", "expires_at", "refuses")
"""What changes without an event."""
T = TypeVar("T")


class ModelRow:
    """Shows a model. Everything but the clicks happens on the panel's thread."""

    def __init__(self, desk: Desk, model: Model) -> None:
        self._desk = desk
        self.model = model
        self.declared = False
        """Whether the operator keeps its configuration."""
        self._told = model
        self._received = time.monotonic()
        self._asking = False
        self._drawer: LogDrawer | None = None
        self._code: CodeView | None = None

        kit, name = desk.kit, model.model_id
        self._head = kit.html("", "llmkit-head")
        self._facts = kit.html()
        self.ask = kit.button(
            "Ask", lambda: desk.lane.call(lambda: desk.open_prompt(name)), style="primary", tip=f"Ask {name}"
        )
        self.load = kit.button("Load", self._on_load, style="primary", tip=f"Load {name}")
        self.cancel = kit.button("Cancel", self._on_cancel, tip=f"Cancel the load of {name}")
        self.unload = kit.button("Unload", self._on_unload, tip=f"Unload {name}")
        self.code = kit.button("Code", self._on_code, tip=f"Show as code what can be done with {name}")
        self.log = kit.button("Log", self._on_log, tip=f"Show the log of {name}")
        self.edit = kit.button("Edit", self._on_edit, tip=f"Edit the configuration of {name}")
        self.duplicate = kit.button("Duplicate", self._on_duplicate, tip=f"Make another model like {name}")
        self.delete = kit.button("Delete", self._on_delete, tip=f"Delete {name}")
        self._bar = kit.make(w.FloatProgress, min=0, max=1)
        self._bar.add_class("llmkit-bar")
        self._label = kit.html()
        self._progress = kit.row(self._bar, self._label, name="llmkit-progress")
        self._error = kit.html()
        self.fix = kit.button("", self._on_fix, style="primary")
        self._fix_row = kit.row(self.fix, name="llmkit-buttons")
        self._note = kit.html()
        self._question = kit.html()
        self.confirm = kit.button("Delete it", self._on_confirm, style="danger", tip=f"Delete {name} now")
        self.keep = kit.button("Keep it", self._on_keep, tip=f"Keep {name}")
        self._confirmation = kit.row(self._question, self.confirm, self.keep, name="llmkit-confirmation")
        self._buttons = (self.ask, self.load, self.cancel, self.unload, self.edit, self.duplicate, self.delete)

        # What the server would refuse on what is somebody else's.
        self._owners: dict[w.Button, tuple[Refusable, str]] = {
            self.cancel: ("unload", self.cancel.tooltip),
            self.unload: ("unload", self.unload.tooltip),
            self.edit: ("update", self.edit.tooltip),
            self.delete: ("delete", self.delete.tooltip),
        }

        words = kit.box(self._head, self._facts, name="llmkit-words")
        actions = kit.row(self.ask, self.load, self.cancel, self.unload, name="llmkit-buttons")
        tools = kit.row(self.log, self.code, self.edit, self.duplicate, self.delete, name="llmkit-row-tools")
        self.widget = kit.box(
            kit.row(words, actions, name="llmkit-row-top"),
            self._progress,
            self._error,
            self._fix_row,
            self._note,
            tools,
            self._confirmation,
            name="llmkit-row",
        )
        show(self._confirmation, visible=False)
        self._draw()
        beside_cells(self.widget)

    # -- showing -----------------------------------------------------------------------------------------------

    def update(self, model: Model) -> None:
        """Show a newer state."""
        if self._drawer is not None:
            self._drawer.resume()
        if model == self._told:
            return
        self._told = model
        if model.refuses is None:  # an event, which is for everybody; the look that follows says it anew
            model = model.model_copy(update={"refuses": self.model.refuses})
        if model.status != self.model.status and model.status in ("loading", "failed"):
            assign(self._note, value="")
        self.model = model
        self._received = time.monotonic()
        self._draw()

    def count(self, model: Model) -> None:
        """Show newer counters of the same state, and what the server would refuse now."""
        refuses = self.model.refuses
        self.model = self.model.model_copy(update={name: getattr(model, name) for name in COUNTERS})
        if self.model.refuses != refuses:
            self._draw()
        else:
            self._draw_facts()

    def mark(self, *, declared: bool) -> None:
        """Take in whether the operator keeps the configuration."""
        if declared != self.declared:
            self.declared = declared
            self._draw()

    def tick(self) -> None:
        """Show how long a load has taken by now, or how long the model stays."""
        if self.model.status == "loading":
            assign(self._label, value=markup.load_label(self.model, self._elapsed()))
        elif self.model.status == "loaded":
            self._draw_facts()

    def _draw_facts(self) -> None:
        assign(self._facts, value=markup.model_facts(self.model, datetime.now(UTC)))

    def _elapsed(self) -> float | None:
        told = self.model.elapsed_seconds
        return None if told is None else told + time.monotonic() - self._received

    def _draw(self) -> None:
        model, status, may = self.model, self.model.status, self._desk.may
        assign(self._head, value=markup.model_head(model))
        self._draw_facts()
        fix = self._fix_arguments()
        visible = {
            self.ask: status == "loaded" and "execute" in may,
            self.load: status in ("unloaded", "failed") and "write" in may,
            self.cancel: status == "loading" and "write" in may,
            self.unload: status in ("loaded", "unloading") and "write" in may,
            self.edit: "write" in may,
            self.duplicate: "write" in may,
            self.delete: status != "loading" and "write" in may,
        }
        for each, wanted in visible.items():
            show(each, visible=wanted)
            what, tip = self._owners.get(each, (None, each.tooltip))
            why = (model.refuses or {}).get(what) if what else None
            assign(each, disabled=self._asking or status == "unloading" or why is not None, tooltip=why or tip)
        show(self._fix_row, visible=bool(fix))
        assign(self.fix, description=markup.fix_words(fix) if fix else "", disabled=self._asking)
        # One button of a row stands out.
        again = "Load again" if status == "failed" else "Load"
        assign(self.load, description=again, button_style="" if fix else "primary")
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
        self._show_code()

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

    def _on_fix(self) -> None:
        arguments, client, model = self._fix_arguments(), self._desk.client, self.model

        def work() -> Model:
            stored = client.configuration(model.config_id)
            client.update(model.model_id, model_kwargs=with_arguments(stored.model_kwargs, arguments))
            return client.start_loading(model.model_id)

        if arguments:
            self._do(work)

    def _fix_arguments(self) -> dict[str, Any]:
        """Give the engine arguments that would cure the failure; none if nobody knows any, or may set them."""
        error = self.model.error
        if self.model.status != "failed" or error is None or self.declared or "write" not in self._desk.may:
            return {}
        if "update" in (self.model.refuses or {}):
            return {}
        kwargs = (error.fix or {}).get("model_kwargs")
        nested = kwargs.get("engine", kwargs) if isinstance(kwargs, dict) else None
        return dict(nested) if isinstance(nested, dict) else {}

    def _on_edit(self) -> None:
        self._desk.lane.call(
            lambda: self._refuse("changed") if self.declared else self._desk.edit(self.model.config_id)
        )

    def _on_duplicate(self) -> None:
        self._desk.lane.call(lambda: self._desk.duplicate(self.model.config_id))

    def _on_delete(self) -> None:
        def ask() -> None:
            if self.declared:
                self._refuse("deleted")
                return
            first = "It is unloaded first. " if self.model.status in ("loaded", "unloading") else ""
            question = f"Delete {self.model.model_id}? {first}Its configuration and its key are gone then."
            assign(self._question, value=markup.hint(question))
            assign(self._note, value="")
            show(self._confirmation, visible=True)
            self.keep.focus()

        self._desk.lane.call(ask)

    def _refuse(self, what: str) -> None:
        why = f"The operator of this server declared {self.model.model_id}, so it cannot be {what} here."
        assign(self._note, value=markup.note(f"{why} Duplicate makes a model of your own."))

    def _on_confirm(self) -> None:
        self._do(lambda: self._desk.client.delete(config_id=self.model.config_id, unload=True))

    def _on_keep(self) -> None:
        def keep() -> None:
            show(self._confirmation, visible=False)
            self.delete.focus()

        self._desk.lane.call(keep)

    # -- drawers -----------------------------------------------------------------------------------------------

    def _on_log(self) -> None:
        def turn() -> None:
            if self._drawer is None:
                self._drawer = self._desk.kit.make(LogDrawer, self._desk.client, self._desk.lane, self.model.model_id)
                self._put_in(self._drawer)
                self._drawer.follow()
            else:
                gone, self._drawer = self._drawer, None
                self._take_out(gone)
            assign(self.log, description="Log" if self._drawer is None else "Close log")

        self._desk.lane.call(turn)

    def _on_code(self) -> None:
        def turn() -> None:
            if self._code is None:
                self._code = view = CodeView(self._desk.kit)
                view.widget.unfolded = True
                # Folding it is the other way to close it.
                view.widget.observe(lambda _: self._desk.lane.call(lambda: self._close_code(view)), "unfolded")
                self._show_code()
                self._put_in(view.widget)
                assign(self.code, description="Close code")
            else:
                self._close_code(self._code)

        self._desk.lane.call(turn)

    def _close_code(self, view: CodeView) -> None:
        if view is self._code:
            self._code = None
            self._take_out(view.widget)
            assign(self.code, description="Code")

    def _show_code(self) -> None:
        """Show what the buttons of now do."""
        if self._code is None:
            return
        refuses = self.model.refuses or {}
        status, may, name, config_id = self.model.status, self._desk.may, self.model.model_id, self.model.config_id
        loaded = status == "loaded"
        possible = (
            ("Load", "write" in may and status in ("unloaded", "failed"), code.load(name, config_id)),
            ("Cancel the load", "write" in may and status == "loading" and "unload" not in refuses, code.unload(name)),
            ("Unload", "write" in may and loaded and "unload" not in refuses, code.unload(name)),
            ("Show the log", True, code.logs(name)),
            (
                "Delete",
                "write" in may and not self.declared and "delete" not in refuses,
                code.delete(config_id, name, unload=loaded),
            ),
        )
        self._code.show(*((title, each) for title, wanted, each in possible if wanted))

    def _put_in(self, widget: w.DOMWidget) -> None:
        beside_cells(widget)
        self.widget.children = (*self.widget.children, widget)

    def _take_out(self, widget: w.DOMWidget) -> None:
        self.widget.children = tuple(child for child in self.widget.children if child is not widget)
        widget.close()

    def pause(self) -> None:
        """Follow the log no more until something is shown again."""
        if self._drawer is not None:
            self._drawer.pause()

    def close(self) -> None:
        """Take the widgets away."""
        self._drawer = self._code = None  # they go with them
        close_all(self.widget)


def with_arguments(model_kwargs: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Give a configuration's arguments with some of the engine's set, wherever it keeps those; the others stay."""
    joined = dict(model_kwargs)
    for name, value in arguments.items():
        engine = joined.get("engine")
        if isinstance(engine, dict) and name not in joined:
            joined["engine"] = {**engine, name: value}
        else:
            joined[name] = value
    return joined
