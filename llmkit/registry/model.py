"""The life of one model: the only writer of its status.

========== =================================== ===================================================
status     `Model.ensure_loaded`               `Model.unload`
========== =================================== ===================================================
unloaded   starts a load and waits for it      nothing to do
loading    waits for the load under way        cancels the load, waits until all is gone
loaded     returns at once                     lets requests finish, ends the rest, stops the engine
unloading  waits for the end, starts a load    joins the unload, cancels a load that waits for it
failed     starts a load and waits for it      forgets the failure, and a restart that is due
========== =================================== ===================================================

An engine that fails while the model is loaded makes it ``failed``. With ``restart: on_failure`` a load starts by itself
after a pause that grows; after three failures in five minutes nothing more happens until somebody asks. A request of
a model with ``auto_load`` loads it, too, but with the same pauses.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from copy import copy
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from pydantic import JsonValue

from llmkit import schemas
from llmkit.engines.base import Engine, LeavableEngine, LoadProgress
from llmkit.engines.http import EngineHTTP
from llmkit.engines.log import LOG_TAIL_LINES, last_lines
from llmkit.errors import (
    EngineCrashed,
    EngineGone,
    LLMKitError,
    LoadCancelled,
    ModelNotLoaded,
    ModelUnloaded,
    ServerStopping,
)
from llmkit.inference.admission import Admission, Slot
from llmkit.inference.running import Running
from llmkit.registry import policies
from llmkit.registry.load_clock import LoadClock
from llmkit.registry.policies import LoadRecord
from llmkit.schemas import Capabilities, Configuration, Memory, ModelError, Phase, Status

TICK_SECONDS = 0.5
"""Between two looks at a load that says nothing: its time and its rest are told again."""

NOT_LOADED = Memory(reason="not loaded")

_NEXT: dict[Status, set[Status]] = {
    "unloaded": {"loading"},
    "loading": {"loaded", "failed", "unloaded"},
    "loaded": {"unloading", "failed"},
    "unloading": {"unloaded"},
    "failed": {"loading", "unloaded"},
}


@dataclass(frozen=True)
class Turn:
    """What a request gets once it may run."""

    http: EngineHTTP
    capabilities: Capabilities


class Use:
    """A request's hold on a model, made by `Model.use`; an asynchronous context manager, to be entered once."""

    # A class rather than a generator: every request passes here.
    __slots__ = ("_model", "auto_load", "idle_ttl", "running", "slot")

    def __init__(self, model: Model, running: Running, idle_ttl: float | None, *, auto_load: bool) -> None:
        self._model = model
        self.running = running
        self.idle_ttl = idle_ttl
        self.auto_load = auto_load
        self.slot: Slot | None = None

    def __aenter__(self) -> Awaitable[Turn]:
        return self._model.enter(self)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._model.leave(self, error)


