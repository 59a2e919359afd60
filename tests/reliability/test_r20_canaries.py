"""R20: a canary in every secret field is nowhere but in the file of secrets, in whatever form it is looked for."""

from __future__ import annotations

import base64
import contextlib
import json
import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pytest
import websocket
from aiohttp import web
from fake_engine_type import PLUGIN
from ipywidgets.widgets.widget import _instances
from mock_upstream import MockUpstream
from support import DEMO, QUESTION, JupyterServer, wait_until

from jupyter_server_ext.handlers import ROUTES
from llmkit.client import connect
from llmkit.errors import LLMKitError
from llmkit.panel import Panel

KEPT = "secrets"
"""The folder below the state's in which raw keys may lie."""
PROXY = "password of a proxy"
"""An engine needs it for its downloads: it has it in its environment, which its account alone can read."""


def new_canary() -> str:
    """Make a key with all characters that somebody escapes."""
    return f"{secrets.token_hex(12)}/+\"'<&>\\%=?{secrets.token_hex(12)}"


def forms(canary: str) -> dict[str, bytes]:
    """Give what a canary is looked for as; escaped in whatever way, its ends stay as they are."""
    found = {
        "raw": canary,
        "URL": quote(canary, safe=""),
        "JSON": json.dumps(canary)[1:-1],
        "hex": canary.encode().hex(),
        "hex of its first 8": canary[:8].encode().hex(),
        "first 8": canary[:8],
        "last 8": canary[-8:],
    }
    for shift in range(3):  # wherever it begins within a longer text
        whole = base64.b64encode(b"\0" * shift + canary.encode())
        found[f"base64 {shift}"] = whole[4 if shift else 0 : len(whole) - 4].decode()
        found[f"base64url {shift}"] = found[f"base64 {shift}"].translate(str.maketrans("+/", "-_"))
    return {name: form.encode() for name, form in found.items()}


@dataclass
class Search:
    """Canaries by the field that they were put into, and all that was looked at."""

    canaries: dict[str, str]
    looked_at: int = 0
    bytes_read: int = 0
    hits: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._forms = {name: forms(canary) for name, canary in self.canaries.items()}

    def look(self, where: str, text: bytes | str, *, but: frozenset[str] = frozenset()) -> None:
        """Look for every canary in every form, but for some."""
        data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
        self.looked_at += 1
        self.bytes_read += len(data)
        for name in self._forms.keys() - but:
            its_forms = self._forms[name]
            self.hits += [f"{name} as {form} in {where}" for form, what in its_forms.items() if what in data]

    def look_below(self, folder: Path, *, skip: Path | None = None) -> None:
        """Look into every file below a folder, and at its name."""
        for path in folder.rglob("*"):
            if skip is not None and path.is_relative_to(skip):
                continue
            self.look(f"the name of {path}", str(path))
            if path.is_file() and not path.is_symlink():
                with contextlib.suppress(FileNotFoundError):
                    self.look(str(path), path.read_bytes())

    def look_at_processes(self, processes: list[psutil.Process], *, but: frozenset[str] = frozenset()) -> int:
        """Look at arguments and environments, as another program can; give how many there were."""
        seen = 0
        for process in processes:
            with contextlib.suppress(OSError):
                place = Path(f"/proc/{process.pid}")
                self.look(f"argv of {process.pid}", (place / "cmdline").read_bytes())
                self.look(f"environ of {process.pid}", (place / "environ").read_bytes(), but=but)
                seen += 1
        return seen

    def told(self) -> str:
        return (
            f"{len(self.canaries)} canaries x {len(forms('x' * 20))} forms in {self.looked_at} answers, files and "
            f"processes ({self.bytes_read / 1e6:.1f} MB): {len(self.hits)} hits"
        )


def test_r20_the_search_finds_what_it_looks_for() -> None:
    canary = new_canary()
    ways: dict[str, Callable[[str], bytes]] = {
        "plain": str.encode,
        "JSON": lambda text: json.dumps({"key": text}).encode(),
        "URL": lambda text: quote(text, safe="").encode(),
        "base64": lambda text: base64.b64encode(f"user:{text}".encode()),
        "base64url": lambda text: base64.urlsafe_b64encode(f"Bearer {text}".encode()),
        "hex": lambda text: text.encode().hex().encode(),
        "cut": lambda text: f"{text[:8]}...".encode(),
        "its end": lambda text: f"...{text[-8:]}".encode(),
        "repr": lambda text: repr(text).encode(),
    }
    for name, way in ways.items():
        search = Search({"key": canary})
        search.look(name, b"before " + way(canary) + b" after")
        assert search.hits, name
        other = Search({"key": new_canary()})
        other.look(name, way(canary))
        assert other.hits == [], name


