"""The whole journey without a browser: ``python -m llmkit.demo``.

Starts a real Jupyter server in folders of its own, configures the embedded model, loads it into vLLM, asks it a
question, unloads it, and prints the answer and the seconds of each step. The exit status is 0 if the answer was
right. Nothing is left, however it ends.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmkit.client.results import describe_memory
from llmkit.client.starting import StartedServer
from llmkit.demo import DEMO_MODEL_NAME
from llmkit.errors import LLMKitError

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."


@contextmanager
def timed(step: str) -> Iterator[list[str]]:
    """Print a step and the seconds that it took; what is put into the list stands beside them."""
    remarks: list[str] = []
    started = time.monotonic()
    print(f"  {step:<22}", end="", flush=True)
    try:
        yield remarks
    except BaseException:
        print(f"{time.monotonic() - started:6.1f} s  failed", flush=True)
        raise
    print(f"{time.monotonic() - started:6.1f} s  {'  '.join(remarks)}".rstrip(), flush=True)


def server_in(folder: Path) -> StartedServer:
    """Start a Jupyter server with llmkit, which knows nothing of the user's own and writes into this folder alone."""
    places = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "LLMKIT_STATE_DIR": "state",
        "LLMKIT_RUN_DIR": "r",
    }
    environ = {variable: str(folder / name) for variable, name in places.items()}
    return StartedServer(f"--ServerApp.root_dir={folder}", environ=environ, cwd=folder)


def journey(folder: Path) -> str:
    """Do every step, and give the answer."""
    server: StartedServer | None = None
    try:
        with timed("start the server"):
            server = server_in(folder)
            client = server.connect()
        with client:
            with timed("configure the model"):
                client.configure("demo", DEMO_MODEL_NAME, "vllm")
            with timed("load it into vLLM"):
                client.load("demo", progress=False)
            with timed("ask"):
                answer = client.prompt("demo", QUESTION)
            with timed("unload it") as remarks:
                if freed := describe_memory(client.unload("demo")):
                    remarks.append(f"freed {freed}")
    finally:
        if server is not None:
            with timed("stop the server"):
                server.stop()
    return str(answer)


def main() -> int:
    """Run the program."""
    # SIGTERM unwinds like any other end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    print("A Jupyter server, a real vLLM engine, one question:\n")
    # Short, and not under TMPDIR, which can be long: the path of a unix socket ends at 107 bytes.
    home = "/tmp" if os.name == "posix" else None  # noqa: S108
    try:
        with tempfile.TemporaryDirectory(prefix="lk-", dir=home, ignore_cleanup_errors=True) as folder:
            answer = journey(Path(folder))
    except LLMKitError as error:
        print("", error, *getattr(error, "__notes__", []), sep="\n", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    print(f"\n  Question:  {QUESTION}\n  Answer:    {answer}\n")
    if answer != ANSWER:
        print(f"  Expected:  {ANSWER}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
