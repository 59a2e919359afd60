"""Answers of a batch in a file: JSON lines, appended and made durable in groups.

One line an answer is enough, as each is looked up only once, at the start. Unlike a database it is readable with any
tool, works on network file systems, and the worst that a killed process leaves is a line without an end.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import threading
from collections.abc import Collection, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from llmkit.errors import DiskFull, DoesNotFit, LLMKitError, WrongState

VERSION: Final = 1
_HEAD: Final = json.dumps({"llmkit_map": VERSION}).encode() + b"\n"
_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LOCK_AT: Final = 1 << 40  # on Windows a locked byte cannot be read; none is there


class Row(BaseModel):
    """What became of one prompt.

    Attributes
    ----------
    id
        Identity of the prompt: a digest of all that decides its answer.
    error
        Why there is no answer, or why it is not as asked for; None if all is well.
    model_id
        Which model answered: another one, if that which was asked failed and has a fallback.
    seconds
        That the server took for it.
    """

    model_config = ConfigDict(protected_namespaces=())

    id: str
    response: str | None = None
    error: str | None = None
    model_id: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    seconds: float | None = None


class Checkpoint:
    """``with Checkpoint(path) as checkpoint:`` holds the file for this process alone.

    Raises
    ------
    WrongState
        If another process, or another call in this one, has it open.
    DoesNotFit
        If the file is something else; it is left as it is.
    LLMKitError
        If it cannot be written here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = -1
        self._end = 0
        self._mutex = threading.Lock()
        self._writing = self._closed = False

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            binary: int = getattr(os, "O_BINARY", 0)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | binary, 0o600)
        except OSError as error:
            raise self._explain(error) from error
        try:
            if not self._lock():
                raise WrongState(
                    f"Another batch writes to {self.path} now.",
                    hint="Wait for its end or stop it, or give this one another file: checkpoint='...'.",
                )
            self._open()
        except BaseException:
            os.close(self._file)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._mutex:
            self._closed = True
            if not self._writing:
                os.close(self._file)  # gives the lock back, too

    def _lock(self) -> bool:
        try:
            return _lock(self._file)
        except OSError as error:
            raise LLMKitError(
                f"The checkpoint {self.path} cannot be locked: {error.strerror or error}.",
                hint="Name a file on another disk, which has locks: checkpoint='/path/of/batch.jsonl'.",
            ) from error

    def _open(self) -> None:
        """Find the end of the last whole line; what follows is of a process that was killed while it wrote."""
        size = os.fstat(self._file).st_size
        with open(self._file, "rb", closefd=False) as reader:
            head = reader.readline()
            if head != _HEAD and not _HEAD.startswith(head):
                raise self._foreign(head)
            self._end = len(head) if head == _HEAD else 0
            while self._end and (line := reader.readline()).endswith(b"\n"):
                self._end += len(line)
        try:
            if size > self._end:
                os.ftruncate(self._file, self._end)
            if not self._end:
                self._write(_HEAD)
                _sync_folder(self.path.parent)  # else the file itself may be gone after a loss of power
        except OSError as error:
            raise self._explain(error) from error

    def _foreign(self, head: bytes) -> DoesNotFit:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            if (version := int(json.loads(head)["llmkit_map"])) > VERSION:
                return DoesNotFit(
                    f"{self.path} is of version {version}; this llmkit reads {VERSION}.", hint="Upgrade llmkit."
                )
        return DoesNotFit(
            f"{self.path} is no checkpoint of client.map.",
            hint="It is left as it is; name another file.",
            param="checkpoint",
        )

    def read(self, wanted: Collection[str]) -> dict[str, Row]:
        """Give what is known of the prompts with these identities; the last line of each counts."""
        known: dict[str, Row] = {}
        with self.path.open("rb") as reader:
            reader.readline()
            for line in reader:
                with contextlib.suppress(ValidationError):  # a line that somebody has edited is asked again
                    row = Row.model_validate_json(line)
                    if row.id in wanted:
                        known[row.id] = row
        return known

    def append(self, rows: Iterable[Row]) -> None:
        """Write rows; when it returns, they are on the disk.

        Raises
        ------
        DiskFull
            If there is no room; what was there before is kept.
        WrongState
            If the file was closed meanwhile.
        """
        # A disk can be so slow that the batch is left while it writes. The file is not closed under it then: the number
        # would soon be that of another file, into which the rest would go.
        with self._mutex:
            if self._closed:
                raise WrongState(f"The checkpoint {self.path} is closed.")
            self._writing = True
        try:
            self._write(b"".join(row.model_dump_json(exclude_defaults=True).encode() + b"\n" for row in rows))
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._end)
            raise self._explain(error) from error
        finally:
            with self._mutex:
                self._writing = False
                if self._closed:
                    os.close(self._file)

    def _write(self, data: bytes) -> None:
        os.lseek(self._file, self._end, os.SEEK_SET)
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._file, rest) :]
        os.fsync(self._file)
        self._end += len(data)

    def _explain(self, error: OSError) -> LLMKitError:
        if error.errno in _NO_ROOM:
            return DiskFull(
                f"No room on the disk for the checkpoint {self.path}.",
                hint="Rows that were finished before are kept in it. Make room and run the same call again.",
            )
        return LLMKitError(
            f"The checkpoint {self.path} cannot be written: {error.strerror or error}.",
            hint="Name a file in a folder where you may write: checkpoint='/path/of/batch.jsonl'.",
        )


def make_private(folder: Path) -> None:
    """Make a folder for checkpoints that nobody else reads, and that git takes for nothing of the project.

    Raises
    ------
    LLMKitError
        If it cannot be made.
    """
    try:
        folder.mkdir(mode=0o700)
        (folder / ".gitignore").write_text("*\n")
    except FileExistsError:
        return
    except OSError as error:
        raise LLMKitError(
            f"The folder {folder.absolute()} cannot be made: {error.strerror or error}.",
            hint="Name a file in a folder where you may write: checkpoint='/path/of/batch.jsonl'.",
        ) from error


if sys.platform == "win32":  # pragma: no cover

    def _lock(file: int) -> bool:
        import msvcrt

        os.lseek(file, _LOCK_AT, os.SEEK_SET)
        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        os.lseek(file, 0, os.SEEK_SET)
        return True

    def _sync_folder(folder: Path) -> None:
        """Windows writes the entry of a folder with the file."""

else:

    def _lock(file: int) -> bool:
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _sync_folder(folder: Path) -> None:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def as_json(value: Any) -> str:
    """Give JSON that is the same for equal values.

    Raises
    ------
    DoesNotFit
        If it cannot be written as JSON.
    """
    try:
        return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise DoesNotFit(f"A parameter cannot be written as JSON: {error}.") from None
