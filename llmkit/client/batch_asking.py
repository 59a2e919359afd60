"""Ask a model many prompts, some at a time, and outlive what goes wrong meanwhile.

One event loop in a thread of its own, with aiohttp: a request costs a fraction of what it costs with a thread for each,
and leaving it closes its connection at once, which ends the generation on the server. One worker for each prompt that
may run, not a task for each row, so that a long table takes no more memory than its answers do.

A prompt keeps its place until its answer is on the disk. So after a kill at most as many are asked twice as may run.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final, Literal

from llmkit import errors
from llmkit.client.batch_checkpoint import Checkpoint, Row
from llmkit.client.batch_server import BatchServer, ConfigurationChanged, Lost
from llmkit.errors import LLMKitError

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before the first retry at most, and before any; each is drawn at random below twice the one before."""
CHECK_SECONDS: Final = 2.0
"""How often the configuration is looked at; answers since the last time are taken back if it was changed."""
_STOP_SECONDS: Final = 10.0
_FIRST_LOOK: Final = 0.1

# Whatever the row, the answer would be the same.
HOPELESS: Final = (
    errors.NotAuthenticated,
    errors.NotAllowed,
    errors.NotFound,
    errors.KeyMissing,
    errors.KeyNotAllowed,
    errors.ModelNameNotFound,
    errors.ParameterForbidden,
    errors.UpstreamRefusedKey,
    errors.EngineNotInstalled,
)
ABSENT: Final = (errors.ModelNotLoaded, errors.ModelUnloaded, errors.ServerStopping)
"""The model is not there; the row has no part in that."""


@dataclass
class Plan:
    """What to ask, and how.

    Attributes
    ----------
    prompts
        Identity and prompt of what is to be asked, each once.
    check
        Gives what is wrong with an answer, given its text and why it ended; None if nothing is.
    patience
        Seconds to wait for a model, or a server, that is gone.
    """

    prompts: Iterator[tuple[str, str]]
    model_id: str
    inference_kwargs: Mapping[str, Any]
    concurrency: int
    retries: int
    priority: str
    on_engine_lost: Literal["wait", "fail"]
    patience: float
    check: Callable[[str, str | None], str | None]


