"""What is made ready for the next load: when, for which model, and when it is given back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import psutil
import pytest
from aiohttp import web
from mock_upstream import MockUpstream, chat_answer
from registry_stage import RegistryStage, ask, configure, until
from scripted_engine import ScriptedEngine, ScriptedEngineType
from traitlets import TraitError
from traitlets.config import Config

from jupyter_server_ext.app import LLMKitApp
from llmkit.engines.base import EngineContext, EngineType, LoadProgress, PreparedType
from llmkit.errors import EngineNotInstalled, NoRoom
from llmkit.process.devices import Devices
from llmkit.registry.model import Model
from llmkit.registry.policies import LoadRecord
from llmkit.registry.readiness import MOST_FAILURES, QUIET_LOOKS, Mode, Readiness
from llmkit.registry.registry import ModelRegistry
from llmkit.schemas import Capabilities, Configuration

GIB = 1 << 30
LOG = logging.getLogger("test-readiness")


class Times(NamedTuple):
    """As `psutil.cpu_times` gives them."""

    user: float
    idle: float


class Processor:
    """A machine that is as busy as the test says."""

    def __init__(self) -> None:
        self.share = 0.0
        self.moves = True
        self._times = Times(0.0, 0.0)

    def __call__(self) -> Times:
        if self.moves:
            self._times = Times(self._times.user + self.share, self._times.idle + 1 - self.share)
        return self._times


class PreparedEngineType(ScriptedEngineType):
    """Something can be made ready for its loads; `calls` has what it was asked for, `made` what it was made for."""

    def __init__(self, base_url: str = "http://127.0.0.1:9/v1") -> None:
        super().__init__(base_url, ready=True)
        self.calls: list[str] = []
        self.made: list[str] = []
        self.folders: list[Path] = []
        self.is_prepared = False
        self.bytes: int | None = GIB
        self.can_be_made = True
        self.ends_by_itself = False
        self.error: Exception | None = None
        self.most_errors = 1 << 30
        self.put_away_error: Exception | None = None
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()

    async def prepare(self, configuration: Configuration, run_dir: Path, logger: logging.Logger) -> bool:
        self.calls.append("prepare")
        self.folders.append(run_dir)
        try:
            await self.may_go_on.wait()
        except asyncio.CancelledError:
            self.calls.append("cancelled")
            raise
        if self.error is not None and self.calls.count("prepare") <= self.most_errors:
            raise self.error
        if self.is_prepared:
            self.is_prepared = not self.ends_by_itself
        elif self.can_be_made:
            self.made.append(configuration.model_id)
            self.is_prepared = True
        return self.is_prepared

    async def put_away(self) -> None:
        self.calls.append("put_away")
        if self.put_away_error is not None:
            raise self.put_away_error
        self.is_prepared = False

    async def prepared_bytes(self, *, anonymous: bool = False) -> int | None:
        return self.bytes if self.is_prepared else None

    def create(self, configuration: Configuration, context: EngineContext) -> ScriptedEngine:
        engine = super().create(configuration, context)
        launch, self.is_prepared = "standby" if self.is_prepared else "plain", False
        start = engine.start

        async def start_and_say_how(report: Callable[[LoadProgress], None]) -> Capabilities:
            report(LoadProgress("starting", 0.0, launch=launch))
            return await start(report)

        engine.start = start_and_say_how  # type: ignore[method-assign]
        return engine


@dataclass
class Known:
    """All that is asked of a model."""

    configuration: Configuration
    live: bool = False


class Machine(Devices):
    """Its memory is what the test says, without what engines and standby of a type hold; `looks` counts."""

    def __init__(self, free: int, engine_type: PreparedEngineType | None = None) -> None:
        super().__init__()
        self.free = free
        self.looks = 0
        self.error: Exception | None = None
        self._type = engine_type

    def free_ram(self) -> int:
        self.looks += 1
        if self.error is not None:
            raise self.error
        if self._type is None:
            return self.free
        held = sum(engine.held for engine in self._type.engines if not engine.stops)
        return self.free - held - ((self._type.bytes or 0) if self._type.is_prepared else 0)


class Site:
    """A `Readiness` whose looks the test makes, with nothing configured, nothing under way and 8 GiB free."""

    def __init__(
        self,
        mode: Mode = "auto",
        environ: Mapping[str, str] | None = None,
        engine_types: Mapping[str, EngineType] | None = None,
    ) -> None:
        self.type = PreparedEngineType()
        self.models: list[Known] = []
        self.busy = 0
        self.machine = Machine(8 * GIB)
        self.readiness = Readiness(
            mode,
            engine_types if engine_types is not None else {"scripted": self.type},
            lambda: cast("list[Model]", self.models),
            lambda: self.busy,
            Path("/run/s1"),
            self.machine,
            LOG,
            environ or {},
        )

    def add(self, model_id: str, model_type: str = "scripted", *, live: bool = False) -> Known:
        configuration = Configuration(config_id=model_id, model_id=model_id, model_name="n", model_type=model_type)
        self.models.append(known := Known(configuration, live))
        return known

    async def look(self, times: int = QUIET_LOOKS) -> PreparedEngineType:
        for _ in range(times):
            await self.readiness._look()
        return self.type

    async def watch_to_the_end(self) -> PreparedEngineType:
        async with asyncio.timeout(10):
            await self.readiness.watch()
        return self.type


@pytest.fixture(autouse=True)
def processor(monkeypatch: pytest.MonkeyPatch) -> Processor:
    monkeypatch.setattr("llmkit.registry.readiness.LOOK_SECONDS", 0.002)
    monkeypatch.setattr(psutil, "cpu_times", processor := Processor())
    return processor


# -- where -----------------------------------------------------------------------------------------------------


async def test_the_scripted_types_are_what_they_are_meant_to_be() -> None:
    assert isinstance(PreparedEngineType(), PreparedType)
    assert not isinstance(ScriptedEngineType(), PreparedType)


@pytest.mark.parametrize(
    ("mode", "environ", "made"),
    [
        ("off", {}, []),
        ("auto", {}, ["a"]),
        ("on", {}, ["a"]),
        ("auto", {"JUPYTERHUB_USER": "jo"}, []),
        ("auto", {"JUPYTERHUB_USER": ""}, []),
        ("on", {"JUPYTERHUB_USER": "jo"}, ["a"]),
        ("off", {"JUPYTERHUB_USER": "jo"}, []),
    ],
)
async def test_the_operator_says_where_something_is_made_ready(
    mode: Mode, environ: dict[str, str], made: list[str]
) -> None:
    site = Site(mode, environ)
    site.add("a")
    assert (await site.look()).made == made
    assert await site.readiness.held_bytes() == (GIB if made else None)


async def test_off_watches_nothing_and_has_nothing_to_close() -> None:
    site = Site("off")
    site.add("a")
    assert (await site.watch_to_the_end()).calls == []
    await site.readiness.close()
    assert site.type.calls == []
    assert site.machine.looks == 0


async def test_a_type_for_which_nothing_can_be_made_ready_is_left_alone() -> None:
    site = Site("on", engine_types={"scripted": ScriptedEngineType()})
    site.add("a")
    await site.watch_to_the_end()
    await site.look()
    assert await site.readiness.held_bytes() is None
    await site.readiness.close()


# -- for which model -------------------------------------------------------------------------------------------


async def test_it_is_made_once_something_is_configured_and_given_back_with_the_last_configuration() -> None:
    site = Site()
    assert (await site.look(10)).calls == []
    first, second = site.add("a"), site.add("b")
    await site.look(1)
    assert (site.type.made, site.type.is_prepared) == (["b"], True)
    site.models.remove(second)
    await site.look()
    assert (site.type.made, site.type.is_prepared) == (["b"], True)
    site.models.remove(first)
    await site.look(1)
    assert (site.type.calls[-1], site.type.is_prepared) == ("put_away", False)
    calls = len(site.type.calls)
    await site.look()
    assert len(site.type.calls) == calls  # once


async def test_configurations_of_other_types_do_not_count() -> None:
    site = Site()
    site.add("a", "openai")
    site.add("b", "of another version")
    assert (await site.look()).calls == []


async def test_each_type_has_its_own() -> None:
    other, plain = PreparedEngineType(), ScriptedEngineType()
    site = Site("on", engine_types={"one": PreparedEngineType(), "other": other, "plain": plain})
    site.add("a", "other")
    site.add("b", "plain")
    await site.look()
    assert other.made == ["a"]
    other.bytes = 7
    assert await site.readiness.held_bytes() == 7


async def test_what_is_held_adds_up_and_what_cannot_be_measured_is_left_out() -> None:
    types = {name: PreparedEngineType() for name in "abc"}
    site = Site("on", engine_types=types)
    for name in types:
        site.add(name, name)
    await site.look()
    types["a"].bytes, types["b"].bytes, types["c"].bytes = 3, None, 4
    assert await site.readiness.held_bytes() == 7
    types["a"].bytes = types["c"].bytes = None
    assert await site.readiness.held_bytes() is None


async def test_a_type_that_is_not_available_gets_nothing_and_gives_back_what_it_has() -> None:
    site = Site("on")
    site.add("a")
    site.type.why_unavailable = EngineNotInstalled("It is not installed.")
    assert (await site.look()).calls == []
    site.type.why_unavailable = None
    assert (await site.look(1)).is_prepared
    site.type.why_unavailable = EngineNotInstalled("It is not installed any more.")
    assert not (await site.look(1)).is_prepared
    assert site.type.calls[-1] == "put_away"


@pytest.mark.parametrize(
    ("live", "expected"),
    [("", "c"), ("c", "b"), ("bc", "a"), ("a", "c"), ("ac", "b"), ("abc", "c")],
)
async def test_it_is_for_the_latest_model_that_is_not_live_and_else_for_the_latest(live: str, expected: str) -> None:
    site = Site()
    for name in "abc":
        site.add(name, live=name in live)
    site.add("elsewhere", "openai")
    assert (await site.look()).made == [expected]


async def test_it_gets_a_new_folder_each_time_with_a_short_name() -> None:
    site = Site()
    site.add("a")
    folders = (await site.look(10)).folders
    assert len(set(folders)) == len(folders) > 5
    assert {folder.parent for folder in folders} == {Path("/run/s1")}
    assert all(len(folder.name) <= 12 for folder in folders)  # no longer than that of an engine


# -- when ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "free", "made"),
    [
        ("auto", 4 * GIB, True),
        ("auto", 4 * GIB - 1, False),
        ("on", 4 * GIB - 1, True),
        ("on", 2 * GIB, True),
        ("on", 2 * GIB - 1, False),
        ("on", 0, False),
    ],
)
async def test_memory_must_be_there_for_it(mode: Mode, free: int, made: bool) -> None:
    site = Site(mode)
    site.add("a")
    site.machine.free = free
    assert (await site.look(10)).is_prepared is made


@pytest.mark.parametrize("mode", ["auto", "on"])
async def test_it_is_given_back_when_memory_is_all_but_gone_and_made_again_when_it_is_back(mode: Mode) -> None:
    site = Site(mode)
    site.add("a")
    await site.look()
    site.machine.free = GIB  # less than it would be made with
    await site.look()
    assert "put_away" not in site.type.calls
    site.machine.free = GIB - 1
    await site.look(1)
    assert (site.type.calls[-1], site.type.is_prepared) == ("put_away", False)
    site.machine.free = 2 * GIB - 1
    assert not (await site.look()).is_prepared
    site.machine.free = 4 * GIB
    assert (await site.look(1)).made == ["a", "a"]


async def test_it_is_made_after_three_quiet_looks_in_a_row(processor: Processor) -> None:
    site = Site()
    site.add("a")
    await site.look(2)
    site.busy = 1
    await site.look(1)
    site.busy = 0
    await site.look(2)
    processor.share = 0.9
    await site.look(1)
    processor.share = 0.0
    assert (await site.look(2)).calls == []
    assert (await site.look(1)).calls == ["prepare"]


async def test_it_is_not_made_while_a_load_or_a_request_is_under_way() -> None:
    site = Site("on")
    site.add("a")
    site.busy = 1
    assert (await site.look(10)).calls == []


@pytest.mark.parametrize(("share", "made"), [(0.49, True), (0.51, False), (1.0, False)])
async def test_it_is_not_made_while_the_processor_is_busy(share: float, made: bool, processor: Processor) -> None:
    site = Site("on")
    site.add("a")
    processor.share = share
    assert (await site.look(10)).is_prepared is made


async def test_a_clock_that_stands_still_does_not_look_like_an_idle_machine(processor: Processor) -> None:
    site = Site("on")
    site.add("a")
    processor.moves = False
    assert (await site.look(10)).calls == []


async def test_what_is_there_stays_in_busy_times_and_is_looked_after(processor: Processor) -> None:
    site = Site()
    site.add("a")
    await site.look()
    site.busy, processor.share = 5, 1.0
    await site.look(10)
    assert site.type.made == ["a"]
    assert site.type.calls == ["prepare"] * 11


async def test_after_a_load_took_it_the_next_one_waits_for_quiet() -> None:
    site = Site()
    known = site.add("a")
    await site.look()
    site.type.is_prepared, known.live, site.busy = False, True, 1
    await site.look()
    site.busy = 0
    await site.look(2)
    assert site.type.made == ["a"]
    assert (await site.look(1)).made == ["a", "a"]


# -- what goes wrong -------------------------------------------------------------------------------------------


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == LOG.name]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, LOG.name)
    return caplog


async def test_after_three_errors_it_is_given_up_and_the_log_says_so(log: pytest.LogCaptureFixture) -> None:
    site = Site()
    site.add("a")
    site.type.error = ValueError("no luck")
    assert (await site.watch_to_the_end()).calls == [*["prepare"] * MOST_FAILURES, "put_away"]
    *errors, last = told(log)
    assert errors == ["Nothing could be made ready for the next load."] * MOST_FAILURES
    assert "any more" in last
    assert log.text.count("no luck") == MOST_FAILURES


async def test_what_ends_by_itself_three_times_is_given_up(log: pytest.LogCaptureFixture) -> None:
    site = Site()
    site.add("a")
    site.type.ends_by_itself = True
    assert (await site.watch_to_the_end()).made == ["a"] * MOST_FAILURES
    assert not site.type.is_prepared
    (line,) = told(log)
    assert "any more" in line


async def test_what_can_never_be_made_is_not_tried_for_ever(log: pytest.LogCaptureFixture) -> None:
    site = Site()
    site.add("a")
    site.type.can_be_made = False
    assert (await site.watch_to_the_end()).calls.count("prepare") == MOST_FAILURES
    assert len(told(log)) == 1


async def test_two_failures_are_none() -> None:
    site = Site()
    site.add("a")
    site.type.error = ValueError("no luck")
    site.type.most_errors = MOST_FAILURES - 1
    watching = asyncio.create_task(site.readiness.watch())
    await until(lambda: site.type.is_prepared)
    await until(lambda: len(site.type.calls) > 10)
    assert site.type.made == ["a"]
    assert not watching.done()
    await cancel(watching)


async def test_nothing_stays_behind_unwatched_when_it_is_given_up() -> None:
    site = Site()
    site.add("a")
    assert (await site.look()).is_prepared
    site.machine.error = OSError("no /proc")
    assert not (await site.watch_to_the_end()).is_prepared
    assert site.type.calls[-1] == "put_away"


async def test_close_gives_everything_back_whatever_one_type_does(log: pytest.LogCaptureFixture) -> None:
    bad, good = PreparedEngineType(), PreparedEngineType()
    site = Site(engine_types={"bad": bad, "good": good})
    site.add("a", "bad")
    site.add("b", "good")
    await site.look()
    bad.put_away_error = OSError("it is stuck")
    await site.readiness.close()
    assert not good.is_prepared
    assert "it is stuck" in log.text
    await site.readiness.close()  # idempotent


async def cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


# -- in the registry -------------------------------------------------------------------------------------------


class PreparedStage(RegistryStage):
    """Loads of its registry are quicker with a standby, which holds 1 GiB of the 8 GiB that are free."""

    def __init__(self, folder: Path, upstream: MockUpstream) -> None:
        super().__init__(folder, upstream)
        self.engines: PreparedEngineType = PreparedEngineType(upstream.base_url)
        self.machine = Machine(8 * GIB, self.engines)

    async def some_looks(self) -> None:
        """Return when there were enough looks to make something ready, if it was to be."""
        seen = self.machine.looks
        await until(lambda: self.machine.looks > seen + 3 * QUIET_LOOKS)


@pytest.fixture
def stage(tmp_path: Path, upstream: MockUpstream) -> PreparedStage:
    return PreparedStage(tmp_path, upstream)


async def test_devices_tell_what_is_held_for_loads_to_come(stage: PreparedStage) -> None:
    async with stage.registry(standby="on", devices=stage.machine) as registry:
        await stage.some_looks()
        assert (await registry.devices()).ram.standby_bytes is None
        await configure(registry, "a")
        await until(lambda: stage.engines.is_prepared)
        assert (await registry.devices()).ram.standby_bytes == GIB


async def test_a_registry_has_none_unless_it_is_told_to(stage: PreparedStage) -> None:
    async with stage.registry(devices=stage.machine) as registry:
        await registry.load(await configure(registry, "a"))
        assert (await registry.devices()).ram.standby_bytes is None
    assert stage.engines.calls == []


async def test_it_comes_with_the_first_configuration_and_goes_with_the_last(stage: PreparedStage) -> None:
    async with stage.registry(standby="auto", devices=stage.machine) as registry:
        first, second = await configure(registry, "a"), await configure(registry, "b")
        await until(lambda: stage.engines.is_prepared)
        await registry.delete(first)
        await stage.some_looks()
        assert stage.engines.is_prepared
        await registry.delete(second)
        await until(lambda: not stage.engines.is_prepared)
        assert stage.engines.calls[-1] == "put_away"


async def test_it_waits_for_loads_and_requests_and_comes_again_for_the_next_load(
    stage: PreparedStage, upstream: MockUpstream
) -> None:
    async with stage.registry(standby="on", devices=stage.machine) as registry:
        config_id = await configure(registry, "a", auto_load=True)
        await until(lambda: stage.engines.made == ["a"])
        stage.engines.ready = False
        loading = asyncio.create_task(registry.load(config_id))
        await until(lambda: len(stage.engines.engines) == 1)
        await stage.some_looks()
        assert stage.engines.made == ["a"]

        may_answer = False

        async def respond(*_: Any) -> Any:
            while not may_answer:
                await asyncio.sleep(0.005)
            return web.json_response(chat_answer("done"))

        upstream.respond = respond
        asking = asyncio.create_task(registry.requests.infer(ask("a")))
        await until(lambda: len(registry.requests) == 1)
        stage.engines.engines[0].ready.set()
        await loading
        await until(lambda: registry.model("a").in_flight == 1)
        await stage.some_looks()
        assert stage.engines.made == ["a"]
        may_answer = True
        await asking
        await until(lambda: stage.engines.made == ["a", "a"])


async def test_a_model_that_fits_only_with_what_the_standby_holds_is_not_refused(stage: PreparedStage) -> None:
    stage.machine.free = 4 * GIB
    async with stage.registry(standby="auto", devices=stage.machine) as registry:
        large = await configure(registry, "large", 5 * GIB)
        fits = await configure(registry, "fits", 7 * GIB // 2)
        await until(lambda: stage.engines.is_prepared)
        assert stage.machine.free_ram() == 3 * GIB
        plan = await registry.plan(fits)
        assert (plan.fits, plan.free_bytes) == (True, 4 * GIB)
        with pytest.raises(NoRoom, match=r"needs about 5\.0 GiB of memory, and 4\.0 GiB are free"):
            await registry.load(large)
        await registry.load(fits)
        assert registry.loaded_models() == ["fits"]
        assert registry._models["fits"].load_record() is not None


async def test_a_standby_that_cannot_be_measured_counts_for_nothing(stage: PreparedStage) -> None:
    stage.machine.free = 4 * GIB
    stage.engines.bytes = None
    async with stage.registry(standby="auto", devices=stage.machine) as registry:
        config_id = await configure(registry, "a", 5 * GIB)
        await until(lambda: stage.engines.is_prepared)
        assert (await registry.devices()).ram.standby_bytes is None
        with pytest.raises(NoRoom, match=r"4\.0 GiB are free"):
            await registry.load(config_id)


async def last_launch(registry: ModelRegistry, config_id: str, expected: str) -> LoadRecord:
    """Give the stored record of the last load once it was launched so."""
    async with asyncio.timeout(10):
        while True:
            record = await registry._loader.last_load(registry.configuration(config_id))
            if record is not None and record.launch == expected:
                return record
            await asyncio.sleep(0.005)


async def test_how_an_engine_was_launched_is_remembered_beyond_the_server(stage: PreparedStage) -> None:
    async with stage.registry(standby="on", devices=stage.machine) as registry:
        config_id = await configure(registry, "a")
        await until(lambda: stage.engines.is_prepared)
        await registry.load(config_id)
        told = registry._models["a"].load_record()
        assert told is not None
        assert told.launch == "standby"
        record = await last_launch(registry, config_id, "standby")
        assert record.steps.keys() == {"weights"}
    async with stage.registry(devices=stage.machine) as registry:
        assert await registry._loader.last_load(registry.configuration(config_id)) == record
        await registry.load(config_id)
        await last_launch(registry, config_id, "plain")


async def test_a_record_of_an_earlier_version_does_not_say_how(stage: PreparedStage) -> None:
    async with stage.registry(devices=stage.machine) as registry:
        config_id = await configure(registry, "a")
        configuration = registry.configuration(config_id)
        earlier = {"seconds": 2.0, "steps": {"weights": 1.0}, "pss_bytes": 5, "gpu_bytes": None}
        await registry._stored.add_load(config_id, registry._loader._hash(configuration), 0.0, 2.0, earlier)
        assert await registry._loader.last_load(configuration) == LoadRecord(2.0, {"weights": 1.0}, 5)


async def test_a_registry_that_closes_gives_it_back(stage: PreparedStage) -> None:
    async with stage.registry(standby="on", devices=stage.machine) as registry:
        await configure(registry, "a")
        await until(lambda: stage.engines.is_prepared)
    assert (stage.engines.calls[-1], stage.engines.is_prepared) == ("put_away", False)
    assert not registry._tasks  # nobody watches any more


async def test_a_registry_can_close_while_something_is_being_made_ready(stage: PreparedStage) -> None:
    stage.engines.may_go_on.clear()
    async with stage.registry(standby="on", devices=stage.machine) as registry:
        await configure(registry, "a")
        await until(lambda: stage.engines.calls == ["prepare"])
    assert stage.engines.calls == ["prepare", "cancelled", "put_away"]


async def test_a_registry_closes_to_the_end_whatever_is_not_given_back(stage: PreparedStage) -> None:
    async with stage.registry(standby="on", devices=stage.machine) as registry:
        await registry.load(await configure(registry, "a"))
        stage.engines.put_away_error = OSError("it is stuck")
    async with stage.registry() as registry:  # what it has stored is no longer in use
        assert [one.model_id for one in registry.configurations()] == ["a"]
        assert registry.health().status == "ok"


# -- in the server ---------------------------------------------------------------------------------------------

NONSENSE = r"'standby' trait of a LLMKitApp .* any of \['auto', 'on', 'off'\].*'nonsense'"


@pytest.mark.parametrize(
    "make",
    [
        lambda: LLMKitApp(standby="nonsense"),
        lambda: LLMKitApp(config=Config({"LLMKitApp": {"standby": "nonsense"}})),
    ],
)
def test_another_word_is_refused_and_the_right_ones_are_named(make: Callable[[], LLMKitApp]) -> None:
    with pytest.raises(TraitError, match=NONSENSE):
        make()


def test_another_word_on_the_command_line_ends_the_program_with_a_clear_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = LLMKitApp()
    app.log.addHandler(caplog.handler)
    try:
        with pytest.raises(SystemExit) as raised:
            app.parse_command_line(["--LLMKitApp.standby=nonsense"])
    finally:
        app.log.removeHandler(caplog.handler)
    assert raised.value.code == 1
    (record,) = [record for record in caplog.records if "standby" in record.getMessage()]
    assert "'nonsense'" in record.getMessage()
    assert record.exc_info is None  # no traceback


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [([], "auto"), (["--LLMKitApp.standby=on"], "on"), (["--LLMKitApp.standby=OFF"], "off")],
)
def test_the_command_line_says_it_in_any_case_and_auto_is_the_default(arguments: list[str], expected: str) -> None:
    app = LLMKitApp()
    app.parse_command_line(arguments)
    assert app.standby == expected


class TestServer:
    """A server that was told to."""

    @pytest.fixture(params=["on", "auto", "off"])
    def mode(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture
    def jp_server_config(self, mode: str) -> dict[str, Any]:
        return {
            "ServerApp": {"jpserver_extensions": {"jupyter_server_ext": True}},
            "LLMKitApp": {"standby": mode.upper()},
        }

    @pytest.fixture
    def engines(self, monkeypatch: pytest.MonkeyPatch) -> PreparedEngineType:
        engines = PreparedEngineType()
        monkeypatch.delenv("JUPYTERHUB_USER", raising=False)
        monkeypatch.setattr("llmkit.registry.registry.load_engine_types", lambda logger: {"scripted": engines})
        monkeypatch.setattr(Devices, "free_ram", lambda devices: 8 * GIB)
        return engines

    async def test_what_the_operator_says_reaches_the_registry(
        self, mode: str, engines: PreparedEngineType, jp_serverapp: Any
    ) -> None:
        (app,) = jp_serverapp.extension_manager.extension_apps["jupyter_server_ext"]
        registry = await app.ready()
        try:
            assert registry._settings.standby == mode
            await configure(registry, "a")
            if mode == "off":
                assert not registry._readiness._types
            else:
                await until(lambda: engines.is_prepared)
        finally:
            await app.stop_extension()
        assert not engines.is_prepared
