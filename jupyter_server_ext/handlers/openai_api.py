"""OpenAI's API: an unmodified ``openai.OpenAI(base_url=".../llm/v1", api_key=TOKEN)`` talks to these."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, Final

from jupyter_server.auth.decorator import authorized
from tornado import web

from jupyter_server_ext.answers import (
    ChatCompletionRequest,
    CompletionRequest,
    EmbeddingRequest,
    OpenAIModel,
    OpenAIModelList,
    OpenAIRequest,
    ResponseRequest,
    TokenizeRequest,
)
from jupyter_server_ext.handlers.base import RESOURCE, LLMHandler
from jupyter_server_ext.handlers.inference import HEADERS_OF_ANSWERS, PRIORITY, AskingHandler
from jupyter_server_ext.operations import Text, describes
from llmkit.errors import ASK_ERRORS, EngineRefused, ModelNotFound
from llmkit.inference import openai_api
from llmkit.inference.running import Running

RELAYED_PATHS: Final = "|".join(openai_api.PATHS)
BODIES: Final[dict[str, type[OpenAIRequest]]] = {
    "chat/completions": ChatCompletionRequest,
    "completions": CompletionRequest,
    "embeddings": EmbeddingRequest,
    "responses": ResponseRequest,
    "tokenize": TokenizeRequest,
}
PASSED_HEADERS: Final = ("traceparent", "tracestate", "OpenAI-Beta")
"""Of a client's request, to the engine."""


class OpenAIHandler(AskingHandler):
    """``POST /llm/v1/...``, of the APIs that engines have."""

    max_values = 1_000_000  # prompts and inputs of embeddings can be lists of tokens

    @describes(
        answer=dict[str, Any],
        body=BODIES,
        headers=(PRIORITY, *(Text(name, "Passed on to the engine.") for name in PASSED_HEADERS)),
        answer_headers=HEADERS_OF_ANSWERS,
        errors=ASK_ERRORS,
        streams='With `stream`: the engine\'s own events; an error is a last event `{"error": ...}` without `[DONE]`.',
        engine_errors=True,
    )
    @web.authenticated
    @authorized("execute", resource=RESOURCE)
    async def post(self, api: str) -> None:
        """Relay a request to the engine, and its answer to the client."""
        await self.until_gone(self._relay(api))

    async def _relay(self, api: str) -> None:
        requests = (await self.registry()).requests
        body, priority = await self.read_object(), self.priority()
        sent = self.request.headers
        headers = {name: sent[name] for name in PASSED_HEADERS if name in sent}

        def known(running: Running) -> None:
            self.introduce(requests, running)

        async def write(events: bytes, *, is_last: bool) -> None:
            self.name_model()
            await self.write_now(events, is_last=is_last)

        try:
            answer = await requests.relay(
                api,
                body,
                write,
                priority=priority,
                headers=headers or None,
                key=self.tool_key,
                by=self.person,
                known=known,
            )
        except Exception as raised:
            if not self._headers_written:
                raise
            await self.fail(raised)
            return
        if answer is None:
            return
        if self._headers_written:  # a heartbeat was quicker than an answer that is no stream
            if answer.status >= HTTPStatus.BAD_REQUEST and b'"error"' not in answer.body:
                await self.fail(EngineRefused(answer.body.decode("utf-8", "replace")))
            else:
                await self.write_now(b"data: " + b" ".join(answer.body.splitlines()) + b"\n\n", is_last=True)
            return
        self.name_model()
        for name, value in answer.headers.items():
            self.set_header(name, value)
        self.set_status(answer.status)
        self.finish(answer.body)


class OpenAIModelsHandler(LLMHandler):
    """``GET /llm/v1/models``."""

    opened_by_keys = frozenset({"GET"})
    _track_activity = False

    @describes(answer=OpenAIModelList)
    @web.authenticated
    @authorized("read", resource=RESOURCE)
    async def get(self) -> None:
        """List the models that can be asked now."""
        registry = await self.registry()
        self.answer({"object": "list", "data": registry.openai_models(self.tool_key)})


class OpenAIModelHandler(LLMHandler):
    """``GET /llm/v1/models/{model_id}``."""

    opened_by_keys = frozenset({"GET"})
    _track_activity = False

    @describes(answer=OpenAIModel, errors=(ModelNotFound,))
    @web.authenticated
    @authorized("read", resource=RESOURCE)
    async def get(self, model_id: str) -> None:
        """Answer one model, whether it can be asked now or not."""
        registry = await self.registry()
        self.answer(registry.openai_model(model_id, self.tool_key))
