"""The program that has vLLM imported and waits: ``python -m llmkit.engines.vllm.standby SOCKET [ARCHITECTURE ...]``.

Once it listens at the socket it is ready. Who connects sends one line of JSON with ``arguments``, ``environ`` and
``log_file``, gets ``{"taken": true}`` back, and from then on this process is the engine that ``launch`` with these
arguments would have been. If the connection ends without a line, the program ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmkit.engines.vllm import launch, warm
from llmkit.engines.vllm.launcher import TAKEN

MOST_BYTES = 1 << 20


def main() -> None:
    """Run the program."""
    path, *architectures = sys.argv[1:]
    warm.preload_libraries()
    launch.name_the_cpu_build()
    before = dict(os.environ)
    warm.import_vllm(architectures)
    # What imports have set is set in an engine as well.
    imported = {name: value for name, value in os.environ.items() if before.get(name) != value}
    connection, order = _wait(path)
    if order is None:
        return
    with connection, _output_to(order["log_file"]) as files:
        warm.become({**order["environ"], **imported})
        # Its output is that of all its children; and it must not hold the connection.
        warm.start_fork_server(not_to_keep=[connection.fileno(), *files])
        connection.sendall(TAKEN)
    if not launch.plan(order["arguments"]):
        sys.exit(1)
    launch.run(order["arguments"])


@contextlib.contextmanager
def _output_to(log_file: str) -> Iterator[list[int]]:
    """Write to a log from here on, unless the block fails: its error is to be read in the standby's own.

    Gives the files that are open for that, and closed after it.
    """
    before = [os.dup(number) for number in (1, 2)]
    log = os.open(log_file, os.O_WRONLY | os.O_APPEND)
    try:
        for number in (1, 2):
            os.dup2(log, number)
        yield [log, *before]
    except BaseException:
        for number, file in zip((1, 2), before, strict=True):
            os.dup2(file, number)
        raise
    finally:
        for file in (log, *before):
            os.close(file)


def _wait(path: str) -> tuple[socket.socket, dict[str, Any] | None]:
    """Give who has connected, and what is to be done, or None if it is to be nothing."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        connection, _ = listener.accept()
        with contextlib.suppress(OSError):
            Path(path).unlink()
    line = b""
    while not line.endswith(b"\n"):
        part = connection.recv(65536)
        if not part or len(line) > MOST_BYTES:
            return connection, None
        line += part
    return connection, json.loads(line)


if __name__ == "__main__":
    main()
