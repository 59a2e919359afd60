"""What tests of whole programs share: a real Jupyter server, and a look at what it leaves behind."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import httpx
import psutil

from llmkit.engines.vllm.install import has_nvidia_gpu, installed

REPOSITORY = Path(__file__).resolve().parent.parent
PROXY_FOLDER = "npm"
"""Where in the virtual environment JupyterHub's proxy is installed."""
MARKERS = ("gpu", "vllm", "ray", "browser", "hub")
"""What a test is marked with that needs more of a machine than Python."""
FREE_PORTS = range(20_000, 32_000)
"""Below those of clients on Linux: else one of them could take a port before the server that it is meant for."""
IN_CI = os.environ.get("CI", "").lower() not in ("", "0", "false")

START_SECONDS = 60.0
STOP_SECONDS = 30.0
REQUEST_SECONDS = 30.0
LOAD_SECONDS = 240.0

DEMO = {"model_name": "llmkit/demo", "model_type": "vllm"}
QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."

T = TypeVar("T")

# What a developer's own shell may have set, and a test must not see.
FOREIGN_VARIABLES = ("JUPYTER", "JPY_", "LLMKIT_", "OPENAI_", "IPYTHON", "XDG_", "VLLM_")


def chromium() -> str | None:
    """Give the path of Chromium, or None."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next(filter(None, map(shutil.which, names)), None)


def proxy_of_jupyterhub() -> str | None:
    """Give the path of ``configurable-http-proxy``, or None; ``tests/tiers.py`` installs it."""
    if shutil.which("node") is None:
        return None
    own = Path(sys.prefix) / PROXY_FOLDER / "node_modules" / ".bin"
    return shutil.which("configurable-http-proxy", path=f"{own}{os.pathsep}{os.environ.get('PATH', '')}")


def missing(marker: str) -> str | None:
    """Say what a test with this marker lacks on this machine, or None."""
    if marker == "vllm":
        if sys.platform != "linux":
            return "vLLM runs on Linux only"
        if importlib.util.find_spec("vllm") is None:
            return "vLLM is not installed: python -m llmkit.engines.vllm.install"
    if marker == "ray" and (reason := missing("vllm")):
        return reason
    if marker == "ray" and importlib.util.find_spec("ray") is None:
        return "Ray is not installed: make test-ray"
    if marker == "gpu":
        if not has_nvidia_gpu():
            return "there is no NVIDIA GPU"
        if not installed("vllm"):
            return "the vLLM of GPUs is not installed: python -m llmkit.engines.vllm.install"
    if marker == "browser" and chromium() is None:
        return "Chromium is not installed: apt-get install chromium"
    if marker == "hub":
        if importlib.util.find_spec("jupyterhub") is None:
            return "JupyterHub is not installed: make setup"
        if proxy_of_jupyterhub() is None:
            return "JupyterHub's proxy is not installed: npm install --global configurable-http-proxy@4"
    return None


def wait_until(condition: Callable[[], T], what: str, seconds: float = 10.0, interval: float = 0.05) -> T:
    """Give the first true value of `condition`; fail with `what` if there is none in time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        time.sleep(interval)
    return value


_begin = secrets.randbelow(len(FREE_PORTS))  # not where another test process begins
_ports = itertools.cycle((*FREE_PORTS[_begin:], *FREE_PORTS[:_begin]))


def free_port() -> int:
    """Give a port of 127.0.0.1 on which nobody listens; the same one never soon again."""
    for port in itertools.islice(_ports, len(FREE_PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("every port is taken")


def scaled(count: int) -> int:
    """Give how often a bar is tried: so often in the test suite, times ``LLMKIT_SOAK`` in ``make soak N=...``."""
    return count * max(1, int(os.environ.get("LLMKIT_SOAK") or 1))


def own_environment() -> dict[str, str]:
    """Give this process's environment without what could lead a program to a developer's own Jupyter."""
    return {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN_VARIABLES)}


def processes_using(folder: Path) -> list[psutil.Process]:
    """Give every process that works in a folder: by arguments, working directory, TMPDIR or an open file.

    A process can change its title, as vLLM's do, and with it lose arguments and environment; its open log file
    still gives it away.
    """
    place = str(folder)

    def uses(process: Path) -> bool:
        with contextlib.suppress(OSError):
            if os.fsencode(place) in (process / "cmdline").read_bytes():
                return True
        with contextlib.suppress(OSError):
            if b"TMPDIR=" + os.fsencode(place) in (process / "environ").read_bytes():
                return True
        for link in (process / "cwd", *_entries(process / "fd")):
            with contextlib.suppress(OSError):
                if str(link.readlink()).startswith(place):
                    return True
        return False

    found = []
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) != os.getpid() and uses(process):
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(process.name)))
    return found


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


