"""What advisories of other servers teach, each lesson as a test against a real server.

What stands with the code that it is about is named in `test_named.py`.
"""

from __future__ import annotations

import ast
import hashlib
import http.client
import json
import os
import re
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from relayed import Relayed, relayed
from support import REPOSITORY, JupyterServer

from jupyter_server_ext.handlers import ROUTES
from llmkit.inference.openai_api import FORBIDDEN

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="engines are kept on Linux only")

READ_WORDS_OF_OTHERS = {
    "jupyter_server_ext/handlers/base.py",  # finds a number that could overflow, anywhere in a body
    "jupyter_server_ext/openapi.py",  # reads our own routes
    "llmkit/cli/system.py",
    "llmkit/client/markdown.py",  # asks whether an answer could load anything, to leave most as they are
    "llmkit/engines/refusals.py",
    "llmkit/engines/vllm/failures.py",
    "llmkit/engines/vllm/progress.py",
    "llmkit/engines/vllm/warm.py",
    "llmkit/inference/relay.py",
    "llmkit/process/devices.py",
}
"""Modules that look for words in logs, answers and files; what decides whether something is allowed is `fullmatch`."""

CANARY = "Zq9canary7Xw"
APIS = ("v1", "inference")


@pytest.fixture(scope="module")
def running() -> Iterator[Relayed]:
    """Give a server with a model elsewhere, `m`, and one whose engine is its own, `ours`."""
    with relayed(plugin=True) as found:
        config_id = found.server.configure("ours", model_name="any --tokens-per-second=1000", model_type="fake")
        found.server.load(config_id)
        yield found


def ask(running: Relayed, api: str, model_id: str, messages: Any = None, **kwargs: Any) -> Any:
    """Ask a model with parameters, in one of both ways."""
    if api == "v1":
        body = {"model": model_id, "messages": messages or [{"role": "user", "content": "plain"}], **kwargs}
        return running.server.request("POST", "llm/v1/chat/completions", json=body)
    body = {"model_id": model_id, "prompt": "plain", "inference_kwargs": kwargs}
    if messages is not None:
        body["inference_kwargs"] = {**kwargs, "messages": messages}
    return running.server.request("POST", "llm/inference/", json=body)


def param_of(api: str, name: str) -> str:
    return name if api == "v1" else f"inference_kwargs.{name}"


# -- secrets and addresses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [f"https://user:{CANARY}@h/v1", f"https://{CANARY}@h/v1", f"https://h/v1?key={CANARY}", f"https://h/v1#{CANARY}"],
)
def test_a_secret_in_an_address_is_refused_and_not_repeated(running: Relayed, url: str) -> None:
    body = {"model_id": "x", "model_name": "y", "model_type": "openai", "model_kwargs": {"base_url": url}}
    answer = running.server.request("POST", "llm/configure_model/", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "model_kwargs.base_url")
    assert CANARY not in answer.text
    assert CANARY not in running.server.log


