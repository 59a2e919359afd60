"""Logs, devices, and loads that make room, over HTTP."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scripted_engine import ScriptedEngineType

from jupyter_server_ext.app import LLMKitApp
from llmkit.registry.registry import ModelRegistry, Settings


def log_of(app: LLMKitApp, config_id: str) -> Path:
    assert app._folder is not None
    return Path(app._folder.path) / f"{config_id}.log"


def lines_of(parts: list[bytes]) -> list[str]:
    events = b"".join(parts).decode().split("\n\n")
    return [json.loads(event[6:])["line"] for event in events if event.startswith("data: ")]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def test_the_last_lines_of_a_log(call: Any, configure: Any, app: LLMKitApp) -> None:
    config_id = await configure("s", model_type="scripted")
    assert (await call("GET", "llm/models/s/logs")).json == {"model_id": "s", "lines": []}
    log_of(app, config_id).write_text("".join(f"line {number}\n" for number in range(500)))
    assert (await call("GET", "llm/models/s/logs?tail=2")).json["lines"] == ["line 498", "line 499"]
    assert len((await call("GET", "llm/models/s/logs")).json["lines"]) == 200
    assert (await call("GET", "llm/models/s/logs?tail=0")).json["lines"] == []


@pytest.mark.parametrize("tail", ["-1", "many", "1e9", ""])
async def test_a_wrong_number_of_lines_is_a_400(call: Any, configure: Any, tail: str) -> None:
    await configure("s", model_type="scripted")
    answer = await call("GET", f"llm/models/s/logs?tail={tail}")
    assert (answer.status, answer.json["error"]["param"]) == (400, "tail")


@pytest.mark.parametrize("follow", ["false", "true"])
async def test_logs_of_no_model_are_a_404(call: Any, app: LLMKitApp, follow: str) -> None:
    answer = await call("GET", f"llm/models/nobody/logs?follow={follow}")
    assert (answer.status, answer.json["error"]["code"]) == (404, "model_not_found")


async def test_a_followed_log_begins_with_history_and_ends_with_the_model(
    call: Any, configure: Any, app: LLMKitApp
) -> None:
    config_id = await configure("s", model_type="scripted")
    log = log_of(app, config_id)
    log.write_text("one\ntwo\nthree\n")
    parts: list[bytes] = []
    following = asyncio.create_task(
        call("GET", "llm/models/s/logs?follow=true&tail=2", streaming_callback=parts.append)
    )
    await until(lambda: lines_of(parts) == ["two", "three"])
    with log.open("a") as file:
        file.write("four\nhalf of")
        file.flush()
        await until(lambda: lines_of(parts) == ["two", "three", "four"])
        file.write(" five\n")
    await until(lambda: lines_of(parts)[-1] == "half of five")
    log.write_text("a new load\n")
    await until(lambda: lines_of(parts)[-1] == "a new load")
    await call("DELETE", f"llm/configuration/{config_id}")
    answer = await asyncio.wait_for(following, 10)
    assert answer.headers["Content-Type"] == "text/event-stream"


async def test_a_reader_who_leaves_ends_what_follows_for_him(call: Any, configure: Any, app: LLMKitApp) -> None:
    config_id = await configure("s", model_type="scripted")
    log_of(app, config_id).write_text("one\n")
    before = len(asyncio.all_tasks())
    parts: list[bytes] = []
    with pytest.raises(Exception, match=r"(?i)timeout"):
        await call("GET", "llm/models/s/logs?follow=true", streaming_callback=parts.append, request_timeout=0.5)
    assert lines_of(parts) == ["one"]
    await until(lambda: len(asyncio.all_tasks()) <= before)


async def test_a_server_that_stops_ends_what_is_followed(call: Any, configure: Any, app: LLMKitApp) -> None:
    config_id = await configure("s", model_type="scripted")
    log_of(app, config_id).write_text("one\n")
    parts: list[bytes] = []
    following = asyncio.create_task(call("GET", "llm/models/s/logs?follow=true", streaming_callback=parts.append))
    await until(lambda: bool(parts))
    await asyncio.wait_for(app.stop_extension(), 10)
    await asyncio.wait_for(following, 10)


async def test_devices_with_the_share_of_each_model(call: Any, configure: Any, scripted: ScriptedEngineType) -> None:
    scripted.held = 5 << 20
    await call("POST", f"llm/load_model/{await configure('s', model_type='scripted')}")
    await configure("idle", model_type="scripted")
    told = (await call("GET", "llm/devices")).json
    assert told["cpu"]["cores"] > 0
    ram = told["ram"]
    assert 0 < ram["used_bytes"] < ram["total_bytes"]
    assert ram["used_bytes"] + ram["free_bytes"] == ram["total_bytes"]
    assert ram["shares"] == [{"model_id": "s", "bytes": 5 << 20}]
    assert isinstance(told["gpus"], list)


async def test_a_dry_run_answers_the_estimate_and_loads_nothing(
    call: Any, configure: Any, scripted: ScriptedEngineType
) -> None:
    config_id = await configure("s", model_type="scripted", model_kwargs={"size": 1 << 20})
    plan = await call("POST", f"llm/load_model/{config_id}?dry_run=true")
    assert (plan.status, plan.json["fits"], plan.json["evict"]) == (200, True, [])
    assert plan.json["estimate"]["total_bytes"] == 1 << 20
    assert plan.json["free_bytes"] > 1 << 20
    assert scripted.engines == []
    assert (await call("GET", "llm/models/s")).json["status"] == "unloaded"
    large = await configure("large", model_type="scripted", model_kwargs={"size": 1 << 50})
    plan = await call("POST", f"llm/load_model/{large}?dry_run=true")
    assert (plan.status, plan.json["fits"]) == (200, False)
    assert "1048576.0 GiB" in plan.json["reason"]


async def test_no_room_is_a_409_and_force_tries_all_the_same(call: Any, configure: Any) -> None:
    config_id = await configure("large", model_type="scripted", model_kwargs={"size": 1 << 50})
    answer = await call("POST", f"llm/load_model/{config_id}")
    assert (answer.status, answer.json["error"]["code"]) == (409, "no_room")
    assert answer.json["error"]["details"]["needed_bytes"] == 1 << 50
    assert (await call("POST", f"llm/load_model/{config_id}?force=true")).status == 200


async def test_health_tells_how_configurations_are_stored(call: Any, app: LLMKitApp) -> None:
    store = (await call("GET", "llm/health")).json["store"]
    assert (store["journal_mode"], Path(store["path"]).name) == ("wal", "llmkit.sqlite")
    assert store["schema_version"] >= 2


async def test_what_another_server_has_loaded_can_be_neither_deleted_nor_changed(
    call: Any, configure: Any, app: LLMKitApp, tmp_path: Path
) -> None:
    body = {"model_id": "s", "model_name": "gpt-3", "model_type": "scripted"}
    config_id = await configure(**body)
    folder = Path((await call("GET", "llm/health")).json["store"]["path"]).parent
    engines = {"scripted": ScriptedEngineType(ready=True)}
    settings = Settings(state_dir=folder, run_dir=tmp_path, url="http://other:8888/")
    other = ModelRegistry(settings, lambda event: None, logging.getLogger("other"), {}, engines)
    await other.start()
    try:
        await other.load(config_id)
        for method, path, sent in (
            ("DELETE", f"llm/configuration/{config_id}", None),
            ("DELETE", f"llm/configuration/{config_id}?unload=true", None),
            ("PUT", f"llm/configuration/{config_id}", {**body, "description": "new"}),
        ):
            answer = await call(method, path, sent)
            assert (answer.status, answer.json["error"]["code"]) == (409, "model_live_elsewhere")
            assert "http://other:8888/" in answer.json["error"]["message"]
        async with asyncio.timeout(5):
            while (await call("GET", "llm/models/s")).json["owner"] != "http://other:8888/":
                await asyncio.sleep(0.02)
        await other.unload("s")
        async with asyncio.timeout(5):
            while (await call("DELETE", f"llm/configuration/{config_id}")).status != 200:
                await asyncio.sleep(0.02)
    finally:
        await other.close()
