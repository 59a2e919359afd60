"""What is seen of a load from several places: logs, devices, plans, two kernels and curl. Engines are processes."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fake_engine_type import PLUGIN
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager
from support import JupyterServer, wait_until

from llmkit.client import Client, connect
from llmkit.errors import KVCacheTooSmall, ModelNotFound

WATCH = """
import time, llmkit
from llmkit.client import Watcher
seen = []
def note(watcher):
    status = next((m.status for m in watcher.snapshot.models if m.model_id == "seen"), None)
    if not seen or seen[-1][0] != status:
        seen.append((status, time.time()))
watcher = Watcher(llmkit.connect())
watcher.subscribe(note)
while watcher.state != "connected":
    time.sleep(0.01)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[JupyterServer]:
    """Give a real server with the model type ``fake``: vLLM's processes without a model."""
    with JupyterServer(env=PLUGIN) as running:
        yield running


@pytest.fixture
def kernels(server: JupyterServer) -> Iterator[list[BlockingKernelClient]]:
    """Give two real kernels that watch the server."""
    managers = [KernelManager(kernel_name="python3") for _ in range(2)]
    clients = []
    try:
        for manager in managers:
            manager.start_kernel(env={**server.client_environment(), **PLUGIN})
            clients.append(manager.blocking_client())
        for client in clients:
            client.start_channels()
            client.wait_for_ready(timeout=60)
            run(client, WATCH)
        yield clients
    finally:
        for client in clients:
            client.stop_channels()
        for manager in managers:
            manager.shutdown_kernel(now=True)


def run(client: BlockingKernelClient, code: str) -> str:
    """Run code in a kernel and give what it printed."""
    printed: list[str] = []

    def take(message: dict[str, Any]) -> None:
        if message["msg_type"] == "stream":
            printed.append(message["content"]["text"])

    reply = client.execute_interactive(code, timeout=60, output_hook=take)
    assert reply["content"]["status"] == "ok", reply["content"]
    return "".join(printed)


def curl(server: JupyterServer, method: str, path: str, body: Any = None) -> Any:
    command = ["curl", "-sS", "-X", method, "-H", f"Authorization: token {server.token}", server.url + path]
    if body is not None:
        command += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_two_kernels_and_curl_see_the_same_within_a_second(
    server: JupyterServer, kernels: list[BlockingKernelClient]
) -> None:
    body = {"model_id": "seen", "model_name": "any --phase-seconds=0.3", "model_type": "fake"}
    changed: list[tuple[str | None, float]] = []
    config_id = curl(server, "POST", "llm/configure_model/", body)["config_id"]
    changed.append(("unloaded", time.time()))
    curl(server, "POST", f"llm/load_model/{config_id}?wait=false")
    changed.append(("loading", time.time()))
    while curl(server, "GET", "llm/models/seen")["status"] != "loaded":
        time.sleep(0.02)
    changed.append(("loaded", time.time()))
    curl(server, "POST", "llm/unload_model/seen")
    changed.append(("unloaded", time.time()))
    curl(server, "DELETE", f"llm/configuration/{config_id}")
    changed.append((None, time.time()))
    time.sleep(1.0)
    late = []
    for kernel in kernels:
        seen = json.loads(run(kernel, "import json; print(json.dumps(seen[1:]))"))
        assert [s for s, _ in seen if s != "unloading"] == [status for status, _ in changed]
        times = [moment for status, moment in seen if status != "unloading"]
        late += [moment - ours for moment, (_, ours) in zip(times, changed, strict=True)]
    print(f"\ntwo kernels saw what curl did {max(late):+.3f} s after curl at most (- is before its answer)")
    assert max(late) <= 1.0


@pytest.fixture
def client(server: JupyterServer) -> Iterator[Client]:
    with connect(server.url, server.token) as connected:
        yield connected
        for model in connected.models():
            connected.delete(model.model_id, unload=True)


def test_a_log_is_read_and_followed_through_two_loads(client: Client) -> None:
    client.configure("m", "any", "fake")
    assert client.logs("m") == []
    lines: list[str] = []

    def follow() -> None:
        lines.extend(client.follow_logs("m"))

    reader = threading.Thread(target=follow)
    reader.start()
    client.load("m", progress=False)
    told = client.logs("m")
    assert any("Starting vLLM server" in line for line in told)
    assert client.logs("m", tail=1) == told[-1:]
    wait_until(lambda: lines == told, "the lines of the first load")
    client.unload("m")
    client.load("m", progress=False)
    wait_until(lambda: sum("Starting vLLM server" in line for line in lines) == 2, "the lines of the second load")
    client.delete("m", unload=True)
    reader.join(10)
    assert not reader.is_alive()
    with pytest.raises(ModelNotFound):
        next(client.follow_logs("m"))


def test_memory_is_shown_by_model_and_planned_before_a_load(client: Client) -> None:
    client.configure("m", "any", "fake")
    assert client.plan("m").model_id == "m"
    client.load("m", progress=False)
    ram = client.devices().ram
    (share,) = ram.shares
    assert share.model_id == "m"
    assert 0 < share.bytes < ram.used_bytes < ram.total_bytes
    freed = client.unload("m")
    assert freed.verified
    assert freed.pss_bytes is not None
    assert freed.pss_bytes > 0
    assert client.devices().ram.shares == []


def test_the_second_load_tells_how_long_it_takes(client: Client) -> None:
    client.configure("m", "any --phase-seconds=0.5", "fake")
    client.load("m", progress=False)
    client.unload("m")
    client.start_loading("m")
    told = []
    while (model := client.model("m")).status == "loading":
        told.append(model)
        time.sleep(0.05)
    assert model.status == "loaded"
    forecasts = [model.elapsed_seconds + model.eta_seconds for model in told if model.eta_seconds is not None]
    assert len(forecasts) > len(told) / 2
    assert all(abs(forecast - model.load_seconds) < 1.0 for forecast in forecasts), (forecasts, model.load_seconds)
    fractions = [model.progress for model in told if model.progress is not None]
    assert fractions == sorted(fractions)
    assert fractions[-1] > 0.5
    assert all(fraction < 1 for fraction in fractions)


def test_a_failure_says_what_to_change_and_the_change_is_enough(client: Client) -> None:
    client.configure("m", "any --kv-cache-tokens=2048", "fake", {"max_model_len": 4096})
    with pytest.raises(KVCacheTooSmall, match=r"no room for 4096 tokens.*2048 fit") as raised:
        client.load("m", progress=False)
    error = client.model("m").error
    assert error is not None
    assert error.fix == raised.value.details["fix"] == {"model_kwargs": {"max_model_len": 2048}}
    assert error.hint == "Set max_model_len to 2048, or give the KV cache more memory."
    assert any("estimated maximum model length is 2048" in line for line in error.log_tail or [])
    client.update("m", **error.fix)
    assert client.load("m", progress=False).status == "loaded"
