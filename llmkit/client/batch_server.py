"""The server of a batch: requests to it, and whether it and the model are there."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping
from http import HTTPStatus
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self
from urllib.parse import urlsplit

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
SILENCE_SECONDS: Final = 45.0
"""An answer on its way says at least every 15 s that it is; after three times as long the line is dead."""
LOOK_SECONDS: Final = 2.0
"""A server that is silent for so long may be found at another address; a model so long unloaded is no accident."""


class Lost(errors.ConnectError):
    """The server did not answer.

    Attributes
    ----------
    sent
        Whether the request may have reached it.
    """

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


class ConfigurationChanged(errors.WrongState):
    """Answers of one batch would be those of two configurations."""


def is_gone(error: LLMKitError) -> bool:
    """Say whether the server cannot be asked now; one that was started anew may have another token."""
    refused = isinstance(error, errors.NotAuthenticated | errors.NotAllowed)
    return refused or error.status >= HTTPStatus.INTERNAL_SERVER_ERROR


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
        Finds the server again after it went; its client is closed here, if it is not ``client`` itself.

    Attributes
    ----------
    server
        Where it is now.
    generation
        Grows when the model is there again after it was gone.
    """

    def __init__(
        self, client: Client, configuration: Configuration, epoch: str, reconnect: Callable[[], Client]
    ) -> None:
        self.server = client.connection.server
        self.generation = 0
        self._client = client
        self._configuration = configuration
        self._epoch = epoch
        self._reconnect = reconnect
        self._silent_since = self._unloaded_since = 0.0
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = _session(self.server)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def ask(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> dict[str, Any]:
        """Send a prompt that is to be streamed, and give the whole answer, which comes last.

        While a model takes its time a stream says that it is there. So a proxy does not end what is quiet for a minute,
        and a line that is dead is noticed.

        Raises
        ------
        Lost
            If there is no answer, or it breaks off.
        LLMKitError
            What the server said.
        """
        limits = aiohttp.ClientTimeout(total=ANSWER_SECONDS, sock_connect=CONNECT_SECONDS, sock_read=SILENCE_SECONDS)
        last_but_one = last = rest = b""
        async with self._open("POST", "llm/inference/", limits, body, headers) as response:
            async for part in response.content.iter_any():
                *events, rest = (rest + part).split(b"\n\n")
                for event in events:
                    if event.startswith(b"data:"):
                        last_but_one, last = last, event
        is_whole = last == b"data: [DONE]"
        frame = _parse((last_but_one if is_whole else last).removeprefix(b"data:"))
        if isinstance(frame, dict) and "error" in frame:
            raise from_wire(0, frame)
        if not is_whole or not isinstance(frame, dict):
            raise Lost(f"{self.server.url} broke off its answer.", sent=True)
        return frame

    async def call(self, method: str, path: str) -> Any:
        """Send a request and give the JSON of its answer.

        Raises
        ------
        Lost
            If there is no answer.
        LLMKitError
            What the server said.
        """
        limits = aiohttp.ClientTimeout(total=REQUEST_SECONDS, sock_connect=CONNECT_SECONDS)
        async with self._open(method, path, limits) as response:
            told = _parse(await response.read())
        if told is None:
            raise Lost(f"{self.server.url} answered something that is no JSON.", sent=True)
        return told

    @contextlib.asynccontextmanager
    async def _open(
        self,
        method: str,
        path: str,
        limits: aiohttp.ClientTimeout,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        assert self._session is not None  # noqa: S101  # entered
        server = self.server
        # The path is encoded already; a base URL may hold %40, which must stay as it is.
        url = URL(server.url + path, encoded=True)
        # Not of the session, which would show them to a proxy as well.
        headers = {**server.headers, "Accept": "application/json", **(headers or {})}
        try:
            async with self._session.request(
                method, url, json=body, headers=headers, timeout=limits, allow_redirects=False
            ) as response:
                if response.status >= HTTPStatus.MULTIPLE_CHOICES:
                    raise await self._refusal(response)
                yield response
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            sent = not isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)
            raise Lost(f"{server.url} does not answer: {error or type(error).__name__}.", sent=sent) from error

    async def _refusal(self, response: aiohttp.ClientResponse) -> LLMKitError:
        """Give what an answer without success means, which may be that of a proxy or a hub before the server."""
        if response.status < HTTPStatus.BAD_REQUEST:
            return errors.NotAuthenticated(f"{self.server.url} asks for a login.")
        told = _parse(await response.read())
        error = told.get("error") if isinstance(told, dict) else None
        is_ours = isinstance(error, dict) and isinstance(error.get("code"), str)
        if not is_ours and response.status == HTTPStatus.TOO_MANY_REQUESTS:
            asked = response.headers.get("Retry-After")
            return errors.RateLimited(f"{self.server.url} asks to slow down.", details={"retry_after": asked or 1})
        # JupyterHub says 424 of a server that is stopped.
        if not is_ours and (told is None or response.status >= HTTPStatus.FAILED_DEPENDENCY):
            return Lost(f"{self.server.url} answered {response.status}, and not as llmkit does.", sent=True)
        return from_wire(response.status, told)

    async def is_there(self) -> bool:
        """Say whether server and model are ready for prompts."""
        try:
            model = await self._model()
        except LLMKitError as error:
            if is_gone(error):
                return False
            raise
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
            health = await self.call("GET", "llm/health")
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
        except LLMKitError as error:
            if not is_gone(error):
                raise
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
        self._check(await self.call("GET", path))

    async def _model(self) -> Model:
        # A name may hold no character that a URL would have to encode.
        path = f"llm/models/{self._configuration.model_id}"
        return Model.model_validate(await self.call("GET", path))

    async def _load(self, model: Model) -> str:
        """Load a model that was loaded before the server was started anew."""
        try:
            path = f"llm/load_model/{model.config_id}?wait=false"
            await self.call("POST", path)
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
        if server is None or server == self.server:
            return
        before, self._session = self._session, _session(server)
        self.server = server
        if before is not None:
            await before.close()

    def _find(self) -> Server | None:
        # Whatever is wrong there: this address is looked at again, and so is that one.
        with contextlib.suppress(Exception), contextlib.ExitStack() as stack:
            client = self._reconnect()
            if client is not self._client:
                stack.enter_context(client)
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
    return aiohttp.ClientSession(connector=connector, proxy=None if server.is_local else _proxy(server.url))


def _proxy(url: str) -> str | None:
    """Give the proxy that the environment names for an address.

    aiohttp would look itself, but then reads passwords from ``~/.netrc`` too, and sends none beside a token.
    """
    parts = urlsplit(url)
    if urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    named = urllib.request.getproxies()
    return named.get(parts.scheme) or named.get("all")


def _parse(data: bytes) -> Any:
    """Give the JSON value, None if it is none."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None
