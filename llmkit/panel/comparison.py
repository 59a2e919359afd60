"""What a comparison has measured: a row for each answer, as a table in the panel and as a DataFrame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from llmkit.client import Answer
from llmkit.client.results import data_frame, describe_engine
from llmkit.panel.markup import seconds_in_words

if TYPE_CHECKING:
    from pandas import DataFrame

Row = dict[str, Any]
PARAMETERS = ("system", "temperature", "top_p", "max_tokens", "seed")
COLUMNS = (
    "run",
    "column",
    "model_id",
    "prompt",
    *PARAMETERS,
    "response",
    "finish_reason",
    "prompt_tokens",
    "completion_tokens",
    "first_token_seconds",
    "total_seconds",
    "tokens_per_second",
    "cost",
    "currency",
    "engine",
    "engine_version",
    "error",
)
_MEASURES = {
    "completion_tokens": "Tokens",
    "tokens_per_second": "Tokens/s",
    "first_token_seconds": "First token",
    "total_seconds": "Total",
    "cost": "Cost",
}
_BEST = {"tokens_per_second": max, "first_token_seconds": min, "total_seconds": min}


def asked(run: int, column: str, body: Mapping[str, Any]) -> Row:
    """Begin a row with what was asked; what is not known yet is None."""
    options = body.get("inference_kwargs") or {}
    row: Row = dict.fromkeys(COLUMNS)
    row |= {"run": run, "column": column, "model_id": body["model_id"], "prompt": body["prompt"]}
    return row | {name: options.get(name) for name in PARAMETERS}


def measured(answer: Answer) -> Row:
    """Give what an answer adds to its row."""
    usage, timings, known = answer.usage, answer.timings, answer.provenance
    return {
        "response": answer.response,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": usage.prompt_tokens if usage else None,
        "completion_tokens": usage.completion_tokens if usage else None,
        "first_token_seconds": timings.first_token,
        "total_seconds": timings.total,
        "tokens_per_second": timings.tokens_per_second,
        "cost": answer.cost.amount if answer.cost else None,
        "currency": answer.cost.currency if answer.cost else None,
        "engine": known["engine"],
        "engine_version": known["engine_version"],
    }


def note(row: Row) -> str:
    """Say in one line what an answer took."""
    count, version = row["completion_tokens"], row["engine_version"]
    parts = [
        f"{count} token{'' if count == 1 else 's'}" if count is not None else "",
        f"{_words(row, 'tokens_per_second')} tokens/s" if row["tokens_per_second"] is not None else "",
        f"first token after {_words(row, 'first_token_seconds')}" if row["first_token_seconds"] is not None else "",
        f"{_words(row, 'total_seconds')} in all" if row["total_seconds"] is not None else "",
        _words(row, "cost"),
        describe_engine(row["engine"] or "engine", version) if version is not None else "",
        "cut off at the token limit" if row["finish_reason"] == "length" else "",
    ]
    return " · ".join(filter(None, parts))


def table(rows: Sequence[Row]) -> str:
    """Give the rows of one run as a table, also while it goes on, with the fastest marked in each measure."""
    if not rows:
        return ""
    shown = [name for name in _MEASURES if any(row[name] is not None for row in rows)]
    best = {name: _best(rows, name) for name in shown}
    heads = "".join(f'<th scope="col">{title}</th>' for title in ("", "Model", *(_MEASURES[name] for name in shown)))
    lines = []
    for row in rows:
        cells = "".join(_cell(row, name, is_best=row[name] is not None and row[name] == best[name]) for name in shown)
        if told := _unmeasured(row):
            cells = f'<td colspan="{max(len(shown), 1)}" class="llmkit-quiet">{told}</td>'
        lines.append(f'<tr><th scope="row">{escape(row["column"])}</th><td>{escape(row["model_id"])}</td>{cells}</tr>')
    return (
        f'<div class="llmkit-figures" tabindex="0" role="region" aria-label="Figures of run {rows[0]["run"]}"><table>'
        f"<caption>Run {rows[0]['run']}</caption>"
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def to_dataframe(rows: Sequence[Row]) -> DataFrame:
    """Give rows as a `pandas.DataFrame`.

    Raises
    ------
    LLMKitError
        If pandas is not installed.
    """
    return data_frame(rows, COLUMNS, "panel.compare.results gives the same as a list.")


def _best(rows: Sequence[Row], name: str) -> Any:
    known = [row[name] for row in rows if row[name] is not None]
    # Of one, or of equal ones, none is the fastest.
    return _BEST[name](known) if name in _BEST and len(set(known)) > 1 else None


def _unmeasured(row: Row) -> str:
    """Say why a row has no figures, or nothing where it has."""
    if row["response"] is None:
        return "answering …"
    return "failed" if row["error"] else "stopped" if row["finish_reason"] == "stopped" else ""


def _cell(row: Row, name: str, *, is_best: bool) -> str:
    text = escape(_words(row, name))
    if is_best:
        return f'<td class="llmkit-fastest">{text} <span class="llmkit-mark">fastest</span></td>'
    return f"<td>{text}</td>"


def _words(row: Row, name: str) -> str:
    value = row[name]
    if value is None:
        return ""
    if name.endswith("_seconds"):
        return seconds_in_words(value)
    if name == "cost":
        return f"{value:.4g} {row['currency']}"
    return f"{value:.1f}" if name == "tokens_per_second" else f"{value:,}"
