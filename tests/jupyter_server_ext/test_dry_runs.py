"""``?dry_run=true`` of configurations: all that is wrong is said, and nothing is kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

NEW = {"model_id": "m", "model_name": "gpt-3", "model_type": "openai"}
CHECK = "llm/configure_model/?dry_run=true"
CANARY = "sk-canary-dry-run"


@pytest.fixture
def events(app: Any) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []

    async def listen(logger: Any, schema_id: str, data: dict[str, Any]) -> None:
        seen.append(data)

    app.serverapp.event_logger.add_listener(schema_id="https://llmkit.org/events/model/v1", listener=listen)
    return seen


def secrets() -> list[str]:
    folder = Path(os.environ["LLMKIT_STATE_DIR"]) / "secrets"
    return [file.name for file in folder.iterdir()]


async def test_a_check_answers_a_plan_and_leaves_no_trace(call: Any, events: list[dict[str, Any]]) -> None:
    before = (await call("GET", "llm/models/")).json["revision"]
    answer = await call("POST", CHECK, {**NEW, "model_type": "scripted", "model_kwargs": {"size": 1000}})
    assert answer.status == 200
    assert set(answer.json) == {"plan"}
    plan = answer.json["plan"]
    assert (plan["model_id"], plan["config_id"], plan["fits"]) == ("m", "", True)
    assert plan["estimate"]["total_bytes"] == 1000
    answer = await call("POST", CHECK, {**NEW, "model_kwargs": {"api_key": CANARY}})
    assert answer.json["plan"]["estimate"] is None
    assert CANARY not in answer.text
    after = (await call("GET", "llm/models/")).json
    assert (after["models"], after["revision"]) == ([], before)
    assert secrets() == []
    assert events == []


async def test_every_wrong_field_is_told_as_by_the_real_call(call: Any) -> None:
    for wrong in (
        {**NEW, "model_id": "a b", "model_name": "", "max_queued": -1},
        {**NEW, "model_kwargs": {"temprature": 1, "top_p": 2}},
        {**NEW, "model_type": "nonsense"},
        {**NEW, "model_kwargs": {"api_key": "env:HOME"}},
        {**NEW, "model_type": "scripted", "model_kwargs": {"size": "large"}},
        {**NEW, "model_type": "vllm", "model_name": "-x", "model_kwargs": {"enable_auto_tool_choice": True}},
    ):
        checked, real = await call("POST", CHECK, wrong), await call("POST", "llm/configure_model/", wrong)
        assert checked.status == 422, checked.json
        assert checked.json == real.json
    assert (await call("GET", "llm/configurations/")).json == []


async def test_a_model_id_that_is_taken_is_told_as_by_the_real_call(call: Any, configure: Any) -> None:
    config_id = await configure("m")
    same = await call("POST", CHECK, NEW)
    assert (same.status, same.json["plan"]["config_id"]) == (200, config_id)
    different = {**NEW, "model_name": "gpt-4o-mini"}
    checked, real = await call("POST", CHECK, different), await call("POST", "llm/configure_model/", different)
    assert checked.status == 409
    assert checked.json == real.json


async def test_a_replacement_is_checked_and_not_made(call: Any, configure: Any, events: list[dict[str, Any]]) -> None:
    config_id = await configure("s", model_type="scripted", model_kwargs={"size": 10})
    path = f"llm/configuration/{config_id}?dry_run=true"
    stored = (await call("GET", f"llm/configuration/{config_id}")).json
    changed = {**stored, "model_kwargs": {"size": 20}}
    plan = (await call("PUT", path, changed)).json["plan"]
    assert (plan["config_id"], plan["estimate"]["total_bytes"]) == (config_id, 20)
    await call("POST", f"llm/load_model/{config_id}")
    checked, real = await call("PUT", path, changed), await call("PUT", f"llm/configuration/{config_id}", changed)
    assert (checked.status, checked.json["error"]["code"]) == (409, "model_is_loaded")
    assert checked.json == real.json
    count = len(events)
    assert (await call("PUT", f"{path}&reload=true", changed)).status == 200
    assert (await call("GET", "llm/models/s")).json["status"] == "loaded"
    assert (await call("GET", f"llm/configuration/{config_id}")).json == stored
    assert len(events) == count
    assert (await call("PUT", path, {**changed, "config_id": "another"})).status == 422
    assert (await call("PUT", "llm/configuration/none?dry_run=true", {})).status == 404


async def test_the_key_that_is_kept_can_be_kept_in_a_check_and_a_new_one_is_not_written(
    call: Any, configure: Any
) -> None:
    config_id = await configure("m", model_kwargs={"api_key": CANARY})
    path = f"llm/configuration/{config_id}?dry_run=true"
    stored = (await call("GET", f"llm/configuration/{config_id}")).json
    kept = secrets()
    assert len(kept) == 1
    assert (await call("PUT", path, {**stored, "description": "new"})).status == 200
    assert (await call("PUT", path, {**stored, "model_kwargs": {"api_key": "another"}})).status == 200
    elsewhere = {"api_key": stored["model_kwargs"]["api_key"], "base_url": "http://127.0.0.1:9/v1"}
    answer = await call("PUT", path, {**stored, "model_kwargs": elsewhere})
    assert (answer.status, answer.json["error"]["code"]) == (422, "key_missing")
    assert secrets() == kept


async def test_dry_run_must_be_true_or_false(call: Any) -> None:
    answer = await call("POST", "llm/configure_model/?dry_run=perhaps", NEW)
    assert answer.status == 400
    assert (await call("GET", "llm/configurations/")).json == []
