"""What the program decides that talks to Ray; Ray's libraries are real, and there is no cluster."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Ray's own, as it is imported
]


@pytest.fixture
def program() -> Any:
    from llmkit.engines import ray_application  # not where Ray is not installed

    return ray_application


def details(host: str, *nodes: str, status: str = "HEALTHY") -> dict[str, Any]:
    proxies = {node: {"node_ip": f"10.0.0.{number}", "status": status} for number, node in enumerate(nodes, 1)}
    return {"http_options": {"host": host, "port": 8000}, "proxies": proxies}


@pytest.mark.parametrize(
    ("told", "operator", "url"),
    [
        (details("127.0.0.1", "here", "there"), None, "http://127.0.0.1:8000"),
        (details("0.0.0.0", "there", "here"), None, "http://10.0.0.2:8000"),
        (details("0.0.0.0", "there"), None, "http://10.0.0.1:8000"),
        (details("::1", "here"), None, "http://[::1]:8000"),
        (details("10.9.9.9", "there"), None, "http://10.9.9.9:8000"),
        (details("127.0.0.1", "there"), "http://serve.example/", "http://serve.example"),
    ],
)
def test_ray_serve_is_looked_for_where_it_can_be_reached(
    program: Any, told: dict[str, Any], operator: str | None, url: str
) -> None:
    assert program.address_of(told, "here", operator) == url


@pytest.mark.parametrize("told", [details("127.0.0.1", "there"), details("0.0.0.0", "here", status="UNHEALTHY")])
def test_proxies_that_cannot_be_reached_are_no_address(program: Any, told: dict[str, Any]) -> None:
    with pytest.raises(program.Failed) as caught:
        program.address_of(told, "here", None)
    assert caught.value.args[0] == "unreachable"


def test_only_what_a_dead_server_of_this_home_on_this_host_has_left_is_deleted(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "11-living").mkdir()
    order = {
        "name": "n",
        "owner_mark": "llmkit-mine-",
        "host_mark": "--here-",
        "servers_dir": str(tmp_path),
    }
    dead = "llmkit-mine-m-123456--here-12-dead"
    others = [
        "llmkit-mine-m-123456--here-11-living",
        "llmkit-mine-m-123456",  # kept
        "llmkit-mine-m-123456--there-12-dead",
        "llmkit-other-m-123456--here-12-dead",
        "somebody--here-12-dead",
    ]
    deleted: list[str] = []

    def delete(name: str, *, _blocking: bool) -> None:
        assert not _blocking
        deleted.append(name)

    monkeypatch.setattr(program.serve, "delete", delete)
    program.Application(order, threading.Event()).delete_abandoned(dict.fromkeys([*others, dead]))
    assert deleted == [dead]


def test_objects_in_the_log_of_a_replica_become_words(program: Any, capsys: pytest.CaptureFixture[str]) -> None:
    program._print_line("abc", '{"asctime": "now", "levelname": "ERROR", "message": "Out of it", "more": 1}')
    program._print_line("abc", ":actor_name:x")
    program._print_line("abc", "a line")
    program._print_line("abc", f"{program.MARK}x")
    shown = capsys.readouterr().out.splitlines()
    assert shown == ["[abc] ERROR Out of it", "[abc] a line", f"[abc] {program.MARK}x"]
