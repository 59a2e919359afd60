"""Where an answer comes from: what a client notes of each prompt, at next to no cost."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import Any

import httpx

from llmkit.client.connection import Connection, path_to
from llmkit.client.results import KEY, Answer, Asked, Configuration, read_configuration
from llmkit.client.stopping import Stopped
from llmkit.errors import LLMKitError, ParameterForbidden

ANSWER_SECONDS = 600.0
"""So long may a model take until it answers, or between two pieces of a streamed answer."""
KEPT_SECONDS = 10.0
"""So long the configurations count as known; another client may change them meanwhile."""
_PATIENCE_SECONDS = 3.0
_NO_PARAMETERS = ("stream", "request_id", "idle_ttl", "messages")


class KnownConfigurations:
    """The configurations by their ``model_id``, asked for once in some seconds; threads may share it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._known: Mapping[str, Configuration] = {}
        self._until = 0.0

    def get(self) -> Mapping[str, Configuration]:
        """Give what is known; nothing if the server does not tell it to this user."""
        with self._lock:
            if time.monotonic() >= self._until:
                self._until = time.monotonic() + KEPT_SECONDS
                self._known = self._ask()
            return self._known

    def forget(self) -> None:
        """Ask again the next time: a configuration was changed here."""
        self._until = 0.0

    def _ask(self) -> Mapping[str, Configuration]:
        try:
            told = self._connection.call("GET", "llm/configurations/", seconds=_PATIENCE_SECONDS)
            return {one["model_id"]: read_configuration(one) for one in told}
        except (LLMKitError, ValueError, LookupError, TypeError, AttributeError):
            return {}  # a prompt is sent all the same; its answer knows less


class Prompt:
    """One prompt, sent at once or as a stream.

    Raises
    ------
    ParameterForbidden
        If a key goes with it: it would be kept with the answer, and shown.
    """

    def __init__(self, connection: Connection, known: KnownConfigurations, body: dict[str, Any]) -> None:
        if KEY in body["inference_kwargs"]:
            raise ParameterForbidden(
                f"`{KEY}` is not allowed in a request.",
                hint="The configuration has the key: client.set_key(model_id).",
                param=KEY,
            )
        self._connection = connection
        self._configurations = known
        self._body = body
        self._known: Mapping[str, Configuration] = {}
        self._asked: Asked | None = None

    def ask(self) -> Answer:
        """Send it and give the answer."""
        self._note()
        try:
            told = self._connection.call("POST", "llm/inference/", json=self._body, seconds=ANSWER_SECONDS)
        except KeyboardInterrupt:
            # Its connection is closed by now, and with that the server ends the generation.
            raise Stopped("Stopped. The server ends the answer, too.") from None
        return self.read_answer(told)

    def open_stream(self) -> AbstractContextManager[httpx.Response]:
        """Send it, for an answer that is streamed."""
        self._note()
        return self._connection.stream("POST", "llm/inference/", json=self._body, seconds=ANSWER_SECONDS)

    def cancel(self, request_id: str) -> None:
        """End it on the server."""
        self._connection.call("DELETE", path_to("llm/inference", request_id))

    def read_answer(self, told: dict[str, Any]) -> Answer:
        """Give the answer that the server told, with what is known of the prompt."""
        answer = Answer.model_validate(told)
        return answer if self._asked is None else answer.signed(self._asked, self._known)

    def _note(self) -> None:
        # Before it is sent: the model answers as it is configured then.
        self._known = self._configurations.get()
        sent = self._body["inference_kwargs"]
        parameters = {name: value for name, value in sent.items() if name not in _NO_PARAMETERS}
        self._asked = Asked(parameters, datetime.now(UTC))
