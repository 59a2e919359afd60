"""An OpenAI-compatible endpoint that a test directs with its prompts, down to the bytes; a program of its own.

The last message of a request says how it is answered: ``MODE name=value ...``, for example
``stream id=7 count=64 pause=0.01``. What became of it can be asked for at ``/seen``, in moments of the clock that all
processes of a machine share.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, cast

import httpx
from benchmarks.loops import new_loop

MODEL: Final = "scripted"
EVENT_STREAM: Final = "text/event-stream"
FLOOD_BYTES: Final = 16 << 10


# -- for tests -------------------------------------------------------------------------------------------------


class ScriptedUpstream:
    """``with ScriptedUpstream() as upstream:`` runs it in a process of its own; `base_url` is for a configuration."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-c", "import scripted_upstream; scripted_upstream.main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parent,
        )
        assert self._process.stdout is not None
        self.origin = f"http://127.0.0.1:{int(self._process.stdout.readline())}"
        self.base_url = f"{self.origin}/v1"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def seen(self) -> dict[str, dict[str, Any]]:
        """Give what became of each request, by the ``id`` of its prompt: see `Exchange.told`."""
        return cast("dict[str, dict[str, Any]]", self._get("/seen"))

    def counts(self) -> dict[str, int]:
        """Give how many connections are open, how many requests came and run, and ran at once at most."""
        return cast("dict[str, int]", self._get("/counts"))

    def _get(self, path: str) -> Any:
        return httpx.get(self.origin + path, trust_env=False, timeout=10).json()


def prompt(mode: str, **values: object) -> str:
    """Write the words that direct the upstream."""
    return " ".join([mode, *(f"{name}={value}" for name, value in values.items())])


def word(number: int) -> str:
    """Give the text of one chunk of a stream."""
    return f"w{number:03d} "


# -- the program -----------------------------------------------------------------------------------------------