# -- what is not a request's to give -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "trust_remote_code", "trust-remote-code", "config", "middleware", "worker_cls", "worker_extension_cls",
        "logits_processors", "model_impl", "plugins", "log_config_file", "uvicorn_log_config", "executable", "command",
        "download_dir", "allowed_local_media_path", "allowed_media_domains", "chat_template", "tool_parser_plugin",
        "reasoning_parser_plugin", "enable_prompt_embeds", "media_io_kwargs", "mm_processor_kwargs", "hf_overrides",
        "speculative_config", "host", "port", "api_key", "ssl_keyfile", "lora_modules", "kv_transfer_config",
    ],
)  # fmt: skip
@pytest.mark.parametrize("nested", [False, True])
def test_code_files_and_listeners_cannot_be_asked_for(running: Relayed, name: str, nested: bool) -> None:
    kwargs = {name: "x"}
    body = {
        "model_id": "x",
        "model_name": "y",
        "model_type": "fake",
        "model_kwargs": {"engine": kwargs} if nested else kwargs,
    }
    answer = running.server.request("POST", "llm/configure_model/", json=body)
    assert answer.status_code in (403, 422), answer.text
    assert name in answer.json()["error"]["param"]


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("name", sorted(FORBIDDEN))
def test_a_request_cannot_change_how_the_engine_reads_or_renders(running: Relayed, api: str, name: str) -> None:
    asked = running.upstream.counts()["asked"]
    answer = ask(running, api, "m", **{name: {"a": "b"}})
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, param_of(api, name))
    assert running.upstream.counts()["asked"] == asked


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize(
    ("kwargs", "path"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"pattern": "(a+)+$"}}}},
         "response_format.json_schema.schema.pattern"),
        ({"guided_regex": "((x{1,999}){1,999}){1,999}"}, "guided_regex"),
        ({"structured_outputs": {"json": {"$ref": "http://127.0.0.1:9/"}}}, "structured_outputs.json.$ref"),
        ({"structured_outputs": {"grammar": "(" * 1000}}, "structured_outputs.grammar"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"pattern": "a" * 9000}}}]},
         "tools.0.function.parameters.pattern"),
        ({"guided_choice": ["x"] * 60_000}, "guided_choice"),
    ],
)  # fmt: skip
def test_no_schema_or_pattern_keeps_the_engine_busy(
    running: Relayed, api: str, kwargs: dict[str, Any], path: str
) -> None:
    for model_id in ("m", "ours"):
        answer = ask(running, api, model_id, **kwargs)
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, param_of(api, path))
    assert ask(running, api, "ours", response_format={"type": "json_object"}).status_code == 200


@pytest.mark.parametrize("place", ["", "generation."])
def test_no_schema_of_a_configuration_keeps_the_engine_busy(running: Relayed, place: str) -> None:
    told = {"response_format": {"type": "json_schema", "json_schema": {"schema": {"pattern": "(a+)+$"}}}}
    body = {"model_id": "tangled", "model_name": "gpt-3", "model_type": "openai"}
    # A flat default beside a nested one: each error names its own place.
    other = {"seed": 1} if place else {"generation": {"seed": 1}}
    kwargs = {"base_url": running.upstream.base_url, **other, **({"generation": told} if place else told)}
    answer = running.server.request("POST", "llm/configure_model/", json={**body, "model_kwargs": kwargs})
    path = f"model_kwargs.{place}response_format.json_schema.schema.pattern"
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, path)


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("kind", ["image_url", "audio_url", "video_url"])
def test_the_engine_fetches_nothing_that_a_request_names(running: Relayed, api: str, kind: str) -> None:
    def told(url: str, model_id: str) -> Any:
        return ask(running, api, model_id, [{"role": "user", "content": [{"type": kind, kind: {"url": url}}]}])

    for url in (f"{running.server.url}api", "file:///etc/passwd", "ftp://127.0.0.1/"):
        answer = told(url, "ours")
        assert answer.status_code == 422, answer.text
        assert answer.json()["error"]["param"] == param_of(api, f"messages.0.content.0.{kind}")
    assert told("file:///etc/passwd", "m").status_code == 422
    assert told("data:image/png;base64,aGk=", "ours").status_code == 200


@pytest.mark.parametrize("api", APIS)
def test_the_server_makes_the_id_of_a_request(running: Relayed, api: str) -> None:
    running.server._http.headers["X-Request-Id"] = CANARY
    try:
        answer = ask(running, api, "ours")
    finally:
        del running.server._http.headers["X-Request-Id"]
    assert answer.status_code == 200
    assert answer.headers["X-Request-Id"] != CANARY
    assert CANARY not in json.dumps(running.records(5))


# -- ids, words and logs -----------------------------------------------------------------------------------


def test_an_id_becomes_no_path_and_no_argument_of_its_own(running: Relayed) -> None:
    name = "x..y@z:--w"
    config_id = running.server.configure(name, model_name="any", model_type="fake")
    running.server.load(config_id)
    try:
        for folder in (running.server.run_dir, running.server.state_dir):
            assert not [path for path in folder.rglob("*") if "x..y" in str(path) or "--w" in str(path)]
        words = [word for process in running.server.engine_processes() for word in process.cmdline() if name in word]
        assert words
        assert all(re.fullmatch(r"--[a-z-]+=" + re.escape(name), word) for word in words), words
    finally:
        assert running.server.request("DELETE", f"llm/configuration/{config_id}?unload=true").status_code == 200


