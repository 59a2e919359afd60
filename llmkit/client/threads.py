"""Threads for who awaits: each runs a call that waits, and where nobody awaits that any more, it is ended."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import ctypes
import functools
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from llmkit.errors import LLMKitError

THREADS = 64
"""So many calls of one client run at once; more wait for their turn."""
ENDING_SECONDS = 10.0
"""So long the end of an answer is seen to after its task was cancelled."""
PAUSE_SECONDS = 0.05
_ENDING_THREADS = 8
_AWAKE_SECONDS = 0.2

T = TypeVar("T")
Future = concurrent.futures.Future


class Threads:
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


def cancel_until_over(reading: Future[Any], cancel: Callable[[], None]) -> None:
    """End an answer: the server may get to know of the request only after the first try."""
    deadline = time.monotonic() + ENDING_SECONDS
    while not reading.done() and time.monotonic() < deadline:
        with contextlib.suppress(LLMKitError):
            cancel()
        concurrent.futures.wait([reading], PAUSE_SECONDS)


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
    concurrent.futures.wait([future], ENDING_SECONDS)
