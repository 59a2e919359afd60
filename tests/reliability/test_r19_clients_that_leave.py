"""R19: whoever leaves, in whatever way and at whatever moment: the upstream knows at once, and nothing is left."""

from __future__ import annotations

import asyncio
import itertools
import random
import sys
import time
from dataclasses import dataclass
from typing import Any

import pytest
from relayed import API, PATHS, RawClient, Relayed, Way, body_of, relayed
from scripted_upstream import prompt
from support import scaled

pytestmark = [pytest.mark.alone, pytest.mark.skipif(sys.platform != "linux", reason="open files are counted in /proc")]

WAYS: tuple[Way, ...] = ("FIN", "RST", "half-close")
MOMENTS = ("before the first token", "in the middle", "between tokens", "near the end", "before a plain answer")
LEAVERS = scaled(100)
AT_ONCE = 10
CHUNKS = 64
HOLD_SECONDS = 5.0
"""So long the upstream waits at the moment in which a client leaves: none of them leaves after the end."""
BAR_SECONDS = 1.0
WAITERS = scaled(20)


@dataclass(frozen=True)
class Leaving:
    """How one client leaves."""

    number: int
    api: API
    moment: str
    way: Way

    def prompt(self) -> str:
        """Give the words that make the upstream wait at the moment."""
        if self.moment == "before a plain answer":
            return prompt("plain", id=self.number, pause=HOLD_SECONDS)
        form: dict[str, float] = {
            "before the first token": {"at": 0, "hold": HOLD_SECONDS},
            "in the middle": {"at": CHUNKS // 2, "hold": HOLD_SECONDS},
            "between tokens": {"pause": HOLD_SECONDS / CHUNKS},
            "near the end": {"at": CHUNKS - 1, "hold": HOLD_SECONDS},
        }[self.moment]
        return prompt("stream", id=self.number, count=CHUNKS, **form)

    def chunks(self) -> int:
        """Give how many chunks are read before."""
        most = {"in the middle": CHUNKS // 2, "between tokens": CHUNKS // 4, "near the end": CHUNKS - 1}
        return random.randint(most[self.moment] // 2 + 1, most[self.moment]) if self.moment in most else 0


def test_r19_the_upstream_knows_at_once_of_a_client_that_leaves_and_nothing_stays() -> None:
    ways = itertools.cycle((api, moment, way) for moment in MOMENTS for api in PATHS for way in WAYS)
    leavings = [Leaving(number, *next(ways)) for number in range(LEAVERS)]
    with relayed(extensions=["probe_extension"], max_in_flight=AT_ONCE) as running:
        asyncio.run(ask_to_the_end(running))
        before = running.wait_until_quiet(running.held())
        left_at = asyncio.run(leave_all(running, leavings))
        time.sleep(BAR_SECONDS)
        seen = running.upstream.seen()
        after = running.wait_until_quiet(before)
        records = [record for record in running.records(2 * LEAVERS) if record["outcome"] != "ok"]
        assert " failed: " not in running.server.log
        assert "Traceback" not in running.server.log

    late = {one: seen[str(one.number)] for one in leavings if seen[str(one.number)]["how"] != "left"}
    assert late == {}
    seconds = {one: seen[str(one.number)]["ended"] - left_at[one] for one in leavings}
    slowest = max(seconds, key=lambda one: seconds[one])
    outcomes = {record["outcome"] for record in records}
    print(
        f"\nR19: {LEAVERS} clients left by {', '.join(WAYS)}, at {len(MOMENTS)} moments, of {len(PATHS)} APIs: "
        f"the upstream knew after at most {seconds[slowest] * 1000:.0f} ms ({slowest.moment}, {slowest.way}); "
        f"tasks {before.tasks} -> {after.tasks}, open files {before.files} -> {after.files}; "
        f"{len(records)} records: {', '.join(outcomes)}"
    )
    assert seconds[slowest] <= BAR_SECONDS
    assert len(records) == LEAVERS
    assert outcomes == {"cancelled"}


async def ask_to_the_end(running: Relayed) -> None:
    """Ask in each way once, so that what is made once is there before anything is counted."""
    async with running.session() as client:
        for api in PATHS:
            for stream in (True, False):
                words = prompt("stream" if stream else "plain")
                async with client.post(running.url(PATHS[api]), json=body_of(api, words, stream=stream)) as answer:
                    assert answer.status == 200, await answer.text()
                    await answer.read()


async def leave_all(running: Relayed, leavings: list[Leaving]) -> dict[Leaving, float]:
    """Let all clients leave, some at a time; give the moments."""
    places = asyncio.Semaphore(AT_ONCE)
    left_at: dict[Leaving, float] = {}

    async def one(leaving: Leaving) -> None:
        async with places:
            left_at[leaving] = await leave(running, leaving)

    await asyncio.gather(*(one(leaving) for leaving in leavings))
    return left_at


async def leave(running: Relayed, leaving: Leaving) -> float:
    stream = leaving.moment != "before a plain answer"
    client = await RawClient.connect(running.port, running.raw(leaving.api, leaving.prompt(), stream=stream))
    try:
        async with asyncio.timeout(HOLD_SECONDS):
            await client.read_chunks(leaving.chunks())
            while not await asked(running, leaving):
                await asyncio.sleep(0.02)
        await asyncio.sleep(random.uniform(0, 0.1))
        moment = time.monotonic()
        client.leave(leaving.way)
        if leaving.way == "half-close":
            async with asyncio.timeout(HOLD_SECONDS / 2):
                await client.read_to_end()
            assert b"[DONE]" not in client.received
        return moment
    finally:
        client.close()


async def asked(running: Relayed, leaving: Leaving) -> dict[str, Any] | None:
    """Give what the upstream knows of a request, if it has come."""
    return (await asyncio.to_thread(running.upstream.seen)).get(str(leaving.number))


def test_r19_who_leaves_the_queue_is_never_sent_on() -> None:
    with relayed(extensions=["probe_extension"], max_in_flight=1) as running:
        asyncio.run(ask_to_the_end(running))
        before = running.wait_until_quiet(running.held())
        asked_before = running.upstream.counts()["asked"]
        asyncio.run(leave_the_queue(running))
        after = running.wait_until_quiet(before)
        asked_after = running.upstream.counts()["asked"]
        records = running.records(WAITERS + 1)
    outcomes = [record["outcome"] for record in records]
    print(
        f"\nR19: {WAITERS} clients left the queue: {asked_after - asked_before - 1} were sent on, "
        f"tasks {before.tasks} -> {after.tasks}, open files {before.files} -> {after.files}"
    )
    assert asked_after - asked_before == 1
    assert sorted(outcomes) == ["cancelled"] * WAITERS + ["ok"]


async def leave_the_queue(running: Relayed) -> None:
    """Hold the only place, and let others wait for it and leave before it is free."""
    first = await RawClient.connect(running.port, running.raw("v1", prompt("plain", pause=2), stream=False))
    waiting: list[RawClient] = []
    try:
        async with asyncio.timeout(5):
            while (await asyncio.to_thread(running.model))["in_flight"] != 1:
                await asyncio.sleep(0.02)
            for number, api in zip(range(WAITERS), itertools.cycle(PATHS)):
                words = running.raw(api, prompt("plain"), stream=number % 3 == 0)
                waiting.append(await RawClient.connect(running.port, words))
            while (await asyncio.to_thread(running.model))["queued"] != WAITERS:
                await asyncio.sleep(0.02)
            for number, client in enumerate(waiting):
                client.leave(WAYS[number % 3])
            while (await asyncio.to_thread(running.model))["queued"]:
                await asyncio.sleep(0.02)
        while b"answer to" not in first.received:
            assert await first.read()
    finally:
        for client in (first, *waiting):
            client.close()
