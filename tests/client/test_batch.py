"""`client.map` and `client.compare` against a real server, whose models are those of a scripted upstream."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import pydoc
import signal
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pandas as pd
import pytest
import tqdm.auto
from aiohttp import web
from echo_upstream import Echo
from support import JupyterServer, wait_until

from llmkit.client import Client, batch, batch_asking, connect
from llmkit.client.batch_checkpoint import Checkpoint
from llmkit.client.connection import Connection, Server
from llmkit.client.stopping import Stopped
from llmkit.errors import DoesNotFit, LLMKitError, ModelNotFound, ModelNotLoaded, UpstreamRefusedKey

ADDED = ["response", "error", "finish_reason", "prompt_tokens", "completion_tokens", "seconds", "answered_by"]
COUNTRIES = ["France", "Japan", "Peru"]


@pytest.fixture
def echo() -> Iterator[Echo]:
    with Echo() as running:
        yield running


@pytest.fixture
def client(server: JupyterServer, echo: Echo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """Give a client of a server with the loaded models ``one`` and ``two``; the checkpoints lie in a new folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(batch_asking, "FIRST_PAUSE", 0.01)
    with connect(server.url, server.token) as connected:
        for model_id in ("one", "two"):
            configure(connected, model_id, echo)
        yield connected
        for model_id in ("one", "two"):
            connected.delete(model_id, unload=True)


def configure(client: Client, model_id: str, echo: Echo, **fields: Any) -> None:
    kwargs = {"base_url": echo.base_url, "max_retries": 0, **fields.pop("model_kwargs", {})}
    client.configure(model_id, "gpt-3", "openai", kwargs, **fields)
    client.load(model_id, progress=False)


@pytest.fixture
def countries() -> pd.DataFrame:
    return pd.DataFrame({"country": COUNTRIES, "size": [1, 2, 3]}, index=["f", "j", "p"])


def ask(client: Client, data: Any, template: str = "Capital of {country}?", **more: Any) -> pd.DataFrame:
    return client.map(data, template, **{"model": "one", "progress": False, **more})


# -- results ---------------------------------------------------------------------------------------------------


def test_every_row_gets_its_answer_beside_its_own_columns(client: Client, countries: pd.DataFrame) -> None:
    answered = ask(client, countries)
    assert list(answered.columns) == ["country", "size", *ADDED]
    assert list(answered.index) == ["f", "j", "p"]
    assert answered["response"].tolist() == [f"to Capital of {name}?" for name in COUNTRIES]
    assert answered["error"].isna().all()
    assert answered["finish_reason"].tolist() == ["stop"] * 3
    assert answered["prompt_tokens"].tolist() == [8] * 3
    assert (answered["seconds"] > 0).all()
    assert list(countries.columns) == ["country", "size"]


def test_an_empty_table_gives_an_empty_result_with_all_columns(client: Client, countries: pd.DataFrame) -> None:
    answered = ask(client, countries.iloc[:0])
    assert list(answered.columns) == ["country", "size", *ADDED]
    assert not len(answered)


def test_a_series_and_a_list_of_dicts_are_tables_too(client: Client) -> None:
    assert ask(client, pd.Series(["a"]), "{text}")["response"].tolist() == ["to a"]
    assert ask(client, pd.Series(["a"], name="word"), "{word}")["response"].tolist() == ["to a"]
    assert ask(client, [{"x": "b"}, {"x": "c"}], "{x}")["response"].tolist() == ["to b", "to c"]
    with pytest.raises(DoesNotFit, match="no table"):
        ask(client, "text", "{x}")


def test_parameters_and_system_go_with_every_prompt_as_a_batch(
    client: Client, echo: Echo, server: JupyterServer
) -> None:
    ask(client, [{"x": "b"}], "{x}", system="Be brief.", temperature=0.5)
    assert echo.bodies[-1]["temperature"] == 0.5
    assert echo.bodies[-1]["messages"][0] == {"role": "system", "content": "Be brief."}
    recent = server.request("GET", "llm/requests/").json()["recent"]
    assert recent[0]["priority"] == "batch"


def test_no_more_run_at_once_than_were_allowed(client: Client, echo: Echo) -> None:
    async def slowly(prompt: str, times: int) -> None:
        await asyncio.sleep(0.02)

    echo.script = slowly
    ask(client, pd.DataFrame({"n": range(30)}), "{n}", concurrency=3)
    assert echo.most == 3


