"""What a client gives back: the wire's objects, as they look in a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from llmkit import schemas
from llmkit.schemas import Wire

_COLUMNS = ("model_id", "status", "model_type", "model_name", "memory", "error")


class Answer(schemas.InferenceAnswer):
    """The answer to a prompt; ``str(answer)`` is its text."""

    def __str__(self) -> str:
        return self.response

    def __repr__(self) -> str:
        return f"Answer({self.response!r})"

    def _repr_markdown_(self) -> str:
        return self.response


class Configuration(schemas.Configuration):
    """A stored configuration."""

    def __repr__(self) -> str:
        return f"Configuration({', '.join(f'{name}={value!r}' for name, value in self.to_wire().items())})"


class Model(schemas.Model):
    """A model as it was when it was asked for."""

    def __str__(self) -> str:
        return f"{self.model_id}: {describe_status(self)}"

    def __repr__(self) -> str:
        return f"<Model {self}>"

    def _repr_html_(self) -> str:
        return ModelList([self])._repr_html_()


class ModelList(list[Model]):
    """Models; shows as a table."""

    def __repr__(self) -> str:
        if not self:
            return "No models yet: client.configure('demo', 'llmkit/demo', 'vllm') makes one."
        rows = self._rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)

    def _repr_html_(self) -> str:
        if not self:
            return f"<p>{escape(repr(self))}</p>"
        head, *rows = self._rows()
        titles = "".join(f'<th scope="col" style="text-align: left">{name}</th>' for name in head)
        body = "".join(
            "<tr>" + "".join(f'<td style="text-align: left">{escape(cell)}</td>' for cell in row) + "</tr>"
            for row in rows
        )
        return f"<table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"

    def _rows(self) -> list[list[str]]:
        """Give head and rows without the columns that are empty."""
        rows = [_COLUMNS, *(_cells(model) for model in self)]
        kept = [i for i in range(len(_COLUMNS)) if any(row[i] for row in rows[1:])]
        return [[row[i] for i in kept] for row in rows]


class ModelType(Wire):
    """A model type of the server.

    Attributes
    ----------
    arguments, generation
        JSON schemas of the engine's arguments and of the generation defaults.
    table
        Where a flat key of ``model_kwargs`` belongs: ``engine`` or ``generation``.
    """

    name: str
    summary: str
    available: bool
    reason: str | None = None
    arguments: dict[str, Any]
    generation: dict[str, Any]
    table: dict[str, str]


def read_configuration(told: Mapping[str, Any]) -> Configuration:
    """Read a configuration; what a newer server adds to it is left out."""
    return Configuration.model_validate({k: v for k, v in told.items() if k in Configuration.model_fields})


def describe_status(model: schemas.Model) -> str:
    """Say how a model is, in a few words."""
    if model.status == "loading":
        phase = f" ({model.phase})" if model.phase else ""
        return f"loading{phase}"
    return f"{model.status}: {model.reason}" if model.status == "failed" and model.reason else model.status


def describe_bytes(count: int | None) -> str:
    """Give a size for a person, or nothing where it is not known."""
    if count is None:
        return ""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def describe_download(download: schemas.Download) -> str:
    """Give bytes and rate of a download for a person."""
    whole = f" of {describe_bytes(download.total_bytes)}" if download.total_bytes is not None else ""
    rate = f", {describe_bytes(int(download.bytes_per_second))}/s" if download.bytes_per_second else ""
    left = f", {download.eta_seconds:.0f} s left" if download.eta_seconds is not None else ""
    return f"{describe_bytes(download.done_bytes)}{whole}{rate}{left}"


def describe_memory(memory: schemas.Memory) -> str:
    """Give what a model holds for a person, or nothing where it is not known."""
    parts = ((memory.gpu_bytes, "GPU"), (memory.pss_bytes, "RAM"))
    return ", ".join(f"{describe_bytes(count)} {kind}" for count, kind in parts if count)


def _cells(model: schemas.Model) -> tuple[str, ...]:
    error = model.error.message if model.error else ""
    status = f"loading ({model.phase})" if model.status == "loading" and model.phase else model.status
    return (model.model_id, status, model.model_type, model.model_name, describe_memory(model.memory), error)