# -- a server with a canary in every field ---------------------------------------------------------------------------


@dataclass
class Told:
    """What came over the events' websocket."""

    frames: list[str] = field(default_factory=list)


@contextlib.contextmanager
def listening(server: JupyterServer) -> Iterator[Told]:
    """Collect every event."""
    told = Told()
    opened = websocket.create_connection(
        "ws" + server.url.removeprefix("http") + "api/events/subscribe",
        header={"Authorization": f"token {server.token}"},
        suppress_origin=True,
        http_no_proxy=["*"],
        timeout=30,
    )

    def read() -> None:
        with contextlib.suppress(OSError, websocket.WebSocketException):
            while frame := opened.recv():
                told.frames.append(str(frame))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        yield told
    finally:
        opened.shutdown()
        thread.join(10)


async def repeat_the_key(request: web.Request, body: dict[str, Any]) -> web.StreamResponse | None:
    """Do what a careless endpoint does: tell the key in errors, in headers, in answers and in streams."""
    key = request.headers.get("Authorization", "").removeprefix("Bearer ")
    prompt = json.dumps(body.get("messages") or body.get("prompt") or "")
    headers = {"X-Request-Id": key, "OpenAI-Organization": key}
    for status in (400, 401, 403, 404, 429, 500, 503):
        if f"fail {status}" in prompt:
            error = {"message": f"Incorrect API key provided: {key}", "param": key, "code": key, "type": key}
            return web.json_response({"error": error}, status=status, headers=headers)
    if "fail in text" in prompt:
        return web.Response(status=502, text=f"<html>Authorization: Bearer {key}</html>", content_type="text/html")
    if "fail within" in prompt and body.get("stream"):
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        event = json.dumps({"error": {"message": f"key {key} is out of credit", "code": 500}})
        await response.write(b"data: " + event.encode() + b"\n\n")
        return response
    return None


FAILURES = [
    *(f"fail {status}" for status in (400, 401, 403, 404, 429, 500, 503)),
    "fail in text",
    "fail within",
    "fine",
]


def refused_bodies(canary: str, base_url: str) -> list[tuple[str, Any]]:
    """Give configurations that must be refused, each with the canary somewhere."""
    wrong: list[dict[str, Any]] = [
        {"base_url": base_url.replace("://", f"://user:{quote(canary, safe='')}@")},
        {"base_url": f"{base_url}?api_key={quote(canary, safe='')}"},
        {"base_url": f"{base_url}#{quote(canary, safe='')}"},
        {"base_url": f"http://{canary}/v1"},
        {"headers": {"Authorization": f"Bearer {canary}"}},
        {"extra_headers": {"X-API-Key": canary}},
        {"Authorization": canary},
        {"apikey": canary},
        {"api_key": [canary]},
        {"api_key": {"value": canary}},
        {"api_key": {"secret": True, "set_at": canary}},
        {"api_key": f"{canary}\n"},
        {"api_key": f"{canary} é"},
        {"api_key": canary * 200},
        {"api_key": f"env:{canary}"},
        {"organization": f"{canary}\r\n"},
        {"timeout": canary},
        {"api": canary},
    ]
    fields = {"model_id": "refused", "model_name": "gpt-3", "model_type": "openai"}
    bodies: list[tuple[str, Any]] = [
        (str(next(iter(kwargs)))[:12], {**fields, "model_kwargs": {"base_url": base_url, **kwargs}}) for kwargs in wrong
    ]
    bodies += [
        ("vllm key", {**fields, "model_type": "vllm", "model_kwargs": {"api_key": canary}}),
        ("vllm option", {**fields, "model_type": "vllm", "model_kwargs": {"hf_token": canary}}),
        ("no such field", {**fields, "api_key": canary}),
    ]
    return bodies


def fake_paths(config_id: str) -> list[str]:
    """Give a path of every route, with ids that are known."""
    paths = []
    for pattern, _ in ROUTES:
        path = pattern.removesuffix("/?").replace("(?:/.*)?", "/no/such")
        if "(chat" in path or "|" in path:
            continue  # those are asked with bodies
        places = ["keyed"] if "model" in path else [config_id, "keyed"]
        places = [config_id] if "load_model" in path else places
        paths += [path.replace("([^/]+)", place) for place in places]
    return [
        *paths,
        "/llm/models/fake/logs",
        "/llm/requests/?limit=1000",
        "/metrics",
        "/api/status",
    ]


