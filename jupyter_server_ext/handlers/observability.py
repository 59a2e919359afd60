"""How the server itself is, what the machine has, and what an engine says."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import io
from typing import Any

from jupyter_server.auth.decorator import authorized
from prometheus_client import CONTENT_TYPE_LATEST
from tornado import web

from jupyter_server_ext.handlers.base import RESOURCE, LLMHandler
from jupyter_server_ext.handlers.streaming import StreamHandler
from jupyter_server_ext.operations import Flag, Number, describes
from llmkit.errors import EngineGone, ModelNotFound, ModelNotLoaded, NotSupported, TimedOut
from llmkit.registry.registry import ModelRegistry
from llmkit.schemas import Devices, Health, LogTail, UsageList, UsageOfDay

TAIL = Number("tail", "Lines at most.", 200, 10_000)
FOLLOW = Flag("follow", "Stream the log: the last lines first, then what is added.")


class HealthHandler(LLMHandler):
    """``GET /llm/health``."""

    _track_activity = False

    @describes(answer=Health)
    @web.authenticated
    @authorized("read", resource=RESOURCE)
    async def get(self) -> None:
        """Answer the condition of registry and store."""
        registry = await self.registry()
        self.answer(registry.health())


class UsageHandler(LLMHandler):
    """``GET /llm/usage/``."""

    _track_activity = False

    @describes(answer=UsageList)
    @web.authenticated
    @authorized("read", resource=RESOURCE)
    async def get(self) -> None:
        """Answer who has used how much: their own usage to people who do not administer the server."""
        registry = await self.registry()
        self.answer(await registry.usage(self.person))


class UsageTableHandler(LLMHandler):
    """``GET /llm/usage.csv``."""

    _track_activity = False

    @describes(answer=str, text="text/csv")
    @web.authenticated
    @authorized("read", resource=RESOURCE)
    async def get(self) -> None:
        """Answer who has used how much, as a table for a spreadsheet."""
        told = await (await self.registry()).usage(self.person)
        self.set_header("Content-Type", "text/csv; charset=utf-8")
        self.set_header("Content-Disposition", 'attachment; filename="usage.csv"')
        self.finish(_to_csv(told.usage), set_content_type="text/csv; charset=utf-8")


class OpenAPIHandler(LLMHandler):
    """``GET /llm/openapi.json``."""

    _track_activity = False

    @describes(answer=dict[str, Any])
    @web.authenticated
    @authorized("read", resource=RESOURCE)
    async def get(self) -> None:
        """Describe this API, as an OpenAPI 3.1 document."""
        registry = await self.registry()
        # Some tenths of a second the first time, in which the event loop does not stand still.
        self.answer(await asyncio.to_thread(self.app.openapi, tuple(registry.engine_types)))


class DevicesHandler(LLMHandler):
    """``GET /llm/devices``."""

    _track_activity = False

    @describes(answer=Devices)
    @web.authenticated
    @authorized("read", resource=RESOURCE)
    async def get(self) -> None:
        """Answer CPU, RAM and GPUs, and the share of every model."""
        registry = await self.registry()
        self.answer(await registry.devices())


class LogsHandler(StreamHandler):
    """``GET /llm/models/{model_id}/logs``."""

    _track_activity = False

    @describes(
        answer=LogTail,
        query=(TAIL, FOLLOW),
        errors=(ModelNotFound,),
        streams='With `follow=true`: an event `{"line": ...}` for each line, until the engine has ended.',
    )
    @web.authenticated
    @authorized("read", resource=RESOURCE)
    async def get(self, model_id: str) -> None:
        """Answer the last lines of the engine's log, or stream it: the last lines first, then what is added."""
        registry = await self.registry()
        tail = self.number(TAIL)
        if not self.flag(FOLLOW):
            self.answer(LogTail(model_id=model_id, lines=await registry.log_tail(model_id, tail)))
            return
        registry.model(model_id)  # 404 before the headers of a stream
        await self.until_gone(self._follow(registry, model_id, tail))

    async def _follow(self, registry: ModelRegistry, model_id: str, tail: int) -> None:
        self.start_heartbeat()
        async with contextlib.aclosing(registry.follow_log(model_id, tail)) as follower:
            async for lines in follower:
                await self.send(*({"line": line} for line in lines))
        await self.write_now(b"", is_last=True)


class EngineMetricsHandler(StreamHandler):
    """``GET /llm/models/{model_id}/metrics``."""

    _track_activity = False

    @describes(
        answer=str,
        text="text/plain",
        errors=(ModelNotFound, ModelNotLoaded, NotSupported, EngineGone, TimedOut),
    )
    @web.authenticated
    @authorized("read", resource=RESOURCE)
    async def get(self, model_id: str) -> None:
        """Answer what the engine tells Prometheus."""
        await self.until_gone(self._answer(await self.registry(), model_id))

    async def _answer(self, registry: ModelRegistry, model_id: str) -> None:
        metrics = await registry.engine_metrics(model_id)
        self.set_header("Content-Type", CONTENT_TYPE_LATEST)
        self.finish(metrics)


def _to_csv(usage: list[UsageOfDay]) -> str:
    """Write a table with a line of names; no cell begins as the formulas of spreadsheets do."""
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(UsageOfDay.model_fields)
    for one in usage:
        cells = map(str, one.model_dump().values())
        writer.writerow([f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell for cell in cells])
    return file.getvalue()
