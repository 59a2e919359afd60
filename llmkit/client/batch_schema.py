"""Answers that follow a JSON schema: asked for, checked, and as columns of a type."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from llmkit.errors import DoesNotFit

_DTYPES: Final = {"integer": "Int64", "number": "Float64", "boolean": "boolean", "string": "string"}
_WHOLE: Final = "value"
_SHOWN: Final = 200


class AnswerSchema:
    """What answers look like.

    Parameters
    ----------
    given
        A JSON schema, or a pydantic model class.

    Attributes
    ----------
    columns
        The dtype of each column: one for each property of an object, else one with the name ``value``.

    Raises
    ------
    DoesNotFit
        If it is no JSON schema.

    Examples
    --------
    >>> schema = AnswerSchema({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]})
    >>> schema.columns, schema.check('{"n": 3}', "stop"), schema.check('{"n": "x"}', "stop")
    ({'n': 'Int64'}, None, "does not fit the schema: n: 'x' is not of type 'integer'")
    """

    def __init__(self, given: Any) -> None:
        import jsonschema  # type: ignore[import-untyped]  # slow to import; it has no types

        make = getattr(given, "model_json_schema", None)
        schema = make() if callable(make) else given
        if not isinstance(schema, Mapping):
            raise DoesNotFit("`schema` is no JSON schema.", hint="It is a dict, or a pydantic class.", param="schema")
        self.schema = dict(schema)
        kind = jsonschema.validators.validator_for(self.schema, default=jsonschema.Draft202012Validator)
        try:
            kind.check_schema(self.schema)
        except jsonschema.SchemaError as error:
            raise DoesNotFit(f"`schema` is no JSON schema: {error.message}.", param="schema") from None
        _check_references(self.schema)
        self._validator = kind(self.schema)
        properties: Any = self.schema.get("properties")
        self._is_object = isinstance(properties, Mapping) and bool(properties)
        parts: dict[str, Any] = dict(properties) if self._is_object else {_WHOLE: self.schema}
        self.columns = {name: _dtype(part) for name, part in parts.items()}

    @property
    def response_format(self) -> dict[str, Any]:
        """What asks for such answers in OpenAI's API."""
        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": self.schema, "strict": True}}

    def check(self, text: str, finish_reason: str | None) -> str | None:
        """Say what is wrong with an answer, or None."""
        try:
            value = json.loads(text)
        except RecursionError:
            return "is no JSON that can be read: it is nested too deeply"
        except ValueError as error:
            cut = "; it was cut off, a larger max_tokens may help" if finish_reason == "length" else ""
            return f"is no JSON: {error}{cut}"
        try:
            wrong = next(iter(self._validator.iter_errors(value)), None)
        except Exception as error:  # noqa: BLE001  # whatever an answer does to the validator: it is that of one row
            return f"cannot be compared with the schema: {type(error).__name__}"
        if wrong is None:
            return None
        place = ".".join(map(str, wrong.absolute_path))
        return f"does not fit the schema: {place + ': ' if place else ''}{wrong.message}"[:_SHOWN]

    def read(self, texts: Sequence[str | None], index: Any, pandas: Any) -> dict[str, Any]:
        """Give the typed columns of answers that fit, with NA where there is none."""
        values = [None if text is None else json.loads(text) for text in texts]
        columns = {}
        for name, dtype in self.columns.items():
            if self._is_object:
                cells = [value.get(name) if isinstance(value, dict) else None for value in values]
            else:
                cells = values
            columns[name] = _series(cells, dtype, index, pandas)
        return columns


def _check_references(schema: Mapping[str, Any]) -> None:
    """Raise `DoesNotFit` where the schema refers to something that it does not hold: each answer would fail on it."""
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012, EMPTY_REGISTRY

    resolver = EMPTY_REGISTRY.resolver_with_root(DRAFT202012.create_resource(schema))
    for reference in _references(schema):
        try:
            resolver.lookup(reference)
        except Unresolvable:
            raise DoesNotFit(
                f"`schema` refers to {reference!r}, which is not in it.",
                hint='Parts that are referred to stand in "$defs" of the schema itself: {"$ref": "#/$defs/name"}.',
                param="schema",
            ) from None


def _references(part: Any) -> Iterator[str]:
    rest = [part]
    while rest:
        part = rest.pop()
        if isinstance(part, Mapping):
            if isinstance(part.get("$ref"), str):
                yield part["$ref"]
            rest.extend(part.values())
        elif isinstance(part, list):
            rest.extend(part)


def _dtype(part: Any) -> str:
    kinds = part.get("type") if isinstance(part, Mapping) else None
    named = [kind for kind in (kinds if isinstance(kinds, list) else [kinds]) if kind != "null"]
    return _DTYPES.get(str(named[0]), "object") if len(named) == 1 else "object"


def _series(cells: list[Any], dtype: str, index: Any, pandas: Any) -> Any:
    try:
        return pandas.Series(cells, index=index, dtype=dtype)
    except (OverflowError, TypeError, ValueError):  # an integer of more than 64 bits
        return pandas.Series(cells, index=index, dtype="object")
