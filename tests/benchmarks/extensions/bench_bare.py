"""The yardstick: the least that a relay in a Jupyter server can do.

A server extension with one handler that is let in by Jupyter's token, reads the body, posts it over one shared
session and writes back what comes. `relay` is also what the same thing without Jupyter does.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

import aiohttp
from jupyter_server.base.handlers import APIHandler
from jupyter_server.utils import url_path_join
from tornado import web

PATH = "/bench/v1/chat/completions"


class Relay:
    """One shared session to the upstream, made in the loop that uses it."""

    session: ClassVar[aiohttp.ClientSession | None] = None

    @classmethod
    async def answer(cls, handler: web.RequestHandler) -> None:
        """Send the request on, and its answer back."""
        if cls.session is None:
            cls.session = aiohttp.ClientSession(connector=_connector())
        url = (os.environ["BENCH_UPSTREAM"] or "http://engine/v1") + "/chat/completions"
        headers = {"Content-Type": "application/json"}
        async with cls.session.post(url, data=handler.request.body, headers=headers) as response:
            handler.set_status(response.status)
            handler.set_header("Content-Type", response.headers["Content-Type"])
            if response.content_type == "text/event-stream":
                async for chunk in response.content.iter_any():
                    handler.write(chunk)
                    await handler.flush()
            else:
                handler.write(await response.read())


def _connector() -> aiohttp.BaseConnector:
    """Go to the upstream that is named, or to the one engine that llmkit runs in this server."""
    if os.environ["BENCH_UPSTREAM"]:
        return aiohttp.TCPConnector(limit=0)
    [engine] = Path(os.environ["LLMKIT_RUN_DIR"]).rglob("engine.sock")
    return aiohttp.UnixConnector(str(engine), limit=0)


class BareHandler(APIHandler):
    """The relay behind Jupyter's authentication."""

    @web.authenticated
    async def post(self) -> None:
        await Relay.answer(self)


def _jupyter_server_extension_points() -> list[dict[str, str]]:
    return [{"module": "bench_bare"}]


def _load_jupyter_server_extension(app: Any) -> None:
    app.web_app.add_handlers(".*$", [(url_path_join(app.base_url, PATH), BareHandler)])
