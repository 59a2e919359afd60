"""Ask a model once: ``llmkit run``."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from llmkit.cli.output import print_json, write
from llmkit.cli.values import assignment_without_key, finite


def add(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add the command of this module."""
    command = commands.add_parser(
        "run",
        parents=[shared],
        help="ask a model, and print its answer as it comes",
        description='Asks a loaded model. Example: llmkit run demo "What is the capital of France?" '
        "Ctrl+C ends the generation on the server. With --json each piece is a line of JSON and the last line the "
        "whole answer; with --no-stream there is only that.",
    )
    command.add_argument("model", metavar="MODEL")
    command.add_argument("prompt", metavar="PROMPT", help="- reads it from the standard input")
    add_generation(command)
    command.add_argument("--no-stream", action="store_true", help="print the answer when it is complete")
    command.set_defaults(run=run)


def add_generation(command: argparse.ArgumentParser) -> None:
    """Add what decides how a model answers."""
    command.add_argument("--system", metavar="TEXT", help="the system prompt")
    command.add_argument("--temperature", type=finite, metavar="T", help="0 takes the likeliest token")
    command.add_argument("--max-tokens", type=int, metavar="N", help="tokens of the answer at most")
    command.add_argument(
        "--set",
        action="append",
        type=assignment_without_key,
        default=[],
        metavar="KEY=VALUE",
        help="another parameter, for example seed=1; the value is JSON, else a text",
    )


def generation_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Give the parameters of a prompt."""
    named = {name: getattr(arguments, name) for name in ("system", "temperature", "max_tokens")}
    return {**dict(arguments.set), **{name: value for name, value in named.items() if value is not None}}


def run(arguments: argparse.Namespace) -> int:
    """Ask a model and print its answer.

    Raises
    ------
    LLMKitError
        Why there is no answer, for example `ModelNotLoaded`.
    """
    from llmkit.client import connect

    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    prompt.encode()  # bytes that are no text are wrong usage, and `main` says so
    given = generation_of(arguments)
    with connect(arguments.url) as client:
        if arguments.no_stream:
            answer = client.prompt(arguments.model, prompt, **given)
            if arguments.json:
                print_json(answer.model_dump(mode="json"))
            else:
                _end_line(answer.response)
            return 0
        with client.stream(arguments.model, prompt, **given) as stream:
            for piece in stream.pieces():
                if arguments.json:
                    print_json({"delta": piece.text, **({"reasoning": piece.reasoning} if piece.reasoning else {})})
                else:
                    write(piece.text)
            if arguments.json and stream.answer is not None:
                print_json(stream.answer.model_dump(mode="json"))
            elif not stream.text.endswith("\n"):
                write("\n")
    return 0


def _end_line(text: str) -> None:
    write(text if text.endswith("\n") else f"{text}\n")
