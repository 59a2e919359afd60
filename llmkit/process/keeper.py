"""The server's side of a guardian: starts it, hears from it, stops it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmkit.process import guardian
from llmkit.process.guardian import (
    ENGINE_ID,
    Process,
    descendants,
    end_all,
    marked,
    name_of,
    remove_run_dir,
    shared_memory,
)
from llmkit.process.leftovers import reap

GRACE_SECONDS = 3.0
"""Between SIGTERM and SIGKILL."""
PATIENCE_SECONDS = 2.0
"""What the guardian gets beyond the grace, before the keeper does its work."""
LAST_RESORT_SECONDS = 3.0


@dataclass(frozen=True)
class Ended:
    """How a kept process ended.

    ``returncode`` is that of its first process, negative for a signal as in `subprocess`; None if nobody was
    left to see it, which is so when the guardian itself was killed.
    """

    returncode: int | None
    guardian_lost: bool = False


class KeptProcess:
    """A command whose whole process tree ends with it, with this server, or with `stop`. Linux only.

    Parameters
    ----------
    command
        The program and its arguments; it gets no standard input.
    environ
        Its whole environment.
    run_dir
        A folder that is made for it, and removed when the last of its processes is gone.
    log_file
        Where its output goes; replaced at the start, kept after the end.
    grace
        Seconds between SIGTERM and SIGKILL.

    Attributes
    ----------
    engine_id
        What every process of the command has in its environment as ``LLMKIT_ENGINE_ID``.
    ended
        How the command ended, or None while it runs.
    """

    def __init__(
        self,
        command: Sequence[str],
        environ: Mapping[str, str],
        *,
        run_dir: Path,
        log_file: Path,
        grace: float = GRACE_SECONDS,
    ) -> None:
        self.engine_id = uuid.uuid4().hex
        self._command = list(command)
        # First, because `setproctitle` cannot name a process whose first variable was set anew.
        self._environ = {ENGINE_ID: self.engine_id, **environ}
        self._run_dir = run_dir
        self._log_file = log_file
        self._grace = grace
        self._guardian: subprocess.Popen[bytes] | None = None
        self._start_task: asyncio.Task[None] | None = None
        self._watch_task: asyncio.Task[None] | None = None
        self._stop_task: asyncio.Task[bool] | None = None
        self._has_ended = asyncio.Event()
        self.ended: Ended | None = None

    @property
    def guardian_pid(self) -> int | None:
        """Number of the guardian's process, after the start."""
        return self._guardian.pid if self._guardian else None

    # -- start ---------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Return when the guardian runs; the command follows in a few milliseconds.

        A caller that is cancelled must `stop` all the same.

        Raises
        ------
        OSError
            If the folder, the log or the guardian cannot be made, or this system is not Linux.
        """
        if sys.platform != "linux":
            raise OSError("process trees are kept on Linux only")
        # A task of its own: cut in the middle, a process would run that nobody knows.
        self._start_task = asyncio.create_task(self._start())
        await asyncio.shield(self._start_task)

    async def _start(self) -> None:
        self._guardian = await asyncio.to_thread(self._spawn)
        self._watch_task = asyncio.create_task(self._watch(self._guardian))

    def _spawn(self) -> subprocess.Popen[bytes]:
        self._make_run_dir()
        try:
            return self._spawn_guardian()
        except BaseException:
            remove_run_dir(str(self._run_dir))
            raise

    def _spawn_guardian(self) -> subprocess.Popen[bytes]:
        log = make_log(self._log_file)
        try:
            program = [sys.executable, "-I", "-S", guardian.__file__]
            return subprocess.Popen(  # noqa: S603  # no shell; the engine type made the command
                [*program, str(self._run_dir), str(self._grace), str(os.getpid()), *self._command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._environ,
                start_new_session=True,
            )
        finally:
            os.close(log)

    def _make_run_dir(self) -> None:
        self._run_dir.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._run_dir.exists():
            # A socket of an earlier engine would stop this one; the engine itself, too, if it still runs.
            reap(self._run_dir)
        self._run_dir.mkdir(mode=0o700)

    # -- watch ---------------------------------------------------------------------------------------------

    async def wait_exit(self) -> Ended:
        """Return when the first process of the command ended, or the guardian did."""
        await self._has_ended.wait()
        assert self.ended is not None  # noqa: S101  # they are set together
        return self.ended

    async def _watch(self, process: subprocess.Popen[bytes]) -> None:
        reader = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), process.stdout)
        async for line in reader:
            self._set_ended(Ended(json.loads(line)["returncode"]))
        await asyncio.to_thread(process.wait)  # its output has ended, so it has all but ended itself
        if self.ended is None:
            lost = self._stop_task is None
            self._set_ended(Ended(None, guardian_lost=lost))
            if lost:
                await self._end_without_guardian(self._grace)

    def _set_ended(self, ended: Ended) -> None:
        self.ended = ended
        self._has_ended.set()

    async def _end_without_guardian(self, grace: float, shared: Iterable[str] = ()) -> bool:
        def end() -> bool:
            gone = end_all(lambda: marked(self.engine_id), grace, bound=grace + LAST_RESORT_SECONDS, shared=shared)
            remove_run_dir(str(self._run_dir))
            return gone

        return await asyncio.to_thread(end)

    # -- stop ----------------------------------------------------------------------------------------------

    async def stop(self) -> bool:
        """End every process and remove the folder. Idempotent; goes on if the caller is cancelled.

        Takes at most the grace and 5 s more.

        Returns
        -------
        bool
            Whether it was seen that no process of the command is left.
        """
        if self._stop_task is None:
            self._stop_task = asyncio.create_task(self._stop())
        return await asyncio.shield(self._stop_task)

    async def _stop(self) -> bool:
        if self._start_task is None:
            return True
        await asyncio.wait([self._start_task])
        if self._start_task.exception() or self._guardian is None or self._watch_task is None:
            return True  # it was told to who started it
        # The guardian removes it too, if it gets the time before it is given up.
        shared = await asyncio.to_thread(lambda: shared_memory(marked(self.engine_id)))
        assert self._guardian.stdin is not None  # noqa: S101  # a pipe was asked for
        self._guardian.stdin.close()
        done, _ = await asyncio.wait([self._watch_task], timeout=self._grace + PATIENCE_SECONDS)
        if not done:
            self._guardian.kill()
            await asyncio.wait([self._watch_task])
        return await self._end_without_guardian(grace=0, shared=shared)

    # -- priority ------------------------------------------------------------------------------------------

    async def be_nice(self, prefix: str, niceness: int) -> None:
        """Let the processes of the tree whose name begins in a certain way stand back for all others.

        ``niceness`` is that of `nice(2)`. On Linux each thread has its own, and hands it to those that it makes. Where
        the kernel shares out its time among sessions first (`sched(7)`, autogroup), a thread stands back only for
        its own session, so the session gets the same niceness.
        """
        for process in await self.processes(prefix):
            await asyncio.to_thread(_be_nice, process, niceness)

    # -- measure -------------------------------------------------------------------------------------------

    async def processes(self, prefix: str = "") -> dict[Process, str]:
        """Give every process of the tree whose name begins in a certain way, with its name."""
        return await asyncio.to_thread(_named, self.guardian_pid, prefix) if self.guardian_pid else {}

    async def pss_bytes(self, *, anonymous: bool = False) -> int | None:
        """Measure the memory of the whole tree, shared pages counted once; None if there is none.

        What is not ``anonymous`` are mapped files, of which the kernel can have the memory at any time.
        """
        field = "Pss_Anon:" if anonymous else "Pss:"
        return await asyncio.to_thread(_pss_bytes, self.guardian_pid, field) if self.guardian_pid else None

    async def cpu_seconds(self) -> float:
        """Add up the processor time that the whole tree has used."""
        return await asyncio.to_thread(_cpu_seconds, self.guardian_pid) if self.guardian_pid else 0.0


def make_log(path: Path) -> int:
    """Make the file of a log, in the place of an earlier one, and give it open for appending. Blocks."""
    path.unlink(missing_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)


def _be_nice(process: Process, niceness: int) -> None:
    with contextlib.suppress(OSError):  # it ended meanwhile
        for thread in os.listdir(f"/proc/{process.pid}/task"):  # noqa: PTH208  # names are all that is wanted
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, int(thread), niceness)
        Path(f"/proc/{process.pid}/autogroup").write_text(str(niceness))


def _named(root: int, prefix: str) -> dict[Process, str]:
    names = {found.process: name_of(found.process.pid) for found in descendants(root)}
    return {process: name for process, name in names.items() if name.startswith(prefix)}


def _pss_bytes(root: int, field: str) -> int | None:
    measured = [_pss_of(found.process.pid, field) for found in descendants(root)]
    known = [size for size in measured if size is not None]
    return sum(known) if known else None


def _pss_of(pid: int, field: str) -> int | None:
    """Read the proportional set size: shared pages are divided among the processes that share them."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)


def _cpu_seconds(root: int) -> float:
    ticks = sum(found.cpu_ticks for found in descendants(root))
    return ticks / os.sysconf("SC_CLK_TCK")
