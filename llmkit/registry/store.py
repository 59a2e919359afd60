"""Configurations in SQLite, shared by every server of one home.

All methods block; the registry calls them on one thread of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from llmkit.errors import ConfigurationExists, ConfigurationNotFound, DiskFull, LLMKitError, NotReady
from llmkit.schemas import Configuration

APPLICATION_ID = 0x6C6C6D6B  # "llmk": tells our file from any other SQLite database
SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE configurations (
    config_id TEXT PRIMARY KEY,
    model_id TEXT NOT NULL UNIQUE,
    body TEXT NOT NULL,
    created_at REAL NOT NULL,
    updated_at REAL NOT NULL
) STRICT
"""
BUSY_TIMEOUT_SECONDS = 5.0


class StoreTooNewError(LLMKitError):
    """The database was written by a newer llmkit; this one would damage it."""

    code = "store_too_new"


class Store:
    """One connection to the database of configurations.

    Parameters
    ----------
    folder
        The state folder; made with mode 0700 if it is missing.

    Raises
    ------
    StoreTooNewError
        If the file is from a newer version; it is left as it is.
    NotReady, DiskFull
        If another process holds it, or there is no room for it.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = folder / "llmkit.sqlite"
        self._problems: list[str] = []
        self._unreadable: list[str] = []
        try:
            self._connection = self._open()
        except sqlite3.DatabaseError as error:
            if not _is_broken(error):
                raise _explain(error, self.path) from error
            # Keep what is there for a person to look at, and go on with an empty store.
            aside = self.path.with_name(f"{self.path.name}.corrupt-{time.time_ns()}")
            for suffix in ("", "-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    self.path.with_name(self.path.name + suffix).rename(aside.with_name(aside.name + suffix))
            self._problems.append(f"the database could not be read; it was kept as {aside.name}")
            self._connection = self._open()

    @property
    def problems(self) -> list[str]:
        """What is wrong and was worked around, for ``GET /llm/health``."""
        return self._problems + self._unreadable

    def _open(self) -> sqlite3.Connection:
        # Created by us with 0600 before SQLite would create it with the umask's mode.
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
        connection = sqlite3.connect(
            self.path, timeout=BUSY_TIMEOUT_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            _use_wal(connection)
            connection.execute("PRAGMA synchronous = FULL")
            with self._transaction(connection):
                self._prepare(connection)
            if connection.execute("PRAGMA quick_check").fetchone() != ("ok",):
                raise sqlite3.DatabaseError("quick_check failed")
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        (application_id,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not tables and not version:
            connection.execute(SCHEMA)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            return
        if application_id != APPLICATION_ID or "configurations" not in tables:
            raise sqlite3.DatabaseError("not a database of llmkit")
        if version > SCHEMA_VERSION:
            raise StoreTooNewError(
                f"{self.path} has schema version {version}; this llmkit knows {SCHEMA_VERSION}.",
                hint="Upgrade llmkit, or set LLMKIT_STATE_DIR to another folder.",
            )

    @staticmethod
    @contextlib.contextmanager
    def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")

    @contextlib.contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        try:
            with self._transaction(self._connection):
                yield self._connection
        except sqlite3.OperationalError as error:
            raise _explain(error, self.path) from error

    def data_version(self) -> int:
        """Give a number that changes when another server has written."""
        (version,) = self._connection.execute("PRAGMA data_version").fetchone()
        return int(version)

    def all(self) -> list[Configuration]:
        """Read every configuration, oldest first; one that this version cannot read stays where it is."""
        rows = self._connection.execute("SELECT config_id, body FROM configurations ORDER BY created_at, config_id")
        configurations, self._unreadable = [], []
        for config_id, body in rows:
            try:
                configurations.append(Configuration.model_validate_json(body))
            except ValidationError:
                self._unreadable.append(f"configuration {config_id} cannot be read by this version; it was kept")
        return configurations

    def config_ids(self) -> set[str]:
        """Give the ID of every configuration, also of those that cannot be read."""
        return {config_id for (config_id,) in self._connection.execute("SELECT config_id FROM configurations")}

    def insert(self, configuration: Configuration) -> None:
        """Add a configuration.

        Raises
        ------
        ConfigurationExists
            If its ``model_id`` is taken, perhaps by another server a moment ago.
        """
        now = time.time()
        try:
            with self._write() as connection:
                connection.execute(
                    "INSERT INTO configurations VALUES (?, ?, ?, ?, ?)",
                    (configuration.config_id, configuration.model_id, _body(configuration), now, now),
                )
        except sqlite3.IntegrityError as error:
            raise ConfigurationExists(f"The model_id `{configuration.model_id}` is taken.") from error

    def replace(self, configuration: Configuration) -> None:
        """Replace the configuration of the same ``config_id``."""
        with self._write() as connection:
            cursor = connection.execute(
                "UPDATE configurations SET model_id = ?, body = ?, updated_at = ? WHERE config_id = ?",
                (configuration.model_id, _body(configuration), time.time(), configuration.config_id),
            )
            if not cursor.rowcount:
                raise ConfigurationNotFound(f"There is no configuration {configuration.config_id}.")

    def delete(self, config_id: str) -> None:
        """Delete a configuration; one that is gone already is no error."""
        with self._write() as connection:
            connection.execute("DELETE FROM configurations WHERE config_id = ?", (config_id,))

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def _is_broken(error: sqlite3.DatabaseError) -> bool:
    # Our own complaints carry no code; a file that is locked, or a disk that is full, is not broken.
    code = getattr(error, "sqlite_errorcode", None)
    return code is None or code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _explain(error: sqlite3.DatabaseError, path: Path) -> LLMKitError:
    code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return DiskFull("There is no room on the disk for the configurations.", hint=f"Free space at {path.parent}.")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return NotReady("Another server holds the database.", hint="Try again.")
    return NotReady(f"The database cannot be used: {error}.", hint=f"Look at {path}.")


def _use_wal(connection: sqlite3.Connection) -> None:
    # The change of mode does not wait for the busy timeout when servers start together.
    deadline = time.monotonic() + BUSY_TIMEOUT_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return


def _body(configuration: Configuration) -> str:
    return json.dumps(configuration.model_dump(exclude_none=True), allow_nan=False)
