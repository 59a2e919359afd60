"""What people do to a server, all at once and for as long as it is wanted; each kind of work is a thread."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import psutil
import websocket
from relayed import API, RawClient, Relayed, Way, body_of
from scripted_upstream import MODEL, prompt

from llmkit.client import Watcher, connect

GONE: Final = frozenset({404, 409, 429, 502, 503, 504})
"""Answers of a model that is killed and unloaded all the time."""
APIS: Final[tuple[API, ...]] = ("v1", "inference")
WAYS: Final[tuple[Way, ...]] = ("FIN", "RST", "half-close")
KERNEL_SECONDS: Final = 60.0
PANEL: Final = """
import llmkit
from llmkit.client import Watcher
client = llmkit.connect()
panel = llmkit.panel(client)
watcher = Watcher(client)
answer = client.prompt("m", "plain")
print(len(client.models()) > 0, str(answer) != "")
"""


@dataclass
class Work:
    """All kinds of work on one server.

    Attributes
    ----------
    engines
        Fields of the configurations of the models that are loaded, killed and unloaded; all of one model type.
    load_seconds
        So long may a load take.
    """

    running: Relayed
    engines: dict[str, dict[str, Any]]
    load_seconds: float
    seed: int = 0
    done: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.server = self.running.server
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        for model_id, fields in self.engines.items():
            self.server.configure(model_id, restart="on_failure", **fields)

    def start(self) -> None:
        """Begin."""
        self._stop.clear()
        kinds: list[Callable[[random.Random], None]] = [
            self.read_streams, self.read_streams, self.leave, self.leave, self.configure, self.converse, self.look_on,
            self.use_kernels, *(self.life_of(model_id) for model_id in self.engines),
            *(self.ask_what_dies(model_id) for model_id in self.engines),
        ]  # fmt: skip
        self._threads = [
            threading.Thread(target=self._repeat, args=(kind, random.Random(self.seed * 100 + number)), daemon=True)
            for number, kind in enumerate(kinds)
        ]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Let what runs come to its end, and unload all that was loaded; it may take as long as a load."""
        self._stop.set()
        deadline = time.monotonic() + self.load_seconds + KERNEL_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                self.errors.append(f"{thread.name} does not end")
        for model_id in self.engines:
            self.unload(model_id)

    def _repeat(self, kind: Callable[[random.Random], None], chance: random.Random) -> None:
        name = getattr(kind, "__name__", "work")
        threading.current_thread().name = name
        while not self._stop.is_set():
            try:
                kind(chance)
            except Exception as error:  # noqa: BLE001  # whatever it is, the run goes on and tells it at the end
                self.errors.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
                self._stop.wait(1)
            self._stop.wait(chance.uniform(0.02, 0.15))

    def _expect(self, answer: httpx.Response, *statuses: int) -> httpx.Response:
        if answer.status_code not in statuses:
            raise AssertionError(
                f"{answer.request.method} {answer.request.url.path}: {answer.status_code} {answer.text[:200]}"
            )
        return answer

    # -- prompts -------------------------------------------------------------------------------------------

    def read_streams(self, chance: random.Random) -> None:
        """Read a stream to its end, or a whole answer."""
        api = chance.choice(APIS)
        words = prompt("stream", count=chance.randint(1, 60), pause=0.005)
        body = body_of(api, words, stream=True)
        path = "llm/v1/chat/completions" if api == "v1" else "llm/inference/"
        answer = self._expect(self.server.request("POST", path, json=body), 200)
        if not answer.text.rstrip().endswith("data: [DONE]"):
            raise AssertionError(f"a stream without its end: {answer.text[-200:]}")
        self._expect(self.server.request("POST", path, json=body_of(api, "plain", stream=False)), 200)
        self.done["streams"] += 1

    def leave(self, chance: random.Random) -> None:
        """Leave a stream at a random token."""

        async def begin_and_leave() -> None:
            words = prompt("stream", count=500, pause=0.01)
            request = self.running.raw(chance.choice(APIS), words, stream=True)
            client = await RawClient.connect(self.running.port, request)
            try:
                async with asyncio.timeout(30):
                    await client.read_chunks(chance.randint(1, 30))
                client.leave(chance.choice(WAYS))
                await asyncio.sleep(chance.uniform(0, 0.1))
            finally:
                client.close()

        asyncio.run(begin_and_leave())
        self.done["left streams"] += 1

    def ask_what_dies(self, model_id: str) -> Callable[[random.Random], None]:
        """Make the work of asking a model that is killed and unloaded at any time."""

        def ask_what_dies(chance: random.Random) -> None:
            body = {
                "model_id": model_id,
                "prompt": "What is the capital of France?",
                "inference_kwargs": {"stream": True},
            }
            answer = self.server.request("POST", "llm/inference/", json=body, timeout=self.load_seconds)
            self._expect(answer, 200, *GONE)
            self.done["answers" if "[DONE]" in answer.text else "answers that ended early"] += 1
            if answer.status_code in GONE:
                self._stop.wait(chance.uniform(0.1, 0.5))

        return ask_what_dies

    # -- engines -------------------------------------------------------------------------------------------

    def life_of(self, model_id: str) -> Callable[[random.Random], None]:
        """Make the work of loading a model and ending it in one of the ways that there are."""

        def life(chance: random.Random) -> None:
            config_id = self._model(model_id)["config_id"]
            path = f"llm/load_model/{config_id}"
            if chance.random() < 0.3:
                self._expect(self.server.request("POST", f"{path}?wait=false"), 200, 202, 409)
                self._stop.wait(chance.uniform(0, 1.0))
                self.unload(model_id)
                self.done["cancelled loads"] += 1
                return
            answer = self.server.request("POST", path, timeout=self.load_seconds)
            self._expect(answer, 200, 409, 500, 502, 503)
            self.done["loads" if answer.status_code == 200 else "failed loads"] += 1
            self._stop.wait(chance.uniform(0.5, 3.0))
            if chance.random() < 0.5:
                self.kill_an_engine(model_id, chance)
            else:
                self.unload(model_id)
                self.done["unloads"] += 1

        return life

    def kill_an_engine(self, model_id: str, chance: random.Random) -> None:
        """Kill one process of an engine, and wait until the server has seen it."""
        if self._model(model_id)["status"] != "loaded":
            return
        victims = [process for process in self.server.engine_processes() if not _keeps_shared_memory(process)]
        if not victims:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            chance.choice(victims).send_signal(signal.SIGKILL)
        self.done["kills"] += 1
        self._stop.wait(chance.uniform(0, 2.0))

    def unload(self, model_id: str) -> None:
        """Unload a model, whatever it does; one that is not loaded is none to unload."""
        answer = self.server.request("POST", f"llm/unload_model/{model_id}", timeout=self.load_seconds)
        self._expect(answer, 200, 404, 409)

    def _model(self, model_id: str) -> dict[str, Any]:
        return dict(self._expect(self.server.request("GET", f"llm/models/{model_id}"), 200).json())

    # -- everything else -----------------------------------------------------------------------------------

    def configure(self, chance: random.Random) -> None:
        """Configure a model with a key, change it, load it, ask it, and delete it."""
        model_id = f"c-{chance.getrandbits(64):x}"
        kwargs = {
            "base_url": self.running.upstream.base_url,
            "api_key": f"sk-{chance.getrandbits(128):x}",
            "max_retries": 0,
        }
        fields = {"model_name": MODEL, "model_type": "openai", "model_kwargs": kwargs}
        config_id = self.server.configure(model_id, **fields)
        path = f"llm/configuration/{config_id}"
        stored = self._expect(self.server.request("GET", path), 200).json()
        self._expect(self.server.request("PUT", path, json={**stored, "description": "changed"}), 200)
        self.server.load(config_id)
        self._expect(
            self.server.request(
                "POST", "llm/inference/", json=body_of("inference", "plain", stream=False, model_id=model_id)
            ),
            200,
        )
        self._expect(self.server.request("DELETE", f"{path}?unload=true"), 200)
        self.done["configurations"] += 1

    def converse(self, chance: random.Random) -> None:
        """Keep a conversation, grow it, read it; some are deleted, the others go when there are too many."""
        name = f"t-{chance.getrandbits(64):x}"
        turn = {"model_id": "m", "prompt": "word " * 1000, "response": "word " * 1000}
        for turns in (1, 2):
            body = {"title": name, "turns": [turn] * turns}
            self._expect(self.server.request("PUT", f"llm/conversations/{name}", json=body), 200)
        self._expect(self.server.request("GET", f"llm/conversations/{name}"), 200, 404)
        if chance.random() < 0.3:
            self._expect(self.server.request("DELETE", f"llm/conversations/{name}"), 200, 404)
        self.done["conversations"] += 1

    def look_on(self, chance: random.Random) -> None:
        """Follow the models for a moment, as a panel does, and look at everything that can be looked at."""
        with connect(self.server.url, self.server.token) as client:
            watcher = Watcher(client)
            try:
                for path in (
                    "models/",
                    "requests/?limit=50",
                    "devices",
                    "health",
                    "configurations",
                    "model_types/",
                    "v1/models",
                ):
                    self._expect(self.server.request("GET", f"llm/{path}"), 200)
                for model_id in self.engines:
                    self._expect(self.server.request("GET", f"llm/models/{model_id}/logs?tail=50"), 200)
                self._expect(self.server.request("GET", "metrics"), 200)
                self._stop.wait(chance.uniform(0, 1.0))
            finally:
                watcher.close()
        self.done["looks"] += 1

    def use_kernels(self, chance: random.Random) -> None:
        """Start a kernel of the server with a panel in it, restart it once, and shut it down."""
        answer = self.server.request("POST", "api/kernels", json={"name": "python3"}, timeout=KERNEL_SECONDS)
        kernel_id = self._expect(answer, 201).json()["id"]
        try:
            self.run_in_kernel(kernel_id, PANEL)
            if not self._stop.is_set():
                answer = self.server.request("POST", f"api/kernels/{kernel_id}/restart", timeout=KERNEL_SECONDS)
                self._expect(answer, 200)
                self.run_in_kernel(kernel_id, PANEL)
                self.done["kernel restarts"] += 1
            self._stop.wait(chance.uniform(0, 1.0))
        finally:
            self._expect(self.server.request("DELETE", f"api/kernels/{kernel_id}", timeout=KERNEL_SECONDS), 204)
        self.done["kernels"] += 1

    def run_in_kernel(self, kernel_id: str, code: str) -> None:
        """Run code in a kernel of the server, and see that it works."""
        address = urlsplit(self.server.url)
        url = f"ws://{address.netloc}{address.path}api/kernels/{kernel_id}/channels"
        header = {"Authorization": f"token {self.server.token}"}
        message_id = base64.b16encode(random.randbytes(8)).decode()
        head = {"msg_id": message_id, "msg_type": "execute_request", "session": message_id, "version": "5.3"}
        content = {"code": code, "silent": False, "store_history": False, "user_expressions": {}, "allow_stdin": False}
        message = {
            "header": {**head, "username": ""},
            "parent_header": {},
            "metadata": {},
            "channel": "shell",
            "content": content,
        }
        line = websocket.create_connection(url, header=header, timeout=KERNEL_SECONDS)
        try:
            line.send(json.dumps(message))
            deadline = time.monotonic() + KERNEL_SECONDS
            while time.monotonic() < deadline:
                told = json.loads(line.recv())
                if told["msg_type"] == "execute_reply" and told["parent_header"].get("msg_id") == message_id:
                    if told["content"]["status"] != "ok":
                        raise AssertionError(f"a kernel failed: {told['content']}")
                    return
            raise AssertionError("a kernel did not answer")
        finally:
            line.close()


def _keeps_shared_memory(process: psutil.Process) -> bool:
    """Say whether it is Python's own process that removes what killed ones leave in shared memory."""
    try:
        return "resource_tracker" in " ".join(process.cmdline())
    except psutil.Error:
        return True
