"""The server extension: traits in, one registry out."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import signal
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from jupyter_core.paths import is_hidden, jupyter_data_dir
from jupyter_server._tz import utcnow
from jupyter_server.extension.application import ExtensionApp
from jupyter_server.utils import url_path_join
from traitlets import Bool, CaselessStrEnum, Dict, Float, Int, List, TraitError, Unicode, default

from jupyter_server_ext import hub, openapi
from jupyter_server_ext.handlers import ROUTES
from llmkit.errors import LLMKitError, NotReady
from llmkit.process.folders import ServerFolder
from llmkit.registry.budgets import LIMITS
from llmkit.registry.changes import Event
from llmkit.registry.registry import ModelRegistry, Settings
from llmkit.registry.rules import Rules, check_pattern
from llmkit.schemas import MAX_CONFIGURATION_BYTES, MAX_CONVERSATION_BYTES, MAX_PROMPT_BYTES

EVENT_SCHEMAS = Path(__file__).parent / "event_schemas"
MODEL_EVENT = "https://llmkit.org/events/model/v1"
DEFAULT_PORT = 8105
BARE_SERVICES = ("api", "auth", "security", "shutdown", "events")
"""What ``jupyter llmkit`` has of Jupyter's own services: none that runs code or shows files."""
RETRY_SECONDS = 2.0
STOP_SECONDS = 14.0
OWNER_CHECK_SECONDS = 0.5
M_MMAP_THRESHOLD = -3
"""Of ``malloc.h``."""


