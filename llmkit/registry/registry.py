"""The one owner of configurations and models; everything else is a view of it."""

from __future__ import annotations

import asyncio
import difflib
import logging
import os
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from llmkit import __version__, schemas
from llmkit.engines.base import STALL_SECONDS, EngineType, does_not_fit, load_engine_types
from llmkit.engines.http import read_whole
from llmkit.engines.log import LogFollower, last_lines
from llmkit.engines.ray import open_cluster
from llmkit.errors import (
    ConfigurationExists,
    ConfigurationNotFound,
    ConfigurationReadOnly,
    EngineNotInstalled,
    LLMKitError,
    ModelIsLoaded,
    ModelNotFound,
    ServerStopping,
)
from llmkit.inference.metrics import Metrics
from llmkit.inference.running import read_record
from llmkit.process.devices import Devices
from llmkit.registry.budgets import Budgets
from llmkit.registry.changes import Changes, Event
from llmkit.registry.configurations import Configurations, exists
from llmkit.registry.conversations import MOST, MOST_BYTES, Conversations
from llmkit.registry.history import PENDING, PENDING_WITH_BODIES, RequestHistory
from llmkit.registry.keys import ToolKeys
from llmkit.registry.loading import Loader
from llmkit.registry.model import Model
from llmkit.registry.people import Person, check_force, check_owner, check_unload, told_to
from llmkit.registry.readiness import Mode, Readiness
from llmkit.registry.requests import Requests, find_for, no_engine_here
from llmkit.registry.rules import Rules
from llmkit.registry.secrets import KeyPolicy, Secret
from llmkit.schemas import (
    API_VERSION,
    Configuration,
    Health,
    Memory,
    ModelConfigRequest,
    Snapshot,
)
from llmkit.tool_keys import ToolKey

REFRESH_SECONDS = 0.5
EXPIRY_SECONDS = 0.25
LOG_SECONDS = 0.25
CLOSE_SECONDS = 12.0
METRICS_SECONDS = 10.0


@dataclass(frozen=True)
class Settings:
    """What the operator decides.

    ``configurations`` are bodies of ``POST /llm/configure_model/`` that exist as long as the server runs.
    """

    state_dir: Path
    run_dir: Path
    secret_origins: Mapping[str, Sequence[str]] = field(default_factory=dict)
    rules: Rules = field(default_factory=Rules)
    max_in_flight: int = 64
    max_queued: int = 256
    max_loaded_models: int = 0
    idle_ttl: float = -1.0
    max_idle_ttl: float | None = None
    stall_seconds: float = STALL_SECONDS
    engine_niceness: int | None = None
    standby: Mode = "off"
    ray_address: str = ""
    ray_http_url: str = ""
    record_bodies: bool = False
    max_record_bytes: int = 64 << 20
    max_conversations: int = MOST
    max_conversation_bytes: int = MOST_BYTES
    shared: bool = False
    """Whether many people share this server, and each of them is told apart."""
    user_limits: Mapping[str, int] = field(default_factory=dict)
    """Of each of them, by the names of `budgets.LIMITS`."""
    url: str = ""
    """Of this server, for the words of another that shares its home."""
    configurations: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class _Change:
    """A replacement that was checked; `configuration` is what is stored if it is equal to that."""

    model: Model
    stored: Configuration
    configuration: Configuration
    secret: Secret | None = None
    new_engine: bool = False


