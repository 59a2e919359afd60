from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from llmkit.errors import DiskFull
from llmkit.registry import history as module
from llmkit.registry.history import BACKLOG, PENDING, RequestHistory
from llmkit.registry.store import Store
from llmkit.schemas import RequestRecord

LOG = logging.getLogger("test-history")
FILE = "requests.sqlite"
KILLS = 5
TESTS = Path(__file__).parent.parent


def record(number: int, model_id: str = "m", **more: Any) -> dict[str, Any]:
    return {
        "request_id": str(number),
        "model_id": model_id,
        "answered_by": None,
        "api": "chat/completions",
        "priority": "interactive",
        "stream": True,
        "started_at": datetime.fromtimestamp(1_800_000_000 + number, UTC),
        "outcome": "ok",
        "status": 200,
        "error": None,
        "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
        "timings": {"queue": 0.0, "load": 0.0, "first_token": None, "total": 0.5, "tokens_per_second": 4.0},
        "cost": {"amount": 0.25, "currency": "USD"},
    } | more


@asynccontextmanager
async def opened(folder: Path, **more: Any) -> AsyncIterator[RequestHistory]:
    history = RequestHistory(folder, LOG, **more)
    await history.open()
    try:
        yield history
    finally:
        await history.close()


async def ids(history: RequestHistory, limit: int = 100_000, model_id: str | None = None) -> list[int]:
    return [int(one.request_id) for one in await history.recent(limit, model_id)]


def rows(folder: Path) -> list[tuple[int, int, str]]:
    with closing(sqlite3.connect(folder / FILE)) as connection:
        return connection.execute("SELECT id, size, body FROM requests ORDER BY id").fetchall()


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob(f"{FILE}*") if not path.name.endswith("-shm"))


def trace(history: RequestHistory) -> list[str]:
    """Give the statements that are executed from now on."""
    statements: list[str] = []
    assert history._database
    history._database._connection.set_trace_callback(statements.append)
    return statements


