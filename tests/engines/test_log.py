from __future__ import annotations

from pathlib import Path

from llmkit.engines.log import LogFollower, last_lines


def test_a_log_is_followed_from_its_first_line_on(tmp_path: Path) -> None:
    path = tmp_path / "log"
    follower = LogFollower(path)
    assert follower.read() == []
    path.write_text("one\ntwo")
    assert follower.read() == ["one"]
    with path.open("a") as file:
        file.write(" and a half\n\r10%\r20%\r")
    assert follower.read() == ["two and a half", "10%", "20%"]
    assert follower.read() == []


def test_bytes_that_are_no_text_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"\xff\xfe\0\n")
    assert LogFollower(path).read() == ["\ufffd\ufffd\0"]
    assert last_lines(path, 5) == ["\ufffd\ufffd\0"]


def test_the_last_lines_are_those_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    assert last_lines(path, 3) == []
    path.write_text("\n".join(map(str, range(500_000))) + "\n")
    assert last_lines(path, 3) == ["499997", "499998", "499999"]
