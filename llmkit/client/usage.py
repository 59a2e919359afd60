"""Who has asked how much of a server that many people share, and what is left of one's limits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import TYPE_CHECKING, Self

from llmkit.client.results import data_frame, html_table, text_table
from llmkit.errors import NotSupported
from llmkit.schemas import UsageList, UsageOfDay

if TYPE_CHECKING:
    from pandas import DataFrame

COLUMNS = tuple(UsageOfDay.model_fields)


class Usage(list[UsageOfDay]):
    """Requests and tokens of each day (UTC), user and model, oldest first; shows as a table.

    Parameters
    ----------
    rows
        The days.
    limits
        By ``requests_per_minute``, ``requests_per_day``, ``tokens_per_minute`` and ``tokens_per_day``; what is not
        named is not limited. They do not hold for administrators.
    left
        What is left of each limit to who has asked.

    Examples
    --------
    >>> day = UsageOfDay(day="2026-11-25", user="ada", model_id="gpt", requests=3, tokens=40)
    >>> usage = Usage([day], {"tokens_per_day": 1000}, {"tokens_per_day": 960})
    >>> usage
    day         user  model_id  requests  tokens
    2026-11-25  ada   gpt       3         40
    Left: 960 of 1,000 tokens a day
    >>> sum(one.tokens for one in usage)
    40
    """

    def __init__(
        self,
        rows: Iterable[UsageOfDay] = (),
        limits: Mapping[str, int] | None = None,
        left: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(rows)
        self.limits = dict(limits or {})
        self.left = dict(left or {})

    @classmethod
    def read(cls, told: UsageList, place: str) -> Self:
        """Take what a server tells.

        Raises
        ------
        NotSupported
            If it keeps no usage.

        Examples
        --------
        >>> Usage.read(UsageList(usage=[], limits={}, left={}), client.place)
        Nothing was asked yet.
        """
        if not told.kept:
            raise NotSupported(
                f"{place} tells no people apart, so it keeps no usage and has no budgets.",
                hint="client.requests gives what ran; usage is kept by a server that many share under JupyterHub.",
            )
        return cls(told.usage, told.limits, told.left)

    def to_frame(self) -> DataFrame:
        """Give the days as a table of pandas, a row for each day, user and model.

        Raises
        ------
        LLMKitError
            If pandas is not installed.

        Examples
        --------
        >>> day = UsageOfDay(day="2026-11-25", user="ada", model_id="gpt", requests=3, tokens=40)
        >>> int(Usage([day, day]).to_frame()["tokens"].sum())
        80
        """
        rows = (one.model_dump() for one in self)
        return data_frame(rows, COLUMNS, "usage itself is a list of the same days.")

    def __repr__(self) -> str:
        days = text_table([COLUMNS, *self._rows()]) if self else "Nothing was asked yet."
        left = describe_left(self.limits, self.left)
        return f"{days}\n{left}" if left else days

    def _repr_html_(self) -> str:
        days = html_table([COLUMNS, *self._rows()]) if self else "<p>Nothing was asked yet.</p>"
        left = describe_left(self.limits, self.left)
        return f"{days}<p>{escape(left)}</p>" if left else days

    def _rows(self) -> list[list[str]]:
        return [[str(value) for value in one.model_dump().values()] for one in self]


def describe_left(limits: Mapping[str, int], left: Mapping[str, int]) -> str:
    """Say what is left of each limit; nothing where there is none.

    Examples
    --------
    >>> describe_left({"requests_per_day": 20, "tokens_per_minute": 500}, {"requests_per_day": 3})
    'Left: 3 of 20 requests a day'
    """
    parts = (
        f"{left[name]:,} of {limit:,} {name.replace('_per_', ' a ')}" for name, limit in limits.items() if name in left
    )
    told = ", ".join(parts)
    return f"Left: {told}" if told else ""
