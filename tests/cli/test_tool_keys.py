"""``llmkit key``: made, printed once, listed and revoked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from support import JupyterServer

from llmkit.cli.keys_in_notebooks import check_notebook
from llmkit.client import Client
from llmkit.tool_keys import PREFIX, is_key, new_key


@pytest.fixture(autouse=True)
def _revoked(client: Client) -> Iterator[None]:
    yield
    keys = client.keys()
    for key in keys:
        client.revoke_key(key.name)


def test_a_shell_gets_the_key_alone_and_a_person_the_rest(call: Any, run: Any, server: JupyterServer) -> None:
    done = run("key", "create", "--name", "editor", "--models", "code-*", "chat", "--expires", "30d")
    assert done.returncode == 0, done.stderr
    key = done.stdout.removesuffix("\n")
    assert is_key(key)
    assert f"{server.url}llm/v1" in done.stderr
    assert key not in done.stderr
    headers = {"Authorization": f"Bearer {key}"}
    assert httpx.get(f"{server.url}llm/v1/models", headers=headers, trust_env=False).status_code == 200
    status, out, _ = call("key", "list")
    assert status == 0
    assert "editor  code-* chat  " in out
    assert key[8:] not in out
    assert call("key", "revoke", "editor") == (0, "editor is revoked.\n", "")
    assert httpx.get(f"{server.url}llm/v1/models", headers=headers, trust_env=False).status_code == 401


def test_json_has_the_key_once(as_json: Callable[..., Any]) -> None:
    made = as_json("key", "create", "--expires", "2099-01-31")
    assert is_key(made["key"])
    assert made["expires_at"].startswith("2099-01-3")
    (listed,) = as_json("key", "list")
    assert "key" not in listed
    assert listed["name"] == made["name"]
    assert as_json("key", "revoke", made["name"]) == {"name": made["name"], "revoked": True}
    assert as_json("key", "list") == []


@pytest.mark.parametrize(("given", "seconds"), [("90m", 5400), ("12h", 43200), ("30d", 2592000)])
def test_an_end_can_be_a_duration(as_json: Callable[..., Any], given: str, seconds: int) -> None:
    made = as_json("key", "create", "--expires", given)
    left = datetime.fromisoformat(made["expires_at"]) - datetime.now(UTC)
    assert timedelta(seconds=seconds - 300) < left <= timedelta(seconds=seconds)


@pytest.mark.parametrize("words", [("key",), ("key", "revoke"), ("key", "create", "--expires", "soon")])
def test_wrong_usage_is_status_2(call: Any, words: tuple[str, ...]) -> None:
    status, out, err = call(*words)
    assert (status, out) == (2, "")
    assert "usage: llmkit key" in err


def test_what_the_server_refuses_is_status_1(call: Any) -> None:
    assert call("key", "create", "--name", "a")[0] == 0
    for words, code in (
        (("key", "create", "--name", "a"), "key_exists"),
        (("key", "create", "--name", "../a"), "does_not_fit"),
        (("key", "create", "--expires", "2020-01-01"), "does_not_fit"),
        (("key", "revoke", "b"), "key_not_found"),
    ):
        status, out, err = call(*words, "--json")
        assert (status, out) == (1, "")
        assert json.loads(err)["error"]["code"] == code


def test_the_command_takes_no_key_for_the_servers_token(call: Any, client: Client, monkeypatch: Any) -> None:
    key = client.create_key("editor").key
    monkeypatch.setenv("LLMKIT_TOKEN", key)
    for words in (("ps",), ("run", "demo", "Hello")):
        status, out, err = call(*words)
        assert (status, out) == (1, "")
        assert "refuses a key for tools" in err
        assert f"base_url='{client.url}llm/v1'" in err
        assert key not in err


def test_the_check_of_notebooks_finds_a_key(tmp_path: Path) -> None:
    key = new_key()
    cells = [{"cell_type": "code", "source": [f"OpenAI(api_key='{key}')\n", "llmkit-widgets-and-some-more-words"]}]
    file = tmp_path / "a.ipynb"
    file.write_text(json.dumps({"cells": cells}))
    (finding,) = check_notebook(file, {})
    assert (finding.kind, finding.line) == ("llmkit key", 1)
    assert finding.masked.startswith(f"{PREFIX}***")
    assert key[8:] not in str(finding)
