"""The shared registry as its users see it: a real JupyterHub, its login and its proxy, a JupyterLab of one's own."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hub import Hub
from hub_service import KEY, config, person, wait_for_service
from mock_upstream import ANSWER, MockUpstream
from playwright.sync_api import Page, expect
from support import START_SECONDS, free_port, wait_until

pytestmark = [pytest.mark.browser, pytest.mark.hub, pytest.mark.timeout(10 * START_SECONDS)]

STEP_MS = START_SECONDS * 1000
LIMIT = "--LLMKitApp.user_limits=requests_per_day=2"


class Place(NamedTuple):
    """The server of somebody who has logged in, as far as a notebook needs it; the Hub ends it."""

    url: str
    root_dir: Path
    token: str = ""
    process: None = None


def log_in(page: Page, hub: Hub, name: str) -> Place:
    """Log in as a person does, which starts their server."""
    page.goto(f"{hub.url}hub/login?next=%2Fuser%2F{name}%2Flab")
    page.get_by_label("Username").fill(name)
    page.get_by_label("Password").fill("any")
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url(re.compile(rf"/user/{name}/lab"), timeout=STEP_MS)
    return Place(f"{hub.url}user/{name}/", hub.folder / "home" / name)


def test_a_student_at_the_teachers_model(page: Page, open_in: Any) -> None:
    port = free_port()
    with MockUpstream(key=KEY) as upstream, Hub(config(port, LIMIT)) as hub:
        wait_for_service(hub)
        hub.start_server("ada")
        began = time.monotonic()
        with person(hub, "grace") as teacher, person(hub, "ben") as ben:
            kwargs = {"base_url": upstream.base_url, "api_key": "env:CLASS_API_KEY"}
            teacher.configure("gpt", "gpt-3", "openai", kwargs, max_in_flight=1)
            teacher.load("gpt", progress=False)

            notebook = open_in(log_in(page, hub, "ada"))
            notebook.show_panel()
            panel, row = notebook.panel, notebook.row("gpt")
            sign = panel.locator(".llmkit-registry")
            expect(sign).to_have_text("Shared registry", timeout=STEP_MS)
            expect(row).to_contain_text("configured by grace · loaded by grace")
            for name, why in (("Unload", "load of `gpt`"), ("Edit", "configuration of `gpt`"), ("Delete", "grace")):
                refused = row.locator("button", has_text=re.compile(f"^{name}$"))
                expect(refused).to_be_disabled(timeout=STEP_MS)
                expect(refused).to_have_attribute("title", re.compile(f"{why}.*grace", re.DOTALL))
            notebook.photograph("hub-1-models")

            # What the teacher does is told through the Hub's proxy.
            teacher.unload("gpt")
            notebook.status("gpt", "unloaded", START_SECONDS)
            teacher.load("gpt", progress=False)
            notebook.status("gpt", "loaded", START_SECONDS)

            # Somebody else is asking: one sees one's place, then the answer while it goes on.
            upstream.never_end("word ", 0.1)
            notebook.button("Ask", row).click()
            with ben.stream("gpt", "Hello") as theirs:
                assert next(theirs) == "word "
                turn = notebook.ask("And I?")
                note = turn.locator(".llmkit-turn-note")
                expect(note).to_have_text("Waiting: place 1 in the queue.", timeout=STEP_MS)
                notebook.photograph("hub-2-waiting")
            expect(turn.locator(".llmkit-answer")).to_contain_text("word word", timeout=STEP_MS)
            expect(note).to_have_text("")
            notebook.button("Stop").click()
            expect(note).to_have_text("Stopped.", timeout=STEP_MS)
            wait_until(lambda: not upstream.open_streams, "the endpoint's end of it", START_SECONDS)
            upstream.respond = None
            turn = notebook.ask("Hello")
            expect(turn.locator(".llmkit-answer")).to_contain_text(ANSWER, timeout=STEP_MS)
            expect(notebook.button("Send")).to_be_enabled(timeout=STEP_MS)

            # Two a day, and no more.
            turn = notebook.ask("Once more")
            expect(turn.locator(".llmkit-turn-error")).to_contain_text("Of your 2 requests a day 0 are left")
            expect(panel.get_by_text("Left: 0 of 2 requests a day")).to_be_visible()
            notebook.photograph("hub-3-budget")

            # The other registry, and back.
            notebook.button("Show your own registry").click()
            expect(sign).to_have_text("Your own registry", timeout=STEP_MS)
            notebook.button("Try the demo model").wait_for()
            notebook.photograph("hub-4-own")
            notebook.button("Show the shared registry").click()
            expect(sign).to_have_text("Shared registry", timeout=STEP_MS)
            notebook.status("gpt", "loaded", START_SECONDS)
        print(f"in the browser: {time.monotonic() - began:.0f} s")
        page.goto("about:blank")  # before the Hub ends
