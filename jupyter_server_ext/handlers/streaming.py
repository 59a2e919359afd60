"""Server-sent events: one writer, a client that may leave or not read, and an end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, cast

from pydantic_core import to_json
from tornado import http1connection, iostream

from jupyter_server_ext.handlers.base import LLMHandler
from llmkit.errors import LLMKitError

FLUSH_SECONDS = 60.0
"""A client that takes nothing for so long is cut off."""
HEARTBEAT_SECONDS = 15.0
"""Proxies close what is quiet for a minute."""

T = TypeVar("T")


class StreamHandler(LLMHandler):
    """Base of the handlers that can answer with a stream.

    Attributes
    ----------
    heartbeat
        Gives the words of the comment that is sent while there is nothing else.
    """

    heartbeat: Callable[[], str]

    def initialize(self, name: str) -> None:
        """Note when the client leaves, from the first byte on."""
        super().initialize(name)
        self.heartbeat = _waiting
        self._client_gone = False
        self._working: asyncio.Task[Any] | None = None
        self._flushing: asyncio.Future[None] | None = None
        self._beating: asyncio.TimerHandle | None = None
        self._written_at = 0.0

    # -- the client ----------------------------------------------------------------------------------------

    def on_connection_close(self) -> None:
        """End what is done for a client that has left."""
        super().on_connection_close()  # ends the wait for a body that does not come any more
        self._client_gone = True
        if self._working is not None:
            self._working.cancel()

    async def until_gone(self, work: Coroutine[Any, Any, T]) -> T | None:
        """Do work for the client until it is done, or the client has left: then it is cancelled, and gives None."""
        if self._client_gone:
            work.close()
            return None
        task = self._working = asyncio.current_task()
        try:
            return await work
        except asyncio.CancelledError:
            if not self._client_gone or task is None:
                raise
            task.uncancel()
            return None
        finally:
            self._working = None
            self._stop_heartbeat()

    def on_finish(self) -> None:
        """Say nothing more."""
        self._stop_heartbeat()

    # -- writing -------------------------------------------------------------------------------------------

    async def send(self, *frames: Any) -> None:
        """Write JSON values as events; raises as `write_now`."""
        await self.write_now(events_of(*frames))

    async def write_now(self, data: bytes, *, is_last: bool = False) -> None:
        """Write whole events, and wait until the client has taken them; the last ones end the stream.

        Raises
        ------
        asyncio.CancelledError
            If the client is gone, or reads nothing for too long.
        """
        if not self._headers_written:
            self._begin_stream()
        if self._flushing is not None and not self._flushing.done():
            await self._until_taken(self._flushing)  # two flushes at once would forget the first
        self.write(data)
        flushing = self._flushing = self.finish() if is_last else self.flush()
        if not flushing.done():
            if is_last:  # Tornado tells nobody any more that the client has left
                self._connection.set_close_callback(self.on_connection_close)
            await self._until_taken(flushing)
            if is_last and self._connection.stream.closed():
                self._give_up()
        elif flushing.exception() is not None:
            self._give_up()
        self._written_at = time.monotonic()

    async def _until_taken(self, flushing: asyncio.Future[None]) -> None:
        try:
            # Not `wait_for`, which forgets a cancellation that comes when the flush is done already.
            async with asyncio.timeout(FLUSH_SECONDS):
                await asyncio.shield(flushing)
        except iostream.StreamClosedError:
            self._give_up()
        except TimeoutError:
            self._connection.stream.close()
            self._give_up()

    @property
    def _connection(self) -> http1connection.HTTP1Connection:
        return cast("http1connection.HTTP1Connection", self.request.connection)

    def _give_up(self) -> None:
        self._client_gone = True
        raise asyncio.CancelledError

    def _begin_stream(self) -> None:
        self.set_header("Content-Type", "text/event-stream")
        self.set_header("Cache-Control", "no-cache")
        self.set_header("X-Accel-Buffering", "no")
        _send_at_once(self._connection.stream)

    async def fail(self, raised: Exception) -> None:
        """End a stream that has begun with an error: there is no status to send any more."""
        error = raised if isinstance(raised, LLMKitError) else LLMKitError("The server failed on this request.")
        if error is not raised:
            self.log_exception(type(raised), raised, raised.__traceback__)
        if not self._finished:
            await self.write_now(events_of({"error": error.to_wire()["error"]}), is_last=True)

    def finish(self, *args: Any, **kwargs: Any) -> Any:
        """Finish, with the content type that was set, if it is another than Tornado's own."""
        content_type = self._headers.get("Content-Type", "text/html")
        if not content_type.startswith("text/html"):
            kwargs.setdefault("set_content_type", content_type)
        return super().finish(*args, **kwargs)

    # -- heartbeat -----------------------------------------------------------------------------------------

    def start_heartbeat(self) -> None:
        """From now on, say that something is still coming whenever nothing was said for a while."""
        self._written_at = time.monotonic()
        # Asking for the running loop is a system call in Python 3.11; a task knows its own.
        loop = self._working.get_loop() if self._working is not None else asyncio.get_running_loop()
        self._beating = loop.call_later(HEARTBEAT_SECONDS, self._beat)

    def _stop_heartbeat(self) -> None:
        if self._beating is not None:
            self._beating.cancel()
            self._beating = None

    def _beat(self) -> None:
        quiet = time.monotonic() - self._written_at
        is_written = self._flushing is None or self._flushing.done()
        if quiet >= HEARTBEAT_SECONDS and is_written and not self._client_gone and not self._finished:
            if not self._headers_written:
                self._begin_stream()
            self.write(f": {self.heartbeat()}\n\n")
            self._flushing = self.flush()
            self._flushing.add_done_callback(_ignore_error)
            self._written_at, quiet = time.monotonic(), 0.0
        self._beating = asyncio.get_running_loop().call_later(max(HEARTBEAT_SECONDS - quiet, 1.0), self._beat)


def _send_at_once(stream: iostream.IOStream) -> None:
    """Let no event wait for the client's word that it has the one before: it can be 40 ms late (Nagle's algorithm)."""
    stream.set_nodelay(True)
    # For as long as the connection lasts: Tornado turns it off and on with two system calls after every answer.
    stream.set_nodelay = _leave  # type: ignore[method-assign]


def _leave(value: object) -> None:
    """Leave Nagle's algorithm as it is."""


def events_of(*values: Any) -> bytes:
    """Write JSON values as events."""
    return b"".join([b"data: " + to_json(value) + b"\n\n" for value in values])


def _waiting() -> str:
    return "waiting"


def _ignore_error(flushing: asyncio.Future[None]) -> None:
    # Who writes next, or the connection's own callback, finds that the client is gone.
    if not flushing.cancelled():
        flushing.exception()
