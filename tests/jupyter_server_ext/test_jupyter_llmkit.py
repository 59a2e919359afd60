"""``jupyter llmkit``: the extension alone, in a real process."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from mock_upstream import ANSWER, MockUpstream
from support import JupyterServer, wait_until

from jupyter_server_ext.app import DEFAULT_PORT, LLMKitApp
from llmkit.client import Watcher, connect


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_it_prints_a_curl_line_that_works() -> None:
    with JupyterServer("llmkit", env={"JUPYTER_TOKEN": ""}) as server:
        (line,) = wait_until(lambda: re.findall(r"^ +(curl .*)$", server.log, re.MULTILINE), "a curl line")
        ran = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=30, check=True)  # noqa: S602
        assert '"models":[]' in ran.stdout


def test_it_serves_on_8105_of_this_machine_alone_unless_told_otherwise() -> None:
    assert DEFAULT_PORT == 8105
    config = LLMKitApp.serverapp_config
    assert (config["port"], config["ip"]) == (8105, "127.0.0.1")


def test_the_command_line_wins() -> None:
    with JupyterServer("llmkit") as server:  # which asks for any free port
        assert f":{DEFAULT_PORT}/" not in server.url


def test_it_leaves_other_extensions_out() -> None:
    with JupyterServer("llmkit") as server:
        assert server.request("GET", "llm/health").status_code == 200
        assert server.request("GET", "lab").status_code == 404


@pytest.fixture(scope="module")
def bare() -> Iterator[JupyterServer]:
    with JupyterServer("llmkit") as running:
        (running.root_dir / "secret.txt").write_text("secret")
        yield running


GONE = [
    "api/kernels",
    "api/kernels/x/channels",
    "api/kernelspecs",
    "api/sessions",
    "api/terminals",
    "api/contents",
    "api/contents/secret.txt",
    "api/config/notebook",
    "api/nbconvert",
    "files/secret.txt",
    "view/secret.txt",
    "nbconvert/html/secret.txt",
    "kernelspecs/python3/logo-32x32.png",
    "terminals/websocket/1",
    "lab",
    "tree",
]


@pytest.mark.parametrize("path", GONE)
def test_it_runs_no_code_and_shows_no_files(bare: JupyterServer, path: str) -> None:
    for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
        answer = bare.request(method, path, json={})
        assert answer.status_code == 404, (method, path, answer.status_code)
        assert "secret" not in answer.text.replace("secret.txt", "")


@pytest.mark.parametrize("path", ["api", "api/status", "api/me", "metrics", "login", "llm/health", "llm/models/"])
def test_it_keeps_what_clients_need(bare: JupyterServer, path: str) -> None:
    assert bare.request("GET", path).status_code in (200, 302)


def test_a_client_works_as_with_any_other(bare: JupyterServer) -> None:
    changed = threading.Event()
    with connect(bare.url, bare.token) as client, MockUpstream() as upstream:
        assert client.permissions() == {"read", "write", "execute"}
        watcher = Watcher(client)
        watcher.subscribe(lambda now: changed.set() if _status_of(now, "m") == "loaded" else None)
        wait_until(lambda: watcher.state == "connected", "the events")
        try:
            client.configure("m", "gpt-3", "openai", {"base_url": upstream.base_url})
            client.load("m", progress=False)
            assert str(client.prompt("m", "Hello")) == ANSWER
            assert changed.wait(20), "no live event"
        finally:
            watcher.close()
        client.delete("m", unload=True)
    environment = bare.client_environment()
    done = subprocess.run(
        [sys.executable, "-m", "llmkit", "env"], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert f"LLMKIT_SERVER_URL={bare.url.rstrip('/')}\n" in done.stdout.replace("'", "")


def _status_of(watcher: Watcher, model_id: str) -> str | None:
    models = watcher.snapshot.models if watcher.snapshot is not None else []
    return next((model.status for model in models if model.model_id == model_id), None)


def test_it_can_be_shut_down_by_its_api() -> None:
    with JupyterServer("llmkit") as server:
        assert server.request("POST", "api/shutdown").status_code == 200
        assert server.process is not None
        assert server.process.wait(30) == 0


def test_an_extension_of_a_jupyterlab_takes_nothing_away(server: JupyterServer) -> None:
    for path in ("api/kernels", "api/contents", "api/terminals", "lab"):
        assert server.request("GET", path).status_code == 200, path
