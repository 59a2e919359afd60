from __future__ import annotations

import asyncio
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from llmkit.errors import (
    ConversationChanged,
    ConversationNotFound,
    ConversationsNotKept,
    DiskFull,
    DoesNotFit,
    NotReady,
    ServerStopping,
    TooLarge,
)
from llmkit.registry.conversations import Conversations
from llmkit.schemas import MAX_CONVERSATION_BYTES, ConversationRequest, ConversationTurn

FILE = "conversations.sqlite"
MIB = 1 << 20
TURN = ConversationTurn(
    model_id="demo",
    prompt="What is in the picture?",
    images=["data:image/png;base64,aGk="],
    response="A cat \U0001f408 \0",
    reasoning="Fur.",
    tool_calls=[{"id": "1", "function": {"name": "look", "arguments": "{}"}}],
    state="stopped",
    note="3 tokens",
)


@asynccontextmanager
async def opened(folder: Path, **more: Any) -> AsyncIterator[Conversations]:
    conversations = Conversations(folder, **more)
    try:
        yield conversations
    finally:
        await conversations.close()


def asked(title: str = "", *, revision: int | None = None, size: int = 0, **more: Any) -> ConversationRequest:
    return ConversationRequest(title=title, revision=revision, draft="x" * size, **more)


async def ids(conversations: Conversations) -> list[str]:
    return [one.conversation_id for one in (await conversations.summaries()).conversations]


async def test_a_conversation_comes_back_whole_also_from_another_server(tmp_path: Path) -> None:
    request = asked(
        "Cats", model_id="demo", system="Be brief.", parameters={"temperature": 0.5, "stop": ["\n"]}, turns=[TURN, TURN]
    )
    before = datetime.now(UTC)
    async with opened(tmp_path) as conversations:
        revision, updated_at = await conversations.put("c-1", request)
        assert revision == 1
        assert before <= updated_at <= datetime.now(UTC)
    async with opened(tmp_path) as conversations:
        kept = await conversations.get("c-1")
        assert (kept.conversation_id, kept.revision) == ("c-1", 1)
        assert abs((kept.updated_at - updated_at).total_seconds()) < 0.001
        assert kept.turns == [TURN, TURN]
        names = set(ConversationRequest.model_fields) - {"revision"}
        assert kept.model_dump(include=names) == request.model_dump(include=names)
        (summary,) = (await conversations.summaries()).conversations
        assert (summary.conversation_id, summary.title, summary.model_id) == ("c-1", "Cats", "demo")
        assert (summary.turns, summary.revision, summary.updated_at) == (2, 1, kept.updated_at)
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600


async def test_revisions_grow_by_one_and_what_follows_another_is_refused(tmp_path: Path) -> None:
    async with opened(tmp_path) as conversations:
        assert (await conversations.put("c", asked("one")))[0] == 1
        assert (await conversations.put("c", asked("two", revision=1)))[0] == 2
        for wrong in (0, 1, 3):
            with pytest.raises(ConversationChanged, match="revision 2 is kept") as raised:
                await conversations.put("c", asked("lost", revision=wrong))
            assert raised.value.details == {"revision": 2}
        assert (await conversations.get("c")).title == "two"
        assert (await conversations.put("c", asked("three")))[0] == 3
        await conversations.delete("c")
        with pytest.raises(ConversationChanged, match="not kept any more"):
            await conversations.put("c", asked("four", revision=3))
        assert await ids(conversations) == []
        assert (await conversations.put("c", asked("new", revision=0)))[0] == 1


async def test_of_many_who_write_at_once_one_wins_each_revision(tmp_path: Path) -> None:
    async with opened(tmp_path) as one, opened(tmp_path) as other:
        await one.put("c", asked())
        for revision in range(1, 6):
            writes = [here.put("c", asked(revision=revision)) for here in (one, other) * 4]
            results = await asyncio.gather(*writes, return_exceptions=True)
            won = [result for result in results if not isinstance(result, BaseException)]
            assert [number for number, _ in won] == [revision + 1]
            assert all(isinstance(result, tuple | ConversationChanged) for result in results)


