"""What a client gives back: the wire's objects, as they look in a notebook."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from html import escape
from typing import TYPE_CHECKING, Any, Self

from pydantic import PrivateAttr

from llmkit import schemas
from llmkit._version import __version__
from llmkit.client.markdown import harmless
from llmkit.errors import LLMKitError
from llmkit.schemas import Wire

if TYPE_CHECKING:
    from pandas import DataFrame

KEY = "api_key"
_COLUMNS = ("model_id", "status", "model_type", "model_name", "memory", "error")


@dataclass(frozen=True)
class Asked:
    """What the client knows of a prompt that it sent.

    Attributes
    ----------
    parameters
        That went with the prompt.
    time
        When it was sent.
    configuration
        Of the model that answered, if that could be had.
    """

    parameters: Mapping[str, Any]
    time: datetime
    configuration: Configuration | None = None


class Provenance(dict[str, Any]):
    """Where an answer comes from; shows as a table of what is known.

    Examples
    --------
    >>> answer = client.prompt("demo", "What is the capital of France?", temperature=0)
    >>> answer.provenance["parameters"]
    {'temperature': 0}
    """

    def _repr_html_(self) -> str:
        rows = "".join(_row(name, value) for name, value in self.items() if value is not None)
        return f"<table>{rows}</table>"


class Answer(schemas.InferenceAnswer):
    """The answer to a prompt; ``str(answer)`` is its text, and `provenance` says where it comes from.

    Examples
    --------
    >>> answer = client.prompt("demo", "What is the capital of France?")
    >>> answer
    Answer('The capital of France is Paris.')
    >>> print(answer)
    The capital of France is Paris.
    >>> answer.usage.completion_tokens
    6
    """

    _asked: Asked | None = PrivateAttr(None)

    def signed(self, asked: Asked, known: Mapping[str, Configuration]) -> Self:
        """Note the prompt, and of the configurations that are known the one of the model that answered.

        Examples
        --------
        >>> from datetime import UTC, datetime
        >>> asked = Asked({"temperature": 0}, datetime.now(UTC))
        >>> client.prompt("demo", "Hello").signed(asked, {}).provenance["parameters"]
        {'temperature': 0}
        """
        self._asked = replace(asked, configuration=known.get(self.model_id))
        return self

    @property
    def provenance(self) -> Provenance:
        """Where the answer comes from, as JSON; what cannot be known is None.

        ``model_id`` (that answered), ``model_name``, ``configuration_hash`` (see `Configuration.hash`; the
        configuration as it was at most some seconds before the prompt), ``parameters`` (sent with the prompt, without
        ``messages``), ``seed`` (of the prompt, else of the configuration), ``finish_reason``, ``usage`` (tokens),
        ``timings`` (seconds), ``engine`` (the model type), ``engine_version`` (of the engine that answered; a remote
        endpoint tells none), ``llmkit_version`` (of the client), ``request_id`` and ``time`` (UTC, ISO 8601, when the
        prompt was sent).

        Examples
        --------
        >>> answer = client.prompt("demo", "What is the capital of France?")
        >>> answer.provenance["engine"], answer.provenance["model_name"]
        ('vllm', 'llmkit/demo')
        """
        asked = self._asked
        configuration = asked.configuration if asked else None
        parameters = dict(asked.parameters) if asked else None
        seed = (parameters or {}).get("seed")
        if seed is None and configuration is not None:
            seed = configuration.seed
        told = {
            "model_id": self.model_id,
            "model_name": configuration.model_name if configuration else None,
            "configuration_hash": configuration.hash if configuration else None,
            "parameters": parameters,
            "seed": seed,
            "finish_reason": self.finish_reason,
            "usage": self.usage.model_dump(mode="json") if self.usage else None,
            "timings": self.timings.model_dump(mode="json"),
            "engine": configuration.model_type if configuration else None,
            "engine_version": self.engine_version,
            "llmkit_version": __version__,
            "request_id": self.request_id,
            "time": asked.time.isoformat(timespec="milliseconds") if asked else None,
        }
        return Provenance(told)

    def __str__(self) -> str:
        return self.response

    def __repr__(self) -> str:
        return f"Answer({self.response!r})"

    def _repr_markdown_(self) -> str:
        # The text alone: the same answer gives the same output, however often a notebook is run and compared.
        return harmless(self.response)


class Configuration(schemas.Configuration):
    """A stored configuration.

    Examples
    --------
    >>> [one.model_kwargs for one in client.configurations() if one.model_id == "gpt"]
    [{'api_key': 'env:OPENAI_API_KEY', 'temperature': 0}]
    """

    @property
    def hash(self) -> str:
        """Hash of what decides the answers: SHA-256 of model name, type and arguments, in hexadecimal.

        Keys do not count, nor what the model is called here, nor limits and descriptions.

        Examples
        --------
        >>> fields = {"config_id": "c", "model_id": "a", "model_name": "gpt-3", "model_type": "openai"}
        >>> Configuration(**fields).hash == Configuration(**{**fields, "model_id": "b"}).hash
        True
        """
        engine = self.model_kwargs.get("engine")
        kwargs: dict[str, Any] = {name: value for name, value in self.model_kwargs.items() if name != KEY}
        if isinstance(engine, dict):
            kwargs["engine"] = {name: value for name, value in engine.items() if name != KEY}
        what = {"model_name": self.model_name, "model_type": self.model_type, "model_kwargs": kwargs}
        return hashlib.sha256(json.dumps(what, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @property
    def seed(self) -> Any:
        """The seed that the configuration gives to each prompt, or None.

        Examples
        --------
        >>> fields = {"config_id": "c", "model_id": "a", "model_name": "gpt-3", "model_type": "openai"}
        >>> Configuration(**fields, model_kwargs={"generation": {"seed": 7}}).seed
        7
        """
        generation = self.model_kwargs.get("generation")
        nested = generation.get("seed") if isinstance(generation, dict) else None
        return nested if nested is not None else self.model_kwargs.get("seed")

    def __repr__(self) -> str:
        return f"Configuration({', '.join(f'{name}={value!r}' for name, value in self.to_wire().items())})"

    def _repr_html_(self) -> str:
        rows = "".join(_row(name, value) for name, value in self.to_wire().items() if value != {})
        return f"<table>{rows}</table>"


class Model(schemas.Model):
    """A model as it was when it was asked for.

    Examples
    --------
    >>> model = client.model("demo")
    >>> model
    <Model demo: loaded>
    >>> model.capabilities.api
    'chat'
    """

    def __str__(self) -> str:
        return f"{self.model_id}: {describe_status(self)}"

    def __repr__(self) -> str:
        return f"<Model {self}>"

    def _repr_html_(self) -> str:
        return ModelList([self])._repr_html_()


class ModelList(list[Model]):
    """Models; shows as a table.

    Examples
    --------
    >>> [model.model_id for model in client.models() if model.status == "loaded"]
    ['demo', 'gpt']
    """

    def __repr__(self) -> str:
        if not self:
            return "No models yet: client.configure('demo', 'llmkit/demo', 'vllm') makes one."
        return text_table(self._rows())

    def _repr_html_(self) -> str:
        if not self:
            return f"<p>{escape(repr(self))}</p>"
        return html_table(self._rows())

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

    Examples
    --------
    >>> by_name = {one.name: one for one in client.model_types()}
    >>> by_name["vllm"].table["max_model_len"]
    'engine'
    """

    name: str
    summary: str
    available: bool
    reason: str | None = None
    arguments: dict[str, Any]
    generation: dict[str, Any]
    table: dict[str, str]


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Set rows, the first of which is the head, in columns.

    Examples
    --------
    >>> print(text_table([("user", "tokens"), ("ada", "12")]))
    user  tokens
    ada   12
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def data_frame(rows: Iterable[Mapping[str, Any]], columns: Sequence[str], otherwise: str) -> DataFrame:
    """Give rows as a `pandas.DataFrame`.

    Parameters
    ----------
    rows
        By column.
    columns
        In their order, also where there are no rows.
    otherwise
        Where the same is to be had without pandas, for the hint.

    Raises
    ------
    LLMKitError
        If pandas is not installed.
    """
    try:
        pandas = importlib.import_module("pandas")
    except ImportError:
        raise LLMKitError(
            "A DataFrame needs pandas, which is not installed in this kernel.",
            hint=f"%pip install pandas, then ask again; {otherwise}",
        ) from None
    made: DataFrame = pandas.DataFrame(list(rows), columns=list(columns))
    return made


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """Make a table of rows, the first of which is the head."""
    head, *rest = rows
    titles = "".join(f'<th scope="col" style="text-align: left">{escape(name)}</th>' for name in head)
    body = "".join(
        "<tr>" + "".join(f'<td style="text-align: left">{escape(cell)}</td>' for cell in row) + "</tr>" for row in rest
    )
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"


