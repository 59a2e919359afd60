"""connect() from where people are: kernels that real servers start, scripts, nbconvert, other environments."""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from jupyter_server.auth.security import passwd
from kernels import ServerKernel
from support import REPOSITORY, JupyterServer, own_environment

CONNECT = "import llmkit\nclient = llmkit.connect()\nprint(client.url, client.health().status)"
PROGRAM_SECONDS = 120


def around(runtime: Path, **more: str) -> dict[str, str]:
    """Give the environment of a program of somebody who has servers in this runtime folder."""
    return {**own_environment(), "JUPYTER_RUNTIME_DIR": str(runtime), **more}


def printed(command: list[str], environment: dict[str, str], **more: str | Path) -> str:
    """Run a program to its end; give what it printed."""
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=PROGRAM_SECONDS, check=False, **more
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the runtime folder of a user who has several servers."""
    return tmp_path_factory.mktemp("runtime")


@pytest.fixture(scope="module")
def two(runtime: Path) -> Iterator[tuple[JupyterServer, JupyterServer]]:
    """Give two servers of one user, the older with a base URL of its own; a scan would find the newer one first."""
    env = {"JUPYTER_RUNTIME_DIR": str(runtime)}
    with JupyterServer("server", env=env) as older, JupyterServer("server", env=env, base_url="/") as newer:
        yield older, newer


# -- kernels of real servers ---------------------------------------------------------------------------------------


def test_each_kernel_of_two_servers_finds_its_own(two: tuple[JupyterServer, JupyterServer]) -> None:
    for server in two:
        with ServerKernel(server.url, server.token) as kernel:
            assert kernel.run(CONNECT) == f"{server.url} ok"


def test_a_kernel_of_a_server_that_speaks_https_needs_its_certificate_named(certificate: Path) -> None:
    with (
        JupyterServer("server", base_url="/", certificate=certificate) as server,
        ServerKernel(server.url, server.token, certificate=certificate) as kernel,
    ):
        assert server.url.startswith("https:")
        said = kernel.run(CONNECT)
        assert "is not trusted" in said
        assert "LLMKIT_VERIFY" in said
        assert kernel.run(f"import os; os.environ['LLMKIT_VERIFY'] = {str(certificate)!r}\n{CONNECT}") == (
            f"{server.url} ok"
        )


def test_a_server_with_only_a_password_is_named_with_a_cure_that_cures() -> None:
    password = f"--PasswordIdentityProvider.hashed_password={passwd('secret')}"
    with JupyterServer("llmkit", args=[password], env={"JUPYTER_TOKEN": ""}) as server:

        def connect() -> str:
            assert server.process is not None
            environment = around(server.folder / "runtime", JPY_PARENT_PID=str(server.process.pid))
            command = [sys.executable, "-c", CONNECT]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
            return (done.stdout + done.stderr).strip()

        said = connect()
        assert "NotAllowed" in said
        assert f"{server.url} refuses a request without a token" in said
        assert "only a password" in said
        (cure,) = re.findall(r"start it with (--\S+=)\.\.\.", said)
        server.stop()
        server.args.append(f"{cure}abc")
        server.start()
        assert connect() == f"{server.url} ok"


def test_a_kernel_of_another_environment_finds_the_server(tmp_path: Path) -> None:
    python = another_environment(tmp_path / "other")
    kernels = tmp_path / "kernels" / "other"
    kernels.mkdir(parents=True)
    spec = {
        "argv": [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "Other",
        "env": {"PYTHONPATH": ""},
    }
    (kernels / "kernel.json").write_text(json.dumps(spec))
    look = (
        "\nimport sys, importlib.util\nprint(sys.prefix, importlib.util.find_spec('jupyter_server'), llmkit.__file__)"
    )
    with (
        JupyterServer("server", env={"JUPYTER_PATH": str(tmp_path)}) as server,
        ServerKernel(server.url, server.token, name="other") as kernel,
    ):
        found, place = kernel.run(CONNECT + look).splitlines()
        assert found == f"{server.url} ok"
        prefix, jupyter_server, llmkit = place.split()
        assert prefix == str(python.parent.parent) != sys.prefix
        assert jupyter_server == "None"
        assert llmkit.startswith(prefix)
        # And where it finds none, this environment cannot start one, and says so.
        elsewhere = "import os\nos.environ['JUPYTER_RUNTIME_DIR'] = '/nowhere'\n"
        assert "jupyter_server is missing" in kernel.run(f"{elsewhere}llmkit.start()")


def another_environment(prefix: Path) -> Path:
    """Make an environment with llmkit for kernels, that is without a Jupyter server; give its Python."""
    base = Path(sys.executable).resolve()
    (prefix / "bin").mkdir(parents=True)
    python = prefix / "bin" / "python"
    python.symlink_to(base)
    (prefix / "pyvenv.cfg").write_text(f"home = {base.parent}\n")
    here = Path(nbformat.__file__).parent.parent
    packages = prefix / here.relative_to(here.parents[2])
    packages.mkdir(parents=True)
    for entry in here.iterdir():
        if not entry.name.startswith(("jupyter_server", "jupyterlab", "llmkit", "_", "vllm", "torch")):
            (packages / entry.name).symlink_to(entry)
    (packages / "llmkit").symlink_to(REPOSITORY / "llmkit")
    return python


# -- programs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["a script", "standard input", "a module"])
def test_a_program_finds_the_newest_server(
    how: str, two: tuple[JupyterServer, JupyterServer], runtime: Path, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(CONNECT)
    arguments = {"a script": [str(script)], "standard input": ["-"], "a module": ["-m", "script"]}[how]
    with script.open() as stdin:
        done = subprocess.run(
            [sys.executable, *arguments],
            env=around(runtime),
            cwd=tmp_path,
            stdin=stdin,
            capture_output=True,
            text=True,
            timeout=PROGRAM_SECONDS,
            check=False,
        )
    assert done.stdout.strip() == f"{two[1].url} ok", done.stderr


@pytest.fixture
def notebook(tmp_path: Path) -> Path:
    file = tmp_path / "notebook.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CONNECT)]), file)
    return file


def nbconvert(notebook: Path) -> list[str]:
    execute = ["--to", "notebook", "--execute", "--stdout", "--log-level=ERROR"]
    return [sys.executable, "-m", "nbconvert", *execute, str(notebook)]


def first_output(executed: str) -> str:
    (cell,) = nbformat.reads(executed, as_version=4).cells
    (output,) = cell.outputs
    return str(output.text).strip()


def test_nbconvert_finds_the_newest_server(
    two: tuple[JupyterServer, JupyterServer], runtime: Path, notebook: Path
) -> None:
    assert first_output(printed(nbconvert(notebook), around(runtime))) == f"{two[1].url} ok"


def test_nbconvert_in_a_cell_finds_the_server_of_the_notebook(
    two: tuple[JupyterServer, JupyterServer], notebook: Path
) -> None:
    # Its kernel has the variables of the notebook's, but for the one that nbconvert overwrites with itself.
    older, _ = two
    with ServerKernel(older.url, older.token) as kernel:
        run = f"import subprocess; print(subprocess.run({nbconvert(notebook)!r}, stdout=-1, text=True).stdout)"
        assert first_output(kernel.run(run)) == f"{older.url} ok"


# -- servers that come back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
def test_a_server_that_came_back_on_another_port_is_found(number: signal.Signals) -> None:
    with JupyterServer("llmkit") as server:
        assert server.process is not None
        before, pid = server.url, server.process.pid
        server.stop(number)  # killed, it leaves its file behind
        server.start()
        assert server.url != before
        environment = around(server.folder / "runtime", JPY_PARENT_PID=str(pid))
        assert printed([sys.executable, "-c", CONNECT], environment) == f"{server.url} ok"


def test_twenty_stale_files_beside_a_real_server_cost_no_time(server: JupyterServer, tmp_path: Path) -> None:
    (real,) = (server.folder / "runtime").glob("jpserver-*.json")
    told = json.loads(real.read_text())
    (tmp_path / real.name).write_text(real.read_text())
    os.utime(tmp_path / real.name, (1, 1))  # all others are looked at first
    for number in range(20):
        pid = 2**22 + 1 + number  # beyond what Linux gives out
        stale = {**told, "url": "http://10.255.255.1:8888/", "pid": pid}
        (tmp_path / f"jpserver-{pid}.json").write_text(json.dumps(stale))
    code = (
        "import time\nbegan = time.perf_counter()\nimport llmkit\nimported = time.perf_counter()\n"
        "connect = llmkit.connect\nready = time.perf_counter()\nconnect()\nended = time.perf_counter()\n"
        "print(imported - began, ready - imported, ended - ready)"
    )
    runs = [[float(part) for part in printed([sys.executable, "-c", code], around(tmp_path)).split()] for _ in range(5)]
    importing, loading, connecting = (statistics.median(column) for column in zip(*runs, strict=True))
    print(
        f"20 stale files, a real server, fresh processes: connect() {connecting:.3f} s, "
        f"after import llmkit {importing:.3f} s and the client's modules {loading:.3f} s"
    )
    # The bar is for a quiet machine; what would be waited for is seconds.
    assert min(row[2] for row in runs) <= 0.2
