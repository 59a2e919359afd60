from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from mock_upstream import MockUpstream
from support import JupyterServer, free_port, wait_until

from llmkit.client import Client, Watcher, connect
from llmkit.client import events as module
from llmkit.errors import ServerNotFound
from llmkit.schemas import Model, Snapshot


@pytest.fixture
def watcher(client: Client) -> Iterator[Watcher]:
    watching = Watcher(client)
    wait_until(lambda: watching.state == "connected", "the first snapshot")
    yield watching
    watching.close()


def status_of(watcher: Watcher, model_id: str) -> str | None:
    models = watcher.snapshot.models if watcher.snapshot else []
    return next((model.status for model in models if model.model_id == model_id), None)


def test_a_change_by_anyone_is_known_within_a_second(
    watcher: Watcher, server: JupyterServer, upstream: MockUpstream
) -> None:
    delays = []

    def expect(status: str | None) -> None:
        started = time.monotonic()
        wait_until(lambda: status_of(watcher, "seen") == status, f"status {status}", 2, 0.005)
        delays.append(time.monotonic() - started)

    kwargs = {"base_url": upstream.base_url}
    fields = {"model_name": "gpt-3", "model_type": "openai", "model_kwargs": kwargs}
    for _ in range(50):
        config_id = server.configure("seen", **fields)
        expect("unloaded")
        server.load(config_id)
        expect("loaded")
        server.request("POST", "llm/unload_model/seen")
        expect("unloaded")
        server.request("DELETE", f"llm/configuration/{config_id}")
        expect(None)
    p99 = statistics.quantiles(delays, n=100)[-1]
    print(f"\na change is known after {p99:.3f} s (p99 of {len(delays)}), {max(delays):.3f} s at most")
    assert p99 <= 1.0


