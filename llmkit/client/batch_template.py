"""A template of a prompt with the names of columns in it, and what of a table may go into it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any, Final
from uuid import UUID

from llmkit.errors import DoesNotFit

_PIECE: Final = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_TRICK: Final = re.compile(r"[.\[!:]")
_PLAIN: Final = (str, bool, int, float, Decimal, date, time, timedelta, UUID)  # a datetime is a date
_BRACES_HINT: Final = "A brace that is part of the text is written twice: {{ and }}."
_NAMED_ROWS: Final = 5
_SHORT: Final = ("float16", "float32")


class Template:
    """Text with ``{column}`` in it; each is the whole name of a column, with nothing applied to its value.

    Parameters
    ----------
    text
        The template; ``{{`` and ``}}`` stand for braces.
    columns
        The names of the columns that there are.

    Raises
    ------
    DoesNotFit
        If it names a column that is not there, or is no template.

    Examples
    --------
    >>> Template("Capital of {country}? {{short}}", ["country"]).render({"country": "France"})
    'Capital of France? {short}'
    """

    def __init__(self, text: str, columns: Collection[Hashable]) -> None:
        if not isinstance(text, str):
            raise DoesNotFit("The template is no text.", hint='It looks like "Translate: {text}".', param="template")
        self.text = text
        named: dict[str, Hashable] = {str(column): column for column in columns}
        self._pieces: list[tuple[str, str | None]] = []
        self.columns: dict[str, Hashable] = {}
        """The columns it needs: how the template calls each, and its name in the table."""
        for literal, name in _parse(text):
            if name is not None:
                self.columns[name] = _column(name, named)
            self._pieces.append((literal, name))

    def render(self, values: Mapping[str, str]) -> str:
        """Give the prompt of one row; braces in its values stay as they are."""
        return "".join(literal if name is None else values[name] for literal, name in self._pieces)


def _parse(text: str) -> Iterator[tuple[str, str | None]]:
    end = 0
    for found in _PIECE.finditer(text):
        yield text[end : found.start()], None
        end = found.end()
        if found[1] is not None:
            yield "", found[1]
        elif len(found[0]) == 1:
            raise DoesNotFit(
                f"The template has a single {found[0]} at position {found.start()}.",
                hint=_BRACES_HINT,
                param="template",
            )
        else:
            yield found[0][0], None
    yield text[end:], None


def _column(name: str, named: Mapping[str, Hashable]) -> Hashable:
    if name in named:
        return named[name]
    if not name:
        raise DoesNotFit("The template has {} without a name.", hint=_BRACES_HINT, param="template")
    before = _TRICK.split(name)[0]
    if before in named:
        raise DoesNotFit(
            f"{{{name}}} in the template is more than the name of a column.",
            hint=f"Write {{{before}}}, and make a column of its own for anything else.",
            param="template",
        )
    near = difflib.get_close_matches(name, named, 1, 0.0)
    guess = f"Did you mean {{{near[0]}}}? " if near else ""
    raise DoesNotFit(
        f"The table has no column `{name}`.",
        hint=f"{guess}{_BRACES_HINT}",
        param="template",
        details={"columns": list(named)},
    )


def cell_text(value: Any, pandas: Any) -> str | None:
    """Give the text of a cell, None if it is missing (None, NaN, NaT, NA).

    Raises
    ------
    TypeError
        If it is no single plain value, or a text that cannot be sent.
    """
    if _is_short(value) and not pandas.isna(value):
        return str(value)
    item = getattr(value, "item", None)
    if callable(item) and not isinstance(value, _PLAIN) and getattr(value, "ndim", None) == 0:
        value = item()  # a value of NumPy
    if value is None or (pandas.api.types.is_scalar(value) and pandas.isna(value)):
        return None
    if not isinstance(value, _PLAIN):
        raise TypeError(f"a {type(value).__name__} is no plain value")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise TypeError("it has half of a surrogate pair, which is no character") from None
    return text


def columns_of(data: Any, template: Template) -> dict[str, Sequence[Any]]:
    """Give the values of each column that a template needs."""
    columns = {name: data[column] for name, column in template.columns.items()}
    # As a list of Python's own numbers 0.1 of 32 bits would be 0.10000000149011612.
    return {
        name: list(values.array) if str(values.dtype).lower() in _SHORT else values.tolist()
        for name, values in columns.items()
    }


def _is_short(value: Any) -> bool:
    """Say whether it is a NumPy number with fewer digits than Python's."""
    return str(getattr(value, "dtype", "")) in _SHORT and getattr(value, "ndim", None) == 0


class Rows:
    """The rows of a table as prompts, made when they are asked for: a large table is never there twice.

    Attributes
    ----------
    skipped
        Why a row has no prompt, by its position.

    Raises
    ------
    DoesNotFit
        If a cell cannot go into a prompt, or is missing and ``missing`` is ``error``.
    """

    def __init__(self, data: Any, template: Template, *, missing: str, pandas: Any) -> None:
        self._template, self._pandas = template, pandas
        self._columns = columns_of(data, template)
        self._count = len(data)
        self.skipped: dict[int, str] = {}
        labels = data.index.tolist()  # of Python's own types: one would read np.int64(7)
        for position in range(self._count):
            for name, values in self._columns.items():
                try:
                    text = cell_text(values[position], pandas)
                except TypeError as error:
                    raise DoesNotFit(
                        f"Row {labels[position]!r}, column `{name}`: {error}.",
                        hint=f"Make it text before: df[{name!r}] = df[{name!r}].map(...).",
                        param=name,
                    ) from None
                if text is None:
                    self.skipped.setdefault(position, f"skipped: `{name}` is missing")
        if self.skipped and missing == "error":
            some = ", ".join(repr(labels[position]) for position in list(self.skipped)[:_NAMED_ROWS])
            more = ", ..." if len(self.skipped) > _NAMED_ROWS else ""
            raise DoesNotFit(
                f"{len(self.skipped)} of {self._count} rows have an empty cell that the template needs: {some}{more}.",
                hint='Fill them (df.fillna), leave them out (df.dropna), or pass missing="skip".',
            )

    def __iter__(self) -> Iterator[tuple[int, str]]:
        """Give position and prompt of each row that has one."""
        for position in range(self._count):
            if position not in self.skipped:
                yield position, self.prompt(position)

    def prompt(self, position: int) -> str:
        """Give the prompt of one row."""
        cells = {name: str(cell_text(values[position], self._pandas)) for name, values in self._columns.items()}
        return self._template.render(cells)