@pytest.mark.timeout(300)
def test_r20_no_canary_is_anywhere_but_in_the_file_of_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("raw key", "second key", "key by PUT", "key of a dry run", "refused key", "key of a broken body")
    canaries = {name: new_canary() for name in names}
    variables = {"OPENAI_API_KEY": new_canary(), "OTHER_API_KEY": new_canary(), "UNRELATED_PASSWORD": new_canary()}
    canaries |= {f"variable {name}": value for name, value in variables.items()}
    proxy_password = secrets.token_hex(12)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    env = {**PLUGIN, **variables, "TMPDIR": str(temporary), "HTTPS_PROXY": f"http://user:{proxy_password}@127.0.0.1:1"}
    args = ["--debug", "--LLMKitApp.record_bodies=True"]
    with MockUpstream() as upstream, JupyterServer(args=args, env=env) as server:
        upstream.respond = repeat_the_key
        search = Search({**canaries, "token of the server": server.token, PROXY: proxy_password})

        def ask(method: str, path: str, *, look: bool = True, **more: Any) -> Any:
            answer = server.request(method, path, **more)
            if look:
                search.look(f"{method} {path[:80]}: {answer.status_code}", answer.content)
                search.look(f"headers of {method} {path[:80]}", str(answer.headers))
            return answer

        def body(model_id: str, key: str | None, **more: Any) -> dict[str, Any]:
            kwargs = {"base_url": upstream.base_url, "max_retries": 0, **({"api_key": key} if key else {})}
            return {"model_id": model_id, "model_name": "gpt-3", "model_type": "openai", "model_kwargs": kwargs, **more}

        with listening(server) as told:
            # Keys that are taken.
            made = ask("POST", "llm/configure_model/", json=body("keyed", canaries["raw key"]))
            config_id = made.json()["config_id"]
            ask("POST", "llm/configure_model/", json=body("keyed", canaries["raw key"]))
            assert ask("POST", "llm/configure_model/", json=body("keyed", canaries["second key"])).status_code == 409
            changed = body("keyed", canaries["key by PUT"], description="changed")
            assert ask("PUT", f"llm/configuration/{config_id}", json=changed).status_code == 200
            for path in ("llm/configure_model/", f"llm/configuration/{config_id}"):
                method = "POST" if "configure" in path else "PUT"
                dry = {**body("keyed" if method == "PUT" else "dry", canaries["key of a dry run"])}
                assert ask(method, f"{path}?dry_run=true", json=dry).status_code == 200
            ask("POST", "llm/configure_model/", json=body("named", "env:OTHER_API_KEY"))
            ask(
                "POST",
                "llm/configure_model/",
                json=body("proxied", None) | {"model_kwargs": {"base_url": "https://x.test/v1"}},
            )
            # Keys that are refused.
            refused = refused_bodies(canaries["refused key"], upstream.base_url)
            for name, wrong in refused:
                for path in ("llm/configure_model/", "llm/configure_model/?dry_run=true"):
                    assert ask("POST", path, json=wrong).status_code == 422, name
                assert ask("PUT", f"llm/configuration/{config_id}", json=wrong).status_code in (409, 422), name
            broken = canaries["key of a broken body"]
            for raw in (
                f'{{"api_key": "{broken}',
                f"[{json.dumps(broken)}]",
                json.dumps(broken),
                f'{{"a": NaN, "k": "{broken}"',
            ):
                assert ask("POST", "llm/configure_model/", content=raw.encode()).status_code == 400
            # Loads and questions, with an endpoint that tells the key again and again.
            for model_id in ("keyed", "named"):
                found = next(
                    c for c in server.request("GET", "llm/configurations/").json() if c["model_id"] == model_id
                )
                assert ask("POST", f"llm/load_model/{found['config_id']}").status_code == 200
                for words in FAILURES:
                    for stream in (False, True):
                        messages = [{"role": "user", "content": words}]
                        asked = {"model": model_id, "messages": messages, "stream": stream}
                        ask("POST", "llm/v1/chat/completions", json=asked)
                        kwargs = {"stream": stream}
                        ask(
                            "POST",
                            "llm/inference/",
                            json={"model_id": model_id, "prompt": words, "inference_kwargs": kwargs},
                        )
            upstream.key = "another"
            upstream.respond = None
            ask("POST", "llm/unload_model/keyed")
            assert ask("POST", f"llm/load_model/{config_id}").status_code == 502
            proxied = next(c for c in server.request("GET", "llm/configurations/").json() if c["model_id"] == "proxied")
            assert ask("POST", f"llm/load_model/{proxied['config_id']}").status_code == 502
            # An engine of our own, whose processes everybody on this machine can list.
            fake = {"model_id": "fake", "model_name": "any", "model_type": "fake"}
            fake_id = ask("POST", "llm/configure_model/", json=fake).json()["config_id"]
            assert ask("POST", f"llm/load_model/{fake_id}").status_code == 200
            processes = search.look_at_processes(server.engine_processes(), but=frozenset({PROXY}))
            for path in fake_paths(config_id):
                ask("GET", path)
            look_at_notebook(search, server, monkeypatch)
            wait_until(lambda: told.frames, "events")
        for frame in told.frames:
            search.look("an event", frame)
        assert server.process is not None
        search.look("argv of the server", Path(f"/proc/{server.process.pid}/cmdline").read_bytes())
        for folder in (server.run_dir, temporary, server.root_dir):
            search.look_below(folder)
        search.look_below(server.state_dir, skip=server.state_dir / KEPT)
        kept = [path.read_text() for path in (server.state_dir / KEPT).iterdir()]
        server.stop()
        search.look("the server's log", server.log)
        search.look_below(server.state_dir, skip=server.state_dir / KEPT)
        assert "DEBUG" in server.log or "[D " in server.log
    print(
        f"\nR20: {search.told()}; {len(refused)} refused bodies, {processes} engine processes, "
        f"{len(told.frames)} events"
    )
    assert search.hits == [], "\n".join(search.hits)
    assert processes >= 3
    assert len(kept) == 1
    assert json.loads(kept[0])["value"] == canaries["key by PUT"]


