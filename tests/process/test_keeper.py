"""A kept process tree ends with its server, with its guardian, and when it is asked to; whatever it does against it."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from support import wait_until

from llmkit.process.guardian import RECORD, Process, end_all, is_alive, marked, send
from llmkit.process.guardian import stat as process_stat
from llmkit.process.keeper import Ended, KeptProcess

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="process trees are kept on Linux only")

HERE = Path(__file__).parent
TREE = [sys.executable, "-I", "-S", str(HERE / "tree.py")]
SECONDS = 5.0

Keep = Callable[..., KeptProcess]


@pytest.fixture
def run_root() -> Path:
    return Path(os.environ["LLMKIT_RUN_DIR"])


@pytest.fixture
def keep(run_root: Path, jp_asyncio_loop: asyncio.AbstractEventLoop) -> Iterator[Keep]:
    """Make kept processes; at the end of the test nothing is left of them, whether it stopped them or not."""
    made: list[KeptProcess] = []

    def make(*command: str, grace: float = 3.0) -> KeptProcess:
        place = run_root / f"e{len(made)}"
        log_file = place.with_suffix(".log")
        made.append(KeptProcess(command, dict(os.environ), run_dir=place, log_file=log_file, grace=grace))
        return made[-1]

    yield make
    for kept in made:
        assert jp_asyncio_loop.run_until_complete(kept.stop())


def engine_of(kept: KeptProcess) -> list[int]:
    """Give what runs of the command, without the guardian."""
    return [process.pid for process in marked(kept.engine_id) if process.pid != kept.guardian_pid]


async def until(condition: Callable[[], object], seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        await asyncio.sleep(0.01)


async def test_stop_ends_every_process_and_removes_the_folder(keep: Keep, run_root: Path) -> None:
    kept = keep(*TREE, "3", "setsid")
    await kept.start()
    await until(lambda: len(engine_of(kept)) == 3)
    (run_root / "e0" / "sub").mkdir()
    (run_root / "e0" / "sub" / "file").write_text("left")
    started = time.monotonic()
    assert await kept.stop()
    assert time.monotonic() - started < 1.5
    assert marked(kept.engine_id) == []
    assert list(run_root.iterdir()) == [run_root / "e0.log"]
    assert kept.ended == Ended(-signal.SIGTERM)


async def test_a_tree_that_ignores_sigterm_is_killed_after_the_grace(keep: Keep) -> None:
    kept = keep(*TREE, "3", "setsid", "ignore-sigterm", grace=0.4)
    await kept.start()
    await until(lambda: len(engine_of(kept)) == 3)
    started = time.monotonic()
    assert await kept.stop()
    assert 0.4 <= time.monotonic() - started < 2.0
    assert marked(kept.engine_id) == []
    assert kept.ended == Ended(-signal.SIGKILL)


async def test_the_first_process_gets_the_time_to_end_the_others_in_good_order(keep: Keep, run_root: Path) -> None:
    program = """
import os, signal, time
child = os.fork()
if not child:
    signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b"child was asked"), os._exit(1)))
    time.sleep(60)
def end(*_):
    time.sleep(0.2)
    os.kill(child, signal.SIGKILL)
    print("ended in good order", flush=True)
    os._exit(7)
