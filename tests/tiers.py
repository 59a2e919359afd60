"""Run every test in tiers, each a pytest process of its own: ``python tests/tiers.py [pytest arguments]``.

The quick tier comes first, in two processes (pytest-xdist), because most of its time is waiting. What measures the
machine itself, real engines and browsers come later and one after the other, because together they would starve
each other on a small machine. The last line counts all tiers; the exit status is 0 if all passed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree as ET

from support import PROXY_FOLDER, proxy_of_jupyterhub

REPOSITORY = Path(__file__).resolve().parent.parent
TIERS = {
    "fast": "not vllm and not browser and not alone",
    "alone": "alone and not vllm and not browser",
    "vllm": "vllm and not browser",
    "browser": "browser",
}
# The tests of a file stay in one process, so that they share its servers. The order of the files stays too: xdist would
# begin those of few tests last, which take longest, and one process would wait for the other.
OPTIONS = {"fast": ["-p", "xdist", "--numprocesses=2", "--dist=loadfile", "--no-loadscope-reorder"]}
NO_TESTS = 5  # pytest's exit status when it selected none
INTERRUPT_SECONDS = 60
"""So long pytest may take to end its servers after Ctrl+C."""

DEBIAN_PACKAGES = {"chromium": ["chromium", "fonts-liberation"], "curl": ["curl"]}
"""Programs that tests drive, and the Debian packages that have them."""
NODE_PACKAGES = {"node": ["nodejs"], "npm": ["npm"]}
"""The same for what installs and runs JupyterHub's proxy."""
PROXY = "configurable-http-proxy@4"
APT_SECONDS = 900
NPM_SECONDS = 300


def provide_programs() -> None:
    """Install the programs that are missing, where that is possible and allowed; the tests say what they lack."""
    needed = DEBIAN_PACKAGES if proxy_of_jupyterhub() else DEBIAN_PACKAGES | NODE_PACKAGES
    packages = [p for program, some in needed.items() if shutil.which(program) is None for p in some]
    if packages:
        install_packages(packages)
    if proxy_of_jupyterhub() is None:
        install_proxy()


def install_packages(packages: list[str]) -> None:
    """Install Debian packages, or say why not."""
    names = " ".join(packages)
    root = as_root()
    if shutil.which("apt-get") is None or root is None:
        print(f"Not installed, and not mine to install: {names}. Tests that need them are skipped.", flush=True)
        return
    print(f"Installing Debian packages: {names}", flush=True)
    quiet = ["-qq", "-o", "Dpkg::Use-Pty=0"]
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
        try:
            done = subprocess.run(
                [*root, "apt-get", *quiet, *command],
                env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=APT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            print(f"apt-get {command[0]} took more than {APT_SECONDS} s", flush=True)
            return
        if done.returncode != 0:
            print(f"apt-get {command[0]} failed:\n{done.stdout[-2000:]}", flush=True)
            return


def install_proxy() -> None:
    """Install JupyterHub's proxy in this virtual environment, or say why not."""
    npm = shutil.which("npm")
    if npm is None:
        print(f"Not installed, for want of npm: {PROXY}. Tests that need it are skipped.", flush=True)
        return
    print(f"Installing {PROXY}", flush=True)
    quiet = ["--no-audit", "--no-fund", "--no-update-notifier", "--loglevel=error"]
    try:
        done = subprocess.run(
            [npm, "install", *quiet, f"--prefix={Path(sys.prefix) / PROXY_FOLDER}", PROXY],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=NPM_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        print(f"npm install took more than {NPM_SECONDS} s", flush=True)
        return
    if done.returncode != 0:
        print(f"npm install failed:\n{done.stdout[-2000:]}", flush=True)


def as_root() -> list[str] | None:
    """Give what to put before a command to run it as root without a question, or None where that is impossible."""
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        return []
    sudo = ["sudo", "-n"]
    if shutil.which("sudo") and subprocess.run([*sudo, "true"], capture_output=True, check=False).returncode == 0:
        return sudo
    return None


def run(tier: str, arguments: list[str]) -> tuple[int, Counter[str]]:
    """Run one tier; give pytest's exit status and the counts of passed, failed and skipped tests."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-m", TIERS[tier], *OPTIONS.get(tier, []), f"--junit-xml={report}"]
        with subprocess.Popen([sys.executable, "-m", "pytest", *options, *arguments], cwd=REPOSITORY) as pytest:
            try:
                status = pytest.wait()
            except KeyboardInterrupt:
                # Ctrl+C has reached pytest and its processes, too; killed now, they would leave their servers.
                pytest.wait(INTERRUPT_SECONDS)
                raise
        return status, count(report)


def count(report: Path) -> Counter[str]:
    """Count passed, failed and skipped tests of a JUnit report."""
    counts: Counter[str] = Counter()
    if report.exists():
        for suite in ET.parse(report).getroot().iter("testsuite"):  # noqa: S314 - pytest has just written it
            here = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
            failed, skipped = here["failures"] + here["errors"], here["skipped"]
            counts.update(passed=max(0, here["tests"] - failed - skipped), failed=failed, skipped=skipped)
    return counts


def main(arguments: list[str]) -> int:
    """Run all tiers and print their seconds and their sum."""
    provide_programs()
    totals: Counter[str] = Counter()
    lines, good = [], True
    for tier in TIERS:
        print(f"\n== tier: {tier} ({TIERS[tier]})", flush=True)
        started = time.monotonic()
        status, counts = run(tier, arguments)
        good &= status in (0, NO_TESTS)
        totals.update(counts)
        outcome = {0: "ok", NO_TESTS: "no tests"}.get(status, f"FAILED (pytest's exit status {status})")
        lines.append(f"{tier:8} {time.monotonic() - started:7.1f} s  {outcome}")
    print("\n== seconds of each tier", *lines, sep="\n")
    if not totals["passed"]:
        good = False
    print(f"{totals['passed']} passed, {totals['failed']} failed, {totals['skipped']} skipped", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
