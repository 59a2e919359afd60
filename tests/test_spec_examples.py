"""The examples of the API's specification, taken from its own text, against a real server.

Four things are substituted, because the text cannot be run without: host and port, the ``config_id``, and
credentials. The calls are ordered so that each finds what it needs: a model is prompted before it is unloaded.
``gpt-3`` is served by whatever ``OPENAI_BASE_URL`` names: a small mock, or a real ``vllm serve`` of the demo model.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from mock_upstream import MockUpstream
from support import ANSWER, IN_CI, LOAD_SECONDS, QUESTION, JupyterServer, free_port, own_environment, wait_until

from llmkit.demo import demo_model_path

SPEC = (Path(__file__).parent / "data" / "llm_api.md").read_text(encoding="utf-8")
DOCUMENTED_ORIGIN = "http://localhost:8000"
DOCUMENTED_CONFIG_ID = "abcd1234-efgh-5678-ijkl-9012mnop3456"
ORDER = (
    "Configure Model",
    "Load Model",
    "Perform Inference",
    "List Model Configurations",
    "Get Model Configuration",
    "List Loaded Models",
    "Unload Model",
    "Delete Model Configuration",
)


@dataclass(frozen=True)
class Example:
    """What the specification shows of one endpoint."""

    title: str
    curl: str
    python: str
    answer: Any


def examples() -> list[Example]:
    """Take the examples out of the specification, in the order in which they can run."""
    reference, usage = SPEC.split("## Usage\n")
    found = []
    for title in ORDER:
        section = part(reference, rf"### \d\. {title}\n")
        found.append(
            Example(
                title,
                curl=code(section, "bash"),
                python=code(part(usage, rf"#### \d\. {title}\n"), "python"),
                answer=json.loads(code(section, "json")),
            )
        )
    return found


def part(text: str, heading: str) -> str:
    """Give the text from a heading to the next, not counting those of an endpoint's path."""
    found = re.search(rf"^{heading}(.*?)(?=^#{{2,4}} [^`]|\Z)", text, re.DOTALL | re.MULTILINE)
    assert found, heading
    return found[1]


def code(section: str, language: str) -> str:
    """Give the one block of a language in a section."""
    [block] = re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)
    return str(block)


def other_slash(text: str) -> str:
    """Give the example with a trailing slash where it has none, and the other way round."""

    def turn(url: re.Match[str]) -> str:
        path = url[0][:-1]
        return (path[:-1] if path.endswith("/") else path + "/") + url[0][-1]

    turned, count = re.subn(rf"{re.escape(DOCUMENTED_ORIGIN)}[^\"]+\"", turn, text)
    assert count == 1
    return turned


def substituted(text: str, server: JupyterServer, config_id: str) -> str:
    """Put the real host, port and ``config_id`` into an example."""
    return text.replace(DOCUMENTED_ORIGIN, server.url.rstrip("/")).replace(DOCUMENTED_CONFIG_ID, config_id)


def run_curl(example: str, server: JupyterServer) -> Any:
    """Run an example with curl, with credentials, and give the answer."""
    header = shlex.quote(f"Authorization: token {server.token}")
    command, count = re.subn(r"^curl ", f"curl --silent --show-error --fail-with-body -H {header} ", example)
    assert count == 1
    return json.loads(printed(["bash", "-c", command]))


def run_python(example: str, server: JupyterServer) -> Any:
    """Run an example in an interpreter of its own, with credentials, and give what it prints."""
    headers = {"Authorization": f"token {server.token}"}
    program, count = re.subn(r"requests\.(get|post|delete)\(url", rf"requests.\1(url, headers={headers!r}", example)
    assert count == 1
    return ast.literal_eval(printed([sys.executable, "-c", program]))


