"""The command against a real server: in this process, and in one of its own."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest

# The servers that a client is tested with are those of its commands.
from client.conftest import certificate, client, fake, https_fake, upstream  # noqa: F401
from mock_upstream import MockUpstream
from support import JupyterServer

from llmkit.cli import main
from llmkit.client import Client


class Terminal:
    """The command in a terminal of its own, read as it prints."""

    def __init__(self, environment: Mapping[str, str], *words: str) -> None:
        self.said = ""
        self.pid, self._file = pty.fork()
        if self.pid == 0:
            os.execve(PROGRAM[0], [*PROGRAM, *words], {**environment, "TERM": "xterm", "COLUMNS": "100"})  # noqa: S606  # our own interpreter
        self.status: int | None = None

    def write(self, text: str) -> None:
        os.write(self._file, text.encode())

    def read_until(self, words: str, seconds: float = 30.0) -> str:
        """Give what was printed before some words; both are then taken."""
        deadline = time.monotonic() + seconds
        while words not in self.said:
            assert time.monotonic() < deadline, f"{words!r} is not in {self.said!r}"
            if not self._read():
                raise AssertionError(f"it has ended without {words!r}: {self.said!r}")
        before, _, self.said = self.said.partition(words)
        return before

    def end(self) -> str:
        """Wait for its end, and give the rest."""
        while self._read():
            pass
        _, status = os.waitpid(self.pid, 0)
        os.close(self._file)
        self.status = os.waitstatus_to_exitcode(status)
        return self.said

    def _read(self) -> bool:
        if not select.select([self._file], [], [], 30)[0]:
            return False
        try:
            part = os.read(self._file, 4096)
        except OSError:  # the end, on Linux
            return False
        self.said += part.decode(errors="replace")
        return bool(part)


PROGRAM = [sys.executable, "-m", "llmkit"]
Run = Callable[..., subprocess.CompletedProcess[str]]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(server: JupyterServer) -> Run:
    """Give a function that runs the command in a process of its own."""

    def do(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*PROGRAM, *words],
            env=server.client_environment(),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return do


@pytest.fixture
def call(server: JupyterServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Give a function that runs the command in this process; it gives exit status, output and errors."""
    monkeypatch.setenv("LLMKIT_SERVER_URL", server.url)
    monkeypatch.setenv("LLMKIT_TOKEN", server.token)

    def do(*words: str) -> tuple[int, str, str]:
        status = main(words)
        said = capsys.readouterr()
        return status, said.out, said.err

    return do


@pytest.fixture
def as_json(call: Call) -> Callable[..., Any]:
    """Give a function that runs the command with ``--json`` and gives its one document."""

    def do(*words: str) -> Any:
        status, out, err = call(*words, "--json")
        assert (status, err) == (0, ""), (status, err)
        assert out.count("\n") == 1
        return json.loads(out)

    return do


@pytest.fixture
def loaded(client: Client, upstream: MockUpstream) -> str:  # noqa: F811
    """Configure and load a model; give its model_id."""
    client.configure("ask", "gpt-3", "openai", {"base_url": upstream.base_url})
    client.load("ask", progress=False)
    return "ask"


@pytest.fixture
def terminal() -> type[Terminal]:
    return Terminal