def test_listeners_are_told_and_one_that_fails_harms_no_other(
    watcher: Watcher, client: Client, upstream: MockUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    told = threading.Event()

    def fail(_: Watcher) -> None:
        raise ValueError("broken")

    watcher.subscribe(fail)
    unsubscribe = watcher.subscribe(lambda _: told.set())
    assert told.is_set()  # the first snapshot came before it listened
    told.clear()
    client.configure("seen", "gpt-3", "openai", {"base_url": upstream.base_url})
    assert told.wait(2)
    assert "a listener failed" in caplog.text
    unsubscribe()
    told.clear()
    client.delete("seen")
    wait_until(lambda: status_of(watcher, "seen") is None, "the deletion")
    assert not told.is_set()


def test_closing_ends_the_thread_at_once(client: Client) -> None:
    watching = Watcher(client)
    wait_until(lambda: watching._socket is not None and watching.state == "connected", "the events")
    started = time.monotonic()
    watching.close()
    assert not watching._thread.is_alive()
    assert time.monotonic() - started < 1.0


def test_where_events_do_not_come_through_the_state_is_polled(
    client: Client, upstream: MockUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Watcher, "_open_events", lambda _: None)
    watching = Watcher(client)
    try:
        wait_until(lambda: watching.state == "connected", "the first snapshot")
        client.configure("seen", "gpt-3", "openai", {"base_url": upstream.base_url})
        wait_until(lambda: status_of(watching, "seen") == "unloaded", "the poll", 2)
    finally:
        watching.close()


def test_a_server_that_goes_and_comes_back_is_shown_and_joined_again(unused_port: int) -> None:
    with JupyterServer("server", port=unused_port) as server:
        client = connect(server.url, server.token)
        watching = Watcher(client)
        try:
            wait_until(lambda: watching.state == "connected", "the first snapshot")
            assert watching.snapshot is not None
            epoch = watching.snapshot.epoch
            server.stop()
            wait_until(lambda: watching.state == "reconnecting", "the loss", 3)
            assert isinstance(watching.error, ServerNotFound)
            assert watching.snapshot is not None  # what was known last stays
            server.start()
            wait_until(lambda: watching.state == "connected", "the return", 5)
            assert watching.error is None
            assert watching.snapshot.epoch != epoch
            wait_until(lambda: watching._socket is not None, "the events", 5)
            server.configure("late", model_type="openai", model_name="x")
            wait_until(lambda: status_of(watching, "late") == "unloaded", "an event", 1)
        finally:
            watching.close()
            client.close()


@pytest.fixture
def unused_port() -> int:
    return free_port()


# -- the order of events, without a server -------------------------------------------------------------------------


class Snapshots:
    """Stands for a client: gives the snapshot that the test has set."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.next = snapshot
        self.asked = 0

    def snapshot(self) -> Snapshot:
        self.asked += 1
        return self.next


def model(model_id: str, status: str = "unloaded") -> dict[str, Any]:
    return {"model_id": model_id, "config_id": f"c-{model_id}", "model_name": "n", "model_type": "t", "status": status}


def snapshot(epoch: str, revision: int, *models: dict[str, Any]) -> Snapshot:
    return Snapshot(epoch=epoch, revision=revision, models=[Model.model_validate(one) for one in models])


def event(epoch: str, revision: int, told: dict[str, Any] | None, model_id: str = "") -> bytes:
    import json

    name = told["model_id"] if told else model_id
    data = {"epoch": epoch, "revision": revision, "model_id": name, "model": told, "change": "status"}
    return json.dumps({"schema_id": module.MODEL_EVENT, **data}).encode()


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Watcher:
    """Give a watcher whose thread has ended, to feed it by hand: epoch e, revision 5, one model."""
    monkeypatch.setattr(Watcher, "_run", lambda _: None)
    watching = Watcher(Snapshots(snapshot("e", 5, model("a"))))  # type: ignore[arg-type]
    watching._take_snapshot()
    return watching


def test_newer_events_are_taken_and_older_ones_dropped(quiet: Watcher) -> None:
    quiet._take_event(event("e", 6, model("a", "loading")))
    quiet._take_event(event("e", 4, model("a", "failed")))
    assert status_of(quiet, "a") == "loading"
    # The registry counts a change when it happens and tells it later: two events may carry one revision.
    quiet._take_event(event("e", 6, model("b")))
    assert [one.model_id for one in quiet.snapshot.models] == ["a", "b"]  # type: ignore[union-attr]
    quiet._take_event(event("e", 7, None, "a"))
    assert [one.model_id for one in quiet.snapshot.models] == ["b"]  # type: ignore[union-attr]


def test_a_new_epoch_takes_a_new_snapshot(quiet: Watcher) -> None:
    source: Any = quiet._client
    source.next = snapshot("f", 1, model("z", "loaded"))
    quiet._take_event(event("f", 1, model("y")))
    assert source.asked == 2
    assert [one.model_id for one in quiet.snapshot.models] == ["z"]  # type: ignore[union-attr]


@pytest.mark.parametrize("data", [b"no json", b"[]", b'{"schema_id": "https://events.jupyter.org/kernel"}', b"{}"])
def test_what_is_no_event_of_ours_changes_nothing(quiet: Watcher, data: bytes) -> None:
    before = quiet.snapshot
    quiet._take_event(data)
    assert quiet.snapshot is before


@pytest.mark.parametrize("broken", [{"epoch": "e"}, {"epoch": "e", "revision": 9, "model_id": "a", "model": {"x": 1}}])
def test_an_event_that_cannot_be_read_is_logged_and_left(
    quiet: Watcher, broken: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    import json

    quiet._take_event(json.dumps({"schema_id": module.MODEL_EVENT, **broken}).encode())
    assert "could not be read" in caplog.text
    assert status_of(quiet, "a") == "unloaded"


def test_a_failure_nobody_expected_does_not_end_the_thread(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = client.snapshot
    answers: list[Any] = [ValueError("unexpected"), httpx.InvalidURL("odd")]

    def sometimes() -> Snapshot:
        if answers:
            raise answers.pop(0)
        return ask()

    monkeypatch.setattr(client, "snapshot", sometimes)
    monkeypatch.setattr(module, "LONGEST_PAUSE_SECONDS", 0.05)
    watching = Watcher(client)
    try:
        wait_until(lambda: watching.state == "connected", "the recovery", 5)
    finally:
        watching.close()
