"""A virtual environment in which llmkit can be installed as the pages say, without a download.

It finds the packages of the tests' own environment, all but llmkit: that is installed from a copy of the repository.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path

from support import REPOSITORY, own_environment

PROGRAMS = ("pip", "jupyter", "jupyter-lab")
IGNORED = shutil.ignore_patterns(
    ".git", ".venv*", "__pycache__", ".*_cache", "dist", "build", ".hypothesis", "screenshots"
)


def published(folder: Path) -> Path:
    """Make a repository, `llmkit`, of what lies here, whether this is a clone or was unpacked."""
    place = folder / "published" / "llmkit"
    shutil.copytree(REPOSITORY, place, ignore=IGNORED)
    git = ["git", "-C", str(place), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for words in (["init", "-q"], ["add", "--all"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    return place


class BareEnvironment:
    """A virtual environment in a folder.

    Parameters
    ----------
    folder
        Where it is made.
    python
        What it is made of; of the same version as the tests' own, because compiled packages are used with it.
    user
        Whose it is; by default ours.
    """

    def __init__(self, folder: Path, python: str = sys.executable, user: pwd.struct_passwd | None = None) -> None:
        self.folder = folder
        self._user = user
        self.packages = next((Path(sys.prefix) / "lib").glob("python*/site-packages"))
        self.run([python, "-m", "venv", "--without-pip", str(folder)], folder.parent)
        for program in PROGRAMS:
            script = (Path(sys.prefix) / "bin" / program).read_text().split("\n", 1)[1]
            (folder / "bin" / program).write_text(f"#!{folder}/bin/python\n{script}")
            (folder / "bin" / program).chmod(0o755)

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    def environ(self) -> dict[str, str]:
        """Give the variables of a shell in which it is active."""
        return {
            **own_environment(),
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
            "PYTHONPATH": str(self.packages),
            "PIP_NO_INDEX": "1",
            "PIP_NO_DEPS": "1",
            "PIP_NO_BUILD_ISOLATION": "0",  # pip's way to say that there is to be none
            "PIP_IGNORE_INSTALLED": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }

    def run(self, command: list[str], cwd: Path, **environ: str) -> str:
        """Run a program in it, as its user; give what it printed."""
        done = subprocess.run(
            command,
            cwd=cwd,
            env={**self.environ(), **environ},
            user=self._user.pw_uid if self._user else None,
            group=self._user.pw_gid if self._user else None,
            extra_groups=[] if self._user else None,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=180,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}"
        return done.stdout

    def where(self, module: str) -> Path:
        """Give where a module comes from, away from any repository and from the tests' own packages."""
        command = [str(self.python), "-c", f"import {module}; print({module}.__file__)"]
        environ = {name: value for name, value in self.environ().items() if name != "PYTHONPATH"}
        done = subprocess.run(command, cwd="/", env=environ, check=True, capture_output=True, text=True)
        return Path(done.stdout.strip())
