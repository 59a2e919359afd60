"""README and the pages of docs: every block of code in them is run as it stands.

The programs are real ones: a Jupyter server, vLLM with the demo model, kernels, shells. What is elsewhere is played
here: a hub of models, and an endpoint with OpenAI's. What the pages say beside, `test_readme_tables.py` compares.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from bare_environment import BareEnvironment, published
from fake_hub import FakeHub
from kernels import ServerKernel
from mock_upstream import MockUpstream
from pages import BLOCKS, block
from support import ANSWER, LOAD_SECONDS, REPOSITORY, STOP_SECONDS, JupyterServer, own_environment, wait_until
from traitlets.config import Config

from jupyter_server_ext.app import LLMKitApp
from llmkit.client import connect
from llmkit.demo import demo_model_path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="engines are kept on Linux only")

DOCUMENTED_ORIGIN = "http://127.0.0.1:8105/"

CLONE = block("README.md", "Two commands", "bash")
INSTALL = block("README.md", "Two commands", "bash", 1)
OPENAI = block("README.md", "With any OpenAI client", "python")
CURL = block("README.md", "With curl", "bash")
TERMINAL = block("README.md", "In a terminal", "bash")
ERROR = block("docs/http.md", "The HTTP API", "json")
SETTINGS = [one for one in BLOCKS if one.page == "docs/operators.md" and one.language == "python"]
KEYS = block("docs/operators.md", "Keys for tools", "bash")
SCALING = [one for one in BLOCKS if one.page == "docs/scaling.md"]
CELLS = [one for one in BLOCKS if one.language == "python" and one not in (OPENAI, *SETTINGS, *SCALING)]


def test_every_block_is_run_by_a_test_of_this_module() -> None:
    run = [CLONE, INSTALL, OPENAI, CURL, TERMINAL, ERROR, *SETTINGS, KEYS, *SCALING, *CELLS]
    assert [one for one in BLOCKS if one not in run] == []
    assert len(BLOCKS) >= 12
    assert {one.page for one in CELLS} == {"README.md", "docs/notebooks.md", "docs/lifecycle.md"}


# -- what is installed -------------------------------------------------------------------------------------


def test_the_two_commands_open_the_quickstart(tmp_path: Path) -> None:
    # What takes minutes, the installation, is left to `make newcomer`: the clone finds an environment that is ready.
    ready = tmp_path / "ready"
    ready.touch()
    os.utime(ready, (time.time() + 86400,) * 2)
    home = tmp_path / "home"
    assert CLONE.text.count("<this repository>") == 1
    shell = subprocess.Popen(
        ["bash", "-ec", CLONE.text.replace("<this repository>", f"file://{published(tmp_path)}")],
        cwd=tmp_path,
        env={
            **own_environment(),
            "HOME": str(home),
            "MAKEFLAGS": f"-- VENV={sys.prefix} READY={ready}",
            "ARGS": "--no-browser --LLMKitApp.standby=off",
            "LLMKIT_RUN_DIR": os.environ["LLMKIT_RUN_DIR"],
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        files = home / ".local" / "share" / "jupyter" / "runtime"
        told = json.loads(wait_until(lambda: [*files.glob("jpserver-*.json")], "a server", 60)[0].read_text())
        with httpx.Client(base_url=told["url"], params={"token": told["token"]}, trust_env=False) as http:
            wait_until(lambda: answers(http, "llm/health"), "JupyterLab with llmkit", 60)
            first = http.get("")
            assert first.headers["Location"].split("?")[0].endswith("/lab/tree/notebooks/quickstart.ipynb")
            assert http.get("api/contents/notebooks/quickstart.ipynb").json()["type"] == "notebook"
    finally:
        end(shell)


def answers(http: httpx.Client, path: str) -> bool:
    try:
        return http.get(path).is_success
    except httpx.TransportError:
        return False


def end(shell: subprocess.Popen[bytes]) -> None:
    """End a shell and the server that it runs."""
    os.killpg(shell.pid, 15)
    try:
        shell.communicate(timeout=STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(shell.pid, 9)
        shell.communicate()


def test_the_commands_for_an_environment_of_ones_own_start_a_server_with_llmkit(tmp_path: Path) -> None:
    environment, home = BareEnvironment(tmp_path / "venv"), tmp_path / "home"
    shell = subprocess.Popen(
        ["bash", "-ec", INSTALL.text],
        cwd=published(tmp_path),
        env={
            **environment.environ(),
            "HOME": str(home),
            "LLMKIT_RUN_DIR": os.environ["LLMKIT_RUN_DIR"],
            "JUPYTER_TOKEN": "t",
            "JUPYTER_CONFIG_DIR": str(config_of_a_test(tmp_path)),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        files = home / ".local" / "share" / "jupyter" / "runtime"

        def look() -> list[Path]:
            if shell.poll() is not None:
                raise AssertionError(shell.communicate()[0].decode())
            return [*files.glob("jpserver-*.json")]

        told = json.loads(wait_until(look, "a server", 90)[0].read_text())
        with httpx.Client(base_url=told["url"], params={"token": "t"}, trust_env=False) as http:
            wait_until(lambda: answers(http, "llm/health"), "a server with llmkit", 60)
        assert environment.where("llmkit").is_relative_to(environment.folder)
    finally:
        end(shell)


def config_of_a_test(folder: Path) -> Path:
    """Give a folder of configuration of which a person's own Jupyter would have no need."""
    made = folder / "config"
    made.mkdir()
    (made / "jupyter_server_config.py").write_text(
        "c.ServerApp.port = 0\nc.ServerApp.open_browser = False\nc.LLMKitApp.standby = 'off'\n"
        f"c.ServerApp.allow_root = {os.geteuid() == 0}\n"
    )
    return made


