"""How an operation of the API is described, beside the method that does it; `openapi` makes the document of it.

Examples
--------
The decorator goes on top of the others, and the method reads its query parameters by what is declared::

    DRY_RUN = Flag("dry_run", "Only check it.")

    @describes(answer=Configured, body=ModelConfigRequest, query=(DRY_RUN,), errors=(ConfigurationExists,))
    @web.authenticated
    @authorized("write", resource=RESOURCE)
    async def post(self) -> None:
        \"\"\"Store a new configuration.\"\"\"
        dry_run = self.flag(DRY_RUN)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from llmkit.errors import LLMKitError

_ATTRIBUTE: Final = "operation"
C = TypeVar("C", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Flag:
    """A query parameter that is true or false."""

    name: str
    description: str
    default: bool = False

    def schema(self) -> dict[str, Any]:
        """Give its JSON schema."""
        return {"type": "boolean", "default": self.default}


@dataclass(frozen=True, slots=True)
class Number:
    """A query parameter that is a whole number from 0 to `most`."""

    name: str
    description: str
    default: int
    most: int

    def schema(self) -> dict[str, Any]:
        """Give its JSON schema."""
        return {"type": "integer", "minimum": 0, "maximum": self.most, "default": self.default}


@dataclass(frozen=True, slots=True)
class Seconds:
    """A query parameter that is a duration in seconds, from 0 to `most`."""

    name: str
    description: str
    default: float
    most: float

    def schema(self) -> dict[str, Any]:
        """Give its JSON schema."""
        return {"type": "number", "minimum": 0, "maximum": self.most, "default": self.default}


@dataclass(frozen=True, slots=True)
class Text:
    """A query parameter, or a header, that is a text; `choices` are all that it can be."""

    name: str
    description: str
    choices: tuple[str, ...] = ()

    def schema(self) -> dict[str, Any]:
        """Give its JSON schema."""
        return {"type": "string"} | ({"enum": list(self.choices)} if self.choices else {})


Parameter = Flag | Number | Seconds | Text


@dataclass(frozen=True)
class Operation:
    """What the document says of an operation and its method does not show.

    Parameters
    ----------
    answer
        Type of the JSON of a 200: a pydantic model or anything else that pydantic knows.
    others
        Types of the JSON of other answers that are no errors, by status.
    body
        Model of the request's body; where a route is one of several paths, one for each.
    query, headers
        Parameters that the method reads.
    answer_headers
        Headers of a 200 that are worth reading, with their description.
    errors
        What can be raised, beyond what every operation can: see `openapi.errors_of`.
    text
        Content type of a 200 that is no JSON.
    streams
        Whether, and when, a 200 can be a stream of server-sent events; in a person's words.
    engine_errors
        Whether an engine's own 4xx passes unchanged.
    """

    answer: Any
    others: Mapping[int, Any] = field(default_factory=dict)
    body: Any = None
    query: tuple[Parameter, ...] = ()
    headers: tuple[Text, ...] = ()
    answer_headers: Mapping[str, str] = field(default_factory=dict)
    errors: tuple[type[LLMKitError], ...] = ()
    text: str | None = None
    streams: str | None = None
    engine_errors: bool = False


def describes(answer: Any, **fields: Any) -> Callable[[C], C]:
    """Describe the operation that a handler's method is; the parameters are those of `Operation`."""
    operation = Operation(answer, **fields)

    def mark(method: C) -> C:
        setattr(method, _ATTRIBUTE, operation)
        return method

    return mark


def operation_of(method: Callable[..., Any]) -> Operation | None:
    """Give the description of a method, or None."""
    found = getattr(method, _ATTRIBUTE, None)
    return found if isinstance(found, Operation) else None


def action_of(method: Callable[..., Any]) -> str:
    """Give what Jupyter's authorizer is asked before a method runs: ``read``, ``write`` or ``execute``.

    Raises
    ------
    TypeError
        If the method is open to everybody.
    """
    at: Any = method
    while at is not None:
        # `authorized` keeps it nowhere else.
        action = inspect.getclosurevars(at).nonlocals.get("action")
        if isinstance(action, str):
            return action
        at = getattr(at, "__wrapped__", None)
    raise TypeError(f"{method.__qualname__} has no @authorized(action, resource=RESOURCE)")
