from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
from aiohttp import web
from mock_upstream import ANSWER, MockUpstream
from support import wait_until

from llmkit.client import Answer, Client, ModelList
from llmkit.errors import (
    ConfigurationExists,
    ConfigurationNotFound,
    DoesNotFit,
    EngineGone,
    LLMKitError,
    LoadCancelled,
    LoadFailed,
    ModelIsLoaded,
    ModelNameNotFound,
    ModelNotFound,
    ModelNotLoaded,
    RequestNotFound,
    ServerNotFound,
    UpstreamUnreachable,
)

CANARY = "sk-canary-Zq3vT8"


def configure(client: Client, upstream: MockUpstream, model_id: str = "ask", **kwargs: Any) -> None:
    client.configure(model_id, "gpt-3", "openai", {"base_url": upstream.base_url, **kwargs})


@pytest.fixture
def loaded(client: Client, upstream: MockUpstream) -> str:
    """Configure and load a model; give its model_id."""
    configure(client, upstream)
    client.load("ask", progress=False)
    return "ask"


# -- configurations ------------------------------------------------------------------------------------------------


def test_a_configuration_is_stored_found_and_equal_when_it_is_sent_again(
    client: Client, upstream: MockUpstream
) -> None:
    kwargs = {"base_url": upstream.base_url, "temperature": 0.5}
    made = client.configure("ask", "gpt-3", "openai", kwargs, description="a test", max_queued=5)
    assert (made.model_id, made.model_name, made.model_type, made.model_kwargs) == ("ask", "gpt-3", "openai", kwargs)
    assert (made.description, made.max_queued, made.auto_load) == ("a test", 5, None)
    assert client.configure("ask", "gpt-3", "openai", kwargs, description="a test", max_queued=5) == made
    assert made in client.configurations()
    assert client.configuration(made.config_id) == made


def test_another_configuration_of_the_same_name_is_refused(client: Client, upstream: MockUpstream) -> None:
    configure(client, upstream)
    with pytest.raises(ConfigurationExists):
        client.configure("ask", "gpt-4o-mini", "openai", {"base_url": upstream.base_url})


def test_a_wrong_field_comes_back_with_its_path(client: Client) -> None:
    with pytest.raises(DoesNotFit) as raised:
        client.configure("ask", "gpt-3", "openai", {"temprature": 1})
    assert raised.value.details["fields"][0]["path"] == "model_kwargs.temprature"
    assert "temperature" in raised.value.message


def test_an_update_changes_what_is_named_and_keeps_the_rest_the_key_too(client: Client, upstream: MockUpstream) -> None:
    upstream.key = CANARY
    configure(client, upstream, api_key=CANARY)
    client.update("ask", description="new", max_queued=3)
    changed = client.update("ask", description=None)
    assert (changed.description, changed.max_queued) == (None, 3)
    assert CANARY not in repr(changed)
    client.load("ask", progress=False)
    assert str(client.prompt("ask", "?")) == ANSWER


def test_what_a_live_engine_was_started_with_changes_only_with_reload(loaded: str, client: Client) -> None:
    with pytest.raises(ModelIsLoaded):
        client.update(loaded, model_name="gpt-4o-mini")
    assert client.update(loaded, model_name="gpt-4o-mini", reload=True).model_name == "gpt-4o-mini"


def test_a_configuration_is_deleted_by_either_name(client: Client, upstream: MockUpstream) -> None:
    configure(client, upstream)
    client.delete("ask")
    made = client.configure("ask", "gpt-3", "openai", {"base_url": upstream.base_url})
    client.delete(config_id=made.config_id)
    with pytest.raises(ModelNotFound):
        client.model("ask")
    with pytest.raises(ConfigurationNotFound):
        client.configuration(made.config_id)


def test_a_loaded_model_is_deleted_only_with_unload(loaded: str, client: Client) -> None:
    with pytest.raises(ModelIsLoaded):
        client.delete(loaded)
    client.delete(loaded, unload=True)
    assert loaded not in [model.model_id for model in client.models()]


