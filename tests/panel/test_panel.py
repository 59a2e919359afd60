from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import ipywidgets as w
import pytest
from aiohttp import web
from mock_upstream import MockUpstream
from support import JupyterServer, free_port, wait_until

import llmkit
from llmkit.client import Client, connect
from llmkit.errors import EngineNotInstalled, NotReady
from llmkit.panel import Panel
from llmkit.panel.model_row import ModelRow


def hidden(widget: w.DOMWidget) -> bool:
    return "llmkit-hidden" in widget._dom_classes


def row_of(panel: Panel, model_id: str) -> ModelRow:
    def find() -> ModelRow | None:
        assert panel.models is not None
        return next((row for row in list(panel.models.rows.values()) if row.model.model_id == model_id), None)

    return wait_until(lambda: find() or False, f"the row of {model_id}", 5) or pytest.fail("no row")


def wait_for_status(panel: Panel, model_id: str, status: str) -> ModelRow:
    row = row_of(panel, model_id)
    wait_until(lambda: row.model.status == status and not row._asking, f"{model_id} {status}", 10)
    assert panel._lane.settle(5)
    return row


def all_text(widget: w.Widget) -> str:
    own = " ".join(str(getattr(widget, name, "")) for name in ("value", "description", "tooltip"))
    return " ".join([own, *(all_text(child) for child in getattr(widget, "children", ()))])


def test_the_module_is_the_function_whichever_way_it_is_reached() -> None:
    import importlib

    module = importlib.import_module("llmkit.panel")
    assert callable(module)
    assert callable(llmkit.panel)