class Model:
    """One model.

    Parameters
    ----------
    configuration
        What was asked for; `configuration`, and `generation` with the generation defaults out of it, may be set anew,
        and hold from the next load or request.
    make_engine
        Makes the engine of one load, and room for it; raises `LLMKitError` if there can be none. Its second
        argument says whether to load by force.
    log_file
        Where the engine writes its log.
    changed
        Called after every change, with ``"status"`` or ``"progress"``.
    last_load
        Gives the last load that was like this one would be, so that the rest of this one can be told.
    ttl_limits
        The server's default idle TTL and its ceiling, as in `policies.effective_ttl`.
    """

    def __init__(
        self,
        configuration: Configuration,
        make_engine: Callable[[Configuration, bool], Awaitable[Engine]],
        log_file: Path,
        changed: Callable[[Model, str], None],
        last_load: Callable[[Configuration], Awaitable[LoadRecord | None]],
        *,
        max_in_flight: int,
        max_queued: int,
        logger: logging.Logger,
        ttl_limits: tuple[float, float | None] = (-1.0, None),
    ) -> None:
        self.configuration = configuration
        self.generation: Mapping[str, JsonValue] = {}
        self.admission = Admission(configuration.model_id, max_in_flight, max_queued)
        self.log_file = log_file
        self._make_engine = make_engine
        self._changed = changed
        self._last_load = last_load
        self.ttl_limits = ttl_limits
        self._log = logger
        self._status: Status = "unloaded"
        self._reason: str | None = None
        self._phase: Phase | None = None
        self._progress: float | None = None
        self._error: ModelError | None = None
        self._clock: LoadClock | None = None
        self._asked_ttl: float | None = None
        self._failures: deque[float] = deque(maxlen=policies.CRASHES)
        self._failure: LLMKitError | None = None
        self.owner: str | None = None
        self._loaded_by: str | None = None
        self._next_by: str | None = None
        self._leased_until = 0.0
        self._restart_task: asyncio.Task[None] | None = None
        self._load_seconds: float | None = None
        self._loaded_at: datetime | None = None
        self._last_used_at: datetime | None = None
        self._memory = NOT_LOADED
        self._capabilities = Capabilities()
        self._engine: Engine | None = None
        self._http: EngineHTTP | None = None
        self._load_task: asyncio.Task[LLMKitError | None] | None = None
        self._next_load: asyncio.Task[LLMKitError | None] | None = None
        self._unload_task: asyncio.Task[Memory] | None = None
        self._watch_task: asyncio.Task[None] | None = None
        self._burial: asyncio.Task[None] | None = None
        self._retired: LLMKitError | None = None
        self._draining = False
        self._drain_until = 0.0
        self._calmer = asyncio.Event()
        self._running: dict[str, Running] = {}

    @property
    def status(self) -> Status:
        """Where the model is in its life."""
        return self._status

    @property
    def live(self) -> bool:
        """Whether an engine runs or is on the way."""
        return self._status in ("loading", "loaded", "unloading")

    @property
    def loaded_by(self) -> str | None:
        """Who has asked for the load, where people are told apart; None if it was a request, or nobody has."""
        return self._loaded_by

    @property
    def load_seconds(self) -> float | None:
        """How long the last load took; None if it did not end well."""
        return self._load_seconds

    @property
    def http(self) -> EngineHTTP:
        """The way to the engine, or raise `ModelNotLoaded`."""
        self._check_loaded()
        assert self._http is not None  # noqa: S101  # loaded
        return self._http

    @property
    def leaving(self) -> bool:
        """Whether an engine is on its way out."""
        return self._unload_task is not None or self._burial is not None

    @property
    def holding(self) -> bool:
        """Whether it may hold memory."""
        return self.live or self.leaving

    async def measure(self) -> Memory:
        """Measure what the model holds now."""
        engine = self._engine
        if engine is None:
            return NOT_LOADED
        memory = await engine.memory()
        if self._engine is engine and self._status == "loaded":
            self._memory = memory
        return memory

    def snapshot(self) -> schemas.Model:
        """Give the state as it is now."""
        configuration = self.configuration
        load = self._clock if self._status == "loading" else None
        return schemas.Model(
            model_id=configuration.model_id,
            config_id=configuration.config_id,
            model_name=configuration.model_name,
            model_type=configuration.model_type,
            status=self._status,
            reason=self._reason,
            phase=self._phase,
            progress=self._progress,
            elapsed_seconds=round(load.elapsed, 3) if load else None,
            eta_seconds=load.eta if load else None,
            download=load.download if load else None,
            load_seconds=self._load_seconds,
            loaded_at=self._loaded_at,
            last_used_at=self._last_used_at,
            expires_at=self.expires_at,
            in_flight=self.admission.in_flight,
            queued=self.admission.queued,
            memory=self._memory,
            capabilities=self._capabilities,
            owner=self.owner,
            configured_by=configuration.configured_by,
            loaded_by=self._loaded_by,
            error=self._error,
        )

    def _set(self, status: Status, reason: str | None = None, error: ModelError | None = None) -> None:
        if status not in _NEXT[self._status]:
            raise AssertionError(f"{self.configuration.model_id}: {self._status} -> {status}")
        self._status, self._reason, self._error = status, reason, error
        if status != "loading":
            self._phase = "ready" if status == "loaded" else None
            self._progress = 1.0 if status == "loaded" else None
        if status in ("unloaded", "failed"):
            self._memory, self._capabilities, self._loaded_at = NOT_LOADED, Capabilities(), None
            self._asked_ttl = None
        if status == "unloaded":
            self._loaded_by, self._leased_until = None, 0.0
        self._changed(self, "status")

    # -- load ----------------------------------------------------------------------------------------------

    async def ensure_loaded(self, *, force: bool = False, by: str | None = None) -> None:
        """Return when the model is loaded, whoever started the load.

        A caller that is cancelled leaves the load to the others. The parameters are those of `start_loading`.

        Raises
        ------
        LLMKitError
            The reason why it could not be loaded; `LoadCancelled` if somebody unloaded it meanwhile.
        """
        error = await asyncio.shield(self.start_loading(force=force, by=by))
        if error is not None:
            raise copy(error)  # each has its own: an error keeps the frames that it has gone through

    def start_loading(self, *, force: bool = False, by: str | None = None) -> asyncio.Task[LLMKitError | None]:
        """Start a load, if there is none; one that has to wait for an unload begins when that is over.

        Parameters
        ----------
        force
            Busy models may be unloaded to make room, and what is not expected to fit is tried.
        by
            Who asks; theirs is the load, if this call has started it.

        Returns
        -------
        Task
            The load; its result is None, or the reason why it failed. Cancel it with `unload` alone.

        Raises
        ------
        LLMKitError
            If the model was retired.
        """
        if self._retired is not None:
            raise copy(self._retired)
        if self._unload_task is not None:
            if self._next_load is None:
                self._next_load, self._next_by = self._new_load(force=force), by
            return self._next_load
        if self._status in ("unloaded", "failed"):
            self._end_restart()
            self._failures.clear()
            self._loaded_by = by
            return self._begin(force=force)
        assert self._load_task is not None  # noqa: S101  # loading or loaded
        return self._load_task

    def _start_for_request(self) -> asyncio.Task[LLMKitError | None]:
        """Start a load that nobody but a request has asked for: what fails again and again gets its pauses."""
        if self._status == "failed" and self._unload_task is None and self._retired is None and self._failures:
            now = time.monotonic()
            pause = policies.restart_delay(self._failures, now) or policies.LONGEST_RESTART_SECONDS
            if self._failure is not None and now - self._failures[-1] < pause:
                raise copy(self._failure)
            self._end_restart()
            return self._begin(force=False)
        return self.start_loading()

    def _begin(self, *, force: bool) -> asyncio.Task[LLMKitError | None]:
        self._load_task = self._new_load(force=force)
        self._set_loading()
        return self._load_task

    def _new_load(self, *, force: bool) -> asyncio.Task[LLMKitError | None]:
        return asyncio.create_task(self._load(force=force), name=f"load {self.configuration.model_id}")

    def _set_loading(self) -> None:
        self._clock = LoadClock()
        self._phase, self._progress, self._load_seconds = "queued", 0.0, None
        self._set("loading")

    def retire(self, error: LLMKitError | None) -> None:
        """Refuse every load from now on, because the model is deleted or the server stops; None takes it back."""
        self._retired = error

    async def _load(self, *, force: bool) -> LLMKitError | None:
        ticking = None
        try:
            await self.gone()
            if self._retired is not None:
                raise asyncio.CancelledError  # as the unload does that is about to come
            ticking = asyncio.create_task(self._tick(), name=f"tick {self.configuration.model_id}")
            return await self._start_engine(force=force)
        except asyncio.CancelledError:
            # Only `unload` cancels this task, and waits for it: the cancellation ends here, as a result.
            if asyncio.current_task() is self._load_task:
                await self._stop_engine()
                self._set("unloaded", "load cancelled")
            return self._retired or LoadCancelled(
                f"The load of `{self.configuration.model_id}` was cancelled.",
                hint="Somebody unloaded it meanwhile.",
            )
        finally:
            if ticking is not None:
                ticking.cancel()

    async def _start_engine(self, *, force: bool) -> LLMKitError | None:
        load, configuration = self._clock, self.configuration
        assert load is not None  # noqa: S101  # made with the status
        try:
            load.earlier = await self._last_load(configuration)
            engine = self._engine = await self._make_engine(configuration, force)
            load.begin()
            self._capabilities = await engine.start(self._report)
            self._memory = await engine.memory()
        except Exception as raised:  # noqa: BLE001  # whatever an engine of a third party raises, the model is failed
            return await self._fail(raised)
        self._http = EngineHTTP(engine.endpoint)
        self._load_seconds = round(load.elapsed, 3)
        self._loaded_at = datetime.now(UTC)
        self._watch_task = asyncio.create_task(self._watch(engine), name=f"watch {configuration.model_id}")
        self._set("loaded")  # the last step: what cancels this task means a load, not a loaded model
        return None

    def load_record(self) -> LoadRecord | None:
        """Give what the next load can learn of the one that has just ended well."""
        return self._clock.record(self._memory) if self._clock is not None else None

    def _report(self, progress: LoadProgress) -> None:
        if self._status == "loaded" and progress.phase == "ready":
            if self._reason != progress.notice:
                self._reason = progress.notice
                self._changed(self, "status")
            return
        if self._status != "loading" or self._clock is None:
            return
        before = (self._phase, self._progress, self._clock.download)
        self._clock.take(progress)
        self._phase = progress.phase
        self._progress = self._clock.fraction
        if before != (self._phase, self._progress, self._clock.download):
            self._changed(self, "progress")

    async def _tick(self) -> None:
        """Tell from time to time how far a load is, also while its engine says nothing."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            if self._clock is not None:
                self._clock.tick()
                self._progress = self._clock.fraction
                self._changed(self, "progress")

    async def _fail(self, raised: Exception) -> LLMKitError:
        if isinstance(raised, LLMKitError):
            error = raised
        else:
            self._log.error("The engine of %s failed.", self.configuration.model_id, exc_info=raised)
            error = EngineGone(f"The engine failed: {type(raised).__name__}.", hint="The server's log says more.")
        started = self._engine is not None
        await self._stop_engine()
        told = await self._model_error(error)
        if started:  # what fails before costs next to nothing, and may be cured by now
            self._note_failure(error)
        self._set("failed", error.message, told)
        return error

    def _note_failure(self, error: LLMKitError) -> None:
        self._failures.append(time.monotonic())
        self._failure = error

    async def _model_error(self, error: LLMKitError) -> ModelError:
        tail = error.details.get("log_tail")
        if tail is None:
            tail = await asyncio.to_thread(last_lines, self.log_file, LOG_TAIL_LINES)
        return ModelError(
            code=error.code,
            message=error.message,
            hint=error.hint,
            fix=error.details.get("fix"),
            log_tail=tail,
        )

    async def _watch(self, engine: Engine) -> None:
        try:
            message = (await engine.wait_exit()).message
        except Exception:  # noqa: BLE001  # an engine that nobody watches must not look well
            self._log.exception("The engine of %s cannot be watched.", self.configuration.model_id)
            message = "The engine could not be watched any more."
        if self._status != "loaded" or self._engine is not engine:
            return
        error = EngineCrashed(message, hint="Load it again; the log tail says why it ended.")
        self._note_failure(error)
        # At once, so that nobody is sent to an engine that is gone; loads and unloads wait for the burial.
        self._burial = asyncio.create_task(self._bury(error), name=f"bury {self.configuration.model_id}")
        self._set("failed", message, ModelError(code=error.code, message=error.message, hint=error.hint))
        self._abort_all(error)

    async def _bury(self, error: LLMKitError) -> None:
        try:
            await self._stop_engine()
            told = await self._model_error(error)
        finally:
            self._burial = None
        if self._status == "failed":
            self._error = told
            self._changed(self, "status")
            if self.configuration.restart == "on_failure" and self._unload_task is None:
                self._restart_task = asyncio.create_task(self._restart(), name=f"restart {self.configuration.model_id}")

    # -- restart -------------------------------------------------------------------------------------------

    async def _restart(self) -> None:
        """Start again and again, with pauses that grow, until it is loaded or there have been too many failures."""
        while True:
            why = (self._reason or "").removesuffix(".")
            pause = policies.restart_delay(self._failures, time.monotonic())
            if pause is None:
                minutes = policies.CRASH_SECONDS / 60
                self._reason = (
                    f"{why}. It failed {policies.CRASHES} times in {minutes:g} minutes and is left alone now."
                )
                self._changed(self, "status")
                return
            self._reason = f"{why}. It is started again in {pause:g} s."
            self._changed(self, "status")
            await asyncio.sleep(pause)
            if self._status != "failed" or self._retired is not None or self.configuration.restart != "on_failure":
                return
            await asyncio.wait([self._begin(force=False)])
            if self._status != "failed":
                return

    def _end_restart(self) -> None:
        task, self._restart_task = self._restart_task, None
        if task is not None:
            task.cancel()

    # -- unload --------------------------------------------------------------------------------------------

    async def unload(self, drain: float = 0.0, reason: str | None = None) -> Memory:
        """Unload, whatever the status, and say what was freed; the parameters are those of `start_unloading`."""
        return await asyncio.shield(self.start_unloading(drain, reason))

    def start_unloading(self, drain: float = 0.0, reason: str | None = None) -> asyncio.Task[Memory]:
        """Start to unload, or join the unload under way; from now on no request comes in.

        Parameters
        ----------
        drain
            Seconds that requests, running and waiting, get to finish before they are ended with `ModelUnloaded`;
            of several calls the one that ends first counts.
        reason
            Why, if nobody asked for it.

        Returns
        -------
        Task
            The unload; its result is what was freed.
        """
        self._end_restart()
        if self._next_load is not None:
            # After its first step, so that it ends with a result.
            asyncio.get_running_loop().call_soon(self._next_load.cancel)
            self._next_load = None
        until = time.monotonic() + drain
        if self._unload_task is None:
            self._drain_until = until
            self._unload_task = asyncio.create_task(self._unload(reason), name=f"unload {self.configuration.model_id}")
            if self._status == "loaded":
                self._set("unloading", reason)
        elif until < self._drain_until:
            self._drain_until = until
            self._calmer.set()
        return self._unload_task

    async def _unload(self, reason: str | None) -> Memory:
        try:
            return await self._bring_down(reason)
        finally:
            self._unload_task = None
            following, self._next_load = self._next_load, None
            if following is not None:
                self._load_task, self._loaded_by = following, self._next_by
                self._set_loading()

    async def _bring_down(self, reason: str | None) -> Memory:
        if self._status == "loading" and self._load_task is not None:
            self._load_task.cancel()
            await asyncio.wait([self._load_task])
            if self.status == "unloaded":
                return Memory(verified=True, reason="the load was cancelled")
        if self._burial is not None:
            await asyncio.wait([self._burial])
        if self._status == "failed":
            self._set("unloaded")
        if self._status == "unloaded":
            return Memory(verified=True, reason="not loaded")
        if self._status == "loaded":  # a load that could not be cancelled any more
            self._set("unloading", reason)
        await self._drain()
        self._abort_all(
            ModelUnloaded(f"`{self.configuration.model_id}` was unloaded.", hint="Load it and send the request again.")
        )
        freed = await self._stop_engine()
        self._set("unloaded", reason)
        return freed

    async def _drain(self) -> None:
        self._draining = True
        try:
            while self.busy and (left := self._drain_until - time.monotonic()) > 0:
                self._calmer.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(left):
                        await self._calmer.wait()
        finally:
            self._draining = False

    async def gone(self) -> None:
        """Return when no engine is on its way out."""
        leaving = [task for task in (self._unload_task, self._burial) if task is not None]
        if leaving:
            await asyncio.wait(leaving)

    # -- expiry --------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether requests run or wait."""
        return bool(self.admission.in_flight or self.admission.queued)

    @property
    def leased(self) -> bool:
        """Whether somebody's batch has it, on a server that many people share: also between two of its requests."""
        return time.monotonic() < self._leased_until

    @property
    def idle_since(self) -> datetime | None:
        """The end of the last request, or of the load if there was none; None if it is not loaded."""
        return max(filter(None, (self._loaded_at, self._last_used_at))) if self._loaded_at else None

    @property
    def expires_at(self) -> datetime | None:
        """When it will be unloaded, if nobody asks it anything."""
        if self._status != "loaded" or self._loaded_at is None:
            return None
        ceiling = self.ttl_limits[1]
        return policies.expires_at(
            self.idle_ttl(), self._loaded_at, self._last_used_at, busy=self.busy, ceiling=ceiling
        )

    def idle_ttl(self) -> float | None:
        """Give the seconds that it may be idle, or None for ever."""
        return policies.effective_ttl(self._asked_ttl, self.configuration.idle_ttl, *self.ttl_limits)

    async def _stop_engine(self) -> Memory:
        """End what belongs to the last load; never raises, so that a status always follows."""
        watch, self._watch_task = self._watch_task, None
        if watch is not None and watch is not asyncio.current_task():
            watch.cancel()
        freed = Memory(reason="there was no engine")
        try:
            if self._http is not None:
                await self._http.close()
            engine = self._engine
            if isinstance(self._retired, ServerStopping) and isinstance(engine, LeavableEngine):
                freed = await engine.leave()
            elif engine is not None:
                freed = await engine.stop()
        except Exception:  # noqa: BLE001  # as above; what is left is the guardian's
            self._log.exception("The engine of %s did not stop as it should.", self.configuration.model_id)
            freed = Memory(reason="the stop failed; the server's log says more")
        # Only now: a stop that was cancelled half-way is done again.
        self._http = self._engine = None
        return freed

    def _abort_all(self, error: LLMKitError) -> None:
        self.admission.reject_waiting(error)
        for running in list(self._running.values()):
            running.abort(error)

    # -- requests ------------------------------------------------------------------------------------------

    def use(self, running: Running, idle_ttl: float | None = None, *, auto_load: bool = False) -> Use:
        """Hold the model for one request within ``async with``, after waiting for a place; it gives a `Turn`.

        Inside, the task of ``running`` is cancelled when the model goes away or the request is cancelled by its
        id; that cancellation leaves here as the error it stands for.

        Parameters
        ----------
        running
            The request.
        idle_ttl
            Holds after this request, until the next one.
        auto_load
            Load the model first if it is not loaded; who waits for that has a place in the queue.

        Raises
        ------
        ModelNotLoaded, QueueFull, ModelUnloaded, EngineGone
            Or the reason why it could not be loaded.
        """
        return Use(self, running, idle_ttl, auto_load=auto_load)

    async def enter(self, use: Use) -> Turn:
        """Begin a request; for `Use`."""
        running = use.running
        load_seconds = 0.0

        async def load() -> None:
            nonlocal load_seconds
            asked = time.monotonic()
            running.status = "loading"
            error = await asyncio.shield(self._start_for_request())
            load_seconds = time.monotonic() - asked
            running.status = "queued"
            if error is not None:
                raise copy(error)

        loads = use.auto_load and self._status != "loaded"
        if not loads:
            self._check_loaded()
        slot = Slot(running.priority, running, load if loads else None, running.user)
        try:
            await self.admission.enter(slot)
            use.slot = slot
            if not self._draining:
                self._check_loaded()
            self._running[running.request_id] = running
            self._asked_ttl = use.idle_ttl
            assert self._http is not None  # noqa: S101  # loaded
            running.begin(load_seconds)
            return Turn(self._http, self._capabilities)
        except BaseException as error:
            self.leave(use, error)
            raise

    def leave(self, use: Use, error: BaseException | None) -> None:
        """End a request; raises the error that an abort of it stands for. For `Use`."""
        running = use.running
        if self._running.pop(running.request_id, None) is not None:
            self._last_used_at = datetime.now(UTC)
            if running.user is not None and running.priority == "batch":
                self._leased_until = time.monotonic() + policies.LEASE_SECONDS
        if use.slot is not None:
            self.admission.leave(use.slot)
        self._calmer.set()
        if error is not None:
            running.tell(error)

    def _check_loaded(self) -> None:
        if self._status != "loaded":
            model_id, config_id = self.configuration.model_id, self.configuration.config_id
            state = {"loading": "still loading", "unloading": "being unloaded", "failed": "failed"}.get(
                self._status, "not loaded"
            )
            raise ModelNotLoaded(
                f"`{model_id}` is {state}.",
                param="model_id",
                hint=f"POST /llm/load_model/{config_id} loads it. In Python: client.load({model_id!r}).",
            )
