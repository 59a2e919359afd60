"""One request: who asked for what, when its steps happened, and how others can end it."""

from __future__ import annotations

import asyncio
import os
import time
from copy import copy
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Literal

from llmkit.errors import LLMKitError, RequestCancelled
from llmkit.schemas import Cost, Outcome, Prices, Priority, RunningRequest, Timings, Usage

MOST_KEPT_BYTES: Final = 1 << 20
"""Of a question and of an answer, for the record."""
_MOST_TOKENS: Final = 1 << 53
"""What JSON and Prometheus can tell apart."""
Recorded = tuple[Any, ...]
"""Of plain values alone."""


def new_request_id() -> str:
    """Make an ID that nobody can guess."""
    return f"req-{os.urandom(12).hex()}"


@dataclass(eq=False, slots=True)
class Running:
    """A request, from the moment in which it is known to its end; moments are seconds of `time.monotonic`."""

    model_id: str
    api: str
    """As in `RequestRecord.api`."""
    request_id: str = field(default_factory=new_request_id)
    priority: Priority = "interactive"
    stream: bool = False
    key: str | None = None
    """Name of the key for tools that it came with."""
    user: str | None = None
    """Who asks, on a server that many people share."""
    task: asyncio.Task[Any] | None = field(default_factory=asyncio.current_task)
    error: LLMKitError | None = None
    """Why somebody else ended it."""
    status: Literal["queued", "loading", "running"] = "queued"
    answered_by: str | None = None
    answering: bool = False
    """Whether something of the answer is on its way to the client."""
    complete: bool = False
    """Whether all of it is."""
    failed: str | None = None
    """The code of an error that the engine's own answer tells."""
    started_at: float = field(default_factory=time.time)
    """Seconds of the epoch."""
    start: float = field(default_factory=time.monotonic)
    asked: float = field(default_factory=time.monotonic)
    """When the model that is to answer was asked; after a fallback later than `start`."""
    queue: float = 0.0
    load: float = 0.0
    sent: float | None = None
    first_token: float | None = None
    usage: Usage | None = None
    prices: Prices | None = None
    """Of the model that answers."""
    request_body: bytes | None = None
    response_body: list[bytes] | None = None
    """Pieces of the answer; None if nobody wants them."""
    kept_bytes: int = 0

    # -- ending it -----------------------------------------------------------------------------------------

    def abort(self, error: LLMKitError) -> None:
        """End the request with an error, unless its answer is complete.

        The first error counts; but who has cancelled a request is not to get the answer of a fallback.
        """
        if self.complete:
            return
        first = self.error is None
        if first or isinstance(error, RequestCancelled):
            self.error = error
        if first and self.task is not None:
            self.task.cancel()

    def tell(self, raised: BaseException) -> None:
        """Raise the error that a cancellation by `abort` stands for; do nothing if it was none."""
        if self.error is not None and isinstance(raised, asyncio.CancelledError | LLMKitError):
            if self.task is not None and self.task.uncancel():
                return  # somebody else has cancelled it, too: the client is gone
            # A copy: one error can end many requests, and would keep what is in their frames, prompts and all.
            raise copy(self.error) from None

    def keep(self, data: bytes) -> None:
        """Keep a piece of the answer for the record, if it is wanted and not too much."""
        if self.response_body is not None and self.kept_bytes < MOST_KEPT_BYTES:
            self.response_body.append(data)
            self.kept_bytes += len(data)

    # -- telling of it -------------------------------------------------------------------------------------

    def ask(self, model_id: str, prices: Prices | None) -> None:
        """Note that a model is asked now, the first one or a fallback."""
        self.status, self.sent, self.error = "queued", None, None
        self.answered_by, self.prices = model_id, prices
        self.asked = time.monotonic()

    def begin(self, load_seconds: float) -> None:
        """Note that the request goes to the engine now."""
        self.status = "running"
        self.sent = time.monotonic()
        self.load = load_seconds
        self.queue = self.sent - self.asked - load_seconds

    def record_bodies(self, request: bytes) -> None:
        """Keep question and answer for the record, from now on."""
        self.request_body, self.response_body, self.kept_bytes = request[:MOST_KEPT_BYTES], [], 0

    def timings(self) -> Timings:
        """Give the durations up to now."""
        return Timings(**self._timings(time.monotonic() - self.start))

    def _timings(self, total: float) -> dict[str, float | None]:
        tokens = self.usage.completion_tokens if self.usage else None
        generating = total - (self.sent - self.start if self.sent is not None else 0.0)
        return {
            "queue": round(self.queue, 6),
            "load": round(self.load, 6),
            "first_token": None if self.first_token is None else round(self.first_token - self.start, 6),
            "total": round(total, 6),
            "tokens_per_second": round(tokens / generating, 3) if tokens and generating > 0 else None,
        }

    def cost(self) -> Cost | None:
        """Give the price, or None where prices or tokens are not known."""
        usage, prices = self.usage, self.prices
        if prices is None or usage is None or usage.prompt_tokens is None or usage.completion_tokens is None:
            return None
        amount = (usage.prompt_tokens * prices.input + usage.completion_tokens * prices.output) / 1_000_000
        return Cost(amount=round(amount, 12), currency=prices.currency)

    def record(self, outcome: Outcome, status: int, error: str | None, seconds: float) -> Recorded:
        """Give what `RequestRecord` is made of, once the request is over; `read_record` does that.

        A flat tuple, which Python's garbage collector does not look into: thousands of them can wait to be written,
        and each of its passes would stop the event loop for longer.
        """
        body = None if self.response_body is None else b"".join(self.response_body)
        usage, cost = self.usage, self.cost()
        return (
            self.request_id,
            self.model_id,
            self.answered_by if outcome == "ok" else None,
            self.api,
            self.priority,
            self.stream,
            self.key,
            self.started_at,
            outcome,
            status,
            error,
            self.user,
            *self._timings(seconds).values(),
            *((usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) if usage else (None, None, None)),
            *((cost.amount, cost.currency) if cost else (None, None)),
            self.request_body,
            body,
        )

    def to_wire(self, position: int | None) -> RunningRequest:
        """Say how it is now."""
        return RunningRequest(
            request_id=self.request_id,
            model_id=self.model_id,
            api=self.api,
            priority=self.priority,
            stream=self.stream,
            tool_key=self.key,
            started_at=datetime.fromtimestamp(self.started_at, UTC),
            status=self.status,
            position=position,
            elapsed_seconds=round(time.monotonic() - self.start, 3),
            user=self.user,
        )