class ModelRegistry:
    """Configure, load, prompt and unload models.

    Parameters
    ----------
    settings
        What the operator decides.
    emit
        Called with the data of every event, in the order of their revisions.
    logger
        For what a person should read in the server's log.
    environ
        The server's environment; keys are taken from it.
    engine_types
        By name; those that are installed if not given.
    devices
        What the machine has; the real ones if not given.

    Attributes
    ----------
    requests
        Prompts go there.
    conversations
        Those that are kept.
    keys
        Keys for tools.
    budgets
        Of the people who share the server; None where all are one.
    """

    def __init__(
        self,
        settings: Settings,
        emit: Callable[[Event], None],
        logger: logging.Logger,
        environ: Mapping[str, str] = os.environ,
        engine_types: Mapping[str, EngineType] | None = None,
        devices: Devices | None = None,
    ) -> None:
        self.engine_types = dict(engine_types if engine_types is not None else load_engine_types(logger))
        self._settings = settings
        self._changes = Changes(emit)
        self._log = logger
        self._stored = Configurations(
            settings.state_dir,
            self.engine_types,
            KeyPolicy(settings.secret_origins),
            environ,
            settings.url,
            settings.rules,
        )
        self._models: dict[str, Model] = {}
        devices = devices or Devices()
        self._readiness = Readiness(
            settings.standby,
            self.engine_types,
            self._models.values,
            self.busy,
            settings.run_dir,
            devices,
            logger,
            environ,
        )
        self._loader = Loader(
            self._stored,
            lambda: [*self._models.values(), *self._deleting],
            settings.run_dir,
            settings.max_loaded_models,
            settings.stall_seconds,
            logger,
            devices,
            engine_niceness=settings.engine_niceness,
            standby_bytes=partial(self._readiness.held_bytes, anonymous=True),
        )
        self._deleting: set[Model] = set()
        self._metrics = Metrics(lambda: [model.snapshot() for model in self._models.values()])
        self._history = RequestHistory(
            settings.state_dir,
            logger,
            read_record,
            max_bytes=settings.max_record_bytes,
            most_pending=PENDING_WITH_BODIES if settings.record_bodies else PENDING,
        )
        self.budgets = Budgets(settings.state_dir, dict(settings.user_limits), logger) if settings.shared else None
        self.requests = Requests(
            self._for_request,
            self._metrics,
            self._history,
            logger,
            record_bodies=settings.record_bodies,
            budgets=self.budgets,
        )
        self.conversations = Conversations(
            settings.state_dir, most=settings.max_conversations, most_bytes=settings.max_conversation_bytes
        )
        self.keys = ToolKeys(settings.state_dir, logger)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing = False
        self._behind = False
        self._started_at = datetime.now(UTC)

    # -- start and stop ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open the store and take up every configuration.

        Raises
        ------
        LLMKitError, OSError
            If the store cannot be used.
        """
        stored = await self._stored.open()
        self._loader.cluster = await asyncio.to_thread(
            open_cluster, self._settings.ray_address, self._settings.ray_http_url, self._settings.state_dir
        )
        for configuration in stored:
            self._add(configuration)
        for body in self._settings.configurations:
            try:
                declared = self._stored.declare(body)
                if declared.model_id in self._models:
                    raise exists(self._models[declared.model_id].configuration)
                self._add(declared)
            except LLMKitError as error:
                # The operator reads the log; the other models are served meanwhile.
                self._log.error("c.LLMKitApp.configurations: %s", error)
        await self._history.open()
        if self.budgets is not None:
            await self.budgets.open()
        await self.keys.catch_up()
        self._metrics.show()
        self._spawn(self._follow_other_servers())
        self._spawn(self.keys.follow())
        self._spawn(self._expire())
        self._spawn(self._readiness.watch())

    async def close(self) -> None:
        """Unload every model and end every task. Idempotent, bounded, raises nothing."""
        if self._closing:
            return
        self._closing = True
        models = [*self._models.values(), *self._deleting]
        for model in models:
            model.retire(ServerStopping("The server is stopping.", hint="Ask again when it is back."))
        unloads = [asyncio.create_task(model.unload()) for model in models]
        if unloads:
            await asyncio.wait(unloads, timeout=CLOSE_SECONDS)
        self._changes.close()
        tasks = [*self._tasks, *unloads]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._readiness.close()
        self._metrics.hide()
        await self._history.close()
        if self.budgets is not None:
            await self.budgets.close()
        await self.conversations.close()
        await self.keys.close()
        await self._stored.close()

    def _spawn(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() and not isinstance(task.exception(), LLMKitError):
            self._log.error("A task of llmkit failed.", exc_info=task.exception())

    # -- reading -------------------------------------------------------------------------------------------

    def health(self) -> Health:
        """Say whether registry and store are well."""
        parts = (self._stored, self._history, self.conversations, self.keys)
        problems = [problem for part in parts for problem in part.problems()]
        problems += self.budgets.problems() if self.budgets is not None else []
        return Health(
            status="stopping" if self._closing else "degraded" if problems else "ok",
            version=__version__,
            api_version=API_VERSION,
            epoch=self._changes.epoch,
            problems=problems,
            store=self._stored.condition(),
        )

    async def devices(self) -> schemas.Devices:
        """Give CPU, RAM and GPUs, with the share of every model."""
        devices = await asyncio.to_thread(self._loader.devices.read)
        loaded = [model for model in self._models.values() if model.status == "loaded"]
        memories = {model.configuration.model_id: await model.measure() for model in loaded}
        here = {model.configuration.model_id for model in loaded if self._loader.is_here(model)}
        devices.ram.shares = [
            schemas.Share(model_id=name, bytes=memory.pss_bytes)
            for name, memory in memories.items()
            if memory.pss_bytes is not None or name in here
        ]
        devices.ram.standby_bytes = await self._readiness.held_bytes()
        reserved = await asyncio.to_thread(self._loader.placement.reservations)
        for gpu in devices.gpus:
            gpu.reserved_bytes = reserved.get(gpu.index, 0)
            gpu.shares = [
                schemas.Share(model_id=name, bytes=held)
                for name, memory in memories.items()
                if (held := memory.gpus.get(gpu.index))
            ]
        return devices

    async def plan(self, config_id: str) -> schemas.LoadPlan:
        """Say what a load would take, or raise `ConfigurationNotFound`."""
        model = self._by_config_id(config_id)
        return await self._loader.plan(model.configuration, model)

    async def log_tail(self, model_id: str, count: int) -> list[str]:
        """Give the last lines of an engine's log, or raise `ModelNotFound`; none if there is no engine of ours."""
        return await asyncio.to_thread(last_lines, self._by_model_id(model_id).log_file, count)

    async def follow_log(self, model_id: str, count: int) -> AsyncGenerator[list[str], None]:
        """Give the last lines of an engine's log, then what is added, as long as there is such a model."""
        model = self._by_model_id(model_id)
        follower = LogFollower(model.log_file)
        yield await asyncio.to_thread(follower.skip_to_last, count)
        while not self._closing and self._models.get(model_id) is model:
            await asyncio.sleep(LOG_SECONDS)
            lines = await asyncio.to_thread(follower.read)
            if lines:
                yield lines

    async def engine_metrics(self, model_id: str) -> bytes:
        """Give what an engine itself tells Prometheus.

        Raises
        ------
        ModelNotFound, ModelNotLoaded
        NotSupported
            If the model runs elsewhere.
        TimedOut
            If the engine does not answer.
        """
        model = self._by_model_id(model_id)
        http = model.http
        if "metrics" not in http.endpoint.extras:
            raise no_engine_here(model)
        async with http.open("//metrics", method="GET") as response, asyncio.timeout(METRICS_SECONDS):
            await http.check_status(response)
            return await read_whole(response)

    async def usage(self, by: Person | None = None) -> schemas.UsageList:
        """Give who has used how much, as far as who asks may see it; nothing where people are not told apart."""
        if self.budgets is None or by is None:
            return schemas.UsageList(usage=[], limits={}, left={}, kept=False)
        usage = await self.budgets.by_day(None if by.administers else by.name)
        return schemas.UsageList(usage=usage, limits=self.budgets.limits, left=self.budgets.left(by.name))

    def snapshot(self, by: Person | None = None) -> Snapshot:
        """Give every model as it is now, with what it would refuse to who asks."""
        models = [told_to(by, model) for model in self._models.values()]
        return Snapshot(epoch=self._changes.epoch, revision=self._changes.revision, models=models)

    def configurations(self) -> list[Configuration]:
        """Give every configuration, oldest first."""
        return [model.configuration for model in self._models.values()]

    def configuration(self, config_id: str) -> Configuration:
        """Give one configuration, or raise `ConfigurationNotFound`."""
        return self._by_config_id(config_id).configuration

    def model(self, model_id: str, by: Person | None = None) -> schemas.Model:
        """Give the live state of one model, with what it would refuse to who asks, or raise `ModelNotFound`."""
        return told_to(by, self._by_model_id(model_id))

    def loaded_models(self) -> list[str]:
        """Give the ``model_id`` of every loaded model."""
        return [m.configuration.model_id for m in self._models.values() if m.status == "loaded"]

    def openai_models(self, key: ToolKey | None = None) -> list[dict[str, Any]]:
        """Give the models that can be asked now, loaded or loaded by a request, as OpenAI's API lists models."""
        models = (model for model in self._models.values() if model.status == "loaded" or model.configuration.auto_load)
        ids = (model.configuration.model_id for model in models)
        return [self.openai_model(model_id) for model_id in ids if key is None or key.allows(model_id)]

    def openai_model(self, model_id: str, key: ToolKey | None = None) -> dict[str, Any]:
        """Give one model as OpenAI's API tells of models, or raise `ModelNotFound`."""
        model = find_for(key, self._by_model_id, model_id).snapshot()
        return {
            "id": model.model_id,
            "object": "model",
            "created": int((model.loaded_at or self._started_at).timestamp()),
            "owned_by": "llmkit",
            "root": model.model_name,
            "status": model.status,
            "max_model_len": model.capabilities.max_model_len,
        }

    def busy(self) -> int:
        """Count the loads and requests under way."""
        return len(self.requests) + sum(m.status in ("loading", "unloading") for m in self._models.values())

    def model_types(self) -> list[dict[str, Any]]:
        """Describe every model type: its arguments as JSON schema, and where flat keys belong."""
        generation = schemas.GenerationParameters.model_json_schema()
        described = []
        for engine_type in self.engine_types.values():
            reason = engine_type.unavailable()
            arguments = engine_type.arguments.model_json_schema()
            for name in self._settings.rules.hidden_arguments:
                arguments["properties"].pop(name, None)
            described.append(
                {
                    "name": engine_type.name,
                    "summary": engine_type.summary,
                    "available": reason is None,
                    "reason": str(reason) if reason else None,
                    "arguments": arguments,
                    "generation": generation,
                    "table": dict.fromkeys(arguments["properties"], "engine")
                    | dict.fromkeys(generation["properties"], "generation"),
                }
            )
        return described

    def _by_config_id(self, config_id: str) -> Model:
        for model in self._models.values():
            if model.configuration.config_id == config_id:
                return model
        raise ConfigurationNotFound(
            f"There is no configuration {config_id[:64]!r}.",
            param="config_id",
            hint="GET /llm/configurations/ lists them. In Python: client.configurations().",
        )

    def _for_request(self, model_id: str) -> Model:
        self._check_open()
        return self._by_model_id(model_id)

    def _by_model_id(self, model_id: str) -> Model:
        if model_id in self._models:
            return self._models[model_id]
        near = difflib.get_close_matches(model_id, self._models, n=1)
        hint = f"Did you mean `{near[0]}`?" if near else "POST /llm/configure_model/ makes one."
        raise ModelNotFound(f"There is no model {model_id[:128]!r}.", param="model_id", hint=hint)

    # -- configuring ---------------------------------------------------------------------------------------

    async def configure(self, request: ModelConfigRequest, by: Person | None = None) -> Configuration:
        """Store a new configuration, that of who asks; one that is equal to the stored one is given back.

        Raises
        ------
        DoesNotFit, KeyNotAllowed, RefusedByOperator
            If it is wrong.
        ConfigurationExists
            If another configuration has the ``model_id``.
        """
        same = await self._same_as(request)
        if same is not None:
            return same.configuration
        try:
            configuration = await self._stored.insert(request, by)
        except ConfigurationExists:
            # Somebody was faster, here or in another server of this home.
            self._take_over(await self._stored.read())
            if request.model_id not in self._models:
                raise
            return await self.configure(request, by)
        self._changed(self._add(configuration), "configured")
        return configuration

    async def check(
        self,
        request: ModelConfigRequest,
        config_id: str | None = None,
        *,
        reload: bool = False,
        by: Person | None = None,
    ) -> schemas.LoadPlan | None:
        """Check what `configure` would store, with ``config_id`` what `update` would; nothing is changed.

        Returns
        -------
        LoadPlan or None
            What loading it would take; None if nothing of its type can be loaded here.

        Raises
        ------
        LLMKitError
            What `configure` or `update` would raise.
        """
        if config_id is None:
            model = await self._same_as(request)
            configuration = self._stored.draft(request, by) if model is None else model.configuration
        else:
            change = await self._change(config_id, request, reload=reload, by=by)
            if change.configuration is not change.stored:
                await self._stored.check_not_live_elsewhere(config_id)
            # What the engine was started with decides what a load takes.
            model, configuration = change.model, change.configuration if change.new_engine else change.stored
        try:
            return await self._loader.plan(configuration, model)
        except EngineNotInstalled:  # it can be configured all the same
            return None

    async def _same_as(self, request: ModelConfigRequest) -> Model | None:
        """Give the model that a new configuration is equal to; None if its ``model_id`` is free."""
        self._check_open()
        await self._catch_up()
        model = self._models.get(request.model_id)
        if model is not None and not await self._stored.is_same(request, model.configuration):
            raise exists(model.configuration)
        return model

    async def update(
        self, config_id: str, request: ModelConfigRequest, *, reload: bool = False, by: Person | None = None
    ) -> Configuration:
        """Replace a configuration.

        Generation defaults, description, limits and prices hold from the next request; what the engine was
        started with changes only with ``reload``, which unloads a live model and starts to load it again.

        Raises
        ------
        ConfigurationNotFound, ConfigurationReadOnly, DoesNotFit, KeyNotAllowed, ModelIsLoaded
        NotAllowed
            If it is somebody else's, or the load that would end is.
        """
        change = await self._change(config_id, request, reload=reload, by=by)
        model, stored, configuration = change.model, change.stored, change.configuration
        if configuration is stored:
            return stored
        was_live = model.live
        # Before it is written, so that a load or a change that comes meanwhile is one of the new configuration.
        self._apply(model, configuration)
        try:
            await self._stored.replace(configuration, change.secret, stored)
        except BaseException:
            if model.configuration is configuration:
                self._apply(model, stored)
            raise
        self._changed(model, "updated")
        if change.new_engine and was_live:
            loaded_by = model.loaded_by
            await model.unload()
            model.start_loading(by=loaded_by)
        return configuration

    async def _change(self, config_id: str, request: ModelConfigRequest, *, reload: bool, by: Person | None) -> _Change:
        """Check a replacement against what is stored at the moment in which it returns."""
        self._check_open()
        await self._catch_up()
        model = self._by_config_id(config_id)
        stored = model.configuration
        self._check_writable(stored, by)
        if request.model_id != stored.model_id:
            detail = {"path": "model_id", "message": f"must stay `{stored.model_id}`"}
            raise does_not_fit(
                [detail], hint="POST /llm/configure_model/ makes another model. In Python: client.configure(...)."
            )
        if await self._stored.is_same(request, stored):
            return _Change(model, stored, stored)
        configuration, secret = await self._stored.prepare(request, stored, by)
        if model.configuration is not stored:
            return await self._change(config_id, request, reload=reload, by=by)  # somebody was faster: against theirs
        new_engine = (
            (configuration.model_name, configuration.model_type) != (stored.model_name, stored.model_type)
            # A new raw key has a new mark among the arguments.
            or self._stored.sorted(configuration).engine != self._stored.sorted(stored).engine
        )
        if new_engine and model.live and not reload:
            raise ModelIsLoaded(
                f"`{stored.model_id}` is {model.status}; its engine cannot change while it runs.",
                hint="Unload it first, or send the same with ?reload=true. In Python: client.update(..., reload=True).",
            )
        if new_engine:
            check_unload(by, model)
        return _Change(model, stored, configuration, secret, new_engine=new_engine)

    async def delete(self, config_id: str, *, unload: bool = False, by: Person | None = None) -> None:
        """Delete a configuration and its key.

        Raises
        ------
        ConfigurationNotFound, ConfigurationReadOnly
        ModelIsLoaded
            If it is live and ``unload`` was not asked for.
        NotAllowed
            If it is somebody else's, or the load that would end is.
        """
        self._check_open()
        model = self._by_config_id(config_id)
        configuration = model.configuration
        self._check_writable(configuration, by)
        if model.live and not unload:
            raise ModelIsLoaded(
                f"`{configuration.model_id}` is {model.status}.",
                hint=f"POST /llm/unload_model/{configuration.model_id} first, or send ?unload=true. "
                f"In Python: client.delete({configuration.model_id!r}, unload=True).",
            )
        check_unload(by, model)
        # Out of use first, so that nobody can load it again meanwhile.
        self._retire_deleted(model)
        try:
            await self._stored.delete(configuration)
        except BaseException:
            model.retire(None)
            raise
        self._deleting.add(model)
        self._remove(model)
        try:
            await model.unload()
        finally:
            self._deleting.discard(model)
            await self._loader.delete_log(configuration)

    def _check_writable(self, configuration: Configuration, by: Person | None) -> None:
        if configuration.declared:
            raise ConfigurationReadOnly(
                f"`{configuration.model_id}` is declared by the operator of this server.",
                hint="Configure a model of your own under another model_id.",
            )
        check_owner(by, configuration.configured_by, f"The configuration of `{configuration.model_id}`")

    def _check_open(self) -> None:
        if self._closing:
            raise ServerStopping("The server is stopping.")

    # -- loading -------------------------------------------------------------------------------------------

    async def load(
        self, config_id: str, *, wait: bool = True, force: bool = False, by: Person | None = None
    ) -> schemas.Model:
        """Load a model; with ``wait`` until it is loaded.

        Parameters
        ----------
        force
            Unload busy models, too, to make room, and try what is not expected to fit.

        Raises
        ------
        ConfigurationNotFound, LLMKitError
            With ``wait``, the reason why it could not be loaded.
        NotAllowed
            With ``force``, if others' models are not theirs to unload.
        """
        self._check_open()
        model = self._by_config_id(config_id)
        check_force(by, force=force)
        name = None if by is None else by.name
        if wait:
            await model.ensure_loaded(force=force, by=name)
        else:
            model.start_loading(force=force, by=name)
        return model.snapshot()

    async def unload(self, model_id: str, *, drain: float = 0.0, by: Person | None = None) -> Memory:
        """Unload a model, whatever its status, and say what was freed; raises `NotAllowed` if it is somebody else's."""
        model = self._by_model_id(model_id)
        check_unload(by, model)
        return await model.unload(drain)

    async def _expire(self) -> None:
        """Unload models that were idle for as long as they may be."""
        while True:
            await asyncio.sleep(EXPIRY_SECONDS)
            now = datetime.now(UTC)
            for model in self._models.values():
                expires = model.expires_at
                if expires is not None and expires <= now and model.idle_since is not None:
                    model.start_unloading(reason=f"idle for {(now - model.idle_since).total_seconds():.0f} s")

    # -- changes -------------------------------------------------------------------------------------------

    def _add(self, configuration: Configuration) -> Model:
        model = Model(
            configuration,
            self._loader.make_engine,
            self._loader.log_file(configuration),
            self._changed,
            self._loader.last_load,
            max_in_flight=self._settings.max_in_flight,
            max_queued=self._settings.max_queued,
            logger=self._log,
            ttl_limits=(self._settings.idle_ttl, self._settings.max_idle_ttl),
        )
        self._models[configuration.model_id] = model
        self._apply(model, configuration)
        return model

    def _apply(self, model: Model, configuration: Configuration) -> None:
        model.configuration = configuration
        try:
            model.generation = self._stored.sorted(configuration).generation
        except LLMKitError:  # of a type that is not installed here, or of another version: it cannot be loaded
            model.generation = {}
        model.admission.max_in_flight = configuration.max_in_flight or self._settings.max_in_flight
        queued = configuration.max_queued
        model.admission.max_queued = self._settings.max_queued if queued is None else queued

    def _retire_deleted(self, model: Model) -> None:
        model.retire(ModelNotFound(f"`{model.configuration.model_id}` was deleted.", param="model_id"))

    def _remove(self, model: Model) -> None:
        if self._models.pop(model.configuration.model_id, None) is not None:
            self._changed(model, "deleted")
            self._metrics.forget(model.configuration.model_id)

    def _changed(self, model: Model, change: str) -> None:
        """Tell a change, unless the model was deleted: its engine may still be on the way down."""
        if change == "status":
            self._metrics.model_has_changed(model.configuration.model_id, model.status, model.load_seconds)
        if change == "status" and model.status != "loading":
            self._loader.settled(model)
            if model.status == "loaded":
                self._spawn(self._loader.keep(model))
            elif not model.live:
                self._spawn(self._loader.release(model))
        if change == "deleted" or self._models.get(model.configuration.model_id) is model:
            self._changes.tell(model, change)

    async def _follow_other_servers(self) -> None:
        """Take over what another server of the same home has configured or deleted."""
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            try:
                await self._catch_up()
                await self._loader.release_again()
                await self._see_owners()
            except Exception as error:  # noqa: BLE001  # the next turn tries again
                self._log.warning("The configurations could not be read again: %s", type(error).__name__)

    async def _catch_up(self) -> None:
        if self._behind or await self._stored.changed_elsewhere():
            self._take_over(await self._stored.read())

    async def _see_owners(self) -> None:
        """Note which models other servers of this home have."""
        owners = await self._stored.owners()
        for model in self._models.values():
            owner = owners.get(model.configuration.config_id)
            if model.owner != owner:
                model.owner = owner
                self._changed(model, "updated")

    def _take_over(self, configurations: list[Configuration]) -> None:
        stored = {configuration.config_id: configuration for configuration in configurations}
        # What is live stays as it is; what was skipped for that is looked at again.
        self._behind = False
        for model in list(self._models.values()):
            ours = model.configuration
            if ours.declared:
                continue
            theirs = stored.pop(ours.config_id, None)
            if theirs is None:
                if model.live:
                    self._behind = True
                else:
                    self._retire_deleted(model)
                    self._remove(model)
                    model.start_unloading()  # ends a restart that is due
            elif theirs != ours:
                self._apply(model, theirs)
                self._changed(model, "updated")
        for configuration in stored.values():
            if configuration.model_id not in self._models:
                self._changed(self._add(configuration), "configured")
            elif not self._models[configuration.model_id].configuration.declared:
                self._behind = True
