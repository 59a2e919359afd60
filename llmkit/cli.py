"""The ``llmkit`` command: what a shell has to know of the server that ``llmkit.connect()`` finds."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmkit._version import __version__
from llmkit.errors import ConnectError, LLMKitError

if TYPE_CHECKING:
    from llmkit.client.connection import Server

USE = 'eval "$(llmkit env)"'


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and give its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return env(arguments.url)
    except LLMKitError as error:
        # Nothing goes to the standard output, so that a shell that evaluates it does nothing.
        print(f"llmkit: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("llmkit", description="Large language models in Jupyter.")
    parser.add_argument("--version", action="version", version=f"llmkit {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "env",
        help=f"print the variables that lead to the Jupyter server, for {USE}",
        description=f"Finds the Jupyter server as llmkit.connect() does, and prints LLMKIT_SERVER_URL and LLMKIT_TOKEN "
        f"for a shell: {USE}. Then: "
        'curl -H "Authorization: token $LLMKIT_TOKEN" "$LLMKIT_SERVER_URL/llm/models/"',
    )
    command.add_argument("--url", help="address of the server, also as copied from the browser with its token")
    return parser


def env(url: str | None) -> int:
    """Print the variables of a shell that lead to the server.

    Raises
    ------
    LLMKitError
        If there is no server, or none that variables can lead to.
    """
    from llmkit.client.discovery import connect  # not needed to print the help

    with connect(url) as client:
        server = client.connection.server
    for name, value in variables_of(server).items():
        print(f"export {name}={shlex.quote(value)}")
    if _has_own_certificate(server):
        way = '--cacert "$LLMKIT_VERIFY"' if server.verify else "--insecure"
        print(f"llmkit: the server has a certificate of its own: curl {way} ...", file=sys.stderr)
    if sys.stdout.isatty():
        print(f"llmkit: {USE} sets them in this shell.", file=sys.stderr)
    return 0


def variables_of(server: Server) -> dict[str, str]:
    """Give the variables that lead to a server.

    Raises
    ------
    ConnectError
        If it listens on a unix socket, which no address can name.
    """
    url = server.url.rstrip("/")
    if server.uds is not None:
        raise ConnectError(
            f"The server listens on the unix socket {server.uds}, which LLMKIT_SERVER_URL cannot name.",
            hint="In Python llmkit.connect() finds it by itself. With the token that `jupyter server list` shows: "
            f"curl --unix-socket {shlex.quote(server.uds)} -H 'Authorization: token TOKEN' {url}/llm/models/",
        )
    variables = {"LLMKIT_SERVER_URL": url, "LLMKIT_TOKEN": server.token or ""}
    if _has_own_certificate(server):
        # A whole path, as the shell may go to another folder; `connect` takes 0 for any certificate.
        variables["LLMKIT_VERIFY"] = str(Path(server.verify).absolute()) if isinstance(server.verify, str) else "0"
    return variables


def _has_own_certificate(server: Server) -> bool:
    return server.url.startswith("https:") and server.verify is not True
