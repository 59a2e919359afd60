"""Who asks with a key for tools: the key itself, and only where keys open something.

Jupyter's identity provider, whichever it is, is not changed and knows nothing of these keys: every other route of the
server takes one for a wrong token.
"""

from __future__ import annotations

import re
from typing import Any, Final

from jupyter_server.auth.identity import User
from tornado.httputil import HTTPServerRequest

from llmkit.errors import NotAllowed, NotAuthenticated
from llmkit.tool_keys import is_key

USER_PREFIX: Final = "key:"
"""Before the name of a key, in the name of the user that an authorizer decides on."""
_HEADER: Final = re.compile(r"(?:token|bearer)\s+(\S+)\s*", re.IGNORECASE)  # as Jupyter reads its own token


class KeyIdentity:
    """Stands in one request where the identity provider stands in all others.

    What has the form of a key is never handed on: on a server without authentication it would open everything,
    revoked or not.

    Parameters
    ----------
    text
        The key; empty for one that came in the address, where others read it.
    """

    def __init__(self, text: str) -> None:
        self._text = text

    async def get_user(self, handler: Any) -> User:
        """Give the user that a key stands for.

        Raises
        ------
        NotAuthenticated
            If the key is not known, has expired, or was in the address.
        NotAllowed
            If it opens nothing here.
        """
        handler.current_user = handler._jupyter_current_user = None  # noqa: SLF001  # Jupyter's log asks for them
        if not self._text:
            raise NotAuthenticated(
                "A key is not taken from an address, which logs and browsers keep.",
                hint="Send it as a header: `Authorization: Bearer KEY`. Revoke this one if others could read it.",
            )
        key = (await handler.registry()).keys.find(self._text)
        if handler.request.method not in handler.opened_by_keys:
            raise NotAllowed(
                f"The key `{key.name}` does not open this.",
                hint="Keys for tools open /llm/v1 and /llm/inference/ alone; everything else takes the server's token.",
            )
        handler.tool_key = key
        return User(f"{USER_PREFIX}{key.name}")

    def is_token_authenticated(self, handler: Any) -> bool:
        """Say that no cookie is involved, so that nobody's browser can be made to ask."""
        return True

    def should_check_origin(self, handler: Any) -> bool:
        """Let pages of other servers ask that have a key, as with Jupyter's token."""
        return False


def given_key(request: HTTPServerRequest) -> str | None:
    """Give the key for tools that a request comes with: empty if it is in the address, None if there is none."""
    match = _HEADER.fullmatch(request.headers.get("Authorization", ""))
    if match and is_key(match[1]):
        return match[1]
    in_address = any(is_key(value.decode("latin-1")) for value in request.query_arguments.get("token", ()))
    return "" if in_address else None
