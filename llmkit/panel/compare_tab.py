"""The tab *Compare*: one prompt to several models, or to one model with several parameters, at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import ipywidgets as w
import traitlets

from llmkit.panel import code, comparison, markup
from llmkit.panel.asking import Asking, Outcome
from llmkit.panel.code_view import CodeView
from llmkit.panel.comparison import Row
from llmkit.panel.desk import Desk
from llmkit.panel.options import generation_options, offer_models
from llmkit.panel.transcript import Transcript
from llmkit.panel.widgets import assign, beside_cells, close_all, show
from llmkit.schemas import Model, Snapshot

if TYPE_CHECKING:
    from pandas import DataFrame

FEWEST, MOST = 2, 6
KEPT_ROWS = 200
FIRST_QUESTION = "What is the capital of France?"
NO_MODEL = "No model is loaded. Load one under Models."
ABOUT = "With panel = llmkit.panel(), panel.comparison() gives every run as a DataFrame."
MAY_NOT = "This account may not prompt models."


class ColumnHead(anywidget.AnyWidget):
    """The heading of a column, which also names the column to those who hear the page."""

    _esm = Path(__file__).parent / "static" / "column_head.js"
    text = traitlets.Unicode().tag(sync=True)


class Column:
    """One model with its own parameters, and its answers; for the panel's thread."""

    def __init__(self, desk: Desk, name: str, on_change: Callable[[], Any], on_remove: Callable[[Column], Any]) -> None:
        self.name = name

        kit = desk.kit
        self.model = kit.make(w.Dropdown, description="Model", options=())
        self.system = kit.make(w.Textarea, description="System prompt (optional)", rows=1, continuous_update=False)
        for field in (self.model, self.system):
            field.add_class("llmkit-field-top")
        self.options = generation_options(desk)
        self.transcript = kit.make(Transcript, compact=True, placeholder="The answer appears here.")
        self.asking = Asking(desk, self.transcript)
        self.remove = kit.button("Remove", lambda: desk.lane.call(lambda: on_remove(self)), tip=f"Remove column {name}")
        self.widget = kit.box(
            kit.row(kit.make(ColumnHead, text=f"Column {name}"), self.remove, name="llmkit-column-top"),
            self.model,
            self.system,
            kit.box(*(option.widget for option in self.options.values()), name="llmkit-column-options"),
            self.transcript,
            name="llmkit-column",
        )
        controls = [one for option in self.options.values() for one in (option.switch, option.control)]
        for control in (self.model, self.system, *controls):
            control.observe(lambda _: desk.lane.call(on_change), "value")

    @property
    def answering(self) -> bool:
        """Whether an answer is on its way."""
        return self.asking.running

    def body(self, prompt: str) -> dict[str, Any] | None:
        """Give what is sent, as the body of ``POST /llm/inference/``; None without a model."""
        if self.model.value is None:
            return None
        system = self.system.value.strip()
        options = {"system": system} if system else {}
        for option in self.options.values():
            options |= option.given
        return {"model_id": self.model.value, "prompt": prompt, "inference_kwargs": options}

    def begin(self, run: int, body: dict[str, Any], then: Callable[[Row], Any]) -> Row:
        """Ask, and give the row that is filled when the answer has ended, however it ends; ``then`` gets it, too."""
        row = comparison.asked(run, self.name, body)

        def ended(outcome: Outcome) -> None:
            row.update(comparison.measured(outcome.answer) if outcome.answer else {"response": outcome.text})
            if outcome.stopped:
                row["finish_reason"] = "stopped"
            elif outcome.error is not None:
                row["error"] = str(outcome.error)
            then(row)

        self.asking.begin(body, ended)
        return row


