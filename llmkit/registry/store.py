"""Configurations in SQLite, shared by every server of one home; who has which model; how loads went.

All methods block; the registry calls them on one thread of its own.
"""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llmkit.errors import ConfigurationExists, ConfigurationNotFound, ModelLiveElsewhere
from llmkit.registry.database import Database, json_object
from llmkit.schemas import Configuration

Alive = Callable[[str], bool]
"""Says whether a server lives."""
KEPT_LOADS = 5


class Store(Database):
    """What is in the database; parameters and errors are those of `Database`."""

    def __init__(self, folder: Path) -> None:
        self._unreadable: list[str] = []
        super().__init__(folder)

    @property
    def problems(self) -> list[str]:
        """What is wrong and was worked around, for ``GET /llm/health``."""
        return [*super().problems, *self._unreadable]

    def all(self) -> list[Configuration]:
        """Read every configuration, oldest first; one that this version cannot read stays where it is."""
        with self.read() as connection:
            rows = connection.execute(
                "SELECT config_id, body FROM configurations ORDER BY created_at, config_id"
            ).fetchall()
        configurations, self._unreadable = [], []
        for config_id, body in rows:
            try:
                configuration = Configuration.model_validate_json(body)
            except ValidationError:
                configuration = None
            if configuration is not None and configuration.config_id == config_id:
                configurations.append(configuration)
            else:
                self._unreadable.append(f"configuration {config_id} cannot be read by this version; it was kept")
        return configurations

    def config_ids(self) -> set[str]:
        """Give the ID of every configuration, also of those that cannot be read."""
        with self.read() as connection:
            return {config_id for (config_id,) in connection.execute("SELECT config_id FROM configurations")}

    def insert(self, configuration: Configuration) -> None:
        """Add a configuration.

        Raises
        ------
        ConfigurationExists
            If its ``model_id`` is taken, perhaps by another server a moment ago.
        """
        now = time.time()
        row = (configuration.config_id, configuration.model_id, _body(configuration), now, now)
        with self.write() as connection:
            try:
                connection.execute("INSERT INTO configurations VALUES (?, ?, ?, ?, ?)", row)
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
        with self.write() as connection:
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
        with self.write() as connection:
            _check_not_live_elsewhere(connection, config_id, server_id, alive)
            for table in ("configurations", "live", "loads"):
                connection.execute(f"DELETE FROM {table} WHERE config_id = ?", (config_id,))  # noqa: S608  # ours

    def check_not_live_elsewhere(self, config_id: str, server_id: str, alive: Alive) -> None:
        """Raise `ModelLiveElsewhere` where `replace` and `delete` would."""
        with self.read() as connection:
            _check_not_live_elsewhere(connection, config_id, server_id, alive)

    # -- servers and loads -----------------------------------------------------------------------------------

    def register(self, server_id: str, url: str, alive: Alive) -> None:
        """Tell the other servers of this home who this one is, and forget those that live no longer."""
        row = (server_id, url, socket.gethostname(), os.getpid(), time.time())
        with self.write() as connection:
            for (other,) in connection.execute("SELECT server_id FROM servers").fetchall():
                if not alive(other):
                    _forget(connection, other)
            connection.execute("INSERT OR REPLACE INTO servers VALUES (?, ?, ?, ?, ?)", row)

    def unregister(self, server_id: str) -> None:
        """Take back what a server has told."""
        with self.write() as connection:
            _forget(connection, server_id)

    def claim(self, config_id: str, server_id: str) -> None:
        """Tell that a server loads a model, or raise `ConfigurationNotFound` if it was deleted."""
        with self.write() as connection:
            found = connection.execute("SELECT 1 FROM configurations WHERE config_id = ?", (config_id,)).fetchone()
            if found is None:
                raise ConfigurationNotFound(f"There is no configuration {config_id}.", param="config_id")
            connection.execute("INSERT OR IGNORE INTO live VALUES (?, ?)", (config_id, server_id))

    def release(self, config_id: str, server_id: str) -> None:
        """Tell that a server has a model no longer."""
        with self.write() as connection:
            connection.execute("DELETE FROM live WHERE config_id = ? AND server_id = ?", (config_id, server_id))

    def owners(self, server_id: str, alive: Alive) -> dict[str, str]:
        """Give the address of each other server that lives and has a model, by ``config_id``."""
        with self.read() as connection:
            rows = connection.execute(
                "SELECT config_id, live.server_id, url FROM live LEFT JOIN servers USING (server_id) "
                "WHERE live.server_id IS NOT ?",
                (server_id,),
            ).fetchall()
        return {config_id: url or "another server" for config_id, other, url in rows if alive(other)}

    def add_load(
        self, config_id: str, engine_hash: str, started_at: float, seconds: float, body: dict[str, Any]
    ) -> None:
        """Remember how a load went; the last few of a configuration are kept."""
        row = (config_id, engine_hash, started_at, seconds, json.dumps(body))
        with self.write() as connection:
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
        with self.read() as connection:
            row = connection.execute(
                "SELECT body FROM loads WHERE config_id = ? AND engine_hash = ? ORDER BY id DESC LIMIT 1",
                (config_id, engine_hash),
            ).fetchone()
        return json_object(row[0]) if row else None


def _forget(connection: sqlite3.Connection, server_id: str) -> None:
    connection.execute("DELETE FROM servers WHERE server_id = ?", (server_id,))
    connection.execute("DELETE FROM live WHERE server_id = ?", (server_id,))


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


def _body(configuration: Configuration) -> str:
    return json.dumps(configuration.model_dump(exclude_none=True), allow_nan=False)
