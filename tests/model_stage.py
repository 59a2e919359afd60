"""A model with an engine that waits for the test at every step, and everything it told."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from scripted_engine import ScriptedEngine, ScriptedEngineType

from llmkit.engines.base import EngineContext
from llmkit.registry.model import Model
from llmkit.registry.policies import LoadRecord
from llmkit.schemas import Configuration, Restart

LOG = logging.getLogger("test")


class Stage:
    """A model, its engines, and every change it told."""

    def __init__(
        self, folder: Path, *, max_in_flight: int = 4, max_queued: int = 4, restart: Restart | None = None
    ) -> None:
        self.engine_type = ScriptedEngineType()
        self.changes: list[tuple[str, str]] = []
        self.forced: list[bool] = []
        self.records: list[LoadRecord] = []
        configuration = Configuration(
            config_id="c", model_id="m", model_name="n", model_type="scripted", restart=restart
        )
        log_file = folder / "m.log"

        async def make_engine(configuration: Configuration, force: bool) -> ScriptedEngine:
            self.forced.append(force)
            return self.engine_type.create(configuration, EngineContext(folder, log_file, None, LOG))

        async def last_load(_: Configuration) -> LoadRecord | None:
            return self.records[-1] if self.records else None

        def changed(model: Model, change: str) -> None:
            self.changes.append((change, model.status))
            if (change, model.status) == ("status", "loaded") and (record := model.load_record()):
                self.records.append(record)

        self.model = Model(
            configuration,
            make_engine,
            log_file,
            changed,
            last_load,
            max_in_flight=max_in_flight,
            max_queued=max_queued,
            logger=LOG,
        )

    @property
    def engine(self) -> ScriptedEngine:
        return self.engine_type.engines[-1]

    async def until_engine(self) -> ScriptedEngine:
        while not self.engine_type.engines:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        return self.engine

    async def loaded(self) -> None:
        self.engine_type.ready = True
        await self.model.ensure_loaded()
