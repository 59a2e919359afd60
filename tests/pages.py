"""README and the pages of docs, taken apart: their blocks of code, and their tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from support import REPOSITORY
from test_docs import parse

PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((REPOSITORY / "docs").glob("*.md")))]


class Block(NamedTuple):
    """A block of code, by the heading that it stands under."""

    page: str
    heading: str
    language: str
    text: str


class Table(NamedTuple):
    """A table, by the heading that it stands under; each row a list of Markdown."""

    page: str
    heading: str
    rows: list[list[str]]


def read(page: str) -> str:
    return (REPOSITORY / page).read_text(encoding="utf-8")


def contents(page: str) -> Iterator[Block | Table]:
    """Give the blocks and tables of a page, in their order."""
    heading, found = "", parse(read(page))
    for index, token in enumerate(found):
        if token.type == "heading_open":
            heading = found[index + 1].content
        elif token.type in ("fence", "code_block"):
            yield Block(page, heading, token.info, token.content)
        elif token.type == "table_open":
            end = next(i for i in range(index, len(found)) if found[i].type == "table_close")
            rows: list[list[str]] = []
            for one in found[index:end]:
                if one.type == "tr_open":
                    rows.append([])
                elif one.type == "inline":
                    rows[-1].append(one.content)
            yield Table(page, heading, rows)


BLOCKS = [one for page in PAGES for one in contents(page) if isinstance(one, Block)]
TABLES = [one for page in PAGES for one in contents(page) if isinstance(one, Table)]


def block(page: str, heading: str, language: str, number: int = 0) -> Block:
    found = [one for one in BLOCKS if (one.page, one.heading, one.language) == (page, heading, language)]
    return found[number]


def table(page: str, heading: str, number: int = 0) -> list[list[str]]:
    return [one for one in TABLES if (one.page, one.heading) == (page, heading)][number].rows


def plain(markdown: str) -> list[str]:
    """Give the pieces of code of a cell."""
    return re.findall(r"`([^`]+)`", markdown)
