"""A small OpenAI-compatible endpoint in a thread of its own, which answers as it is told and remembers all."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from typing import Any, Self

from aiohttp import web

ANSWER = "The capital of France is Paris."
Respond = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse | None]]


class MockUpstream:
    """``with MockUpstream() as upstream:`` serves on `base_url`.

    `respond` may answer instead; it is given the request and its body, and None lets the usual answer pass.
    `key` is the only key that is accepted, if it is set.
    """

    def __init__(self, models: tuple[str, ...] = ("gpt-3", "gpt-4o-mini"), key: str | None = None) -> None:
        self.models = models
        self.key = key
        self.respond: Respond | None = None
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.open_streams = 0
        self.aborted = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._started = threading.Event()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def never_end(self, word: str, pause: float) -> None:
        """Let every stream say one word again and again, with a pause of so many seconds, until its reader leaves."""

        async def respond(request: web.Request, body: dict[str, Any]) -> web.StreamResponse | None:
            if not body.get("stream"):
                return None
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            self.open_streams += 1
            try:
                while True:
                    await response.write(event({"choices": [{"delta": {"content": word}}]}))
                    await asyncio.sleep(pause)
            finally:
                self.open_streams -= 1
                self.aborted += 1

        self.respond = respond

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        runner = self._loop.run_until_complete(self._serve())
        self._started.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()

    async def _serve(self) -> web.AppRunner:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        self.origin = f"http://127.0.0.1:{port}"
        self.base_url = f"{self.origin}/v1"
        return runner

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read() or b"{}")
        self.requests.append((request.path, dict(request.headers), body))
        if self.respond is not None:
            answer = await self.respond(request, body)
            if answer is not None:
                return answer
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            said = f"Incorrect API key provided: {request.headers.get('Authorization')}"
            return web.json_response({"error": {"message": said}}, status=401)
        if request.path == "/v1/models":
            return web.json_response({"object": "list", "data": [{"id": name} for name in self.models]})
        if request.path == "/v1/chat/completions":
            return await self._stream(request) if body.get("stream") else web.json_response(chat_answer(ANSWER))
        return web.json_response({"error": {"message": "no such path"}}, status=404)

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        self.open_streams += 1
        try:
            for piece in ANSWER.split(" "):
                space = "" if piece == "The" else " "
                await response.write(event({"choices": [{"delta": {"content": space + piece}}]}))
            await response.write(event({"choices": [{"delta": {}, "finish_reason": "stop"}]}))
            await response.write(event({"choices": [], "usage": USAGE}))
            await response.write(b"data: [DONE]\n\n")
        except (ConnectionError, asyncio.CancelledError):
            self.aborted += 1
            raise
        finally:
            self.open_streams -= 1
        return response


USAGE = {"prompt_tokens": 8, "completion_tokens": 7, "total_tokens": 15}


def chat_answer(text: str) -> dict[str, Any]:
    """Give a whole chat completion."""
    message = {"role": "assistant", "content": text}
    return {"choices": [{"message": message, "finish_reason": "stop"}], "usage": USAGE}


def event(data: dict[str, Any]) -> bytes:
    """Give one server-sent event."""
    return b"data: " + json.dumps(data).encode() + b"\n\n"
