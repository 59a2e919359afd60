"""Keys for tools: what they open, what they do not, and how long."""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
import stat
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import websocket
from jupyter_server.auth.authorizer import Authorizer
from mock_upstream import ANSWER, MockUpstream
from support import JupyterServer, wait_until

from jupyter_server_ext.app import LLMKitApp
from jupyter_server_ext.handlers import ROUTES
from llmkit.client import connect
from llmkit.errors import KeyExists, KeyNotFound, NotAllowed, NotAuthenticated
from llmkit.registry.keys import ToolKeys
from llmkit.tool_keys import ToolKeyRequest, new_key

Ask = Callable[..., Awaitable[Any]]
PROMPT = {"model_id": "m", "prompt": "Hello"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture
def make(call: Any) -> Callable[..., Awaitable[str]]:
    """Make a key and give its text."""

    async def do(name: str = "tool", **fields: Any) -> str:
        answer = await call("POST", "llm/keys/", {"name": name, **fields})
        assert answer.status == 200, answer.text
        text: str = answer.json["key"]
        return text

    return do


@pytest.fixture
def ask(jp_http_port: int, jp_base_url: str, app: LLMKitApp) -> Ask:
    """Send a request with nothing but what is given."""

    async def do(method: str, path: str, key: str | None = None, **kwargs: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        headers |= kwargs.pop("headers", {})
        async with httpx.AsyncClient(timeout=30, trust_env=False) as client:
            url = f"http://127.0.0.1:{jp_http_port}{jp_base_url}{path}"
            return await client.request(method, url, headers=headers, **kwargs)

    return do


@pytest.fixture
def loaded(call: Any, configure: Any, upstream: MockUpstream) -> Callable[[], Awaitable[None]]:
    """Configure and load the model `m`."""

    async def do() -> None:
        assert (await call("POST", f"llm/load_model/{await configure('m')}")).status == 200

    return do


# -- made, listed, revoked -----------------------------------------------------------------------------------------


async def test_a_key_is_told_once_and_kept_as_a_digest(call: Any, app: LLMKitApp, caplog: Any) -> None:
    caplog.set_level(logging.DEBUG)
    made = await call("POST", "llm/keys/", {"name": "editor", "models": ["code-*"], "expires_in": 3600})
    key = made.json["key"]
    assert made.headers["Cache-Control"] == "no-store"
    (listed,) = (await call("GET", "llm/keys")).json["keys"]
    assert (listed["name"], listed["models"], listed["expired"]) == ("editor", ["code-*"], False)
    left = datetime.fromisoformat(listed["expires_at"]) - datetime.fromisoformat(listed["created_at"])
    assert left == timedelta(hours=1)
    assert listed["last_used_at"] is None
    for text in (json.dumps(listed), caplog.text):
        assert key not in text
        assert key[-12:] not in text
    files = sorted(Path(app.state_dir).glob("keys.sqlite*"))
    assert files
    for file in files:
        assert key.encode() not in file.read_bytes()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({"name": "../x"}, "name"),
        ({"name": ""}, "name"),
        ({"name": "a\n"}, "name"),
        ({"models": "m"}, "models"),
        ({"models": ["a b"]}, "models.0"),
        ({"expires_in": 0}, "expires_in"),
        ({"expires_in": 1e12}, "expires_in"),
        ({"expires_at": "2020-01-01T00:00:00Z"}, "expires_at"),
        ({"expires_at": "2030-01-01T00:00:00"}, "expires_at"),
        ({"expires_at": "9999-12-31T23:59:59-12:00"}, "expires_at"),
        ({"expires_at": 4102444800}, "expires_at"),
        ({"expires_at": "2030-01-01T00:00:00Z", "expires_in": 60}, ""),
        ({"scope": "all"}, "scope"),
    ],
)
async def test_what_does_not_fit_is_refused_by_its_name(call: Any, body: dict[str, Any], path: str) -> None:
    answer = await call("POST", "llm/keys/", body)
    assert answer.status == 422, answer.text
    assert answer.json["error"]["details"]["fields"][0]["path"] == path
    assert (await call("GET", "llm/keys")).json == {"keys": []}


