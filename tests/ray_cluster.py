"""A Ray cluster of two nodes on this machine, with Ray Serve: ``python ray_cluster.py FOLDER``.

What it listens at is on 127.0.0.1. Its address, and that of Ray Serve, go to ``FOLDER/cluster.json`` when it is ready.
SIGUSR1 kills the node that is not the head's; SIGUSR2 starts another one. An application of somebody else runs there,
`STRANGER`. It is meant to be run under a guardian, which ends all of its processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import ray
from ray import serve

STRANGER = "somebody-elses"
NODE = (
    "--block",
    "--node-ip-address=127.0.0.1",
    "--num-cpus=3",
    "--memory=4000000000",
    "--object-store-memory=80000000",
    "--disable-usage-stats",
)
PORTS = ("dashboard-agent-grpc-port", "dashboard-agent-listen-port", "metrics-export-port", "runtime-env-agent-port")
NODE_SECONDS = 60.0


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Stranger:
    async def __call__(self) -> str:
        return "still here"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start_node(*options: str) -> subprocess.Popen[bytes]:
    # A node that chooses the ports of its agents by itself gives up where these take 15 s to say what they are.
    ports = [f"--{name}={free_port()}" for name in PORTS]
    command = [str(Path(sys.executable).with_name("ray")), "start", *NODE, *ports, *options]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)


def alive() -> int:
    return sum(node["Alive"] for node in ray.nodes())


def add_node(address: str) -> subprocess.Popen[bytes]:
    """Start a node until one stays: beside busy replicas it may give itself up."""
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
    # Blocked in every thread from here on, so that they wait until they are asked for.
    asked = [signal.SIGUSR1, signal.SIGUSR2]
    gcs, dashboard, port = free_port(), free_port(), free_port()
    address = f"127.0.0.1:{gcs}"
    start_node("--head", f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}")
    signal.pthread_sigmask(signal.SIG_BLOCK, asked)
    ray.init(address, log_to_driver=False)
    other = add_node(address)
    serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
    serve.run(Stranger.bind(), name=STRANGER, route_prefix=f"/{STRANGER}")
    ready = folder / "cluster.new"
    ready.write_text(json.dumps({"pid": os.getpid(), "address": address, "http": f"http://127.0.0.1:{port}"}))
    ready.rename(folder / "cluster.json")
    while True:
        if signal.sigwait(asked) == signal.SIGUSR2:
            other = add_node(address)
        else:
            kill(other)
            while alive() > 1:  # its heartbeats are missed after a while
                time.sleep(0.1)


if __name__ == "__main__":
    main()
