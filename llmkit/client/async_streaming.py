"""A streamed answer for ``async for``: the same stream, read in threads."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from types import TracebackType
from typing import Any, Self, TypeVar

from llmkit.client.results import Answer
from llmkit.client.streaming import AnswerStream, Piece
from llmkit.client.threads import Future, Threads, cancel_until_over

T = TypeVar("T")


class AsyncAnswerStream(AsyncIterator[str]):
    """Pieces of an answer as they come, for ``async for``; the attributes are those of `AnswerStream`.

    Cancelling the task that reads, closing it or leaving its ``async with`` block ends the generation on the server.

    Examples
    --------
    >>> async for piece in client.stream("demo", "What is the capital of France?"):
    ...     print(piece, end="")
    The capital of France is Paris.
    """

    def __init__(self, stream: AnswerStream, threads: Threads) -> None:
        self._stream = stream
        self._threads = threads

    @property
    def request_id(self) -> str:
        """Names the request on the server.

        Examples
        --------
        >>> stream = client.stream("demo", "What is the capital of France?", request_id="mine")
        >>> stream.request_id
        'mine'
        """
        return self._stream.request_id

    @property
    def text(self) -> str:
        """The text that has come so far.

        Examples
        --------
        >>> stream = client.stream("demo", "What is the capital of France?")
        >>> async for _ in stream:
        ...     pass
        >>> stream.text
        'The capital of France is Paris.'
        """
        return self._stream.text

    @property
    def reasoning(self) -> str:
        """The reasoning that has come so far.

        Examples
        --------
        >>> stream = client.stream("demo", "What is the capital of France?")
        >>> async for _ in stream:
        ...     pass
        >>> stream.reasoning
        ''
        """
        return self._stream.reasoning

    @property
    def answer(self) -> Answer | None:
        """The whole answer, once the last piece has been taken.

        Examples
        --------
        >>> stream = client.stream("demo", "What is the capital of France?")
        >>> async for _ in stream:
        ...     pass
        >>> stream.answer.finish_reason
        'stop'
        """
        return self._stream.answer

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        piece = await self._take(lambda: next(self._stream, None))
        if piece is None:
            raise StopAsyncIteration
        return piece

    async def pieces(self) -> AsyncGenerator[Piece]:
        """Give what comes, the model's reasoning too.

        Examples
        --------
        >>> stream = client.stream("demo", "What is the capital of France?")
        >>> [piece.reasoning async for piece in stream.pieces() if piece.reasoning]
        []
        """
        pieces = self._stream.pieces()
        while (piece := await self._take(lambda: next(pieces, None))) is not None:
            yield piece

    async def _take(self, call: Callable[[], T]) -> T:
        return await self._threads.run(call, self._end)

    def _end(self, reading: Future[Any]) -> None:
        cancel_until_over(reading, self._stream.cancel)
        if reading.done():
            self._stream.close()

    async def cancel(self) -> None:
        """End the generation on the server; who reads gets an error.

        Examples
        --------
        >>> stream = client.stream("demo", "What is the capital of France?")
        >>> await anext(stream)
        'The'
        >>> await stream.cancel()
        >>> await stream.close()
        """
        await self._threads.finish(self._stream.cancel)

    async def close(self) -> None:
        """End the generation on the server, if it still runs.

        Examples
        --------
        >>> stream = client.stream("demo", "What is the capital of France?")
        >>> await anext(stream)
        'The'
        >>> await stream.close()
        """
        await self._threads.finish(self._stream.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
