"""Look at everything that llmkit needs, and say what to do: ``llmkit doctor``."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from llmkit.cli.output import print_json, print_table


def add(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add the command of this module."""
    command = commands.add_parser(
        "doctor",
        parents=[shared],
        help="look at this system, what is installed and which server is found",
        description="Looks at everything that llmkit needs. Exit status: 0 nothing has failed, 1 something has.",
    )
    command.set_defaults(run=doctor)


def doctor(arguments: argparse.Namespace) -> int:
    """Print what was looked at, how it is, and what to do."""
    from llmkit.cli.system import look

    checks = look(arguments.url)
    failed = any(check.status == "fail" for check in checks)
    if arguments.json:
        print_json({"ok": not failed, "checks": [check.to_wire() for check in checks]})
    elif sys.stdout.isatty():
        rows = [(check.name, check.status, "\n".join(filter(None, (check.message, check.hint)))) for check in checks]
        print_table(("", "", ""), rows)
    else:
        for check in checks:
            first, *more = [*check.message.splitlines(), *check.hint.splitlines()]
            print(f"{check.status:4}  {check.name}: {first}")
            print("".join(f"      {line}\n" for line in more), end="")
    return 1 if failed else 0
