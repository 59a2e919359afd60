"""A batch outlives its process, its server and its engine; each of them is really ended here."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
from echo_upstream import Echo
from fake_engine_type import PLUGIN
from support import REPOSITORY, JupyterServer, free_port, scaled, wait_until

from llmkit.client import Client, batch_asking, batch_server, connect
from llmkit.errors import LLMKitError, TimedOut, WrongState

PROGRAM = REPOSITORY / "tests" / "batch_program.py"
KILLS = scaled(10)
CONCURRENCY = 6
ROWS = 300


@pytest.fixture
def echo() -> Iterator[Echo]:
    with Echo() as running:

        async def slowly(prompt: str, times: int) -> None:
            await asyncio.sleep(0.03)

        running.script = slowly
        yield running


@pytest.fixture
def port() -> int:
    return free_port()


def configure(client: Client, echo: Echo, **fields: Any) -> None:
    client.configure("one", "gpt-3", "openai", {"base_url": echo.base_url, "max_retries": 0}, **fields)
    client.load("one", progress=False)


class InThread:
    """A call of `map` in a thread; `result` waits for it."""

    def __init__(self, call: Callable[[], pd.DataFrame]) -> None:
        self._call = call
        self._given: list[pd.DataFrame | BaseException] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._given.append(self._call())
        except BaseException as error:  # noqa: BLE001  # the test raises it
            self._given.append(error)

    def result(self, seconds: float = 60) -> pd.DataFrame:
        self._thread.join(seconds)
        assert self._given, "it has not ended"
        if isinstance(self._given[0], BaseException):
            raise self._given[0]
        return self._given[0]


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") - 1 if path.exists() else 0


def test_a_batch_that_is_killed_again_and_again_asks_no_more_twice_than_may_run(
    server: JupyterServer, echo: Echo, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "batch.jsonl"
    arguments = [server.url, "one", str(checkpoint), str(ROWS), str(CONCURRENCY)]
    environment = {**server.client_environment(), "LLMKIT_TOKEN": server.token, "PYTHONPATH": str(REPOSITORY)}

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, str(PROGRAM), *arguments]
        return subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True)

    with connect(server.url, server.token) as client:
        configure(client, echo)
        try:
            for kill in range(1, KILLS + 1):
                with start() as program:
                    assert program.stdout is not None
                    assert program.stdout.readline() == "asking\n"
                    before = lines(checkpoint)
                    wait_until(lambda: lines(checkpoint) > before, "a row", 30, 0.002)  # noqa: B023  # ends at once
                    time.sleep(random.uniform(0, 0.06))
                    assert program.poll() is None, "it ended before the kill"
                    program.send_signal(signal.SIGKILL)
                wait_until(lambda: not echo.running, "the end of what ran")
                assert lines(checkpoint) > before
                assert echo.asked.total() - lines(checkpoint) <= kill * CONCURRENCY
            done = start()
            told = json.loads(done.communicate(timeout=60)[0].splitlines()[-1])
        finally:
            client.delete("one", unload=True)
    assert told == {"responses": [f"to number {n}" for n in range(ROWS)], "errors": 0}
    twice = echo.asked.total() - ROWS
    assert len(echo.asked) == ROWS
    assert twice <= KILLS * CONCURRENCY
    print(f"\n{KILLS} kills: {twice} of {ROWS} prompts asked again, {KILLS * CONCURRENCY} allowed")


def test_a_server_that_is_started_anew_gets_the_rest_and_the_model_is_loaded_again(
    echo: Echo, port: int, tmp_path: Path
) -> None:
    data = pd.DataFrame({"n": range(150)})
    with JupyterServer("server", port=port) as server, connect(server.url, server.token) as client:
        configure(client, echo)
        running = InThread(
            lambda: client.map(data, "{n}", model="one", checkpoint=tmp_path / "b.jsonl", concurrency=4, progress=False)
        )
        wait_until(lambda: len(echo.asked) > 40, "some answers")
        server.stop()
        asked = len(echo.asked)
        assert asked < 150
        server.start()
        answered = running.result()
        assert client.model("one").status == "loaded"
    assert answered["error"].isna().all()
    assert answered["response"].tolist() == [f"to {n}" for n in range(150)]
    assert echo.asked.total() - 150 <= 4


def test_a_server_that_comes_back_at_another_port_is_found_and_no_other_is_taken_for_it(
    echo: Echo, tmp_path: Path
) -> None:
    data = pd.DataFrame({"n": range(100)})
    found: list[str] = []
    with contextlib.ExitStack() as stack:
        server, stranger = (stack.enter_context(JupyterServer("server")) for _ in range(2))
        client, other = (stack.enter_context(connect(one.url, one.token)) for one in (server, stranger))
        configure(client, echo)
        configure(other, echo)

        def reconnect() -> Client:
            to = stranger if not found else server
            found.append(to.url)
            return connect(to.url, to.token)

        running = InThread(
            lambda: client.map(
                data,
                "{n}",
                model="one",
                checkpoint=tmp_path / "b.jsonl",
                concurrency=4,
                progress=False,
                reconnect=reconnect,
            )
        )
        wait_until(lambda: len(echo.asked) > 20, "some answers")
        before = server.url
        server.stop()
        with socket.socket() as taken:  # so that it gets another port
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(("127.0.0.1", int(before.split(":")[2].split("/")[0])))
            server.start()
            assert server.url != before
            answered = running.result()
        assert answered["error"].isna().all()
        assert found[0] == stranger.url
        assert found[-1] == server.url
        assert not stranger.request("GET", "llm/requests/").json()["recent"]


def start_with_another_token(server: JupyterServer) -> None:
    server.stop()
    server.token = "another-" + server.token
    server._env["JUPYTER_TOKEN"] = server.token
    server._http.headers["Authorization"] = f"token {server.token}"
    server.start()


def test_a_server_that_comes_back_with_another_token_is_asked_with_it_where_it_can_be_found(
    echo: Echo, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = pd.DataFrame({"n": range(150)})
    with JupyterServer("server", port=port) as server, connect(server.url, server.token) as client:
        configure(client, echo)
        # Here the server has noted itself, and its token.
        monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(server.folder / "runtime"))
        file = tmp_path / "b.jsonl"
        running = InThread(lambda: client.map(data, "{n}", model="one", checkpoint=file, concurrency=4, progress=False))
        wait_until(lambda: len(echo.asked) > 20, "some answers")
        start_with_another_token(server)
        answered = running.result()
        # The client has learnt it, too.
        again = client.map(data, "{n}", model="one", checkpoint=file, progress=False)
        pd.testing.assert_frame_equal(again, answered)
    assert answered["error"].isna().all()
    assert answered["response"].tolist() == [f"to {n}" for n in range(150)]
    assert echo.asked.total() - 150 <= 4


def test_without_the_other_token_the_error_says_so_and_finished_rows_are_kept(
    echo: Echo, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = pd.DataFrame({"n": range(100)})
    begun = time.monotonic()
    with JupyterServer("server", port=port) as server, connect(server.url, server.token) as client:
        patience = 2 + 3 * (time.monotonic() - begun)  # it outlasts the next start, however slow the machine is
        configure(client, echo)
        monkeypatch.setenv("LLMKIT_SERVER_URL", server.url)
        monkeypatch.setenv("LLMKIT_TOKEN", server.token)
        file = tmp_path / "b.jsonl"
        running = InThread(
            lambda: client.map(data, "{n}", model="one", checkpoint=file, progress=False, patience=patience)
        )
        wait_until(lambda: len(echo.asked) > 20, "some answers")
        start_with_another_token(server)
        with pytest.raises(LLMKitError) as caught:
            running.result()
        assert "the server refuses the token; a new `llmkit.connect()`" in str(caught.value)
        assert f"{lines(file)} of 100 rows are finished and kept in" in caught.value.__notes__[0]
        # With it the same call goes on.
        with connect(server.url, server.token) as again:
            again.load("one", progress=False)
            answered = again.map(data, "{n}", model="one", checkpoint=file, progress=False)
    assert answered["response"].tolist() == [f"to {n}" for n in range(100)]
    assert echo.asked.total() - 100 <= 8


def test_a_comparison_outlives_a_restart_of_the_server(
    echo: Echo, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = pd.DataFrame({"n": range(60)})
    with JupyterServer("server", port=port) as server, connect(server.url, server.token) as client:
        configure(client, echo)
        client.configure("two", "gpt-3", "openai", {"base_url": echo.base_url, "max_retries": 0})
        client.load("two", progress=False)
        running = InThread(lambda: client.compare(["one", "two"], data, "{n}", progress=False, concurrency=4))
        wait_until(lambda: len(echo.asked) > 20, "some answers of the first model")
        server.stop()
        assert len(echo.asked) < 60
        server.start()
        compared = running.result()
    assert compared["error"].isna().all()
    assert compared["response"].tolist() == [f"to {n}" for n in range(60)] * 2
    assert compared["answered_by"].tolist() == ["one"] * 60 + ["two"] * 60


def test_a_loss_ends_the_batch_where_that_was_asked_and_finished_rows_are_kept(echo: Echo, tmp_path: Path) -> None:
    data = pd.DataFrame({"n": range(100)})
    for more, expected in (({"on_engine_lost": "fail"}, LLMKitError), ({"patience": 0.5}, TimedOut)):
        with JupyterServer("server") as server, connect(server.url, server.token) as client:
            configure(client, echo)
            echo.asked.clear()
            path = tmp_path / f"{len(more)}{expected.__name__}.jsonl"
            running = InThread(
                lambda: client.map(data, "{n}", model="one", checkpoint=path, progress=False, **more)  # noqa: B023
            )
            wait_until(lambda: len(echo.asked) > 20, "some answers")
            server.stop()
            with pytest.raises(expected) as caught:
                running.result()
            assert f"{lines(path)} of 100 rows are finished and kept in" in caught.value.__notes__[0]
            assert lines(path) >= 10


@pytest.mark.parametrize("stopped", [False, True])
def test_no_answer_of_a_changed_configuration_is_kept_for_the_old_one(
    server: JupyterServer, echo: Echo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    data = pd.DataFrame({"n": range(60)})
    file = tmp_path / "b.jsonl"
    later: set[str] = set()
    kwargs = {"base_url": echo.base_url, "max_retries": 0}
    wait = batch_asking.Asking.wait
    check = batch_server.BatchServer.check
    changed = threading.Event()

    async def check_late(self: batch_server.BatchServer) -> None:
        # A look between the change and the next request would end the batch before anything is asked with what is new.
        async with asyncio.timeout(30):
            while changed.is_set() and not later:
                await asyncio.sleep(0.005)
        await check(self)

    def press_stop(self: batch_asking.Asking, seconds: float) -> bool:
        if stopped and later:
            raise KeyboardInterrupt
        return wait(self, 0.002 if stopped else seconds)

    monkeypatch.setattr(batch_asking.Asking, "wait", press_stop)
    monkeypatch.setattr(batch_server.BatchServer, "check", check_late)
    with connect(server.url, server.token) as client:
        # One runs at a time: the others are in the queue when it is changed, and go with what it is then.
        configure(client, echo, max_in_flight=1, max_queued=100)

        async def change(prompt: str, times: int) -> None:
            if "top_p" in echo.bodies[-1]:
                later.add(prompt)
            elif len(echo.asked) == 20:
                # A default of the generation: the model stays loaded, and no request fails.
                changed.set()
                await asyncio.to_thread(client.update, "one", model_kwargs={**kwargs, "top_p": 0.5})

        echo.script = change
        try:
            with pytest.raises((WrongState, KeyboardInterrupt)) as caught:
                client.map(data, "{n}", model="one", checkpoint=file, progress=False)
            assert "was changed meanwhile" in str(caught.value) or stopped
            assert later
            client.update("one", model_kwargs=kwargs)
            monkeypatch.undo()
            before = dict(echo.asked)
            again = client.map(data, "{n}", model="one", checkpoint=file, progress=False)
        finally:
            client.delete("one", unload=True)
    assert again["response"].tolist() == [f"to {n}" for n in range(60)]
    assert all(echo.asked[prompt] > before[prompt] for prompt in later)


@pytest.mark.skipif(sys.platform != "linux", reason="engines are kept on Linux only")
def test_an_engine_that_is_killed_half_way_comes_back_and_answers_the_rest(tmp_path: Path) -> None:
    path = os.pathsep.join(filter(None, (PLUGIN["PYTHONPATH"], os.environ.get("PYTHONPATH", ""))))
    data = pd.DataFrame({"word": [f"word{n}" for n in range(80)]})
    with JupyterServer("server", env={"PYTHONPATH": path}) as server, connect(server.url, server.token) as client:
        client.configure("engine", "any --tokens-per-second=40", "fake", restart="on_failure")
        client.load("engine", progress=False)
        file = tmp_path / "b.jsonl"
        running = InThread(
            lambda: client.map(data, "{word}", model="engine", checkpoint=file, concurrency=4, progress=False)
        )
        wait_until(lambda: lines(file) > 20, "some answers")
        for process in server.engine_processes():
            with contextlib.suppress(psutil.Error):
                if any("fake_engine" in word for word in process.cmdline()):
                    process.kill()
        wait_until(lambda: client.model("engine").status != "loaded", "the loss")
        assert lines(file) < 80
        answered = running.result()
    assert answered["error"].isna().all()
    assert [text.strip() for text in answered["response"]] == data["word"].tolist()
