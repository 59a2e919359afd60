"""A real JupyterHub on this machine: real proxy, real single-user servers with llmkit, users by name alone."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import psutil
from support import free_port, own_environment, processes_using, proxy_of_jupyterhub, wait_until

START_SECONDS = 60.0
STOP_SECONDS = 30.0
REQUEST_SECONDS = 30.0

CONFIG = """
import os
c = get_config()
c.JupyterHub.bind_url = {url!r}
c.JupyterHub.hub_ip = "127.0.0.1"
c.JupyterHub.hub_port = {hub_port}
c.ConfigurableHTTPProxy.api_url = "http://127.0.0.1:{proxy_port}"
c.ConfigurableHTTPProxy.command = [{proxy!r}]
c.JupyterHub.db_url = "sqlite:///{folder}/hub.sqlite"
c.JupyterHub.cookie_secret_file = "{folder}/cookie_secret"
c.ConfigurableHTTPProxy.pid_file = "{folder}/proxy.pid"
c.JupyterHub.authenticator_class = "dummy"
c.Authenticator.allow_all = True
c.JupyterHub.spawner_class = "simple"
c.SimpleLocalProcessSpawner.home_dir_template = "{folder}/home/{{username}}"
c.Spawner.cmd = [{python!r}, "-m", "jupyterhub.singleuser"]
c.Spawner.args = ["--allow-root", "--LLMKitApp.standby=off"]
c.Spawner.http_timeout = c.Spawner.start_timeout = {seconds}
c.Spawner.env_keep = list(os.environ)
c.JupyterHub.services = [dict(name="tests", api_token={token!r})]
c.JupyterHub.load_roles = [dict(
    name="tests", services=["tests"], scopes=["admin:users", "admin:servers", "access:servers", "tokens"],
)]
"""


class Hub:
    """Runs JupyterHub until the block ends; then nothing of it is left, no process and no folder.

    Parameters
    ----------
    config
        More text for ``jupyterhub_config.py``; it comes last, so that it wins.

    Attributes
    ----------
    url
        Public address, with a slash at its end.
    token
        Opens the Hub's API and every user's server.
    hub_port
        Of the Hub's API, without the proxy.
    killed
        Processes that did not end with it, and were killed.
    """

    def __init__(self, config: str = "") -> None:
        proxy = proxy_of_jupyterhub()
        assert proxy, "configurable-http-proxy is not installed"
        self.folder = Path(tempfile.mkdtemp(prefix="llmkit-hub-"))
        # The path of a unix socket has at most 107 bytes: not below a long temporary folder.
        self.run_dir = Path(tempfile.mkdtemp(prefix="lk-", dir="/tmp"))
        self.log_file = self.folder / "hub.log"
        self.token = secrets.token_hex(16)
        port, self.hub_port, proxy_port = free_port(), free_port(), free_port()
        self.url = f"http://127.0.0.1:{port}/"
        (self.folder / "home").mkdir()
        (self.folder / "jupyterhub_config.py").write_text(
            CONFIG.format(
                url=self.url,
                hub_port=self.hub_port,
                proxy_port=proxy_port,
                proxy=str(proxy),
                folder=self.folder,
                python=sys.executable,
                seconds=int(START_SECONDS),
                token=self.token,
            )
            + config
        )
        self._http = httpx.Client(
            headers={"Authorization": f"token {self.token}"}, timeout=REQUEST_SECONDS, trust_env=False
        )
        self._process: subprocess.Popen[bytes] | None = None
        self.killed: list[psutil.Process] = []

    def __enter__(self) -> Self:
        environment = {
            **own_environment(),
            "JUPYTER_CONFIG_DIR": str(self.folder / "config"),
            "LLMKIT_RUN_DIR": str(self.run_dir),
        }
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "jupyterhub", "-f", "jupyterhub_config.py"],
                env=environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            wait_until(self._answers, "an answer of JupyterHub", START_SECONDS)
        except BaseException as error:
            error.add_note(self.log)
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            # Without what the proxy says to whoever asks again and again whether something has started.
            lines = [line for line in self.log.splitlines() if "[ConfigProxy]" not in line or " 404 GET " not in line]
            error.add_note("\n".join(("log of JupyterHub:", *lines))[-6000:])
        self.close()

    def _answers(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            raise AssertionError("JupyterHub ended at once")
        try:
            return self.request("GET", "hub/api/").is_success
        except httpx.TransportError:
            return False

    def close(self) -> None:
        """End the Hub, its proxy and all servers, and remove the folders."""
        try:
            self.stop()
        finally:
            self._http.close()
            shutil.rmtree(self.run_dir, ignore_errors=True)
            shutil.rmtree(self.folder, ignore_errors=True)

    def stop(self) -> None:
        """End the Hub, its proxy and all servers; the folders stay."""
        process, self._process = self._process, None
        if process is None:
            return
        tree: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):
            tree = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)  # it ends proxy and servers itself
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        _, alive = psutil.wait_procs(tree, timeout=5)
        for one in {*alive, *processes_using(self.folder), *processes_using(self.run_dir)}:
            self.killed.append(one)
            with contextlib.suppress(psutil.Error):
                one.kill()

    # -- use -----------------------------------------------------------------------------------------------

    @property
    def log(self) -> str:
        """What Hub, proxy and servers printed."""
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def request(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        """Send a request with the token; `path` starts below the public address, for example ``hub/api/users``."""
        return self._http.request(method, self.url + path, **kwargs)

    def token_of(self, user: str) -> str:
        """Make a user, if need be, and give a token with which they may what they may."""
        answer = self.request("POST", f"hub/api/users/{user}")
        assert answer.status_code in (201, 409), answer.text
        answer = self.request("POST", f"hub/api/users/{user}/tokens", json={"note": "tests"})
        assert answer.status_code == 201, answer.text
        return str(answer.json()["token"])

    def start_server(self, user: str) -> str:
        """Make a user and start their server; give its public base URL, with a slash at its end."""
        answer = self.request("POST", f"hub/api/users/{user}")
        assert answer.status_code in (201, 409), answer.text
        answer = self.request("POST", f"hub/api/users/{user}/server")
        assert answer.status_code in (201, 202), answer.text

        def is_ready() -> bool:
            told = self.request("GET", f"hub/api/users/{user}").json()
            assert told["servers"], "the user's server did not start"
            return bool(told["servers"][""]["ready"])

        wait_until(is_ready, f"the server of {user}", START_SECONDS)
        return f"{self.url}user/{user}/"
