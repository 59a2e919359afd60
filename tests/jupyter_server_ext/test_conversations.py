"""Conversations over HTTP."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from llmkit.schemas import MAX_CONVERSATION_BYTES

TURN = {"model_id": "demo", "prompt": "What is the capital of France?", "response": "Paris."}


async def test_a_conversation_is_put_listed_got_and_deleted(call: Any) -> None:
    assert (await call("GET", "llm/conversations/")).json == {"conversations": [], "kept": True}
    put = await call("PUT", "llm/conversations/c-1", {"title": "France", "model_id": "demo", "turns": [TURN]})
    assert (put.status, set(put.json)) == (200, {"conversation_id", "revision", "updated_at"})
    assert (put.json["conversation_id"], put.json["revision"]) == ("c-1", 1)
    got = (await call("GET", "llm/conversations/c-1/")).json
    assert (got["title"], got["revision"], got["updated_at"]) == ("France", 1, put.json["updated_at"])
    assert got["turns"][0] | TURN == got["turns"][0]
    again = await call(
        "PUT", "llm/conversations/c-1", {k: v for k, v in got.items() if k not in put.json} | {"revision": 1}
    )
    assert again.json["revision"] == 2
    listed = (await call("GET", "llm/conversations")).json["conversations"]
    assert listed == [
        {
            "conversation_id": "c-1",
            "title": "France",
            "model_id": "demo",
            "turns": 1,
            "revision": 2,
            "updated_at": again.json["updated_at"],
        }
    ]
    assert (await call("DELETE", "llm/conversations/c-1")).json["conversation_id"] == "c-1"
    for method in ("GET", "DELETE"):
        answer = await call(method, "llm/conversations/c-1")
        assert (answer.status, answer.json["error"]["code"]) == (404, "conversation_not_found")


async def test_another_revision_is_a_409_that_names_the_kept_one(call: Any) -> None:
    for _ in range(2):
        await call("PUT", "llm/conversations/c", {"title": "kept"})
    answer = await call("PUT", "llm/conversations/c", {"title": "lost", "revision": 1})
    error = answer.json["error"]
    assert (answer.status, error["code"], error["details"]) == (409, "conversation_changed", {"revision": 2})
    assert error["hint"]
    assert (await call("GET", "llm/conversations/c")).json["title"] == "kept"


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({"turns": [{"model_id": "demo"}]}, "turns.0.prompt"),
        ({"turns": [TURN, {**TURN, "state": "streaming"}]}, "turns.1.state"),
        ({"titel": "x"}, "titel"),
        ({"title": "x" * 201}, "title"),
        ({"revision": "1"}, "revision"),
        ({"updated_at": "2026-01-01T00:00:00Z"}, "updated_at"),
    ],
)
async def test_a_body_that_does_not_fit_is_a_422_with_the_path(call: Any, body: dict[str, Any], path: str) -> None:
    answer = await call("PUT", "llm/conversations/c", body)
    assert answer.status == 422
    assert [field["path"] for field in answer.json["error"]["details"]["fields"]] == [path]


async def test_an_id_that_does_not_fit_is_a_422(call: Any) -> None:
    answer = await call("PUT", "llm/conversations/a b", {})
    assert (answer.status, answer.json["error"]["param"]) == (422, "conversation_id")
    assert (await call("GET", "llm/conversations/a b")).status == 404


async def test_more_than_4_mib_is_a_413(call: Any) -> None:
    large = {"draft": "x" * (MAX_CONVERSATION_BYTES - 100)}
    assert (await call("PUT", "llm/conversations/c", large)).status == 200
    assert (await call("GET", "llm/conversations/c")).json["draft"] == large["draft"]
    answer = await call("PUT", "llm/conversations/c", {"draft": "x" * MAX_CONVERSATION_BYTES})
    assert (answer.status, answer.json["error"]["code"]) == (413, "too_large")
    assert (await call("GET", "llm/conversations/c")).json["revision"] == 1


@pytest.mark.parametrize("jp_argv", [["--LLMKitApp.max_conversations=0"]])
async def test_an_operator_can_have_none_kept(call: Any) -> None:
    answer = await call("PUT", "llm/conversations/c", {})
    assert (answer.status, answer.json["error"]["code"]) == (403, "conversations_not_kept")
    assert "max_conversations" in answer.json["error"]["hint"]
    assert (await call("GET", "llm/conversations/")).json == {"conversations": [], "kept": False}
    assert (await call("GET", "llm/conversations/c")).status == 404
    assert not list(Path(os.environ["LLMKIT_STATE_DIR"]).glob("conversations*"))


@pytest.mark.parametrize("jp_argv", [["--LLMKitApp.max_conversations=2"]])
async def test_an_operator_decides_how_many_are_kept(call: Any) -> None:
    for name in "abc":
        await call("PUT", f"llm/conversations/{name}", {})
    listed = (await call("GET", "llm/conversations/")).json["conversations"]
    assert [one["conversation_id"] for one in listed] == ["c", "b"]


async def test_a_damaged_file_makes_the_server_unwell_and_nothing_else(call: Any) -> None:
    assert (await call("GET", "llm/health")).json["status"] == "ok"
    (Path(os.environ["LLMKIT_STATE_DIR"]) / "conversations.sqlite").write_bytes(b"no database, " * 1000)
    assert (await call("PUT", "llm/conversations/c", {})).status == 200
    health = (await call("GET", "llm/health")).json
    assert health["status"] == "degraded"
    assert "conversations.sqlite.corrupt-" in health["problems"][0]


async def test_looking_at_conversations_is_no_activity_and_writing_is(call: Any, app: Any) -> None:
    settings = app.serverapp.web_app.settings
    await call("PUT", "llm/conversations/c", {})
    written = settings["api_last_activity"]
    await call("GET", "llm/conversations/c")
    await call("GET", "llm/conversations/")
    assert settings["api_last_activity"] == written
    await call("DELETE", "llm/conversations/c")
    assert settings["api_last_activity"] > written
