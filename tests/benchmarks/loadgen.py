"""The load generator, a process of its own: ``python -m benchmarks.loadgen``.

It reads one job a line as JSON and prints one result a line, until standard input ends. It speaks just enough
HTTP/1.1 to be far cheaper than anything it measures: prepared requests on connections that are kept, one answer
each with a ``Content-Length`` or in chunks. Every answer is checked; one that is equal to the last good one is good.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict, dataclass, field
from time import perf_counter, process_time
from typing import Any, cast

from benchmarks.accounting import cpu_seconds
from benchmarks.loops import new_loop
from benchmarks.payloads import CHECKS

CONNECT_SECONDS = 20.0
DRAIN_SECONDS = 60.0
MOST_REASONS = 3


@dataclass
class Job:
    """What to do: `clients` connections that send `request` again and again."""

    request: str
    check: str
    clients: int
    warmup: float
    seconds: float
    port: int = 0
    unix: str | None = None
    pids: list[int] = field(default_factory=list)
    helpers: list[int] = field(default_factory=list)


@dataclass
class Result:
    """What came of it. `progress` counts parts of answers too: bytes in the window, by the bytes of a whole one."""

    completed: int
    progress: float
    seconds: float
    latencies: list[float]
    first: list[float]
    parts: float
    cpu: float
    helpers_cpu: float
    generator_cpu: float
    failures: int
    reasons: list[str]


class Run:
    """One job under way."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.request = job.request.encode()
        self.check = CHECKS[job.check]
        self.good = b""
        self.wanted = True
        self.began = float("inf")
        self.bytes = self.completed = self.failures = 0
        self.whole = self.whole_bytes = self.whole_parts = 0
        self.latencies: list[float] = []
        self.first: list[float] = []
        self.reasons: list[str] = []

    def fail(self, reason: str) -> None:
        """Note a failed request; the run goes to its end, but it has failed."""
        self.failures += 1
        if len(self.reasons) < MOST_REASONS:
            self.reasons.append(reason)

    def usage(self) -> tuple[float, float, float]:
        """Give the processor time of contender, of other processes and of this one."""
        return cpu_seconds(self.job.pids), cpu_seconds(self.job.helpers), process_time()

    async def run(self) -> Result:
        """Warm up, measure, let the requests that are under way finish."""
        loop = asyncio.get_running_loop()
        job = self.job
        async with asyncio.timeout(CONNECT_SECONDS):
            if job.unix:
                opening = [loop.create_unix_connection(lambda: Client(self), job.unix) for _ in range(job.clients)]
            else:
                opening = [
                    loop.create_connection(lambda: Client(self), "127.0.0.1", job.port) for _ in range(job.clients)
                ]
            clients = [client for _, client in await asyncio.gather(*opening)]
        for client in clients:
            client.send()
        await asyncio.sleep(job.warmup)
        before, self.began = self.usage(), perf_counter()
        self.bytes = self.completed = 0
        await asyncio.sleep(job.seconds)
        after, seconds = self.usage(), perf_counter() - self.began
        received, completed, self.wanted = self.bytes, self.completed, False
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                await asyncio.gather(*(client.closed for client in clients))
        except TimeoutError:
            self.fail(f"requests that had no end within {DRAIN_SECONDS:g} s")
        used = [late - early for early, late in zip(before, after, strict=True)]
        whole = max(1, self.whole)
        return Result(
            completed=completed,
            progress=received / (self.whole_bytes / whole) if self.whole_bytes else 0.0,
            seconds=seconds,
            latencies=self.latencies,
            first=self.first,
            parts=self.whole_parts / whole,
            cpu=used[0],
            helpers_cpu=used[1],
            generator_cpu=used[2],
            failures=self.failures,
            reasons=self.reasons,
        )


class Client(asyncio.Protocol):
    """One connection, with one request at a time."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport | None = None
        self.busy = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance

    def connection_lost(self, exc: Exception | None) -> None:
        if self.busy:
            self.run.fail(f"the connection was closed during a request: {exc or 'by the server'}")
        if not self.closed.done():
            self.closed.set_result(None)

    def send(self) -> None:
        """Send the next request, or close if there shall be none."""
        assert self.transport
        if not self.run.wanted:
            self.transport.close()
            return
        self.busy = True
        self.head = b""
        self.parts: list[bytes] = []
        self.received = 0
        self.length = -1
        self.tail = b""
        self.first_at = 0.0
        self.sent_at = perf_counter()
        self.transport.write(self.run.request)

    def data_received(self, data: bytes) -> None:
        if not self.busy:
            self._give_up(f"more than was asked for: {data[:200]!r}")
            return
        if not self.parts:
            if (read := self._read_head(data)) is None:
                return
            data = read
            self.first_at = perf_counter()
        self.parts.append(data)
        self.received += len(data)
        self.run.bytes += len(data)
        if self.length >= 0:
            if self.received >= self.length:
                self._complete(b"".join(self.parts))
            return
        self.tail = data[-5:] if len(data) >= 5 else (self.tail + data)[-5:]
        # A chunk's length, its bytes and its end cannot look like this in server-sent events, which have no CR.
        if self.tail == b"0\r\n\r\n":
            self._complete(self._without_framing())

    def _read_head(self, data: bytes) -> bytes | None:
        """Read status and headers, once for an answer; give what is there of the body, None for nothing yet."""
        if self.length == -1:
            self.head += data
            head, end, data = self.head.partition(b"\r\n\r\n")
            if not end:
                return None
            low = head.lower()
            if head[9:12] != b"200":
                status = head.split(b"\r\n")[0].decode()
                self._give_up(f"{status}: {data[:300].decode(errors='replace')}")
                return None
            before, found, rest = low.partition(b"\r\ncontent-length:")
            if found:
                self.length = int(rest.partition(b"\r\n")[0])
            elif b"\r\ntransfer-encoding: chunked" in before:
                self.length = -2
            else:
                self._give_up(f"neither a length nor chunks: {head[:300]!r}")
                return None
        return data or None

    def _without_framing(self) -> bytes:
        raw, pieces, position = b"".join(self.parts), [], 0
        while True:
            line = raw.index(b"\r\n", position)
            size = int(raw[position:line], 16)
            if size == 0:
                break
            pieces.append(raw[line + 2 : line + 2 + size])
            position = line + 4 + size
        self.run.whole_parts += len(pieces)
        return b"".join(pieces)

    def _complete(self, payload: bytes) -> None:
        run, now = self.run, perf_counter()
        self.busy = False
        if payload != run.good:
            if wrong := run.check(payload):
                self._give_up(wrong)
                return
            run.good = payload
        run.whole += 1
        run.whole_bytes += self.received
        run.completed += 1
        # One that takes longer than the window began before it, and ends after it.
        if now >= run.began:
            run.latencies.append(now - self.sent_at)
            run.first.append(self.first_at - self.sent_at)
        self.send()

    def _give_up(self, reason: str) -> None:
        assert self.transport
        self.busy = False
        self.run.fail(reason)
        self.transport.abort()


def main() -> None:
    """Do jobs until standard input ends."""
    with asyncio.Runner(loop_factory=new_loop) as runner:
        for line in sys.stdin:
            fields: dict[str, Any] = json.loads(line)
            result = runner.run(Run(Job(**fields)).run())
            print(json.dumps(asdict(result)), flush=True)


if __name__ == "__main__":
    main()
