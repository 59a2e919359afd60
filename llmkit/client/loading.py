"""Follow a load to its end, and show how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

from llmkit import schemas
from llmkit.client.results import describe_download
from llmkit.errors import ConnectError, LLMKitError, LoadCancelled, LoadFailed, TimedOut, from_wire

if TYPE_CHECKING:
    from llmkit.client.models import Models
    from llmkit.client.results import Model

LOG_LINES = 20
_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 0.4
_PATIENCE_SECONDS = 15.0
"""A server that does not answer for so long is given up."""

PHASES = {
    "queued": "Waiting",
    "starting": "Starting the engine",
    "downloading": "Downloading",
    "weights": "Loading the weights",
    "warming": "Warming up",
    "ready": "Ready",
}


def follow(client: Models, model_id: str, show: Callable[[Model], None]) -> Model:
    """Return when a model is loaded whose load was started; ``show`` gets it again and again meanwhile.

    Raises
    ------
    LLMKitError
        Why it could not be loaded; `LoadCancelled` if somebody unloaded it meanwhile, or the server was started anew.
    """
    pause, silent_since = _FIRST_PAUSE, 0.0
    epoch = _epoch(client)
    while True:
        try:
            model = client.model(model_id)
            silent_since = 0.0
        except (ConnectError, TimedOut):
            # The load goes on without us; a short break of the line is no reason to give up.
            silent_since = silent_since or time.monotonic()
            if time.monotonic() - silent_since > _PATIENCE_SECONDS:
                raise
        else:
            show(model)
            if model.status == "loaded":
                return model
            if model.status == "failed":
                raise load_error(model)
            if model.status == "unloaded":
                if epoch is not None and epoch != _epoch(client):
                    raise LoadCancelled(
                        f"The load of `{model_id}` ended with the server, which was started anew.",
                        hint="Load it again.",
                    )
                raise LoadCancelled(f"The load of `{model_id}` was cancelled.", hint="Somebody unloaded it.")
        time.sleep(pause)
        pause = min(pause * 1.5, _LONGEST_PAUSE)


def _epoch(client: Models) -> str | None:
    """Give what changes when the server is started anew; None if it cannot be had now."""
    try:
        return client.health().epoch
    except LLMKitError:
        return None


def load_error(model: schemas.Model) -> LLMKitError:
    """Give the error of a failed model, with the end of the engine's log as a note."""
    if model.error is None:
        return LoadFailed(f"`{model.model_id}` failed: {model.reason or 'no reason given'}.")
    told = model.error
    details = {"log_tail": told.log_tail, "fix": told.fix}
    error = from_wire(
        LoadFailed.status,
        {"error": {"message": told.message, "code": told.code, "hint": told.hint, "details": details}},
    )
    if told.log_tail:
        error.add_note("\n".join(("The end of the engine's log:", *told.log_tail[-LOG_LINES:])))
    return error


def _rest(model: schemas.Model) -> str:
    """Say how much is downloaded, and how long the load still takes, as far as it is known."""
    parts = []
    if model.download is not None:
        parts.append(describe_download(model.download))
    if model.eta_seconds is not None:
        parts.append(f"about {model.eta_seconds:.0f} s left")
    return ", ".join(parts)


class Bar:
    """A progress bar, or nothing."""

    def __init__(self, model_id: str, *, visible: bool) -> None:
        self._model_id = model_id
        self._bar: Any = None
        self._visible = visible

    def __enter__(self) -> Self:
        if self._visible:
            from tqdm.auto import tqdm  # slow to import

            self._bar = tqdm(
                total=1.0,
                desc=self._model_id,
                bar_format="{desc} |{bar}| {elapsed}{postfix}",
                leave=True,
                dynamic_ncols=True,
            )
        return self

    def show(self, model: schemas.Model) -> None:
        """Show how far the load is."""
        if self._bar is None:
            return
        phase = PHASES.get(model.phase or "", "") if model.status in ("loading", "loaded") else model.status
        self._bar.set_description_str(f"{self._model_id}: {phase}", refresh=False)
        self._bar.set_postfix_str(_rest(model), refresh=False)
        if model.progress is not None:
            self._bar.n = max(self._bar.n, model.progress)
        self._bar.refresh()

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