def printed(command: list[str]) -> str:
    done = subprocess.run(command, env=own_environment(), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


RUNNERS = {"curl": run_curl, "python": run_python}


def assert_as_documented(answer: Any, documented: Any, config_id: str) -> None:
    """Objects may say more than the specification shows, never less or something else; lists are equal."""
    if documented == DOCUMENTED_CONFIG_ID:
        documented = config_id
    if isinstance(documented, dict):
        assert isinstance(answer, dict)
        assert documented.keys() <= answer.keys()
        for key, value in documented.items():
            assert_as_documented(answer[key], value, config_id)
    elif isinstance(documented, list):
        assert isinstance(answer, list)
        assert len(answer) == len(documented)
        for one, value in zip(answer, documented, strict=True):
            assert_as_documented(one, value, config_id)
    else:
        assert answer == documented


def follow(server: JupyterServer, language: str, *, turned: bool = False) -> None:
    """Run all examples of a language, one after the other, and compare every answer."""
    config_id = ""
    for example in examples():
        text = example.curl if language == "curl" else example.python
        text = other_slash(text) if turned else text
        answer = RUNNERS[language](substituted(text, server, config_id), server)
        config_id = config_id or answer["config_id"]
        assert_as_documented(answer, example.answer, config_id)


def test_every_endpoint_of_the_specification_has_both_examples() -> None:
    endpoints = re.findall(r"^#### `(\w+) (\S+)`", SPEC, re.MULTILINE)
    assert len(endpoints) == len(examples()) == 8
    for example in examples():
        [url] = re.findall(rf"{DOCUMENTED_ORIGIN}([^\"]+)", example.curl)
        assert url in example.python
        pattern = url.replace(DOCUMENTED_CONFIG_ID, "{config_id}").replace("example_model", "{model_id}")
        [method] = re.findall(r"-X (\w+)", example.curl)
        assert (method, pattern) in endpoints


@pytest.fixture(scope="module")
def curl_is_there() -> None:
    """Fail early, and by name, where there is no curl."""
    if subprocess.run(["bash", "-c", "command -v curl"], capture_output=True, check=False).returncode != 0:
        (pytest.fail if IN_CI else pytest.skip)("curl is not installed")


@pytest.fixture(scope="module")
def server_of_mock() -> Iterator[JupyterServer]:
    """Give a server whose OpenAI endpoint is a mock that wants a key."""
    with MockUpstream(models=("gpt-3",), key="sk-mock") as upstream:
        environment = {"OPENAI_BASE_URL": upstream.base_url, "OPENAI_API_KEY": "sk-mock"}
        with JupyterServer(env=environment) as server:
            yield server


@pytest.mark.usefixtures("curl_is_there")
@pytest.mark.parametrize("turned", [False, True], ids=["as written", "other slash"])
@pytest.mark.parametrize("language", RUNNERS)
def test_the_examples_answer_as_documented(server_of_mock: JupyterServer, language: str, turned: bool) -> None:
    follow(server_of_mock, language, turned=turned)


@pytest.fixture(scope="module")
def gpt_3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve the demo model with ``vllm serve`` under the name of the specification; give its base URL."""
    port = free_port()
    folder = tmp_path_factory.mktemp("gpt-3")
    command = [
        *[sys.executable, "-m", "llmkit.engines.vllm.launch", "serve", str(demo_model_path())],
        *["--served-model-name=gpt-3", "--host=127.0.0.1", f"--port={port}", "--enforce-eager", "--dtype=float32"],
        *["--kv-cache-memory-bytes=134217728", "--max-num-seqs=4"],
    ]
    environment = {**own_environment(), "TMPDIR": str(folder), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    log = folder / "log"
    with log.open("wb") as output:
        engine = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)

    def healthy() -> bool:
        assert engine.poll() is None, log.read_text()[-4000:]
        try:
            return httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).is_success
        except httpx.TransportError:
            return False

    try:
        wait_until(healthy, "vllm serve", LOAD_SECONDS)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        end_tree(engine)


def end_tree(engine: subprocess.Popen[bytes]) -> None:
    """End a program and everything below it, whatever it thinks of that."""
    family = [psutil.Process(engine.pid), *psutil.Process(engine.pid).children(recursive=True)]
    engine.terminate()
    _, alive = psutil.wait_procs(family, timeout=15)
    for process in alive:
        process.kill()
    engine.wait(10)


@pytest.mark.vllm
@pytest.mark.usefixtures("curl_is_there")
def test_the_examples_answer_as_documented_by_a_real_engine(gpt_3: str) -> None:
    with JupyterServer(env={"OPENAI_BASE_URL": gpt_3}) as server:
        for language in RUNNERS:
            follow(server, language)


@pytest.mark.vllm
def test_vllm_that_runs_elsewhere_has_what_it_has_beside_openais_api(gpt_3: str) -> None:
    with JupyterServer() as server:
        server.load(server.configure("far", model_name="gpt-3", model_type="openai", model_kwargs={"base_url": gpt_3}))
        assert server.request("GET", "llm/models/far").json()["capabilities"]["max_model_len"] == 512
        tokens = server.request("POST", "llm/v1/tokenize", json={"model": "far", "prompt": QUESTION}).json()
        assert tokens["count"] == len(tokens["tokens"]) > 3
        assert "vllm:num_requests_running{" in server.request("GET", "llm/models/far/metrics").text
        answer = server.request("POST", "llm/inference/", json={"model_id": "far", "prompt": QUESTION}).json()
        assert answer["response"] == ANSWER
