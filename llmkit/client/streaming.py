"""A streamed answer: server-sent events in, pieces of text out."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import httpx

from llmkit.client.results import Answer
from llmkit.client.stopping import Stopped
from llmkit.errors import EngineGone, RequestNotFound, from_wire


class Opener(Protocol):
    """The prompt that a stream is the answer to."""

    def open_stream(self) -> AbstractContextManager[httpx.Response]:
        """Send the prompt."""
        ...

    def cancel(self, request_id: str) -> None:
        """End the request on the server."""
        ...

    def read_answer(self, told: dict[str, Any]) -> Answer:
        """Give the answer that the server told."""
        ...


class Piece(NamedTuple):
    """What came at once: text of the answer, of the model's reasoning, or of both.

    Examples
    --------
    >>> next(client.stream("demo", "What is the capital of France?").pieces())
    Piece(text='The', reasoning='')
    """

    text: str
    reasoning: str


class AnswerStream(Iterator[str]):
    """Pieces of an answer as they come: its text alone, or with `pieces` also what the model thinks before.

    Closing it, leaving its ``with`` block, or interrupting its loop ends the generation on the server.

    Attributes
    ----------
    request_id
        Names the request on the server.
    text, reasoning
        What has come so far.
    answer
        The whole answer with its usage and timings, once the last piece has been taken; until then None.

    Examples
    --------
    >>> with client.stream("demo", "What is the capital of France?") as stream:
    ...     for piece in stream:
    ...         print(piece, end="")
    The capital of France is Paris.
    >>> stream.answer.finish_reason
    'stop'
    """

    def __init__(self, opener: Opener, request_id: str) -> None:
        self.request_id = request_id
        self.text = ""
        self.reasoning = ""
        self.answer: Answer | None = None
        self._opener = opener
        # It knows nothing of this object: a stream that nobody holds any more is closed at once.
        self._frames = _frames(opener)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        while (piece := self._take()) is not None:
            if piece.text:
                return piece.text
        raise StopIteration

    def pieces(self) -> Iterator[Piece]:
        """Give what comes, the model's reasoning too; the loops over it and over the stream share what there is.

        Examples
        --------
        >>> stream = client.stream("demo", "What is the capital of France?")
        >>> thought = "".join(piece.reasoning for piece in stream.pieces())
        >>> (thought, stream.text)
        ('', 'The capital of France is Paris.')
        """
        while (piece := self._take()) is not None:
            yield piece

    def _take(self) -> Piece | None:
        try:
            for frame in self._frames:
                if "response" in frame:
                    self.answer = self._opener.read_answer(frame)
                    continue
                piece = Piece(str(frame.get("delta") or ""), str(frame.get("reasoning") or ""))
                if any(piece):
                    self.text += piece.text
                    self.reasoning += piece.reasoning
                    return piece
        except KeyboardInterrupt:
            self.close()
            raise Stopped("Stopped. The server ends the answer, too.") from None
        except BaseException:
            self.close()
            raise
        return None

    def close(self) -> None:
        """End the generation on the server, if it still runs; for the thread that reads.

        Examples
        --------
        >>> stream = client.stream("demo", "What is the capital of France?")
        >>> next(stream)
        'The'
        >>> stream.close()
        """
        self._frames.close()

    def cancel(self) -> None:
        """End the generation on the server from any thread; the reader then gets an error.

        Examples
        --------
        >>> stream = client.stream("demo", "What is the capital of France?")
        >>> next(stream)
        'The'
        >>> stream.cancel()
        >>> stream.close()
        """
        with contextlib.suppress(RequestNotFound):  # it has ended meanwhile
            self._opener.cancel(self.request_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_events(response: httpx.Response) -> Iterator[Any]:
    """Give the JSON value of each server-sent event; None for ``[DONE]``."""
    for line in response.iter_lines():
        if line.startswith("data:"):  # not heartbeats, nor the blank lines between events
            data = line.removeprefix("data:").strip()
            yield None if data == "[DONE]" else json.loads(data)


def _frames(opener: Opener) -> Generator[dict[str, Any]]:
    complete = False
    with opener.open_stream() as response:
        for frame in read_events(response):
            if frame is None:
                complete = True  # the rest is read, so that the connection can be used again
                continue
            if "error" in frame:
                raise from_wire(0, frame)
            yield frame
    if not complete:
        raise EngineGone("The answer ended before it was complete.", hint="The server may have stopped; ask again.")
