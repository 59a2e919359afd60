"""What the commands print: JSON, tables for a terminal, or plain lines for a pipe."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from typing import Any

# What could move the cursor, rename the window or worse: C0 without tab and line end, DEL, and C1.
_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    r"""Take out of a text what a terminal would obey: models, logs and servers are not to steer it.

    Examples
    --------
    >>> printable("a \x1b[31mred\x1b[0m word\n")
    'a red word\n'
    """
    return _CONTROL.sub("", text)


def print_json(value: Any) -> None:
    """Print one JSON value on one line, at once."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def note(text: str) -> None:
    """Say something to the person beside what is printed for others."""
    print(printable(text), file=sys.stderr, flush=True)


def write(text: str) -> None:
    """Print a piece of text at once; to a terminal only what it shows, to a pipe as it is."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: drawn on a terminal, in a pipe plain lines with two blanks between the columns."""
    if sys.stdout.isatty():
        from rich import box  # slow to import, and of use only here
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            # As `Text`, brackets in a name are no markup.
            table.add_row(*(Text(printable(cell), style=_STYLES.get(cell, "")) for cell in row))
        Console().print(table)
        return
    lines = [list(columns), *([" ".join(cell.split()) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


_STYLES = {"loaded": "green", "ok": "green", "loading": "yellow", "warn": "yellow", "failed": "red", "fail": "red"}
