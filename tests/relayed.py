"""A real Jupyter server in front of a scripted upstream, and clients that do to it what real ones do."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import aiohttp
from benchmarks.processes import EXTENSIONS
from fake_engine_type import PLUGIN
from scripted_upstream import MODEL, ScriptedUpstream
from support import REPOSITORY, JupyterServer, wait_until
from yarl import URL

API = Literal["v1", "inference"]
Way = Literal["FIN", "RST", "half-close"]
PATHS: dict[API, str] = {"v1": "llm/v1/chat/completions", "inference": "llm/inference/"}
MODEL_ID = "m"
QUIET_SECONDS = 15.0
"""So long may it take until nothing is left of a load: idle connections to an engine are kept for some seconds."""


@dataclass(frozen=True)
class Held:
    """What a server holds."""

    tasks: int
    files: int
    tasks_by_name: dict[str, int]

    def within(self, before: Held) -> bool:
        """Say whether it is no more than before."""
        return self.tasks <= before.tasks and self.files <= before.files


class Relayed:
    """A server whose model ``m`` is the upstream."""

    def __init__(self, server: JupyterServer, upstream: ScriptedUpstream) -> None:
        self.server = server
        self.upstream = upstream
        assert server.process is not None
        self.pid = server.process.pid
        address = server.url.removeprefix("http://").partition("/")[0]
        self.port = int(address.rpartition(":")[2])

    # -- looking -------------------------------------------------------------------------------------------

    def model(self, model_id: str = MODEL_ID) -> dict[str, Any]:
        """Give the model as it is now."""
        told: dict[str, Any] = self.server.request("GET", f"llm/models/{model_id}").json()
        return told

    def probe(self) -> dict[str, Any]:
        """Give what the probe sees: tasks and buffers."""
        told: dict[str, Any] = self.server.request("GET", "probe").json()
        return told

    def held(self) -> Held:
        """Give what the server holds now."""
        tasks = self.probe()["tasks"]
        return Held(sum(tasks.values()), len(list(Path(f"/proc/{self.pid}/fd").iterdir())), tasks)

    def wait_until_quiet(self, before: Held) -> Held:
        """Wait until no request runs and nothing more is held than before; give what is."""
        wait_until(lambda: self.model()["in_flight"] == self.model()["queued"] == 0, "no request in flight", 5.0)
        held = before

        def quiet() -> bool:
            nonlocal held
            held = self.held()
            return held.within(before)

        try:
            wait_until(quiet, "what was held is given back", QUIET_SECONDS, 0.25)
        except AssertionError as error:
            error.add_note(f"before {before}, now {held}")
            raise
        return held

    def records(self, limit: int) -> list[dict[str, Any]]:
        """Give the last requests that are over."""
        answer = self.server.request("GET", f"llm/requests/?limit={limit}")
        assert answer.status_code == 200, answer.text
        recent: list[dict[str, Any]] = answer.json()["recent"]
        return recent

    # -- asking --------------------------------------------------------------------------------------------

    def url(self, path: str) -> URL:
        """Give an address below the base URL, which aiohttp would write in another way."""
        return URL(self.server.url + path, encoded=True)

    @property
    def headers(self) -> dict[str, str]:
        """What every client sends."""
        return {"Authorization": f"Bearer {self.server.token}"}

    def session(self, connections: int = 0) -> aiohttp.ClientSession:
        """Make a client with at most so many connections."""
        return aiohttp.ClientSession(
            headers=self.headers,
            connector=aiohttp.TCPConnector(limit=connections),
            timeout=aiohttp.ClientTimeout(total=60),
        )

    def raw(self, api: API, prompt: str, *, stream: bool, model_id: str = MODEL_ID) -> bytes:
        """Give a whole HTTP request."""
        body = json.dumps(body_of(api, prompt, stream=stream, model_id=model_id)).encode()
        path = self.server.base_url + PATHS[api]
        head = [
            f"POST {path} HTTP/1.1",
            "Host: 127.0.0.1",
            *(f"{name}: {value}" for name, value in self.headers.items()),
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
        ]
        return "\r\n".join(head).encode() + b"\r\n\r\n" + body


@contextmanager
def relayed(
    *,
    extensions: Sequence[str] = (),
    args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    plugin: bool = False,
    **fields: Any,
) -> Iterator[Relayed]:
    """Run a server with the model ``m``; `fields` are of its configuration.

    Parameters
    ----------
    extensions
        More server extensions: ``probe_extension``, ``bench_loop``.
    args, env
        More arguments and environment variables of the server.
    plugin
        Whether the model type ``fake`` is installed.
    """
    places = [str(REPOSITORY), PLUGIN["PYTHONPATH"] if plugin else str(Path(__file__).parent), str(EXTENSIONS)]
    kwargs = {"max_retries": 0, **fields.pop("model_kwargs", {})}
    with (
        ScriptedUpstream() as upstream,
        JupyterServer(
            args=[
                *(f"--ServerApp.jpserver_extensions={name}=True" for name in ("jupyter_server_ext", *extensions)),
                *args,
            ],
            env={"PYTHONPATH": os.pathsep.join(places), **(env or {})},
        ) as server,
    ):
        kwargs["base_url"] = upstream.base_url
        server.load(server.configure(MODEL_ID, model_name=MODEL, model_type="openai", model_kwargs=kwargs, **fields))
        yield Relayed(server, upstream)


def body_of(api: API, prompt: str, *, stream: bool, model_id: str = MODEL_ID) -> dict[str, Any]:
    """Give the body of a request."""
    if api == "v1":
        return {"model": model_id, "messages": [{"role": "user", "content": prompt}], "stream": stream}
    return {"model_id": model_id, "prompt": prompt, "inference_kwargs": {"stream": stream}}


class RawClient:
    """A connection of its own, which reads no more than it is told to, and leaves as it is told to."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.received = b""

    @classmethod
    async def connect(cls, port: int, request: bytes) -> Self:
        """Connect and send a request."""
        connection = socket.socket()
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(connection, ("127.0.0.1", port))
        await loop.sock_sendall(connection, request)
        return cls(connection)

    async def read(self) -> bytes:
        """Give what has come; nothing at the end."""
        data = await asyncio.get_running_loop().sock_recv(self.socket, 1 << 16)
        self.received += data
        return data

    async def read_chunks(self, count: int) -> None:
        """Read until so many events were seen."""
        while self.received.count(b"data: ") < count:
            assert await self.read(), self.received

    async def read_to_end(self) -> bytes:
        """Read until the server closes; give all of it."""
        while await self.read():
            pass
        return self.received

    def leave(self, way: Way) -> None:
        """Go away; after a half-close the other half is still there to be read."""
        if way == "half-close":
            self.socket.shutdown(socket.SHUT_WR)
            return
        if way == "RST":
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def close(self) -> None:
        """Close what is still open."""
        self.socket.close()
