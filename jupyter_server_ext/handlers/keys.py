"""Keys for tools: make, list, revoke."""

from __future__ import annotations

from jupyter_core.utils import ensure_async
from jupyter_server.auth.decorator import authorized
from tornado import web

from jupyter_server_ext.answers import KeyRevoked
from jupyter_server_ext.handlers.base import RESOURCE, LLMHandler
from jupyter_server_ext.operations import describes
from llmkit.errors import DiskFull, KeyExists, KeyNotFound, NotAllowed
from llmkit.tool_keys import NewToolKey, ToolKeyList, ToolKeyRequest

GRANTED = ("read", "execute")
"""What a key opens; who makes one needs it all."""


class KeysHandler(LLMHandler):
    """``/llm/keys/``."""

    _track_activity = False

    @describes(answer=ToolKeyList)
    @web.authenticated
    @authorized("read", resource=RESOURCE)
    async def get(self) -> None:
        """List the keys, without what opens anything."""
        self.check_administers()
        registry = await self.registry()
        self.answer(ToolKeyList(keys=registry.keys.all()))

    @describes(answer=NewToolKey, body=ToolKeyRequest, errors=(KeyExists, DiskFull))
    @web.authenticated
    @authorized("write", resource=RESOURCE)
    async def post(self) -> None:
        """Make a key and answer it, this once."""
        self.check_administers()
        registry = await self.registry()
        request = await self.read_body(ToolKeyRequest)
        for action in GRANTED:
            may = self.authorizer.is_authorized(self, self.current_user, action, RESOURCE)
            if not await ensure_async(may):
                raise NotAllowed("A key would open more than you may do.", hint=f"You lack `{action}` on `{RESOURCE}`.")
        made = await registry.keys.create(request)
        self.set_header("Cache-Control", "no-store")
        self.answer(made)


class KeyHandler(LLMHandler):
    """``DELETE /llm/keys/{name}``."""

    @describes(answer=KeyRevoked, errors=(KeyNotFound, DiskFull))
    @web.authenticated
    @authorized("write", resource=RESOURCE)
    async def delete(self, name: str) -> None:
        """Revoke a key."""
        self.check_administers()
        registry = await self.registry()
        await registry.keys.revoke(name)
        self.answer(KeyRevoked(message="Key revoked", name=name))
