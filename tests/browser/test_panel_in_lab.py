"""The panel in real JupyterLab, with an endpoint that a test can steer."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from aiohttp import web
from mock_upstream import ANSWER, MockUpstream
from support import QUESTION, JupyterServer, wait_until

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]

CANARY = "sk-canary-Zq3vT8wLx5"
SIDEWAYS = """() => [document.documentElement, ...document.querySelectorAll('.llmkit-panel, .llmkit-panel *')]
    .filter((node) => node.scrollWidth > node.clientWidth + 1 && !['visible', 'hidden', 'clip'].includes(
        getComputedStyle(node).overflowX))
    .map((node) => node.className)"""


def test_a_configured_model_is_loaded_and_asked(open_notebook: Any, configure: Callable[[str], str]) -> None:
    configure("ask")
    notebook = open_notebook()
    notebook.show_panel()
    notebook.button("Load", notebook.row("ask")).click()
    notebook.status("ask", "loaded")
    notebook.button("Ask", notebook.row("ask")).click()
    turn = notebook.ask(QUESTION)
    turn.locator(".llmkit-turn-note", has_text="7 tokens").wait_for()
    assert ANSWER in turn.locator(".llmkit-answer").inner_text()

    # Ctrl+Enter sends, too, with what was typed last.
    prompt = notebook.panel.get_by_label("Prompt", exact=True)
    prompt.fill("And of Spain?")
    prompt.press("Control+Enter")
    notebook.panel.locator(".llmkit-turn").nth(1).locator(".llmkit-turn-note", has_text="tokens").wait_for()
    assert notebook.panel.locator(".llmkit-question").all_inner_texts() == [QUESTION, "And of Spain?"]

    # A reload of the page takes nothing away.
    notebook.save()
    notebook.page.reload()
    notebook.wait_for_kernel()
    notebook.panel.locator(".llmkit-turn").nth(1).wait_for()
    assert notebook.panel.locator(".llmkit-question").all_inner_texts() == [QUESTION, "And of Spain?"]


def test_a_change_made_elsewhere_is_on_the_screen_within_a_second(
    open_notebook: Any, lab: JupyterServer, configure: Callable[[str], str]
) -> None:
    config_id = configure("seen")
    notebook = open_notebook()
    notebook.show_panel()
    notebook.status("seen", "unloaded")
    delays = []
    for _ in range(5):
        for path, status in (
            (f"llm/load_model/{config_id}", "loaded"),
            ("llm/unload_model/seen", "unloaded"),
        ):
            lab.request("POST", path)
            started = time.monotonic()
            notebook.status("seen", status, 3)
            delays.append(time.monotonic() - started)
    print(f"on the screen after {max(delays):.2f} s at most, of {len(delays)}")
    assert max(delays) <= 1.0


def test_a_click_is_handled_while_a_cell_runs(open_notebook: Any, configure: Callable[[str], str]) -> None:
    configure("ask")
    notebook = open_notebook("import time\ntime.sleep(25)\nprint('slept')")
    notebook.show_panel()
    notebook.run(1)
    notebook.page.locator(".jp-CodeCell .jp-InputPrompt", has_text="[*]").wait_for()
    started = time.monotonic()
    notebook.button("Load", notebook.row("ask")).click()
    notebook.status("ask", "loaded")
    seconds = time.monotonic() - started
    notebook.button("Ask", notebook.row("ask")).click()
    turn = notebook.ask(QUESTION)
    turn.locator(".llmkit-turn-note", has_text="7 tokens").wait_for()
    assert time.monotonic() - started < 20  # the cell still runs
    assert notebook.output(1).count() == 0
    print(f"a click beside a running cell was handled after {seconds:.2f} s")
    assert seconds <= 1.0


def test_a_key_is_in_no_widget_state_and_in_no_notebook(
    open_notebook: Any, upstream: MockUpstream, lab: JupyterServer
) -> None:
    upstream.key = CANARY
    notebook = open_notebook("import json, ipywidgets\nprint(json.dumps(ipywidgets.Widget.get_manager_state()))")
    notebook.show_panel()
    notebook.tab("Configure")
    panel = notebook.panel
    panel.get_by_label("model_type").select_option("openai")
    key = panel.get_by_label("api_key")
    key.wait_for()
    panel.get_by_label("model_id").fill("keyed")
    panel.get_by_label("model_name").fill("gpt-3")
    panel.get_by_label("base_url").fill(upstream.base_url)
    key.fill(CANARY)
    assert key.get_attribute("type") == "password"

    def saved_everywhere() -> str:
        """Give all that could hold the key: the notebook with its widgets' state, and the kernel's own view of it."""
        notebook.run(1)
        wait_until(lambda: notebook.output(1).count() == 1, "the state", 10)
        notebook.page.wait_for_timeout(500)
        return notebook.save() + str(notebook.output(1).inner_text())

    menu = notebook.page.locator(".lm-MenuBar-item", has_text="Settings")
    menu.click()
    notebook.page.locator(".lm-Menu-item", has_text="Save Widget State Automatically").click()
    before = saved_everywhere()
    assert "application/vnd.jupyter.widget-state+json" in before
    assert CANARY not in before

    notebook.button("Save and load").click()
    notebook.status("keyed", "loaded")
    assert upstream.requests[-1][1]["Authorization"] == f"Bearer {CANARY}"
    assert key.input_value() == ""
    assert CANARY not in saved_everywhere()
    assert CANARY not in notebook.page.content()
    assert CANARY not in lab.log
    assert CANARY not in lab.request("GET", "llm/configurations/").text


HOSTILE = [
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "![x](http://127.0.0.1:9/leak.png) [y](javascript:window.hacked=1)",
    "\x1b[31mred\x1b[0m",
    "w" * 20_000,
    "| a " * 500,
]


def test_whatever_a_model_says_stays_text(
    open_notebook: Any, upstream: MockUpstream, configure: Callable[[str], str], lab: JupyterServer
) -> None:
    async def hostile(request: web.Request, body: dict[str, Any]) -> web.StreamResponse | None:
        if not body.get("stream"):
            return None
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for piece in HOSTILE:
            frame = {"choices": [{"delta": {"content": piece + "\n"}}]}
            await response.write(b"data: " + json.dumps(frame).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    upstream.respond = hostile
    lab.load(configure("ask"))
    notebook = open_notebook()
    notebook.show_panel()
    notebook.tab("Prompt")
    requests: list[str] = []
    notebook.page.on("request", lambda request: requests.append(request.url))
    turn = notebook.ask("<b>hi</b><script>window.hacked = 1</script>")
    turn.locator(".llmkit-turn-note", has_text="in all").wait_for()
    text = turn.locator(".llmkit-answer").text_content()
    assert "<script>window.hacked = 1</script>" in text
    assert "<img src=x onerror=" in text
    assert "w" * 20_000 in text
    assert "\x1b" not in text
    assert turn.locator("script, img, b, [onerror], [style]").count() == 0
    links = turn.locator("a").evaluate_all("links => links.map((link) => link.getAttribute('href'))")
    assert all(link.startswith("http") for link in links)
    assert notebook.page.evaluate("window.hacked") is None
    assert not [url for url in requests if "leak" in url]
    assert notebook.page.evaluate(SIDEWAYS) == []


@pytest.fixture
def long_answer(upstream: MockUpstream) -> int:
    """Let the endpoint answer with so many tokens, about 1,000 a second."""
    tokens = 3000

    async def stream(request: web.Request, body: dict[str, Any]) -> web.StreamResponse | None:
        if not body.get("stream"):
            return None
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number in range(tokens):
            frame = {"choices": [{"delta": {"content": f"w{number} "}}]}
            await response.write(b"data: " + json.dumps(frame).encode() + b"\n\n")
            if number % 10 == 0:
                await asyncio.sleep(0.01)
        await response.write(b"data: [DONE]\n\n")
        return response

    upstream.respond = stream
    return tokens


def test_a_long_answer_costs_its_own_length_in_few_messages_and_moves_nothing(
    open_notebook: Any, configure: Callable[[str], str], lab: JupyterServer, long_answer: int
) -> None:
    lab.load(configure("ask"))
    notebook = open_notebook()
    frames: list[tuple[float, int]] = []

    def watch(socket: Any) -> None:
        if "/channels" in socket.url:
            socket.on("framereceived", lambda data: frames.append((time.monotonic(), len(data))))

    notebook.page.on("websocket", watch)
    notebook.page.reload()
    notebook.wait_for_kernel()
    notebook.show_panel()
    notebook.tab("Prompt")
    send = notebook.button("Send")
    send.wait_for()
    place = send.bounding_box()
    notebook.page.wait_for_timeout(500)
    frames.clear()
    started = time.monotonic()
    turn = notebook.ask("Count")
    turn.locator(".llmkit-turn-note", has_text="in all").wait_for(timeout=60_000)
    seconds = time.monotonic() - started
    text = "".join(f"w{number} " for number in range(long_answer))
    assert text.rstrip() in (turn.locator(".llmkit-answer").text_content() or "")
    received = sum(size for _, size in frames)
    print(
        f"{long_answer} tokens, {len(text)} bytes in {seconds:.1f} s: {len(frames)} messages "
        f"({len(frames) / seconds:.0f} a second), {received} bytes"
    )
    assert len(frames) <= 30 * seconds + 30  # and what the click itself brought
    assert received <= len(text) + 900 * len(frames)
    assert send.bounding_box() == place
    assert notebook.page.evaluate(SIDEWAYS) == []


def test_stop_ends_the_answer(
    open_notebook: Any, configure: Callable[[str], str], lab: JupyterServer, long_answer: int
) -> None:
    lab.load(configure("ask"))
    notebook = open_notebook()
    notebook.show_panel()
    notebook.tab("Prompt")
    turn = notebook.ask("Count")
    turn.locator(".llmkit-answer", has_text="w100 ").wait_for()
    notebook.button("Stop").click()
    turn.locator(".llmkit-turn-note", has_text="Stopped.").wait_for(timeout=2000)
    assert f"w{long_answer - 1} " not in (turn.locator(".llmkit-answer").text_content() or "")


@pytest.fixture
def bare_lab() -> Iterator[JupyterServer]:
    """Give a JupyterLab in which the extension is switched off."""
    with JupyterServer("lab", args=["--ServerApp.jpserver_extensions={'jupyter_server_ext': False}"]) as running:
        yield running


def test_a_kernel_without_a_server_gets_a_card_that_says_what_to_do(bare_lab: JupyterServer, open_in: Any) -> None:
    notebook = open_in(bare_lab)
    notebook.run(0)
    card = notebook.panel.locator(".llmkit-card-error")
    card.wait_for()
    assert "not enabled" in card.inner_text()
    assert "jupyter server extension enable" in card.inner_text()
    notebook.photograph("no-server-light")
    notebook.use_theme("JupyterLab Dark")
    notebook.photograph("no-server-dark")


def test_every_tab_fits_in_both_themes_and_in_a_narrow_cell(
    open_notebook: Any, configure: Callable[[str], str], lab: JupyterServer
) -> None:
    lab.load(configure("capitals"))
    configure("spare")
    broken = lab.configure(
        "broken", model_name="gpt-4", model_type="openai", model_kwargs={"base_url": "http://127.0.0.1:9/v1"}
    )
    lab.request("POST", f"llm/load_model/{broken}")
    notebook = open_notebook()
    notebook.show_panel()
    notebook.tab("Prompt")
    notebook.ask(QUESTION).locator(".llmkit-turn-note", has_text="tokens").wait_for()
    notebook.tab("Configure")
    notebook.panel.get_by_role("button", name="Generation defaults").click()
    notebook.panel.get_by_label("temperature", exact=True).wait_for()
    notebook.panel.get_by_label("model_type").select_option("openai")
    notebook.panel.get_by_label("api_key").wait_for()
    notebook.panel.get_by_label("model_id").fill("no good name")
    notebook.panel.get_by_label("model_name").fill("gpt-3")
    notebook.button("Save").click()
    notebook.panel.locator(".llmkit-field-error").first.wait_for()
    for theme, name in (("JupyterLab Light", "light"), ("JupyterLab Dark", "dark")):
        notebook.page.set_viewport_size({"width": 1200, "height": 900})
        notebook.use_theme(theme)
        for width, kind in ((1200, name), (640, f"narrow-{name}")):
            notebook.page.set_viewport_size({"width": width, "height": 900})
            for tab in ("Models", "Configure", "Prompt", "Compare"):
                notebook.tab(tab)
                notebook.photograph(f"{tab.lower()}-{kind}")
                assert notebook.page.evaluate(SIDEWAYS) == [], f"{tab}, {kind}"


def test_every_control_has_a_name_and_the_keyboard_reaches_it(
    open_notebook: Any, configure: Callable[[str], str], lab: JupyterServer
) -> None:
    lab.load(configure("ask"))
    notebook = open_notebook()
    notebook.show_panel()
    nameless = """() => [...document.querySelectorAll('.llmkit-panel :is(button, input, select, textarea)')]
        .filter((node) => !node.closest('.llmkit-hidden'))
        .filter((node) => !(node.textContent.trim() || node.title || node.getAttribute('aria-label')
            || node.labels?.length && node.labels[0].textContent.trim()))
        .map((node) => node.outerHTML.slice(0, 200))"""
    assert notebook.page.evaluate(nameless) == []

    # By keys alone: from the first tab to the third, and an answer.
    notebook.panel.get_by_role("tab", name="Models").focus()
    notebook.page.keyboard.press("ArrowRight")
    notebook.page.keyboard.press("ArrowRight")
    notebook.page.keyboard.press("Enter")
    prompt = notebook.panel.get_by_label("Prompt", exact=True)
    prompt.wait_for()
    prompt.focus()
    notebook.page.keyboard.press("Control+Enter")
    notebook.panel.locator(".llmkit-turn-note", has_text="7 tokens").wait_for()
