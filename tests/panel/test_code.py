from __future__ import annotations

import ast
import json
import os
import re
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from mock_upstream import ANSWER, MockUpstream
from support import JupyterServer

from llmkit.client import Client
from llmkit.panel import code
from llmkit.panel.code import Code
from llmkit.panel.code_view import CodeView
from llmkit.panel.widgets import Kit

CANARY = "sk-canary-Zq3vT8wL"
HOSTILE = (
    "It's \"quoted\" and 'single'",
    "$HOME `id` $(id) ${LLMKIT_TOKEN} \\$HOME !! !x",
    "back\\slash \\n \\' \\\" \\u0041 \\",
    "two\nlines\n\nand\ttab\r\n",
    "'''triple''' and \"\"\"double\"\"\" {braces} %s {0}",
    "emoji 🦙, umlaut ü, 漢字, right\u202eto left, separator\u2028, nul\x00, delete\x7f, bell\x07",
    "-d @/etc/passwd\n' END\nEND\nEOF",
    'one two three four five six seven eight nine ten eleven twelve thirteen it\'s long "enough"\nto be\nfolded',
)
BROKEN = "".join(HOSTILE)


@pytest.fixture
def run_python(
    server: JupyterServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[Code], str]:
    """Give a function that runs the Python of a code as a cell would, and gives what it printed."""
    monkeypatch.setenv("LLMKIT_SERVER_URL", server.url)
    monkeypatch.setenv("LLMKIT_TOKEN", server.token)

    def run(made: Code) -> str:
        capsys.readouterr()
        names: dict[str, Any] = {}
        try:
            exec(compile(made.python, "cell", "exec"), names)  # noqa: S102  # it is ours, and made to be run
        finally:
            if "client" in names:
                names["client"].close()
        return capsys.readouterr().out

    return run


@pytest.fixture
def run_curl(server: JupyterServer) -> Callable[[Code], str]:
    """Give a function that runs the curl of a code as a terminal would, and gives what it printed."""
    environment = {**os.environ, "LLMKIT_SERVER_URL": server.url, "LLMKIT_TOKEN": server.token, "HOME": "/nowhere"}

    def run(made: Code) -> str:
        done = subprocess.run(
            ["sh", "-s"], input=made.curl.encode(), env=environment, capture_output=True, timeout=60, check=False
        )
        assert (done.returncode, done.stderr) == (0, b"")
        return done.stdout.decode()

    return run


def asked(upstream: MockUpstream) -> list[dict[str, Any]]:
    """Give the chat requests that came, without how they were streamed."""
    how = ("stream", "stream_options")
    bodies = [body for path, _, body in upstream.requests if path == "/v1/chat/completions"]
    upstream.requests.clear()
    return [{name: value for name, value in body.items() if name not in how} for body in bodies]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_prompt_arrives_as_it_is(
    text: str,
    client: Client,
    configure: Callable[[str], None],
    upstream: MockUpstream,
    run_python: Callable[[Code], str],
    run_curl: Callable[[Code], str],
) -> None:
    configure("ask")
    client.load("ask", progress=False)
    options = {"system": text, "temperature": 0.5, "stop": [text[:20]], "messages": [{"role": "user", "content": text}]}
    made = code.prompt({"model_id": "ask", "prompt": text, "inference_kwargs": options})
    upstream.requests.clear()
    assert ANSWER in run_python(made)
    (by_python,) = asked(upstream)
    frames = run_curl(made)
    (by_curl,) = asked(upstream)
    assert by_python == by_curl
    said = [(message["role"], message["content"]) for message in by_curl["messages"]]
    assert said == [("system", text), ("user", text), ("user", text)]
    assert (by_curl["temperature"], by_curl["stop"]) == (0.5, [text[:20]])
    assert frames.count("data: ") > 2
    assert "[DONE]" in frames


def test_a_configuration_arrives_as_it_is(
    client: Client, upstream: MockUpstream, run_python: Callable[[Code], str], run_curl: Callable[[Code], str]
) -> None:
    for text in HOSTILE:
        body = {
            "model_id": "made",
            "model_name": "gpt-3",
            "model_type": "openai",
            "model_kwargs": {
                "engine": {"base_url": upstream.base_url, "api_key": "env:SOME_API_KEY"},
                "generation": {"stop": [text], "temperature": 0.25},
            },
            "description": text,
            "auto_load": False,
            "prices": {"input": 1.5, "output": 2, "currency": "EUR"},
        }
        made = code.configure(body)
        stored = []
        for run in (run_python, run_curl):
            assert run(made)
            stored.append(client.configuration(client.model("made").config_id).to_wire())
            client.delete("made")
        by_python, by_curl = ({k: v for k, v in one.items() if k != "config_id"} for one in stored)
        assert by_python == by_curl
        assert (by_curl["description"], by_curl["model_kwargs"]) == (text, body["model_kwargs"])


