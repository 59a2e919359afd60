"""Requests for inference: who is asked, who is asked instead, how it ended, and what is remembered of it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from http import HTTPStatus
from typing import Any, Final, TypeVar

from pydantic_core import to_json

from llmkit.engines.http import EngineHTTP
from llmkit.errors import (
    BudgetExhausted,
    EngineGone,
    EngineRefused,
    LLMKitError,
    ModelNotFound,
    ModelNotLoaded,
    ModelUnloaded,
    NotReady,
    NotSupported,
    QueueFull,
    RateLimited,
    RequestCancelled,
    RequestNotFound,
    TimedOut,
    WrongState,
)
from llmkit.inference import openai_api
from llmkit.inference.bounds import check_media
from llmkit.inference.metrics import Metrics
from llmkit.inference.prompting import Collector, read_options, to_openai
from llmkit.inference.relay import WholeAnswer, Write, relay
from llmkit.inference.reserving import answer_bound, check_bounded, most_tokens, with_bound
from llmkit.inference.running import Running
from llmkit.registry.budgets import Budgets, Charge
from llmkit.registry.history import RequestHistory
from llmkit.registry.model import Model, Turn
from llmkit.registry.people import Person
from llmkit.schemas import InferenceAnswer, InferenceRequest, Outcome, Priority, RequestList, RunningRequest
from llmkit.tool_keys import ToolKey

CLIENT_CLOSED_REQUEST: Final = 499
"""nginx's status for a client that has left before its answer."""
_REFUSED: Final = (HTTPStatus.BAD_REQUEST, HTTPStatus.UNPROCESSABLE_ENTITY)
_WORTH_ANOTHER: Final = (EngineGone, NotReady, RateLimited, TimedOut)
"""Errors of a model after which its fallback is asked; not what is wrong with the request, nor a full queue."""

Send = Callable[..., Awaitable[None]]
Known = Callable[[Running], None]
T = TypeVar("T")


