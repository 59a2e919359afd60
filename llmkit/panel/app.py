"""The panel itself: finds the server, holds the tabs, follows what happens."""

from __future__ import annotations

import contextlib
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ipywidgets as w
from IPython.display import display

from llmkit.client import Client, ModelType, Watcher, connect
from llmkit.client.conversations import KeptConversations
from llmkit.client.discovery import names_shared
from llmkit.errors import LLMKitError
from llmkit.panel import markup
from llmkit.panel.compare_tab import CompareTab
from llmkit.panel.configure_tab import ConfigureTab
from llmkit.panel.desk import Desk
from llmkit.panel.lane import Lane
from llmkit.panel.models_tab import ModelsTab
from llmkit.panel.prompt_tab import PromptTab
from llmkit.panel.run_card import RUN_CARD
from llmkit.panel.widgets import STATIC, Kit, assign, beside_cells, close_all, show
from llmkit.schemas import Conversation, Snapshot

if TYPE_CHECKING:
    from pandas import DataFrame

FIRST_LOOK_SECONDS = 0.8
REFRESH_TICKS = 2
"""Counters and memory are read so often, in seconds; changes of a model come by themselves."""
MODELS, CONFIGURE, PROMPT, COMPARE = range(4)
TITLES = ("Models", "Configure", "Prompt", "Compare")


def read_styles() -> str:
    """Give the style sheets of all tabs, that of the whole panel first."""
    files = sorted(STATIC.glob("*.css"), key=lambda file: (file.stem != "panel", file.stem))
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


@dataclass(frozen=True)
class Found:
    """What has to be known of a server before anything is shown."""

    client: Client
    snapshot: Snapshot
    types: list[ModelType]
    may: frozenset[str]
    conversations: KeptConversations
    latest: Conversation | None


def look(client: Client) -> Found:
    """Ask a server for all of it."""
    snapshot, types, may = client.snapshot(), client.model_types(), client.permissions()
    conversations, latest = KeptConversations(conversations=[], kept=False), None
    with contextlib.suppress(LLMKitError):  # an older server
        conversations = client.conversations()
        if conversations.conversations:  # it may be deleted just now
            latest = client.conversation(conversations.conversations[0].conversation_id)
    return Found(client, snapshot, types, may, conversations, latest)


