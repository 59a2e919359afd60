"""An engine's log, as it is written."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import anywidget
import httpx
import traitlets

from llmkit.client import Client
from llmkit.client.connection import LOG_SILENCE_SECONDS
from llmkit.errors import ConnectError, LLMKitError, TimedOut
from llmkit.panel.lane import Lane
from llmkit.panel.widgets import read_module

log = logging.getLogger(__name__)
KEPT_LINES = 2000
FIRST_LINES = 200
INTERVAL_SECONDS = 0.1
"""A page gets no more often something new than that."""

# Colours, titles and movements of a terminal: CSI, OSC and the short sequences; then what cannot be shown.
_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def plain(line: str) -> str:
    r"""Give a line as a terminal would show it, without its colours.

    Examples
    --------
    >>> plain("\x1b[32mINFO\x1b[0m ready"), plain("10%\r100%\r")
    ('INFO ready', '100%')
    """
    line = _ANSI.sub("", line).rstrip("\r")
    return _CONTROL.sub("", line.rpartition("\r")[2])


class LogReader:
    """Follows a log on a thread of its own, until it is stopped or the server ends it.

    Parameters
    ----------
    take
        Called on that thread with new lines, at most ten times a second.
    ended
        Called on that thread at the end, if it was not stopped, with the error if there was one.
    """

    def __init__(
        self,
        client: Client,
        model_id: str,
        take: Callable[[list[str]], None],
        ended: Callable[[LLMKitError | None], None],
    ) -> None:
        self._client, self._model_id = client, model_id
        self._take, self._ended = take, ended
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self.thread = threading.Thread(target=self._run, name="llmkit-panel-log", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """End the thread, from any other one; returns at once."""
        self._stopped.set()
        # In the lock: once the answer is over, its connection may belong to another request.
        with self._lock, contextlib.suppress(OSError):
            if self._socket is not None:
                # Wakes the thread out of its read. A socket with TLS would first say goodbye, beside that read.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def _run(self) -> None:
        told: LLMKitError | None = None
        try:
            self._read()
        except LLMKitError as error:
            told = error
        except Exception as error:
            if not self._stopped.is_set():
                log.exception("the log of a model could not be read")
                told = LLMKitError(f"The log could not be read: {type(error).__name__}.")
        if not self._stopped.is_set():
            self._ended(told)

    def _read(self) -> None:
        # Not `Client.follow_logs`: it gives line by line, and a page wants what came at once in one piece.
        path = f"llm/models/{quote(self._model_id, safe='')}/logs"
        params = {"tail": FIRST_LINES, "follow": "true"}
        with self._client.connection.stream("GET", path, params=params, seconds=LOG_SILENCE_SECONDS) as response:
            self._hold(response)
            if self._stopped.is_set():  # before there was a socket
                return
            try:
                for lines in _batches(response.iter_text()):
                    if self._stopped.is_set():
                        return
                    if lines:
                        self._take(lines)
                        # What comes meanwhile waits in the socket.
                        self._stopped.wait(INTERVAL_SECONDS)
            finally:
                with self._lock:
                    self._socket = None

    def _hold(self, response: httpx.Response) -> None:
        with self._lock:
            stream = response.extensions.get("network_stream")
            self._socket = stream.get_extra_info("socket") if stream is not None else None


def _batches(pieces: Iterator[str]) -> Iterator[list[str]]:
    """Give the log's lines that each piece of the event stream completes; none for a heartbeat."""
    rest = ""
    for piece in pieces:
        *complete, rest = (rest + piece).split("\n")
        data = (line.removeprefix("data:") for line in complete if line.startswith("data:"))
        yield [str(json.loads(one)["line"]) for one in data]


class LogDrawer(anywidget.AnyWidget):
    """Shows a log. Only what is new is sent, by messages; no line is in the widget's state."""

    _esm = read_module("log_drawer.js")
    label = traitlets.Unicode().tag(sync=True)
    kept = traitlets.Int(KEPT_LINES).tag(sync=True)

    def __init__(self, client: Client, lane: Lane, model_id: str, **values: Any) -> None:
        self._client, self._lane, self._name = client, lane, model_id  # `_model_id` is the widget's own
        self._lock = threading.Lock()
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._note = ""
        self._reader: LogReader | None = None
        self._lost = False
        super().__init__(label=f"Log of {model_id}", **values)
        self.on_msg(self._greeted)

    @property
    def lines(self) -> list[str]:
        """What is shown."""
        return list(self._lines)

    @property
    def note(self) -> str:
        """What is said about the log."""
        return self._note

    def follow(self) -> None:
        """Show the last lines, then each new one; on the panel's thread."""
        self.stop()
        self._lost = False
        with self._lock:
            self._lines.clear()
            self._note = "No lines yet. A model that runs elsewhere writes no log here."
            self._send_all()

        # The names stand for the reader that is made here: what a stopped one still says is dropped.
        def take(lines: list[str]) -> None:
            self._lane.call(lambda: self._append(lines) if self._reader is reader else None)

        def ended(error: LLMKitError | None) -> None:
            self._lane.call(lambda: self._end(error) if self._reader is reader else None)

        reader = self._reader = LogReader(self._client, self._name, take, ended)

    def resume(self) -> None:
        """Follow again what a lost connection has ended; on the panel's thread."""
        if self._lost:
            self.follow()

    def pause(self) -> None:
        """Follow no more until `resume`; what is shown stays."""
        if self._reader is not None:
            self.stop()
            self._lost = True

    def stop(self) -> None:
        """Follow no more; what is shown stays."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.stop()

    def close(self) -> None:
        """Take it away."""
        self.stop()
        super().close()

    def _append(self, lines: list[str]) -> None:
        shown = [plain(line) for line in lines]
        with self._lock:
            self._lines.extend(shown)
            self._note = ""
            self.send({"type": "append", "lines": shown[-KEPT_LINES:]})

    def _end(self, error: LLMKitError | None) -> None:
        self._reader = None
        self._lost = error is None or isinstance(error, ConnectError | TimedOut)
        with self._lock:
            self._note = str(error) if error else "The server has ended the log."
            self.send({"type": "note", "note": self._note})

    def _greeted(self, _: Any, content: Any, __: Any) -> None:
        if isinstance(content, dict) and content.get("type") == "hello":
            # In the lock, so that what is new is sent either with all of it or after it.
            with self._lock:
                self._send_all()

    def _send_all(self) -> None:
        self.send({"type": "all", "lines": list(self._lines), "note": self._note})
