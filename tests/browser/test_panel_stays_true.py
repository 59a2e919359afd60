"""The panel stays true: after a reload, a restart of kernel or server, beside another panel, without a kernel."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web
from mock_upstream import ANSWER, MockUpstream
from support import QUESTION, JupyterServer, free_port

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]

CHANGES = 50
TIMES = 3


def test_after_a_restart_of_the_kernel_models_conversation_and_draft_are_back(
    open_notebook: Any, configure: Callable[[str], str], lab: JupyterServer
) -> None:
    lab.load(configure("ask"))
    notebook = open_notebook()
    notebook.show_panel()
    notebook.tab("Prompt")
    notebook.ask(QUESTION).locator(".llmkit-turn-note", has_text="7 tokens").wait_for()
    notebook.panel.get_by_label("Prompt", exact=True).fill("And what I was about to")
    notebook.page.wait_for_timeout(2500)  # kept a moment after it was typed
    notebook.restart_kernel()
    notebook.show_panel()
    notebook.status("ask", "loaded")
    notebook.tab("Prompt")
    notebook.panel.locator(".llmkit-answer", has_text=ANSWER).wait_for()
    assert notebook.panel.locator(".llmkit-question").all_inner_texts() == [QUESTION]
    assert notebook.panel.get_by_label("Prompt", exact=True).input_value() == "And what I was about to"
    assert "7 tokens" in notebook.panel.locator(".llmkit-turn-note").inner_text()


def test_a_running_answer_ends_with_its_kernel_and_goes_on_over_a_reload(
    open_notebook: Any, configure: Callable[[str], str], lab: JupyterServer, upstream: MockUpstream
) -> None:
    async def endless(request: web.Request, body: dict[str, Any]) -> web.StreamResponse | None:
        if not body.get("stream"):
            return None
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        upstream.open_streams += 1
        try:
            for number in range(100_000):
                frame = {"choices": [{"delta": {"content": f"w{number} "}}]}
                await response.write(b"data: " + json.dumps(frame).encode() + b"\n\n")
                await asyncio.sleep(0.02)
        finally:
            upstream.open_streams -= 1
        return response

    upstream.respond = endless
    lab.load(configure("ask"))
    notebook = open_notebook()
    notebook.show_panel()
    notebook.tab("Prompt")
    turn = notebook.ask("Count")
    turn.locator(".llmkit-answer", has_text="w20 ").wait_for()
    notebook.save()
    notebook.page.reload()
    notebook.page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=60_000)
    turn = notebook.panel.locator(".llmkit-turn").first
    turn.locator(".llmkit-answer", has_text="w20 ").wait_for()
    seen = len(turn.locator(".llmkit-answer").inner_text())
    notebook.page.wait_for_timeout(1000)
    assert len(turn.locator(".llmkit-answer").inner_text()) > seen
    assert upstream.open_streams == 1
    notebook.restart_kernel()
    deadline = time.monotonic() + 5
    while upstream.open_streams and time.monotonic() < deadline:
        notebook.page.wait_for_timeout(100)
    assert upstream.open_streams == 0


def test_two_panels_at_once_show_the_same_models(
    open_notebook: Any, configure: Callable[[str], str], lab: JupyterServer
) -> None:
    configure("shared")
    notebook = open_notebook("llmkit.panel()")
    notebook.show_panel()
    notebook.run(1)
    panels = notebook.page.locator(".llmkit-panel")
    panels.nth(1).locator(".llmkit-row").wait_for()
    panels.nth(0).get_by_role("button", name="Load", exact=True).click()
    for number in range(2):
        panels.nth(number).locator(".llmkit-row .llmkit-is-loaded").wait_for(timeout=2000)
    lab.request("POST", "llm/unload_model/shared")
    for number in range(2):
        panels.nth(number).locator(".llmkit-row .llmkit-is-unloaded").wait_for(timeout=1000)


def test_a_saved_notebook_without_a_kernel_says_that_the_cell_is_to_be_run(
    open_notebook: Any, configure: Callable[[str], str], lab: JupyterServer
) -> None:
    configure("ask")
    notebook = open_notebook()
    notebook.show_panel()
    notebook.status("ask", "unloaded")
    card = notebook.page.locator(".llmkit-run-card")
    assert not card.is_visible()
    saved = notebook.save()
    assert "llmkit-run-card" in saved
    for session in lab.request("GET", "api/sessions").json():
        lab.request("DELETE", f"api/sessions/{session['id']}")
    for trusted in (True, False):
        if not trusted:
            notebook.file.write_text(json.dumps(json.loads(saved)))  # as it comes from somebody else
        notebook.page.goto(f"{lab.url}lab/workspaces/saved{trusted}/tree/{notebook.file.name}?token={lab.token}")
        notebook.wait_for_kernel()  # JupyterLab starts another one, which knows no panel
        notebook.page.wait_for_timeout(3000)
        assert "Run this cell" in card.inner_text()
        box = card.bounding_box()
        assert box is not None
        assert box["height"] > 30
        others = [one for one in notebook.output(0).all() if one.is_visible() and one.inner_text().strip()]
        assert len(others) == 1, [one.inner_text() for one in others]
    notebook.photograph("saved-notebook")


def test_a_server_that_restarts_is_said_and_joined_again(open_in: Any) -> None:
    port = free_port()
    # The kernel of the notebook ends with its server, so the panel watches another one.
    with JupyterServer("lab") as lab, JupyterServer("server", port=port) as watched:
        watched.configure("seen", model_type="openai", model_name="x")
        code = f"import llmkit\nllmkit.panel(llmkit.connect({watched.url!r}, {watched.token!r}))"
        notebook = open_in(lab, code)
        notebook.run(1)
        notebook.status("seen", "unloaded")
        watched.stop()
        notebook.panel.locator(".llmkit-is-reconnecting").wait_for(timeout=5000)
        notebook.photograph("server-gone")
        watched.start()
        notebook.panel.locator(".llmkit-header .llmkit-is-connected").wait_for(timeout=10_000)
        watched.configure("late", model_type="openai", model_name="x")
        notebook.row("late").wait_for(timeout=2000)


def test_the_panel_is_there_within_a_second_and_changes_are_seen_within_one(
    open_notebook: Any, configure: Callable[[str], str], lab: JupyterServer
) -> None:
    config_id = configure("seen")
    notebook = open_notebook(*["llmkit.panel()"] * TIMES)
    notebook.show_panel()  # the kernel is warm then
    seconds = []
    for number in range(TIMES):
        notebook.page.evaluate(WHEN_SHOWN)
        notebook.run(1 + number)
        notebook.page.wait_for_function("window.shownAfter !== undefined")
        seconds.append(notebook.page.evaluate("window.shownAfter") / 1000)
    print(f"a panel shown {min(seconds):.2f} to {max(seconds):.2f} s after its cell was run")
    assert statistics.median(seconds) <= 1.0
    delays = []
    row = notebook.page.locator(".llmkit-panel").first.locator(".llmkit-row")
    for number in range(CHANGES):
        path, status = (
            (f"llm/load_model/{config_id}", "loaded") if number % 2 == 0 else ("llm/unload_model/seen", "unloaded")
        )
        lab.request("POST", path)
        started = time.monotonic()
        row.locator(f".llmkit-is-{status}").wait_for(timeout=5000)
        delays.append(time.monotonic() - started)
    p95 = statistics.quantiles(delays, n=20)[-1]
    print(f"{CHANGES} changes of another client: on the screen after {p95:.3f} s (p95), {max(delays):.3f} s at most")
    assert p95 <= 1.0


WHEN_SHOWN = """() => {
    window.shownAfter = undefined;
    const seen = document.querySelectorAll('.llmkit-panel .llmkit-row').length;
    let began;
    document.addEventListener('keydown', (event) => {
        if (event.key === 'Enter' && event.shiftKey) began = performance.now();
    }, {capture: true});
    new MutationObserver((_, observer) => {
        const rows = document.querySelectorAll('.llmkit-panel .llmkit-row');
        if (rows.length > seen && rows[rows.length - 1].getBoundingClientRect().height > 0) {
            window.shownAfter = performance.now() - began;
            observer.disconnect();
        }
    }).observe(document.body, {childList: true, subtree: true});
}"""


def test_the_first_token_is_on_the_screen_soon_after_it_was_sent(
    open_notebook: Any, configure: Callable[[str], str], lab: JupyterServer, upstream: MockUpstream
) -> None:
    sent: list[float] = []

    async def stream(request: web.Request, body: dict[str, Any]) -> web.StreamResponse | None:
        if not body.get("stream"):
            return None
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await asyncio.sleep(0.5)
        sent.append(time.time())
        await response.write(b'data: {"choices": [{"delta": {"content": "first "}}]}\n\n')
        await asyncio.sleep(0.5)
        await response.write(b'data: {"choices": [{"delta": {"content": "last"}}]}\n\ndata: [DONE]\n\n')
        return response

    upstream.respond = stream
    lab.load(configure("ask"))
    notebook = open_notebook()
    notebook.show_panel()
    notebook.tab("Prompt")
    delays = []
    for number in range(10):
        notebook.page.evaluate(WHEN_FIRST)
        turn = notebook.ask(f"Go {number}")
        turn.locator(".llmkit-turn-note", has_text="in all").wait_for()
        delays.append(notebook.page.evaluate("window.firstAt") / 1000 - sent[-1])
    print(
        f"first token on the screen after {statistics.median(delays) * 1000:.0f} ms, {max(delays) * 1000:.0f} at most"
    )
    assert statistics.median(delays) <= 0.15


WHEN_FIRST = """() => {
    window.firstAt = undefined;
    const count = document.querySelectorAll('.llmkit-turn').length;
    const observer = new MutationObserver(() => {
        const answers = document.querySelectorAll('.llmkit-turn .llmkit-answer');
        if (answers.length > count && answers[answers.length - 1].textContent.includes('first')) {
            observer.disconnect();
            requestAnimationFrame(() => { window.firstAt = Date.now(); });
        }
    });
    observer.observe(document.body, {childList: true, subtree: true, characterData: true});
}"""
