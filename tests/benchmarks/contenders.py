"""What is compared: each relay as a running program in front of the same upstream."""

from __future__ import annotations

import contextlib
import json
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from support import JupyterServer, free_port, own_environment

from benchmarks.payloads import MODEL, chat_body
from benchmarks.processes import EXTENSIONS, BenchmarkError, Child, Upstream, family
from benchmarks.venvs import python_of

START_SECONDS = 120.0
NO_TOKEN = "none"
HOST = "127.0.0.1"
LLMKIT_PATH = "llm/v1/chat/completions"
BARE_PATH = "bench/v1/chat/completions"
LLMKIT_MODEL = "bench"


@dataclass
class Contender:
    """A running relay: where it listens, what to send there, and which processes are it."""

    name: str
    port: int
    path: str
    token: str
    model: str
    pid: int
    check: Callable[[], None]

    def pids(self) -> list[int]:
        """Give its processes, as they are now."""
        return family(self.pid)

    def request(self, *, stream: bool, mode: str) -> str:
        """Give a request, ready to be sent again and again."""
        body = chat_body(self.model, stream=stream, mode=mode)
        return http_request(self.path, self.token, body, stream=stream)


def http_request(path: str, token: str, body: bytes, *, stream: bool) -> str:
    """Give a whole HTTP/1.1 request."""
    head = [
        f"POST {path} HTTP/1.1",
        f"Host: {HOST}",
        "User-Agent: llmkit-bench",
        f"Authorization: Bearer {token}",
        "Content-Type: application/json",
        # jupyter-server-proxy streams only to who asks for it in this way.
        f"Accept: {'text/event-stream' if stream else 'application/json'}",
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join(head) + "\r\n\r\n" + body.decode()


def jupyter(*extensions: str, upstream: str = "", llmkit: bool = True) -> JupyterServer:
    """Give a Jupyter server, not started yet, with more extensions and with or without llmkit."""
    wanted = {"jupyter_server_ext": llmkit, **dict.fromkeys(extensions, True)}
    return JupyterServer(
        base_url="/",
        args=[f"--ServerApp.jpserver_extensions={name}={on}" for name, on in wanted.items()],
        env={"PYTHONPATH": str(EXTENSIONS), "BENCH_UPSTREAM": upstream},
    )


def load_mock(server: JupyterServer, base_url: str, model_id: str = LLMKIT_MODEL) -> None:
    """Configure and load the upstream as a model of llmkit."""
    server.load(
        server.configure(
            model_id,
            model_name=MODEL,
            model_type="openai",
            model_kwargs={"base_url": base_url},
            max_in_flight=1000,
        )
    )


def of_server(name: str, server: JupyterServer, path: str, model: str) -> Contender:
    """Give a Jupyter server as a contender."""
    assert server.process
    process = server.process

    def check() -> None:
        if process.poll() is not None:
            raise BenchmarkError(f"{name}: the Jupyter server has ended: {server.log[-2000:]}")

    return Contender(name, httpx.URL(server.url).port or 80, f"/{path}", server.token, model, process.pid, check)


def of_child(child: Child, port: int, path: str, *, token: str, model: str) -> Contender:
    """Give a program as a contender."""
    return Contender(child.name, port, path, token, model, child.process.pid, child.check)


@contextmanager
def direct(upstream: Upstream) -> Iterator[Contender]:
    """No relay at all."""
    yield of_child(upstream, upstream.port, "/v1/chat/completions", token=NO_TOKEN, model=MODEL)


@contextmanager
def bare(upstream: Upstream) -> Iterator[Contender]:
    """The yardstick: the least relay behind Jupyter's authentication."""
    with jupyter("bench_bare", upstream=upstream.base_url, llmkit=False) as server:
        yield of_server("bare", server, BARE_PATH, MODEL)


@contextmanager
def bare_without_jupyter(upstream: Upstream) -> Iterator[Contender]:
    """The same relay in a Tornado application of its own."""
    env = {**own_environment(), "BENCH_UPSTREAM": upstream.base_url}
    with Child("bare-noauth", [sys.executable, EXTENSIONS / "bare_app.py"], env=env) as child:
        yield of_child(child, int(child.read_line()), f"/{BARE_PATH}", token=NO_TOKEN, model=MODEL)


@contextmanager
def llmkit(upstream: Upstream) -> Iterator[Contender]:
    """The product, as it is installed."""
    with jupyter() as server:
        load_mock(server, upstream.base_url)
        yield of_server("llmkit", server, LLMKIT_PATH, LLMKIT_MODEL)


@contextmanager
def jupyter_server_proxy(upstream: Upstream) -> Iterator[Contender]:
    """The proxy that Jupyter servers usually have."""
    python, port, token = python_of("jupyter-server-proxy"), free_port(), secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="llmkit-bench-") as folder:
        env = {**own_environment(), "HOME": folder, "JUPYTER_TOKEN": token, "JUPYTER_RUNTIME_DIR": folder}
        command: list[str | Path] = [
            python,
            "-m",
            "jupyter_server",
            f"--ip={HOST}",
            f"--port={port}",
            "--ServerApp.port_retries=0",
        ]
        command += ["--no-browser", "--allow-root", f"--ServerApp.root_dir={folder}"]
        with Child("jupyter-server-proxy", command, env=env, cwd=Path(folder), talks=False) as child:
            wait_for(child, f"http://{HOST}:{port}/api")
            path = f"/proxy/{upstream.port}/v1/chat/completions"
            yield of_child(child, port, path, token=token, model=MODEL)


