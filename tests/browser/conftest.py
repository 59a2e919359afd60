"""A real JupyterLab in a real Chromium, and what a person does in it."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mock_upstream import MockUpstream
from playwright.sync_api import Browser, Locator, Page, sync_playwright
from support import JupyterServer, chromium

SCREENSHOTS = Path(__file__).parent / "screenshots"
FLAGS = [
    "--no-sandbox",  # root, as in containers, may run no sandbox
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
START_MS = 90_000
STEP_MS = 15_000
numbers = itertools.count(1)


class Notebook:
    """A notebook of a JupyterLab server, open in a page, its cells run by keys as a person does."""

    def __init__(self, page: Page, server: JupyterServer, *cells: str) -> None:
        self.page = page
        self.server = server
        self.problems: list[str] = []
        number = next(numbers)
        name = f"notebook-{number}.ipynb"
        self.file = server.root_dir / name
        self.file.write_text(json.dumps(notebook(*cells)))
        page.set_default_timeout(STEP_MS)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        # A workspace of its own: no tab of another test is opened again.
        page.goto(f"{server.url}lab/workspaces/w{number}/tree/{name}?token={server.token}")
        self.wait_for_kernel()

    def wait_for_kernel(self) -> None:
        """Return when cells can be run."""
        self.page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=START_MS)
        self.page.get_by_text(re.compile(r"Python 3 \(ipykernel\) \| Idle")).wait_for(timeout=START_MS)

    def run(self, number: int) -> None:
        """Run a cell; the first is 0."""
        self.page.locator(".jp-Notebook .jp-CodeCell .cm-content").nth(number).click()
        self.page.keyboard.press("Shift+Enter")

    def output(self, number: int) -> Locator:
        """Give the output of a cell."""
        return self.page.locator(".jp-Notebook .jp-CodeCell").nth(number).locator(".jp-OutputArea-output")

    def show_panel(self) -> None:
        """Run the first cell and wait for the panel."""
        self.run(0)
        self.panel.locator(".llmkit-tab").first.wait_for(state="attached")

    def restart_kernel(self) -> None:
        """Restart the kernel from the menu, as a person does."""
        self.page.locator(".lm-MenuBar-item", has_text="Kernel").click()
        self.page.locator(".lm-Menu-item", has_text=re.compile("^Restart Kernel…")).click()
        self.page.locator(".jp-Dialog-button.jp-mod-accept").click()
        self.page.locator(".jp-Dialog").wait_for(state="detached")
        self.wait_for_kernel()

    def save(self) -> str:
        """Save the notebook and give the file's text."""
        before = self.file.stat().st_mtime_ns
        self.page.locator("[data-command='docmanager:save']").first.click()
        deadline = time.monotonic() + 10
        text = ""
        while not text and time.monotonic() < deadline:
            self.page.wait_for_timeout(50)
            if self.file.stat().st_mtime_ns != before:
                text = self.file.read_text()  # nothing, for a moment, while it is being written
        assert text
        return text

    def use_theme(self, name: str) -> None:
        """Choose a theme of JupyterLab from its menu."""
        self.page.locator(".lm-MenuBar-item", has_text="Settings").click()
        self.page.locator(".lm-Menu-item", has_text="Theme").first.click()
        self.page.locator(".lm-Menu-item", has_text=re.compile(f"^{name}$")).first.click()
        light = "false" if "Dark" in name else "true"
        self.page.locator(f"body[data-jp-theme-light='{light}']").wait_for(state="attached")

    def photograph(self, name: str) -> None:
        """Take a picture for a person to look at."""
        SCREENSHOTS.mkdir(exist_ok=True)
        self.page.wait_for_timeout(300)  # the end of transitions
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png")

    # -- the panel ---------------------------------------------------------------------------------------------

    @property
    def panel(self) -> Locator:
        """Give the panel."""
        return self.page.locator(".llmkit-panel")

    def tab(self, name: str) -> None:
        """Open a tab of the panel."""
        self.panel.get_by_role("tab", name=name).click()

    def row(self, model_id: str) -> Locator:
        """Give the row of a model."""
        name = self.page.locator(".llmkit-name > span:first-child", has_text=re.compile(f"^{re.escape(model_id)}$"))
        return self.panel.locator(".llmkit-row").filter(has=name)

    def status(self, model_id: str, status: str, seconds: float = STEP_MS / 1000) -> None:
        """Wait until a model's row shows a status."""
        self.row(model_id).locator(f".llmkit-is-{status}").wait_for(timeout=seconds * 1000)

    def button(self, name: str, inside: Locator | None = None) -> Locator:
        """Give a button that can be seen, by its whole name."""
        return (inside or self.panel).get_by_role("button", name=name, exact=True)

    def ask(self, prompt: str) -> Locator:
        """Send a prompt; give the turn that shows it."""
        turns = self.panel.locator(".llmkit-turn")
        count = turns.count()
        self.panel.get_by_label("Prompt", exact=True).fill(prompt)
        self.button("Send").click()
        turns.nth(count).wait_for()
        return turns.nth(count)