def look_at_notebook(search: Search, server: JupyterServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at what a notebook would save: what objects show of themselves, and the state of every widget."""
    with connect(server.url, server.token) as client:
        shown: list[Any] = [client, *client.configurations(), client.models(), client.health(), client.requests()]
        for call in (
            lambda: client.prompt("keyed", QUESTION),
            lambda: client.load("keyed", progress=False),
            lambda: client.configure("other", "gpt-3", "openai", {"apikey": search.canaries["refused key"]}),
        ):
            with pytest.raises(LLMKitError) as caught:
                call()
            shown.append(caught.value)
        for one in shown:
            search.look(f"repr of {type(one).__name__}", repr(one) + str(one))
            as_html = getattr(one, "_repr_html_", None)
            search.look(f"HTML of {type(one).__name__}", str(as_html()) if as_html else "")
        others = set(_instances)  # of other tests' panels, whose children may be closed already
        panel = Panel(client)
        try:
            wait_until(lambda: panel.prompt is not None, "the panel's tabs", 30)
            ours = {key: widget for key, widget in list(_instances.items()) if key not in others}
            state = {key: repr(widget.get_state()) for key, widget in ours.items()}
        finally:
            panel.close()
    assert len(state) > 50
    notebook = {"cells": [repr(one) for one in shown], "metadata": {"widgets": state}}
    search.look("a saved notebook", json.dumps(notebook))
    (server.root_dir / "saved.ipynb").write_text(json.dumps(notebook))


@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_r20_no_canary_is_in_arguments_environment_or_log_of_a_real_engine(tmp_path: Path) -> None:
    names = ("OPENAI_API_KEY", "OTHER_API_KEY", "AWS_SECRET_ACCESS_KEY", "VLLM_API_KEY")
    canaries = {name: new_canary() for name in names}
    with JupyterServer(env={**canaries, "TMPDIR": str(tmp_path)}, args=["--debug"]) as server:
        search = Search({**canaries, "token of the server": server.token})
        kwargs = {"base_url": "http://127.0.0.1:1/v1", "api_key": new_canary()}
        search = Search({**search.canaries, "raw key": kwargs["api_key"]})
        server.configure("keyed", model_name="gpt-3", model_type="openai", model_kwargs=kwargs)
        server.load(server.configure("m", **DEMO))
        asked = server.request("POST", "llm/inference/", json={"model_id": "m", "prompt": QUESTION})
        assert asked.status_code == 200
        processes = search.look_at_processes(server.engine_processes())
        for path in ("llm/models/m/logs?tail=10000", "llm/models/m/metrics", "metrics", "llm/models/", "llm/devices"):
            search.look(path, server.request("GET", path).content)
        for folder in (server.run_dir, tmp_path, server.root_dir):
            search.look_below(folder)
        search.look_below(server.state_dir, skip=server.state_dir / KEPT)
        search.look("the server's log", server.log)
    print(f"\nR20 with real vLLM: {search.told()}; {processes} engine processes")
    assert search.hits == [], "\n".join(search.hits)
    assert processes >= 4
