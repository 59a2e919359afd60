"""What of the form only a browser can show: what screen readers are told, and a key that stays in the page."""

from __future__ import annotations

from typing import Any

import pytest
from mock_upstream import MockUpstream
from playwright.sync_api import Locator, expect
from support import JupyterServer

pytestmark = pytest.mark.browser
CANARY = "sk-canary-Zq3vT8wL"


def described(control: Locator) -> str:
    """Give the text that a screen reader says about a control after its name."""
    return str(
        control.evaluate(
            "e => (e.getAttribute('aria-describedby') ?? '').split(' ')"
            ".map((id) => document.getElementById(id)?.textContent ?? '').join(' ')"
        )
    )


def test_the_form_is_checked_while_it_is_filled_and_says_so_to_everybody(
    open_notebook: Any, upstream: MockUpstream
) -> None:
    notebook = open_notebook()
    notebook.show_panel()
    notebook.tab("Configure")
    panel = notebook.panel
    panel.get_by_label("model_type").select_option("openai")
    panel.get_by_label("api_key").wait_for()
    name = panel.get_by_label("model_id", exact=True)
    address = panel.get_by_label("base_url", exact=True)
    name.press_sequentially("no good")
    address.press_sequentially("nonsense")
    expect(address).to_have_attribute("aria-invalid", "true")
    expect(name).to_have_attribute("aria-invalid", "true")
    assert "the address must begin with http" in described(address).lower()
    assert "does not fit" in described(name).lower()
    # Nobody who types is disturbed by what comes back meanwhile.
    assert (name.input_value(), address.input_value()) == ("no good", "nonsense")
    expect(panel.get_by_label("model_name", exact=True)).not_to_have_attribute("aria-invalid", "true")
    address.fill(upstream.base_url)
    name.fill("good")
    expect(address).not_to_have_attribute("aria-invalid", "true")
    expect(name).not_to_have_attribute("aria-invalid", "true")


def test_a_fold_says_whether_it_is_open_and_hides_what_is_in_it(open_notebook: Any, upstream: MockUpstream) -> None:
    del upstream  # its models are deleted before and after
    notebook = open_notebook()
    notebook.show_panel()
    notebook.tab("Configure")
    fold, inside = notebook.button("Policies"), notebook.panel.get_by_label("idle_ttl", exact=True)
    for opened in ("true", "false", "true"):
        fold.press("Enter")
        expect(fold).to_have_attribute("aria-expanded", opened)
        expect(inside).to_be_visible(visible=opened == "true")


def test_a_configuration_is_edited_and_its_key_replaced_after_a_refusal_without_typing_it_twice(
    open_notebook: Any, upstream: MockUpstream, lab: JupyterServer
) -> None:
    kwargs = {"base_url": upstream.base_url, "api_key": "sk-old", "temperature": 0.25}
    config_id = lab.configure("edited", model_name="gpt-3", model_type="openai", model_kwargs=kwargs)
    upstream.key = CANARY
    notebook = open_notebook()
    notebook.show_panel()
    notebook.button("Edit", notebook.row("edited")).click()
    panel = notebook.panel
    panel.get_by_text("Editing edited").wait_for()
    key, address = panel.get_by_label("api_key"), panel.get_by_label("base_url", exact=True)
    assert key.get_attribute("placeholder") == "a key is stored; type to replace it"
    expect(panel.get_by_label("model_id", exact=True)).to_be_disabled()
    expect(panel.get_by_label("temperature", exact=True)).to_have_value("0.25")
    key.fill(CANARY)
    address.fill("nonsense")
    expect(address).to_have_attribute("aria-invalid", "true")
    for theme, kind in (("JupyterLab Light", "light"), ("JupyterLab Dark", "dark")):
        notebook.page.set_viewport_size({"width": 1200, "height": 1300})
        notebook.use_theme(theme)
        for width in (1200, 670):  # the panel is 300 wide in the narrow one
            notebook.page.set_viewport_size({"width": width, "height": 1300})
            address.scroll_into_view_if_needed()
            notebook.photograph(f"form-edit-{kind}-{width}")
    notebook.button("Save").click()
    panel.get_by_text("Some fields need another value.").wait_for()
    assert key.input_value() == CANARY
    address.fill(upstream.base_url)
    notebook.button("Save and load").click()
    notebook.status("edited", "loaded")
    assert upstream.requests[-1][1]["Authorization"] == f"Bearer {CANARY}"
    assert key.input_value() == ""
    kept = lab.request("GET", f"llm/configuration/{config_id}").json()["model_kwargs"]
    assert kept["temperature"] == 0.25
    assert kept["api_key"]["secret"] is True