class CompareTab:
    """Asks several at once."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._loaded: tuple[str, ...] = ()
        self._models: list[Model] = []
        self._run = 0
        self._rows: deque[Row] = deque(maxlen=KEPT_ROWS)
        self._latest: list[Row] = []

        kit = desk.kit
        self._hint = kit.html()
        self.prompt = kit.make(
            w.Textarea,
            description="Prompt for all columns",
            value=FIRST_QUESTION,
            rows=2,
            continuous_update=False,
            placeholder="Ask something; Ctrl+Enter sends it",
        )
        self.prompt.add_class("llmkit-user-prompt")
        self.prompt.add_class("llmkit-field-top")
        self.run = kit.button(
            "Run", lambda: desk.lane.call(self._begin), style="primary", tip="Ask all columns at once (Ctrl+Enter)"
        )
        self.run.add_class("llmkit-send")
        self.stop = kit.button("Stop", lambda: desk.lane.call(self.stop_answers), tip="End all answers")
        self.add = kit.button("Add a column", lambda: desk.lane.call(self._add), tip="Compare one more")
        self.columns: list[Column] = []
        self._columns = kit.box(name="llmkit-columns")
        self.table = kit.html("", "llmkit-figures-place")
        about = kit.html(markup.hint(ABOUT))
        self.code = CodeView(kit, lambda: desk.lane.call(self._show_code))
        self.widget = kit.box(
            self._hint,
            self.prompt,
            kit.row(self.run, self.stop, self.add, name="llmkit-buttons"),
            self._columns,
            self.table,
            about,
            self.code.widget,
            name="llmkit-tab",
        )
        self.prompt.observe(lambda _: desk.lane.call(self._show_code), "value")
        self._draw()
        beside_cells(self.widget)

    def open(self) -> None:
        """Make the first columns, on the panel's thread: many widgets, not sent before somebody opens the tab."""
        while len(self.columns) < FEWEST:
            self._add()

    @property
    def results(self) -> list[Row]:
        """What was measured, a row for each answer, the latest 200."""
        return sorted(map(dict, tuple(self._rows)), key=lambda row: (row["run"], row["column"]))

    def to_dataframe(self) -> DataFrame:
        """Give `results` as a DataFrame, or raise an `LLMKitError` if pandas is not installed."""
        return comparison.to_dataframe(self.results)

    def update(self, snapshot: Snapshot) -> None:
        """Offer the models that are loaded now."""
        self._loaded = tuple(model.model_id for model in snapshot.models if model.status == "loaded")
        self._models = snapshot.models
        for number, column in enumerate(self.columns):
            self._offer(number, column)
        self._draw()

    def _offer(self, number: int, column: Column) -> None:
        # Each column begins with another model, as long as there are so many.
        default = self._loaded[number % len(self._loaded)] if self._loaded else None
        offer_models(column.model, self._models, default)

    def _draw(self) -> None:
        answering = any(column.answering for column in self.columns)
        may = "execute" in self._desk.may
        ready = bool(self._loaded)
        assign(self._hint, value=markup.hint(MAY_NOT if not may else NO_MODEL) if not (may and ready) else "")
        assign(self.run, disabled=answering or not (may and ready and self.columns))
        assign(self.stop, disabled=not answering)
        assign(self.table, value=comparison.table(self._latest))
        assign(self.add, disabled=answering or len(self.columns) >= MOST)
        for column in self.columns:
            assign(column.remove, disabled=answering)
            show(column.remove, visible=len(self.columns) > FEWEST)
        self._show_code()

    def _show_code(self) -> None:
        if not self.code.is_open:
            return
        bodies = [body for column in self.columns if (body := column.body(self.prompt.value)) is not None]
        self.code.show(*([("Compare", code.compare(bodies))] if bodies else []))

    # -- columns -----------------------------------------------------------------------------------------------

    def _add(self) -> None:
        taken = {column.name for column in self.columns}
        name = next((letter for letter in "ABCDEF" if letter not in taken), None)
        if name is None or any(column.answering for column in self.columns):
            return
        column = Column(self._desk, name, self._draw, self._remove)
        self.columns.append(column)
        self._offer(len(self.columns) - 1, column)
        beside_cells(column.widget)
        self._place()

    def _remove(self, column: Column) -> None:
        if column not in self.columns or len(self.columns) <= FEWEST or column.answering:
            return
        self.columns.remove(column)
        self._place()
        close_all(column.widget)

    def _place(self) -> None:
        self._columns.children = tuple(column.widget for column in self.columns)
        self._draw()

    # -- asking ------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        prompt = self.prompt.value
        asked = [(column, body) for column in self.columns if (body := column.body(prompt)) is not None]
        if not asked or not prompt.strip() or any(column.answering for column in self.columns):
            return
        if "execute" not in self._desk.may:
            return
        self._run += 1
        self._latest = [column.begin(self._run, body, self._end) for column, body in asked]
        self._draw()

    def _end(self, row: Row) -> None:
        self._rows.append(row)
        self._draw()

    def stop_answers(self) -> None:
        """End every answer that is on its way."""
        for column in self.columns:
            column.asking.stop()