class Requests:
    """The requests of one registry.

    Parameters
    ----------
    find
        Gives a model by its ``model_id``, or raises `ModelNotFound`.
    metrics, history
        Told of every request that is over.
    record_bodies
        Whether what was asked and answered is remembered, too.
    budgets
        Of the people who share the server; None where all are one.
    """

    def __init__(
        self,
        find: Callable[[str], Model],
        metrics: Metrics,
        history: RequestHistory,
        logger: logging.Logger,
        *,
        record_bodies: bool = False,
        budgets: Budgets | None = None,
    ) -> None:
        self._find = find
        self._budgets = budgets
        self._metrics = metrics
        self._history = history
        self._log = logger
        self._record_bodies = record_bodies
        self._running: dict[str, Running] = {}

    # -- asking --------------------------------------------------------------------------------------------

    async def infer(
        self,
        request: InferenceRequest,
        send: Send | None = None,
        *,
        priority: Priority = "interactive",
        key: ToolKey | None = None,
        by: Person | None = None,
        known: Known | None = None,
    ) -> InferenceAnswer:
        """Answer a prompt.

        Parameters
        ----------
        request
            The prompt and its parameters.
        send
            Called with the frames of a streamed answer, as many at once as have come, and awaited before more is read.
        priority
            The class of the request in the queue.
        key
            The key for tools that it came with: it asks only the models that this one may, also as a fallback.
        by
            Who asks.
        known
            Called once, with the request, before anything is waited for.

        Raises
        ------
        LLMKitError
        """
        options = read_options(request)
        model = find_for(key, self._find, request.model_id)
        running = Running(
            request.model_id,
            "inference",
            priority=priority,
            stream=send is not None,
            key=_name_of(key),
            user=_name_of(by),
        )
        if options.request_id is not None:
            running.request_id = options.request_id
        if running.request_id in self._running:
            raise WrongState(
                f"A request {running.request_id!r} is running.",
                param="inference_kwargs.request_id",
                hint="Choose another request_id, or none.",
            )

        most, bound = self._most(
            "inference", model, {**request.inference_kwargs, "prompt": request.prompt}, by, "inference_kwargs"
        )

        async def ask(model: Model, turn: Turn) -> InferenceAnswer:
            http = turn.http
            api = turn.capabilities.api or "chat"
            is_ours = not http.endpoint.fetches
            check_media(request.inference_kwargs, is_ours=is_ours, at="inference_kwargs")
            for adds_options in _tries(http):
                path, body = to_openai(
                    request, options, model.generation, api, http.endpoint.model, stream_options=adds_options
                )
                body = with_bound(
                    path[1:], body, request.inference_kwargs, bound, http.endpoint, turn.capabilities.max_model_len
                )
                if self._record_bodies:
                    running.record_bodies(to_json(body))
                try:
                    collector = await _collect(http, path, body, running, send)
                except EngineRefused as error:
                    if adds_options and send is not None and _refuses_options(error.message, running):
                        continue
                    raise
                if send is not None:
                    http.takes_stream_options = adds_options
                break
            running.usage = collector.usage
            running.keep("".join(collector.text).encode("utf-8", "replace"))
            return collector.answer(running, turn.capabilities.engine_version)

        return await self._run(model, running, ask, idle_ttl=options.idle_ttl, key=key, known=known, by=by, most=most)

    async def relay(
        self,
        api: str,
        body: dict[str, Any],
        write: Write,
        *,
        priority: Priority = "interactive",
        headers: Mapping[str, str] | None = None,
        key: ToolKey | None = None,
        by: Person | None = None,
        known: Known | None = None,
    ) -> WholeAnswer | None:
        """Answer a request of OpenAI's API, with the engine's own words.

        Parameters
        ----------
        api
            One of `openai_api.PATHS`.
        body
            OpenAI's; ``model`` is a ``model_id``.
        write
            Takes whole events of a streamed answer, and is awaited before more is read.
        priority, key, by, known
            As in `infer`.
        headers
            Of the client's request, those that the engine may see.

        Returns
        -------
        WholeAnswer or None
            None if the answer was a stream.

        Raises
        ------
        LLMKitError
        """
        model = find_for(key, self._find, openai_api.model_of(body))
        openai_api.check(body)
        model_id, stream = model.configuration.model_id, openai_api.is_stream(body)
        running = Running(model_id, api, priority=priority, stream=stream, key=_name_of(key), user=_name_of(by))
        most, bound = self._most(api, model, body, by)

        async def ask(model: Model, turn: Turn) -> WholeAnswer | None:
            http = turn.http
            check_media(body, is_ours=not http.endpoint.fetches)
            if api == "tokenize" and "tokenize" not in http.endpoint.extras:
                raise no_engine_here(model)
            bounded = with_bound(api, body, body, bound, http.endpoint, turn.capabilities.max_model_len)
            for adds_options in _tries(http):
                call = openai_api.to_call(
                    api,
                    bounded,
                    model.generation,
                    http.endpoint.model,
                    model_api=turn.capabilities.api,
                    stream_options=adds_options,
                )
                if self._record_bodies:
                    running.record_bodies(call.body)
                answer = await relay(http, call, running, write, headers)
                if not call.adds_options and not call.lacks_options:
                    break
                if answer is None:
                    http.takes_stream_options = adds_options
                    break
                words = answer.body.decode("utf-8", "replace") if answer.status in _REFUSED else ""
                if not (call.adds_options and _refuses_options(words, running)):
                    break
            return answer

        return await self._run(model, running, ask, key=key, known=known, by=by, most=most)

    async def _run(
        self,
        model: Model,
        running: Running,
        ask: Callable[[Model, Turn], Awaitable[T]],
        *,
        idle_ttl: float | None = None,
        key: ToolKey | None = None,
        known: Known | None = None,
        by: Person | None = None,
        most: int = 0,
    ) -> T:
        """Ask a model, or its fallback, and note how it ends."""
        self._running[running.request_id] = running
        outcome: Outcome = "failed"
        status, code = 500, None
        tried: list[Model] = []
        charge: Charge | None = None
        try:
            if known is not None:
                known(running)
            if self._budgets is not None and by is not None:
                charge = await _reserve(self._budgets, running, by, most)
            while True:
                configuration = model.configuration
                running.ask(configuration.model_id, configuration.prices)
                try:
                    async with model.use(running, idle_ttl, auto_load=bool(configuration.auto_load)) as turn:
                        answer = await ask(model, turn)
                    break
                except LLMKitError as error:
                    tried.append(model)
                    following = self._fallback_of(model, error, tried, key)
                    if following is None or running.answering:
                        raise
                    model = following
            status, outcome = HTTPStatus.OK, "ok"
            if isinstance(answer, WholeAnswer) and answer.status >= HTTPStatus.BAD_REQUEST:
                status, outcome, code = answer.status, "refused", EngineRefused.code
            elif running.failed is not None:
                status, outcome, code = HTTPStatus.BAD_GATEWAY, "failed", running.failed
            return answer
        except LLMKitError as raised:
            outcome, status, code = _outcome_of(raised), raised.status, raised.code
            _part_from_its_origin(raised)
            raise
        except asyncio.CancelledError:
            outcome, status = "cancelled", CLIENT_CLOSED_REQUEST
            raise
        finally:
            del self._running[running.request_id]
            if charge is not None and self._budgets is not None:
                _settle(self._budgets, charge, running, outcome, code)
            self._note(running, outcome, int(status), code)

    def _most(
        self, api: str, model: Model, asked: dict[str, Any], by: Person | None, at: str = ""
    ) -> tuple[int, int | None]:
        """Give the tokens that a request can take, and what bounds its answer, where anybody counts them.

        The bound is None where it need not be sent. It is decided once, so that a fallback with other defaults keeps
        within what was reserved.
        """
        if self._budgets is None or by is None or api == "tokenize":  # nothing is generated, and nobody pays for it
            return 0, None
        limited = self._budgets.counts_tokens and not by.administers
        if limited:
            check_bounded(api, asked, at)
        bound = answer_bound(api, asked, model.generation)
        return most_tokens(asked, bound), bound if limited else None

    def _fallback_of(self, model: Model, error: LLMKitError, tried: list[Model], key: ToolKey | None) -> Model | None:
        """Give the model to ask instead, or None."""
        name = model.configuration.fallback
        failed = isinstance(error, ModelNotLoaded) and model.status == "failed"
        if name is None or not (failed or isinstance(error, _WORTH_ANOTHER)):
            return None
        if key is not None and not key.allows(name):
            return None
        try:
            following = self._find(name)
        except LLMKitError as missing:
            if isinstance(missing, ModelNotFound):
                self._log.warning("%s names a fallback that does not exist: %s.", model.configuration.model_id, name)
            return None
        if following in tried:
            return None
        self._log.warning(
            "%s failed on a request (%s); %s is asked instead.", model.configuration.model_id, error.code, name
        )
        return following

    def _note(self, running: Running, outcome: Outcome, status: int, error: str | None) -> None:
        seconds = time.monotonic() - running.start
        self._history.add(running.record(outcome, status, error, seconds))
        with suppress(LLMKitError):
            self._find(running.model_id)  # one that was deleted meanwhile has no figures any more
            self._metrics.request_is_over(running, outcome, seconds)

    # -- looking and ending --------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._running)

    def running(self, model_id: str | None = None, by: Person | None = None) -> list[RunningRequest]:
        """Give the requests that are not over, oldest first, as far as who looks may see them."""
        positions: dict[str, dict[Any, int]] = {}
        found = []
        for one in self._running.values():
            if model_id not in (None, one.model_id) or not _may_see(by, one):
                continue
            name = one.answered_by or one.model_id
            if name not in positions:
                try:
                    positions[name] = self._find(name).admission.positions()
                except LLMKitError:  # deleted meanwhile
                    positions[name] = {}
            found.append(one.to_wire(positions[name].get(one)))
        return found

    def position(self, running: Running) -> int | None:
        """Give the place of a request in the queue of the model that is to answer it; None if it waits in none."""
        try:
            return self._find(running.answered_by or running.model_id).admission.positions().get(running)
        except LLMKitError:
            return None  # deleted meanwhile

    async def overview(self, limit: int, model_id: str | None = None, by: Person | None = None) -> RequestList:
        """Give what runs, and as much of what is over: their own to people who do not administer the server."""
        user = None if by is None or by.administers else by.name
        recent = await self._history.recent(limit, model_id, user)
        return RequestList(running=self.running(model_id, by), recent=recent)

    def cancel(self, request_id: str, key: ToolKey | None = None, by: Person | None = None) -> None:
        """End a running request, or raise `RequestNotFound`; with a key for tools, or of many people, an own one."""
        running = self._running.get(request_id)
        if running is None or (key is not None and running.key != key.name) or not _may_see(by, running):
            raise RequestNotFound(f"No running request has the id {request_id[:128]!r}.", param="request_id")
        running.abort(RequestCancelled("The request was cancelled.", hint="Somebody deleted it by its request_id."))


