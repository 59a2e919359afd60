"""Start a server where there is none: for a script, or a notebook without a Jupyter server that has llmkit."""

from __future__ import annotations

import atexit
import importlib.util
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from llmkit.client.client import Client
from llmkit.client.connection import Connection
from llmkit.client.discovery import connect, probe, running_servers, runtime_dir
from llmkit.errors import ConnectError, ExtensionMissing, LLMKitError, ServerNotFound, TimedOut

START_SECONDS = 60.0
STOP_SECONDS = 30.0
"""More than what the server gives its engines to end."""
_PAUSE_SECONDS = 0.05
_END_SECONDS = 1.0
_LOG_LINES = 20
_LOG_BYTES = 16 << 10


def start(*, timeout: float = START_SECONDS) -> Client:
    """Give a client of the server that `connect` finds; where it finds none that works, start one first.

    For a script, or for a notebook whose front end has no Jupyter server with llmkit, as in VS Code or Colab. The
    server is ``jupyter llmkit`` of this Python's environment: it listens on a free port of this machine alone, opens to
    a token of its own, and reads the same configuration files as always. It ends with this process, however that one
    ends, and its engines with it. Until then ``LLMKIT_SERVER_URL`` and ``LLMKIT_TOKEN`` are set in this process, so
    that `connect`, the panel, the magics and programs started from here find it.

    Calling it again gives a client of the same server; if that one has ended, a new one is started. Within a coroutine,
    ``await asyncio.to_thread(llmkit.start)`` lets others go on meanwhile.

    Parameters
    ----------
    timeout
        Seconds that a new server has until it answers.

    Returns
    -------
    Client
        Closing it leaves the server running.

    Raises
    ------
    ExtensionMissing
        This environment has no Jupyter server to start.
    ConnectError
        The server ended, or did not answer in time; the end of its log is told.
    LLMKitError
        ``LLMKIT_SERVER_URL`` names a server that fails: no other is started in its place. Or the new server
        answers that it cannot work, and why.

    Examples
    --------
    >>> import llmkit
    >>> client = llmkit.start()
    >>> client.health().status
    'ok'
    """
    return _OWN.client(timeout)