@contextmanager
def litellm(upstream: Upstream) -> Iterator[Contender]:
    """The gateway that is most used: one worker, no database, no telemetry."""
    python, port, key = python_of("litellm"), free_port(), "sk-" + secrets.token_hex(16)
    configuration = {
        "model_list": [
            {
                "model_name": LLMKIT_MODEL,
                "litellm_params": {
                    "model": f"openai/{MODEL}",
                    "api_base": upstream.base_url,
                    "api_key": "none",
                },
            }
        ],
        "litellm_settings": {"telemetry": False, "num_retries": 0},
        "general_settings": {"master_key": key},
    }
    with tempfile.TemporaryDirectory(prefix="llmkit-bench-") as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(json.dumps(configuration))  # JSON is YAML
        env = {
            **own_environment(),
            "HOME": folder,
            "LITELLM_LOG": "ERROR",
            # Else it asks the network for a list of prices.
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "DISABLE_ADMIN_UI": "True",
        }
        command: list[str | Path] = [python.parent / "litellm", "--config", file, "--host", HOST, "--port", str(port)]
        command += ["--num_workers", "1", "--telemetry", "False"]
        with Child("litellm", command, env=env, cwd=Path(folder), talks=False) as child:
            wait_for(child, f"http://{HOST}:{port}/health/liveliness")
            yield of_child(child, port, "/v1/chat/completions", token=key, model=LLMKIT_MODEL)


def wait_for(child: Child, url: str) -> None:
    """Wait until a program answers."""
    with httpx.Client(trust_env=False, timeout=START_SECONDS) as client:
        for _ in range(int(START_SECONDS / 0.1)):
            child.check()
            with contextlib.suppress(httpx.TransportError):
                if client.get(url).is_success:
                    return
            with contextlib.suppress(Exception):
                child.process.wait(0.1)
    raise BenchmarkError(f"{child.name} does not answer within {START_SECONDS:g} s: {child.last_words()}")


Start = Callable[[Upstream], AbstractContextManager[Contender]]
CONTENDERS: dict[str, Start] = {
    "upstream": direct,
    "bare": bare,
    "bare-noauth": bare_without_jupyter,
    "llmkit": llmkit,
    "jupyter-server-proxy": jupyter_server_proxy,
    "litellm": litellm,
}
YARDSTICK = "bare"
