"""How a stream of events is cut, whatever the pieces are that it comes in."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmkit.engines import sse
from llmkit.engines.sse import EventCutter, data_of, split_events
from llmkit.errors import UpstreamFailed

pytestmark = pytest.mark.timeout(30)

LINE_ENDS = ["\n", "\r\n"]
TEXT = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=12)
LINES = st.one_of(
    st.tuples(st.sampled_from(["data: ", "data:", "event: ", "id: ", ": ", ":", "retry: "]), TEXT).map("".join),
    st.sampled_from(["data", "data: [DONE]", 'data: {"a": "\\n\\n"}', "other: field", "no field"]),
)
EVENTS = st.lists(st.lists(LINES, min_size=1, max_size=4), max_size=8)


def written(events: list[list[str]], line_ends: list[str]) -> bytes:
    """Write events, each with a line end of its own."""
    return b"".join(
        "".join(line + line_end for line in [*event, ""]).encode()
        for event, line_end in zip(events, line_ends, strict=True)
    )


def cut(stream: bytes, sizes: list[int]) -> list[bytes]:
    """Cut a stream into pieces of these sizes, again and again."""
    pieces, start, turn = [], 0, 0
    while start < len(stream):
        pieces.append(stream[start : start + sizes[turn % len(sizes)]])
        start, turn = start + sizes[turn % len(sizes)], turn + 1
    return pieces


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[list[str]], bytes]:
    events = draw(EVENTS)
    line_ends = draw(st.lists(st.sampled_from(LINE_ENDS), min_size=len(events), max_size=len(events)))
    return events, written(events, line_ends)


SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=6)


# -- cutting -------------------------------------------------------------------------------------------------------


@given(stream=streams(), tail=st.sampled_from(["", "data: x", "data: x\n", "data: x\r\n", "\r", ":"]), sizes=SIZES)
@example(stream=([["data: x"]], b"data: x\r\n\r\n"), tail="", sizes=[1])
@example(stream=([["data: x"]], b"data: x\r\n\r\n"), tail="data: y\r\n", sizes=[10, 1, 1])
def test_nothing_is_lost_or_added_and_only_whole_events_are_given(
    stream: tuple[list[list[str]], bytes], tail: str, sizes: list[int]
) -> None:
    _, whole = stream
    cutter = EventCutter()
    given_pieces = [cutter.feed(piece) for piece in cut(whole + tail.encode(), sizes)]
    assert b"".join(given_pieces) == whole
    assert cutter.feed(b"\n\n") == tail.encode() + b"\n\n"
    for piece in given_pieces:
        assert piece == b"" or piece.endswith((b"\n\n", b"\r\n\r\n"))


@given(stream=streams(), sizes=SIZES)
def test_an_event_is_given_as_soon_as_its_end_has_come(stream: tuple[list[list[str]], bytes], sizes: list[int]) -> None:
    _, whole = stream
    cutter, fed, told = EventCutter(), b"", b""
    for piece in cut(whole, sizes):
        fed += piece
        told += cutter.feed(piece)
        end = max(
            fed.rfind(b"\n\n") + 2 if b"\n\n" in fed else 0, fed.rfind(b"\r\n\r\n") + 4 if b"\r\n\r\n" in fed else 0
        )
        assert told == fed[:end]


@given(stream=streams(), sizes=SIZES)
def test_the_same_events_are_found_however_they_were_cut(
    stream: tuple[list[list[str]], bytes], sizes: list[int]
) -> None:
    events, whole = stream
    cutter = EventCutter()
    found = [event for piece in cut(whole, sizes) for event in split_events(cutter.feed(piece))]
    assert found == ["\n".join(lines).encode() for lines in events]


@given(pieces=st.lists(st.binary(max_size=20) | st.sampled_from([b"\n", b"\r", b"\n\n", b"\r\n\r\n", b""])))
def test_of_any_bytes_nothing_is_lost_or_added(pieces: list[bytes]) -> None:
    cutter = EventCutter()
    told = b"".join(map(cutter.feed, pieces))
    assert told + cutter.feed(b"\n\n") == b"".join(pieces) + b"\n\n"


def test_whole_events_pass_as_they_came() -> None:
    piece = b"data: 1\n\ndata: 2\n\n"
    assert EventCutter().feed(piece) is piece


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_an_end_that_comes_byte_by_byte_is_seen(line_end: bytes) -> None:
    cutter = EventCutter()
    event = b"data: x" + line_end * 2
    assert [cutter.feed(event[n : n + 1]) for n in range(len(event))] == [b""] * (len(event) - 1) + [event]
    assert cutter.feed(event) == event


def test_a_carriage_return_alone_ends_nothing() -> None:
    cutter = EventCutter()
    assert cutter.feed(b"data: x\r\rdata: y\r\r") == b""
    assert cutter.feed(b"\n\n") == b"data: x\r\rdata: y\r\r\n\n"


def test_what_a_cutter_has_given_is_not_changed_by_what_comes_later() -> None:
    cutter = EventCutter()
    cutter.feed(b"data: ")
    first = cutter.feed(b"1\n\nda")
    cutter.feed(b"ta: 2\n\n")
    assert (first, hash(first)) == (b"data: 1\n\n", hash(b"data: 1\n\n"))


# -- limits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 100, 1000])
def test_an_endless_event_is_refused_however_it_comes(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 10_000)
    cutter = EventCutter()
    cutter.feed(b"data: whole\n\n")
    for _ in range(10_000 // size):
        assert cutter.feed(b"x" * size) == b""
    with pytest.raises(UpstreamFailed, match="endless event"):
        cutter.feed(b"x")


def test_an_endless_event_after_whole_ones_in_one_piece_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 1000)
    assert EventCutter().feed(b"data: x\n\n" + b"y" * 1000) == b"data: x\n\n"
    with pytest.raises(UpstreamFailed, match="endless event"):
        EventCutter().feed(b"data: x\n\n" + b"y" * 1001)


def test_many_events_are_together_larger_than_one_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 1000)
    cutter = EventCutter()
    for _ in range(100):
        assert cutter.feed(b"data: " + b"y" * 500) == b""
        assert cutter.feed(b"\n\ndata: 2\n\n" * 200).endswith(b"data: 2\n\n")


def seconds_for(size: int, piece: int, block: bytes) -> float:
    """Give how long it takes to feed an event of a size in pieces, at best of three times."""
    stream = (block * (size // len(block) + 1))[:size]
    pieces = [stream[start : start + piece] for start in range(0, size, piece)]
    best = float("inf")
    for _ in range(3):
        cutter = EventCutter()
        begun = time.perf_counter()
        for one in pieces:
            cutter.feed(one)
        best = min(best, time.perf_counter() - begun)
        assert len(cutter.feed(b"\n\n")) == size + 2
    return best


@pytest.mark.alone
@pytest.mark.parametrize("block", [b"x", b"data: x\n", b"data: x\r\n"], ids=["line", "lf", "crlf"])
def test_a_large_event_in_tiny_pieces_takes_time_in_proportion_to_its_size(block: bytes) -> None:
    small, large = seconds_for(32 << 10, 8, block), seconds_for(1 << 20, 8, block)
    assert large < 32 * small * 5, f"{large / small:.0f} times as long for 32 times as much"


@pytest.mark.alone
def test_many_small_events_in_pieces_that_end_within_one_take_time_in_proportion() -> None:
    def seconds(count: int) -> float:
        stream = b"data: 12345678\n\n" * count
        pieces = [stream[start : start + 100_001] for start in range(0, len(stream), 100_001)]
        best = float("inf")
        for _ in range(3):
            cutter = EventCutter()
            begun = time.perf_counter()
            total = sum(len(cutter.feed(piece)) for piece in pieces)
            best = min(best, time.perf_counter() - begun)
            assert total == len(stream)
        return best

    assert seconds(640_000) < 16 * seconds(40_000) * 5


# -- events and their data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("events", "split"),
    [
        (b"", []),
        (b"\n\n", []),
        (b"data: 1\n\n", [b"data: 1"]),
        (b"data: 1\r\n\r\n", [b"data: 1"]),
        (b"data: 1\n\ndata: 2\n\n", [b"data: 1", b"data: 2"]),
        (b"data: 1\r\n\r\ndata: 2\n\n", [b"data: 1", b"data: 2"]),
        (b"event: e\r\ndata: 1\r\n\r\n", [b"event: e\ndata: 1"]),
        (b": hello\n\n\n\ndata: 1\n\n", [b": hello", b"data: 1"]),
    ],
)
def test_events_are_split_without_the_blank_lines(events: bytes, split: list[bytes]) -> None:
    assert split_events(events) == split


@pytest.mark.parametrize(
    ("event", "data"),
    [
        (b"data: 1", b"1"),
        (b"data:1", b"1"),
        (b"data:  1 ", b" 1 "),
        (b"data:", b""),
        (b"data: ", b""),
        (b"data: a: b", b"a: b"),
        (b"data: [DONE]", b"[DONE]"),
        ("data: größe 🌍".encode(), "größe 🌍".encode()),
        (b"data: 1\ndata: 2", b"1\n2"),
        (b"data: 1\ndata:\ndata:3", b"1\n\n3"),
        (b"event: e\ndata: 1\nid: 7", b"1"),
        (b": comment\ndata: 1", b"1"),
        (b"\ndata: 1", b"1"),
        (b": comment", None),
        (b":", None),
        (b"event: ping", None),
        (b"database: 1", None),
        (b" data: 1", None),
        (b"", None),
    ],
)
def test_the_data_of_an_event_is_that_of_its_data_lines(event: bytes, data: bytes | None) -> None:
    assert data_of(event) == data


@given(
    lines=st.lists(TEXT, min_size=1, max_size=5), line_end=st.sampled_from(LINE_ENDS), space=st.sampled_from([" ", ""])
)
def test_data_of_any_lines_comes_back(lines: list[str], line_end: str, space: str) -> None:
    kept = lines if space else [line.removeprefix(" ") for line in lines]
    event = written([[f"data:{space}{line}" for line in lines]], [line_end])
    (found,) = split_events(EventCutter().feed(event))
    assert data_of(found) == "\n".join(kept).encode()
