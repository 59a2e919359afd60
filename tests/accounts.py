"""Unix accounts of their own for the service and the users of a real Hub, without adding any to this machine.

The Hub, which runs as root, is told of them where it looks accounts up; all else that it does with them, as the
kernel does, is real. They are numbers that nobody has here.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import psutil
from fake_engine_type import PLUGIN

FIRST, LAST = 40_000, 59_000
SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin"
PROGRAMS = {
    "jupyter": "jupyter_core.command",
    "jupyter-llmkit": "jupyter_server_ext.app",
    "llmkit": "llmkit.cli",
}
TABLE = """
import pwd
_accounts = {{
    name: pwd.struct_passwd((name, "x", uid, uid, "", f"{homes}/{{name}}", "/bin/bash"))
    for name, uid in {uids!r}.items()
}}
_known = pwd.getpwnam
pwd.getpwnam = lambda name: _accounts.get(name) or _known(name)
"""


def why_not() -> str | None:
    """Say why no other account can be played here, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "other accounts are played by root alone"
    return None


class Accounts:
    """A Python that every account can run, and a home for each name.

    Parameters
    ----------
    folder
        Where they lie; everybody can go there.
    names
        Of the accounts.

    Attributes
    ----------
    uids
        The number of each account, by name; that of its group is the same.
    python
        Of an environment that has everything that the tests' own has.

    Raises
    ------
    LookupError
        If there is no Python here that other accounts can run.
    """

    def __init__(self, folder: Path, *names: str) -> None:
        self.uids = dict(zip(names, _free(len(names)), strict=True))
        self.homes = folder / "home"
        for name, uid in self.uids.items():
            home = self.homes / name
            home.mkdir(mode=0o700)
            os.chown(home, uid, uid)
        self.folder = folder / "python"
        self.python = self.folder / "bin" / "python"
        self._make()

    @property
    def path(self) -> str:
        """Give the ``PATH`` of these accounts."""
        return f"{self.python.parent}{os.pathsep}{SYSTEM_PATH}"

    def table(self) -> str:
        """Give what tells the Hub of them, in its configuration."""
        return TABLE.format(homes=self.homes, uids=self.uids)

    def home(self, name: str) -> Path:
        """Give the home of an account."""
        return self.homes / name

    def processes(self) -> list[psutil.Process]:
        """Give all processes of these accounts."""
        found = []
        for process in psutil.process_iter(["uids"]):
            uids = process.info["uids"]
            if uids is not None and uids.real in self.uids.values():
                found.append(process)
        return found

    def _make(self) -> None:
        """Make an environment, as venv does, with the packages of the tests' own."""
        self.python.parent.mkdir(parents=True)
        minor = f"python{sys.version_info.major}.{sys.version_info.minor}"
        packages = self.folder / "lib" / minor / "site-packages"
        packages.mkdir(parents=True)
        paths = [
            *PLUGIN["PYTHONPATH"].split(os.pathsep),
            *dict.fromkeys(map(sysconfig.get_path, ("purelib", "platlib"))),
        ]
        (packages / "tests.pth").write_text("\n".join(paths) + "\n")
        for name in ("etc", "share"):  # Jupyter's configuration and kernels
            (self.folder / name).symlink_to(Path(sys.prefix) / name)
        for name, module in PROGRAMS.items():
            program = self.python.parent / name
            program.write_text(f"#!{self.python}\nimport sys\nfrom {module} import main\nsys.exit(main())\n")
            program.chmod(0o755)
        for interpreter in dict.fromkeys((Path(sys.executable).resolve(), Path("/usr/bin") / minor)):
            (self.folder / "pyvenv.cfg").write_text(f"home = {interpreter.parent}\n")
            self.python.unlink(missing_ok=True)
            self.python.symlink_to(interpreter)
            if self._runs():
                return
        raise LookupError(f"neither {sys.executable} nor /usr/bin/{minor} can be run by other accounts")

    def _runs(self) -> bool:
        uid = next(iter(self.uids.values()))
        command = [self.python, "-c", "import jupyterhub, jupyter_server_ext.app, zmq"]
        try:
            done = subprocess.run(
                command,
                user=uid,
                group=uid,
                extra_groups=[],
                cwd="/",
                env={"PATH": SYSTEM_PATH},
                capture_output=True,
                check=False,
                timeout=60,
            )
        except OSError:
            return False
        return done.returncode == 0


def _free(count: int) -> list[int]:
    """Give numbers that no account, process or folder of llmkit has."""
    import pwd  # not on Windows

    taken = {uid for process in psutil.process_iter(["uids"]) if (uids := process.info["uids"]) for uid in uids}
    taken |= {account.pw_uid for account in pwd.getpwall()}
    # From where nobody else begins, who runs the same tests at the same time.
    begin = FIRST + os.getpid() * count % (LAST - FIRST)
    free = (uid for uid in range(begin, begin + 1000) if uid not in taken and not Path(f"/tmp/llmkit-{uid}").exists())
    return [next(free) for _ in range(count)]
