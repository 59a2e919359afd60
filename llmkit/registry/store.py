"""Configurations in SQLite, shared by every server of one home.

All methods block; the registry calls them on one thread of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llmkit.errors import (
    ConfigurationExists,
    ConfigurationNotFound,
    DiskFull,
    LLMKitError,
    ModelLiveElsewhere,
    NotReady,
)
from llmkit.schemas import Configuration, StoreCondition

Alive = Callable[[str], bool]
"""Says whether a server lives."""

APPLICATION_ID = 0x6C6C6D6B  # "llmk": tells our file from any other SQLite database
MIGRATIONS = [
    [
        """
        CREATE TABLE configurations (
            config_id TEXT PRIMARY KEY,
            model_id TEXT NOT NULL UNIQUE,
            body TEXT NOT NULL,
            created_at REAL NOT NULL,
            updated_at REAL NOT NULL
        ) STRICT
        """
    ],
    [
        """
        CREATE TABLE servers (
            server_id TEXT PRIMARY KEY,
            url TEXT NOT NULL,
            host TEXT NOT NULL,
            pid INTEGER NOT NULL,
            started_at REAL NOT NULL
        ) STRICT
        """,
        """
        CREATE TABLE live (
            config_id TEXT NOT NULL,
            server_id TEXT NOT NULL,
            PRIMARY KEY (config_id, server_id)
        ) STRICT
        """,
        """
        CREATE TABLE loads (
            id INTEGER PRIMARY KEY,
            config_id TEXT NOT NULL,
            engine_hash TEXT NOT NULL,
            started_at REAL NOT NULL,
            seconds REAL NOT NULL,
            body TEXT NOT NULL
        ) STRICT
        """,
    ],
]
"""What makes each version of the schema out of the one before."""
SCHEMA_VERSION = len(MIGRATIONS)
KEPT_LOADS = 5
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

    def condition(self) -> StoreCondition:
        """Say how the configurations are stored."""
        return StoreCondition(path=str(self.path), journal_mode=self._journal_mode, schema_version=SCHEMA_VERSION)

    def _open(self) -> sqlite3.Connection:
        # Created by us with 0600 before SQLite would create it with the umask's mode.
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
        connection = sqlite3.connect(
            self.path, timeout=BUSY_TIMEOUT_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            self._journal_mode = _journal_mode(connection, self.path)
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
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        elif application_id != APPLICATION_ID or "configurations" not in tables:
            raise sqlite3.DatabaseError("not a database of llmkit")
        if version > SCHEMA_VERSION:
            raise StoreTooNewError(
                f"{self.path} has schema version {version}; this llmkit knows {SCHEMA_VERSION}.",
                hint="Upgrade llmkit, or set LLMKIT_STATE_DIR to another folder.",
            )
        for steps in MIGRATIONS[version:]:
            for step in steps:
                connection.execute(step)
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    @staticmethod
    @contextlib.contextmanager
    def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:  # SQLite has rolled back by itself after some errors, a full disk for one
                connection.execute("ROLLBACK")
            raise

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

    def replace(
        self, configuration: Configuration, *, server_id: str | None = None, alive: Alive | None = None
    ) -> None:
        """Replace the configuration of the same ``config_id``.

        Parameters
        ----------
        server_id, alive
            Who asks, and how to tell whether another server lives; without them nobody is asked.

        Raises
        ------
        ModelLiveElsewhere
            If another server has it loaded.
        """
        with self._write() as connection:
            _check_not_live_elsewhere(connection, configuration.config_id, server_id, alive)
            cursor = connection.execute(
                "UPDATE configurations SET model_id = ?, body = ?, updated_at = ? WHERE config_id = ?",
                (configuration.model_id, _body(configuration), time.time(), configuration.config_id),
            )
            if not cursor.rowcount:
                raise ConfigurationNotFound(f"There is no configuration {configuration.config_id}.")

    def delete(self, config_id: str, *, server_id: str | None = None, alive: Alive | None = None) -> None:
        """Delete a configuration and what its loads have taught; one that is gone already is no error.

        Parameters and errors are those of `replace`.
        """
        with self._write() as connection:
            _check_not_live_elsewhere(connection, config_id, server_id, alive)
            for table in ("configurations", "live", "loads"):
                connection.execute(f"DELETE FROM {table} WHERE config_id = ?", (config_id,))  # noqa: S608  # ours

    # -- servers and loads -----------------------------------------------------------------------------------

    def register(self, server_id: str, url: str) -> None:
        """Tell the other servers of this home who this one is."""
        row = (server_id, url, socket.gethostname(), os.getpid(), time.time())
        with self._write() as connection:
            connection.execute("INSERT OR REPLACE INTO servers VALUES (?, ?, ?, ?, ?)", row)

    def unregister(self, server_id: str) -> None:
        """Take back what a server has told."""
        with self._write() as connection:
            connection.execute("DELETE FROM servers WHERE server_id = ?", (server_id,))
            connection.execute("DELETE FROM live WHERE server_id = ?", (server_id,))

    def claim(self, config_id: str, server_id: str) -> None:
        """Tell that a server loads a model, or raise `ConfigurationNotFound` if it was deleted."""
        with self._write() as connection:
            found = connection.execute("SELECT 1 FROM configurations WHERE config_id = ?", (config_id,)).fetchone()
            if found is None:
                raise ConfigurationNotFound(f"There is no configuration {config_id}.", param="config_id")
            connection.execute("INSERT OR IGNORE INTO live VALUES (?, ?)", (config_id, server_id))

    def release(self, config_id: str, server_id: str) -> None:
        """Tell that a server has a model no longer."""
        with self._write() as connection:
            connection.execute("DELETE FROM live WHERE config_id = ? AND server_id = ?", (config_id, server_id))

    def add_load(
        self, config_id: str, engine_hash: str, started_at: float, seconds: float, body: dict[str, Any]
    ) -> None:
        """Remember how a load went; the last few of a configuration are kept."""
        row = (config_id, engine_hash, started_at, seconds, json.dumps(body))
        with self._write() as connection:
            connection.execute(
                "INSERT INTO loads (config_id, engine_hash, started_at, seconds, body) VALUES (?, ?, ?, ?, ?)", row
            )
            connection.execute(
                "DELETE FROM loads WHERE config_id = ? AND id NOT IN "
                "(SELECT id FROM loads WHERE config_id = ? ORDER BY id DESC LIMIT ?)",
                (config_id, config_id, KEPT_LOADS),
            )

    def last_load(self, config_id: str, engine_hash: str) -> dict[str, Any] | None:
        """Give how the last load of a configuration with these engine arguments went."""
        row = self._connection.execute(
            "SELECT body FROM loads WHERE config_id = ? AND engine_hash = ? ORDER BY id DESC LIMIT 1",
            (config_id, engine_hash),
        ).fetchone()
        body = json.loads(row[0]) if row else None
        return body if isinstance(body, dict) else None

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


def _check_not_live_elsewhere(
    connection: sqlite3.Connection, config_id: str, server_id: str | None, alive: Alive | None
) -> None:
    if alive is None:
        return
    rows = connection.execute(
        "SELECT live.server_id, url, host, pid FROM live LEFT JOIN servers USING (server_id) "
        "WHERE config_id = ? AND live.server_id IS NOT ?",
        (config_id, server_id),
    ).fetchall()
    for other, url, host, pid in rows:
        if alive(other):
            raise ModelLiveElsewhere(
                f"Another Jupyter server has this model loaded: {url or 'address not known'} "
                f"(process {pid} on {host}).",
                hint="Unload it there first.",
                details={"url": url, "host": host, "pid": pid},
            )
        connection.execute("DELETE FROM live WHERE server_id = ?", (other,))


def _journal_mode(connection: sqlite3.Connection, path: Path) -> str:
    """Use WAL where the file system can, and say which mode is used.

    Network file systems cannot share memory between processes; some show it only at the first write, so it is
    tried on a scratch file.
    """
    scratch = path.with_name(f"{path.name}.probe-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        if _wal_works(scratch):
            _use_wal(connection)
            return "wal"
    finally:
        for suffix in ("", "-wal", "-shm", "-journal"):
            with contextlib.suppress(OSError):
                scratch.with_name(scratch.name + suffix).unlink(missing_ok=True)
    return str(connection.execute("PRAGMA journal_mode = DELETE").fetchone()[0])


def _wal_works(scratch: Path) -> bool:
    connections = []
    try:
        for _ in range(2):  # the second one needs what the first has put into the shared memory
            connection = sqlite3.connect(scratch, timeout=BUSY_TIMEOUT_SECONDS, isolation_level=None)
            connections.append(connection)
            if connection.execute("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
                return False
            connection.execute("CREATE TABLE IF NOT EXISTS probe (one INTEGER)")
            connection.execute("INSERT INTO probe VALUES (1)")
        (rows,) = connections[0].execute("SELECT count(*) FROM probe").fetchone()
        return bool(rows == 2)
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_FULL:
            raise
        return False
    finally:
        for connection in connections:
            connection.close()


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
