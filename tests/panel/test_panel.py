from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import ipywidgets as w
import pytest
from aiohttp import web
from mock_upstream import ANSWER, MockUpstream
from support import JupyterServer, wait_until

import llmkit
from llmkit.client import Client, connect
from llmkit.errors import DoesNotFit, EngineNotInstalled, NotReady
from llmkit.panel import Panel
from llmkit.panel.desk import Desk
from llmkit.panel.key_field import KeyField
from llmkit.panel.lane import Lane
from llmkit.panel.model_row import ModelRow
from llmkit.panel.prompt_tab import PromptTab, describe
from llmkit.panel.widgets import Kit
from llmkit.schemas import Snapshot

CANARY = "sk-canary-Zq3vT8wL"


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
    wait_until(lambda: not panel._lane.ticking, "the end of the clock")


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


# -- configure -----------------------------------------------------------------------------------------------------


def type_key(field: KeyField, typed: str) -> None:
    """Let the field's page answer as its JavaScript does."""
    field.send = lambda message: field._receive(
        None, {"type": "key", "request": message["request"], "value": typed}, None
    )


@pytest.fixture
def form(panel: Panel) -> Any:
    """Give the form, set to an openai model."""
    assert panel.configure is not None
    panel.configure.model_type.value = "openai"
    wait_until(lambda: "api_key" in panel.configure.essential, "the fields", 5)  # type: ignore[union-attr]
    type_key(panel.configure.essential["api_key"].control, "")
    return panel.configure


def fill(form: Any, **values: str) -> None:
    for name, value in values.items():
        form._fields()[name].control.value = value


def test_the_form_makes_the_configuration_that_was_entered(
    panel: Panel, form: Any, client: Client, upstream: MockUpstream
) -> None:
    generation = next(section for section in form.sections if section._title == "Generation defaults")
    generation.header.click()
    assert panel._lane.settle(5)
    fill(form, model_id="formed", model_name="gpt-3", base_url=upstream.base_url, temperature="0.25")
    form.save.click()
    wait_until(lambda: "formed is saved" in form._result.value, "the note", 5)
    made = next(one for one in client.configurations() if one.model_id == "formed")
    assert made.model_kwargs == {"base_url": upstream.base_url, "temperature": 0.25}
    assert form.names["model_id"].control.value == ""
    assert client.model("formed").status == "unloaded"


def test_save_and_load_does_both_and_shows_the_models(panel: Panel, form: Any, upstream: MockUpstream) -> None:
    assert panel._tabs is not None
    panel._tabs.selected_index = 1
    fill(form, model_id="formed", model_name="gpt-3", base_url=upstream.base_url)
    form.save_and_load.click()
    wait_for_status(panel, "formed", "loaded")
    wait_until(lambda: panel._tabs.selected_index == 0, "the models", 5)  # type: ignore[union-attr]


def test_what_is_missing_is_said_at_its_field(panel: Panel, form: Any) -> None:
    form.save.click()
    assert panel._lane.settle(5)
    assert "is missing" in form.names["model_id"]._error.value
    assert "is missing" in form.names["model_name"]._error.value
    assert not form.save.disabled


def test_the_servers_words_stand_at_the_field_they_are_about(panel: Panel, form: Any) -> None:
    fill(form, model_id="not a name", model_name="gpt-3", base_url="nonsense")
    form.save.click()
    wait_until(lambda: form.names["model_id"]._error.value, "the complaint", 5)
    assert "does not fit" in form.names["model_id"]._error.value
    assert not form.save.disabled
    fill(form, model_id="aname")
    form.save.click()
    wait_until(lambda: form.essential["base_url"]._error.value, "the complaint", 5)
    assert form.names["model_id"]._error.value == ""


def test_words_about_no_field_stand_under_the_form(panel: Panel, form: Any) -> None:
    form._refused(DoesNotFit("x", hint="Do <that>.", details={"fields": [{"path": "elsewhere", "message": "is odd"}]}))
    assert "elsewhere: is odd" in form._result.value
    assert "Do &lt;that&gt;." in form._result.value
    form._refused(NotReady("The server is stopping."))
    assert "The server is stopping." in form._result.value


