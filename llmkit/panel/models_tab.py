"""The tab *Models*: a row for each, and a way to begin when there is none."""

from __future__ import annotations

from llmkit.client import ModelType
from llmkit.errors import LLMKitError
from llmkit.panel import markup
from llmkit.panel.desk import Desk
from llmkit.panel.model_row import ModelRow
from llmkit.panel.widgets import assign, beside_cells, show
from llmkit.schemas import Model, Snapshot

DEMO = {"model_id": "demo", "model_name": "llmkit/demo", "model_type": "vllm"}

_WELCOME = (
    '<div class="llmkit-welcome"><b>No models yet</b>'
    "<div>The demo model is small, lies in the package and knows the capitals of the world. "
    "It needs no network, no key and no GPU.</div></div>"
)


class ModelsTab:
    """Shows every model of the server."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self.rows: dict[str, ModelRow] = {}
        kit = desk.kit
        self.try_demo = kit.button("Try the demo model", self._on_demo, style="primary")
        self.try_demo.add_class("llmkit-big")
        self.configure = kit.button("Configure a model", lambda: desk.lane.call(desk.open_configure))
        self._demo_note = kit.html()
        self._welcome = kit.box(
            kit.html(_WELCOME),
            kit.row(self.try_demo, self.configure, name="llmkit-buttons"),
            self._demo_note,
            name="llmkit-start",
        )
        self._list = kit.box(name="llmkit-list")
        self.widget = kit.box(self._welcome, self._list, name="llmkit-tab")
        show(self._welcome, visible=False)
        beside_cells(self.widget)

    def update(self, snapshot: Snapshot) -> None:
        """Show the models as they are now."""
        known = {model.config_id: model for model in snapshot.models}
        for config_id in self.rows.keys() - known.keys():
            gone = self.rows.pop(config_id)
            self._arrange()
            gone.close()
        for config_id, model in known.items():
            if config_id in self.rows:
                self.rows[config_id].update(model)
            else:
                self.rows[config_id] = ModelRow(self._desk, model)
        self.rows = {config_id: self.rows[config_id] for config_id in known}
        self._arrange()
        show(self._welcome, visible=not known)

    def _arrange(self) -> None:
        assign(self._list, children=tuple(each.widget for each in self.rows.values()))

    @property
    def loading(self) -> bool:
        """Whether a load is under way, so that its seconds have to be counted."""
        return any(each.model.status == "loading" for each in self.rows.values())

    def tick(self) -> None:
        """Show how long each load has taken by now."""
        for each in self.rows.values():
            each.tick()

    def offer(self, types: list[ModelType]) -> None:
        """Say whether the demo model can run here."""
        vllm = next((one for one in types if one.name == DEMO["model_type"]), None)
        reason = "This server has no vLLM engine." if vllm is None else vllm.reason
        assign(self.try_demo, disabled=reason is not None)
        assign(self._demo_note, value=markup.hint(f"The demo model cannot run here: {reason}") if reason else "")

    # -- the demo model ----------------------------------------------------------------------------------------

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
