"""A ``vllm`` model on a Ray cluster: one application of Ray Serve LLM, kept by a program of ours under a guardian.

The program (`llmkit.engines.ray_application`) deploys the application, says how it is, and deletes it when it ends,
unless it is to be kept. Requests go from the relay to Ray Serve's own HTTP. Replicas, their number and their places are
Ray's business.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import socket
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from llmkit.engines.base import Cluster, Endpoint, EngineContext, EngineExit, LoadProgress
from llmkit.engines.http import EngineHTTP
from llmkit.engines.log import LOG_TAIL_LINES, LogFollower, last_lines
from llmkit.engines.vllm.arguments import NO_FLAGS, Placement, VLLMArguments
from llmkit.engines.vllm.environment import engine_environ
from llmkit.engines.vllm.failures import READ_LINES, explain
from llmkit.engines.vllm.progress import LoadLog
from llmkit.errors import (
    EngineGone,
    EngineNotInstalled,
    LLMKitError,
    LoadFailed,
    LoadStalled,
    NoRoom,
    NotAllowed,
    UpstreamUnreachable,
)
from llmkit.process.keeper import KeptProcess
from llmkit.schemas import API, Capabilities, Configuration, Memory

MARK: Final = "llmkit-ray: "
"""What the program puts before a line that is for us; all others are of the replicas' logs."""
COMMAND: Final = (sys.executable, "-m", "llmkit.engines.ray_application")
DELETE_MARK: Final = "delete"
"""Name of a file in the engine's folder that says: delete the application, even if it is to be kept."""
GRACE_SECONDS: Final = 6.0
"""What the program gets to delete the application: a stop is bounded at 10 s."""
AFTERWARDS_SECONDS: Final = 9.0
"""What a second program gets, where the first was killed."""
CONNECT_TIMEOUT_SECONDS: Final = 600.0
RETRIES: Final = 3
"""Of requests that were not answered, or with a failure: a replica was lost, and there may be others."""
SEQUENCES: Final = 128
"""Requests that a replica is given at once before Ray starts another, where ``max_num_seqs`` is not given."""

_POLL_SECONDS: Final = 0.1
_REPLICA_LINE: Final = re.compile(r"^\[[a-z0-9]+\] ")
_NOT_IN_A_NAME: Final = re.compile(r"[^A-Za-z0-9-]+")
_ELSEWHERE: Final = Memory(reason="runs on the Ray cluster")
_OWNER_FILE: Final = "cluster_owner"
_OF_THE_CLUSTER: Final = re.compile(r"RAY_(?!ADDRESS$|NAMESPACE$|JOB_)\w+")
_TOKENS: Final = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_TO_REPLICAS: Final = ("VLLM_NO_USAGE_STATS", "VLLM_DO_NOT_TRACK", "DO_NOT_TRACK", "HF_HUB_DISABLE_TELEMETRY")
_TO_REPLICAS_OFFLINE: Final = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def open_cluster(address: str, http_url: str, state_dir: Path) -> Cluster | None:
    """Give the cluster that the operator has named, or None. Reads and writes a file: blocks.

    Two homes that use one cluster never take each other's applications for theirs: each writes a text of chance into
    its state folder, once.
    """
    if not address:
        return None
    path = state_dir / _OWNER_FILE
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = path.with_name(f"{_OWNER_FILE}.{uuid.uuid4().hex}")
    new.write_text(uuid.uuid4().hex[:10])
    try:
        os.link(new, path)  # unless it is there: another server may do the same at this moment
    except FileExistsError:
        pass
    finally:
        new.unlink()
    return Cluster(address, path.read_text().strip(), http_url or None)


