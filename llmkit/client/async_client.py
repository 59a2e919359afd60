"""The client for ``await``: the same methods, each run in a thread.

Nothing is implemented twice: the methods of `AsyncClient` are made from those of `Client`. Where a task is cancelled
that waits for an answer, the answer is ended on the server by its ``request_id``: the thread that reads cannot be
interrupted.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import ctypes
import functools
import re
import socket
import threading
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar

import httpx

from llmkit.client import discovery
from llmkit.client import keys as asking_keys
from llmkit.client.client import Client
from llmkit.client.results import Answer, Configuration, Model
from llmkit.client.streaming import AnswerStream, Piece, read_events
from llmkit.errors import LLMKitError

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI

THREADS = 64
"""So many calls of one client run at once; more wait for their turn."""
INTERRUPTIBLE = frozenset({"map", "compare"})
"""They work on for long, and end their requests and keep their rows when they are interrupted."""
_ENDING_THREADS = 8
_ENDING_SECONDS = 10.0
"""So long the end of an answer is seen to after its task was cancelled."""
_PAUSE_SECONDS = 0.05
_AWAKE_SECONDS = 0.2

_AWAITED_CALL = re.compile(r"(?<![\w.`])client\.(?!openai|async_openai|as_async|stream|follow_logs)\w+\(")
"""Where an example of `Client` calls what is awaited here."""

P = ParamSpec("P")
T = TypeVar("T")
Future = concurrent.futures.Future


class _Threads:
    """Runs calls in threads, and what ends them in threads of their own, as the others may all be waiting."""

    def __init__(self) -> None:
        self._working = concurrent.futures.ThreadPoolExecutor(THREADS, "llmkit-call")
        self._ending = concurrent.futures.ThreadPoolExecutor(_ENDING_THREADS, "llmkit-end")
        self._waiting = 0
        self._awake: asyncio.AbstractEventLoop | None = None

    async def run(self, call: Callable[[], T], end: Callable[[Future[T]], None] | None = None) -> T:
        """Run a call; ``end`` ends it if the task is cancelled meanwhile, and is waited for."""
        # The context goes along, so that what a call prints or shows lands under the cell that awaits it.
        future = self._working.submit(contextvars.copy_context().run, call)
        try:
            return await self._result(future)
        except asyncio.CancelledError:
            if end is not None:
                await self.finish(functools.partial(end, future))
            raise

    async def run_interruptible(self, call: Callable[[], T]) -> T:
        """Run a call that ends in order when it is interrupted, and interrupt it if the task is cancelled."""
        future: Future[T] = Future()
        run = functools.partial(contextvars.copy_context().run, call)
        # A thread of its own: an interrupt that comes too late must not hit somebody else's call.
        thread = threading.Thread(target=_keep_result, args=(future, run), name="llmkit-long-call", daemon=True)
        thread.start()
        try:
            return await self._result(future)
        except asyncio.CancelledError:
            await self.finish(functools.partial(_interrupt, thread, future))
            raise

    async def _result(self, future: Future[T]) -> T:
        self._waiting += 1
        loop = asyncio.get_running_loop()
        if self._awake is not loop:
            self._awake = loop
            self._stay_awake(loop)
        try:
            return await asyncio.wrap_future(future)
        finally:
            self._waiting -= 1

    def _stay_awake(self, loop: asyncio.AbstractEventLoop) -> None:
        # A kernel notices the stop button only when its loop wakes; while we wait nothing else might wake it.
        if self._waiting and self._awake is loop:
            loop.call_later(_AWAKE_SECONDS, self._stay_awake, loop)
        elif self._awake is loop:
            self._awake = None

    async def finish(self, end: Callable[[], None]) -> None:
        """Run what ends something, whatever becomes of the task."""
        await asyncio.shield(asyncio.wrap_future(self._ending.submit(end)))

    def close(self) -> None:
        """Let the threads end when their calls are over."""
        self._working.shutdown(wait=False, cancel_futures=True)
        self._ending.shutdown(wait=False)


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


class AsyncAnswerStream(AsyncIterator[str]):
    """Pieces of an answer as they come, for ``async for``; the attributes are those of `AnswerStream`.

    Cancelling the task that reads, closing it or leaving its ``async with`` block ends the generation on the server.

    Examples
    --------
    >>> async for piece in client.stream("demo", "What is the capital of France?"):
    ...     print(piece, end="")
    The capital of France is Paris.
    """

    def __init__(self, stream: AnswerStream, threads: _Threads) -> None:
        self._stream = stream
        self._threads = threads

    @property
    def request_id(self) -> str:
        """Names the request on the server.

        Examples
        --------
        >>> stream = client.stream("demo", "What is the capital of France?", request_id="mine")
        >>> stream.request_id
        'mine'
        """
        return self._stream.request_id

    @property
    def text(self) -> str:
        """The text that has come so far.

        Examples
        --------
        >>> stream = client.stream("demo", "What is the capital of France?")
        >>> async for _ in stream:
        ...     pass
        >>> stream.text
        'The capital of France is Paris.'
        """
        return self._stream.text

    @property
    def reasoning(self) -> str:
        """The reasoning that has come so far.

        Examples
        --------
        >>> stream = client.stream("demo", "What is the capital of France?")
        >>> async for _ in stream:
        ...     pass
        >>> stream.reasoning
        ''
        """
        return self._stream.reasoning

    @property
    def answer(self) -> Answer | None:
        """The whole answer, once the last piece has been taken.

        Examples
        --------
        >>> stream = client.stream("demo", "What is the capital of France?")
        >>> async for _ in stream:
        ...     pass
        >>> stream.answer.finish_reason
        'stop'
        """
        return self._stream.answer

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        piece = await self._take(lambda: next(self._stream, None))
        if piece is None:
            raise StopAsyncIteration
        return piece

    async def pieces(self) -> AsyncGenerator[Piece]:
        """Give what comes, the model's reasoning too.

        Examples
        --------
        >>> stream = client.stream("demo", "What is the capital of France?")
        >>> [piece.reasoning async for piece in stream.pieces() if piece.reasoning]
        []
        """
        pieces = self._stream.pieces()
        while (piece := await self._take(lambda: next(pieces, None))) is not None:
            yield piece

    async def _take(self, call: Callable[[], T]) -> T:
        return await self._threads.run(call, self._end)

    def _end(self, reading: Future[Any]) -> None:
        _cancel_until_over(reading, self._stream.cancel)
        if reading.done():
            self._stream.close()

    async def cancel(self) -> None:
        """End the generation on the server; who reads gets an error.

        Examples
        --------
        >>> stream = client.stream("demo", "What is the capital of France?")
        >>> await anext(stream)
        'The'
        >>> await stream.cancel()
        >>> await stream.close()
        """
        await self._threads.finish(self._stream.cancel)

    async def close(self) -> None:
        """End the generation on the server, if it still runs.

        Examples
        --------
        >>> stream = client.stream("demo", "What is the capital of France?")
        >>> await anext(stream)
        'The'
        >>> await stream.close()
        """
        await self._threads.finish(self._stream.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


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
        self._threads = _Threads()

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
            _cancel_until_over(asking, lambda: self._client.cancel(request_id))

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
            deadline = time.monotonic() + _ENDING_SECONDS
            while not loading.done() and time.monotonic() < deadline:
                with contextlib.suppress(LLMKitError):
                    if before and before[0].status != "loading" and self._client.model(model_id).status == "loading":
                        self._client.unload(model_id)
                if before and before[0].status == "loading":
                    return
                concurrent.futures.wait([loading], _PAUSE_SECONDS)

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
                concurrent.futures.wait([reading], _ENDING_SECONDS)

            while (line := await self._threads.run(lambda: next(lines, None), end)) is not None:
                yield line["line"]


def _cancel_until_over(reading: Future[Any], cancel: Callable[[], None]) -> None:
    """End an answer: the server may get to know of the request only after the first try."""
    deadline = time.monotonic() + _ENDING_SECONDS
    while not reading.done() and time.monotonic() < deadline:
        with contextlib.suppress(LLMKitError):
            cancel()
        concurrent.futures.wait([reading], _PAUSE_SECONDS)


def _keep_result(future: Future[T], call: Callable[[], T]) -> None:
    future.set_running_or_notify_cancel()
    try:
        result = call()
    except BaseException as error:  # noqa: BLE001  # it is for who awaits the result
        future.set_exception(error)
    else:
        future.set_result(result)


def _interrupt(thread: threading.Thread, future: Future[Any]) -> None:
    """Do to a thread what the stop button does to that of the cell."""
    if not future.done():
        number = ctypes.c_ulong(thread.ident or 0)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(number, ctypes.py_object(KeyboardInterrupt))
    concurrent.futures.wait([future], _ENDING_SECONDS)


def _hang_up(response: httpx.Response) -> None:
    line = response.extensions["network_stream"].get_extra_info("socket")
    with contextlib.suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)
