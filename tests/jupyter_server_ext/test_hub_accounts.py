"""The Hub as it is meant to run: as root, with accounts of their own for the service and for each user.

Students look for the keys in a real kernel and a real terminal of their own server; `hostile_student` says how.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest
import websocket
from accounts import Accounts, why_not
from aiohttp import web
from hub import Hub
from hub_service import config, person, wait_for_service
from kernels import ServerKernel
from mock_upstream import ANSWER, MockUpstream, event
from support import START_SECONDS, free_port, wait_until

from llmkit.client import Client

pytestmark = [
    pytest.mark.hub,
    pytest.mark.timeout(8 * START_SECONDS),
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

KEY, RAW = f"sk-class-{secrets.token_hex(16)}", f"sk-typed-{secrets.token_hex(16)}"
CANARY = "everybody-can-read-this"
PROMPT = " ".join(["word"] * 400)
HOSTILE_SECONDS = 120.0
SETTINGS = """
c.JupyterHub.spawner_class = "jupyterhub.spawner.LocalProcessSpawner"
c.Spawner.cmd = [{python!r}, "-m", "jupyterhub.singleuser"]
c.Spawner.args = ["--LLMKitApp.standby=off"]
c.Spawner.env_keep = ["LANG"]
c.Spawner.environment["PATH"] = {path!r}
_service["user"] = "llmkit"
_service["environment"] = dict(PATH={path!r})
"""


class School(NamedTuple):
    """A Hub with accounts of their own for the service and two students; ada may load, too."""

    hub: Hub
    accounts: Accounts
    port: int

    @property
    def state_dir(self) -> Path:
        """Give where the service keeps configurations and keys, by default."""
        return self.accounts.home("llmkit") / ".local" / "share" / "jupyter" / "llmkit"

    @property
    def run_dir(self) -> Path:
        """Give where its sockets and logs are, by default."""
        return run_dir(self.accounts.uids["llmkit"])

    def service(self) -> psutil.Process:
        """Give the process of the service."""
        uid = self.accounts.uids["llmkit"]
        return next(
            p for p in self.accounts.processes() if p.uids().real == uid and "jupyter-llmkit" in " ".join(p.cmdline())
        )


def run_dir(uid: int) -> Path:
    return Path(f"/tmp/llmkit-{uid}")


class Indiscreet(MockUpstream):
    """Takes the key of the class; of the other one it says, where it is asked something, which it was."""

    def __init__(self) -> None:
        super().__init__()
        self.respond = self._tell

    async def _tell(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse | None:
        given = request.headers.get("Authorization", "")
        if given == f"Bearer {KEY}" or (request.path == "/v1/models" and given == f"Bearer {RAW}"):
            return None
        said = {"error": {"message": f"Incorrect API key provided: {given}", "param": given}}
        if not body.get("stream"):
            return web.json_response(said, status=401, headers={"X-Key": given})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "X-Key": given})
        await response.prepare(request)
        await response.write(event(said))
        return response


@pytest.fixture(scope="module")
def upstream() -> Iterator[MockUpstream]:
    with Indiscreet() as running:
        yield running


@pytest.fixture(scope="module")
def school() -> Iterator[School]:
    port = free_port()
    hub = Hub(config(port))
    uids: list[int] = []
    try:
        # The folder of a Hub may be open; what lies in it and is secret, is not.
        hub.folder.chmod(0o755)
        (hub.folder / "readable").write_text(CANARY)
        try:
            accounts = Accounts(hub.folder, "llmkit", "sam", "ada")
        except LookupError as error:
            pytest.skip(str(error))
        uids += accounts.uids.values()
        file = hub.folder / "jupyterhub_config.py"
        file.chmod(0o600)
        settings = SETTINGS.format(python=str(accounts.python), path=accounts.path)
        file.write_text(file.read_text() + accounts.table() + settings)
        # As documented: JupyterHub's database, which it makes readable for all, keeps the `environment` of a service.
        own = accounts.home("llmkit") / ".jupyter" / "jupyter_llmkit_config.py"
        own.parent.mkdir(mode=0o700)
        own.write_text(f"import os\nos.environ['CLASS_API_KEY'] = {KEY!r}\n")
        own.chmod(0o600)
        for path in (own.parent, own):
            os.chown(path, accounts.uids["llmkit"], accounts.uids["llmkit"])
        with hub:
            wait_for_service(hub)
            yield School(hub, accounts, port)
    finally:
        hub.close()
        for uid in uids:
            shutil.rmtree(run_dir(uid), ignore_errors=True)


@pytest.fixture(scope="module")
def teacher(school: School, upstream: MockUpstream) -> Iterator[Client]:
    """Give the service both kinds of keys, and an engine with a unix socket."""
    with person(school.hub, "grace") as client:
        client.configure("gpt", "gpt-3", "openai", {"base_url": upstream.base_url, "api_key": "env:CLASS_API_KEY"})
        # The endpoint does not take this one, and says it again in its answer.
        client.configure("typed", "gpt-3", "openai", {"base_url": upstream.base_url, "api_key": RAW})
        client.configure("engine", "any --tokens-per-second=2", "fake")
        for model_id in ("gpt", "typed", "engine"):
            client.load(model_id, progress=False)
        yield client


@pytest.fixture(scope="module")
def servers(school: School) -> dict[str, str]:
    return {name: school.hub.start_server(name) for name in ("sam", "ada")}


def test_all_works_as_it_does_with_one_account(school: School, teacher: Client, servers: dict[str, str]) -> None:
    hub, accounts, _ = school
    with ServerKernel(servers["sam"], hub.token) as kernel:
        assert kernel.run("import os, llmkit\nprint({os.getuid(), os.getgid(), *os.getgroups()})") == (
            f"{{{accounts.uids['sam']}}}"
        )
        assert kernel.run("shared = llmkit.connect()\nprint(shared.place)") == f"{hub.url}services/llmkit/ (shared)"
        assert kernel.run("print(shared.prompt('gpt', 'Hello'))") == ANSWER
        asked = "shared.openai().chat.completions.create(model='gpt', stream=True, messages=messages)"
        streamed = (
            f"messages = [{{'role': 'user', 'content': 'Hello'}}]\n"
            f"pieces = [one.choices[0].delta.content or '' for one in {asked} if one.choices]\n"
            "print(len(pieces) > 2, ''.join(pieces))"
        )
        assert kernel.run(streamed) == f"True {ANSWER}"
        assert kernel.run("own = llmkit.connect(shared=False)\nprint(own.health().status, len(own.models()))") == "ok 0"
    assert school.service().uids().real == accounts.uids["llmkit"]
    # What it has written is its account's alone, whatever the umask of the Hub is.
    written = [*school.state_dir.rglob("*"), school.state_dir, *school.run_dir.rglob("*"), school.run_dir]
    assert any(path.is_socket() for path in written)
    for path in written:
        found = path.lstat()
        assert found.st_uid == accounts.uids["llmkit"], path
        is_open = 0 if path.is_dir() or path.is_relative_to(school.state_dir) else found.st_mode & 0o077
        assert stat.S_IMODE(found.st_mode) & 0o077 == is_open, path
    assert not re.search(r"permission ?(denied|error)|not permitted|traceback", hub.log, re.IGNORECASE), hub.log


def test_hostile_students_find_nothing(school: School, teacher: Client, servers: dict[str, str]) -> None:
    hub, accounts, port = school
    token = school.service().environ()["JUPYTERHUB_API_TOKEN"]
    looked_for = [KEY, RAW, token, hub.token, teacher.connection.server.token]
    assert all(looked_for)
    secret_files = [path for path in school.state_dir.rglob("*") if path.is_file()]
    secret_files.sort(key=lambda path: RAW.encode() not in path.read_bytes())  # first what holds the key
    sockets = [path for path in school.run_dir.rglob("*") if not path.is_dir()]
    root = school.service().parent()
    assert root is not None
    proxys = re.search(r'api_url = "(.*?)"', (hub.folder / "jupyterhub_config.py").read_text())
    assert proxys is not None
    with teacher.stream("engine", PROMPT, request_id="others") as stream:
        next(iter(stream))
        for name, url in servers.items():
            uid, home = accounts.uids[name], accounts.home(name)
            pids = [one.pid for one in (root, *root.children(recursive=True)) if one.uids().real != uid]
            task = {
                "loot": str(home / "loot"),
                "done": str(home / "done"),
                "folders": [str(hub.folder), "/dev/shm", *(str(run_dir(one)) for one in accounts.uids.values())],
                "files": [str(path) for path in (*secret_files, *sockets, hub.folder / "hub.sqlite")],
                "sockets": [str(path) for path in sockets if path.is_socket()],
                "pids": pids,
                "port": port,
                "uid": accounts.uids["llmkit"],
                "proxy_api": proxys[1],
                "state_dir": str(school.state_dir),
                "run_dir": str(school.run_dir),
                "ids": {one: teacher.model(one).config_id for one in ("gpt", "typed")},
            }
            assert pids
            assert task["sockets"]
            file = home / "task.json"
            file.write_text(json.dumps(task))
            look = in_terminal if name == "sam" else in_kernel
            said = look(url, hub.token, accounts.python, file)
            assert (home / "done").exists(), said
            told = json.loads((home / "done").read_text())
            loot = (home / "loot").read_bytes()
            print(
                f"{name}: {told['read']} files, {told['refused']} refused, {told['asked']} requests, {len(loot)} bytes"
            )
            assert told["got"] == []
            # It does look: what can be read is found.
            assert CANARY.encode() in loot
            assert f"JUPYTERHUB_USER={name}".encode() in loot
            assert b"jupyter-llmkit" in loot
            assert told["refused"] > 100
            assert told["asked"] > 100
            for one in looked_for:
                place = loot.find(one.encode())
                # Where it was: the name of what was read stands before it.
                assert place < 0, loot[loot.rindex(b"\n== ", 0, place) :][:200]
        assert "others" in [one.request_id for one in teacher.requests().running]
    assert not any(one in hub.log for one in looked_for)
    assert {one.status for one in teacher.models()} == {"loaded"}


def in_terminal(url: str, token: str, python: Path, task: Path) -> str:
    """Be hostile in a terminal of a user's server; give what it showed."""
    headers = {"Authorization": f"token {token}"}
    name = httpx.post(f"{url}api/terminals", headers=headers, trust_env=False, timeout=60).json()["name"]
    said = ""
    address = f"{url.replace('http', 'ws', 1)}terminals/websocket/{name}"
    connection = websocket.create_connection(address, header=headers, timeout=HOSTILE_SECONDS)
    try:
        connection.send(json.dumps(["stdin", f"{python} -m hostile_student {task}; exit\r"]))
        while (told := json.loads(connection.recv()))[0] != "disconnect":
            said += str(told[1]) if told[0] == "stdout" else ""
    finally:
        connection.close()
    return said


def in_kernel(url: str, token: str, _: Path, task: Path) -> str:
    """Be hostile in a kernel of a user's server, in the kernel's own process; give what it printed."""
    with ServerKernel(url, token) as kernel:
        return kernel.run(f"import hostile_student\nhostile_student.main({str(task)!r})")


def test_the_end_of_the_hub_leaves_nothing(school: School, teacher: Client, servers: dict[str, str]) -> None:
    hub, accounts, _ = school
    assert len(accounts.processes()) > 4
    assert {process.uids().real for process in accounts.processes()} == set(accounts.uids.values())
    hub.stop()
    wait_until(lambda: not accounts.processes(), "the end of all their processes", 15)
    assert not hub.killed
    assert not re.search(r"permission ?(denied|error)|not permitted", hub.log, re.IGNORECASE), hub.log
    # A student's server, which JupyterHub interrupts, leaves its empty folder to its next start.
    theirs = {run_dir(uid) for uid in accounts.uids.values()}
    left = {
        path
        for folder in ("/dev/shm", "/tmp")
        for path in Path(folder).iterdir()
        if path.lstat().st_uid in accounts.uids.values()
    }
    assert left <= theirs
    assert list(school.run_dir.iterdir()) == []
