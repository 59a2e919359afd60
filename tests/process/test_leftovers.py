"""What a double kill left is ended; what somebody keeps, or what merely looks like it, is not touched."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import wait_until

from llmkit.process.guardian import ENGINE_ID, RECORD, boot_id, marked, stat
from llmkit.process.keeper import KeptProcess
from llmkit.process.leftovers import reap_leftovers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="process trees are kept on Linux only")

HERE = Path(__file__).parent
TREE = [sys.executable, "-I", "-S", str(HERE / "tree.py")]


@pytest.fixture
def run_root() -> Path:
    return Path(os.environ["LLMKIT_RUN_DIR"])


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """A process that is none of an engine's."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def identity(pid: int) -> list[int]:
    found = stat(pid)
    assert found
    return list(found.process)


def write_record(run_dir: Path, **fields: Any) -> None:
    run_dir.mkdir(parents=True)
    record = {"engine_id": "none", "boot_id": boot_id(), "guardian": [1 << 22, 1], "engine": None}
    (run_dir / RECORD).write_text(json.dumps({**record, **fields}))


def test_an_engine_without_server_and_guardian_is_ended(run_root: Path) -> None:
    command = [sys.executable, str(HERE / "parent.py"), str(run_root / "engine"), "3", "setsid", "ignore-sigterm"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout
        engine_id = server.stdout.readline().split()[0]
        wait_until(lambda: len(marked(engine_id)) == 4, "the tree is up")
        guardian, engine = (json.loads((run_root / "engine" / RECORD).read_text())[k] for k in ("guardian", "engine"))
        os.kill(guardian[0], signal.SIGSTOP)  # or it would notice
        server.kill()
        server.wait()
        os.kill(guardian[0], signal.SIGKILL)
    wait_until(lambda: stat(engine[0]) is None, "the first process ended with its guardian")
    assert len(marked(engine_id)) == 2
    assert reap_leftovers(run_root) == [run_root / "engine"]
    assert marked(engine_id) == []
    assert not (run_root / "engine").exists()


async def test_an_engine_whose_guardian_lives_is_left_alone(run_root: Path) -> None:
    kept = KeptProcess([*TREE, "2"], dict(os.environ), run_dir=run_root / "engine", log_file=run_root / "log")
    await kept.start()
    await asyncio.to_thread(wait_until, lambda: len(marked(kept.engine_id)) == 3, "the tree is up")
    assert await asyncio.to_thread(reap_leftovers, run_root) == []
    assert len(marked(kept.engine_id)) == 3
    assert await kept.stop()


def test_the_first_process_is_known_by_its_start_time_where_it_wiped_its_environment(
    run_root: Path, bystander: subprocess.Popen[bytes]
) -> None:
    write_record(run_root / "engine", engine=identity(bystander.pid))
    assert reap_leftovers(run_root) == [run_root / "engine"]
    assert bystander.wait(5) == -signal.SIGKILL


def test_a_process_that_only_has_the_number_of_an_engine_is_not_touched(
    run_root: Path, bystander: subprocess.Popen[bytes]
) -> None:
    pid, start = identity(bystander.pid)
    write_record(run_root / "later", engine=[pid, start - 1])
    write_record(run_root / "other-boot", engine=[pid, start], boot_id="another")
    assert len(reap_leftovers(run_root)) == 2
    assert bystander.poll() is None
    assert list(run_root.iterdir()) == []


def test_a_guardian_of_another_boot_keeps_nothing(run_root: Path, bystander: subprocess.Popen[bytes]) -> None:
    write_record(run_root / "engine", guardian=identity(bystander.pid), boot_id="another")
    assert reap_leftovers(run_root) == [run_root / "engine"]
    assert bystander.poll() is None


def test_processes_of_another_engine_are_not_touched(run_root: Path) -> None:
    with subprocess.Popen(["sleep", "60"], env={**os.environ, ENGINE_ID: "another-engine"}) as other:
        write_record(run_root / "engine", engine_id="another-engin")
        reap_leftovers(run_root)
        assert other.poll() is None
        write_record(run_root / "engine", engine_id="another-engine")
        reap_leftovers(run_root)
        assert other.wait(5) == -signal.SIGKILL


def test_a_folder_that_never_had_an_engine_is_removed(run_root: Path) -> None:
    (run_root / "engine").mkdir()
    (run_root / "engine" / f"{RECORD}.new").write_text("{")
    (run_root / "engine.log").write_text("words")
    assert reap_leftovers(run_root) == []
    assert list(run_root.iterdir()) == [run_root / "engine.log"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"engine_id": "x"}', '{"engine_id": 1, "boot_id": 2, "guardian": 3}'])
def test_a_record_that_cannot_be_understood_ends_nothing(run_root: Path, text: str) -> None:
    (run_root / "engine").mkdir()
    (run_root / "engine" / RECORD).write_text(text)
    assert reap_leftovers(run_root) == []
    assert reap_leftovers(run_root / "missing") == []