signal.signal(signal.SIGTERM, end)
print("up", flush=True)
time.sleep(60)
"""
    kept = keep(sys.executable, "-I", "-S", "-c", program)
    await kept.start()
    log = run_root / "e0.log"
    await until(lambda: log.read_text() == "up\n")
    assert await kept.stop()
    assert log.read_text() == "up\nended in good order\n"
    assert kept.ended == Ended(7)


@pytest.mark.parametrize("status", [0, 3, -signal.SIGKILL])
async def test_the_end_of_the_first_process_is_reported_and_ends_the_others(
    keep: Keep, status: int, run_root: Path
) -> None:
    kept = keep(*TREE, "3", "setsid", f"exit={int(status)}")
    await kept.start()
    assert await asyncio.wait_for(kept.wait_exit(), SECONDS) == Ended(status)
    await until(lambda: not marked(kept.engine_id))
    await until(lambda: not (run_root / "e0").exists())


async def test_a_command_that_cannot_be_started_says_so_in_the_log(keep: Keep, run_root: Path) -> None:
    kept = keep("/nonexistent/program")
    await kept.start()
    assert await asyncio.wait_for(kept.wait_exit(), SECONDS) == Ended(127)
    assert "/nonexistent/program cannot be started: No such file" in (run_root / "e0.log").read_text()


async def test_what_the_guardian_leaves_when_it_is_killed_is_ended_and_the_loss_reported(
    keep: Keep, run_root: Path
) -> None:
    kept = keep(*TREE, "3", "setsid", "ignore-sigterm", grace=0.2)
    await kept.start()
    await until(lambda: len(engine_of(kept)) == 3)
    assert kept.guardian_pid
    os.kill(kept.guardian_pid, signal.SIGKILL)
    assert await asyncio.wait_for(kept.wait_exit(), SECONDS) == Ended(None, guardian_lost=True)
    await until(lambda: not marked(kept.engine_id))
    await until(lambda: not (run_root / "e0").exists())


async def test_sigterm_to_the_guardian_ends_the_tree_and_a_terminal_cannot(keep: Keep) -> None:
    kept = keep(*TREE, "2")
    await kept.start()
    await until(lambda: len(engine_of(kept)) == 2)
    assert kept.guardian_pid
    # A terminal reaches sessions, and this one is neither the server's nor the engine's.
    sessions = {os.getsid(pid) for pid in (0, kept.guardian_pid, *engine_of(kept))}
    assert len(sessions) == 3
    for signum in (signal.SIGINT, signal.SIGHUP):
        os.kill(kept.guardian_pid, signum)
    await asyncio.sleep(0.3)
    assert len(engine_of(kept)) == 2
    os.kill(kept.guardian_pid, signal.SIGTERM)
    assert await asyncio.wait_for(kept.wait_exit(), SECONDS) == Ended(-signal.SIGTERM)
    await until(lambda: not marked(kept.engine_id))


async def test_no_engine_holds_what_the_server_has_open_nor_the_pipe_of_another(keep: Keep, run_root: Path) -> None:
    first, second = keep(*TREE, "1"), keep(*TREE, "1", "print-fds")
    with (run_root / "of-the-server").open("w"):
        await first.start()
        await second.start()
    await until((run_root / "e1.log").read_text)
    assert (run_root / "e1.log").read_text().split() == ["0", "1", "2"]
    started = time.monotonic()
    assert await first.stop()
    assert time.monotonic() - started < 1.5
    assert engine_of(second)


@pytest.mark.parametrize("moment", [0.0, 0.001, 0.02, 0.03, 0.05, 0.2])
async def test_a_start_that_is_cancelled_leaves_nothing_after_stop(keep: Keep, moment: float, run_root: Path) -> None:
    kept = keep(*TREE, "3", "setsid")
    starting = asyncio.create_task(kept.start())
    await asyncio.sleep(moment)
    starting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await starting
    started = time.monotonic()
    assert await kept.stop()
    assert time.monotonic() - started < 1.5
    assert marked(kept.engine_id) == []
    assert not (run_root / "e0").exists()


async def test_stop_may_come_before_the_start_twice_and_from_callers_that_leave(keep: Keep) -> None:
    unused = keep(*TREE, "1")
    assert await unused.stop()
    kept = keep(*TREE, "2")
    await kept.start()
    leaving = asyncio.create_task(kept.stop())
    await asyncio.sleep(0)
    leaving.cancel()
    assert await asyncio.gather(kept.stop(), kept.stop()) == [True, True]
    assert marked(kept.engine_id) == []


async def test_folder_record_and_log_are_for_their_user_alone(keep: Keep, run_root: Path) -> None:
    (run_root / "e0.log").write_text("of an earlier load")
    kept = keep(*TREE, "1")
    await kept.start()
    await until(lambda: engine_of(kept))
    modes = {path: stat.S_IMODE((run_root / path).stat().st_mode) for path in ("e0", f"e0/{RECORD}", "e0.log")}
    assert modes == {"e0": 0o700, f"e0/{RECORD}": 0o600, "e0.log": 0o600}
    assert (run_root / "e0.log").read_text() == ""


async def test_what_an_earlier_engine_left_in_the_folder_does_not_stop_the_start(keep: Keep, run_root: Path) -> None:
    (run_root / "e0").mkdir()
    (run_root / "e0" / "engine.sock").write_text("")
    kept = keep(*TREE, "1")
    await kept.start()
    await until(lambda: engine_of(kept))
    assert not (run_root / "e0" / "engine.sock").exists()


async def test_shared_memory_of_a_killed_tree_is_removed(keep: Keep, run_root: Path) -> None:
    program = (
        "import signal, time; from multiprocessing.shared_memory import SharedMemory\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print(SharedMemory(create=True, size=4096).name, flush=True)\n"
        "time.sleep(60)"
    )
    kept = keep(sys.executable, "-c", program, grace=0.1)
    await kept.start()
    log = run_root / "e0.log"
    await until(lambda: log.read_text().endswith("\n"))
    segment = Path("/dev/shm", log.read_text().strip())
    assert segment.exists()
    assert await kept.stop()
    assert not segment.exists()


async def test_shared_memory_that_only_its_processes_know_of_is_removed_unless_another_uses_it(
    keep: Keep, run_root: Path
) -> None:
    """As vLLM's workers on the CPU make it: no resource tracker hears of it."""
    program = (
        "import mmap, os, sys, time\n"
        "for path in sys.argv[1:]:\n"
        "    file = os.open(path, os.O_RDWR | os.O_CREAT)\n"
        "    os.ftruncate(file, 4096)\n"
        "    globals()[path] = mmap.mmap(file, 4096)\n"
        "print('made', flush=True)\n"
        "time.sleep(60)"
    )
    own, common = (Path("/dev/shm", f"llmkit-test-{os.getpid()}-{name}") for name in ("own", "common"))
    try:
        kept = keep(sys.executable, "-c", program, str(own), str(common))
        await kept.start()
        await until(lambda: (run_root / "e0.log").read_text().endswith("made\n"))
        with common.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
            assert await kept.stop()
            assert not own.exists()
            assert common.exists()
    finally:
        own.unlink(missing_ok=True)
        common.unlink(missing_ok=True)


