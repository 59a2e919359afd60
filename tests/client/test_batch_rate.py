"""How fast a batch is, and how much memory it takes; printed, because the machine may be busy."""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pandas as pd
import psutil
import pytest
from mock_upstream import ANSWER
from support import REPOSITORY, JupyterServer
from yarl import URL

from llmkit.client import connect

ROWS = 10_000
CONCURRENCY = 32
GROWTH_MIB = 40
"""Of 10,000 answers and what their table takes; a task and a client's buffers for each row would take far more."""


PROGRAM = """
import sys
from mock_upstream import MockUpstream
with MockUpstream() as upstream:
    print(upstream.base_url, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def base_url() -> Iterator[str]:
    """Give the address of the upstream in a process of its own: here it would take turns with the client."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "tests")}
    command = [sys.executable, "-c", PROGRAM]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.communicate()


async def plain_rate(server: JupyterServer, model_id: str, count: int) -> float:
    """Give the answers a second of a loop that does nothing but ask, and have the answers streamed as a batch has."""
    headers = {"Authorization": f"token {server.token}", "X-LLMKit-Priority": "batch"}
    url = URL(server.url + "llm/inference/", encoded=True)
    numbers = itertools.count()

    async def ask(session: aiohttp.ClientSession) -> None:
        while (number := next(numbers)) < count:
            body = {"model_id": model_id, "prompt": f"number {number}", "inference_kwargs": {"stream": True}}
            async with session.post(url, json=body) as response:
                assert response.status == 200
                await response.read()

    begun = time.monotonic()
    async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(ask(session) for _ in range(CONCURRENCY)))
    return count / (time.monotonic() - begun)


def test_ten_thousand_rows_in_little_memory(server: JupyterServer, base_url: str, tmp_path: Path) -> None:
    process = psutil.Process()
    sizes: list[float] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.2):
            sizes.append(process.memory_info().rss / 2**20)

    with connect(server.url, server.token) as client:
        kwargs = {"base_url": base_url}
        client.configure("fast", "gpt-3", "openai", kwargs, max_in_flight=2 * CONCURRENCY, max_queued=1000)
        try:
            client.load("fast", progress=False)
            before = asyncio.run(plain_rate(server, "fast", ROWS // 4))
            watcher = threading.Thread(target=watch)
            watcher.start()
            begun = time.monotonic()
            answered = client.map(
                pd.DataFrame({"n": range(ROWS)}),
                "number {n}",
                model="fast",
                checkpoint=tmp_path / "b.jsonl",
                concurrency=CONCURRENCY,
                progress=False,
            )
            rate = ROWS / (time.monotonic() - begun)
            ended.set()
            watcher.join()
            plain = (before + asyncio.run(plain_rate(server, "fast", ROWS // 4))) / 2
        finally:
            ended.set()
            client.delete("fast", unload=True)
    assert answered["error"].isna().all()
    assert (answered["response"] == ANSWER).all()
    assert max(sizes) - sizes[0] < GROWTH_MIB
    print(
        f"\n{ROWS} rows: {rate:.0f} a second, a loop that only asks {plain:.0f} ({rate / plain:.0%}); "
        f"memory {sizes[0]:.0f} to {max(sizes):.0f} MiB"
    )