# -- resume ----------------------------------------------------------------------------------------------------


def test_the_same_call_again_asks_nothing(client: Client, echo: Echo, countries: pd.DataFrame) -> None:
    first = ask(client, countries)
    again = ask(client, countries)
    pd.testing.assert_frame_equal(first, again)
    assert set(echo.asked.values()) == {1}
    (file,) = Path(".llmkit").glob("*.jsonl")
    assert file.name.startswith("map-")
    # Answers are nobody else's, and nothing to commit.
    assert Path(".llmkit").stat().st_mode & 0o777 == 0o700
    assert Path(".llmkit/.gitignore").read_text() == "*\n"


def test_finished_rows_are_had_though_the_model_is_no_longer_loaded(client: Client, countries: pd.DataFrame) -> None:
    first = ask(client, countries)
    client.unload("one")
    pd.testing.assert_frame_equal(first, ask(client, countries))


def test_equal_rows_are_asked_once_and_reordered_ones_get_their_own_answers(client: Client, echo: Echo) -> None:
    twice = pd.DataFrame({"country": ["Peru", "France", "Peru", "Japan"]}, index=[7, 7, 1, 0])
    answered = ask(client, twice)
    assert answered["response"].tolist() == [f"to Capital of {name}?" for name in twice["country"]]
    other = twice.iloc[[3, 0, 1, 2]]
    answered = ask(client, other)
    assert answered["response"].tolist() == [f"to Capital of {name}?" for name in other["country"]]
    assert list(answered.index) == list(other.index)
    assert set(echo.asked.values()) == {1}


def test_whatever_decides_an_answer_has_it_asked_anew(client: Client, echo: Echo) -> None:
    data = [{"country": "France", "same": "Capital of France?"}]
    kwargs = {"base_url": echo.base_url, "max_retries": 0}
    calls: list[dict[str, Any]] = [
        {},
        {"template": "{same}"},  # the same prompt of another template
        {"system": "Be brief."},
        {"temperature": 0.1},
        {"temperature": 0.2},
        {"schema": {"type": "string"}},
        {"model": "two", "after": lambda: client.update("two", reload=True, model_kwargs={**kwargs, "top_p": 0.5})},
    ]
    for number, call in enumerate(calls, 1):
        call.pop("after", lambda: None)()
        ask(client, data, checkpoint="all.jsonl", **call)
        assert echo.asked.total() == number
        ask(client, data, checkpoint="all.jsonl", **call)
        assert echo.asked.total() == number


def test_a_failed_row_is_asked_again_only_when_told(client: Client, echo: Echo, countries: pd.DataFrame) -> None:
    async def refuse(prompt: str, times: int) -> web.Response | None:
        if "Japan" in prompt and times == 1:
            return web.json_response({"error": {"message": "This prompt is refused."}}, status=400)
        return None

    echo.script = refuse
    answered = ask(client, countries)
    assert answered["error"].isna().tolist() == [True, False, True]
    assert "This prompt is refused." in answered["error"].iloc[1]
    assert pd.isna(answered["response"].iloc[1])
    pd.testing.assert_frame_equal(answered, ask(client, countries))
    answered = ask(client, countries, retry_errors=True)
    assert answered["error"].isna().all()
    assert echo.asked["Capital of Japan?"] == 2
    assert echo.asked["Capital of France?"] == 1


# -- trouble ---------------------------------------------------------------------------------------------------


def test_a_failure_that_passes_is_asked_again(client: Client, echo: Echo, countries: pd.DataFrame) -> None:
    async def fail_twice(prompt: str, times: int) -> web.Response | None:
        return web.json_response({"error": {"message": "overloaded"}}, status=500) if times < 3 else None

    echo.script = fail_twice
    assert ask(client, countries, retries=2)["error"].isna().all()
    assert min(echo.asked.values()) == 3


def test_a_failure_that_stays_is_the_error_of_its_row_alone(
    client: Client, echo: Echo, countries: pd.DataFrame
) -> None:
    async def fail(prompt: str, times: int) -> web.Response | None:
        return web.json_response({"error": {"message": "broken"}}, status=500) if "Peru" in prompt else None

    echo.script = fail
    answered = ask(client, countries, retries=2)
    assert answered["error"].isna().tolist() == [True, True, False]
    assert echo.asked["Capital of Peru?"] == 3


