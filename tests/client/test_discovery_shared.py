"""Which of two registries is found under JupyterHub, and to whom the user's token goes."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmkit.client.client import Client
from llmkit.client.connection import Connection, Server
from llmkit.client.discovery import candidates, connect
from llmkit.errors import ServerNotFound

SHARED = "http://hub.example/services/llmkit/"
HUB = {
    "LLMKIT_SHARED_URL": SHARED,
    "JUPYTERHUB_API_TOKEN": "of-the-user",
    "JUPYTERHUB_SERVICE_PREFIX": "/user/ada/",
    "JUPYTERHUB_SERVICE_URL": "http://127.0.0.1:5001/user/ada/",
}


@pytest.fixture(autouse=True)
def _runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))


def test_the_shared_one_comes_first_with_the_users_own_token() -> None:
    (found,) = candidates(None, HUB)
    assert found.server == Server(SHARED, "of-the-user", shared=True)
    assert (found.source, found.explicit) == ("LLMKIT_SHARED_URL", True)


def test_the_own_one_is_found_when_it_is_asked_for() -> None:
    servers = [one.server for one in candidates(None, HUB, shared=False) if one.server is not None]
    assert servers == [Server("http://127.0.0.1:5001/user/ada/", "of-the-user")]


def test_what_the_user_names_wins() -> None:
    environ = {**HUB, "LLMKIT_SERVER_URL": "http://elsewhere.example/", "LLMKIT_TOKEN": "other"}
    for shared in (None, False):
        (found,) = candidates(None, environ, shared=shared)
        assert found.server == Server("http://elsewhere.example/", "other")
    (found,) = candidates(None, environ, shared=True)
    assert found.server == Server(SHARED, "of-the-user", shared=True)
    (found,) = candidates(SHARED, environ)
    assert found.server == Server(SHARED, "of-the-user", shared=True)


@pytest.mark.parametrize(
    "url",
    [
        "http://hub.example:81/services/llmkit/",
        "https://hub.example/services/llmkit/",
        "http://hub.example/services/other/",
        "http://hub.example/",
        "http://hub.example.evil/services/llmkit/",
        "http://127.0.0.1:5001/user/ben/",
    ],
)
def test_the_token_goes_nowhere_else(url: str) -> None:
    (found,) = candidates(url, HUB)
    assert found.server == Server(url, None)


def test_where_there_is_none_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMKIT_SHARED_URL", raising=False)
    with pytest.raises(ServerNotFound, match="names no llmkit that many people share"):
        connect(shared=True)


def test_a_client_says_which_one_it_is_of() -> None:
    with Client(Connection(Server(SHARED, "x", shared=True))) as client:
        assert client.shared
        assert repr(client) == f"<llmkit.Client {SHARED} (shared)>"
    with Client(Connection(Server("http://127.0.0.1:1/"))) as client:
        assert not client.shared
        assert repr(client) == "<llmkit.Client http://127.0.0.1:1/>"
