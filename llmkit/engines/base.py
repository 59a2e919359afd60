"""What the registry asks of an engine, and how ``model_kwargs`` are sorted and checked.

A third party adds a model type with the entry-point group ``llmkit.engines``: an object that is, or a class
without arguments that makes, an `EngineType`.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from ssl import SSLContext
from typing import Any, Literal, Protocol, runtime_checkable

from pydantic import BaseModel, JsonValue, ValidationError

from llmkit.errors import DoesNotFit, LLMKitError
from llmkit.process.devices import Devices
from llmkit.schemas import (
    API,
    Capabilities,
    Configuration,
    Download,
    GenerationParameters,
    Memory,
    MemoryEstimate,
    Phase,
)

ENTRY_POINT_GROUP = "llmkit.engines"
STALL_SECONDS = 300.0
MAX_ARGUMENTS = 256
MAX_DETAILS = 20


Extra = Literal["metrics", "tokenize"]


@dataclass(frozen=True)
class Endpoint:
    """Where the relay reaches an engine's OpenAI-compatible API.

    ``base_url`` ends before the path of a call, for example ``https://api.openai.com/v1``; with ``uds`` set,
    the connection goes to that unix socket and the host is only a header.
    """

    base_url: str
    model: str
    uds: Path | None = None
    root_url: str | None = None
    """Where an engine has what is outside OpenAI's API; None if it has nothing of that."""
    extras: frozenset[Extra] = frozenset()
    """What it has there."""
    fetches: bool = False
    """Whether it is somebody else's, and may fetch from where it is what a request names by ``http(s)``."""
    api_key: str | None = field(default=None, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout: float | None = None
    """Seconds without a byte after which a request is given up."""
    max_retries: int = 0
    """How often a request is sent again that was not answered, or with 429 or a failure of the endpoint."""
    proxy: str | None = field(default=None, repr=False)
    """URL of a proxy on the way."""
    ssl: SSLContext | None = None
    """Whose certificates are trusted; None is the system's choice."""


@dataclass(frozen=True)
class LoadProgress:
    """One step of a load: its phase and the fraction of the whole load, 0 to 1, where it is known.

    ``step`` names where the load is, the same in every load of a configuration: what is left is learnt by it.
    """

    phase: Phase
    fraction: float | None = None
    step: str | None = None
    download: Download | None = None
    launch: str | None = None
    """How the engine was started, where there are several ways; said once."""
    notice: str | None = None
    """What a person should know of an engine that goes on answering, for example that a part of it is missing.

    An engine may report that after its load, too, with the phase ``ready``; None then takes it back.
    """


@dataclass(frozen=True)
class EngineExit:
    """How an engine ended that nobody had asked to end."""

    message: str
    returncode: int | None = None


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster that the operator of the server has named."""

    address: str
    """Of its head: ``host:port``."""
    owner: str
    """Part of the name of everything that is put there; servers of another home have another one."""
    http_url: str | None = None
    """Where Ray Serve answers; None is where the cluster says."""


@dataclass(frozen=True)
class EngineContext:
    """What an engine gets from the registry for one load."""

    run_dir: Path
    """A 0700 folder of this host, server and model; gone after the stop."""
    log_file: Path
    """The engine's log; kept after the stop, replaced by the next load."""
    api_key: str | None = field(repr=False)
    logger: logging.Logger
    stall_seconds: float = STALL_SECONDS
    """How long a load may show no sign of life; there is no limit to a load that does."""
    niceness: int | None = None
    """How far the processes that compute stand back for others, 0 to 19; None lets the engine type decide."""
    devices: Devices = field(default_factory=Devices)
    gpus: tuple[int, ...] = ()
    """GPUs that were set aside for it; none means that it does not need any."""
    gpu_memory_utilization: float | None = None
    """The share of each of them that is free, for an engine whose configuration does not say what to take."""
    cluster: Cluster | None = None
    """Where models can be placed beside this machine; None if the operator has named no cluster."""


class Engine(Protocol):
    """Runs one model, once: made for a load, thrown away after its stop.

    The registry's `Model` calls `start` once and `stop` at least once, `stop` also in the middle of `start`
    (after cancelling it) and after the engine ended by itself.
    """

    @property
    def endpoint(self) -> Endpoint:
        """Where to send requests; valid once `start` has returned."""
        ...

    async def start(self, report: Callable[[LoadProgress], None]) -> Capabilities:
        """Return when the engine answers requests.

        Raises
        ------
        LLMKitError
            If it cannot; the message says why in the user's terms, `LoadFailed.details["log_tail"]` holds the
            end of the log.
        """
        ...

    async def stop(self) -> Memory:
        """End every process, remove what they left, and say what was freed. Idempotent, bounded at 10 s."""
        ...

    async def wait_exit(self) -> EngineExit:
        """Return when the engine ended without being asked to; wait for ever if that cannot happen."""
        ...

    async def memory(self) -> Memory:
        """Measure what the engine holds now."""
        ...


@runtime_checkable
class LeavableEngine(Engine, Protocol):
    """An engine whose model can outlive the server."""

    async def leave(self) -> Memory:
        """Do as `stop` at the end of the server, except that a model that is to outlive it goes on."""
        ...


class EngineType(Protocol):
    """A model type: its arguments and its engines."""

    @property
    def name(self) -> str:
        """The ``model_type`` of a configuration."""
        ...

    @property
    def summary(self) -> str:
        """What it is, in a line."""
        ...

    @property
    def arguments(self) -> type[BaseModel]:
        """Engine arguments, every one optional; their JSON schema makes the panel's form."""
        ...

    def unavailable(self) -> LLMKitError | None:
        """Say why no model of this type can be loaded here, or None. Quick; imports nothing heavy."""
        ...

    def check(self, configuration: Configuration) -> None:
        """Raise `DoesNotFit` where a configuration is wrong beyond what the schema can say."""
        ...

    def origin(self, configuration: Configuration) -> str | None:
        """Give ``scheme://host:port`` that an ``api_key`` of this configuration goes to, or None."""
        ...

    def default_origin(self) -> str | None:
        """Give the origin that the server's ``OPENAI_API_KEY`` goes to without being named, or None."""
        ...

    def estimate(self, configuration: Configuration) -> MemoryEstimate | None:
        """Say what a load will take, or None if it takes no memory of this machine. May read files: blocks."""
        ...

    def create(self, configuration: Configuration, context: EngineContext) -> Engine:
        """Make the engine of one load."""
        ...


@runtime_checkable
class PreparedType(EngineType, Protocol):
    """An engine type whose loads are quicker if something was made ready before them."""

    @property
    def is_prepared(self) -> bool:
        """Whether there is something for the next load, ready or on its way."""
        ...

    async def prepare(self, configuration: Configuration, run_dir: Path, logger: logging.Logger) -> bool:
        """Have something ready for the next load, best of all for that of a configuration; say whether there is.

        Returns before it is ready. ``run_dir`` is a folder that does not exist yet; it is used if something is made.
        """
        ...

    async def put_away(self) -> None:
        """Give back what was made ready and not used, with all that it holds. Idempotent, bounded at 10 s."""
        ...

    async def prepared_bytes(self, *, anonymous: bool = False) -> int | None:
        """Measure the main memory that what was made ready holds; None if there is nothing.

        With ``anonymous`` without mapped files, of which the kernel can have the memory at any time.
        """
        ...


@runtime_checkable
class PlacedType(EngineType, Protocol):
    """An engine type where the configuration, too, decides whether a model can be loaded here."""

    def unavailable_for(self, configuration: Configuration, cluster: Cluster | None) -> LLMKitError | None:
        """Say why this model cannot be loaded here, or None; instead of `unavailable`, and as quick."""
        ...


def unavailable(engine_type: EngineType, configuration: Configuration, cluster: Cluster | None) -> LLMKitError | None:
    """Say why a model cannot be loaded here, or None."""
    if isinstance(engine_type, PlacedType):
        return engine_type.unavailable_for(configuration, cluster)
    return engine_type.unavailable()


@dataclass(frozen=True)
class SortedKwargs:
    """``model_kwargs`` after sorting: only what was given."""

    engine: dict[str, Any]
    generation: dict[str, Any]

    def api(self) -> API | None:
        """Give the API that the configuration chose, or None for `auto`."""
        chosen = self.engine.get("api", "auto")
        return None if chosen == "auto" else chosen


def load_engine_types(logger: logging.Logger) -> dict[str, EngineType]:
    """Make every model type that is installed, by name; one that cannot be imported is named in the log."""
    types: dict[str, EngineType] = {}
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        try:
            made = entry.load()
            types[entry.name] = made() if isinstance(made, type) else made
        except Exception:
            logger.exception("The model type %s (%s) cannot be used.", entry.name, entry.value)
    return dict(sorted(types.items()))


def validation_details(
    error: ValidationError, schema: type[BaseModel], prefix: tuple[str, ...] = ()
) -> list[dict[str, str]]:
    """Give every wrong field of a pydantic error as ``{path, message}``, in a user's words and without the values."""
    details = []
    for item in error.errors(include_url=False, include_input=False):
        path, message = item["loc"], item["msg"]
        if item["type"] == "extra_forbidden":
            message = "unknown field" + (_nearest(str(path[0]), list(schema.model_fields)) if len(path) == 1 else "")
        elif item["type"] == "missing":
            message = "is missing"
        elif item["type"] == "string_pattern_mismatch":
            field = schema.model_fields.get(str(path[0])) if path else None
            if field is not None and field.description:
                _, _, rule = field.description.partition(": ")
                message = f"does not fit: {rule or field.description}"
        elif item["type"] == "value_error":
            message = str(item["ctx"]["error"])
        details.append({"path": ".".join((*prefix, *map(str, path))), "message": message})
    return details


def does_not_fit(details: list[dict[str, str]], hint: str | None = None) -> DoesNotFit:
    """Make the one error that names every wrong field with its path."""
    summary = "; ".join(f"{d['path']}: {d['message']}" if d["path"] else d["message"] for d in details[:8])
    return DoesNotFit(
        summary if len(details) <= 8 else f"{summary}; and {len(details) - 8} more",
        param=details[0]["path"] or None,
        hint=hint,
        details={"fields": details[:MAX_DETAILS]},
    )


def _nearest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"; did you mean `{close[0]}`?" if close else ""


def sort_kwargs(engine_type: EngineType, model_kwargs: Mapping[str, JsonValue]) -> SortedKwargs:
    """Sort and check ``model_kwargs``.

    A flat key belongs to generation if `GenerationParameters` has it, otherwise to the engine.

    Raises
    ------
    DoesNotFit
        With every wrong key and value, and the nearest known name of an unknown one.
    """
    sections: dict[str, type[BaseModel]] = {
        "engine": engine_type.arguments,
        "generation": GenerationParameters,
    }
    values: dict[str, dict[str, Any]] = {"engine": {}, "generation": {}}
    paths: dict[tuple[str, str], str] = {}
    details: list[dict[str, str]] = []
    if len(model_kwargs) > MAX_ARGUMENTS or any(
        len(v) > MAX_ARGUMENTS for v in model_kwargs.values() if isinstance(v, dict)
    ):
        raise does_not_fit([{"path": "model_kwargs", "message": f"has more than {MAX_ARGUMENTS} entries"}])

    def take(section: str, key: str, value: JsonValue, path: str) -> None:
        if key in values[section]:
            details.append({"path": path, "message": "given twice, flat and nested"})
        values[section][key] = value
        paths[section, key] = path

    for key, value in model_kwargs.items():
        if key in sections:
            if not isinstance(value, dict):
                details.append({"path": f"model_kwargs.{key}", "message": "must be an object"})
                continue
            for inner, inner_value in value.items():
                take(key, inner, inner_value, f"model_kwargs.{key}.{inner}")
        else:
            section = "generation" if key in GenerationParameters.model_fields else "engine"
            take(section, key, value, f"model_kwargs.{key}")

    for section, schema in sections.items():
        try:
            schema.model_validate(values[section])
        except ValidationError as error:
            # A nested key of the wrong section is as likely as a misspelt one.
            known = [
                *schema.model_fields,
                *(name for other in sections.values() for name in other.model_fields),
            ]
            for item, detail in zip(error.errors(), validation_details(error, schema), strict=True):
                head, *rest = map(str, item["loc"]) if item["loc"] else ("",)
                if item["type"] == "extra_forbidden" and not rest:
                    detail["message"] = f"no argument of `{engine_type.name}` models{_nearest(head, known)}"
                detail["path"] = ".".join((paths.get((section, head), f"model_kwargs.{head}"), *rest))
                details.append(detail)
    if details:
        raise does_not_fit(details, hint="GET /llm/model_types/ lists every argument. In Python: client.model_types().")
    return SortedKwargs(**values)
