"""The file of a database: opened, migrated, read and written; what is broken is kept aside, and saved from.

All methods block; the registry calls them on one thread of its own for each file.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from llmkit.errors import DiskFull, LLMKitError, NotReady
from llmkit.registry.presence import one_at_a_time
from llmkit.schemas import StoreCondition

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
BUSY_TIMEOUT_SECONDS = 5.0
OPENING_SECONDS = 20.0
_PROBE_AGE_SECONDS = 3600.0


class StoreTooNewError(LLMKitError):
    """The database was written by a newer llmkit; this one would damage it."""

    code = "store_too_new"


@dataclass(frozen=True)
class Schema:
    """What is in one file of a state folder.

    Attributes
    ----------
    file_name
        Its name in the folder.
    application_id
        Tells it from any other SQLite database, also from others of ours.
    migrations
        What makes each version of the schema out of the one before.
    contents
        What it holds, for messages.
    is_salvaged
        Whether what can be read of a broken file is taken over into the new one. Only the configurations are.
    """

    file_name: str
    application_id: int
    migrations: Sequence[Sequence[str]]
    contents: str
    is_salvaged: bool = False

    @property
    def version(self) -> int:
        """The version that the migrations lead to."""
        return len(self.migrations)


CONFIGURATIONS = Schema("llmkit.sqlite", APPLICATION_ID, MIGRATIONS, "configurations", is_salvaged=True)


class Database:
    """One connection to a database: that of the configurations, unless a subclass has another schema.

    Parameters
    ----------
    folder
        The state folder; made with mode 0700 if it is missing.

    Attributes
    ----------
    schema
        What is in the file.

    Raises
    ------
    StoreTooNewError
        If the file is from a newer version; it is left as it is.
    NotReady, DiskFull
        If another process holds it, or there is no room for it.
    OSError
        If the folder cannot be used.
    """

    schema: ClassVar[Schema] = CONFIGURATIONS

    def __init__(self, folder: Path) -> None:
        self.path = folder / self.schema.file_name
        self._problems: list[str] = []
        self._openings = 0
        self._file: tuple[int, int] | None = None
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._open()
        except (sqlite3.Error, TimeoutError) as error:
            raise explain(error, self.path, self.schema.contents) from error
        except OSError as error:
            if _is_full(error):
                raise explain(error, self.path, self.schema.contents) from error
            raise

    @property
    def problems(self) -> list[str]:
        """What is wrong and was worked around, for ``GET /llm/health``."""
        return list(self._problems)

    def condition(self) -> StoreCondition:
        """Say how the rows are stored."""
        return StoreCondition(path=str(self.path), journal_mode=self._journal_mode, schema_version=self.schema.version)

    @property
    def has_lost(self) -> bool:
        """Whether a database was kept aside: what is not in this one may be in that."""
        return any(self.path.parent.glob(f"{self.path.name}.corrupt-*"))

    # -- opening ---------------------------------------------------------------------------------------------

    def _open(self) -> None:
        # One at a time: a second server would take the new file aside for the broken one that the first has found.
        with one_at_a_time(self.path.with_name(f"{self.path.name}.lock"), OPENING_SECONDS):
            aside = None
            connection = self._connect()
            try:
                self._prepare(connection)
            except BaseException as error:
                if not _is_broken(error):
                    connection.close()
                    raise
                aside = self._set_aside(connection)
            if aside is not None:
                connection = self._start_anew(aside)
            self._connection = connection
            self._file = _identity(self.path)
            self._openings += 1

    def _reopen(self) -> None:
        self._file = None
        old = self._connection
        try:
            self._open()
        finally:
            old.close()  # only now: the first to close a file that was not moved writes the WAL into it

    def _set_aside(self, connection: sqlite3.Connection) -> Path:
        """Keep what is there for a person to look at."""
        if sys.platform == "win32":  # where an open file cannot be moved
            connection.close()
        aside = self.path.with_name(f"{self.path.name}.corrupt-{time.time_ns()}")
        try:
            for suffix in ("-wal", "-shm", ""):
                with contextlib.suppress(FileNotFoundError):
                    self.path.with_name(self.path.name + suffix).rename(aside.with_name(aside.name + suffix))
        finally:
            connection.close()  # only now, since SQLite writes the WAL into a file that was not moved
        return aside

    def _start_anew(self, aside: Path) -> sqlite3.Connection:
        """Go on with a new file, and with what can be read of the one that was kept aside."""
        connection = self._connect()
        try:
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        problem = f"the database could not be read; it was kept as {aside.name}"
        if self.schema.is_salvaged:
            try:
                with self._transaction(connection):
                    saved = _salvage(aside, connection, self.schema)
            except (sqlite3.Error, UnicodeDecodeError, OSError):
                saved = 0
            problem += f", {self.schema.contents} saved from it: {saved}"
        self._problems.append(problem)
        return connection

    def _connect(self) -> sqlite3.Connection:
        # Created by us with 0600 before SQLite would create it with the umask's mode. Never opened by us if it is
        # there: closing it would drop the locks that this process holds on it.
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        connection = sqlite3.connect(
            self.path, timeout=BUSY_TIMEOUT_SECONDS, isolation_level=None, check_same_thread=False
        )
        connection.text_factory = _text  # one bad byte in one row must not hide all others
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        wal = _probe(self.path)
        if not wal:  # a file in WAL mode can then be read only without the shared memory
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        _check_readable(connection, self.path, self.schema)
        self._journal_mode = _use_wal(connection) if wal else _use_journal(connection)
        connection.execute("PRAGMA synchronous = FULL")
        with self._transaction(connection):
            _migrate(connection, self.schema)

    @staticmethod
    @contextlib.contextmanager
    def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
        if connection.in_transaction:  # the rollback of the last one failed, too
            connection.execute("ROLLBACK")
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:  # SQLite has rolled back by itself after some errors, a full disk for one
                with contextlib.suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """Give the connection; what SQLite raises leaves as an error of ours.

        A file that turns out to be broken is kept aside like one that is found at the opening; who asked has to ask
        again, since nobody knows how far the first try came.
        """
        try:
            if self._file is None or _identity(self.path) != self._file:
                # Another server has kept the file aside. What is written to the old one would be lost.
                self._reopen()
            yield self._connection
        except (sqlite3.Error, UnicodeDecodeError, OSError) as error:
            if _is_broken(error):
                with contextlib.suppress(sqlite3.Error, UnicodeDecodeError, OSError):  # the next call tries again
                    self._reopen()
            raise explain(error, self.path, self.schema.contents) from error

    @contextlib.contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """Give the connection within a transaction, which ends with the block; errors are those of `read`."""
        with self.read() as connection, self._transaction(connection):
            yield connection

    # -- configurations --------------------------------------------------------------------------------------

    def data_version(self) -> int:
        """Give a number that changes when another server has written, or the file is another."""
        with self.read() as connection:
            (version,) = connection.execute("PRAGMA data_version").fetchone()
        return int(version) + (self._openings << 32)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


class _DamagedError(sqlite3.DatabaseError):
    """What SQLite can read, but is not what we have written."""


def _code(error: BaseException) -> int:
    return (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF


def _is_broken(error: BaseException) -> bool:
    # A file that is locked, or a disk that is full, is not broken. What SQLite says of a broken schema has the names
    # in it, and cannot always be decoded.
    return isinstance(error, _DamagedError | UnicodeDecodeError) or _code(error) in (
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
    )


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return _code(error) == sqlite3.SQLITE_FULL


def explain(error: Exception, path: Path, contents: str = CONFIGURATIONS.contents) -> LLMKitError:
    """Make an error of ours out of one of SQLite or of the system."""
    if _is_full(error):
        return DiskFull(f"There is no room on the disk for the {contents}.", hint=f"Free space at {path.parent}.")
    if isinstance(error, TimeoutError) or _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return NotReady("Another server holds the database.", hint="Try again.")
    if _is_broken(error):
        return NotReady("The database was damaged.", hint="Try again; GET /llm/health says what was done.")
    return NotReady(f"The {contents} cannot be used: {error}.", hint=f"Look at {path}.")


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _text(raw: bytes) -> str | bytes:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw


def json_object(text: object) -> dict[str, Any] | None:
    """Read a JSON object, or give None if it is none."""
    try:
        value = json.loads(text) if isinstance(text, str) else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


# -- what is in a file -----------------------------------------------------------------------------------------


def _check_readable(connection: sqlite3.Connection, path: Path, schema: Schema) -> None:
    """Look, before anything is changed, whether this file is ours to change."""
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    # Not quick_check: an ID that differs from the index's would be taken for another configuration.
    if connection.execute("PRAGMA integrity_check").fetchone() != ("ok",):
        raise _DamagedError("integrity_check failed")
    if application_id == schema.application_id and version > schema.version:
        raise StoreTooNewError(
            f"{path} has schema version {version}; this llmkit knows {schema.version}.",
            hint="Upgrade llmkit, or set LLMKIT_STATE_DIR to another folder.",
        )
    if (application_id or version or _columns(connection)) and application_id != schema.application_id:
        raise _DamagedError("not a database of llmkit")


def _migrate(connection: sqlite3.Connection, schema: Schema) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if not 0 <= version <= schema.version:
        raise _DamagedError(f"no schema has version {version}")
    try:
        for steps in schema.migrations[version:]:
            for step in steps:
                connection.execute(step)
    except sqlite3.OperationalError as error:
        if _code(error) == sqlite3.SQLITE_ERROR:  # a table is there already: it is not of the version that it says
            raise _DamagedError(str(error)) from error
        raise
    if not _ideal_columns(schema) <= _columns(connection):
        raise _DamagedError("the tables are not ours")
    if version < schema.version:
        connection.execute(f"PRAGMA application_id = {schema.application_id}")
        connection.execute(f"PRAGMA user_version = {schema.version}")


def _columns(connection: sqlite3.Connection) -> set[tuple[str, str, str]]:
    return set(
        connection.execute(
            "SELECT tables.name, columns.name, columns.type "
            "FROM sqlite_master AS tables, pragma_table_info(tables.name) AS columns WHERE tables.type = 'table'"
        )
    )


def _ideal_columns(schema: Schema) -> set[tuple[str, str, str]]:
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        for step in itertools.chain(*schema.migrations):
            connection.execute(step)
        return _columns(connection)


def _salvage(aside: Path, connection: sqlite3.Connection, schema: Schema) -> int:
    """Copy every row that can still be read, and give the number of configurations.

    Two tries: as the file is, and with the first page of a new database in the place of its own. That page says
    where each table is, always the same, and is the one whose loss hides all others.
    """
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder) / "scratch"
        for renewed in (False, True):
            # A copy, since SQLite would change what it opens.
            for suffix in ("", "-wal"):
                with contextlib.suppress(FileNotFoundError):
                    shutil.copyfile(aside.with_name(aside.name + suffix), scratch.with_name(scratch.name + suffix))
            if renewed:
                _renew_first_page(scratch, schema)
            _copy_rows(scratch, connection, schema)
    (count,) = connection.execute("SELECT count(*) FROM configurations").fetchone()
    return int(count)


def _renew_first_page(path: Path, schema: Schema) -> None:
    new = path.with_name("new")
    with contextlib.closing(sqlite3.connect(new, isolation_level=None)) as connection:
        for step in itertools.chain(*schema.migrations):
            connection.execute(step)
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    page = bytearray(new.read_bytes()[:size])
    new.unlink()
    page[28:32] = (path.stat().st_size // size).to_bytes(4, "big")
    with path.open("r+b") as file:
        file.write(page)


def _copy_rows(source: Path, connection: sqlite3.Connection, schema: Schema) -> None:
    with contextlib.closing(sqlite3.connect(source, isolation_level=None)) as broken:
        broken.text_factory = _text
        tables = {table for table, _, _ in _ideal_columns(schema)}
        for table, order in itertools.product(tables, ("ASC", "DESC")):  # up to a bad page from both sides
            with contextlib.suppress(sqlite3.Error, UnicodeDecodeError):
                broken.execute("PRAGMA writable_schema = ON")  # reads what it can of a schema that is damaged
                for row in broken.execute(f"SELECT * FROM {table} ORDER BY rowid {order}"):  # noqa: S608  # ours
                    if table == "configurations":
                        body = json_object(row[2])
                        if body is None or (body.get("config_id"), body.get("model_id")) != row[:2]:
                            continue
                    with contextlib.suppress(sqlite3.Error):
                        marks = ", ".join("?" * len(row))
                        connection.execute(f"INSERT OR IGNORE INTO {table} VALUES ({marks})", row)  # noqa: S608


# -- the journal -----------------------------------------------------------------------------------------------


def _probe(path: Path) -> bool:
    """Say whether WAL can be used in a folder.

    Network file systems cannot share memory between processes; some show it only at the first write, so it is
    tried on a scratch file.
    """
    for left in path.parent.glob(f"{path.name}.probe-*"):  # by a server that was killed
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _PROBE_AGE_SECONDS:
                left.unlink()
    scratch = path.with_name(f"{path.name}.probe-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        return _wal_works(scratch)
    finally:
        for suffix in ("", "-wal", "-shm", "-journal"):
            with contextlib.suppress(OSError):
                scratch.with_name(scratch.name + suffix).unlink(missing_ok=True)


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


def _use_wal(connection: sqlite3.Connection) -> str:
    # The change of mode does not wait for the busy timeout when servers start together.
    deadline = time.monotonic() + BUSY_TIMEOUT_SECONDS
    while True:
        try:
            return str(connection.execute("PRAGMA journal_mode = WAL").fetchone()[0])
        except sqlite3.OperationalError as error:
            if _code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _use_journal(connection: sqlite3.Connection) -> str:
    mode = str(connection.execute("PRAGMA journal_mode = DELETE").fetchone()[0])
    connection.execute("PRAGMA locking_mode = NORMAL")
    connection.execute("SELECT 1 FROM sqlite_master").fetchone()  # gives the lock back
    return mode
