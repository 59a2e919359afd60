"""Ask a model from a shell, once and turn by turn."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import Any

from aiohttp import web
from mock_upstream import ANSWER, MockUpstream, chat_answer
from support import JupyterServer, wait_until


def endless(upstream: MockUpstream) -> None:
    """Have every answer of a stream begin and never end."""
    upstream.never_end("word ", 0.02)


def test_an_answer_is_printed_and_nothing_else(run: Any, loaded: str) -> None:
    for more in ((), ("--no-stream",)):
        done = run("run", loaded, "What?", *more)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{ANSWER}\n", "")


def test_a_prompt_comes_from_the_standard_input(run: Any, loaded: str, upstream: MockUpstream) -> None:
    assert run("run", loaded, "-", stdin="What\nis it?").stdout == f"{ANSWER}\n"
    assert upstream.requests[-1][2]["messages"] == [{"role": "user", "content": "What\nis it?"}]


def test_what_is_not_text_is_wrong_usage_and_letters_that_are_missing_are_no_end(
    server: JupyterServer, loaded: str, upstream: MockUpstream
) -> None:
    async def respond(request: web.Request, body: dict[str, Any]) -> web.StreamResponse | None:
        return web.json_response(chat_answer("\u00fcber")) if "messages" in body else None

    def ask(prompt: bytes, **environ: str) -> tuple[int, bytes, bytes]:
        command = [sys.executable, "-m", "llmkit", "run", loaded, "-", "--no-stream"]
        environment = {**server.client_environment(), "PYTHONUTF8": "1", **environ}
        done = subprocess.run(command, env=environment, input=prompt, capture_output=True, timeout=60, check=False)
        return done.returncode, done.stdout, done.stderr

    assert ask(b"\xff\xfe") == (2, b"", b"llmkit: What was given is not UTF-8.\n")
    upstream.respond = respond
    assert ask(b"What?", PYTHONIOENCODING="ascii") == (0, b"?ber\n", b"")


def test_the_parameters_go_to_the_model(call: Any, loaded: str, upstream: MockUpstream) -> None:
    words = ("--system", "Be short.", "--temperature", "0", "--max-tokens", "9", "--set", "seed=3")
    assert call("run", loaded, "What?", *words)[0] == 0
    body = upstream.requests[-1][2]
    assert (body["temperature"], body["max_tokens"], body["seed"]) == (0, 9, 3)
    assert body["messages"][0] == {"role": "system", "content": "Be short."}


def test_a_key_is_no_parameter(call: Any, loaded: str, upstream: MockUpstream) -> None:
    sent = len(upstream.requests)
    status, out, err = call("run", loaded, "What?", "--set", "api_key=sk-canary")
    assert (status, out, "canary" in err) == (2, "", False)
    status, out, err = call("run", loaded, "What?", "--set", "api_key=env:SOME_API_KEY")
    assert (status, out) == (1, "")
    assert "not allowed" in err
    assert len(upstream.requests) == sent


def test_as_json_a_stream_is_lines_and_the_whole_is_a_document(call: Any, loaded: str) -> None:
    lines = [json.loads(line) for line in call("run", loaded, "What?", "--json")[1].splitlines()]
    assert "".join(line["delta"] for line in lines[:-1]) == ANSWER == lines[-1]["response"]
    assert lines[-1]["usage"]["completion_tokens"] == 7
    out = call("run", loaded, "What?", "--json", "--no-stream")[1]
    assert json.loads(out)["response"] == ANSWER


def test_a_model_that_is_not_loaded_is_status_1(run: Any, client: Any, loaded: str) -> None:
    client.unload(loaded)
    done = run("run", loaded, "What?", "--json")
    assert (done.returncode, done.stdout) == (1, "")
    assert json.loads(done.stderr)["error"]["code"] == "model_not_loaded"


def test_ctrl_c_ends_the_generation_on_the_server(
    server: JupyterServer, loaded: str, upstream: MockUpstream, client: Any
) -> None:
    endless(upstream)
    command = [sys.executable, "-m", "llmkit", "run", loaded, "Tell me all."]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=server.client_environment(), stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None
    assert process.stdout.read(5) == "word "
    assert upstream.open_streams == 1
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "")
    wait_until(lambda: upstream.open_streams == 0, "the end of the generation")
    wait_until(lambda: client.model(loaded).in_flight == 0, "the end of the request")


def test_a_conversation_goes_on_from_what_was_said(run: Any, loaded: str, upstream: MockUpstream) -> None:
    done = run("chat", loaded, "--system", "Be short.", stdin="One?\n\nTwo?\n/clear\nThree?\n/exit\nFour?\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{ANSWER}\n" * 3, "")
    asked = [body["messages"] for path, _, body in upstream.requests if path.endswith("completions")]
    system = {"role": "system", "content": "Be short."}
    one, two, three = ({"role": "user", "content": f"{word}?"} for word in ("One", "Two", "Three"))
    assert asked == [[system, one], [system, one, {"role": "assistant", "content": ANSWER}, two], [system, three]]


def test_a_conversation_as_json_is_one_line_an_answer(run: Any, loaded: str) -> None:
    done = run("chat", loaded, "--json", stdin="One?\nTwo?\n")
    assert [json.loads(line)["response"] for line in done.stdout.splitlines()] == [ANSWER, ANSWER]
    assert run("chat", "nobody", "--json").returncode == 1


def test_in_a_terminal_ctrl_c_ends_the_answer_and_the_conversation_goes_on(
    server: JupyterServer, loaded: str, upstream: MockUpstream, terminal: Any
) -> None:
    endless(upstream)
    running = terminal(server.client_environment(), "chat", loaded)
    assert "/exit ends" in running.read_until("> ")
    running.write("Tell me all.\n")
    running.read_until("word word")
    running.write("\x03")
    running.read_until("(ended)")
    running.read_until("> ")
    wait_until(lambda: upstream.open_streams == 0, "the end of the generation")
    upstream.respond = None
    running.write("And now?\n")
    running.read_until(ANSWER)
    running.read_until("> ")
    assert [one["content"] for one in upstream.requests[-1][2]["messages"]] == ["And now?"]
    running.write("\x04")
    running.end()
    assert running.status == 0


def test_a_model_does_not_steer_the_terminal(
    server: JupyterServer, loaded: str, upstream: MockUpstream, terminal: Any, run: Any
) -> None:
    evil = "\x1b]0;owned\x07\x1b[2Jdone"

    async def respond(request: web.Request, body: dict[str, Any]) -> web.StreamResponse | None:
        return web.json_response(chat_answer(evil)) if "messages" in body else None

    upstream.respond = respond
    running = terminal(server.client_environment(), "run", loaded, "What?", "--no-stream")
    assert running.end() == "]0;owneddone\r\n"
    assert running.status == 0
    assert run("run", loaded, "What?", "--no-stream").stdout == f"{evil}\n"  # a pipe gets what was said
