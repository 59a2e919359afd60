"""What a user may do, as Jupyter's own authorizer says."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from jupyter_server.auth.authorizer import Authorizer
from support import JupyterServer

from llmkit.client import connect
from llmkit.client.client import PERMISSIONS
from llmkit.errors import NotAllowed


class Visitors(Authorizer):
    """Lets everybody look and ask, and nobody change."""

    def is_authorized(self, handler: Any, user: Any, action: str, resource: str) -> bool:
        return resource != "llm" or action in ("read", "execute")


@pytest.fixture
def jp_server_config() -> dict[str, Any]:
    return {
        "ServerApp": {"jpserver_extensions": {"jupyter_server_ext": True}, "authorizer_class": Visitors},
        "LLMKitApp": {"standby": "off"},
    }


async def test_what_the_authorizer_refuses_is_missing(
    jp_serverapp: Any, http_server: Any, jp_http_port: int, jp_base_url: str
) -> None:
    def ask() -> frozenset[str]:
        url = f"http://127.0.0.1:{jp_http_port}{jp_base_url}"
        with connect(url, jp_serverapp.identity_provider.token) as client:
            for change in (client.configure, client.check):  # it is no matter of words
                with pytest.raises(NotAllowed):
                    change("demo", "llmkit/demo", "vllm")
            return client.permissions()

    assert await asyncio.to_thread(ask) == {"read", "execute"}


def test_who_may_do_everything_is_told_so(server: JupyterServer) -> None:
    with connect(server.url, server.token) as client:
        assert client.permissions() == PERMISSIONS == {"read", "write", "execute"}


@pytest.mark.parametrize(
    "reply",
    [
        (404, "<html>Not Found</html>"),
        (403, {"message": "Forbidden"}),
        (200, "<html>Log in</html>"),
        (200, []),
        (200, {"identity": {}}),
        (200, {"permissions": {"llm": None}}),
        (200, {"permissions": {"llm": [{}]}}),
    ],
)
def test_a_server_that_cannot_tell_is_taken_to_allow_everything(fake: Any, reply: tuple[int, Any]) -> None:
    fake.replies["GET", "/api/me"] = reply
    with connect(fake.url) as client:
        assert client.permissions() == PERMISSIONS


def test_actions_that_are_not_known_are_left_out(fake: Any) -> None:
    fake.replies["GET", "/api/me"] = (200, {"permissions": {"llm": ["read", "fly"]}})
    with connect(fake.url) as client:
        assert client.permissions() == {"read"}