def read_configuration(told: Mapping[str, Any]) -> Configuration:
    """Read a configuration; what a newer server adds to it is left out."""
    return Configuration.model_validate({k: v for k, v in told.items() if k in Configuration.model_fields})


def describe_status(model: schemas.Model) -> str:
    """Say how a model is, in a few words."""
    if model.status == "loading":
        phase = f" ({model.phase})" if model.phase else ""
        return f"loading{phase}{_by(model)}"
    if model.status == "failed" and model.reason:
        return f"{model.status}: {model.reason}"
    return f"{model.status}{_by(model)}"


def _by(model: schemas.Model) -> str:
    return f" by {model.loaded_by}" if model.loaded_by else ""


def describe_engine(name: str | None, version: str | None) -> str:
    """Name an engine with its version, as far as they are known.

    Examples
    --------
    >>> describe_engine("vllm", "0.11.0"), describe_engine("openai", None)
    ('vllm 0.11.0', 'openai')
    """
    return " ".join(filter(None, (name, version)))


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


def _row(name: str, value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    # A blank line would end the HTML within Markdown.
    text = escape(re.sub(r"\n\s*\n", "\n", text))
    left = 'style="text-align: left"'
    return f'<tr><th scope="row" {left}>{escape(name)}</th><td {left}><code>{text}</code></td></tr>'


def _cells(model: schemas.Model) -> tuple[str, ...]:
    error = model.error.message if model.error else ""
    status = f"loading ({model.phase})" if model.status == "loading" and model.phase else model.status
    engine = describe_engine(model.model_type, model.capabilities.engine_version)
    return (model.model_id, status, engine, model.model_name, describe_memory(model.memory), error)
