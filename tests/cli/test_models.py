"""Configure, load, look at, unload and delete models from a shell."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fake_engine_type import PLUGIN
from mock_upstream import MockUpstream
from support import JupyterServer, wait_until

from llmkit.client import Client, connect, loading
from llmkit.errors import LoadCancelled

CANARY = "sk-canary-Zq3vT8"


def test_the_journey_of_a_model(as_json: Callable[..., Any], call: Any, client: Client, upstream: MockUpstream) -> None:
    address = f"base_url={upstream.base_url}"
    made = as_json(
        "configure",
        "m",
        "gpt-3",
        "--type",
        "openai",
        "--set",
        address,
        "--set",
        "temperature=0.5",
        "--description",
        "a test",
        "--idle-ttl",
        "600",
    )
    assert made["model_kwargs"] == {"base_url": upstream.base_url, "temperature": 0.5}
    assert (made["description"], made["idle_ttl"]) == ("a test", 600)
    assert as_json("ps") == {"models": []}
    assert as_json("load", "m")["status"] == "loaded"
    (model,) = as_json("ps")["models"]
    assert (model["model_id"], model["status"]) == ("m", "loaded")
    status, out, _ = call("ps")
    assert status == 0
    assert out.splitlines()[0].split() == ["model", "status", "type", "memory", "requests", "expires"]
    assert "m      loaded  openai  -       -         in 10 min" in out
    assert as_json("unload", "m")["freed"]["verified"]
    assert as_json("delete", "m") == {"model_id": "m", "deleted": True}
    assert "m" not in [one.model_id for one in client.models()]


def test_people_are_told_what_happened_and_what_is_next(call: Any, client: Client, upstream: MockUpstream) -> None:
    words = ("configure", "m", "gpt-3", "--type", "openai", "--set", f"base_url={upstream.base_url}")
    assert call(*words)[1] == "m is configured: `llmkit load m` loads it.\n"
    status, out, _ = call("load", "m")
    assert (status, out.startswith("m is loaded")) == (0, True)
    assert call("unload", "m")[1] == "m is unloaded.\n"
    assert call("delete", "m")[1] == "m is deleted.\n"


def test_another_configuration_takes_the_place_only_with_replace_and_keeps_the_key(
    call: Any, as_json: Callable[..., Any], client: Client, upstream: MockUpstream
) -> None:
    upstream.key = CANARY
    client.configure("m", "gpt-3", "openai", {"base_url": upstream.base_url, "api_key": CANARY}, description="old")
    words = ("configure", "m", "gpt-4o-mini", "--type", "openai", "--set", f"base_url={upstream.base_url}")
    status, _, err = call(*words)
    assert (status, "`m`" in err) == (1, True)
    changed = as_json(*words, "--replace")
    assert (changed["model_name"], "description" in changed) == ("gpt-4o-mini", False)
    assert CANARY not in json.dumps(changed)
    assert as_json("load", "m")["status"] == "loaded"


@pytest.mark.parametrize("given", ["raw", "env:SOME_API_KEY"])
def test_a_key_under_engine_stays_too(
    as_json: Callable[..., Any], client: Client, upstream: MockUpstream, given: str
) -> None:
    key = CANARY if given == "raw" else given
    before = client.configure("m", "gpt-3", "openai", {"engine": {"base_url": upstream.base_url, "api_key": key}})
    words = ("--type", "openai", "--replace", "--set")
    flat = as_json("configure", "m", "gpt-4", *words, f"base_url={upstream.base_url}")
    assert flat["model_kwargs"]["api_key"] == before.model_kwargs["engine"]["api_key"]
    nested = as_json(
        "configure", "m", "gpt-5", *words, json.dumps({"base_url": upstream.base_url}).join(("engine=", ""))
    )
    assert nested["model_kwargs"]["engine"]["api_key"] == before.model_kwargs["engine"]["api_key"]


def test_a_loaded_model_goes_on_unless_it_may_be_reloaded(
    call: Any, client: Client, upstream: MockUpstream, loaded: str
) -> None:
    words = ("configure", loaded, "gpt-4o-mini", "--type", "openai", "--set", f"base_url={upstream.base_url}")
    status, out, err = call(*words, "--replace")
    assert (status, out) == (1, "")
    assert "--reload" in err
    model = client.model(loaded)
    assert (model.status, model.model_name) == ("loaded", "gpt-3")
    status, out, err = call(*words, "--reload")
    assert (status, out, err.endswith("Ready\n") or err == "") == (0, f"{loaded} is configured, and loaded.\n", True)
    model = client.model(loaded)
    assert (model.status, model.model_name) == ("loaded", "gpt-4o-mini")
    # What holds from the next request needs no reload.
    assert call(*words, "--replace", "--set", "temperature=0")[:2] == (0, f"{loaded} is configured, and loaded.\n")


def test_a_reload_that_fails_is_status_1(call: Any, client: Client, loaded: str) -> None:
    words = ("configure", loaded, "gpt-3", "--type", "openai", "--reload", "--set", "base_url=http://127.0.0.1:9/v1")
    status, out, err = call(*words)
    assert (status, out) == (1, "")
    assert "127.0.0.1:9" in err
    assert client.model(loaded).status == "failed"


def test_a_key_is_named_or_asked_for_and_never_taken_from_the_command_line(
    call: Any, as_json: Callable[..., Any], client: Client, upstream: MockUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("configure", "m", "gpt-3", "--type", "openai", "--set", f"base_url={upstream.base_url}")
    for given in (f"api_key={CANARY}", json.dumps({"api_key": CANARY}).join(("engine=", ""))):
        status, out, err = call(*words, "--set", given)
        assert (status, out) == (2, "")
        assert "--ask-key" in err
        assert CANARY not in err
    named = as_json(*words, "--key-from-env", "SOME_API_KEY")
    assert named["model_kwargs"]["api_key"] == "env:SOME_API_KEY"
    client.delete("m")
    monkeypatch.setattr("getpass.getpass", lambda prompt: f" {CANARY}\n")
    asked = as_json(*words, "--ask-key")
    assert asked["model_kwargs"]["api_key"]["secret"] is True
    upstream.key = CANARY
    assert as_json("load", "m")["status"] == "loaded"


def test_errors_of_the_server_are_status_1_with_its_words(call: Any) -> None:
    status, out, err = call("configure", "m", "gpt-3", "--type", "openai", "--set", "temprature=1")
    assert (status, out) == (1, "")
    assert "temperature" in err
    status, out, err = call("load", "nobody", "--json")
    assert (status, out) == (1, "")
    assert json.loads(err)["error"]["code"] == "model_not_found"
    for words in (("unload", "nobody"), ("delete", "nobody"), ("logs", "nobody"), ("logs", "nobody", "-f")):
        assert call(*words)[0] == 1


def test_a_load_that_fails_says_why(call: Any, client: Client) -> None:
    client.configure("m", "gpt-3", "openai", {"base_url": "http://127.0.0.1:9/v1"})
    status, out, err = call("load", "m", "--json")
    assert (status, out) == (1, "")
    assert json.loads(err)["error"]["code"] == "upstream_unreachable"


def test_the_status_shows_server_models_and_devices(
    call: Any, as_json: Callable[..., Any], loaded: str, server: JupyterServer
) -> None:
    told = as_json("status")
    assert told["server"]["url"] == server.url
    assert told["server"]["found"] == "LLMKIT_SERVER_URL"
    assert told["health"]["status"] == "ok"
    assert loaded in [model["model_id"] for model in told["models"]]
    assert told["devices"]["ram"]["total_bytes"] > 0
    assert server.token not in json.dumps(told)
    out = call("status")[1]
    assert server.url in out
    assert "RAM" in out
    assert f"{loaded} " in out


# -- an engine that takes its time ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slow_server() -> Iterator[JupyterServer]:
    """Give a real server with the model type ``fake``: vLLM's processes without a model."""
    path = os.pathsep.join(filter(None, (PLUGIN["PYTHONPATH"], os.environ.get("PYTHONPATH", ""))))
    with JupyterServer(env={"PYTHONPATH": path}) as running:
        yield running


