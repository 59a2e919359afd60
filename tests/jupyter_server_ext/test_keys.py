"""Which key goes where, and that none is ever seen again (R20)."""

from __future__ import annotations

import base64
import json
import logging
import os
import stat
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from aiohttp import web
from mock_upstream import ANSWER, MockUpstream

CANARY = 'sk-Cn4ry"/+&%zQ7w-9vTail.x81'
GPT3 = {"model_id": "m", "model_name": "gpt-3", "model_type": "openai"}
PROMPT = {"model_id": "m", "prompt": "Hi"}


@pytest.fixture
def state_dir() -> Path:
    return Path(os.environ["LLMKIT_STATE_DIR"])


def with_key(key: Any, **kwargs: Any) -> dict[str, Any]:
    return {**GPT3, "model_kwargs": {"api_key": key, **kwargs}}


def leaks(text: str) -> list[str]:
    """Find the canary in any of the forms that it could take."""
    forms = {
        "raw": CANARY,
        "json": json.dumps(CANARY)[1:-1],
        "url": quote(CANARY, safe=""),
        "base64": base64.b64encode(CANARY.encode()).decode().rstrip("="),
        "first 8": CANARY[:8],
        "last 8": CANARY[-8:],
    }
    return [name for name, form in forms.items() if form in text]


async def test_a_raw_key_works_is_marked_and_lies_in_a_0600_file(call: Any, state_dir: Path) -> None:
    with MockUpstream(key=CANARY) as upstream:
        body = with_key(CANARY, base_url=upstream.base_url)
        config_id = (await call("POST", "llm/configure_model", body)).json["config_id"]
        stored = (await call("GET", f"llm/configuration/{config_id}")).json
        mark = stored["model_kwargs"]["api_key"]
        assert mark["secret"] is True
        assert set(mark) == {"secret", "set_at"}
        assert (await call("POST", f"llm/load_model/{config_id}")).status == 200
        assert (await call("POST", "llm/inference", PROMPT)).json["response"] == ANSWER
        assert upstream.requests[-1][1]["Authorization"] == f"Bearer {CANARY}"
    (file,) = (state_dir / "secrets").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE((state_dir / "llmkit.sqlite").stat().st_mode) == 0o600
    await call("POST", "llm/unload_model/m")
    await call("DELETE", f"llm/configuration/{config_id}")
    assert list((state_dir / "secrets").iterdir()) == []


