"""Models on a real Ray cluster of two nodes, with real vLLM: as any other, for whoever uses them.

All of it takes some eleven minutes on two cores.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Self

import httpx
import pytest
from ray_stage import STRANGER, RayCluster
from support import ANSWER, QUESTION, JupyterServer, scaled, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

LOAD_SECONDS = 300.0
END_SECONDS = 40.0
CYCLES = scaled(10)
CLIENTS = 4


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with RayCluster() as running:
        yield running


@pytest.fixture
def serve(cluster: RayCluster) -> Callable[..., JupyterServer]:
    def make(*args: str) -> JupyterServer:
        return JupyterServer(args=[f"--LLMKitApp.ray_address={cluster.address}", *args], env=cluster.environ)

    return make


@pytest.fixture(autouse=True)
def _cluster_is_as_before(cluster: RayCluster) -> Iterator[None]:
    assert cluster.names() == {STRANGER}
    yield
    wait_until(lambda: cluster.names() == {STRANGER}, "no application of ours", END_SECONDS)
    wait_until(lambda: cluster.engines() == [], "no process of a model", END_SECONDS)
    assert cluster.stranger_answers()


def placed(*, replicas: int = 1, keep: bool = False, cpus: float = 1, **engine: Any) -> dict[str, Any]:
    ray = {"replicas": {"min": replicas, "max": replicas}, "resources": {"CPU": cpus}}
    return {"engine": {"placement": {"ray": ray, "keep": keep}, **engine}}


def load(server: JupyterServer, config_id: str) -> list[dict[str, Any]]:
    """Load as our own clients do; give what the model looked like meanwhile."""
    server.request("POST", f"llm/load_model/{config_id}?wait=false")
    seen: list[dict[str, Any]] = []

    def is_over() -> bool:
        seen.append(server.request("GET", "llm/models/demo").json())
        return seen[-1]["status"] != "loading"

    wait_until(is_over, "the end of the load", LOAD_SECONDS, 0.2)
    return seen


def ask(server: JupyterServer) -> str:
    answer = server.request("POST", "llm/inference/", json={"model_id": "demo", "prompt": QUESTION}, timeout=120)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["response"])


def test_a_model_on_the_cluster_is_as_any_other_and_a_kept_one_is_found_again(
    cluster: RayCluster, serve: Callable[..., JupyterServer]
) -> None:
    with serve() as server:
        config_id = server.configure("demo", model_kwargs=placed(keep=True))
        seen = load(server, config_id)
        model = seen[-1]
        assert model["status"] == "loaded", model
        assert "warming" in {one["phase"] for one in seen}  # read off the log of the replica
        assert model["capabilities"]["api"] == "chat"
        assert model["memory"]["reason"] == "runs on the Ray cluster"
        assert ask(server) == ANSWER
        body = {"model": "demo", "messages": [{"role": "user", "content": QUESTION}], "stream": True}
        stream = server.request("POST", "llm/v1/chat/completions", json=body)
        assert stream.text.rstrip().endswith("data: [DONE]")
        assert "Loading weights took" in server.request("GET", "llm/models/demo/logs?tail=300").text
        ours, replicas = cluster.names() - {STRANGER}, cluster.replicas()
        assert len(ours) == len(replicas) == 1
        server.stop(signal.SIGKILL)
        assert server.left_behind() == []
        time.sleep(3)  # a deletion would have been asked for by now
        assert cluster.names() - {STRANGER} == ours
        server.start()
        began = time.monotonic()
        assert load(server, config_id)[-1]["status"] == "loaded"
        print(f"found again in {time.monotonic() - began:.1f} s; the first load took {model['load_seconds']} s")
        assert cluster.replicas() == replicas
        assert ask(server) == ANSWER
        freed = server.request("POST", "llm/unload_model/demo").json()["freed"]
        assert freed["verified"], freed


@pytest.mark.long
def test_what_the_cluster_has_no_room_for_fails_in_words(serve: Callable[..., JupyterServer]) -> None:
    with serve("--LLMKitApp.stall_timeout=40") as server:
        model = load(server, server.configure("demo", model_kwargs=placed(cpus=100)))[-1]
        assert model["status"] == "failed"
        assert model["error"]["code"] == "no_room", model["error"]
        print(model["error"]["message"])


@pytest.mark.long
def test_load_and_unload_again_and_again_and_a_killed_server_leave_nothing(
    cluster: RayCluster, serve: Callable[..., JupyterServer]
) -> None:
    before = cluster.processes()
    with serve() as server:
        config_id = server.configure("demo", model_kwargs=placed())
        for cycle in range(CYCLES):
            if cycle in (0, CYCLES - 1):
                assert load(server, config_id)[-1]["status"] == "loaded"
                assert ask(server) == ANSWER
            else:  # given up under way, sooner or later
                server.request("POST", f"llm/load_model/{config_id}?wait=false")
                wait_until(lambda: len(cluster.names()) == 2, "an application", 120)
                time.sleep(cycle)
            server.request("POST", "llm/unload_model/demo")
            wait_until(lambda: cluster.names() == {STRANGER}, "its end", END_SECONDS)
        wait_until(lambda: cluster.processes() <= before, "as many processes as before", END_SECONDS)
        print(f"{CYCLES} loads and unloads; {before} processes of the cluster before, {cluster.processes()} after")
        server.request("POST", f"llm/load_model/{config_id}?wait=false")
        wait_until(lambda: len(cluster.names()) == 2, "an application", 120)
        server.stop(signal.SIGKILL)
        wait_until(lambda: cluster.names() == {STRANGER}, "the end of the application", END_SECONDS)


class Clients:
    """Ask for streams again and again; what became of each request is in `ends`."""

    def __init__(self, server: JupyterServer) -> None:
        self.ends: list[str] = []
        self._server = server
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(CLIENTS)]

    def _run(self) -> None:
        body = {"model": "demo", "messages": [{"role": "user", "content": QUESTION}], "stream": True}
        headers = {"Authorization": f"token {self._server.token}"}
        with httpx.Client(headers=headers, timeout=200, trust_env=False) as http:
            while not self._over.wait(0.3):
                answer = http.post(f"{self._server.url}llm/v1/chat/completions", json=body)
                self.ends.append(_end(answer))

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(240)
            assert not thread.is_alive()


def _end(answer: httpx.Response) -> str:
    """Say how a request ended: answered, with an error that says what it is, or lost."""
    if answer.status_code != 200:
        return f"error {answer.json()['error']['code']}"
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    if answer.text.rstrip().endswith("data: [DONE]"):
        text = "".join(c["delta"].get("content") or "" for e in events for c in e.get("choices", ()))
        return "answered" if text == ANSWER else f"lost: {text!r}"
    return f"error {events[-1]['error']['code']}" if events and "error" in events[-1] else "lost"


@pytest.mark.long
def test_a_node_that_is_killed_under_load_costs_no_request_its_end(
    cluster: RayCluster, serve: Callable[..., JupyterServer]
) -> None:
    with serve() as server:
        config_id = server.configure("demo", model_kwargs=placed(replicas=2))
        assert load(server, config_id)[-1]["status"] == "loaded"
        assert len(cluster.replicas()) == 2  # each node has room for one

        def model() -> dict[str, Any]:
            told: dict[str, Any] = server.request("GET", "llm/models/demo").json()
            return told

        with Clients(server) as clients:
            wait_until(lambda: len(clients.ends) > 20, "answers", 60)
            cluster.kill_node()
            reason = str(wait_until(lambda: model()["reason"], "a word of the loss", 60))
            before = len(clients.ends)
            wait_until(lambda: len(clients.ends) > before + 20, "answers with one replica", 120)
            cluster.add_node()
            try:
                wait_until(lambda: model()["reason"] is None, "the replica that comes back", LOAD_SECONDS)
            except AssertionError as error:
                error.add_note(server.request("GET", "llm/models/demo/logs?tail=100").text)
                raise
        print(reason, {end: clients.ends.count(end) for end in set(clients.ends)})
        assert "1 of 2 replicas" in reason
        assert model()["status"] == "loaded"
        assert all(end == "answered" or end.startswith("error ") for end in clients.ends)
        assert clients.ends.count("answered") > len(clients.ends) / 2
        assert ask(server) == ANSWER
