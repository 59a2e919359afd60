"""The tab *Models* against a real server, whose model type ``fake`` has engines that are real processes."""

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
from fake_engine_type import PLUGIN
from mock_upstream import MockUpstream
from support import JupyterServer, wait_until

from llmkit.client import Client, Watcher, connect
from llmkit.errors import NotReady
from llmkit.panel import Panel
from llmkit.panel.asking import Asking
from llmkit.panel.desk import Desk
from llmkit.panel.lane import Lane
from llmkit.panel.log_drawer import KEPT_LINES, LogDrawer, plain
from llmkit.panel.model_row import ModelRow, with_arguments
from llmkit.panel.models_tab import ModelsTab
from llmkit.panel.transcript import Transcript
from llmkit.panel.widgets import Kit
from llmkit.schemas import Devices, Snapshot

EVERYTHING = frozenset({"read", "execute", "write"})
DECLARED = {
    "model_id": "kept",
    "model_name": "gpt-3",
    "model_type": "openai",
    "model_kwargs": {"base_url": "http://x/v1"},
}


@pytest.fixture(scope="module")
def server() -> Iterator[JupyterServer]:
    """Give a real server with the model type ``fake``."""
    with JupyterServer(env=PLUGIN) as running:
        yield running


class Stage:
    """A tab that follows the server, and what it asked of the other tabs."""

    def __init__(self, client: Client, lane: Lane, may: frozenset[str] = EVERYTHING) -> None:
        self.lane = lane
        self.asked: list[tuple[str, str]] = []
        self.tab = ModelsTab(
            Desk(
                client,
                lane,
                Kit(),
                may,
                open_configure=lambda: self.asked.append(("configure", "")),
                edit=lambda config_id: self.asked.append(("edit", config_id)),
                duplicate=lambda config_id: self.asked.append(("duplicate", config_id)),
                open_models=lambda: self.asked.append(("models", "")),
                open_prompt=lambda model_id: self.asked.append(("prompt", model_id)),
            )
        )
        self.watcher = Watcher(client)
        self.watcher.subscribe(lambda watcher: self.show(watcher.snapshot))

    def show(self, snapshot: Snapshot | None) -> None:
        if snapshot is not None:
            self.lane.call(lambda: self.tab.update(snapshot))

    def row(self, model_id: str) -> ModelRow:
        def find() -> ModelRow | None:
            return next((row for row in list(self.tab.rows.values()) if row.model.model_id == model_id), None)

        return wait_until(lambda: find() or False, f"the row of {model_id}", 20) or pytest.fail("no row")

    def status(self, model_id: str, status: str) -> ModelRow:
        row = self.row(model_id)
        wait_until(lambda: row.model.status == status and not row._asking, f"{model_id} {status}", 30)
        self.settle()
        return row

    def settle(self) -> None:
        assert self.lane.settle(5)

    def click(self, button: w.Button) -> None:
        assert not button.disabled
        button.click()
        self.settle()

    def refresh(self) -> None:
        """Poll as the panel's clock does, and wait for the answer."""
        wait_until(lambda: not self.tab._polling, "the answer to an earlier question", 10)
        self.tab._poll_at = 0.0
        self.lane.call(self.tab.refresh)
        self.settle()
        wait_until(lambda: not self.tab._polling, "the answer", 10)

    def close(self) -> None:
        self.watcher.close()
        for row in self.tab.rows.values():
            row.close()


@pytest.fixture
def stage(client: Client, lane: Lane) -> Iterator[Stage]:
    made = Stage(client, lane)
    yield made
    made.close()


def shown(widget: w.DOMWidget) -> bool:
    return "llmkit-hidden" not in widget._dom_classes


def fake(client: Client, *options: str, **fields: Any) -> None:
    """Configure ``local``, a model whose engine is a process with these options."""
    client.configure("local", " ".join(("any", *options)), "fake", **fields)


# -- what is newer -----------------------------------------------------------------------------------------------


