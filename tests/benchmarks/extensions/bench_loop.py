"""A server extension that measures how late the server's event loop is: a heartbeat, and a route to read it."""

from __future__ import annotations

import asyncio
from typing import Any

from jupyter_server.base.handlers import APIHandler
from jupyter_server.utils import url_path_join
from tornado import web

BEAT_SECONDS = 0.01


class Heartbeat:
    """Wants to be called every 10 ms, and notes how late it was."""

    def __init__(self) -> None:
        self.late: list[float] = []
        self.loop = asyncio.get_running_loop()
        self._due = self.loop.time()
        self.beat()

    def beat(self) -> None:
        """Note the lateness of this beat and ask for the next."""
        now = self.loop.time()
        self.late.append(now - self._due)
        self._due = now + BEAT_SECONDS
        self.loop.call_at(self._due, self.beat)

    def reset(self) -> None:
        """Forget the beats so far."""
        self.late = []

    def figures(self) -> dict[str, float]:
        """Give the count, and median, p99 and the worst in milliseconds."""
        late = sorted(self.late) or [0.0]  # read before the first beat after a reset
        last = len(late) - 1
        return {
            "count": len(self.late),
            "p50_ms": late[round(0.5 * last)] * 1000,
            "p99_ms": late[round(0.99 * last)] * 1000,
            "max_ms": late[last] * 1000,
        }


class LoopHandler(APIHandler):
    """``GET`` reads, ``DELETE`` resets."""

    def initialize(self, heartbeat: Heartbeat) -> None:
        self.heartbeat = heartbeat

    @web.authenticated
    def get(self) -> None:
        self.finish(self.heartbeat.figures())

    @web.authenticated
    def delete(self) -> None:
        self.heartbeat.reset()
        self.finish({})


def _jupyter_server_extension_points() -> list[dict[str, str]]:
    return [{"module": "bench_loop"}]


def _load_jupyter_server_extension(app: Any) -> None:
    # The loop that serves does not run yet; the first turn of it begins the heartbeat.
    route = url_path_join(app.base_url, "/bench/loop")
    app.io_loop.add_callback(
        lambda: app.web_app.add_handlers(".*$", [(route, LoopHandler, {"heartbeat": Heartbeat()})])
    )
