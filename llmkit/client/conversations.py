"""The part of the client that keeps conversations on the server."""

from __future__ import annotations

import contextlib

from pydantic import ValidationError

from llmkit.client.connection import Connection, path_to
from llmkit.errors import IncompatibleVersion
from llmkit.schemas import Conversation, ConversationList, ConversationRequest, ConversationSummary


class KeptConversations(ConversationList):
    """The conversations that the server keeps, what was changed last first.

    Attributes
    ----------
    unreadable
        How many are left out, because this client cannot read what the server tells of them.

    Examples
    --------
    >>> kept = client.conversations()
    >>> (len(kept.conversations), kept.unreadable)
    (0, 0)
    """

    unreadable: int = 0


class Conversations:
    """Conversations of the user, as the server keeps them."""

    connection: Connection

    def conversations(self) -> KeptConversations:
        """Give what the server knows of the conversations that it keeps, what was changed last first.

        One that this client cannot read hides no other: it is left out, and counted in ``unreadable``.

        Examples
        --------
        >>> kept = client.conversations()
        >>> [one.title for one in kept.conversations]
        []
        """
        told = self.connection.call("GET", "llm/conversations/")
        readable = []
        for one in told["conversations"]:
            with contextlib.suppress(ValidationError):
                readable.append(ConversationSummary.model_validate(one))
        unreadable = len(told["conversations"]) - len(readable)
        return KeptConversations(conversations=readable, kept=told.get("kept", True), unreadable=unreadable)

    def conversation(self, conversation_id: str) -> Conversation:
        """Give one conversation, or raise `ConversationNotFound`, or `IncompatibleVersion` if it cannot be read here.

        Examples
        --------
        >>> from llmkit.schemas import ConversationRequest
        >>> revision = client.save_conversation("capitals", ConversationRequest(title="Capitals"))
        >>> conversation = client.conversation("capitals")
        >>> conversation.title
        'Capitals'
        """
        told = self.connection.call("GET", path_to("llm/conversations", conversation_id))
        try:
            return Conversation.model_validate({k: v for k, v in told.items() if k in Conversation.model_fields})
        except ValidationError:
            raise IncompatibleVersion(
                f"The conversation `{conversation_id}` cannot be read by this version of llmkit.",
                hint="Upgrade llmkit in the environment of the kernel, and restart the kernel.",
            ) from None

    def save_conversation(self, conversation_id: str, body: ConversationRequest) -> int:
        """Have a conversation kept as it is now, and give its new revision.

        Parameters
        ----------
        conversation_id
            Your name for it: letters, digits and ``. _ -``, at most 64. A new one makes a new conversation.
        body
            The whole conversation; with a ``revision`` only if that is the one that is kept, 0 for none.

        Raises
        ------
        ConversationChanged
            If another revision is kept, or none; that stays as it is.
        ConversationsNotKept
            If the server keeps no conversations.
        TooLarge
            If it has more than 4 MiB.

        Examples
        --------
        >>> from llmkit.schemas import ConversationRequest
        >>> client.save_conversation("capitals", ConversationRequest(title="Capitals", system="Be brief."))
        1
        """
        path = path_to("llm/conversations", conversation_id)
        sent = body.model_dump(mode="json", exclude_defaults=True)
        return int(self.connection.call("PUT", path, json=sent)["revision"])

    def delete_conversation(self, conversation_id: str) -> None:
        """Have a conversation forgotten, or raise `ConversationNotFound`.

        Examples
        --------
        >>> from llmkit.schemas import ConversationRequest
        >>> revision = client.save_conversation("capitals", ConversationRequest(title="Capitals"))
        >>> client.delete_conversation("capitals")
        """
        self.connection.call("DELETE", path_to("llm/conversations", conversation_id))
