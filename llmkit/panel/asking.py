"""One answer on its way from the server into a transcript."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from llmkit.client import Answer, AnswerStream
from llmkit.errors import LLMKitError
from llmkit.panel.comparison import measured, note
from llmkit.panel.desk import Desk
from llmkit.panel.pace import paced
from llmkit.panel.transcript import Transcript

STOP_TRIES = 25
STOP_PAUSE_SECONDS = 0.2


@dataclass(frozen=True)
class Outcome:
    """How an answer ended: with all of it, with an error, or because somebody stopped it."""

    text: str
    answer: Answer | None = None
    error: LLMKitError | None = None
    stopped: bool = False


class Asking:
    """Asks one model at a time; for the panel's thread.

    Parameters
    ----------
    desk
        What the tabs share.
    transcript
        Shows prompt and answer, as it comes.
    """

    def __init__(self, desk: Desk, transcript: Transcript) -> None:
        self._desk = desk
        self._transcript = transcript
        self._stream: AnswerStream | None = None
        self._stopping = False
        self._looking = False
        self._ended = threading.Event()  # of the answer that is on its way

    @property
    def running(self) -> bool:
        """Whether an answer is on its way."""
        return self._stream is not None

    def begin(self, body: dict[str, Any], then: Callable[[Outcome], Any], images: Iterable[str] = ()) -> None:
        """Ask; ``then`` is called when the answer has ended, however it ends.

        Parameters
        ----------
        body
            That of ``POST /llm/inference/``.
        then
            Called on the panel's thread.
        images
            Data URLs of what is shown with the prompt.
        """
        model_id, prompt = body["model_id"], body["prompt"]
        stream = self._stream = self._desk.client.stream(model_id, prompt, **body["inference_kwargs"])
        self._stopping = False
        ended = self._ended = threading.Event()
        self._transcript.begin(model_id, prompt, images)

        def read() -> Answer | None:
            try:
                for piece in paced(stream.pieces()):
                    self._transcript.append(piece.text, piece.reasoning)
                return stream.answer
            finally:
                ended.set()

        def done(answer: Answer | None) -> None:
            said = note(measured(answer)) if answer else ""
            self._transcript.end(said, tool_calls=(answer and answer.tool_calls) or ())
            end(Outcome(answer.response if answer else stream.text, answer))

        def failed(error: LLMKitError) -> None:
            stopped = self._stopping
            self._transcript.end("Stopped." if stopped else str(error), "stopped" if stopped else "failed")
            end(Outcome(stream.text, error=None if stopped else error, stopped=stopped))

        def end(outcome: Outcome) -> None:
            self._stream, self._stopping = None, False
            then(outcome)

        self._desk.lane.ask(read, done, failed)

    def tick(self) -> None:
        """Say where a prompt stands that waits for its turn."""
        stream = self._stream
        if stream is None or self._looking or stream.text or stream.reasoning:
            return
        self._looking = True

        def look() -> int | None:
            running = self._desk.client.requests(0).running
            return next((one.position for one in running if one.request_id == stream.request_id), None)

        def say(position: int | None) -> None:
            self._looking = False
            if stream is self._stream:
                self._transcript.wait("" if position is None else f"Waiting: place {position} in the queue.")

        def failed(_: LLMKitError) -> None:
            self._looking = False

        self._desk.lane.ask(look, say, failed)

    def stop(self) -> None:
        """End the answer that is on its way; returns at once."""
        stream, ended = self._stream, self._ended
        if stream is None:
            return
        self._stopping = True

        def work() -> None:
            # A request that is only on its way cannot be cancelled yet.
            for _ in range(STOP_TRIES):
                stream.cancel()
                if ended.wait(STOP_PAUSE_SECONDS):
                    return

        self._desk.lane.ask(work)
