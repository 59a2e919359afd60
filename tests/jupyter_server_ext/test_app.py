"""The extension in its server: events, traits, folders, start and stop."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest
from mock_upstream import MockUpstream
from scripted_engine import ScriptedEngineType

from jupyter_server_ext.app import LLMKitApp
from llmkit.engines.base import LoadProgress

SCHEMA = "https://llmkit.org/events/model/v1"


@pytest.fixture
def events(app: LLMKitApp) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []

    async def listen(logger: Any, schema_id: str, data: dict[str, Any]) -> None:
        seen.append(data)

    app._server.event_logger.add_listener(schema_id=SCHEMA, listener=listen)
    return seen


async def test_every_change_is_an_event_and_the_revision_grows(
    call: Any, configure: Any, upstream: MockUpstream, events: list[dict[str, Any]]
) -> None:
    config_id = await configure()
    await call("POST", f"llm/load_model/{config_id}")
    await call("POST", "llm/unload_model/example_model")
    await call("DELETE", f"llm/configuration/{config_id}")
    await asyncio.sleep(0.05)
    told = [(e["change"], e["model"]["status"] if e["model"] else None) for e in events if e["change"] != "progress"]
    assert told == [
        ("configured", "unloaded"),
        ("status", "loading"),
        ("status", "loaded"),
        ("status", "unloading"),
        ("status", "unloaded"),
        ("deleted", None),
    ]
    revisions = [e["revision"] for e in events]
    assert revisions == sorted(set(revisions))
    snapshot = (await call("GET", "llm/models")).json
    assert snapshot["revision"] == revisions[-1]
    assert {e["epoch"] for e in events} == {snapshot["epoch"]}


async def test_progress_is_told_at_most_four_times_a_second_and_never_lost(
    call: Any, configure: Any, scripted: ScriptedEngineType, app: LLMKitApp, events: list[dict[str, Any]]
) -> None:
    scripted.ready = False
    config_id = await configure("s", model_type="scripted")
    await call("POST", f"llm/load_model/{config_id}?wait=false")
    while not scripted.engines:
        await asyncio.sleep(0.01)
    registry = await app.ready()
    model = registry._models["s"]
    begin = time.monotonic()
    for step in range(100):
        model._report(LoadProgress("weights", 0.5 + step / 1000))
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.3)
    sent = [e for e in events if e["change"] == "progress"]
    assert 2 <= len(sent) <= 4 * (time.monotonic() - begin) + 1
    assert sent[-1]["model"]["progress"] == pytest.approx(0.599)
    scripted.engines[0].ready.set()
    await call("POST", f"llm/load_model/{config_id}")


async def test_a_websocket_client_hears_of_a_change_within_a_second(
    call: Any, configure: Any, upstream: MockUpstream, app: LLMKitApp, jp_ws_fetch: Any
) -> None:
    ws = await jp_ws_fetch("api", "events", "subscribe")
    config_id = await configure()
    begin = time.monotonic()
    while True:
        data = json.loads(await asyncio.wait_for(ws.read_message(), 5))
        if data.get("config_id") == config_id:
            break
    assert time.monotonic() - begin < 1
    assert data["change"] == "configured"
    ws.close()


async def test_loads_and_requests_count_as_activity_and_idle_models_do_not(
    call: Any, configure: Any, scripted: ScriptedEngineType, app: LLMKitApp
) -> None:
    assert app.current_activity() is None
    scripted.ready = False
    config_id = await configure("s", model_type="scripted")
    await call("POST", f"llm/load_model/{config_id}?wait=false")
    assert app.current_activity() == 1
    while not scripted.engines:
        await asyncio.sleep(0.01)
    scripted.engines[0].ready.set()
    await call("POST", f"llm/load_model/{config_id}")
    assert app.current_activity() is None
    before = app._server.web_app.settings["api_last_activity"]
    await call("GET", "llm/models")
    assert app._server.web_app.settings["api_last_activity"] == before


async def test_stopping_the_server_stops_every_engine(
    call: Any, configure: Any, scripted: ScriptedEngineType, app: LLMKitApp
) -> None:
    loaded = await configure("a", model_type="scripted")
    await call("POST", f"llm/load_model/{loaded}")
    scripted.ready = False
    await call("POST", f"llm/load_model/{await configure('b', model_type='scripted')}?wait=false")
    while len(scripted.engines) < 2:
        await asyncio.sleep(0.01)
    await app.stop_extension()
    assert [engine.stops for engine in scripted.engines] == [1, 1]
    assert list(Path(app.run_dir).iterdir()) == []


async def test_two_servers_of_one_home_see_each_others_configurations_within_a_second(
    call: Any, configure: Any, upstream: MockUpstream, app: LLMKitApp, tmp_path: Path
) -> None:
    import logging

    from llmkit.registry.registry import ModelRegistry, Settings
    from llmkit.schemas import ModelConfigRequest

    other = ModelRegistry(Settings(Path(app.state_dir), tmp_path), lambda event: None, logging.getLogger("other"))
    await call("GET", "llm/health")
    await other.start()
    try:
        request = ModelConfigRequest(model_id="theirs", model_name="gpt-3", model_type="openai")
        config_id = (await other.configure(request)).config_id
        begin = time.monotonic()
        while not (await call("GET", "llm/configurations")).json:
            assert time.monotonic() - begin < 1.0
            await asyncio.sleep(0.02)
        clash = {"model_id": "theirs", "model_name": "x", "model_type": "openai"}
        assert (await call("POST", "llm/configure_model", clash)).status == 409
        await call("DELETE", f"llm/configuration/{config_id}")
        begin = time.monotonic()
        while other.configurations():
            assert time.monotonic() - begin < 1.0
            await asyncio.sleep(0.02)
    finally:
        await other.close()


class TestDeclared:
    """Configurations of the operator's."""

    @pytest.fixture
    def jp_server_config(self) -> dict[str, Any]:
        good = {"model_id": "ours", "model_name": "gpt-3", "model_type": "openai"}
        wrong = {"model_id": "wrong", "model_name": "x", "model_type": "nope"}
        raw_key = {**good, "model_id": "raw", "model_kwargs": {"api_key": "sk-raw"}}
        return {
            "ServerApp": {"jpserver_extensions": {"jupyter_server_ext": True}},
            "LLMKitApp": {"configurations": [good, wrong, raw_key]},
        }

    async def test_they_are_listed_used_and_read_only(
        self, upstream: MockUpstream, call: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        (declared,) = (await call("GET", "llm/configurations")).json
        assert declared["declared"] is True
        assert declared["model_id"] == "ours"
        assert (await call("POST", f"llm/load_model/{declared['config_id']}")).status == 200
        refused = await call("DELETE", f"llm/configuration/{declared['config_id']}")
        assert (refused.status, refused.json["error"]["code"]) == (409, "configuration_read_only")
        assert "model_type: must be one of" in caplog.text
        assert "sk-raw" not in caplog.text


async def test_a_folder_that_cannot_be_used_is_a_503_that_says_which(
    call: Any, monkeypatch: pytest.MonkeyPatch, app: LLMKitApp, tmp_path: Path
) -> None:
    await call("GET", "llm/health")
    await app.stop_extension()
    (tmp_path / "file").write_text("")
    app.state_dir = str(tmp_path / "file" / "below")
    app._registry = app._starting = app._stopping = app._folder = None
    answer = await call("GET", "llm/models")
    assert (answer.status, answer.json["error"]["code"]) == (503, "not_ready")
    assert "LLMKIT_STATE_DIR" in answer.json["error"]["hint"]
