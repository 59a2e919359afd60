"""R14: a Jupyter server ends soon and leaves nothing, however and whenever it is asked to."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from fake_engine_type import PLUGIN
from support import JupyterServer, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="engines are kept on Linux only")

WAYS = ("TERM", "TERM twice", "INT", "HUP", "/api/shutdown")
MOMENTS = ("idle", "loading", "streaming")
EXIT_SECONDS = 15.0


def end(server: JupyterServer, way: str) -> None:
    """Ask the server to end, without a terminal."""
    assert server.process is not None
    if way == "/api/shutdown":
        server.request("POST", "api/shutdown")
        return
    number = signal.Signals[f"SIG{way.split()[0]}"]
    server.process.send_signal(number)
    if way == "TERM twice":
        time.sleep(0.05)
        server.process.send_signal(number)


def stream_in_background(server: JupyterServer) -> threading.Event:
    """Ask for a long answer, and go on once it has begun."""
    begun = threading.Event()
    body = {"model_id": "m", "prompt": "word " * 400, "inference_kwargs": {"stream": True}}

    def read() -> None:
        headers = {"Authorization": f"token {server.token}"}
        url = f"{server.url}llm/inference/"
        try:
            with httpx.stream("POST", url, json=body, headers=headers, timeout=30, trust_env=False) as answer:
                for _ in answer.iter_lines():
                    begun.set()
        except httpx.HTTPError:
            pass  # the server has ended

    threading.Thread(target=read, daemon=True).start()
    return begun


def bring_to(server: JupyterServer, moment: str) -> None:
    options = {"idle": "", "loading": " --stall-at=weights", "streaming": " --tokens-per-second=20"}[moment]
    config_id = server.configure("m", model_name=f"any --setsid{options}", model_type="fake")
    if moment == "loading":
        server.request("POST", f"llm/load_model/{config_id}?wait=false")
        wait_until(lambda: server.request("GET", "llm/models/m").json()["phase"] == "weights", "the phase weights")
        return
    server.load(config_id)
    if moment == "streaming":
        assert stream_in_background(server).wait(10)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("way", WAYS)
def test_r14_the_server_ends_within_15_seconds_and_leaves_nothing(way: str, moment: str) -> None:
    env = {"PYTHONPATH": os.pathsep.join(filter(None, (PLUGIN["PYTHONPATH"], os.environ.get("PYTHONPATH", ""))))}
    with JupyterServer("server", env=env) as server:
        bring_to(server, moment)
        process, run_dir = server.process, Path(server.run_dir)
        assert process is not None
        assert server.engine_processes()
        started = time.monotonic()
        end(server, way)
        process.wait(EXIT_SECONDS)
        ended = time.monotonic() - started
        assert server.left_behind() == []
        gone = time.monotonic() - started
        assert not [entry for folder in run_dir.glob("*-*") for entry in folder.iterdir() if entry.is_dir()]
    print(f"\nR14: {way} while {moment}: exit after {ended:.2f} s, nothing left after {gone:.2f} s")
