"""The folder of one server on this host, and what servers that are gone have left in theirs."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from llmkit.errors import NotReady
from llmkit.process.leftovers import reap_leftovers

if sys.platform != "win32":
    import fcntl

_LOCK = "server.lock"


class ServerFolder:
    """A 0700 folder that belongs to one running server. Making and removing it blocks.

    The server holds a lock in it as long as it lives, in whatever way it ends; so others can tell, also from
    another container that shares the folder, whether it is still in use.

    Parameters
    ----------
    base
        The folder that the folders of all servers of this user lie in; made if it is missing.

    Raises
    ------
    OSError
        If it cannot be made.
    NotReady
        If somebody else made ``base``.
    """

    def __init__(self, base: Path) -> None:
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        if hasattr(os, "getuid"):
            found = base.lstat()
            if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode):
                raise NotReady(
                    f"{base} belongs to another user.", hint="Set LLMKIT_RUN_DIR to a short path of your own."
                )
            base.chmod(0o700)
        self.path, self._lock = self._make(base)

    @staticmethod
    def _make(base: Path) -> tuple[Path, int | None]:
        while True:
            path = base / f"{os.getpid()}-{os.urandom(3).hex()}"
            path.mkdir(mode=0o700)
            lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            if _try_lock(lock) and (path / _LOCK).exists():
                return path, lock
            # A server that starts now took it for abandoned before it was locked.
            os.close(lock)
            shutil.rmtree(path, ignore_errors=True)

    def remove_abandoned(self) -> list[Path]:
        """End the engines and remove the folders of servers that are gone.

        Returns
        -------
        list[Path]
            The folders of engines that nobody kept any more.
        """
        reaped: list[Path] = []
        if sys.platform != "linux":
            return reaped
        for folder in self.path.parent.iterdir():
            with _locked(folder / _LOCK) as abandoned:
                if abandoned:
                    reaped += reap_leftovers(folder)
                    # A guardian may still be ending its engine; then its folder waits for the next start.
                    if not any(entry.is_dir() for entry in folder.iterdir()):
                        shutil.rmtree(folder, ignore_errors=True)
        return reaped

    def remove(self) -> None:
        """Remove the folder, and what is in it."""
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)  # first: Windows removes no open file
        shutil.rmtree(self.path, ignore_errors=True)


def _try_lock(file: int) -> bool:
    if sys.platform == "win32":
        return True  # no engine runs here that could be left
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold somebody's lock for a moment; False if they hold it, or there is none."""
    try:
        file = os.open(path, os.O_RDWR)
    except OSError:
        yield False
        return
    try:
        yield _try_lock(file)
    finally:
        os.close(file)
