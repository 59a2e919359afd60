"""Prompts: ask a model, see what runs, and end a running request."""

from __future__ import annotations

from typing import Any, Final

from jupyter_server.auth.decorator import authorized
from tornado import web

from jupyter_server_ext.answers import Cancelled
from jupyter_server_ext.handlers.base import RESOURCE, LLMHandler
from jupyter_server_ext.handlers.streaming import StreamHandler, events_of
from jupyter_server_ext.operations import Number, Text, describes
from llmkit.errors import ASK_ERRORS, MalformedRequest, ModelNotFound, RequestNotFound
from llmkit.inference.running import Running
from llmkit.registry.requests import Requests
from llmkit.schemas import (
    ANSWER_MAY_LACK,
    InferenceAnswer,
    InferenceRequest,
    Priority,
    RequestList,
)

PRIORITY_HEADER: Final = "X-LLMKit-Priority"
REQUEST_ID_HEADER: Final = "X-Request-Id"
MODEL_HEADER: Final = "X-LLMKit-Model"
_PRIORITIES: Final[dict[str, Priority]] = {"interactive": "interactive", "batch": "batch"}
LIMIT = Number("limit", "Requests that are over, at most.", 100, 10_000)
MODEL_ID = Text("model_id", "Only requests to this model.")
PRIORITY = Text(
    PRIORITY_HEADER,
    "A batch goes after everything interactive in the queue; interactive if it is not said.",
    ("interactive", "batch"),
)
HEADERS_OF_ANSWERS: Final = {
    REQUEST_ID_HEADER: "By which the request can be ended, and is known in GET /llm/requests/.",
    MODEL_HEADER: "The model_id of the model that answered: another one if that failed and has a fallback.",
}


class AskingHandler(StreamHandler):
    """Base of the handlers that put a request to a model."""

    opened_by_keys = frozenset({"POST"})

    def initialize(self, name: str) -> None:
        """Take as much as the operator lets prompts be."""
        super().initialize(name)
        self.max_body_bytes = self.app.max_body_size

    def priority(self) -> Priority:
        """Read the class of the request."""
        given = self.request.headers.get(PRIORITY_HEADER, "interactive")
        if given not in _PRIORITIES:
            raise MalformedRequest(f"{PRIORITY_HEADER} must be interactive or batch.", param=PRIORITY_HEADER)
        return _PRIORITIES[given]

    def introduce(self, requests: Requests, running: Running) -> None:
        """Name a request to its client, and let a stream say that it waits."""
        self.running = running
        self.set_header(REQUEST_ID_HEADER, running.request_id)
        if running.stream:

            def describe() -> str:
                position = requests.position(running)
                return running.status if position is None else f"{running.status}, position {position}"

            self.heartbeat = describe
            self.start_heartbeat()

    def name_model(self) -> None:
        """Say in the headers which model answers: it can be a fallback."""
        if not self._headers_written and self.running.answered_by is not None:
            self.set_header(MODEL_HEADER, self.running.answered_by)


class InferenceHandler(AskingHandler):
    """``POST /llm/inference/``."""

    @describes(
        answer=InferenceAnswer,
        body=InferenceRequest,
        headers=(PRIORITY,),
        answer_headers=HEADERS_OF_ANSWERS,
        errors=ASK_ERRORS,
        streams='With `stream` in `inference_kwargs`: events `{"delta": ...}`, then the whole answer, then `[DONE]`; '
        'an error is a last event `{"error": ...}` without it.',
    )
    @web.authenticated
    @authorized("execute", resource=RESOURCE)
    async def post(self) -> None:
        """Answer a prompt, in one piece or as server-sent events."""
        await self.until_gone(self._ask())

    async def _ask(self) -> None:
        requests = (await self.registry()).requests
        request, priority = await self.read_body(InferenceRequest), self.priority()

        def known(running: Running) -> None:
            self.introduce(requests, running)

        if request.inference_kwargs.get("stream") is not True:
            answer = await requests.infer(request, priority=priority, key=self.tool_key, by=self.person, known=known)
            self.name_model()
            self.answer(_plain(answer))
            return

        async def send(*frames: dict[str, Any]) -> None:
            self.name_model()
            await self.send(*frames)

        try:
            answer = await requests.infer(
                request, send, priority=priority, key=self.tool_key, by=self.person, known=known
            )
            self.name_model()
            await self.write_now(events_of(_plain(answer)) + b"data: [DONE]\n\n", is_last=True)
        except Exception as raised:
            if not self._headers_written:
                raise
            await self.fail(raised)


def _plain(answer: Any) -> dict[str, Any]:
    """Leave out what this answer has none of."""
    return {k: v for k, v in answer.model_dump(mode="json").items() if v is not None or k not in ANSWER_MAY_LACK}


class RequestHandler(LLMHandler):
    """``DELETE /llm/inference/{request_id}``."""

    opened_by_keys = frozenset({"DELETE"})

    @describes(answer=Cancelled, errors=(RequestNotFound,))
    @web.authenticated
    @authorized("execute", resource=RESOURCE)
    async def delete(self, request_id: str) -> None:
        """End a running request."""
        registry = await self.registry()
        registry.requests.cancel(request_id, self.tool_key, self.person)
        self.answer(Cancelled(message="Request cancelled", request_id=request_id))


class RequestsHandler(LLMHandler):
    """``GET /llm/requests/``."""

    _track_activity = False

    @describes(answer=RequestList, query=(LIMIT, MODEL_ID), errors=(ModelNotFound,))
    @web.authenticated
    @authorized("read", resource=RESOURCE)
    async def get(self) -> None:
        """Answer the requests that run, and those of late."""
        registry = await self.registry()
        limit = self.number(LIMIT)
        model_id = self.get_query_argument(MODEL_ID.name, None)
        if model_id is not None:
            registry.model(model_id)  # 404 of one that does not exist
        found = await registry.requests.overview(limit, model_id, self.person)
        told = found.model_dump(mode="json")
        for record in (*told["running"], *told["recent"]):
            for name in ("request_body", "response_body", "user"):
                if name in record and record[name] is None:
                    del record[name]
        self.answer(told)