@pytest.fixture
def stalled(slow_server: JupyterServer) -> Iterator[Client]:
    """Give a client whose model ``slow`` is loading for ever once it is loaded."""
    with connect(slow_server.url, slow_server.token) as connected:
        connected.configure("slow", "any --stall-at=weights", "fake")
        yield connected
        connected.delete("slow", unload=True)


def start(server: JupyterServer, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "llmkit", *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=server.client_environment(), stdout=pipe, stderr=pipe, text=True)


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_stops_to_watch_and_the_load_goes_on(slow_server: JupyterServer, stalled: Client, as_json: bool) -> None:
    process = start(slow_server, "load", "slow", *(["--json"] if as_json else []))
    wait_until(lambda: stalled.model("slow").phase == "weights", "the load")
    if not as_json:
        assert process.stderr is not None
        while "Loading the weights" not in process.stderr.readline():
            pass
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    if as_json:
        assert json.loads(err)["error"]["code"] == "interrupted"
    else:
        assert err == "The load goes on; `llmkit unload slow` cancels it.\n"
    assert stalled.model("slow").status == "loading"
    stopped = start(slow_server, "unload", "slow")
    assert stopped.communicate(timeout=30)[0].startswith("slow is unloaded")
    assert stalled.model("slow").status == "unloaded"


