"""Why a Jupyter server answers, but without llmkit: what its process and its environment tell."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from llmkit.client.connection import Server
from llmkit.errors import ConnectError, ExtensionMissing, RestartNeeded

EXTENSION = "jupyter_server_ext"


def explain_missing(server: Server) -> ConnectError:
    """Say why a Jupyter server has no ``/llm``, and what cures it.

    The environment of the server's process is searched for llmkit. If it is there, and younger than the process,
    the server only has to be started again.
    """
    process = _process(server)
    prefix = _prefix(process) if process else None
    if process is None or prefix is None:
        return ExtensionMissing(
            f"{server.url} is a Jupyter server without llmkit.",
            hint="Install llmkit in the environment of that server (`pip install llmkit`), then restart the server.",
        )
    installed_at = _installed_at(prefix)
    if installed_at is None:
        python = prefix / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        return ExtensionMissing(
            f"{server.url} runs in an environment without llmkit: {prefix}.",
            hint=f"Install it there (`{python} -m pip install llmkit`), then restart the server.",
        )
    if process.create_time() < installed_at:
        return RestartNeeded(
            f"{server.url} was started before llmkit was installed.", hint="Restart the Jupyter server."
        )
    return ExtensionMissing(
        f"llmkit is installed in the environment of {server.url} ({prefix}), but not enabled there.",
        hint=f"`jupyter server extension enable {EXTENSION}`, then restart the server; "
        "`jupyter server extension list` and the server's log say more.",
    )


def _process(server: Server) -> psutil.Process | None:
    if server.pid is None:
        return None
    try:
        return psutil.Process(server.pid)
    except psutil.Error:
        return None


def _prefix(process: psutil.Process) -> Path | None:
    """Give the environment that a Python process runs in, or None where that cannot be seen."""
    try:
        program = process.cmdline()[0]
        if not Path(program).is_absolute():
            program = shutil.which(program, path=process.environ().get("PATH")) or ""
    except (psutil.Error, IndexError, OSError):
        return None
    if not program or not Path(program).name.startswith("python"):
        return None
    # The link in a virtual environment's bin, not what it points to, is what Python goes by.
    return Path(program).parent.parent if os.name != "nt" else _windows_prefix(Path(program))


def _windows_prefix(program: Path) -> Path:
    return program.parent.parent if program.parent.name.lower() == "scripts" else program.parent


def _installed_at(prefix: Path) -> float | None:
    """Give when llmkit was installed in an environment, in seconds since the epoch; None if it is not there."""
    times = []
    for folder in _records(prefix):
        try:
            times.append(folder.stat().st_mtime)
        except OSError:
            continue
    return max(times, default=None)


def _records(prefix: Path) -> Iterator[Path]:
    """Give the folders in which pip noted llmkit."""
    for pattern in ("lib*/python*/*-packages", "local/lib/python*/*-packages", "Lib/site-packages"):
        for packages in prefix.glob(pattern):
            yield from packages.glob("llmkit-*.dist-info")
    if _is_same(prefix, Path(sys.prefix)):
        # Also what this user alone has installed.
        for distribution in importlib.metadata.distributions(name="llmkit"):
            located = getattr(distribution, "_path", None)
            if isinstance(located, Path):
                yield located


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False