async def test_what_was_changed_last_comes_first_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as conversations:
        for name in "abc":
            await conversations.put(name, asked())
        assert await ids(conversations) == ["c", "b", "a"]
        await conversations.put("b", asked())
        assert await ids(conversations) == ["b", "c", "a"]
        await conversations.put("b", asked())
        with closing(sqlite3.connect(tmp_path / FILE)) as connection, connection:
            connection.execute("UPDATE conversations SET updated_at = 0 WHERE conversation_id = 'b'")
        assert await ids(conversations) == ["b", "c", "a"]


async def test_the_oldest_go_when_there_are_too_many(tmp_path: Path) -> None:
    async with opened(tmp_path, most=3) as conversations:
        for name in "abcd":
            await conversations.put(name, asked())
        assert await ids(conversations) == ["d", "c", "b"]
        await conversations.put("b", asked())
        await conversations.put("e", asked())
        assert await ids(conversations) == ["e", "b", "d"]
        with pytest.raises(ConversationNotFound):
            await conversations.get("a")


async def test_the_oldest_go_when_they_are_too_large_together(tmp_path: Path) -> None:
    async with opened(tmp_path, most_bytes=8 * MIB) as conversations:
        for number in range(12):
            await conversations.put(f"c{number}", asked(size=2 * MIB))
        assert await ids(conversations) == ["c11", "c10", "c9"]
        await conversations.put("last", asked(size=3 * MIB))
        assert await ids(conversations) == ["last", "c11", "c10"]
        size = sum(path.stat().st_size for path in tmp_path.glob(f"{FILE}*"))
        assert size < 24 * MIB


async def test_one_that_is_too_large_is_refused_and_the_kept_one_stays(tmp_path: Path) -> None:
    async with opened(tmp_path, most_bytes=0) as conversations:
        await conversations.put("c", asked("kept", size=MAX_CONVERSATION_BYTES - 100))
        with pytest.raises(TooLarge):
            await conversations.put("c", asked("new", size=MAX_CONVERSATION_BYTES))
        assert (await conversations.get("c")).title == "kept"


async def test_a_server_that_keeps_none_says_so_and_makes_no_file(tmp_path: Path) -> None:
    async with opened(tmp_path, most=0) as conversations:
        told = await conversations.summaries()
        assert (told.kept, told.conversations) == (False, [])
        with pytest.raises(ConversationsNotKept, match="max_conversations"):
            await conversations.put("c", asked())
        for ask in (conversations.get, conversations.delete):
            with pytest.raises(ConversationNotFound):
                await ask("c")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", ["", ".c", "-c", "a/b", "a b", "ä", "c\n", "x" * 65])
async def test_an_id_that_does_not_fit_is_refused(tmp_path: Path, wrong: str) -> None:
    async with opened(tmp_path) as conversations:
        with pytest.raises(DoesNotFit, match="conversation_id"):
            await conversations.put(wrong, asked())
        with pytest.raises(ConversationNotFound):
            await conversations.get(wrong)


async def test_what_is_not_there_cannot_be_deleted(tmp_path: Path) -> None:
    async with opened(tmp_path) as conversations:
        with pytest.raises(ConversationNotFound, match="'c'"):
            await conversations.delete("c")


# -- what goes wrong -----------------------------------------------------------------------------------------------


async def test_a_damaged_file_is_kept_aside_and_told(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"no database at all, " * 1000)
    async with opened(tmp_path) as conversations:
        assert await ids(conversations) == []
        (problem,) = conversations.problems()
        assert "kept as conversations.sqlite.corrupt-" in problem
        await conversations.put("c", asked())
        assert await ids(conversations) == ["c"]
    assert len(list(tmp_path.glob(f"{FILE}.corrupt-*"))) == 1


