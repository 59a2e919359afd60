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
from pathlib import Path
from typing import Any

from llmkit.engines.vllm import launch, warm

MOST_BYTES = 1 << 20


def main() -> None:
    """Run the program."""
    path, *architectures = sys.argv[1:]
    warm.preload_libraries()
    launch.name_the_cpu_build()
    warm.import_vllm(architectures)
    order = _wait(path)
    if order is None:
        return
    log = os.open(order["log_file"], os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    warm.become(order["environ"])
    if not launch.plan(order["arguments"]):
        sys.exit(1)
    warm.start_fork_server()
    launch.run(order["arguments"])


def _wait(path: str) -> dict[str, Any] | None:
    """Give what is to be done, or None if it is to be nothing."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        connection, _ = listener.accept()
        with contextlib.suppress(OSError):
            Path(path).unlink()
    with connection:
        line = b""
        while not line.endswith(b"\n"):
            part = connection.recv(65536)
            if not part or len(line) > MOST_BYTES:
                return None
            line += part
        order: dict[str, Any] = json.loads(line)
        connection.sendall(b'{"taken": true}\n')
    return order


if __name__ == "__main__":
    main()
