"""Large answers share memory: no two wait for each other, none takes another's place, and every wait has an end."""

from __future__ import annotations

import asyncio

import pytest

from llmkit.engines import answer_memory
from llmkit.engines.answer_memory import FREE_BYTES, SHARED_BYTES, AnswerMemory
from llmkit.errors import TimedOut

MIB = 1 << 20


@pytest.fixture
def memory() -> AnswerMemory:
    return AnswerMemory()


async def waits(task: asyncio.Task[None]) -> bool:
    """Let everything go on that can, and say whether the task still waits."""
    for _ in range(5):
        await asyncio.sleep(0)
    return not task.done()


async def test_small_answers_never_wait(memory: AnswerMemory) -> None:
    await memory.grow("large", SHARED_BYTES * 4)
    async with asyncio.timeout(1):
        for number in range(100):
            await memory.grow(f"small {number}", FREE_BYTES)


async def test_large_ones_grow_while_there_is_room_and_go_on_when_there_is_again(memory: AnswerMemory) -> None:
    await memory.grow("first", SHARED_BYTES - MIB)
    await memory.grow("second", MIB)
    more = asyncio.create_task(memory.grow("second", MIB + 1))
    assert await waits(more)
    memory.release("first")
    await more
    memory.release("second")
    await memory.grow("third", 36 * MIB)


async def test_two_that_wait_for_more_do_not_wait_for_each_other(memory: AnswerMemory) -> None:
    await memory.grow("first", SHARED_BYTES // 2)
    await memory.grow("second", SHARED_BYTES // 2)
    second = asyncio.create_task(memory.grow("second", SHARED_BYTES))
    assert await waits(second)
    await memory.grow("first", 36 * MIB)  # the first always goes on
    assert not second.done()
    memory.release("first")
    await second


async def test_the_next_one_becomes_the_first(memory: AnswerMemory) -> None:
    await memory.grow("first", SHARED_BYTES)
    tasks = [asyncio.create_task(memory.grow(name, 20 * MIB)) for name in ("second", "third")]
    assert await waits(tasks[0])
    memory.release("first")
    done, _ = await asyncio.wait(tasks, timeout=5, return_when=asyncio.FIRST_COMPLETED)
    assert len(done) == 1
    name = ("second", "third")[tasks.index(done.pop())]
    memory.release(name)
    await asyncio.gather(*tasks)


async def test_a_wait_that_is_cancelled_takes_nothing(memory: AnswerMemory) -> None:
    await memory.grow("first", SHARED_BYTES)
    gone = asyncio.create_task(memory.grow("gone", MIB))
    assert await waits(gone)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    memory.release("gone")
    memory.release("first")
    await memory.grow("other", 36 * MIB)
    assert not memory._waiting


async def test_a_wait_ends_with_a_clear_error(memory: AnswerMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_memory, "LONGEST_WAIT_SECONDS", 0.05)
    await memory.grow("first", SHARED_BYTES)
    with pytest.raises(TimedOut, match="other large ones take the memory") as caught:
        await memory.grow("second", MIB)
    assert "less at once" in str(caught.value.hint)
    assert not memory._waiting
