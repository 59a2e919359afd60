"""Know the state of every model: one thread that listens to the server's events.

Every event carries the registry's epoch and revision. The thread subscribes first and takes the snapshot then, so
nothing is lost in between; an event that is older than what is known is dropped; a new epoch means a new server, so
a new snapshot is taken. Where events do not come through, the snapshot is taken once a second.
"""

from __future__ import annotations

import json
import logging
import socket
import ssl
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from llmkit.errors import ConnectError, LLMKitError
from llmkit.schemas import Model, Snapshot

if TYPE_CHECKING:
    import websocket

    from llmkit.client.client import Client

MODEL_EVENT = "https://llmkit.org/events/model/v1"
POLL_SECONDS = 1.0
EVENTS_AGAIN_SECONDS = 15.0
"""After so long without events they are tried again."""
QUIET_SECONDS = 10.0
"""A line that is quiet for so long is asked whether it still stands."""
OPEN_SECONDS = 5.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.2, 3.0

log = logging.getLogger(__name__)
State = Literal["connecting", "connected", "reconnecting"]


class Watcher:
    """Follows every model of a server until it is closed.

    Parameters
    ----------
    client
        The server.

    Attributes
    ----------
    snapshot
        What is known; None before the first answer. It is replaced, never changed.
    state
        ``connecting``, ``connected``, or ``reconnecting`` while the server does not answer.
    error
        Why it does not answer.

    Examples
    --------
    >>> seen = threading.Event()
    >>> watcher = Watcher(client)
    >>> end = watcher.subscribe(lambda watcher: None if watcher.snapshot is None else seen.set())
    >>> seen.wait(10)
    True
    >>> [model.status for model in watcher.snapshot.models]
    ['loaded', 'loaded']
    >>> watcher.close()
    """

    def __init__(self, client: Client) -> None:
        self.snapshot: Snapshot | None = None
        self.state: State = "connecting"
        self.error: LLMKitError | None = None
        self._client = client
        self._listeners: list[Callable[[Watcher], None]] = []
        self._closed = threading.Event()
        self._socket: websocket.WebSocket | None = None
        self._thread = threading.Thread(target=self._run, name="llmkit-watcher", daemon=True)
        self._thread.start()

    def subscribe(self, listener: Callable[[Watcher], None]) -> Callable[[], None]:
        """Call a function after every change, on this watcher's thread; gives a function that ends that.

        What is known already is told at once, on yours.

        Examples
        --------
        >>> watcher = Watcher(client)
        >>> states = []
        >>> end = watcher.subscribe(lambda watcher: states.append(watcher.state))
        >>> end()
        >>> watcher.close()
        """
        self._listeners = [*self._listeners, listener]
        if self.state != "connecting":
            _call(listener, self)

        def unsubscribe() -> None:
            self._listeners = [one for one in self._listeners if one is not listener]

        return unsubscribe

    def close(self) -> None:
        """End the thread.

        Examples
        --------
        >>> watcher = Watcher(client)
        >>> watcher.close()
        """
        self._closed.set()
        opened = self._socket
        if opened is not None:
            opened.abort()  # type: ignore[no-untyped-call]  # wakes the thread out of its read
        if threading.current_thread() is not self._thread:
            self._thread.join(OPEN_SECONDS + 1.0)

    # -- the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        import websocket  # here, so that who only asks does not pay for it

        pause = FIRST_PAUSE_SECONDS
        while not self._closed.is_set():
            self._socket = self._open_events()
            try:
                self._take_snapshot()
                pause = FIRST_PAUSE_SECONDS
                if self._socket is not None:
                    self._listen(self._socket)
                else:
                    self._poll()
            except LLMKitError as error:
                self._lost(error)
                self._closed.wait(pause)
                pause = min(pause * 2, LONGEST_PAUSE_SECONDS)
            except (OSError, websocket.WebSocketException):
                self._closed.wait(FIRST_PAUSE_SECONDS)  # the line broke; the next turn finds out why
            except Exception as error:
                log.exception("the server's state could not be read")
                self._lost(ConnectError(f"The state of the server could not be read: {type(error).__name__}."))
                self._closed.wait(LONGEST_PAUSE_SECONDS)
            finally:
                if self._socket is not None:
                    self._socket.close()
                    self._socket = None

    def _open_events(self) -> websocket.WebSocket | None:
        import websocket

        server = self._client.connection.server
        options: dict[str, Any] = {}
        if server.verify is False:
            options["sslopt"] = {"cert_reqs": ssl.CERT_NONE, "check_hostname": False}
        elif isinstance(server.verify, str):
            options["sslopt"] = {"ca_certs": server.verify}
        try:
            if server.uds:
                options["socket"] = _connect_uds(server.uds)
            opened = websocket.create_connection(
                "ws" + server.url.removeprefix("http") + "api/events/subscribe",
                timeout=OPEN_SECONDS,
                header=server.headers,
                suppress_origin=True,
                redirect_limit=0,  # the token is for this server alone
                http_no_proxy=["*"] if server.is_local else None,
                **options,
            )
        except (websocket.WebSocketException, OSError) as error:
            log.debug("no events: %s", error)
            return None
        opened.settimeout(QUIET_SECONDS)
        return opened

    def _listen(self, opened: websocket.WebSocket) -> None:
        import websocket

        asked = False
        while not self._closed.is_set():
            try:
                opcode, data = opened.recv_data(control_frame=True)
            except websocket.WebSocketTimeoutException:
                if asked:
                    return
                opened.send(b"", websocket.ABNF.OPCODE_PING)
                asked = True
                continue
            asked = False
            if opcode == websocket.ABNF.OPCODE_CLOSE:
                return
            if opcode == websocket.ABNF.OPCODE_TEXT:
                self._take_event(data)

    def _poll(self) -> None:
        for _ in range(int(EVENTS_AGAIN_SECONDS / POLL_SECONDS)):
            if self._closed.wait(POLL_SECONDS):
                return
            self._take_snapshot()

    def _take_snapshot(self) -> None:
        snapshot = self._client.snapshot()
        if (self.state, self.snapshot) != ("connected", snapshot):
            self.snapshot, self.state, self.error = snapshot, "connected", None
            self._tell()

    def _take_event(self, data: bytes) -> None:
        try:
            event = json.loads(data)
            if event.get("schema_id") != MODEL_EVENT:
                return  # Jupyter's own
            known = self.snapshot
            if known is None or event["epoch"] != known.epoch:
                self._take_snapshot()
                return
            if event["revision"] < known.revision:
                return
            model = Model.model_validate(event["model"]) if event["model"] else None
            models = _replace(known.models, str(event["model_id"]), model)
            self.snapshot = Snapshot(epoch=known.epoch, revision=event["revision"], models=models)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("an event of the server could not be read: %s", type(error).__name__)
            return
        self._tell()

    def _lost(self, error: LLMKitError) -> None:
        self.error = error
        if self.state != "reconnecting":
            self.state = "reconnecting"
            self._tell()

    def _tell(self) -> None:
        if self._closed.is_set():
            return
        for listener in self._listeners:
            _call(listener, self)


def _call(listener: Callable[[Watcher], None], watcher: Watcher) -> None:
    try:
        listener(watcher)
    except Exception:
        # A listener that fails must not end the thread that serves all of them.
        log.exception("a listener failed")


def _replace(models: list[Model], model_id: str, model: Model | None) -> list[Model]:
    """Give the models with one of them replaced, added, or, for None, removed; the order stays."""
    replaced = [model if one.model_id == model_id else one for one in models]
    if model is not None and not any(one.model_id == model_id for one in models):
        replaced.append(model)
    return [one for one in replaced if one is not None]


def _connect_uds(path: str) -> socket.socket:
    opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    opened.settimeout(OPEN_SECONDS)
    try:
        opened.connect(path)
    except OSError:
        opened.close()
        raise
    return opened
