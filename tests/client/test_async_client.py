"""The client for ``await``: the same methods, and tasks whose cancellation ends what they wait for on the server."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from mock_upstream import ANSWER, MockUpstream, chat_answer
from support import JupyterServer, wait_until

import llmkit
from llmkit.client import AsyncClient, Client
from llmkit.errors import LLMKitError, ModelNotLoaded

NOT_AWAITED = {"stream", "follow_logs", "openai", "async_openai", "as_async"}


@pytest.fixture
def loaded(client: Client, upstream: MockUpstream) -> str:
    client.configure("ask", "gpt-3", "openai", {"base_url": upstream.base_url})
    client.load("ask", progress=False)
    return "ask"


@pytest.fixture
def asking(client: Client) -> AsyncClient:
    return client.as_async()


class Held:
    """An upstream that begins its answers and ends none until it is let go."""

    def __init__(self, upstream: MockUpstream) -> None:
        self.running = 0
        self.most = 0
        self.go = threading.Event()
        upstream.respond = self._respond

    async def _respond(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse | None:
        if request.path != "/v1/chat/completions":
            return None
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            response: web.StreamResponse | None = None
            if body.get("stream"):
                response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
                await response.prepare(request)
                await response.write(b'data: {"choices": [{"delta": {"content": "la "}}]}\n\n')
            while not self.go.is_set():
                await asyncio.sleep(0.01)
            return response or web.json_response(chat_answer(ANSWER))
        finally:
            self.running -= 1


def public(kind: type) -> dict[str, Any]:
    return {name: found for name, found in inspect.getmembers(kind) if not name.startswith("_")}


def parameters(method: Any) -> list[tuple[str, Any, Any]]:
    return [(one.name, one.kind, one.default) for one in inspect.signature(method).parameters.values()]


# -- one core ------------------------------------------------------------------------------------------------------


def test_both_clients_have_the_same_names_with_the_same_parameters() -> None:
    sync, awaited = public(Client), public(AsyncClient)
    assert awaited.keys() - sync.keys() == {"connect"}
    assert sync.keys() - awaited.keys() == set()
    for name, method in sync.items():
        if callable(method):
            assert parameters(awaited[name]) == parameters(method), name
            assert awaited[name].__doc__, name
            assert inspect.iscoroutinefunction(awaited[name]) == (name not in NOT_AWAITED), name
        else:
            assert isinstance(awaited[name], property)
    assert parameters(AsyncClient.connect) == parameters(llmkit.connect)


async def test_a_model_is_configured_loaded_asked_and_deleted(server: JupyterServer, upstream: MockUpstream) -> None:
    async with await llmkit.AsyncClient.connect(server.url, server.token) as client:
        assert client.url == server.url
        assert client.as_async() is client
        try:
            await client.configure("ask", "gpt-3", "openai", {"base_url": upstream.base_url})
            with pytest.raises(ModelNotLoaded):
                await client.prompt("ask", "Hello")
            assert (await client.load("ask", progress=False)).status == "loaded"
            answer = await client.prompt("ask", "Hello", temperature=0.5)
            assert str(answer) == ANSWER
            assert answer.provenance["parameters"] == {"temperature": 0.5}
            assert "ask" in repr(await client.models())
            recent = (await client.requests(limit=1)).recent
            assert [one.request_id for one in recent] == [answer.request_id]
        finally:
            await client.delete("ask", unload=True)


async def test_a_stream_gives_its_pieces_and_then_the_answer(loaded: str, asking: AsyncClient) -> None:
    stream = asking.stream(loaded, "Hello")
    assert stream.answer is None
    assert [piece async for piece in stream] == ["The", " capital", " of", " France", " is", " Paris."]
    assert stream.text == ANSWER
    assert stream.answer is not None
    assert stream.answer.request_id == stream.request_id
    async with asking.stream(loaded, "Hello") as stream:
        assert "".join([piece.text async for piece in stream.pieces()]) == ANSWER


async def test_as_many_prompts_run_at_once_as_there_are_threads(
    loaded: str, asking: AsyncClient, upstream: MockUpstream
) -> None:
    held = Held(upstream)
    prompts = [asyncio.create_task(asking.prompt(loaded, "Hello")) for _ in range(70)]
    await asyncio.to_thread(wait_until, lambda: held.running == 64, "64 prompts at once", 20)
    held.go.set()
    assert [str(answer) for answer in await asyncio.gather(*prompts)] == [ANSWER] * 70
    assert held.most == 64


async def test_the_loop_goes_on_while_a_prompt_waits(loaded: str, asking: AsyncClient, upstream: MockUpstream) -> None:
    held = Held(upstream)
    prompt = asyncio.create_task(asking.prompt(loaded, "Hello"))
    await asyncio.to_thread(wait_until, lambda: held.running == 1, "the prompt", 10)
    assert not prompt.done()
    held.go.set()
    assert str(await prompt) == ANSWER


# -- cancelling ----------------------------------------------------------------------------------------------------


async def test_cancelling_a_prompt_ends_its_generation(
    loaded: str, client: Client, asking: AsyncClient, upstream: MockUpstream
) -> None:
    held = Held(upstream)
    prompt = asyncio.create_task(asking.prompt(loaded, "Hello", request_id="req-mine"))
    await asyncio.to_thread(wait_until, lambda: held.running == 1, "the prompt", 10)
    prompt.cancel()
    with pytest.raises(asyncio.CancelledError):
        await prompt
    await asyncio.to_thread(wait_until, lambda: held.running == 0, "the end of the generation", 2)
    (record,) = client.requests(limit=1).recent
    assert (record.request_id, record.outcome) == ("req-mine", "cancelled")


async def test_cancelling_the_reader_of_a_stream_ends_its_generation(
    loaded: str, asking: AsyncClient, upstream: MockUpstream
) -> None:
    held = Held(upstream)
    stream = asking.stream(loaded, "Sing")

    async def read() -> None:
        async for _ in stream:
            pass

    reader = asyncio.create_task(read())
    await asyncio.to_thread(wait_until, lambda: stream.text, "the first piece", 10)
    assert held.running == 1
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    await asyncio.to_thread(wait_until, lambda: held.running == 0, "the end of the generation", 2)
    assert stream.text == "la "


async def test_a_prompt_that_waits_for_a_thread_is_never_sent_when_it_is_cancelled(
    loaded: str, asking: AsyncClient, upstream: MockUpstream
) -> None:
    held = Held(upstream)
    prompts = [asyncio.create_task(asking.prompt(loaded, "Hello")) for _ in range(64)]
    await asyncio.to_thread(wait_until, lambda: held.running == 64, "64 prompts at once", 20)
    sent = len(upstream.requests)
    late = asyncio.create_task(asking.prompt(loaded, "late"))
    await asyncio.sleep(0.05)
    late.cancel()
    # All threads wait, and yet a running one is ended.
    prompts[0].cancel()
    await asyncio.wait([late, prompts[0]], timeout=10)
    assert late.cancelled()
    assert prompts[0].cancelled()
    held.go.set()
    await asyncio.gather(*prompts[1:])
    assert len(upstream.requests) == sent


async def test_cancelling_a_table_ends_its_requests(
    loaded: str, asking: AsyncClient, upstream: MockUpstream, tmp_path: Path
) -> None:
    held = Held(upstream)
    rows = [{"n": n} for n in range(20)]
    table = asyncio.create_task(
        asking.map(rows, "Say {n}", model=loaded, concurrency=4, checkpoint=tmp_path / "c", progress=False)
    )
    await asyncio.to_thread(wait_until, lambda: held.running == 4, "the first rows", 10)
    table.cancel()
    await asyncio.wait([table], timeout=8)
    assert table.cancelled()
    await asyncio.to_thread(wait_until, lambda: held.running == 0, "the end of the requests", 2)


@pytest.mark.parametrize("way", ["close", "cancel", "leave", "drop"])
async def test_a_stream_is_ended_in_each_other_way(
    loaded: str, asking: AsyncClient, upstream: MockUpstream, way: str
) -> None:
    held = Held(upstream)
    if way == "drop":
        async for _ in asking.stream(loaded, "Sing"):
            break
    else:
        async with asking.stream(loaded, "Sing") as stream:
            assert await anext(stream) == "la "
            assert held.running == 1
            if way == "close":
                await stream.close()
                assert [piece async for piece in stream] == []
            elif way == "cancel":
                await stream.cancel()
                with pytest.raises(LLMKitError, match="cancelled"):
                    await anext(stream)
    await asyncio.to_thread(wait_until, lambda: held.running == 0, "the end of the generation", 2)


@pytest.mark.parametrize("ours", [True, False])
async def test_cancelling_a_load_ends_it_if_it_is_ours(
    client: Client, asking: AsyncClient, upstream: MockUpstream, *, ours: bool
) -> None:
    client.configure("ask", "gpt-3", "openai", {"base_url": upstream.base_url})
    reached, go = threading.Event(), threading.Event()

    async def hold(request: web.Request, _: dict[str, Any]) -> None:
        if request.path == "/v1/models":
            reached.set()
            await asyncio.to_thread(go.wait, 10)

    upstream.respond = hold  # type: ignore[assignment]
    if not ours:
        client.start_loading("ask")
    load = asyncio.create_task(asking.load("ask", progress=False))
    assert await asyncio.to_thread(reached.wait, 10)
    await asyncio.sleep(0.1)
    load.cancel()
    with pytest.raises(asyncio.CancelledError):
        await load
    assert client.model("ask").status == ("unloaded" if ours else "loading")
    go.set()


async def test_a_log_is_followed_to_its_end(fake: Any) -> None:
    fake.replies["GET", "/llm/models/m/logs"] = (200, 'data: {"line": "a"}\n\ndata: {"line": "b"}\n\n')
    async with llmkit.connect(fake.url).as_async() as client:
        assert [line async for line in client.follow_logs("m")] == ["a", "b"]


async def test_cancelling_the_reader_of_a_silent_log_frees_its_thread(
    client: Client, asking: AsyncClient, upstream: MockUpstream
) -> None:
    client.configure("ask", "gpt-3", "openai", {"base_url": upstream.base_url})

    async def read() -> None:
        async for _ in asking.follow_logs("ask"):
            pass

    reader = asyncio.create_task(read())
    await asyncio.sleep(0.3)
    reader.cancel()
    await asyncio.wait([reader], timeout=3)
    assert reader.cancelled()


KERNEL = """
import threading
from jupyter_client.manager import start_new_kernel
manager, kernel = start_new_kernel(kernel_name="python3")
stop_after = {stop_after}
if stop_after:
    threading.Timer(stop_after, manager.interrupt_kernel).start()