class Exchange:
    """A request and how it is answered; cancelled when its client leaves."""

    def __init__(self, connection: Connection, path: str, body: dict[str, Any]) -> None:
        self._connection = connection
        self.path = path
        self.body = body
        messages = body.get("messages") or [{"content": ""}]
        mode, *pairs = str(messages[-1]["content"]).split() or ["plain"]
        self.mode = mode
        self.values = dict(pair.split("=", 1) for pair in pairs)
        self.told: dict[str, Any] = {"begun": time.monotonic(), "how": "running", "ended": None, "sent": 0, "last": 0.0}

    def number(self, name: str, default: float) -> float:
        """Give a value of the prompt."""
        return float(self.values.get(name, default))

    async def send(self, data: bytes) -> None:
        """Send bytes as they are, and wait while the client takes no more."""
        await self._connection.write(data)
        self.told["sent"] += len(data)
        self.told["last"] = time.monotonic()

    async def head(self, kind: str, *lines: str, status: str = "200 OK") -> None:
        """Send a head; without a length the answer ends with the connection."""
        await self.send("\r\n".join([f"HTTP/1.1 {status}", f"Content-Type: {kind}", *lines, "", ""]).encode())

    async def chunk(self, data: bytes) -> None:
        """Send a piece of an answer in chunks."""
        await self.send(b"%x\r\n%b\r\n" % (len(data), data))

    async def answer(self, data: bytes, kind: str = "application/json", *lines: str, status: str = "200 OK") -> None:
        """Send a whole answer."""
        head = "\r\n".join([f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(data)}", *lines])
        await self.send(head.encode() + b"\r\n\r\n" + data)

    def close(self) -> None:
        """Close the connection once everything is sent."""
        self._connection.transport.close()


Behaviour = Callable[[Exchange], Awaitable[None]]


def event(data: dict[str, Any]) -> bytes:
    """Give one server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


def token(text: str) -> bytes:
    """Give the event of one piece of an answer."""
    return event({"choices": [{"index": 0, "delta": {"content": text}}]})


async def plain(exchange: Exchange) -> None:
    """Answer in one piece, after ``pause`` seconds."""
    await asyncio.sleep(exchange.number("pause", 0))
    message = {"role": "assistant", "content": f"answer to {exchange.values.get('id')}"}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    answer = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage}
    await exchange.answer(json.dumps(answer).encode())


async def stream(exchange: Exchange) -> None:
    """Send ``count`` chunks, ``pause`` seconds apart, waiting for ``hold`` seconds before the one numbered ``at``.

    With ``ragged``, what is sent at once has nothing to do with where events end.
    """
    count, pause = int(exchange.number("count", 64)), exchange.number("pause", 0)
    at, hold = int(exchange.number("at", -1)), exchange.number("hold", 0)
    if at == 0:
        await asyncio.sleep(hold)  # before the head, too
    await exchange.head(EVENT_STREAM, "Transfer-Encoding: chunked")
    name = exchange.values.get("id", "")
    if "ragged" in exchange.values:
        whole = b"".join(token(f"{name}:{word(number)}") for number in range(count)) + b"data: [DONE]\n\n"
        while whole:
            size = random.randint(1, 400)
            await exchange.chunk(whole[:size])
            whole = whole[size:]
            await asyncio.sleep(pause)
    else:
        for number in range(count):
            if number and number == at:
                await asyncio.sleep(hold)
            await exchange.chunk(token(f"{name}:{word(number)}"))
            await asyncio.sleep(pause)
        await exchange.chunk(b"data: [DONE]\n\n")
    await exchange.send(b"0\r\n\r\n")


async def flood(exchange: Exchange) -> None:
    """Send chunks without end, as fast as they are taken."""
    await exchange.head(EVENT_STREAM)
    one = token("flood " * 20)
    many = one * (FLOOD_BYTES // len(one))
    while True:
        await exchange.send(many)
        await asyncio.sleep(0)  # a client that takes all must not keep the others waiting


BEHAVIOURS: dict[str, Behaviour] = {"plain": plain, "stream": stream, "flood": flood}


class Upstream:
    """What all connections share."""

    def __init__(self, behaviours: dict[str, Behaviour]) -> None:
        self.behaviours = behaviours
        self.seen: dict[str, dict[str, Any]] = {}
        self.connections = self.asked = self.running = self.most = 0

    async def respond(self, exchange: Exchange) -> None:
        """Answer one request."""
        if exchange.path == "/v1/models":
            listed = {"object": "list", "data": [{"id": MODEL, "object": "model"}]}
            await exchange.answer(json.dumps(listed).encode())
        elif exchange.path == "/seen":
            await exchange.answer(json.dumps(self.seen).encode())
        elif exchange.path == "/counts":
            names = ("connections", "asked", "running", "most")
            await exchange.answer(json.dumps({name: getattr(self, name) for name in names}).encode())
        else:
            await self._watch(exchange)

    async def _watch(self, exchange: Exchange) -> None:
        self.asked += 1
        self.running += 1
        self.most = max(self.most, self.running)
        told = exchange.told
        if "id" in exchange.values:
            self.seen[exchange.values["id"]] = told
        try:
            await self.behaviours[exchange.mode](exchange)
            told["how"] = "complete"
        except asyncio.CancelledError:
            told["how"] = "left"
            raise
        finally:
            told["ended"] = time.monotonic()
            self.running -= 1


class Connection(asyncio.Protocol):
    """HTTP/1.1 by hand: an HTTP library would not send what is wrong."""

    transport: asyncio.Transport

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._received = b""
        self._task: asyncio.Task[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self._upstream.connections += 1

    def connection_lost(self, exc: Exception | None) -> None:
        self._upstream.connections -= 1
        if self._task is not None:
            self._task.cancel()

    def eof_received(self) -> None:
        # The relay never closes only one half: it has left, and takes nothing any more.
        self.transport.abort()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._task is None:
            self._take()

    def _take(self) -> None:
        head, found, rest = self._received.partition(b"\r\n\r\n")
        if not found:
            return
        first, *lines = head.decode("latin-1").split("\r\n")
        fields = dict(line.lower().split(": ", 1) for line in lines)
        length = int(fields.get("content-length", 0))
        if len(rest) < length:
            return
        self._received = rest[length:]
        exchange = Exchange(self, first.split()[1], json.loads(rest[:length] or b"{}"))
        self._task = asyncio.ensure_future(self._upstream.respond(exchange))
        self._task.add_done_callback(self._answered)

    def _answered(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if task.cancelled() or self.transport.is_closing():
            return
        task.result()
        self._take()

    async def write(self, data: bytes) -> None:
        """Write, and wait while too much is not taken yet."""
        self.transport.write(data)
        await self._writable.wait()


async def serve() -> None:
    """Serve until standard input ends."""
    from hostile_answers import HOSTILE  # it is made of what stands here

    upstream = Upstream({**BEHAVIOURS, **HOSTILE})
    server = await asyncio.get_running_loop().create_server(lambda: Connection(upstream), "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    server.close()


def main() -> None:
    """Print the port and serve until standard input ends."""
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(serve())
