"""The server of a batch: requests to it, and whether it and the model are there."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import aiohttp
from yarl import URL

from llmkit import errors
from llmkit.client.connection import CONNECT_SECONDS, REQUEST_SECONDS, Server
from llmkit.client.results import Configuration, Model, describe_status
from llmkit.errors import LLMKitError, from_wire

if TYPE_CHECKING:
    from llmkit.client.client import Client

ANSWER_SECONDS: Final = 3600.0
"""So long may the answer to a prompt of a batch take, its wait in the queue included."""
LOOK_SECONDS: Final = 2.0
"""A server that is silent for so long may be found at another address; a model so long unloaded is no accident."""


class Lost(errors.ConnectError):
    """The server did not answer."""

    sent = False
    """Whether the request may have reached it."""


class ConfigurationChanged(errors.WrongState):
    """Answers of one batch would be those of two configurations."""


# A server that was started anew may have another token.
_GONE: Final = (Lost, errors.NotReady, errors.NotAuthenticated, errors.NotAllowed)


class BatchServer:
    """``async with BatchServer(...)``: requests of one batch, in the loop that entered it.

    Parameters
    ----------
    client
        Of the server as it is found at first.
    configuration
        Of the model; a server where it is another one is not the same.
    epoch
        Of the server now; it changes when the server is started anew.
    reconnect
        Finds the server again after it went; its client is closed here.
    """

    def __init__(
        self, client: Client, configuration: Configuration, epoch: str, reconnect: Callable[[], Client]
    ) -> None:
        self._server = client.connection.server
        self._configuration = configuration
        self._epoch = epoch
        self._reconnect = reconnect
        self._silent_since = self._unloaded_since = 0.0
        self._session: aiohttp.ClientSession | None = None
        self.generation = 0
        """Grows when the model is there again after it was gone."""

    async def __aenter__(self) -> Self:
        self._session = _session(self._server)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        *,
        seconds: float = ANSWER_SECONDS,
    ) -> Any:
        """Send a request and give the JSON of its answer.

        Raises
        ------
        Lost
            If there is no answer.
        LLMKitError
            What the server said.
        """
        assert self._session is not None  # noqa: S101  # entered
        # The path is encoded already; a base URL may hold %40, which must stay as it is.
        url = URL(self._server.url + path, encoded=True)
        timeout = aiohttp.ClientTimeout(sock_connect=CONNECT_SECONDS, total=seconds)
        try:
            async with self._session.request(
                method, url, json=body, headers=headers, timeout=timeout, allow_redirects=False
            ) as response:
                data, status = await response.read(), response.status
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            lost = Lost(f"{self._server.url} does not answer: {error or type(error).__name__}.")
            lost.sent = not isinstance(error, aiohttp.ClientConnectorError)
            raise lost from error
        if HTTPStatus.MULTIPLE_CHOICES <= status < HTTPStatus.BAD_REQUEST:
            raise errors.NotAuthenticated(f"{self._server.url} asks for a login.")
        try:
            told = json.loads(data)
        except ValueError:
            # A proxy that stands before a server that is gone answers so.
            lost = Lost(f"{self._server.url} answered {status}, and something that is no JSON.")
            lost.sent = True
            raise lost from None
        if status >= HTTPStatus.BAD_REQUEST:
            raise from_wire(status, told)
        return told

    async def is_there(self) -> bool:
        """Say whether server and model are ready for prompts."""
        try:
            model = await self._model()
        except _GONE:
            return False
        return model.status == "loaded" or bool(self._configuration.auto_load and model.status == "unloaded")

    async def regain(self) -> str | None:
        """Try to have the model again, and say what is missing for that; None if nothing is.

        Raises
        ------
        ModelNotLoaded
            If somebody has unloaded it.
        ConfigurationChanged
            If the model is configured otherwise now.
        """
        try:
            model = await self._model()
            health = await self.call("GET", "llm/health", seconds=REQUEST_SECONDS)
            self._silent_since = 0.0
            if health["status"] == "stopping":  # it unloads its models before it ends
                return "the server is going down"
            epoch = str(health["epoch"])
            await self.check()
            if model.status == "loaded" or (self._configuration.auto_load and model.status == "unloaded"):
                self._epoch, self._unloaded_since = epoch, 0.0
                self.generation += 1
                return None
            if model.status != "unloaded":
                self._unloaded_since = 0.0
            elif epoch != self._epoch:
                return await self._load(model)
            else:
                # Perhaps only for a moment: to be loaded with other arguments, or since the server begins to end.
                self._unloaded_since = self._unloaded_since or time.monotonic()
                if time.monotonic() - self._unloaded_since < LOOK_SECONDS:
                    return f"`{model.model_id}` was unloaded"
                raise errors.ModelNotLoaded(
                    f"`{model.model_id}` was unloaded.",
                    hint=f"client.load({model.model_id!r}) loads it; then run the same call again.",
                )
            return f"`{model.model_id}` is {describe_status(model)}"
        except _GONE as error:
            self._unloaded_since = 0.0
            self._silent_since = self._silent_since or time.monotonic()
            if time.monotonic() - self._silent_since > LOOK_SECONDS:
                await self._look_elsewhere()
            if isinstance(error, errors.NotAuthenticated | errors.NotAllowed):
                return "the server refuses the token; a new `llmkit.connect()` may find the one that it has now"
            return "the server does not answer" if isinstance(error, Lost) else error.message.rstrip(".")

    async def check(self) -> None:
        """Raise `ConfigurationChanged` if the model is configured otherwise now."""
        path = f"llm/configuration/{self._configuration.config_id}"
        self._check(await self.call("GET", path, seconds=REQUEST_SECONDS))

    async def _model(self) -> Model:
        # A name may hold no character that a URL would have to encode.
        path = f"llm/models/{self._configuration.model_id}"
        return Model.model_validate(await self.call("GET", path, seconds=REQUEST_SECONDS))

    async def _load(self, model: Model) -> str:
        """Load a model that was loaded before the server was started anew."""
        try:
            path = f"llm/load_model/{model.config_id}?wait=false"
            await self.call("POST", path, seconds=REQUEST_SECONDS)
        except Lost:
            raise
        except LLMKitError as error:
            return f"`{model.model_id}` cannot be loaded: {error.message.rstrip('.')}"
        return f"`{model.model_id}` is loading"

    def _check(self, told: Mapping[str, Any]) -> None:
        stored = Configuration.model_validate({k: v for k, v in told.items() if k in Configuration.model_fields})
        if stored.hash != self._configuration.hash:
            raise ConfigurationChanged(
                f"The configuration of `{stored.model_id}` was changed meanwhile.",
                hint="Answers of both would be mixed. Run the same call again to have all rows answered as it is now.",
            )

    async def _look_elsewhere(self) -> None:
        """Go on at another address, if the same server is there: it has the same configuration by the same id."""
        server = await asyncio.to_thread(self._find)
        if server is None or server == self._server:
            return
        before, self._session = self._session, _session(server)
        self._server = server
        if before is not None:
            await before.close()

    def _find(self) -> Server | None:
        # Whatever is wrong there: this address is looked at again, and so is that one.
        with contextlib.suppress(Exception), self._reconnect() as client:
            self._check(client.configuration(self._configuration.config_id).to_wire())
            return client.connection.server
        return None


def _session(server: Server) -> aiohttp.ClientSession:
    trust: ssl.SSLContext | bool = True
    if isinstance(server.verify, str):
        trust = ssl.create_default_context(cafile=server.verify)
    elif not server.verify:
        trust = False
    connector = aiohttp.UnixConnector(server.uds, limit=0) if server.uds else aiohttp.TCPConnector(limit=0, ssl=trust)
    headers = {**server.headers, "Accept": "application/json"}
    return aiohttp.ClientSession(connector=connector, headers=headers, trust_env=not server.is_local)
