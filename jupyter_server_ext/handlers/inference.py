"""Prompts: ask a model, and end a running request."""

from __future__ import annotations

from typing import Any

from jupyter_server.auth.decorator import authorized
from tornado import web

from jupyter_server_ext.handlers.base import RESOURCE, LLMHandler, until_gone
from jupyter_server_ext.handlers.streaming import StreamHandler
from llmkit.errors import LLMKitError
from llmkit.registry.registry import ModelRegistry
from llmkit.schemas import MAX_PROMPT_BYTES, InferenceRequest


class InferenceHandler(StreamHandler):
    """``POST /llm/inference/``."""

    max_body_bytes = MAX_PROMPT_BYTES

    @web.authenticated
    @authorized("execute", resource=RESOURCE)
    async def post(self) -> None:
        """Answer a prompt, in one piece or as server-sent events."""
        registry = await self.registry()
        request = await self.read_body(InferenceRequest)
        await until_gone(self._ask(registry, request), self.client_gone)

    async def _ask(self, registry: ModelRegistry, request: InferenceRequest) -> None:
        if request.inference_kwargs.get("stream") is not True:
            self.answer(_plain(await registry.infer(request)))
            return
        try:
            answer = await registry.infer(request, self.send)
            await self.send(_plain(answer))
            await self.write_now(b"data: [DONE]\n\n")
        except Exception as raised:
            if not self._headers_written:
                raise
            # After the headers there is no status to send: the error is the last event.
            error = raised if isinstance(raised, LLMKitError) else LLMKitError("The server failed on this request.")
            if error is not raised:
                self.log_exception(type(raised), raised, raised.__traceback__)
            await self.send({"error": error.to_wire()["error"]})
        await self.end()


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