def told(revision: int, epoch: str = "e", **fields: Any) -> Snapshot:
    model = {"model_id": "m", "config_id": "c", "model_name": "n", "model_type": "t", "status": "loaded", **fields}
    return Snapshot.model_validate({"epoch": epoch, "revision": revision, "models": [model]})


@pytest.fixture
def alone(client: Client, lane: Lane) -> ModelsTab:
    """Give a tab that shows revision 5 and is told nothing."""
    tab = ModelsTab(Desk(client, lane, Kit(), frozenset({"read", "execute"}), *[print] * 5))
    tab.update(told(5))
    return tab


def test_an_older_state_never_replaces_a_newer_one(alone: ModelsTab) -> None:
    alone.update(told(4, status="loading"))
    alone._take(told(4, status="loading", in_flight=3))
    assert (alone.rows["c"].model.status, alone.rows["c"].model.in_flight) == ("loaded", 0)


def test_of_the_same_state_only_the_counters_are_taken(alone: ModelsTab) -> None:
    alone._take(told(5, status="unloaded", in_flight=2, queued=1, memory={"pss_bytes": 1 << 30}))
    row = alone.rows["c"]
    assert row.model.status == "loaded"
    assert "1.0 GiB RAM · 2 running, 1 waiting" in row._facts.value


def test_counters_stay_when_an_event_is_about_another_model(alone: ModelsTab) -> None:
    alone._take(told(5, in_flight=2))
    alone.update(told(6))  # the watcher has no newer word of this model
    assert alone.rows["c"].model.in_flight == 2
    alone.update(told(7, status="unloading"))
    assert alone.rows["c"].model.status == "unloading"


def test_a_newer_state_is_taken_as_a_whole(alone: ModelsTab) -> None:
    alone._take(told(9, status="unloading"))
    assert alone.rows["c"].model.status == "unloading"
    alone.update(told(8))
    assert alone.rows["c"].model.status == "unloading"


def test_an_answer_of_another_server_is_left_to_the_events(alone: ModelsTab) -> None:
    alone._take(told(100, epoch="before", status="failed"))
    assert alone.rows["c"].model.status == "loaded"
    alone.update(told(1, epoch="after", status="unloaded"))
    assert alone.rows["c"].model.status == "unloaded"


# -- polling -----------------------------------------------------------------------------------------------------


def test_requests_and_memory_are_read_while_a_model_answers(
    stage: Stage, client: Client, upstream: MockUpstream, configure: Callable[[str], None]
) -> None:
    go, asked = threading.Event(), threading.Event()

    async def hold(request: web.Request, _: dict[str, Any]) -> None:
        if request.path == "/v1/chat/completions":
            asked.set()
            await asyncio.to_thread(go.wait, 10)

    upstream.respond = hold
    configure("ask")
    client.load("ask", progress=False)
    row = stage.status("ask", "loaded")
    assert "no requests" in row._facts.value
    asking = threading.Thread(target=client.prompt, args=("ask", "What?"))
    asking.start()
    try:
        assert asked.wait(5)
        wait_until(lambda: stage.refresh() or "1 running" in row._facts.value, "the request", 5)
    finally:
        go.set()
        asking.join()
    wait_until(lambda: stage.refresh() or "no requests" in row._facts.value, "its end", 5)


def test_when_a_model_goes_is_counted_down(stage: Stage, client: Client, upstream: MockUpstream) -> None:
    client.configure("ask", "gpt-3", "openai", {"base_url": upstream.base_url}, idle_ttl=240)
    client.load("ask", progress=False)
    row = stage.status("ask", "loaded")
    assert "unloads in 4 min if idle" in row._facts.value
    row.model = row.model.model_copy(update={"expires_at": row.model.loaded_at})
    stage.lane.call(stage.tab.tick)
    stage.settle()
    assert "unloads now if idle" in row._facts.value


def test_the_machine_is_shown_with_the_share_of_a_model_as_soon_as_it_is_loaded(stage: Stage, client: Client) -> None:
    wait_until(lambda: "used" in stage.tab._devices.value, "the machine", 5)
    fake(client)
    client.load("local", progress=False)
    row = stage.status("local", "loaded")
    wait_until(lambda: "<span>local</span>" in stage.tab._devices.value, "the share", 5)
    wait_until(lambda: "MiB RAM" in row._facts.value, "the memory", 5)