def test_in_a_terminal_a_bar_shows_the_phase(slow_server: JupyterServer, stalled: Client, terminal: Any) -> None:
    running = terminal(slow_server.client_environment(), "load", "slow")
    running.read_until("slow: Loading the weights")
    running.write("\x03")
    running.read_until("The load goes on")
    running.end()
    assert running.status == 130
    assert stalled.model("slow").status == "loading"


def test_who_does_not_wait_is_back_at_once_and_one_who_does_hears_of_the_end(
    slow_server: JupyterServer, stalled: Client
) -> None:
    process = start(slow_server, "load", "slow", "--wait=false")
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert out.startswith("slow: loading")
    watching = start(slow_server, "load", "slow")
    assert watching.stderr is not None
    assert watching.stderr.readline().startswith("slow: ")
    stalled.unload("slow")
    _, err = watching.communicate(timeout=30)
    assert watching.returncode == 1
    assert "was cancelled" in err


def test_a_load_that_ends_with_its_server_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_PATIENCE_SECONDS", 120.0)
    path = os.pathsep.join(filter(None, (PLUGIN["PYTHONPATH"], os.environ.get("PYTHONPATH", ""))))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (
        JupyterServer(env={"PYTHONPATH": path}, port=port) as running,
        connect(running.url, running.token) as connected,
        ThreadPoolExecutor(1) as pool,
    ):
        connected.configure("slow", "any --stall-at=weights", "fake")
        seen: list[str | None] = []
        connected.start_loading("slow")
        watching = pool.submit(loading.follow, connected, "slow", lambda model: seen.append(model.phase))
        wait_until(lambda: "weights" in seen, "the load")
        running.stop()
        running.start()
        with pytest.raises(LoadCancelled, match="started anew"):
            watching.result(timeout=120)


def test_a_log_is_shown_and_followed_until_ctrl_c(slow_server: JupyterServer, stalled: Client) -> None:
    stalled.start_loading("slow")
    wait_until(lambda: len(stalled.logs("slow")) > 3, "some lines")
    process = start(slow_server, "logs", "slow", "--tail", "2", "--json")
    out, _ = process.communicate(timeout=30)
    assert json.loads(out)["lines"] == stalled.logs("slow", 2)
    process = start(slow_server, "logs", "slow")
    assert process.communicate(timeout=30)[0].splitlines() == stalled.logs("slow")
    process = start(slow_server, "logs", "slow", "-f", "--tail", "2", "--json")
    assert process.stdout is not None
    assert json.loads(process.stdout.readline()) == {"line": stalled.logs("slow", 2)[0]}
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