async def until(condition: Any, seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


# -- what is kept --------------------------------------------------------------------------------------------


async def test_what_was_added_is_there_in_the_next_process_newest_first(tmp_path: Path) -> None:
    async with opened(tmp_path) as history:
        for number in range(5):
            history.add(record(number))
    async with opened(tmp_path) as history:
        assert await ids(history) == [4, 3, 2, 1, 0]
        assert await ids(history, 2) == [4, 3]
        assert await ids(history, 0) == []
        assert await ids(history, -1) == []
        (last,) = await history.recent(1)
        assert last == RequestRecord.model_validate(record(4))
        assert history.problems() == []


async def test_a_record_of_an_older_version_is_read_without_what_it_does_not_tell(tmp_path: Path) -> None:
    async with opened(tmp_path) as history:
        history.add(record(1))
        history.add(record(2, tool_key="editor"))
        assert [one.tool_key for one in await history.recent(2)] == ["editor", None]


async def test_one_model_can_be_asked_for(tmp_path: Path) -> None:
    async with opened(tmp_path) as history:
        for number in range(6):
            history.add(record(number, "even" if number % 2 == 0 else "odd"))
        assert await ids(history, 2, "even") == [4, 2]
        assert await ids(history, 10, "odd") == [5, 3, 1]
        assert await ids(history, 10, "none") == []


async def test_what_is_not_written_yet_is_seen(tmp_path: Path) -> None:
    async with opened(tmp_path) as history:
        history.add(record(0))
        assert await ids(history) == [0]
        history.add(record(1))
        history.add(record(2))
        assert await ids(history) == [2, 1, 0]
        assert len(rows(tmp_path)) == 3


async def test_bodies_are_kept_whatever_their_bytes_are(tmp_path: Path) -> None:
    async with opened(tmp_path) as history:
        history.add(record(0, request_body='{"ä": "\x00"}'.encode(), response_body=b"cut \xe2\x82"))
        history.add(record(1, request_body=b"", response_body="text"))
        history.add(record(2))
        none, text, raw = await history.recent(3)
    assert (none.request_body, none.response_body) == (None, None)
    assert (text.request_body, text.response_body) == ("", "text")
    assert (raw.request_body, raw.response_body) == ('{"ä": "\x00"}', "cut \ufffd")


async def test_a_row_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    async with opened(tmp_path) as history:
        for number in range(5):
            history.add(record(number))
        await history.recent(1)
        bodies = iter(["no JSON", "{}", b"\xff\xfe"])
        with closing(sqlite3.connect(tmp_path / FILE, isolation_level=None)) as connection:
            for (row,) in connection.execute("SELECT id FROM requests ORDER BY id LIMIT 3").fetchall():
                connection.execute("UPDATE requests SET body = CAST(? AS TEXT) WHERE id = ?", (next(bodies), row))
        assert await ids(history) == [4, 3]


async def test_a_record_that_cannot_be_written_keeps_no_other_from_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(tmp_path) as history:
        history.add(record(0))
        history.add(record(1, error="\ud800"))
        history.add({"request_id": "2"})
        history.add(record(3, model_id=5))  # SQLite or the reader may refuse it, not the writing of the others
        history.add(record(4))
        assert await ids(history) == [4, 0]
        assert history.problems() == ["requests that ended without a record, since it could not be written: 2"]
    assert len(caplog.records) == 1


# -- how it is written ---------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX")
async def test_the_file_is_for_its_user_alone(tmp_path: Path) -> None:
    async with opened(tmp_path / "state") as history:
        history.add(record(0))
        await history.recent(1)
        paths = list((tmp_path / "state").iterdir())
        assert {FILE, f"{FILE}-wal", f"{FILE}-shm"} <= {path.name for path in paths}
        for path in paths:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700


async def test_records_are_written_together_and_nothing_is_done_without_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_SECONDS", 0.2)
    async with opened(tmp_path) as history:
        statements = trace(history)
        await asyncio.sleep(0.5)
        assert statements == []
        for number in range(BACKLOG):
            history.add(record(number))
        assert statements == []
        await until(lambda: "COMMIT" in statements)
        await asyncio.sleep(0.5)
        assert statements.count("COMMIT") == 1
        assert len(rows(tmp_path)) == BACKLOG
        history.add(record(BACKLOG))  # the writer goes on
        await until(lambda: statements.count("COMMIT") == 2)


async def test_a_backlog_is_written_without_delay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_SECONDS", 1000.0)
    async with opened(tmp_path) as history:
        history.add(record(0))
        await asyncio.sleep(0.1)  # the writer waits for more
        for number in range(BACKLOG):
            history.add(record(1 + number))
        await until(lambda: len(rows(tmp_path)) == BACKLOG + 1)


async def test_the_configurations_do_not_notice(tmp_path: Path) -> None:
    store = Store(tmp_path)
    version = store.data_version()
    async with opened(tmp_path) as history:
        history.add(record(0))
        await history.recent(1)
        assert store.data_version() == version
    store.close()


async def test_to_add_is_cheap_and_the_loop_is_not_held_up(tmp_path: Path) -> None:
    calls, longest = 50_000, 0.0
    records = [record(number, request_body=b"x" * 500) for number in range(1000)]

    async def tick() -> None:
        nonlocal longest
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            longest = max(longest, time.perf_counter() - before)

    async with opened(tmp_path) as history:
        ticking = asyncio.create_task(tick())
        spent = 0.0
        for _ in range(calls // len(records)):
            started = time.perf_counter()
            for one in records:
                history.add(one)
            spent += time.perf_counter() - started
            await asyncio.sleep(0.05)
        ticking.cancel()
        await asyncio.gather(ticking, return_exceptions=True)
        assert len(await ids(history)) + history._pushed_out == calls
    print(f"\nadd: {spent / calls * 1e6:.2f} us a call; the loop was held up for {longest * 1e3:.0f} ms at most")


# -- the bound -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wal", [True, False])
async def test_the_oldest_are_forgotten_and_the_file_stays_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, wal: bool
) -> None:
    monkeypatch.setattr("llmkit.registry.database._wal_works", lambda scratch: wal)
    bound, largest, number, written = 4 << 20, 0, 0, 0
    rng = random.Random(4)
    async with opened(tmp_path, max_bytes=bound) as history:
        assert history._database
        assert history._database.condition().journal_mode == ("wal" if wal else "delete")
        while written < 8 * bound:
            for _ in range(300):
                body = rng.choice((0, 1000, 2000, 10_000)) * b"x"
                history.add(record(number, request_body=body))
                number += 1
                written += 600 + len(body)
            newest = await ids(history, 1)
            largest = max(largest, on_disk(tmp_path))
            assert newest == [number - 1]
        sizes = [size for _, size, _ in rows(tmp_path)]
        kept = await ids(history)
        assert 0.95 * bound < sum(sizes) <= bound
        assert kept == list(range(number - 1, number - 1 - len(sizes), -1))
        assert largest < 2 * bound + 2 * module.JOURNAL_BYTES
    assert sizes == [len(body.encode()) for _, _, body in rows(tmp_path)]
    print(f"\n{written >> 20} MiB written with a bound of {bound >> 20}: at most {largest / 2**20:.1f} MiB on the disk")


async def test_a_journal_that_a_reader_has_kept_long_is_cut_down_afterwards(tmp_path: Path) -> None:
    wal = tmp_path / f"{FILE}-wal"

    async def write(history: RequestHistory, count: int) -> None:
        for number in range(count):
            history.add(record(number, request_body=b"x" * 100_000))
        await history.recent(1)

    async with opened(tmp_path) as history:
        await write(history, 1)
        with closing(sqlite3.connect(tmp_path / FILE, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM requests").fetchone()
            await write(history, 200)
            assert wal.stat().st_size > 4 * module.JOURNAL_BYTES
            reader.execute("ROLLBACK")
        for _ in range(2):
            await write(history, 1)
        assert wal.stat().st_size <= module.JOURNAL_BYTES


async def test_a_record_of_an_extraordinary_size_loses_its_bodies_only(tmp_path: Path) -> None:
    bound = 1 << 20
    async with opened(tmp_path, max_bytes=bound) as history:
        for number in range(20):
            history.add(record(number))
        history.add(record(20, request_body=b"x" * bound, response_body=b"y"))
        history.add(record(21, request_body=b'"' * (bound // 20)))  # twice as large as JSON
        history.add(record(22, request_body=b"x" * (bound // 20)))
        records = await history.recent(100)
    assert [int(one.request_id) for one in records] == list(range(22, -1, -1))
    assert [bool(one.request_body) for one in records[:3]] == [True, False, False]
    assert records[2].response_body is None


async def test_a_bound_of_nothing_keeps_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path, max_bytes=0) as history:
        history.add(record(0))
        assert await ids(history) == []
        assert history.problems() == []


# -- what goes wrong -----------------------------------------------------------------------------------------


async def test_what_finds_no_room_on_the_disk_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "BATCH_SECONDS", 0.05)
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.05)
    async with opened(tmp_path) as history:
        history.add(record(0))
        assert await ids(history) == [0]
        assert history._database
        connection = history._database._connection
        connection.execute("PRAGMA max_page_count = 1")  # SQLite takes what there is for the least
        for number in range(1, 100):
            history.add(record(number))
        await until(history.problems)
        (problem,) = history.problems()
        assert "no room on the disk for the record of requests" in problem
        assert await ids(history) == list(range(99, -1, -1))  # from the memory
        await asyncio.sleep(0.3)
        assert len(rows(tmp_path)) == 1
        connection.execute("PRAGMA max_page_count = 100000")
        await until(lambda: not history.problems())
        assert [json.loads(body)["request_id"] for _, _, body in rows(tmp_path)] == [str(n) for n in range(100)]
    assert len(caplog.records) == 1
    assert "\n" not in caplog.messages[0]


async def test_what_cannot_be_written_for_long_does_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound = 1 << 20

    def full(*_: Any) -> None:
        raise DiskFull("There is no room.")

    async with opened(tmp_path, max_bytes=bound) as history:
        with monkeypatch.context() as patch:
            patch.setattr(module._RequestFile, "write", full)
            for number in range(100):
                history.add(record(number, request_body=b"x" * (bound // 20)))
            kept = await ids(history)
            assert history._held <= bound // 4
            assert 1 <= len(kept) < 10
            assert kept == list(range(99, 99 - len(kept), -1))
            assert f"could not be written: {100 - len(kept)}" in history.problems()[1]
        assert await ids(history) == kept
        assert len(history.problems()) == 1


async def test_a_lock_that_somebody_holds_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUSY_MILLISECONDS", 50)
    async with opened(tmp_path) as history:
        with closing(sqlite3.connect(tmp_path / FILE, isolation_level=None)) as holder:
            holder.execute("BEGIN IMMEDIATE")
            history.add(record(0))
            assert await ids(history) == [0]
            assert "Another server holds" in history.problems()[0]
            history.add(record(1))
            assert await ids(history) == [1, 0]
            holder.execute("ROLLBACK")
        assert await ids(history) == [1, 0]
        assert history.problems() == []
    assert len(rows(tmp_path)) == 2


async def test_a_broken_file_is_set_aside_and_the_writing_goes_on(tmp_path: Path) -> None:
    asides = []
    for number in range(2):
        content = bytes([65 + number]) * 10_000
        (tmp_path / FILE).write_bytes(content)
        async with opened(tmp_path) as history:
            (aside,) = tmp_path.glob(f"{FILE}.corrupt-*")  # the one before is gone: they are bounded, too
            asides.append(aside)
            assert aside.read_bytes() == content
            (problem,) = history.problems()
            assert problem == f"the database could not be read; it was kept as {aside.name}"
            history.add(record(number))
            assert await ids(history) == [number]
    assert asides[0] != asides[1]


async def test_a_file_that_breaks_while_it_is_used_is_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_SECONDS", 0.05)
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.05)
    async with opened(tmp_path) as history:
        for number in range(1000):
            history.add(record(number))
        await history.recent(1)
        assert history._database
        connection = history._database._connection
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        size = (tmp_path / FILE).stat().st_size
        with (tmp_path / FILE).open("r+b") as file:
            file.write(b"\xff" * size)
        connection.execute("PRAGMA shrink_memory")  # else it is read from memory
        history.add(record(1000))
        await until(lambda: any("kept as" in problem for problem in history.problems()))
        await until(lambda: not any("not recorded" in problem for problem in history.problems()))
        assert await ids(history) == [1000]
    assert len(rows(tmp_path)) == 1


async def test_a_file_that_was_removed_is_made_anew(tmp_path: Path) -> None:
    async with opened(tmp_path) as history:
        history.add(record(0))
        await history.recent(1)
        for path in tmp_path.glob(f"{FILE}*"):
            path.unlink()
        history.add(record(1))
        assert await ids(history) == [1]


async def test_a_folder_that_cannot_be_used_stops_nothing_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "BATCH_SECONDS", 0.05)
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.05)
    state = tmp_path / "state"
    state.write_text("a file, not a folder")
    async with opened(state) as history:
        assert "not recorded" in history.problems()[0]
        history.add(record(0))
        assert await ids(history) == [0]
        await asyncio.sleep(0.3)
        state.unlink()
        await until(lambda: not history.problems())
        assert len(rows(state)) == 1
    assert len(caplog.records) == 1
    assert "\n" not in caplog.messages[0]


async def test_a_file_of_the_first_version_keeps_its_records(tmp_path: Path) -> None:
    async with opened(tmp_path) as history:
        history.add(record(0))
    with closing(sqlite3.connect(tmp_path / FILE, isolation_level=None)) as connection:
        connection.execute("DROP INDEX requests_of_user")
        connection.execute("ALTER TABLE requests DROP COLUMN user")
        connection.execute("PRAGMA user_version = 1")
    async with opened(tmp_path) as history:
        history.add(record(1, user="ada"))
        assert await ids(history) == [1, 0]
        assert [one.request_id for one in await history.recent(10, user="ada")] == ["1"]
        assert history.problems() == []


async def test_a_file_of_a_newer_version_is_left_as_it_is(tmp_path: Path) -> None:
    async with opened(tmp_path) as history:
        history.add(record(0))
    with closing(sqlite3.connect(tmp_path / FILE)) as connection:
        connection.execute("PRAGMA user_version = 99")
        connection.execute("PRAGMA journal_mode = DELETE")
    before = (tmp_path / FILE).read_bytes()
    async with opened(tmp_path) as history:
        history.add(record(1))
        assert await ids(history) == [1]
        assert "schema version 99" in history.problems()[0]
    assert (tmp_path / FILE).read_bytes() == before


async def test_what_does_not_fit_into_the_queue_is_told(tmp_path: Path) -> None:
    history = RequestHistory(tmp_path, LOG)
    for number in range(PENDING + 5):
        history.add(record(number))
    assert history.problems() == ["requests that ended without a record, since it could not be written: 5"]
    assert await ids(history) == list(range(PENDING + 4, 4, -1))
    await history.close()


# -- the end -------------------------------------------------------------------------------------------------


async def test_close_writes_the_rest_and_leaves_no_task_and_no_thread(tmp_path: Path) -> None:
    history = RequestHistory(tmp_path, LOG)
    await history.open()
    await history.open()
    (task,) = [task for task in asyncio.all_tasks() if task.get_name() == "llmkit-history"]
    (thread,) = history._disk._threads
    history.add(record(0))
    await history.close()
    await history.close()
    assert task.done()
    await until(lambda: not thread.is_alive())
    assert len(rows(tmp_path)) == 1
    assert not (tmp_path / f"{FILE}-wal").exists()
    history.add(record(1))
    assert await history.recent(1) == []


async def test_close_without_anything_makes_no_file(tmp_path: Path) -> None:
    history = RequestHistory(tmp_path, LOG)
    await history.close()
    await history.open()
    assert list(tmp_path.iterdir()) == []


async def test_close_does_not_wait_for_a_lock_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CLOSING_SECONDS", 0.2)
    history = RequestHistory(tmp_path, LOG)
    await history.open()
    (thread,) = history._disk._threads
    with closing(sqlite3.connect(tmp_path / FILE, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        history.add(record(0))
        started = time.monotonic()
        await history.close()
        assert time.monotonic() - started < module.BUSY_MILLISECONDS / 1000
        holder.execute("ROLLBACK")
    await until(lambda: not thread.is_alive())
    assert len(rows(tmp_path)) == 1  # the thread was given the lock a moment later


# -- several servers -----------------------------------------------------------------------------------------


async def test_two_histories_of_one_folder_see_each_other(tmp_path: Path) -> None:
    async with opened(tmp_path) as ours, opened(tmp_path) as theirs:
        for number in range(0, 100, 2):
            ours.add(record(number))
            theirs.add(record(number + 1))
            if number % 10 == 0:
                await asyncio.gather(ours.recent(1), theirs.recent(1))
        await ours.recent(1)
        assert sorted(await ids(theirs)) == list(range(100))


def write_some(folder: Path, start: int, count: int) -> list[str]:
    async def work() -> list[str]:
        async with opened(folder) as history:
            for number in range(start, start + count):
                history.add(record(number))
                if number % 50 == 0:
                    await history.recent(1)
            return history.problems()

    return asyncio.run(work())


async def test_two_processes_lose_nothing(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        problems = list(pool.map(write_some, [tmp_path] * 2, [0, 5000], [5000] * 2))
    assert problems == [[], []]
    async with opened(tmp_path) as history:
        found = await ids(history)
    assert sorted(found) == list(range(10_000))
    for half in (range(5000), range(5000, 10_000)):
        assert [number for number in found if number in half] == list(reversed(half))


# -- kills and faults ----------------------------------------------------------------------------------------

PROGRAM = """
import asyncio, logging, sys
sys.path[:0] = sys.argv[2:4]
from pathlib import Path
from test_history import RequestHistory, record

async def main():
    history = RequestHistory(Path(sys.argv[1]), logging.getLogger("test"), max_bytes=1 << 20)
    await history.open()
    number = int(sys.argv[4])
    while True:
        for _ in range(20):
            history.add(record(number))
            number += 1
        await history.recent(1)
        print(number, flush=True)

asyncio.run(main())
"""


def test_a_killed_writer_leaves_what_it_has_written(tmp_path: Path) -> None:
    async def look() -> list[int]:
        async with opened(tmp_path, max_bytes=1 << 20) as history:
            assert history.problems() == []
            assert history._database
            check = history._database._connection.execute("PRAGMA integrity_check").fetchone()
            assert check == ("ok",)
            return await ids(history)

    rng, start, outputs = random.Random(), 0, []
    for _ in range(KILLS):
        arguments = [str(tmp_path), str(TESTS / "registry"), str(TESTS), str(start)]
        with subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout
            written = int(writer.stdout.readline())
            time.sleep(rng.random() * 0.3)
            writer.kill()
            for line in writer.stdout:
                written = int(line) if line.endswith("\n") else written
        found = asyncio.run(look())
        assert found[0] >= written - 1  # what it said was written
        assert found == list(range(found[0], found[-1] - 1, -1))
        outputs.append((written - start) // 20)
        start = found[0] + 1
    print(f"\n{KILLS} writers killed after so many transactions: {outputs}; {start} records, none lost, none twice")


FAULTY = """
import asyncio, errno, json, logging, shutil, sys
sys.path[:0] = sys.argv[2:5]
from pathlib import Path
from test_history import module, ids, opened, record
from test_r08_store_faults import Calls, sqlite_library

module.BATCH_SECONDS = module.RETRY_SECONDS = 0.01
faults = Calls(sqlite_library())
told = 0

async def trial(folder, at, error, forever):
    global told
    faults.arm(at, error, forever=forever)
    async with opened(folder, max_bytes=1 << 20) as history:
        for number in range(3):
            history.add(record(number, request_body=b"x" * 3000))
            await history.recent(1)
        calls = faults.count
        told += bool(history.problems())
        faults.disarm()
        history.add(record(3))
        found = await ids(history)
        assert found == [3, 2, 1, 0], (at, errno.errorcode[error], forever, found)
        assert history.problems() == [], (at, history.problems())
    async with opened(folder) as history:
        assert await ids(history) == [3, 2, 1, 0]
    assert not list(folder.glob("*.corrupt-*"))
    shutil.rmtree(folder)
    return calls

folder = Path(sys.argv[1])
calls = asyncio.run(trial(folder, 0, 0, False))
runs = 0
for error in (errno.ENOSPC, errno.EIO):
    for forever in (False, True):
        for at in range(1, calls + 1):
            asyncio.run(trial(folder, at, error, forever))
            runs += 1
print(json.dumps({"calls": calls, "runs": runs, "told": told}))
"""


@pytest.mark.skipif(
    sys.platform != "linux" or "/libsqlite3.so" not in Path("/proc/self/maps").read_text(),
    reason="SQLite's calls cannot be replaced",
)
def test_any_call_to_the_disk_may_fail_and_nothing_is_lost_or_written_twice(tmp_path: Path) -> None:
    folders = [str(TESTS / "registry"), str(TESTS / "reliability"), str(TESTS)]
    done = subprocess.run(
        [sys.executable, "-c", FAULTY, str(tmp_path / "state"), *folders],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["told"], "no fault reached the record"
    print(f"\n{told['runs']} runs, each of {told['calls']} calls failed once and for ever; {told['told']} told of it")
