"""The guardian: a small program that keeps the process tree of one engine, and outlives nothing.

The server starts it by its path, with ``python -I -S``, so that it is there in milliseconds; it imports the
standard library alone. Its environment is the engine's. It holds a pipe from the server, is the subreaper of
everything below it, and ends the whole tree when

* the pipe reaches its end, because the server asked for it or ended, in whatever way;
* the server is no longer its parent, for the case that somebody else held the pipe open;
* the engine's first process ended by itself: then ``{"returncode": ...}`` goes to the standard output first.

Then it removes the engine's folder, with sockets, temporary files and the record, and ends.

.. code-block:: text

    python -I -S guardian.py RUN_DIR GRACE_SECONDS SERVER_PID COMMAND...

What it knows about processes, other modules of this package use too; importing it works on every system.
"""

# pathlib would add half to the time of the start.
# ruff: noqa: PTH105, PTH106, PTH108, PTH110, PTH116, PTH118, PTH123, PTH208

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, NoReturn

ENGINE_ID = "LLMKIT_ENGINE_ID"
"""Variable in the environment of every process of an engine; its value is the engine's own."""
RECORD = "engine.json"
"""Name of the record of an engine, in the engine's folder."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PARENT_CHECK_SECONDS = 1.0
_LONGEST_PAUSE = 0.05
_TRACKER_SECONDS = 1.0
_SHARED = b"/dev/shm/"
_SETTLED_NS = 2_000_000_000


class Process(NamedTuple):
    """A process that cannot be mistaken for a later one with the same number."""

    pid: int
    start: int
    """Clock ticks after the boot."""


class Stat(NamedTuple):
    """What ``/proc/PID/stat`` says."""

    process: Process
    parent: int
    state: str
    cpu_ticks: int
    """Of the process and of its children that it has waited for."""


# -- looking -----------------------------------------------------------------------------------------------


def boot_id() -> str:
    """Give a text that is another after every start of this machine."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def stat(pid: int) -> Stat | None:
    """Read what the kernel says of a process, or None if there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except OSError:
        return None
    # The second field is the name in parentheses, and may itself hold spaces and parentheses. See proc(5).
    fields = text[text.rindex(b")") + 2 :].split()
    return Stat(
        process=Process(pid, int(fields[19])),
        parent=int(fields[1]),
        state=fields[0].decode(),
        cpu_ticks=sum(map(int, fields[11:15])),
    )


def name_of(pid: int) -> str:
    """Read the name of a process, cut to 15 bytes by the kernel; empty if there is none."""
    try:
        with open(f"/proc/{pid}/comm", "rb") as file:
            return file.read().decode("utf-8", "replace").strip()
    except OSError:
        return ""


def all_stats() -> Iterator[Stat]:
    """Read every process of this system; one that ended and was not waited for yet is left out."""
    for name in os.listdir("/proc"):
        if name.isdecimal() and (found := stat(int(name))) and found.state not in "ZX":
            yield found


def descendants(root: int) -> list[Stat]:
    """Give every process below one, without itself."""
    children: dict[int, list[Stat]] = {}
    for found in all_stats():
        children.setdefault(found.parent, []).append(found)
    below = list(children.get(root, ()))
    for found in below:  # grows while it is walked
        below += children.get(found.process.pid, ())
    return below


def marked(engine_id: str) -> list[Process]:
    """Give every process of this user that has an engine's ID in its environment."""
    marker = f"{ENGINE_ID}={engine_id}".encode()
    candidates = [found.process for found in all_stats() if _environment_has(found.process.pid, marker)]
    # A number may have changed hands between the two looks at it.
    return [process for process in candidates if is_alive(process)]


def _environment_has(pid: int, marker: bytes) -> bool:
    try:
        if os.stat(f"/proc/{pid}").st_uid != os.getuid():
            return False
        with open(f"/proc/{pid}/environ", "rb") as file:
            return marker in file.read().split(b"\0")
    except OSError:
        return False


def _is_resource_tracker(process: Process) -> bool:
    """Say whether a process is Python's keeper of shared memory and semaphores."""
    try:
        with open(f"/proc/{process.pid}/cmdline", "rb") as file:
            return b"multiprocessing.resource_tracker" in file.read()
    except OSError:
        return False


