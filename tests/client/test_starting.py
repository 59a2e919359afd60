"""llmkit.start(): real servers of scripts and of kernels that have none, and what is left of them: nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_engine_type import PLUGIN
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager
from kernels import ServerKernel
from support import JupyterServer, own_environment, processes_using, wait_until

from llmkit.client import start, starting
from llmkit.errors import ConnectError, ExtensionMissing, NotReady, ServerNotFound

SECONDS = 120
GONE_SECONDS = 30.0

ENGINE = """
client.configure("m", "any --setsid", "fake")
client.load("m", progress=False)
"""


@pytest.fixture
def run_dir() -> Path:
    """Give the folder of what the servers of a test keep on this host."""
    return Path(os.environ["LLMKIT_RUN_DIR"])


@pytest.fixture
def environment(tmp_path: Path, run_dir: Path) -> dict[str, str]:
    """Give the environment of somebody without any server, in which the model type ``fake`` is installed."""
    path = os.pathsep.join(filter(None, (PLUGIN["PYTHONPATH"], os.environ.get("PYTHONPATH", ""))))
    return {
        **own_environment(),
        "HOME": str(tmp_path),
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"),
        "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
        "LLMKIT_RUN_DIR": str(run_dir),
        "LLMKIT_STATE_DIR": str(tmp_path / "state"),
        "PYTHONPATH": path,
    }


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let this very process have no server, in folders of this test."""
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path / "config"))
    return tmp_path


def script(code: str, environment: dict[str, str], status: int = 0) -> list[str]:
    """Run a script that has started a server; give the lines that it printed."""
    program = f"import llmkit, os, signal, subprocess, sys\nclient = llmkit.start()\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        cwd=environment["HOME"],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout.splitlines()


def is_gone(pid: int, run_dir: Path) -> bool:
    return not psutil.pid_exists(pid) and not processes_using(run_dir) and list(run_dir.iterdir()) == []


# -- a script ------------------------------------------------------------------------------------------------------


def test_there_is_one_server_for_a_script_and_all_that_it_starts(environment: dict[str, str], run_dir: Path) -> None:
    code = """
import asyncio, psutil
print(client.health().status, llmkit.start().url == llmkit.connect().url == client.url)
child = "import llmkit; print(llmkit.connect().url, llmkit.start().url)"
print(subprocess.run([sys.executable, "-c", child], stdout=-1, text=True).stdout.split() == [client.url] * 2)
async def within_a_loop():
    return llmkit.start().url, (await asyncio.to_thread(llmkit.start)).url, (await llmkit.AsyncClient.connect()).url
print(set(asyncio.run(within_a_loop())) == {client.url})
client.close()
print(len([one for one in psutil.Process().children(recursive=True) if "jupyter_server_ext" in one.cmdline()]))
print(any(client.connection.server.token in word for one in psutil.Process().children() for word in one.cmdline()))
"""
    assert script(code, environment) == ["ok True", "True", "True", "1", "False"]
    assert list(run_dir.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="engines are kept on Linux only")
@pytest.mark.parametrize(
    ("ending", "status"),
    [
        ("", 0),
        ("raise SystemExit(3)", 3),
        ("os._exit(4)", 4),
        ("os.kill(os.getpid(), signal.SIGTERM)", -15),
        ("os.kill(os.getpid(), signal.SIGKILL)", -9),
    ],
    ids=["its last line", "an error", "a hard exit", "SIGTERM", "SIGKILL"],
)
def test_the_server_and_its_engine_end_with_the_script(
    ending: str, status: int, environment: dict[str, str], run_dir: Path
) -> None:
    show = "print(client.connection.server.pid, client.models()[0].status, flush=True)\n"
    (line,) = script(ENGINE + show + ending, environment, status)
    pid, model = line.split()
    assert model == "loaded"
    if status in (0, 3):
        assert is_gone(int(pid), run_dir)  # the script has waited for it
    wait_until(lambda: is_gone(int(pid), run_dir), "the end of server and engine", GONE_SECONDS)


def test_a_fork_of_the_script_ends_without_its_server(environment: dict[str, str]) -> None:
    code = """
pid = os.fork()
if not pid:
    assert llmkit.start().url == client.url
    sys.exit(0)  # with all that is done at the end of a Python
print(os.waitpid(pid, 0)[1], client.health().status)
"""
    assert script(code, environment) == ["0 ok"]


def test_a_server_that_was_killed_is_replaced(environment: dict[str, str]) -> None:
    code = """
import psutil
server = psutil.Process(client.connection.server.pid)
server.kill()
while server.status() != psutil.STATUS_ZOMBIE: pass
again = llmkit.start()
print(again.connection.server.pid != server.pid, llmkit.connect().url == again.url, again.health().status)
"""
    assert script(code, environment) == ["True True ok"]


def test_what_the_user_has_configured_for_other_servers_does_not_hinder(
    environment: dict[str, str], certificate: Path, tmp_path: Path
) -> None:
    config = tmp_path / "config"
    config.mkdir()
    (config / "jupyter_server_config.py").write_text(
        f"c.ServerApp.certfile = c.ServerApp.keyfile = {str(certificate)!r}\n"
        "c.ServerApp.ip = '0.0.0.0'\nc.ServerApp.port = 80\nc.ServerApp.base_url = '/a%40b/'\n"
        "c.ServerApp.sock = '/tmp/s'\nc.IdentityProvider.token = 'of-the-file'\n"
    )
    # Nor what lies beside the notebook and has the name of a module.
    (tmp_path / "jinja2.py").write_text("raise RuntimeError")
    (line,) = script("print(client.url, client.health().status)", environment)
    url, status = line.split()
    assert url.startswith("http://127.0.0.1:")
    assert url.endswith("/a%40b/")
    assert status == "ok"