def test_a_loaded_model_and_each_of_its_answers_say_the_version_of_the_engine(stage: Stage, client: Client) -> None:
    fake(client, "--version=1.2.3")
    assert ">fake · any" in stage.status("local", "unloaded")._facts.value
    client.load("local", progress=False)
    row = stage.status("local", "loaded")
    assert ">fake 1.2.3 · any --version=1.2.3 · " in row._facts.value
    transcript, ended = Transcript(), threading.Event()
    body = {"model_id": "local", "prompt": "Hello", "inference_kwargs": {}}
    stage.lane.call(lambda: Asking(row._desk, transcript).begin(body, lambda _: ended.set()))
    assert ended.wait(30)
    assert transcript.turns[-1].note.endswith(" in all · fake 1.2.3")
    client.unload("local")
    assert ">fake · any" in stage.status("local", "unloaded")._facts.value


def test_one_question_at_a_time_and_rarely_while_nothing_is_loaded(
    stage: Stage, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, calls = threading.Event(), []

    def slow() -> Devices:
        calls.append(1)
        assert go.wait(10)
        raise NotReady("Not now.")

    def seen() -> bool:
        stage.lane.call(stage.tab.refresh)  # as the panel's clock does
        return "used" in stage.tab._devices.value

    wait_until(seen, "the machine")
    stage.settle()
    stage.tab._poll_at = 0.0
    monkeypatch.setattr(client, "devices", slow)
    for _ in range(3):
        stage.lane.call(stage.tab.refresh)
    wait_until(lambda: calls, "the question")
    stage.settle()
    go.set()
    wait_until(lambda: not stage.tab._polling, "the answer")
    stage.lane.call(stage.tab.refresh)
    stage.settle()
    assert not stage.tab._polling
    assert len(calls) == 1
    stage.refresh()  # once it is time again
    assert len(calls) == 2


def test_a_server_that_does_not_answer_ends_no_polling(
    stage: Stage, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> Snapshot:
        raise NotReady("Not now.")

    wait_until(lambda: "used" in stage.tab._devices.value, "the machine")
    monkeypatch.setattr(client, "snapshot", refuse)
    stage.refresh()
    stage.tab._devices.value = ""
    monkeypatch.undo()
    stage.refresh()
    assert "used" in stage.tab._devices.value


# -- buttons -----------------------------------------------------------------------------------------------------


def test_edit_and_duplicate_open_the_form(stage: Stage, configure: Callable[[str], None]) -> None:
    configure("ask")
    row = stage.row("ask")
    stage.click(row.edit)
    stage.click(row.duplicate)
    assert stage.asked == [("edit", row.model.config_id), ("duplicate", row.model.config_id)]


def test_what_the_operator_declared_says_why_it_cannot_be_changed(lane: Lane) -> None:
    declaring = JupyterServer()
    config = declaring.folder / "config" / "jupyter_llmkit_config.json"
    config.write_text(json.dumps({"LLMKitApp": {"configurations": [DECLARED]}}))
    with declaring:
        client = connect(declaring.url, declaring.token)
        stage = Stage(client, lane)
        try:
            row = stage.row("kept")
            wait_until(lambda: row.declared, "the mark", 5)
            stage.click(row.edit)
            assert "The operator of this server declared kept, so it cannot be changed" in row._note.value
            stage.click(row.delete)
            assert "cannot be deleted" in row._note.value
            assert not shown(row._confirmation)
            stage.click(row.duplicate)
            assert stage.asked == [("duplicate", row.model.config_id)]
        finally:
            stage.close()
            client.close()


def test_a_button_that_the_server_would_refuse_says_why(stage: Stage, configure: Callable[[str], None]) -> None:
    configure("ask")
    told = stage.row("ask").model.model_copy(update={"status": "loaded", "loaded_by": "ada"})
    why = {"unload": "The load is that of ada.", "delete": "The load is that of ada."}
    row = ModelRow(stage.tab._desk, told.model_copy(update={"refuses": why}))  # as a shared server tells it
    try:
        assert (row.unload.disabled, row.unload.tooltip) == (True, why["unload"])
        assert (row.delete.disabled, row.delete.tooltip) == (True, why["delete"])
        assert not any(each.disabled for each in (row.ask, row.edit, row.duplicate))
        row.update(told.model_copy(update={"reason": "an event"}))  # which says nothing of it
        assert row.unload.disabled
        row.count(told.model_copy(update={"refuses": {}}))
        assert (row.unload.disabled, row.unload.tooltip) == (False, "Unload ask")
    finally:
        row.close()


@pytest.mark.parametrize("may", [{"read"}, {"read", "execute"}])
def test_who_may_not_change_models_gets_no_button_that_would(
    may: set[str], client: Client, lane: Lane, configure: Callable[[str], None]
) -> None:
    stage = Stage(client, lane, frozenset(may))
    try:
        wait_until(lambda: shown(stage.tab._welcome), "the state")
        assert not shown(stage.tab._begin)
        configure("ask")
        client.load("ask", progress=False)
        row = stage.status("ask", "loaded")
        buttons = (row.ask, row.load, row.cancel, row.unload, row.edit, row.duplicate, row.delete)
        visible = [button.description for button in buttons if shown(button)]
        assert visible == (["Ask"] if "execute" in may else [])
        assert "This account may only" in stage.tab._rights.value
        client.unload("ask")
        stage.status("ask", "unloaded")
        assert not shown(row.load)
    finally:
        stage.close()


def test_the_code_is_that_of_what_can_be_done_now(
    stage: Stage, client: Client, configure: Callable[[str], None]
) -> None:
    configure("ask")
    row = stage.row("ask")
    stage.click(row.code)
    view = row._code
    assert view is not None

    def titles() -> list[str]:
        return [title for title, _ in view.widget._code]

    assert titles() == ["Load", "Show the log", "Delete"]
    client.load("ask", progress=False)
    stage.status("ask", "loaded")
    assert titles() == ["Unload", "Show the log", "Delete"]
    assert view.widget._code[2][1].python.endswith('client.delete("ask", unload=True)\n')
    assert view.widget in row.widget.children
    view.widget.unfolded = False  # as its own fold does
    stage.settle()
    stage.settle()
    assert view.widget not in row.widget.children
    assert row.code.description == "Code"
    stage.click(row.code)
    stage.click(row.code)
    assert row._code is None


# -- fixes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
def test_a_fix_is_one_click_and_keeps_everything_else(stage: Stage, client: Client, nested: bool) -> None:
    engine, generation = {"max_model_len": 2048, "dtype": "float32"}, {"temperature": 0.5}
    kwargs = {"engine": engine, "generation": generation} if nested else {**engine, **generation}
    client.configure("local", "any --kv-cache-tokens=1024", "fake", kwargs, description="Mine", idle_ttl=900)
    row = stage.row("local")
    stage.click(row.load)
    stage.status("local", "failed")
    assert shown(row._fix_row)
    assert row.fix.description == "Set max_model_len to 1024 and load again"
    assert (row.fix.button_style, row.load.button_style) == ("primary", "")
    row.fix.click()
    stage.status("local", "loaded")
    assert not shown(row._fix_row)
    now = client.configuration(row.model.config_id)
    engine["max_model_len"] = 1024
    assert now.model_kwargs == ({"engine": engine, "generation": generation} if nested else {**engine, **generation})
    assert (now.description, now.idle_ttl) == ("Mine", 900)


def test_a_fix_keeps_the_key(stage: Stage, client: Client, upstream: MockUpstream) -> None:
    upstream.key = "sk-canary-fix"
    kwargs = {"base_url": upstream.base_url, "api_key": upstream.key}
    client.configure("ask", "gpt-3", "openai", kwargs)
    client.load("ask", progress=False)
    row = stage.status("ask", "loaded")
    error = {"code": "x", "message": "It was too long.", "fix": {"model_kwargs": {"engine": {"api": "chat"}}}}
    client.unload("ask")
    stage.status("ask", "unloaded")
    failed = row.model.model_copy(update={"status": "failed"}).model_dump() | {"error": error}
    stage.lane.call(lambda: row.update(type(row.model).model_validate(failed)))
    stage.settle()
    stage.click(row.fix)
    stage.status("ask", "loaded")
    assert client.prompt("ask", "What?").response
    assert client.configuration(row.model.config_id).model_kwargs["api"] == "chat"


def test_a_failure_without_a_fix_has_no_such_button(stage: Stage, client: Client) -> None:
    fake(client, "--die-at=weights")
    row = stage.row("local")
    stage.click(row.load)
    stage.status("local", "failed")
    assert not shown(row._fix_row)
    assert row.load.button_style == "primary"


def test_arguments_are_set_where_the_configuration_keeps_them() -> None:
    new = {"max_model_len": 1}
    assert with_arguments({"max_model_len": 2, "dtype": "x"}, new) == {"max_model_len": 1, "dtype": "x"}
    assert with_arguments({"engine": {"dtype": "x"}}, new) == {"engine": {"dtype": "x", "max_model_len": 1}}
    mixed = {"engine": {"dtype": "x"}, "max_model_len": 2}
    assert with_arguments(mixed, new) == {"engine": {"dtype": "x"}, "max_model_len": 1}
    assert mixed["max_model_len"] == 2


# -- logs --------------------------------------------------------------------------------------------------------


def log_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "llmkit-panel-log"]


def open_log(stage: Stage, model_id: str) -> LogDrawer:
    row = stage.row(model_id)
    stage.click(row.log)
    assert row._drawer is not None
    return row._drawer


def test_the_log_follows_the_engine_and_ends_with_the_drawer(stage: Stage, client: Client) -> None:
    fake(client, "--phase-seconds=0.3")
    drawer = open_log(stage, "local")
    assert "No lines yet" in drawer.note
    client.start_loading("local")
    wait_until(lambda: any("Starting to load model" in line for line in drawer.lines), "the first lines", 10)
    stage.status("local", "loaded")
    wait_until(lambda: any("Starting vLLM server" in line for line in drawer.lines), "the last lines", 5)
    assert drawer.note == ""
    row = stage.row("local")
    assert row.log.description == "Close log"
    started = time.monotonic()
    stage.click(row.log)
    wait_until(lambda: not log_threads(), "the end of the thread", 5)
    assert time.monotonic() - started < 2
    assert row._drawer is None
    assert drawer not in row.widget.children
    assert row.log.description == "Log"


@pytest.mark.parametrize("end", ["row", "widget"])
def test_a_log_ends_with_its_row(stage: Stage, client: Client, end: str) -> None:
    fake(client)
    drawer = open_log(stage, "local")
    wait_until(log_threads, "the thread")
    row = stage.row("local")
    row.close() if end == "row" else drawer.close()
    wait_until(lambda: not log_threads(), "the end of the thread", 5)


def test_a_log_ends_with_the_panel(client: Client) -> None:
    fake(client)
    panel = Panel(client)
    wait_until(lambda: panel.models is not None and panel.models.rows, "the row")
    assert panel.models is not None
    next(iter(panel.models.rows.values())).log.click()
    wait_until(log_threads, "the thread")
    assert panel._lane.settle(5)
    panel.close()
    wait_until(lambda: not log_threads(), "the end of the thread", 5)


def test_a_log_ends_when_its_model_is_deleted(stage: Stage, client: Client) -> None:
    fake(client)
    open_log(stage, "local")
    client.delete("local")
    wait_until(lambda: not stage.tab.rows, "the end of the row", 5)
    wait_until(lambda: not log_threads(), "the end of the thread", 5)


def test_what_cannot_be_followed_is_said_in_the_servers_words(client: Client, lane: Lane) -> None:
    drawer = LogDrawer(client, lane, "unknown")
    lane.call(drawer.follow)
    wait_until(lambda: "unknown" in drawer.note, "the words", 5)
    assert not drawer._lost
    drawer.close()


def test_a_lost_connection_is_taken_up_again(client: Client, lane: Lane) -> None:
    fake(client)
    client.load("local", progress=False)
    drawer = LogDrawer(client, lane, "local")
    lane.call(drawer.follow)
    wait_until(lambda: drawer.lines, "the lines", 5)
    reader = drawer._reader
    assert reader is not None
    assert reader._socket is not None
    reader._socket.shutdown(2)
    wait_until(lambda: drawer._lost, "the loss", 5)
    assert "does not answer" in drawer.note
    lane.call(drawer.resume)
    wait_until(lambda: drawer.lines and not drawer.note, "the lines again", 5)
    drawer.close()


class Watched(LogDrawer):
    """A drawer whose messages are kept."""

    def __init__(self, *args: Any) -> None:
        self.sent: list[Any] = []
        super().__init__(*args)

    def send(self, content: Any, buffers: Any = None) -> None:
        self.sent.append(content)


@pytest.fixture
def drawer(client: Client, lane: Lane) -> Watched:
    return Watched(client, lane, "local")


def test_a_log_is_bounded_and_a_page_that_comes_later_gets_all_that_is_kept(drawer: Watched) -> None:
    for start in range(0, 3000, 500):
        drawer._append([f"line {number}" for number in range(start, start + 500)])
    assert [len(message["lines"]) for message in drawer.sent] == [500] * 6
    assert (len(drawer.lines), drawer.lines[0]) == (KEPT_LINES, "line 1000")
    drawer._greeted(None, {"type": "hello"}, None)
    assert drawer.sent[-1] == {"type": "all", "lines": drawer.lines, "note": ""}
    drawer._greeted(None, "nonsense", None)
    assert len(drawer.sent) == 7
    assert "line 2999" not in json.dumps(drawer.get_state(), default=str)


def test_many_lines_come_in_few_messages(client: Client, lane: Lane, drawer: Watched) -> None:
    fake(client)
    client.load("local", progress=False)
    started = time.monotonic()
    lane.call(drawer.follow)
    wait_until(lambda: any("Starting vLLM server" in line for line in drawer.lines), "the lines", 5)
    seconds = time.monotonic() - started
    appended = [message for message in drawer.sent if message["type"] == "append"]
    assert len(appended) <= 1 + seconds * 10
    assert len(drawer.lines) > len(appended)
    drawer.close()


def test_late_lines_of_a_stopped_log_are_dropped(client: Client, lane: Lane, drawer: Watched) -> None:
    fake(client)
    client.load("local", progress=False)
    held = threading.Event()
    lane.call(lambda: held.wait(10))  # the panel is busy while lines come
    lane.call(lambda: None)
    reader_made = threading.Event()
    threading.Thread(target=lambda: (drawer.follow(), reader_made.set())).start()
    assert reader_made.wait(5)
    wait_until(lambda: lane._queue.qsize() > 1, "a line that waits", 5)
    drawer.stop()
    held.set()
    assert lane.settle(5)
    assert drawer.lines == []


@pytest.mark.parametrize(
    ("line", "plainly"),
    [
        ("\x1b[1;36m(APIServer pid=1)\x1b[0;0m INFO", "(APIServer pid=1) INFO"),
        ("\x1b]0;title\x07text \x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "text link"),
        ("Loading:  10%\rLoading: 100%\r", "Loading: 100%"),
        ("a\tb\x00\x08\x7f\x9b", "a\tb"),
        ("\x1b(Bplain \x1b7\x1b[?25l", "plain "),
        ("cut off \x1b[", "cut off "),
        ("<b>ünïcode</b> ▍", "<b>ünïcode</b> ▍"),
    ],
)
def test_lines_are_shown_as_a_terminal_would_without_colours(line: str, plainly: str) -> None:
    assert plain(line) == plainly
