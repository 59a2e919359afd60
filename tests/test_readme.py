"""README and the pages of docs: every block of code in them is run as it stands, every table compared with the code.

The programs are real ones: a Jupyter server, vLLM with the demo model, kernels, shells. What is elsewhere is played
here: a hub of models, and an endpoint with OpenAI's.
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
from typing import Any, NamedTuple, get_args

import httpx
import pytest
from bare_environment import BareEnvironment, published
from fake_hub import FakeHub
from kernels import ServerKernel
from mock_upstream import MockUpstream
from support import ANSWER, LOAD_SECONDS, REPOSITORY, STOP_SECONDS, JupyterServer, own_environment, wait_until
from test_docs import parse, tokens
from traitlets import Undefined
from traitlets.config import Config

import llmkit
from jupyter_server_ext.app import LLMKitApp
from jupyter_server_ext.handlers import ROUTES
from jupyter_server_ext.openapi import document
from llmkit import errors
from llmkit.client import Client
from llmkit.demo import demo_model_path
from llmkit.schemas import Status

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="engines are kept on Linux only")

PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((REPOSITORY / "docs").glob("*.md")))]
SPEC = (REPOSITORY / "tests" / "data" / "llm_api.md").read_text(encoding="utf-8")
DOCUMENTED_ORIGIN = "http://127.0.0.1:8105/"


class Block(NamedTuple):
    """A block of code, by the heading that it stands under."""

    page: str
    heading: str
    language: str
    text: str


class Table(NamedTuple):
    """A table, by the heading that it stands under; each row a list of Markdown."""

    page: str
    heading: str
    rows: list[list[str]]


def read(page: str) -> str:
    return (REPOSITORY / page).read_text(encoding="utf-8")


def contents(page: str) -> Iterator[Block | Table]:
    """Give the blocks and tables of a page, in their order."""
    heading, found = "", parse(read(page))
    for index, token in enumerate(found):
        if token.type == "heading_open":
            heading = found[index + 1].content
        elif token.type in ("fence", "code_block"):
            yield Block(page, heading, token.info, token.content)
        elif token.type == "table_open":
            end = next(i for i in range(index, len(found)) if found[i].type == "table_close")
            rows: list[list[str]] = []
            for one in found[index:end]:
                if one.type == "tr_open":
                    rows.append([])
                elif one.type == "inline":
                    rows[-1].append(one.content)
            yield Table(page, heading, rows)


BLOCKS = [one for page in PAGES for one in contents(page) if isinstance(one, Block)]
TABLES = [one for page in PAGES for one in contents(page) if isinstance(one, Table)]


def block(page: str, heading: str, language: str, number: int = 0) -> Block:
    found = [one for one in BLOCKS if (one.page, one.heading, one.language) == (page, heading, language)]
    return found[number]


def table(page: str, heading: str, number: int = 0) -> list[list[str]]:
    return [one for one in TABLES if (one.page, one.heading) == (page, heading)][number].rows


CLONE = block("README.md", "Two commands", "bash")
INSTALL = block("README.md", "Two commands", "bash", 1)
OPENAI = block("README.md", "With any OpenAI client", "python")
CURL = block("README.md", "With curl", "bash")
TERMINAL = block("README.md", "In a terminal", "bash")
ERROR = block("docs/http.md", "The HTTP API", "json")
SETTINGS = [one for one in BLOCKS if one.page == "docs/operators.md" and one.language == "python"]
KEYS = block("docs/operators.md", "Keys for tools", "bash")
CELLS = [one for one in BLOCKS if one.language == "python" and one not in (OPENAI, *SETTINGS)]


def test_every_block_is_run_by_a_test_of_this_module() -> None:
    run = [CLONE, INSTALL, OPENAI, CURL, TERMINAL, ERROR, *SETTINGS, KEYS, *CELLS]
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


# -- what is said ------------------------------------------------------------------------------------------


def plain(markdown: str) -> list[str]:
    """Give the pieces of code of a cell."""
    return re.findall(r"`([^`]+)`", markdown)


def test_the_eight_endpoints_are_those_of_the_specification_and_curl_calls_them_in_this_order() -> None:
    rows = table("README.md", "With curl")[1:]
    written = [(method, path) for _, cell, _ in rows for method, path in [plain(cell)[0].split()]]
    assert [row[0] for row in rows] == [str(number) for number in range(1, 9)]
    assert sorted(written) == sorted(re.findall(r"^#### `(\w+) (\S+)`", SPEC, re.MULTILINE))
    called = []
    for line in re.findall(r"curl -s[^\n]*", CURL.text):
        method = re.search(r"-X (\w+)", line)
        path = re.search(r"\$URL(\S+)", line)
        assert path
        named = path[1].replace("$CONFIG_ID", "{config_id}").replace("/capitals", "/{model_id}")
        called.append((method[1] if method else "GET", named))
    assert called == written


def test_every_operation_of_the_router_is_in_the_table_of_endpoints() -> None:
    made = document(ROUTES, "/", ("openai", "vllm"))
    served = {(method.upper(), path.rstrip("/")) for path, methods in made["paths"].items() for method in methods}
    written = set()
    for cell, _ in table("docs/http.md", "The HTTP API")[1:]:
        for code in plain(cell):
            methods, path = code.rsplit(" ", 1)
            written |= {(method, path.rstrip("/")) for method in methods.split(", ")}
    assert written == served


DEFAULTS = {
    # What a computed or a missing default is called in the table.
    "state_dir": "`LLMKIT_STATE_DIR`, else `llmkit` in Jupyter's data folder",
    "run_dir": "`LLMKIT_RUN_DIR`, else `/tmp/llmkit-UID`",
    "max_loaded_models": "0, no limit",
    "idle_ttl": "never",
    "max_idle_ttl": "no limit",
    "engine_niceness": "15 on the CPU, 0 on GPUs",
    "allowed_model_names": "all",
    "allowed_base_urls": "all",
}
REAL = {"max_loaded_models": 0, "idle_ttl": -1.0, "max_idle_ttl": None, "engine_niceness": None}
"""The real defaults of those above that are values."""


def test_every_setting_is_in_the_table_with_its_default() -> None:
    traits = {name: trait for name, trait in LLMKitApp.class_own_traits(config=True).items() if name != "owner_pid"}
    written = {}
    for names, default, meaning in table("docs/operators.md", "Settings")[1:]:
        assert meaning
        defaults = default.split(", ") if len(plain(names)) > 1 else [default]
        if len(defaults) == 1:
            defaults *= len(plain(names))
        written |= dict(zip(plain(names), defaults, strict=True))
    assert written.keys() == traits.keys()
    for name, said in written.items():
        value = traits[name].default_value
        if name in DEFAULTS:
            assert said == DEFAULTS[name]
            assert value in (REAL.get(name, value), Undefined, "")
        else:
            assert said == spoken(value), name


def spoken(value: Any) -> str:
    """Say a default as the table says it."""
    if value is Undefined or value in ([], {}):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return f"`{value}`"
    return f"{value >> 20} MiB" if isinstance(value, int) and value >= 1 << 20 else f"{value:g}"


def test_a_models_states_are_all_in_the_table() -> None:
    rows = table("docs/lifecycle.md", "What a call does in each state")
    assert [plain(row[0])[0] for row in rows[1:]] == list(get_args(Status))


def test_what_the_pages_name_exists() -> None:
    """Names in running text, which no block runs."""
    modules = [*(REPOSITORY / "llmkit").rglob("*.py"), *(REPOSITORY / "jupyter_server_ext").rglob("*.py")]
    code = "".join(path.read_text(encoding="utf-8") for path in modules)
    targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    commands = subprocess.run(
        [sys.executable, "-m", "llmkit", "--help"], env=own_environment(), capture_output=True, text=True, check=True
    ).stdout
    checked = 0
    for page in PAGES:
        for word in (token.content for token in tokens(read(page)) if token.type == "code_inline"):
            for pattern, exists in (
                (r"make ([a-z-]+)\b.*", lambda name: name in targets),
                (r"client\.(\w+).*", lambda name: hasattr(Client, name)),
                (r"llmkit\.(\w+)\(.*", lambda name: name in llmkit.__all__),
                (r"c\.LLMKitApp\.(\w+)", lambda name: name in LLMKitApp.class_trait_names(config=True)),
                (r"llmkit ([a-z]+)\b.*", lambda name: re.search(rf"^ +{name} ", commands, re.MULTILINE) is not None),
                (r"((?:LLMKIT|OPENAI)_[A-Z_]+)=?.*", lambda name: name in code),
                (r"(X-\w+-\w+).*", lambda name: name in code),
            ):
                if found := re.fullmatch(pattern, word):
                    checked += 1
                    assert exists(found[1]), f"{page}: {word}"
    assert checked >= 30


def test_codes_of_errors_that_the_pages_name_exist() -> None:
    codes = {error.code for error in errors.walk()}
    said = {
        row[0].strip("`")
        for row in table("README.md", "When something is wrong")[1:]
        if re.fullmatch("`[a-z_]+`", row[0])
    }
    assert said
    assert said <= codes


@pytest.mark.parametrize(
    ("words", "status"),
    [(["--version"], 0), (["ps", "--url", "http://127.0.0.1:9/"], 1), (["load"], 2), (["check", "no-such-file"], 2)],
)
def test_exit_statuses_are_as_said(words: list[str], status: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llmkit", *words], env=own_environment(), capture_output=True, check=False
    )
    assert done.returncode == status, done.stderr
    assert f"{status} " in read("README.md").split("Exit status:")[1].split("\n\n")[0]


RESULTS = "tests/benchmarks/results/RESULTS.md"
RELAYS = {
    "the least relay behind Jupyter's authentication": "bare",
    "**llmkit**": "llmkit",
    "jupyter-server-proxy 4": "jupyter-server-proxy",
    "LiteLLM proxy": "litellm",
}
LOADS = {
    "`vllm serve`, the same flags": "vllm serve",
    "llmkit, without a standby": "llmkit, without a standby",
    "**llmkit, with a standby**": "llmkit, standby",
    "llmkit, another model unloaded first": "llmkit, standby, another model unloaded first",
}


def measured(heading: str) -> dict[str, list[str]]:
    """Give the rows of a table of results, by their first column."""
    [found] = [one for one in contents(RESULTS) if isinstance(one, Table) and one.heading == heading]
    return {row[0]: row[1:] for row in found.rows[1:]}


def number(cell: str) -> float:
    return float(re.sub(r"[*, a-zA-Z]", "", cell))


def about(said: str) -> Any:
    """A figure is as measured, but for the digits that are left out."""
    digits = len(said.strip("*").replace(",", "").partition(".")[2].split(" ")[0])
    return pytest.approx(number(said), abs=0.5 * 10**-digits + 1e-9)


def test_the_figures_are_those_of_the_benchmarks() -> None:
    whole = measured("Relay: whole answers, 16 clients")
    fast = measured("Relay: streams of 64 chunks, as fast as they come, 16 clients")
    slow = measured("Relay: streams of 64 chunks, 5 ms apart, 16 clients")
    rows = table("README.md", "Speed")[1:]
    assert [row[0] for row in rows] == list(RELAYS)
    for name, requests, cpu, streams, chunk in rows:
        contender = RELAYS[name]
        assert number(whole[contender][0]) == about(requests)
        assert number(whole[contender][6]) == about(cpu)
        assert number(fast[contender][0]) == about(streams)
        assert number(slow[contender][6]) == about(chunk)
    loads = measured("Loads: seconds until the engine answers, and what it holds")
    rows = table("README.md", "Speed", 1)[1:]
    assert [row[0] for row in rows] == list(LOADS)
    for name, seconds, ratio, memory in rows:
        found = loads[LOADS[name]]
        assert number(found[0]) == about(seconds)
        assert number(found[2]) == about(ratio)
        assert number(found[3]) == about(memory)
    assert f"{loads['a standby that waits'][3]} MiB while it waits" in read("README.md")


def test_the_table_of_peers_is_whole() -> None:
    head, *rows = table("README.md", "Beside others")
    assert head[1] == "llmkit"
    assert all(len(row) == len(head) and all(row) for row in rows)
    assert all(row[1] != "-" for row in rows), "what llmkit has not is no feature of it"