def test_a_name_that_is_taken_is_said_at_the_name(panel: Panel, form: Any, configure: Callable[[str], None]) -> None:
    configure("formed")
    fill(form, model_id="formed", model_name="gpt-4o-mini")
    form.save.click()
    wait_until(lambda: form.names["model_id"]._error.value, "the complaint", 5)


def test_a_key_reaches_the_endpoint_and_nothing_else(
    panel: Panel, form: Any, client: Client, upstream: MockUpstream
) -> None:
    upstream.key = CANARY
    fill(form, model_id="formed", model_name="gpt-3", base_url=upstream.base_url)
    type_key(form.essential["api_key"].control, CANARY)
    form.save_and_load.click()
    wait_for_status(panel, "formed", "loaded")
    assert upstream.requests[-1][1]["Authorization"] == f"Bearer {CANARY}"
    state = json.dumps(w.Widget.get_manager_state(), default=str)
    assert CANARY not in state
    assert CANARY not in all_text(panel)
    assert CANARY not in repr(client.configurations())


def test_another_type_brings_its_own_fields_and_keeps_the_names(panel: Panel, form: Any) -> None:
    fill(form, model_id="kept", model_name="kept-too")
    old = form._essential.children
    form.model_type.value = "vllm"
    wait_until(lambda: "dtype" in form.essential, "the fields", 5)
    assert panel._lane.settle(5)
    assert "api_key" not in form.essential
    assert form.names["model_id"].control.value == "kept"
    assert all(widget.comm is None for widget in old)


def test_folds_open_and_close(panel: Panel, form: Any) -> None:
    policies = next(section for section in form.sections if section._title == "Policies")
    assert policies.fields == {}
    policies.header.click()
    assert panel._lane.settle(5)
    assert set(policies.fields) == {"description", "auto_load", "max_in_flight", "max_queued"}
    assert policies.header.description == "▾ Policies"
    policies.header.click()
    assert panel._lane.settle(5)
    assert hidden(policies._body)


# -- prompt --------------------------------------------------------------------------------------------------------


@pytest.fixture
def asking(panel: Panel, configure: Callable[[str], None], client: Client) -> Any:
    """Give the prompt tab with a loaded model chosen."""
    configure("ask")
    client.load("ask", progress=False)
    assert panel.prompt is not None
    wait_until(lambda: "ask" in panel.prompt.model.options, "the model", 5)  # type: ignore[union-attr]
    assert panel._lane.settle(5)
    panel.prompt.choose("ask")
    return panel.prompt


def wait_for_turn(prompt: Any, state: str) -> Any:
    wait_until(lambda: prompt.transcript.turns and prompt.transcript.turns[-1].state == state, f"a turn {state}", 5)
    assert prompt._desk.lane.settle(5)
    return prompt.transcript.turns[-1]


def test_an_answer_streams_in_with_its_figures(asking: Any, upstream: MockUpstream) -> None:
    asking.prompt.value = "What is the capital of France?"
    asking.system.value = " Be brief. "
    asking.temperature.switch.value = True
    asking.temperature.control.value = 0.25
    asking.send.click()
    turn = wait_for_turn(asking, "done")
    assert (turn.model_id, turn.prompt, turn.text) == ("ask", "What is the capital of France?", ANSWER)
    assert "7 tokens" in turn.note
    assert "tokens/s" in turn.note
    assert "first token after" in turn.note
    body = upstream.requests[-1][2]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert body["temperature"] == 0.25
    assert "max_tokens" not in body
    assert asking.prompt.value == ""
    assert not asking.send.disabled


def test_an_option_can_be_set_only_when_it_is_on(asking: Any) -> None:
    assert asking.max_tokens.control.disabled
    asking.max_tokens.switch.value = True
    assert asking._desk.lane.settle(5)
    assert not asking.max_tokens.control.disabled
    assert asking.max_tokens.given == {"max_tokens": 256}


def test_without_a_loaded_model_nothing_can_be_sent(client: Client, lane: Lane) -> None:
    prompt = PromptTab(Desk(client, lane, Kit(), frozenset({"read", "execute", "write"}), *[print] * 5))
    assert prompt.send.disabled
    assert not hidden(prompt._no_model)
    prompt._on_send()
    assert lane.settle(5)
    assert prompt.transcript.turns == []