class StartedServer:
    """A ``jupyter llmkit`` that this process starts, and that ends with it.

    Parameters
    ----------
    options
        More of its arguments; every user of this machine can read them.
    environ
        More variables of its environment.
    cwd
        The folder that it works in and serves; by default this process's.

    Raises
    ------
    ConnectError
        If no process can be started.
    """

    def __init__(self, *options: str, environ: Mapping[str, str] | None = None, cwd: Path | None = None) -> None:
        self._token = secrets.token_urlsafe(32)
        # The token is no argument, because those are seen by everybody.
        environment = {**os.environ, **(environ or {}), "JUPYTER_TOKEN": self._token}
        named = environment.get("JUPYTER_RUNTIME_DIR")
        self._runtime_dir = Path(named) if named else runtime_dir()
        self._owner = os.getpid()
        command = [
            # What lies beside a notebook shall not stand in for modules of the server.
            *(sys.executable, "-P", "-m", "jupyter_server_ext", f"--LLMKitApp.owner_pid={self._owner}"),
            # The user's files of configuration may say otherwise, for servers that others reach.
            *("--ServerApp.ip=127.0.0.1", "--ServerApp.port=0", "--ServerApp.sock=", "--ServerApp.open_browser=False"),
            *("--ServerApp.certfile=", "--ServerApp.keyfile="),
            "--ServerApp.allow_root=True",  # who runs this as root means it
            *options,
        ]
        # Without a name, so that nobody has to remove it.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed when it answers, or at the end
        try:
            self._process = subprocess.Popen(  # noqa: S603  # our own interpreter; no shell
                command,
                env=environment,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,  # the interrupt of a cell is not for the server
            )
        except OSError as error:
            self._log.close()
            raise ConnectError(
                f"{sys.executable} cannot be started: {error.strerror}.", hint="Start `jupyter llmkit` in a terminal."
            ) from error

    def connect(self, timeout: float = START_SECONDS) -> Client:
        """Wait until it answers, for so many seconds, and give a client of it; if it fails, it is ended.

        Raises
        ------
        LLMKitError
            If it ends, says that it cannot work, or the time is over.
        """
        try:
            deadline = time.monotonic() + timeout
            while (returncode := self._process.poll()) is None:
                client = self._client()
                if client is not None:
                    self._log.close()
                    return client
                if time.monotonic() > deadline:
                    break
                time.sleep(_PAUSE_SECONDS)
            self.stop()
            how = f"did not answer within {timeout:g} s" if returncode is None else f"ended with status {returncode}"
            raise self._failed(how)
        except BaseException:
            self.stop()
            self._log.close()
            raise

    def _client(self) -> Client | None:
        for server, _ in running_servers(self._runtime_dir):
            # On Windows the Python of a virtual environment starts another, which is the server.
            if server.pid == self._process.pid or server.token == self._token:
                connection = Connection(server)
                try:
                    probe(connection)
                except (ServerNotFound, TimedOut):  # not listening yet
                    connection.close()
                except BaseException:
                    connection.close()
                    raise
                else:
                    return Client(connection)
        return None

    def _failed(self, how: str) -> ConnectError:
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - _LOG_BYTES))
        lines = self._log.read().decode("utf-8", "replace").splitlines()[-_LOG_LINES:]
        return ConnectError(
            f"The Jupyter server that was started {how}. The end of its log:\n" + "\n".join(lines or ["(nothing)"]),
            hint="`jupyter llmkit` in a terminal shows all that it says.",
            details={"log_tail": lines},
        )

    def has_ended(self, patience: float) -> bool:
        """Say whether it ends within so many seconds; only the process that started it can know."""
        if os.getpid() != self._owner:
            return False
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            return False
        return True

    def stop(self) -> None:
        """End it, and with it every engine; does nothing in a fork of the process that started it."""
        if os.getpid() != self._owner or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class _OwnServer:
    """The one server that `start` has started in this process, if any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._server: StartedServer | None = None
        self._url = ""

    def client(self, timeout: float) -> Client:
        """Give a client of the server that is found, or of one that is started."""
        with self._lock:
            self._forget_if_ended(patience=0)
            try:
                return connect()
            except LLMKitError:
                # A process that was just killed refuses connections before it is known to have ended.
                self._forget_if_ended(_END_SECONDS)
                # Named by the user or the Hub, or started here and alive: `connect` would not look for another.
                if os.environ.get("LLMKIT_SERVER_URL") or os.environ.get("LLMKIT_SHARED_URL"):
                    raise
            _check_installed()
            server = StartedServer()
            client = server.connect(timeout)
            self._server, self._url = server, client.url
            os.environ.update(LLMKIT_SERVER_URL=client.url, LLMKIT_TOKEN=client.connection.server.token or "")
            # It would notice the end of this process by itself; this is sooner, and waits for the end of its engines.
            atexit.register(server.stop)
            return client

    def _forget_if_ended(self, patience: float) -> None:
        if self._server is None or not self._server.has_ended(patience):
            return
        self._server = None
        if os.environ.get("LLMKIT_SERVER_URL") == self._url:
            del os.environ["LLMKIT_SERVER_URL"]
            os.environ.pop("LLMKIT_TOKEN", None)


_OWN = _OwnServer()


def _check_installed() -> None:
    missing = [name for name in ("jupyter_server", "jupyter_server_ext") if importlib.util.find_spec(name) is None]
    if missing:
        raise ExtensionMissing(
            f"No server can be started in the environment of this Python, {sys.prefix}: {missing[0]} is missing.",
            hint=f"`{sys.executable} -m pip install llmkit` installs it.",
        )
