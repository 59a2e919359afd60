"""``jupyter llmkit``: the extension alone, in a real process."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from support import JupyterServer, wait_until

from jupyter_server_ext.app import DEFAULT_PORT, LLMKitApp


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
