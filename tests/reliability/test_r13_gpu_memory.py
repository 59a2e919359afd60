"""R13: on a real GPU, memory is back after SIGKILL and after an engine that has asked for too much.

What decides whether it is back is tried with a stand-in for the driver in ``tests/engines/vllm/test_engine.py``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Literal

import psutil
import pytest
from support import JupyterServer, scaled, wait_until

pytestmark = [pytest.mark.gpu, pytest.mark.vllm, pytest.mark.timeout(0)]

TIMES = scaled(20)
BACK_SECONDS = 15.0
SLACK_BYTES = 64 << 20
"""The driver's own books move by a little; an engine holds hundreds of megabytes."""
TOO_MUCH_BYTES = 1 << 40
"""No GPU has so much for a KV cache."""

Victim = Literal["core", "guardian", "server"]


@pytest.fixture(scope="module")
def server() -> Iterator[JupyterServer]:
    with JupyterServer() as running:
        yield running


def used(server: JupyterServer) -> list[int]:
    """Give the bytes in use on each GPU."""
    told = server.request("GET", "llm/devices").json()
    assert told["gpus"], told.get("reason")
    return [gpu["used_bytes"] for gpu in told["gpus"]]


def wait_until_back(server: JupyterServer, before: list[int]) -> float:
    """Wait until no GPU holds more than before; give the seconds."""
    began = time.monotonic()

    def is_back() -> bool:
        return all(now <= then + SLACK_BYTES for now, then in zip(used(server), before, strict=True))

    wait_until(is_back, f"the GPU's memory of before, {before}", BACK_SECONDS)
    return time.monotonic() - began


def victim_of(server: JupyterServer, victim: Victim) -> psutil.Process:
    """Give the process to kill."""
    assert server.process is not None
    if victim == "server":
        return psutil.Process(server.process.pid)
    name = "VLLM::" if victim == "core" else "guardian"
    return next(
        p for p in server.engine_processes() if name in (p.name() if victim == "core" else " ".join(p.cmdline()))
    )


@pytest.mark.parametrize("victim", ["core", "guardian", "server"])
def test_r13_memory_of_the_gpu_is_back_after_sigkill(server: JupyterServer, victim: Victim) -> None:
    before, seconds, held = used(server), [], []
    config_id = server.configure("demo")
    for _ in range(TIMES):
        server.load(config_id)
        held.append(max(now - then for now, then in zip(used(server), before, strict=True)))
        victim_of(server, victim).kill()
        if victim == "server":
            server.stop()
            server.start()
        seconds.append(wait_until_back(server, before))
        wait_until(
            lambda: server.request("GET", "llm/models/demo").json()["status"] in ("failed", "unloaded"), "the end", 30
        )
    print(
        f"\nR13: {TIMES} engines that lost their {victim} by SIGKILL: each held {min(held) >> 20} MiB at least, "
        f"back after {max(seconds):.1f} s at most"
    )
    assert min(held) > SLACK_BYTES
    assert server.left_behind() == []


def test_r13_memory_of_the_gpu_is_back_after_an_engine_that_asked_for_too_much(server: JupyterServer) -> None:
    before, seconds, codes = used(server), [], set()
    config_id = server.configure("large", model_kwargs={"kv_cache_memory_bytes": TOO_MUCH_BYTES})
    for _ in range(TIMES):
        answer = server.request("POST", f"llm/load_model/{config_id}?force=true", timeout=240)
        codes.add((answer.status_code, answer.json()["error"]["code"]))
        seconds.append(wait_until_back(server, before))
    print(f"\nR13: {TIMES} engines out of memory ({codes}): back after {max(seconds):.1f} s at most")
    assert {code for _, code in codes} <= {"out_of_memory", "kv_cache_too_small"}
    assert server.left_behind() == []