def no_engine_here(model: Model) -> NotSupported:
    """Make the error of what an endpoint may not offer beside OpenAI's API."""
    return NotSupported(
        f"`{model.configuration.model_id}` runs elsewhere, and its endpoint does not offer this.",
        param="model",
    )


def find_for(key: ToolKey | None, find: Callable[[str], Model], model_id: str) -> Model:
    """Give a model that a key may ask, or raise `ModelNotFound`, which tells nothing of the names of others."""
    if key is None:
        return find(model_id)
    with suppress(ModelNotFound):
        if key.allows(model_id):
            return find(model_id)
    raise ModelNotFound(
        f"There is no model {model_id[:128]!r} for the key `{key.name}`.",
        param="model_id",
        hint="GET /llm/v1/models lists those that it may ask.",
    )


def _name_of(asker: ToolKey | Person | None) -> str | None:
    return None if asker is None else asker.name


def _may_see(by: Person | None, running: Running) -> bool:
    return by is None or by.administers or by.name == running.user


async def _reserve(budgets: Budgets, running: Running, by: Person, most: int) -> Charge:
    try:
        return await budgets.reserve(by.name, running.model_id, most, limited=not by.administers)
    except asyncio.CancelledError as raised:
        running.tell(raised)  # it was cancelled by its ID
        raise


