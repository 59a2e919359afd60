"""The file of a batch: what a kill, a full disk, a second process and other files do to it."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support import REPOSITORY

from llmkit.client.batch_checkpoint import Checkpoint, Row
from llmkit.errors import DiskFull, DoesNotFit, LLMKitError, WrongState


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "below" / "batch.jsonl"


def known(path: Path, *ids: str) -> dict[str, Row]:
    with Checkpoint(path) as checkpoint:
        return checkpoint.read(ids)


def test_what_was_written_is_there_the_next_time_and_the_last_word_counts(path: Path) -> None:
    rows = [Row(id="a", response="ö\n\u2028"), Row(id="b", error="no"), Row(id="c", response="x")]
    with Checkpoint(path) as checkpoint:
        assert checkpoint.read(["a"]) == {}
        checkpoint.append(rows[:2])
        checkpoint.append([rows[2], Row(id="b", response="yes", seconds=0.5)])
    assert known(path, "a", "b") == {"a": rows[0], "b": Row(id="b", response="yes", seconds=0.5)}


def test_every_torn_end_costs_only_the_line_that_was_not_whole(path: Path) -> None:
    with Checkpoint(path) as checkpoint:
        checkpoint.append([Row(id="a", response="one"), Row(id="b", response="two")])
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        expected = {name for name, end in (("a", 2), ("b", 3)) if size >= sum(map(len, lines[:end]))}
        with Checkpoint(path) as checkpoint:
            assert set(checkpoint.read(["a", "b"])) == expected
            checkpoint.append([Row(id="c", response="three")])
        assert set(known(path, "a", "b", "c")) == {*expected, "c"}


def test_a_line_that_somebody_has_edited_is_as_if_it_were_not_there(path: Path) -> None:
    with Checkpoint(path) as checkpoint:
        checkpoint.append([Row(id="a", response="one"), Row(id="b", response="two")])
    path.write_bytes(path.read_bytes().replace(b'"one"', b"one"))
    assert set(known(path, "a", "b")) == {"b"}


@pytest.mark.parametrize("content", ["a,b\n1,2\n", '{"other": 1}\n', "text"])
def test_another_file_is_refused_and_left_as_it_is(path: Path, content: str) -> None:
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(DoesNotFit, match="is no checkpoint"), Checkpoint(path):
        pass
    assert path.read_text() == content


def test_a_file_of_a_later_version_is_refused(path: Path) -> None:
    path.parent.mkdir()
    path.write_text('{"llmkit_map": 2}\n')
    with pytest.raises(DoesNotFit, match=r"version 2.*\nUpgrade"), Checkpoint(path):
        pass


def test_a_second_call_in_this_process_or_another_is_refused(path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom llmkit.client.batch_checkpoint import Checkpoint\n"
        "with Checkpoint(Path(sys.argv[1])): print('open')"
    )
    command = [sys.executable, "-c", code, str(path)]

    def other() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)

    with Checkpoint(path):
        with pytest.raises(WrongState, match="Another batch writes to"), Checkpoint(path):
            pass
        assert "Another batch writes to" in other().stderr
    assert other().stdout == "open\n"


def test_a_full_disk_is_a_clear_error_and_what_was_finished_is_kept(path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoint(path) as checkpoint:
        checkpoint.append([Row(id="a", response="kept")])
        # The nearest to a full disk that needs no other file system: the write stops in the middle of a line.
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, before[1]))
        try:
            with pytest.raises(DiskFull, match=r"(?s)No room on the disk.*Make room and run the same call again"):
                checkpoint.append([Row(id="b", response="x" * 1000)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        checkpoint.append([Row(id="c", response="there is room again")])
    assert set(known(path, "a", "b", "c")) == {"a", "c"}


@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_where_one_may_not_write_is_a_clear_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(LLMKitError, match=r"cannot be written"), Checkpoint(tmp_path / "x.jsonl"):
        pass


def test_a_path_that_is_a_folder_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(LLMKitError, match=r"(?s)cannot be written.*checkpoint="), Checkpoint(tmp_path):
        pass


def test_a_file_that_is_left_while_it_is_written_is_closed_afterwards_and_no_other_is_written_to(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    fsync = os.fsync

    def slow(file: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            assert go_on.wait(30)
        fsync(file)

    monkeypatch.setattr(os, "fsync", slow)
    with Checkpoint(path) as checkpoint:
        writing = threading.Thread(target=checkpoint.append, args=([Row(id="a", response="one")],))
        writing.start()
        assert begun.wait(30)
    others = [os.open(path.with_suffix(f".{number}"), os.O_RDWR | os.O_CREAT) for number in range(5)]
    # Nobody else gets the file until all is written.
    with pytest.raises(WrongState, match="Another batch"), Checkpoint(path):
        pass
    go_on.set()
    writing.join()
    with pytest.raises(WrongState, match="is closed"):
        checkpoint.append([Row(id="b", response="two")])
    for other in others:
        assert os.fstat(other).st_size == 0
        os.close(other)
    assert known(path, "a", "b") == {"a": Row(id="a", response="one")}


def test_a_disk_without_locks_is_a_clear_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(LLMKitError, match=r"(?s)cannot be locked: No locks available.*another disk"), Checkpoint(path):
        pass
