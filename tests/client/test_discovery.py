from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support import JupyterServer, own_environment, wait_until

from llmkit.client import connect
from llmkit.client.connection import Server
from llmkit.client.discovery import running_servers
from llmkit.client.installed import explain_missing
from llmkit.errors import (
    ExtensionMissing,
    IncompatibleVersion,
    NotAllowed,
    RestartNeeded,
    ServerNotFound,
    ServerStopping,
)

DEAD_PID = 2**22 + 1  # beyond what Linux gives out


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a runtime folder of this test alone, in which connect() looks."""
    folder = tmp_path / "runtime"
    folder.mkdir()
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(folder))
    return folder


def write_server_file(folder: Path, url: str, pid: int, token: str = "", **more: Any) -> None:
    told = {"url": url, "pid": pid, "token": token, "base_url": "/", "sock": "", **more}
    (folder / f"jpserver-{pid}.json").write_text(json.dumps(told))


def run_connect(environment: dict[str, str], code: str = "") -> str:
    """Run connect() as a kernel of its own would, and give what it printed."""
    program = f"import llmkit\nclient = llmkit.connect()\nprint(client.url, client.health().status)\n{code}"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# -- where it looks ------------------------------------------------------------------------------------------------


def test_the_address_given_wins_over_everything(fake: Any, runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMKIT_SERVER_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("LLMKIT_TOKEN", "for-another-server")
    connect(f"{fake.url}lab?token=abc").close()
    assert fake.asked[-1].headers["Authorization"] == "token abc"


def test_a_token_of_the_environment_goes_only_to_the_server_of_the_environment(
    fake: Any, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMKIT_SERVER_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("LLMKIT_TOKEN", "canary")
    connect(fake.url).close()
    assert "Authorization" not in fake.asked[-1].headers
    monkeypatch.setenv("LLMKIT_SERVER_URL", fake.url.replace("127.0.0.1", "localhost"))
    connect(fake.url).close()
    assert fake.asked[-1].headers["Authorization"] == "token canary"


def test_an_address_without_a_token_takes_the_one_that_jupyter_noted(fake: Any, runtime: Path) -> None:
    write_server_file(runtime, fake.url, os.getpid(), "noted")
    connect(fake.url).close()
    assert fake.asked[-1].headers["Authorization"] == "token noted"


def test_the_variables_point_to_the_server(server: JupyterServer) -> None:
    environment = {**own_environment(), "LLMKIT_SERVER_URL": server.url, "LLMKIT_TOKEN": server.token}
    assert run_connect(environment) == f"{server.url} ok"


def test_the_server_of_the_variables_is_the_only_one_tried(
    fake: Any, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_server_file(runtime, fake.url, os.getpid())
    monkeypatch.setenv("LLMKIT_SERVER_URL", "http://127.0.0.1:9/")
    with pytest.raises(ServerNotFound, match=r"127\.0\.0\.1:9"):
        connect()
    assert fake.asked == []


def test_a_kernel_finds_the_server_that_started_it(server: JupyterServer) -> None:
    assert server.process is not None
    environment = {
        **own_environment(),
        "JUPYTER_RUNTIME_DIR": str(server.folder / "runtime"),
        "JPY_PARENT_PID": str(server.process.pid),
    }
    assert run_connect(environment).endswith("/a%40b/ ok")


def test_a_script_finds_the_only_running_server(server: JupyterServer) -> None:
    environment = {**own_environment(), "JUPYTER_RUNTIME_DIR": str(server.folder / "runtime")}
    assert run_connect(environment).endswith("/a%40b/ ok")


def test_the_hubs_variables_lead_to_the_single_user_server(
    fake: Any, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.replies["GET", "/user/ada/llm/health"] = fake.replies["GET", "/llm/health"]
    monkeypatch.setenv("JUPYTERHUB_SERVICE_PREFIX", "/user/ada/")
    monkeypatch.setenv("JUPYTERHUB_API_TOKEN", "of-the-hub")
    monkeypatch.setenv("JUPYTERHUB_SERVICE_URL", fake.url.replace("127.0.0.1", "0.0.0.0"))
    with connect() as client:
        assert client.url == f"{fake.url}user/ada/"
    assert fake.asked[-1].headers["Authorization"] == "token of-the-hub"


def test_under_a_hub_the_kernels_own_server_is_opened_with_the_hubs_token(
    fake: Any, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_server_file(runtime, fake.url, os.getpid(), token="")
    monkeypatch.setenv("JPY_PARENT_PID", str(os.getpid()))
    monkeypatch.setenv("JUPYTERHUB_API_TOKEN", "of-the-hub")
    connect().close()
    assert fake.asked[-1].headers["Authorization"] == "token of-the-hub"


def test_a_running_server_without_llmkit_is_passed_over(fake: Any, runtime: Path) -> None:
    write_server_file(runtime, fake.url, os.getpid())
    older = psutil.Process().ppid()
    write_server_file(runtime, "http://127.0.0.1:9/", older)
    os.utime(runtime / f"jpserver-{os.getpid()}.json", (1, 1))
    with connect() as client:
        assert client.url == fake.url


def test_a_server_on_a_unix_socket_is_found(tmp_path: Path) -> None:
    path = Path(os.environ["LLMKIT_RUN_DIR"]) / "s"
    program = [
        str(Path(sys.executable).parent / "jupyter-server"),
        f"--sock={path}",
        "--no-browser",
        "--allow-root",
    ]
    runtime = tmp_path / "runtime"
    environment = {
        **own_environment(),
        "JUPYTER_RUNTIME_DIR": str(runtime),
        "HOME": str(tmp_path),
        "LLMKIT_STATE_DIR": str(tmp_path / ".state"),  # hidden: the folder around it is served
        "JUPYTER_TOKEN": "abc",
        "LLMKIT_RUN_DIR": os.environ["LLMKIT_RUN_DIR"],
    }
    with (tmp_path / "log").open("wb") as log:
        running = subprocess.Popen(program, env=environment, cwd=tmp_path, stdout=log, stderr=log)
    try:
        wait_until(lambda: path.exists() and list(runtime.glob("jpserver-*.json")), "the socket", 60)
        watch = (
            "import time; from llmkit.client import Watcher; watcher = Watcher(client); time.sleep(1)\n"
            "print(watcher.state, watcher._socket is not None); watcher.close()"
        )
        assert run_connect(environment, watch) == "http://localhost/ ok\nconnected True"
        assert run_connect({**environment, "JPY_PARENT_PID": str(running.pid)}) == "http://localhost/ ok"
    finally:
        running.terminate()
        running.wait(30)


# -- what it says when there is none -------------------------------------------------------------------------------


def test_no_server_says_everything_that_was_tried_and_how_to_start_one(
    runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_server_file(runtime, "http://127.0.0.1:9/", DEAD_PID)
    monkeypatch.setenv("JPY_PARENT_PID", "1234567")
    with pytest.raises(ServerNotFound) as raised:
        connect()
    said = str(raised.value)
    for part in ("LLMKIT_SERVER_URL", "jpserver-1234567.json", "JUPYTERHUB_SERVICE_PREFIX", str(runtime)):
        assert part in said
    assert "1 left by servers that have ended" in said
    assert "jupyter lab" in said
    assert "llmkit.start()" in said


@pytest.mark.alone
def test_twenty_stale_files_cost_no_time(fake: Any, runtime: Path) -> None:
    write_server_file(runtime, fake.url, os.getpid())
    for number in range(20):
        write_server_file(runtime, "http://10.255.255.1:8888/", DEAD_PID + number)
        (runtime / f"jpserver-9{number}.json").write_text("half a fi")
    connect().close()  # imports are not what is measured
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        connect().close()
        seconds.append(time.perf_counter() - started)
    print(f"connect() with 20 stale files: {statistics.median(seconds):.3f} s")
    assert min(seconds) <= 0.2  # what else this machine does is not what is measured


def test_a_wrong_token_and_a_missing_one_are_named_with_their_cure(server: JupyterServer) -> None:
    with pytest.raises(NotAllowed, match="refuses the token") as raised:
        connect(server.url, "wrong")
    assert "LLMKIT_TOKEN" in str(raised.value)
    assert "wrong" not in str(raised.value).replace("refuses", "")
    with pytest.raises(NotAllowed, match="without a token") as raised:
        connect(server.url)
    assert "password" in str(raised.value)


@pytest.mark.parametrize("way", ["argument", "address", "variable"])
def test_a_key_for_tools_says_what_it_opens_and_how_to_ask_with_it(
    server: JupyterServer, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    with connect(server.url, server.token) as client:
        key = client.create_key(f"by-{way}").key
        try:
            if way == "variable":
                monkeypatch.setenv("LLMKIT_SERVER_URL", server.url)
                monkeypatch.setenv("LLMKIT_TOKEN", key)
            given = {"argument": (server.url, key), "address": (f"{server.url}lab?token={key}",), "variable": ()}[way]
            with pytest.raises(NotAllowed, match="refuses a key for tools") as raised:
                connect(*given)
            said = str(raised.value)
            assert "/llm/v1 and /llm/inference/ alone" in said
            assert "jupyter server list" in said
            assert key not in said
            told = re.search(r"`openai\.OpenAI\(base_url='(.+)', api_key=KEY\)`", said)
            assert told is not None
            with openai.OpenAI(base_url=told[1], api_key=key, max_retries=0) as asking:
                assert asking.models.list().object == "list"
        finally:
            client.revoke_key(f"by-{way}")
    with pytest.raises(NotAllowed, match="refuses a key for tools"):  # revoked, it opens no more than before
        connect(*given)


def test_another_version_of_the_api_says_which_side_to_upgrade(fake: Any) -> None:
    _, health = fake.replies["GET", "/llm/health"]
    fake.replies["GET", "/llm/health"] = (200, {**health, "api_version": "0"})
    with pytest.raises(IncompatibleVersion, match="environment of the server"):
        connect(fake.url)
    fake.replies["GET", "/llm/health"] = (200, {**health, "api_version": "2"})
    with pytest.raises(IncompatibleVersion, match="environment of the kernel"):
        connect(fake.url)


def test_a_server_that_is_stopping_says_so_itself(fake: Any) -> None:
    fake.replies["GET", "/llm/health"] = (503, ServerStopping("The server is stopping.").to_wire())
    with pytest.raises(ServerStopping):
        connect(fake.url)


def test_something_that_is_no_jupyter_server_is_told_apart(fake: Any) -> None:
    fake.replies.clear()
    with pytest.raises(ServerNotFound, match="no Jupyter server"):
        connect(fake.url)
    fake.replies["GET", "/llm/health"] = (200, {"ok": True})
    with pytest.raises(ServerNotFound, match="not as llmkit does"):
        connect(fake.url)


def test_a_server_of_which_nothing_is_known_is_said_to_be_without_llmkit(fake: Any, runtime: Path) -> None:
    del fake.replies["GET", "/llm/health"]
    with pytest.raises(ExtensionMissing, match="without llmkit") as raised:
        connect(fake.url)
    assert "pip install llmkit" in str(raised.value)


def test_the_own_server_without_llmkit_is_reported_rather_than_the_absence_of_others(
    fake: Any, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del fake.replies["GET", "/llm/health"]
    write_server_file(runtime, fake.url, DEAD_PID)
    monkeypatch.setenv("JPY_PARENT_PID", str(DEAD_PID))
    with pytest.raises(ExtensionMissing):
        connect()


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """Start a real Jupyter server in an environment without llmkit; give it and the environment's packages."""
    prefix = tmp_path_factory.mktemp("environment")
    (prefix / "bin").mkdir()
    python = prefix / "bin" / "python"
    python.symlink_to(Path(sys.executable).resolve())
    (prefix / "pyvenv.cfg").write_text(f"home = {Path(sys.executable).resolve().parent}\n")
    packages = prefix / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    packages.mkdir(parents=True)
    import jupyter_server

    runtime = prefix / "runtime"
    environment = {
        **own_environment(),
        # Jupyter's packages are lent from here; the settings that enable extensions are not.
        "PYTHONPATH": str(Path(jupyter_server.__file__).parent.parent),
        "JUPYTER_RUNTIME_DIR": str(runtime),
        "JUPYTER_TOKEN": "abc",
        "HOME": str(prefix),
    }
    command = [str(python), "-m", "jupyter_server", "--port=0", "--no-browser", "--allow-root"]
    with (prefix / "log").open("wb") as log:
        running = subprocess.Popen(command, env=environment, cwd=prefix, stdout=log, stderr=log)
    try:
        file = wait_until(lambda: next(iter(runtime.glob("jpserver-*.json")), None), "the bare server", 60)
        told = wait_until(lambda: file.read_text() and json.loads(file.read_text()), "its file", 10)
        yield Server(told["url"], "abc", pid=told["pid"]), packages
    finally:
        running.terminate()
        running.wait(30)


