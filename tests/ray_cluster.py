"""A Ray cluster of two nodes on this machine, with Ray Serve: ``python ray_cluster.py FOLDER``.

What it listens at is on 127.0.0.1. Its address, and that of Ray Serve, go to ``FOLDER/cluster.json`` when it is ready.
SIGUSR1 kills the node that is not the head's; SIGUSR2 starts another one. An application of somebody else runs there,
`STRANGER`. It is meant to be run under a guardian, which ends all of its processes.
"""

from __future__ import annotations

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
    command = [str(Path(sys.executable).with_name("ray")), "start", *NODE, *options]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)


def main() -> None:
    folder = Path(sys.argv[1])
    # Blocked in every thread from here on, so that they wait until they are asked for.
    asked = [signal.SIGUSR1, signal.SIGUSR2]
    gcs, dashboard, port = free_port(), free_port(), free_port()
    address = f"127.0.0.1:{gcs}"
    start_node("--head", f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}")
    other = start_node(f"--address={address}")
    signal.pthread_sigmask(signal.SIG_BLOCK, asked)
    ray.init(address, log_to_driver=False)
    while len(ray.nodes()) < 2:
        time.sleep(0.1)
    serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
    serve.run(Stranger.bind(), name=STRANGER, route_prefix=f"/{STRANGER}")
    ready = folder / "cluster.new"
    ready.write_text(json.dumps({"pid": os.getpid(), "address": address, "http": f"http://127.0.0.1:{port}"}))
    ready.rename(folder / "cluster.json")
    while True:
        if signal.sigwait(asked) == signal.SIGUSR2:
            other = start_node(f"--address={address}")
        else:
            os.killpg(other.pid, signal.SIGKILL)
            other.wait()


if __name__ == "__main__":
    main()