class JupyterServer:
    """A real Jupyter server with the extension, in a process and in folders of its own.

    Use it as a context manager: at the end nothing is left, no process and no folder. `stop` and `start` may be
    called in between; configurations and token stay.

    Parameters
    ----------
    app
        Which program: ``jupyter server``, ``jupyter lab`` or ``jupyter llmkit``.
    base_url
        Where the server lies; the default catches mistakes of encoding.
    args
        More command-line arguments.
    env
        More environment variables of the server.
    root_dir
        The folder it serves; by default an empty one.
    state_dir
        Where configurations lie; by default an empty folder of its own.
    port
        Where it listens, also after a restart; by default on any free port, each time another.
    certificate
        File of a certificate and its key: the server then speaks ``https``.
    standby
        As the trait of `LLMKitApp`; off, so that tests do not import vLLM beside each other.
    python
        Of the environment that it runs in; by default that of the tests.
    prefix
        What is put before its command, and becomes the command.

    Attributes
    ----------
    url
        Base URL with a slash at its end.
    token
        Opens it.
    run_dir
        ``LLMKIT_RUN_DIR`` of the server.
    """

    def __init__(
        self,
        app: Literal["server", "lab", "llmkit"] = "server",
        *,
        base_url: str = "/a%40b/",
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        root_dir: Path | None = None,
        state_dir: Path | None = None,
        port: int = 0,
        certificate: Path | None = None,
        standby: Literal["auto", "on", "off"] = "off",
        python: Path = Path(sys.executable),
        prefix: Sequence[str] = (),
    ) -> None:
        self.app = app
        self.prefix = prefix
        self.python = python
        self.standby = standby
        self.port = port
        self.base_url = base_url
        self.args = [*args, *([f"--certfile={certificate}", f"--keyfile={certificate}"] if certificate else [])]
        self._scheme = "https" if certificate else "http"
        self.folder = Path(tempfile.mkdtemp(prefix="llmkit-server-"))
        # The path of a unix socket has at most 107 bytes: not below a long temporary folder.
        self.run_dir = Path(tempfile.mkdtemp(prefix="lk-", dir="/tmp"))
        self.state_dir = state_dir or self.folder / "state"
        self.root_dir = root_dir or self.folder / "root"
        self.log_file = self.folder / "server.log"
        self.token = secrets.token_hex(16)
        self.url = ""
        self.process: subprocess.Popen[bytes] | None = None
        self._http = httpx.Client(
            headers={"Authorization": f"token {self.token}"},
            timeout=REQUEST_SECONDS,
            trust_env=False,
            verify=ssl.create_default_context(cafile=certificate) if certificate else True,
        )
        self._env = {**self._environment(), **(env or {})}

    def _environment(self) -> dict[str, str]:
        folders = {
            "HOME": "home",
            "JUPYTER_CONFIG_DIR": "config",
            "JUPYTER_DATA_DIR": "data",
            "JUPYTER_RUNTIME_DIR": "runtime",
            "IPYTHONDIR": "ipython",
        }
        for name in folders.values():
            (self.folder / name).mkdir()
        self.root_dir.mkdir(exist_ok=True)
        # JupyterLab would ask whether to fetch news, and fetch them.
        page = self.folder / "config" / "labconfig" / "page_config.json"
        page.parent.mkdir()
        page.write_text(json.dumps({"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}))
        return {
            **own_environment(),
            **{variable: str(self.folder / name) for variable, name in folders.items()},
            # Compiled code of engines is worth keeping from one run to the next.
            "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache"),
            "JUPYTER_TOKEN": self.token,
            "LLMKIT_STATE_DIR": str(self.state_dir),
            "LLMKIT_RUN_DIR": str(self.run_dir),
        }

    # -- life ----------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Start it, and return when it answers."""
        command = [
            *self.prefix,
            str(self.python.parent / f"jupyter-{self.app}"),
            "--ip=127.0.0.1",
            f"--port={self.port}",
            "--no-browser",
            f"--ServerApp.base_url={self.base_url}",
            f"--ServerApp.root_dir={self.root_dir}",
            f"--LLMKitApp.standby={self.standby}",
            *(["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []),
            *self.args,
        ]
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                env=self._env,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            wait_until(self._answers, f"an answer of jupyter {self.app}", START_SECONDS)
        except BaseException as error:
            self.stop(signal.SIGKILL)
            error.add_note(self.log)
            raise
        return self

    def _answers(self) -> bool:
        if self.process is None or self.process.poll() is not None:
            raise AssertionError(f"jupyter {self.app} ended at once")
        information = Path(self._env["JUPYTER_RUNTIME_DIR"]) / f"jpserver-{self.process.pid}.json"
        try:
            self.url = f"{self._scheme}://127.0.0.1:{json.loads(information.read_text())['port']}{self.base_url}"
            return self._http.get(self.url + "api").is_success
        except (OSError, ValueError, httpx.TransportError):
            return False

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int | None:
        """Send a signal and wait for the end; give the exit status, None if it was not running.

        A server that does not end in time is killed, and that is an error.
        """
        process, self.process = self.process, None
        if process is None:
            return None
        process.send_signal(number)
        try:
            return process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(f"did not end within {STOP_SECONDS:g} s of {number.name}:\n{self.log}") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Stop it and remove its folders.

        Raises
        ------
        AssertionError
            If a process of it was left; it is killed, too.
        """
        try:
            self.stop()
            left = self.left_behind()
        finally:
            self._http.close()
            for process in processes_using(self.run_dir):
                with contextlib.suppress(psutil.Error):
                    process.kill()
            shutil.rmtree(self.run_dir, ignore_errors=True)
            shutil.rmtree(self.folder, ignore_errors=True)
        assert not left, f"left behind: {left}"

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            error.add_note(f"log of jupyter {self.app}:\n{self.log[-4000:]}")
        self.close()

    # -- use -----------------------------------------------------------------------------------------------

    @property
    def log(self) -> str:
        """What it printed."""
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def request(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        """Send a request with the token; `path` starts below the base URL, for example ``llm/health``."""
        return self._http.request(method, self.url + path.removeprefix("/"), **kwargs)

    def configure(self, model_id: str, **fields: Any) -> str:
        """Configure a model, the embedded demo model unless `fields` say otherwise; give its ``config_id``."""
        answer = self.request("POST", "llm/configure_model/", json={"model_id": model_id, **DEMO, **fields})
        assert answer.status_code == 200, answer.text
        config_id: str = answer.json()["config_id"]
        return config_id

    def load(self, config_id: str) -> dict[str, Any]:
        """Load a model and wait for it; give the answer."""
        answer = self.request("POST", f"llm/load_model/{config_id}", timeout=LOAD_SECONDS)
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    def client_environment(self) -> dict[str, str]:
        """Give an environment in which ``llmkit.connect()`` finds this server."""
        environment = {k: v for k, v in self._env.items() if k != "JUPYTER_TOKEN"}
        return {**environment, "LLMKIT_SERVER_URL": self.url, "LLMKIT_TOKEN": self.token}

    def engine_processes(self) -> list[psutil.Process]:
        """Give the processes of its engines: guardians and everything below them."""
        server = self.process.pid if self.process else None
        return [process for process in processes_using(self.run_dir) if process.pid != server]

    def left_behind(self, seconds: float = 5.0) -> list[psutil.Process]:
        """Give the engine processes that are still there after a moment; call it after `stop`."""
        with contextlib.suppress(AssertionError):
            wait_until(lambda: not self.engine_processes(), "the end of the engines", seconds)
        return self.engine_processes()