# -- a kernel ------------------------------------------------------------------------------------------------------


@pytest.fixture
def kernel(environment: dict[str, str]) -> Iterator[tuple[KernelManager, BlockingKernelClient]]:
    """Give a kernel that no Jupyter server has started, as VS Code's."""
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(env=environment, cwd=environment["HOME"])
    client = manager.blocking_client()
    try:
        client.start_channels()
        client.wait_for_ready(timeout=SECONDS)
        yield manager, client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def run(client: BlockingKernelClient, code: str) -> str:
    """Run a cell and give what it printed."""
    printed: list[str] = []

    def take(message: dict[str, Any]) -> None:
        if message["msg_type"] == "stream":
            printed.append(message["content"]["text"])

    reply = client.execute_interactive(code, timeout=SECONDS, output_hook=take)
    assert reply["content"]["status"] == "ok", reply["content"]
    return "".join(printed).strip()


@pytest.mark.skipif(sys.platform != "linux", reason="engines are kept on Linux only")
@pytest.mark.parametrize("way", ["shut down", "restarted", "killed"])
def test_the_server_and_its_engine_end_with_the_kernel(
    way: str, kernel: tuple[KernelManager, BlockingKernelClient], run_dir: Path
) -> None:
    manager, client = kernel
    run(client, "import os, signal, time, llmkit\nclient = llmkit.start()" + ENGINE)
    interrupted = (
        "try:\n    os.killpg(os.getpgrp(), signal.SIGINT)\n    time.sleep(60)\nexcept KeyboardInterrupt:\n"
        "    time.sleep(1)\n"
    )
    told = run(client, interrupted + "print(client.connection.server.pid, llmkit.connect().models()[0].status)")
    pid, model = told.split()
    assert model == "loaded"  # the interrupt of a cell goes to all processes of the kernel, but not to the server
    if way == "restarted":
        manager.restart_kernel()
    else:
        manager.shutdown_kernel(now=way == "killed")
    wait_until(lambda: is_gone(int(pid), run_dir), "the end of server and engine", GONE_SECONDS)


def test_a_kernel_of_a_jupyter_server_without_llmkit_gets_a_server_of_its_own() -> None:
    off = "--ServerApp.jpserver_extensions={'jupyter_server_ext': False}"
    with (
        JupyterServer("server", args=[off]) as server,  # at its end it looks for what was left
        ServerKernel(server.url, server.token) as kernel,
    ):
        connect = "import llmkit\nprint(llmkit.connect().url, llmkit.connect().health().status)"
        assert "ExtensionMissing" in kernel.run(connect)
        kernel.run("llmkit.start()")
        url, status = kernel.run(connect).split()
        assert url != server.url
        assert status == "ok"


# -- where it starts none ------------------------------------------------------------------------------------------


def test_a_server_that_connect_finds_is_used(
    server: JupyterServer, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    (line,) = script("print(client.url)", {**environment, "JUPYTER_RUNTIME_DIR": str(server.folder / "runtime")})
    assert line.endswith("/a%40b/")


def test_a_server_that_was_named_is_the_only_one(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMKIT_SERVER_URL", "http://127.0.0.1:9/")
    with pytest.raises(ServerNotFound, match=r"127\.0\.0\.1:9"):
        start()


def no_child_is_left() -> bool:
    return not [child for child in psutil.Process().children() if "jupyter_server_ext" in child.cmdline()]


def test_a_server_that_ends_at_once_is_told_with_the_end_of_its_log(
    alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", "/dev/null/runtime")
    with pytest.raises(ConnectError, match="ended with status 1") as raised:
        start()
    assert "/dev/null/runtime" in raised.value.message
    assert raised.value.details["log_tail"][-1] in raised.value.message
    assert "LLMKIT_SERVER_URL" not in os.environ


def test_a_server_that_does_not_answer_in_time_is_ended(alone: Path) -> None:
    with pytest.raises(ConnectError, match=r"did not answer within 0\.01 s"):
        start(timeout=0.01)
    assert no_child_is_left()


def test_a_server_that_cannot_work_says_why_and_is_ended(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMKIT_STATE_DIR", "/dev/null/state")
    with pytest.raises(NotReady, match="cannot use its folders") as raised:
        start()
    assert "LLMKIT_STATE_DIR" in str(raised.value)
    assert no_child_is_left()


def test_a_stop_while_it_starts_ends_it(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(starting.StartedServer, "_client", interrupt)
    with pytest.raises(KeyboardInterrupt):
        start()
    assert no_child_is_left()


def test_an_environment_without_the_extension_is_named_with_its_cure(
    alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jupyter_server_ext", None)
    with pytest.raises(ExtensionMissing, match="jupyter_server_ext is missing") as raised:
        start()
    assert f"{sys.executable} -m pip install llmkit" in str(raised.value)