class LLMKitApp(ExtensionApp):
    """Puts the ``/llm`` endpoints into a Jupyter server."""

    name = "llmkit"
    description = "A Jupyter server with llmkit alone: configure, load, prompt and unload language models."
    load_other_extensions = False
    serverapp_config: dict[str, Any] = {  # noqa: RUF012  # Jupyter reads it from the class
        "port": DEFAULT_PORT,
        "ip": "127.0.0.1",
        "open_browser": False,
    }

    state_dir = Unicode(
        help="Folder of configurations and keys. Default: LLMKIT_STATE_DIR, else llmkit in Jupyter's data folder."
    ).tag(config=True)
    run_dir = Unicode(
        help="Folder of what belongs to this host: sockets, logs, records of engines; keep it short. "
        "Default: LLMKIT_RUN_DIR, else llmkit-UID in the temporary folder. Every server makes its own folder in it."
    ).tag(config=True)
    secret_origins = Dict(
        key_trait=Unicode(),
        value_trait=List(Unicode()),
        help="Which environment variables may be sent to which endpoint, for example "
        "{'OPENAI_API_KEY': ['https://api.openai.com:443']}. If it is set, nothing else may be named; "
        "if not, any variable that ends in _API_KEY or _TOKEN.",
    ).tag(config=True)
    allow_trust_remote_code = Bool(
        default_value=False,
        help="Let configurations of vLLM ask for trust_remote_code: Python code that comes with a model then runs as "
        "the account of this server, whoever wrote it.",
    ).tag(config=True)
    allowed_model_names = List(
        Unicode(),
        help="Patterns of the model_name that may be configured and loaded, for example ['Qwen/*', 'gpt-4o*']; of "
        "another tokenizer's name, too. Empty allows every name. What `configurations` declares is not bound by this.",
    ).tag(config=True)
    allowed_base_urls = List(
        Unicode(),
        help="Where models of the type openai may be, for example ['https://api.openai.com', "
        "'https://*.example.com/v1']: an address, or the beginning of one; *. before the host allows all of a domain. "
        "Asked when a model is configured and when it is loaded. Empty allows every address. What `configurations` "
        "declares is not bound by this.",
    ).tag(config=True)
    max_body_size = Int(
        MAX_PROMPT_BYTES,
        min=MAX_CONFIGURATION_BYTES,
        max=512 << 20,
        help="Bytes of a prompt with all that comes with it, such as images. Configurations have 1 MiB at most.",
    ).tag(config=True)
    max_in_flight = Int(
        64, min=1, help="Requests of one model that run at once, where its configuration does not say."
    ).tag(config=True)
    max_queued = Int(
        256, min=0, help="Requests of one model that wait at most, where its configuration does not say."
    ).tag(config=True)
    max_loaded_models = Int(
        0,
        min=0,
        help="Models that hold memory of this machine at once; an idle one is unloaded for the next. 0 is no limit.",
    ).tag(config=True)
    idle_ttl = Float(
        -1.0,
        help="Seconds without a request after which a model is unloaded, where neither its configuration nor the "
        "request says; negative is never.",
    ).tag(config=True)
    max_idle_ttl = Float(
        None,
        allow_none=True,
        help="Seconds that a model may be idle at most, whoever asks for more; None is no limit.",
    ).tag(config=True)
    stall_timeout = Float(
        300.0,
        min=1.0,
        help="Seconds without any sign of life, in the log or in processor time, after which a load is given up. "
        "There is no limit to a load that goes on.",
    ).tag(config=True)
    engine_niceness = Int(
        None,
        min=0,
        max=19,
        allow_none=True,
        help="How far the processes that compute stand back for others, so that tokens reach their readers at once: "
        "0 to 19, as nice(2). None: 15 for an engine on the CPU, 0 for one on a GPU.",
    ).tag(config=True)
    standby = CaselessStrEnum(
        ["auto", "on", "off"],
        default_value="auto",
        help="A process that has vLLM imported and waits, so that the next load takes a fraction of the time; it holds "
        "about 0.6 GB. auto: where there is a configuration for vLLM and 4 GiB of memory are free, but not in a server "
        "of a JupyterHub user. on: also there, and with less memory. off: never.",
    ).tag(config=True)
    ray_address = Unicode(
        help="Address of the Ray cluster that models may be placed on, host:port of its head; this machine has to "
        "belong to it. Whoever may configure models can then run them there. Empty: no model is placed on a cluster.",
    ).tag(config=True)
    ray_http_url = Unicode(
        help="Where Ray Serve of that cluster answers, such as http://10.0.0.1:8000. Empty: where the cluster says.",
    ).tag(config=True)
    max_record_bytes = Int(
        64 << 20,
        min=1 << 20,
        help="Bytes of the record of requests (requests.sqlite); the oldest go first.",
    ).tag(config=True)
    record_bodies = Bool(
        default_value=False,
        help="Keep what was asked and answered in the record of requests, too. Whoever may read this server's "
        "endpoints can then read it.",
    ).tag(config=True)
    max_conversations = Int(
        200,
        min=0,
        help="Conversations of the panel that are kept (conversations.sqlite); the oldest go first. 0 keeps none. "
        "Whoever may read this server's endpoints can read them.",
    ).tag(config=True)
    max_conversation_bytes = Int(
        64 << 20,
        min=MAX_CONVERSATION_BYTES,
        help="Bytes of all conversations that are kept, together; the oldest go first.",
    ).tag(config=True)
    user_limits = Dict(
        key_trait=CaselessStrEnum(list(LIMITS)),
        value_trait=Int(min=0),
        help="What each user may ask of a service of JupyterHub, for example {'requests_per_minute': 20, "
        "'tokens_per_day': 200000}; also requests_per_day and tokens_per_minute. They do not hold for "
        "administrators.",
    ).tag(config=True)
    owner_pid = Int(
        0,
        min=0,
        help="Number of a process with which this server ends, however that one ends; 0 is none. llmkit.start() sets "
        "it.",
    ).tag(config=True)
    configurations = List(
        Dict(),
        help="Configurations that this server always has, as bodies of POST /llm/configure_model/. "
        "They are read-only; keys are named as env:NAME.",
    ).tag(config=True)

    @default("state_dir")
    def _default_state_dir(self) -> str:
        return os.environ.get("LLMKIT_STATE_DIR") or str(Path(jupyter_data_dir()) / "llmkit")

    @default("run_dir")
    def _default_run_dir(self) -> str:
        # Not under TMPDIR, which can be long: the path of a unix socket ends at 107 bytes.
        base = Path("/tmp") if os.name == "posix" else Path(tempfile.gettempdir())  # noqa: S108
        user = os.getuid() if hasattr(os, "getuid") else os.getlogin()
        return os.environ.get("LLMKIT_RUN_DIR") or str(base / f"llmkit-{user}")

    # -- start and stop ------------------------------------------------------------------------------------

    @property
    def _server(self) -> Any:
        return self.serverapp  # linked before anything of ours runs

    def _link_jupyter_server_extension(self, serverapp: Any) -> None:
        """Take the configuration over from the server."""
        self._wrong_setting: str | None = None
        try:
            super()._link_jupyter_server_extension(serverapp)
        except TraitError as error:
            # Jupyter goes on with the defaults of what was not read, which may allow what the operator forbade.
            self._wrong_setting = str(error).partition(", not ")[0]  # the value may be a key
            raise

    def initialize_settings(self) -> None:
        """Register the events; the registry starts with the event loop."""
        self._starting: asyncio.Task[ModelRegistry] | None = None
        self._registry: ModelRegistry | None = None
        self._folder: ServerFolder | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._owner_watch: asyncio.Task[None] | None = None
        self._retry_at = 0.0
        self._openapi: dict[str, Any] | None = None
        if hub.service_name(os.environ):
            hub.hide_token(self._server.identity_provider)
        for schema in sorted(EVENT_SCHEMAS.rglob("*.yaml")):
            self._server.event_logger.register_event_schema(schema)

    def initialize_handlers(self) -> None:
        """Add the routes."""
        self.handlers.extend(ROUTES)

    async def _start_jupyter_server_extension(self, serverapp: Any) -> None:
        if serverapp.starter_app is self:
            self._print_curl_line()
            # JupyterHub ends services with it first, and Jupyter minds it in a terminal alone: elsewhere the server
            # would be torn out of whatever it does, and tell no engine.
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                signal.signal(signal.SIGINT, lambda *_: serverapp.stop(from_signal=True))
        if self.owner_pid:
            self._owner_watch = asyncio.create_task(self._end_with_owner(), name="llmkit owner")
        try:
            await self.ready()
        except LLMKitError as error:
            # The notebooks are served all the same; every request under /llm says what is wrong.
            self.log.error("llmkit cannot start: %s", error)
        # Some 200,000 objects of a started Jupyter server live as long as it does. Python's garbage collector walks
        # through all of them again and again, 0.1 s each time in which no token reaches its reader.
        if not gc.get_freeze_count():  # once a process, which may start more than one server
            gc.collect()
            gc.freeze()
            _give_large_memory_back()

    async def ready(self) -> ModelRegistry:
        """Give the registry, started at the first call.

        Raises
        ------
        LLMKitError
            If it cannot be started.
        """
        if self._registry is not None:
            return self._registry
        failed = self._starting is not None and self._starting.done()
        if self._starting is None or (failed and time.monotonic() > self._retry_at):
            self._starting = asyncio.create_task(self._start_registry(), name="llmkit start")
        return await asyncio.shield(self._starting)

    async def _start_registry(self) -> ModelRegistry:
        folder: ServerFolder | None = None
        registry: ModelRegistry | None = None
        if self._wrong_setting is not None:
            raise NotReady(
                f"A setting of the server has a wrong value, so llmkit does not start: {self._wrong_setting}.",
                hint="The operator mends it where it is set (Jupyter's configuration or command line) and starts the "
                "server again. jupyter server --show-config shows what is set.",
            )
        for pattern in self.allowed_base_urls:
            try:
                check_pattern(pattern)
            except ValueError as error:
                # Not an error of the trait, after which Jupyter would go on without what else was configured.
                self.log.error("c.LLMKitApp.allowed_base_urls: %r allows nothing: %s.", pattern, error)
        try:
            await asyncio.to_thread(self._check_places)
            folder = await asyncio.to_thread(ServerFolder, Path(self.run_dir))
            for engine in await asyncio.to_thread(folder.remove_abandoned):
                self.log.warning("Ended an engine that a killed server had left: %s", engine)
            shared = hub.service_name(os.environ) is not None
            if shared:
                hub.check_identity(self._server.identity_provider)
            settings = Settings(
                state_dir=Path(self.state_dir),
                run_dir=folder.path,
                secret_origins=self.secret_origins,
                rules=Rules(self.allow_trust_remote_code, self.allowed_model_names, self.allowed_base_urls),
                max_in_flight=self.max_in_flight,
                max_queued=self.max_queued,
                configurations=self.configurations,
                max_loaded_models=self.max_loaded_models,
                idle_ttl=self.idle_ttl,
                max_idle_ttl=self.max_idle_ttl,
                stall_seconds=self.stall_timeout,
                engine_niceness=self.engine_niceness,
                standby=self.standby,
                ray_address=self.ray_address,
                ray_http_url=self.ray_http_url,
                record_bodies=self.record_bodies,
                max_record_bytes=self.max_record_bytes,
                # Everybody could read everybody's.
                max_conversations=0 if shared else self.max_conversations,
                shared=shared,
                user_limits=self.user_limits,
                max_conversation_bytes=self.max_conversation_bytes,
                url=self._server.connection_url,
            )
            registry = ModelRegistry(settings, self._emit, self.log)
            await registry.start()
        except BaseException as error:
            self._retry_at = time.monotonic() + RETRY_SECONDS
            if registry is not None:
                await registry.close()
            if folder is not None:
                await asyncio.to_thread(folder.remove)
            if not isinstance(error, OSError):
                raise
            raise NotReady(
                f"llmkit cannot use its folders: {error.strerror}: {error.filename}.",
                hint="Set LLMKIT_STATE_DIR and LLMKIT_RUN_DIR to folders that you can write.",
            ) from error
        self._registry, self._folder = registry, folder
        return registry

    def _check_places(self) -> None:
        """Keep keys out of what the server serves as files, to whoever may read files; logs there are warned of."""
        if self._server.default_services == BARE_SERVICES:
            return  # it serves no files
        contents = self._server.contents_manager
        root, shows_hidden = Path(self._server.root_dir), bool(getattr(contents, "allow_hidden", False))
        if _is_served(Path(self.state_dir), root, shows_hidden=shows_hidden):
            raise NotReady(
                f"The folder of configurations and keys, {self.state_dir}, lies among the files that this server "
                f"serves ({root}): whoever may read files could read the keys.",
                hint="Set LLMKIT_STATE_DIR to a folder outside of it, or in one whose name begins with a dot.",
            )
        if _is_served(Path(self.run_dir), root, shows_hidden=shows_hidden):
            self.log.warning(
                "The folder of logs and sockets, %s, lies among the files that this server serves (%s). "
                "Set LLMKIT_RUN_DIR to a short path outside of it.",
                self.run_dir,
                root,
            )

    async def stop_extension(self) -> None:
        """End every engine. May be called twice, as by two SIGTERMs; raises nothing, and has an end."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop(), name="llmkit stop")
        await asyncio.wait([self._stopping], timeout=STOP_SECONDS)

    async def _end_with_owner(self) -> None:
        """Stop the server as soon as its owner has ended; one that was killed can tell nobody."""
        with contextlib.suppress(psutil.NoSuchProcess):
            owner = psutil.Process(self.owner_pid)
            # One that has ended and was not waited for yet is still in the list.
            while owner.is_running() and owner.status() != psutil.STATUS_ZOMBIE:  # noqa: ASYNC110  # nobody tells
                await asyncio.sleep(OWNER_CHECK_SECONDS)
        self.log.warning("Process %s, which started this server, has ended: the server ends, too.", self.owner_pid)
        self._server.stop()

    async def _stop(self) -> None:
        if self._owner_watch is not None:
            self._owner_watch.cancel()
        if self._starting is None:
            return
        await asyncio.wait([self._starting])
        try:
            if self._registry is not None:
                await self._registry.close()
            if self._folder is not None:
                await asyncio.to_thread(self._folder.remove)
        except Exception:
            # A server that cannot stop is worse than an engine that its guardian ends.
            self.log.exception("llmkit did not stop as it should.")

    def current_activity(self) -> int | None:
        """Count loads and requests under way, so that a working server is not culled."""
        return (self._registry.busy() or None) if self._registry is not None else None

    def _emit(self, event: Event) -> None:
        self._server.web_app.settings["api_last_activity"] = utcnow()
        data = {**event, "time": datetime.now(UTC).isoformat(timespec="milliseconds")}
        self._server.event_logger.emit(schema_id=MODEL_EVENT, data=data)

    def openapi(self, model_types: tuple[str, ...]) -> dict[str, Any]:
        """Give the OpenAPI document of all routes, made at the first call; of any thread."""
        if self._openapi is None:
            self._openapi = openapi.document(self.handlers, self._server.base_url, model_types)
        return self._openapi

    # -- jupyter llmkit ------------------------------------------------------------------------------------

    @classmethod
    def make_serverapp(cls, **kwargs: Any) -> Any:
        """Make the server of ``jupyter llmkit``, which runs nobody's code and shows nobody's files."""
        server: Any = super().make_serverapp(**kwargs)
        # Not in a subclass: its name would be that of its section in the operator's configuration, too.
        server.default_services = BARE_SERVICES
        if hub.service_name(os.environ):
            server.jpserver_extensions = {**server.jpserver_extensions, hub.EXTENSION: True}
        return server

    def _jupyter_server_config(self) -> dict[str, Any]:
        # Jupyter applies this after the command line; ours are defaults, so what was given stays.
        config: dict[str, Any] = super()._jupyter_server_config()  # type: ignore[no-untyped-call]
        given = self._server.config.get("ServerApp", {}) if self.serverapp else {}
        if hub.service_name(os.environ):
            config["ServerApp"]["authorizer_class"] = hub.HubAuthorizer
        return {
            "ServerApp": {name: value for name, value in config["ServerApp"].items() if name not in given},
            # The contents manager brings /files of its own accord.
            "ContentsManager": {"files_handler_class": None},
        }

    def _print_curl_line(self) -> None:
        """Say how to reach a server that has nothing but llmkit."""
        server = self._server
        if name := hub.service_name(os.environ):
            print(f"\nllmkit is the service {name} of JupyterHub, at {server.base_url}llm.\n", flush=True)
            return
        scheme = "https" if server.certfile else "http"
        url = f"{scheme}://{server.ip or 'localhost'}:{server.port}{url_path_join(server.base_url, 'llm/models/')}"
        provider = server.identity_provider
        if not provider.token:
            header = ""
        elif provider.token_generated:
            header = f"-H 'Authorization: token {provider.token}' "
        else:
            header = '-H "Authorization: token $JUPYTER_TOKEN" '  # the operator's own is not repeated
        print(
            f"\nllmkit serves {server.base_url}llm on port {server.port}. Try:\n\n    curl {header}{url}\n", flush=True
        )


def _is_served(folder: Path, root: Path, *, shows_hidden: bool) -> bool:
    """Say whether Jupyter's file server serves a folder: it lies below the root, and is not hidden as it means it."""
    folder, root = folder.expanduser().resolve(), root.expanduser().resolve()
    return folder.is_relative_to(root) and (shows_hidden or not is_hidden(folder, root))


def _give_large_memory_back() -> None:
    """Let what is larger than a megabyte go back to the system as soon as it is done with.

    Of itself glibc learns from large blocks to keep up to 64 MiB of them for later (mallopt(3), M_MMAP_THRESHOLD), and
    some answers of many megabytes teach it that.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)


main = LLMKitApp.launch_instance