def unavailable(cluster: Cluster | None) -> LLMKitError | None:
    """Say why no model can be placed on a Ray cluster, or None."""
    if cluster is None:
        return NotAllowed(
            "No Ray cluster was named to this server, so no model can be placed on one.",
            param="model_kwargs.placement",
            hint="The operator sets c.LLMKitApp.ray_address; without `placement` the model runs on this machine.",
        )
    if sys.platform != "linux":
        return EngineNotInstalled("Models are placed on a Ray cluster from Linux only.")
    try:
        version("ray")
    except PackageNotFoundError:
        return EngineNotInstalled(
            "Ray is not installed.", hint="Run `pip install 'llmkit[ray]'` in the environment of the Jupyter server."
        )
    return None


@dataclass(frozen=True)
class _State:
    """What the program says of the application."""

    status: str = ""
    running: int = 0
    wanted: int = 0
    placed: int = 0
    message: str = ""

    @property
    def notice(self) -> str | None:
        """What a person should know of an application that is deployed."""
        if self.running >= self.wanted:
            return None if self.status == "RUNNING" else f"Ray says: {self.message or self.status}"[:500]
        are = "is" if self.running == 1 else "are"
        return f"{self.running} of {self.wanted} replicas {are} there; Ray starts what is missing."


class RayEngine:
    """One model as an application on a Ray cluster.

    Parameters
    ----------
    source
        What vLLM is asked to load there: a name of a hub, or a path on the nodes.
    arguments
        Of vLLM; their ``placement`` says what is asked of the cluster.
    command
        What is run with the order.
    environ
        The server's environment.
    """

    def __init__(
        self,
        configuration: Configuration,
        context: EngineContext,
        source: str,
        arguments: VLLMArguments,
        environ: Mapping[str, str],
        command: Sequence[str] = COMMAND,
    ) -> None:
        assert arguments.placement is not None  # noqa: S101  # that is why it is ours
        assert context.cluster is not None  # noqa: S101  # `unavailable` has looked
        self._configuration = configuration
        self._arguments = arguments
        self._keep = arguments.placement.keep
        self._context = context
        self._command = tuple(command)
        self._environ = _program_environ(environ, context.run_dir)
        self._order = _order(configuration, context, source, arguments, arguments.placement)
        self._kept = self._program("serve")
        self._endpoint = Endpoint("http://127.0.0.1", configuration.model_id)
        self._follower = LogFollower(context.log_file)
        self._state = _State()
        self._failure: LLMKitError | None = None
        self._deleted = False
        self._connected = False
        self._url: str | None = None
        self._load_log = LoadLog()
        self._log_moved = False
        self._report: Callable[[LoadProgress], None] = lambda _: None
        self._stop_task: asyncio.Task[Memory] | None = None

    @property
    def engine_id(self) -> str:
        """What the program has in its environment as ``LLMKIT_ENGINE_ID``."""
        return self._kept.engine_id

    @property
    def application(self) -> str:
        """The name of the application on the cluster."""
        return str(self._order["name"])

    @property
    def endpoint(self) -> Endpoint:
        """Where to send requests; valid once `start` has returned."""
        return self._endpoint

    def _program(self, task: str) -> KeptProcess:
        run_dir = self._context.run_dir
        log_file = self._context.log_file
        if task == "delete":
            run_dir, log_file = run_dir.with_name(f"{run_dir.name}-x"), log_file.with_suffix(".end")
        order = json.dumps({**self._order, "do": task})
        return KeptProcess(
            [*self._command, order], self._environ, run_dir=run_dir, log_file=log_file, grace=GRACE_SECONDS
        )

    # -- start ---------------------------------------------------------------------------------------------

    async def start(self, report: Callable[[LoadProgress], None]) -> Capabilities:
        """Return when the application answers requests.

        Raises
        ------
        LLMKitError
            Why it does not, with the end of its log in ``details["log_tail"]``.
        """
        self._report = report
        report(LoadProgress("starting", 0.0, "cluster"))
        try:
            await self._kept.start()
        except OSError as error:
            raise LoadFailed(f"The program that talks to Ray could not be started: {error}.") from error
        await self._wait_until_ready()
        assert self._url is not None  # noqa: S101  # it is ready
        self._endpoint = Endpoint(
            base_url=f"{self._url}/v1",
            model=self._configuration.model_id,
            root_url=self._url,
            timeout=CONNECT_TIMEOUT_SECONDS,
            max_retries=RETRIES,
        )
        http = EngineHTTP(self._endpoint)
        try:
            capabilities = await self._ask_capabilities(http)
            if await self._tokenizes(http):
                self._endpoint = replace(self._endpoint, extras=frozenset({"tokenize"}))
        finally:
            await http.close()
        report(LoadProgress("ready", 1.0))
        return capabilities

    async def _wait_until_ready(self) -> None:
        moved_at, before = time.monotonic(), self._state
        while self._url is None:
            ended = self._kept.ended is not None  # looked at first: its last words are read then
            await self._read()
            if self._failure is not None or ended:
                raise await self._why_not()
            if self._log_moved or before != self._state:
                moved_at, before, self._log_moved = time.monotonic(), self._state, False
            if time.monotonic() - moved_at > self._context.stall_seconds:
                raise await self._stalled()
            await asyncio.sleep(_POLL_SECONDS)

    async def _read(self) -> None:
        """Take what the program has printed since the last time."""
        for line in await asyncio.to_thread(self._follower.read):
            if line.startswith(MARK):
                try:
                    self._take(json.loads(line.removeprefix(MARK)))
                except (ValueError, KeyError, TypeError):
                    continue  # cut by the end of the program
            else:
                self._log_moved = True
                if self._load_log.read(_REPLICA_LINE.sub("", line)) and self._url is None:
                    self._report(self._load_log.progress)

    def _take(self, told: dict[str, Any]) -> None:
        event = told.pop("event")
        if event == "connected":
            self._connected = True
        elif event == "state":
            self._state = _State(**told)
            if self._url is None and self._state.wanted and not self._state.placed:
                self._report(LoadProgress("queued", step="placement"))
            elif self._url is None and (self._load_log.progress.fraction or 0.0) == 0.0:
                self._report(LoadProgress("starting", 0.05, "replica"))
        elif event == "ready":
            self._url = told["url"]
            if told["adopted"]:
                self._report(LoadProgress("starting", 0.9, launch="adopted"))
        elif event == "failed":
            self._failure = self._error(told["code"], told["message"])
        elif event == "deleted":
            self._deleted = True

    def _error(self, code: str, message: str) -> LLMKitError:
        cluster = self._context.cluster
        assert cluster is not None  # noqa: S101  # as above
        if code == "unreachable":
            return UpstreamUnreachable(
                f"The Ray cluster at {cluster.address} cannot be used: {message}",
                hint="Is it running, and does this machine belong to it? Ask whoever set c.LLMKitApp.ray_address.",
            )
        if code == "gone":
            return EngineGone(message, hint="Load it again.")
        return LoadFailed(f"Ray could not start the model: {message}", hint="The log says more.")

    async def _why_not(self) -> LLMKitError:
        """Make the error of an application that did not come to answer."""
        lines = await asyncio.to_thread(last_lines, self._context.log_file, READ_LINES)
        tail = lines[-LOG_TAIL_LINES:]
        failure = self._failure
        if failure is None:
            returncode = self._kept.ended.returncode if self._kept.ended else None
            how = f" with exit status {returncode}" if returncode is not None else ""
            failure = LoadFailed(f"The program that talks to Ray ended{how}.", hint="The log says more.")
        elif type(failure) is LoadFailed:
            words = [_REPLICA_LINE.sub("", line) for line in lines if not line.startswith(MARK)]
            explained = explain(words, self._configuration.model_name, None)
            if type(explained) is not LoadFailed or "ended" not in explained.message:
                failure = explained
        failure.details["log_tail"] = tail
        return failure

    async def _stalled(self) -> LLMKitError:
        lines = await asyncio.to_thread(last_lines, self._context.log_file, LOG_TAIL_LINES)
        details = {"log_tail": lines}
        if self._connected and not self._state.placed:
            return NoRoom(
                f"The Ray cluster has had no room for the model for {self._context.stall_seconds:g} s: "
                f"{' '.join(self._state.message.split()) or 'Ray does not say why'}"[:1000],
                hint="Ask for less in placement.ray.resources, unload another model, or add a node.",
                details=details,
            )
        return LoadStalled(
            f"The model showed no sign of life on the Ray cluster for {self._context.stall_seconds:g} s.",
            hint="Load it again; the log says what it did last.",
            details=details,
        )

    async def _ask_capabilities(self, http: EngineHTTP) -> Capabilities:
        chosen, length = self._arguments.api, self._arguments.max_model_len
        return Capabilities(
            api=chosen if chosen is not None and chosen != "auto" else await self._ask_api(http),
            tools=bool(self._arguments.enable_auto_tool_choice),
            max_model_len=length if isinstance(length, int) else None,
        )

    async def _ask_api(self, http: EngineHTTP) -> API:
        """Give chat if the application can apply a chat template: a token of an answer is asked for."""
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
        try:
            await http.json("POST", "/chat/completions", {"model": self._endpoint.model, **body})
        except EngineGone:
            raise
        except LLMKitError:
            return "completions"
        return "chat"

    async def _tokenizes(self, http: EngineHTTP) -> bool:
        """Say whether this version of Ray Serve LLM gives tokens of this version of vLLM."""
        try:
            await http.json("POST", "//tokenize", {"model": self._endpoint.model, "prompt": "Hello"})
        except LLMKitError:
            return False
        return True

    # -- the end -------------------------------------------------------------------------------------------

    async def wait_exit(self) -> EngineExit:
        """Return when the application is gone, or nobody can say any more how it is.

        What is missing of it meanwhile is reported as a notice.
        """
        told: str | None = None
        missing_since: float | None = None
        while True:
            ended = self._kept.ended
            await self._read()
            if self._failure is not None:
                return EngineExit(self._failure.message)
            if ended is not None:
                lost = "The guardian of the program" if ended.guardian_lost else "The program"
                return EngineExit(f"{lost} that talks to Ray ended, so the model is given up.", ended.returncode)
            notice = self._state.notice
            if notice != told:
                told = notice
                self._report(LoadProgress("ready", 1.0, notice=notice))
            if self._state.wanted and not self._state.running:
                missing_since = missing_since or time.monotonic()
                if time.monotonic() - missing_since > self._context.stall_seconds:
                    message = " ".join(self._state.message.split())
                    return EngineExit(f"Ray could not bring back any replica: {message or self._state.status}"[:1000])
            else:
                missing_since = None
            await asyncio.sleep(_POLL_SECONDS)

    async def stop(self) -> Memory:
        """Delete the application, and end what is here. Idempotent, bounded at 10 s."""
        if self._stop_task is None:
            self._stop_task = asyncio.create_task(self._stop(delete=True))
        return await asyncio.shield(self._stop_task)

    async def leave(self) -> Memory:
        """End what is here; the application, too, unless it is to be kept."""
        if self._stop_task is None:
            self._stop_task = asyncio.create_task(self._stop(delete=not self._keep))
        return await asyncio.shield(self._stop_task)

    async def _stop(self, *, delete: bool) -> Memory:
        lost = self._kept.ended is not None and self._failure is None
        if delete and self._keep:
            await asyncio.to_thread(_touch, self._context.run_dir / DELETE_MARK)
        gone = await self._kept.stop()
        await self._read()
        if not delete:
            return Memory(verified=gone, reason="it goes on running on the Ray cluster")
        if lost and self._connected and not self._deleted:  # the program was killed, so it could not
            self._deleted = await self._delete_afterwards()
        verified = gone and (self._deleted or not self._connected)
        reason = _ELSEWHERE.reason if verified else "the Ray cluster did not say that the application is gone"
        return Memory(verified=verified, reason=reason)

    async def _delete_afterwards(self) -> bool:
        program = self._program("delete")
        log_file = self._context.log_file.with_suffix(".end")
        try:
            await program.start()
            async with asyncio.timeout(AFTERWARDS_SECONDS):
                await program.wait_exit()
            return any("deleted" in line for line in await asyncio.to_thread(last_lines, log_file, LOG_TAIL_LINES))
        except (OSError, TimeoutError):
            return False
        finally:
            await program.stop()
            await asyncio.to_thread(log_file.unlink, missing_ok=True)

    async def memory(self) -> Memory:
        """Say that nothing of it is on this machine, as far as this server knows."""
        return _ELSEWHERE


