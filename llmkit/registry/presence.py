"""Which servers of one home are alive: each holds a lock as long as it lives, in whatever way it ends."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

if sys.platform != "win32":
    import fcntl


class Presence:
    """The presence of one server among those that share a state folder. All methods block.

    Parameters
    ----------
    folder
        The state folder; the locks lie in ``servers`` in it.

    Attributes
    ----------
    server_id
        A name that no other server has.
    """

    def __init__(self, folder: Path) -> None:
        self.server_id = uuid.uuid4().hex
        self._folder = folder / "servers"
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in self._folder.glob("*.lock"):
            self.alive(path.stem)
        while True:
            path = self._path(self.server_id)
            self._lock: int | None = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            if _try_lock(self._lock) and path.exists():
                return
            os.close(self._lock)  # another that starts now took it for that of a dead server

    def _path(self, server_id: str) -> Path:
        return self._folder / f"{server_id}.lock"

    def alive(self, server_id: str) -> bool:
        """Say whether a server lives; what a dead one has left here is removed."""
        if server_id == self.server_id:
            return True
        path = self._path(server_id)
        try:
            file = os.open(path, os.O_RDWR)
        except OSError:
            return False
        try:
            if sys.platform == "win32" or not _try_lock(file):
                return True
            path.unlink(missing_ok=True)
            return False
        finally:
            os.close(file)

    def close(self) -> None:
        """End the presence."""
        lock, self._lock = self._lock, None
        if lock is not None:
            with contextlib.suppress(OSError):
                self._path(self.server_id).unlink(missing_ok=True)
            os.close(lock)


@contextlib.contextmanager
def one_at_a_time(path: Path, seconds: float) -> Iterator[None]:
    """Hold a lock that only one process holds at once; its end, in whatever way, gives it back.

    Raises
    ------
    TimeoutError
        If another holds it for so long.
    """
    deadline = time.monotonic() + seconds
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        while not _try_lock(file):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{path} is locked")
            time.sleep(0.01)
        yield
    finally:
        os.close(file)


def _try_lock(file: int) -> bool:
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks; to wait for one would be to wait for ever
    return True