# -- what is run -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def documented(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JupyterServer]:
    """Give a server to which the pages are new, with an endpoint elsewhere, a hub, and keys in its environment."""
    home = tmp_path_factory.mktemp("hub")
    with MockUpstream(key="sk-mock") as upstream, FakeHub({"Qwen/Qwen3-0.6B": demo_model_path()}) as hub:
        env = {"OPENAI_BASE_URL": upstream.base_url, "OPENAI_API_KEY": "sk-mock", **hub.environment(home)}
        with JupyterServer("lab", env=env) as server:
            yield server


def shell(text: str, server: JupyterServer, cwd: Path, *, stdin: str = "") -> str:
    """Run a block as if typed into a shell that the server is found from; give what it printed."""
    environment = server.client_environment()
    path = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=cwd,
        env={**environment, "PATH": path, "NO_COLOR": "1"},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=LOAD_SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
    return done.stdout


def run_cells(kernel: ServerKernel, page: str) -> list[str]:
    """Run every block of a page as a cell; give what each showed."""
    shown = []
    for cell in CELLS:
        if cell.page == page:
            said = ""
            for kind, content in kernel.messages(cell.text):
                assert kind != "error", (cell, content)
                if kind == "stream":
                    said += content["text"]
                elif kind in ("execute_result", "display_data", "update_display_data"):
                    said += str(content["data"].get("text/markdown") or content["data"]["text/plain"])
            shown.append(said)
    return shown


def documents(text: str) -> list[Any]:
    """Give the JSON documents of a text, one after the other."""
    found, decoder = [], json.JSONDecoder()
    while text := text.lstrip():
        value, used = decoder.raw_decode(text)
        found.append(value)
        text = text[used:]
    return found


