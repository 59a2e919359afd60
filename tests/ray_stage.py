"""A real Ray cluster for tests, kept by a guardian: at the end nothing of it is left."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final, Self

import httpx
from support import own_environment, wait_until

from llmkit.process import guardian
from llmkit.process.guardian import ENGINE_ID, end_all, marked

PROGRAM: Final = Path(__file__).with_name("ray_cluster.py")
STRANGER: Final = "somebody-elses"
START_SECONDS: Final = 240.0
GRACE_SECONDS: Final = 3.0


class RayCluster:
    """Two nodes on this machine; use it as a context manager.

    Attributes
    ----------
    address
        What the operator would set as ``LLMKitApp.ray_address``.
    environ
        What a server needs in its environment to use the cluster.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="lkr-", dir="/tmp"))
        self.environ = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self._id = secrets.token_hex(16)
        self._log = self.folder / "cluster.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._told: dict[str, Any] = {}

    @property
    def address(self) -> str:
        return str(self._told["address"])

    def __enter__(self) -> Self:
        program = [sys.executable, "-I", "-S", guardian.__file__, str(self.folder / "run"), str(GRACE_SECONDS)]
        environ = {
            ENGINE_ID: self._id,
            **own_environment(),
            **self.environ,
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            "RAY_TMPDIR": str(self.folder),
            "RAY_raylet_start_wait_time_s": "120",  # a node that starts beside busy replicas takes its time
            "HOME": str(self.folder),
        }
        (self.folder / "run").mkdir()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*program, str(os.getpid()), sys.executable, str(PROGRAM), str(self.folder)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environ,
                start_new_session=True,
            )
        try:
            wait_until(self._is_ready, "a Ray cluster", START_SECONDS)
        except BaseException as error:
            error.add_note(self._log.read_text(errors="replace")[-4000:])
            self.__exit__()
            raise
        return self

    def _is_ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, "the cluster ended at once"
        with contextlib.suppress(FileNotFoundError):
            self._told = json.loads((self.folder / "cluster.json").read_text())
        return bool(self._told)

    def __exit__(self, *_: object) -> None:
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(30)
        end_all(lambda: marked(self._id), grace=0, bound=10)
        shutil.rmtree(self.folder, ignore_errors=True)

    def kill_node(self) -> None:
        """Kill the node that is not the head's, with all that runs there."""
        os.kill(self._told["pid"], signal.SIGUSR1)

    def add_node(self) -> None:
        """Start another node."""
        os.kill(self._told["pid"], signal.SIGUSR2)

    def names(self) -> set[str]:
        """Give the names of the applications."""
        return set(self._get("-/routes").json().values())

    def stranger_answers(self) -> bool:
        """Say whether somebody else's application is as it was."""
        return self._get(STRANGER).text == "still here"

    def _get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self._told['http']}/{path}", timeout=30, trust_env=False).raise_for_status()

    def processes(self) -> int:
        """Say how many processes the cluster has, but for those that wait to be used again.

        Ray keeps some idle workers, and ends those that are too many in its own time.
        """
        return sum(not _title(process.pid).startswith(b"ray::IDLE") for process in marked(self._id))

    def engines(self) -> list[int]:
        """Give the processes of models: replicas of Ray Serve LLM, and what vLLM has started below them."""
        titles = {process.pid: _title(process.pid) for process in marked(self._id)}
        return [pid for pid, title in titles.items() if title.startswith(b"VLLM::") or b"ServeReplica:llmkit" in title]

    def replicas(self) -> list[int]:
        """Give the processes of replicas that have a model."""
        titles = {process.pid: _title(process.pid) for process in marked(self._id)}
        return [pid for pid, title in titles.items() if b"ServeReplica:llmkit" in title and b"LLMServer" in title]


def _title(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""
