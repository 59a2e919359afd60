"""Answers of a batch on their way to the disk: those that come at about the same time are kept together.

Before they are written the configuration is looked at once more. So every row of the file is of the configuration that
it is kept for, in whatever way the batch ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from llmkit.client.batch_checkpoint import Checkpoint, Row

CLOSING_SECONDS: Final = 5.0
"""So long may it take to write what has come before the end."""


class Keeper:
    """Writes rows in the loop of a batch.

    Parameters
    ----------
    check
        Returns when the rows that have come are known to be of the right configuration, and raises if they are not.
    kept
        Is told what is on the disk.
    """

    def __init__(
        self, checkpoint: Checkpoint, check: Callable[[], Awaitable[None]], kept: Callable[[Sequence[Row]], None]
    ) -> None:
        self._checkpoint = checkpoint
        self._check = check
        self._kept = kept
        self._pending: list[tuple[Row, asyncio.Future[None]]] = []
        self._writer: asyncio.Task[None] | None = None

    async def keep(self, row: Row) -> None:
        """Return when the row is on the disk.

        Raises
        ------
        LLMKitError
            If it was not written.
        """
        durable = asyncio.get_running_loop().create_future()
        self._pending.append((row, durable))
        if self._writer is None:
            self._writer = asyncio.create_task(self._write())
        await durable

    async def close(self) -> None:
        """Let what has come be written; what cannot be within some seconds is given up."""
        writer = self._writer  # it forgets itself when it ends
        if writer is not None:
            await asyncio.wait({writer}, timeout=CLOSING_SECONDS)
            writer.cancel()
            await asyncio.wait({writer})

    async def _write(self) -> None:
        failed: BaseException | None = None
        while self._pending:
            group, self._pending = self._pending, []
            rows = [row for row, _ in group]
            try:
                if failed is None:
                    await self._check()
                    await asyncio.to_thread(self._checkpoint.append, rows)
                    self._kept(rows)
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001  # the workers raise it
                failed = error
            for _, durable in group:
                if durable.done():  # its worker was stopped meanwhile
                    continue
                if failed is None:
                    durable.set_result(None)
                elif isinstance(failed, asyncio.CancelledError):
                    durable.cancel()
                else:
                    durable.set_exception(failed)
        self._writer = None
