"""R9: a database that is damaged in any way: the registry opens, keeps the file, says so, saves what can be read."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import re
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from fake_engine_type import FakePluginEngineType
from support import scaled

from llmkit.errors import NotReady
from llmkit.registry.database import StoreTooNewError
from llmkit.registry.registry import ModelRegistry, Settings
from llmkit.registry.store import Store
from llmkit.schemas import Configuration, Health, ModelConfigRequest

MUTATIONS = scaled(200)
RUNNING = scaled(20)
SHARED = scaled(10)
CONFIGURATIONS = 40
PAGE = 4096
VERSION = slice(60, 64)
KEPT = re.compile(r"llmkit\.sqlite\.corrupt-\d+")


def configuration(number: int) -> Configuration:
    return Configuration(
        config_id=f"00000000-0000-4000-8000-{number:012d}",
        model_id=f"m{number}",
        model_name="n",
        model_type="fake",
        description=f"{number} " + "x" * (number * 37 % 700),  # rows of several sizes, on several pages
    )


def flip_a_bit(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def flip_a_bit_of_the_head(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(100)] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def garble(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content))
    length = min(rng.choice((1, 16, 512, PAGE)), len(content) - start)
    content[start : start + length] = rng.randbytes(length)
    path.write_bytes(content)


def zero_a_page(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    start = rng.randrange(0, len(content), PAGE)
    content[start : start + PAGE] = bytes(len(content[start : start + PAGE]))
    path.write_bytes(content)


def swap_two_pages(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    pages = [content[at : at + PAGE] for at in range(0, len(content), PAGE)]
    one, other = rng.sample(range(len(pages)), 2) if len(pages) > 1 else (0, 0)
    pages[one], pages[other] = pages[other], pages[one]
    path.write_bytes(b"".join(pages))


def only_garbage(path: Path, rng: random.Random) -> None:
    path.write_bytes(rng.randbytes(rng.randrange(1, 3 * PAGE)))


def break_a_name(path: Path, rng: random.Random) -> None:
    name = rng.choice((b"configurations", b"servers", b"live", b"config_id", b"CREATE"))
    content = path.read_bytes()
    path.write_bytes(content[:PAGE].replace(name, b"\xe5" + name[1:]) + content[PAGE:])


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (
    flip_a_bit,
    flip_a_bit_of_the_head,
    truncate,
    garble,
    zero_a_page,
    swap_two_pages,
    only_garbage,
    break_a_name,
)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Give three healthy state folders: all in the main file, part in the WAL, and the WAL of another database."""
    folders = [tmp_path_factory.mktemp(name) for name in ("main", "wal", "foreign")]
    with_wal = tmp_path_factory.mktemp("open")
    for folder in (folders[0], with_wal):
        store = Store(folder)
        for number in range(CONFIGURATIONS // 2):
            store.insert(configuration(number))
        store._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        for number in range(CONFIGURATIONS // 2, CONFIGURATIONS):
            store.insert(configuration(number))
        if folder is with_wal:
            for target in folders[1:]:
                for name in ("llmkit.sqlite", "llmkit.sqlite-wal"):
                    shutil.copyfile(folder / name, target / name)
        store.close()
    with sqlite3.connect(tmp_path_factory.mktemp("other") / "x.sqlite", isolation_level=None) as other:
        other.execute("PRAGMA journal_mode = WAL")
        other.execute("CREATE TABLE t (a)")
        other.executemany("INSERT INTO t VALUES (?)", [("y" * 500,)] * 100)
        (file,) = [row[2] for row in other.execute("PRAGMA database_list")]
        shutil.copyfile(file + "-wal", folders[2] / "llmkit.sqlite-wal")
    other.close()
    return folders


async def serve(state: Path) -> tuple[Health, list[Configuration]]:
    """Start a registry, configure a model, and give what it says."""
    registry = ModelRegistry(
        Settings(state_dir=state, run_dir=state / "run"),
        lambda event: None,
        logging.getLogger("test"),
        {},
        {"fake": FakePluginEngineType()},
    )
    try:
        await registry.start()
        known = registry.configurations()
        await registry.configure(ModelConfigRequest(model_id="new", model_name="n", model_type="fake"))
        return registry.health(), known
    finally:
        await registry.close()


def test_r09_the_registry_opens_whatever_the_file_is(tmp_path: Path, originals: list[Path]) -> None:
    seed = random.randrange(1 << 32)
    rng = random.Random(seed)
    outcomes: Counter[str] = Counter()
    saved = of = 0
    slowest = 0.0
    for number in range(MUTATIONS):
        state = tmp_path / "state"
        original = originals[number % 2 if number % 10 else 2]
        shutil.copytree(original, state)
        database, wal = state / "llmkit.sqlite", state / "llmkit.sqlite-wal"
        target = wal if wal.exists() and number % 3 == 0 else database
        damage = DAMAGES[number % len(DAMAGES)]
        damage(target, rng)
        what = f"seed {seed}, mutation {number}: {damage.__name__} of {original.name}/{target.name}"
        broken = database.read_bytes()
        started = time.monotonic()
        try:
            health, known = asyncio.run(serve(state))
        except StoreTooNewError:
            # Only where the number that says so was hit; then nothing is changed.
            assert broken[VERSION] != (original / "llmkit.sqlite").read_bytes()[VERSION], what
            assert database.read_bytes() == broken, what
            outcomes["refused as too new"] += 1
        except Exception as error:
            raise AssertionError(what) from error
        else:
            slowest = max(slowest, time.monotonic() - started)
            changed = [c for c in known if c != configuration(int(c.model_id[1:]))]
            # SQLite keeps no checksums: a flipped bit can make another letter in a text. More is not let through.
            assert len(changed) <= (damage in (flip_a_bit, garble)), what
            outcomes["a letter changed unseen"] += len(changed)
            kept = [path for path in state.iterdir() if KEPT.fullmatch(path.name)]
            if kept:
                assert [path.read_bytes() for path in kept] == [broken], what
                assert health.status == "degraded", what
                assert kept[0].name in health.problems[0], what
                outcomes["kept aside"] += 1
                saved, of = saved + len(known), of + CONFIGURATIONS
            elif len(known) == CONFIGURATIONS:
                outcomes["all there"] += 1
            elif health.status == "degraded":
                outcomes["rows named"] += 1
            else:
                # SQLite takes the end of a WAL that it cannot read for a write that was not finished.
                assert wal.name == target.name or original.name.startswith("foreign") or not broken, what
                outcomes["end of the WAL gone"] += 1
            again = Store(state)
            assert len(again.all()) == len(known) + 1, what
            again.close()
        shutil.rmtree(state)
    print(
        f"\nR9: {MUTATIONS} mutations: {dict(outcomes)}; {saved} of {of} configurations saved from files kept aside; "
        f"start to end at most {slowest:.2f} s"
    )


def test_r09_what_breaks_under_a_running_registry_is_mended(tmp_path: Path) -> None:
    """No error of SQLite leaves the store, and after the first it goes on with what can be read."""
    rng = random.Random(9)
    failed = saved = 0
    for number in range(RUNNING):
        state = tmp_path / str(number)
        store = Store(state)
        for index in range(CONFIGURATIONS):
            store.insert(configuration(index))
        store._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        pages = (state / "llmkit.sqlite").stat().st_size // PAGE
        with (state / "llmkit.sqlite").open("r+b") as file:
            file.seek(PAGE * rng.randrange(pages))
            file.write(rng.randbytes(PAGE))
        store._connection.execute("PRAGMA shrink_memory")  # else it is read from memory
        for call in (
            store.data_version,
            store.config_ids,
            store.all,
            lambda store=store: store.last_load("c", "h"),  # type: ignore[misc]
            lambda store=store: store.add_load("c", "h", 0, 0, {}),  # type: ignore[misc]
            lambda store=store: store.insert(configuration(99)),  # type: ignore[misc]
        ):
            try:
                call()
            except NotReady:
                failed += 1
                call()
        known = len(store.all())
        if store.problems:
            assert list(state.glob("llmkit.sqlite.corrupt-*"))
            saved += known - 1
        store.close()
        again = Store(state)
        assert len(again.all()) == known
        again.close()
    assert failed, "nothing was found broken, so nothing was tested"
    print(f"\nR9: {RUNNING} pages overwritten under an open store: {failed} calls refused, each worked when repeated")


def test_r09_keys_outlive_the_database_that_named_them(tmp_path: Path) -> None:
    key = tmp_path / "secrets" / f"{configuration(1).config_id}.json"
    Store(tmp_path).close()
    key.parent.mkdir()
    key.write_text("{}")
    os.utime(key, (0, 0))
    (tmp_path / "llmkit.sqlite").write_bytes(b"garbage" * 1000)
    for _ in range(2):  # the second finds nothing wrong
        asyncio.run(serve(tmp_path))
        assert key.exists()


def test_r09_two_that_find_it_broken_at_once_keep_one_new_file(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        list(pool.map(insert_one, [tmp_path / "warm"] * 2, range(2)))
        for number in range(SHARED):
            state = tmp_path / str(number)
            Store(state).close()
            (state / "llmkit.sqlite").write_bytes(b"garbage" * 1000)
            list(pool.map(insert_one, [state] * 2, range(2)))
            store = Store(state)
            assert len(store.all()) == 2
            store.close()
            assert len(list(state.glob("llmkit.sqlite.corrupt-*"))) == 1


def insert_one(state: Path, number: int) -> None:
    store = Store(state)
    store.insert(configuration(number))
    store.close()


def test_r09_a_server_follows_when_another_has_kept_the_file_aside(tmp_path: Path) -> None:
    first = Store(tmp_path)
    first.insert(configuration(1))
    first._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    before = first.data_version()
    content = bytearray((tmp_path / "llmkit.sqlite").read_bytes())
    content[16:18] = b"xx"  # the size of a page
    (tmp_path / "llmkit.sqlite").write_bytes(content)
    second = Store(tmp_path)
    assert second.problems
    second.insert(configuration(2))
    assert first.data_version() != before
    first.insert(configuration(3))
    first.close()
    assert [c.model_id for c in second.all()] == ["m1", "m2", "m3"]
    second.close()
    again = Store(tmp_path)
    assert len(again.all()) == 3
    again.close()
