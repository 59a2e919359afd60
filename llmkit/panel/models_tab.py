"""The tab *Models*: a row for each, and a way to begin when there is none."""

from __future__ import annotations

import time
from collections.abc import Collection

from llmkit.client import Configuration, ModelType
from llmkit.errors import LLMKitError
from llmkit.panel import markup
from llmkit.panel.desk import Desk
from llmkit.panel.device_bar import WAITING, device_bar
from llmkit.panel.model_row import ModelRow
from llmkit.panel.widgets import assign, beside_cells, show
from llmkit.schemas import Devices, Model, Snapshot

LIVE_SECONDS, QUIET_SECONDS = 1.5, 10.0
"""So often is the machine looked at while it holds a model, and while it holds none."""
DEMO = {"model_id": "demo", "model_name": "llmkit/demo", "model_type": "vllm"}

_WELCOME = (
    '<div class="llmkit-welcome"><b>No models yet</b>'
    "<div>The demo model is small, lies in the package and knows the capitals of the world. "
    "It needs no network, no key and no GPU.</div></div>"
)


class ModelsTab:
    """Shows every model of the server, and what they hold of its machine."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self.rows: dict[str, ModelRow] = {}
        self._shown: tuple[str, int] | None = None
        """Epoch and revision of what is shown."""
        self._polling = False
        self._poll_at = 0.0
        kit = desk.kit
        self._devices = kit.html(WAITING)
        self.try_demo = kit.button("Try the demo model", self._on_demo, style="primary")
        self.try_demo.add_class("llmkit-big")
        self.configure = kit.button("Configure a model", lambda: desk.lane.call(desk.open_configure))
        self._demo_note = kit.html()
        self._begin = kit.row(self.try_demo, self.configure, name="llmkit-buttons")
        self._welcome = kit.box(kit.html(_WELCOME), self._begin, self._demo_note, name="llmkit-start")
        self._list = kit.box(name="llmkit-list")
        self._rights = kit.html(markup.hint(_describe_rights(desk.may)) if "write" not in desk.may else "")
        self.widget = kit.box(self._devices, self._rights, self._welcome, self._list, name="llmkit-tab")
        show(self._begin, visible="write" in desk.may)
        show(self._welcome, visible=False)
        beside_cells(self.widget)

    # -- showing -----------------------------------------------------------------------------------------------

    def update(self, snapshot: Snapshot) -> None:
        """Show the models as they are now; what is older than what is shown is left out."""
        if self._is_older(snapshot):
            return
        self._shown = snapshot.epoch, snapshot.revision
        known = {model.config_id: model for model in snapshot.models}
        for config_id in self.rows.keys() - known.keys():
            gone = self.rows.pop(config_id)
            self._arrange()
            gone.close()
        added = known.keys() - self.rows.keys()
        for config_id, model in known.items():
            if config_id in self.rows:
                row = self.rows[config_id]
                if _changes(model) != _changes(row.model):
                    self._poll_at = 0.0  # the machine's memory has changed, too, or whose it is
                row.update(model)
            else:
                self.rows[config_id] = ModelRow(self._desk, model)
        self.rows = {config_id: self.rows[config_id] for config_id in known}
        self._arrange()
        show(self._welcome, visible=not known)
        if added:
            self._poll_at = 0.0
            self._ask_who_keeps_them()
        self.refresh()  # while one event follows the other, the panel's clock does not come to its turn

    def _is_older(self, snapshot: Snapshot) -> bool:
        if self._shown is None:
            return False
        epoch, revision = self._shown
        return snapshot.epoch == epoch and snapshot.revision < revision

    def _arrange(self) -> None:
        assign(self._list, children=tuple(each.widget for each in self.rows.values()))

    @property
    def loading(self) -> bool:
        """Whether a load is under way, so that its seconds have to be counted."""
        return any(each.model.status == "loading" for each in self.rows.values())

    def pause(self) -> None:
        """Follow no log until something is shown again: nobody sees the panel."""
        for each in self.rows.values():
            each.pause()

    def tick(self) -> None:
        """Show how long each load has taken by now, and how long each model stays."""
        for each in self.rows.values():
            each.tick()

    # -- what no event tells -----------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Ask for requests, memory and devices, if it is time to; an answer of before comes first."""
        if self._polling or time.monotonic() < self._poll_at:
            return
        self._polling = True
        live = any(each.model.status in ("loading", "loaded", "unloading") for each in self.rows.values())
        self._poll_at = time.monotonic() + (LIVE_SECONDS if live else QUIET_SECONDS)
        client = self._desk.client

        def work() -> tuple[Snapshot, Devices | None]:
            snapshot = client.snapshot()
            try:
                return snapshot, client.devices()
            except LLMKitError:
                return snapshot, None

        def done(answer: tuple[Snapshot, Devices | None]) -> None:
            self._polling = False
            snapshot, devices = answer
            self._take(snapshot)
            if devices is not None:
                assign(self._devices, value=device_bar(devices))
            else:
                again_soon()

        def failed(_: LLMKitError) -> None:
            self._polling = False  # that the server does not answer, the panel's header says
            again_soon()

        def again_soon() -> None:
            self._poll_at = min(self._poll_at, time.monotonic() + LIVE_SECONDS)

        self._desk.lane.ask(work, done, failed)

    def _take(self, snapshot: Snapshot) -> None:
        """Show what was polled: all of it if it is newer, else its counters if nothing has changed meanwhile."""
        if self._shown is None or snapshot.epoch != self._shown[0]:
            return  # another server; the events say which of the two is there now
        if snapshot.revision > self._shown[1]:
            self.update(snapshot)
        elif snapshot.revision == self._shown[1]:
            for model in snapshot.models:
                if model.config_id in self.rows:
                    self.rows[model.config_id].count(model)

    def _ask_who_keeps_them(self) -> None:
        """Mark the rows whose configuration the operator has declared."""

        def mark(configurations: list[Configuration]) -> None:
            for one in configurations:
                if one.config_id in self.rows:
                    self.rows[one.config_id].mark(declared=one.declared)

        if "write" in self._desk.may:
            self._desk.lane.ask(self._desk.client.configurations, mark)

    # -- the demo model ----------------------------------------------------------------------------------------

    def offer(self, types: list[ModelType]) -> None:
        """Say whether the demo model can run here."""
        vllm = next((one for one in types if one.name == DEMO["model_type"]), None)
        reason = "This server has no vLLM engine." if vllm is None else vllm.reason
        assign(self.try_demo, disabled=reason is not None)
        assign(self._demo_note, value=markup.hint(f"The demo model cannot run here: {reason}") if reason else "")

    def _on_demo(self) -> None:
        def begin() -> None:
            assign(self.try_demo, disabled=True)
            assign(self._demo_note, value="")
            self._desk.lane.ask(work, end, failed)

        def work() -> Model:
            self._desk.client.configure(DEMO["model_id"], DEMO["model_name"], DEMO["model_type"])
            return self._desk.client.start_loading(DEMO["model_id"])

        def end(_: Model) -> None:
            assign(self.try_demo, disabled=False)

        def failed(error: LLMKitError) -> None:
            assign(self.try_demo, disabled=False)
            assign(self._demo_note, value=markup.error_card(error))

        self._desk.lane.call(begin)


def _changes(model: Model) -> tuple[str | None, ...]:
    return model.status, model.configured_by, model.loaded_by


def _describe_rights(may: Collection[str]) -> str:
    """Say what an account may do that may not change models."""
    can = "only prompt models" if "execute" in may else "only look at models"
    return f"This account may {can}, not configure, load or unload them."
