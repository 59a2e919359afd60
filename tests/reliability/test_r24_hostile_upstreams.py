"""R24: whatever an upstream answers, its client gets a clear error, and the server stays small, quick and whole."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from benchmarks.accounting import pss_kib
from hostile_answers import HOSTILE, REALM
from relayed import API, PATHS, Relayed, body_of, relayed
from scripted_upstream import prompt
from support import scaled

pytestmark = [pytest.mark.alone, pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")]

EACH = scaled(20)
AT_ONCE = 10
STAY_SECONDS = 0.5
"""So long a client stays with an answer that does not end."""
TIMEOUT_SECONDS = 1.0
"""``timeout`` of the model: seconds of silence."""
LONGEST_SECONDS = 10.0
MOST_MIB = 64.0
HEALTH_SECONDS = 1.0
BOTH: tuple[API, ...] = ("v1", "inference")
INFERENCE: tuple[API, ...] = ("inference",)
FAILED = "upstream_failed"
UNREACHABLE = "upstream_unreachable"
GONE = "engine_gone"
TIMED_OUT = "timed_out"


@dataclass(frozen=True)
class Case:
    """One thing that an upstream does, and what its client is to get."""

    mode: str
    stream: bool
    codes: frozenset[str]
    """Codes of the error; none if the answer may be of use."""
    begins: bool = False
    """Whether something of a stream comes before the error."""
    endless: bool = False
    """Whether the client has to leave, since nothing else ends it."""
    apis: tuple[API, ...] = BOTH

    def __str__(self) -> str:
        return f"{self.mode}{' streamed' if self.stream else ''}"


def refused(mode: str, *codes: str, stream: bool | None = None, **fields: Any) -> list[Case]:
    """Make the cases of an upstream whose answer ends in an error, streamed and plain if it is not said."""
    return [Case(mode, one, frozenset(codes), **fields) for one in ((False, True) if stream is None else (stream,))]


def left(mode: str, *, stream: bool) -> list[Case]:
    """Make the case of an upstream that nothing ends but the client."""
    return [Case(mode, stream, frozenset(), endless=True)]


def of_use(mode: str, *, apis: tuple[API, ...] = BOTH) -> list[Case]:
    """Make the cases of an upstream whose answer may be taken or refused, but never makes the server fail."""
    return [Case(mode, stream, frozenset(), apis=apis) for stream in (False, True)]


CASES = [
    *refused("gzip_bomb", FAILED),
    *refused("gzip_without_a_word", FAILED, stream=False),
    *refused("gzip_without_a_word", GONE, stream=True),
    *left("endless_events", stream=True),
    *left("endless_empty_events", stream=True),
    *left("endless_comments", stream=True),
    *refused("endless_line", FAILED, stream=True),
    *refused("endless_lines", FAILED, stream=True),
    *refused("many_lines", FAILED, GONE, stream=True),
    *refused("endless_body", FAILED, stream=False),
    *refused("endless_refusal", "engine_refused"),
    *left("endless_continue", stream=False),
    *refused("bad_utf8", FAILED, stream=True),
    *refused("bad_utf8", FAILED, stream=False),
    *of_use("half_a_character"),
    *of_use("absurd_usage"),
    *refused("swelling", FAILED, stream=False, apis=INFERENCE),
    *refused("deep_nesting", FAILED, GONE, stream=True),
    *refused("deep_nesting", FAILED, stream=False),
    *refused("basic_challenge", "upstream_refused_key"),
    *refused("proxy_challenge", FAILED),
    *left("drip", stream=True),
    *left("drip", stream=False),
    *left("dripping_head", stream=False),
    *refused("silence", TIMED_OUT),
    *refused("silence_in_the_middle", TIMED_OUT, stream=True, begins=True),
    *refused("no_answer", TIMED_OUT),
    *refused("hang_up", UNREACHABLE),
    *refused("redirect", FAILED),
    *refused("too_short", UNREACHABLE, stream=False),
    *refused("too_short", UNREACHABLE, stream=True, begins=True),
    *refused("two_lengths", UNREACHABLE),
    *refused("bad_chunks", UNREACHABLE, stream=False),
    *refused("bad_chunks", UNREACHABLE, stream=True, begins=True),
    *refused("no_http", UNREACHABLE),
    *refused("html", FAILED),
    *refused("html_said_to_be_json", FAILED, stream=False),
    *refused("html_said_to_be_json", GONE, stream=True),
    *refused("huge_header", UNREACHABLE),
    *refused("endless_headers", UNREACHABLE),
    *of_use("odd_headers"),
    *refused("odd_busy", "rate_limited"),
    *refused("broken_in_an_event", GONE, stream=True, begins=True),
    *refused("no_done", GONE, stream=True, begins=True),
    *refused("events_for_json", FAILED, stream=False),
    *refused("no_form", FAILED, stream=True, begins=True, apis=INFERENCE),
    *refused("error_event", FAILED, stream=True, begins=True),
    *refused("odd_status", FAILED),
]


@dataclass
class Watch:
    """What was seen of the server meanwhile."""

    health: list[tuple[float, str]] = field(default_factory=list)
    """How long an answer took, and what the upstream did then."""
    kept: list[tuple[float, str]] = field(default_factory=list)
    """MiB that the server has more than before, after each thing that the upstream did."""
    most: tuple[float, str] = (0.0, "")
    """MiB more than before at any time, and what the upstream did then."""
    doing: str = ""


def test_r24_no_upstream_makes_the_server_fail_grow_or_stand_still() -> None:
    assert {case.mode for case in CASES} == HOSTILE.keys()
    kwargs = {"timeout": TIMEOUT_SECONDS}
    with relayed(extensions=["probe_extension", "bench_loop"], model_kwargs=kwargs, max_in_flight=64) as running:
        wrong, watch, began = Counter[str](), Watch(), time.monotonic()
        quiet = running.held()
        assert running.server.request("DELETE", "bench/loop").status_code == 200
        elsewhere = asyncio.run(meet_all(running, wrong, watch))
        seconds = time.monotonic() - began
        loop = running.server.request("GET", "bench/loop").json()
        after = running.wait_until_quiet(quiet)
        records = running.records(10_000)
        log = running.server.log
        problems = running.server.request("GET", "llm/health").json()["problems"]
    asked = sum(len(case.apis) for case in CASES) * EACH
    (kept, keeper), (slowest, slowed), (most, taker) = max(watch.kept), max(watch.health), watch.most
    print(
        f"\nR24: {len(HOSTILE)} kinds of hostile upstreams in {len(CASES)} forms, {asked} requests in {seconds:.0f} s: "
        f"{wrong.total()} wrong answers; memory {watch.kept[-1][0]:+.0f} MiB at the end, {kept:+.0f} MiB after "
        f"{keeper}, {most:+.0f} MiB at any time ({taker}); health answered {len(watch.health)} times, after at most "
        f"{slowest * 1000:.0f} ms ({slowed}); beats of the loop late by "
        f"p99 {loop['p99_ms']:.0f} ms, at most {loop['max_ms']:.0f} ms; tasks {quiet.tasks} -> {after.tasks}, "
        f"open files {quiet.files} -> {after.files}; {len(records)} records"
    )
    told = "\n".join(f"{count} x {what}" for what, count in sorted(wrong.items()))
    assert not wrong, f"wrong answers:\n{told}"
    assert elsewhere == 0, "a redirect was followed"
    assert kept <= MOST_MIB, keeper
    assert most <= MOST_MIB, taker
    assert slowest <= HEALTH_SECONDS, slowed
    assert len(records) == min(asked, 10_000)
    assert problems == []
    assert "Traceback" not in log
    assert REALM not in log


async def meet_all(running: Relayed, wrong: Counter[str], watch: Watch) -> int:
    """Let clients meet every upstream; give how many requests went to where redirects lead."""
    async with another_origin() as (origin, seen), running.session() as client, watched(running, watch):
        places = asyncio.Semaphore(AT_ONCE)

        async def meet(case: Case, api: API) -> None:
            async with places:
                try:
                    async with asyncio.timeout(LONGEST_SECONDS):
                        said = await complaint(running, client, case, api, origin)
                except TimeoutError:
                    said = f"no end within {LONGEST_SECONDS:g} s"
                if said:
                    wrong[f"{case} on {api}: {said}"] += 1

        before = pss_kib(running.pid)
        for case in CASES:
            watch.doing = str(case)
            await asyncio.gather(*(meet(case, api) for api in case.apis for _ in range(EACH)))
            await asyncio.to_thread(running.probe)  # collects garbage: what is kept after that stays
            watch.kept.append(((await asyncio.to_thread(pss_kib, running.pid) - before) / 1024, str(case)))
        return len(seen)


@asynccontextmanager
async def another_origin() -> AsyncIterator[tuple[str, list[str]]]:
    """Serve where redirects lead; give the address, and what was asked for there."""
    seen: list[str] = []

    async def handle(request: web.Request) -> web.Response:
        seen.append(request.path)
        return web.json_response({})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/elsewhere", seen
    finally:
        await runner.cleanup()


@asynccontextmanager
async def watched(running: Relayed, watch: Watch) -> AsyncIterator[None]:
    """Look at the server all the time: whether it answers, and how large it is."""
    statm = Path(f"/proc/{running.pid}/statm")

    def pages() -> int:
        return int(statm.read_text().split()[1])

    before = pages()

    async def look() -> None:
        async with running.session() as client:
            while True:
                began = time.monotonic()
                async with client.get(running.url("llm/health")) as answer:
                    assert answer.status == 200, await answer.text()
                    await answer.read()
                watch.health.append((time.monotonic() - began, watch.doing))
                watch.most = max(watch.most, ((pages() - before) * 4 / 1024, watch.doing))
                await asyncio.sleep(0.02)

    looking = asyncio.create_task(look())
    try:
        yield
    finally:
        looking.cancel()
        (outcome,) = await asyncio.gather(looking, return_exceptions=True)
    assert isinstance(outcome, asyncio.CancelledError), outcome


# -- one request -----------------------------------------------------------------------------------------------


async def complaint(running: Relayed, client: aiohttp.ClientSession, case: Case, api: API, origin: str) -> str | None:
    """Send a request and say what is wrong with its answer."""
    words = prompt(case.mode, to=origin)
    asking = client.post(running.url(PATHS[api]), json=body_of(api, words, stream=case.stream))
    if case.endless:
        return await complaint_of_endless(asking)
    async with asking as answer:
        try:
            text = (await answer.read()).decode()
        except UnicodeDecodeError:
            return f"{answer.status} of {answer.content_type} that is not UTF-8"
        if REALM in text or REALM in str(answer.headers) or "WWW-Authenticate" in answer.headers:
            return "the challenge was passed on"
        if answer.status == 500:
            return f"500: {text[:300]}"
        if answer.status == 200 and answer.content_type == "text/event-stream":
            return complaint_of_stream(text, case)
        if answer.content_type != "application/json":
            return f"{answer.status}, no JSON but {answer.content_type}"
        if not is_json(text):
            return f"{answer.status} with a body that is no JSON: {text[:100]!r}"
        told = json.loads(text)
        if answer.status == 200:
            return None if not case.codes else f"200: {text[:100]!r}"
        return "an error, where a stream was to begin" if case.begins else complaint_of_error(told, case)


async def complaint_of_endless(asking: Any) -> str | None:
    """Stay for a while and leave."""
    read = 0
    try:
        async with asyncio.timeout(STAY_SECONDS), asking as answer:
            if answer.status != 200:
                return f"{answer.status}: {(await answer.text())[:300]}"
            async for part in answer.content.iter_any():
                read += len(part)
    except TimeoutError:
        return None
    return f"an end after {read} bytes"


def complaint_of_stream(text: str, case: Case) -> str | None:
    """Say what is wrong with a stream that has ended."""
    *events, nothing = text.split("\n\n")
    if nothing or not events:
        return f"a stream that ends in the middle of an event: {text[-100:]!r}"
    if events[-1] == "data: [DONE]":
        return "[DONE], as if all were well" if case.codes else None
    told = json.loads(events[-1].removeprefix("data: "))
    if not case.codes and "error" not in told:
        return f"a stream without an end: {text[-100:]!r}"
    if case.begins and len(events) < 2:
        return "the beginning of the stream is missing"
    if case.begins and not all(is_json(event.removeprefix("data: ")) for event in events if event):
        return f"an event by half is passed on: {text[:200]!r}"
    return complaint_of_error(told, case)


def is_json(text: str) -> bool:
    """Say whether a text is JSON that a client can parse."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def complaint_of_error(told: dict[str, Any], case: Case) -> str | None:
    """Say what is wrong with an error."""
    error = told.get("error")
    if not isinstance(error, dict) or not {"code", "message"} <= error.keys():
        return f"an error without code or message: {str(told)[:200]}"
    if error["code"] == "internal_error" or (case.codes and error["code"] not in case.codes):
        return f"{error['code']} instead of {' or '.join(case.codes) or 'something better'}: {error['message'][:200]}"
    return None