def _touch(path: Path) -> None:
    if path.parent.is_dir():  # it goes with the program
        path.touch()


def _program_environ(environ: Mapping[str, str], run_dir: Path) -> dict[str, str]:
    """Give what the program needs of the server's environment: with the way to the cluster, without tokens of hubs."""
    given = engine_environ(environ, run_dir)
    to_ray = {name: value for name, value in environ.items() if _OF_THE_CLUSTER.fullmatch(name)}
    plain = {name: value for name, value in given.items() if name not in _TOKENS}
    return {**plain, **to_ray, "RAY_USAGE_STATS_ENABLED": "0"}


def _slug(model_id: str) -> str:
    """Give a text for names on the cluster and for URLs that no other model has."""
    return f"{_NOT_IN_A_NAME.sub('-', model_id)[:40]}-{hashlib.sha256(model_id.encode()).hexdigest()[:6]}"


def _order(
    configuration: Configuration,
    context: EngineContext,
    source: str,
    arguments: VLLMArguments,
    placement: Placement,
) -> dict[str, Any]:
    """Make the order of the program."""
    cluster = context.cluster
    assert cluster is not None  # noqa: S101  # as above
    slug, wanted = _slug(configuration.model_id), placement.ray
    on_cpu = not any(wanted.resources.get(device) for device in ("GPU", "TPU"))
    environ = engine_environ({}, Path("/tmp"), offline=bool(arguments.offline))  # noqa: S108  # not used
    sent: dict[str, str] = {name: environ[name] for name in (*_TO_REPLICAS, *_TO_REPLICAS_OFFLINE) if name in environ}
    if on_cpu:
        # Bound, the workers of all replicas on a node would share its first processors and leave the others idle.
        sent |= {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    flags = arguments.model_dump(exclude_none=True, exclude=set(NO_FLAGS))
    what: dict[str, Any] = {
        "model_id": configuration.model_id,
        "source": source,
        # Images and sounds come with the request; nothing is fetched for it, from whatever network.
        "engine_kwargs": {**flags, "allowed_media_domains": ["none.invalid"]},
        "placement_group": {"bundle_per_worker": wanted.resources},
        "environ": sent,
        "min": wanted.replicas.min,
        "max": wanted.replicas.most,
        "ongoing": arguments.max_num_seqs or SEQUENCES,
    }
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:10]
    server = context.run_dir.parent
    here = hashlib.sha256(f"{socket.gethostname()} {server.parent}".encode()).hexdigest()[:8]
    owner_mark, host_mark = f"llmkit-{cluster.owner}-", f"--{here}-"
    name = f"{owner_mark}{slug}" + ("" if placement.keep else f"{host_mark}{server.name}")
    return {
        **what,
        "address": cluster.address,
        "http_url": cluster.http_url,
        "name": name,
        "deployment": f"{slug}-{digest}",
        "keep": placement.keep,
        "delete_file": str(context.run_dir / DELETE_MARK),
        "owner_mark": owner_mark,
        "host_mark": host_mark,
        # Where the folders of living servers are: see `Application.delete_abandoned`.
        "servers_dir": str(server.parent),
    }


def is_placed(arguments: Mapping[str, Any]) -> bool:
    """Say whether engine arguments ask for a place on a cluster."""
    return arguments.get("placement") is not None
