"""A newcomer's first minutes, by the README's two commands: ``make newcomer``.

Clones the repository into an empty folder, sets everything up, waits for JupyterLab, and runs the quickstart up to its
first answer. Home and environment are new ones, of another user where that is possible; of ours stays only what tells
pip where packages are. Prints the seconds of each step; the exit status is 0 if the answer was right, and in time.

Only what is committed is cloned.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import nbformat
from kernels import ServerKernel
from support import ANSWER, REPOSITORY, wait_until

MOST_SECONDS = 300
STEP_SECONDS = 900
"""After that it is given up; what is late is told with its figure all the same."""
SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin"
KEPT = re.compile(r"PIP_\w+|SSL_CERT_\w+|REQUESTS_CA_BUNDLE|(?:https?|no|all)_proxy|LANG|LC_\w+|TERM|TZ", re.IGNORECASE)
NOTEBOOK = "notebooks/quickstart.ipynb"


def two_commands(address: str) -> str:
    """Give the README's first block of commands, with the address of a repository put in."""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    block = re.findall(r"^```bash\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)[0]
    assert block.count("<this repository>") == 1
    return str(block).replace("<this repository>", address)


def newcomer() -> tuple[pwd.struct_passwd, str]:
    """Give who does it, and their PATH: somebody else, if we are root and they can run a Python that will do."""
    us = pwd.getpwuid(os.getuid())
    ours = f"{Path(sys._base_executable).parent}:{SYSTEM_PATH}"  # type: ignore[attr-defined]
    if os.getuid() != 0:
        return us, ours
    check = "import sys; sys.exit(sys.version_info < (3, 11))"
    with contextlib.suppress(KeyError, OSError):
        other = pwd.getpwnam("nobody")
        for path in (ours, SYSTEM_PATH):
            python = shutil.which("python3", path=path)
            with contextlib.suppress(OSError):
                done = subprocess.run(
                    [str(python), "-c", check], user=other.pw_uid, group=other.pw_gid, cwd="/", check=False
                )
                if done.returncode == 0:
                    return other, path
    print("No other user can run a Python here that is new enough: it is done as root, with a home of its own.")
    return us, ours


class Newcomer:
    """Somebody with an empty home and folder, who follows the README."""

    def __init__(self, folder: Path) -> None:
        self.user, path = newcomer()
        self.home = folder / "home"
        self.work = folder / "work"
        self.log = folder / "log"
        self._repository = folder / "llmkit.git"
        self._env = {name: value for name, value in os.environ.items() if KEPT.fullmatch(name)}
        self._env |= {"HOME": str(self.home), "USER": self.user.pw_name, "PATH": path, "ARGS": "--no-browser"}
        for made in (self.home, self.work):
            made.mkdir()
        subprocess.run(["git", "clone", "--quiet", "--bare", str(REPOSITORY), str(self._repository)], check=True)
        for place in (folder, *folder.rglob("*")):
            os.chown(place, self.user.pw_uid, self.user.pw_gid)

    @contextlib.contextmanager
    def follow(self) -> Iterator[subprocess.Popen[bytes]]:
        """Type the two commands; at the end what they started ends."""
        with self.log.open("wb") as output:
            shell = subprocess.Popen(
                ["bash", "-ec", two_commands(str(self._repository))],
                cwd=self.work,
                env=self._env,
                user=self.user.pw_uid,
                group=self.user.pw_gid,
                extra_groups=[],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            yield shell
        except BaseException as error:
            error.add_note(self.log.read_text(errors="replace")[-4000:])
            raise
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                shell.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)

    def server(self) -> dict[str, Any] | None:
        """Give what the Jupyter server says of itself, once it answers."""
        for file in self.home.glob(".local/share/jupyter/runtime/jpserver-*.json"):
            with contextlib.suppress(OSError, ValueError, httpx.TransportError):
                told: dict[str, Any] = json.loads(file.read_text())
                if httpx.get(f"{told['url']}api", trust_env=False).is_success:
                    return told
        return None


def first_answer(url: str, token: str) -> str:
    """Open the quickstart and run its cells up to the first prompt; give the answer."""
    page = httpx.get(f"{url}lab/tree/{NOTEBOOK}", params={"token": token}, trust_env=False, follow_redirects=True)
    assert page.is_success, page.status_code
    with ServerKernel(url, token) as kernel:
        for cell in nbformat.read(REPOSITORY / NOTEBOOK, as_version=4).cells:
            if cell.cell_type == "code":
                told = list(kernel.messages(cell.source))
                assert not [content for kind, content in told if kind == "error"], told
                if cell.source.startswith("client.prompt("):
                    [answer] = [c["data"]["text/plain"] for kind, c in told if kind == "execute_result"]
                    return str(answer)
    raise AssertionError(f"{NOTEBOOK} asks nothing")


def main() -> int:
    """Run the program."""
    with tempfile.TemporaryDirectory(prefix="newcomer-", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)
        person = Newcomer(folder)
        print(f"As {person.user.pw_name}, in {folder}:\n\n{two_commands('REPOSITORY')}", flush=True)
        clone = person.work / "llmkit"
        started = before = time.monotonic()

        def step(name: str) -> float:
            nonlocal before
            now = time.monotonic()
            print(f"  {name:<34}{now - before:6.1f} s", flush=True)
            before = now
            return now - started

        with person.follow() as shell:

            def until(done: Any, what: str) -> Any:
                def look() -> Any:
                    assert shell.poll() is None, f"ended before {what}"
                    return done()

                return wait_until(look, what, STEP_SECONDS, interval=0.1)

            until((clone / "Makefile").exists, "a clone")
            step("clone")
            until((clone / ".venv" / ".llmkit-ready").exists, "the set-up")
            step("set up, vLLM included")
            server = until(person.server, "JupyterLab")
            step("start of JupyterLab")
            answer = first_answer(server["url"], server["token"])
            seconds = step("quickstart up to its first answer")
        print(f"\n  From clone to first answer: {seconds:.0f} s (bar: {MOST_SECONDS})\n  Answer: {answer}")
    return 0 if ANSWER in answer and seconds <= MOST_SECONDS else 1


if __name__ == "__main__":
    sys.exit(main())
