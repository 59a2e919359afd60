"""A program that behaves like vLLM's standby, without vLLM: it becomes ``fake_engine.py``.

.. code-block:: text

    python fake_standby.py [options of its own] SOCKET [ARCHITECTURE ...]

Its output says how far it is: ``importing``, ``ready``, ``connected``.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from pathlib import Path

FAKE_ENGINE = Path(__file__).with_name("fake_engine.py")
LAST_WORDS = "ImportError: the import went wrong"
RUBBISH = {"rubbish": b"HTTP/1.1 400 Bad Request\r\n", "endless-rubbish": bytes(1 << 20), "nothing": b""}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", action="append", default=[], help="an option of the fake engine")
    parser.add_argument("--import-seconds", type=float, default=0.0, help="compute for so long before being ready")
    parser.add_argument(
        "--instead",
        choices=["die-importing", "hang", "plain-file", "datagrams", "die-unheard", "die-told", "silence", *RUBBISH],
        help="what to do in place of becoming an engine",
    )
    parser.add_argument("socket")
    parser.add_argument("architectures", nargs="*")
    return parser.parse_args(arguments)


def say(words: str) -> None:
    print(words, flush=True)


def sleep() -> None:
    while True:
        time.sleep(60)


def die() -> None:
    say(LAST_WORDS)
    sys.exit(1)


def receive(connection: socket.socket) -> bytes:
    """Give the order: one line."""
    line = b""
    while not line.endswith(b"\n"):
        part = connection.recv(65536)
        if not part:
            sys.exit(0)
        line += part
    return line


def main() -> None:
    options = parse(sys.argv[1:])
    say("importing")
    end = time.monotonic() + options.import_seconds
    while time.monotonic() < end:
        pass
    if options.instead == "die-importing":
        die()
    if options.instead == "hang":
        sleep()
    if options.instead == "plain-file":
        Path(options.socket).touch()
        sleep()
    if options.instead == "datagrams":
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
            other.bind(options.socket)
            sleep()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(options.socket)
        listener.listen(1)
        say("ready")
        connection, _ = listener.accept()
        Path(options.socket).unlink()
    say("connected")
    if options.instead == "die-unheard":
        die()
    if options.instead == "silence":
        sleep()
    with connection:
        order = json.loads(receive(connection))
        if options.instead == "die-told":
            die()
        if options.instead in RUBBISH:
            connection.sendall(RUBBISH[options.instead])
            connection.close()
            sleep()
        connection.sendall(b'{"taken": true}\n')
    log = os.open(order["log_file"], os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    command = [sys.executable, str(FAKE_ENGINE), *options.engine, *order["arguments"]]
    os.execvpe(command[0], command, order["environ"])  # noqa: S606  # what it is for


if __name__ == "__main__":
    main()
