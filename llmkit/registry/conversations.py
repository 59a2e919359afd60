"""Conversations that the server keeps, so that they outlive kernel and page: the latest ones, bounded in size.

They have a file of their own: their many writes do not wake the other servers of the home, which watch that of the
configurations.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from pydantic import TypeAdapter, ValidationError

from llmkit.engines.base import does_not_fit
from llmkit.errors import (
    ConversationChanged,
    ConversationNotFound,
    ConversationsNotKept,
    NotReady,
    ServerStopping,
    TooLarge,
)
from llmkit.registry.database import Database, Schema, explain
from llmkit.schemas import (
    MAX_CONVERSATION_BYTES,
    Conversation,
    ConversationId,
    ConversationList,
    ConversationRequest,
    ConversationSummary,
)

MOST: Final = 200
MOST_BYTES: Final = 64 << 20
CLOSING_SECONDS: Final = 2.0
JOURNAL_BYTES: Final = 4 << 20
"""The WAL is not kept larger."""
_ID: Final = TypeAdapter[str](ConversationId)

# A conversation that is stored again gets a new and higher ID: the order of the IDs is that of the changes, also where
# a clock was set back or two servers write at once.
_PUT: Final = (
    "INSERT OR REPLACE INTO conversations VALUES ((SELECT max(id) FROM conversations) + 1, ?, ?, ?, ?, ?, ?, ?, ?)"
)
_TRIM: Final = """
    DELETE FROM conversations WHERE id IN (
        SELECT id FROM (
            SELECT id, row_number() OVER newest AS place, sum(size) OVER newest AS bytes
            FROM conversations WINDOW newest AS (ORDER BY id DESC)
        ) WHERE place > ? OR bytes > ?
    )