try:
    print(kernel.execute_interactive({cell!r}, timeout=60)["content"].get("ename"))
finally:
    kernel.stop_channels()
    manager.shutdown_kernel(now=True)
"""


def in_a_kernel(server: JupyterServer, cell: str, stop_after: float = 0) -> str:
    """Run a cell that has a client in a real kernel, press stop after some seconds, and give what it prints."""
    made = f"import llmkit, asyncio\nclient = await llmkit.AsyncClient.connect({server.url!r}, {server.token!r})\n"
    code = KERNEL.format(cell=made + cell, stop_after=stop_after)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def test_await_works_at_the_top_of_a_cell(server: JupyterServer, loaded: str) -> None:
    """A real kernel: IPython awaits in its own loop."""
    cell = f"""
print(len(await asyncio.gather(*(client.prompt("{loaded}", "Hello") for _ in range(20)))))
async for piece in client.stream("{loaded}", "Hello"):
    print(piece, end="")
"""
    assert f"20\n{ANSWER}" in in_a_kernel(server, cell)


def test_the_stop_button_ends_what_a_cell_awaits(server: JupyterServer, loaded: str, upstream: MockUpstream) -> None:
    held = Held(upstream)
    started = time.monotonic()
    # Held for good: without the stop button this takes until the kernel is given up.
    assert "CancelledError" in in_a_kernel(server, f'await client.prompt("{loaded}", "Hello")', stop_after=3)
    wait_until(lambda: held.running == 0, "the end of the generation", 2)
    assert held.most == 1
    assert time.monotonic() - started < 30