def test_a_real_server_of_an_environment_without_llmkit_names_the_environment(
    bare: tuple[Server, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, packages = bare
    prefix = packages.parents[2]
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(prefix / "runtime"))
    monkeypatch.setenv("JPY_PARENT_PID", str(server.pid))
    with pytest.raises(ExtensionMissing, match="environment without llmkit") as raised:
        connect()
    assert f"{prefix}/bin/python -m pip install llmkit" in str(raised.value)


def test_a_real_server_that_is_older_than_the_installation_needs_a_restart(bare: tuple[Server, Path]) -> None:
    server, packages = bare
    record = packages / "llmkit-0.1.0.dist-info"
    record.mkdir()
    try:
        with pytest.raises(RestartNeeded, match="before llmkit was installed") as raised:
            _raise(explain_missing(server))
        assert "Restart" in str(raised.value)
        # Installed before the start, and yet not there: it is not enabled.
        os.utime(record, (1, 1))
        with pytest.raises(ExtensionMissing, match="not enabled") as missing:
            _raise(explain_missing(server))
        assert "jupyter server extension enable" in str(missing.value)
    finally:
        record.rmdir()


def _raise(error: Exception) -> None:
    raise error


def test_a_real_server_with_the_extension_switched_off_is_told_apart(tmp_path: Path) -> None:
    off = "--ServerApp.jpserver_extensions={'jupyter_server_ext': False}"
    with JupyterServer("server", args=[off]) as running:
        assert running.process is not None
        with pytest.raises(ExtensionMissing, match="not enabled"):
            raise explain_missing(Server(running.url, running.token, pid=running.process.pid))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
TOLD = st.fixed_dictionaries(
    {},
    optional={
        "url": JSON
        | st.sampled_from(["http://127.0.0.1:1/", "https://[::1]:8/a%40b/", "http://[", "ftp://x", "http://x:99999"]),
        "pid": JSON | st.just(os.getpid()) | st.sampled_from([0, -1, 2**31, 2**64, 10**400]),
        "token": JSON,
        "base_url": JSON | st.just("/"),
        "sock": JSON,
        "root_dir": JSON,
    },
)


@given(st.binary(max_size=60) | TOLD.map(lambda told: json.dumps(told).encode()))
@example(b"[" * 100_000)
@example(b'{"url": "http://127.0.0.1:1/", "pid": Infinity}')
@example(b'{"url": "http://127.0.0.1:1/", "pid": ' + b"9" * 5000 + b"}")
@example(b'{"url": "http://127.0.0.1:1/", "pid": 99999999999999999999}')
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_lies_in_the_runtime_folder_is_read_or_passed_over(runtime: Path, content: bytes) -> None:
    (runtime / "jpserver-1.json").write_bytes(content)
    write_server_file(runtime, "http://127.0.0.1:9/", os.getpid())
    found = list(running_servers(runtime))
    assert any(server.url.startswith("http://127.0.0.1:9") and alive for server, alive in found)
    for server, _ in found:
        assert isinstance(server.url, str)
        assert server.token is None or isinstance(server.token, str)
        assert server.uds is None or isinstance(server.uds, str)
