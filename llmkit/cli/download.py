"""Get a model from the hub ahead of time: ``llmkit download``."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from typing import Any

from llmkit.cli.output import note, print_json
from llmkit.errors import NotReady


def add(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add the command of this module."""
    command = commands.add_parser(
        "download",
        parents=[shared],
        help="get a model from the hub ahead of time",
        description="Downloads what an engine loads of a model into the hub's cache of this machine, and prints the "
        "folder. Goes on with what an interrupted download has left. The variables HF_HOME, HF_TOKEN, HF_ENDPOINT "
        "and the other HF_* count.",
    )
    command.add_argument("name", metavar="NAME", help="the model in the hub, for example Qwen/Qwen3-0.6B")
    command.add_argument("--revision", metavar="R", help="a branch, tag or commit (main)")
    command.add_argument("--all", action="store_true", help="every file of the repository")
    command.set_defaults(run=download)


def download(arguments: argparse.Namespace) -> int:
    """Bring a model here, and say where it lies.

    Raises
    ------
    LLMKitError
        Why it cannot be had.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        raise NotReady(
            "The package huggingface_hub is not installed here.",
            hint=f"Install it: {sys.executable} -m pip install huggingface_hub",
        )
    from llmkit.cli import hub
    from llmkit.client.results import describe_bytes

    plan = hub.make_plan(arguments.name, arguments.revision, everything=arguments.all)
    if not arguments.json:
        size = f"{describe_bytes(plan.bytes)} to download" if plan.bytes else "all of it is here"
        note(f"{plan.name}: {len(plan.files)} files, {size}, in {plan.folder}")
    try:
        path = hub.fetch(plan, quiet=arguments.json)
    except KeyboardInterrupt:
        if not arguments.json:
            note("What has come is kept; the same command goes on with it.")
        raise
    if arguments.json:
        print_json(
            {
                "model_name": plan.name,
                "revision": plan.revision,
                "path": path,
                "files": len(plan.files),
                "downloaded_bytes": plan.bytes,
            }
        )
    else:
        print(path)
    return 0