async def test_a_name_is_given_once_and_made_up_where_there_is_none(call: Any, make: Any) -> None:
    first = await make("editor")
    again = await call("POST", "llm/keys/", {"name": "editor"})
    assert (again.status, again.json["error"]["code"]) == (409, "key_exists")
    assert first not in again.text
    assert (await call("POST", "llm/keys/", {})).json["name"].startswith("key-")
    assert (await call("DELETE", "llm/keys/editor")).status == 200
    gone = await call("DELETE", "llm/keys/editor")
    assert (gone.status, gone.json["error"]["code"]) == (404, "key_not_found")


async def test_there_is_an_end_to_how_many_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmkit.registry.keys.MOST_KEYS", 2)
    keys = ToolKeys(tmp_path, logging.getLogger("keys"))
    await keys.create(ToolKeyRequest())
    await keys.create(ToolKeyRequest())
    with pytest.raises(Exception, match="There are 2 keys already"):
        await keys.create(ToolKeyRequest())
    await keys.close()


# -- what a key opens ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "token", "Token", "BEARER "])
async def test_it_opens_prompts_and_openais_api(
    ask: Ask, make: Any, loaded: Any, call: Any, scheme: str, upstream: MockUpstream
) -> None:
    await loaded()
    key = await make()
    headers = {"Authorization": f"{scheme} {key}"}
    assert [m["id"] for m in (await ask("GET", "llm/v1/models", headers=headers)).json()["data"]] == ["m"]
    assert (await ask("GET", "llm/v1/models/m", headers=headers)).status_code == 200
    chat = await ask("POST", "llm/v1/chat/completions", headers=headers, json=CHAT)
    assert chat.json()["choices"][0]["message"]["content"] == ANSWER
    answer = await ask("POST", "llm/inference/", headers=headers, json=PROMPT)
    assert (answer.status_code, answer.json()["response"]) == (200, ANSWER)
    assert "Set-Cookie" not in answer.headers
    used = (await call("GET", "llm/keys")).json["keys"][0]["last_used_at"]
    assert datetime.now(UTC) - datetime.fromisoformat(used) < timedelta(minutes=5)
    assert datetime.fromisoformat(used).second == 0
    # The key stays here: what the endpoint gets is its own.
    assert all(key not in str(one) for one in upstream.requests)


async def test_every_route_that_does_not_say_so_is_closed_to_it(ask: Ask, make: Any, loaded: Any) -> None:
    await loaded()
    key = await make()
    opened, closed = set(), 0
    for pattern, handler in ROUTES:
        path = pattern.removeprefix("/").removesuffix("/?").replace("([^/]+)", "m").replace("(?:/.*)?", "/nothing")
        path = path.replace("|".join(RELAYED), "chat/completions").replace("(", "").replace(")", "")
        for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"):
            answer = await ask(method, path, key, content=b"{}")
            if method in handler.opened_by_keys:
                opened.add(f"{method} {path}")
                assert answer.status_code != 403, (method, path, answer.text)
            else:
                closed += 1
                assert answer.status_code in (403, 405), (method, path, answer.status_code)
    assert opened == {
        "POST llm/v1/chat/completions",
        "GET llm/v1/models",
        "GET llm/v1/models/m",
        "POST llm/inference",
        "DELETE llm/inference/m",
    }
    assert closed > 100


RELAYED = ("chat/completions", "completions", "embeddings", "responses", "tokenize")


@pytest.mark.parametrize(
    "path", ["api/contents", "api/kernels", "api/sessions", "api/terminals", "api/me", "api/config/x", "files/x", "lab"]
)
async def test_it_opens_nothing_of_jupyters_own(ask: Ask, make: Any, path: str) -> None:
    key = await make()
    for how in ({"key": key}, {"params": {"token": key}}):
        for method in ("GET", "POST"):
            answer = await ask(method, path, **how)
            assert answer.status_code in (302, 403, 404, 405), (method, how, answer.status_code)
            assert answer.status_code != 302 or "/login" in answer.headers["Location"]


