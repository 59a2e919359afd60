"""The client for ``await``: the same methods, each run in a thread.

Nothing is implemented twice: the methods of `AsyncClient` are made from those of `Client`. Where a task is cancelled
that waits for an answer, the answer is ended on the server by its ``request_id``: the thread that reads cannot be
interrupted.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import re
import socket
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar

import httpx

from llmkit.client import discovery
from llmkit.client import keys as asking_keys
from llmkit.client.async_streaming import AsyncAnswerStream
from llmkit.client.client import Client
from llmkit.client.results import Answer, Configuration, Model
from llmkit.client.streaming import read_events
from llmkit.client.threads import ENDING_SECONDS, PAUSE_SECONDS, Future, Threads, cancel_until_over
from llmkit.errors import LLMKitError

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI

INTERRUPTIBLE = frozenset({"map", "compare"})
"""They work on for long, and end their requests and keep their rows when they are interrupted."""
_AWAITED_CALL = re.compile(r"(?<![\w.`])client\.(?!openai|async_openai|as_async|stream|follow_logs)\w+\(")
"""Where an example of `Client` calls what is awaited here."""

P = ParamSpec("P")
T = TypeVar("T")


def _awaited(
    method: Callable[Concatenate[Client, P], T],
) -> Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]]:
    """Make a method of `AsyncClient` from one of `Client`: the same, in a thread, with ``await`` in its examples."""

    @functools.wraps(method)
    async def call(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        run = self._threads.run_interruptible if method.__name__ in INTERRUPTIBLE else self._threads.run
        return await run(lambda: method(self._client, *args, **kwargs))

    call.__doc__ = _AWAITED_CALL.sub(r"await \g<0>", method.__doc__ or "")
    return call


class AsyncClient:
    """Configure, load, prompt and unload the models of one Jupyter server, with ``await``.

    It has the methods of `Client`, with the same parameters, results and errors. Each is awaited, besides these:
    `stream` and `follow_logs` are for ``async for``, `openai` and `async_openai` give their client at once. Up to 64
    calls run at the same time, each in a thread; a stream needs one only while it waits for its next piece.
    Cancelling a task ends on the server, too, what it waits for: the answer, the load, or the requests of a table.

    Parameters
    ----------
    client
        What it asks with; closed with it.

    Examples
    --------
    >>> client = await llmkit.AsyncClient.connect()
    >>> questions = ["What is the capital of France?", "What is the capital of Italy?"]
    >>> answers = await asyncio.gather(*(client.prompt("demo", question) for question in questions))
    >>> print(answers[0])
    The capital of France is Paris.
    >>> await client.close()
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._threads = Threads()

    @classmethod
    async def connect(
        cls,
        url: str | None = None,
        token: str | None = None,
        *,
        verify: bool | str | None = None,
        shared: bool | None = None,
    ) -> Self:
        """Find the server and give a client of it; parameters and errors are those of `llmkit.connect`.

        Examples
        --------
        >>> client = await llmkit.AsyncClient.connect()
        >>> client
        <llmkit.AsyncClient http://127.0.0.1:...>
        >>> await client.close()
        """
        return cls(await asyncio.to_thread(discovery.connect, url, token, verify=verify, shared=shared))

    @property
    def url(self) -> str:
        """Base URL of the server.

        Examples
        --------
        >>> client.url
        'http://127.0.0.1:...'
        """
        return self._client.url

    @property
    def shared(self) -> bool:
        """Whether many people share the server, as a service of their JupyterHub.

        Examples
        --------
        >>> client.shared
        False
        """
        return self._client.shared

    @property
    def place(self) -> str:
        """The server in words for people: its address, and whether it is a shared one.

        Examples
        --------
        >>> client.place
        'http://127.0.0.1:...'
        """
        return self._client.place

    def __repr__(self) -> str:
        return f"<llmkit.AsyncClient {self.place}>"

    def as_async(self) -> AsyncClient:
        """Give this client.

        Examples
        --------
        >>> client.as_async() is client
        True
        """
        return self

    def openai(self, **kwargs: Any) -> OpenAI:
        """Give an ``openai.OpenAI`` of this server; see `Client.openai`.

        Examples
        --------
        >>> openai = client.openai()
        >>> str(openai.base_url).endswith("/llm/v1/")
        True
        >>> openai.close()
        """
        return self._client.openai(**kwargs)

    def async_openai(self, **kwargs: Any) -> AsyncOpenAI:
        """Give an ``openai.AsyncOpenAI`` of this server; see `Client.openai`.

        Examples
        --------
        >>> openai = client.async_openai()
        >>> messages = [{"role": "user", "content": "What is the capital of France?"}]
        >>> reply = await openai.chat.completions.create(model="demo", messages=messages)
        >>> reply.choices[0].message.content
        'The capital of France is Paris.'
        >>> await openai.close()
        """
        return self._client.async_openai(**kwargs)

    async def close(self) -> None:
        """Close the connections to the server; the models stay as they are.

        Examples
        --------
        >>> await client.close()
        """
        await self._threads.finish(self._client.close)
        self._threads.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # -- what is as it is there ------------------------------------------------------------------------------------

    permissions = _awaited(Client.permissions)
    configure = _awaited(Client.configure)
    check = _awaited(Client.check)
    configurations = _awaited(Client.configurations)
    configuration = _awaited(Client.configuration)
    update = _awaited(Client.update)
    delete = _awaited(Client.delete)
    export_configurations = _awaited(Client.export_configurations)
    import_configurations = _awaited(Client.import_configurations)
    model_types = _awaited(Client.model_types)
    models = _awaited(Client.models)
    model = _awaited(Client.model)
    snapshot = _awaited(Client.snapshot)
    health = _awaited(Client.health)
    devices = _awaited(Client.devices)
    plan = _awaited(Client.plan)
    logs = _awaited(Client.logs)
    start_loading = _awaited(Client.start_loading)
    unload = _awaited(Client.unload)
    cancel = _awaited(Client.cancel)
    requests = _awaited(Client.requests)
    usage = _awaited(Client.usage)
    map = _awaited(Client.map)
    compare = _awaited(Client.compare)
    conversations = _awaited(Client.conversations)
    conversation = _awaited(Client.conversation)
    save_conversation = _awaited(Client.save_conversation)
    delete_conversation = _awaited(Client.delete_conversation)
    keys = _awaited(Client.keys)
    create_key = _awaited(Client.create_key)
    revoke_key = _awaited(Client.revoke_key)

    # -- what can be ended half-way, or needs more than a thread ---------------------------------------------------

    async def prompt(self, model_id: str, prompt: str, **inference_kwargs: Any) -> Answer:
        """Ask a model and give its answer; see `Client.prompt`. Cancelling the task ends the generation.

        Examples
        --------
        >>> answer = await client.prompt("demo", "What is the capital of France?", temperature=0)
        >>> print(answer)
        The capital of France is Paris.
        """
        request_id = str(inference_kwargs.setdefault("request_id", f"req-{uuid.uuid4().hex}"))

        def end(asking: Future[Answer]) -> None:
            cancel_until_over(asking, lambda: self._client.cancel(request_id))

        return await self._threads.run(lambda: self._client.prompt(model_id, prompt, **inference_kwargs), end)

    def stream(self, model_id: str, prompt: str, **inference_kwargs: Any) -> AsyncAnswerStream:
        """Ask a model and give its answer as it comes; the parameters are those of `prompt`.

        Examples
        --------
        >>> async for piece in client.stream("demo", "What is the capital of France?"):
        ...     print(piece, end="")
        The capital of France is Paris.
        """
        return AsyncAnswerStream(self._client.stream(model_id, prompt, **inference_kwargs), self._threads)

    async def load(self, model_id: str, *, progress: bool = True, force: bool = False) -> Model:
        """Load a model, and return when it is loaded; see `Client.load`. Cancelling the task cancels the load.

        Examples
        --------
        >>> await client.load("demo")
        <Model demo: loaded>
        """
        before: list[Model] = []

        def load() -> Model:
            before.append(self._client.model(model_id))
            return self._client.load(model_id, progress=progress, force=force)

        def end(loading: Future[Model]) -> None:
            # Only a load of our own: that of somebody else goes on.
            deadline = time.monotonic() + ENDING_SECONDS
            while not loading.done() and time.monotonic() < deadline:
                with contextlib.suppress(LLMKitError):
                    if before and before[0].status != "loading" and self._client.model(model_id).status == "loading":
                        self._client.unload(model_id)
                if before and before[0].status == "loading":
                    return
                concurrent.futures.wait([loading], PAUSE_SECONDS)

        return await self._threads.run(load, end)

    async def set_key(self, model_id: str, key: str | None = None, *, reload: bool = False) -> Configuration:
        """Give a configuration another API key; see `Client.set_key`.

        Examples
        --------
        >>> changed = await client.set_key("gpt", reload=True)
        API key of gpt: ········
        """
        # A kernel can ask a person only from the thread that runs the cell.
        given = asking_keys.ask_key(model_id) if key is None else key
        return await self._threads.run(lambda: self._client.set_key(model_id, given, reload=reload))

    async def follow_logs(self, model_id: str, tail: int = 200) -> AsyncGenerator[str]:
        """Give the last lines of an engine's log, then each new one; see `Client.follow_logs`.

        Examples
        --------
        >>> async for line in client.follow_logs("demo"):
        ...     print(line)
        ...     break
        (APIServer pid=...) INFO ... non-default args: ...
        """
        with contextlib.ExitStack() as opened:
            log = self._client.connection.log_stream(model_id, tail)
            response = await self._threads.run(
                lambda: opened.enter_context(log),
                lambda opening: opening.add_done_callback(lambda _: opened.close()),
            )
            lines = read_events(response)

            def end(reading: Future[Any]) -> None:
                # The silence of a log has no end: the thread that reads is woken by the end of its connection.
                _hang_up(response)
                concurrent.futures.wait([reading], ENDING_SECONDS)

            while (line := await self._threads.run(lambda: next(lines, None), end)) is not None:
                yield line["line"]


def _hang_up(response: httpx.Response) -> None:
    line = response.extensions["network_stream"].get_extra_info("socket")
    with contextlib.suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)
