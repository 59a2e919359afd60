"""The main job as a person does it: JupyterLab, the panel, a real vLLM engine."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest
from support import ANSWER, LOAD_SECONDS, QUESTION, JupyterServer

pytestmark = [pytest.mark.browser, pytest.mark.vllm, pytest.mark.timeout(600)]


@pytest.fixture
def own_lab() -> Iterator[JupyterServer]:
    """Give a JupyterLab without any configuration; the test ends its engine itself."""
    with JupyterServer("lab") as running:
        yield running


def curl(server: JupyterServer, method: str, path: str) -> None:
    """Do something with curl, as another person would."""
    if shutil.which("curl") is None:
        server.request(method, path)
        return
    command = ["curl", "-sf", "-X", method, "-H", f"Authorization: token {server.token}", server.url + path]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def test_from_nothing_to_an_answer_and_back(own_lab: JupyterServer, open_in: Any) -> None:
    notebook = open_in(own_lab)
    notebook.show_panel()
    notebook.button("Try the demo model").wait_for()
    notebook.photograph("journey-1-start")

    started = time.monotonic()
    notebook.button("Try the demo model").click()
    notebook.status("demo", "loading", 5)
    row = notebook.row("demo")
    row.locator(".llmkit-phase", has_text="Starting the engine").wait_for()
    notebook.photograph("journey-2-loading")
    notebook.status("demo", "loaded", LOAD_SECONDS)
    print(f"from the click to a loaded model: {time.monotonic() - started:.1f} s")
    assert "loaded in" in row.inner_text()
    notebook.photograph("journey-3-loaded")

    notebook.button("Ask", row).click()
    assert notebook.panel.get_by_label("Model", exact=True).input_value() == "demo"
    started = time.monotonic()
    turn = notebook.ask(QUESTION)
    turn.locator(".llmkit-turn-note", has_text="tokens/s").wait_for()
    print(f"from the click to the whole answer: {time.monotonic() - started:.2f} s")
    assert ANSWER in turn.locator(".llmkit-answer").inner_text()
    notebook.photograph("journey-4-answer")

    # What another client does is shown within a second.
    notebook.tab("Models")
    curl(own_lab, "POST", "llm/unload_model/demo")
    started = time.monotonic()
    notebook.status("demo", "unloaded", 2)
    seconds = time.monotonic() - started
    print(f"shown {seconds:.2f} s after curl had unloaded it")
    assert seconds <= 1.0

    # A load is cancelled, with nothing left of it.
    notebook.button("Load", row).click()
    row.locator(".llmkit-phase", has_text="Starting the engine").wait_for()
    notebook.page.wait_for_timeout(1500)
    started = time.monotonic()
    notebook.button("Cancel", row).click()
    notebook.status("demo", "unloaded", 10)
    seconds = time.monotonic() - started
    print(f"cancelled in {seconds:.2f} s")
    assert seconds <= 5.0

    notebook.button("Delete", row).click()
    notebook.button("Delete it", row).click()
    notebook.button("Try the demo model").wait_for()
    assert own_lab.request("GET", "llm/configurations/").json() == []
