"""The ``llmkit`` command: everything the client can do, from a shell.

Exit statuses: 0 all is well; 1 the server refused, failed or was not found, or a check found something; 2 the command
was used wrongly, or a file cannot be read; 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from llmkit._version import __version__
from llmkit.errors import LLMKitError

__all__ = ["main"]

INTERRUPTED = 130
EPILOG = """exit status: 0 all is well; 1 the server refused, failed or was not found, or a check found something;
2 wrong usage, or a file cannot be read; 130 interrupted.

The server is found as llmkit.connect() finds it; LLMKIT_SERVER_URL and LLMKIT_TOKEN name one."""


class _WrongUsage(Exception):
    def __init__(self, parser: argparse.ArgumentParser, message: str) -> None:
        super().__init__(message)
        self.parser = parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _WrongUsage(self, message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and give its exit status.

    Parameters
    ----------
    argv
        The words after ``llmkit``; by default those of this process.

    Returns
    -------
    int
        0 all is well, 1 an error of the server or a finding, 2 wrong usage, 130 interrupted.

    Examples
    --------
    >>> main(["load"])
    2
    """
    words = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in words
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an answer may have letters that this terminal has not
    try:
        arguments = _parser().parse_args(words)
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except _WrongUsage as error:
        return _say_usage(error.parser, str(error), as_json=as_json)
    except LLMKitError as error:
        _say_error(error, as_json=as_json)
        return 1
    except KeyboardInterrupt:
        if as_json:
            _say_json({"message": "Interrupted.", "code": "interrupted"})
        elif sys.stderr.isatty():
            print(file=sys.stderr)  # the terminal has shown ^C
        return INTERRUPTED
    except BrokenPipeError:
        # Who reads has enough, as `head` does. What is still in the buffer must not fail once more at the exit.
        _give_up_output()
        return 1
    except UnicodeError:
        _say_plainly("What was given is not UTF-8.", "wrong_usage", as_json=as_json)
        return 2
    except OSError as error:
        _say_plainly(f"{error.strerror or type(error).__name__}.", "failed", as_json=as_json)
        _give_up_output()
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    from llmkit.cli import chat, check, doctor, download, env, models, prompts, server, tool_keys

    parser = _Parser(
        "llmkit",
        description="Large language models in Jupyter.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"llmkit {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", action="store_true", help="print JSON and nothing else; errors too, to stderr")
    served = argparse.ArgumentParser(add_help=False, parents=[shared])
    served.add_argument("--url", help="address of the server, also as copied from the browser with its token")
    for group in (server, models, prompts, chat, tool_keys, env):
        group.add(commands, served)
    for group in (download, check):
        group.add(commands, shared)
    doctor.add(commands, served)
    return parser


def _say_usage(parser: argparse.ArgumentParser, message: str, *, as_json: bool) -> int:
    if as_json:
        _say_json({"message": message, "code": "wrong_usage", "hint": parser.format_usage().strip()})
    else:
        parser.print_usage(sys.stderr)
        print(f"{parser.prog}: {message}", file=sys.stderr)
    return 2


def _say_error(error: LLMKitError, *, as_json: bool) -> None:
    # Nothing goes to the standard output, so that a shell that evaluates it does nothing.
    if as_json:
        _say_json(error.to_wire()["error"])
        return
    from llmkit.cli.output import printable  # not needed for the help

    for text in (f"llmkit: {error}", *getattr(error, "__notes__", ())):
        print(printable(text) if sys.stderr.isatty() else text, file=sys.stderr)


def _say_plainly(message: str, code: str, *, as_json: bool) -> None:
    if as_json:
        _say_json({"message": message, "code": code})
    else:
        print(f"llmkit: {message}", file=sys.stderr)


def _give_up_output() -> None:
    with contextlib.suppress(OSError):  # a test's own output is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say_json(error: dict[str, object]) -> None:
    print(json.dumps({"error": error}), file=sys.stderr)