@pytest.mark.parametrize("jp_argv", [["--LLMKitApp.record_bodies=True"]])
async def test_the_canary_is_nowhere_but_in_its_file(
    call: Any, app: Any, state_dir: Path, jp_fetch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    seen: list[str] = []

    async def listen(logger: Any, schema_id: str, data: dict[str, Any]) -> None:
        seen.append(json.dumps(data))

    app.serverapp.event_logger.add_listener(schema_id="https://llmkit.org/events/model/v1", listener=listen)

    async def echo(request: web.Request, body: dict[str, Any]) -> web.Response | None:
        if request.path == "/v1/models":
            return None
        said = f"bad request with {request.headers.get('Authorization')} {CANARY[:8]}... ...{CANARY[-8:]}"
        return web.json_response({"error": {"message": said}}, status=int(body.get("seed", 400)))

    with MockUpstream(key=CANARY) as upstream:
        kwargs = {"api_key": CANARY, "base_url": upstream.base_url, "max_retries": 0}
        answers = [
            await call("POST", "llm/configure_model", {**GPT3, "model_kwargs": {"engine": kwargs}}),
            await call("POST", "llm/configure_model", {**GPT3, "model_kwargs": kwargs}),
            await call("POST", "llm/configure_model", {**GPT3, "model_kwargs": {**kwargs, "timeout": "x"}}),
            await call("POST", "llm/configure_model", {**GPT3, "model_kwargs": {**kwargs, "api_kei": CANARY}}),
            await call("POST", "llm/configure_model", {**GPT3, "model_kwargs": {"api_key": CANARY + "\n"}}),
            await call("POST", "llm/configure_model", {**GPT3, "model_kwargs": {"api_key": [CANARY]}}),
            await call("POST", "llm/configure_model", raw=b'{"api_key": "' + CANARY.encode() + b'"'),
        ]
        config_id = answers[0].json["config_id"]
        answers.append(await call("POST", f"llm/load_model/{config_id}"))
        upstream.respond = echo
        for status in (400, 401, 403, 404, 422, 429, 500, 302):
            answers.append(await call("POST", "llm/inference", {**PROMPT, "inference_kwargs": {"seed": status}}))
            stream = {"seed": status, "stream": True}
            answers.append(await call("POST", "llm/inference", {**PROMPT, "inference_kwargs": stream}))
            for body in ({"seed": status}, stream):
                chat = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], **body}
                answers.append(await call("POST", "llm/v1/chat/completions", chat))
        paths = ("configurations", f"configuration/{config_id}", "models", "models/m", "health", "model_types")
        paths += ("requests", "v1/models", "v1/models/m", "devices")
        answers.extend([await call("GET", f"llm/{path}") for path in paths])
        upstream.respond = None
        upstream.key = "another"
        await call("POST", "llm/unload_model/m")
        answers.append(await call("POST", f"llm/load_model/{config_id}"))
        assert answers[-1].json["error"]["code"] == "upstream_refused_key"
        answers.append(await call("GET", "llm/models/m"))
    for answer in answers:
        assert not leaks(answer.text), answer.text
        assert not leaks(str(list(answer.headers.get_all())))
    assert len(json.loads((await call("GET", "llm/requests")).text)["recent"]) == 32
    assert not leaks((await jp_fetch("metrics")).body.decode())
    assert seen
    assert not leaks("\n".join(seen))
    assert not leaks(caplog.text)
    for file in state_dir.rglob("*"):
        if file.is_file() and file.parent.name != "secrets":
            assert not leaks(file.read_bytes().decode("latin-1")), file


async def test_get_then_put_keeps_the_key(call: Any) -> None:
    with MockUpstream(key=CANARY) as upstream:
        body = with_key(CANARY, base_url=upstream.base_url)
        config_id = (await call("POST", "llm/configure_model", body)).json["config_id"]
        assert (await call("POST", "llm/configure_model", body)).json["config_id"] == config_id
        other = await call("POST", "llm/configure_model", with_key("sk-other", base_url=upstream.base_url))
        assert other.status == 409
        stored = (await call("GET", f"llm/configuration/{config_id}")).json
        put = {k: v for k, v in stored.items() if k != "config_id"}
        assert (await call("POST", f"llm/load_model/{config_id}")).status == 200
        assert (await call("PUT", f"llm/configuration/{config_id}", put)).json == stored
        assert (await call("POST", "llm/inference", PROMPT)).status == 200


async def test_a_key_is_asked_for_again_when_the_address_changes(call: Any) -> None:
    with MockUpstream() as upstream, MockUpstream() as elsewhere:
        config_id = (await call("POST", "llm/configure_model", with_key(CANARY, base_url=upstream.base_url))).json[
            "config_id"
        ]
        stored = (await call("GET", f"llm/configuration/{config_id}")).json
        stored["model_kwargs"]["base_url"] = elsewhere.base_url
        body = {k: v for k, v in stored.items() if k != "config_id"}
        answer = await call("PUT", f"llm/configuration/{config_id}", body)
        assert (answer.status, answer.json["error"]["code"]) == (422, "key_missing")
        body["model_kwargs"]["api_key"] = "sk-for-elsewhere"
        assert (await call("PUT", f"llm/configuration/{config_id}", body)).status == 200
        await call("POST", f"llm/load_model/{config_id}")
        assert elsewhere.requests[-1][1]["Authorization"] == "Bearer sk-for-elsewhere"
        assert upstream.requests == []


async def test_a_mark_that_was_never_given_is_no_key(call: Any) -> None:
    answer = await call("POST", "llm/configure_model", with_key({"secret": True, "set_at": "now"}))
    assert (answer.status, answer.json["error"]["code"]) == (422, "key_missing")