@pytest.mark.parametrize("arguments", [{}, {"model_id": "a", "config_id": "b"}])
def test_a_deletion_without_one_name_is_a_mistake(client: Client, arguments: dict[str, str]) -> None:
    with pytest.raises(TypeError):
        client.delete(**arguments)


@pytest.mark.parametrize("name", ["", "../../api/kernels", "a/b", "%2e%2e", "a?unload=true", "\x00", "no-such-model"])
def test_whatever_a_name_is_it_stays_one_part_of_the_path(client: Client, name: str) -> None:
    with pytest.raises(LLMKitError) as raised:
        client.model(name)
    assert isinstance(raised.value, ModelNotFound) or not name


def test_the_model_types_come_with_their_schemas(client: Client) -> None:
    openai = next(one for one in client.model_types() if one.name == "openai")
    assert openai.available
    assert "base_url" in openai.arguments["properties"]
    assert openai.table["temperature"] == "generation"


# -- loading -------------------------------------------------------------------------------------------------------


def test_a_model_is_loaded_shown_and_unloaded(client: Client, upstream: MockUpstream) -> None:
    configure(client, upstream)
    model = client.load("ask", progress=False)
    assert (model.model_id, model.status) == ("ask", "loaded")
    assert client.load("ask").status == "loaded"  # loaded already
    assert "ask" in repr(client.models())
    assert client.unload("ask").verified
    assert client.model("ask").status == "unloaded"


