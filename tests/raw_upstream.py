"""A server of HTTP/1.1 by hand, in the test's own event loop: it counts connections, and says and closes what it likes.

Beside it stand a way to speak TLS with certificates of the test's own, and addresses where nothing answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

EVENT_STREAM: Final = "text/event-stream"
NAME: Final = "upstream.test"
"""The name in the certificates; no name server knows it."""
END_OF_CHUNKS: Final = b"0\r\n\r\n"

_CONFIGURATION: Final = """
[req]
distinguished_name = name
[name]
[authority]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[server]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = DNS:{name}, DNS:localhost, IP:127.0.0.1
"""


# -- what is said --------------------------------------------------------------------------------------------------


def head(*lines: str, status: str = "200 OK") -> bytes:
    """Give the head of an answer."""
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode()


def answer(body: bytes | dict[str, Any] = b"{}", *lines: str, status: str = "200 OK") -> bytes:
    """Give a whole answer with its length."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return head("Content-Type: application/json", f"Content-Length: {len(data)}", *lines, status=status) + data


def stream_head(*lines: str) -> bytes:
    """Give the head of a stream in chunks."""
    return head(f"Content-Type: {EVENT_STREAM}", "Transfer-Encoding: chunked", *lines)


def chunk(data: bytes) -> bytes:
    """Give one chunk of a stream."""
    return b"%x\r\n%b\r\n" % (len(data), data)


# -- the server ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A request as it came."""

    connection: int
    """The number of the connection it came on, from 1."""
    method: str
    target: str
    headers: dict[str, str]
    """With names in small letters."""
    body: bytes
    moment: float = field(default_factory=time.monotonic)


class Peer:
    """Whoever has connected."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.left = asyncio.Event()
        """Whether it was found, in `wait_left`, that the other side has closed."""

    async def send(self, data: bytes) -> None:
        """Send bytes as they are, and wait while the other side takes no more."""
        self.writer.write(data)
        await self.writer.drain()

    async def wait_left(self) -> None:
        """Wait until the other side closes the connection."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(1 << 16):
                pass
        self.left.set()

    def close(self) -> None:
        """Close the connection once everything is sent."""
        self.writer.close()


Respond = Callable[[Asked, Peer], Awaitable[None]]


def replies(*answers: bytes) -> Respond:
    """Answer with each of these in turn, and then with the last again and again."""
    left = list(answers)

    async def respond(asked: Asked, peer: Peer) -> None:
        del asked
        await peer.send(left.pop(0) if len(left) > 1 else left[0])

    return respond


async def hang_up(asked: Asked, peer: Peer) -> None:
    """Close the connection without a word."""
    del asked
    peer.close()


async def silence(asked: Asked, peer: Peer) -> None:
    """Say nothing until the other side leaves."""
    del asked
    await peer.wait_left()


class RawUpstream:
    """``async with RawUpstream(respond) as upstream:`` serves on ``127.0.0.1``, or on the unix socket ``uds``.

    With ``takes_bodies=False`` it is for `respond` to read the body of a request.
    """

    def __init__(
        self,
        respond: Respond,
        *,
        uds: Path | None = None,
        tls: ssl.SSLContext | None = None,
        takes_bodies: bool = True,
    ) -> None:
        self.respond = respond
        self.connections = 0
        self.asked: list[Asked] = []
        self.peers: list[Peer] = []
        self._uds = uds
        self._tls = tls
        self._takes_bodies = takes_bodies
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        if self._uds is not None:
            self._server = await asyncio.start_unix_server(self._accepted, self._uds, limit=1 << 20)
            self.port = 80
        else:
            self._server = await asyncio.start_server(self._accepted, "127.0.0.1", 0, limit=1 << 20, ssl=self._tls)
            self.port = int(self._server.sockets[0].getsockname()[1])
        self.origin = f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"
        self.base_url = f"{self.origin}/v1"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.connections += 1
        number = self.connections
        peer = Peer(reader, writer)
        self.peers.append(peer)
        try:
            while not writer.is_closing():
                asked = await _read_request(number, reader, with_body=self._takes_bodies)
                if asked is None:
                    break
                self.asked.append(asked)
                await self.respond(asked, peer)
        except (ConnectionError, asyncio.CancelledError):
            pass  # the other side has left, or the test is over
        finally:
            writer.close()
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await writer.wait_closed()


