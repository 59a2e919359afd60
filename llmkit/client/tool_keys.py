"""The part of the client that makes, lists and revokes keys for tools."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from llmkit.client.connection import Connection, path_to
from llmkit.tool_keys import NewToolKey, ToolKey, ToolKeyList


class ToolKeys:
    """Keys for tools of one server: they open ``/llm/v1`` and ``/llm/inference/``, and nothing else."""

    connection: Connection

    def keys(self) -> list[ToolKey]:
        """Give what is known of every key for tools, oldest first: when it ends and was last used, not the key.

        Examples
        --------
        >>> made = client.create_key("script")
        >>> keys = client.keys()
        >>> [key.name for key in keys]
        ['script']
        >>> client.revoke_key("script")
        """
        return ToolKeyList.model_validate(self.connection.call("GET", "llm/keys/")).keys

    def create_key(
        self,
        name: str | None = None,
        *,
        models: Sequence[str] = (),
        expires: timedelta | datetime | float | None = None,
    ) -> NewToolKey:
        """Make a key for a tool, which then needs no Jupyter token: that would open terminals, too.

        Parameters
        ----------
        name
            What it is called in lists; one is made up if not given.
        models
            The models that it may ask, as names or patterns such as ``"code-*"``; none: every model.
        expires
            After which duration, or when, it opens nothing any more; a number is seconds. None: when it is revoked.

        Returns
        -------
        NewToolKey
            Its text is in ``key``, this once: the server keeps only a digest. It is not shown with the rest.

        Raises
        ------
        KeyExists
            If there is a key of this name.
        DoesNotFit
            If a field is wrong, or the key would have expired already.
        NotAllowed
            If you may not do yourself what the key would.

        Examples
        --------
        >>> from datetime import timedelta
        >>> import openai
        >>> made = client.create_key("editor", models=["code-*"], expires=timedelta(days=30))
        >>> tool = openai.OpenAI(base_url=f"{client.url}llm/v1", api_key=made.key)
        >>> [model.id for model in tool.models.list()]  # of those that are loaded it may ask none
        []
        >>> client.revoke_key("editor")
        """
        body: dict[str, Any] = {"models": [models] if isinstance(models, str) else list(models)}
        if name is not None:
            body["name"] = name
        if isinstance(expires, datetime):
            body["expires_at"] = expires.astimezone(UTC).isoformat()
        elif expires is not None:
            body["expires_in"] = expires.total_seconds() if isinstance(expires, timedelta) else float(expires)
        return NewToolKey.model_validate(self.connection.call("POST", "llm/keys/", json=body))

    def revoke_key(self, name: str) -> None:
        """Revoke a key for tools, which opens nothing from the next request on, or raise `KeyNotFound`.

        Examples
        --------
        >>> made = client.create_key("notebook")
        >>> client.revoke_key("notebook")
        """
        self.connection.call("DELETE", path_to("llm/keys", name))