def test_a_call_gives_a_panel_that_is_complete_when_it_is_shown_first(
    server: JupyterServer, client: Client, configure: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    configure("ask")
    monkeypatch.setenv("LLMKIT_SERVER_URL", server.url)
    monkeypatch.setenv("LLMKIT_TOKEN", server.token)
    started = time.monotonic()
    made = llmkit.panel()
    seconds = time.monotonic() - started
    try:
        assert made.models is not None
        assert [row.model.model_id for row in made.models.rows.values() if row.model.model_id != "demo"] == ["ask"]
        assert "Connected" in made._header.value
        assert "panel" in repr(made)
        print(f"panel made in {seconds:.2f} s")
    finally:
        made.close()


def test_a_kernel_without_a_server_gets_a_card_and_may_try_again(
    server: JupyterServer, client: Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    made = Panel()
    try:
        wait_until(lambda: not hidden(made._no_server), "the card", 5)
        for part in ("No Jupyter server with llmkit was found", "JPY_PARENT_PID", "jupyter lab"):
            assert part in made._card.value
        monkeypatch.setenv("LLMKIT_SERVER_URL", server.url)
        monkeypatch.setenv("LLMKIT_TOKEN", server.token)
        made.try_again.click()
        wait_until(lambda: made.models is not None, "the tabs", 5)
        assert made._lane.settle(5)
        assert hidden(made._no_server)
    finally:
        made.close()


# -- models --------------------------------------------------------------------------------------------------------


def test_what_others_do_is_shown_within_a_second(panel: Panel, server: JupyterServer, upstream: MockUpstream) -> None:
    fields = {"model_name": "gpt-3", "model_type": "openai", "model_kwargs": {"base_url": upstream.base_url}}

    def shown() -> set[str]:
        assert panel.models is not None
        return set(panel.models.rows)

    delays = []
    for _ in range(5):
        config_id = server.configure("seen", **fields)
        started = time.monotonic()
        wait_until(lambda config_id=config_id: config_id in shown(), "the row", 2, 0.01)
        delays.append(time.monotonic() - started)
        server.request("DELETE", f"llm/configuration/{config_id}")
        started = time.monotonic()
        wait_until(lambda config_id=config_id: config_id not in shown(), "the deletion", 2, 0.01)
        delays.append(time.monotonic() - started)
    print(f"a change is drawn after {max(delays):.3f} s at most")
    assert max(delays) <= 1.0


def test_a_model_is_loaded_asked_unloaded_and_deleted_by_clicks(
    panel: Panel, configure: Callable[[str], None], client: Client
) -> None:
    configure("ask")
    row = row_of(panel, "ask")
    assert not hidden(row.load)
    assert hidden(row.unload)
    row.load.click()
    wait_for_status(panel, "ask", "loaded")
    assert (hidden(row.load), hidden(row.unload), hidden(row.ask)) == (True, False, False)
    row.ask.click()
    assert panel._lane.settle(5)
    assert panel._tabs is not None
    assert panel.prompt is not None
    assert (panel._tabs.selected_index, panel.prompt.model.value) == (2, "ask")
    row.unload.click()
    wait_for_status(panel, "ask", "unloaded")
    assert "Unloaded" in row._note.value
    row.delete.click()
    assert panel._lane.settle(5)
    assert not hidden(row._confirmation)
    assert "Delete ask?" in row._question.value
    row.keep.click()
    assert panel._lane.settle(5)
    assert hidden(row._confirmation)
    assert client.model("ask").status == "unloaded"
    row.delete.click()
    row.confirm.click()
    wait_until(lambda: "ask" not in [m.model_id for m in client.models()], "the deletion", 5)
    wait_until(lambda: row.widget.comm is None, "the end of the row", 5)


def test_deleting_a_loaded_model_says_that_it_is_unloaded_first(
    panel: Panel, configure: Callable[[str], None], client: Client
) -> None:
    configure("ask")
    client.load("ask", progress=False)
    row = wait_for_status(panel, "ask", "loaded")
    row.delete.click()
    assert panel._lane.settle(5)
    assert "unloaded first" in row._question.value
    row.confirm.click()
    wait_until(lambda: "ask" not in [m.model_id for m in client.models()], "the deletion", 5)


def test_a_failed_load_shows_a_card_and_can_be_tried_again(panel: Panel, client: Client) -> None:
    client.configure("ask", "gpt-3", "openai", {"base_url": "http://127.0.0.1:9/v1"})
    row = row_of(panel, "ask")
    row.load.click()
    wait_for_status(panel, "ask", "failed")
    assert "127.0.0.1:9" in row._error.value
    assert 'role="alert"' in row._error.value
    assert row.load.description == "Load again"
    client.unload("ask")
    wait_for_status(panel, "ask", "unloaded")
    assert row._error.value == ""


class Held:
    """Holds the upstream's list of models back, and with it every load, until it is let go."""

    def __init__(self, upstream: MockUpstream) -> None:
        self.go = threading.Event()
        upstream.respond = self._respond

    async def _respond(self, request: web.Request, _: dict[str, Any]) -> None:
        if request.path == "/v1/models":
            await asyncio.to_thread(self.go.wait, 10)


@pytest.fixture
def held(upstream: MockUpstream) -> Iterator[Held]:
    holding = Held(upstream)
    yield holding
    holding.go.set()


def test_a_load_shows_its_phase_and_its_seconds_and_can_be_cancelled(
    panel: Panel, configure: Callable[[str], None], held: Held
) -> None:
    configure("ask")
    row = row_of(panel, "ask")
    row.load.click()
    wait_until(lambda: "Starting the engine" in row._label.value, "the phase", 5)
    assert not hidden(row._progress)
    assert hidden(row.delete)
    assert panel._lane.ticking
    wait_until(lambda: "2 s" in row._label.value, "the seconds", 4)
    row.cancel.click()
    wait_for_status(panel, "ask", "unloaded")
    assert "cancelled" in row._note.value
    assert hidden(row._progress)


def test_a_refused_click_says_why_and_leaves_the_buttons_usable(
    panel: Panel, configure: Callable[[str], None], client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure("ask")
    row = row_of(panel, "ask")

    def refuse(_: str) -> None:
        raise NotReady("Not <now>.", hint="Later.")

    monkeypatch.setattr(client, "start_loading", refuse)
    row.load.click()
    wait_until(lambda: "Not &lt;now&gt;." in row._note.value, "the refusal", 5)
    assert not row.load.disabled


def test_a_click_while_another_is_on_its_way_is_ignored(
    panel: Panel, configure: Callable[[str], None], client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure("ask")
    row = row_of(panel, "ask")
    go, calls = threading.Event(), []

    def slow(model_id: str) -> None:
        calls.append(model_id)
        go.wait(5)

    monkeypatch.setattr(client, "start_loading", slow)
    row.load.click()
    row.load.click()
    assert panel._lane.settle(5)
    assert row.load.disabled
    go.set()
    wait_until(lambda: not row._asking, "the answer", 5)
    assert calls == ["ask"]


def test_the_demo_model_is_one_click_when_there_is_nothing_yet(
    panel: Panel, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert panel.models is not None
    done: list[Any] = []
    monkeypatch.setattr(client, "configure", lambda *args: done.append(args))
    monkeypatch.setattr(client, "start_loading", done.append)
    panel.models.try_demo.disabled = False
    panel.models.try_demo.click()
    wait_until(lambda: len(done) == 2, "the two requests", 5)
    assert done == [("demo", "llmkit/demo", "vllm"), "demo"]


def test_where_the_demo_model_cannot_run_the_button_says_why(panel: Panel, client: Client) -> None:
    assert panel.models is not None
    types = client.model_types()
    for one in types:
        if one.name == "vllm":
            one.available, one.reason = False, str(EngineNotInstalled("vLLM runs on Linux only."))
    panel.models.offer(types)
    assert panel.models.try_demo.disabled
    assert "vLLM runs on Linux only." in panel.models._demo_note.value
    panel.models.offer([one for one in types if one.name != "vllm"])
    assert "no vLLM engine" in panel.models._demo_note.value


# -- always true ---------------------------------------------------------------------------------------------------


def test_a_panel_that_nobody_sees_follows_nothing_and_begins_again_when_it_is_seen(
    panel: Panel, configure: Callable[[str], None]
) -> None:
    panel._view_count = 1
    watcher = panel._watcher
    assert watcher is not None
    panel._view_count = 0
    wait_until(lambda: panel._watcher is None, "the end of the watch", 5)
    wait_until(lambda: not watcher._thread.is_alive(), "the end of its thread", 10)
    configure("meanwhile")
    panel._view_count = 1
    row_of(panel, "meanwhile")


def test_a_server_that_goes_is_shown_and_joined_again_when_it_comes_back() -> None:
    port = free_port()
    with JupyterServer("server", port=port) as server:
        client = connect(server.url, server.token)
        made = Panel(client)
        try:
            wait_until(lambda: "Connected" in made._header.value, "the connection")
            server.stop()
            wait_until(lambda: "does not answer" in made._header.value, "the loss", 5)
            assert "llmkit-stale" in made._body._dom_classes
            server.start()
            wait_until(lambda: "Connected" in made._header.value, "the return", 8)
            assert "llmkit-stale" not in made._body._dom_classes
            server.configure("late", model_type="openai", model_name="x")
            row_of(made, "late")
        finally:
            made.close()
            client.close()


def test_closing_ends_every_thread_of_the_panel(client: Client) -> None:
    made = Panel(client)
    wait_until(lambda: made._watcher is not None, "the watch")
    watcher = made._watcher
    made.close()
    made._lane._thread.join(5)
    assert not made._lane._thread.is_alive()
    wait_until(lambda: watcher is not None and not watcher._thread.is_alive(), "the end of the watch", 10)
