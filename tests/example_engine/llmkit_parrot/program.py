"""The program of a parrot: ``python -m llmkit_parrot.program SOCKET VOICE TIMES``, OpenAI's chat on a unix socket."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from aiohttp import web


def main() -> None:
    """Answer until it is ended."""
    socket, voice, times = sys.argv[1:]

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": voice, "object": "model"}]})

    async def chat(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        said = str(body["messages"][-1]["content"])
        words = (said.upper() if voice == "loud" else said).split() * int(times)
        usage = {"prompt_tokens": len(said.split()), "completion_tokens": len(words)}
        usage["total_tokens"] = sum(usage.values())
        if not body.get("stream"):
            message = {"role": "assistant", "content": " ".join(words)}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            return web.json_response(answer("chat.completion", voice, [choice], usage))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number, word in enumerate(words):
            delta = {"content": f"{' ' if number else ''}{word}"}
            await send(response, voice, [{"index": 0, "delta": delta, "finish_reason": None}])
        await send(response, voice, [{"index": 0, "delta": {}, "finish_reason": "stop"}])
        if (body.get("stream_options") or {}).get("include_usage"):
            await send(response, voice, [], usage)
        await response.write(b"data: [DONE]\n\n")
        return response

    app = web.Application(client_max_size=64 << 20)
    app.add_routes([web.get("/v1/models", models), web.post("/v1/chat/completions", chat)])
    print(f"A {voice} parrot listens.", flush=True)
    web.run_app(app, path=socket, print=None, access_log=None, shutdown_timeout=0.1)


def answer(kind: str, voice: str, choices: list[Any], usage: dict[str, int] | None = None) -> dict[str, Any]:
    """Make an answer, or a piece of a stream, as OpenAI's API has it."""
    made = {"id": "parrot", "object": kind, "created": int(time.time()), "model": voice, "choices": choices}
    return {**made, "usage": usage} if usage else made


async def send(
    response: web.StreamResponse, voice: str, choices: list[Any], usage: dict[str, int] | None = None
) -> None:
    """Send one piece of a stream."""
    piece = answer("chat.completion.chunk", voice, choices, usage)
    await response.write(f"data: {json.dumps(piece)}\n\n".encode())


if __name__ == "__main__":
    main()
