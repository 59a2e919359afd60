from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from llmkit.client import Piece
from llmkit.panel.pace import paced


def texts(pieces: list[Piece]) -> list[str]:
    return [piece.text for piece in pieces]


def test_no_text_is_lost_and_the_messages_are_few() -> None:
    pieces = [f"{number} " for number in range(3000)]

    def quick() -> Iterator[Piece]:
        for piece in pieces:
            time.sleep(0.0001)
            yield Piece(piece, "")

    started = time.monotonic()
    batches = list(paced(quick()))
    seconds = time.monotonic() - started
    assert "".join(texts(batches)) == "".join(pieces)
    print(f"{len(batches)} messages for 3,000 tokens in {seconds:.2f} s: {len(batches) / seconds:.1f} a second")
    assert len(batches) <= 30 * seconds + 1


@pytest.mark.alone
def test_the_first_piece_comes_at_once_and_a_pause_holds_nothing_back() -> None:
    more = threading.Event()

    def slow() -> Iterator[Piece]:
        yield Piece("", "a")
        time.sleep(0.005)
        yield Piece("b", "")
        more.wait(5)
        yield Piece("c", "")

    batches = paced(slow())
    started = time.monotonic()
    assert next(batches) == Piece("", "a")
    assert time.monotonic() - started < 0.02
    assert next(batches) == Piece("b", "")  # although nothing follows it yet
    more.set()
    assert texts(list(batches)) == ["c"]


def test_an_error_comes_after_what_came_before_it() -> None:
    def breaks() -> Iterator[Piece]:
        yield Piece("a", "")
        yield Piece("b", "")
        raise ValueError("broken")

    got: list[Piece] = []
    with pytest.raises(ValueError, match="broken"):
        got.extend(paced(breaks()))
    assert "".join(texts(got)) == "ab"


def test_nothing_at_all_is_no_text() -> None:
    assert list(paced([])) == []
