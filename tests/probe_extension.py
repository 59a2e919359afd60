"""A server extension that looks into the server's own process: tasks, and what is buffered for clients and engines.

``GET {base_url}probe`` tells. ``PROBE_FLUSH_SECONDS`` in the environment takes the place of the minute after which
a client that reads nothing is cut off. With ``PROBE_LEAKS`` every look leaks a file, a task and two MiB, so that a test
can see that this is noticed.
"""

from __future__ import annotations

import asyncio
import gc
import os
from collections import Counter
from typing import Any, ClassVar

from aiohttp import StreamReader
from jupyter_server.base.handlers import APIHandler
from jupyter_server.utils import url_path_join
from tornado import web
from tornado.iostream import BaseIOStream

from jupyter_server_ext.handlers import streaming
from llmkit.engines.sse import EventCutter


class ProbeHandler(APIHandler):
    """``GET`` looks."""

    leaked: ClassVar[list[Any]] = []

    @web.authenticated
    async def get(self) -> None:
        if os.environ.get("PROBE_LEAKS"):
            waiting = asyncio.create_task(asyncio.Event().wait())
            self.leaked.append((os.open(os.devnull, os.O_RDONLY), waiting, os.urandom(2 << 20)))
        gc.collect()
        tasks = Counter(getattr(task.get_coro(), "__qualname__", "?") for task in asyncio.all_tasks())
        self.finish({"tasks": tasks, "buffers": buffers()})


def buffers() -> dict[str, int]:
    """Give the bytes that wait in the server, by where they wait."""
    found = {"to clients": 0, "from clients": 0, "from engines": 0, "events by half": 0}
    for one in gc.get_objects():
        if isinstance(one, BaseIOStream) and not one.closed():
            found["to clients"] += len(one._write_buffer)
            found["from clients"] += one._read_buffer_size
        elif isinstance(one, StreamReader):
            found["from engines"] += one._size
        elif isinstance(one, EventCutter):
            found["events by half"] += len(one._rest)
    return found


def _jupyter_server_extension_points() -> list[dict[str, str]]:
    return [{"module": "probe_extension"}]


def _load_jupyter_server_extension(app: Any) -> None:
    seconds = os.environ.get("PROBE_FLUSH_SECONDS")
    if seconds:
        streaming.FLUSH_SECONDS = float(seconds)
    app.web_app.add_handlers(".*$", [(url_path_join(app.base_url, "/probe"), ProbeHandler)])
