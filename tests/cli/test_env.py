"""``llmkit env``, in shells and in terminals of real servers."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import websocket
from support import JupyterServer, own_environment

from llmkit.cli import main
from llmkit.cli.env import variables_of
from llmkit.client.connection import Server
from llmkit.errors import ConnectError

LLMKIT = str(Path(sys.executable).parent / "llmkit")
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
CURL = 'curl -sS -H "Authorization: token $LLMKIT_TOKEN" "$LLMKIT_SERVER_URL/llm/health"'


def sh(script: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def around(server: JupyterServer, **more: str) -> dict[str, str]:
    """Give the environment of a shell of somebody who has this server running."""
    return {**own_environment(), "JUPYTER_RUNTIME_DIR": str(server.folder / "runtime"), **more}


# -- in a shell ----------------------------------------------------------------------------------------------------


@needs_curl
@pytest.mark.parametrize("command", [LLMKIT, f"{sys.executable} -m llmkit"])
def test_a_shell_that_evaluates_it_reaches_the_server(server: JupyterServer, command: str) -> None:
    ran = sh(f'eval "$({command} env)" && {CURL}', around(server))
    assert (ran.returncode, ran.stderr) == (0, "")
    assert json.loads(ran.stdout)["status"] == "ok"


def test_it_prints_the_server_without_a_slash_and_its_token(server: JupyterServer) -> None:
    ran = sh(f"{LLMKIT} env", around(server))
    address = re.escape(server.url.rstrip("/")).replace(r"127\.0\.0\.1", r"(127\.0\.0\.1|localhost)")
    assert re.fullmatch(rf"export LLMKIT_SERVER_URL={address}\nexport LLMKIT_TOKEN={server.token}\n", ran.stdout)


def test_the_variables_it_prints_lead_it_to_the_same_server(server: JupyterServer) -> None:
    environment = {**own_environment(), "LLMKIT_SERVER_URL": server.url, "LLMKIT_TOKEN": server.token}
    once = sh(f"{LLMKIT} env", environment)
    twice = sh(f'eval "$({LLMKIT} env)"; {LLMKIT} env', environment)
    assert once.stdout == twice.stdout != ""


def test_an_address_copied_from_the_browser_is_taken(server: JupyterServer) -> None:
    ran = sh(f"{LLMKIT} env --url '{server.url}lab/tree/a.ipynb?token={server.token}'", own_environment())
    assert f"LLMKIT_SERVER_URL={server.url.rstrip('/')}\n" in ran.stdout
    assert f"LLMKIT_TOKEN={server.token}\n" in ran.stdout


def test_a_shell_does_nothing_when_there_is_no_server(tmp_path: Path) -> None:
    environment = {**own_environment(), "JUPYTER_RUNTIME_DIR": str(tmp_path), "LLMKIT_TOKEN": "mine"}
    ran = sh(f'{LLMKIT} env; echo "status $?"', environment)
    assert ran.stdout == "status 1\n"
    assert "No Jupyter server with llmkit was found" in ran.stderr
    assert "Traceback" not in ran.stderr
    ran = sh(f'eval "$({LLMKIT} env)"; echo "$LLMKIT_TOKEN$LLMKIT_SERVER_URL"', environment)
    assert ran.stdout == "mine\n"


def test_a_wrong_token_is_said_and_nothing_is_printed(server: JupyterServer) -> None:
    ran = sh(f"{LLMKIT} env --url '{server.url}?token=wrong'", own_environment())
    assert (ran.returncode, ran.stdout) == (1, "")
    assert "refuses the token" in ran.stderr


def test_as_json_it_is_one_object(server: JupyterServer) -> None:
    told = json.loads(sh(f"{LLMKIT} env --json", around(server)).stdout)
    assert set(told) == {"LLMKIT_SERVER_URL", "LLMKIT_TOKEN"}
    assert told["LLMKIT_TOKEN"] == server.token


# -- servers of other kinds ----------------------------------------------------------------------------------------


def test_what_a_shell_could_run_is_quoted(
    fake: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    token = "it's $(touch /tmp/x); `id`"
    monkeypatch.setenv("LLMKIT_SERVER_URL", fake.url)
    monkeypatch.setenv("LLMKIT_TOKEN", token)
    assert main(["env"]) == 0
    ran = sh(f'{capsys.readouterr().out}printf %s "$LLMKIT_TOKEN"', own_environment())
    assert ran.stdout == token


@needs_curl
def test_a_certificate_goes_along_and_curl_is_told_how_to_trust_it(https_fake: Any, certificate: Path) -> None:
    environment = {**own_environment(), "LLMKIT_VERIFY": certificate.name}
    script = f'cd {certificate.parent}; eval "$({LLMKIT} env --url {https_fake.url})"; cd /; '
    ran = sh(script + CURL.replace("curl", 'curl --cacert "$LLMKIT_VERIFY"'), environment)
    assert json.loads(ran.stdout)["status"] == "ok"
    assert 'curl --cacert "$LLMKIT_VERIFY"' in ran.stderr
    ran = sh(f"{LLMKIT} env --url {https_fake.url}", {**environment, "LLMKIT_VERIFY": "0"})
    assert "export LLMKIT_VERIFY=0\n" in ran.stdout
    assert "--insecure" in ran.stderr
    ran = sh(f"{LLMKIT} env --url {https_fake.url}", own_environment())
    assert (ran.returncode, ran.stdout) == (1, "")
    assert "LLMKIT_VERIFY" in ran.stderr


def test_a_certificate_is_no_matter_where_there_is_none() -> None:
    assert set(variables_of(Server("http://h/", verify="x"))) == {"LLMKIT_SERVER_URL", "LLMKIT_TOKEN"}


def test_a_unix_socket_is_said_to_be_out_of_reach_of_variables() -> None:
    with pytest.raises(ConnectError, match="unix socket /tmp/a b") as raised:
        variables_of(Server("http://localhost/base/", "secret", uds="/tmp/a b"))
    assert "--unix-socket '/tmp/a b'" in str(raised.value)
    assert "http://localhost/base/llm/models/" in str(raised.value)
    assert "secret" not in str(raised.value)


# -- in a terminal of JupyterLab -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two() -> Iterator[tuple[JupyterServer, JupyterServer]]:
    """Give two servers of one runtime folder; to a script the newer one comes first."""
    with JupyterServer() as older, JupyterServer() as newer:
        for file in (newer.folder / "runtime").glob("jpserver-*.json"):
            shutil.copy(file, older.folder / "runtime")
        yield older, newer


def type_into(server: JupyterServer, line: str) -> str:
    """Type a line into a new terminal of a server; give what it printed up to the mark."""
    name = server.request("POST", "api/terminals").json()["name"]
    address = f"{server.url.replace('http', 'ws', 1)}terminals/websocket/{name}"
    header = [f"Authorization: token {server.token}"]
    said = ""
    with closing(websocket.create_connection(address, header=header, timeout=60)) as terminal:
        terminal.send(json.dumps(["stdin", f"{line}; echo the''-end\n"]))
        while "the-end" not in said:
            kind, *content = json.loads(terminal.recv())
            said += content[0] if kind == "stdout" else ""
    server.request("DELETE", f"api/terminals/{name}")
    return said


@needs_curl
def test_a_terminal_leads_to_its_own_server(two: tuple[JupyterServer, JupyterServer]) -> None:
    older, newer = two
    script = sh(f"{LLMKIT} env", around(older))
    assert newer.token in script.stdout  # what is not in a terminal takes the newest
    said = type_into(older, f'eval "$({LLMKIT} env)"; echo "url=$LLMKIT_SERVER_URL token=$LLMKIT_TOKEN"; {CURL}')
    assert f"url={older.url.rstrip('/')} token={older.token}" in said
    assert '"status":"ok"' in said


def test_a_terminal_whose_process_is_no_child_of_the_server_goes_by_the_folder(
    two: tuple[JupyterServer, JupyterServer],
) -> None:
    older, newer = two
    for root, token in ((older.root_dir, older.token), (newer.root_dir, newer.token)):
        ran = sh(f"{LLMKIT} env", around(older, JUPYTER_SERVER_ROOT=str(root), JUPYTER_SERVER_URL=newer.url))
        assert f"LLMKIT_TOKEN={token}\n" in ran.stdout
