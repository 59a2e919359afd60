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
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final, Literal

from llmkit import errors
from llmkit.client.batch_checkpoint import Checkpoint, Row
from llmkit.client.batch_keeping import Keeper
from llmkit.client.batch_server import BatchServer, Lost, is_gone
from llmkit.errors import LLMKitError

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before the first retry at most, and before any; each is drawn at random below twice the one before."""
_STOP_SECONDS: Final = 10.0
_FIRST_LOOK, _LONGEST_LOOK = 0.1, 5.0
_FULL: Final = "the queue of the model is full"
_SPENT: Final = "your budget is spent for now"
_SLOW: Final = "the endpoint asks to slow down"

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


class WaitedInVain(errors.TimedOut):
    """Nothing came for as long as the caller has patience."""


@dataclass
class Plan:
    """What to ask, and how.

    Attributes
    ----------
    identities
        Of the prompts to ask, each once.
    prompt
        Gives a prompt by its identity.
    check
        Gives what is wrong with an answer, given its text and why it ended; None if nothing is.
    patience
        Seconds to wait for a model, an endpoint or a server that is gone, or has no room.
    """

    identities: Sequence[str]
    prompt: Callable[[str], str]
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
    """

    plan: Plan
    server: BatchServer
    checkpoint: Checkpoint
    done: dict[str, Row] = field(default_factory=dict)
    error: BaseException | None = None

    def __post_init__(self) -> None:
        self._finished = threading.Event()
        self._stopped = False
        self._news: deque[Row] = deque()
        self._left = iter(self.plan.identities)
        self._working = self.plan.concurrency
        self._resting = {_FULL: 0, _SPENT: 0, _SLOW: 0}
        self._waiting_for = ""
        self._answers, self._answered_at = 0, 0.0
        self._good: Row | None = None
        for row in self.done.values():
            self._note_if_good(row)
        self._keeper = Keeper(self.checkpoint, self._check, self._kept)
        self._waiting: asyncio.Task[bool] | None = None
        self._thread = threading.Thread(target=self._run, name="llmkit-map", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._main: asyncio.Task[None] | None = None

    # -- for the caller's thread -------------------------------------------------------------------------------

    @property
    def note(self) -> str:
        """What it waits for now, for a person."""
        if self._waiting_for or sum(self._resting.values()) < self._working:
            return self._waiting_for
        return next((f"waiting, {why}" for why, count in self._resting.items() if count), "")

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
        """End what runs, here and on the server; answers that have come are written before.

        Who presses the stop button once more does not shorten that: it takes some seconds at most.
        """
        self._stopped = True
        if self._thread.ident is None:  # never started
            return
        end, told = time.monotonic() + _STOP_SECONDS, False
        # The event and not the thread: a join that is interrupted takes the thread for ended (Python 3.11).
        while not self._finished.is_set() and time.monotonic() < end:
            with contextlib.suppress(KeyboardInterrupt):
                if not told and self._loop is not None and self._main is not None:
                    told = True
                    with contextlib.suppress(RuntimeError):  # it has ended meanwhile
                        self._loop.call_soon_threadsafe(self._main.cancel)
                self._finished.wait(max(end - time.monotonic(), 0.0))

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
        self._answered_at = time.monotonic()
        async with self.server:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(self.plan.concurrency):
                        group.create_task(self._work())
            finally:
                if self._waiting is not None:
                    self._waiting.cancel()
                await self._keeper.close()

    async def _work(self) -> None:
        for identity in self._left:
            await self._keeper.keep(await self._ask(identity))
        self._working -= 1

    async def _check(self) -> None:
        """Return when the model is known to be configured still as it was when the answers came."""
        while True:
            try:
                return await self.server.check()
            except LLMKitError as error:
                if not is_gone(error):
                    raise
                await self._wait(error, self.server.regain)

    def _kept(self, rows: Sequence[Row]) -> None:
        self.done.update((row.id, row) for row in rows)
        self._news.extend(rows)

    # -- one row -----------------------------------------------------------------------------------------------

    async def _ask(self, identity: str) -> Row:
        """Ask until there is an answer, or an error that stays."""
        plan, failures, limits, limited_at = self.plan, 0, 0, 0.0
        prompt = plan.prompt(identity)
        while True:
            if self._waiting is not None:
                await asyncio.shield(self._waiting)
            generation, answers = self.server.generation, self._answers
            try:
                row = self._read(identity, await self._send(prompt))
            except WaitedInVain:
                raise
            except errors.RateLimited as error:
                limits, limited_at = limits + 1, limited_at or time.monotonic()
                rest = limited_at + plan.patience - time.monotonic()
                if rest > 0:
                    await self._rest(_SLOW, min(_pause(limits) + _asked_pause(error, rest), rest))
                elif await self._try_another(identity, answers) is None:
                    return Row(id=identity, error=_one_line(error))
                else:
                    raise self._in_vain(_SLOW) from error
            except HOPELESS as error:
                # A server that was started anew with another token knows us no more; one that is there means it.
                if not isinstance(error, errors.NotAuthenticated | errors.NotAllowed):
                    raise
                if generation == self.server.generation:
                    if await self.server.is_there():
                        raise
                    await self._wait(error, self.server.regain)
            except LLMKitError as error:
                begun = not isinstance(error, ABSENT) and not (isinstance(error, Lost) and not error.sent)
                lost = await self._is_lost(error, generation)
                if begun and not _may_pass(error):
                    return Row(id=identity, error=_one_line(error))
                # What was begun may be the cause of a loss, and is not asked for ever; but an outage is no row's fault.
                if begun and (lost or isinstance(error, Lost) or await self._is_well(identity, answers, error)):
                    failures += 1
                    if failures > plan.retries:
                        return Row(id=identity, error=_one_line(error))
                if lost:
                    await self._wait(error, self.server.regain)
                else:
                    await asyncio.sleep(_pause(max(failures, 1)))
            else:
                self._answers += 1
                self._answered_at = time.monotonic()
                self._note_if_good(row)
                return row

    async def _send(self, prompt: str) -> dict[str, Any]:
        """Give what the server answers; there may be no room yet, which is no failure."""
        plan, begun_at = self.plan, time.monotonic()
        kwargs = {**plan.inference_kwargs, "stream": True}
        body = {"model_id": plan.model_id, "prompt": prompt, "inference_kwargs": kwargs}
        while True:
            try:
                return await self.server.ask(body, {"X-LLMKit-Priority": plan.priority})
            except (errors.QueueFull, errors.BudgetExhausted) as error:
                why = _FULL if isinstance(error, errors.QueueFull) else _SPENT
                if time.monotonic() - max(begun_at, self._answered_at) > plan.patience:
                    raise self._in_vain(why) from error
                await self._rest(why, _asked_pause(error, LONGEST_PAUSE) * random.uniform(1, 1.25))  # noqa: S311

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

    async def _rest(self, why: str, seconds: float) -> None:
        self._resting[why] += 1
        try:
            await asyncio.sleep(seconds)
        finally:
            self._resting[why] -= 1

    # -- waits that all workers share --------------------------------------------------------------------------

    async def _is_lost(self, error: LLMKitError, generation: int) -> bool:
        """Say whether an error means that the server or the model is gone, and that nobody has seen to it yet."""
        if not isinstance(error, (Lost, *ABSENT, errors.EngineGone)) or generation != self.server.generation:
            return False
        return not await self.server.is_there()

    async def _is_well(self, identity: str, answers: int, error: LLMKitError) -> bool:
        """Say whether others are answered while a row fails; if they are not, wait until they are."""
        return self._answers != answers or not await self._wait(error, lambda: self._try_another(identity, answers))

    async def _try_another(self, identity: str, answers: int) -> str | None:
        """Ask another row than that which has failed, and say what is wrong there, too; None if nothing is.

        One that was answered before is best, as it has no fault of its own, and the shortest costs least.
        """
        others = [self._good.id] if self._good is not None else self.plan.identities
        others = [other for other in random.sample(others, min(len(others), 2)) if other != identity]
        if not others or self._answers != answers:
            return None
        try:
            await self._send(self.plan.prompt(others[0]))
        except WaitedInVain:
            raise
        except (Lost, *ABSENT, errors.NotAuthenticated, errors.NotAllowed) as error:
            return await self.server.regain() or _one_line(error)
        except HOPELESS:
            raise
        except LLMKitError as error:
            return _one_line(error) if _may_pass(error) else None
        return None

    def _note_if_good(self, row: Row) -> None:
        if row.error is None and row.model_id in (None, self.plan.model_id):
            tokens = [one.completion_tokens or 0 for one in (row, self._good) if one is not None]
            if tokens[0] <= tokens[-1]:
                self._good = row

    async def _wait(self, error: LLMKitError, look: Callable[[], Awaitable[str | None]]) -> bool:
        """Wait until nothing is missing, all workers together, and say whether something was.

        Parameters
        ----------
        look
            Says what is missing, None if nothing is.
        """
        if self._waiting is None:
            self._waiting = asyncio.create_task(self._look_again_and_again(error, look))
            self._waiting.add_done_callback(self._waited)
        return await asyncio.shield(self._waiting)

    def _waited(self, task: asyncio.Task[bool]) -> None:
        self._waiting_for = ""
        if not task.cancelled() and task.exception() is None:
            self._waiting = None

    async def _look_again_and_again(self, error: LLMKitError, look: Callable[[], Awaitable[str | None]]) -> bool:
        plan, begun_at, pause = self.plan, time.monotonic(), _FIRST_LOOK
        while (why := await look()) is not None:
            if plan.on_engine_lost == "fail":
                raise error
            waited = time.monotonic() - begun_at
            if waited + pause > plan.patience:
                raise self._in_vain(why) from error
            self._waiting_for = f"waiting, {why} ({waited:.0f} of {plan.patience:.0f} s)"
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, _LONGEST_LOOK)
        return pause > _FIRST_LOOK

    def _in_vain(self, why: str) -> WaitedInVain:
        return WaitedInVain(
            f"Waited {self.plan.patience:.0f} s for `{self.plan.model_id}` in vain: {why}.",
            hint="See to that and run the same call again; `patience` is how long it waits.",
        )


def _may_pass(error: LLMKitError) -> bool:
    """Say whether the same request may be answered later."""
    return error.status >= HTTPStatus.INTERNAL_SERVER_ERROR or error.status == HTTPStatus.TOO_MANY_REQUESTS


def _pause(failures: int) -> float:
    longest = min(FIRST_PAUSE * 2 ** (failures - 1), LONGEST_PAUSE)
    return random.uniform(longest / 2, longest)  # noqa: S311  # spreads load, no secret


def _asked_pause(error: LLMKitError, longest: float) -> float:
    """Give the seconds after which the server wants to be asked again."""
    try:
        return min(max(float(error.details.get("retry_after", 1)), 0.05), longest)
    except (TypeError, ValueError):
        return 1.0


def _one_line(error: LLMKitError) -> str:
    return _sendable(f"{error.code}: {' '.join(error.message.split())}")


def _sendable(text: str) -> str:
    """Give a text that can be written; half a surrogate pair cannot."""
    return text.encode("utf-8", "replace").decode()
