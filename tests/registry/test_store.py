from __future__ import annotations

import json
import os
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from llmkit.errors import ConfigurationExists, ConfigurationNotFound, ModelLiveElsewhere, NotReady
from llmkit.registry.database import SCHEMA_VERSION, StoreTooNewError
from llmkit.registry.presence import Presence
from llmkit.registry.store import KEPT_LOADS, Store
from llmkit.schemas import Configuration


def configuration(model_id: str = "m", config_id: str = "c") -> Configuration:
    return Configuration(config_id=config_id, model_id=model_id, model_name="n", model_type="openai")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


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
    assert {f"llmkit.sqlite{suffix}" for suffix in ("", "-wal", "-shm")} <= names(tmp_path / "state")
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
    monkeypatch.setattr("llmkit.registry.database.BUSY_TIMEOUT_SECONDS", 0.1)
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
    connection.execute("PRAGMA journal_mode = DELETE")  # perhaps for a reason of the newer version's own
    connection.close()
    before = (tmp_path / "llmkit.sqlite").read_bytes()
    with pytest.raises(StoreTooNewError, match="Upgrade llmkit"):
        Store(tmp_path)
    assert (tmp_path / "llmkit.sqlite").read_bytes() == before
    assert names(tmp_path) == {"llmkit.sqlite", "llmkit.sqlite.lock"}


def make_version_1(path: Path, *bodies: str) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.executescript(
        """
        PRAGMA journal_mode = WAL;
        PRAGMA application_id = 0x6C6C6D6B;
        CREATE TABLE configurations (
            config_id TEXT PRIMARY KEY,
            model_id TEXT NOT NULL UNIQUE,
            body TEXT NOT NULL,
            created_at REAL NOT NULL,
            updated_at REAL NOT NULL
        ) STRICT;
        PRAGMA user_version = 1;
        """
    )
    for number, body in enumerate(bodies):
        connection.execute(
            "INSERT INTO configurations VALUES (?, ?, ?, ?, 0)", (f"c{number}", f"m{number}", body, number)
        )
    connection.close()


def test_a_database_of_version_1_is_taken_over(tmp_path: Path) -> None:
    body = '{"config_id": "c0", "model_id": "m0", "model_name": "n", "model_type": "openai", "description": "old"}'
    make_version_1(tmp_path / "llmkit.sqlite", body)
    store = Store(tmp_path)
    assert [c.description for c in store.all()] == ["old"]
    assert store.problems == []
    assert store.condition().schema_version == SCHEMA_VERSION
    store.claim("c0", "server")
    store.add_load("c0", "hash", 0, 1, {"seconds": 1})
    assert store.last_load("c0", "hash") == {"seconds": 1}
    store.close()
    connection = sqlite3.connect(tmp_path / "llmkit.sqlite")
    assert connection.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
    connection.close()


@pytest.mark.parametrize("version", [-1, 0, 2])
def test_a_database_that_is_not_of_the_version_it_says_is_kept_aside_and_its_rows_saved(
    tmp_path: Path, version: int
) -> None:
    body = '{"config_id": "c0", "model_id": "m0", "model_name": "n", "model_type": "openai"}'
    make_version_1(tmp_path / "llmkit.sqlite", body, "no JSON")
    connection = sqlite3.connect(tmp_path / "llmkit.sqlite")
    connection.execute(f"PRAGMA user_version = {version}")
    connection.close()
    store = Store(tmp_path)
    assert [c.model_id for c in store.all()] == ["m0"]
    assert "corrupt" in store.problems[0]
    assert store.has_lost
    store.close()


def test_what_cannot_do_wal_is_used_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Store(tmp_path)
    before.insert(configuration())
    assert before.condition().journal_mode == "wal"
    before.close()
    monkeypatch.setattr("llmkit.registry.database._wal_works", lambda scratch: False)
    ours, theirs = Store(tmp_path), Store(tmp_path)
    assert ours.condition().journal_mode == "delete"
    theirs.insert(configuration("m2", "c2"))
    assert [c.model_id for c in ours.all()] == ["m", "m2"]
    assert not (tmp_path / "llmkit.sqlite-wal").exists()
    ours.close()
    theirs.close()


WITHOUT_SHARED_MEMORY = """
import ctypes, errno, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_r08_store_faults import Calls, sqlite_library

kind = ctypes.CFUNCTYPE(ctypes.c_void_p, *[ctypes.c_void_p] * 6, use_errno=True)

def refuse(*arguments):
    ctypes.set_errno(errno.ENODEV)
    return ctypes.c_void_p(-1).value

sqlite = ctypes.CDLL(sqlite_library())
sqlite.sqlite3_vfs_find.restype = ctypes.POINTER(Calls._VFS)
vfs = sqlite.sqlite3_vfs_find(None)
mmap = kind(refuse)
assert vfs.contents.set_system_call(ctypes.cast(vfs, ctypes.c_void_p), b"mmap", ctypes.cast(mmap, ctypes.c_void_p)) == 0

from llmkit.registry.store import Store
store = Store(Path(sys.argv[1]))
print(store.condition().journal_mode, len(store.all()), store.problems)
store.close()
"""


