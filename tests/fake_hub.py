"""A hub that speaks as much of Hugging Face's as its real library asks for, with models out of folders."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PIECE_BYTES = 1 << 16


class FakeHub:
    """Serves models until the block ends.

    Parameters
    ----------
    models
        The folder of each model, by its name.

    Attributes
    ----------
    gated
        Names of models that one has to ask for.
    bytes_per_second
        How fast files come; None is as fast as can be.
    bytes_per_answer
        After so many bytes of a file the line breaks; None is never.
    busy
        So many questions for a file are answered with 503 first.
    asked
        Method, path and Authorization header of every request.
    """

    def __init__(self, models: dict[str, Path]) -> None:
        self.models = models
        self.gated: set[str] = set()
        self.bytes_per_second: float | None = None
        self.bytes_per_answer: int | None = None
        self.busy = 0
        self.asked: list[tuple[str, str, str | None]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.asked.append((self.command, self.path, self.headers.get("Authorization")))
                path = unquote(self.path.split("?")[0])
                name = "/".join(path.removeprefix("/api/models").strip("/").split("/")[:2])
                if name not in hub.models:
                    self._refuse(404, "RepoNotFound", "Repository not found")
                elif name in hub.gated:
                    self._refuse(403, "GatedRepo", "Access to this model is restricted")
                elif path.startswith(f"/api/models/{name}/tree/"):
                    self._send(json.dumps(hub.tree(name)).encode(), "application/json")
                elif path.startswith("/api/models/"):
                    revision = path.partition("/revision/")[2] or "main"
                    if revision in ("main", COMMIT):
                        self._send(json.dumps(hub.describe(name)).encode(), "application/json")
                    else:
                        self._refuse(404, "RevisionNotFound", "Invalid rev id")
                else:
                    file = hub.models[name] / path.rsplit("/", 1)[1]
                    if hub.busy and self.command == "GET" and file.suffix == ".safetensors":
                        hub.busy -= 1
                        self._refuse(503, "", "busy")
                    elif file.is_file():
                        self._send_file(file)
                    else:
                        self._refuse(404, "EntryNotFound", "Entry not found")

            do_HEAD = do_GET  # noqa: N815  # a name of http.server

            def _refuse(self, status: int, code: str, words: str) -> None:
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                self.send_header("X-Error-Message", words)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def _send(self, data: bytes, content_type: str) -> None:
                self.send_response(200)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(data)

            def _send_file(self, file: Path) -> None:
                data = file.read_bytes()
                start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0] or 0)
                self.send_response(206 if start else 200)
                self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", str(len(data) - start))
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
                self.end_headers()
                if self.command == "GET":
                    for at in range(start, len(data), PIECE_BYTES):
                        if hub.bytes_per_answer is not None and at - start >= hub.bytes_per_answer:
                            self.close_connection = True
                            return
                        self.wfile.write(data[at : at + PIECE_BYTES])
                        if hub.bytes_per_second:
                            time.sleep(PIECE_BYTES / hub.bytes_per_second)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def describe(self, name: str) -> dict[str, object]:
        files = sorted(path for path in self.models[name].iterdir() if path.is_file())
        siblings = [
            {"rfilename": path.name, "size": path.stat().st_size, "blobId": "0", **self._large(path)} for path in files
        ]
        return {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}

    def _large(self, path: Path) -> dict[str, object]:
        """Give what the hub says of weights, which it keeps by their SHA-256."""
        if path.suffix != ".safetensors":
            return {}
        data = path.read_bytes()
        return {"lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}}

    def tree(self, name: str) -> list[dict[str, object]]:
        files = sorted(path for path in self.models[name].iterdir() if path.is_file())
        return [{"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0"} for path in files]

    def environment(self, home: Path) -> dict[str, str]:
        """Give what leads the real library here."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
