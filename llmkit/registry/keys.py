"""Keys for tools: made, looked up and revoked, in a file that every server of one home reads.

The file has digests alone. A slow hash, as for passwords, would add nothing: a key is 256 random bits, which nobody
finds by trying, and it is looked up at every request.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from llmkit.engines.base import does_not_fit
from llmkit.errors import KeyExists, KeyNotFound, LLMKitError, NotAuthenticated, WrongState
from llmkit.registry.database import Database, Schema, explain
from llmkit.tool_keys import MOST_SECONDS, NewToolKey, ToolKey, ToolKeyRequest, new_key

MOST_KEYS: Final = 1000
REFRESH_SECONDS: Final = 0.5
_MINUTE: Final = 60.0

T = TypeVar("T")


class _KeyFile(Database):
    schema = Schema(
        "keys.sqlite",
        0x6C6C6D74,  # "llmt"
        [
            [
                """
                CREATE TABLE keys (
                    digest TEXT PRIMARY KEY,
                    name TEXT NOT NULL UNIQUE,
                    models TEXT NOT NULL,
                    created_at REAL NOT NULL,
                    expires_at REAL,
                    last_used_at REAL
                ) STRICT
                """
            ]
        ],
        "keys for tools",
    )


class ToolKeys:
    """The keys for tools of one home.

    SQLite lives on one thread; requests look in a table in memory, which that thread replaces as a whole after every
    change. The file is made with the first key.

    Parameters
    ----------
    state_dir
        The state folder.
    logger
        For what a person should read in the server's log.
    """

    def __init__(self, state_dir: Path, logger: logging.Logger) -> None:
        self._state_dir = state_dir
        self._log = logger
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="llmkit-keys")
        self._file: _KeyFile | None = None
        self._version: int | None = None
        self._by_digest: dict[str, ToolKey] = {}
        self._used: dict[str, float] = {}
        self._problem: str | None = None

    # -- looking -------------------------------------------------------------------------------------------

    def find(self, text: str) -> ToolKey:
        """Give the key with this text, and note its use.

        Raises
        ------
        NotAuthenticated
            If there is none, or it has expired.
        """
        # Found by its digest: how long that takes tells nothing, since nobody can choose what a text's digest begins
        # with, let alone go from there to a key.
        digest = _digest(text)
        key = self._by_digest.get(digest)
        if key is None:
            raise NotAuthenticated(
                "This key is not known here; it may have been revoked.", hint="`llmkit key create` makes another."
            )
        if _is_over(key):
            raise NotAuthenticated(
                f"The key `{key.name}` has expired.", hint="Revoke it, and make another: `llmkit key create`."
            )
        self._used[digest] = time.time() // _MINUTE * _MINUTE
        return key

    def all(self) -> list[ToolKey]:
        """Give what is known of every key, oldest first."""
        keys = sorted(self._by_digest.items(), key=lambda item: (item[1].created_at, item[1].name))
        return [self._told(digest, key) for digest, key in keys]

    def _told(self, digest: str, key: ToolKey) -> ToolKey:
        used, here = key.last_used_at, _time(self._used.get(digest))
        last = max(filter(None, (used, here)), default=None)
        return key.model_copy(update={"last_used_at": last, "expired": _is_over(key)})

    def problems(self) -> list[str]:
        """Say what is wrong with the file."""
        file = self._file
        return [*(file.problems if file is not None else []), *([self._problem] if self._problem else [])]

    # -- changing ------------------------------------------------------------------------------------------

    async def create(self, request: ToolKeyRequest) -> NewToolKey:
        """Make a key.

        Raises
        ------
        DoesNotFit
            If it would have expired already.
        KeyExists
            If there is one of this name.
        WrongState
            If there are too many.
        DiskFull, NotReady
        """
        now = datetime.now(UTC).replace(microsecond=0)
        expires = request.expires_at
        if request.expires_in is not None:
            expires = now + timedelta(seconds=request.expires_in)
        if expires is not None and expires <= datetime.now(UTC):
            raise does_not_fit([{"path": "expires_at", "message": "is over already"}])
        if expires is not None and expires > now + timedelta(seconds=MOST_SECONDS):
            raise does_not_fit([{"path": "expires_at", "message": "is more than 100 years ahead"}])
        expires = expires.astimezone(UTC) if expires is not None else None
        name = request.name or f"key-{os.urandom(4).hex()}"
        made = NewToolKey(name=name, models=request.models, created_at=now, expires_at=expires, key=new_key())
        await self._on_disk(self._insert, made)
        return made

    async def revoke(self, name: str) -> None:
        """Delete a key, which opens nothing from now on, or raise `KeyNotFound`."""
        await self._on_disk(self._delete, name)

    def _insert(self, made: NewToolKey) -> None:
        expires = made.expires_at.timestamp() if made.expires_at is not None else None
        row = (_digest(made.key), made.name, json.dumps(made.models), made.created_at.timestamp(), expires)
        file = self._opened()
        with file.write() as connection:
            (count,) = connection.execute("SELECT count(*) FROM keys").fetchone()
            if count >= MOST_KEYS:
                raise WrongState(f"There are {count} keys already.", hint="Revoke those that nobody uses.")
            try:
                connection.execute("INSERT INTO keys VALUES (?, ?, ?, ?, ?, NULL)", row)
            except sqlite3.IntegrityError as error:
                raise KeyExists(
                    f"There is a key `{made.name}` already.", param="name", hint="Choose another name, or revoke it."
                ) from error
        self._read(file)

    def _delete(self, name: str) -> None:
        found = 0
        if self._file is not None or self._is_there():
            file = self._opened()
            with file.write() as connection:
                found = connection.execute("DELETE FROM keys WHERE name = ?", (name,)).rowcount
            self._read(file)
        if not found:
            raise KeyNotFound(f"There is no key {name[:64]!r}.", param="name", hint="GET /llm/keys/ lists them.")

    # -- the file ------------------------------------------------------------------------------------------

    async def follow(self) -> None:
        """Take over, for ever, what other servers of the home change, and write down which keys are in use."""
        while True:
            await self.catch_up()
            await asyncio.sleep(REFRESH_SECONDS)

    async def catch_up(self) -> None:
        """Read the file if it has changed; what cannot be read is a problem, and the table stays as it is."""
        try:
            await self._on_disk(self._catch_up)
            self._problem = None
        except LLMKitError as error:
            problem = f"the keys for tools cannot be read again: {error.message}"
            if problem != self._problem:
                self._log.warning("%s", problem)
            self._problem = problem

    def _catch_up(self) -> None:
        if self._file is None and not self._is_there():
            return
        file = self._opened()
        if file.data_version() != self._version:
            self._read(file)
        used = {d: at for d, at in list(self._used.items()) if (k := self._by_digest.get(d)) and _is_later(at, k)}
        if used:
            with file.write() as connection:
                connection.executemany(
                    "UPDATE keys SET last_used_at = max(ifnull(last_used_at, 0), ?) WHERE digest = ?",
                    [(at, digest) for digest, at in used.items()],
                )
            self._read(file)

    def _is_there(self) -> bool:
        return (self._state_dir / _KeyFile.schema.file_name).exists()

    def _opened(self) -> _KeyFile:
        if self._file is None:
            self._file = _KeyFile(self._state_dir)
        return self._file

    def _read(self, file: _KeyFile) -> None:
        # Before the reading: a change between the two is then seen again, not missed.
        version = file.data_version()
        with file.read() as connection:
            rows = connection.execute(
                "SELECT digest, name, models, created_at, expires_at, last_used_at FROM keys"
            ).fetchall()
        self._by_digest = {row[0]: key for row in rows if (key := _key_of(*row[1:])) is not None}
        self._used = {digest: at for digest, at in list(self._used.items()) if digest in self._by_digest}
        self._version = version

    async def _on_disk(self, function: Callable[..., T], *args: object) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._disk, partial(function, *args))
        except OSError as error:
            raise explain(error, self._state_dir, _KeyFile.schema.contents) from error

    async def close(self) -> None:
        """Write down which keys were used, and close the file."""
        await self.catch_up()
        if self._file is not None:
            await self._on_disk(self._file.close)
        self._disk.shutdown(wait=False)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _key_of(
    name: str, models: str, created_at: float, expires_at: float | None, last_used_at: float | None
) -> ToolKey | None:
    try:
        return ToolKey(
            name=name,
            models=json.loads(models),
            created_at=datetime.fromtimestamp(created_at, UTC),
            expires_at=_time(expires_at),
            last_used_at=_time(last_used_at),
        )
    except (ValueError, OverflowError):  # a row that somebody has changed by hand opens nothing
        return None


def _time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def _is_over(key: ToolKey) -> bool:
    return key.expires_at is not None and key.expires_at <= datetime.now(UTC)


def _is_later(used_at: float, key: ToolKey) -> bool:
    return key.last_used_at is None or used_at > key.last_used_at.timestamp()
