"""What the operator of a server decides: each trait by the command line and by a file, in a real server."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from fake_engine_type import PLUGIN
from jupyter_server.auth.authorizer import Authorizer
from jupyter_server.auth.identity import IdentityProvider, User
from mock_upstream import ANSWER, MockUpstream
from support import JupyterServer, wait_until
from traitlets import TraitError

from jupyter_server_ext.app import LLMKitApp
from jupyter_server_ext.authorizer import PromptOnlyAuthorizer
from llmkit.client import Client, connect
from llmkit.errors import KeyNotAllowed, NotAllowed, QueueFull, RefusedByOperator
from llmkit.schemas import MAX_PROMPT_BYTES


@pytest.fixture(scope="module")
def upstream() -> Iterator[MockUpstream]:
    with MockUpstream() as running:
        yield running


def configure_in_file(server: JupyterServer, traits: dict[str, Any], name: str = "jupyter_llmkit_config.py") -> None:
    lines = [f"c.LLMKitApp.{trait} = {value!r}" for trait, value in traits.items()]
    (server.folder / "config" / name).write_text("\n".join(lines))


@pytest.fixture(scope="module", params=["command line", "file"])
def decided(request: pytest.FixtureRequest, upstream: MockUpstream) -> Iterator[Client]:
    """Give a client of a server whose operator has decided everything."""
    traits: dict[str, Any] = {
        "allow_trust_remote_code": True,
        "allowed_model_names": ["gpt-*", "org/*", "any*"],
        "allowed_base_urls": [upstream.origin, "https://*.example.com/v1"],
        "secret_origins": {"ONE_API_KEY": [upstream.origin]},
        "max_body_size": 2 << 20,
        "max_in_flight": 1,
        "max_queued": 0,
        "max_idle_ttl": 600.0,
        "max_loaded_models": 1,
        "record_bodies": True,
        "configurations": [
            {
                "model_id": "declared",
                "model_name": "other-name",
                "model_type": "openai",
                "model_kwargs": {"base_url": "http://127.0.0.1:9/v1"},
            }
        ],
    }
    path = os.pathsep.join(filter(None, (PLUGIN["PYTHONPATH"], os.environ.get("PYTHONPATH", ""))))
    server = JupyterServer(env={"PYTHONPATH": path, "ONE_API_KEY": "one", "TWO_API_KEY": "two"})
    filed = traits if request.param == "file" else {"configurations": traits.pop("configurations")}
    configure_in_file(server, filed)
    if request.param != "file":
        for name, value in traits.items():
            # Traitlets takes a list as its items, one by one.
            server.args += [f"--LLMKitApp.{name}={one}" for one in (value if isinstance(value, list) else [value])]
    with server, connect(server.url, server.token) as client:
        client.configure("m", "gpt-3", "openai", {"base_url": upstream.base_url})
        client.load("m", progress=False)
        yield client


def test_names_of_models(decided: Client) -> None:
    with pytest.raises(RefusedByOperator, match=r"does not allow `llmkit/demo`") as caught:
        decided.configure("x", "llmkit/demo", "vllm")
    assert caught.value.param == "model_name"
    with pytest.raises(RefusedByOperator):
        decided.check("x", "llmkit/demo", "vllm")


def test_addresses(decided: Client) -> None:
    for url in ("http://10.11.12.13/v1", "https://a.example.com/v2"):
        with pytest.raises(RefusedByOperator, match="does not allow requests to"):
            decided.configure("x", "gpt-3", "openai", {"base_url": url})
    with pytest.raises(RefusedByOperator):  # OpenAI's own is not among them
        decided.configure("x", "gpt-3", "openai")
    with pytest.raises(RefusedByOperator):
        decided.update("m", model_kwargs={"base_url": "http://10.11.12.13/v1"}, reload=True)
    decided.configure("x", "gpt-3", "openai", {"base_url": "https://a.example.com/v1"})
    decided.delete("x")


def test_code_of_models(decided: Client) -> None:
    (vllm,) = (one for one in decided.model_types() if one.name == "vllm")
    assert "trust_remote_code" in vllm.arguments["properties"]
    decided.configure("x", "org/model", "vllm", {"trust_remote_code": True})
    decided.delete("x")


def test_keys_and_where_they_go(decided: Client, upstream: MockUpstream) -> None:
    with pytest.raises(KeyNotAllowed, match="TWO_API_KEY"):
        decided.check("x", "gpt-3", "openai", {"base_url": upstream.base_url, "api_key": "env:TWO_API_KEY"})
    decided.check("x", "gpt-3", "openai", {"base_url": upstream.base_url, "api_key": "env:ONE_API_KEY"})


def test_the_size_of_prompts_and_not_of_configurations(decided: Client) -> None:
    assert str(decided.prompt("m", "x" * (3 << 19))) == ANSWER
    for path in ("llm/inference/", "llm/v1/chat/completions"):
        refused = decided.connection.raw("POST", path, json={"model_id": "m", "prompt": "x" * (2 << 20)})
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "too_large")
    body = {"model_id": "x", "model_name": "gpt-3", "model_type": "openai", "description": "x" * (1 << 20)}
    assert decided.connection.raw("POST", "llm/configure_model/", json=body).status_code == 413


def test_how_many_ask_at_once_and_wait(decided: Client, upstream: MockUpstream) -> None:
    began, end = threading.Event(), threading.Event()

    async def respond(request: Any, body: Any) -> None:
        import asyncio

        if request.path == "/v1/chat/completions":
            began.set()
            while not end.is_set():
                await asyncio.sleep(0.01)

    upstream.respond = respond
    threading.Timer(20, end.set).start()  # a second one that is let in must not wait for ever
    try:
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(decided.prompt, "m", "Hello")
            try:
                assert began.wait(20)
                with pytest.raises(QueueFull):
                    decided.prompt("m", "Hello")
            finally:
                end.set()
            assert str(first.result(20)) == ANSWER
    finally:
        upstream.respond = None


def test_how_long_a_model_may_be_idle(decided: Client) -> None:
    decided.prompt("m", "Hello", idle_ttl=1e6)
    expires = decided.model("m").expires_at
    assert expires is not None
    assert timedelta(0) < expires - datetime.now(UTC) <= timedelta(seconds=600)


def test_what_is_recorded(decided: Client) -> None:
    answer = decided.prompt("m", "remember me")

    def recorded() -> Any:
        recent = decided.connection.call("GET", "llm/requests/")["recent"]
        return next((one for one in recent if one["request_id"] == answer.request_id), None)

    assert "remember me" in wait_until(recorded, "the record")["request_body"]


def test_how_many_models_hold_memory(decided: Client) -> None:
    decided.configure("one", "any", "fake")
    decided.configure("two", "any", "fake")
    decided.load("one", progress=False)
    decided.load("two", progress=False)
    assert {one.model_id for one in decided.models() if one.status == "loaded"} == {"m", "two"}
    for name in ("one", "two"):
        decided.delete(name, unload=True)


def test_what_is_declared_is_there_and_not_bound_by_the_rules_for_others(decided: Client) -> None:
    (declared,) = (one for one in decided.configurations() if one.declared)
    assert (declared.model_id, declared.model_name) == ("declared", "other-name")
    assert decided.plan("declared").fits is True


# -- safe defaults, and what they do to what is stored -------------------------------------------------------------


def test_what_is_no_longer_allowed_stays_listed_and_is_not_loaded(upstream: MockUpstream) -> None:
    with JupyterServer(args=["--LLMKitApp.allow_trust_remote_code=True"]) as server:
        with connect(server.url, server.token) as client:
            client.configure("code", "org/model", "vllm", {"trust_remote_code": True})
            client.configure("far", "gpt-3", "openai", {"base_url": upstream.base_url}, auto_load=True)
            client.load("far", progress=False)
        server.stop()
        server.args = ["--LLMKitApp.allowed_base_urls=https://api.openai.com"]
        server.start()
        with connect(server.url, server.token) as client:
            assert {one.model_id for one in client.configurations()} == {"code", "far"}
            (vllm,) = (one for one in client.model_types() if one.name == "vllm")
            assert "trust_remote_code" not in vllm.arguments["properties"]
            before = len(upstream.requests)
            for attempt in (
                lambda: client.load("far", progress=False),
                lambda: client.plan("far"),
                lambda: client.prompt("far", "Hello"),
                lambda: client.configure("again", "org/model", "vllm", {"trust_remote_code": True}),
            ):
                with pytest.raises(RefusedByOperator, match="operator"):
                    attempt()
            assert len(upstream.requests) == before
            assert client.model("far").status in ("unloaded", "failed")
            for name in ("code", "far"):
                client.delete(name)


def test_defaults_are_safe() -> None:
    app = LLMKitApp()
    assert (app.allow_trust_remote_code, app.record_bodies, app.max_body_size) == (False, False, MAX_PROMPT_BYTES)
    with pytest.raises(TraitError):
        app.max_body_size = 1000
    for name, trait in LLMKitApp.class_own_traits(config=True).items():
        assert len(trait.help) > 20, name


# -- a role that only prompts --------------------------------------------------------------------------------------

ROLE = "--ServerApp.authorizer_class=jupyter_server_ext.authorizer.PromptOnlyAuthorizer"


def test_who_only_prompts_sees_and_asks_and_changes_nothing(upstream: MockUpstream) -> None:
    declared = {
        "model_id": "ours",
        "model_name": "gpt-3",
        "model_type": "openai",
        "model_kwargs": {"base_url": upstream.base_url},
        "auto_load": True,
    }
    made = JupyterServer("llmkit", args=[ROLE])
    configure_in_file(made, {"configurations": [declared]})
    with made as server, connect(server.url, server.token) as client:
        assert client.permissions() == {"read", "execute"}
        assert [one.model_id for one in client.models()] == ["ours"]
        assert str(client.prompt("ours", "Hello")) == ANSWER  # the configuration loads it, not the person
        for change in (
            lambda: client.configure("mine", "gpt-3", "openai"),
            lambda: client.check("mine", "gpt-3", "openai"),
            lambda: client.load("ours", progress=False),
            lambda: client.unload("ours"),
            lambda: client.delete("ours"),
            lambda: client.create_key("mine"),
            lambda: client.revoke_key("mine"),
        ):
            with pytest.raises(NotAllowed):
                change()
        assert client.model("ours").status == "loaded"
        assert server.request("GET", "api/status").status_code == 200


def test_the_rest_of_a_server_is_as_without_it() -> None:
    with JupyterServer(args=[ROLE]) as server:
        for path in ("api/contents", "api/kernels", "api/terminals"):
            assert server.request("GET", path).status_code == 200, path
        assert server.request("POST", "llm/configure_model/", json={}).status_code == 403
        asked = {"permissions": json.dumps({"contents": ["write"], "llm": ["write", "execute"]})}
        told = server.request("GET", "api/me", params=asked).json()["permissions"]
        assert (told["contents"], told["llm"]) == (["write"], ["execute"])


class DenyAll(Authorizer):
    def is_authorized(self, handler: Any, user: Any, action: str, resource: str) -> bool:
        return False


def test_operators_are_named_or_of_a_group_and_keys_are_none() -> None:
    role = PromptOnlyAuthorizer(
        operators=["ada"],
        operator_groups=["staff"],
        other_authorizer_class=DenyAll,
        identity_provider=IdentityProvider(),
    )

    def may(user: Any) -> bool:
        assert role.is_authorized(None, user, "read", "llm")
        assert role.is_authorized(None, user, "execute", "llm")
        assert not role.is_authorized(None, user, "read", "contents")
        decided = role.is_authorized(None, user, "write", "llm")
        assert isinstance(decided, bool)
        return decided

    assert may(User("ada"))
    assert may(SimpleNamespace(username="bo", groups=["guests", "staff"]))
    assert may(SimpleNamespace(username="bo", hub_user={"name": "bo", "groups": ["staff"]}))
    assert not may(User("bo"))
    assert not may(User("bo", name="ada", display_name="ada"))
    assert not may(User("key:ada"))
    assert not may(SimpleNamespace(username="bo", groups="staff"))
    assert not may(SimpleNamespace(username="bo", hub_user={"name": "bo", "groups": ["guests"]}))
    assert not role.is_authorized(None, User("bo"), "fly", "llm")


@pytest.mark.parametrize(
    ("service", "how"), [("llmkit", "command line"), ("server", "command line"), ("server", "the server's file")]
)
def test_a_setting_that_cannot_be_read_allows_nothing(service: str, how: str) -> None:
    """Jupyter would go on with the defaults of all that stands after it; in llmkit's own file it ends at once."""
    canary = "Zq9canary7Xw"
    traits = {"configurations": f"key {canary}", "allowed_model_names": ["gpt-*"]}
    arguments = [f"--LLMKitApp.{name}={value}" for name, value in traits.items()] if how == "command line" else []
    server = JupyterServer(service, args=arguments)
    if how == "the server's file":
        configure_in_file(server, traits, "jupyter_server_config.py")
    with server:
        for path in ("models/", "health", "v1/models"):
            answer = server.request("GET", f"llm/{path}")
            assert answer.status_code == 503
            assert "A setting of the server has a wrong value" in answer.json()["message"]
            assert "'configurations' trait" in answer.json()["message"]
            assert "--show-config" in answer.json()["error"]["hint"]
            assert canary not in answer.text
        assert "llmkit cannot start: A setting of the server" in server.log
