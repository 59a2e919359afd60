"""The part of the client that asks about every row of a table."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, cast

from llmkit.errors import DoesNotFit

if TYPE_CHECKING:
    import pandas as pd

    from llmkit.client.batch import Batch
    from llmkit.client.client import Client

P = ParamSpec("P")


def _table_of(run: Callable[P, tuple[Batch, pd.DataFrame]]) -> Callable[P, pd.DataFrame]:
    """Give a function that gives only the table, and shows in `help` what the other has."""

    @functools.wraps(run)
    def call(*args: P.args, **kwargs: P.kwargs) -> pd.DataFrame:
        return run(*args, **kwargs)[1]

    # So that the parameters stand in one place, with their types and defaults.
    shown = inspect.signature(run).replace(return_annotation="pd.DataFrame")
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
        How often a row is asked again after the engine or the line has failed, with growing pauses. A full
        queue of the server is waited for without counting.
    retry_errors
        Ask rows again whose ``error`` the checkpoint holds.
    missing
        ``error``, or ``skip``: rows with an empty cell that the template needs get a reason instead of an answer.
    on_engine_lost
        ``wait`` until a model or a server that went is back (a model that was loaded is loaded again after a
        restart of the server), or ``fail``.
    patience
        Seconds to wait for that at most.
    progress
        Show a progress bar with rate and time left.
    priority
        ``batch`` lets requests of people go first.
    reconnect
        Gives a client of the server when it is back at another address; default: `llmkit.connect`.
    **inference_kwargs
        Parameters of every prompt, for example ``temperature``, ``max_tokens``.

    Returns
    -------
    pandas.DataFrame
        The table with the same index, and ``response``, ``error`` (NA where all is well), ``finish_reason``,
        ``prompt_tokens``, ``completion_tokens``, ``seconds`` (of the request on the server), and the columns of
        the schema.

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
    from llmkit.client.batch import Batch, follow
    from llmkit.client.batch_asking import Asking, Plan
    from llmkit.client.batch_checkpoint import Checkpoint
    from llmkit.client.batch_server import BatchServer

    for name, value, least in (("concurrency", concurrency, 1), ("retries", retries, 0), ("patience", patience, 0)):
        if value < least:
            raise DoesNotFit(f"`{name}` is {value}; it is at least {least}.", param=name)
    if on_engine_lost not in ("wait", "fail") or priority not in ("batch", "interactive"):
        raise DoesNotFit('`on_engine_lost` is "wait" or "fail", `priority` "batch" or "interactive".')
    client = cast("Client", self)
    batch = Batch(client, data, template, model, system, schema, inference_kwargs, missing=missing)
    if not batch.places:
        return batch, batch.result({})
    with Checkpoint(Path(checkpoint) if checkpoint is not None else batch.default_checkpoint()) as opened:
        known = opened.read(batch.places)
        if retry_errors:
            known = {identity: row for identity, row in known.items() if row.error is None}
        left = [identity for identity in batch.places if identity not in known]
        if left:
            plan = Plan(
                batch.prompts(left),
                model,
                batch.inference_kwargs,
                min(concurrency, len(left)),
                retries,
                priority,
                on_engine_lost,
                patience,
                batch.check,
            )
            server = BatchServer(client, batch.configuration, batch.look(), reconnect or _discover)
            follow(Asking(plan, server, opened, known), batch, progress=progress)
        return batch, batch.result(known)


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
            adds, ``answered_by`` (another model, where one with a fallback failed) and ``configuration_hash``.

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

        frames = []
        for model in models:
            batch, answers = _map(self, data, template, model=model, **arguments)
            columns: dict[str, Any] = {"row": list(answers.index), "model_id": [model] * len(answers)}
            columns |= {name: answers[name].array for name in batch.added}
            columns["answered_by"] = batch.answered_by
            columns["configuration_hash"] = [batch.configuration.hash] * len(answers)
            frames.append(pd.DataFrame(columns))
        return pd.concat(frames, ignore_index=True)
