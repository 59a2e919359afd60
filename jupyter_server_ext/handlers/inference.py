"""Prompts: ask a model, and end a running request."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from jupyter_server.auth.decorator import authorized
from pydantic_core import to_json
from tornado import iostream, web

from jupyter_server_ext.handlers.base import RESOURCE, LLMHandler, until_gone
from llmkit.errors import LLMKitError
from llmkit.registry.registry import ModelRegistry
from llmkit.schemas import MAX_PROMPT_BYTES, InferenceRequest

FLUSH_SECONDS = 60.0
"""A client that takes nothing for so long is cut off; its request ends at the engine."""


class InferenceHandler(LLMHandler):
    """``POST /llm/inference/``."""

    max_body_bytes = MAX_PROMPT_BYTES

    def initialize(self, name: str) -> None:
        """Note when the client leaves, from the first byte on."""
        self._gone = asyncio.Event()
        super().initialize(name)

    def on_connection_close(self) -> None:
        """End the request at the engine when its client is gone."""
        self._gone.set()

    @web.authenticated
    @authorized("execute", resource=RESOURCE)
    async def post(self) -> None:
        """Answer a prompt, in one piece or as server-sent events."""
        registry = await self.registry()
        request = await self.read_body(InferenceRequest)
        await until_gone(self._ask(registry, request), self._gone)

    async def _ask(self, registry: ModelRegistry, request: InferenceRequest) -> None:
        if request.inference_kwargs.get("stream") is not True:
            self.answer(_plain(await registry.infer(request)))
            return
        try:
            answer = await registry.infer(request, self._send)
            await self._send(_plain(answer))
            await self._write(b"data: [DONE]\n\n")
        except Exception as raised:
            if not self._headers_written:
                raise
            # After the headers there is no status to send: the error is the last event.
            error = raised if isinstance(raised, LLMKitError) else LLMKitError("The server failed on this request.")
            if error is not raised:
                self.log_exception(type(raised), raised, raised.__traceback__)
            await self._send({"error": error.to_wire()["error"]})
        with contextlib.suppress(iostream.StreamClosedError):  # a client may leave with the last word
            await self.finish()

    async def _send(self, frame: dict[str, Any]) -> None:
        if not self._headers_written:
            self.set_header("Content-Type", "text/event-stream")
            self.set_header("Cache-Control", "no-cache")
            self.set_header("X-Accel-Buffering", "no")
        await self._write(b"data: " + to_json(frame) + b"\n\n")

    async def _write(self, data: bytes) -> None:
        self.write(data)
        try:
            # Not `wait_for`, which forgets a cancellation that comes when the flush is done already.
            async with asyncio.timeout(FLUSH_SECONDS):
                await self.flush()
        except (iostream.StreamClosedError, TimeoutError) as error:
            if isinstance(error, TimeoutError):
                self.detach().close()
            self._gone.set()
            raise asyncio.CancelledError from None

    def finish(self, *args: Any, **kwargs: Any) -> Any:
        """Finish, with the content type of a stream if it is one."""
        content_type = self._headers.get("Content-Type", "")
        if content_type.startswith("text/event-stream"):
            kwargs["set_content_type"] = content_type
        return super().finish(*args, **kwargs)


def _plain(answer: Any) -> dict[str, Any]:
    """Leave out what this answer has none of."""
    optional = {"reasoning", "tool_calls", "cost"}
    return {k: v for k, v in answer.model_dump(mode="json").items() if v is not None or k not in optional}


class RequestHandler(LLMHandler):
    """``DELETE /llm/inference/{request_id}``."""

    @web.authenticated
    @authorized("execute", resource=RESOURCE)
    async def delete(self, request_id: str) -> None:
        """End a running request."""
        registry = await self.registry()
        registry.cancel(request_id)
        self.answer({"message": "Request cancelled", "request_id": request_id})