async def test_a_conversation_of_a_newer_version_is_told_and_the_others_are_read(tmp_path: Path) -> None:
    async with opened(tmp_path) as conversations:
        await conversations.put("a", asked())
        await conversations.put("b", asked())
        with closing(sqlite3.connect(tmp_path / FILE)) as connection, connection:
            connection.execute("UPDATE conversations SET body = '{\"new\": 1}' WHERE conversation_id = 'a'")
            connection.execute("UPDATE conversations SET title = CAST(x'ff' AS TEXT) WHERE conversation_id = 'b'")
        with pytest.raises(NotReady, match="cannot be read"):
            await conversations.get("a")
        assert await ids(conversations) == ["a"]
        assert (await conversations.get("b")).revision == 1


async def test_a_full_disk_is_said_and_loses_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path) as conversations:
        await conversations.put("c", asked("kept"))
        assert conversations._database
        conversations._database._connection.execute("PRAGMA max_page_count = 1")  # SQLite takes what there is
        with pytest.raises(DiskFull, match="conversations"):
            await conversations.put("c", asked("new", size=MIB))
        kept = await conversations.get("c")
        assert (kept.title, kept.revision) == ("kept", 1)
        conversations._database._connection.execute("PRAGMA max_page_count = 1000000")
        assert (await conversations.put("c", asked("new", size=MIB, revision=1)))[0] == 2


async def test_a_folder_that_cannot_be_used_is_said_and_tried_again(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    async with opened(tmp_path / "state") as conversations:
        with pytest.raises(NotReady, match="conversations"):
            await conversations.put("c", asked())
        (tmp_path / "state").unlink()
        await conversations.put("c", asked())
        assert await ids(conversations) == ["c"]


async def test_after_the_end_the_server_is_stopping_and_a_second_end_is_no_error(tmp_path: Path) -> None:
    async with opened(tmp_path) as conversations:
        await conversations.put("c", asked())
    await conversations.close()
    with pytest.raises(ServerStopping):
        await conversations.summaries()


KILLED = """
import asyncio, sys
from pathlib import Path
from llmkit.registry.conversations import Conversations
from llmkit.schemas import ConversationRequest

async def main():
    conversations = Conversations(Path(sys.argv[1]))
    for number in range(1, 10_000):
        revision, _ = await conversations.put("c", ConversationRequest(title=str(number), draft="x" * 200_000))
        print(revision, flush=True)

asyncio.run(main())
"""


def test_what_was_answered_survives_a_kill(tmp_path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    for _ in range(5):
        told = int(writer.stdout.readline())
    writer.kill()
    told = max([told, *map(int, writer.stdout.read().split())])
    writer.wait()
    writer.stdout.close()

    async def look() -> None:
        async with opened(tmp_path) as conversations:
            kept = await conversations.get("c")
            assert kept.revision in (told, told + 1)
            assert (kept.title, len(kept.draft)) == (str(kept.revision), 200_000)
            assert conversations.problems() == []

    asyncio.run(look())


async def test_large_conversations_do_not_hold_the_loop_up(tmp_path: Path) -> None:
    turns = [TURN.model_copy(update={"response": "word " * 2000}) for _ in range(300)]
    async with opened(tmp_path) as conversations:
        work = asyncio.create_task(conversations.put("c", asked(turns=turns)))
        longest, last = 0.0, time.perf_counter()
        while not work.done():
            await asyncio.sleep(0.001)
            longest, last = max(longest, time.perf_counter() - last), time.perf_counter()
        await work
        work2 = asyncio.create_task(conversations.get("c"))
        while not work2.done():
            await asyncio.sleep(0.001)
            longest, last = max(longest, time.perf_counter() - last), time.perf_counter()
        assert len((await work2).turns) == 300
    print(f"a conversation of 3 MB: the loop was held up for {longest * 1e3:.0f} ms at most")
    assert longest < 0.25
