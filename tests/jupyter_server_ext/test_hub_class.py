"""A class of sixty at one service of a real JupyterHub: one key, one limit of the endpoint, a budget for each."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from aiohttp import web
from hub import Hub
from hub_service import KEY, config, person, wait_for_service
from mock_upstream import ANSWER, USAGE, MockUpstream
from support import START_SECONDS, free_port, scaled

from llmkit.client import Client
from llmkit.errors import BudgetExhausted

pytestmark = [pytest.mark.hub, pytest.mark.timeout(10 * START_SECONDS)]

STUDENTS = [f"student{number}" for number in range(60)]
PROMPTS = 20
AT_ONCE = 4
"""Requests that the endpoint takes at once; one more is a 429."""
PROXY_SECONDS = 60.0 if scaled(1) > 1 else 10.0
"""With `make soak`, a load of three minutes through a proxy that waits one."""
_MILLISECONDS = f"{PROXY_SECONDS * 1000:.0f}"
PROXY = f"""
c.ConfigurableHTTPProxy.command += ["--proxy-timeout", "{_MILLISECONDS}", "--timeout", "{_MILLISECONDS}"]
"""


class LimitedUpstream(MockUpstream):
    """Refuses with 429 what is more than it takes at once, as providers do."""

    def __init__(self) -> None:
        super().__init__(key=KEY)
        self.now = self.most = self.refused = self.answered = 0
        self.respond = self._limit

    async def _limit(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse | None:
        if request.path != "/v1/chat/completions":
            return None
        if self.now >= AT_ONCE:
            self.refused += 1
            return web.json_response({"error": {"message": "Rate limit reached"}}, status=429)
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await asyncio.sleep(0.01)
        finally:
            self.now -= 1
        self.answered += 1
        return None


@pytest.fixture(scope="module")
def upstream() -> Iterator[LimitedUpstream]:
    with LimitedUpstream() as running:
        yield running


@pytest.fixture(scope="module")
def service() -> Iterator[tuple[Hub, int]]:
    port = free_port()
    limits = [f"--LLMKitApp.user_limits=requests_per_day={PROMPTS}", "--LLMKitApp.user_limits=tokens_per_day=100000"]
    with Hub(config(port, *limits) + PROXY) as running:
        wait_for_service(running)
        yield running, port


@pytest.fixture(scope="module")
def teacher(service: tuple[Hub, int], upstream: LimitedUpstream) -> Iterator[Client]:
    with person(service[0], "grace") as client:
        kwargs = {"base_url": upstream.base_url, "api_key": "env:CLASS_API_KEY"}
        client.configure("gpt", "gpt-3", "openai", kwargs, max_in_flight=AT_ONCE)
        client.load("gpt", progress=False)
        yield client


def test_sixty_students(service: tuple[Hub, int], teacher: Client, upstream: LimitedUpstream) -> None:
    hub, _ = service
    clients = {name: person(hub, name) for name in STUDENTS}
    begin = threading.Barrier(len(STUDENTS))
    positions: set[int] = set()
    done = threading.Event()

    def ask(name: str) -> list[str]:
        begin.wait(60)
        return [str(clients[name].prompt("gpt", "Hello", max_tokens=10)) for _ in range(PROMPTS)]

    def watch(name: str) -> None:
        # Its own requests alone are listed, and yet each says how many are before it.
        while not done.is_set():
            listed = clients[name].requests(0).running
            assert {one.user for one in listed} <= {name}
            positions.update(one.position for one in listed if one.position is not None)
            time.sleep(0.05)

    began = time.monotonic()
    with ThreadPoolExecutor(len(STUDENTS) + 1) as pool:
        watching = pool.submit(watch, STUDENTS[-1])
        answers = list(pool.map(ask, STUDENTS))
        seconds = time.monotonic() - began
        done.set()
        watching.result(30)
    total = len(STUDENTS) * PROMPTS
    print(f"{total} prompts of {len(STUDENTS)} students in {seconds:.1f} s, positions up to {max(positions)}")
    assert answers == [[ANSWER] * PROMPTS] * len(STUDENTS)
    assert (upstream.answered, upstream.refused, upstream.most) == (total, 0, AT_ONCE)
    assert max(positions) > 1
    told = teacher.connection.call("GET", "llm/usage/")["usage"]
    used = {one["user"]: (one["requests"], one["tokens"]) for one in told if one["user"] in clients}
    assert used == dict.fromkeys(STUDENTS, (PROMPTS, PROMPTS * USAGE["total_tokens"]))
    recorded = Counter(one.user for one in teacher.requests(10_000).recent if one.outcome == "ok")
    assert {name: recorded[name] for name in STUDENTS} == dict.fromkeys(STUDENTS, PROMPTS)
    # The budget is exact: not one more.
    for client in clients.values():
        with pytest.raises(BudgetExhausted, match=f"{PROMPTS} requests a day"):
            client.prompt("gpt", "Hello", max_tokens=10)
        client.close()
    assert upstream.answered == total


def test_a_load_takes_longer_than_the_proxy_waits(service: tuple[Hub, int], teacher: Client) -> None:
    # Three phases of an engine's start, each as long as the limit.
    teacher.configure("slow", f"any --phase-seconds={PROXY_SECONDS}", "fake")
    began = time.monotonic()
    assert teacher.load("slow", progress=False).status == "loaded"
    seconds = time.monotonic() - began
    print(f"a load of {seconds:.0f} s through a proxy that waits {PROXY_SECONDS:.0f} s")
    assert seconds > 3 * PROXY_SECONDS
    teacher.unload("slow")
    # The limit is there: one request that waits for the load is cut off, and the load goes on.
    path = f"{teacher.url}llm/load_model/{teacher.model('slow').config_id}"
    with (
        httpx.Client(headers=teacher.connection.server.headers, trust_env=False, timeout=3 * PROXY_SECONDS) as plain,
        contextlib.suppress(httpx.RemoteProtocolError),  # the connection was closed, without a word
    ):
        assert plain.post(path).status_code >= 500
    assert teacher.model("slow").status == "loading"
    teacher.delete("slow", unload=True)


def test_what_the_way_through_the_hub_adds(service: tuple[Hub, int], teacher: Client) -> None:
    _, port = service
    alone, through = f"http://127.0.0.1:{port}/services/llmkit/", teacher.url
    options = {"max_tokens": 10}
    prompt = {"model_id": "gpt", "prompt": "Hello", "inference_kwargs": options}
    # The same way, but for what a model does: what this takes longer through the proxy is the proxy's own.
    nothing = {**prompt, "model_id": "unknown"}
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    with httpx.Client(headers=teacher.connection.server.headers, trust_env=False, timeout=60) as plain:
        for _ in range(100):  # by turns, so that all see the same machine
            for base in (alone, through):
                for body, status in ((nothing, 404), (prompt, 200)):
                    began = time.perf_counter()
                    answer = plain.post(f"{base}llm/inference/", json=body)
                    seconds[base, body["model_id"]].append(time.perf_counter() - began)
                    assert answer.status_code == status, answer.text
    middle = {what: statistics.median(taken) * 1e3 for what, taken in seconds.items()}
    proxys_own = middle[through, "unknown"] - middle[alone, "unknown"]
    added = middle[through, "gpt"] - middle[alone, "gpt"]
    print(f"a prompt takes {middle[alone, 'gpt']:.2f} ms, through the Hub {added:.2f} more; proxy: {proxys_own:.2f} ms")
    assert added <= 2 * proxys_own + 1.0  # of which a busy machine decides
