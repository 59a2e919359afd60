from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from llmkit.panel.pace import paced


def test_no_text_is_lost_and_the_messages_are_few() -> None:
    pieces = [f"{number} " for number in range(3000)]

    def quick() -> Iterator[str]:
        for piece in pieces:
            time.sleep(0.0001)
            yield piece

    started = time.monotonic()
    batches = list(paced(quick()))
    seconds = time.monotonic() - started
    assert "".join(batches) == "".join(pieces)
    print(f"{len(batches)} messages for 3,000 tokens in {seconds:.2f} s: {len(batches) / seconds:.1f} a second")
    assert len(batches) <= 30 * seconds + 1


def test_the_first_piece_comes_at_once_and_a_pause_holds_nothing_back() -> None:
    more = threading.Event()

    def slow() -> Iterator[str]:
        yield "a"
        time.sleep(0.005)
        yield "b"
        more.wait(5)
        yield "c"

    batches = paced(slow())
    started = time.monotonic()
    assert next(batches) == "a"
    assert time.monotonic() - started < 0.02
    assert next(batches) == "b"  # although nothing follows it yet
    more.set()
    assert list(batches) == ["c"]


def test_an_error_comes_after_what_came_before_it() -> None:
    def breaks() -> Iterator[str]:
        yield "a"
        yield "b"
        raise ValueError("broken")

    got: list[str] = []
    with pytest.raises(ValueError, match="broken"):
        got.extend(paced(breaks()))
    assert "".join(got) == "ab"


def test_nothing_at_all_is_no_text() -> None:
    assert list(paced([])) == []
