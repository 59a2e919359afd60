"""Whatever ends the server, no process, socket or file of an engine stays (R11, R14), with real vLLM."""

from __future__ import annotations

import signal
import time

import psutil
import pytest
from support import JupyterServer, wait_until

pytestmark = pytest.mark.vllm


def shared_memory() -> set[str]:
    from pathlib import Path

    return {path.name for path in Path("/dev/shm").iterdir()}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("when", ["waiting", "in mid-load", "loaded"])
def test_nothing_is_left_when_the_server_ends(number: signal.Signals, when: str) -> None:
    shared_before = shared_memory()
    with JupyterServer("server", standby="on" if when == "waiting" else "off") as server:
        config_id = server.configure("demo")
        if when == "waiting":
            wait_until(lambda: list(server.run_dir.rglob("standby.sock")), "a standby that waits", 60)
        elif when == "loaded":
            server.load(config_id)
        else:
            assert server.request("POST", f"llm/load_model/{config_id}?wait=false").status_code == 202
            wait_until(lambda: len(server.engine_processes()) > 1, "an engine below its guardian", 30)
            # Into the imports, which take seconds.
            wait_until(
                lambda: server.request("GET", "llm/models/demo").json()["elapsed_seconds"] > 2, "the load goes on", 30
            )
            assert server.request("GET", "llm/models/demo").json()["status"] == "loading"
        engine = server.engine_processes()
        assert len(engine) > 1
        began = time.monotonic()
        server.stop(number)
        stopped = time.monotonic() - began
        _, alive = psutil.wait_procs(engine, timeout=15)
        gone = time.monotonic() - began
        count = len(engine)
        print(f"{when}, {number.name}: server gone after {stopped:.1f} s, {count} processes after {gone:.1f} s")
        assert not alive
        assert gone <= 15
        if number is signal.SIGTERM:
            assert list(server.run_dir.iterdir()) == []
        else:
            # The guardian has removed the engine's folder; the log and the lock wait for the next start.
            assert not [path for path in server.run_dir.glob("*/*") if path.is_dir()]
            server.start()
            assert server.request("GET", "llm/models/demo").json()["status"] == "unloaded"
            assert len(list(server.run_dir.iterdir())) == 1
    assert shared_memory() <= shared_before
