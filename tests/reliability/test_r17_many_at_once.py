"""R17: many streams at once lose nothing; a burst gets answers or a clear refusal, and a person goes before a batch."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest
from relayed import MODEL_ID, PATHS, Relayed, body_of, relayed
from scripted_upstream import prompt, word
from support import scaled

pytestmark = [pytest.mark.alone, pytest.mark.skipif(sys.platform != "linux", reason="sockets are counted for Linux")]

STREAMS = scaled(200)
CHUNKS = 64
REQUESTS = scaled(5000)
CONNECTIONS = 500
MAX_IN_FLIGHT = 64
MAX_QUEUED = 256
BATCH = 300
"""So many of a batch run and wait without a refusal: some places are kept free for people."""
PEOPLE = scaled(3)
PERSON_SECONDS = 0.1
"""So long takes the answer to a person: what of a batch ends meanwhile says nothing about the queue."""
MOST_OVERTAKING = MAX_IN_FLIGHT
"""So many can have begun before a person asked, and so may end before."""


def test_r17_many_streams_at_once_lose_double_and_mix_nothing() -> None:
    with relayed(max_in_flight=STREAMS) as running:
        began = time.monotonic()
        asyncio.run(read_streams(running))
        seconds = time.monotonic() - began
        most = running.upstream.counts()["most"]
        assert running.model()["in_flight"] == running.model()["queued"] == 0
    print(
        f"\nR17: {STREAMS} streams of {CHUNKS} chunks, {most} of them at once, in {seconds:.1f} s: "
        "no chunk lost, doubled, mixed or reordered"
    )
    assert most > STREAMS / 2, "they did not run at once"


async def read_streams(running: Relayed) -> None:
    async def one(client: aiohttp.ClientSession, number: int) -> None:
        # Half of them come cut at any byte, not at the ends of events.
        form = {"ragged": 1, "pause": 0.005} if number % 2 else {"pause": 0.01}
        body = body_of("v1", prompt("stream", id=number, count=CHUNKS, **form), stream=True)
        async with client.post(running.url(PATHS["v1"]), json=body) as answer:
            assert answer.status == 200, await answer.text()
            *events, last, nothing = (await answer.text()).split("\n\n")
        assert (last, nothing) == ("data: [DONE]", "")
        told = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"]["content"] for event in events]
        assert told == [f"{number}:{word(chunk)}" for chunk in range(CHUNKS)]

    async with running.session() as client:
        await asyncio.wait_for(asyncio.gather(*(one(client, number) for number in range(STREAMS))), 120)


def test_r17_a_burst_is_answered_or_refused_in_clear_words() -> None:
    with relayed(max_in_flight=MAX_IN_FLIGHT, max_queued=MAX_QUEUED) as running:
        for share, batch in (("none", 0), ("every second", 2)):
            began = time.monotonic()
            outcomes, most_queued = asyncio.run(burst(running, batch))
            seconds = time.monotonic() - began
            model, counts = running.model(), running.upstream.counts()
            told = ", ".join(f"{count} x {status} {priority}" for (priority, status), count in sorted(outcomes.items()))
            print(
                f"\nR17: burst of {REQUESTS} over {CONNECTIONS} connections, {share} of a batch, in {seconds:.1f} s: "
                f"{told}; at most {most_queued} waited, at most {counts['most']} ran"
            )
            assert {status for _, status in outcomes} <= {200, 429, 503}
            assert outcomes.total() == REQUESTS
            assert outcomes["interactive", 429] + outcomes["batch", 429] > 0, (
                "nothing was refused, so nothing was tested"
            )
            assert outcomes["interactive", 200] > outcomes["batch", 200]
            assert most_queued <= MAX_QUEUED
            assert counts["most"] <= MAX_IN_FLIGHT
            assert (model["in_flight"], model["queued"]) == (0, 0)
            assert counts["running"] == 0


async def burst(running: Relayed, batch: int) -> tuple[Counter[tuple[str, int]], int]:
    """Send all requests, each connection one after the other.

    Returns
    -------
    tuple
        How often each class of request got each status, and how many waited at most.
    """
    outcomes: Counter[tuple[str, int]] = Counter()
    numbers = iter(range(REQUESTS))

    async def send(client: aiohttp.ClientSession) -> None:
        for number in numbers:
            body = body_of("v1", prompt("plain", id=number, pause=0.05), stream=False)
            priority = "batch" if batch and number % batch == 0 else "interactive"
            headers = {"X-LLMKit-Priority": priority}
            async with client.post(running.url(PATHS["v1"]), json=body, headers=headers) as answer:
                told = await answer.json()
                outcomes[priority, answer.status] += 1
                if answer.status == 200:
                    assert told["choices"][0]["message"]["content"] == f"answer to {number}"
                elif answer.status == 429:
                    assert told["error"]["code"] == "queue_full"
                    assert int(answer.headers["Retry-After"]) >= 1

    async with running.session(CONNECTIONS) as client, watched(running) as queued:
        await asyncio.gather(*(send(client) for _ in range(CONNECTIONS)))
    return outcomes, max(queued)


@asynccontextmanager
async def watched(running: Relayed) -> AsyncIterator[list[int]]:
    """Look at the queue all the time; give what was seen."""
    queued: list[int] = []

    async def look(client: aiohttp.ClientSession) -> None:
        while True:
            async with client.get(running.url(f"llm/models/{MODEL_ID}")) as answer:
                told = await answer.json()
            assert told["in_flight"] <= MAX_IN_FLIGHT
            queued.append(told["queued"])
            await asyncio.sleep(0.02)

    async with running.session(1) as client:
        looking = asyncio.create_task(look(client))
        try:
            yield queued
        finally:
            looking.cancel()
            (outcome,) = await asyncio.gather(looking, return_exceptions=True)
        assert isinstance(outcome, asyncio.CancelledError), outcome


def test_r17_a_person_is_answered_before_most_of_a_running_batch() -> None:
    with relayed(max_in_flight=MAX_IN_FLIGHT, max_queued=MAX_QUEUED) as running:
        places = [asyncio.run(person_in_a_batch(running)) for _ in range(PEOPLE)]
    told = ", ".join(f"asked after {asked}, was answer {place}" for asked, place in places)
    print(f"\nR17: a person in a batch of {BATCH}: {told}")
    for asked, place in places:
        assert place <= BATCH / 2
        assert place - asked <= MOST_OVERTAKING


async def person_in_a_batch(running: Relayed) -> tuple[int, int]:
    """Send a batch and, in the middle of it, one request of a person.

    Returns
    -------
    tuple
        How many of the batch were answered when it was sent, and the place of its answer among all.
    """
    answered: list[str] = []
    some = asyncio.Event()

    async def ask(client: aiohttp.ClientSession, priority: str, seconds: float) -> None:
        body = body_of("v1", prompt("plain", pause=f"{seconds:.3f}"), stream=False)
        async with client.post(running.url(PATHS["v1"]), json=body, headers={"X-LLMKit-Priority": priority}) as answer:
            assert answer.status == 200, await answer.text()
            answered.append(priority)
        if len(answered) >= BATCH // 6:
            some.set()

    async with running.session() as client:
        batch = [asyncio.create_task(ask(client, "batch", random.uniform(0.1, 0.5))) for _ in range(BATCH)]
        await asyncio.wait_for(some.wait(), 30)
        asked = len(answered)
        await ask(client, "interactive", PERSON_SECONDS)
        await asyncio.gather(*batch)
    return asked, answered.index("interactive") + 1
