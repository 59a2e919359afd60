from __future__ import annotations

import asyncio
import importlib
import json
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import ipywidgets as w
import pytest
from aiohttp import web
from mock_upstream import ANSWER, USAGE, MockUpstream, event
from support import wait_until

from llmkit.client import Client
from llmkit.errors import LLMKitError
from llmkit.panel import comparison
from llmkit.panel.compare_tab import MAY_NOT, NO_MODEL, CompareTab
from llmkit.panel.desk import Desk
from llmkit.panel.lane import Lane
from llmkit.panel.widgets import Kit


def hidden(widget: w.DOMWidget) -> bool:
    return "llmkit-hidden" in widget._dom_classes


def make_desk(client: Client, lane: Lane, *may: str) -> Desk:
    def nothing(*_: object) -> None:
        return None

    return Desk(client, lane, Kit(), frozenset(may), nothing, nothing, nothing, nothing, nothing)


def make_tab(client: Client, lane: Lane, *may: str) -> CompareTab:
    made = CompareTab(make_desk(client, lane, *may))
    lane.call(made.open)
    lane.call(lambda: made.update(client.snapshot()))
    assert lane.settle(5)
    return made


@pytest.fixture
def load(client: Client, configure: Callable[[str], None]) -> Callable[..., None]:
    """Give a function that configures and loads models of the mock upstream."""

    def make(*names: str) -> None:
        for name in names:
            configure(name)
            client.load(name, progress=False)

    return make


@pytest.fixture
def tab(client: Client, lane: Lane, load: Callable[..., None]) -> CompareTab:
    load("first", "second")
    return make_tab(client, lane, "read", "execute")


def run(tab: CompareTab, lane: Lane) -> None:
    tab.run.click()
    assert lane.settle(5)


def ended(tab: CompareTab, lane: Lane, rows: int) -> list[comparison.Row]:
    wait_until(lambda: len(tab.results) == rows, f"{rows} rows", 15)
    assert lane.settle(5)
    return tab.results


def slowly(upstream: MockUpstream, pieces: int, pause: float) -> None:
    """Let the upstream stream so many pieces, each after a pause."""

    async def respond(request: web.Request, body: dict[str, Any]) -> web.StreamResponse | None:
        if not body.get("stream"):
            return None
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        upstream.open_streams += 1
        try:
            for _ in range(pieces):
                await response.write(event({"choices": [{"delta": {"content": "word "}}]}))
                await asyncio.sleep(pause)
            await response.write(event({"choices": [{"delta": {}, "finish_reason": "stop"}]}))
            await response.write(event({"choices": [], "usage": USAGE}))
            await response.write(b"data: [DONE]\n\n")
        finally:
            upstream.open_streams -= 1
        return response

    upstream.respond = respond


def test_columns_begin_with_different_models_and_the_prompt_goes_to_all(
    tab: CompareTab, lane: Lane, upstream: MockUpstream
) -> None:
    assert [column.model.value for column in tab.columns] == ["first", "second"]
    upstream.requests.clear()
    tab.prompt.value = "Which?"
    run(tab, lane)
    rows = ended(tab, lane, 2)
    assert [(row["run"], row["column"], row["model_id"]) for row in rows] == [(1, "A", "first"), (1, "B", "second")]
    for row in rows:
        assert (row["prompt"], row["response"], row["finish_reason"]) == ("Which?", ANSWER, "stop")
        assert (row["prompt_tokens"], row["completion_tokens"]) == (8, 7)
        assert row["total_seconds"] >= row["first_token_seconds"] > 0
        assert row["error"] is None
    assert [column.transcript.turns[-1].text for column in tab.columns] == [ANSWER, ANSWER]
    assert "7 tokens" in tab.columns[0].transcript.turns[-1].note
    assert [body["messages"][-1]["content"] for _, _, body in upstream.requests] == ["Which?", "Which?"]
    assert tab.prompt.value == "Which?"  # to run it again with other parameters
    assert not tab.run.disabled
    assert tab.stop.disabled


def test_one_model_can_be_compared_with_itself_under_other_parameters(
    tab: CompareTab, lane: Lane, upstream: MockUpstream
) -> None:
    first, second = tab.columns
    second.model.value = "first"
    first.options["temperature"].switch.value = True
    first.options["temperature"].control.value = 0.1
    second.options["seed"].switch.value = True
    second.options["seed"].control.value = 7
    second.system.value = " Be brief. "
    assert lane.settle(5)
    upstream.requests.clear()
    run(tab, lane)
    rows = ended(tab, lane, 2)
    given = [{name: row[name] for name in comparison.PARAMETERS if row[name] is not None} for row in rows]
    assert given == [{"temperature": 0.1}, {"system": "Be brief.", "seed": 7}]
    sent = {
        json.dumps([body.get("temperature"), body.get("seed"), len(body["messages"])]) for *_, body in upstream.requests
    }
    assert sent == {"[0.1, null, 1]", "[null, 7, 2]"}