def _settle(budgets: Budgets, charge: Charge, running: Running, outcome: Outcome, code: str | None) -> None:
    """Charge what a request took: nothing if it was never sent, no tokens if the engine has refused it."""
    if running.sent is None:
        budgets.take_back(charge)
    elif running.usage is not None:
        told = running.usage
        whole = (told.prompt_tokens or 0) + (told.completion_tokens or 0)
        budgets.settle(charge, max(told.total_tokens or 0, whole))
    else:
        # An engine that has not answered in time may have been at work all the while.
        unpaid = outcome in ("refused", "failed") and not running.answering and code != TimedOut.code
        budgets.settle(charge, 0 if unpaid else None)


def _tries(http: EngineHTTP) -> tuple[bool, ...]:
    """Say whether to ask for the usage of a stream, and again without that where an endpoint does not know it.

    Without it the tokens of a stream are not counted.
    """
    return (True, False) if http.takes_stream_options else (False,)


def _refuses_options(words: str, running: Running) -> bool:
    """Say whether an endpoint refuses what we have added to a request for a stream."""
    return "stream_options" in words and not running.answering


async def _collect(http: EngineHTTP, path: str, body: dict[str, Any], running: Running, send: Send | None) -> Collector:
    """Ask the engine and put its answer together; with ``send``, hand on what is new as it comes."""
    collector = Collector()
    if send is None:
        answer = await http.json("POST", path, body)
        running.answering = True
        collector.add_whole(answer)
        return collector
    async with aclosing(http.events(path, body)) as events:
        async for pieces in events:
            frames, failure = collector.add_all(pieces)
            if frames:
                running.first_token = running.first_token or time.monotonic()
                running.answering = True
                await send(*frames)
            if failure is not None:
                raise failure
    return collector


def _part_from_its_origin(error: LLMKitError) -> None:
    """Let go of where an error was raised, and of the errors that it was made of.

    They hold what the engine sent, which can be megabytes, and each other; together they would stay until Python
    collects garbage, which in a server of few objects is seldom.
    """
    error.__traceback__ = error.__cause__ = error.__context__ = None


def _outcome_of(error: LLMKitError) -> Outcome:
    if isinstance(error, QueueFull | BudgetExhausted):
        return "rejected"
    if isinstance(error, RequestCancelled | ModelUnloaded):
        return "cancelled"
    if isinstance(error, RateLimited) or error.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return "failed"
    return "refused"
