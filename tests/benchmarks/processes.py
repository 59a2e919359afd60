"""The processes around what is measured: each in a group of its own, each ended in every case."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Self

import psutil
from support import REPOSITORY, own_environment

from benchmarks.loadgen import Job, Result

TESTS = REPOSITORY / "tests"
EXTENSIONS = Path(__file__).resolve().parent / "extensions"
END_SECONDS = 10.0


class BenchmarkError(Exception):
    """A benchmark whose figures would mean nothing: a request failed, or a process is gone."""


def family(pid: int) -> list[int]:
    """Give a process and everything below it."""
    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return [pid]


class Child:
    """A program; a context manager that ends its whole process group. What it says is kept for errors.

    With `talks` its standard output is for `read_line`.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path = TESTS,
        talks: bool = True,
    ) -> None:
        self.name = name
        self.talks = talks
        self.command = [str(part) for part in command]
        self.env = dict(own_environment() if env is None else env)
        self.cwd = cwd

    def __enter__(self) -> Self:
        self.said: IO[bytes] = tempfile.TemporaryFile("a+b")  # closed in __exit__
        self.process = subprocess.Popen(
            self.command,
            env=self.env,
            cwd=self.cwd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if self.talks else self.said,
            stderr=self.said,
            text=True,
            start_new_session=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(END_SECONDS)
        for stream in (self.process.stdin, self.process.stdout, self.said):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def read_line(self) -> str:
        """Give the next line it prints."""
        assert self.process.stdout
        if not (line := self.process.stdout.readline()):
            raise BenchmarkError(f"{self.name} has ended: {self.last_words()}")
        return line

    def last_words(self) -> str:
        """Give the end of what it said."""
        self.said.seek(0)
        return self.said.read().decode(errors="replace")[-2000:]

    def check(self) -> None:
        """Make sure that it still runs."""
        if self.process.poll() is not None:
            raise BenchmarkError(f"{self.name} has ended with {self.process.returncode}: {self.last_words()}")


class Upstream(Child):
    """The mock upstream."""

    def __init__(self) -> None:
        super().__init__("upstream", [sys.executable, "-m", "benchmarks.upstream"])

    def __enter__(self) -> Self:
        super().__enter__()
        self.port = int(self.read_line())
        return self

    @property
    def base_url(self) -> str:
        """Its address as a client of OpenAI's API is given it."""
        return f"http://127.0.0.1:{self.port}/v1"


class Generator(Child):
    """The load generator."""

    def __init__(self) -> None:
        super().__init__("the load generator", [sys.executable, "-m", "benchmarks.loadgen"])

    def run(self, job: Job, what: str) -> Result:
        """Do one job; a failed request is an error that names `what` was measured."""
        assert self.process.stdin
        self.check()
        self.process.stdin.write(json.dumps(asdict(job)) + "\n")
        self.process.stdin.flush()
        fields: dict[str, Any] = json.loads(self.read_line())
        result = Result(**fields)
        if result.failures:
            raise BenchmarkError(f"{what}: {result.failures} failed requests, for example: {'; '.join(result.reasons)}")
        if not result.latencies:
            raise BenchmarkError(f"{what}: not one request was answered")
        return result