def test_the_progress_bar_names_the_model_and_its_end(
    client: Client, upstream: MockUpstream, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(client, upstream)
    client.load("ask")
    assert "ask: Ready" in capsys.readouterr().err


def test_a_load_that_fails_raises_what_the_engine_said(client: Client, upstream: MockUpstream) -> None:
    client.configure("ask", "no-such-name", "openai", {"base_url": upstream.base_url})
    with pytest.raises(ModelNameNotFound, match="no-such-name") as raised:
        client.load("ask", progress=False)
    assert raised.value.hint
    assert client.model("ask").status == "failed"


def test_an_endpoint_that_does_not_answer_fails_the_load(client: Client) -> None:
    client.configure("ask", "gpt-3", "openai", {"base_url": "http://127.0.0.1:9/v1"})
    with pytest.raises(UpstreamUnreachable):
        client.load("ask", progress=False)


def test_an_unknown_model_cannot_be_loaded(client: Client) -> None:
    with pytest.raises(ModelNotFound):
        client.load("no-such-model")


class Gate:
    """Holds the upstream's answers back until `open` is set; for loads and generations in the middle."""

    def __init__(self, upstream: MockUpstream, path: str) -> None:
        self.open = threading.Event()
        self.reached = threading.Event()
        self._path = path
        upstream.respond = self._respond

    async def _respond(self, request: web.Request, _: dict[str, Any]) -> web.StreamResponse | None:
        if request.path == self._path:
            self.reached.set()
            await asyncio.to_thread(self.open.wait, 10)
        return None


def test_interrupting_a_load_cancels_it_on_the_server(
    client: Client, upstream: MockUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(client, upstream)
    gate = Gate(upstream, "/v1/models")

    def interrupt(_: float) -> None:
        if gate.reached.is_set():
            raise KeyboardInterrupt

    monkeypatch.setattr("llmkit.client.loading.time.sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        client.load("ask", progress=False)
    model = client.model("ask")
    assert (model.status, model.reason) == ("unloaded", "load cancelled")
    gate.open.set()


def test_interrupting_the_wait_for_a_load_of_somebody_else_leaves_it(
    client: Client, upstream: MockUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(client, upstream)
    gate = Gate(upstream, "/v1/models")
    client.start_loading("ask")
    assert gate.reached.wait(10)

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llmkit.client.loading.time.sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        client.load("ask", progress=False)
    monkeypatch.undo()
    assert client.model("ask").status == "loading"
    gate.open.set()
    assert client.load("ask", progress=False).status == "loaded"


def test_a_load_that_somebody_else_cancels_says_so(client: Client, upstream: MockUpstream) -> None:
    configure(client, upstream)
    gate = Gate(upstream, "/v1/models")

    def unload() -> None:
        assert gate.reached.wait(10)
        time.sleep(0.2)
        client.unload("ask")

    thread = threading.Thread(target=unload)
    thread.start()
    with pytest.raises(LoadCancelled):
        client.load("ask", progress=False)
    thread.join()
    gate.open.set()


def test_a_failed_vllm_load_carries_the_end_of_its_log_as_a_note(fake: Any) -> None:
    from llmkit.client import connect

    model = {"model_id": "m", "config_id": "c", "model_name": "n", "model_type": "vllm"}
    failure = {
        "code": "load_failed",
        "message": "Out of memory.",
        "hint": "Lower max_model_len.",
        "log_tail": ["a", "b"],
    }
    failed = {**model, "status": "failed", "reason": "Out of memory.", "error": failure}
    states = iter([model, {**model, "status": "loading", "phase": "weights"}, failed])
    fake.replies["GET", "/llm/models/m"] = lambda _: (200, next(states))
    fake.replies["POST", "/llm/load_model/c"] = (202, {**model, "status": "loading"})
    with connect(fake.url) as client, pytest.raises(LoadFailed, match="Out of memory") as raised:
        client.load("m", progress=False)
    assert raised.value.hint == "Lower max_model_len."
    assert raised.value.__notes__ == ["The end of the engine's log:\na\nb"]


def test_a_short_silence_of_the_server_does_not_end_the_wait_for_a_load(
    fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmkit.client import connect

    model = {"model_id": "m", "config_id": "c", "model_name": "n", "model_type": "vllm", "status": "loading"}
    with connect(fake.url) as client:
        unloaded, loaded = ({**model, "status": status} for status in ("unloaded", "loaded"))
        answers: list[Any] = [unloaded, ServerNotFound("no"), ServerNotFound("no"), loaded]
        fake.replies["GET", "/llm/models/m"] = (200, model)
        fake.replies["POST", "/llm/load_model/c"] = (202, model)
        ask = client.model

        def sometimes(model_id: str) -> Any:
            ask(model_id)
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return type(ask("m")).model_validate(answer)

        assert client.start_loading("m").status == "loading"
        monkeypatch.setattr(client, "model", sometimes)
        assert client.load("m", progress=False).status == "loaded"
        answers = [unloaded, *[ServerNotFound("no")] * 100]
        monkeypatch.setattr("llmkit.client.loading._PATIENCE_SECONDS", 0.2)
        with pytest.raises(ServerNotFound):
            client.load("m", progress=False)


# -- prompts -------------------------------------------------------------------------------------------------------


def test_an_answer_prints_as_its_text_and_knows_the_rest(loaded: str, client: Client) -> None:
    answer = client.prompt(loaded, "What is the capital of France?", max_tokens=20)
    assert str(answer) == ANSWER
    assert repr(answer) == f"Answer({ANSWER!r})"
    assert isinstance(answer, Answer)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 7
    assert answer.timings.total > 0


def test_parameters_reach_the_model(loaded: str, client: Client, upstream: MockUpstream) -> None:
    client.prompt(loaded, "Hello", system="Be brief.", temperature=0.25, max_tokens=9)
    _, _, body = upstream.requests[-1]
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert (body["temperature"], body["max_tokens"]) == (0.25, 9)


def test_a_model_that_is_not_loaded_says_what_to_do(client: Client, upstream: MockUpstream) -> None:
    configure(client, upstream)
    for ask in (client.prompt, lambda *args: list(client.stream(*args))):
        with pytest.raises(ModelNotLoaded, match="not loaded"):
            ask("ask", "Hello")


def test_a_stream_gives_its_pieces_and_then_the_answer(loaded: str, client: Client) -> None:
    stream = client.stream(loaded, "What is the capital of France?")
    assert stream.answer is None
    pieces = list(stream)
    assert pieces == ["The", " capital", " of", " France", " is", " Paris."]
    assert stream.text == ANSWER
    assert stream.answer is not None
    assert str(stream.answer) == ANSWER
    assert stream.answer.request_id == stream.request_id
    assert list(stream) == []


@pytest.fixture
def endless(upstream: MockUpstream) -> MockUpstream:
    """Let the upstream never finish its streams."""
    upstream.never_end("la ", 0.02)
    return upstream


def test_closing_a_stream_ends_the_generation(loaded: str, client: Client, endless: MockUpstream) -> None:
    with client.stream(loaded, "Sing") as stream:
        assert next(stream) == "la "
        assert endless.open_streams == 1
    wait_until(lambda: endless.open_streams == 0, "the end of the generation", 2)
    assert list(stream) == []


def test_dropping_a_stream_ends_the_generation(loaded: str, client: Client, endless: MockUpstream) -> None:
    for _ in client.stream(loaded, "Sing"):
        break
    wait_until(lambda: endless.open_streams == 0, "the end of the generation", 2)


def test_interrupting_a_stream_ends_the_generation(
    loaded: str, client: Client, endless: MockUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = client.stream(loaded, "Sing")
    next(stream)

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("llmkit.client.streaming.json.loads", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    monkeypatch.undo()
    wait_until(lambda: endless.open_streams == 0, "the end of the generation", 2)


def test_a_stream_is_cancelled_from_another_thread(loaded: str, client: Client, endless: MockUpstream) -> None:
    stream = client.stream(loaded, "Sing")
    next(stream)
    threading.Timer(0.1, stream.cancel).start()
    with pytest.raises(LLMKitError, match="cancelled"):
        list(stream)
    wait_until(lambda: endless.open_streams == 0, "the end of the generation", 2)
    stream.cancel()  # it has ended: nothing happens
    with pytest.raises(RequestNotFound):
        client.cancel(stream.request_id)


def test_unloading_ends_a_stream_with_the_reason(loaded: str, client: Client, endless: MockUpstream) -> None:
    stream = client.stream(loaded, "Sing")
    next(stream)
    client.unload(loaded)
    with pytest.raises(LLMKitError, match="unloaded"):
        list(stream)


def test_a_stream_that_breaks_off_is_no_answer(fake: Any) -> None:
    from llmkit.client import connect

    fake.replies["POST", "/llm/inference/"] = (200, ': wait\n\ndata: {"delta": "The"}\n\n')
    with connect(fake.url) as client:
        stream = client.stream("m", "Hello")
        assert next(stream) == "The"
        with pytest.raises(EngineGone, match="before it was complete"):
            next(stream)
        assert stream.answer is None


def test_one_client_serves_many_threads(loaded: str, client: Client) -> None:
    answers: list[str] = []
    threads = [
        threading.Thread(target=lambda: answers.extend(str(client.prompt(loaded, "?")) for _ in range(5)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [ANSWER] * 40


# -- looks ---------------------------------------------------------------------------------------------------------


def test_the_table_of_models_is_text_and_safe_html(client: Client) -> None:
    client.configure("ask", "<script>alert(1)</script>", "openai")
    models = client.models()
    assert isinstance(models, ModelList)
    assert "<script>" in repr(models)
    assert "unloaded" in repr(models)
    assert "<script>" not in models._repr_html_()
    assert "&lt;script&gt;" in models._repr_html_()
    assert "<script>" not in client.model("ask")._repr_html_()


def test_a_configuration_shows_only_what_was_set(client: Client) -> None:
    made = client.configure("ask", "gpt-3", "openai", {"temperature": 0.5}, max_queued=3)
    expected = f"config_id={made.config_id!r}, model_id='ask', model_name='gpt-3', model_type='openai', "
    assert repr(made) == f"Configuration({expected}model_kwargs={{'temperature': 0.5}}, max_queued=3)"


def test_an_empty_table_says_how_to_begin() -> None:
    assert "client.configure" in repr(ModelList())
    assert "client.configure" in ModelList()._repr_html_()