@pytest.mark.skipif(
    sys.platform != "linux" or "/libsqlite3.so" not in Path("/proc/self/maps").read_text(),
    reason="SQLite's calls cannot be replaced",
)
def test_a_file_in_wal_mode_opens_where_memory_cannot_be_shared(tmp_path: Path) -> None:
    """As when a home moves to a network file system: mmap fails."""
    store = Store(tmp_path)
    store.insert(configuration())
    store.close()
    tests = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_SHARED_MEMORY, str(tmp_path), str(tests / "reliability")],
        env={**os.environ, "PYTHONPATH": str(tests)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "delete 1 []\n", done.stderr


def test_what_a_killed_probe_left_is_removed_when_it_is_old(tmp_path: Path) -> None:
    old, young = tmp_path / "llmkit.sqlite.probe-1-a", tmp_path / "llmkit.sqlite.probe-2-b-wal"
    old.touch()
    young.touch()
    os.utime(old, (0, 0))
    Store(tmp_path).close()
    assert not old.exists()
    assert young.exists()


def test_a_model_that_is_live_elsewhere_is_left_alone(tmp_path: Path) -> None:
    store, ours, theirs = Store(tmp_path), Presence(tmp_path), Presence(tmp_path)
    store.insert(configuration())
    store.register(theirs.server_id, "http://there/", ours.alive)
    store.claim("c", theirs.server_id)
    for work in (
        lambda: store.replace(configuration(), server_id=ours.server_id, alive=ours.alive),
        lambda: store.delete("c", server_id=ours.server_id, alive=ours.alive),
    ):
        with pytest.raises(ModelLiveElsewhere, match="http://there/") as caught:
            work()
        assert caught.value.details["url"] == "http://there/"
        assert caught.value.details["pid"] == os.getpid()
    store.delete("c", server_id=theirs.server_id, alive=theirs.alive)  # its own models are a server's own business
    assert store.all() == []
    for presence in (ours, theirs):
        presence.close()
    store.close()


def test_what_was_released_or_belongs_to_a_dead_server_is_no_obstacle(tmp_path: Path) -> None:
    store, ours, theirs = Store(tmp_path), Presence(tmp_path), Presence(tmp_path)
    store.insert(configuration())
    store.register(theirs.server_id, "http://there/", ours.alive)
    store.claim("c", theirs.server_id)
    store.release("c", theirs.server_id)
    store.replace(configuration(), server_id=ours.server_id, alive=ours.alive)
    store.claim("c", theirs.server_id)
    store.claim("c", theirs.server_id)  # twice is no error
    theirs.close()
    store.delete("c", server_id=ours.server_id, alive=ours.alive)
    with pytest.raises(ConfigurationNotFound):
        store.claim("c", ours.server_id)
    ours.close()
    store.close()


def test_a_new_server_forgets_the_dead(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.insert(configuration())
    for name in ("dead", "living", "new"):
        store.register(name, "", lambda other: other != "dead")
        store.claim("c", name)
    for query in ("SELECT server_id FROM servers ORDER BY 1", "SELECT server_id FROM live ORDER BY 1"):
        assert store._connection.execute(query).fetchall() == [("living",), ("new",)]
    store.unregister("living")
    store.unregister("new")
    assert store._connection.execute("SELECT * FROM servers").fetchall() == []
    assert store._connection.execute("SELECT * FROM live").fetchall() == []
    store.close()


def test_the_last_few_loads_of_each_configuration_are_kept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add_load("other", "hash", 0, 1, {"number": -1})
    for number in range(KEPT_LOADS + 3):
        store.add_load("c", f"hash{number % 2}", 0, 1, {"number": number})
    rows = store._connection.execute("SELECT body FROM loads WHERE config_id = 'c' ORDER BY id").fetchall()
    assert [json.loads(body)["number"] for (body,) in rows] == list(range(3, KEPT_LOADS + 3))
    assert store.last_load("c", "hash0") == {"number": KEPT_LOADS + 1}
    assert store.last_load("c", "hash1") == {"number": KEPT_LOADS + 2}
    assert store.last_load("c", "another") is None
    assert store.last_load("other", "hash") == {"number": -1}
    store._connection.execute("UPDATE loads SET body = 'no JSON'")
    assert store.last_load("c", "hash0") is None
    store.close()


def test_no_error_of_sqlite_leaves_the_store(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.close()
    for call in (store.data_version, store.all, store.config_ids, lambda: store.insert(configuration())):
        with pytest.raises(NotReady):
            call()
    assert not store.has_lost
