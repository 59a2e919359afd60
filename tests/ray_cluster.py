"""A Ray cluster of two nodes on this machine, with Ray Serve: ``python ray_cluster.py FOLDER``.

Ray's processes listen at every address of the machine; the token of `RayCluster` keeps others out of the cluster. Its
address, and that of Ray Serve, go to ``FOLDER/cluster.json`` when it is ready. SIGUSR1 kills the node that is not the
head's; SIGUSR2 starts another one. An application of somebody else runs there, `STRANGER`. It is meant to be run under
a guardian, which ends all of its processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ray
from ray import serve
from support import free_port

STRANGER = "somebody-elses"
NODE = (
    "--block",
    "--node-ip-address=127.0.0.1",
    "--num-cpus=3",
    "--memory=4000000000",
    "--object-store-memory=80000000",
    "--disable-usage-stats",
)
NODE_SECONDS = 60.0


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Stranger:
    async def __call__(self) -> str:
        return "still here"


def start_node(*options: str) -> subprocess.Popen[bytes]:
    command = [str(Path(sys.executable).with_name("ray")), "start", *NODE, *options]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)


def alive() -> int:
    return sum(node["Alive"] for node in ray.nodes())


def add_node(address: str) -> subprocess.Popen[bytes]:
    """Start a node until one stays: Ray gives it up where its agent takes 15 s to start, as beside busy replicas."""
    there = alive()
    while True:
        node = start_node(f"--address={address}")
        deadline = time.monotonic() + NODE_SECONDS
        while time.monotonic() < deadline and node.poll() is None:
            if alive() > there:
                return node
            time.sleep(0.2)
        kill(node)


def kill(node: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(node.pid, signal.SIGKILL)
    node.wait()


def main() -> None:
    folder = Path(sys.argv[1])
    # Handled, not blocked and waited for: Ray changes what is blocked.
    asked: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda which, _: asked.append(which))
    gcs, dashboard, port = free_port(), free_port(), free_port()
    address = f"127.0.0.1:{gcs}"
    start_node("--head", f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}")
    ray.init(address, log_to_driver=False)
    other = add_node(address)
    serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
    serve.run(Stranger.bind(), name=STRANGER, route_prefix=f"/{STRANGER}")
    ready = folder / "cluster.new"
    ready.write_text(json.dumps({"pid": os.getpid(), "address": address, "http": f"http://127.0.0.1:{port}"}))
    ready.rename(folder / "cluster.json")
    while True:
        if not asked:
            time.sleep(0.1)
        elif asked.pop(0) == signal.SIGUSR2:
            other = add_node(address)
        else:
            kill(other)
            while alive() > 1:  # its heartbeats are missed after a while
                time.sleep(0.1)


if __name__ == "__main__":
    main()
