"""Templates, and what of a table may go into one."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pytest

from llmkit.client.batch_template import Rows, Template, cell_text
from llmkit.errors import DoesNotFit


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{a} and {b c}", "1 and 2"),
        ('{{"a": "{a}"}}', '{"a": "1"}'),
        ("{{a}}", "{a}"),
        ("{{{a}}}", "{1}"),
        ("no column", "no column"),
        ("", ""),
        ("{a}{a}", "11"),
        ("{d.e}{f[0]}", "34"),
        ("{5}", "5"),
    ],
)
def test_a_name_in_braces_is_the_cell_of_that_column(text: str, expected: str) -> None:
    columns: list[Any] = ["a", "b c", "d.e", "f[0]", 5]
    template = Template(text, columns)
    assert template.render({"a": "1", "b c": "2", "d.e": "3", "f[0]": "4", "5": "5"}) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{countri}", r"no column `countri`\.\nDid you mean \{country\}\?"),
        ("{country.__class__}", "more than the name of a column"),
        ("{country[0]}", "more than the name"),
        ("{country!r}", "more than the name"),
        ("{country:>9}", "more than the name"),
        ("{}", r"\{\} without a name"),
        ("{country", r"single \{ at position 0"),
        ("country}", r"single \} at position 7"),
        ("{a{country}}", r"single \{ at position 0"),
    ],
)
def test_whatever_else_stands_in_braces_is_a_clear_error(text: str, said: str) -> None:
    with pytest.raises(DoesNotFit, match=said):
        Template(text, ["country"])


def test_braces_in_a_cell_stay_as_they_are() -> None:
    data = pd.DataFrame({"a": ["{b}"], "b": ["{{x}}"]})
    assert dict(rows(data, "{a}{b}")) == {0: "{b}{{x}}"}


def rows(data: pd.DataFrame, template: str, missing: str = "error") -> Rows:
    return Rows(data, Template(template, list(data.columns)), missing=missing, pandas=pd)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("é", "é"),
        ("", ""),
        (3, "3"),
        (True, "True"),
        (0.1, "0.1"),
        (np.int64(3), "3"),
        (np.float32(0.5), "0.5"),
        (np.bool_(False), "False"),
        (Decimal("1.10"), "1.10"),
        (dt.date(2026, 1, 2), "2026-01-02"),
        (pd.Timestamp("2026-01-02 03:04"), "2026-01-02 03:04:00"),
        (pd.Timedelta(days=1), "1 days 00:00:00"),
        (None, None),
        (float("nan"), None),
        (np.float64("nan"), None),
        (pd.NA, None),
        (pd.NaT, None),
    ],
)
def test_plain_values_have_a_text_and_missing_ones_none(value: object, text: str | None) -> None:
    assert cell_text(value, pd) == text


@pytest.mark.parametrize("value", [[1], {"a": 1}, {1}, b"x", object(), np.array([1, 2]), 1j, "\ud800"])
def test_a_cell_that_is_no_plain_value_is_named(value: object) -> None:
    data = pd.DataFrame({"a": pd.Series(["x", value], index=["first", "second"], dtype="object")})
    with pytest.raises(DoesNotFit, match="Row 'second', column `a`: "):
        rows(data, "{a}")


def test_a_column_that_the_template_does_not_name_may_hold_anything() -> None:
    assert dict(rows(pd.DataFrame({"a": ["x"], "b": [[1]], "c": [None]}), "{a}")) == {0: "x"}


def test_missing_cells_are_told_by_the_labels_of_their_rows() -> None:
    data = pd.DataFrame({"a": ["x", None, None]}, index=["p", "q", "r"])
    with pytest.raises(DoesNotFit, match=r"2 of 3 rows .*: 'q', 'r'"):
        rows(data, "{a}")
    skipping = rows(data, "{a}", "skip")
    assert dict(skipping) == {0: "x"}
    assert skipping.skipped == {1: "skipped: `a` is missing", 2: "skipped: `a` is missing"}


@pytest.mark.parametrize("dtype", ["float32", "Float32", "float16", "object"])
def test_a_short_number_is_written_with_the_digits_that_it_has(dtype: str) -> None:
    data = pd.DataFrame({"x": pd.Series([np.float32(0.1), None], dtype=dtype)})
    rows = Rows(data, Template("{x}", ["x"]), missing="skip", pandas=pd)
    assert list(rows) == [(0, "0.1")]
    assert rows.skipped == {1: "skipped: `x` is missing"}


def test_labels_are_told_as_plain_values() -> None:
    data = pd.DataFrame({"x": ["a", None]}, index=[5, 7])
    with pytest.raises(DoesNotFit, match=r"the template needs: 7\."):
        Rows(data, Template("{x}", ["x"]), missing="error", pandas=pd)
