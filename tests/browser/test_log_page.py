"""The log drawer alone in a page: its real module, with a stand-in for the kernel."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import Page, Route

from llmkit.panel.log_drawer import LogDrawer
from llmkit.panel.transcript import STATIC

pytestmark = pytest.mark.browser

STYLES = "\n".join((STATIC / name).read_text() for name in ("panel.css", "models.css"))
HTML = f"""<!doctype html><meta charset="utf-8"><style>{STYLES}</style>
<div class="llmkit-panel" id="place"></div>
<script type="module">
  import start from "./module.js";
  const model = {{
    get: (name) => ({{ label: "Log of m", kept: 100 }})[name],
    on: (name, call) => (window.receive = call),
    send: (content) => (window.sent ??= []).push(content),
  }};
  const widget = start();
  widget.initialize({{ model }});
  widget.render({{ model, el: document.getElementById("place") }});
  window.ready = true;
</script>"""
AT_THE_END = "() => { const box = document.querySelector('.llmkit-log-box'); \
return box.scrollHeight - box.scrollTop - box.clientHeight < 2 }"
FIRST_SEEN = """() => {
  const { left, top } = document.querySelector('.llmkit-log-box').getBoundingClientRect();
  return document.caretRangeFromPoint(left + 20, top + 20).startContainer.data;
}"""


@pytest.fixture
def log(page: Page) -> Page:
    """Give a page with an empty log of at most 100 lines."""

    def serve(route: Route) -> None:
        script = route.request.url.endswith("module.js")
        kind, body = ("text/javascript", str(LogDrawer._esm)) if script else ("text/html", HTML)
        route.fulfill(content_type=kind, body=body)

    page.route("https://llmkit.example/**", serve)
    page.goto("https://llmkit.example/")
    page.wait_for_function("window.ready")
    page.evaluate("() => new Promise(requestAnimationFrame)")
    assert page.evaluate("sent") == [{"type": "hello"}]
    return page


def tell(log: Page, kind: str, **message: Any) -> None:
    log.evaluate("receive", {"type": kind, **message})


def lines(first: int, count: int) -> list[str]:
    return [f"line {number}" for number in range(first, first + count)]


def test_it_follows_the_end_and_keeps_no_more_than_the_kernel(log: Page) -> None:
    tell(log, "append", lines=lines(0, 80))
    assert log.evaluate(AT_THE_END)
    tell(log, "append", lines=lines(80, 80))
    assert log.evaluate(AT_THE_END)
    assert log.locator(".llmkit-log-text").text_content() == "".join(f"{line}\n" for line in lines(60, 100))


def test_what_is_being_read_stays_where_it_is(log: Page) -> None:
    tell(log, "append", lines=lines(0, 100))
    log.evaluate("document.querySelector('.llmkit-log-box').scrollTop = 800")
    seen = log.evaluate(FIRST_SEEN)
    tell(log, "append", lines=lines(100, 20))
    assert log.evaluate(FIRST_SEEN) == seen
    assert not log.evaluate(AT_THE_END)


def test_lines_stay_text_and_all_of_them_replace_what_was_there(log: Page) -> None:
    hostile = "<img src=x onerror='window.hacked = 1'><script>window.hacked = 1</script>"
    tell(log, "append", lines=lines(0, 5))
    tell(log, "all", lines=[hostile], note=hostile)
    assert log.locator(".llmkit-log-text").text_content() == hostile + "\n"
    assert log.locator(".llmkit-log-note").text_content() == hostile
    assert log.locator("img").count() == 0
    assert log.evaluate("window.hacked") is None


def test_it_has_a_name_takes_keys_and_can_be_copied(log: Page) -> None:
    log.context.grant_permissions(["clipboard-read", "clipboard-write"])
    copy = log.get_by_role("button", name="Copy the log of m")
    assert copy.is_disabled()
    tell(log, "append", lines=lines(0, 50))
    copy.click()
    log.get_by_text("Copied", exact=True).wait_for()
    assert log.evaluate("navigator.clipboard.readText()") == "\n".join(lines(0, 50))
    box = log.get_by_role("log", name="Log of m")
    box.focus()
    log.keyboard.press("Home")
    log.wait_for_function("document.querySelector('.llmkit-log-box').scrollTop === 0")
