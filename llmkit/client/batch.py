"""A prompt over every row of a table: what is asked, how far it is, and the table that comes of it."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from llmkit.client.batch_asking import Asking
from llmkit.client.batch_checkpoint import Row, as_json
from llmkit.client.batch_schema import AnswerSchema
from llmkit.client.batch_template import Rows, Template
from llmkit.client.results import Configuration
from llmkit.client.stopping import Stopped
from llmkit.errors import DoesNotFit, LLMKitError, ModelNotLoaded

if TYPE_CHECKING:
    import pandas as pd

    from llmkit.client.client import Client

COLUMNS: Final = {
    "response": "string",
    "error": "string",
    "finish_reason": "string",
    "prompt_tokens": "Int64",
    "completion_tokens": "Int64",
    "seconds": "Float64",
    "answered_by": "string",
}
"""The columns of every result and their types."""
_FIELDS: Final = {"answered_by": "model_id"}
"""What a column is called in a row of the checkpoint, if not the same."""
_OURS: Final = ("stream", "messages", "request_id", "n", "prompt", "model_id")
_LOOK_SECONDS: Final = 0.2


@dataclass(frozen=True)
class Seen:
    """A model as it was when the work began.

    Attributes
    ----------
    epoch
        Of the server; it changes when the server is started anew.
    status
        Of the model.
    """

    configuration: Configuration
    epoch: str
    status: str

    @classmethod
    def look(cls, client: Client, model_id: str) -> Self:
        """Look at a model now.

        Raises
        ------
        LLMKitError
        """
        epoch = client.health().epoch
        model = client.model(model_id)
        return cls(client.configuration(model.config_id), epoch, model.status)

    @property
    def is_there(self) -> bool:
        """Whether the model answers, or is about to."""
        return self.status in ("loaded", "loading") or bool(self.configuration.auto_load)


class Batch:
    """A table, a template and a model: what is to be asked, and the table that comes of the answers.

    Attributes
    ----------
    seen
        The model.
    places
        For each prompt that is different, by its identity, the positions of its rows.
    """

    def __init__(
        self,
        seen: Seen,
        data: Any,
        template: str,
        system: str | None,
        schema: Any,
        inference_kwargs: Mapping[str, Any],
        *,
        missing: str,
    ) -> None:
        if missing not in ("error", "skip"):
            raise DoesNotFit('`missing` is "error" or "skip".', param="missing")
        if wrong := next((name for name in _OURS if name in inference_kwargs), None):
            raise DoesNotFit(f"`{wrong}` cannot be given here: each row is one prompt.", param=wrong)
        self.seen, self._pandas = seen, _pandas()
        self.table = _table(data, self._pandas)
        self._template = Template(template, list(self.table.columns))
        self._schema = None if schema is None else AnswerSchema(schema)
        self.added = {**COLUMNS, **(self._schema.columns if self._schema else {})}
        self._check_names()
        self.inference_kwargs = dict(inference_kwargs)
        if system is not None:
            self.inference_kwargs["system"] = system
        if self._schema is not None:
            if "response_format" in inference_kwargs:
                raise DoesNotFit("Give `schema` or `response_format`, not both.", param="schema")
            self.inference_kwargs["response_format"] = self._schema.response_format
        self._rows = Rows(self.table, self._template, missing=missing, pandas=self._pandas)
        what = [template, seen.configuration.model_id, seen.configuration.hash, self.inference_kwargs]
        self._what = as_json(what).encode()
        self.places: dict[str, list[int]] = {}
        for position, prompt in self._rows:
            self.places.setdefault(self._identity(prompt), []).append(position)

    def _identity(self, prompt: str) -> str:
        # The length keeps what belongs to the prompt apart from the rest.
        return hashlib.sha256(b"%d:%b%b" % (len(self._what), self._what, prompt.encode())).hexdigest()

    def _check_names(self) -> None:
        there = [str(name) for name in self.table.columns]
        taken = [name for name in self.added if name in there]
        twice = [name for name in self._schema.columns if name in COLUMNS] if self._schema else []
        if twice:
            raise DoesNotFit(f"The schema has a property `{twice[0]}`, and so has every result; call it otherwise.")
        if taken:
            raise DoesNotFit(
                f"The table has a column `{taken[0]}` already, which the result would have twice.",
                hint=f"df.rename(columns={{{taken[0]!r}: 'previous_{taken[0]}'}}), or drop it.",
            )
        for name in self._template.columns.values():
            if list(self.table.columns).count(name) > 1:
                raise DoesNotFit(f"The table has more than one column `{name}`.")

    def default_checkpoint(self) -> Path:
        """Give the file of this template, model and parameters, beside the notebook; the rows may change."""
        digest = hashlib.sha256(self._what).hexdigest()[:16]
        return Path(".llmkit") / f"map-{digest}.jsonl"

    def prompt(self, identity: str) -> str:
        """Make a prompt."""
        return self._rows.prompt(self.places[identity][0])

    def is_known(self, row: Row, *, retry_errors: bool) -> bool:
        """Say whether a row of the checkpoint needs not be asked again.

        What another model has answered, because this one failed, is no answer of this one.
        """
        if row.model_id not in (None, self.seen.configuration.model_id):
            return False
        return row.error is None or not retry_errors

    def check(self, text: str, finish_reason: str | None) -> str | None:
        """Say what is wrong with an answer, or None."""
        wrong = self._schema.check(text, finish_reason) if self._schema else None
        return f"The answer {wrong}" if wrong else None

    def require_model(self) -> None:
        """Raise `ModelNotLoaded` if the model has to be loaded first."""
        seen = self.seen
        if not seen.is_there:
            model_id = seen.configuration.model_id
            raise ModelNotLoaded(
                f"`{model_id}` is {'not loaded' if seen.status == 'unloaded' else seen.status}.",
                hint=f"client.load({model_id!r}) loads it.",
                param="model",
            )

    def count(self, rows: Iterable[Row]) -> tuple[int, int]:
        """Give of how many rows of the table these are the answers, and how many of them failed."""
        finished = failed = 0
        for row in rows:
            places = len(self.places[row.id])
            finished += places
            failed += places if row.error is not None else 0
        return finished, failed

    @property
    def skipped(self) -> int:
        """How many rows are not asked."""
        return len(self.table) - sum(map(len, self.places.values()))

    def result(self, rows: Mapping[str, Row]) -> pd.DataFrame:
        """Give the table with the answers."""
        at: list[Row | None] = [None] * len(self.table)
        for identity, positions in self.places.items():
            for position in positions:
                at[position] = rows.get(identity)
        index, new = self.table.index, {}
        for name, dtype in COLUMNS.items():
            cells = [None if row is None else getattr(row, _FIELDS.get(name, name)) for row in at]
            if name == "error":
                for position, reason in self._rows.skipped.items():
                    cells[position] = reason
            new[name] = self._pandas.Series(cells, index=index, dtype=dtype)
        if self._schema is not None:
            texts = [row.response if row is not None and row.error is None else None for row in at]
            new |= self._schema.read(texts, index, self._pandas)
        # By position: an index may have the same label twice.
        plain = {name: column.array for name, column in new.items()}
        return self._pandas.concat([self.table, self._pandas.DataFrame(plain, index=index)], axis=1)


def follow(asking: Asking, batch: Batch, *, progress: bool) -> None:
    """Ask, show how far it is, and leave nothing running.

    Raises
    ------
    KeyboardInterrupt, LLMKitError
        With words about how to go on.
    """
    try:
        with _Bar(batch, asking, visible=progress) as bar:
            asking.start()
            while not asking.wait(_LOOK_SECONDS):
                bar.show()
    except KeyboardInterrupt:
        asking.stop()
        raise Stopped(f"Stopped. {_how_to_go_on(asking, batch)}") from None
    except BaseException:
        asking.stop()
        raise
    if isinstance(asking.error, LLMKitError):
        asking.error.add_note(_how_to_go_on(asking, batch))
    if asking.error is not None:
        raise asking.error


def _how_to_go_on(asking: Asking, batch: Batch) -> str:
    finished = batch.count(asking.done.values())[0] + batch.skipped
    return (
        f"{finished} of {len(batch.table)} rows are finished and kept in {asking.checkpoint.path}; "
        "the same call again goes on from there."
    )


class _Bar:
    """A progress bar over the rows of a table, or nothing."""

    def __init__(self, batch: Batch, asking: Asking, *, visible: bool) -> None:
        self._batch, self._asking, self._visible = batch, asking, visible
        self._failed = 0
        self._bar: Any = None

    def __enter__(self) -> Self:
        if self._visible:
            with self._or_none():
                self._bar = self._make()
        return self

    def _make(self) -> Any:
        from tqdm.auto import tqdm  # slow to import

        finished, self._failed = self._batch.count(self._asking.done.values())
        return tqdm(
            total=len(self._batch.table),
            initial=finished + self._batch.skipped,  # so that the rate is that of this call
            desc=self._asking.plan.model_id,
            unit="row",
            dynamic_ncols=True,
        )

    @contextlib.contextmanager
    def _or_none(self) -> Iterator[None]:
        """Go on without a bar where it cannot be shown, as in a terminal that was closed: the work is worth more."""
        try:
            yield
        except Exception:  # noqa: BLE001  # of whatever shows it
            self._bar = None

    def show(self) -> None:
        """Show how far it is."""
        if self._bar is None:
            return
        finished, failed = self._batch.count(self._asking.take_news())
        self._failed += failed
        told = [f"{self._failed} failed"] if self._failed else []
        with self._or_none():
            self._bar.set_postfix_str(", ".join([*told, *filter(None, [self._asking.note])]), refresh=False)
            if not self._bar.update(finished):
                self._bar.refresh()  # the time goes on, and what it waits for

    def __exit__(self, *_: object) -> None:
        self.show()
        if self._bar is not None:
            with self._or_none():
                self._bar.close()


def _pandas() -> Any:
    try:
        import pandas as pd
    except ImportError:
        raise LLMKitError("A table needs pandas, which is not installed.", hint="%pip install pandas") from None
    return pd


def _table(data: Any, pandas: Any) -> pd.DataFrame:
    if isinstance(data, pandas.DataFrame):
        return data
    if isinstance(data, pandas.Series):
        return data.to_frame(name=data.name if isinstance(data.name, str) else "text")
    if isinstance(data, Sequence) and not isinstance(data, str) and all(isinstance(one, Mapping) for one in data):
        return pandas.DataFrame([dict(one) for one in data])
    raise DoesNotFit("The data is no table.", hint="A DataFrame, a Series, or a list of dicts.", param="data")
