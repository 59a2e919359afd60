"""A web server that answers as a test tells it, and a client of the session's real server."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from mock_upstream import MockUpstream
from support import JupyterServer

from llmkit.client import Client, connect
from llmkit.schemas import API_VERSION

HEALTH = {"status": "ok", "version": "0.1.0", "api_version": API_VERSION, "epoch": "e1", "problems": []}
Reply = tuple[int, Any] | tuple[int, Any, dict[str, str]]


class Asked(NamedTuple):
    """A request that the fake server got."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any


class FakeServer:
    """Answers from `replies`, by method and path; what is not there is Jupyter's own 404 page."""

    def __init__(self, certificate: Path | None = None) -> None:
        self.asked: list[Asked] = []
        self.replies: dict[tuple[str, str], Reply | Callable[[Asked], Reply]] = {
            ("GET", "/api"): (200, {"version": "2.21.1"}),
            ("GET", "/llm/health"): (200, HEALTH),
        }
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                asked = Asked(self.command, self.path, dict(self.headers), json.loads(body) if body else None)
                fake.asked.append(asked)
                reply = fake.replies.get((self.command, self.path.split("?")[0]), (404, "<html>Not Found</html>"))
                status, content, *headers = reply(asked) if callable(reply) else reply
                data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in (headers[0] if headers else {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815  # names of http.server

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = f"{'https' if certificate else 'http'}://127.0.0.1:{self._server.server_address[1]}/"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.close()


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """Give a certificate of localhost, signed by itself, for this test alone, and its key."""
    file = tmp_path / "certificate.pem"
    file.write_text(CERTIFICATE)
    return file


@pytest.fixture
def https_fake(certificate: Path) -> Iterator[FakeServer]:
    server = FakeServer(certificate)
    yield server
    server.close()


@pytest.fixture
def upstream() -> Iterator[MockUpstream]:
    with MockUpstream() as running:
        yield running


@pytest.fixture
def client(server: JupyterServer) -> Iterator[Client]:
    """Give a client of the real server; the models that it makes are deleted."""
    with connect(server.url, server.token) as connected:
        before = {model.model_id for model in connected.models()}
        yield connected
        for model in connected.models():
            if model.model_id not in before:
                connected.delete(model.model_id, unload=True)


# Valid from 2020 to 2120; opens nothing but the fake server above.
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBjjCCATSgAwIBAgIUIZdfFGaWJUuYUZCblHB63/14kPwwCgYIKoZIzj0EAwIw
FjEUMBIGA1UEAwwLbGxta2l0IHRlc3QwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAx
MDEwMDAwMDBaMBYxFDASBgNVBAMMC2xsbWtpdCB0ZXN0MFkwEwYHKoZIzj0CAQYI
KoZIzj0DAQcDQgAEf9GJ8OsvIJvQD3U6s3+I3u0IEaZ0SdUEIE81pJOWSU83CKZI
YgrZghAas+LhUMz4v0LBMu17PZJTCfEQEC8ZoqNeMFwwGgYDVR0RBBMwEYIJbG9j
YWxob3N0hwR/AAABMA8GA1UdEwEB/wQFMAMBAf8wDgYDVR0PAQH/BAQDAgKEMB0G
A1UdDgQWBBQcAv1p7vwLfjGtM3fZDpGnoxl3nTAKBggqhkjOPQQDAgNIADBFAiAj
xpSZX/MRgek2gba0bSP9Lvq761rO2QluRRDej11kMgIhANpJW4AHX+3Y9VG1vR9P
67VXPM91sdMelvJBPK4+ednQ
-----END CERTIFICATE-----
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgoscuaBmcSvWa01CK
zTMGSNjIwpI8eK9PN9G9OUsGhOShRANCAAR/0Ynw6y8gm9APdTqzf4je7QgRpnRJ
1QQgTzWkk5ZJTzcIpkhiCtmCEBqz4uFQzPi/QsEy7Xs9klMJ8RAQLxmi
-----END PRIVATE KEY-----
"""