def test_what_was_seen_once_is_ended_though_a_later_look_misses_it() -> None:
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"]) as child:
        found = process_stat(child.pid)
        assert found is not None
        looks = iter([[found.process]])
        assert end_all(lambda: next(looks, []), 0.0)
        assert not is_alive(found.process)


async def test_shared_memory_of_one_process_that_was_killed_alone_is_removed(keep: Keep, run_root: Path) -> None:
    """When the rest of the engine is ended, nobody has it mapped any more."""
    program = (
        "import mmap, os, sys, time\n"
        "if os.fork():\n"
        "    time.sleep(60)\n"
        "file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\n"
        "os.ftruncate(file, 4096)\n"
        "mapped = mmap.mmap(file, 4096)\n"
        "print('made', os.getpid(), flush=True)\n"
        "time.sleep(60)"
    )
    segment = Path("/dev/shm", f"llmkit-test-{os.getpid()}-alone")
    try:
        kept = keep(sys.executable, "-c", program, str(segment))
        await kept.start()
        log = run_root / "e0.log"
        await until(lambda: log.read_text().startswith("made ") and log.read_text().endswith("\n"))
        await asyncio.sleep(2.5)  # the guardian looks every second
        os.kill(int(log.read_text().split()[1]), signal.SIGKILL)
        assert segment.exists()
        assert await kept.stop()
        assert not segment.exists()
    finally:
        segment.unlink(missing_ok=True)