def test_the_first_model_that_is_loaded_is_chosen_without_a_click(client: Client, lane: Lane) -> None:
    prompt = PromptTab(Desk(client, lane, Kit(), frozenset({"read", "execute", "write"}), *[print] * 5))
    models = [
        {"model_id": name, "config_id": name, "model_name": "n", "model_type": "t", "status": status}
        for name, status in (("a", "unloaded"), ("b", "loaded"), ("c", "loaded"))
    ]
    prompt.update(Snapshot.model_validate({"epoch": "e", "revision": 1, "models": models}))
    assert (prompt.model.options, prompt.model.value, prompt.send.disabled) == (("b", "c"), "b", False)
    prompt.update(Snapshot(epoch="e", revision=2, models=[]))
    assert (prompt.model.value, prompt.send.disabled) == (None, True)


def test_an_empty_prompt_is_not_sent(asking: Any) -> None:
    asking.prompt.value = "  \n"
    asking.send.click()
    assert asking._desk.lane.settle(5)
    assert asking.transcript.turns == []


@pytest.fixture
def endless(upstream: MockUpstream) -> MockUpstream:
    async def stream(request: web.Request, body: dict[str, Any]) -> web.StreamResponse | None:
        if not body.get("stream"):
            return None
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        upstream.open_streams += 1
        try:
            while True:
                await response.write(b'data: {"choices": [{"delta": {"content": "la "}}]}\n\n')
                await asyncio.sleep(0.01)
        finally:
            upstream.open_streams -= 1

    upstream.respond = stream
    return upstream


def test_stop_ends_the_answer_here_and_at_the_engine(asking: Any, endless: MockUpstream) -> None:
    asking.prompt.value = "Sing"
    asking.send.click()
    wait_until(lambda: asking.transcript.turns and "la la" in asking.transcript.turns[-1].text, "the song", 5)
    assert asking.send.disabled
    assert not asking.stop.disabled
    assert endless.open_streams == 1
    asking.stop.click()
    turn = wait_for_turn(asking, "done")
    assert turn.note == "Stopped."
    wait_until(lambda: endless.open_streams == 0, "the end of the generation", 2)
    assert asking.stop.disabled
    asking._on_stop()  # nothing runs: nothing happens


def test_an_answer_that_fails_says_why_and_gives_the_prompt_back(asking: Any, upstream: MockUpstream) -> None:
    async def refuse(_: web.Request, __: Any) -> web.Response:
        return web.json_response({"error": {"message": "The tokens ran out."}}, status=400)

    upstream.respond = refuse
    asking.prompt.value = "Hello"
    asking.send.click()
    turn = wait_for_turn(asking, "failed")
    assert "The tokens ran out." in turn.note
    assert asking.prompt.value == "Hello"


def test_a_choice_stays_when_other_models_come_and_go(
    asking: Any, configure: Callable[[str], None], client: Client
) -> None:
    configure("another")
    client.load("another", progress=False)
    wait_until(lambda: "another" in asking.model.options, "the other model", 5)
    assert asking.model.value == "ask"
    client.unload("another")
    wait_until(lambda: "another" not in asking.model.options, "its end", 5)
    assert asking.model.value == "ask"


def test_a_model_can_be_chosen_before_it_is_loaded(
    asking: Any, configure: Callable[[str], None], client: Client
) -> None:
    asking.choose("later")
    configure("later")
    client.load("later", progress=False)
    wait_until(lambda: asking.model.value == "later", "the choice", 5)


def test_the_transcript_can_be_cleared(asking: Any) -> None:
    asking.send.click()
    wait_for_turn(asking, "done")
    asking.clear.click()
    assert asking._desk.lane.settle(5)
    assert asking.transcript.turns == []


def test_the_figures_of_an_answer_leave_out_what_is_not_known() -> None:
    from llmkit.client import Answer
    from llmkit.schemas import Timings, Usage

    timings = Timings(queue=0, load=0, first_token=None, total=0.5, tokens_per_second=None)
    answer = Answer(response="x", model_id="m", request_id="r", timings=timings)
    assert describe(answer) == "0.50 s in all"
    answer.usage = Usage(completion_tokens=1)
    answer.finish_reason = "length"
    assert describe(answer) == "1 token · 0.50 s in all · cut off at the token limit"


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
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
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