async def _read_request(number: int, reader: asyncio.StreamReader, *, with_body: bool) -> Asked | None:
    try:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
        body = await reader.readexactly(int(headers.get("content-length", 0)) if with_body else 0)
    except asyncio.IncompleteReadError:
        return None
    method, target, _ = first.split(" ")
    return Asked(number, method, target, headers, body)


def tunnel_to(port: int) -> Respond:
    """Do what a proxy does with CONNECT, whatever the name: hand everything on to a port of this machine."""

    async def respond(asked: Asked, peer: Peer) -> None:
        assert asked.method == "CONNECT"
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await peer.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
        try:
            await asyncio.gather(_hand_on(peer.reader, writer), _hand_on(reader, peer.writer))
        finally:
            writer.close()

    return respond


async def _hand_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


# -- where nothing answers -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def refusing() -> Iterator[socket.socket]:
    """Hold a port that refuses connections, until somebody listens on it."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held


@contextlib.asynccontextmanager
async def never_accepting() -> AsyncIterator[int]:
    """Hold a port whose queue of connections is full, so that one more is neither taken nor refused."""
    with contextlib.ExitStack() as held:
        listening = held.enter_context(socket.socket())
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        for _ in range(4):
            waiting = held.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listening.getsockname())
        await asyncio.sleep(0.05)
        yield int(listening.getsockname()[1])


# -- certificates --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Certificates:
    """An authority of the test's own, and what it has signed for `NAME`, ``localhost`` and 127.0.0.1."""

    authority: Path
    """A file with the authority's certificate."""
    folder: Path
    """A folder with the same, under the name that OpenSSL looks for."""
    server: Path
    """A file with a server's certificate and key."""

    def context(self) -> ssl.SSLContext:
        """Make what a server needs to speak TLS."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.server)
        return context


def make_certificates(folder: Path, authority_name: str = "authority of a test") -> Certificates:
    """Make an authority and a server's certificate with the ``openssl`` program."""
    configuration = folder / "openssl.cnf"
    configuration.write_text(_CONFIGURATION.format(name=NAME))
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-config", str(configuration))
    authority, authority_key = folder / "authority.pem", folder / "authority.key"
    _openssl(
        *("req", "-x509", *key, "-extensions", "authority", "-subj", f"/CN={authority_name}", "-days", "2"),
        *("-out", str(authority), "-keyout", str(authority_key)),
    )
    request, certificate, server_key = folder / "server.csr", folder / "server.crt", folder / "server.key"
    _openssl("req", *key, "-subj", f"/CN={NAME}", "-out", str(request), "-keyout", str(server_key))
    _openssl(
        *("x509", "-req", "-in", str(request), "-CA", str(authority), "-CAkey", str(authority_key), "-days", "2"),
        *("-CAcreateserial", "-extfile", str(configuration), "-extensions", "server", "-out", str(certificate)),
    )
    server = folder / "server.pem"
    server.write_bytes(certificate.read_bytes() + server_key.read_bytes())
    hashed = folder / "hashed"
    hashed.mkdir()
    number = _openssl("x509", "-hash", "-noout", "-in", str(authority)).strip()
    (hashed / f"{number}.0").write_bytes(authority.read_bytes())
    return Certificates(authority, hashed, server)


def _openssl(*arguments: str) -> str:
    return subprocess.run(["openssl", *arguments], check=True, capture_output=True, text=True).stdout