async def test_a_key_in_an_address_opens_nothing_and_is_told_so(ask: Ask, make: Any, loaded: Any) -> None:
    await loaded()
    key = await make()
    answer = await ask("GET", "llm/v1/models", params={"token": key})
    assert answer.status_code == 401
    assert "address" in answer.json()["message"]
    # The key in the header counts, whatever stands beside it.
    assert (await ask("GET", "llm/v1/models", key, params={"token": "x"})).status_code == 200


async def test_who_comes_with_a_key_is_the_key_also_with_the_servers_token_beside_it(
    ask: Ask, make: Any, jp_serverapp: Any
) -> None:
    key = await make()
    token = jp_serverapp.identity_provider.token
    assert (await ask("GET", "llm/configurations", params={"token": token})).status_code == 200
    assert (await ask("GET", "llm/configurations", key, params={"token": token})).status_code == 403


async def test_what_is_nearly_a_key_opens_nothing(ask: Ask, make: Any, loaded: Any) -> None:
    await loaded()
    key = await make()
    flipped = key[:-1] + ("a" if key[-1] != "a" else "b")
    wrong = [flipped, new_key(), key.upper(), key.lower(), key[:-1], key + "a", key.removeprefix("llmkit-"), f"{key} x"]
    wrong += [f"LLMKIT-{key[7:]}", f"llmkit_{key[7:]}", f"{key},{key}", "llmkit-" + "0" * 43]
    for text in wrong:
        answer = await ask("GET", "llm/v1/models", text)
        assert answer.status_code in (401, 403), text
    for header in (key, f"Basic {key}", f"Bearer{key}", f"Bearer token {key}"):
        assert (await ask("GET", "llm/v1/models", headers={"Authorization": header})).status_code == 403


async def test_a_key_ends_when_it_was_to_end(
    ask: Ask, make: Any, loaded: Any, call: Any, app: LLMKitApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    await loaded()
    key = await make(expires_in=3600)
    assert (await ask("GET", "llm/v1/models", key)).status_code == 200

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) + timedelta(seconds=3601)

    monkeypatch.setattr("llmkit.registry.keys.datetime", Later)
    answer = await ask("GET", "llm/v1/models", key)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "not_authenticated")
    assert "expired" in answer.json()["message"]
    assert (await call("GET", "llm/keys")).json["keys"][0]["expired"] is True


async def test_a_revoked_key_opens_nothing_at_the_next_request(ask: Ask, make: Any, loaded: Any, call: Any) -> None:
    await loaded()
    key, other = await make(), await make("other")
    assert (await ask("GET", "llm/v1/models", key)).status_code == 200
    await call("DELETE", "llm/keys/tool")
    assert (await ask("GET", "llm/v1/models", key)).status_code == 401
    assert (await ask("GET", "llm/v1/models", other)).status_code == 200


# -- which models --------------------------------------------------------------------------------------------------


async def test_it_sees_and_asks_the_models_that_it_may_and_learns_of_no_other(
    ask: Ask, make: Any, call: Any, configure: Any, loaded: Any
) -> None:
    await loaded()
    await call("POST", f"llm/load_model/{await configure('secret-m')}")
    key = await make(models=["m", "n*"])
    assert [one["id"] for one in (await ask("GET", "llm/v1/models", key)).json()["data"]] == ["m"]
    for model_id in ("secret-m", "secret", "n-secret-m"):
        said = [
            await ask("GET", f"llm/v1/models/{model_id}", key),
            await ask("POST", "llm/v1/chat/completions", key, json={**CHAT, "model": model_id}),
            await ask("POST", "llm/inference/", key, json={**PROMPT, "model_id": model_id}),
        ]
        for answer in said:
            assert answer.status_code == 404, answer.text
            assert answer.json()["error"]["code"] == "model_not_found"
            assert "secret-m" not in answer.text.replace(model_id, "")
    assert (await ask("POST", "llm/inference/", key, json=PROMPT)).status_code == 200


