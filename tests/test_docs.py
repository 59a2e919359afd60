"""The pages: what they link to and name is there; and one command decides what is well written."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token
from support import REPOSITORY

ROOMS = ("llmkit", "jupyter_server_ext", "tests", "notebooks", "binder", "docs", ".ci")
PLACE = re.compile(rf"(?:{'|'.join(map(re.escape, ROOMS))})/[\w./*-]*|[A-Z]+\.md|Makefile|pyproject\.toml")
NOT_MADE_YET = ("tests/reliability/results", "tests/browser/screenshots")
"""Folders that a command makes."""


def pages(root: Path) -> dict[Path, list[str]]:
    """Give the Markdown of every page and notebook below a folder: a text for each page, or for each of its cells."""
    found = {path: [path.read_text(encoding="utf-8")] for path in _files(root, "*.md")}
    for path in _files(root, "*.ipynb"):
        cells = nbformat.read(path, as_version=4).cells
        found[path] = [cell.source for cell in cells if cell.cell_type == "markdown"]
    return found


def _files(root: Path, pattern: str) -> Iterator[Path]:
    # Not those of packages in a virtual environment.
    yield from sorted(root.glob(pattern))
    for room in ROOMS:
        yield from (path for path in sorted((root / room).rglob(pattern)) if ".ipynb_checkpoints" not in path.parts)


def parse(text: str) -> list[Token]:
    """Parse a Markdown text."""
    parser = MarkdownIt("commonmark").enable("table")
    parser.validateLink = lambda url: True  # it would take a `file:` for plain text
    return parser.parse(text)


def tokens(text: str) -> Iterator[Token]:
    """Give every token of a Markdown text, those within a line too."""
    for token in parse(text):
        yield token
        yield from token.children or ()


def links(text: str) -> Iterator[str]:
    """Give what a text links to and shows."""
    for token in tokens(text):
        if token.type in ("link_open", "image"):
            yield str(token.attrs.get("href") or token.attrs.get("src") or "")
        elif token.type in ("html_block", "html_inline"):
            yield from re.findall(r"""(?:href|src)=["']([^"']*)""", token.content)


def anchors(text: str) -> set[str]:
    """Give the names of a text's headings, as GitHub and JupyterLab make them."""
    titles = [after.content for token, after in pairwise(parse(text)) if token.type == "heading_open"]
    return {name for title in titles for name in (_github(title), title.replace(" ", "-"))}


def _github(title: str) -> str:
    return re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-")


def dead_links(root: Path) -> list[str]:
    """Give every link of the pages below a folder that leads to nothing in it, with the page that has it."""
    found = pages(root)
    dead = []
    for page, texts in found.items():
        for link in (link for text in texts for link in links(text)):
            url = urlsplit(link)
            if url.scheme in ("http", "https", "mailto") or link.startswith("attachment:"):
                continue
            target = (page.parent / unquote(url.path)).resolve() if url.path else page
            known = {name for text in found.get(target, ()) for name in anchors(text)}
            if (
                url.scheme
                or not target.is_relative_to(root.resolve())
                or not target.exists()
                or (url.fragment and target in found and unquote(url.fragment) not in known)
            ):
                dead.append(f"{page.relative_to(root)}: {link}")
    return dead


def test_no_link_is_dead() -> None:
    found = pages(REPOSITORY)
    names = {str(path.relative_to(REPOSITORY)) for path in found}
    assert {"README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "SECURITY.md", "CHANGELOG.md"} < names
    assert {"tests/reliability/README.md", "notebooks/quickstart.ipynb"} < names
    count = sum(len(list(links(text))) for texts in found.values() for text in texts)
    print(f"{len(found)} pages, {count} links")
    assert count >= 15
    assert dead_links(REPOSITORY) == []


def test_a_dead_link_is_found_wherever_it_stands(tmp_path: Path) -> None:
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "picture.png").touch()
    (tmp_path / "README.md").write_text(
        "# One & two\n[a](#one--two) [b](picture.png) [c](notebooks/x.ipynb#Three-four) [d](https://example.com/gone)\n"
        "`[e](no.md)`\n\n| t |\n| --- |\n| [f](no.md) |\n\n![g](no.png) [h](#three) [i](../outside.md) [j][k]\n\n"
        "<img src='no.svg'> [l](picture.png#any) [m](notebooks/x.ipynb#four) [n](file:///etc/passwd)\n\n[k]: no/k.md\n"
    )
    cells = [
        nbformat.v4.new_markdown_cell("## Three four\n[o](../README.md) [p](README.md)"),
        nbformat.v4.new_code_cell("[q](no.md)"),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "notebooks" / "x.ipynb")
    assert dead_links(tmp_path.resolve()) == [
        *(f"README.md: {link}" for link in ("no.md", "no.png", "#three", "../outside.md", "no/k.md", "no.svg")),
        *(f"README.md: {link}" for link in ("notebooks/x.ipynb#four", "file:///etc/passwd")),
        "notebooks/x.ipynb: README.md",
    ]


def named_places(text: str) -> set[str]:
    """Give every file and folder of the repository that a text names as code."""
    codes = [token.content for token in tokens(text) if token.type in ("code_inline", "fence", "code_block")]
    return {place.rstrip("./") for code in codes for place in PLACE.findall(code)}


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "SECURITY.md", "tests/reliability/README.md"]
)
def test_files_that_a_page_names_exist(page: str) -> None:
    places = named_places((REPOSITORY / page).read_text(encoding="utf-8"))
    assert places
    missing = [place for place in places if not list(REPOSITORY.glob(place)) and not place.startswith(NOT_MADE_YET)]
    assert missing == []


def test_the_map_names_only_files_of_its_rooms_and_leaves_no_room_out() -> None:
    rows = re.findall(r"^\| (`[^|]*`) \| (.*) \|$", (REPOSITORY / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert len(rows) >= 8
    rooms = set()
    for first, second in rows:
        here = re.findall(r"`([^`]+)`", first)
        rooms |= {path.rstrip("/") for path in here}
        for name in re.findall(r"`([\w*/]+\.(?:py|js|css)|\w+/)`", second):
            inside = any(list((REPOSITORY / path).rglob(name)) for path in here)
            assert inside or (REPOSITORY / name).exists(), f"{first}: {name}"
    package = REPOSITORY / "llmkit"
    expected = {f"llmkit/{path.parent.name}" for path in package.glob("*/__init__.py")}
    expected |= {f"llmkit/{path.name}" for path in package.glob("*.py") if not path.name.startswith("_")}
    assert expected - rooms == set()


def test_what_is_checked_before_a_commit_is_what_make_lint_checks(tmp_path: Path) -> None:
    hooks = [
        hook
        for repository in yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"]
        for hook in repository["hooks"]
    ]
    assert [hook["entry"] for hook in hooks] == ["make lint"]
    assert all(hook["language"] == "system" and not hook["pass_filenames"] for hook in hooks)
    ready = tmp_path / "ready"
    ready.touch()  # the environment need not be set up for a plan
    planned = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", f"READY={ready}", "lint"],
        cwd=REPOSITORY,
        env={**os.environ, "MAKEFLAGS": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout.splitlines()
    assert planned == [".venv/bin/ruff check", ".venv/bin/ruff format --check", ".venv/bin/mypy"]
    assert {"ruff", "mypy"} <= tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"].keys()
