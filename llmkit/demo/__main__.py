"""The whole journey without a browser: ``python -m llmkit.demo``.

Starts a real Jupyter server in folders of its own, configures the embedded model, loads it into vLLM, asks it a
question, unloads it, and prints the answer and the seconds of each step. The exit status is 0 if the answer was
right. Nothing is left, however it ends.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmkit.client import Client, connect
from llmkit.client.results import describe_memory
from llmkit.demo import DEMO_MODEL_NAME
from llmkit.errors import LLMKitError, ServerNotFound

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."

START_SECONDS = 60.0
STOP_SECONDS = 30.0
LOG_LINES = 20

# The server ends with the pipe on its standard input, and so with the demo, even one that is killed.
SERVER = """
import os, runpy, signal, threading

def end_with_the_pipe():
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=end_with_the_pipe, daemon=True).start()
runpy.run_module("jupyter_server", run_name="__main__", alter_sys=True)
"""


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


class Server:
    """A Jupyter server with llmkit, which knows nothing of the user's own.

    Parameters
    ----------
    folder
        An empty folder for all that it writes.
    """

    def __init__(self, folder: Path) -> None:
        self._log = folder / "server.log"
        self._runtime = folder / "runtime"
        self._token = secrets.token_hex(16)
        environment = {
            **os.environ,
            "JUPYTER_CONFIG_DIR": str(folder / "config"),
            "JUPYTER_DATA_DIR": str(folder / "data"),
            "JUPYTER_RUNTIME_DIR": str(self._runtime),
            "JUPYTER_TOKEN": self._token,
            "LLMKIT_STATE_DIR": str(folder / "state"),
            "LLMKIT_RUN_DIR": str(folder / "r"),
        }
        options = ["--ip=127.0.0.1", "--port=0", "--no-browser", "--allow-root", f"--ServerApp.root_dir={folder}"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter; no shell
                [sys.executable, "-c", SERVER, *options],
                env=environment,
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the demo, which then ends the server in order
            )

    def connect(self) -> Client:
        """Wait until it answers, and give a client of it.

        Raises
        ------
        ServerNotFound
            If it ends, or does not answer in time.
        """
        information = self._runtime / f"jpserver-{self._process.pid}.json"
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                return connect(json.loads(information.read_text())["url"], self._token)
            except (OSError, ValueError, ServerNotFound):
                time.sleep(0.05)  # not there, not written to its end, or not listening yet
        end = "\n".join(self._log.read_text(errors="replace").splitlines()[-LOG_LINES:])
        raise ServerNotFound("The Jupyter server did not start.", hint=f"The end of its log:\n{end}")

    def stop(self) -> None:
        """End it, and with it every engine."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def journey(folder: Path) -> str:
    """Do every step, and give the answer."""
    server: Server | None = None
    try:
        with timed("start the server"):
            server = Server(folder)
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
