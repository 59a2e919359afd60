"""Which GPUs an engine gets: chosen under a lock, so that two servers of this user do not choose the same room.

A choice is a reservation until the engine has taken its memory: a file that its server holds locked, so that it ends
with the server, in whatever way. The lock of the choice itself is held for that moment only. All functions block.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from llmkit.errors import NoRoom, TimedOut
from llmkit.process.devices import Devices

if sys.platform != "win32":
    import fcntl

_GIB: Final = 1 << 30
_PAUSE_SECONDS: Final = 0.02
_MOST_UTILIZATION: Final = 0.9


@dataclass(frozen=True)
class Room:
    """What one GPU has left."""

    index: int
    free_bytes: int


def choose(rooms: Sequence[Room], count: int, bytes_each: int) -> list[int] | None:
    """Choose GPUs with enough room, those with the most; None if there are not as many."""
    fitting = sorted((room for room in rooms if room.free_bytes >= bytes_each), key=lambda r: (-r.free_bytes, r.index))
    return sorted(room.index for room in fitting[:count]) if len(fitting) >= count else None


def utilization(free_bytes: int, total_bytes: int, margin_bytes: int) -> float:
    """Give the share of a GPU that an engine may take: what is free without a margin, 0.9 at most, 0.01 at least."""
    share = (free_bytes - margin_bytes) / total_bytes if total_bytes else 0.0
    return max(0.01, min(_MOST_UTILIZATION, int(share * 100) / 100))


class Reservation:
    """GPUs that are set aside for one engine, until `release` or the end of this server."""

    def __init__(self, gpus: list[int], path: Path, file: int) -> None:
        self.gpus = gpus
        self._path = path
        self._file: int | None = file

    def release(self) -> None:
        """Give them back. Idempotent."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
            os.close(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Placement:
    """Chooses GPUs for engines.

    Parameters
    ----------
    devices
        What the machine has.
    folder
        Where the servers of this user on this host keep their reservations; made if it is missing.
    """

    def __init__(self, devices: Devices, folder: Path) -> None:
        self._devices = devices
        self._folder = folder

    def reserve(self, count: int, bytes_each: int, *, wait: float = 10.0) -> Reservation:
        """Set GPUs aside for an engine.

        Parameters
        ----------
        count
            How many.
        bytes_each
            What is needed on each; 0 takes those with the most room.
        wait
            Seconds to wait while another server chooses.

        Raises
        ------
        NoRoom
            If there are not as many with room; it says who holds it.
        TimedOut
            If another server does not end its choice.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._locked(wait):
            taken = self.reservations()
            gpus = self._devices.read().gpus
            rooms = [Room(gpu.index, max(0, gpu.free_bytes - taken.get(gpu.index, 0))) for gpu in gpus]
            chosen = choose(rooms, count, bytes_each)
            if chosen is None:
                raise self._no_room(rooms, taken, count, bytes_each)
            # Who takes what there is sets all of it aside.
            sizes = {room.index: bytes_each or room.free_bytes for room in rooms if room.index in chosen}
            path = self._folder / f"{uuid.uuid4().hex}.json"
            new = path.with_suffix(".new")
            file = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            _try_lock(file)
            os.write(file, json.dumps({"pid": os.getpid(), "gpus": sizes}).encode())
            new.rename(path)  # only now can others see it: locked, so nobody takes it for abandoned
            return Reservation(chosen, path, file)

    def reservations(self) -> dict[int, int]:
        """Give the bytes that are set aside on each GPU by servers that live."""
        taken: dict[int, int] = {}
        for path in self._folder.glob("*.json"):
            for index, size in _read(path).items():
                taken[index] = taken.get(index, 0) + size
        return taken

    def _no_room(self, rooms: Sequence[Room], taken: dict[int, int], count: int, bytes_each: int) -> NoRoom:
        words = []
        for room in rooms:
            holders = ", ".join(self._devices.holders(room.index)[:5]) or "nobody that can be seen"
            aside = f" beside {taken[room.index] / _GIB:.1f} GiB set aside" if taken.get(room.index) else ""
            words.append(f"GPU {room.index} has {room.free_bytes / _GIB:.1f} GiB free{aside}, held by {holders}")
        each = f" with {bytes_each / _GIB:.1f} GiB free" + (" each" if count > 1 else "")
        return NoRoom(
            f"{count} GPU{'s' * (count > 1)}{each} {'are' if count > 1 else 'is'} needed; "
            + ("; ".join(words) or "there is no GPU")
            + ".",
            hint="Unload a model, end another program that uses the GPU, or choose a smaller model.",
        )

    @contextlib.contextmanager
    def _locked(self, wait: float) -> Iterator[None]:
        # Opened anew each time: the lock belongs to the opening, so it holds between threads, too.
        file = os.open(self._folder / "gpus.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            deadline = time.monotonic() + wait
            while not _try_lock(file):
                if time.monotonic() > deadline:
                    raise TimedOut("Another server does not end its choice of a GPU.", hint="Try again.")
                time.sleep(_PAUSE_SECONDS)
            yield
        finally:
            os.close(file)


def _read(path: Path) -> dict[int, int]:
    """Read a reservation; that of a server that is gone is removed and counts no more."""
    try:
        file = os.open(path, os.O_RDWR)
    except OSError:
        return {}
    try:
        if _try_lock(file) and sys.platform != "win32":
            path.unlink(missing_ok=True)
            return {}
        gpus = json.loads(os.read(file, 65536))["gpus"]
        return {int(index): int(size) for index, size in gpus.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    finally:
        os.close(file)


def _try_lock(file: int) -> bool:
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
