"""``%llm`` and ``%%llm`` in IPython's own shell, against a real server."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from IPython.core.completer import provisionalcompleter
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from mock_upstream import ANSWER, MockUpstream, chat_answer, event
from support import JupyterServer, wait_until

import llmkit
from llmkit.client.stopping import Stopped
from llmkit.errors import DoesNotFit, LLMKitError, ModelNotFound, ModelNotLoaded, NotAllowed, ServerNotFound
from llmkit.magics import Magics, expand, read_code, read_json

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class Notebook:
    """Runs cells, and keeps what they print and show."""

    def __init__(self, shell: InteractiveShell) -> None:
        self.shell = shell
        self.names = self.shell.user_ns
        self.out = self.err = ""
        self.shown: list[Any] = []

    def run(self, cell: str) -> Any:
        """Run a cell and give its value; what it raises is raised."""
        with capture_output() as captured:
            result = self.shell.run_cell(cell)
        self.out, self.err = (_COLOURS.sub("", text) for text in (captured.stdout, captured.stderr))
        self.shown = captured.outputs
        result.raise_error()
        return result.result


@pytest.fixture(scope="module")
def shell(shell: InteractiveShell) -> InteractiveShell:
    shell.run_line_magic("load_ext", "llmkit")
    return shell


@pytest.fixture
def upstream() -> Iterator[MockUpstream]:
    with MockUpstream() as running:
        yield running


@pytest.fixture
def client(server: JupyterServer) -> Iterator[llmkit.Client]:
    with llmkit.connect(server.url, server.token) as connected:
        before = {model.model_id for model in connected.models()}
        yield connected
        for model in connected.models():
            if model.model_id not in before:
                connected.delete(model.model_id, unload=True)


@pytest.fixture
def notebook(
    shell: InteractiveShell,
    server: JupyterServer,
    client: llmkit.Client,
    upstream: MockUpstream,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Notebook]:
    """Give a notebook with the magics, and the model ``ask`` loaded."""
    monkeypatch.setenv("LLMKIT_SERVER_URL", server.url)
    monkeypatch.setenv("LLMKIT_TOKEN", server.token)
    client.configure("ask", "gpt-3", "openai", {"base_url": upstream.base_url})
    client.load("ask", progress=False)
    shell.reset()
    yield Notebook(shell)
    shell.run_line_magic("reload_ext", "llmkit")  # it forgets server, model and names


def magics(shell: InteractiveShell) -> Magics:
    """Give what stands behind the magics: it completes their lines."""
    (hook,) = shell.strdispatchers["complete_command"].flat_matches("%llm")
    found: Magics = hook.__func__.__self__
    return found


def says(upstream: MockUpstream, text: str) -> None:
    """Let the upstream answer with this text, in pieces of three characters."""

    async def respond(request: web.Request, body: dict[str, Any]) -> web.StreamResponse | None:
        if request.path != "/v1/chat/completions":
            return None
        if not body.get("stream"):
            return web.json_response(chat_answer(text))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for at in range(0, len(text), 3):
            await response.write(event({"choices": [{"delta": {"content": text[at : at + 3]}}]}))
        await response.write(event({"choices": [{"delta": {}, "finish_reason": "stop"}]}))
        await response.write(b"data: [DONE]\n\n")
        return response

    upstream.respond = respond


# -- %llm ----------------------------------------------------------------------------------------------------------


def test_a_model_is_loaded_used_and_unloaded(notebook: Notebook, client: llmkit.Client) -> None:
    notebook.run("%llm unload ask")
    assert client.model("ask").status == "unloaded"
    assert notebook.run("%llm load ask").status == "loaded"
    assert "ask" in {model.model_id for model in notebook.run("%llm models")}
    notebook.run("%llm use ask")
    notebook.run("%llm status")
    assert client.url in notebook.out
    assert "%%llm asks ask." in notebook.out
    assert "loaded" in notebook.out


def test_without_a_command_it_says_what_there_is(notebook: Notebook) -> None:
    notebook.run("%llm")
    assert "%llm load NAME" in notebook.out
    assert "--as markdown|json|code" in notebook.out
    notebook.run("%%llm --help\n ")
    assert "--to VARIABLE" in notebook.out


@pytest.mark.parametrize("line", ["nonsense", "load", "load a b", "models x", "use 'a"])
def test_a_mistake_in_the_line_says_how_it_goes(notebook: Notebook, line: str) -> None:
    with pytest.raises(UsageError, match=r"%llm|Quotes"):
        notebook.run(f"%llm {line}")


def test_a_model_that_does_not_exist_cannot_be_used(notebook: Notebook) -> None:
    with pytest.raises(ModelNotFound):
        notebook.run("%llm use no-such-model")


def test_a_name_may_come_from_a_variable(notebook: Notebook) -> None:
    notebook.names["name"] = "ask"
    assert notebook.run("%llm load {name}").model_id == "ask"


def test_tab_offers_commands_and_models(notebook: Notebook) -> None:
    def offered(line: str) -> set[str]:
        with provisionalcompleter():
            return {one.text for one in notebook.shell.Completer.completions(line, len(line))}

    assert {"models", "load"} <= offered("%llm ")
    assert "load" in offered("%llm lo")
    assert "ask" in offered("%llm load a")
    assert "ask" in offered("%%llm a")


# -- %%llm ---------------------------------------------------------------------------------------------------------


def test_the_answer_is_printed_kept_and_signed(notebook: Notebook) -> None:
    assert notebook.run("%%llm ask --to text\nWhat is the capital of France?") is None
    assert notebook.out == f"{ANSWER}\n"
    assert notebook.names["text"] == ANSWER
    assert notebook.names["_llm"].provenance["model_name"] == "gpt-3"


def test_pieces_are_printed_as_they_come(notebook: Notebook, upstream: MockUpstream) -> None:
    go = threading.Event()

    async def respond(request: web.Request, _: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(event({"choices": [{"delta": {"content": "first "}}]}))
        await asyncio.to_thread(go.wait, 10)
        await response.write(event({"choices": [{"delta": {"content": "second"}, "finish_reason": "stop"}]}))
        await response.write(b"data: [DONE]\n\n")
        return response

    upstream.respond = respond
    printed: list[tuple[str, bool]] = []

    class Screen:
        def write(self, text: str) -> None:
            printed.append((text, go.is_set()))
            if "first" in text:
                go.set()

        def flush(self) -> None:
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", Screen())
        notebook.shell.run_cell("%%llm ask\nHello").raise_error()
    assert ("first ", False) in printed
    assert ("second", True) in printed


def test_options_reach_the_model(notebook: Notebook, upstream: MockUpstream) -> None:
    notebook.names["who"] = "a poet"
    notebook.run("%%llm ask --system 'You are {who}.' --temperature 0.25 --max-tokens 9 --no-stream\nHello")
    _, _, body = upstream.requests[-1]
    assert body["messages"] == [{"role": "system", "content": "You are a poet."}, {"role": "user", "content": "Hello"}]
    assert (body["temperature"], body["max_tokens"]) == (0.25, 9)
    assert not body.get("stream")
    assert notebook.out == f"{ANSWER}\n"


def test_variables_stand_in_the_prompt(notebook: Notebook, upstream: MockUpstream) -> None:
    notebook.run("row = {'city': 'Paris'}; price = 2.0")
    notebook.run("%%llm ask\n{row[city]} for {price:.2f} $price in {{braces}}")
    assert upstream.requests[-1][2]["messages"][-1]["content"] == "Paris for 2.00 $price in {braces}"


def test_a_variable_that_is_missing_is_named_and_nothing_is_asked(notebook: Notebook, upstream: MockUpstream) -> None:
    sent = len(upstream.requests)
    with pytest.raises(UsageError, match=r"no variable `citty`.*\{\{"):
        notebook.run("%%llm ask\nThe capital is {citty}")
    assert "citty" in notebook.err + notebook.out
    assert len(upstream.requests) == sent


def test_the_only_loaded_model_needs_no_name(
    notebook: Notebook, client: llmkit.Client, upstream: MockUpstream, server: JupyterServer
) -> None:
    loaded = [model.model_id for model in client.models() if model.status == "loaded"]
    if loaded == ["ask"]:  # the session's server may have the demo model loaded, too
        notebook.run("%%llm\nHello")
        assert notebook.out == f"{ANSWER}\n"
    client.configure("ask2", "gpt-3", "openai", {"base_url": upstream.base_url})
    client.load("ask2", progress=False)
    with pytest.raises(UsageError, match="ask, ask2"):
        notebook.run("%%llm\nHello")
    notebook.run("%llm use ask2")
    notebook.run("%%llm\nHello")
    assert notebook.names["_llm"].model_id == "ask2"


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("%%llm ask --to 1a\nHello", "--to"),
        ("%%llm ask --to class\nHello", "--to"),
        ("%%llm ask --as yaml\nHello", "yaml"),
        ("%%llm ask --nonsense\nHello", "nonsense"),
        ("%%llm ask --temperature hot\nHello", "hot"),
        ("%%llm ask\n  \n", "no prompt"),
        ("%%llm ask\n{", "braces|put in"),
    ],
)
def test_a_mistake_in_the_cell_is_said_before_anything_is_asked(
    notebook: Notebook, upstream: MockUpstream, cell: str, said: str
) -> None:
    sent = len(upstream.requests)
    with pytest.raises(UsageError, match=said):
        notebook.run(cell)
    assert len(upstream.requests) == sent


def test_markdown_is_drawn_in_one_place_not_too_often(notebook: Notebook, upstream: MockUpstream) -> None:
    text = "**Paris** is the capital. " * 40
    says(upstream, text)
    started = time.monotonic()
    notebook.run("%%llm ask --as markdown --to text\nHello")
    seconds = time.monotonic() - started
    assert 1 <= len(notebook.shown) <= seconds / 0.1 + 2
    assert notebook.shown[-1].data["text/markdown"] == text
    assert len({one.transient["display_id"] for one in notebook.shown}) == 1
    assert notebook.names["text"] == text
    assert notebook.out == ""


@pytest.mark.parametrize("text", ['{"city": "Paris"}', 'Here:\n```json\n{"city": "Paris"}\n```\n'])
def test_json_is_read(notebook: Notebook, upstream: MockUpstream, text: str) -> None:
    says(upstream, text)
    assert notebook.run("%%llm ask --as json --to value\nHello") == {"city": "Paris"}
    assert notebook.names["value"] == {"city": "Paris"}


def test_what_is_no_json_is_a_clear_error_and_stays(notebook: Notebook) -> None:
    with pytest.raises(DoesNotFit, match="no JSON"):
        notebook.run("%%llm ask --as json --to value\nHello")
    assert notebook.names["value"] == notebook.names["_llm"].response == ANSWER


def test_code_goes_into_a_new_cell(notebook: Notebook, upstream: MockUpstream) -> None:
    says(upstream, "Try this:\n```python\nprint(1)\n```\nor\n```\nprint(2)\n```\n")
    notebook.run("%%llm ask --as code --to code\nHello")
    assert notebook.shell.rl_next_input == notebook.names["code"] == "print(1)\n\nprint(2)"


# -- trouble -------------------------------------------------------------------------------------------------------


def test_the_stop_button_ends_the_generation_and_keeps_what_came(notebook: Notebook, upstream: MockUpstream) -> None:
    came = threading.Event()

    async def sing(request: web.Request, _: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        upstream.open_streams += 1
        try:
            while True:
                await response.write(event({"choices": [{"delta": {"content": "la "}}]}))
                came.set()
                await asyncio.sleep(0.02)
        finally:
            upstream.open_streams -= 1

    upstream.respond = sing

    def stop() -> None:
        assert came.wait(10)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    stopper = threading.Thread(target=stop)
    stopper.start()
    with pytest.raises(Stopped):
        notebook.run("%%llm ask --to text\nSing")
    stopper.join()
    wait_until(lambda: upstream.open_streams == 0, "the end of the generation", 2)
    assert notebook.names["text"].startswith("la la ")
    assert notebook.out.startswith("la la ")
    assert "What has come is in `text`." in notebook.out + notebook.err
    assert "Traceback" not in notebook.out + notebook.err


@pytest.mark.parametrize(
    "cell",
    [
        "%%llm ask --no-stream\nSing",
        "client.prompt('ask', 'Sing')",
        "for piece in client.stream('ask', 'Sing'): pass",
        "client.map([{'x': 'Sing'}], '{x}', model='ask', progress=False)",
    ],
    ids=["magic", "prompt", "stream", "map"],
)
def test_whatever_is_stopped_says_so_in_a_line_and_is_ended_on_the_server(
    notebook: Notebook,
    client: llmkit.Client,
    upstream: MockUpstream,
    cell: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    running: list[str] = []

    async def hold(request: web.Request, _: dict[str, Any]) -> web.Response:
        running.append(request.path)
        try:
            await asyncio.sleep(60)
            return web.json_response(chat_answer("too late"))
        finally:
            running.clear()

    upstream.respond = hold
    notebook.names["client"] = client

    def stop() -> None:
        wait_until(lambda: running, "the request")
        os.kill(os.getpid(), signal.SIGINT)

    stopper = threading.Thread(target=stop)
    stopper.start()
    with pytest.raises(Stopped):
        notebook.run(cell)
    stopper.join()
    wait_until(lambda: not running, "the end of the generation", 5)
    (line,) = (notebook.out + notebook.err).strip().splitlines()
    assert line.startswith("Stopped. ")


def test_an_error_half_way_keeps_what_came(notebook: Notebook, upstream: MockUpstream) -> None:
    async def break_off(request: web.Request, _: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(event({"choices": [{"delta": {"content": "half"}}]}))
        await asyncio.sleep(0.2)
        return response

    upstream.respond = break_off
    with pytest.raises(LLMKitError):
        notebook.run("%%llm ask --to text\nHello")
    assert notebook.names["text"] == "half"


def test_an_error_shows_as_message_and_hint(notebook: Notebook, client: llmkit.Client) -> None:
    client.unload("ask")
    with pytest.raises(ModelNotLoaded):
        notebook.run("%%llm ask\nHello")
    lines = (notebook.out + notebook.err).strip().splitlines()
    assert "ModelNotLoaded" in lines[0]
    assert "`ask` is not loaded" in lines[0]
    assert lines[1].startswith("Hint: ")
    assert len(lines) <= 4


def test_a_line_of_the_cell_is_named_and_the_whole_traceback_can_be_had(notebook: Notebook) -> None:
    cell = "from llmkit.client.connection import parse_url\n\nparse_url('nonsense')"
    with pytest.raises(ServerNotFound):
        notebook.run(cell)
    short = notebook.out + notebook.err
    assert "line 3: parse_url('nonsense')" in short
    assert "def parse_url" not in short
    notebook.run("%xmode Verbose")
    notebook.run("%tb")
    assert "parse_url" in notebook.out + notebook.err
    assert "raise ServerNotFound" in notebook.out + notebook.err
    notebook.run("%xmode Context")


def test_a_server_that_is_gone_is_looked_for_again(
    notebook: Notebook, server: JupyterServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook.run("%llm status")
    connected = magics(notebook.shell)._client
    assert connected is not None
    connected.connection._http.base_url = "http://127.0.0.1:9/"
    with pytest.raises(ServerNotFound):
        notebook.run("%llm status")
    notebook.run("%llm status")
    assert server.url in notebook.out


def test_a_server_with_another_token_is_looked_for_again(
    notebook: Notebook, server: JupyterServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook.run("%llm status")
    connected = magics(notebook.shell)._client
    assert connected is not None
    # As after a restart on the same port: Jupyter makes a new token.
    connected.connection._http.headers["Authorization"] = "token of-before"
    with pytest.raises(NotAllowed):
        notebook.run("%llm status")
    notebook.run("%llm status")
    assert server.url in notebook.out


def test_unloaded_they_are_gone_with_their_connections(notebook: Notebook, server: JupyterServer) -> None:
    notebook.run("%llm status")
    connected = magics(notebook.shell)._client
    assert connected is not None
    notebook.run("%unload_ext llmkit")
    assert connected.connection._http.is_closed
    assert not list(notebook.shell.strdispatchers["complete_command"].flat_matches("%llm"))
    with pytest.raises(UsageError, match="not found"):
        notebook.shell.run_line_magic("llm", "status")
    notebook.run("%load_ext llmkit")
    notebook.run("%llm status")
    assert server.url in notebook.out


def test_a_temperature_that_is_no_number_is_an_error_in_a_few_lines(notebook: Notebook, upstream: MockUpstream) -> None:
    sent = len(upstream.requests)
    with pytest.raises(DoesNotFit, match="temperature"):
        notebook.run("%%llm ask --temperature nan\nHello")
    assert len((notebook.out + notebook.err).strip().splitlines()) <= 4
    assert len(upstream.requests) == sent


def test_a_picture_in_an_answer_is_not_drawn(notebook: Notebook, upstream: MockUpstream) -> None:
    says(upstream, "![a](http://127.0.0.1:9/a.png) <img src=http://127.0.0.1:9/a.png>")
    notebook.run("%%llm ask --as markdown --to text\nHello")
    for shown in notebook.shown:
        assert "![" not in shown.data["text/markdown"]
        assert "<img" not in shown.data["text/markdown"]
    assert notebook.names["text"].startswith("![a](http")
    assert "<img" not in notebook.names["_llm"]._repr_markdown_()


# -- texts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{a}", "1"),
        ("{{a}}", "{a}"),
        ("{b.real} {c[0]} {c[0]!r:>4} {a:03d}", "2 x  'x' 001"),
        ("{none}", "None"),
        ("no variables", "no variables"),
    ],
)
def test_templates(template: str, text: str) -> None:
    assert expand(template, {"a": 1, "b": 2, "c": ["x"], "none": None}) == text


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{}", "`{}`"),
        ("{0}", "`0`"),
        ("{!r}", "`{}`"),
        ('{"a": 1}', '`"a"`'),
        ("{a.nothing}", "a.nothing"),
        ("{c[9]}", "c"),
        ("{a:nonsense}", "put in"),
        ("}", "put in"),
        ("{a", "put in"),
    ],
)
def test_wrong_templates(template: str, said: str) -> None:
    with pytest.raises(UsageError) as raised:
        expand(template, {"a": 1, "c": []})
    assert said in str(raised.value)


def test_json_and_code_are_found_in_what_models_write() -> None:
    assert read_json(" [1, 2] ") == [1, 2]
    assert read_json("```\n{}\n```") == {}
    with pytest.raises(DoesNotFit, match="begins"):
        read_json("")
    with pytest.raises(DoesNotFit, match="nested too deeply"):
        read_json("[" * 100_000)
    assert read_code(" x = 1 \n") == "x = 1"
    assert read_code("```py\nif x:\n    y\n```") == "if x:\n    y"
    assert read_code("```py\nx = 1\n```\n\n```\ny\n```") == "x = 1\n\ny"
