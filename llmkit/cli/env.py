"""``llmkit env``: the variables of a shell that lead to the server that ``llmkit.connect()`` finds."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.cli.output import print_json
from llmkit.errors import ConnectError

if TYPE_CHECKING:
    from llmkit.client.connection import Server

USE = 'eval "$(llmkit env)"'


def add(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add the command of this module."""
    command = commands.add_parser(
        "env",
        parents=[shared],
        help=f"print the variables that lead to the Jupyter server, for {USE}",
        description=f"Finds the Jupyter server as llmkit.connect() does, and prints LLMKIT_SERVER_URL and LLMKIT_TOKEN "
        f"for a shell: {USE}. Then: "
        'curl -H "Authorization: token $LLMKIT_TOKEN" "$LLMKIT_SERVER_URL/llm/models/"',
    )
    command.set_defaults(run=env)


def env(arguments: argparse.Namespace) -> int:
    """Print the variables of a shell that lead to the server.

    Raises
    ------
    LLMKitError
        If there is no server, or none that variables can lead to.
    """
    from llmkit.client.discovery import connect  # not needed to print the help

    with connect(arguments.url) as client:
        server = client.connection.server
    variables = variables_of(server)
    if arguments.json:
        print_json(variables)
        return 0
    for name, value in variables.items():
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
