"""The record of requests: what was asked and how it ended, written off the way of a request, bounded in size.

It has a file of its own: its many writes do not wake the other servers of the home, which watch that of the
configurations, and need not be as durable.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError
from pydantic_core import to_json

from llmkit.errors import LLMKitError
from llmkit.registry.database import Database, Schema
from llmkit.schemas import RequestRecord

MAX_BYTES = 64 << 20
PENDING = 10_000
PENDING_WITH_BODIES = 256
BACKLOG = 1_000
"""So many are written without waiting for more."""
BATCH_SECONDS = 1.0
RETRY_SECONDS = 5.0
CLOSING_SECONDS = 2.0
WARNING_SECONDS = 60.0
BUSY_MILLISECONDS = 1_000
"""Less than for the configurations: nobody waits for a record, and it is tried again."""
JOURNAL_BYTES = 4 << 20
"""About what SQLite takes over into the file at once: the WAL is not kept larger."""
_BODIES = ("request_body", "response_body")
_ERRORS = (LLMKitError, OSError, sqlite3.Error)

# The ID of a row is its place in the bytes of all bodies that were ever written. So the primary key says which rows
# are beyond the bound, and nothing has to be summed up.
_INSERT = "INSERT INTO requests VALUES ((SELECT id + size FROM requests ORDER BY id DESC LIMIT 1), ?, ?, ?, ?, ?)"
_TRIM = "DELETE FROM requests WHERE id < (SELECT id + size FROM requests ORDER BY id DESC LIMIT 1) - ?"

T = TypeVar("T")


class _Row(NamedTuple):
    started_at: float
    model_id: str
    size: int
    body: str
    user: str | None


class _RequestFile(Database):
    schema = Schema(
        "requests.sqlite",
        0x6C6C6D72,  # "llmr"
        [
            [
                """
                CREATE TABLE requests (
                    id INTEGER PRIMARY KEY,
                    started_at REAL NOT NULL,
                    model_id TEXT NOT NULL,
                    size INTEGER NOT NULL CHECK (size > 0),
                    body TEXT NOT NULL
                ) STRICT
                """,
                "CREATE INDEX requests_of_model ON requests (model_id)",
            ],
            [
                "ALTER TABLE requests ADD COLUMN user TEXT",
                "CREATE INDEX requests_of_user ON requests (user) WHERE user IS NOT NULL",
            ],
        ],
        "record of requests",
    )

    def _prepare(self, connection: sqlite3.Connection) -> None:
        super()._prepare(connection)
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(f"PRAGMA journal_size_limit = {JOURNAL_BYTES}")
        connection.execute(f"PRAGMA busy_timeout = {BUSY_MILLISECONDS}")

    def _set_aside(self, connection: sqlite3.Connection) -> Path:
        for older in self.path.parent.glob(f"{self.path.name}.corrupt-*"):  # else a bad disk is filled with them
            with contextlib.suppress(OSError):
                older.unlink()
        return super()._set_aside(connection)


class RequestHistory:
    """The requests that are over, of every server of one home; the oldest are forgotten.

    SQLite and all work on a record live on one thread. What cannot be written is tried again, told by `problems`, and
    is no error of any method.

    Parameters
    ----------
    state_dir
        The state folder.
    logger
        Is told what goes wrong, at most once a minute.
    read
        Gives the fields of a `RequestRecord`, as plain values, out of what was added; bodies may be bytes. It is called
        on the thread. By default what is added are those fields.
    max_bytes
        Bytes of all records together, as JSON. The file is larger by a quarter if they have no bodies, and at most
        twice as large, where each just does not share a page with the next. A record of more than a sixteenth of
        it loses its bodies.
    most_pending
        So many records wait to be written; what comes then pushes the oldest out.
    """

    def __init__(
        self,
        state_dir: Path,
        logger: logging.Logger,
        read: Callable[[Any], dict[str, Any]] = dict,
        *,
        max_bytes: int = MAX_BYTES,
        most_pending: int = PENDING,
    ) -> None:
        self._state_dir = state_dir
        self._log = logger
        self._read = read
        self._max_bytes = max_bytes
        self._largest = max(1, max_bytes // 16)
        self._pending: deque[Any] = deque(maxlen=most_pending)
        self._backlog = min(BACKLOG, most_pending // 4)
        self._pushed_out = 0
        self._some = asyncio.Event()
        self._many = asyncio.Event()
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="llmkit-history")
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        # Of the thread:
        self._database: _RequestFile | None = None
        self._rows: deque[_Row] = deque()
        """What was taken from the pending ones and is not written yet."""
        self._held = 0
        self._lost = 0
        self._failure: str | None = None
        self._told: str | None = None
        self._quiet_until = 0.0

    async def _on_disk(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, partial(function, *args))

    async def open(self) -> None:
        """Open the file and start to write; a file that cannot be opened is tried again at every write."""
        if self._task is None and not self._closed:
            self._task = asyncio.create_task(self._write_on(), name="llmkit-history")
            await self._on_disk(self._open)

    def add(self, record: Any) -> None:
        """Take the record of a request that is over; to be called on the event loop's thread.

        Parameters
        ----------
        record
            What ``read`` can read. It is read later, on another thread: it must not change any more.
        """
        pending = self._pending
        if len(pending) == pending.maxlen:
            self._pushed_out += 1
        pending.append(record)
        self._some.set()
        if len(pending) > self._backlog:
            self._many.set()

    async def recent(self, limit: int, model_id: str | None = None, user: str | None = None) -> list[RequestRecord]:
        """Give what ended last, newest first, also what is not written yet.

        Parameters
        ----------
        limit
            Gives at most so many; fewer, if some of them cannot be read by this version.
        model_id
            Gives only those that asked for this model.
        user
            Gives only those of this person.
        """
        return [] if self._closed else await self._on_disk(self._recent, max(0, limit), model_id, user)

    def problems(self) -> list[str]:
        """Say what is wrong with the record of requests."""
        problems = list(self._database.problems) if self._database else []
        if self._failure:
            problems.append(f"requests are not recorded: {self._failure}")
        if lost := self._pushed_out + self._lost:
            problems.append(f"requests that ended without a record, since it could not be written: {lost}")
        return problems

    async def close(self) -> None:
        """Write what is pending and close the file, in two seconds at most; twice is no error."""
        if self._closed:
            return
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        # It is not cancelled if it takes longer: the thread closes what it has opened, and then ends.
        end = self._disk.submit(self._end)
        self._disk.shutdown(wait=False)
        await asyncio.to_thread(wait, [end], CLOSING_SECONDS)

    async def _write_on(self) -> None:
        while True:
            await self._some.wait()
            self._some.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BATCH_SECONDS):
                    await self._many.wait()
            await self._on_disk(self._write)
            while self._rows:
                await asyncio.sleep(RETRY_SECONDS)
                await self._on_disk(self._write)
            self._many.clear()

    # -- on the thread ---------------------------------------------------------------------------------------

    def _open(self) -> None:
        try:
            self._opened()
        except _ERRORS as error:
            self._fail(error)

    def _opened(self) -> _RequestFile:
        if self._database is None:
            self._database = _RequestFile(self._state_dir)
            self._failure = None
        return self._database

    def _recent(self, limit: int, model_id: str | None, user: str | None) -> list[RequestRecord]:
        self._write()
        bodies = [
            row.body for row in reversed(self._rows) if model_id in (None, row.model_id) and user in (None, row.user)
        ]
        asked = {name: value for name, value in (("model_id", model_id), ("user", user)) if value is not None}
        which, values = " AND ".join(f"{name} = ?" for name in asked), tuple(asked.values())
        which = f"WHERE {which}" if which else ""
        try:
            with self._opened().read() as connection:
                query = f"SELECT body FROM requests {which} ORDER BY id DESC LIMIT ?"  # noqa: S608  # ours
                bodies += [body for (body,) in connection.execute(query, (*values, limit))]
        except _ERRORS as error:
            self._warn(_one_line(error))
        records = []
        for body in bodies[:limit]:
            with contextlib.suppress(ValidationError):
                records.append(RequestRecord.model_validate_json(body))
        return records

    def _write(self) -> None:
        """Write all there is; after a failure, take it all over and keep what there is room for."""
        works = True
        while self._pending or (works and self._rows):
            self._take()
            works = works and self._commit()
            while self._held > 4 * self._largest and not works:
                self._held -= self._rows.popleft().size
                self._lost += 1

    def _take(self) -> None:
        """Take what is pending, but no more than makes a transaction of a decent size."""
        enough = self._held + self._largest
        while self._pending and self._held < enough:
            record = self._pending.popleft()
            try:
                row = self._row(self._read(record))
            except Exception as error:  # noqa: BLE001  # one bad record must not keep all others from being written
                self._lost += 1
                self._warn(f"a record that cannot be written: {error!r}")
            else:
                self._rows.append(row)
                self._held += row.size

    def _row(self, record: dict[str, Any]) -> _Row:
        body = self._body(record)
        return _Row(
            record["started_at"].timestamp(), str(record["model_id"]), len(body), body.decode(), record.get("user")
        )

    def _body(self, record: dict[str, Any]) -> bytes:
        bodies = {name: record[name] for name in _BODIES if record.get(name) is not None}
        if sum(map(len, bodies.values())) <= self._largest:
            for name, body in bodies.items():
                if isinstance(body, bytes):
                    bodies[name] = body.decode(errors="replace")
            whole = to_json(record | bodies)
            if len(whole) <= self._largest:
                return whole
        # One that would push out many others, or hold the interpreter for long.
        return to_json(record | dict.fromkeys(_BODIES))

    def _commit(self) -> bool:
        try:
            with self._opened().write() as connection:
                connection.executemany(_INSERT, self._rows)
                connection.execute(_TRIM, (self._max_bytes,))
        except _ERRORS as error:
            self._fail(error)
            return False
        self._rows.clear()
        self._held = 0
        self._failure = self._told = None
        return True

    def _fail(self, error: Exception) -> None:
        self._failure = _one_line(error)
        self._warn(self._failure)

    def _warn(self, text: str) -> None:
        now = time.monotonic()
        if text != self._told and now >= self._quiet_until:
            self._told, self._quiet_until = text, now + WARNING_SECONDS
            self._log.warning("The record of requests: %s", text)

    def _end(self) -> None:
        self._write()
        if self._database is not None:
            with contextlib.suppress(sqlite3.Error):
                self._database.close()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).splitlines())
