"""The program that has a model on a Ray cluster: ``python -m llmkit.engines.ray_application ORDER``.

The order is a JSON object, made by `llmkit.engines.ray`. The program deploys one Ray Serve application, or finds the
one that is there already, and watches it; what it sees it prints, a line of JSON after `MARK` each time. Lines without
the mark are those of the replicas' logs. SIGTERM ends it, and with it the application, unless that is to be kept.

What needs vLLM is done on the cluster: here are Ray's own libraries alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final

import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.util.state import get_log

from llmkit.engines.ray import MARK

POLL_SECONDS: Final = 0.5
DELETE_SECONDS: Final = 4.5
"""Less than the guardian's patience; Ray goes on with a deletion that was asked for."""
BLIND_SECONDS: Final = 60.0
"""So long may Ray Serve's controller not answer: Ray starts it again by itself."""
INGRESS_CPUS: Final = 0.1
LOG_TRIES: Final = 120
"""One each second: the log of a replica can be had only once its process has imported what it needs."""
LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")
EVERYWHERE: Final = ("0.0.0.0", "::")  # noqa: S104  # what somebody else listens at


class Failed(Exception):
    """The application cannot be had; the first argument is a code of `llmkit.engines.ray`, the second says why."""


def tell(event: str, **more: Any) -> None:
    """Print what is seen."""
    print(MARK + json.dumps({"event": event, **more}), flush=True)


def deploy(order: dict[str, Any]) -> None:
    """Deploy the application. Runs on the cluster, as a task: to build it, Ray imports vLLM."""
    from ray import serve
    from ray.serve.llm import build_openai_app

    replicas = {"min_replicas": order["min"], "initial_replicas": max(order["min"], 1), "max_replicas": order["max"]}
    config = {
        "model_loading_config": {"model_id": order["model_id"], "model_source": order["source"]},
        "engine_kwargs": order["engine_kwargs"],
        "placement_group_config": order["placement_group"],
        "runtime_env": {"env_vars": order["environ"]},
        "deployment_config": {
            "name": order["deployment"],
            "autoscaling_config": {**replicas, "target_ongoing_requests": order["ongoing"]},
            # A configuration that does not work does not work the next time either; but a replica that is to be brought
            # back can be unlucky, on a node that is about to go.
            "max_constructor_retry_count": 3,
            # The relay has ended its requests before it unloads.
            "graceful_shutdown_wait_loop_s": 0.2,
            "graceful_shutdown_timeout_s": 2.0,
            "health_check_period_s": 2.0,
        },
    }
    ingress = {
        "autoscaling_config": {
            "min_replicas": 1,
            "initial_replicas": 1,
            "max_replicas": 2 * order["max"],
            "target_ongoing_requests": order["ongoing"],
        },
        "ray_actor_options": {"num_cpus": order["ingress_cpus"], "runtime_env": {"env_vars": order["environ"]}},
        "graceful_shutdown_wait_loop_s": 0.2,
        "graceful_shutdown_timeout_s": 2.0,
    }
    application = build_openai_app({"llm_configs": [config], "ingress_deployment_config": ingress})
    # The log is for what goes wrong; a line for each request would push that out of its end.
    quiet = {"enable_access_log": False}
    target = serve.RunTarget(
        target=application, name=order["name"], route_prefix=f"/{order['name']}", logging_config=quiet
    )
    serve.run_many([target], wait_for_applications_running=False)


