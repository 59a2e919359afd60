"""Conversations kept by a real server, as the client gives them."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from llmkit.client import Client, connect
from llmkit.errors import ConversationChanged, ConversationNotFound, IncompatibleVersion
from llmkit.schemas import ConversationRequest, ConversationTurn


def test_a_conversation_is_saved_and_given_back(client: Client) -> None:
    turn = ConversationTurn(
        model_id="demo", prompt="Grüße \U0001f600", response="Hello", reasoning="Hm", note="2 tokens"
    )
    body = ConversationRequest(title="Greetings", system="Be kind.", parameters={"top_p": 0.5}, turns=[turn])
    before = len(client.conversations().conversations)
    assert client.save_conversation("kept.1", body) == 1
    try:
        kept = client.conversation("kept.1")
        assert (kept.revision, kept.turns, kept.system, kept.parameters) == (1, [turn], "Be kind.", {"top_p": 0.5})
        assert abs((datetime.now(UTC) - kept.updated_at).total_seconds()) < 60
        told = client.conversations()
        assert told.kept
        assert told.conversations[0].title == "Greetings"
        assert client.save_conversation("kept.1", body.model_copy(update={"revision": 1})) == 2
        with pytest.raises(ConversationChanged) as raised:
            client.save_conversation("kept.1", body.model_copy(update={"revision": 1}))
        assert raised.value.details == {"revision": 2}
    finally:
        client.delete_conversation("kept.1")
    assert len(client.conversations().conversations) == before
    for ask in (client.conversation, client.delete_conversation):
        with pytest.raises(ConversationNotFound):
            ask("kept.1")


def test_what_a_newer_server_adds_to_a_conversation_is_left_out(fake: Any) -> None:
    told = {"conversation_id": "c", "revision": 3, "updated_at": "2026-01-02T03:04:05Z", "turns": [], "stars": 5}
    fake.replies["GET", "/llm/conversations/c"] = (200, json.dumps(told))
    with connect(fake.url) as connected:
        kept = connected.conversation("c")
    assert (kept.revision, kept.updated_at) == (3, datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))


def test_a_conversation_that_cannot_be_read_hides_no_other(fake: Any) -> None:
    summary = {"conversation_id": "c", "title": "C", "turns": 1, "revision": 3, "updated_at": "2026-01-02T03:04:05Z"}
    strange = {**summary, "conversation_id": "d", "turns": "several"}
    fake.replies["GET", "/llm/conversations/"] = (200, {"conversations": [strange, summary, {}], "kept": True})
    whole = {"conversation_id": "d", "revision": 3, "updated_at": "2026-01-02T03:04:05Z", "turns": [{"said": 5}]}
    fake.replies["GET", "/llm/conversations/d"] = (200, whole)
    with connect(fake.url) as connected:
        known = connected.conversations()
        assert ([one.conversation_id for one in known.conversations], known.unreadable) == (["c"], 2)
        with pytest.raises(IncompatibleVersion, match="`d` cannot be read"):
            connected.conversation("d")
