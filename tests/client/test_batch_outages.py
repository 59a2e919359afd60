"""What lies between a batch and its answers fails for a time: the endpoint, a proxy, a hub, the line itself."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self, cast

import aiohttp
import pandas as pd
import pytest
from aiohttp import web
from echo_upstream import Echo
from support import JupyterServer, wait_until
from yarl import URL

from llmkit.client import Client, batch_asking, batch_server, connect
from llmkit.client.batch_server import BatchServer
from llmkit.client.connection import Server
from llmkit.client.results import Configuration
from llmkit.errors import TimedOut, UpstreamFailed


@pytest.fixture
def echo() -> Iterator[Echo]:
    with Echo() as running:
        yield running


@pytest.fixture
def client(server: JupyterServer, echo: Echo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """Give a client of a server with the loaded model ``one``; the checkpoints lie in a new folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(batch_asking, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(batch_asking, "_LONGEST_LOOK", 0.2)
    with connect(server.url, server.token) as connected:
        connected.configure("one", "gpt-3", "openai", {"base_url": echo.base_url, "max_retries": 0})
        connected.load("one", progress=False)
        yield connected
        connected.delete("one", unload=True)


def ask(client: Client, rows: int, **more: Any) -> pd.DataFrame:
    return client.map(pd.DataFrame({"n": range(rows)}), "{n}", **{"model": "one", "progress": False, **more})


def refusal(status: int = 503, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response({"error": {"message": "overloaded"}}, status=status, headers=headers)


# -- the endpoint ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answered", [0, 10])
def test_an_endpoint_that_is_down_for_a_while_costs_no_row(client: Client, echo: Echo, answered: int) -> None:
    refused = 0

    async def be_down(prompt: str, times: int) -> web.Response | None:
        nonlocal refused
        if len(echo.asked) <= answered or refused >= 30:
            return None
        refused += 1
        return refusal()

    echo.script = be_down
    # Eight rows that are asked twice each would be sixteen errors.
    answered_rows = ask(client, 40, retries=1, concurrency=8)
    assert answered_rows["error"].isna().all()
    assert answered_rows["response"].tolist() == [f"to {n}" for n in range(40)]


@pytest.mark.parametrize("broken", ["0", "19"])
@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_row_that_fails_while_others_are_answered_gets_its_error(
    client: Client, echo: Echo, broken: str, concurrency: int
) -> None:
    async def fail(prompt: str, times: int) -> web.Response | None:
        return refusal(500) if prompt == broken else None

    echo.script = fail
    answered = ask(client, 20, retries=2, concurrency=concurrency)
    assert answered.index[answered["error"].notna()].tolist() == [int(broken)]
    assert echo.asked[broken] == 3


def test_the_only_row_of_a_table_gets_its_error(client: Client, echo: Echo) -> None:
    async def fail(prompt: str, times: int) -> web.Response:
        return refusal(500)

    echo.script = fail
    assert "overloaded" in ask(client, 1, retries=2)["error"].iloc[0]
    assert echo.asked["0"] == 3


def test_an_endpoint_that_stays_away_ends_the_batch_within_patience(client: Client, echo: Echo) -> None:
    # The first ten are answered and kept; then nothing is, not even one of them.
    down = False

    async def then_none(prompt: str, times: int) -> web.Response | None:
        nonlocal down
        down = down or len(echo.asked) > 10
        return refusal() if down else None

    echo.script = then_none
    with pytest.raises(TimedOut, match=r"(?s)in vain: upstream_failed.*overloaded") as caught:
        ask(client, 20, concurrency=1, patience=1.0)
    assert "10 of 20 rows are finished" in caught.value.__notes__[0]
    with pytest.raises(UpstreamFailed, match="overloaded"):
        ask(client, 20, concurrency=1, on_engine_lost="fail")


def test_an_endpoint_that_asks_to_slow_down_is_waited_for_without_counting(client: Client, echo: Echo) -> None:
    async def limit(prompt: str, times: int) -> web.Response | None:
        return refusal(429, {"Retry-After": "0"}) if times <= 4 else None

    echo.script = limit
    assert ask(client, 12, retries=0)["error"].isna().all()
    assert set(echo.asked.values()) == {5}


def test_a_row_that_is_limited_for_ever_is_its_own_error(client: Client, echo: Echo) -> None:
    async def limit(prompt: str, times: int) -> web.Response | None:
        return refusal(429, {"Retry-After": "0"}) if prompt == "3" else None

    echo.script = limit
    answered = ask(client, 10, patience=0.5)
    assert answered.index[answered["error"].notna()].tolist() == [3]


def test_a_full_queue_is_told_of_and_waited_for_no_longer_than_there_is_patience(client: Client, echo: Echo) -> None:
    notes: set[str] = set()
    release = threading.Event()

    async def hold(prompt: str, times: int) -> None:
        if prompt == "hold":
            await asyncio.to_thread(release.wait, 60)

    wait = batch_asking.Asking.wait

    def look(self: batch_asking.Asking, seconds: float) -> bool:
        notes.add(self.note)
        return wait(self, 0.01)

    echo.script = hold
    client.update("one", reload=True, max_in_flight=1, max_queued=0)
    holding = threading.Thread(target=lambda: client.prompt("one", "hold"))
    holding.start()
    try:
        wait_until(lambda: echo.running == 1, "the one that holds the place")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(batch_asking.Asking, "wait", look)
            with pytest.raises(TimedOut, match="the queue of the model is full"):
                ask(client, 3, patience=0.5)
    finally:
        release.set()
        holding.join()
    assert "waiting, the queue of the model is full" in notes
    assert ask(client, 3)["error"].isna().all()


# -- a hub, a proxy --------------------------------------------------------------------------------------------


class Gate:
    """A proxy before a server; it leads there, or answers itself as long as `closed` is set."""

    def __init__(self, server: JupyterServer) -> None:
        self._origin = str(URL(server.url).origin())
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.closed: Callable[[], web.Response] | None = None
        self.refused = 0
        self.swallow_after: int | None = None
        """So many prompts are led on; of those after them nothing is heard any more, not even that they are gone."""
        self.prompts = self.swallowed = 0

    def __enter__(self) -> Self:
        self._thread.start()
        self.origin = asyncio.run_coroutine_threadsafe(self._open(), self._loop).result(10)
        return self

    async def _open(self) -> str:
        self._session = aiohttp.ClientSession(auto_decompress=False)
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._lead)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _lead(self, request: web.Request) -> web.StreamResponse:
        if self.closed is not None:
            self.refused += 1
            return self.closed()
        self.prompts += request.method == "POST"
        if request.method == "POST" and self.swallow_after is not None and self.prompts > self.swallow_after:
            self.swallowed += 1
            await asyncio.Event().wait()
        url = URL(self._origin + request.raw_path, encoded=True)
        headers = {name: value for name, value in request.headers.items() if name.lower() != "host"}
        async with self._session.request(request.method, url, data=await request.read(), headers=headers) as answer:
            data = await answer.read()
            kind = answer.headers.get("Content-Type", "text/plain")
            return web.Response(status=answer.status, body=data, headers={"Content-Type": kind})

    async def _close(self) -> None:
        await self._session.close()
        await self._runner.cleanup()

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


@pytest.mark.parametrize(
    ("status", "kind", "said"),
    [
        (424, "application/json", '{"message": "JupyterHub server no longer running at /user/ada/."}'),
        (503, "application/json", '{"status": 503, "message": "Service Unavailable"}'),
        (502, "application/json", '{"message": "Bad Gateway"}'),
        (504, "text/html", "<html>Gateway Time-out</html>"),
    ],
)
def test_what_a_hub_or_a_proxy_says_for_a_server_that_is_down_is_no_error_of_a_row(
    client: Client, server: JupyterServer, echo: Echo, status: int, kind: str, said: str
) -> None:
    given: list[pd.DataFrame] = []

    async def slowly(prompt: str, times: int) -> None:
        await asyncio.sleep(0.03)

    echo.script = slowly
    with Gate(server) as gate, connect(gate.origin + server.base_url, server.token) as over:
        running = threading.Thread(target=lambda: given.append(ask(over, 60, concurrency=4, reconnect=lambda: over)))
        running.start()
        wait_until(lambda: len(echo.asked) > 12, "some answers")
        gate.closed = lambda: web.Response(status=status, text=said, content_type=kind)
        # More than four rows would be asked with all their retries, and longer than a client is looked for.
        wait_until(lambda: gate.refused > 20, "that it is noticed")
        gate.closed = None
        running.join(60)
        assert over.health().status == "ok"  # what `reconnect` gave is not closed, where it is the client itself
    assert given[0]["error"].isna().all()
    assert given[0]["response"].tolist() == [f"to {n}" for n in range(60)]


# -- the line --------------------------------------------------------------------------------------------------


def test_a_line_that_is_dead_is_noticed_and_its_rows_are_asked_again(
    client: Client, server: JupyterServer, echo: Echo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_server, "SILENCE_SECONDS", 1.0)
    given: list[pd.DataFrame] = []
    with Gate(server) as gate, connect(gate.origin + server.base_url, server.token) as over:
        gate.swallow_after = 8
        running = threading.Thread(target=lambda: given.append(ask(over, 30, concurrency=4)))
        running.start()
        wait_until(lambda: gate.swallowed >= 4, "lost requests")
        gate.swallow_after = None
        running.join(60)
    assert given[0]["response"].tolist() == [f"to {n}" for n in range(30)]


def test_the_token_goes_to_the_server_alone_and_no_password_of_netrc_does(
    fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine hub.example.test login me password pw\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HTTP_PROXY", fake.url)
    configuration = Configuration(config_id="c", model_id="one", model_name="gpt-3", model_type="openai")
    fake.replies["GET", "http://hub.example.test/llm/configuration/c"] = (200, configuration.to_wire())
    far = SimpleNamespace(connection=SimpleNamespace(server=Server("http://hub.example.test/", "T" * 8)))

    async def look() -> None:
        async with BatchServer(cast("Client", far), configuration, "e1", lambda: cast("Client", far)) as server:
            await server.check()

    asyncio.run(look())
    assert [one.headers["Authorization"] for one in fake.asked] == ["token " + "T" * 8]
    assert "Proxy-Authorization" not in fake.asked[0].headers