def test_a_full_queue_is_waited_for_without_counting(client: Client, echo: Echo) -> None:
    async def slowly(prompt: str, times: int) -> None:
        await asyncio.sleep(0.05)

    echo.script = slowly
    client.update("one", reload=True, max_in_flight=1, max_queued=0)
    answered = ask(client, pd.DataFrame({"n": range(12)}), "{n}", concurrency=4, retries=0)
    assert answered["error"].isna().all()
    assert echo.most == 1


def test_a_wrong_key_ends_the_whole_at_once(client: Client, echo: Echo) -> None:
    async def refuse(prompt: str, times: int) -> web.Response:
        return web.json_response({"error": {"message": "Incorrect API key"}}, status=401)

    echo.script = refuse
    with pytest.raises(UpstreamRefusedKey):
        ask(client, pd.DataFrame({"n": range(100)}), "{n}", concurrency=2)
    assert echo.asked.total() <= 4


def test_a_model_that_is_unloaded_half_way_is_a_clear_error_and_finished_rows_are_kept(
    client: Client, echo: Echo
) -> None:
    async def unload(prompt: str, times: int) -> None:
        if prompt == "5" and times == 1:
            await asyncio.to_thread(client.unload, "one")

    echo.script = unload
    data = pd.DataFrame({"n": range(20)})
    with pytest.raises(ModelNotLoaded, match="was unloaded") as caught:
        ask(client, data, "{n}", concurrency=1)
    assert "5 of 20 rows are finished and kept in" in caught.value.__notes__[0]
    client.load("one", progress=False)
    assert ask(client, data, "{n}", concurrency=1)["response"].tolist() == [f"to {n}" for n in range(20)]
    assert echo.asked["4"] == 1


def test_a_model_that_is_not_there_is_a_clear_error(client: Client, echo: Echo, countries: pd.DataFrame) -> None:
    client.unload("one")
    with pytest.raises(ModelNotLoaded, match=r"(?s)`one` is not loaded.*client\.load\('one'\)"):
        ask(client, countries)
    with pytest.raises(ModelNotFound):
        ask(client, countries, model="none")
    assert not echo.asked