def address_of(details: dict[str, Any], node_id: str, told: str | None) -> str:
    """Give the URL of Ray Serve's proxies.

    Parameters
    ----------
    details
        What the controller says.
    node_id
        The node of the cluster that this program runs on.
    told
        What the operator says; it wins.

    Raises
    ------
    Failed
        If there is no proxy that can be reached from here.
    """
    if told:
        return told.rstrip("/")
    host, port = details["http_options"]["host"], details["http_options"]["port"]
    proxies = {node: one["node_ip"] for node, one in details["proxies"].items() if one["status"] == "HEALTHY"}
    if host in EVERYWHERE and proxies:
        host = proxies.get(node_id) or next(iter(proxies.values()))
    elif host in EVERYWHERE or (host in LOOPBACK and node_id not in proxies):
        raise Failed("unreachable", f"Ray Serve listens at {host} of other nodes; none of its proxies is on this one.")
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Application:
    """One application of Ray Serve, from its deployment to its deletion."""

    def __init__(self, order: dict[str, Any], stop: threading.Event) -> None:
        self._order = order
        self._name: str = order["name"]
        self._stop = stop
        self._followed: set[str] = set()
        self._told: dict[str, Any] | None = None

    # -- the cluster ---------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Connect to the cluster, and see to it that Ray Serve runs there."""
        try:
            ray.init(self._order["address"], log_to_driver=False, namespace="llmkit", logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise Failed("unreachable", _last_line(error)) from error
        signal.signal(signal.SIGTERM, lambda *_: self._stop.set())  # Ray has put its own in its place
        if _get_global_client(raise_if_no_controller_running=False) is None:
            serve.start(http_options={"host": LOOPBACK[0]})

    def details(self) -> dict[str, Any]:
        """Give what Ray Serve's controller knows."""
        told: dict[str, Any] = _get_global_client().get_serve_details()
        return told

    def delete(self, name: str | None = None) -> bool:
        """Delete an application, this one if no other is named; say whether it was seen to be gone."""
        name = name or self._name
        serve.delete(name, _blocking=False)
        deadline = time.monotonic() + DELETE_SECONDS
        while name in self.details()["applications"]:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def delete_abandoned(self, applications: dict[str, Any]) -> None:
        """Delete what servers of this home on this host have left that are gone, and so are their guardians."""
        for name in applications:
            ours, _, server = name.rpartition(self._order["host_mark"])
            is_ours = ours.startswith(self._order["owner_mark"])
            if is_ours and not Path(self._order["servers_dir"], server).exists():
                tell("abandoned", name=name)
                serve.delete(name, _blocking=False)

    # -- the application -----------------------------------------------------------------------------------

    def have(self) -> bool:
        """Deploy it, unless it is there as it was ordered; say whether it was there."""
        applications = self.details()["applications"]
        self.delete_abandoned(applications)
        found = applications.get(self._name)
        if found is not None:
            is_well = found["status"] in ("RUNNING", "DEPLOYING", "UNHEALTHY")
            if is_well and any(name.endswith(self._order["deployment"]) for name in found["deployments"]):
                return True
            self.delete()
        tell("deploying")
        task = ray.remote(num_cpus=0, max_retries=0)(deploy).remote(self._order)
        while not ray.wait([task], timeout=POLL_SECONDS)[0]:
            if self._stop.is_set():
                ray.cancel(task, force=True)
                return False
        try:
            ray.get(task)
        except ray.exceptions.RayError as error:
            raise Failed("deploy_failed", _last_line(error)) from error
        return False

    def watch(self, *, adopted: bool) -> None:
        """Print how it is, until it is gone or this program is to end."""
        ready, seen_at = False, time.monotonic()
        while not self._stop.is_set():
            try:
                details = self.details()
                seen_at = time.monotonic()
            except (ray.exceptions.RayError, serve.exceptions.RayServeException) as error:
                if time.monotonic() - seen_at > BLIND_SECONDS:
                    raise Failed("unreachable", f"Ray Serve does not answer: {_last_line(error)}") from error
                self._stop.wait(POLL_SECONDS)
                continue
            found = details["applications"].get(self._name)
            if found is None or found["status"] == "DELETING":
                raise Failed("gone", "Somebody deleted the application on the cluster.")
            self._look(found)
            if found["status"] == "DEPLOY_FAILED":
                raise Failed("deploy_failed", _message(found))
            if not ready and found["status"] == "RUNNING":
                ready = True
                node = ray.get_runtime_context().get_node_id()
                url = address_of(details, node, self._order["http_url"])
                tell("ready", url=f"{url}/{self._name}", adopted=adopted)
            self._stop.wait(POLL_SECONDS)

    def _look(self, found: dict[str, Any]) -> None:
        deployments = found["deployments"].items()
        models = [one for name, one in deployments if name.endswith(self._order["deployment"])]
        replicas = [replica for one in models for replica in one["replicas"]]
        told = {
            "status": found["status"],
            "running": sum(replica.get("state") == "RUNNING" for replica in replicas),
            "wanted": sum(one["target_num_replicas"] for one in models),
            "placed": sum(replica.get("node_id") is not None for replica in replicas),
            "message": _message(found),
        }
        if told != self._told:
            self._told = told
            tell("state", **told)
        for replica in replicas:
            actor = replica.get("actor_id")
            if actor is not None and replica.get("node_id") is not None and actor not in self._followed:
                self._followed.add(actor)
                for kind in ("out", "err"):
                    threading.Thread(target=_follow, args=(replica["replica_id"], actor, kind), daemon=True).start()

    def end(self) -> None:
        """Delete it, unless it is to be kept."""
        if not self._order["keep"] or Path(self._order["delete_file"]).exists():
            with contextlib.suppress(Exception):  # whatever it is: the cluster could not be asked
                if self.delete():
                    tell("deleted")


def _follow(replica: str, actor: str, kind: str) -> None:
    """Print the log of a replica as it grows; a library of Ray gets it from the cluster's dashboard."""
    why: Exception | None = None
    for _ in range(LOG_TRIES):
        try:
            rest = ""
            for part in get_log(actor_id=actor, suffix=kind, follow=True, errors="replace"):
                *lines, rest = (rest + part).split("\n")
                for line in lines:
                    _print_line(replica, line)
            return
        except Exception as error:  # noqa: BLE001  # a log is not worth an application
            why = error
        time.sleep(1.0)
    if why is not None:
        _print_line(replica, f"The log cannot be read: {_last_line(why)}")


def _print_line(replica: str, line: str) -> None:
    if line.startswith((":job_id:", ":actor_name:")):
        return
    if line.startswith('{"asctime"'):  # Ray's libraries write objects where a person expects words
        with contextlib.suppress(ValueError, KeyError):
            told = json.loads(line)
            line = f"{told['levelname']} {told['message']}"
    print(f"[{replica}] {line}", flush=True)


def _message(found: dict[str, Any]) -> str:
    words = [found.get("message"), *(one.get("message") for one in found["deployments"].values())]
    return "\n".join(dict.fromkeys(word for word in words if word))[-4000:]


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:1000]


def main() -> int:
    """Run the program."""
    order = {**json.loads(sys.argv[1]), "ingress_cpus": INGRESS_CPUS}
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    application = Application(order, stop)
    try:
        application.connect()
        if order["do"] == "delete":
            if application.delete():
                tell("deleted")
            return 0
        tell("connected")
        try:
            adopted = application.have()
            application.watch(adopted=adopted)
        finally:
            application.end()
    except Failed as failed:
        code, message = failed.args
        tell("failed", code=code, message=message)
        return 1
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    # Ray's threads, and those that follow logs, would take their time.
    os._exit(status)
