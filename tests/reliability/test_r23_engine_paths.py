"""R23: only our paths reach an engine; its HTTP is a unix socket; it leaves nothing in any temporary folder."""

from __future__ import annotations

import http.client
import json
import re
import socket
import stat
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

import psutil
import pytest
from mock_upstream import MockUpstream
from support import ANSWER, QUESTION, REPOSITORY, JupyterServer

from jupyter_server_ext.handlers import ROUTES, UnknownPathHandler
from llmkit.inference.openai_api import PATHS

STORED = (REPOSITORY / "tests" / "data" / "vllm_routes.txt").read_text("utf-8").split()
"""Of vLLM 0.32, those of its other tasks and of its development mode too; the installed one's are tried beside it."""
METHODS = ("GET", "POST", "PUT", "DELETE")
BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": QUESTION}], "prompt": QUESTION}).encode()
ASKED_AT_LOAD = {"/v1/models", "/v1/models/gpt-3"}
ALLOWED = {"/tokenize" if path.startswith("//") else f"/v1{path}" for path in PATHS.values()} | ASKED_AT_LOAD
OTHERS_NAMES = re.compile(r"(lk-|llmkit-server-|llmkit-\d|pytest-|tmp|bash_jobs|fake-|\.|playwright|wt-|brief|issue).*")
"""What other programs of this machine, tests among them, make in shared folders meanwhile."""

# Prints the paths of the API server of the installed vLLM.
REAL_ROUTES = """
import json, warnings
from llmkit.engines.vllm.launch import name_the_cpu_build
name_the_cpu_build()
warnings.simplefilter("ignore")
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.openai.api_server import build_app
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
ServeSubcommand().subparser_init(parser.add_subparsers())
app = build_app(parser.parse_args(["serve", "some/model"]), ("generate",))
print("routes", json.dumps(sorted({route.path for route in app.routes})))
"""


def spellings(path: str) -> list[str]:
    """Give the targets, below the base URL, by which somebody may try to reach a path of the engine."""
    encoded = quote(path, safe="")
    dotted = "/%2e%2e"
    below_v1 = path.removeprefix("/v1")
    return [
        f"llm/v1{below_v1}",
        f"llm/v1{path}",
        f"llm{path}",
        f"llm/v1/{below_v1}",
        f"llm//v1{below_v1}",
        f"llm/v1/..{path}",
        f"llm/v1{dotted}{path}",
        f"llm/v1/%2E%2E%2F{encoded}",
        f"llm/v1/{encoded}",
        f"llm/v1/{quote(encoded, safe='')}",
        f"llm/v1/.{below_v1}",
        f"llm/v1{below_v1}/.",
        f"llm/v1{below_v1}//",
        f"llm/v1{below_v1.upper()}",
        f"llm/V1{below_v1}",
        f"llm/v1{below_v1}?x=/v1/chat/completions",
        f"llm/v1{below_v1};x=1",
        f"llm/v1{below_v1}%00",
        f"llm/v1{below_v1}%0d%0aX:%20y",
        f"llm/v1{below_v1}%20",
        f"llm/v1/chat/completions/..{dotted}{path}",
        f"llm/v1/chat/completions%2f..%2f..{encoded}",
        f"llm/v1/chat/completions{path}",
        f"llm/v1/tokenize{path}",
        f"llm/v1/models/..{path}",
        f"llm/v1/models/m%2f..%2f..{encoded}",
        f"llm/v1/models/{encoded}",
        f"llm/models/m/metrics{path}",
        f"llm/models/m%2f..{encoded}/logs",
        f"llm/v1\\..{below_v1}",
        f"llm/v1/http://engine{path}",
        f"llm/v1/@engine{path}",
    ]


def is_ours(target: str) -> bool:
    """Say whether a target is, letter by letter, one of our routes."""
    path = urlsplit(f"http://x/{target}").path
    return any(
        re.fullmatch(pattern, path) for pattern, handler in ROUTES if handler is not UnknownPathHandler
    )  # the router matches what was sent, before anything is decoded


def try_all(server: JupyterServer, paths: list[str]) -> tuple[Counter[int], list[str]]:
    """Send everything, exactly as written; give the statuses, and the answers that are not ours."""
    address = urlsplit(server.url)
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=60)
    headers = {"Authorization": f"Bearer {server.token}", "Content-Type": "application/json"}
    statuses: Counter[int] = Counter()
    wrong = []
    for path in paths:
        for target in spellings(path):
            for method in METHODS:
                connection.request(method, server.base_url + target, BODY if method == "POST" else None, headers)
                answer = connection.getresponse()
                text = answer.read().decode("utf-8", "replace")
                statuses[answer.status] += 1
                if is_ours(target) and answer.status not in range(300, 400) and answer.status < 500:
                    continue  # an engine's own refusal is passed on
                if answer.status < 400 or answer.status >= 500 or not has_our_code(text):
                    wrong.append(f"{method} {target}: {answer.status} {text[:200]}")
    connection.close()
    return statuses, wrong


def has_our_code(text: str) -> bool:
    """Say whether an error is in our form: its `code` is a word, where vLLM's is a number."""
    try:
        return isinstance(json.loads(text)["error"]["code"], str)
    except (ValueError, KeyError, TypeError):
        return False