def read_record(recorded: Recorded) -> dict[str, Any]:
    """Give the fields of a `RequestRecord` out of what `Running.record` has given."""
    (*head, queue, load, first_token, total, rate, prompt, completion, tokens, amount, currency, request, response) = (
        recorded
    )
    names = ("request_id", "model_id", "answered_by", "api", "priority", "stream", "tool_key", "started_at")
    fields = dict(zip((*names, "outcome", "status", "error", "user"), head, strict=True))
    return {
        **fields,
        "started_at": datetime.fromtimestamp(fields["started_at"], UTC),
        "timings": Timings(queue=queue, load=load, first_token=first_token, total=total, tokens_per_second=rate),
        "usage": None
        if prompt is None and completion is None
        else Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=tokens),
        "cost": None if amount is None else Cost(amount=amount, currency=currency),
        "request_body": request,
        "response_body": response,
    }


def read_usage(told: Any) -> Usage | None:
    """Read the tokens of an answer, in the words of chat and completions or of responses; None if there are none."""
    if not isinstance(told, dict):
        return None

    def count(*names: str) -> int | None:
        value = next((told[name] for name in names if name in told), None)
        return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST_TOKENS else None

    prompt, completion = count("prompt_tokens", "input_tokens"), count("completion_tokens", "output_tokens")
    if prompt is None and completion is None:
        return None
    return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=count("total_tokens"))
