"""A panel without a browser: the widgets are real, and so is the server."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from mock_upstream import MockUpstream
from support import JupyterServer, wait_until

from llmkit.client import Client, connect
from llmkit.panel import Panel
from llmkit.panel.lane import Lane


@pytest.fixture
def upstream() -> Iterator[MockUpstream]:
    with MockUpstream() as running:
        yield running


@pytest.fixture
def client(server: JupyterServer) -> Iterator[Client]:
    """Give a client of the real server; what other tests left is deleted, but for the model of the session."""

    def delete_all() -> None:
        for model in connected.models():
            if model.model_id != "demo":
                connected.delete(model.model_id, unload=True)
        for conversation in connected.conversations().conversations:
            connected.delete_conversation(conversation.conversation_id)

    with connect(server.url, server.token) as connected:
        delete_all()
        yield connected
        delete_all()


@pytest.fixture
def panel(client: Client) -> Iterator[Panel]:
    made = Panel(client)
    wait_until(lambda: made.prompt is not None and made._watcher is not None, "the tabs")
    yield made
    made.close()


@pytest.fixture
def lane() -> Iterator[Lane]:
    made = Lane()
    yield made
    made.close()


@pytest.fixture
def configure(client: Client, upstream: MockUpstream) -> Callable[[str], None]:
    """Give a function that configures a model of the mock upstream."""

    def make(model_id: str) -> None:
        client.configure(model_id, "gpt-3", "openai", {"base_url": upstream.base_url})

    return make
