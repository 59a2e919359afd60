"""Server-sent events: one writer, a client that may leave or not read, and an end."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from pydantic_core import to_json
from tornado import iostream

from jupyter_server_ext.handlers.base import LLMHandler

FLUSH_SECONDS = 60.0
"""A client that takes nothing for so long is cut off."""


class StreamHandler(LLMHandler):
    """Base of the handlers that can answer with a stream.

    Attributes
    ----------
    client_gone
        Set when the client has left.
    """

    def initialize(self, name: str) -> None:
        """Note when the client leaves, from the first byte on."""
        self.client_gone = asyncio.Event()
        super().initialize(name)

    def on_connection_close(self) -> None:
        """Note that the client is gone."""
        self.client_gone.set()

    async def send(self, *frames: Any) -> None:
        """Write JSON values as events; without any, a comment that keeps the line open.

        Raises
        ------
        asyncio.CancelledError
            If the client is gone, or reads nothing for too long.
        """
        await self.write_now(b"".join(b"data: " + to_json(frame) + b"\n\n" for frame in frames) or b": waiting\n\n")

    async def write_now(self, data: bytes) -> None:
        """Write a part of the stream, and wait until the client has taken it; raises as `send`."""
        if not self._headers_written:
            self.set_header("Content-Type", "text/event-stream")
            self.set_header("Cache-Control", "no-cache")
            self.set_header("X-Accel-Buffering", "no")
        self.write(data)
        try:
            # Not `wait_for`, which forgets a cancellation that comes when the flush is done already.
            async with asyncio.timeout(FLUSH_SECONDS):
                await self.flush()
        except (iostream.StreamClosedError, TimeoutError) as error:
            if isinstance(error, TimeoutError):
                self.detach().close()
            self.client_gone.set()
            raise asyncio.CancelledError from None

    async def end(self) -> None:
        """End the stream."""
        with contextlib.suppress(iostream.StreamClosedError):  # a client may leave with the last word
            await self.finish()

    def finish(self, *args: Any, **kwargs: Any) -> Any:
        """Finish, with the content type of a stream if it is one."""
        content_type = self._headers.get("Content-Type", "")
        if content_type.startswith("text/event-stream"):
            kwargs["set_content_type"] = content_type
        return super().finish(*args, **kwargs)