async def test_shared_memory_is_removed_where_the_guardian_never_gets_the_time_to(keep: Keep, run_root: Path) -> None:
    """As on a machine that is so busy that it is given up: the processes have ended, their memory is still there."""
    program = (
        "import mmap, os, sys, time\n"
        "file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\n"
        "os.ftruncate(file, 4096)\n"
        "mapped = mmap.mmap(file, 4096)\n"
        "print('made', flush=True)\n"
        "time.sleep(60)"
    )
    segment = Path("/dev/shm", f"llmkit-test-{os.getpid()}-starved")
    try:
        kept = keep(sys.executable, "-c", program, str(segment), grace=0.1)
        await kept.start()
        await until(lambda: (run_root / "e0.log").read_text() == "made\n")
        assert kept.guardian_pid is not None
        os.kill(kept.guardian_pid, signal.SIGSTOP)
        stopping = asyncio.create_task(kept.stop())
        stdin = kept._guardian and kept._guardian.stdin
        await until(lambda: stdin is not None and stdin.closed)
        for pid in engine_of(kept):
            os.kill(pid, signal.SIGKILL)
        assert await stopping
        assert not segment.exists()
    finally:
        segment.unlink(missing_ok=True)


async def test_the_whole_tree_is_measured(keep: Keep) -> None:
    kept = keep(*TREE, "3")
    assert await kept.pss_bytes() is None
    await kept.start()
    await until(lambda: len(engine_of(kept)) == 3)
    one = psutil.Process(engine_of(kept)[0]).memory_full_info().pss
    measured = await kept.pss_bytes()
    assert measured is not None
    assert one < measured < 10 * one


async def test_the_processor_time_of_the_tree_is_added_up(keep: Keep) -> None:
    idle, busy = keep(*TREE, "2"), keep(sys.executable, "-I", "-S", "-c", "while True: pass")
    await idle.start()
    await busy.start()
    for _ in range(50):
        await asyncio.sleep(0.1)
        if await busy.cpu_seconds() > 0.5:
            break
    assert await busy.cpu_seconds() > 0.5 > await idle.cpu_seconds()


@pytest.mark.parametrize("moment", ["at once", "up"])
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_when_the_server_is_ended(run_root: Path, signum: signal.Signals, moment: str) -> None:
    with small_server(run_root, "3", "setsid") as (server, engine_id, _):
        if moment == "up":
            wait_until(lambda: len(marked(engine_id)) == 4, "the tree is up")
        server.send_signal(signum)
        server.wait(SECONDS)
        wait_until(lambda: not marked(engine_id), "the tree is gone")
        wait_until(lambda: not (run_root / "engine").exists(), "the folder is gone")


def test_nothing_is_left_when_the_server_is_killed_and_its_child_holds_the_pipe(run_root: Path) -> None:
    with small_server(run_root, "fork", "2") as (server, engine_id, bystander):
        try:
            server.kill()
            server.wait(SECONDS)
            wait_until(lambda: not marked(engine_id), "the tree is gone")
            assert psutil.pid_exists(bystander)
        finally:
            os.kill(bystander, signal.SIGKILL)


@contextlib.contextmanager
def small_server(run_root: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str, int]]:
    command = [sys.executable, str(HERE / "parent.py"), str(run_root / "engine"), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout
            engine_id, bystander = server.stdout.readline().split()
            yield server, engine_id, int(bystander)
        finally:
            server.kill()


def test_no_process_is_mistaken_for_another_with_its_number() -> None:
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        found = process_stat(sleeper.pid)
        assert found
        other = Process(sleeper.pid, found.process.start + 1)
        assert not is_alive(other)
        send(other, signal.SIGKILL)
        time.sleep(0.05)
        assert sleeper.poll() is None
        send(found.process, signal.SIGKILL)
        assert sleeper.wait(SECONDS) == -signal.SIGKILL


@pytest.mark.parametrize("module", ["guardian", "keeper", "leftovers"])
def test_the_modules_can_be_imported_on_other_systems(module: str) -> None:
    program = f"""
import asyncio, importlib, os, select, signal, subprocess, sys
sys.platform = "win32"
for owner, names in (
    (os, ["fork", "getuid", "setsid", "pidfd_open"]),
    (select, ["poll"]),
    (signal, ["SIGKILL", "SIGHUP", "SIGCHLD", "pidfd_send_signal"]),
):
    for name in names:
        delattr(owner, name)
importlib.import_module("llmkit.process.{module}")
"""
    subprocess.run([sys.executable, "-c", program], check=True)


async def test_to_start_one_on_another_system_is_refused(keep: Keep, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = keep(*TREE, "1")
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(OSError, match="Linux only"):
        await kept.start()
