"""Two servers never choose the same room of a GPU, and what is set aside ends with the server that set it aside."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import pytest
from fake_nvml import GIB, FakeGPU, FakeNVML
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit import schemas
from llmkit.errors import DiskFull, NoRoom, NotReady, TimedOut
from llmkit.process.devices import Devices
from llmkit.process.placement import Placement, Room, choose, utilization

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="engines run on GPUs on Linux only")

PROGRAM = """
import json, os, sys
from pathlib import Path
from fake_nvml import FakeGPU, FakeNVML
from llmkit.errors import NoRoom
from llmkit.process.devices import Devices
from llmkit.process.placement import Placement

gpus = [FakeGPU(total) for total in json.loads(sys.argv[2])]
placement = Placement(Devices(FakeNVML(*gpus)), Path(sys.argv[1]))
kept = []
print("ready", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked is None:
        kept.pop().release()
        answer = "released"
    else:
        try:
            kept.append(placement.reserve(*asked))
            answer = kept[-1].gpus
        except NoRoom as error:
            answer = error.message
    print(json.dumps(answer), flush=True)
"""


class Server:
    """Another process that chooses among GPUs of the same machine."""

    def __init__(self, folder: Path, gpus: Sequence[int]) -> None:
        tests = Path(__file__).resolve().parent.parent
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(folder), json.dumps(gpus)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(tests)},
            text=True,
        )
        assert self._answer() == "ready\n"

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def ask(self, asked: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        return json.loads(self._answer())

    def reserve(self, count: int, bytes_each: int) -> Any:
        """Give the GPUs, or the message of the error."""
        self.ask([count, bytes_each])
        return self.answer()

    def release(self) -> None:
        self.ask(None)
        assert self.answer() == "released"

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        with self.process:
            pass


Make = Callable[..., Placement]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "gpus"


@pytest.fixture(autouse=True)
def _every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def make(folder: Path) -> Make:
    return lambda *gpus: Placement(Devices(FakeNVML(*gpus)), folder)


def refused(placement: Placement, count: int, bytes_each: int) -> str:
    with pytest.raises(NoRoom) as caught:
        placement.reserve(count, bytes_each)
    return caught.value.message


def files(folder: Path) -> list[str]:
    """Give the suffixes of what lies there besides the lock."""
    return sorted(path.suffix for path in folder.iterdir() if path.name != "gpus.lock")


# -- the choice --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "count", "bytes_each", "chosen"),
    [
        ([5, 9, 7], 1, 5, [1]),
        ([5, 9, 7], 2, 5, [1, 2]),
        ([5, 9, 7], 3, 5, [0, 1, 2]),
        ([5, 9, 7], 3, 6, None),
        ([5, 9, 7], 4, 0, None),
        ([5, 9, 7], 1, 10, None),
        ([5, 5, 5], 2, 5, [0, 1]),
        ([0, 0], 1, 0, [0]),
        ([], 1, 0, None),
    ],
)
def test_those_with_most_room_are_chosen(free: list[int], count: int, bytes_each: int, chosen: list[int]) -> None:
    assert choose([Room(index, size) for index, size in enumerate(free)], count, bytes_each) == chosen


@given(free=st.lists(st.integers(0, 9)), count=st.integers(1, 4), bytes_each=st.integers(0, 9), data=st.data())
def test_a_choice_fits_and_leaves_no_larger_gpu(
    free: list[int], count: int, bytes_each: int, data: st.DataObject
) -> None:
    rooms = [Room(index, size) for index, size in enumerate(free)]
    chosen = choose(data.draw(st.permutations(rooms)), count, bytes_each)
    assert chosen == choose(rooms, count, bytes_each)
    fitting = [size for size in free if size >= bytes_each]
    if chosen is None:
        assert len(fitting) < count
    else:
        assert chosen == sorted(set(chosen))
        assert sorted((free[index] for index in chosen), reverse=True) == sorted(fitting, reverse=True)[:count]


amounts = st.integers(0, 200 * GIB)


@given(free=amounts, total=st.integers(0, 200 * GIB), margin=amounts)
def test_a_share_is_what_is_free_in_whole_percents(free: int, total: int, margin: int) -> None:
    share = utilization(free, total, margin)
    assert 0.01 <= share <= 0.9
    percent = round(share * 100)
    assert share == percent / 100
    if share > 0.01:
        assert percent * total <= (free - margin) * 100
    if 0.01 < share < 0.9:
        assert (free - margin) * 100 < (percent + 1) * total


@pytest.mark.parametrize(
    ("free", "total", "margin", "share"),
    [(24, 24, 0, 0.9), (12, 24, 0, 0.5), (29, 100, 0, 0.29), (58, 100, 1, 0.57), (0, 24, 1, 0.01), (0, 0, 0, 0.01)],
)
def test_shares(free: int, total: int, margin: int, share: float) -> None:
    assert utilization(free, total, margin) == share


# -- reservations of one server ----------------------------------------------------------------------------


def test_what_is_set_aside_does_not_count_as_free(make: Make) -> None:
    placement = make(FakeGPU(24 * GIB), FakeGPU(16 * GIB))
    first = placement.reserve(1, 10 * GIB)
    assert first.gpus == [0]
    assert placement.reservations() == {0: 10 * GIB}
    second = placement.reserve(2, 9 * GIB)
    assert second.gpus == [0, 1]
    assert placement.reservations() == {0: 19 * GIB, 1: 9 * GIB}
    first.release()
    assert placement.reservations() == {0: 9 * GIB, 1: 9 * GIB}


def test_who_takes_what_there_is_sets_all_of_it_aside(make: Make) -> None:
    placement = make(FakeGPU(24 * GIB, 4 * GIB))
    with placement.reserve(1, 0):
        assert placement.reservations() == {0: 20 * GIB}
        refused(placement, 1, 1)
    assert placement.reservations() == {}


def test_to_release_twice_is_to_release_once(make: Make, folder: Path) -> None:
    reservation = make(FakeGPU(24 * GIB)).reserve(1, 8 * GIB)
    reservation.release()
    unrelated = [os.open(folder / "gpus.lock", os.O_RDONLY) for _ in range(3)]
    with reservation:
        reservation.release()
    for file in unrelated:
        os.close(file)  # a second release would have closed one of these by its number
    assert files(folder) == []


def test_a_release_ends_nothing_else_if_the_folder_is_gone(make: Make, folder: Path) -> None:
    reservation = make(FakeGPU()).reserve(1, 1)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    reservation.release()
    assert make(FakeGPU()).reservations() == {}


def test_nothing_but_the_lock_is_left(make: Make, folder: Path) -> None:
    placement = make(FakeGPU(24 * GIB))
    with placement.reserve(1, GIB), contextlib.suppress(NoRoom):
        assert files(folder) == [".json"]
        placement.reserve(1, 24 * GIB)
    assert files(folder) == []
    assert folder.stat().st_mode & 0o777 == 0o700


async def test_a_reservation_of_a_load_that_was_cancelled_meanwhile_is_given_back(make: Make) -> None:
    placement = make(FakeGPU())
    chooses, go_on, read = threading.Event(), threading.Event(), placement._devices.read

    def slow() -> schemas.Devices:
        chooses.set()
        assert go_on.wait(10)
        return read()

    placement._devices.read = slow  # type: ignore[method-assign]
    task = asyncio.create_task(asyncio.to_thread(placement.reserve, 1, GIB))
    assert await asyncio.to_thread(chooses.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go_on.set()
    with placement._locked(10):
        pass  # the thread has chosen
    deadline = time.monotonic() + 5
    while placement.reservations():
        assert time.monotonic() < deadline, "it is still set aside"
        await asyncio.sleep(0.01)


def test_the_error_names_who_holds_it(make: Make) -> None:
    own = os.getpid()
    placement = make(
        FakeGPU(24 * GIB, 15 * GIB, processes=[(own, 15 * GIB)]), FakeGPU(24 * GIB, 20 * GIB), FakeGPU(40 * GIB)
    )
    with placement.reserve(1, 40 * GIB):
        message = refused(placement, 2, 10 * GIB)
    name = psutil.Process().name()
    assert message == (
        "2 GPUs with 10.0 GiB free each are needed; "
        f"GPU 0 has 9.0 of 24.0 GiB free, held by {name} (pid {own}): 15.0 GiB; "
        "GPU 1 has 4.0 of 24.0 GiB free, held by nobody that can be seen; "
        f"GPU 2 has 0.0 of 40.0 GiB free, held by a load of server {own}: 40.0 GiB set aside."
    )


def test_the_error_says_why_there_is_no_gpu(make: Make) -> None:
    assert refused(make(), 1, 0) == "1 GPU is needed; there is no NVIDIA GPU."


@pytest.mark.parametrize("visible", ["1", "GPU-b"])
def test_only_gpus_that_this_server_may_use_are_chosen(
    make: Make, monkeypatch: pytest.MonkeyPatch, visible: str
) -> None:
    placement = make(FakeGPU(80 * GIB, uuid="GPU-a"), FakeGPU(24 * GIB, uuid="GPU-b"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with placement.reserve(1, GIB) as reservation:
        assert reservation.gpus == [1]
    message = refused(placement, 1, 40 * GIB)
    assert "GPU 1" in message
    assert "GPU 0" not in message


# -- two servers -------------------------------------------------------------------------------------------


def test_the_other_server_sees_what_is_set_aside_and_whose_it_is(make: Make, folder: Path) -> None:
    placement = make(FakeGPU(24 * GIB))
    with Server(folder, [24 * GIB]) as other:
        assert other.reserve(1, 16 * GIB) == [0]
        assert placement.reservations() == {0: 16 * GIB}
        message = refused(placement, 1, 10 * GIB)
        assert f"a load of server {other.process.pid}: 16.0 GiB set aside" in message
        with placement.reserve(1, 8 * GIB):
            assert "GPU 0 has 0.0 of 24.0 GiB free" in other.reserve(1, 1)
        other.release()
        assert placement.reservations() == {}


def test_of_servers_that_choose_at_once_one_gets_the_room(folder: Path) -> None:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(Server(folder, [10 * GIB])) for _ in range(3)]
        winners = []
        for _ in range(40):
            for server in servers:
                server.ask([1, 6 * GIB])
            got = [server for server in servers if server.answer() == [0]]
            assert len(got) == 1
            winners.append(got[0].process.pid)
            got[0].release()
    print("won by", {pid: winners.count(pid) for pid in set(winners)})


def test_a_killed_server_holds_nothing_any_more(make: Make, folder: Path) -> None:
    placement = make(FakeGPU(24 * GIB))
    with Server(folder, [24 * GIB]) as other:
        assert other.reserve(1, 16 * GIB) == [0]
        refused(placement, 1, 16 * GIB)
        other.kill()
        with placement.reserve(1, 24 * GIB):
            assert placement.reservations() == {0: 24 * GIB}
    assert files(folder) == []


def test_a_server_killed_in_the_middle_of_a_choice_stops_nobody(make: Make, folder: Path) -> None:
    placement = make(FakeGPU(24 * GIB))
    program = "import fcntl, os, sys, time; f = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT);"
    program += "fcntl.flock(f, fcntl.LOCK_EX); print('locked', flush=True); time.sleep(60)"
    folder.mkdir(parents=True)
    (folder / "0123.new").write_text("{")
    with subprocess.Popen([sys.executable, "-c", program, folder / "gpus.lock"], stdout=subprocess.PIPE) as chooser:
        assert chooser.stdout is not None
        assert chooser.stdout.readline() == b"locked\n"
        with pytest.raises(TimedOut, match="does not end its choice"):
            placement.reserve(1, 1, wait=0.1)
        chooser.kill()
    with placement.reserve(1, 1):
        assert files(folder) == [".json"]


def test_two_who_look_at_once_do_not_take_each_other_for_the_server(make: Make, folder: Path) -> None:
    placement = make(FakeGPU(24 * GIB))
    folder.mkdir(parents=True)
    wrong: list[object] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            wrong.extend(filter(None, [placement.reservations()]))

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(300):
        new = folder / "abandoned"
        new.write_text('{"pid": 1, "gpus": {"0": 5}}')
        new.rename(folder / f"{number}.json")
        time.sleep(0.001)
    done.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert placement.reservations() == {}
    assert files(folder) == []


# -- faults ------------------------------------------------------------------------------------------------

FOREIGN = {
    "empty": "",
    "text": "something of mine",
    "list": "[1, 2]",
    "null": "null",
    "other": '{"pid": 5}',
    "negative": '{"pid": 5, "gpus": {"0": -1000000000000}}',
    "infinite": '{"pid": 5, "gpus": {"0": Infinity}}',
    "named": '{"pid": 5, "gpus": {"first": 5}}',
    "deep": "[" * 60000,
    "cut": '{"pid": 5, "gpus": {"0": 10',
}


@pytest.fixture(params=list(FOREIGN))
def foreign(request: pytest.FixtureRequest, folder: Path) -> Iterator[Path]:
    folder.mkdir(parents=True)
    path = folder / f"{request.param}.json"
    path.write_text(FOREIGN[request.param])
    yield path
    assert path.read_text() == FOREIGN[request.param]


def test_a_file_that_is_no_reservation_is_ignored_left_alone_and_named_once(
    make: Make, foreign: Path, caplog: pytest.LogCaptureFixture
) -> None:
    placement = make(FakeGPU(24 * GIB))
    for _ in range(3):
        assert placement.reservations() == {}
    with placement.reserve(1, 24 * GIB):
        assert placement.reservations() == {0: 24 * GIB}
    assert [record.getMessage() for record in caplog.records] == [
        f"{foreign} is ignored as a reservation of GPUs: it is none."
    ]


def test_a_folder_in_the_place_of_a_reservation_is_ignored(
    make: Make, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "folder.json").mkdir(parents=True)
    assert make(FakeGPU()).reservations() == {}
    assert "Is a directory" in caplog.text


@settings(deadline=None)  # disks have moods
@given(content=st.binary(max_size=200))
def test_no_content_of_a_file_makes_the_reading_fail(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("gpus")
    (folder / "a.json").write_bytes(content)
    assert Placement(Devices(FakeNVML(FakeGPU())), folder).reservations() == {}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_and_leaves_nothing(
    make: Make, folder: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(file: int, content: bytes) -> int:
        raise OSError(number, os.strerror(number))

    placement = make(FakeGPU())
    opened = len(os.listdir("/proc/self/fd"))  # noqa: PTH208  # a link of them goes while they are listed
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(DiskFull):
            placement.reserve(1, GIB)
    assert files(folder) == []
    assert len(os.listdir("/proc/self/fd")) == opened  # noqa: PTH208
    with placement.reserve(1, GIB):
        assert placement.reservations() == {0: GIB}


def test_a_folder_that_cannot_be_made_is_said(make: Make, folder: Path) -> None:
    folder.parent.write_text("a file")
    with pytest.raises(NotReady, match="Not a directory"):
        make(FakeGPU()).reserve(1, 1)
    assert make(FakeGPU()).reservations() == {}


def test_a_file_system_without_locks_is_said_at_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def unable(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", unable)
    started = time.monotonic()
    with pytest.raises(NotReady, match="No locks available"):
        make(FakeGPU()).reserve(1, 1)
    assert time.monotonic() - started < 1
