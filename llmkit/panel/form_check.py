"""How a form is checked: a moment after the last change, one check at a time, late answers dropped."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from llmkit.client import Client
from llmkit.errors import DoesNotFit, LLMKitError, ModelIsLoaded
from llmkit.panel.lane import Lane
from llmkit.schemas import OPTIONAL_FIELDS, LoadPlan

QUIET_SECONDS = 0.4
T = TypeVar("T")


class Checker(Generic[T]):
    """Asks the server about what changes. Everything happens on the panel's thread.

    Parameters
    ----------
    begin
        Called when it is time: gives what asks the server, or None if there is nothing to check.
    then, failed
        Called with the answer, if nothing has changed meanwhile.
    """

    def __init__(
        self,
        lane: Lane,
        begin: Callable[[], Callable[[], T] | None],
        then: Callable[[T], object],
        failed: Callable[[LLMKitError], object],
    ) -> None:
        self._lane = lane
        self._begin = begin
        self._then = then
        self._failed = failed
        self._version = 0
        self._changed_at = 0.0
        self._wanted = False
        self._waiting = False
        self._running = False

    def changed(self) -> None:
        """Check what is there now, unless it changes again at once."""
        self._version += 1
        self._wanted = True
        self._changed_at = time.monotonic()
        if not self._waiting:
            self._waiting = True
            self._wait(QUIET_SECONDS)

    def drop(self) -> None:
        """Care no longer about an answer that is on its way, nor about a check that is to come."""
        self._version += 1
        self._wanted = False

    def _wait(self, seconds: float) -> None:
        timer = threading.Timer(seconds, lambda: self._lane.call(self._look))
        timer.daemon = True
        timer.start()

    def _look(self) -> None:
        left = self._changed_at + QUIET_SECONDS - time.monotonic()
        if left > 0:
            self._wait(left)
            return
        self._waiting = False
        self._ask()

    def _ask(self) -> None:
        if not self._wanted or self._running:
            return
        self._wanted = False
        work = self._begin()
        if work is None:
            return
        version = self._version
        self._running = True

        def end(tell: Callable[[], object]) -> None:
            self._running = False
            if version == self._version:
                tell()
            if not self._waiting:
                self._ask()

        self._lane.ask(
            work, lambda answer: end(lambda: self._then(answer)), lambda error: end(lambda: self._failed(error))
        )


@dataclass(frozen=True)
class Checked:
    """What the server says about the form."""

    plan: LoadPlan | None
    needs_reload: LLMKitError | None
    """Its words, if what is entered asks for a reload of the live model."""


def stand_ins() -> dict[str, Any]:
    """Give names to stand for those that are missing or wrong: all else can be checked then."""
    # No other model can have this one.
    return {"model_id": uuid.uuid4().hex, "model_name": "unnamed"}


def check(client: Client, body: dict[str, Any], config_id: str | None) -> Checked:
    """Ask the server about a configuration, or about a change of one.

    A change that needs a reload is no mistake. The server looks at the arguments only when all around them fits: what
    does not is then left out and asked about once more, so that a person sees everything that is wrong.
    """
    try:
        return Checked(client.check(**body, config_id=config_id), None)
    except ModelIsLoaded as error:
        return Checked(client.check(**body, config_id=config_id, reload=True), error)
    except DoesNotFit as error:
        found = error.details.get("fields") or []
        wrong = {str(one.get("path", "")).split(".")[0] for one in found}
        if not wrong or not wrong <= {*stand_ins(), *OPTIONAL_FIELDS}:
            raise
        others = {name: value for name, value in body.items() if name not in wrong}
        try:
            client.check(**{**stand_ins(), **others}, config_id=config_id)
        except DoesNotFit as more:
            every = [*found, *(more.details.get("fields") or [])]
            raise DoesNotFit(error.message, hint=error.hint, details={"fields": every}) from None
        except LLMKitError:
            pass  # of the stand-ins, perhaps; the first answer is the one that counts
        raise
