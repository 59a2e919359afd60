"""Conversations that the server keeps: list, get, store, forget."""

from __future__ import annotations

from jupyter_server.auth.decorator import authorized
from tornado import web

from jupyter_server_ext.answers import ConversationDeleted, ConversationStored
from jupyter_server_ext.handlers.base import RESOURCE, LLMHandler
from jupyter_server_ext.operations import describes
from llmkit.errors import ConversationChanged, ConversationNotFound, ConversationsNotKept, DiskFull
from llmkit.schemas import MAX_CONVERSATION_BYTES, Conversation, ConversationList, ConversationRequest


class ConversationsHandler(LLMHandler):
    """``GET /llm/conversations/``."""

    _track_activity = False

    @describes(answer=ConversationList)
    @web.authenticated
    @authorized("read", resource=RESOURCE)
    async def get(self) -> None:
        """List the conversations that are kept, what was changed last first."""
        registry = await self.registry()
        self.answer(await registry.conversations.summaries())


class ConversationHandler(LLMHandler):
    """``/llm/conversations/{conversation_id}``."""

    max_body_bytes = MAX_CONVERSATION_BYTES

    @describes(answer=Conversation, errors=(ConversationNotFound,))
    @web.authenticated
    @authorized("read", resource=RESOURCE)
    async def get(self, conversation_id: str) -> None:
        """Answer one conversation."""
        self._track_activity = False  # who writes one is at work, unlike who looks
        registry = await self.registry()
        self.answer(await registry.conversations.get(conversation_id))

    @describes(
        answer=ConversationStored,
        body=ConversationRequest,
        errors=(ConversationsNotKept, ConversationNotFound, ConversationChanged, DiskFull),
    )
    @web.authenticated
    @authorized("execute", resource=RESOURCE)
    async def put(self, conversation_id: str) -> None:
        """Keep a conversation as it is now, and answer its revision."""
        registry = await self.registry()
        request = await self.read_body(ConversationRequest)
        revision, updated_at = await registry.conversations.put(conversation_id, request)
        self.answer(ConversationStored(conversation_id=conversation_id, revision=revision, updated_at=updated_at))

    @describes(answer=ConversationDeleted, errors=(ConversationNotFound, DiskFull))
    @web.authenticated
    @authorized("execute", resource=RESOURCE)
    async def delete(self, conversation_id: str) -> None:
        """Forget a conversation."""
        registry = await self.registry()
        await registry.conversations.delete(conversation_id)
        self.answer(ConversationDeleted(message="Conversation deleted", conversation_id=conversation_id))