def test_what_a_client_says_is_cut_and_escaped_in_the_log(running: Relayed) -> None:
    before = len(running.server.log)
    long, escape = "x" * 20_000, "\x1b[31m\x07\x85\u00e9"
    for line in (f"GET {{}}llm/{long}{CANARY}", f"GET {{}}llm/{escape}", f"POST {{}}llm/load_model/{long}?x={long}"):
        raw(running, line.format(running.server.base_url).encode("latin-1"), ("User-Agent", long), ("Referer", escape))
    body = {"model_id": f"{long}\x1b[31m", "model_name": f"\x1b[31m{CANARY}", "model_type": long}
    assert running.server.request("POST", "llm/configure_model/", json=body).status_code == 422
    written = running.server.log[before:]
    assert max(map(len, written.splitlines()), default=0) < 4000
    assert CANARY not in written
    assert [line for line in written.split("\n") if not line.replace("\t", " ").isprintable()] == []


def raw(running: Relayed, line: bytes, *headers: tuple[str, str]) -> bytes:
    """Send a request whose first line is these bytes; give the first line of the answer."""
    head = [line + b" HTTP/1.1", b"Host: 127.0.0.1", f"Authorization: token {running.server.token}".encode()]
    head += [f"{name}: {value}".encode("latin-1") for name, value in headers]
    with socket.create_connection(("127.0.0.1", running.port), 20) as connection:
        connection.sendall(b"\r\n".join([*head, b"Content-Length: 0", b"Connection: close", b"", b""]))
        return connection.makefile("rb").readline()


def test_what_is_allowed_is_decided_by_whole_matches() -> None:
    """`match` and `search` let pass what only begins well; they are for reading logs and answers."""
    for place in ("llmkit", "jupyter_server_ext"):
        for file in (REPOSITORY / place).rglob("*.py"):
            name = str(file.relative_to(REPOSITORY))
            calls = [
                node.lineno
                for node in ast.walk(ast.parse(file.read_text()))
                if isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("match", "search")
            ]
            assert not calls or name in READ_WORDS_OF_OTHERS, f"{name}, lines {calls}: use fullmatch"


# -- HTTP --------------------------------------------------------------------------------------------------


def paths(config_id: str) -> list[str]:
    """Give every route's path, with ids that exist where it takes one."""
    found = []
    for pattern, _ in ROUTES:
        place = config_id if "configuration" in pattern or "load_model" in pattern else "ours"
        path = pattern.replace("([^/]+)", place).replace("(?:/.*)?", "/no/such").removesuffix("/?")
        choice = re.search(r"\((.*)\)", path)
        found += [path] if choice is None else [path.replace(choice[0], one) for one in choice[1].split("|")]
    assert len(found) >= len(ROUTES)
    return found


def config_of(running: Relayed) -> str:
    listed = running.server.request("GET", "llm/configurations/").json()
    found = listed if isinstance(listed, list) else listed["configurations"]
    return str(next(one["config_id"] for one in found if one["model_id"] == "ours"))


def test_no_get_changes_anything(running: Relayed) -> None:
    every = paths(config_of(running))

    def state() -> dict[str, Any]:
        files = {
            str(path): hashlib.sha256(path.read_bytes()).hexdigest()
            for folder in (running.server.state_dir, running.server.root_dir)
            for path in folder.rglob("*")
            if path.is_file() and not path.name.endswith("-shm")  # of readers, too
        }
        listed = {path: running.server.request("GET", f"llm/{path}/").json() for path in ("configurations", "requests")}
        told = running.server.request("GET", "llm/models/").json()
        models = [{name: one[name] for name in ("model_id", "status", "loaded_at")} for one in told["models"]]
        entries = sorted(str(path) for path in running.server.run_dir.rglob("*"))
        return {"files": files, **listed, "revision": told["revision"], "models": models, "entries": entries}

    before = state()
    for path in every:
        for query in ("", "?dry_run=false", "?unload=true&wait=true", "?body=%7B%22model_id%22%3A%22z%22%7D"):
            answer = running.server.request("GET", path[1:] + query, headers={"Accept": "*/*"})
            assert answer.status_code in (200, 400, 404, 405, 422), f"{path}: {answer.text}"
    after = state()
    for name, value in before.items():
        if name == "files":
            changed = {file for file in value.keys() | after[name].keys() if value.get(file) != after[name].get(file)}
            assert not changed
        assert after[name] == value, name
    print(f"\n{len(every)} routes by GET: revision, store and files are as before")


