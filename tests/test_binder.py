"""Binder: its files do what repo2docker makes of them, and the quickstart works on a machine as small as Binder's.

repo2docker's rules, as its source has them: a folder `binder` is the only place where it looks; `runtime.txt` names
the Python; packages of `apt.txt` are installed first; the repository is copied and given to a user without privileges,
who runs ``pip install -r binder/requirements.txt`` in it and then `postBuild`, and at last starts JupyterLab there.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from bare_environment import BareEnvironment, published
from kernels import ServerKernel
from newcomer import newcomer
from packaging.specifiers import SpecifierSet
from small_machine import SmallMachine
from support import REPOSITORY, JupyterServer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Binder's machines run Linux")

BINDER = REPOSITORY / "binder"
READ_BY_REPO2DOCKER = {"runtime.txt", "apt.txt", "requirements.txt", "postBuild"}
LIMIT_BYTES = 2_000_000_000
NOTEBOOK = "notebooks/quickstart.ipynb"


def test_the_folder_holds_what_repo2docker_reads_and_nothing_that_would_come_first() -> None:
    assert {path.name for path in BINDER.iterdir()} <= READ_BY_REPO2DOCKER
    assert not (REPOSITORY / ".binder").exists(), "repo2docker refuses two folders"


def test_the_python_of_runtime_txt_is_one_that_llmkit_wants() -> None:
    found = re.fullmatch(r"python-(3\.\d+)", (BINDER / "runtime.txt").read_text().strip())
    assert found
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert f"{found[1]}.0" in SpecifierSet(project["requires-python"])


def lines(name: str) -> list[str]:
    """Give the lines of a file without comments."""
    bare = [line.split("#", 1)[0].strip() for line in (BINDER / name).read_text().splitlines()]
    return [line for line in bare if line]


def test_requirements_are_installed_after_the_repository_was_copied() -> None:
    # A line that begins with a dot is what tells repo2docker to wait for that.
    assert lines("requirements.txt") == [".[notebooks]"]


def test_packages_of_the_system_are_named_as_repo2docker_wants_them() -> None:
    assert lines("apt.txt")
    assert all(re.fullmatch(r"[a-z0-9.+-]+", name) for name in lines("apt.txt"))


@pytest.mark.skipif(shutil.which("dpkg") is None, reason="this is no Debian")
@pytest.mark.vllm
def test_what_vllm_links_is_in_the_packages_of_the_system_that_are_named() -> None:
    found = importlib.util.find_spec("vllm")
    assert found
    assert found.submodule_search_locations
    [folder] = map(Path, found.submodule_search_locations)
    linked = set()
    for library in folder.glob("*.so"):
        told = subprocess.run(["ldd", str(library)], capture_output=True, text=True, check=False).stdout
        linked |= set(re.findall(r"^\s*(lib\S+) => /", told, re.MULTILINE))
    assert "libnuma.so.1" in linked
    assert "libnuma1" in lines("apt.txt")


@pytest.fixture
def place() -> Iterator[Path]:
    """Give a folder that other users can enter, which those of pytest are not."""
    folder = Path(tempfile.mkdtemp(prefix="lkb-", dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def builder() -> tuple[pwd.struct_passwd | None, str]:
    """Give who builds and which Python they have: another user, if there is one who can run one like ours."""
    user, path = newcomer()
    python = shutil.which("python3", path=path)
    if user.pw_uid != os.getuid() and python:
        asked = "import sys; print(*sys.version_info[:2])"
        told = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=False).stdout
        if told.split() == [str(part) for part in sys.version_info[:2]]:
            return user, python
    return None, sys.executable


def give(user: pwd.struct_passwd | None, *folders: Path) -> None:
    for folder in folders if user else ():
        for one in (folder, *folder.rglob("*")):
            os.chown(one, user.pw_uid, user.pw_gid, follow_symlinks=False)


@pytest.mark.vllm
@pytest.mark.timeout(400)
def test_what_repo2docker_builds_runs_the_quickstart_with_2_gb_and_one_core(place: Path) -> None:
    user, python = builder()
    clone = published(place)
    home = place / "home"
    home.mkdir()
    give(user, place)
    seconds: dict[str, float] = {}
    began = time.monotonic()

    def step(name: str) -> None:
        nonlocal began
        seconds[name], began = round(time.monotonic() - began, 1), time.monotonic()

    environment = BareEnvironment(place / "venv", python, user)
    for command in (
        ["pip", "install", "--no-cache-dir", "-r", "binder/requirements.txt"],
        ["sh", "-c", "chmod +x binder/postBuild && ./binder/postBuild"],
    ):
        said = environment.run(command, clone, HOME=str(home))
    assert re.search(r"vLLM \S+ \(\w+ build\) is ready", said)
    assert environment.where("llmkit").is_relative_to(environment.folder)
    step("build")

    as_user = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"] if user else []
    cells = [cell for cell in nbformat.read(clone / NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    with SmallMachine(LIMIT_BYTES) as machine:
        server = JupyterServer(
            "lab",
            root_dir=clone,
            standby="auto",
            python=environment.python,
            prefix=[*machine.prefix, *as_user],
            env={**environment.environ(), "HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache")},
        )
        give(user, server.folder, server.run_dir)
        with server:
            assert server.process is not None
            machine.watch(server.process.pid)
            step("server")
            assert server.request("GET", f"lab/tree/{NOTEBOOK}").is_success
            assert server.request("GET", "llm/devices").json()["cpu"]["cores"] == 1
            with ServerKernel(server.url, server.token) as kernel:
                for cell in cells:
                    assert shown(kernel, cell.source) == stored(cell), cell.source
                step("quickstart")
                whose = kernel.run("import getpass, os; print(os.getuid())")
            assert int(whose) == (user.pw_uid if user else os.getuid())
            described = machine.describe()
        assert machine.kills == 0
        assert 0 < machine.most_bytes < LIMIT_BYTES
    print(f"\nBinder, as {user.pw_name if user else 'ourselves'}: {described}; seconds {seconds}")


def shown(kernel: ServerKernel, code: str) -> list[Any]:
    """Run a cell; give what it printed, and what it gave."""
    said, given = "", []
    for kind, content in kernel.messages(code):
        assert kind != "error", (code, content)
        if kind == "stream" and content["name"] == "stdout":
            said += content["text"]
        elif kind == "execute_result":
            given.append(content["data"]["text/plain"])
    return [said, *given]


def stored(cell: Any) -> list[Any]:
    """Give the same of what is stored with a cell."""
    streams = [one["text"] for one in cell.outputs if one.output_type == "stream" and one.name == "stdout"]
    return ["".join(streams), *(o["data"]["text/plain"] for o in cell.outputs if o.output_type == "execute_result")]