@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_every_page_does_what_it_says_from_top_to_bottom(documented: JupyterServer, tmp_path: Path) -> None:
    server, seconds = documented, {}

    def timed(name: str, since: float) -> None:
        seconds[name] = round(time.monotonic() - since, 1)

    with ServerKernel(server.url, server.token) as kernel:
        began = time.monotonic()
        [shown] = run_cells(kernel, "README.md")
        assert ANSWER in shown
        assert "Japan" in shown
        timed("notebook", began)

        began = time.monotonic()
        assert OPENAI.text.count(DOCUMENTED_ORIGIN) == 1
        program = OPENAI.text.replace(DOCUMENTED_ORIGIN, server.url)
        assert shell(f"python -c {shlex.quote(program)}", server, tmp_path) == ANSWER
        timed("OpenAI's client", began)

        began = time.monotonic()
        loaded, answer, listed, got, models, unloaded, deleted = documents(shell(CURL.text, server, tmp_path))
        assert loaded["message"] == "Model loaded successfully"
        assert answer["response"] == ANSWER
        assert got in listed
        assert models == ["demo", "capitals"]
        assert unloaded["freed"]["verified"]
        assert deleted["detail"] == "Configuration deleted successfully"
        timed("curl", began)

        began = time.monotonic()
        _, _, _, magics, _ = run_cells(kernel, "docs/notebooks.md")
        assert "Nairobi" in magics
        assert "Paris" in kernel.run("print(answers, list(frame))")
        timed("docs/notebooks.md", began)

        began = time.monotonic()
        [said] = run_cells(kernel, "docs/lifecycle.md")
        first, *imported = said.splitlines()
        assert first, "the engine's log begins with an empty line"
        assert [line.split() for line in imported] == [[name, "unchanged"] for name in ("demo", "mini", "llama")]
        written = kernel.run("import os; print(*os.listdir())").split()
        assert {"models.json", ".llmkit"} <= set(written)
        timed("docs/lifecycle.md", began)

        began = time.monotonic()
        said = shell(TERMINAL.text, server, REPOSITORY, stdin="/exit\n")
        assert ANSWER in said
        assert "Qwen3-0.6B" in said
        status = server.request("GET", "llm/models/demo").json()["status"]
        assert status == "unloaded"
        shell(KEYS.text, server, tmp_path)
        timed("terminal", began)

        answer = server.request("POST", "llm/inference/", json={"model_id": "demo", "prompt": "Hello"})
        assert answer.status_code == 409
        assert_says(answer.json(), json.loads(ERROR.text))

    print(f"\nthe pages, run: {seconds}")


def assert_says(answer: Any, written: Any) -> None:
    """An answer is as it is written, where `...` stands for what is left out."""
    if isinstance(written, dict):
        for key, value in written.items():
            if key != "...":
                assert_says(answer[key], value)
    else:
        assert re.fullmatch(".+".join(map(re.escape, str(written).split("..."))), str(answer)), (answer, written)


def test_models_for_several_devices_and_for_a_cluster_are_configured_as_written() -> None:
    several, cluster, placed = (one.text for one in SCALING)
    config = Config()
    exec(cluster, {"c": config})  # noqa: S102  # as Jupyter reads it
    assert config.LLMKitApp.keys() == {"ray_address", "ray_http_url"}
    server = JupyterServer("llmkit")
    (server.folder / "config" / "jupyter_llmkit_config.py").write_text(cluster)
    with server, connect(server.url, server.token) as client:
        exec(several + placed, {"client": client})  # noqa: S102  # as a cell runs it
        assert [one.model_id for one in client.configurations()] == ["big", "busy", "shared"]


def test_the_settings_of_an_operator_are_obeyed() -> None:
    text = "\n".join(one.text for one in SETTINGS)
    config = Config()
    exec(text, {"c": config})  # noqa: S102  # as Jupyter reads it
    taken = LLMKitApp(config=config)
    for name, value in config.LLMKitApp.items():
        assert getattr(taken, name) == value
    server = JupyterServer("llmkit", env={"OPENAI_API_KEY": "sk-of-the-server"})
    (server.folder / "config" / "jupyter_llmkit_config.py").write_text(text)
    with server:
        [declared] = server.request("GET", "llm/configurations/").json()
        assert (declared["model_id"], declared["declared"]) == ("demo", True)
        # The token belongs to nobody whom the settings name as an operator.
        body = {"model_id": "a", "model_name": "gpt-4o", "model_type": "openai"}
        assert server.request("POST", "llm/configure_model/", json=body).status_code == 403
