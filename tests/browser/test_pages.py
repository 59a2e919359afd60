"""Pages of the repository, as JupyterLab shows them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from playwright.sync_api import Page
from support import REPOSITORY, JupyterServer

THEMES = {"JupyterLab Light": "true", "JupyterLab Dark": "false"}
START_MS = 90_000
SCREENSHOTS = Path(__file__).parent / "screenshots"
PAGE = REPOSITORY / "ARCHITECTURE.md"
SETTINGS = "lab/api/settings/@jupyterlab"


@pytest.mark.browser
@pytest.mark.parametrize("theme", THEMES)
def test_the_picture_of_the_architecture_is_drawn(page: Page, lab: JupyterServer, theme: str) -> None:
    text = PAGE.read_text(encoding="utf-8")
    (lab.root_dir / PAGE.name).write_text(text, encoding="utf-8")
    for plugin, setting in (
        ("apputils-extension:themes", {"theme": theme}),
        ("docmanager-extension:plugin", {"defaultViewers": {"markdown": "Markdown Preview"}}),
    ):
        assert lab.request("PUT", f"{SETTINGS}/{plugin}", json={"raw": json.dumps(setting)}).is_success
    # A workspace of its own: no tab of another test is opened again.
    page.goto(f"{lab.url}lab/workspaces/page-{THEMES[theme]}/tree/{PAGE.name}?token={lab.token}")
    page.locator(f"body[data-jp-theme-light='{THEMES[theme]}']").wait_for(state="attached", timeout=START_MS)
    picture = page.locator(".jp-RenderedMermaid img")
    picture.wait_for(timeout=START_MS)
    drawn = unquote(picture.get_attribute("src") or "")
    SCREENSHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"architecture-{theme.split()[1].lower()}.png")
    names = re.findall(r'^ +\w+\[\(?"([\w ]+)', text, re.MULTILINE)
    assert len(names) >= 10
    assert [name for name in names if name not in drawn] == []