class Panel(w.VBox):
    """Every model of the server, in a cell.

    Parameters
    ----------
    client
        The server; by default the one that `llmkit.connect` finds.
    """

    def __init__(self, client: Client | None = None) -> None:
        self._given = client
        self._client: Client | None = None
        self._watcher: Watcher | None = None
        self._lane = Lane(self._tick)
        kit = self._kit = Kit()
        self._style = kit.html(f"<style>{read_styles()}</style>")
        self._header = kit.html(markup.header("connecting", ""))
        self._kept: dict[bool, Client] = {}
        """Clients that were found, by whether they are of the shared registry; closed with the panel."""
        self._wanted: bool | None = None
        """Which registry was asked for; None is the one that `connect` takes by itself."""
        self.switch = kit.button("", self._on_switch)
        self._card = kit.html()
        self.try_again = kit.button("Try again", self._on_try_again, style="primary", tip="Look for the server again")
        self._no_server = kit.row(self._card, self.try_again, name="llmkit-no-server")
        self._body = kit.box(name="llmkit-body")
        self.models: ModelsTab | None = None
        self.configure: ConfigureTab | None = None
        self.prompt: PromptTab | None = None
        self.compare: CompareTab | None = None
        self._ticks = 0
        self._finding = False
        self._tabs: w.Tab | None = None
        # 0 asks the browser to count the views: a panel that nobody sees follows nothing.
        top = kit.row(self._header, self.switch, name="llmkit-top")
        super().__init__([self._style, top, self._no_server, self._body], _view_count=0)
        self.add_class("llmkit-panel")
        show(self._no_server, visible=False)
        show(self.switch, visible=False)
        beside_cells(self)
        self.observe(self._on_views, "_view_count")
        self._looked = threading.Event()
        self._lane.call(self._find)
        # What is shown first is usually complete then, so that nothing jumps.
        self._looked.wait(FIRST_LOOK_SECONDS)

    def __repr__(self) -> str:
        return "llmkit panel (run this cell to show it)"

    def _ipython_display_(self) -> None:
        # What is saved in the notebook: without a kernel the widget cannot be drawn, and this card takes its place.
        display({"text/html": RUN_CARD, "text/plain": repr(self)}, raw=True)  # type: ignore[no-untyped-call]
        display({**self._repr_mimebundle_(), "text/plain": ""}, raw=True)  # type: ignore[no-untyped-call]

    def comparison(self) -> DataFrame:
        """Give what the tab *Compare* has measured, a row for each answer.

        Raises
        ------
        LLMKitError
            If pandas is not installed, or there is no server.
        """
        if self.compare is None:
            raise LLMKitError("The panel has no server.", hint="Press Try again in it.")
        return self.compare.to_dataframe()

    def close(self) -> None:
        """Keep what was written, end what runs, and take the panel away."""
        self._lane.call(self._end)
        self._lane.close()

    def _end(self) -> None:
        if self.prompt and self.compare:
            self.prompt.tick()
            self.prompt.stop_answer()
            self.compare.stop_answers()
        self._leave()
        for child in self.children:
            close_all(child)
        super().close()

    # -- the server --------------------------------------------------------------------------------------------

    def _find(self) -> None:
        if self._finding or self._client is not None:
            return  # pressed twice
        self._finding = True
        assign(self.try_again, disabled=True)
        wanted = self._wanted
        kept = self._given if wanted is None else self._kept.get(wanted)

        def work() -> Found:
            client = kept or connect(shared=wanted)
            try:
                return look(client)
            except BaseException:
                if kept is None:
                    client.close()
                raise

        self._lane.ask(work, self._found, self._not_found)

    def _found(self, found: Found) -> None:
        self._finding = False
        assign(self.try_again, disabled=False)
        show(self._no_server, visible=False)
        self._client = found.client
        self._kept.setdefault(found.client.shared, found.client)
        self._offer_switch(shared=found.client.shared)
        self._build(found.client, found.may)
        assign(self._header, value=self._head("connected"))
        self._show(found.snapshot)
        self._watch()
        if self.models and self.configure and self.prompt:
            self.models.offer(found.types)
            self.configure.offer(found.types)
            self.prompt.restore(found.conversations, found.latest)
        self._looked.set()

    def _not_found(self, error: LLMKitError) -> None:
        self._finding = False
        assign(self.try_again, disabled=False)
        assign(self._header, value=markup.header("lost", ""))
        assign(self._card, value=markup.no_server(error))
        show(self._no_server, visible=True)
        self._looked.set()

    def _head(self, state: str) -> str:
        client = self._client
        if client is None:
            return markup.header(state, "")
        own = "Your own registry" if names_shared(os.environ) else ""
        return markup.header(state, client.url, "Shared registry" if client.shared else own)

    def _offer_switch(self, *, shared: bool) -> None:
        """Offer the other of two registries, where the Hub names one that many people share."""
        which = "False" if shared else "True"
        assign(
            self.switch,
            description="Show your own registry" if shared else "Show the shared registry",
            tooltip=f"As code: llmkit.panel(llmkit.connect(shared={which}))",
        )
        show(self.switch, visible=shared or names_shared(os.environ))

    def _on_switch(self) -> None:
        def switch() -> None:
            if self._finding:
                return
            shown = self._client.shared if self._client is not None else bool(self._wanted)
            self._wanted = not shown
            self._unwatch()
            if self.prompt and self.compare:
                self.prompt.stop_answer()
                self.compare.stop_answers()
            gone, self._body.children = self._body.children, ()
            self.models = self.configure = self.prompt = self.compare = self._tabs = self._client = None
            for each in gone:
                close_all(each)
            self._offer_switch(shared=self._wanted)
            assign(self._header, value=markup.header("connecting", ""))
            self._find()

        self._lane.call(switch)

    def _on_try_again(self) -> None:
        self._lane.call(self._find)

    def _build(self, client: Client, may: frozenset[str]) -> None:
        desk = Desk(
            client,
            self._lane,
            self._kit,
            may,
            open_configure=lambda: self._open(CONFIGURE),
            edit=lambda config_id: self._open_form(config_id, as_copy=False),
            duplicate=lambda config_id: self._open_form(config_id, as_copy=True),
            open_models=lambda: self._open(MODELS),
            open_prompt=self._open_prompt,
        )
        self.models, self.configure = ModelsTab(desk), ConfigureTab(desk)
        self.prompt, self.compare = PromptTab(desk), CompareTab(desk)
        tabs = [each.widget for each in (self.models, self.configure, self.prompt, self.compare)]
        self._tabs = self._kit.make(w.Tab, tabs, titles=TITLES, selected_index=MODELS)
        self._tabs.observe(lambda change: self._lane.call(lambda: self._opened(change["new"])), "selected_index")
        beside_cells(self._tabs)
        self._body.children = (self._tabs,)

    def _opened(self, tab: int | None) -> None:
        if self.compare is not None and tab == COMPARE:
            self.compare.open()

    def _open(self, tab: int) -> None:
        if self._tabs is not None:
            self._tabs.selected_index = tab

    def _open_form(self, config_id: str, *, as_copy: bool) -> None:
        if self.configure is not None:
            self.configure.open(config_id, as_copy=as_copy)
        self._open(CONFIGURE)

    def _open_prompt(self, model_id: str) -> None:
        if self.prompt is not None:
            self.prompt.choose(model_id)
        self._open(PROMPT)

    # -- following ---------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        self._unwatch()
        if self._client is not None:
            self._lane.ticking = True
            self._watcher = Watcher(self._client)
            self._watcher.subscribe(lambda watcher: self._lane.call(lambda: self._follow(watcher)))

    def _unwatch(self) -> None:
        self._lane.ticking = False
        if self.models and self.prompt:
            self.models.pause()
            self.prompt.tick()
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            self._lane.ask(watcher.close)

    def _leave(self) -> None:
        watcher, clients = self._watcher, [one for one in self._kept.values() if one is not self._given]
        self._watcher = self._client = None
        self._kept = {}

        def work() -> None:
            if watcher is not None:
                watcher.close()
            for client in clients:
                client.close()

        self._lane.ask(work)

    def _follow(self, watcher: Watcher) -> None:
        if watcher is not self._watcher or self._client is None:
            return
        assign(self._header, value=self._head(watcher.state))
        connected = watcher.state == "connected"
        (self._body.remove_class if connected else self._body.add_class)("llmkit-stale")
        if connected and watcher.snapshot is not None:
            self._show(watcher.snapshot)

    def _show(self, snapshot: Snapshot) -> None:
        if self.models and self.prompt and self.compare:
            self.models.update(snapshot)
            self.prompt.update(snapshot)
            self.compare.update(snapshot)

    def _tick(self) -> None:
        if self._watcher is None or self._watcher.state != "connected":
            return
        self._ticks += 1
        if self.models and self.prompt:
            self.models.tick()
            self.prompt.tick()
            if self._ticks % REFRESH_TICKS == 0:
                self.models.refresh()

    def _on_views(self, change: dict[str, int]) -> None:
        if change["new"] == 0:
            self._lane.call(self._unwatch)
        elif change["old"] == 0:
            self._lane.call(lambda: None if self._watcher else self._watch())