def test_an_interrupt_ends_what_runs_on_the_server_and_says_how_to_go_on(
    client: Client, echo: Echo, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(prompt: str, times: int) -> None:
        if prompt in ("5", "6") and times == 1:
            await asyncio.sleep(60)

    echo.script = hang
    wait = batch_asking.Asking.wait

    def press_stop(self: batch_asking.Asking, seconds: float) -> bool:
        if echo.running == 2 and len(self.done) == 5:
            raise KeyboardInterrupt
        return wait(self, seconds)

    monkeypatch.setattr(batch_asking.Asking, "wait", press_stop)
    data = pd.DataFrame({"n": range(10)})
    with pytest.raises(KeyboardInterrupt, match=r"5 of 10 rows are finished and kept in .*goes on from there"):
        ask(client, data, "{n}", concurrency=2)
    wait_until(lambda: echo.aborted == 2, "the end of both on the server")
    assert ask(client, data, "{n}")["response"].tolist() == [f"to {n}" for n in range(10)]
    assert echo.asked.total() == 12


def test_a_comparison_that_is_stopped_half_way_goes_on_with_what_is_left(
    client: Client, echo: Echo, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = pd.DataFrame({"n": range(6)})
    held = asyncio.Event()

    async def hang(prompt: str, times: int) -> None:
        if prompt in ("2", "3") and times == 2:  # of the second model, at the first try
            await held.wait()

    echo.script = hang
    wait = batch_asking.Asking.wait

    def press_stop(self: batch_asking.Asking, seconds: float) -> bool:
        if echo.running == 2 and self.plan.model_id == "two" and len(self.done) == 2:
            raise KeyboardInterrupt
        return wait(self, min(seconds, 0.01))

    monkeypatch.setattr(batch_asking.Asking, "wait", press_stop)
    with pytest.raises(KeyboardInterrupt, match="2 of 6 rows are finished"):
        client.compare(["one", "two"], data, "{n}", progress=False, concurrency=2)
    wait_until(lambda: echo.aborted == 2, "the end of both on the server")
    assert echo.asked.total() == 6 + 4
    compared = client.compare(["one", "two"], data, "{n}", progress=False, concurrency=2)
    assert compared["response"].tolist() == [f"to {n}" for n in range(6)] * 2
    assert compared["model_id"].tolist() == ["one"] * 6 + ["two"] * 6
    assert echo.asked.total() == 12 + 2


class Way:
    """Leads to a server on another way: what comes in there goes to the server's own port, and back."""

    def __init__(self, server: JupyterServer, *, certificate: Path | None = None, uds: Path | None = None) -> None:
        self._port = int(server.url.split(":")[2].split("/")[0])
        self._certificate, self._uds = certificate, uds
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.connections = 0
        self.port = 0

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result(10)
        return self

    async def _open(self) -> None:
        if self._uds is not None:
            self._server: asyncio.Server = await asyncio.start_unix_server(self._lead, self._uds)
            return
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(str(self._certificate))
        self._server = await asyncio.start_server(self._lead, "127.0.0.1", 0, ssl=context)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _lead(self, come: asyncio.StreamReader, go: asyncio.StreamWriter) -> None:
        self.connections += 1
        back, forth = await asyncio.open_connection("127.0.0.1", self._port)
        await asyncio.gather(self._copy(come, forth), self._copy(back, go))

    async def _copy(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while part := await source.read(1 << 16):
                sink.write(part)
                await sink.drain()
        sink.close()
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            await sink.wait_closed()

    async def _close(self) -> None:
        self._server.close()
        rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        await asyncio.wait(rest, timeout=5) if rest else None

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


def test_a_certificate_of_its_own_is_trusted_by_a_batch_where_the_client_trusts_it(
    client: Client, server: JupyterServer, certificate: Path
) -> None:
    data = pd.DataFrame({"n": range(30)})
    with Way(server, certificate=certificate) as way:
        url = server.url.replace("http://", "https://").replace(f":{way._port}/", f":{way.port}/")
        with connect(url, server.token, verify=str(certificate)) as over:
            before = way.connections
            assert ask(over, data, "{n}")["response"].tolist() == [f"to {n}" for n in range(30)]
            assert way.connections > before


def test_a_batch_goes_over_a_unix_socket(client: Client, server: JupyterServer) -> None:
    data = pd.DataFrame({"n": range(30)})
    path = Path(os.environ["LLMKIT_RUN_DIR"]) / "s"
    with Way(server, uds=path) as way:
        there = Server(f"http://localhost{server.base_url}", server.token, uds=str(path))
        with Client(Connection(there)) as over:
            before = way.connections
            assert ask(over, data, "{n}")["response"].tolist() == [f"to {n}" for n in range(30)]
            assert way.connections > before


# -- schemas, several models, arguments ------------------------------------------------------------------------

CITY = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "people": {"type": "integer"}, "old": {"type": "boolean"}},
    "required": ["name", "people"],
}


def test_answers_of_a_schema_are_asked_for_checked_and_typed(client: Client, echo: Echo) -> None:
    answers = {"a": '{"name": "Paris", "people": 2000000, "old": true}', "b": '{"name": "Rome"}', "c": "no JSON"}

    async def told(prompt: str, times: int) -> str:
        return answers[prompt]

    echo.script = told
    answered = ask(client, [{"x": x} for x in "abc"], "{x}", schema=CITY)
    assert echo.bodies[0]["response_format"]["json_schema"]["schema"] == CITY
    assert answered["name"].iloc[0] == "Paris"
    assert [str(answered[name].dtype) for name in ("people", "old")] == ["Int64", "boolean"]
    assert answered["people"].tolist()[0] == 2000000
    assert answered[["name", "people", "old"]].iloc[1:].isna().all(axis=None)
    assert "'people' is a required property" in answered["error"].iloc[1]
    assert "is no JSON" in answered["error"].iloc[2]
    assert answered["response"].iloc[2] == "no JSON"


def test_compare_gives_a_row_for_each_row_and_model(client: Client, echo: Echo, countries: pd.DataFrame) -> None:
    client.update("two", reload=True, model_kwargs={"base_url": echo.base_url, "top_p": 0.5})
    told = client.compare(["one", "two"], countries, "Capital of {country}?", progress=False)
    assert told["row"].tolist() == ["f", "j", "p"] * 2
    assert told["model_id"].tolist() == ["one"] * 3 + ["two"] * 3
    assert told["answered_by"].tolist() == told["model_id"].tolist()
    assert told["response"].tolist() == [f"to Capital of {name}?" for name in COUNTRIES] * 2
    hashes = [client.configuration(client.model(name).config_id).hash for name in ("one", "two")]
    assert told["configuration_hash"].tolist() == [hashes[0]] * 3 + [hashes[1]] * 3
    assert hashes[0] != hashes[1]
    assert list(told.columns) == ["row", "model_id", *ADDED, "configuration_hash"]


def test_an_answer_that_cannot_even_be_read_is_the_error_of_its_row(client: Client, echo: Echo) -> None:
    async def told(prompt: str, times: int) -> str:
        return "[" * 100_000 if prompt == "b" else '{"name": "Paris", "people": 1}'

    echo.script = told
    answered = ask(client, [{"x": x} for x in "abc"], "{x}", schema=CITY)
    assert answered["error"].isna().tolist() == [True, False, True]
    assert "nested too deeply" in answered["error"].iloc[1]
    assert answered["people"].tolist()[::2] == [1, 1]


@pytest.mark.parametrize("name", ["row", "model_id", "configuration_hash"])
def test_a_comparison_refuses_a_property_that_it_has_itself(client: Client, echo: Echo, name: str) -> None:
    schema = {"type": "object", "properties": {name: {"type": "integer"}}}
    with pytest.raises(DoesNotFit, match=f"property `{name}`"):
        client.compare(["one"], [{"x": "a"}], "{x}", schema=schema)
    assert not echo.asked


def test_a_comparison_says_at_the_beginning_that_a_model_is_not_loaded(client: Client, echo: Echo) -> None:
    client.unload("two")
    with pytest.raises(ModelNotLoaded, match="`two` is not loaded"):
        client.compare(["one", "two"], [{"x": "a"}], "{x}", progress=False)
    assert not echo.asked


def test_what_a_fallback_has_answered_says_so_and_is_asked_again_of_the_model_itself(
    client: Client, echo: Echo, countries: pd.DataFrame
) -> None:
    async def fail(prompt: str, times: int) -> web.Response | None:
        first = echo.bodies[-1].get("top_p") == 0.5
        return web.json_response({"error": {"message": "down"}}, status=503) if first else None

    echo.script = fail
    kwargs = {"base_url": echo.base_url, "max_retries": 0, "top_p": 0.5}
    client.update("one", reload=True, model_kwargs=kwargs, fallback="two")
    assert ask(client, countries)["answered_by"].tolist() == ["two"] * 3
    compared = client.compare(["one"], countries, "Capital of {country}?", progress=False)
    assert compared["answered_by"].tolist() == ["two"] * 3
    assert compared["configuration_hash"].isna().all()
    echo.script = None
    assert ask(client, countries)["answered_by"].tolist() == ["one"] * 3
    before = echo.asked.total()
    assert ask(client, countries)["answered_by"].tolist() == ["one"] * 3
    assert echo.asked.total() == before


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"concurrency": 0}, "at least 1"),
        ({"concurrency": "8"}, "`concurrency` is '8'; it is a whole number"),
        ({"concurrency": 2.5}, "`concurrency` is 2.5; it is a whole number"),
        ({"patience": None}, "`patience` is None; it is a number"),
        ({"patience": float("nan")}, "at least 0"),
        ({"schema": {"type": "object", "properties": {"a": {"$ref": "#/$defs/none"}}}}, "which is not in it"),
        ({"retries": -1}, "at least 0"),
        ({"missing": "x"}, "missing"),
        ({"on_engine_lost": "x"}, "on_engine_lost"),
        ({"stream": True}, "`stream` cannot be given"),
        ({"temperature": float("nan")}, "JSON"),
        ({"schema": {"type": "nonsense"}}, "no JSON schema"),
        ({"schema": {"type": "string"}, "response_format": {}}, "not both"),
        ({"schema": {"type": "object", "properties": {"error": {}}}}, "property `error`"),
        ({"schema": {"type": "object", "properties": {"country": {}}}}, "column `country` already"),
        ({"template": "{contry}"}, "no column `contry`"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_asked(
    client: Client, echo: Echo, countries: pd.DataFrame, more: dict[str, Any], said: str
) -> None:
    with pytest.raises(LLMKitError, match=said):
        ask(client, countries, **more)
    assert not echo.asked
    assert not list(Path().glob(".llmkit/*"))


def test_a_missing_cell_is_an_error_or_skips_its_row(client: Client, echo: Echo) -> None:
    data = pd.DataFrame({"x": ["a", None, "c"], "other": [1, 2, None]})
    with pytest.raises(DoesNotFit, match=r'(?s)1 of 3 rows.*missing="skip"'):
        ask(client, data, "{x}")
    answered = ask(client, data, "{x}", missing="skip")
    assert answered["error"].iloc[1] == "skipped: `x` is missing"
    assert answered["response"].isna().tolist() == [False, True, False]
    assert echo.asked.total() == 2


def test_a_bar_shows_how_many_rows_are_finished(
    client: Client, echo: Echo, countries: pd.DataFrame, capsys: pytest.CaptureFixture[str]
) -> None:
    async def refuse(prompt: str, times: int) -> web.Response | None:
        return web.json_response({"error": {"message": "no"}}, status=400) if "Peru" in prompt else None

    echo.script = refuse
    ask(client, pd.concat([countries, countries]), progress=True)
    shown = capsys.readouterr().err
    assert "6/6" in shown
    assert "row/s" in shown
    assert "2 failed" in shown


@pytest.mark.parametrize("name", ["__init__", "update", "close"])
def test_a_bar_that_cannot_be_shown_ends_nothing(
    client: Client, countries: pd.DataFrame, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    bar = type("Bar", (tqdm.auto.tqdm,), {name: fail, "__del__": lambda self: None})
    monkeypatch.setattr(tqdm.auto, "tqdm", bar)
    assert ask(client, countries, progress=True)["error"].isna().all()


def test_a_stop_before_it_has_begun_says_how_to_go_on(
    client: Client, countries: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    def press_stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tqdm.auto, "tqdm", press_stop)
    with pytest.raises(Stopped, match="0 of 3 rows are finished"):
        ask(client, countries, progress=True)


@pytest.mark.skipif(sys.platform == "win32", reason="signals as on POSIX")
def test_a_second_press_on_the_stop_button_does_not_leave_what_is_being_written(
    client: Client, echo: Echo, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing, go_on = threading.Event(), threading.Event()
    write = Checkpoint._write

    def write_slowly(self: Checkpoint, data: bytes) -> None:
        if b"to 5" in data:
            writing.set()
            assert go_on.wait(30)
        write(self, data)

    async def hang(prompt: str, times: int) -> None:
        await asyncio.sleep(60 if int(prompt) > 5 and times == 1 else 0)

    def press_again(asking: batch_asking.Asking) -> None:
        wait_until(lambda: asking._stopped, "the first press")
        for _ in range(2):
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        go_on.set()

    pressing: list[threading.Thread] = []
    wait = batch_asking.Asking.wait

    def press_stop(self: batch_asking.Asking, seconds: float) -> bool:
        if not writing.is_set():
            return wait(self, 0.01)
        pressing.append(threading.Thread(target=press_again, args=(self,)))
        pressing[0].start()
        raise KeyboardInterrupt

    echo.script = hang
    data = pd.DataFrame({"n": range(20)})
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "_write", write_slowly)
        patch.setattr(batch_asking.Asking, "wait", press_stop)
        with pytest.raises(Stopped, match="6 of 20 rows are finished"):
            ask(client, data, "{n}", concurrency=1)
        pressing[0].join()
    echo.script = None
    assert ask(client, data, "{n}")["error"].isna().all()
    assert echo.asked["5"] == 1


def test_help_shows_every_parameter_with_its_type_and_no_more_of_how_it_is_made() -> None:
    shown = inspect.signature(Client.map)
    assert shown.return_annotation == "pd.DataFrame"
    assert all(one.annotation is not one.empty for name, one in shown.parameters.items() if name != "self")
    told = inspect.getdoc(Client.map) or ""
    for name in shown.parameters:
        assert name == "self" or f"{name}\n    " in told, name
    text = pydoc.render_doc(Client.map, renderer=pydoc.plaintext)
    assert "concurrency: 'int' = 8" in text
    assert "patience: 'float' = 3600.0" in text
    assert Client.map.__name__ == "map"
    assert list(batch.COLUMNS) == ADDED
