"""What all commands share: help, usage, errors, exit statuses, and what a terminal gets."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import pytest
from mock_upstream import MockUpstream
from support import JupyterServer, own_environment

from llmkit import __version__
from llmkit.cli import main
from llmkit.cli.output import print_table, printable
from llmkit.client import Client

COMMANDS = ("status", "ps", "logs", "configure", "load", "unload", "delete", "run", "chat", "env", "download", "check")
HELP_SECONDS = 0.3


def run(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llmkit", *words]
    environment = {**own_environment(), **environ}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.alone
def test_the_help_is_there_at_once_and_names_every_command() -> None:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        done = run("--help")
        seconds.append(time.perf_counter() - start)
    print(f"llmkit --help: {min(seconds):.3f} s")
    assert min(seconds) <= HELP_SECONDS
    assert done.returncode == 0
    assert all(f"    {name}" in done.stdout for name in (*COMMANDS, "doctor"))
    assert "exit status" in done.stdout


def test_the_command_loads_nothing_heavy_before_it_is_needed() -> None:
    heavy = {"pydantic", "httpx", "tornado", "jupyter_server", "psutil", "rich", "huggingface_hub"}
    code = (
        "import sys, contextlib\nfrom llmkit.cli import main\n"
        "with contextlib.suppress(SystemExit): main(['--help'])\n"
        f"print('loaded', {heavy!r} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.endswith("loaded set()\n")


def test_it_says_its_version() -> None:
    assert run("--version").stdout == f"llmkit {__version__}\n"


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("load",),
        ("nonsense",),
        ("load", "a", "--wait=perhaps"),
        ("logs", "a", "--tail=x"),
        ("run", "a", "b", "--temperature=nan"),
        ("unload", "a", "--drain=inf"),
        ("configure", "a", "b", "--type=openai", "--idle-ttl=nan"),
        ("run", "a", "b", "--set", "x=" + "[" * 50_000),
    ],
)
def test_wrong_usage_is_status_2(words: tuple[str, ...]) -> None:
    done = run(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: llmkit")
    told = json.loads(run(*words, "--json").stderr)["error"]
    assert told["code"] == "wrong_usage"


@pytest.mark.parametrize(
    "words", [("status",), ("ps",), ("load", "a"), ("run", "a", "b"), ("chat", "a"), ("logs", "a")]
)
def test_without_a_server_it_is_status_1(words: tuple[str, ...], tmp_path: Any) -> None:
    done = run(*words, JUPYTER_RUNTIME_DIR=str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("llmkit: No Jupyter server with llmkit was found")
    assert "Traceback" not in done.stderr
    done = run(*words, "--json", JUPYTER_RUNTIME_DIR=str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert json.loads(done.stderr)["error"]["code"] == "server_not_found"


def test_a_reader_that_has_enough_is_no_error_that_is_shown() -> None:
    code = f"set -o pipefail; {sys.executable} -m llmkit doctor | true"
    done = subprocess.run(
        ["bash", "-c", code], env=own_environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_output_that_cannot_be_written_is_an_error_in_one_line() -> None:
    code = f"{sys.executable} -m llmkit doctor > /dev/full"
    done = subprocess.run(
        ["sh", "-c", code], env=own_environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (1, "llmkit: No space left on device.\n")


def test_a_terminal_gets_tables(client: Client, upstream: MockUpstream, server: JupyterServer, terminal: Any) -> None:
    client.configure("shown", "gpt-3", "openai", {"base_url": upstream.base_url})
    client.load("shown", progress=False)
    for words in (("ps",), ("status",)):
        running = terminal(server.client_environment(), *words)
        said = running.end()
        assert running.status == 0
        assert "\u2500" in said
        assert "\x1b[32mloaded" in said
        assert "shown" in said


def test_what_would_steer_a_terminal_is_taken_out() -> None:
    assert printable("a\x1b]0;title\x07b\x1b[2Jc\td\n\x9b1m") == "a]0;titlebc\td\n1m"


def test_a_table_in_a_pipe_is_plain(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("a", "bb"), [("[red]", "1\n2"), ("x", "")])
    assert capsys.readouterr().out == "a      bb\n[red]  1 2\nx\n"


def test_main_gives_the_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["load"]) == 2
    assert "usage: llmkit load" in capsys.readouterr().err
