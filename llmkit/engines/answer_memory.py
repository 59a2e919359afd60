"""The memory that answers in one piece share while they are read.

One answer may be large; many at once may not fill the server. Small ones never wait. Larger ones grow while all of
them together have room; beyond it only the one that became large first grows on, so that there is always one that can
be read to its end. The others are not read meanwhile, and what they are sent waits at the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Final

import aiohttp

from llmkit.errors import TimedOut, UpstreamFailed

FREE_BYTES: Final = 256 << 10
SHARED_BYTES: Final = 4 << 20
LONGEST_WAIT_SECONDS: Final = 60.0


class AnswerMemory:
    """Counts what the large answers of one event loop hold."""

    def __init__(self) -> None:
        self._sizes: dict[object, int] = {}  # the one that became large first is the first
        self._waiting: set[asyncio.Future[None]] = set()

    async def grow(self, answer: object, size: int) -> None:
        """Let an answer become so large, in bytes, as soon as there is room.

        Raises
        ------
        TimedOut
            If there is none for a minute.
        """
        if size <= FREE_BYTES or self._has_room(answer, size):
            self._note(answer, size)
            return
        try:
            async with asyncio.timeout(LONGEST_WAIT_SECONDS):
                while not self._has_room(answer, size):
                    freed = asyncio.get_running_loop().create_future()
                    self._waiting.add(freed)
                    try:
                        await freed
                    finally:
                        self._waiting.discard(freed)
        except TimeoutError:
            raise TimedOut(
                "The answer is large, and other large ones take the memory there is for them.",
                hint="Ask for less at once, or send the request again later.",
            ) from None
        self._note(answer, size)

    def release(self, answer: object) -> None:
        """Give back what an answer held."""
        if self._sizes.pop(answer, 0):
            for freed in self._waiting:
                if not freed.done():
                    freed.set_result(None)

    def _note(self, answer: object, size: int) -> None:
        if size > FREE_BYTES:
            self._sizes[answer] = size

    def _has_room(self, answer: object, size: int) -> bool:
        if next(iter(self._sizes), answer) is answer:
            return True
        return sum(self._sizes.values()) - self._sizes.get(answer, 0) + size <= SHARED_BYTES


_MEMORY: Final = AnswerMemory()


@contextlib.asynccontextmanager
async def whole_answer(response: aiohttp.ClientResponse, limit: int) -> AsyncGenerator[bytearray, None]:
    """Read an answer; its memory counts as taken until the end of the block.

    Parameters
    ----------
    response
        Whose body is read.
    limit
        Bytes that it may have.

    Yields
    ------
    bytearray
        The body.

    Raises
    ------
    UpstreamFailed
        If it is larger.
    TimedOut
        If there is no memory for it.
    """
    data = bytearray()  # in one piece: very many small ones would stay in the allocator
    try:
        if (response.content_length or 0) > limit:
            raise _too_large(limit)
        async for part in response.content.iter_any():
            if len(data) + len(part) > limit:
                raise _too_large(limit)
            await _MEMORY.grow(response, len(data) + len(part))
            data += part
        yield data
    finally:
        data.clear()  # an error's traceback keeps the variable until garbage is collected
        _MEMORY.release(response)


def _too_large(limit: int) -> UpstreamFailed:
    return UpstreamFailed(f"The answer is larger than {limit >> 20} MiB.")