def told(statuses: Counter[int]) -> str:
    return ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items()))


def test_r23_only_our_paths_reach_an_engine_however_they_are_written() -> None:
    with MockUpstream() as upstream, JupyterServer() as server:
        kwargs = {"base_url": upstream.base_url}
        server.load(server.configure("m", model_name="gpt-3", model_type="openai", model_kwargs=kwargs))
        statuses, wrong = try_all(server, STORED)
        reached = {path for path, _, _ in upstream.requests}
        assert server.request("GET", "llm/models/m").json()["status"] == "loaded"
    print(
        f"\nR23: {len(STORED)} paths of vLLM x {len(spellings('/x'))} spellings x {len(METHODS)} methods: "
        f"{told(statuses)}; the engine was asked for {', '.join(sorted(reached))}"
    )
    assert wrong == []
    assert reached <= ALLOWED
    assert "/v1/chat/completions" in reached  # what is allowed does come through


# -- real vLLM -------------------------------------------------------------------------------------------------------


def installed_routes() -> list[str]:
    command = [sys.executable, "-c", REAL_ROUTES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("routes "))
    return [re.sub(r"\{[^}]*\}", "some-id", path) for path in json.loads(line.partition(" ")[2])]


def listeners(processes: list[psutil.Process]) -> dict[tuple[str, int], str]:
    """Give every TCP listener of some processes, with the name of its process."""
    found = {}
    for process in processes:
        for one in process.net_connections(kind="inet"):
            if one.status == psutil.CONN_LISTEN:
                found[one.laddr.ip, one.laddr.port] = process.name()
    return found


def answer_to_http(address: tuple[str, int]) -> bytes:
    """Speak HTTP to a listener; give what it says within a moment."""
    said = b""
    with socket.create_connection(address, 5) as sock:
        sock.settimeout(1.5)
        try:
            sock.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            while part := sock.recv(4096):
                said += part
        except OSError:
            pass
    return said


def entries(folder: str) -> set[str]:
    """Give what lies in a folder that other programs use, too."""
    return {path.name for path in Path(folder).iterdir() if not OTHERS_NAMES.fullmatch(path.name)}


@pytest.fixture
def temporary() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="lk-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_r23_a_real_engine_is_reached_by_its_socket_alone_and_leaves_nothing(temporary: Path) -> None:
    before = {folder: entries(folder) for folder in ("/tmp", "/dev/shm")}
    routes = sorted({*installed_routes(), *STORED})
    with JupyterServer(env={"TMPDIR": str(temporary)}) as server:
        server.load(server.configure("m"))
        engine = server.engine_processes()
        (sock,) = [path for path in server.run_dir.rglob("*") if path.is_socket() and path.name == "engine.sock"]
        folders = [path for path in sock.parents if path.is_relative_to(server.run_dir)]
        modes = {str(path.relative_to(server.run_dir)): stat.S_IMODE(path.stat().st_mode) for path in folders}
        open_to_tcp = listeners(engine)
        statuses, wrong = try_all(server, routes)
        asked = server.request("POST", "llm/inference/", json={"model_id": "m", "prompt": QUESTION})
        unloaded = server.request("POST", "llm/unload_model/m", timeout=60)
        left_by_engine = sorted(str(path.relative_to(temporary)) for path in temporary.rglob("*"))
        folder_is_gone = not sock.parent.exists()
        after = {folder: entries(folder) - before[folder] for folder in before}
        survivors = server.left_behind()
        # Last, and of another engine: no listener of torch or ZeroMQ is to be spoken to in HTTP, and it can break.
        server.load(server.configure("m"))
        spoken_to = listeners(server.engine_processes())
        spoke_http = [address for address in spoken_to if answer_to_http(address).startswith(b"HTTP/")]
    names = Counter(f"{ip} ({name})" for (ip, _), name in open_to_tcp.items())
    print(
        f"\nR23: {len(routes)} paths x {len(spellings('/x'))} spellings x {len(METHODS)} methods on real vLLM: "
        f"{told(statuses)}, {len(wrong)} beside ours; {len(open_to_tcp)} TCP listeners in {len(engine)} processes: "
        f"{', '.join(f'{count} on {where}' for where, count in names.items())}; {len(spoke_http)} speak HTTP; "
        f"socket folder {modes[str(sock.parent.relative_to(server.run_dir))]:o}; left in TMPDIR {len(left_by_engine)}, "
        f"/tmp {len(after['/tmp'])}, /dev/shm {len(after['/dev/shm'])}"
    )
    for (ip, port), name in sorted(open_to_tcp.items()):
        print(f"  listener {ip}:{port} of {name}")
    assert wrong == []
    assert asked.json()["response"] == ANSWER
    assert {ip for ip, _ in open_to_tcp} <= {"127.0.0.1"}
    assert spoken_to
    assert spoke_http == []
    assert set(modes.values()) == {0o700}
    assert unloaded.status_code == 200
    assert survivors == []
    assert left_by_engine == []
    assert folder_is_gone
    assert after == {"/tmp": set(), "/dev/shm": set()}
