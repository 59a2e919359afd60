"""The mock upstream, a process of its own: ``python -m benchmarks.upstream``.

It prints the port it listens on and ends with its standard input. How it answers is asked for by the first word of
the last message, which every relay passes on (see `payloads.PAUSES`).
"""

from __future__ import annotations

import asyncio
import json
import sys

from aiohttp import web

from benchmarks.loops import new_loop
from benchmarks.payloads import BROKEN, DONE, MODEL, PAUSES, plain_answer, stream_events, usage_event

PLAIN = plain_answer()
EVENTS = stream_events()
USAGE = usage_event()


async def models(_: web.Request) -> web.Response:
    """List the one model."""
    return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "bench"}]})


async def chat(request: web.Request) -> web.StreamResponse:
    """Answer a chat completion."""
    body = json.loads(await request.read())
    mode = body["messages"][-1]["content"].partition(" ")[0]
    if mode == BROKEN:
        return web.json_response({"error": {"message": "This upstream is broken."}}, status=500)
    if not body.get("stream"):
        return web.Response(body=PLAIN, content_type="application/json")
    pause = PAUSES[mode]
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    for event in EVENTS:
        await response.write(event)
        # Even without a pause each chunk is a turn of the loop of its own, as in an engine.
        await asyncio.sleep(pause)
    if (body.get("stream_options") or {}).get("include_usage"):
        await response.write(USAGE)
    await response.write(DONE + b"\n\n")
    return response


async def serve() -> None:
    """Serve until standard input ends."""
    app = web.Application()
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/chat/completions", chat)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await runner.cleanup()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=new_loop) as loop_runner:
        loop_runner.run(serve())
