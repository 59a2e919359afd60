"""The yardstick's relay without Jupyter: ``python bare_app.py`` prints its port and ends with its standard input."""

from __future__ import annotations

import asyncio
import sys

from bench_bare import PATH, Relay
from tornado import httpserver, netutil, web


class BareHandler(web.RequestHandler):
    """The relay, open to all."""

    async def post(self) -> None:
        await Relay.answer(self)


async def serve() -> None:
    """Serve until standard input ends."""
    sockets = netutil.bind_sockets(0, "127.0.0.1", backlog=1024)
    server = httpserver.HTTPServer(web.Application([(PATH, BareHandler)]))
    server.add_sockets(sockets)
    print(sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(serve())