@pytest.mark.parametrize("language", ["python", "curl"])
def test_an_update_puts_the_whole_body_in_place_and_keeps_the_key(
    language: str,
    client: Client,
    upstream: MockUpstream,
    run_python: Callable[[Code], str],
    run_curl: Callable[[Code], str],
) -> None:
    kwargs = {"base_url": upstream.base_url, "api_key": CANARY}
    stored = client.configure("made", "gpt-3", "openai", kwargs, description="old", max_queued=3)
    body = stored.to_wire()
    del body["max_queued"]
    body["description"] = HOSTILE[0]
    body["model_kwargs"]["temperature"] = 0.25
    made = code.update(stored.config_id, "made", body)
    assert CANARY not in made.python + made.curl
    (run_python if language == "python" else run_curl)(made)
    assert client.configuration(stored.config_id).to_wire() == body
    client.load("made", progress=False)
    client.prompt("made", "Still with the key?")
    assert upstream.requests[-1][1]["Authorization"] == f"Bearer {CANARY}"


@pytest.mark.parametrize("language", ["python", "curl"])
def test_a_live_model_is_loaded_again_where_that_is_asked_for(
    language: str,
    client: Client,
    upstream: MockUpstream,
    run_python: Callable[[Code], str],
    run_curl: Callable[[Code], str],
) -> None:
    stored = client.configure("made", "gpt-3", "openai", {"base_url": upstream.base_url})
    client.load("made", progress=False)
    made = code.update(stored.config_id, "made", {**stored.to_wire(), "model_name": "gpt-4o-mini"}, reload=True)
    (run_python if language == "python" else run_curl)(made)
    assert client.configuration(stored.config_id).model_name == "gpt-4o-mini"


@pytest.mark.parametrize("place", [lambda key: {"api_key": key}, lambda key: {"engine": {"api_key": key}}])
@pytest.mark.parametrize("key", [CANARY, {"secret": True, "set_at": CANARY}])
def test_a_key_is_left_out_and_how_to_give_it_is_said(
    place: Callable[[Any], dict[str, Any]], key: Any, client: Client, run_python: Callable[[Code], str]
) -> None:
    body = {"model_id": "made", "model_name": "gpt-3", "model_type": "openai", "model_kwargs": place(key)}
    made = code.configure(body)
    for text in (made.python, made.curl):
        assert CANARY not in text
        assert "key is left out" in text
        assert "getpass" in text
    run_python(made)
    assert "api_key" not in json.dumps(client.configuration(client.model("made").config_id).model_kwargs)
    raw = code.update("some-id", "made", {"model_kwargs": place(CANARY)})
    assert CANARY not in raw.python + raw.curl
    assert "left out" not in code.configure({**body, "model_kwargs": place("env:SOME_API_KEY")}).python


@pytest.mark.parametrize("language", ["python", "curl"])
def test_load_logs_unload_and_delete_do_it(
    language: str,
    client: Client,
    configure: Callable[[str], None],
    run_python: Callable[[Code], str],
    run_curl: Callable[[Code], str],
) -> None:
    name = "name:tag@1.0"  # part of an address, where it means something else
    configure(name)
    config_id = client.model(name).config_id
    run = run_python if language == "python" else run_curl
    run(code.load(name, config_id))
    assert client.model(name).status == "loaded"
    assert run(code.logs(name))
    run(code.unload(name))
    assert client.model(name).status == "unloaded"
    client.load(name, progress=False)
    run(code.delete(config_id, name, unload=True))
    assert name not in [model.model_id for model in client.models()]
    configure(name)
    run(code.delete(client.model(name).config_id, name))
    assert name not in [model.model_id for model in client.models()]


def test_a_comparison_asks_all_and_one_failure_hurts_no_other(
    client: Client,
    configure: Callable[[str], None],
    upstream: MockUpstream,
    run_python: Callable[[Code], str],
    run_curl: Callable[[Code], str],
) -> None:
    for name in ("first", "second", "asleep"):
        configure(name)
    for name in ("first", "second"):
        client.load(name, progress=False)
    bodies: list[dict[str, Any]] = [
        {"model_id": "asleep", "prompt": BROKEN},
        {"model_id": "first", "prompt": BROKEN, "inference_kwargs": {"temperature": 0.5}},
        {"model_id": "second", "prompt": BROKEN, "inference_kwargs": {"system": BROKEN, "seed": 3}},
    ]
    made = code.compare(bodies)
    upstream.requests.clear()
    printed = run_python(made)
    by_python = sorted(asked(upstream), key=str)
    assert printed.count(ANSWER) == 2
    assert "not loaded" in printed
    answers = [json.loads(line) for line in run_curl(made).splitlines()]
    by_curl = sorted(asked(upstream), key=str)
    assert by_python == by_curl
    assert {message["content"] for body in by_curl for message in body["messages"]} == {BROKEN}
    assert sorted(one["response"] for one in answers if "response" in one) == [ANSWER, ANSWER]
    assert [one["error"]["code"] for one in answers if "error" in one] == ["model_not_loaded"]