@dataclass
class Asking:
    """Asks in a thread; the caller looks at the counts and at `note`.

    Attributes
    ----------
    done
        What became of each prompt, by its identity; only what is on the disk.
    note
        What it waits for now, for a person.
    """

    plan: Plan
    server: BatchServer
    checkpoint: Checkpoint
    done: dict[str, Row] = field(default_factory=dict)
    note: str = ""
    error: BaseException | None = None

    def __post_init__(self) -> None:
        self._finished = threading.Event()
        self._stopped = False
        self._news: deque[Row] = deque()
        self._unsure: list[str] = []
        self._thread = threading.Thread(target=self._run, name="llmkit-map", daemon=True)
        self._pending: list[tuple[Row, asyncio.Future[None]]] = []
        self._writer: asyncio.Task[None] | None = None
        self._regaining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._main: asyncio.Task[None] | None = None

    # -- for the caller's thread -------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Wait some time for the end, and say whether it has come."""
        return self._finished.wait(seconds)

    def take_news(self) -> list[Row]:
        """Give what has come to be done since the last time."""
        return [self._news.popleft() for _ in range(len(self._news))]

    def stop(self) -> None:
        """End what runs, here and on the server; answers that have come are written before."""
        self._stopped = True
        if self._loop is not None and self._main is not None:
            with contextlib.suppress(RuntimeError):  # it has ended meanwhile
                self._loop.call_soon_threadsafe(self._main.cancel)
        self._thread.join(_STOP_SECONDS)

    # -- in the loop -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            asyncio.run(self._ask_all())
        except asyncio.CancelledError:
            pass
        except BaseException as error:  # noqa: BLE001  # the caller's thread raises it
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            self.error = error
        finally:
            self._finished.set()

    async def _ask_all(self) -> None:
        self._loop, self._main = asyncio.get_running_loop(), asyncio.current_task()
        if self._stopped:
            return
        changed = False
        async with self.server:
            try:
                async with asyncio.TaskGroup() as group:
                    workers = [group.create_task(self._work()) for _ in range(self.plan.concurrency)]
                    watch = group.create_task(self._watch())
                    await asyncio.wait(workers)
                    watch.cancel()
                await self._check()
            except* ConfigurationChanged:
                changed = True
                raise
            finally:
                if self._regaining is not None:
                    self._regaining.cancel()
                if self._writer is not None:
                    await self._writer
                if changed:
                    self._take_back()

    async def _watch(self) -> None:
        """Look now and then whether the answers are still those of the configuration that they are kept for."""
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            await self._check()

    async def _check(self) -> None:
        before = len(self._unsure)
        try:
            await self.server.check()
        except ConfigurationChanged:
            raise
        except LLMKitError:
            return  # the workers see to what is wrong
        del self._unsure[:before]

    def _take_back(self) -> None:
        """Forget what was answered since the configuration was last seen to be the right one."""
        for identity in self._unsure:
            self.done.pop(identity, None)
        self.checkpoint.append(Row(id=identity, void=True) for identity in self._unsure)

    async def _work(self) -> None:
        for identity, prompt in self.plan.prompts:
            await self._commit(await self._ask(identity, prompt))

    async def _ask(self, identity: str, prompt: str) -> Row:
        """Ask until there is an answer, or an error that stays."""
        plan, failures = self.plan, 0
        body = {"model_id": plan.model_id, "prompt": prompt, "inference_kwargs": dict(plan.inference_kwargs)}
        headers = {"X-LLMKit-Priority": plan.priority}
        while True:
            if self._regaining is not None:
                await self._regain()
            generation = self.server.generation
            try:
                return self._read(identity, await self.server.call("POST", "llm/inference/", body, headers))
            except errors.QueueFull as error:
                await asyncio.sleep(_asked_pause(error) * random.uniform(1, 1.25))  # noqa: S311  # no secret
                continue  # there is no room yet: nothing has failed
            except HOPELESS as error:
                # A server that was started anew with another token knows us no more; one that is there means it.
                if not isinstance(error, (errors.NotAuthenticated, errors.NotAllowed)) or await self.server.is_there():
                    raise
                await self._regain(error)
            except LLMKitError as error:
                # What was not even begun has no part in the loss; what was may be its cause, and is not asked for ever.
                begun = not isinstance(error, ABSENT) and not (isinstance(error, Lost) and not error.sent)
                failures += begun
                if failures > plan.retries or (begun and not _may_pass(error)):
                    return Row(id=identity, error=_one_line(error))
                if await self._is_lost(error, generation):
                    await self._regain(error)
                else:
                    await asyncio.sleep(_pause(max(failures, 1), error))

    async def _is_lost(self, error: LLMKitError, generation: int) -> bool:
        if not isinstance(error, (Lost, *ABSENT, errors.EngineGone)) or generation != self.server.generation:
            return False
        return self._regaining is not None or not await self.server.is_there()

    def _read(self, identity: str, told: Mapping[str, Any]) -> Row:
        text, finish_reason = _sendable(str(told.get("response") or "")), told.get("finish_reason")
        usage, timings = told.get("usage") or {}, told.get("timings") or {}
        return Row(
            id=identity,
            response=text,
            error=self.plan.check(text, finish_reason),
            model_id=told.get("model_id"),
            finish_reason=finish_reason,
            prompt_tokens=usage.get("prompt_tokens"),
            completion_tokens=usage.get("completion_tokens"),
            seconds=timings.get("total"),
        )

    async def _regain(self, error: LLMKitError | None = None) -> None:
        """Wait until the model is there again; all workers share one wait."""
        if self._regaining is None:
            assert error is not None  # noqa: S101  # only a loss begins a wait
            self._regaining = asyncio.create_task(self._wait_for_model(error))
            self._regaining.add_done_callback(self._regained)
        await asyncio.shield(self._regaining)

    def _regained(self, task: asyncio.Task[None]) -> None:
        self.note = ""
        if not task.cancelled() and task.exception() is None:
            self._regaining = None

    async def _wait_for_model(self, lost: LLMKitError) -> None:
        plan = self.plan
        if plan.on_engine_lost == "fail":
            raise lost
        begun = time.monotonic()
        pause = _FIRST_LOOK
        while True:
            why = await self.server.regain()
            waited = time.monotonic() - begun
            if why is None:
                return
            if waited + pause > plan.patience:
                raise errors.TimedOut(
                    f"Waited {plan.patience:.0f} s for `{plan.model_id}` in vain: {why}.",
                    hint="Load it, or start the server, and run the same call again; `patience` is how long it waits.",
                ) from lost
            self.note = f"waiting, {why} ({waited:.0f} of {plan.patience:.0f} s)"
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, 5.0)

    # -- to the disk -------------------------------------------------------------------------------------------

    async def _commit(self, row: Row) -> None:
        """Return when the row is on the disk; those that end at about the same time are written together."""
        durable = asyncio.get_running_loop().create_future()
        self._pending.append((row, durable))
        if self._writer is None:
            self._writer = asyncio.create_task(self._write())
        await durable

    async def _write(self) -> None:
        failed: Exception | None = None
        while self._pending:
            group, self._pending = self._pending, []
            try:
                if failed is None:
                    await asyncio.to_thread(self.checkpoint.append, [row for row, _ in group])
            except Exception as error:  # noqa: BLE001  # the workers raise it
                failed = error
            if failed is None:
                self.done.update((row.id, row) for row, _ in group)
                self._unsure.extend(row.id for row, _ in group)
                self._news.extend(row for row, _ in group)
            for _, durable in group:
                if durable.done():  # its worker was stopped meanwhile
                    continue
                if failed is None:
                    durable.set_result(None)
                else:
                    durable.set_exception(failed)
        self._writer = None


def _may_pass(error: LLMKitError) -> bool:
    """Say whether the same request may be answered later."""
    return error.status >= HTTPStatus.INTERNAL_SERVER_ERROR or error.status == HTTPStatus.TOO_MANY_REQUESTS


def _pause(failures: int, error: LLMKitError) -> float:
    longest = min(FIRST_PAUSE * 2 ** (failures - 1), LONGEST_PAUSE)
    asked = _asked_pause(error) if isinstance(error, errors.RateLimited) else 0.0
    return asked + random.uniform(longest / 2, longest)  # noqa: S311  # spreads load, no secret


def _asked_pause(error: LLMKitError) -> float:
    """Give the seconds after which the server wants to be asked again."""
    try:
        return min(max(float(error.details.get("retry_after", 1)), 0.05), LONGEST_PAUSE)
    except (TypeError, ValueError):
        return 1.0


def _one_line(error: LLMKitError) -> str:
    return _sendable(f"{error.code}: {' '.join(error.message.split())}")


def _sendable(text: str) -> str:
    """Give a text that can be written; half a surrogate pair cannot."""
    return text.encode("utf-8", "replace").decode()
