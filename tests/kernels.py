"""A kernel that a real Jupyter server starts, as a front end uses it: over the server's own API."""

from __future__ import annotations

import json
import ssl
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import websocket

SECONDS = 60.0


class ServerKernel:
    """Starts a kernel and runs code in it; the end of the block ends the kernel.

    Parameters
    ----------
    url
        Base URL of the Jupyter server, with a slash at its end.
    token
        Opens it.
    name
        Which kernel; by default the server's own Python.
    certificate
        What an ``https`` server is trusted by.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        name: str | None = None,
        certificate: Path | None = None,
    ) -> None:
        self._url = url
        self._name = name
        self._headers = {"Authorization": f"token {token}"} if token else {}
        self._certificate = certificate
        self._http = httpx.Client(
            base_url=url,
            headers=self._headers,
            timeout=SECONDS,
            verify=ssl.create_default_context(cafile=certificate) if certificate else True,
            trust_env=False,
        )
        self._socket: websocket.WebSocket | None = None
        self._id = ""

    def __enter__(self) -> Self:
        answer = self._http.post("api/kernels", json={"name": self._name} if self._name else {})
        assert answer.status_code == 201, answer.text
        self._id = answer.json()["id"]
        self._socket = websocket.create_connection(
            f"{self._url.replace('http', 'ws', 1)}api/kernels/{self._id}/channels",
            header=self._headers,
            timeout=SECONDS,
            sslopt={"ca_certs": str(self._certificate)} if self._certificate else {},
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._socket is not None:
            self._socket.close()
        if self._id:
            self._http.delete(f"api/kernels/{self._id}")
        self._http.close()

    def run(self, code: str) -> str:
        """Run a cell; give what it printed, and its error if it ended with one."""
        said = ""
        for kind, content in self.messages(code):
            if kind == "stream":
                said += content["text"]
            elif kind == "error":
                said += f"{content['ename']}: {content['evalue']}"
        return said.strip()

    def messages(self, code: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Run a cell; give the type and content of every message about it, until it is done."""
        assert self._socket is not None
        request = uuid.uuid4().hex
        content = {"code": code, "silent": False, "store_history": True, "allow_stdin": False, "stop_on_error": True}
        header = {"msg_id": request, "msg_type": "execute_request", "session": "test", "username": "", "version": "5.3"}
        message = {"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell"}
        self._socket.send(json.dumps(message))
        while True:
            told = json.loads(self._socket.recv())
            if told["parent_header"].get("msg_id") != request:
                continue
            kind, content = told["header"]["msg_type"], told["content"]
            yield kind, content
            if kind == "status" and content["execution_state"] == "idle":
                return
