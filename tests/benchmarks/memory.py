"""What an open stream costs in memory: the server with none, with many that wait, and after they are closed."""

from __future__ import annotations

import socket
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from benchmarks.accounting import pss_kib
from benchmarks.contenders import CONTENDERS, Contender
from benchmarks.payloads import HOLD
from benchmarks.processes import BenchmarkError, Upstream

CONTENDERS_MEASURED = ("bare", "llmkit")
FIRST_CHUNK_SECONDS = 30.0
SETTLE_SECONDS = 2.0
FIRST_CHUNK = b'"t00 "'


@dataclass(frozen=True)
class Settings:
    """How much is measured. From the second cycle on, what is allocated once is there."""

    streams: int = 200
    cycles: int = 2


def measure(settings: Settings) -> dict[str, Any]:
    """Give the proportional set size of servers in KiB, without streams, with them, after them, and for one."""
    figures: dict[str, Any] = {}
    for name in CONTENDERS_MEASURED:
        with Upstream() as upstream, CONTENDERS[name](upstream) as contender:
            cycles = [cycle(contender, settings.streams) for _ in range(settings.cycles)]
            figures[name] = {"streams": settings.streams, **cycles[-1], "cycles": cycles}
    return figures


def cycle(contender: Contender, streams: int) -> dict[str, float]:
    """Open streams, look, close them, look again."""
    time.sleep(SETTLE_SECONDS)
    before = pss_kib(contender.pid)
    request = contender.request(stream=True, mode=HOLD).encode()
    with ExitStack() as stack:
        connections = [
            stack.enter_context(socket.create_connection(("127.0.0.1", contender.port), FIRST_CHUNK_SECONDS))
            for _ in range(streams)
        ]
        for connection in connections:
            connection.sendall(request)
        for connection in connections:
            wait_for_chunk(contender, connection)
        time.sleep(SETTLE_SECONDS)
        contender.check()
        during = pss_kib(contender.pid)
    time.sleep(SETTLE_SECONDS)
    contender.check()
    after = pss_kib(contender.pid)
    return {
        "before_kib": before,
        "open_kib": during,
        "after_kib": after,
        "kib_per_stream": (during - before) / streams,
    }


def wait_for_chunk(contender: Contender, connection: socket.socket) -> None:
    """Read until the first chunk is there."""
    received = b""
    while FIRST_CHUNK not in received:
        try:
            data = connection.recv(65536)
        except TimeoutError:
            data = b""
        received += data
        if not data or not received.startswith(b"HTTP/1.1 200"):
            raise BenchmarkError(f"{contender.name}: a stream without its first chunk: {received[:300]!r}")
