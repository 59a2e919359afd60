"""How the server starts an engine: with a standby, if there is one that fits, and plainly otherwise.

A standby is no state of a model. It is a process in a folder of its own, under a guardian like every engine, that has
vLLM imported and waits (`standby`); the next load takes it, and it becomes that load's engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from pydantic_core import to_json

from llmkit.engines.log import last_lines
from llmkit.engines.vllm import warm
from llmkit.process.guardian import ENGINE_ID
from llmkit.process.keeper import KeptProcess, make_log

STANDBY_COMMAND: Final = (sys.executable, "-m", "llmkit.engines.vllm.standby")
SOCKET_NAME: Final = "standby.sock"
LOG_NAME: Final = "standby.log"
TAKEN: Final = b'{"taken": true}\n'

IMPORT_SECONDS: Final = 120.0
STILL_SECONDS: Final = 1.5
"""One that is not ready yet, and takes no processor time for so long, is stuck."""
ANSWER_SECONDS: Final = 1.5
_POLL_SECONDS: Final = 0.05

Environ = Callable[[Path], dict[str, str]]
"""Gives the environment of a process whose folder this is."""


class StandbyFailed(Exception):
    """A standby is of no use; the words say why."""


class Standby:
    """One process that waits.

    Parameters
    ----------
    run_dir
        Its folder, which becomes the engine's.
    environ
        Its environment.
    architectures
        The classes of the model that it will probably be asked for, as in ``config.json``.
    command
        What is run.

    Attributes
    ----------
    kept
        The process.
    made_for
        What has to be the same when it is used.
    """

    def __init__(
        self, run_dir: Path, environ: Mapping[str, str], architectures: Sequence[str], command: Sequence[str]
    ) -> None:
        self.run_dir = run_dir
        self.made_for = (warm.build(), dict(environ))
        self.kept = KeptProcess(
            [*command, str(run_dir / SOCKET_NAME), *architectures],
            environ,
            run_dir=run_dir,
            log_file=run_dir / LOG_NAME,
        )
        self._began = asyncio.get_running_loop().time()

    async def become(self, arguments: Sequence[str], environ: Mapping[str, str], log_file: Path) -> None:
        """Make an engine of it; once it has imported all, if it is not ready yet.

        Parameters
        ----------
        arguments
            Of ``vllm``, ``serve`` first.
        environ
            The environment of the engine.
        log_file
            The engine's log; replaced.

        Raises
        ------
        StandbyFailed
            If it does not do that. It has to be stopped then.
        """
        marked = {ENGINE_ID: self.kept.engine_id, **environ}
        order = {"arguments": list(arguments), "environ": marked, "log_file": str(log_file)}
        try:
            os.close(await asyncio.to_thread(make_log, log_file))
            reader, writer = await self._connect()
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    writer.write(to_json(order) + b"\n")
                    await writer.drain()
                    answer = await reader.readline()
            finally:
                writer.close()
        except TimeoutError:
            raise StandbyFailed("it does not answer") from None
        except OSError as error:
            raise StandbyFailed(f"it cannot be talked to: {error}") from error
        if answer != TAKEN:
            raise await self._failure()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        clock = asyncio.get_running_loop().time
        used, moved_at = -1.0, clock()
        while True:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                return await asyncio.open_unix_connection(str(self.run_dir / SOCKET_NAME))
            if self.kept.ended:
                raise await self._failure()
            if (now := await self.kept.cpu_seconds()) > used:
                used, moved_at = now, clock()
            if clock() > moved_at + STILL_SECONDS or clock() > self._began + IMPORT_SECONDS:
                raise StandbyFailed("it does not get ready")
            await asyncio.sleep(_POLL_SECONDS)

    async def _failure(self) -> StandbyFailed:
        lines = await asyncio.to_thread(last_lines, self.run_dir / LOG_NAME, 1)
        return StandbyFailed(f"it ended{f': {lines[-1]}' if lines else ''}")


class Launcher:
    """Keeps at most one standby.

    Parameters
    ----------
    environ
        Gives the environment of a standby.
    command
        The standby's program.
    """

    def __init__(self, environ: Environ, command: Sequence[str] = STANDBY_COMMAND) -> None:
        self._environ = environ
        self._command = tuple(command)
        self._standby: Standby | None = None
        self._leaving: set[asyncio.Task[Any]] = set()

    @property
    def standby(self) -> KeptProcess | None:
        """The process that waits, or None."""
        return self._standby.kept if self._standby is not None else None

    async def prepare(self, run_dir: Path, architectures: Sequence[str], logger: logging.Logger) -> bool:
        """Have a standby that fits, made anew if need be; say whether there is one."""
        if (there := self._standby) is not None:
            if self._fits(there):
                return True
            self._standby = None
            self.throw_away(there)
            why = "does not fit any more" if there.kept.ended is None else "ended by itself"
            logger.warning("The standby of vLLM %s.", why)
            return False
        if warm.build() is None:
            return False
        standby = self._standby = Standby(run_dir, self._environ(run_dir), architectures, self._command)
        try:
            await standby.kept.start()
        except OSError as error:
            logger.warning("The standby of vLLM could not be started: %s", error)
            self._standby = None
            self.throw_away(standby)
            return False
        return True

    def take(self) -> Standby | None:
        """Give the standby out of hand, if there is one that fits; who takes it has to stop it."""
        standby, self._standby = self._standby, None
        if standby is None or self._fits(standby):
            return standby
        self.throw_away(standby)
        return None

    def _fits(self, standby: Standby) -> bool:
        is_same = standby.made_for == (warm.build(), self._environ(standby.run_dir))
        return is_same and standby.kept.ended is None

    def throw_away(self, standby: Standby) -> None:
        """End a standby that is of no use, without waiting for that."""
        task = asyncio.create_task(standby.kept.stop())
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def put_away(self) -> None:
        """End the standby, if there is one, and return when all that were thrown away are gone. Bounded at 10 s."""
        standby, self._standby = self._standby, None
        if standby is not None:
            self.throw_away(standby)
        if self._leaving:
            await asyncio.wait(self._leaving)