def shared_memory(processes: Iterable[Process]) -> set[str]:
    """Give the files of shared memory that processes have mapped, by their paths."""
    found = set()
    for process in processes:
        with contextlib.suppress(OSError), open(f"/proc/{process.pid}/maps", "rb") as file:
            found |= {line[line.index(_SHARED) :].rstrip(b"\n") for line in file if _SHARED in line}
    return {os.fsdecode(path) for path in found if not path.endswith(b" (deleted)")}


def remove_shared_memory(paths: set[str]) -> None:
    """Remove what a tree that is gone has left of shared memory: a process that is killed removes none of its own.

    What anybody else has mapped stays.
    """
    left = {path for path in paths if os.path.exists(path)}
    if left:
        for path in left - shared_memory(found.process for found in all_stats()):
            remove(path)


# -- ending ------------------------------------------------------------------------------------------------


def send(process: Process, signum: int) -> None:
    """Signal a process, and never a later one that got its number."""
    try:
        handle = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    except OSError:  # a kernel or a sandbox without process handles
        if is_alive(process):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process.pid, signum)
        return
    try:
        # The handle stays with the process that it was opened for, so a look after that settles which one it is.
        if is_alive(process):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                signal.pidfd_send_signal(handle, signum)
    finally:
        os.close(handle)


def is_alive(process: Process) -> bool:
    """Say whether this very process runs."""
    found = stat(process.pid)
    return found is not None and found.process == process and found.state not in "ZX"


def end_all(
    find: Callable[[], list[Process]],
    grace: float,
    *,
    first: Process | None = None,
    bound: float | None = None,
    shared: Iterable[str] = (),
) -> bool:
    """End every process that ``find`` gives, until it gives none, and remove the shared memory that they leave.

    Parameters
    ----------
    find
        Looks anew each time, so that processes born meanwhile are found too.
    grace
        Seconds between the first SIGTERM and SIGKILL.
    first
        Gets its SIGTERM before all others, and half of the grace to end them in good order.
    bound
        Seconds after which to give up; None is never.
    shared
        Files of shared memory that those which have ended already had mapped.

    Returns
    -------
    bool
        Whether all are gone.
    """
    began = time.monotonic()
    pause = 0.002
    asked: set[Process] = set()
    mapped = set(shared)
    seen: set[Process] = set()
    # A look misses a process whose parent ends just then, and which has another one when the look comes to it.
    while left := find() or [process for process in seen if is_alive(process)]:
        mapped |= shared_memory(process for process in left if process not in seen)
        seen.update(left)
        waited = time.monotonic() - began
        if bound is not None and waited > bound:
            return False
        if waited < grace:
            alone = first is not None and first in left and waited < grace / 2
            for process in [first] if alone and first else left:
                if process not in asked:
                    send(process, signal.SIGTERM)
                    asked.add(process)
        else:
            patient = waited < grace + _TRACKER_SECONDS
            for process in left:
                # A resource tracker ends by itself, after the last process that it works for, and by then has
                # removed the shared memory that those left.
                if not (patient and _is_resource_tracker(process)):
                    send(process, signal.SIGKILL)
        time.sleep(pause)
        pause = min(pause * 1.5, _LONGEST_PAUSE)
    remove_shared_memory(mapped)
    return True


def remove(path: str) -> None:
    """Remove a file, if it is there and may be removed."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def remove_run_dir(run_dir: str) -> None:
    """Remove an engine's folder, its record last: what is left half-way is found again by it."""
    import shutil  # not needed until the end

    record = os.path.join(run_dir, RECORD)
    try:
        entries = list(os.scandir(run_dir))
    except OSError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        elif entry.path != record:
            remove(entry.path)
    remove(record)
    with contextlib.suppress(OSError):
        os.rmdir(run_dir)


# -- the program -------------------------------------------------------------------------------------------