async def test_the_servers_own_key_goes_only_to_its_own_origin(
    call: Any, upstream: MockUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-server")
    with MockUpstream() as elsewhere:
        own = (await call("POST", "llm/configure_model", GPT3)).json["config_id"]
        other_body = {**GPT3, "model_id": "e", "model_kwargs": {"base_url": elsewhere.base_url}}
        other = (await call("POST", "llm/configure_model", other_body)).json["config_id"]
        for config_id in (own, other):
            assert (await call("POST", f"llm/load_model/{config_id}")).status == 200
        assert upstream.requests[-1][1]["Authorization"] == "Bearer sk-server"
        assert "Authorization" not in elsewhere.requests[-1][1]


@pytest.mark.parametrize(
    ("reference", "allowed"),
    [
        ("env:MY_API_KEY", True),
        ("env:MY_TOKEN", True),
        ("env:HOME", False),
        ("env:AWS_SECRET_ACCESS_KEY", False),
        ("env:JUPYTER_TOKEN", False),
        ("env:JUPYTERHUB_API_TOKEN", False),
        ("env:LLMKIT_TOKEN", False),
        ("env:", False),
        ("env:MY_API_KEY ", False),
        ("env:MY_API_KEY\n", False),
    ],
)
async def test_which_variables_may_be_named(
    call: Any, upstream: MockUpstream, monkeypatch: pytest.MonkeyPatch, reference: str, allowed: bool
) -> None:
    monkeypatch.setenv("MY_API_KEY", "from-env")
    monkeypatch.setenv("MY_TOKEN", "from-env")
    answer = await call("POST", "llm/configure_model", with_key(reference))
    assert answer.status == (200 if allowed else 422), answer.json
    if allowed:
        config_id = answer.json["config_id"]
        assert (await call("GET", f"llm/configuration/{config_id}")).json["model_kwargs"]["api_key"] == reference
        await call("POST", f"llm/load_model/{config_id}")
        assert upstream.requests[-1][1]["Authorization"] == "Bearer from-env"


async def test_a_wrong_key_is_refused_with_a_cure(call: Any) -> None:
    with MockUpstream(key="right") as upstream:
        config_id = (await call("POST", "llm/configure_model", with_key("wrong", base_url=upstream.base_url))).json[
            "config_id"
        ]
        answer = await call("POST", f"llm/load_model/{config_id}")
        assert (answer.status, answer.json["error"]["code"]) == (502, "upstream_refused_key")
        assert "api_key" in answer.json["error"]["hint"]


class TestOperatorsMap:
    """``secret_origins`` says which variables go where; then nothing else may be named."""

    @pytest.fixture
    def jp_server_config(self, upstream: MockUpstream) -> dict[str, Any]:
        return {
            "ServerApp": {"jpserver_extensions": {"jupyter_server_ext": True}},
            "LLMKitApp": {"secret_origins": {"CLASS_KEY": [upstream.origin]}},
        }

    async def test_only_what_the_map_says(
        self, call: Any, upstream: MockUpstream, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CLASS_KEY", "of-the-class")
        monkeypatch.setenv("OPENAI_API_KEY", "of-the-operator")
        answer = await call("POST", "llm/configure_model", with_key("env:CLASS_KEY"))
        assert answer.status == 200
        await call("POST", f"llm/load_model/{answer.json['config_id']}")
        assert upstream.requests[-1][1]["Authorization"] == "Bearer of-the-class"
        elsewhere = with_key("env:CLASS_KEY", base_url="http://127.0.0.1:1/v1")
        for body in (with_key("env:MY_API_KEY"), {**elsewhere, "model_id": "e"}):
            refused = await call("POST", "llm/configure_model", {**body, "model_id": "x"})
            assert (refused.status, refused.json["error"]["code"]) == (422, "key_not_allowed")
        plain = (await call("POST", "llm/configure_model", {**GPT3, "model_id": "p"})).json["config_id"]
        await call("POST", f"llm/load_model/{plain}")
        assert "Authorization" not in upstream.requests[-1][1]
