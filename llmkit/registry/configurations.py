"""What is asked for: configurations checked, stored, and parted from their raw keys."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from uuid import NAMESPACE_URL, uuid4, uuid5

from pydantic import ValidationError

from llmkit.engines.base import EngineType, SortedKwargs, does_not_fit, sort_kwargs, validation_details
from llmkit.errors import (
    ConfigurationExists,
    ConfigurationNotFound,
    EngineNotInstalled,
    KeyMissing,
    KeyNotAllowed,
    LLMKitError,
    ModelLiveElsewhere,
)
from llmkit.inference.bounds import check_schemas
from llmkit.registry.database import explain
from llmkit.registry.people import Person
from llmkit.registry.presence import Presence
from llmkit.registry.rules import Rules
from llmkit.registry.secrets import (
    ARGUMENT,
    KeyPolicy,
    Secret,
    SecretFiles,
    is_mark,
    key_of,
    new_secret,
    with_key,
)
from llmkit.registry.store import Store
from llmkit.schemas import OPTIONAL_FIELDS, Configuration, ModelConfigRequest, StoreCondition

_DECLARED = uuid5(NAMESPACE_URL, "llmkit/declared")
T = TypeVar("T")


class Configurations:
    """The stored configurations of one home.

    SQLite and the secret files block on the disk: they live on one thread, so that the order of the writes is
    the order of the calls.
    """

    def __init__(
        self,
        state_dir: Path,
        engine_types: Mapping[str, EngineType],
        policy: KeyPolicy,
        environ: Mapping[str, str],
        url: str = "",
        rules: Rules | None = None,
    ) -> None:
        self._state_dir = state_dir
        self._engine_types = engine_types
        self._policy = policy
        self._rules = rules or Rules()
        self._environ = environ
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="llmkit-store")
        self._url = url
        self._store: Store | None = None
        self._presence: Presence | None = None
        self._files: SecretFiles | None = None
        self._data_version: int | None = None

    async def _io(self, function: Callable[..., T], *args: Any) -> T:
        try:
            return await self._on_disk(function, *args)
        except OSError as error:  # of a secret file; the store has explained its own
            raise explain(error, self._state_dir) from error

    async def _on_disk(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, partial(function, *args))

    @property
    def _opened(self) -> tuple[Store, SecretFiles]:
        assert self._store is not None and self._files is not None  # noqa: S101, PT018  # set by `open`
        return self._store, self._files

    @property
    def _here(self) -> Presence:
        assert self._presence is not None  # noqa: S101  # set by `open`
        return self._presence

    async def open(self) -> list[Configuration]:
        """Open the store and give what is in it.

        Raises
        ------
        LLMKitError, OSError
            If it cannot be used.
        """
        return await self._on_disk(self._open)

    def _open(self) -> list[Configuration]:
        self._store = Store(self._state_dir)
        self._presence = Presence(self._state_dir)
        self._store.register(self._presence.server_id, self._url, self._presence.alive)
        self._files = SecretFiles(self._state_dir)
        self._data_version = self._store.data_version()
        if not self._store.has_lost:
            readable = {configuration.config_id: configuration for configuration in self._store.all()}
            self._files.delete_orphans(dict.fromkeys(self._store.config_ids()) | readable)
        return self._store.all()

    async def close(self) -> None:
        """Close the store."""
        await self._io(self._close)
        self._disk.shutdown(wait=False)

    def _close(self) -> None:
        store, presence = self._store, self._presence
        if store is not None:
            if presence is not None:
                with contextlib.suppress(LLMKitError):  # others see by the lock that this server is gone
                    store.unregister(presence.server_id)
            store.close()
        if presence is not None:
            presence.close()

    # -- loads ---------------------------------------------------------------------------------------------

    async def claim(self, configuration: Configuration) -> None:
        """Tell the other servers that this one has the model: they leave its configuration alone.

        Raises
        ------
        ConfigurationNotFound
            If another server has deleted it a moment ago.
        """
        if not configuration.declared:
            store, _ = self._opened
            await self._io(store.claim, configuration.config_id, self._here.server_id)

    async def release(self, config_id: str) -> None:
        """Take a claim back."""
        store, _ = self._opened
        await self._io(store.release, config_id, self._here.server_id)

    async def owners(self) -> dict[str, str]:
        """Give the address of each other server that lives and has a model, by ``config_id``."""
        store, _ = self._opened
        presence = self._here
        return await self._io(store.owners, presence.server_id, presence.alive)

    async def add_load(
        self, config_id: str, engine_hash: str, started_at: float, seconds: float, body: dict[str, Any]
    ) -> None:
        """Remember how a load went."""
        store, _ = self._opened
        await self._io(store.add_load, config_id, engine_hash, started_at, seconds, body)

    async def last_load(self, config_id: str, engine_hash: str) -> dict[str, Any] | None:
        """Give how the last load of a configuration with these arguments went."""
        store, _ = self._opened
        return await self._io(store.last_load, config_id, engine_hash)

    # -- condition -----------------------------------------------------------------------------------------

    def condition(self) -> StoreCondition | None:
        """Say how the configurations are stored."""
        return self._store.condition() if self._store else None

    def problems(self) -> list[str]:
        """Say what is wrong with the store."""
        return list(self._store.problems) if self._store else ["the store is not open"]

    async def read(self) -> list[Configuration]:
        """Give every configuration."""
        return await self._io(self._read)

    def _read(self) -> list[Configuration]:
        store, _ = self._opened
        # Before the reading: a change between the two is then seen again, not missed.
        self._data_version = store.data_version()
        return store.all()

    async def changed_elsewhere(self) -> bool:
        """Tell whether another server has written since the last reading."""
        store, _ = self._opened
        return await self._io(store.data_version) != self._data_version

    # -- checking ------------------------------------------------------------------------------------------

    def check(self, request: ModelConfigRequest) -> tuple[EngineType, SortedKwargs]:
        """Check type and arguments, or raise `DoesNotFit` with every wrong field."""
        engine_type = self._engine_types.get(request.model_type)
        if engine_type is None:
            known = ", ".join(f"`{name}`" for name in self._engine_types)
            raise does_not_fit([{"path": "model_type", "message": f"must be one of {known}"}])
        kwargs = sort_kwargs(engine_type, request.model_kwargs)
        flat = {name: value for name, value in kwargs.generation.items() if name in request.model_kwargs}
        check_schemas(flat, "model_kwargs")
        nested = {name: value for name, value in kwargs.generation.items() if name not in flat}
        check_schemas(nested, "model_kwargs.generation")
        return engine_type, kwargs

    def engine_type(self, configuration: Configuration) -> EngineType:
        """Give the type of a stored configuration, or raise `EngineNotInstalled`."""
        if configuration.model_type not in self._engine_types:
            raise EngineNotInstalled(
                f"No model type `{configuration.model_type}` is installed here.",
                hint="Install the package that brings it, and restart the server.",
            )
        return self._engine_types[configuration.model_type]

    def sorted(self, configuration: Configuration) -> SortedKwargs:
        """Give the arguments of a stored configuration."""
        return sort_kwargs(self.engine_type(configuration), configuration.model_kwargs)

    def check_allowed(self, configuration: Configuration) -> None:
        """Raise `RefusedByOperator` if a stored configuration asks for what is not allowed, perhaps no longer."""
        self._rules.check(configuration, self.engine_type(configuration), self.sorted(configuration))

    async def is_same(self, request: ModelConfigRequest, stored: Configuration) -> bool:
        """Tell whether a request asks for what is stored; keys are compared by digest."""

        def plain(kwargs: SortedKwargs) -> tuple[dict[str, Any], dict[str, Any]]:
            return {k: v for k, v in kwargs.engine.items() if k != ARGUMENT}, kwargs.generation

        _, kwargs = self.check(request)
        if (
            (request.model_name, request.model_type) != (stored.model_name, stored.model_type)
            or plain(kwargs) != plain(self.sorted(stored))
            or any(getattr(request, name) != getattr(stored, name) for name in OPTIONAL_FIELDS)
        ):
            return False
        given, kept = key_of(request.model_kwargs), key_of(stored.model_kwargs)
        if isinstance(given, str) and is_mark(kept):
            secret = await self.secret(stored)
            return secret is not None and secret.holds(given)
        return given == kept

    def declare(self, body: Mapping[str, Any]) -> Configuration:
        """Make a configuration of the operator's, which is not stored.

        Raises
        ------
        LLMKitError
            If it is wrong.
        """
        try:
            request = ModelConfigRequest.model_validate(dict(body))
        except ValidationError as error:
            raise does_not_fit(validation_details(error, ModelConfigRequest)) from None
        key = key_of(request.model_kwargs)
        if key is not None and not (isinstance(key, str) and key.startswith("env:")):
            raise KeyMissing("A declared configuration takes its key from a variable.", hint="Write env:NAME.")
        configuration, _ = self._part(request, str(uuid5(_DECLARED, request.model_id)), None, declared=True)
        return configuration

    # -- writing -------------------------------------------------------------------------------------------

    def draft(self, request: ModelConfigRequest, by: Person | None = None) -> Configuration:
        """Check a new configuration as `insert` does, and store nothing; it has no ``config_id`` yet.

        Raises
        ------
        DoesNotFit, KeyNotAllowed
        """
        configuration, _ = self._part(request, "", None, by)
        return configuration

    async def insert(self, request: ModelConfigRequest, by: Person | None = None) -> Configuration:
        """Check and store a new configuration, that of who asks.

        Raises
        ------
        DoesNotFit, KeyNotAllowed, RefusedByOperator, ConfigurationExists, DiskFull
        """
        configuration, secret = self._part(request, str(uuid4()), None, by)
        if by is not None:
            configuration = configuration.model_copy(update={"configured_by": by.name})
        store, files = self._opened

        def write() -> None:
            try:
                if secret is not None:
                    files.write(configuration.config_id, secret)
                store.insert(configuration)
            except ConfigurationExists:  # after a failure of the disk nobody knows; the next start cleans up
                files.delete(configuration.config_id, secret)
                raise

        await self._io(write)
        return configuration

    async def prepare(
        self, request: ModelConfigRequest, stored: Configuration, by: Person | None = None
    ) -> tuple[Configuration, Secret | None]:
        """Check a replacement of a stored configuration, which stays whose it is; `replace` then writes it."""
        configuration, secret = self._part(request, stored.config_id, await self.secret(stored), by)
        return configuration.model_copy(update={"configured_by": stored.configured_by}), secret

    async def check_not_live_elsewhere(self, config_id: str) -> None:
        """Raise `ModelLiveElsewhere` where `replace` would."""
        store, _ = self._opened
        presence = self._here
        await self._io(store.check_not_live_elsewhere, config_id, presence.server_id, presence.alive)

    async def replace(self, configuration: Configuration, secret: Secret | None, stored: Configuration) -> None:
        """Store a replacement of what is stored, and its key.

        Raises
        ------
        ModelLiveElsewhere
            If another server has it loaded.
        """
        store, files = self._opened
        presence = self._here

        def write() -> None:
            # A key is written before what refers to it, and deleted after.
            kept = files.read(stored)
            new = secret if secret != kept else None
            try:
                if new is not None:
                    files.write(configuration.config_id, new)
                store.replace(configuration, server_id=presence.server_id, alive=presence.alive)
            except (ConfigurationNotFound, ModelLiveElsewhere):  # as above
                files.delete(configuration.config_id, new)
                raise
            if secret != kept:
                files.delete(configuration.config_id, kept)

        await self._io(write)

    async def delete(self, stored: Configuration) -> None:
        """Delete a configuration and its key, or raise `ModelLiveElsewhere`."""
        store, files = self._opened
        presence = self._here

        def write() -> None:
            kept = files.read(stored)
            store.delete(stored.config_id, server_id=presence.server_id, alive=presence.alive)
            files.delete(stored.config_id, kept)

        await self._io(write)

    # -- keys ----------------------------------------------------------------------------------------------

    async def secret(self, configuration: Configuration) -> Secret | None:
        """Read the raw key of a configuration, if it has one."""
        _, files = self._opened
        return await self._io(files.read, configuration)

    async def api_key(self, configuration: Configuration) -> str | None:
        """Give the key that the engine sends, or None to call without one.

        Raises
        ------
        KeyMissing, KeyNotAllowed
        """
        engine_type = self.engine_type(configuration)
        origin = engine_type.origin(configuration)
        if origin is None:
            return None
        key = key_of(configuration.model_kwargs)
        secret = await self.secret(configuration)
        is_default = key is None and origin == engine_type.default_origin()
        return self._policy.resolve(key, origin, self._environ, secret, is_default=is_default)

    def _part(
        self,
        request: ModelConfigRequest,
        config_id: str,
        kept: Secret | None,
        by: Person | None = None,
        *,
        declared: bool = False,
    ) -> tuple[Configuration, Secret | None]:
        """Check a request and part it from its raw key, which a mark then stands for."""
        engine_type, arguments = self.check(request)
        configuration = Configuration(config_id=config_id, declared=declared, **request.model_dump())
        engine_type.check(configuration)
        self._rules.check(configuration, engine_type, arguments)
        origin = engine_type.origin(configuration)
        given = key_of(request.model_kwargs)
        if by is not None and not by.administers:
            self._rules.check_person(configuration, engine_type, arguments)
            self._policy.check_person(given)
        if given is None:
            return configuration, None
        if origin is None:
            raise KeyNotAllowed(
                f"`{request.model_type}` models take no key.", param=f"model_kwargs.{ARGUMENT}", hint="Leave it out."
            )
        if isinstance(given, str) and given.startswith("env:"):
            self._policy.check_reference(given, origin)
            return configuration, None
        if isinstance(given, str):
            secret = kept if kept and kept.origin == origin and kept.holds(given) else new_secret(given, origin)
        elif kept is not None and kept.origin == origin and given == kept.mark():
            secret = kept
        else:
            why = "There is no stored key to keep."
            if kept is not None and kept.origin != origin:
                why = f"The stored key is for {kept.origin}, not for {origin}."
            raise KeyMissing(why, param=f"model_kwargs.{ARGUMENT}", hint="Send the api_key itself.")
        kwargs = with_key(request.model_kwargs, secret.mark())
        return configuration.model_copy(update={"model_kwargs": kwargs}), secret


def exists(stored: Configuration) -> ConfigurationExists:
    """Make the error that tells how to change what is stored."""
    return ConfigurationExists(
        f"`{stored.model_id}` is configured already, and differently.",
        param="model_id",
        hint=f"PUT /llm/configuration/{stored.config_id} changes it; another model_id makes another model. "
        f"In Python: client.update({stored.model_id!r}, ...).",
        details={"config_id": stored.config_id},
    )
