"""Virtual environments of the other contenders: made on the first run, kept for the next."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from support import REPOSITORY

from benchmarks.processes import BenchmarkError

FOLDER = REPOSITORY / ".venv-bench"
PINS = Path(__file__).with_name("contenders.toml")


def python_of(name: str) -> Path:
    """Give the interpreter of an environment; make the environment if it is not there, or was for other packages."""
    packages: list[str] = tomllib.loads(PINS.read_text())[name]["packages"]
    place = FOLDER / name
    python = place / "bin" / "python"
    # A file in the environment says that it is complete, and with what.
    ready = place / ".ready"
    if not ready.exists() or json.loads(ready.read_text()) != packages:
        print(f"Making {place.relative_to(REPOSITORY)}: {' '.join(packages)}", flush=True)
        shutil.rmtree(place, ignore_errors=True)
        try:
            _call("venv", "--without-pip", str(place))
            # pip of this environment works on the other: a system's Python may come without what venv needs for it.
            _call("pip", "--python", str(python), "install", "--quiet", *packages)
        except subprocess.CalledProcessError as error:
            raise BenchmarkError(f"{place} could not be made: {error.stderr[-2000:]}") from None
        ready.write_text(json.dumps(packages))
    return python


def _call(module: str, *arguments: str) -> None:
    command = [sys.executable, "-m", module, *arguments]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True)


def version_in(python: Path, package: str) -> str:
    """Give the version of a package in an environment."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
