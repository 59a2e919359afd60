"""Talk with a model: ``llmkit chat``."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llmkit.cli.output import note, print_json, write
from llmkit.cli.prompts import add_generation, generation_of
from llmkit.errors import LLMKitError

if TYPE_CHECKING:
    from llmkit.client import Client

HELP = "/exit ends, /clear forgets the conversation; Ctrl+C ends an answer."


def add(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add the command of this module."""
    command = commands.add_parser(
        "chat",
        parents=[shared],
        help="talk with a model, turn by turn",
        description=f"Talks with a loaded model. {HELP} Without a terminal each line of the input is a prompt.",
    )
    command.add_argument("model", metavar="MODEL")
    add_generation(command)
    command.set_defaults(run=chat)


def chat(arguments: argparse.Namespace) -> int:
    """Ask turn by turn, each with what was said before, until the end of the input.

    Raises
    ------
    LLMKitError
        Without a terminal, why there is no answer; in a terminal it is said, and one can go on.
    """
    from llmkit.client import connect

    person = sys.stdin.isatty() and not arguments.json
    messages: list[dict[str, str]] = []
    with connect(arguments.url) as client:
        client.model(arguments.model)  # a name that is wrong is said before anything is typed
        if person:
            note(f"{arguments.model}. {HELP}")
        for prompt in _prompts(person=person):
            word = prompt.strip()
            if word == "/exit":
                break
            if word == "/clear":
                messages.clear()
            elif word:
                try:
                    answer = _ask(client, arguments, prompt, messages)
                except (LLMKitError, KeyboardInterrupt) as error:
                    if not person:
                        raise
                    note(f"\nllmkit: {error}" if isinstance(error, LLMKitError) else "\n(ended)")
                    continue
                messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return 0


def _ask(client: Client, arguments: argparse.Namespace, prompt: str, messages: list[dict[str, str]]) -> str:
    given = {**generation_of(arguments), **({"messages": list(messages)} if messages else {})}
    with client.stream(arguments.model, prompt, **given) as stream:
        for piece in stream:
            if not arguments.json:
                write(piece)
        if arguments.json and stream.answer is not None:
            print_json(stream.answer.model_dump(mode="json"))
        elif not stream.text.endswith("\n"):
            write("\n")
        return stream.text


def _prompts(*, person: bool) -> Iterator[str]:
    """Give what is typed, or the lines of the standard input."""
    if not person:
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    with contextlib.suppress(ImportError):  # there is none on Windows
        importlib.import_module("readline")  # arrow keys and what was typed before
    while True:
        try:
            yield input("> ")
        except EOFError:
            note("")
            return
