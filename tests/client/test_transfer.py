"""Configurations that go to a file and come back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mock_upstream import MockUpstream

from llmkit.client import Client
from llmkit.errors import DoesNotFit
from llmkit.schemas import ModelConfigRequest

CANARY = "sk-canary-7d1f0c55"


def configure(client: Client, upstream: MockUpstream) -> None:
    upstream.key = CANARY
    url = upstream.base_url
    client.configure("raw", "gpt-3", "openai", {"engine": {"base_url": url, "api_key": CANARY}}, idle_ttl=60)
    client.configure("named", "gpt-3", "openai", {"base_url": url, "api_key": "env:SOME_API_KEY", "temperature": 0.5})
    client.configure("plain", "llmkit/demo", "vllm", {"max_model_len": 256}, restart="on_failure")


def rows(done: Any) -> dict[str, str]:
    return {one.model_id: one.outcome for one in done}


def test_configurations_go_to_a_file_without_keys_and_come_back(
    client: Client, upstream: MockUpstream, tmp_path: Path
) -> None:
    configure(client, upstream)
    path = tmp_path / "models.json"
    assert client.export_configurations(path) == ["raw"]
    text = path.read_text()
    assert CANARY not in text
    assert "env:SOME_API_KEY" in text
    assert "config_id" not in text
    assert rows(client.import_configurations(path)) == dict.fromkeys(("raw", "named", "plain"), "unchanged")
    before = {c.model_id: c.to_wire() for c in client.configurations()}
    for model_id in before:
        client.delete(model_id)
    done = client.import_configurations(path)
    assert rows(done) == dict.fromkeys(("raw", "named", "plain"), "created")
    assert "client.update('raw'" in repr(done)
    assert "<td" in done._repr_html_()
    for stored in client.configurations():
        wire, earlier = stored.to_wire(), before[stored.model_id]
        wire["config_id"] = earlier["config_id"]
        if stored.model_id == "raw":
            del earlier["model_kwargs"]["engine"]["api_key"]
        assert wire == earlier


def test_the_file_can_be_given_to_an_operator(client: Client, upstream: MockUpstream, tmp_path: Path) -> None:
    configure(client, upstream)
    client.export_configurations(tmp_path / "models.json")
    for body in json.loads((tmp_path / "models.json").read_text())["configurations"]:
        ModelConfigRequest.model_validate(body)


def test_what_is_different_is_replaced_only_if_asked_for_and_keeps_its_key(
    client: Client, upstream: MockUpstream, tmp_path: Path
) -> None:
    configure(client, upstream)
    path = tmp_path / "models.json"
    client.export_configurations(path)
    client.update("raw", idle_ttl=None, description="mine")
    client.update("plain", model_kwargs={})
    expected = {"raw": "different", "named": "unchanged", "plain": "different"}
    assert rows(client.import_configurations(path)) == expected
    assert client.configuration(client.model("raw").config_id).description == "mine"
    expected = {"raw": "updated", "named": "unchanged", "plain": "updated"}
    assert rows(client.import_configurations(path, replace=True)) == expected
    stored = client.configuration(client.model("raw").config_id)
    assert (stored.idle_ttl, stored.description) == (60, None)
    client.load("raw", progress=False)  # with its key
    assert str(client.prompt("raw", "Hello"))


def test_what_the_server_refuses_stands_beside_what_it_takes(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "models.json"
    good = {"model_id": "good", "model_name": "n", "model_type": "openai"}
    path.write_text(
        json.dumps(
            {
                "llmkit_configurations": 1,
                "configurations": [
                    {**good, "model_id": "bad", "model_kwargs": {"temprature": 1}},
                    good,
                ],
            }
        )
    )
    done = client.import_configurations(path)
    assert rows(done) == {"bad": "refused", "good": "created"}
    assert "temperature" in done[0].note


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not JSON"),
        ("[]", "no file of configurations"),
        ('{"llmkit_configurations": 2, "configurations": []}', "version 2"),
        ('{"llmkit_configurations": 1}', "configurations: Field required"),
        ('{"llmkit_configurations": 1, "configurations": [{"model_id": ""}]}', r"configurations\.0\.model_id"),
        ('{"llmkit_configurations": 1, "configurations": [%s, %s]}', "more than one configuration of good"),
    ],
)
def test_a_file_with_a_mistake_changes_nothing_and_names_it(
    client: Client, tmp_path: Path, text: str, said: str
) -> None:
    path = tmp_path / "models.json"
    good = '{"model_id": "good", "model_name": "n", "model_type": "openai"}'
    path.write_text(text.replace("%s", good))
    before = client.configurations()
    with pytest.raises(DoesNotFit, match=said):
        client.import_configurations(path)
    assert client.configurations() == before


def test_a_file_that_cannot_be_written_leaves_the_one_that_was_there(client: Client, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="models"):
        client.export_configurations(tmp_path / "none" / "models.json")
    with pytest.raises(FileNotFoundError):
        client.import_configurations(tmp_path / "models.json")
    assert list(tmp_path.iterdir()) == []
