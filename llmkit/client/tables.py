"""The part of the client that asks about every row of a table."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, ParamSpec, cast

from llmkit.errors import DoesNotFit

if TYPE_CHECKING:
    import pandas as pd

    from llmkit.client.batch import Batch, Seen
    from llmkit.client.client import Client

P = ParamSpec("P")
_HASH: Final = "configuration_hash"


def _table_of(run: Callable[P, tuple[Batch, pd.DataFrame]]) -> Callable[P, pd.DataFrame]:
    """Give a function that gives only the table, and shows in `help` what the other has."""

    @functools.wraps(run)
    def call(*args: P.args, **kwargs: P.kwargs) -> pd.DataFrame:
        return run(*args, **kwargs)[1]

    # So that the parameters stand in one place, with their types and defaults; those that begin with _ are not shown.
    whole = inspect.signature(run)
    named = [one for name, one in whole.parameters.items() if not name.startswith("_")]
    shown = whole.replace(parameters=named, return_annotation="pd.DataFrame")
    call.__signature__ = shown  # type: ignore[attr-defined]
    call.__name__ = run.__name__.removeprefix("_")
    call.__qualname__ = f"Client.{call.__name__}"
    return call


def _map(
    self: Tables,
    /,
    data: Any,
    template: str,
    *,
    model: str,
    system: str | None = None,
    schema: Any = None,
    checkpoint: str | os.PathLike[str] | None = None,
    concurrency: int = 8,
    retries: int = 3,
    retry_errors: bool = False,
    missing: Literal["error", "skip"] = "error",
    on_engine_lost: Literal["wait", "fail"] = "wait",
    patience: float = 3600.0,
    progress: bool = True,
    priority: Literal["batch", "interactive"] = "batch",
    reconnect: Callable[[], Client] | None = None,
    _seen: Seen | None = None,
    **inference_kwargs: Any,
) -> tuple[Batch, pd.DataFrame]:
    """Ask a model about every row of a table; the same call again goes on where one has ended.

    Each answer is on the disk before it counts. Rows with equal prompts are asked once. An answer is taken from
    the checkpoint only for the same prompt, system prompt, template, parameters, schema and configuration.

    Parameters
    ----------
    data
        A DataFrame, a Series (``{its name}``, else ``{text}``) or a list of dicts.
    template
        The prompt, with ``{column}`` for the cell of that column; ``{{`` and ``}}`` are braces.
    model
        The ``model_id`` of a loaded model.
    system
        System prompt of every row.
    schema
        JSON schema, or pydantic class, that the answers follow: its properties become columns with a type.
    checkpoint
        File for the answers; default: one in ``.llmkit`` in the working folder, beside the notebook.
    concurrency
        Requests running at once at most; so many rows at most are asked twice after a kill.
    retries
        How often a row is asked again after the engine or the line has failed on it, with growing pauses. What is no
        fault of the row is waited for without counting: a full queue, an endpoint that asks to slow down, or one that
        answers no other row either.
    retry_errors
        Ask rows again whose ``error`` the checkpoint holds.
    missing
        ``error``, or ``skip``: rows with an empty cell that the template needs get a reason instead of an answer.
    on_engine_lost
        ``wait`` until a model or a server that went is back (a model that was loaded is loaded again after a
        restart of the server), or an endpoint answers again; or ``fail``.
    patience
        Seconds to wait for that at most, and for room in a queue.
    progress
        Show a progress bar with rate and time left.
    priority
        ``batch`` lets requests of people go first.
    reconnect
        Gives a client of the server when it is back at another address; default: `llmkit.connect`. It is closed when
        it is not needed any more, if it is not this client.
    **inference_kwargs
        Parameters of every prompt, for example ``temperature``, ``max_tokens``.

    Returns
    -------
    pandas.DataFrame
        The table with the same index, and ``response``, ``error`` (NA where all is well), ``finish_reason``,
        ``prompt_tokens``, ``completion_tokens``, ``seconds`` (of the request on the server), ``answered_by`` (another
        model where this one failed and has a fallback; the same call again asks this one anew for these rows), and the
        columns of the schema.

    Raises
    ------
    DoesNotFit
        If the template names no column, or a cell cannot go into a prompt; nothing was asked then.
    ModelNotLoaded
        If the model has to be loaded first, or somebody has unloaded it.
    DiskFull, WrongState, TimedOut
        No room for the checkpoint; another process has it, or the configuration was changed; waited in vain.
    KeyboardInterrupt
        When interrupted: requests are cancelled on the server. With every error finished rows are kept.

    Examples
    --------
    >>> import pandas as pd
    >>> df = pd.DataFrame({"country": ["France"]})
    >>> answered = client.map(df, "What is the capital of {country}?", model="demo", temperature=0)
    >>> answered["response"].tolist()
    ['The capital of France is Paris.']
    """
    # Needed by few, and slow to import.
    from llmkit.client.batch import Batch, Seen, follow
    from llmkit.client.batch_asking import Asking, Plan
    from llmkit.client.batch_checkpoint import Checkpoint, make_private
    from llmkit.client.batch_server import BatchServer

    _check_number("concurrency", concurrency, 1, Integral)
    _check_number("retries", retries, 0, Integral)
    _check_number("patience", patience, 0, Real)
    if on_engine_lost not in ("wait", "fail") or priority not in ("batch", "interactive"):
        raise DoesNotFit('`on_engine_lost` is "wait" or "fail", `priority` "batch" or "interactive".')
    client = cast("Client", self)
    batch = Batch(_seen or Seen.look(client, model), data, template, system, schema, inference_kwargs, missing=missing)
    if not batch.places:
        return batch, batch.result({})
    path = batch.default_checkpoint() if checkpoint is None else Path(checkpoint)
    if checkpoint is None:
        make_private(path.parent)
    with Checkpoint(path) as opened:
        kept = opened.read(batch.places)
        known = {key: row for key, row in kept.items() if batch.is_known(row, retry_errors=retry_errors)}
        left = [identity for identity in batch.places if identity not in known]
        if left:
            batch.require_model()
            plan = Plan(
                left,
                batch.prompt,
                model,
                batch.inference_kwargs,
                min(concurrency, len(left)),
                retries,
                priority,
                on_engine_lost,
                patience,
                batch.check,
            )
            server = BatchServer(client, batch.seen.configuration, batch.seen.epoch, reconnect or _discover)
            try:
                follow(Asking(plan, server, opened, known), batch, progress=progress)
            finally:
                if server.server != client.connection.server:  # so that the next call finds it, too
                    client.connection.move_to(server.server)
        return batch, batch.result(known)


def _check_number(name: str, value: Any, least: int, kind: type) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        what = "a whole number" if kind is Integral else "a number"
        raise DoesNotFit(f"`{name}` is {value!r}; it is {what}.", param=name)
    if not value >= least:  # type: ignore[operator]  # NaN is neither
        raise DoesNotFit(f"`{name}` is {value}; it is at least {least}.", param=name)


def _discover() -> Client:
    from llmkit.client.discovery import connect

    return connect()


class Tables:
    """Prompts over every row of a table."""

    map = _table_of(_map)

    def compare(self, /, models: Sequence[str], data: Any, template: str, **arguments: Any) -> pd.DataFrame:
        """Ask several models about every row of a table, one model after the other.

        Parameters
        ----------
        models
            Each ``model_id``.
        data, template, **arguments
            As of `map`.

        Returns
        -------
        pandas.DataFrame
            One row for each row and model: ``row`` (label of the table's index), ``model_id``, the columns that `map`
            adds, and ``configuration_hash`` (None where another model has answered).

        Raises
        ------
        DoesNotFit, LLMKitError
            As `map`, which says what else there is.

        Examples
        --------
        >>> import pandas as pd
        >>> df = pd.DataFrame({"country": ["France"]})
        >>> compared = client.compare(["demo", "gpt"], df, "What is the capital of {country}?")
        >>> compared["model_id"].tolist()
        ['demo', 'gpt']
        """
        if isinstance(models, str) or not models:
            raise DoesNotFit("`models` is a list of model ids.", hint='client.compare(["one", "two"], df, "...").')
        import pandas as pd

        from llmkit.client.batch import Seen
        from llmkit.client.batch_schema import AnswerSchema

        properties = AnswerSchema(arguments["schema"]).columns if arguments.get("schema") is not None else {}
        if taken := [name for name in ("row", "model_id", _HASH) if name in properties]:
            raise DoesNotFit(
                f"The schema has a property `{taken[0]}`, and so has every comparison; call it otherwise.",
                param="schema",
            )
        # All at the beginning, as they are when the person looks: the server may be started anew meanwhile.
        seen = {model: Seen.look(cast("Client", self), model) for model in models}
        frames = {}
        # One that is not loaded first, so that an error is not told after hours; maybe nothing is left to ask of it.
        for model in sorted(seen, key=lambda model: seen[model].is_there):
            batch, answers = _map(self, data, template, model=model, _seen=seen[model], **arguments)
            columns: dict[str, Any] = {"row": list(answers.index), "model_id": [model] * len(answers)}
            columns |= {name: answers[name].array for name in batch.added}
            asked = answers["answered_by"].fillna(model) == model
            columns[_HASH] = [seen[model].configuration.hash if same else None for same in asked]
            frames[model] = pd.DataFrame(columns)
        return pd.concat([frames[model] for model in models], ignore_index=True)
