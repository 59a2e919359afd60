"""Keys for tools, as they go over the wire: they open the endpoints that ask models, and nothing else.

A Jupyter token opens terminals; an editor or a script that only asks a model should not have one.
"""

from __future__ import annotations

import re
import secrets
import string
from datetime import datetime
from fnmatch import fnmatchcase
from typing import Annotated, Any, Final

from pydantic import AwareDatetime, BeforeValidator, Field, StringConstraints, model_validator

from llmkit.schemas import Strict, Wire

PREFIX: Final = "llmkit-"
"""What every key begins with, so that who looks for secrets in texts finds it."""
_LENGTH: Final = 43
_LETTERS: Final = string.ascii_letters + string.digits
_KEY: Final = re.compile(f"{PREFIX}[A-Za-z0-9]{{{_LENGTH}}}")
MOST_SECONDS: Final = 100 * 365 * 86400.0
MOST_GLOBS: Final = 64


def new_key() -> str:
    """Make a key with 256 random bits."""
    return PREFIX + "".join(secrets.choice(_LETTERS) for _ in range(_LENGTH))


def is_key(text: str) -> bool:
    """Say whether a text has the form of a key.

    Examples
    --------
    >>> is_key(new_key()), is_key("llmkit-"), is_key("sk-1234")
    (True, False, False)
    """
    return _KEY.fullmatch(text) is not None


def _read_time(value: Any) -> datetime:
    try:
        time = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        time = None
    if time is None or time.tzinfo is None:
        raise ValueError("must be a time with Z or an offset, such as 2030-01-31T12:00:00Z")
    return time


Time = Annotated[AwareDatetime, BeforeValidator(_read_time)]


KeyName = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"),
    Field(description="Name of a key: letters, digits and . _ -, the first a letter or a digit, at most 64."),
]
ModelGlob = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9._:@*?\[\]!-]{1,128}$"),
    Field(description="A model_id, or a pattern of some: * is anything, ? one letter, [ab] one of them."),
]


class ToolKeyRequest(Strict):
    """Body of ``POST /llm/keys/``."""

    name: Annotated[KeyName | None, Field(description="What the key is called here; one is made up if missing.")] = None
    models: list[ModelGlob] = Field(
        [], max_length=MOST_GLOBS, description="The model_ids that it may ask, as patterns; none: every model."
    )
    expires_at: Time | None = Field(None, description="When it ends, with Z or an offset; not with expires_in.")
    expires_in: float | None = Field(None, gt=0, le=MOST_SECONDS, description="Seconds until it ends.")

    @model_validator(mode="after")
    def _one_end(self) -> ToolKeyRequest:
        if self.expires_at is not None and self.expires_in is not None:
            raise ValueError("expires_at and expires_in cannot both be given")
        return self


class ToolKey(Wire):
    """What is known of a key; nothing that opens anything.

    Examples
    --------
    >>> for key in client.keys():
    ...     print(key.name, key.expires_at)
    """

    name: str
    models: list[str] = Field([], description="Patterns of the model_ids that it may ask; none: every model.")
    created_at: datetime
    expires_at: datetime | None = None
    last_used_at: datetime | None = Field(None, description="To the minute.")
    expired: bool = False

    def allows(self, model_id: str) -> bool:
        """Say whether it may ask a model.

        Examples
        --------
        >>> key = ToolKey(name="editor", models=["code-*"], created_at="2030-01-01T00:00:00Z")
        >>> key.allows("code-small"), key.allows("chat")
        (True, False)
        """
        return not self.models or any(fnmatchcase(model_id, pattern) for pattern in self.models)


class NewToolKey(ToolKey):
    """A key that was just made: the only time that its text is told.

    It is not shown with the rest, so that it does not end up in a notebook's output.

    Examples
    --------
    >>> made = client.create_key("lesson", expires=3600)
    >>> made
    <NewToolKey 'lesson': its text is in `.key`, and cannot be had again>
    >>> client.revoke_key("lesson")
    """

    key: str = Field(repr=False, description="The key itself; the server keeps only its digest.")

    def __repr__(self) -> str:
        return f"<NewToolKey {self.name!r}: its text is in `.key`, and cannot be had again>"

    __str__ = __repr__


class ToolKeyList(Wire):
    """Answer of ``GET /llm/keys/``."""

    keys: list[ToolKey]
