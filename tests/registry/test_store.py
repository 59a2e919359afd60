from __future__ import annotations

import os
import sqlite3
import stat
from pathlib import Path

import pytest

from llmkit.errors import ConfigurationExists, ConfigurationNotFound, NotReady
from llmkit.registry.store import Store, StoreTooNewError
from llmkit.schemas import Configuration


def configuration(model_id: str = "m", config_id: str = "c") -> Configuration:
    return Configuration(config_id=config_id, model_id=model_id, model_name="n", model_type="openai")


def test_what_is_stored_is_there_in_the_next_process(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.insert(configuration())
    store.insert(configuration("m2", "c2"))
    store.replace(configuration().model_copy(update={"description": "new"}))
    store.delete("c2")
    store.close()
    (stored,) = Store(tmp_path).all()
    assert stored.description == "new"


def test_two_connections_never_take_one_model_id_twice(tmp_path: Path) -> None:
    ours, theirs = Store(tmp_path), Store(tmp_path)
    version = ours.data_version()
    theirs.insert(configuration())
    assert ours.data_version() != version
    with pytest.raises(ConfigurationExists):
        ours.insert(configuration(config_id="other"))
    with pytest.raises(ConfigurationNotFound):
        ours.replace(configuration(config_id="other"))
    ours.close()
    theirs.close()


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX")
def test_the_file_is_for_its_user_alone(tmp_path: Path) -> None:
    store = Store(tmp_path / "state")
    store.insert(configuration())
    for path in (tmp_path / "state").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    store.close()


@pytest.mark.parametrize("content", [b"not a database at all, " * 100, b"SQLite format 3\x00" + b"\xff" * 4000])
def test_a_file_that_cannot_be_read_is_kept_aside_and_the_server_starts(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "llmkit.sqlite").write_bytes(content)
    store = Store(tmp_path)
    assert store.all() == []
    store.insert(configuration())
    (problem,) = store.problems
    (aside,) = tmp_path.glob("llmkit.sqlite.corrupt-*")
    assert aside.name in problem
    assert aside.read_bytes() == content
    store.close()


def test_a_file_that_somebody_holds_is_no_broken_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmkit.registry.store.BUSY_TIMEOUT_SECONDS", 0.1)
    Store(tmp_path).close()
    holder = sqlite3.connect(tmp_path / "llmkit.sqlite", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(NotReady, match="Another server"):
        Store(tmp_path)
    holder.execute("ROLLBACK")
    holder.close()
    assert not list(tmp_path.glob("*.corrupt-*"))


def test_a_row_of_a_newer_version_is_kept_and_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.insert(configuration())
    connection = sqlite3.connect(tmp_path / "llmkit.sqlite")
    body = '{"config_id": "new", "model_id": "new", "model_name": "n", "model_type": "openai", "from_later": 1}'
    connection.execute("INSERT INTO configurations VALUES ('new', 'new', ?, 1, 1)", (body,))
    connection.commit()
    connection.close()
    assert [stored.model_id for stored in store.all()] == ["m"]
    assert "new" in store.problems[0]
    assert store.config_ids() == {"c", "new"}
    store.close()


def test_an_empty_file_is_a_new_database(tmp_path: Path) -> None:
    (tmp_path / "llmkit.sqlite").touch()
    store = Store(tmp_path)
    assert (store.all(), store.problems) == ([], [])
    store.close()


def test_a_newer_schema_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.insert(configuration())
    store.close()
    connection = sqlite3.connect(tmp_path / "llmkit.sqlite")
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StoreTooNewError, match="Upgrade llmkit"):
        Store(tmp_path)
    assert not list(tmp_path.glob("*.corrupt-*"))