def test_all_are_asked_at_once(tab: CompareTab, lane: Lane, upstream: MockUpstream) -> None:
    slowly(upstream, 10, 0.05)
    run(tab, lane)
    wait_until(lambda: upstream.open_streams == 2, "both streaming")
    assert all(column.answering for column in tab.columns)
    assert tab.run.disabled
    assert tab.add.disabled
    assert "answering" in tab.table.value
    tab.run.click()  # asks nothing more
    ended(tab, lane, 2)
    assert [len(column.transcript.turns) for column in tab.columns] == [1, 1]


def test_the_failure_of_one_hurts_no_other(tab: CompareTab, lane: Lane, client: Client) -> None:
    client.unload("second")
    run(tab, lane)
    good, bad = ended(tab, lane, 2)
    assert (good["response"], good["error"]) == (ANSWER, None)
    assert "not loaded" in bad["error"]
    assert bad["response"] == ""
    assert tab.columns[1].transcript.turns[-1].state == "failed"
    assert "failed" in tab.table.value
    lane.call(lambda: tab.update(client.snapshot()))
    assert lane.settle(5)
    # What is compared does not change by itself, and the list says how it is.
    assert tab.columns[1].model.value == "second"
    assert ("second (not loaded)", "second") in tab.columns[1].model.options
    client.delete("second")
    lane.call(lambda: tab.update(client.snapshot()))
    assert lane.settle(5)
    assert tab.columns[1].model.value == "first"


def test_stop_ends_all_and_keeps_what_came(tab: CompareTab, lane: Lane, upstream: MockUpstream) -> None:
    slowly(upstream, 2000, 0.02)
    run(tab, lane)
    wait_until(lambda: all(column.transcript.turns[-1].text for column in tab.columns), "both streaming")
    tab.stop.click()
    rows = ended(tab, lane, 2)
    assert [(row["finish_reason"], row["error"]) for row in rows] == [("stopped", None)] * 2
    assert all(row["response"].startswith("word ") for row in rows)
    assert [column.transcript.turns[-1].state for column in tab.columns] == ["stopped", "stopped"]
    wait_until(lambda: upstream.open_streams == 0, "the end of both streams")
    assert "stopped" in tab.table.value
    assert not tab.run.disabled


def test_columns_come_up_to_six_and_go_down_to_two(tab: CompareTab, lane: Lane, client: Client) -> None:
    for _ in range(8):
        tab.add.click()
    assert lane.settle(5)
    assert [column.name for column in tab.columns] == list("ABCDEF")
    assert tab.add.disabled
    assert len(tab._columns.children) == 6
    assert not hidden(tab.columns[0].remove)
    gone = tab.columns[1]
    gone.remove.click()
    gone.remove.click()
    assert lane.settle(5)
    assert [column.name for column in tab.columns] == list("ACDEF")
    assert gone.model.comm is None  # closed
    tab.add.click()
    for column in tab.columns[:4]:
        column.remove.click()
    assert lane.settle(5)
    assert len(tab.columns) == 2
    assert all(hidden(column.remove) for column in tab.columns)
    tab.columns[0].remove.click()
    assert lane.settle(5)
    assert len(tab.columns) == 2
    run(tab, lane)
    ended(tab, lane, 2)


def test_a_stream_sends_at_most_thirty_messages_a_second(tab: CompareTab, lane: Lane, upstream: MockUpstream) -> None:
    slowly(upstream, 1500, 0.001)
    counts = [0, 0]
    for number, column in enumerate(tab.columns):

        def send(content: dict[str, Any], number: int = number) -> None:
            counts[number] += content["type"] == "append"

        column.transcript.send = send
    run(tab, lane)
    rows = ended(tab, lane, 2)
    for count, row in zip(counts, rows, strict=True):
        assert 2 < count <= 30 * row["total_seconds"] + 2


def test_without_a_model_or_the_right_to_ask_it_says_so(client: Client, lane: Lane, load: Callable[..., None]) -> None:
    tab = make_tab(client, lane, "read", "execute")
    if "demo" not in [model.model_id for model in client.models() if model.status == "loaded"]:
        assert NO_MODEL in tab._hint.value
        assert tab.run.disabled
    load("first")
    lane.call(lambda: tab.update(client.snapshot()))
    assert lane.settle(5)
    assert tab._hint.value == ""
    assert not tab.run.disabled
    bystander = make_tab(client, lane, "read")
    assert MAY_NOT in bystander._hint.value
    assert bystander.run.disabled
    bystander.run.click()
    assert lane.settle(5)
    assert not any(column.answering for column in bystander.columns)


