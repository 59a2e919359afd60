"""R18: clients that never read cost little memory, are cut off in time, and take nothing from the others."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from dataclasses import dataclass, field

import pytest
from benchmarks.accounting import pss_kib
from relayed import RawClient, Relayed, relayed
from scripted_upstream import prompt
from support import scaled

pytestmark = [pytest.mark.alone, pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")]

CLIENTS = scaled(20)
MOST_KIB = 256.0
SOAK = bool(os.environ.get("LLMKIT_SOAK"))
FLUSH_SECONDS = 60.0 if SOAK else 4.0
"""After so long a client that takes nothing is cut off: the real minute in a soak, less in the test suite."""
LATE_SECONDS = 2.0
TRIES = 3
"""Other programs of the machine can be in the way of a throughput; the best of so many counts."""
STREAMS = 40
CHUNKS = 60
PACE_SECONDS = 0.02
LEAST_SHARE = 0.9


@dataclass
class Round:
    """What was measured with one set of clients that do not read."""

    pss_kib: float
    buffered_kib: float
    buffers: dict[str, int]
    before: float
    during: float
    cut: list[float] = field(default_factory=list)

    @property
    def share(self) -> float:
        """The throughput of the others that was left."""
        return self.during / self.before


def test_r18_clients_that_never_read_cost_little_and_are_cut_off() -> None:
    env = {"PROBE_FLUSH_SECONDS": str(FLUSH_SECONDS)}
    with relayed(extensions=["probe_extension"], env=env, max_in_flight=CLIENTS + STREAMS) as running:
        asyncio.run(read_paced(running))  # what is allocated once is there then
        before = running.held()
        rounds = []
        for number in range(TRIES):
            rounds.append(asyncio.run(without_reading(running, number)))
            running.wait_until_quiet(before)
            if rounds[-1].share >= LEAST_SHARE:
                break
    grown = ", ".join(f"{one.pss_kib:.0f} KiB of PSS and {one.buffered_kib:.0f} KiB in buffers" for one in rounds)
    shares = ", ".join(f"{one.share:.0%} ({one.during:.0f} of {one.before:.0f} chunks/s)" for one in rounds)
    cut = [seconds for one in rounds for seconds in one.cut]
    print(
        f"\nR18: {CLIENTS} clients that never read: each {grown} ({rounds[-1].buffers}); "
        f"cut {min(cut):.1f} to {max(cut):.1f} s after the last byte, with {FLUSH_SECONDS:g} s allowed; "
        f"throughput of the others: {shares}"
    )
    assert min(one.pss_kib for one in rounds) <= MOST_KIB
    assert max(one.buffered_kib for one in rounds) <= MOST_KIB
    assert min(cut) >= FLUSH_SECONDS - LATE_SECONDS
    assert max(cut) <= FLUSH_SECONDS + LATE_SECONDS
    assert max(one.share for one in rounds) >= LEAST_SHARE


async def without_reading(running: Relayed, number: int) -> Round:
    """Let clients ask for endless answers without reading them, and others work meanwhile, until the first are cut."""
    throughput = await read_paced(running)
    quiet = await asyncio.to_thread(pss_kib, running.pid)
    names = [f"{number}-{one}" for one in range(CLIENTS)]
    clients = [
        await RawClient.connect(running.port, running.raw("v1", prompt("flood", id=name), stream=True))
        for name in names
    ]
    try:
        await stalled(running, names)
        pss = await asyncio.to_thread(pss_kib, running.pid)
        buffers = (await asyncio.to_thread(running.probe))["buffers"]
        measured = Round(
            pss_kib=(pss - quiet) / CLIENTS,
            buffered_kib=sum(buffers.values()) / 1024 / CLIENTS,
            buffers=buffers,
            before=throughput,
            during=await read_paced(running),
        )
        seen = await asyncio.to_thread(running.upstream.seen)
        assert all(seen[name]["how"] == "running" for name in names), "cut too early, so nothing was measured"
        async with asyncio.timeout(FLUSH_SECONDS + 10):
            while any(seen[name]["how"] == "running" for name in names):
                await asyncio.sleep(0.1)
                seen = await asyncio.to_thread(running.upstream.seen)
        assert all(seen[name]["how"] == "left" for name in names)
        measured.cut = [seen[name]["ended"] - seen[name]["last"] for name in names]
    finally:
        for client in clients:
            client.close()
    return measured


async def stalled(running: Relayed, names: list[str]) -> None:
    """Wait until the upstream can send none of them anything more."""
    sent, since = -1, time.monotonic()
    async with asyncio.timeout(30):
        while time.monotonic() - since < 0.3:
            await asyncio.sleep(0.05)
            seen = await asyncio.to_thread(running.upstream.seen)
            now = sum(seen[name]["sent"] for name in names if name in seen)
            if now != sent or len(seen.keys() & set(names)) < len(names):
                sent, since = now, time.monotonic()


async def read_paced(running: Relayed) -> float:
    """Read streams at the pace of a model; give chunks each second."""

    async def one() -> int:
        words = prompt("stream", count=CHUNKS, pause=PACE_SECONDS)
        client = await RawClient.connect(running.port, running.raw("v1", words, stream=True))
        try:
            while not client.received.endswith(b"0\r\n\r\n"):
                assert await client.read(), client.received[-200:]
            return client.received.count(b"data: ") - 1
        finally:
            client.close()

    began = time.monotonic()
    chunks = await asyncio.wait_for(asyncio.gather(*(one() for _ in range(STREAMS))), 60)
    return sum(chunks) / (time.monotonic() - began)