@pytest.mark.parametrize("token", [True, False])
def test_no_path_under_llm_is_a_redirect(running: Relayed, token: bool) -> None:
    headers = {"Authorization": f"token {running.server.token}"} if token else {}
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
    asked = 0
    for path in paths(config_of(running)):
        for odd in (
            "{}",
            "{}/",
            "{}//",
            "{}///",
            "{}/.",
            "{}/..",
            "{}%2f",
            "{}/%2e%2e/",
            "{}/?x=/",
            "{}\\",
            "{}/..//evil",
        ):
            target = odd.format(path)
            for place in (target, target.replace("/llm/", "/llm//", 1), target.replace("/llm/", "/llm/./", 1)):
                connection.request("GET", running.server.base_url.rstrip("/") + place, headers=headers)
                answer = connection.getresponse()
                words = answer.read()
                assert not 300 <= answer.status < 400, (place, answer.status, answer.headers["Location"])
                assert answer.headers["Location"] is None, place
                assert answer.status in (200, 400, 403, 404, 405, 422), (place, answer.status, words)
                asked += 1
    connection.close()
    print(f"\n{asked} paths, no redirect")


# -- files -------------------------------------------------------------------------------------------------


def test_files_are_for_their_user_alone(running: Relayed) -> None:
    kwargs = {"api_key": CANARY, "base_url": running.upstream.base_url}
    config_id = running.server.configure("keyed", model_name="x", model_type="openai", model_kwargs=kwargs)
    body = {"title": "t", "turns": []}
    assert running.server.request("PUT", "llm/conversations/lesson", json=body).status_code == 200
    wrong = []
    found = 0
    for folder in (running.server.state_dir, running.server.run_dir):
        for path in (folder, *folder.rglob("*")):
            mode = path.lstat().st_mode
            guarded = stat.S_IMODE(mode) & 0o077 == 0
            found += 1
            # Below a folder that nobody else can enter, an engine's own files may be as it makes them.
            if not guarded and (stat.S_ISDIR(mode) or path.is_relative_to(running.server.state_dir)):
                wrong.append(f"{path}: {stat.filemode(mode)}")
    assert running.server.request("DELETE", f"llm/configuration/{config_id}").status_code == 200
    assert not wrong, wrong
    assert found > 8


def test_keys_are_never_among_the_files_that_the_server_serves(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with JupyterServer(root_dir=root, state_dir=root / "state") as server:
        answer = server.request("GET", "llm/health")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
        assert "LLMKIT_STATE_DIR" in answer.json()["error"]["hint"]
        assert not (root / "state").exists()
        assert server.request("GET", "api/contents").status_code == 200  # the notebooks are served all the same


def test_a_hidden_folder_may_hold_keys_and_logs_among_the_files_are_warned_of(tmp_path: Path) -> None:
    root = Path(os.environ["LLMKIT_RUN_DIR"]) / "root"
    root.mkdir()
    with JupyterServer(root_dir=root, state_dir=root / ".state", env={"LLMKIT_RUN_DIR": str(root / "run")}) as server:
        assert server.request("GET", "llm/health").json()["status"] == "ok"
        assert "LLMKIT_RUN_DIR" in server.log
        for place in (".state/llmkit.sqlite", ".state"):
            assert server.request("GET", f"files/{place}").status_code in (403, 404)
            assert server.request("GET", f"api/contents/{place}").status_code in (403, 404)
