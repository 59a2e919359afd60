"""Which GPUs an engine gets: chosen under a lock, so that two servers of this user do not choose the same room.

A choice is a reservation until the engine has taken its memory: a file that its server holds locked, so that it ends
with the server, in whatever way. The lock of the choice itself is held for that moment only. All functions block.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import time
import uuid
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from pydantic import BaseModel, NonNegativeInt

from llmkit import schemas
from llmkit.errors import DiskFull, NoRoom, NotReady, TimedOut
from llmkit.process.devices import Devices

if sys.platform != "win32":
    import fcntl

_GIB: Final = 1 << 30
_PAUSE_SECONDS: Final = 0.02
_MOST_BYTES: Final = 65536
_MOST_HOLDERS: Final = 5
_LOG: Final = logging.getLogger(__name__)
_MOST_PERCENT: Final = 90
_MARGIN_BYTES: Final = 512 << 20
"""What the driver and others take of a GPU while an engine starts."""


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
    percent = (free_bytes - margin_bytes) * 100 // total_bytes if total_bytes else 0
    return max(1, min(_MOST_PERCENT, percent)) / 100


class _Kept(BaseModel):
    """A reservation as its file has it."""

    pid: int
    """Of the server."""
    gpus: dict[NonNegativeInt, NonNegativeInt]
    """Bytes on each GPU."""


class Reservation:
    """GPUs that are set aside for one engine, until `release` or the end of this server.

    One that nobody holds any more is given back, too: a load can be cancelled while its thread still chooses.

    Attributes
    ----------
    gpus
        Their indices.
    share
        The share of each of them that was free, 0.9 at most.
    """

    def __init__(self, gpus: list[int], share: float, path: Path, file: int) -> None:
        self.gpus = gpus
        self.share = share
        self._give_back = weakref.finalize(self, _give_back, path, file)

    def release(self) -> None:
        """Give them back. Idempotent."""
        self._give_back()

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
        self._ignored: set[str] = set()

    def reserve(self, count: int, bytes_each: int, *, everything: bool = False, wait: float = 10.0) -> Reservation:
        """Set GPUs aside for an engine.

        Parameters
        ----------
        count
            How many.
        bytes_each
            What is needed on each; 0 takes those with the most room.
        everything
            Set aside all that is free there, for an engine that takes what it finds.
        wait
            Seconds to wait while another server chooses.

        Raises
        ------
        NoRoom
            If there are not as many with room; it says who holds it.
        TimedOut
            If another server does not end its choice.
        DiskFull, NotReady
            If the reservation cannot be written.
        """
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._locked(wait):
                kept = self._kept()
                taken = _sum(kept)
                devices = self._devices.read()
                rooms = [Room(gpu.index, max(0, gpu.free_bytes - taken.get(gpu.index, 0))) for gpu in devices.gpus]
                chosen = choose(rooms, count, bytes_each)
                if chosen is None:
                    raise self._no_room(devices, rooms, kept, count, bytes_each)
                free = {room.index: room.free_bytes for room in rooms if room.index in chosen}
                sizes = free if everything or not bytes_each else dict.fromkeys(free, bytes_each)
                totals = {gpu.index: gpu.total_bytes for gpu in devices.gpus}
                share = min(utilization(left, totals[index], _MARGIN_BYTES) for index, left in free.items())
                return Reservation(chosen, share, *self._keep(_Kept(pid=os.getpid(), gpus=sizes)))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFull("There is no room on the disk to set a GPU aside.", hint="Free space there.") from error
            raise NotReady(f"No GPU can be set aside: {error.strerror}.", hint=f"Look at {self._folder}.") from error

    def reservations(self) -> dict[int, int]:
        """Give the bytes that are set aside on each GPU by servers that live."""
        return _sum(self._kept())

    def _keep(self, kept: _Kept) -> tuple[Path, int]:
        """Write a reservation; the caller holds the lock of the choice."""
        for left in self._folder.glob("*.new"):
            left.unlink(missing_ok=True)  # of a server that was killed here
        path = self._folder / f"{uuid.uuid4().hex}.json"
        new = path.with_suffix(".new")
        file = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            _try_lock(file)
            os.write(file, kept.model_dump_json().encode())
            new.rename(path)  # only now can others see it: locked, so nobody takes it for abandoned
        except BaseException:
            _give_back(new, file)
            raise
        return path, file

    def _kept(self) -> list[_Kept]:
        """Give the reservations of servers that live."""
        found = []
        for path in self._folder.glob("*.json"):
            try:
                kept = _read(path)
            except (OSError, ValueError) as error:
                if path.name not in self._ignored:
                    self._ignored.add(path.name)
                    why = error.strerror if isinstance(error, OSError) else "it is none"
                    _LOG.warning("%s is ignored as a reservation of GPUs: %s.", path, why)
                continue
            if kept is not None:
                found.append(kept)
        return found

    def _no_room(
        self, devices: schemas.Devices, rooms: Sequence[Room], kept: Sequence[_Kept], count: int, bytes_each: int
    ) -> NoRoom:
        words = []
        for gpu, room in zip(devices.gpus, rooms, strict=True):
            holders = self._devices.holders(gpu.index)[:_MOST_HOLDERS]
            holders += [
                f"a load of server {one.pid}: {one.gpus[gpu.index] / _GIB:.1f} GiB set aside"
                for one in kept
                if one.gpus.get(gpu.index)
            ][:_MOST_HOLDERS]
            words.append(
                f"GPU {gpu.index} has {room.free_bytes / _GIB:.1f} of {gpu.total_bytes / _GIB:.1f} GiB free, "
                f"held by {', '.join(holders) or 'nobody that can be seen'}"
            )
        each = f" with {bytes_each / _GIB:.1f} GiB free{' each' * (count > 1)}" if bytes_each else ""
        return NoRoom(
            f"{count} GPU{'s' * (count > 1)}{each} {'are' if count > 1 else 'is'} needed; "
            + ("; ".join(words) or devices.reason or "there is no GPU")
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


def _sum(kept: Iterable[_Kept]) -> dict[int, int]:
    taken: dict[int, int] = {}
    for one in kept:
        for index, size in one.gpus.items():
            taken[index] = taken.get(index, 0) + size
    return taken


def _read(path: Path) -> _Kept | None:
    """Read a reservation; that of a server that is gone is removed and counts no more.

    Raises
    ------
    OSError
        If it cannot be read.
    ValueError
        If it is no reservation; then it is left alone.
    """
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None  # given back meanwhile
    try:
        kept = _Kept.model_validate_json(os.read(file, _MOST_BYTES))
        # Shared: two who look at once must not take each other for its server.
        if sys.platform != "win32" and _try_lock(file, exclusive=False):
            path.unlink(missing_ok=True)
            return None
        return kept
    finally:
        os.close(file)


def _give_back(path: Path, file: int) -> None:
    os.close(file)  # first: Windows removes no open file
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _try_lock(file: int, *, exclusive: bool = True) -> bool:
    """Lock a file if nobody else has; raise `OSError` where the file system cannot lock."""
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