async def test_a_fallback_is_asked_only_if_the_key_may_ask_it(
    ask: Ask, make: Any, call: Any, configure: Any, upstream: MockUpstream
) -> None:
    dead = {"base_url": "http://127.0.0.1:9/v1", "max_retries": 0}
    await configure("m", model_kwargs=dead, fallback="dear", auto_load=True)
    await call("POST", f"llm/load_model/{await configure('dear')}")
    both, one = await make("both"), await make("one", models=["m"])
    assert (await ask("POST", "llm/inference/", both, json=PROMPT)).json()["model_id"] == "dear"
    refused = await ask("POST", "llm/inference/", one, json=PROMPT)
    assert refused.status_code in (409, 502), refused.text
    assert "dear" not in refused.text


async def test_it_loads_a_model_only_where_the_configuration_says_so(
    ask: Ask, make: Any, configure: Any, upstream: MockUpstream
) -> None:
    key = await make()
    await configure("m")
    answer = await ask("POST", "llm/inference/", key, json=PROMPT)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "model_not_loaded")
    await configure("auto", auto_load=True)
    assert (await ask("POST", "llm/inference/", key, json={**PROMPT, "model_id": "auto"})).status_code == 200


async def test_it_ends_its_own_requests_alone(
    ask: Ask, make: Any, loaded: Any, call: Any, upstream: MockUpstream
) -> None:
    await loaded()
    began = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def wait(request: Any, body: Any) -> None:
        if request.path == "/v1/chat/completions":
            loop.call_soon_threadsafe(began.set)
            await asyncio.sleep(60)

    upstream.respond = wait
    key, other = await make("one"), await make("two")
    body = {**PROMPT, "inference_kwargs": {"request_id": "mine"}}
    running = asyncio.create_task(ask("POST", "llm/inference/", key, json=body))
    await asyncio.wait_for(began.wait(), 20)
    (listed,) = (await call("GET", "llm/requests")).json["running"]
    assert (listed["request_id"], listed["tool_key"]) == ("mine", "one")
    assert (await ask("DELETE", "llm/inference/mine", other)).status_code == 404
    assert (await ask("DELETE", "llm/inference/mine", key)).status_code == 200
    assert (await running).json()["error"]["code"] == "request_cancelled"


async def test_what_it_asks_is_recorded_under_its_name(ask: Ask, make: Any, loaded: Any, call: Any) -> None:
    await loaded()
    key = await make("editor")
    assert (await ask("POST", "llm/inference/", key, json=PROMPT)).status_code == 200
    assert (await ask("POST", "llm/v1/chat/completions", key, json=CHAT)).status_code == 200
    assert (await call("POST", "llm/inference/", PROMPT)).status == 200
    await call("DELETE", "llm/keys/editor")
    told = await call("GET", "llm/requests")
    assert [(one["api"], one["tool_key"]) for one in told.json["recent"]] == [
        ("inference", None),
        ("chat/completions", "editor"),
        ("inference", "editor"),
    ]
    assert key not in told.text


# -- other authorizers and servers ---------------------------------------------------------------------------------


class Decides(Authorizer):
    """Allows what `allowed` says, by the kind of user."""

    allowed: dict[str, set[str]] = {}  # noqa: RUF012  # set by the tests

    def is_authorized(self, handler: Any, user: Any, action: str, resource: str) -> bool:
        kind = "key" if user.username.startswith("key:") else "person"
        return resource == "llm" and action in self.allowed[kind]


