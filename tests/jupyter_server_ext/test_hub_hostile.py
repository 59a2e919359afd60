"""What a student finds who looks for the keys of the class: by HTTP, from a kernel, and as another account of the host.

The service runs here in the account of the tests. A student's account is played by a process that has given up all
rights of it, which needs root; nothing that it then reads is faked.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hub import Hub
from hub_service import KEY, config, person, wait_for_service
from kernels import ServerKernel
from mock_upstream import ANSWER, MockUpstream
from support import START_SECONDS, free_port

from jupyter_server_ext.handlers import ROUTES
from jupyter_server_ext.openapi import described
from llmkit.client import Client

pytestmark = [pytest.mark.hub, pytest.mark.timeout(6 * START_SECONDS)]

RAW = "sk-typed-in-by-the-teacher"
KEYS = (KEY, RAW)

# What can be read by somebody who is nobody: the environments, arguments, open files and memory maps of all processes,
# and every file below the folders that are given.
LOOK = """
import json, os, sys
folders, keys = json.loads(sys.argv[1]), [key.encode() for key in json.loads(sys.argv[2])]
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
found, read, refused = [], 0, 0

def look(path):
    global read, refused
    try:
        with open(path, "rb") as file:
            data = file.read(16 << 20)
    except OSError:
        refused += 1
        return
    read += 1
    if any(key in data for key in keys):
        found.append(path)

mine = str(os.getpid())
for process in filter(str.isdigit, os.listdir("/proc")):
    if process != mine:
        for name in ("environ", "cmdline", "status", "maps", "mem"):
            look(f"/proc/{process}/{name}")
        try:
            for fd in os.listdir(f"/proc/{process}/fd"):
                look(f"/proc/{process}/fd/{fd}")
        except OSError:
            refused += 1
for folder in folders:
    for place, _, names in os.walk(folder):
        for name in names:
            look(os.path.join(place, name))
print(json.dumps({"found": found, "read": read, "refused": refused}))
"""


@pytest.fixture(scope="module")
def upstream() -> Iterator[MockUpstream]:
    with MockUpstream(key=KEY) as running:
        yield running


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    port = free_port()
    with Hub(config(port)) as running:
        wait_for_service(running)
        yield running


@pytest.fixture(scope="module", autouse=True)
def teacher(hub: Hub, upstream: MockUpstream) -> Iterator[Client]:
    """Give the service both kinds of keys: a variable of its account, and one that is typed in."""
    with person(hub, "grace") as client:
        client.configure("gpt", "gpt-3", "openai", {"base_url": upstream.base_url, "api_key": "env:CLASS_API_KEY"})
        client.configure("typed", "gpt-3", "openai", {"base_url": upstream.base_url, "api_key": RAW})
        client.load("gpt", progress=False)
        yield client


def assert_no_key(text: str) -> None:
    assert not any(key in text for key in KEYS)


@pytest.mark.parametrize("who", ["sam", "ada", "grace"])
def test_no_endpoint_tells_one(hub: Hub, who: str) -> None:
    asked = 0
    with person(hub, who) as client:
        config_id = client.model("typed").config_id
        for one in described(ROUTES):
            if one.method == "get":
                names = {"config_id": config_id, "model_id": "typed", "conversation_id": "a", "name": "a"}
                answer = client.connection.raw("GET", one.path.lstrip("/").format(**names))
                assert_no_key(answer.text + str(answer.headers))
                asked += answer.is_success
        for path in ("metrics", "api", "api/me", "api/status", "api/spec.yaml"):
            assert_no_key(client.connection.raw("GET", path).text)
        for path in ("api/contents", "files/state/llmkit.sqlite", "api/terminals", "api/kernels", "static/../state"):
            assert client.connection.raw("GET", path).status_code in (403, 404), path
    assert asked > 10


def test_no_kernel_finds_one(hub: Hub) -> None:
    with ServerKernel(hub.start_server("sam"), hub.token) as kernel:
        assert (
            kernel.run("import os, llmkit\nshared = llmkit.connect()\nprint(shared.prompt('gpt', 'Hello'))") == ANSWER
        )
        assert_no_key(kernel.run("print(dict(os.environ))"))
        assert_no_key(kernel.run("print(shared.configurations(), shared.models(), shared.requests(), shared.health())"))
        assert_no_key(kernel.run("!env; llmkit env"))
        # The own registry, with a configuration that names the variable of the class.
        own = (
            "own = llmkit.connect(shared=False)\n"
            "own.configure('mine', 'gpt-3', 'openai', {'base_url': 'http://127.0.0.1:9/v1', "
            "'api_key': 'env:CLASS_API_KEY'})\nown.load('mine', progress=False)"
        )
        assert "no environment variable CLASS_API_KEY" in kernel.run(own)


def test_no_other_account_of_the_host_finds_one(hub: Hub) -> None:
    if os.geteuid() != 0:
        pytest.skip("another account can be played by root alone")
    state = hub.folder / "service"
    # A student can go where the tests' own folder, which is closed to all others, does not let them.
    hub.folder.chmod(0o755)
    try:
        command = [sys.executable, "-c", LOOK, json.dumps([str(state), str(hub.run_dir)]), json.dumps(["x" * 99])]
        told = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=120).stdout)
        assert told["read"] > 10  # it does look: arguments and states of processes are everybody's to read
        assert told["refused"] > 10
        # The keys are given to it by standard input only now, so that its own arguments do not hold them.
        code = LOOK.replace("json.loads(sys.argv[2])", "json.loads(sys.stdin.read())")
        command = [sys.executable, "-c", code, json.dumps([str(state), str(hub.run_dir)])]
        done = subprocess.run(command, input=json.dumps(KEYS).encode(), check=True, capture_output=True, timeout=120)
        told = json.loads(done.stdout)
        assert told["found"] == []
    finally:
        hub.folder.chmod(0o700)


def test_what_is_on_disk_is_the_accounts_alone(hub: Hub) -> None:
    state = hub.folder / "service" / "state"
    holding = []
    for path in state.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path
        if path.is_file() and any(key.encode() in path.read_bytes() for key in KEYS):
            holding.append(path)
    # One place has the key that was typed in; the variable's is nowhere.
    assert len(holding) == 1
    assert RAW.encode() in holding[0].read_bytes()
    assert holding[0].suffix != ".sqlite"
    assert_no_key(hub.log)
