"""README and the pages of docs: what their tables and names say is what the code does."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any, get_args

import pytest
from pages import PAGES, Table, block, contents, plain, read, table
from support import REPOSITORY, own_environment
from test_docs import tokens
from traitlets import Undefined

import llmkit
from jupyter_server_ext.app import LLMKitApp
from jupyter_server_ext.handlers import ROUTES
from jupyter_server_ext.openapi import document
from llmkit import errors
from llmkit.client import Client
from llmkit.schemas import Status

SPEC = (REPOSITORY / "tests" / "data" / "llm_api.md").read_text(encoding="utf-8")
CURL = block("README.md", "With curl", "bash")


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
    if value is Undefined or value in ([], {}, ""):
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