def test_a_prompt_with_images_is_no_argument_that_is_too_long(
    client: Client,
    configure: Callable[[str], None],
    upstream: MockUpstream,
    run_python: Callable[[Code], str],
    run_curl: Callable[[Code], str],
) -> None:
    configure("ask")
    client.load("ask", progress=False)
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "QUFB" * 100_000}}
    messages = [{"role": "user", "content": [{"type": "text", "text": BROKEN}, image]}]
    body = {"model_id": "ask", "prompt": BROKEN, "inference_kwargs": {"messages": messages}}
    for run, made in ((run_python, code.prompt(body)), (run_curl, code.prompt(body)), (run_curl, code.compare([body]))):
        upstream.requests.clear()
        assert run(made)
        assert asked(upstream)[0]["messages"] == [*messages, {"role": "user", "content": BROKEN}]


def test_python_is_written_as_a_person_would() -> None:
    text = 'A long first line, long enough to be too long for one line of code.\nIt\'s a second "line".\n'
    made = code.prompt({"model_id": "demo", "prompt": text, "inference_kwargs": {"stop": ["a" * 80, "b"], "from": 1}})
    assert made.python == (
        "import llmkit\n\nclient = llmkit.connect()\n"
        "with client.stream(\n"
        '    "demo",\n'
        "    (\n"
        '        "A long first line, long enough to be too long for one line of code.\\n"\n'
        "        'It\\'s a second \"line\".\\n'\n"
        "    ),\n"
        "    stop=[\n"
        f'        "{"a" * 80}",\n'
        '        "b",\n'
        "    ],\n"
        '    **{"from": 1},\n'
        ") as stream:\n"
        "    for piece in stream:\n"
        '        print(piece, end="", flush=True)\n'
        "print()\n"
        "print(stream.answer.usage, stream.answer.timings)\n"
    )
    assert 'client.load("demo")' in code.load("demo", "id").python
    assert "True" in code.configure({"model_id": "a", "auto_load": True}).python


def test_an_unfinished_form_and_nonsense_give_code_that_can_be_read() -> None:
    bodies: list[dict[str, Any]] = [{}, {"model_id": "a"}, {"model_kwargs": {}}, {"description": None}]
    for body in bodies:
        made = code.configure(body)
        ast.parse(made.python)
        assert "None" not in made.python
    ast.parse(code.prompt({"prompt": "\ud800", "model_id": "a"}).python)
    code.prompt({"prompt": "\ud800", "model_id": "a"}).curl.encode()  # else it could not be sent to a page
    ast.parse(code.compare([]).python)


def test_a_terminal_gets_nothing_that_it_would_take_as_a_key() -> None:
    made = code.prompt({"model_id": "a", "prompt": "".join(map(chr, range(0x100)))})
    assert re.sub(r"[\x20-\x7e\n]", "", made.curl).isprintable()
    assert made.curl.startswith("# In a terminal")


# -- the fold ----------------------------------------------------------------------------------------------


@pytest.fixture
def view() -> CodeView:
    return CodeView(Kit())


@pytest.fixture
def sent(view: CodeView) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    view.widget.send = messages.append
    return messages


def test_nothing_is_sent_while_it_is_folded_and_nothing_twice(view: CodeView, sent: list[dict[str, Any]]) -> None:
    for number in range(50):
        view.show(("Load", code.load(f"model-{number}", "id")))
    assert sent == []
    view.widget.unfolded = True
    assert [message["items"][0]["title"] for message in sent] == ["Load"]
    assert "model-49" in sent[0]["items"][0]["python"]
    view.show(("Load", code.load("model-49", "id")))
    assert len(sent) == 1
    view.show(("Load", code.load("other", "id")), ("Unload", code.unload("other")))
    assert [item["title"] for item in sent[-1]["items"]] == ["Load", "Unload"]
    view.widget.unfolded = False
    view.show()
    assert len(sent) == 2
    assert "other" not in json.dumps(view.widget.get_state(), default=str)


def test_of_long_code_the_page_gets_the_beginning_and_to_copy_it_the_whole(
    view: CodeView, sent: list[dict[str, Any]]
) -> None:
    made = code.prompt({"model_id": "a", "prompt": "word " * 100_000})
    view.show(("Ask", made))
    view.widget.unfolded = True
    (item,) = sent[0]["items"]
    assert len(item["python"]) == len(item["curl"]) == 20_000
    assert made.python.startswith(item["python"])
    assert item["characters"] == {"python": len(made.python), "curl": len(made.curl)}
    view.widget._receive(None, {"type": "whole", "request": 7, "item": 0, "language": "curl"}, None)
    assert sent[-1] == {"type": "whole", "request": 7, "text": made.curl}
    for nonsense in ({"item": 3, "language": "curl"}, {"item": 0, "language": "__class__"}, {"item": "0"}):
        view.widget._receive(None, {"type": "whole", "request": 8, **nonsense}, None)
        assert sent[-1]["text"] == ""
    view.widget._receive(None, "nonsense", None)


def test_a_page_that_comes_later_gets_what_is_shown(view: CodeView, sent: list[dict[str, Any]]) -> None:
    view.show(("Load", code.load("a", "id")))
    view.widget._receive(None, {"type": "hello"}, None)
    assert sent == []
    view.widget.unfolded = True
    view.widget._receive(None, {"type": "hello"}, None)
    assert len(sent) == 2
    assert sent[0] == sent[1]
