"""The tests' side of ``registry_program.py``."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
from fake_engine_type import PLUGIN
from support import processes_using

from llmkit.process import guardian

PROGRAM = Path(__file__).with_name("registry_program.py")
END_SECONDS = 20.0


class RegistryProgram:
    """A registry in a process of its own; a context manager that ends it."""

    def __init__(self, state_dir: Path, run_base: Path) -> None:
        self.run_base = run_base
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAM), str(state_dir), str(run_base)],
            env={**os.environ, **PLUGIN},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        first = self._read()
        self.folder = Path(first["folder"])
        self.reaped: int = first["reaped"]

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, "the program ended"
        told: dict[str, Any] = json.loads(line)
        return told

    def send(self, do: str, **fields: Any) -> None:
        """Give a command, without waiting for its answer."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"do": do, **fields}) + "\n")
        self.process.stdin.flush()

    def call(self, do: str, **fields: Any) -> dict[str, Any]:
        """Give a command and its answer."""
        self.send(do, **fields)
        return self._read()

    def ok(self, do: str, **fields: Any) -> Any:
        """Give a command that must succeed, and what it gives."""
        told = self.call(do, **fields)
        assert "ok" in told, told
        return told["ok"]

    def kill(self) -> None:
        """End it with SIGKILL."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(END_SECONDS)

    def guardians(self) -> list[guardian.Process]:
        """Give the guardians of its engines."""
        return [found.process for found in guardian.all_stats() if found.parent == self.process.pid]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process.stdin
        assert self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(END_SECONDS)
        finally:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()


def left(run_base: Path) -> list[str]:
    """Give what runs out of a folder."""
    found = []
    for process in processes_using(run_base):
        with contextlib.suppress(psutil.NoSuchProcess):  # ended since the look, or reaped in the next moment
            found.append(" ".join(process.cmdline()[:3]))
    return found