def notebook(*cells: str) -> dict[str, object]:
    """Give a notebook as nbformat has it."""
    return {
        "cells": [
            {
                "cell_type": "code",
                "id": f"cell-{number}",
                "source": source,
                "metadata": {},
                "outputs": [],
                "execution_count": None,
            }
            for number, source in enumerate(cells)
        ],
        "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


@pytest.fixture(autouse=True)
def jp_asyncio_loop() -> None:
    """Stand in for pytest-jupyter's loop: Playwright runs one of its own on this thread."""


@pytest.fixture(autouse=True)
def jp_server_cleanup() -> None:
    """Stand in for pytest-jupyter's clean-up: there is no server in this process."""


# Its event loop must not go on beneath the tests of other modules.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    made = browser.new_page(viewport={"width": 1200, "height": 900})
    yield made
    made.close()


@pytest.fixture(scope="module")
def lab() -> Iterator[JupyterServer]:
    """Give a JupyterLab of one module's tests."""
    with JupyterServer("lab") as running:
        yield running


@pytest.fixture
def upstream(lab: JupyterServer) -> Iterator[MockUpstream]:
    """Give an endpoint, and a server without models before and after."""
    with MockUpstream() as running:
        yield running
        for one in lab.request("GET", "llm/configurations/").json():
            lab.request("DELETE", f"llm/configuration/{one['config_id']}?unload=true")
        for one in lab.request("GET", "llm/conversations/").json()["conversations"]:
            lab.request("DELETE", f"llm/conversations/{one['conversation_id']}")


@pytest.fixture
def configure(lab: JupyterServer, upstream: MockUpstream) -> Callable[[str], str]:
    """Give a function that configures a model of the mock endpoint, as curl would, and gives its ``config_id``."""

    def make(model_id: str) -> str:
        kwargs = {"base_url": upstream.base_url}
        return lab.configure(model_id, model_name="gpt-3", model_type="openai", model_kwargs=kwargs)

    return make


@pytest.fixture
def open_in(page: Page) -> Iterator[Callable[..., Notebook]]:
    """Give a function that opens a new notebook with the panel's cell, and more, on a server; no script may fail."""
    opened: list[Notebook] = []

    def open_it(server: JupyterServer, *more: str) -> Notebook:
        opened.append(Notebook(page, server, "import llmkit\nllmkit.panel()", *more))
        return opened[-1]

    yield open_it
    page.goto("about:blank")
    for one in opened:
        if one.server.process is not None:
            for session in one.server.request("GET", "api/sessions").json():
                one.server.request("DELETE", f"api/sessions/{session['id']}")
    for one in opened:
        assert one.problems == []


@pytest.fixture
def open_notebook(lab: JupyterServer, open_in: Callable[..., Notebook]) -> Callable[..., Notebook]:
    """Give the same function for this module's JupyterLab."""
    return lambda *more: open_in(lab, *more)