def test_nothing_of_the_columns_is_made_before_the_tab_is_opened(client: Client, lane: Lane) -> None:
    tab = CompareTab(make_desk(client, lane, "execute"))
    tab.update(client.snapshot())
    assert (tab.columns, tab.run.disabled) == ([], True)
    tab.open()
    tab.open()
    assert len(tab.columns) == 2


def test_the_code_is_that_of_the_columns(tab: CompareTab, lane: Lane) -> None:
    sent: list[dict[str, Any]] = []
    tab.code.widget.send = sent.append
    tab.prompt.value = "It's this?"
    assert lane.settle(5)
    assert sent == []
    tab.code.widget.unfolded = True
    assert lane.settle(5)
    python = sent[-1]["items"][0]["python"]
    assert '{"model_id": "first", "prompt": "It\'s this?"}' in python
    tab.columns[1].options["max_tokens"].switch.value = True
    assert lane.settle(5)
    assert '"max_tokens": 256' in sent[-1]["items"][0]["python"]
    count = len(sent)
    lane.call(tab._draw)
    assert lane.settle(5)
    assert len(sent) == count


def test_two_hundred_rows_are_kept(tab: CompareTab) -> None:
    for number in range(250):
        tab._rows.append(comparison.asked(number, "A", {"model_id": "first", "prompt": "?"}))
    assert [row["run"] for row in tab.results] == list(range(50, 250))


def figures(**known: Any) -> comparison.Row:
    row = comparison.asked(3, "A", {"model_id": "<b>m</b>", "prompt": "?"})
    return row | {"response": "", "total_seconds": 1.0, **known}


def test_the_table_marks_the_fastest_of_each_measure() -> None:
    rows = [
        figures(column="A", tokens_per_second=30.0, first_token_seconds=0.5, total_seconds=2.0),
        figures(column="B", tokens_per_second=90.0, first_token_seconds=0.7, total_seconds=1.0),
        figures(column="C", error="broken <i>", total_seconds=None),
    ]
    html = comparison.table(rows)
    assert html.count('class="llmkit-fastest"') == 3
    first, second, third = html.split("<tbody>")[1].split("</tr>")[:3]
    assert first.count("fastest</span>") == 1
    assert "0.50 s <span" in first
    assert second.count("fastest</span>") == 2
    assert "failed" in third
    assert "<b>m" not in html
    assert "Run 3" in html
    assert 'class="llmkit-fastest"' not in comparison.table([rows[0]])
    assert 'class="llmkit-fastest"' not in comparison.table([rows[0], rows[0]])
    assert comparison.table([]) == ""


def test_the_note_says_what_is_known() -> None:
    assert comparison.note(figures()) == "1.0 s in all"
    told = figures(completion_tokens=1, tokens_per_second=12.34, first_token_seconds=0.05, cost=0.00012, currency="EUR")
    assert comparison.note(told | {"finish_reason": "length"}) == (
        "1 token · 12.3 tokens/s · first token after 50 ms · 1.0 s in all · 0.00012 EUR · cut off at the token limit"
    )
    assert comparison.note(figures(engine="openai")) == "1.0 s in all"
    assert comparison.note(figures(engine="vllm", engine_version="0.11.0")) == "1.0 s in all · vllm 0.11.0"
    assert comparison.note(figures(engine_version="0.11.0")) == "1.0 s in all · engine 0.11.0"


def test_without_pandas_an_error_says_what_to_do(tab: CompareTab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)  # as if it were not installed
    with pytest.raises(LLMKitError, match="pandas") as raised:
        tab.to_dataframe()
    assert "pip install pandas" in str(raised.value)


def test_a_dataframe_has_a_row_for_each_answer_and_a_column_for_each_figure(
    tab: CompareTab, lane: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tab, lane)
    ended(tab, lane, 2)
    run(tab, lane)
    ended(tab, lane, 4)
    try:
        made: Any = importlib.import_module("pandas").DataFrame
    except ImportError:

        class Frame:
            """What is used of a DataFrame, for machines without pandas."""

            def __init__(self, rows: list[dict[str, Any]], columns: list[str]) -> None:
                self.columns = columns
                self._rows = [[row[name] for name in columns] for row in rows]

            def __getitem__(self, name: str) -> list[Any]:
                return [row[self.columns.index(name)] for row in self._rows]

        stand_in: Any = ModuleType("pandas")
        made = stand_in.DataFrame = Frame
        monkeypatch.setitem(sys.modules, "pandas", stand_in)
    frame = tab.to_dataframe()
    assert isinstance(frame, made)
    assert list(frame.columns) == list(comparison.COLUMNS)
    assert list(frame["run"]) == [1, 1, 2, 2]
    assert list(frame["model_id"]) == ["first", "second"] * 2
    assert list(frame["response"]) == [ANSWER] * 4
    assert list(frame["engine"]) == ["openai"] * 4
    assert list(frame["engine_version"]) == [None] * 4
