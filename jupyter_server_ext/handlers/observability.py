"""How the server itself is."""

from __future__ import annotations

from jupyter_server.auth.decorator import authorized
from tornado import web

from jupyter_server_ext.handlers.base import RESOURCE, LLMHandler


class HealthHandler(LLMHandler):
    """``GET /llm/health``."""

    _track_activity = False

    @web.authenticated
    @authorized("read", resource=RESOURCE)
    async def get(self) -> None:
        """Answer the condition of registry and store."""
        registry = await self.registry()
        self.answer(registry.health())