"""

T = TypeVar("T")


class _ConversationFile(Database):
    schema = Schema(
        "conversations.sqlite",
        0x6C6C6D63,  # "llmc"
        [
            [
                # What the list shows comes before the body, which can be long: SQLite reads a row from its beginning.
                """
                CREATE TABLE conversations (
                    id INTEGER PRIMARY KEY,
                    conversation_id TEXT NOT NULL UNIQUE,
                    revision INTEGER NOT NULL,
                    updated_at REAL NOT NULL,
                    title TEXT NOT NULL,
                    model_id TEXT,
                    turns INTEGER NOT NULL,
                    size INTEGER NOT NULL,
                    body TEXT NOT NULL
                ) STRICT
                """
            ]
        ],
        "conversations",
    )

    def _prepare(self, connection: sqlite3.Connection) -> None:
        super()._prepare(connection)
        connection.execute(f"PRAGMA journal_size_limit = {JOURNAL_BYTES}")


class Conversations:
    """The conversations of every server of one home; those that were changed last are kept.

    SQLite and the reading of bodies live on one thread. The file is made when the first conversation is asked for.

    Parameters
    ----------
    state_dir
        The state folder.
    most
        So many are kept; 0 keeps none, and leaves the file alone.
    most_bytes
        Bytes of all together, as JSON; not fewer than one conversation may have.
    """

    def __init__(self, state_dir: Path, *, most: int = MOST, most_bytes: int = MOST_BYTES) -> None:
        self._state_dir = state_dir
        self._most = most
        self._most_bytes = max(most_bytes, MAX_CONVERSATION_BYTES)
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="llmkit-conversations")
        self._database: _ConversationFile | None = None
        self._closed = False

    async def summaries(self) -> ConversationList:
        """Give what is known of every conversation, what was changed last first."""
        if not self._most:
            return ConversationList(conversations=[], kept=False)
        return ConversationList(conversations=await self._on_disk(self._summaries))

    async def get(self, conversation_id: str) -> Conversation:
        """Give one conversation, or raise `ConversationNotFound`."""
        if not self._most:
            raise _not_found(conversation_id)
        return await self._on_disk(self._get, conversation_id)

    async def put(self, conversation_id: str, request: ConversationRequest) -> tuple[int, datetime]:
        """Keep a conversation as it is now, and give its new revision and the time.

        Raises
        ------
        ConversationsNotKept
            If this server keeps none.
        ConversationChanged
            If it follows another revision than the one that is kept.
        DoesNotFit, TooLarge, DiskFull, NotReady
        """
        if not self._most:
            raise ConversationsNotKept(
                "This server keeps no conversations.",
                hint="Its operator decides that: c.LLMKitApp.max_conversations is 0.",
            )
        try:
            _ID.validate_python(conversation_id)
        except ValidationError:
            rule = "must be letters, digits and . _ -, at most 64, a letter or digit first"
            raise does_not_fit([{"path": "conversation_id", "message": rule}]) from None
        return await self._on_disk(self._put, conversation_id, request)

    async def delete(self, conversation_id: str) -> None:
        """Forget a conversation, or raise `ConversationNotFound`."""
        if not self._most:
            raise _not_found(conversation_id)
        await self._on_disk(self._delete, conversation_id)

    def problems(self) -> list[str]:
        """Say what is wrong with the file."""
        return list(self._database.problems) if self._database else []

    async def close(self) -> None:
        """Close the file, in two seconds at most; twice is no error."""
        if not self._closed:
            self._closed = True
            end = self._disk.submit(self._close)
            self._disk.shutdown(wait=False)
            await asyncio.to_thread(wait, [end], CLOSING_SECONDS)

    async def _on_disk(self, function: Callable[..., T], *args: object) -> T:
        if self._closed:
            raise ServerStopping("The server is stopping.")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._disk, partial(function, *args))
        except OSError as error:  # of the folder; the database has explained its own
            raise explain(error, self._state_dir, _ConversationFile.schema.contents) from error

    # -- on the thread ---------------------------------------------------------------------------------------

    def _opened(self) -> _ConversationFile:
        if self._database is None:
            self._database = _ConversationFile(self._state_dir)
        return self._database

    def _has_none(self) -> bool:
        """Say whether nothing was ever kept: to read makes no file."""
        return self._database is None and not (self._state_dir / _ConversationFile.schema.file_name).exists()

    def _summaries(self) -> list[ConversationSummary]:
        if self._has_none():
            return []
        columns = "conversation_id, title, model_id, turns, revision, updated_at"
        with self._opened().read() as connection:
            rows = connection.execute(f"SELECT {columns} FROM conversations ORDER BY id DESC").fetchall()  # noqa: S608
        names = columns.split(", ")
        summaries = []
        for row in rows:
            with contextlib.suppress(ValidationError):  # one bad row must not hide all others
                told = dict(zip(names, row, strict=True)) | {"updated_at": _time(row[-1])}
                summaries.append(ConversationSummary.model_validate(told))
        return summaries

    def _get(self, conversation_id: str) -> Conversation:
        if self._has_none():
            raise _not_found(conversation_id)
        with self._opened().read() as connection:
            row = connection.execute(
                "SELECT revision, updated_at, body FROM conversations WHERE conversation_id = ?", (conversation_id,)
            ).fetchone()
        if row is None:
            raise _not_found(conversation_id)
        revision, updated_at, body = row
        try:
            fields = dict(ConversationRequest.model_validate_json(body))
        except ValidationError:
            raise NotReady(
                "The conversation cannot be read.", hint="A newer llmkit may have written it: upgrade this one."
            ) from None
        head = {"conversation_id": conversation_id, "revision": revision, "updated_at": _time(updated_at)}
        return Conversation.model_construct(**{**fields, **head})

    def _put(self, conversation_id: str, request: ConversationRequest) -> tuple[int, datetime]:
        body = request.model_dump_json(exclude_defaults=True, exclude={"revision"})
        size = len(body.encode())
        if size > MAX_CONVERSATION_BYTES:
            raise TooLarge(f"The conversation is larger than {MAX_CONVERSATION_BYTES} bytes.", hint="Begin a new one.")
        now = datetime.now(UTC)
        with self._opened().write() as connection:
            row = connection.execute(
                "SELECT revision FROM conversations WHERE conversation_id = ?", (conversation_id,)
            ).fetchone()
            kept = row[0] if row else 0
            if request.revision not in (None, kept):
                raise ConversationChanged(
                    f"The conversation has changed: revision {kept} is kept, this one follows {request.revision}."
                    if kept
                    else f"The conversation is not kept any more; this one follows revision {request.revision}.",
                    param="revision",
                    hint="GET it and send it again with its revision, or keep this one under another conversation_id.",
                    details={"revision": kept},
                )
            told = (request.title, request.model_id, len(request.turns), size, body)
            connection.execute(_PUT, (conversation_id, kept + 1, now.timestamp(), *told))
            connection.execute(_TRIM, (self._most, self._most_bytes))
        return kept + 1, now

    def _delete(self, conversation_id: str) -> None:
        with self._opened().write() as connection:
            found = connection.execute("DELETE FROM conversations WHERE conversation_id = ?", (conversation_id,))
            if not found.rowcount:
                raise _not_found(conversation_id)

    def _close(self) -> None:
        if self._database is not None:
            with contextlib.suppress(sqlite3.Error):
                self._database.close()


def _time(timestamp: float) -> datetime:
    return datetime.fromtimestamp(timestamp, UTC)


def _not_found(conversation_id: str) -> ConversationNotFound:
    return ConversationNotFound(
        f"There is no conversation {conversation_id[:64]!r}.",
        param="conversation_id",
        hint="GET /llm/conversations/ lists those that are kept.",
    )
