"""Look for keys in notebooks before they are shared: ``llmkit check``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from llmkit.cli.output import print_json, write


def add(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add the command of this module."""
    command = commands.add_parser(
        "check",
        parents=[shared],
        help="find API keys in notebooks",
        description="Looks for API keys in sources, outputs, metadata and widget state: well-known beginnings, what "
        "follows Bearer, token, ?token= or the name of a key, and the values of this environment's variables *_KEY, "
        "*_TOKEN, *_SECRET and *_PASSWORD. A key is never printed. "
        "Exit status: 0 none, 1 keys were found, 2 a file cannot be read and no key was found.",
    )
    command.add_argument("notebooks", nargs="+", type=Path, metavar="NOTEBOOK", help="a notebook, or a folder of them")
    command.set_defaults(run=check)


def check(arguments: argparse.Namespace) -> int:
    """Print every key that is found, without the key."""
    from llmkit.cli.keys_in_notebooks import Unreadable, check_notebook, secrets_of

    secrets = secrets_of(os.environ)
    findings, unreadable, checked = [], [], 0
    for given in arguments.notebooks:
        files = sorted(given.rglob("*.ipynb")) if given.is_dir() else [given]
        if not files:
            unreadable.append({"file": str(given), "reason": "it has no notebooks"})
        for file in files:
            try:
                findings += check_notebook(file, secrets)
                checked += 1
            except Unreadable as error:
                unreadable.append({"file": str(file), "reason": str(error)})
    if arguments.json:
        found = [finding.to_wire() for finding in findings]
        print_json({"findings": found, "unreadable": unreadable, "checked": checked})
    else:
        write("".join(f"{finding}\n" for finding in findings))
        for one in unreadable:
            print(f"llmkit: {one['file']} cannot be read: {one['reason']}", file=sys.stderr)
        if findings:
            hint = "Remove each, and make a new key where it was shared; llmkit keeps keys on the server."
            print(f"{len(findings)} found. {hint}", file=sys.stderr)
    return 1 if findings else 2 if unreadable else 0
