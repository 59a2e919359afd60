"""What comes before an engine: is there room, who makes it, on which device; and what loads have taught."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from llmkit.engines.base import Cluster, Engine, EngineContext, unavailable
from llmkit.errors import ConfigurationNotFound, LLMKitError, NoRoom
from llmkit.process.devices import Devices
from llmkit.process.placement import Placement, Reservation
from llmkit.registry.configurations import Configurations
from llmkit.registry.model import Model
from llmkit.registry.policies import Candidate, LoadRecord, Room, make_room
from llmkit.registry.secrets import ARGUMENT
from llmkit.schemas import Configuration, LoadPlan, Memory, MemoryEstimate

_GIB: Final = 1 << 30
_ROUNDS: Final = 4
"""So often is room looked for: what is being unloaded by others may be the room."""
_RAM: Final = -1
"""Main memory among the devices; GPUs have their indices."""


@dataclass
class _Load:
    """A load that has been let in: its engine takes its memory bit by bit."""

    estimate: MemoryEstimate
    engine: Engine | None = None
    reservation: Reservation | None = None


class Loader:
    """Makes engines, and room for them. It remembers how loads went, too.

    Parameters
    ----------
    models
        Gives every model of the registry.
    run_dir
        The folder of this server; that of all servers of this user lies above it.
    max_loaded_models
        How many models may hold memory of this machine at once; 0 is no limit.
    stall_seconds
        How long a load may show no sign of life.
    engine_niceness
        As in `EngineContext.niceness`.

    Attributes
    ----------
    cluster
        Where models can be placed beside this machine.
    """

    def __init__(
        self,
        stored: Configurations,
        models: Callable[[], Iterable[Model]],
        run_dir: Path,
        max_loaded_models: int,
        stall_seconds: float,
        logger: logging.Logger,
        devices: Devices,
        *,
        engine_niceness: int | None = None,
        standby_bytes: Callable[[], Awaitable[int | None]],
    ) -> None:
        self.devices = devices
        self.cluster: Cluster | None = None
        self.placement = Placement(self.devices, run_dir.parent / "gpus")
        self._stored = stored
        self._models = models
        self._run_dir = run_dir
        self._max_loaded_models = max_loaded_models
        self._stall_seconds = stall_seconds
        self._engine_niceness = engine_niceness
        self._standby_bytes = standby_bytes
        self._log = logger
        self._loads: dict[str, _Load] = {}
        self._local: set[str] = set()
        self._unreleased: set[str] = set()

    def log_file(self, configuration: Configuration) -> Path:
        """Give where the engine writes its log."""
        return self._run_dir / f"{configuration.config_id}.log"

    async def make_engine(self, configuration: Configuration, force: bool) -> Engine:  # noqa: FBT001  # as `Model` calls it
        """Make the engine of one load, after making room for it.

        Raises
        ------
        LLMKitError
            `NoRoom` if there is none, or why there can be no engine.
        """
        engine_type = self._stored.engine_type(configuration)
        why_not = unavailable(engine_type, configuration, self.cluster)
        if why_not is not None:
            raise why_not
        self._stored.check_allowed(configuration)
        self._unreleased.discard(configuration.config_id)
        await self._claim(configuration)
        estimate = await self._estimate(configuration)
        load = None
        self._local.discard(configuration.config_id)
        if estimate is not None:
            load = await self._let_in(configuration, estimate, force=force)
        reservation = load.reservation if load is not None else None
        context = EngineContext(
            # Short: the path of a unix socket in it has at most 107 bytes.
            run_dir=self._run_dir / UUID(configuration.config_id).hex[:12],
            log_file=self.log_file(configuration),
            api_key=await self._stored.api_key(configuration),
            logger=self._log,
            stall_seconds=self._stall_seconds,
            niceness=self._engine_niceness,
            devices=self.devices,
            cluster=self.cluster,
            gpus=tuple(reservation.gpus) if reservation is not None else (),
            gpu_memory_utilization=reservation.share if reservation is not None else None,
        )
        engine = engine_type.create(configuration, context)
        if load is not None:
            load.engine = engine
        return engine

    async def _claim(self, configuration: Configuration) -> None:
        try:
            await self._stored.claim(configuration)
        except ConfigurationNotFound:
            raise
        except LLMKitError as error:
            # A full disk is no reason not to load; another server could delete the configuration meanwhile.
            self._log.warning("Other servers could not be told of the load of %s: %s", configuration.model_id, error)

    def is_here(self, model: Model) -> bool:
        """Say whether the engine of a loaded model runs on this machine."""
        return model.configuration.config_id in self._local

    def settled(self, model: Model) -> None:
        """Give back what was set aside for a load that has ended."""
        config_id = model.configuration.config_id
        load = self._loads.pop(config_id, None)
        if load is not None and load.reservation is not None:
            load.reservation.release()

    async def release(self, model: Model) -> None:
        """Let the other servers change the configuration again, unless it is loaded once more."""
        config_id = model.configuration.config_id
        if model.live or model.configuration.declared:
            return
        self._unreleased.add(config_id)
        await self._stored.release(config_id)
        self._unreleased.discard(config_id)

    async def release_again(self) -> None:
        """Try once more what could not be released."""
        for model in self._models():
            if model.configuration.config_id in self._unreleased:
                await self.release(model)
        self._unreleased &= {model.configuration.config_id for model in self._models()}

    async def plan(self, configuration: Configuration, model: Model | None = None) -> LoadPlan:
        """Say what a load would take, and from whom; nothing is changed.

        Parameters
        ----------
        configuration
            What would be loaded.
        model
            Its live side, if it has one: that goes before another configuration of it is loaded.
        """
        why_not = unavailable(self._stored.engine_type(configuration), configuration, self.cluster)
        if why_not is not None:
            raise why_not
        self._stored.check_allowed(configuration)
        estimate = await self._estimate(configuration)
        head = {"model_id": configuration.model_id, "config_id": configuration.config_id}
        if estimate is None:
            return LoadPlan(**head, estimate=None, fits=True, reason="it takes no memory of this machine")
        if model is not None and model.status == "loaded" and model.configuration is configuration:
            return LoadPlan(**head, estimate=estimate, fits=True, reason="it is loaded")
        free = await self._free(estimate)
        if free is not None and model is not None and self.is_here(model):
            for device, held in _held(model, estimate).items():
                if device in free:
                    free[device] += held
        candidates = self._candidates(configuration, estimate)
        room = self._room(estimate, free, candidates, configuration)
        evictable = sum(sum(c.held.values()) for c in candidates if not c.busy)
        reason = estimate.reason
        if room.fits is False:
            reason = self._no_room(configuration, estimate, free).message
        return LoadPlan(
            **head,
            estimate=estimate,
            free_bytes=_usable(free, estimate),
            evict=room.evict,
            evictable_bytes=evictable,
            fits=room.fits,
            reason=reason,
        )

    # -- room ----------------------------------------------------------------------------------------------

    async def _estimate(self, configuration: Configuration) -> MemoryEstimate | None:
        """Give what a load takes: what the last one like it held, or what its files say."""
        engine_type = self._stored.engine_type(configuration)
        try:
            estimate = await asyncio.to_thread(engine_type.estimate, configuration)
        except Exception:  # noqa: BLE001  # an estimate is not worth a load
            self._log.exception("What %s takes could not be estimated.", configuration.model_id)
            return None
        if estimate is None or estimate.elastic:
            return estimate
        earlier = await self.last_load(configuration)
        held = (earlier.gpu_bytes if estimate.device == "gpu" else earlier.pss_bytes) if earlier else None
        return estimate.model_copy(update={"total_bytes": held, "measured": True}) if held else estimate

    async def _let_in(self, configuration: Configuration, estimate: MemoryEstimate, *, force: bool) -> _Load:
        """Return when there is room, after unloading what has to go for it."""
        free: dict[int, int] | None = None
        for _ in range(_ROUNDS):
            free = await self._free(estimate)
            candidates = self._candidates(configuration, estimate)
            room = self._room(estimate, free, candidates, configuration, force=force)
            if room.fits is not False:
                # Before anything else can happen: the next load that asks must know of this one.
                load = self._loads[configuration.config_id] = _Load(estimate)
                self._local.add(configuration.config_id)
                evicted = self._evict(room, configuration)
                if evicted:
                    await asyncio.wait(evicted)
                if estimate.device == "gpu" and free is not None:
                    load.reservation = await self._reserve(estimate, force=force)
                return load
            leaving = [model for model in self._models() if model.leaving]
            if not leaving:
                break
            await asyncio.gather(*(model.gone() for model in leaving))
        raise self._no_room(configuration, estimate, free)

    def _room(
        self,
        estimate: MemoryEstimate,
        free: dict[int, int] | None,
        candidates: list[Candidate],
        configuration: Configuration,
        *,
        force: bool = False,
    ) -> Room:
        count = estimate.device_count
        each = None if estimate.total_bytes is None else estimate.total_bytes // max(count, 1)
        return make_room(each, free, candidates, count=count, surplus=self._surplus(configuration), force=force)

    async def _reserve(self, estimate: MemoryEstimate, *, force: bool) -> Reservation:
        """Set GPUs aside."""
        each = 0 if force or estimate.total_bytes is None else estimate.total_bytes // estimate.device_count
        reserve = partial(self.placement.reserve, estimate.device_count, each, everything=estimate.elastic)
        return await asyncio.to_thread(reserve)

    async def _free(self, estimate: MemoryEstimate) -> dict[int, int] | None:
        """Measure what is free on each device, without what other loads are about to take; None if nobody can say."""
        if estimate.device == "gpu":
            devices = await asyncio.to_thread(self.devices.read)
            reserved = await asyncio.to_thread(self.placement.reservations)
            return {g.index: max(0, g.free_bytes - reserved.get(g.index, 0)) for g in devices.gpus} or None
        free = await asyncio.to_thread(self.devices.free_ram)
        if not self._loads:  # what was made ready becomes a part of the first engine, or goes
            free += await self._standby_bytes() or 0
        for load in list(self._loads.values()):
            if load.estimate.device == "cpu" and load.estimate.total_bytes:
                held = (await load.engine.memory()).pss_bytes if load.engine else None
                free -= max(0, load.estimate.total_bytes - (held or 0))
        return {_RAM: max(0, free)}

    def _candidates(self, configuration: Configuration, estimate: MemoryEstimate) -> list[Candidate]:
        found = []
        for model in self._models():
            if model.configuration.config_id in self._local and model.idle_since is not None:
                if model.status != "loaded" or model.configuration.config_id == configuration.config_id:
                    continue
                held = _held(model, estimate)
                busy = model.busy or model.leased
                found.append(Candidate(model.configuration.model_id, held, model.idle_since, busy))
        return found

    def _surplus(self, configuration: Configuration) -> int:
        """Count the models that have to go so that no more are loaded than may be."""
        if not self._max_loaded_models:
            return 0
        others = self._local - {configuration.config_id}
        holding = sum(model.configuration.config_id in others and model.holding for model in self._models())
        return max(0, holding + 1 - self._max_loaded_models)

    def _evict(self, room: Room, configuration: Configuration) -> list[asyncio.Task[Memory]]:
        """Start to unload in the moment of the decision, so that no request comes in between."""
        reason = f"evicted to make room for {configuration.model_id}"
        models = {model.configuration.model_id: model for model in self._models() if model.status == "loaded"}
        return [models[model_id].start_unloading(reason=reason) for model_id in room.evict]

    def _no_room(
        self, configuration: Configuration, estimate: MemoryEstimate, free: dict[int, int] | None
    ) -> LLMKitError:
        model_id = configuration.model_id
        where = "GPU memory" if estimate.device == "gpu" else "memory"
        held = [
            f"`{c.model_id}`" + (f" {sum(c.held.values()) / _GIB:.1f} GiB" if c.held else "") + (" (busy)" * c.busy)
            for c in self._candidates(configuration, estimate)
        ]
        holders = f" Loaded: {', '.join(held)}." if held else ""
        hint = "Unload a model, choose a smaller one or a smaller KV cache, or load it with ?force=true."
        if self._surplus(configuration):
            limit = self._max_loaded_models
            return NoRoom(
                f"No more than {limit} models may be loaded at once, and none of them is idle.{holders}", hint=hint
            )
        usable = _usable(free, estimate)
        needed, have = (estimate.total_bytes or 0) / _GIB, (usable or 0) / _GIB
        return NoRoom(
            f"`{model_id}` needs about {needed:.1f} GiB of {where}, and {have:.1f} GiB are free.{holders}",
            hint=hint,
            details={"needed_bytes": estimate.total_bytes, "free_bytes": usable},
        )

    async def delete_log(self, configuration: Configuration) -> None:
        """Delete what the engines of a configuration wrote."""
        with contextlib.suppress(OSError):
            await asyncio.to_thread(self.log_file(configuration).unlink, missing_ok=True)

    # -- history -------------------------------------------------------------------------------------------

    async def last_load(self, configuration: Configuration) -> LoadRecord | None:
        """Give the last load of this configuration with the same engine arguments; None also if it cannot be read."""
        try:
            told = await self._stored.last_load(configuration.config_id, self._hash(configuration))
            return LoadRecord(**told) if told else None
        except Exception as error:  # noqa: BLE001  # a forecast is not worth a load
            self._log.warning("The last load of %s could not be read: %s", configuration.model_id, type(error).__name__)
            return None

    async def keep(self, model: Model) -> None:
        """Remember how the load of a model went that is loaded now, if that can be stored."""
        configuration, record = model.configuration, model.load_record()
        if record is None:
            return
        started = datetime.now(UTC).timestamp() - record.seconds
        try:
            await self._stored.add_load(
                configuration.config_id, self._hash(configuration), started, record.seconds, asdict(record)
            )
        except Exception as error:  # noqa: BLE001  # as above
            self._log.warning("The load of %s could not be kept: %s", configuration.model_id, type(error).__name__)

    def _hash(self, configuration: Configuration) -> str:
        engine = {k: v for k, v in self._stored.sorted(configuration).engine.items() if k != ARGUMENT}
        told: list[Any] = [configuration.model_type, configuration.model_name, engine]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _held(model: Model, estimate: MemoryEstimate) -> dict[int, int]:
    """Give what a model holds of each device of the kind that a load is for."""
    memory = model.snapshot().memory
    return memory.gpus if estimate.device == "gpu" else {_RAM: memory.pss_bytes or 0}


def _usable(free: dict[int, int] | None, estimate: MemoryEstimate) -> int | None:
    """Give what of the free memory a model can use: as much on each of its devices as on the fullest of them."""
    if free is None:
        return None
    best = sorted(free.values(), reverse=True)[: estimate.device_count]
    return min(best) * estimate.device_count if len(best) == estimate.device_count else 0