class Guardian:
    """Keeps one engine, from its start to the end of its last process."""

    def __init__(self, run_dir: str, grace: float, server: int, command: list[str]) -> None:
        self._run_dir = run_dir
        self._grace = grace
        self._server = server
        self._command = command
        self._engine: Process | None = None
        self._stopping = False
        self._shared: set[str] = set()
        self._looked_at = 0

    def run(self) -> None:
        """Start the engine, keep it, end it."""
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        wake = self._catch_signals()
        try:
            self._write_record()
            self._engine = self._start_engine()
            self._write_record()
            self._keep(wake)
        finally:
            end_all(self._tree, self._grace, first=self._engine, shared=self._shared)
            remove_run_dir(self._run_dir)

    def _catch_signals(self) -> int:
        """Let signals end the waiting; SIGTERM ends the engine, and the terminal's signals do nothing."""
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        # Handlers, not SIG_IGN: an ignored signal would stay ignored in the engine.
        for signum in _caught_signals():
            signal.signal(signum, self._on_signal)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        return reader

    def _on_signal(self, signum: int, _: object) -> None:
        self._stopping |= signum == signal.SIGTERM

    def _start_engine(self) -> Process | None:
        guardian = os.getpid()
        # A signal that the child took with the guardian's handlers would be lost.
        signal.pthread_sigmask(signal.SIG_BLOCK, _caught_signals())
        pid = os.fork()
        if pid:
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            started = stat(pid)
            return started.process if started else None
        try:
            os.setsid()
            # Of the main thread, so it comes when the guardian ends and not before.
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() == guardian:
                self._become_engine()
        finally:
            os._exit(127)

    def _become_engine(self) -> NoReturn:
        # Python ignores the last two, and that would be inherited.
        for signum in (*_caught_signals(), signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(signum, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(2, 1)
        try:
            os.execvp(self._command[0], self._command)  # noqa: S606  # the server chose it; there is no shell
        except OSError as error:
            os.write(2, f"{self._command[0]} cannot be started: {error.strerror}\n".encode())
            raise

    def _keep(self, wake: int) -> None:
        """Wait until there is a reason to end the engine."""
        poll = select.poll()
        poll.register(0, select.POLLIN)
        poll.register(wake, select.POLLIN)
        while not self._stopping and self._engine:
            events = dict(poll.poll(_PARENT_CHECK_SECONDS * 1000))
            if wake in events:
                os.read(wake, 4096)
            if 0 in events and not os.read(0, 4096):
                return
            if os.getppid() != self._server:
                return
            self._reap()
            self._note_shared_memory()

    def _note_shared_memory(self) -> None:
        """Note what the engine has mapped: a process that is killed alone takes what only it knew with it."""
        try:
            changed = os.stat(_SHARED).st_mtime_ns
        except OSError:
            return
        # What has just been made is looked at once more: it may not be mapped yet.
        if changed > self._looked_at - _SETTLED_NS:
            self._looked_at = time.time_ns()
            self._shared |= shared_memory(self._tree())

    def _tree(self) -> list[Process]:
        self._reap()
        return [found.process for found in descendants(os.getpid())]

    def _reap(self) -> None:
        """Take the end of every process that ended; report that of the engine's first."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            if self._engine is not None and pid == self._engine.pid:
                self._engine = None
                _report({"returncode": os.waitstatus_to_exitcode(status)})

    def _write_record(self) -> None:
        me = stat(os.getpid())
        record = {
            "engine_id": os.environ[ENGINE_ID],
            "boot_id": boot_id(),
            "guardian": me and me.process,
            "engine": self._engine,
        }
        path = os.path.join(self._run_dir, RECORD)
        file = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.write(file, json.dumps(record).encode())
        os.close(file)
        os.replace(f"{path}.new", path)


def _caught_signals() -> list[signal.Signals]:
    return [signal.SIGTERM, signal.SIGCHLD, signal.SIGINT, signal.SIGHUP]


def _prctl(option: int, value: int) -> None:
    import ctypes  # not on systems where this module is only imported

    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed")


def _report(message: dict[str, object]) -> None:
    with contextlib.suppress(OSError):  # when nobody reads any more: the server is gone
        os.write(1, json.dumps(message).encode() + b"\n")


def main(arguments: list[str]) -> None:
    """Run the program."""
    run_dir, grace, server, *command = arguments
    Guardian(run_dir, float(grace), int(server), command).run()


if __name__ == "__main__":
    main(sys.argv[1:])
