"""R16: nothing that the server does holds up its event loop: a 10 ms heartbeat, idle, in loads, under streams."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator

import pytest
from relayed import RawClient, Relayed, relayed
from scripted_upstream import prompt
from support import wait_until

pytestmark = [pytest.mark.alone, pytest.mark.skipif(sys.platform != "linux", reason="engines are kept on Linux only")]

TRIES = 3
"""Other programs of the machine can be in the way; the best of so many counts, and all are printed."""
IDLE_SECONDS = 5.0
STREAMS = 200
CHUNKS = 200
PACE_SECONDS = 0.02
P99_MS = 10.0
STREAMS_P99_MS = 50.0
LONGEST_MS = 250.0


class Beats:
    """The lateness of a server's heartbeat, over one thing that it does; see `benchmarks/extensions/bench_loop.py`."""

    def __init__(self, running: Relayed, what: str, p99_ms: float) -> None:
        self._server = running.server
        self._what = what
        self._p99_ms = p99_ms
        self._tries: list[tuple[float, float]] = []

    def tries(self) -> Iterator[None]:
        """Measure what happens between one value and the next, until it is within the bars, at most three times."""
        for _ in range(TRIES):
            assert self._server.request("DELETE", "bench/loop").status_code == 200
            yield
            told = self._server.request("GET", "bench/loop").json()
            self._tries.append((told["p99_ms"], told["max_ms"]))
            if self._within(*self._tries[-1]):
                break

    def _within(self, p99: float, longest: float) -> bool:
        return p99 <= self._p99_ms and longest <= LONGEST_MS

    def check(self) -> None:
        """Print all, and assert that the best is within the bars."""
        told = ", ".join(f"p99 {p99:.1f} ms and at most {longest:.0f} ms" for p99, longest in self._tries)
        print(f"\nR16: {self._what}: {told}")
        assert any(self._within(*measured) for measured in self._tries), told


def test_r16_the_loop_is_not_held_up_by_rest_a_load_or_200_streams() -> None:
    with relayed(extensions=["bench_loop"], plugin=True, max_in_flight=STREAMS) as running:
        idle = Beats(running, f"idle for {IDLE_SECONDS:g} s", P99_MS)
        for _ in idle.tries():
            time.sleep(IDLE_SECONDS)

        config_id = running.server.configure("fake", model_name="any --setsid --phase-seconds=0.7", model_type="fake")
        load = Beats(running, "load of a fake engine", P99_MS)
        for _ in load.tries():
            running.server.load(config_id)
            assert running.server.request("POST", "llm/unload_model/fake").status_code == 200

        streams = Beats(running, f"{STREAMS} streams of a chunk each {PACE_SECONDS * 1000:g} ms", STREAMS_P99_MS)
        for _ in streams.tries():
            asyncio.run(read_streams(running))
        for beats in (idle, load, streams):
            beats.check()


async def read_streams(running: Relayed) -> None:
    """Read that many streams at once, and see that each is complete."""

    async def one(number: int) -> None:
        await asyncio.sleep(PACE_SECONDS * number / STREAMS)
        words = prompt("stream", id=number, count=CHUNKS, pause=PACE_SECONDS)
        client = await RawClient.connect(running.port, running.raw("v1", words, stream=True))
        try:
            while not client.received.endswith(b"0\r\n\r\n"):
                assert await client.read(), client.received[-200:]
            assert client.received.count(b"data: ") == CHUNKS + 1
        finally:
            client.close()

    await asyncio.wait_for(asyncio.gather(*(one(number) for number in range(STREAMS))), 60)


@pytest.mark.vllm
def test_r16_the_loop_is_not_held_up_by_the_load_of_a_real_engine() -> None:
    with relayed(extensions=["bench_loop"]) as running:
        config_id = running.server.configure("demo")
        load = Beats(running, "load of vLLM", P99_MS)
        for _ in load.tries():
            began = time.monotonic()
            running.server.load(config_id)
            seconds = time.monotonic() - began
        load.check()
        print(f"R16: the load of vLLM took {seconds:.1f} s")
        wait_until(lambda: running.model("demo")["status"] == "loaded", "loaded")
