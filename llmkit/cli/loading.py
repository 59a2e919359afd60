"""Watch a load from a shell: a bar in a terminal, one line a phase in a log."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from llmkit.cli.output import note, printable
from llmkit.client.loading import PHASES, follow
from llmkit.client.results import describe_download

if TYPE_CHECKING:
    from llmkit.client import Client
    from llmkit.client.results import Model


def watch(client: Client, model_id: str, *, quiet: bool) -> Model:
    """Return when a model is loaded whose load was started; being interrupted changes nothing about the load.

    Parameters
    ----------
    client
        Of the server.
    model_id
        The model.
    quiet
        Show nothing.

    Raises
    ------
    LLMKitError
        Why it could not be loaded; `LoadCancelled` if somebody unloaded it meanwhile.
    """
    with _shown(model_id, quiet=quiet) as show:
        return follow(client, model_id, show)


@contextmanager
def _shown(model_id: str, *, quiet: bool) -> Iterator[Callable[[Model], None]]:
    if quiet:
        yield lambda model: None
    elif sys.stderr.isatty():
        with _bar(model_id) as show:
            yield show
    else:
        yield _lines(model_id)


@contextmanager
def _bar(model_id: str) -> Iterator[Callable[[Model], None]]:
    from rich.console import Console  # slow to import
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[rest]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(model_id, total=None, rest="")

        def show(model: Model) -> None:
            rest = describe_download(model.download) if model.download else ""
            if not rest and model.eta_seconds is not None:
                rest = f"about {model.eta_seconds:.0f} s left"
            progress.update(task, description=printable(f"{model_id}: {_phase(model)}"), rest=rest)
            if model.progress is not None:
                progress.update(task, total=1.0, completed=model.progress)

        yield show


def _lines(model_id: str) -> Callable[[Model], None]:
    said = ""

    def show(model: Model) -> None:
        nonlocal said
        if (phase := _phase(model)) != said:
            said = phase
            note(f"{model_id}: {phase}")

    return show


def _phase(model: Model) -> str:
    return PHASES.get(model.phase or "", model.status) if model.status in ("loading", "loaded") else model.status
