"""How the server starts an engine: with a standby, if there is one that fits, and plainly otherwise.

A standby is no state of a model. It is a process in a folder of its own, under a guardian like every engine, that has
vLLM imported and waits (`standby`); the next load takes it, and it becomes that load's engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from llmkit.engines.log import last_lines
from llmkit.engines.vllm import tested
from llmkit.process.guardian import ENGINE_ID
from llmkit.process.keeper import KeptProcess, make_log

STANDBY_COMMAND: Final = (sys.executable, "-m", "llmkit.engines.vllm.standby")
SOCKET_NAME: Final = "standby.sock"
LOG_NAME: Final = "standby.log"
TAKEN: Final = b'{"taken": true}\n'

IMPORT_SECONDS: Final = 45.0
"""After its start. Imports take six seconds, and three times as long off a cold disk."""
STILL_SECONDS: Final = 1.5
"""One that is not ready yet, and takes no processor time for so long, is stuck."""
ANSWER_SECONDS: Final = 1.5
MOST_FAILURES: Final = 3
"""Of standbys that a load has tried to use; then there are no more."""
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
        self.made_for = (tested.build(), dict(environ))
        self.kept = KeptProcess(
            [*command, str(run_dir / SOCKET_NAME), *architectures],
            environ,
            run_dir=run_dir,
            log_file=run_dir / LOG_NAME,
        )
        self._log_fd: int | None = None
        self._began = asyncio.get_running_loop().time()

    async def start(self) -> None:
        """Start the process, as `KeptProcess.start` does."""
        await self.kept.start()
        # The guardian removes the log with the folder before anybody could read in it why the process ended.
        with contextlib.suppress(FileNotFoundError):
            self._log_fd = os.open(self.run_dir / LOG_NAME, os.O_RDONLY)
            weakref.finalize(self, os.close, self._log_fd)

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
        OSError
            If the log cannot be made.
        """
        marked = {ENGINE_ID: self.kept.engine_id, **environ}
        # In ASCII: variables may hold what is no text.
        order = json.dumps({"arguments": list(arguments), "environ": marked, "log_file": str(log_file)})
        await asyncio.to_thread(_make_empty_log, log_file)
        try:
            reader, writer = await self._connect()
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    writer.write(order.encode() + b"\n")
                    await writer.drain()
                    answer = await reader.readline()
            finally:
                writer.close()
        except TimeoutError:
            raise StandbyFailed("it does not answer") from None
        except OSError as error:
            raise StandbyFailed(f"it cannot be talked to: {error}") from error
        except ValueError:  # a line without end
            raise StandbyFailed("it does not answer as it should") from None
        if not answer:
            raise await self._failure()
        if answer != TAKEN:
            raise StandbyFailed("it does not answer as it should")

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
        path = Path(f"/proc/self/fd/{self._log_fd}")
        lines = await asyncio.to_thread(last_lines, path, 1) if self._log_fd is not None else []
        return StandbyFailed(f"it ended{f': {lines[-1]}' if lines else ''}")


def _make_empty_log(path: Path) -> None:
    # Closed in the thread that opened it: nobody else gets to know of it if the load is cancelled meanwhile.
    os.close(make_log(path))


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
        self._failures = 0
        self._told = False

    @property
    def standby(self) -> KeptProcess | None:
        """The process that waits, or None."""
        return self._standby.kept if self._standby is not None else None

    async def prepare(self, run_dir: Path, architectures: Callable[[], list[str]], logger: logging.Logger) -> bool:
        """Have a standby; False if there can be none, or there was one that is of no use any more.

        ``architectures`` gives those of the model that will probably be asked for; it may read files.
        """
        if (there := self._standby) is not None:
            if await asyncio.to_thread(self._fits, there) or self._standby is not there:
                return True  # or taken meanwhile
            self._standby = None
            self._throw_away_unfit(there, logger)
            return False
        if self._failures >= MOST_FAILURES:
            return False
        if await asyncio.to_thread(tested.build) is None:
            if not self._told:
                logger.info("There is no standby: it was not tried with the vLLM that is installed.")
            self._told = True
            return False
        classes = await asyncio.to_thread(architectures)
        standby = self._standby = Standby(run_dir, self._environ(run_dir), classes, self._command)
        try:
            await standby.start()
        except BaseException as error:
            if self._standby is standby:
                self._standby = None
                self.throw_away(standby)
            if not isinstance(error, OSError):
                raise
            logger.warning("The standby of vLLM could not be started: %s", error)
            return False
        return True

    def take(self, logger: logging.Logger) -> Standby | None:
        """Give the standby out of hand, if there is one that fits; who takes it has to stop it."""
        standby, self._standby = self._standby, None
        if standby is None or self._fits(standby):
            return standby
        self._throw_away_unfit(standby, logger)
        return None

    def _fits(self, standby: Standby) -> bool:
        is_same = standby.made_for == (tested.build(), self._environ(standby.run_dir))
        return is_same and standby.kept.ended is None

    def _throw_away_unfit(self, standby: Standby, logger: logging.Logger) -> None:
        why = "does not fit any more" if standby.kept.ended is None else "ended by itself"
        logger.warning("The standby of vLLM %s.", why)
        self.throw_away(standby)

    def has_failed(self, standby: Standby) -> None:
        """Take back a standby that was of no use to a load."""
        self._failures += 1
        self.throw_away(standby)

    def throw_away(self, standby: Standby) -> None:
        """End a standby without waiting for that."""
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