class TestAuthorizer:
    @pytest.fixture
    def jp_server_config(self) -> dict[str, Any]:
        return {
            "ServerApp": {"jpserver_extensions": {"jupyter_server_ext": True}, "authorizer_class": Decides},
            "LLMKitApp": {"standby": "off"},
        }

    async def test_it_decides_on_keys_too_by_their_name(
        self, ask: Ask, make: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        everything = {"read", "write", "execute"}
        monkeypatch.setattr(Decides, "allowed", {"person": everything, "key": {"read"}})
        key = await make()
        assert (await ask("GET", "llm/v1/models", key)).status_code == 200
        refused = await ask("POST", "llm/inference/", key, json=PROMPT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "not_allowed")
        monkeypatch.setattr(Decides, "allowed", {"person": everything, "key": set()})
        assert (await ask("GET", "llm/v1/models", key)).status_code == 403

    async def test_nobody_makes_a_key_that_opens_more_than_they_may(
        self, call: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for may in ({"read", "write"}, {"write", "execute"}, {"read", "execute"}):
            monkeypatch.setattr(Decides, "allowed", {"person": may, "key": {"read", "execute"}})
            answer = await call("POST", "llm/keys/", {"name": "more"})
            assert (answer.status, answer.json["error"]["code"]) == (403, "not_allowed")


class TestOpenServer:
    """Without authentication a key that is over must not be less than a restriction."""

    @pytest.fixture
    def jp_server_config(self) -> dict[str, Any]:
        return {
            "ServerApp": {
                "jpserver_extensions": {"jupyter_server_ext": True},
                "disable_check_xsrf": True,
                "token": "",
            },
            "LLMKitApp": {"standby": "off"},
        }

    @pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
    async def test_a_key_restricts_there_too_and_one_that_is_unknown_opens_nothing(
        self, ask: Ask, make: Any, loaded: Any
    ) -> None:
        await loaded()
        assert (await ask("GET", "llm/configurations")).status_code == 200
        key = await make(models=["other"])
        assert (await ask("GET", "llm/configurations", key)).status_code == 403
        assert (await ask("GET", "llm/v1/models", key)).json()["data"] == []
        assert (await ask("GET", "llm/v1/models", new_key())).status_code == 401
        assert (await ask("GET", "llm/configurations", new_key())).status_code == 401


class TestStrictServer:
    @pytest.fixture
    def jp_server_config(self) -> dict[str, Any]:
        return {
            "ServerApp": {"jpserver_extensions": {"jupyter_server_ext": True}, "allow_unauthenticated_access": False},
            "LLMKitApp": {"standby": "off"},
        }

    async def test_a_key_opens_the_same(self, ask: Ask, make: Any, loaded: Any) -> None:
        await loaded()
        key = await make()
        assert (await ask("POST", "llm/inference/", key, json=PROMPT)).status_code == 200
        assert (await ask("GET", "llm/configurations", key)).status_code == 403
        assert (await ask("POST", "llm/inference/", new_key(), json=PROMPT)).status_code == 401


# -- the file ------------------------------------------------------------------------------------------------------


async def test_a_broken_file_opens_nothing_and_is_told(call: Any, make: Any, ask: Ask, app: LLMKitApp) -> None:
    key = await make()
    file = Path(app.state_dir) / "keys.sqlite"
    for part in file.parent.glob("keys.sqlite*"):
        part.unlink()  # the newest rows are in the write-ahead log
    file.write_bytes(b"no database" * 100)
    deadline = time.monotonic() + 20
    while (await ask("GET", "llm/v1/models", key)).status_code != 401:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)
    health = (await call("GET", "llm/health")).json
    assert any("kept as keys.sqlite.corrupt-" in problem for problem in health["problems"])
    again = await make("again")
    assert (await ask("GET", "llm/v1/models", again)).status_code == 200


async def test_a_row_that_cannot_be_read_opens_nothing_and_hides_no_other(tmp_path: Path) -> None:
    keys = ToolKeys(tmp_path, logging.getLogger("keys"))
    bad = await keys.create(ToolKeyRequest(name="bad"))
    good = await keys.create(ToolKeyRequest(name="good"))
    with sqlite3.connect(tmp_path / "keys.sqlite") as connection:
        connection.execute("UPDATE keys SET models = 'x' WHERE name = 'bad'")
    connection.close()
    await keys.catch_up()
    assert keys.find(good.key).name == "good"
    with pytest.raises(NotAuthenticated):
        keys.find(bad.key)
    await keys.revoke("bad")
    await keys.close()


# -- real servers --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[JupyterServer, JupyterServer]]:
    """Give two real servers of one home."""
    home = tmp_path_factory.mktemp("home") / "state"
    with JupyterServer(state_dir=home) as one, JupyterServer("llmkit", state_dir=home) as two:
        yield one, two


def asks(server: JupyterServer, key: str) -> int:
    answer = httpx.get(f"{server.url}llm/v1/models", headers={"Authorization": f"Bearer {key}"}, trust_env=False)
    return answer.status_code


def test_an_openai_client_works_with_a_key_and_two_servers_of_a_home_share_it(
    pair: tuple[JupyterServer, JupyterServer],
) -> None:
    one, two = pair
    with MockUpstream() as upstream, connect(one.url, one.token) as client:
        client.configure("shared", "gpt-3", "openai", {"base_url": upstream.base_url}, auto_load=True)
        made = client.create_key("sdk", models=["shar*"], expires=timedelta(days=1))
        assert made.key not in f"{made!r} {made} {[made]}"
        with pytest.raises(KeyExists):
            client.create_key("sdk")
        for server in pair:
            wait_until(lambda server=server: asks(server, made.key) == 200, "the key in the other server")
            wait_until(
                lambda server=server: server.request("GET", "llm/models/shared").status_code == 200, "the model there"
            )
            with openai.OpenAI(base_url=f"{server.url}llm/v1", api_key=made.key, max_retries=0) as sdk:
                assert [model.id for model in sdk.models.list()] == ["shared"]
                messages: Any = [{"role": "user", "content": "Hello"}]
                answer = sdk.chat.completions.create(model="shared", messages=messages)
                assert answer.choices[0].message.content == ANSWER
                pieces = sdk.chat.completions.create(model="shared", messages=messages, stream=True)
                assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == ANSWER
                with pytest.raises(openai.NotFoundError):
                    sdk.chat.completions.create(model="other", messages=messages)
            for path in ("api/contents", "api/terminals", "llm/configurations", "api/me", "llm/keys"):
                refused = httpx.get(server.url + path, headers={"Authorization": f"Bearer {made.key}"}, trust_env=False)
                assert refused.status_code in (403, 404), (path, refused.status_code)
            with pytest.raises(websocket.WebSocketBadStatusException) as closed:
                websocket.create_connection(
                    server.url.replace("http", "ws", 1) + "api/events/subscribe",
                    header={"Authorization": f"Bearer {made.key}"},
                    timeout=20,
                )
            assert closed.value.status_code == 403
        with connect(two.url, two.token) as other:
            (listed,) = other.keys()
            assert (listed.name, listed.models) == ("sdk", ["shar*"])
            assert listed.last_used_at is not None
            other.revoke_key("sdk")
            assert asks(two, made.key) == 401
            began = time.monotonic()
            wait_until(lambda: asks(one, made.key) == 401, "the revocation in the other server")
            print(f"revoked in the other server after {time.monotonic() - began:.2f} s")
        with (
            pytest.raises(openai.AuthenticationError),
            openai.OpenAI(base_url=f"{one.url}llm/v1", api_key=made.key, max_retries=0) as sdk,
        ):
            sdk.models.list()
        with pytest.raises(KeyNotFound):
            client.revoke_key("sdk")
        with connect(two.url, two.token) as other:
            other.unload("shared")
        client.delete("shared", unload=True)


def test_a_key_survives_a_restart(pair: tuple[JupyterServer, JupyterServer]) -> None:
    one, two = pair
    with connect(two.url, two.token) as client:
        made = client.create_key("lasting")
    one.stop()
    one.start()
    assert asks(one, made.key) == 200
    with connect(one.url, one.token) as client:
        client.revoke_key("lasting")


async def test_the_async_client_has_the_same(pair: tuple[JupyterServer, JupyterServer]) -> None:
    with connect(pair[0].url, pair[0].token) as client:
        waiting = client.as_async()
        made = await waiting.create_key(expires=datetime.now(UTC) + timedelta(hours=1))
        assert [key.name for key in await waiting.keys()] == [made.name]
        await waiting.revoke_key(made.name)
        assert await waiting.keys() == []


def test_a_key_is_no_token_of_the_python_client(pair: tuple[JupyterServer, JupyterServer]) -> None:
    with connect(pair[0].url, pair[0].token) as client:
        made = client.create_key("script")
        try:
            with pytest.raises((NotAllowed, NotAuthenticated)), connect(pair[0].url, made.key) as other:
                other.configurations()
        finally:
            client.revoke_key("script")
