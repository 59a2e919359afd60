"""Keys for tools: ``llmkit key create``, ``list`` and ``revoke``."""

from __future__ import annotations

import argparse
from datetime import datetime
from typing import Any

from llmkit.cli.output import note, print_json, print_table
from llmkit.cli.values import end_of_key


def add(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add the commands of this module."""
    command = commands.add_parser(
        "key",
        help="keys for tools, which open /llm/v1 and /llm/inference/ alone",
        description="Keys for tools. A Jupyter token opens terminals and notebooks; a key opens /llm/v1 and "
        "/llm/inference/ alone, for the models that you name, until it expires or is revoked.",
    )
    actions = command.add_subparsers(required=True, metavar="ACTION", dest="action")
    create_ = actions.add_parser(
        "create",
        parents=[shared],
        help="make a key, and print it this once",
        description="Makes a key and prints it, this once: the server keeps only a digest. "
        "Example: llmkit key create --name editor --models 'code-*' --expires 30d",
    )
    create_.add_argument("--name", metavar="NAME", help="what it is called in lists; one is made up if missing")
    create_.add_argument(
        "--models", nargs="+", default=[], metavar="GLOB", help="the models that it may ask (all), as 'code-*'"
    )
    create_.add_argument(
        "--expires", type=end_of_key, metavar="DURATION|DATE", help="30d, 12h, 90m, 2030-01-31 (when it is revoked)"
    )
    create_.set_defaults(run=create)
    list_ = actions.add_parser("list", parents=[shared], help="name, models, end and last use of every key")
    list_.set_defaults(run=list_keys)
    revoke_ = actions.add_parser("revoke", parents=[shared], help="have a key open nothing any more")
    revoke_.add_argument("name", metavar="NAME")
    revoke_.set_defaults(run=revoke)


def create(arguments: argparse.Namespace) -> int:
    """Make a key and print it: the key alone, so that a shell can take it."""
    from llmkit.client import connect

    with connect(arguments.url) as client:
        made = client.create_key(arguments.name, models=arguments.models, expires=arguments.expires)
        url = client.url
    if arguments.json:
        print_json(made.model_dump(mode="json"))
        return 0
    print(made.key, flush=True)
    note(f"This is the key `{made.name}`, shown this once. OpenAI's clients take it as api_key of {url}llm/v1.")
    return 0


def list_keys(arguments: argparse.Namespace) -> int:
    """Print what is known of every key."""
    from llmkit.client import connect

    with connect(arguments.url) as client:
        keys = client.keys()
    if arguments.json:
        print_json([key.model_dump(mode="json") for key in keys])
        return 0
    rows = [
        (
            key.name,
            " ".join(key.models) or "all",
            _when(key.created_at),
            f"{_when(key.expires_at)}{' (over)' if key.expired else ''}" if key.expires_at else "never",
            _when(key.last_used_at) if key.last_used_at else "never",
        )
        for key in keys
    ]
    print_table(("name", "models", "created", "expires", "last used"), rows)
    return 0


def revoke(arguments: argparse.Namespace) -> int:
    """Revoke a key."""
    from llmkit.client import connect

    with connect(arguments.url) as client:
        client.revoke_key(arguments.name)
    if arguments.json:
        print_json({"name": arguments.name, "revoked": True})
    else:
        print(f"{arguments.name} is revoked.")
    return 0


def _when(time: datetime) -> str:
    return time.astimezone().strftime("%Y-%m-%d %H:%M")
