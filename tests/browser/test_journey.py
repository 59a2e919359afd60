"""The main job as a person does it: JupyterLab, the panel, a real vLLM engine."""

from __future__ import annotations

import re
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
    version = re.search(r"vllm \d[\w.+]*", row.inner_text())
    assert version
    notebook.photograph("journey-3-loaded")

    notebook.button("Ask", row).click()
    assert notebook.panel.get_by_label("Model", exact=True).input_value() == "demo"
    started = time.monotonic()
    turn = notebook.ask(QUESTION)
    turn.locator(".llmkit-turn-note", has_text="tokens/s").wait_for()
    assert version[0] in turn.locator(".llmkit-turn-note").inner_text()
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


def test_every_tab_with_a_real_engine(own_lab: JupyterServer, open_in: Any) -> None:
    notebook = open_in(own_lab, "")
    notebook.show_panel()
    panel = notebook.panel

    # A mistake that only the engine finds, and its cure with one click.
    notebook.tab("Configure")
    panel.get_by_label("model_type").select_option("vllm")
    panel.get_by_label("model_id").fill("capitals")
    panel.get_by_label("model_name").fill("llmkit/demo")
    panel.get_by_label("max_model_len").first.fill("100000")
    panel.locator(".llmkit-memory", has_text="KV cache 128 MiB").wait_for()
    notebook.photograph("real-configure")
    notebook.button("Save and load").click()
    notebook.status("capitals", "failed", LOAD_SECONDS)
    row = notebook.row("capitals")
    fix = row.get_by_role("button", name=re.compile("^Set max_model_len to"))
    fix.wait_for()
    notebook.photograph("failure-card-light")
    notebook.use_theme("JupyterLab Dark")
    notebook.photograph("failure-card-dark")
    notebook.use_theme("JupyterLab Light")
    fix.click()
    notebook.status("capitals", "loading", 5)
    notebook.button("Log", row).click()
    notebook.status("capitals", "loaded", LOAD_SECONDS)
    log = row.get_by_role("log")
    log.get_by_text(re.compile("vLLM|APIServer|EngineCore")).first.wait_for()
    panel.locator(".llmkit-legend li", has_text="capitals").wait_for()  # its share of the memory
    notebook.photograph("real-models")
    notebook.button("Close log", row).click()

    # A conversation.
    notebook.button("Ask", row).click()
    turn = notebook.ask(QUESTION)
    turn.locator(".llmkit-turn-note", has_text="tokens/s").wait_for()
    assert ANSWER in turn.locator(".llmkit-answer").inner_text()
    turn = notebook.ask("Which country has Tokyo as its capital?")
    turn.locator(".llmkit-turn-note", has_text="tokens/s").wait_for()
    assert "Japan" in turn.locator(".llmkit-answer").inner_text()
    notebook.photograph("real-prompt")

    # What was done, as code that runs as it is.
    panel.get_by_role("button", name=re.compile("Show as code")).click()
    code = panel.locator(".llmkit-source-text:visible", has_text="client")
    code.wait_for()
    panel.get_by_label("Prompt", exact=True).fill("What is the capital of Italy?")
    code.filter(has_text="Italy").wait_for()
    notebook.page.locator(".jp-Notebook .jp-CodeCell .cm-content").nth(1).fill(code.inner_text())
    notebook.run(1)
    notebook.output(1).filter(has_text="The capital of Italy is Rome.").wait_for(timeout=30_000)

    # One model with two sets of parameters, at once.
    notebook.tab("Compare")
    notebook.button("Run").wait_for()
    panel.get_by_role("checkbox", name="Temperature").nth(1).check()
    notebook.button("Run").click()
    panel.locator(".llmkit-turn-note:visible", has_text="in all").nth(1).wait_for()
    figures = panel.locator(".llmkit-figures tbody tr")
    assert figures.count() == 2
    assert all("s" in text for text in figures.all_inner_texts())
    notebook.photograph("real-compare")

    notebook.tab("Models")
    notebook.button("Unload", row).click()
    row.get_by_text(re.compile("freed .* of RAM")).wait_for()
